//! `qrelay sink`: a QMQP server that shows or stores the mails it gets.
//!
//! Contract: the embedded next hop for trying things out. One thread per connection; `K` is sent
//! only after the mail is stored. With `--answer Z` or `D` every mail is refused and none is
//! stored. Each mail is also one line on stderr.
//!
//! # Failure
//! A mail that can't be stored is answered `Z`, with the cause on stderr. A client that breaks the
//! protocol is answered as by the daemon. Failing to listen ends the command with 71.

use std::fmt;
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

use crate::client::store::{Mail, Store};
use crate::client::stream::{Listener, Stream};

/// Largest message in bytes: what `max_size` can be at most, and room for inserted header lines.
const LIMITS: Limits = Limits { max_size: (1 << 30) + (1 << 16) };
/// Longest silence of a client.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a client may go on sending after an early reply (as the daemon does).
const LINGER: Duration = Duration::from_secs(2);
/// Pause after a failed accept, which would otherwise fail again at once (out of descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What `qrelay sink` is asked to do.
#[derive(Debug, Clone)]
pub struct SinkOptions {
    /// Where to listen.
    pub listen: Endpoint,
    /// What every mail gets.
    pub answer: Status,
    /// A directory (one file per mail) or a file (appended to); stdout if absent.
    pub output: Option<PathBuf>,
}

/// Why the sink can't run.
#[derive(Debug, Error)]
pub enum SinkError {
    /// The socket can't be had.
    #[error("can't listen on {at}: {cause}")]
    Listen {
        /// The address.
        at: Endpoint,
        /// The system's reason.
        #[source]
        cause: io::Error,
    },
    /// The output can't be had.
    #[error("can't open {path}: {cause}")]
    Output {
        /// As given.
        path: PathBuf,
        /// The system's reason.
        #[source]
        cause: io::Error,
    },
    /// Signals or threads can't be had.
    #[error("{0}")]
    System(#[source] io::Error),
}

/// Runs the command until SIGINT or SIGTERM, with the process' own stdout and stderr.
pub fn run(options: &SinkOptions) -> Exit {
    match serve(options) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("qrelay sink: {error}");
            Exit::System
        }
    }
}

/// What every connection needs.
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
    say(format_args!("listening on {}", options.listen));
    let sink = Arc::new(Sink { store, answer: options.answer });
    loop {
        accept(&listener, &sink);
    }
}

/// One line on stderr; nobody reading it is no reason to stop.
fn say(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "qrelay sink: {text}");
}

/// On SIGINT and SIGTERM a thread removes the socket file and ends the process: mails in work have
/// no answer yet, so nothing is lost.
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
        // If no thread can be had, the connection closes unanswered, and its client tries again.
        std::thread::Builder::new().name("client".into()).spawn(move || sink.connection(stream))
    });
    if let Err(error) = result {
        say(format_args!("a connection failed: {error}"));
        std::thread::sleep(ACCEPT_PAUSE);
    }
}

/// What a connection brought.
enum Received {
    /// All of a request.
    Request(Vec<u8>),
    /// Something that can't become one.
    Refused(Reply),
    /// The client left or fell silent.
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
                    say(format_args!("can't store a mail: {error}"));
                    Reply::temporary("can't store the mail")
                }
            },
            Status::Temporary => Reply::temporary("not now"),
            Status::Permanent => Reply::permanent("refused"),
        };
        say(format_args!(
            "{} from=<{}> recipients={} bytes={}",
            char::from(reply.status.code()),
            escape_for_log(mail.sender),
            mail.recipients.len(),
            mail.message.len()
        ));
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

/// Reads and drops what still comes: closing with unread data would take the reply away.
fn linger(stream: &mut Stream) {
    let deadline = Instant::now() + LINGER;
    let mut chunk = [0; 65_536];
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        if stream.set_timeout(left).is_err() || !matches!(stream.read(&mut chunk), Ok(1..)) {
            return;
        }
    }
}
