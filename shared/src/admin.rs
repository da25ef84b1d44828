//! What the control socket carries: the questions of administrators' commands, and the answers of
//! the supervisor.
//!
//! Contract: each side sends JSON objects, one in a line. A client sends a [`Request`] and gets one
//! [`Answer`], or several when it asks for the mails in flight. Every object has the [`VERSION`] of
//! this protocol. Within a version, fields may be added and none changes its meaning, so a reader
//! ignores fields that it doesn't know. Times are seconds, memory is bytes, and a moment is a
//! number of seconds since the epoch.
//!
//! # Failure
//! A request that can't be understood gets [`Body::Error`].

use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::qmqp::Status as Reply;

/// The version of this protocol.
pub const VERSION: u32 = 1;

/// Where the daemon listens for administrators' commands, unless told otherwise.
pub const DEFAULT_PATH: &str = "/run/cm4all/qrelay/control";

/// Returns this moment in seconds since the epoch.
pub fn now() -> f64 {
    UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64()
}

/// Most bytes of a request, its end of line included.
pub const REQUEST_MAX: usize = 64 * 1024;

/// A line from a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The version of the protocol that the client speaks.
    pub version: u32,
    /// The question or order.
    #[serde(flatten)]
    pub command: Command,
}

/// A question or order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Command {
    /// Asks for the [`Status`].
    Status,
    /// Asks for the mails in flight: a line for each, and [`Body::End`].
    Mails,
    /// Loads the configuration anew. The answer comes when the outcome is known.
    Reload,
    /// Stops the daemon. The first answer comes at once, the second one when nothing is left, just
    /// before the daemon ends.
    Stop {
        /// Whether mails in flight are given up.
        #[serde(default)]
        now: bool,
    },
}

/// A line from the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The version of the protocol that the daemon speaks.
    pub version: u32,
    /// The answer itself.
    #[serde(flatten)]
    pub body: Body,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Body {
    /// The state of the daemon.
    Status(Box<Status>),
    /// A mail in flight.
    Mail(Box<InFlight>),
    /// No further mail is in flight.
    End {
        /// Number of mails that were listed.
        mails: u64,
    },
    /// The outcome of a reload.
    Reload(Reload),
    /// The daemon stops.
    Stopping {
        /// Mails that are to be finished.
        in_flight: u64,
    },
    /// The daemon has stopped, and its process is about to end.
    Stopped {},
    /// The request is refused.
    Error {
        /// Why, in one line.
        message: String,
    },
}

impl From<Body> for Answer {
    fn from(body: Body) -> Self {
        Self { version: VERSION, body }
    }
}

/// Where the daemon is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// No configuration serves yet.
    Starting,
    /// Mails are taken.
    Serving,
    /// Mails under way are finished, and no others are taken.
    Stopping,
}

/// The state of the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub program: String,
    /// Process id of the supervisor.
    pub pid: i32,
    /// Name of this run, the first part of every mail's id.
    pub instance: String,
    /// Where the daemon is in its life.
    pub state: State,
    /// When the daemon started.
    pub started: f64,
    /// When this status was made.
    pub now: f64,
    /// Absolute path of the configuration.
    pub config: String,
    /// The generation that gets new mails.
    pub generation: Option<u64>,
    /// Generations that serve, finish or are being loaded.
    pub generations: u64,
    /// The latest attempt to load a configuration that has come to an end.
    pub last_load: Option<Reload>,
    /// Level of the workers' sandbox: `full`, `partial` or `off`.
    pub sandbox: Option<String>,
    /// User id of workers and programs, if it isn't the supervisor's.
    pub user: Option<u32>,
    /// Connections that no worker has.
    pub held: u64,
    /// Connections, of those that no worker has, whose clients have begun to speak.
    pub waiting: u64,
    /// Mails that workers have.
    pub in_flight: u64,
    /// How mails were answered since the start.
    pub answers: Answers,
    /// Mails answered per second.
    pub rates: Rates,
    /// Where mails' time goes.
    pub times: Times,
    /// Mails by listener, action and reply since the start.
    pub mails: Vec<Mails>,
    /// The listening sockets.
    pub listeners: Vec<Listener>,
    /// The workers.
    pub workers: Vec<Worker>,
    /// What has become of workers since the start.
    pub ends: Ends,
    /// Where mails went to.
    pub next_hops: Vec<NextHop>,
    /// The workers' pools of connections to databases, those to the same database added up.
    pub databases: Vec<Database>,
    /// The shared dictionaries.
    pub dictionaries: Vec<Dictionary>,
    /// The supervisor's log.
    pub log: Deliveries,
    /// Datagrams to the Pond log server, if there is one.
    pub pond: Option<Deliveries>,
    /// The supervisor itself.
    pub supervisor: Supervisor,
    /// What has happened lately, oldest first.
    pub incidents: Vec<Incident>,
}

