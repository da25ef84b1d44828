//! `qrelay try`: asks the handler of a listener about a mail that nobody has sent.
//!
//! Contract: the script is loaded as by `qrelay check`, and the handler runs as in a worker: with
//! the script's libraries and time limits, in the sandbox, and, if this process is root's, as the
//! user that the script names. The action isn't carried out: nothing is relayed, and no program is
//! run. What the handler does itself really happens: queries, files, datagrams. The shared
//! dictionaries are the trial's own.
//!
//! # Failure
//! A script that can't be used is [`LoadFailed`], and a mail that can't come in this way is a
//! [`MailError`]. A handler that fails, or takes too long, is a [`Report`] with an error.

mod records;
mod report;

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::{geteuid, getgid, getuid};
use qrelay_shared::address::{complete, is_valid, is_valid_sender, printable};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::{JobId, ListenerId, WorkerId};
use qrelay_shared::ipc::message::{Peer, mail_id};
use qrelay_shared::qmqp::{Limits, Reply, encode_request, parse};
use qrelay_shared::settings::{Declaration, ListenAddress, ListenerDecl, Settings};
use qrelay_shared::sys::rights::{PeerSocket, Rights};
use qrelay_shared::sys::seccomp::spare_other_processes;
use qrelay_shared::sys::signals::disregard;
use qrelay_shared::sys::thread::{LUA_STACK, spawn};
use qrelay_shared::system_error::shown;
use qrelay_shared::texts;
use slog::Level;
use thiserror::Error;

pub use self::records::Record;
pub use self::report::{Answer, Report};

use self::records::Records;
use crate::client::socket::ClientSocket;
use crate::lua::binding::error;
use crate::lua::config::ConfigError;
use crate::lua::engine::monitor::Stop;
use crate::lua::state::{Ended, State};
use crate::mail::{Assumed, Mail, Origin};
use crate::process::{account, check, sandbox};
use crate::session;
use crate::session::script::HandlerError;

/// First part of the mail's id.
const INSTANCE: &str = "try";

/// Pause between two looks at a handler that runs.
const LOOK: Duration = Duration::from_millis(50);

/// The client of a mail, as far as the caller says who it is.
#[derive(Debug, Clone, Default)]
pub struct TrialClient {
    /// User id; by default the caller's.
    pub uid: Option<u32>,
    /// Group id; by default the caller's.
    pub gid: Option<u32>,
    /// Process id; by default the caller's.
    pub pid: Option<i32>,
    /// Control group, instead of the process'.
    pub cgroup: Option<String>,
    /// Address of a client on the network, which has none of the above.
    pub peer: Option<IpAddr>,
}

/// A mail to ask about.
#[derive(Debug, Clone)]
pub struct TrialMail {
    /// Who sends it.
    pub client: TrialClient,
    /// The listener that it comes through, by its address; by default the first one.
    pub listener: Option<String>,
    /// Envelope sender.
    pub sender: String,
    /// Envelope recipients.
    pub recipients: Vec<String>,
    /// Header and body.
    pub message: Vec<u8>,
}

/// Why a mail can't come in this way.
#[derive(Debug, Error)]
pub enum MailError {
    /// No listener has this address.
    #[error("no listener has the address '{asked}'; there is {}", known.join(", "))]
    Listener {
        /// The address.
        asked: String,
        /// The addresses of all listeners.
        known: Vec<String>,
    },
    /// A client on the network, and a listener for local clients.
    #[error("the clients of {0} are processes of this host, and have no IP address (--peer)")]
    NotRemote(String),
    /// A local client, and a listener on the network.
    #[error("a client of {0} has an IP address (--peer), but no user, process or control group")]
    NotLocal(String),
    /// The sender can't be one.
    #[error("the sender '{}' is not a mail address", printable(.0.as_bytes()))]
    Sender(String),
    /// A recipient can't be one.
    #[error("the recipient '{}' is not a mail address", printable(.0.as_bytes()))]
    Recipient(String),
}

/// Why a script can't be used, and what was logged before that.
#[derive(Debug)]
pub struct LoadFailed {
    /// The reason.
    pub error: ConfigError,
    /// The records, oldest first.
    pub log: Vec<Record>,
}

/// A script that has been loaded to be tried.
pub struct Trial {
    state: Arc<State>,
    declaration: Declaration,
    records: Records,
    dictionaries: Option<OwnedFd>,
}

