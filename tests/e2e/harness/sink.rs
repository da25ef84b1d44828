//! A next hop that records the mails it receives and answers as the test wants.
//!
//! Contract: each connection has its own thread. A mail is recorded when its request has been read
//! completely, before the answer is sent.

use std::fmt;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use super::client::Stream;
use super::mail::{Mail, netstring, split};
use super::record::{Gate, PATIENCE, Record};
use super::target::{Listener, Target};

/// The sink's reaction to a complete request.
#[derive(Debug, Clone)]
pub enum Reply {
    /// Sends this text as a netstring, such as `Kok`.
    Text(String),
    /// Sends these bytes as they are.
    Raw(Vec<u8>),
    /// Closes the connection without an answer.
    Close,
    /// Sends nothing, and waits until the peer gives up.
    Silence,
}

impl Reply {
    /// Returns a well-formed reply with this status letter and text.
    pub fn text(text: &str) -> Self {
        Self::Text(text.into())
    }
}

/// The sink's treatment of a connection.
#[derive(Clone)]
pub enum Behaviour {
    /// Reads the request, records the mail, and answers.
    Answer(Arc<dyn Fn(&Mail) -> Reply + Send + Sync>),
    /// Writes these bytes at once, then reads to the end of the connection.
    Early(Vec<u8>),
    /// Reads this number of bytes, writes these bytes, and closes with the rest unread.
    Abort(usize, Vec<u8>),
    /// Never reads anything, and waits until the peer gives up.
    Deaf,
}

impl fmt::Debug for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Answer(_) => "Answer",
            Self::Early(_) => "Early",
            Self::Abort(..) => "Abort",
            Self::Deaf => "Deaf",
        })
    }
}

/// State shared by the threads of all connections.
#[derive(Debug)]
struct Shared {
    mails: Record<Mail>,
    behaviour: Behaviour,
}

/// A running next hop, which ends when it is dropped.
#[derive(Debug)]
pub struct Sink {
    listener: Arc<Listener>,
    address: Target,
    shared: Arc<Shared>,
}

impl Sink {
    /// Listens at `address` and treats every connection with `behaviour`.
    pub fn start(address: impl Into<Target>, behaviour: Behaviour) -> Self {
        let address = address.into();
        let listener = match address.listen() {
            Ok(listener) => Arc::new(listener),
            Err(error) => panic!("listen on {address}: {error}"),
        };
        Self::serve(listener, address, behaviour)
    }

    /// Listens on a free port of 127.0.0.1.
    pub fn tcp(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind port 0");
        let address = listener.local_addr().expect("local address").into();
        Self::serve(Arc::new(Listener::Tcp(listener)), address, behaviour)
    }

    /// Listens at `address` and answers every mail with `text`, such as `Kok`.
    pub fn answering(address: impl Into<Target>, text: &str) -> Self {
        let text = text.to_owned();
        Self::start(address, answer(move |_| Reply::Text(text.clone())))
    }

    /// Listens at `address` and answers every mail with `Kok`, but not before the gate is open.
    pub fn gated(address: impl Into<Target>) -> (Self, Arc<Gate>) {
        let gate = Arc::new(Gate::default());
        let held = gate.clone();
        let behaviour = answer(move |_| {
            held.pass();
            Reply::text("Kok")
        });
        (Self::start(address, behaviour), gate)
    }

    fn serve(listener: Arc<Listener>, address: Target, behaviour: Behaviour) -> Self {
        let shared = Arc::new(Shared { mails: Record::default(), behaviour });
        let (accepting, serving) = (listener.clone(), shared.clone());
        std::thread::spawn(move || {
            while let Ok(stream) = accepting.accept() {
                let shared = serving.clone();
                std::thread::spawn(move || connection(stream, &shared));
            }
        });
        Self { listener, address, shared }
    }

    /// Returns the address on which the sink listens.
    pub fn address(&self) -> &Target {
        &self.address
    }

    /// Returns all mails so far.
    pub fn mails(&self) -> Vec<Mail> {
        self.shared.mails.all()
    }

    /// Returns the record of mails, for waiting.
    pub fn record(&self) -> &Record<Mail> {
        &self.shared.mails
    }

    /// Returns the only mail, and fails if there are more or none.
    #[track_caller]
    pub fn only(&self) -> Mail {
        let mut mails = self.mails();
        assert_eq!(mails.len(), 1, "mails in the sink: {mails:?}");
        mails.remove(0)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.listener.stop();
    }
}

/// Returns the behaviour that reads a request, records the mail, and answers with the result of
/// `reply`.
pub fn answer(reply: impl Fn(&Mail) -> Reply + Send + Sync + 'static) -> Behaviour {
    Behaviour::Answer(Arc::new(reply))
}

fn connection(mut stream: Stream, shared: &Shared) {
    stream.set_read_timeout(3 * PATIENCE);
    match &shared.behaviour {
        Behaviour::Answer(reply) => {
            let Some(mail) = read_request(&mut stream) else { return };
            shared.mails.push(mail.clone());
            match reply(&mail) {
                Reply::Text(text) => drop(stream.write_all(&netstring(text.as_bytes()))),
                Reply::Raw(bytes) => drop(stream.write_all(&bytes)),
                Reply::Close => {}
                Reply::Silence => wait_for_end(&mut stream),
            }
        }
        Behaviour::Early(bytes) => {
            drop(stream.write_all(bytes));
            stream.shutdown(Shutdown::Write);
            wait_for_end(&mut stream);
        }
        Behaviour::Abort(count, bytes) => {
            let mut sink = vec![0; *count];
            drop(stream.read_exact(&mut sink));
            drop(stream.write_all(bytes));
        }
        Behaviour::Deaf => wait_for_hangup(&stream),
    }
}

fn wait_for_end(stream: &mut Stream) {
    let mut chunk = [0; 65_536];
    while matches!(stream.read(&mut chunk), Ok(1..)) {}
}

/// Waits until the peer closes the connection, without reading what the peer has sent.
fn wait_for_hangup(stream: &Stream) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let fd = match stream {
        Stream::Unix(stream) => stream.as_fd(),
        Stream::Tcp(stream) => stream.as_fd(),
    };
    let timeout = PollTimeout::try_from(3 * PATIENCE).expect("fits");
    let _ =
        poll(&mut [PollFd::new(fd, PollFlags::from_bits_retain(nix::libc::POLLRDHUP))], timeout);
}

/// Reads one request, without waiting until the peer closes.
fn read_request(stream: &mut Stream) -> Option<Mail> {
    let mut input = Vec::new();
    let mut chunk = vec![0; 65_536];
    loop {
        match stream.read(&mut chunk) {
            Ok(count @ 1..) => input.extend_from_slice(&chunk[..count]),
            _ => return None,
        }
        if let Some((payload, _)) = split(&input) {
            return Mail::parse(payload);
        }
    }
}

/// Returns the behaviour of a slow next hop, which pauses before every answer. The pause is the
/// behaviour under test, not a wait for a condition.
pub fn slowly(pause: Duration, text: &str) -> Behaviour {
    let text = text.to_owned();
    answer(move |_| {
        std::thread::sleep(pause);
        Reply::Text(text.clone())
    })
}