/// How often clients were answered in which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers {
    /// `K`: accepted.
    pub accepted: u64,
    /// `Z`: not now.
    pub temporary: u64,
    /// `D`: never.
    pub permanent: u64,
    /// None, or one that isn't known.
    pub unanswered: u64,
}

impl Answers {
    /// Counts an answer; `None` is an answer that wasn't given, or isn't known.
    pub fn count(&mut self, reply: Option<Reply>) {
        *match reply {
            Some(Reply::Accepted) => &mut self.accepted,
            Some(Reply::Temporary) => &mut self.temporary,
            Some(Reply::Permanent) => &mut self.permanent,
            None => &mut self.unanswered,
        } += 1;
    }
}

/// Mails per second, on average.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// In the last whole second.
    pub second: f64,
    /// In the last minute.
    pub minute: f64,
    /// In the last 15 minutes.
    pub quarter: f64,
}

/// Where mails' time goes, from accept to answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// Upper bounds of the histograms' buckets in seconds; the last bucket has none.
    pub bounds: Vec<f64>,
    /// Waiting for a worker and a thread.
    pub queue: Histogram,
    /// Waiting for the client's bytes, and reading them.
    pub read: Histogram,
    /// The handler, with all that it waited for.
    pub lua: Histogram,
    /// The next hop or the program.
    pub hop: Histogram,
    /// All of it.
    pub all: Histogram,
}

/// How long something took.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Number of times in each bucket since the start, one more than there are bounds.
    pub buckets: Vec<u64>,
    /// Sum of all times in seconds.
    pub sum: f64,
    /// Half of the last minute's times were at most so long, in seconds; `None` without a mail.
    pub p50: Option<f64>,
    /// Of a hundred of the last minute's times, 99 were at most so long.
    pub p99: Option<f64>,
}

/// Mails that have three things in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mails {
    /// Address of the listener, or `other`.
    pub listener: String,
    /// The action, or `-` when there was none.
    pub action: String,
    /// `K`, `Z`, `D`, or `-` for no answer.
    pub reply: String,
    /// Number of mails since the start.
    pub count: u64,
}

/// A listening socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// The address, as the configuration has it.
    pub address: String,
    /// Permissions of the socket's file in octal digits; `None` for a socket without one.
    pub mode: Option<String>,
    /// Connections from it that no worker has.
    pub held: u64,
    /// Connections from it that the daemon has, with a worker or not.
    pub connections: u64,
    /// Connections that the kernel holds because they are not accepted yet; `None` if the kernel
    /// doesn't say.
    pub backlog: Option<u64>,
    /// Most connections that the kernel holds.
    pub backlog_limit: Option<u64>,
}

/// A worker process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// Number of the worker; no other worker of this run has or had it.
    pub worker: u64,
    /// Process id, once it is known.
    pub pid: Option<i32>,
    /// Generation of the worker's configuration.
    pub generation: u64,
    /// `starting`, `ready`, `finishing` or `dying`.
    pub state: String,
    /// Mails that the worker has.
    pub in_flight: u64,
    /// Most mails that the worker gets at a time.
    pub credit: u64,
    /// Mails that the worker has got.
    pub mails: u64,
    /// How the worker has answered.
    pub answers: Answers,
    /// Memory of its Lua state, as of the latest ping.
    pub lua_bytes: u64,
    /// Its resident memory; `None` if it isn't known.
    pub rss_bytes: Option<u64>,
    /// Its threads; `None` if the number isn't known.
    pub threads: Option<u64>,
    /// Seconds since the worker was asked for.
    pub age: u64,
}