impl Trial {
    /// Loads the script at an absolute path. Records of this level and above are kept for the
    /// report. On `dictionaries` the script gets channels to shared dictionaries, which only this
    /// trial sees.
    ///
    /// # Errors
    /// See [`LoadFailed`].
    pub fn load(
        config: &Path,
        level: Level,
        dictionaries: Option<OwnedFd>,
    ) -> Result<Self, LoadFailed> {
        // Rust's runtime ignores the signal, and so would the script's programs.
        disregard(Signal::SIGPIPE);
        let records = Records::default();
        let kept = dictionaries.as_ref().and_then(|channel| channel.try_clone().ok());
        let logger = records.logger(level);
        let options = check::trial_options(config, logger.clone(), dictionaries);
        let loaded = State::load(options).and_then(|(state, declaration)| {
            state.warnings().iter().for_each(|warning| slog::warn!(logger, "{}", warning));
            become_user(&declaration.settings)
                .map_err(|message| ConfigError::Declaration { path: config.to_owned(), message })?;
            Ok((state, declaration))
        });
        match loaded {
            Ok((state, declaration)) => {
                Ok(Self { state: Arc::new(state), declaration, records, dictionaries: kept })
            }
            Err(error) => Err(LoadFailed { error, log: records.take() }),
        }
    }

    /// Asks the handler about a mail.
    ///
    /// # Errors
    /// See [`MailError`].
    pub fn ask(self, given: &TrialMail) -> Result<Report, MailError> {
        let listeners = &self.declaration.listeners;
        let index = choose(listeners, given.listener.as_deref())?;
        let listener = &listeners[index];
        let peer = peer(&given.client, &listener.address)?;
        let default_domain = self.declaration.settings.default_domain.as_deref();
        check_envelope(given, default_domain)?;
        let mut report = Report {
            listener: listener.address.to_string(),
            sender: given.sender.clone(),
            recipients: given.recipients.clone(),
            ..Report::default()
        };
        match self.mail(given, listener, peer) {
            Ok(mail) => self.run(index, mail, &mut report),
            Err((reply, cause)) => {
                report.answer = Some(reply.into());
                report.cause = Some(cause);
            }
        }
        report.log = self.records.take();
        let own = mail_id(INSTANCE, JobId(1));
        for record in &mut report.log {
            record.fields.retain(|name, value| name != "id" || **value != *own);
        }
        Ok(report)
    }

    /// Makes the mail that a worker would make of the request.
    ///
    /// # Errors
    /// The answer to a request that no handler sees, and why.
    fn mail(
        &self,
        given: &TrialMail,
        listener: &ListenerDecl,
        peer: Peer,
    ) -> Result<Box<Mail>, (Reply, String)> {
        if let Peer::Remote(address) = peer
            && !listener.allows(address)
        {
            let cause = format!("{} does not allow {address}", listener.address);
            return Err((Reply::temporary(texts::ACCESS_DENIED), cause));
        }
        let settings = &self.declaration.settings;
        let max_size = listener.max_size;
        let limits = Limits { max_size, default_domain: settings.default_domain.as_deref() };
        let buffer = encode_request(&given.message, given.sender.as_bytes(), &given.recipients);
        let request = parse(&buffer, &limits).map_err(|error| {
            let (size, count) = (given.message.len(), given.recipients.len());
            let cause = format!("{size} bytes, max_size={max_size}, {count} recipients");
            (Reply::permanent(error.reply_text()), cause)
        })?;
        let mut mail = Box::new(Mail::new(origin(listener, peer), buffer, request));
        mail.assume(match &given.client.cgroup {
            Some(path) => Assumed::Group(path.as_bytes().into()),
            None => Assumed::Process,
        });
        if let Some(domain) = &settings.default_domain {
            mail.complete_addresses(&domain.as_str().into());
        }
        match session::loops(&mail, settings.max_hops) {
            Some(refusal) => Err(refusal),
            None => Ok(mail),
        }
    }

