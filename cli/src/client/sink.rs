//! `qrelay sink`: a QMQP server that shows or stores the mails it gets.
//!
//! Contract: a next hop for trying things out, with one thread per connection. `K` is sent only
//! after the mail is stored. With `--answer Z` or `D` every mail is refused and none is stored.
//! Each mail is also reported by one line on stderr.
//!
//! # Failure
//! A mail that can't be stored is answered with `Z`, and the cause is printed on stderr. A client
//! that breaks the protocol gets the same answer as from the daemon. If listening fails, the
//! command ends with exit status 71.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use qrelay_shared::address::escape_for_log;
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::exit::Exit;
use qrelay_shared::qmqp::{self, Limits, Progress, Reply, Status};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use thiserror::Error;

use crate::client::say;
use crate::client::store::{Mail, Store};
use crate::client::stream::{Listener, Stream};

/// Largest message in bytes: the highest `max_size` of a daemon, and room for the header lines that
/// the daemon inserts.
const LIMITS: Limits<'_> = Limits { max_size: (1 << 30) + (1 << 16), default_domain: None };
/// Longest wait for the next bytes of a client.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time that a client may go on sending after an early reply; the daemon allows the same.
const LINGER: Duration = Duration::from_secs(2);
/// Pause after a failed accept. Without a pause the next accept would fail again at once, because
/// the usual cause is a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Options of `qrelay sink`.
#[derive(Debug, Clone)]
pub struct SinkOptions {
    /// Address to listen on.
    pub listen: Endpoint,
    /// Status of the answer to every mail.
    pub answer: Status,
    /// A directory (one file per mail) or a file (appended to); `None` means stdout.
    pub output: Option<PathBuf>,
}

/// Why the sink can't run.
#[derive(Debug, Error)]
pub enum SinkError {
    /// Binding the socket failed.
    #[error("can't listen on {at}: {cause}")]
    Listen {
        at: Endpoint,
        #[source]
        cause: io::Error,
    },
    /// Opening the output failed.
    #[error("can't open {path}: {cause}")]
    Output {
        /// The path as given on the command line, or `stdout`.
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// The signal handler or its thread could not be set up.
    #[error("{0}")]
    System(#[source] io::Error),
}

/// Runs the command on the stdout and stderr of this process until SIGINT or SIGTERM.
pub fn run(options: &SinkOptions) -> Exit {
    match serve(options) {
        Ok(never) => match never {},
        Err(error) => {
            say("sink", &error);
            Exit::System
        }
    }
}

/// State shared by the threads of all connections.
struct Sink {
    store: Store,
    answer: Status,
}

fn serve(options: &SinkOptions) -> Result<std::convert::Infallible, SinkError> {
    let output = options.output.as_deref();
    let store = Store::open(output).map_err(|cause| SinkError::Output {
        path: output.unwrap_or("stdout".as_ref()).to_owned(),
        cause,
    })?;
    let listener = Listener::bind(&options.listen)
        .map_err(|cause| SinkError::Listen { at: options.listen.clone(), cause })?;
    end_on_signal(&options.listen).map_err(SinkError::System)?;
    say("sink", &format_args!("listening on {}", options.listen));
    let sink = Arc::new(Sink { store, answer: options.answer });
    loop {
        accept(&listener, &sink);
    }
}

/// Starts a thread that removes the socket file and ends the process on SIGINT or SIGTERM. Mails in
/// work are not lost by that, because they have no answer yet.
fn end_on_signal(listen: &Endpoint) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let path = match listen {
        Endpoint::Path(path) => Some(path.clone()),
        Endpoint::Inet(_) | Endpoint::Abstract(_) => None,
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if signals.forever().next().is_some() {
            path.map(std::fs::remove_file);
            std::process::exit(Exit::Success as i32);
        }
    })?;
    Ok(())
}

fn accept(listener: &Listener, sink: &Arc<Sink>) {
    let result = listener.accept().and_then(|stream| {
        let sink = sink.clone();
        // If no thread can be started, the connection closes unanswered, and its client tries
        // again.
        std::thread::Builder::new().name("client".into()).spawn(move || sink.connection(stream))
    });
    if let Err(error) = result {
        say("sink", &format_args!("a connection failed: {error}"));
        std::thread::sleep(ACCEPT_PAUSE);
    }
}

/// Result of reading from a connection.
enum Received {
    /// A complete request.
    Request(Vec<u8>),
    /// Bytes that can't become a request, and the reply to them.
    Refused(Reply),
    /// The client closed the connection or was silent for too long.
    Nothing,
}

impl Sink {
    fn connection(&self, mut stream: Stream) {
        let reply = match receive(&mut stream) {
            Received::Request(request) => self.judge(&request),
            Received::Refused(reply) => reply,
            Received::Nothing => return,
        };
        if stream.write_all(&reply.encode()).and_then(|()| stream.finish()).is_ok() {
            linger(&mut stream);
        }
    }

    fn judge(&self, request: &[u8]) -> Reply {
        match qmqp::parse(request, &LIMITS) {
            Ok(found) => {
                let recipients: Vec<_> =
                    found.recipients.iter().map(|range| &request[range.clone()]).collect();
                self.take(&Mail {
                    message: &request[found.message],
                    sender: &request[found.sender],
                    recipients: &recipients,
                })
            }
            Err(error) => refusal(error),
        }
    }

    fn take(&self, mail: &Mail<'_>) -> Reply {
        let reply = match self.answer {
            Status::Accepted => match self.store.put(mail) {
                Ok(()) => Reply::accepted("ok"),
                Err(error) => {
                    say("sink", &format_args!("can't store a mail: {error}"));
                    Reply::temporary("can't store the mail")
                }
            },
            Status::Temporary => Reply::temporary("not now"),
            Status::Permanent => Reply::permanent("refused"),
        };
        say(
            "sink",
            &format_args!(
                "{} from=<{}> recipients={} bytes={}",
                char::from(reply.status.code()),
                escape_for_log(mail.sender),
                mail.recipients.len(),
                mail.message.len()
            ),
        );
        reply
    }
}

fn refusal(error: qmqp::RequestError) -> Reply {
    Reply::permanent(error.reply_text())
}

fn receive(stream: &mut Stream) -> Received {
    let mut input = Vec::new();
    let mut chunk = [0; 65_536];
    if stream.set_timeout(CLIENT_TIMEOUT).is_err() {
        return Received::Nothing;
    }
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return Received::Nothing,
            Ok(count) => input.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return Received::Nothing,
        }
        match qmqp::progress(&input, &LIMITS) {
            Ok(Progress::NeedMore { .. }) => {}
            Ok(Progress::Complete { .. }) => return Received::Request(input),
            Err(error) => return Received::Refused(refusal(error)),
        }
    }
}

/// Reads and drops what the client still sends, because closing a socket with unread data would
/// reset the connection and take the reply away.
fn linger(stream: &mut Stream) {
    let deadline = Instant::now() + LINGER;
    let mut chunk = [0; 65_536];
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        if stream.set_timeout(left).is_err() || !matches!(stream.read(&mut chunk), Ok(1..)) {
            return;
        }
    }
}
