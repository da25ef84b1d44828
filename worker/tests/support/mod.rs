//! The tools of the tests of scripts: a script in a temporary directory, a log that can be read,
//! and mails.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::{JobId, ListenerId};
use qrelay_shared::ipc::message::{Peer, mail_id};
use qrelay_shared::qmqp;
use qrelay_shared::settings::Declaration;
use qrelay_shared::sys::rights::{PeerSocket, Rights};
use qrelay_worker::client::socket::ClientSocket;
use qrelay_worker::lua::config::ConfigError;
use qrelay_worker::lua::state::{LoadOptions, Purpose, State};
use qrelay_worker::mail::{Mail, Origin};
use qrelay_worker::session::script::Decision;
use slog::{Drain, KV as _, Logger, OwnedKVList, Record, Serializer};

/// Held while a script loads, because loading changes the working directory of the process.
static LOADING: Mutex<()> = Mutex::new(());

/// A loaded script with its declaration and its log.
pub struct Script {
    pub state: Arc<State>,
    pub declaration: Declaration,
    log: Arc<Mutex<String>>,
    _directory: tempfile::TempDir,
}

/// Options for loading a script.
#[derive(Default)]
pub struct Options {
    pub reload: bool,
    pub systemd: Vec<String>,
}

impl Script {
    /// Loads a script, and panics with the error if that fails.
    pub fn load(source: &str) -> Self {
        match Self::load_with(source, Options::default()).0 {
            Ok(script) => script,
            Err(error) => panic!("{error}"),
        }
    }

    /// Loads a script. The second value is the log, which is also there if loading fails.
    pub fn load_with(source: &str, options: Options) -> (Result<Self, ConfigError>, String) {
        let _one = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = tempfile::tempdir().expect("a temporary directory");
        let config = directory.path().join("config.lua");
        std::fs::write(&config, source).expect("the script is written");
        let log = Arc::new(Mutex::new(String::new()));
        let logger = Logger::root(Lines(Arc::clone(&log)), slog::o!());
        let Options { reload, systemd } = options;
        let loaded = State::load(LoadOptions {
            config,
            reload,
            systemd: Some(systemd),
            purpose: Purpose::Serve,
            logger,
            dictionaries: None,
        });
        let text = log.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let script = loaded.map(|(state, declaration)| Self {
            state: Arc::new(state),
            declaration,
            log,
            _directory: directory,
        });
        (script, text)
    }

    /// Runs a listener's handler with a deadline of one minute.
    pub fn handle(&self, listener: usize, mail: Mail) -> Decision {
        self.handle_within(listener, mail, Duration::from_secs(60))
    }

    /// Runs a listener's handler with a deadline after `limit`.
    pub fn handle_within(&self, listener: usize, mail: Mail, limit: Duration) -> Decision {
        let state = Arc::clone(&self.state);
        state.start(listener, Box::new(mail), Deadline::after(limit)).finish()
    }

    /// Returns the log so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Returns the error of a script that can't be used, without the directory of the script.
pub fn config_error(source: &str, options: Options) -> String {
    match Script::load_with(source, options).0 {
        Ok(_) => panic!("this configuration was accepted: {source}"),
        Err(error) => {
            let text = error.to_string();
            text.find("config.lua").map_or(text.clone(), |at| text[at..].to_owned())
        }
    }
}

/// A drain that keeps each record as a line: level, message, fields.
struct Lines(Arc<Mutex<String>>);

impl Drain for Lines {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, _: &OwnedKVList) -> Result<(), slog::Never> {
        let mut fields = Fields(String::new());
        let _ = record.kv().serialize(record, &mut fields);
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(log, "{} {}{}", record.level(), record.msg(), fields.0);
        Ok(())
    }
}

struct Fields(String);

impl Serializer for Fields {
    fn emit_arguments(&mut self, key: slog::Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        let _ = write!(self.0, " {key}={value}");
        Ok(())
    }
}

/// Returns a mail from a local client.
pub fn mail() -> Mail {
    mail_from(Peer::Local { pid: Some(42), uid: 1000, gid: 100 }, MESSAGE)
}

/// Returns a mail from a client on the network.
pub fn remote_mail() -> Mail {
    mail_from(Peer::Remote(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7))), MESSAGE)
}

/// The message of [`mail`].
pub const MESSAGE: &str = "Subject: one\r\nX-Spam: a\r\n b\r\nx-spam: c\r\n\r\nbody X-Spam: d\r\n";

/// Returns a mail from `peer` with this message.
pub fn mail_from(peer: Peer, message: &str) -> Mail {
    let recipients = ["r1@example.net", "r2@example.net"];
    let mut buffer = Vec::new();
    let mut put = |text: &str| {
        let start = buffer.len();
        buffer.extend_from_slice(text.as_bytes());
        start..buffer.len()
    };
    let request = qmqp::Request {
        message: put(message),
        sender: put("s@example.net"),
        recipients: recipients.iter().map(|text| put(text)).collect(),
        payload: 0..0,
    };
    let (socket, _) = UnixStream::pair().expect("a pair of sockets");
    let origin = Origin {
        id: mail_id("id", JobId(1)),
        listener: "/a".into(),
        peer,
        socket: ClientSocket {
            descriptor: Arc::new(PeerSocket::new(socket.into(), Rights::Refused)),
            job: JobId(7),
            listening: ListenerId(0),
            accepted: 0,
        },
    };
    Mail::new(origin, buffer, request)
}