    /// Runs the handler on a thread of its own, because only another thread can notice that Lua is
    /// held for ever.
    fn run(&self, listener: usize, mail: Box<Mail>, report: &mut Report) {
        let settings = self.declaration.settings.clone();
        let state = Arc::clone(&self.state);
        let dictionaries = self.dictionaries.as_ref().and_then(|channel| channel.try_clone().ok());
        let (sender, receiver) = sync_channel(1);
        let run = move || {
            let ended = enter_sandbox(&settings).map(|()| {
                state.after_fork(WorkerId(1), dictionaries);
                let begun = Instant::now();
                let ended = state.handle(listener, mail, Deadline::after(settings.relay_timeout));
                (ended, begun.elapsed())
            });
            // The receiver has given up on a handler that holds Lua for ever.
            let _ = sender.send(ended);
        };
        if let Err(error) = spawn("handler", LUA_STACK, run) {
            return fail(report, texts::INTERNAL_ERROR, format!("no thread: {}", shown(&error)));
        }
        let hang_timeout = self.declaration.settings.hang_timeout;
        let (ended, time) = loop {
            match receiver.recv_timeout(LOOK) {
                Ok(Ok(ended)) => break ended,
                Ok(Err(error)) => return fail(report, texts::INTERNAL_ERROR, error),
                Err(RecvTimeoutError::Disconnected) => {
                    return fail(report, texts::INTERNAL_ERROR, "panic".into());
                }
                Err(RecvTimeoutError::Timeout) => {
                    let held = self.state.held().duration;
                    if held > hang_timeout {
                        report.seconds = report::seconds(held);
                        let error = format!(
                            "{}: the handler has held Lua for {} s (hang_timeout), in something \
                             that handler_timeout can't stop",
                            self.state.handler_place(listener),
                            hang_timeout.as_secs_f64()
                        );
                        return fail(report, texts::TRY_AGAIN, error);
                    }
                }
            }
        };
        report.seconds = report::seconds(time);
        self.show(listener, ended, report);
    }

    /// Notes how a handler has ended.
    fn show(&self, listener: usize, (mail, result): Ended, report: &mut Report) {
        report.show(&mail);
        if let Some(place) = self.state.left() {
            let error = format!("{place}: os.exit would end the worker");
            return fail(report, texts::TRY_AGAIN, error);
        }
        let (failure, error) = match result {
            Ok(action) => return report.decide(&action),
            Err(Stop::NotBegun) => (HandlerError::NotBegun, "no time was left".to_owned()),
            Err(Stop::Deadline) => {
                let place = self.state.handler_place(listener);
                let limit = self.declaration.settings.relay_timeout.as_secs_f64();
                let error = format!(
                    "{place}: the mail's time was over while its handler waited (relay_timeout, \
                     {limit} s)"
                );
                (HandlerError::Deadline, error)
            }
            Err(Stop::Error { message, traceback }) => {
                let located = error::located(message, traceback.as_deref());
                let frames = traceback.unwrap_or_default();
                report.traceback = frames.lines().map(str::to_owned).collect();
                (HandlerError::Script, located.unwrap_or_else(|message| message))
            }
        };
        report.answer = Some(failure.reply().into());
        report.error = Some(error);
    }
}

/// Notes a handler that has come to no decision.
fn fail(report: &mut Report, text: &str, error: String) {
    report.answer = Some(Reply::temporary(text).into());
    report.error = Some(error);
}

/// Becomes the user that the script names, which only root can.
fn become_user(settings: &Settings) -> Result<(), String> {
    match account::declared(settings) {
        Some(account) if geteuid().is_root() => account::become_account(&account).map(drop),
        _ => Ok(()),
    }
}

/// Takes from this thread, and from all threads that it starts, what a worker doesn't have.
fn enter_sandbox(settings: &Settings) -> Result<(), String> {
    if settings.sandbox {
        let level = sandbox::enter()?;
        // A kernel without filters has none in the daemon either.
        let _ = spare_other_processes();
        sandbox::enter_own(level)?;
    }
    Ok(())
}

/// Returns the index of the listener with this address.
fn choose(listeners: &[ListenerDecl], asked: Option<&str>) -> Result<usize, MailError> {
    let Some(asked) = asked else { return Ok(0) };
    let known = listeners.iter().map(|listener| listener.address.to_string());
    let known: Vec<_> = known.collect();
    match known.iter().position(|address| address == asked) {
        Some(index) => Ok(index),
        None => Err(MailError::Listener { asked: asked.to_owned(), known }),
    }
}

