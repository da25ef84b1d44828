//! The commands that talk to the daemon over its control socket: `status`, `mails`, `reload` and
//! `stop`.
//!
//! # Failure
//! Without a daemon, or without an answer that makes sense, a command prints one line that says
//! what to do, and ends with an exit status of its own kind ([`Failure::exit`]).

mod mails;
mod screen;
pub mod status;

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use qrelay_shared::address::printable;
use qrelay_shared::admin::{Answer, Body, Command, Request, VERSION};
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::exit::Exit;
use qrelay_shared::system_error::shown;
use thiserror::Error;

use crate::client::stream::Stream;
use crate::output::print;

/// How long the daemon may take for an answer that doesn't wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Longest time limit, for an answer that waits for mails or for a script.
const AGES: Duration = Duration::from_secs(365 * 24 * 3600);

/// Longest line that is taken from a daemon, in bytes.
const LINE_MAX: u64 = 64 << 20;

/// A command and its options.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Verb {
    /// Show the state of the daemon on one screen.
    #[command(after_help = "Exit status: 0 serving, 1 starting or stopping, 3 not running, \
        4 no permission.")]
    Status {
        /// Print a JSON object (docs/status.md).
        #[arg(long)]
        json: bool,
        /// Show it again every second, until interrupted.
        #[arg(long)]
        watch: bool,
    },
    /// List the mails in flight: where they came from, what they wait for.
    Mails {
        /// Print a JSON object for each mail (docs/status.md).
        #[arg(long)]
        json: bool,
    },
    /// Load the configuration anew, and wait until it serves or is refused.
    #[command(after_help = "Exit status: 0 the new configuration serves, 1 it is refused and the \
        old one serves on, 3 not running, 4 no permission.")]
    Reload,
    /// Stop the daemon, and wait until it has finished the mails in flight.
    #[command(after_help = "Exit status: 0 stopped, 3 not running, 4 no permission.")]
    Stop {
        /// Give up the mails in flight; their clients are told to try again.
        #[arg(long)]
        now: bool,
    },
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum Failure {
    /// No daemon listens.
    #[error(
        "qrelay isn't running, or has another control socket than {} (--control): {cause}",
        path.display()
    )]
    NotRunning {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// Only root and the daemon's user may ask.
    #[error(
        "no permission to use {}: run the command as root or as the daemon's user", .0.display()
    )]
    NoPermission(PathBuf),
    /// The daemon has refused the request.
    #[error("the daemon refuses: {0}")]
    Refused(String),
    /// The daemon is of another version.
    #[error(
        "the daemon speaks version {0} of the protocol, not {VERSION}: use the qrelay that runs"
    )]
    OtherVersion(u32),
    /// The daemon closed the connection.
    #[error("the daemon has closed the connection: see its log")]
    Closed,
    /// The connection broke.
    #[error("no answer from the daemon: {0}")]
    Broken(#[source] io::Error),
    /// What listens is no qrelay.
    #[error("what listens on {} is no qrelay, or one of another version: {cause}", path.display())]
    Nonsense { path: PathBuf, cause: String },
}

impl Failure {
    /// Returns the exit status for this failure.
    pub fn exit(&self) -> Exit {
        match self {
            Self::NotRunning { .. } => Exit::NotRunning,
            Self::NoPermission(_) => Exit::NoPermission,
            Self::Refused(_) => Exit::Refused,
            Self::OtherVersion(_) | Self::Nonsense { .. } => Exit::Protocol,
            Self::Closed | Self::Broken(_) => Exit::Temporary,
        }
    }
}

/// A connection to the daemon.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<Stream>,
    path: PathBuf,
}