/// How workers have come to their ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ends {
    /// Workers that died unexpectedly, hung ones included.
    pub crashes: u64,
    /// Workers that were killed because they hung.
    pub hangs: u64,
    /// Workers that ended after they had finished their mails.
    pub finished: u64,
    /// Mails whose worker died.
    pub lost_mails: u64,
}

/// A next hop or program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NextHop {
    /// Its address or name, or `other`.
    pub next_hop: String,
    /// Mails that wait for it at the moment.
    pub in_flight: u64,
    /// How clients were answered, of the mails that it got.
    pub answers: Answers,
    /// Mails that could not even begin to go there.
    pub connect_failures: u64,
    /// How long it took for a mail.
    pub times: Histogram,
}

/// A pool of connections to a database.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Database {
    /// Name of the database, and its servers, as `mail at db.example.org:5432`.
    pub database: String,
    /// Most connections of all workers together.
    pub limit: u64,
    /// Connections that exist or are being made.
    pub connections: u64,
    /// Requests in work.
    pub busy: u64,
    /// Requests that wait for a connection.
    pub waiting: u64,
    /// Requests that failed because there was no connection, or in time none that was free.
    pub errors: u64,
}

/// A shared dictionary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dictionary {
    /// Its name.
    pub dictionary: String,
    /// Number of keys.
    pub keys: u64,
    /// Memory of keys and values.
    pub bytes: u64,
    /// Most memory that it may have.
    pub limit_bytes: u64,
    /// Reads that found their key.
    pub hits: u64,
    /// Reads that didn't.
    pub misses: u64,
    /// Keys that were removed to make room for others.
    pub evictions: u64,
}

/// Pieces that were to be sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deliveries {
    /// Pieces that were taken.
    pub sent: u64,
    /// Pieces that were not.
    pub lost: u64,
}

/// The supervisor's own consumption.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Supervisor {
    /// Its resident memory; `None` if it isn't known.
    pub rss_bytes: Option<u64>,
    /// Its processor time since the start, in seconds; `None` if it isn't known.
    pub cpu: Option<f64>,
    /// Most descriptors that it may have.
    pub descriptor_limit: u64,
}

/// The end of an attempt to load a configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reload {
    /// When the attempt ended.
    pub at: f64,
    /// Number of the generation that was tried.
    pub generation: u64,
    /// Why the configuration isn't used; `None` when it serves.
    pub failure: Option<String>,
    /// Whether trying again may help.
    pub may_pass: bool,
}

/// Something that an administrator may want to see on a time axis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Incident {
    /// When it happened.
    pub at: f64,
    /// What it was.
    pub kind: IncidentKind,
    /// More about it, in one line.
    pub text: String,
}

/// The kinds of incidents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IncidentKind {
    /// A configuration began to serve.
    Load,
    /// A configuration could not be used.
    LoadFailed,
    /// A worker died unexpectedly.
    Crash,
    /// A worker hung and was killed.
    Hang,
    /// No process could fork workers.
    NoZygote,
    /// The daemon began to stop.
    Stop,
}

/// A mail in flight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InFlight {
    /// The mail's id, as in the log.
    pub id: String,
    /// Seconds since the connection was accepted.
    pub age: f64,
    /// `queued`, `reading`, `lua`, `lua_waits`, `connecting`, `next_hop`, `program`, `answering`
    /// or `answered`.
    pub phase: String,
    /// Seconds in this phase.
    pub phase_age: f64,
    /// Envelope sender, escaped as in the log; empty while it isn't known, or for a bounce.
    pub from: String,
    /// The first recipients, escaped as in the log.
    pub to: Vec<String>,
    /// Number of all recipients; 0 while it isn't known.
    pub recipients: u64,
    /// User id of a local client.
    pub uid: Option<u32>,
    /// Process id of a local client.
    pub pid: Option<i32>,
    /// Address of a remote client.
    pub peer: Option<String>,
    /// Address of the listener.
    pub listener: String,
    /// The account that the script has set.
    pub account: Option<String>,
    /// The next hop or program.
    pub next_hop: Option<String>,
    /// Bytes of the message.
    pub size: u64,
    /// The worker that has the mail.
    pub worker: Option<u64>,
}