/// Returns the client as the kernel would report it to a listener with this address.
fn peer(client: &TrialClient, address: &ListenAddress) -> Result<Peer, MailError> {
    let TrialClient { uid, gid, pid, cgroup, peer } = client;
    let is_local = uid.is_some() || gid.is_some() || pid.is_some() || cgroup.is_some();
    match (peer, address) {
        (Some(_), ListenAddress::Path(_) | ListenAddress::Abstract(_)) => {
            Err(MailError::NotRemote(address.to_string()))
        }
        (None, ListenAddress::Inet(_)) if is_local => Err(MailError::NotLocal(address.to_string())),
        (None, ListenAddress::Inet(own)) => Ok(Peer::Remote(match own.ip().to_canonical() {
            IpAddr::V4(_) => IpAddr::from([127, 0, 0, 1]),
            IpAddr::V6(_) => IpAddr::from(std::net::Ipv6Addr::LOCALHOST),
        })),
        (Some(peer), _) => Ok(Peer::Remote(peer.to_canonical())),
        (None, _) => Ok(Peer::Local {
            pid: Some(pid.unwrap_or_else(|| std::process::id().cast_signed())),
            uid: uid.unwrap_or_else(|| getuid().as_raw()),
            gid: gid.unwrap_or_else(|| getgid().as_raw()),
        }),
    }
}

fn check_envelope(given: &TrialMail, domain: Option<&str>) -> Result<(), MailError> {
    let whole = |address: &str| complete(address.as_bytes(), domain).into_owned();
    if !is_valid_sender(&whole(&given.sender)) {
        return Err(MailError::Sender(given.sender.clone()));
    }
    match given.recipients.iter().find(|recipient| !is_valid(&whole(recipient))) {
        Some(wrong) => Err(MailError::Recipient(wrong.clone())),
        None => Ok(()),
    }
}

/// Returns the origin of a mail whose socket leads nowhere.
fn origin(listener: &ListenerDecl, peer: Peer) -> Origin {
    let (socket, _) = UnixStream::pair().expect("a pair of sockets");
    Origin {
        id: mail_id(INSTANCE, JobId(1)),
        listener: listener.address.to_string().into(),
        peer,
        socket: ClientSocket {
            descriptor: Arc::new(PeerSocket::new(socket.into(), Rights::Refused)),
            job: JobId(1),
            listening: ListenerId(0),
            accepted: 0,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(address: ListenAddress) -> ListenerDecl {
        ListenerDecl {
            address,
            mode: 0o666,
            owner: None,
            group: None,
            backlog: 1,
            max_size: 1024,
            allow: None,
        }
    }

    fn addresses() -> [ListenAddress; 4] {
        [
            ListenAddress::Path("/run/in".into()),
            ListenAddress::Abstract(b"in".to_vec()),
            ListenAddress::Inet(([127, 0, 0, 1], 628).into()),
            ListenAddress::Systemd(Some("web".into())),
        ]
    }

    #[test]
    fn listeners_are_chosen_by_their_addresses() {
        let listeners = addresses().map(listener);
        let chosen = |asked| choose(&listeners, asked).map_err(|error| error.to_string());
        assert_eq!(chosen(None), Ok(0));
        assert_eq!(chosen(Some("@in")), Ok(1));
        assert_eq!(chosen(Some("systemd['web']")), Ok(3));
        let error = "no listener has the address '/x'; there is /run/in, @in, 127.0.0.1:628, \
                     systemd['web']";
        assert_eq!(chosen(Some("/x")), Err(error.to_owned()));
    }

    #[test]
    fn clients_are_of_the_listeners_kind() {
        let [path, hidden, inet, systemd] = addresses();
        let remote = TrialClient { peer: "::ffff:192.0.2.1".parse().ok(), ..Default::default() };
        let local = TrialClient { uid: Some(7), gid: Some(8), pid: Some(9), ..Default::default() };
        let v4 = Peer::Remote([192, 0, 2, 1].into());
        let seven = Peer::Local { pid: Some(9), uid: 7, gid: 8 };
        for (client, address, expected) in [
            (&remote, &path, None),
            (&remote, &hidden, None),
            (&remote, &inet, Some(v4)),
            (&remote, &systemd, Some(v4)),
            (&local, &path, Some(seven)),
            (&local, &hidden, Some(seven)),
            (&local, &inet, None),
            (&local, &systemd, Some(seven)),
            (&TrialClient::default(), &inet, Some(Peer::Remote([127, 0, 0, 1].into()))),
        ] {
            assert_eq!(peer(client, address).ok(), expected, "{client:?} {address:?}");
        }
    }
}