impl Connection {
    /// Connects to the control socket at `path`.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let path = path.to_owned();
        let stream = match Stream::connect(&Endpoint::Path(path.clone()), PATIENCE) {
            Ok(stream) => stream,
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                return Err(Failure::NoPermission(path));
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(Failure::Broken(error));
            }
            Err(cause) => return Err(Failure::NotRunning { path, cause }),
        };
        Ok(Self { stream: BufReader::new(stream), path })
    }

    /// Sends a request.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn ask(&mut self, command: Command) -> Result<(), Failure> {
        let request = Request { version: VERSION, command };
        let mut line = serde_json::to_string(&request)
            .map_err(|error| Failure::Broken(io::Error::other(error)))?;
        line.push('\n');
        let stream = self.stream.get_mut();
        stream.set_timeout(PATIENCE).map_err(Failure::Broken)?;
        // A daemon that refuses this client may have closed the connection, and its reason is read.
        let _ = stream.write_all(line.as_bytes());
        Ok(())
    }

    /// Waits for a line of the daemon, for at most `limit` if one is given.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn line(&mut self, limit: Option<Duration>) -> Result<String, Failure> {
        self.stream.get_ref().set_timeout(limit.unwrap_or(AGES)).map_err(Failure::Broken)?;
        let mut line = String::new();
        match io::Read::take(&mut self.stream, LINE_MAX).read_line(&mut line) {
            Ok(0) => Err(Failure::Closed),
            Ok(_) => Ok(line),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Err(Failure::Closed),
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                Err(Failure::Nonsense { path: self.path.clone(), cause: error.to_string() })
            }
            // The system's word for the end of a time limit says nothing to a person.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                Err(Failure::Broken(ErrorKind::TimedOut.into()))
            }
            Err(error) => Err(Failure::Broken(error)),
        }
    }

    /// Waits for an answer, for at most `limit` if one is given.
    ///
    /// # Errors
    /// See [`Failure`]. An error that the daemon answers is a failure, too.
    pub fn answer(&mut self, limit: Option<Duration>) -> Result<Body, Failure> {
        let line = self.line(limit)?;
        self.parse(&line)
    }

    fn parse(&self, line: &str) -> Result<Body, Failure> {
        let nonsense = |error: serde_json::Error| Failure::Nonsense {
            path: self.path.clone(),
            cause: error.to_string(),
        };
        let value: serde_json::Value = serde_json::from_str(line).map_err(nonsense)?;
        if let Some(message) = value.pointer("/error/message").and_then(|text| text.as_str()) {
            return Err(Failure::Refused(printable(message.as_bytes()).into_owned()));
        }
        match value.get("version").and_then(serde_json::Value::as_u64) {
            Some(version) if version != u64::from(VERSION) => {
                return Err(Failure::OtherVersion(version as u32));
            }
            _ => {}
        }
        serde_json::from_value(value).map(|answer: Answer| answer.body).map_err(nonsense)
    }

    /// Returns the failure for an answer that doesn't fit the question.
    pub fn unexpected(&self, body: &Body) -> Failure {
        Failure::Nonsense { path: self.path.clone(), cause: format!("it answered {body:?}") }
    }
}

/// Runs a command that talks to the daemon at `path`.
pub fn run(verb: &Verb, path: &Path) -> Exit {
    let outcome = match verb {
        Verb::Status { json: true, watch: false } => status::print_json(path),
        Verb::Status { json, watch: true } => status::watch(path, *json),
        Verb::Status { json: false, watch: false } => status::show(path),
        Verb::Mails { json } => mails::list(path, *json),
        Verb::Reload => reload(path),
        Verb::Stop { now } => stop(path, *now),
    };
    outcome.unwrap_or_else(|failure| {
        eprintln!("qrelay: {}", shown(&failure));
        failure.exit()
    })
}

fn reload(path: &Path) -> Result<Exit, Failure> {
    let mut connection = Connection::open(path)?;
    connection.ask(Command::Reload)?;
    match connection.answer(None)? {
        Body::Reload(load) => match load.failure {
            None => Ok(print(&format!("generation {} serves\n", load.generation))),
            Some(message) => {
                let hint = if load.may_pass { "; trying again may help" } else { "" };
                let message = printable(message.as_bytes());
                eprintln!("qrelay: the old configuration serves on: {message}{hint}");
                Ok(Exit::Refused)
            }
        },
        body => Err(connection.unexpected(&body)),
    }
}

fn stop(path: &Path, now: bool) -> Result<Exit, Failure> {
    let mut connection = Connection::open(path)?;
    connection.ask(Command::Stop { now })?;
    match connection.answer(Some(PATIENCE))? {
        Body::Stopping { in_flight: 0 } => {}
        Body::Stopping { in_flight } => {
            eprintln!("qrelay: waiting for the mails in flight: {in_flight}");
        }
        body => return Err(connection.unexpected(&body)),
    }
    match connection.answer(None) {
        Ok(Body::Stopped {}) => Ok(print("stopped\n")),
        Ok(body) => Err(connection.unexpected(&body)),
        Err(failure) => Err(failure),
    }
}
