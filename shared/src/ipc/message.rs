//! The messages between supervisor, zygote and workers.
//!
//! Messages are sent in datagrams over a `SOCK_SEQPACKET` pair. Jobs, and reports of finished
//! mails, can share a datagram; every other message has a datagram of its own. The two directions
//! of a pair carry different types, and a [`super::channel::Channel`] is typed by both, so that
//! sending in the wrong direction doesn't compile. Descriptors are sent along with a message; the
//! documentation of the message says which.
//!
//! # Failure
//! Decoding foreign bytes returns an error and never panics. The receiver of malformed bytes ends
//! the process at the other end.

use std::borrow::Cow;
use std::net::IpAddr;
use std::path::PathBuf;

use arrayvec::ArrayString;
use serde::{Deserialize, Serialize};

use crate::ids::{JobId, ListenerId, WorkerId};
use crate::qmqp::Status;
use crate::settings::{Account, Declaration};
use crate::sys::rights::Rights;

/// A direction of a channel. Its messages borrow from the buffer that they were decoded from.
pub trait Direction {
    /// The message that a datagram contains.
    type Message<'a>: Serialize + Deserialize<'a>;
}

/// The id of a mail, which names the mail in every log.
pub type MailId = ArrayString<{ INSTANCE_MAX + 1 + 16 }>;

/// Longest name in bytes of a run of the supervisor: its start time and its process id in
/// hexadecimal.
const INSTANCE_MAX: usize = 32;

/// Returns the id of a job's mail: the name of the supervisor's run and the number of the job in
/// hexadecimal.
pub fn mail_id(instance: &str, job: JobId) -> MailId {
    let mut id = MailId::new();
    // A longer name is left out; no supervisor gives itself one.
    let _ = id.try_push_str(instance);
    let _ = id.try_push('-');
    let digits = (u64::BITS - job.0.leading_zeros()).div_ceil(4).max(1);
    for place in (0..digits).rev() {
        let digit = job.0 >> (4 * place) & 0xf;
        let _ = id.try_push(char::from(b"0123456789abcdef"[digit as usize]));
    }
    id
}

/// The process or host at the other end of a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Peer {
    /// A local process, from SO_PEERCRED. `pid` is `None` for a process in a foreign pid namespace.
    Local {
        /// Process id.
        pid: Option<i32>,
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// A client on an IP network; IPv4-mapped addresses are already IPv4.
    Remote(IpAddr),
}

/// Direction from the supervisor to a worker on the job socket.
#[derive(Debug)]
pub enum ToJobs {}
impl Direction for ToJobs {
    type Message<'a> = Job;
}

/// An accepted connection for a worker. The message carries the client's socket.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Names the connection in every later message.
    pub job: JobId,
    /// Index into [`Declaration::listeners`] of the worker's generation.
    pub listener: u32,
    /// Names the listening socket; a listener of the configuration can have several.
    pub listening: ListenerId,
    /// The client.
    pub peer: Peer,
    /// Whether the client can pass descriptors.
    pub rights: Rights,
    /// Time of the accept in nanoseconds of CLOCK_BOOTTIME, comparable with the start times of
    /// processes in /proc.
    pub accepted: u64,
    /// Time at which the first byte was there, on the same clock.
    pub spoke: u64,
}

/// Direction from a worker to the supervisor on the job socket.
#[derive(Debug)]
pub enum ToReports {}
impl Direction for ToReports {
    type Message<'a> = Report<'a>;
}

/// A report of a worker about its jobs.
#[expect(clippy::large_enum_variant, reason = "a report exists for a moment, on the stack")]
#[derive(Debug, Serialize, Deserialize)]
pub enum Report<'a> {
    /// The worker can take jobs. This report is sent once.
    Ready,
    /// A child program, the leader of its own process group, runs for this job.
    Child {
        /// The job that the program runs for.
        job: JobId,
        /// Process id of the program, equal to its process group.
        pid: i32,
    },
    /// The child of this job has ended and is about to be reaped. From now on its process id may
    /// become another process'.
    ChildGone {
        /// The job that the program ran for.
        job: JobId,
    },
    /// The action of the job has a time limit of its own, which a drain waits for.
    Timeout {
        /// The job.
        job: JobId,
        /// Time limit in milliseconds from now.
        milliseconds: u64,
    },
    /// The job came without its socket, because the worker had no free descriptor. The supervisor
    /// has to answer the client through its duplicate of the socket. No `Done` follows.
    Lost {
        /// The job.
        job: JobId,
    },
    /// The client has been answered, and its socket is closed.
    Done {
        /// The job.
        job: JobId,
        /// The record of the mail; `None` when the client left without having said anything.
        #[serde(borrow)]
        record: Option<MailRecord<'a>>,
    },
}

/// What a mail's time went by with, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Times {
    /// Waiting for a worker and a thread.
    pub queue: u64,
    /// Waiting for the client's bytes, and reading them.
    pub read: u64,
    /// The handler, with all that it waited for.
    pub lua: u64,
    /// The next hop or the program.
    pub hop: u64,
}

/// A finished mail, as the supervisor logs it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MailRecord<'a> {
    /// Envelope sender as relayed, escaped as in a Pond record, without `<` and `>`.
    #[serde(borrow)]
    pub sender: Cow<'a, str>,
    /// Envelope recipients as relayed, escaped and separated by commas as in a Pond record
    /// (`<a@b>,<c@d>`), as many as can fit in one.
    #[serde(borrow)]
    pub recipients: Cow<'a, str>,
    /// Number of all recipients.
    pub recipient_count: u32,
    /// Number of recipients that `recipients` leaves out.
    pub recipients_cut: u32,
    /// The account that the script set.
    pub account: Option<&'a str>,
    /// The action: `connect`, `exec`, `exec_raw`, `discard`, `reject`, `defer`, or `-` when the
    /// request or the handler failed before an action.
    pub action: &'a str,
    /// Address or program that the mail was to go to. Of several addresses, the last one that was
    /// tried.
    pub next_hop: Option<&'a str>,
    /// Whether the mail began to go there.
    pub forwarded: bool,
    /// The status of the answer; `None` when the client left before an answer was due.
    pub status: Option<Status>,
    /// The text of the answer, made printable, or a word for a mail without an answer.
    #[serde(borrow)]
    pub text: Cow<'a, str>,
    /// Bytes of the message with inserted header lines, but without qrelay's own `Received` line.
    pub size: u64,
    /// Bytes of the request's payload.
    pub received: u64,
    /// Bytes for the next hop: payload with inserted lines; 0 if no next hop was tried.
    pub sent: u64,
    /// Microseconds from accept to answer.
    pub duration: u64,
    /// When the answer had been sent, in microseconds since the epoch.
    pub answered: u64,
    /// What the time from accept to answer went by with.
    pub times: Times,
    /// The value of the field `Message-ID`, as far as it is printable ASCII.
    pub message_id: Option<&'a str>,
    /// Why the handler never ran.
    pub cause: Option<&'a str>,
    /// Whether the handler never ran. A mail that was refused in this way has no Pond record.
    pub refused: bool,
}

/// Direction from the supervisor to a worker on the control socket.
#[derive(Debug)]
pub enum ToControl {}
impl Direction for ToControl {
    type Message<'a> = Control;
}

/// Orders for a worker. The end of this socket means that the supervisor is gone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Control {
    /// Asks for a [`Pong`] at once.
    Ping {
        /// Number that the answer repeats.
        sequence: u64,
    },
}

/// Direction from a worker to the supervisor on the control socket.
#[derive(Debug)]
pub enum FromControl {}
impl Direction for FromControl {
    type Message<'a> = Pong;
}

/// Longest place in a [`Pong`], which must fit into a small buffer.
pub const MAX_PLACE: usize = 512;

/// The state of a worker. The control thread of the worker sends it without taking any lock.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Pong {
    /// Number of the ping.
    pub sequence: u64,
    /// Milliseconds that the current call has held Lua; 0 when Lua is free.
    pub held: u64,
    /// The job that holds Lua, 0 when unknown.
    pub job: JobId,
    /// Milliseconds for which the leader, the thread that receives and begins jobs, has made no
    /// progress although there is a job; 0 while it waits for Lua.
    pub stuck: u64,
    /// File and line of the handler that holds Lua, at most [`MAX_PLACE`] bytes; empty when
    /// unknown.
    pub place: String,
    /// Whether the Lua state has hit its memory limit even after a collection. Such a worker has to
    /// be replaced.
    pub exhausted: bool,
    /// Memory of the Lua state in bytes after the latest call.
    pub lua_bytes: u64,
    /// The pools of connections to databases, at most [`MAX_DATABASES`].
    pub databases: Vec<DatabaseState>,
}

/// Most databases in a [`Pong`].
pub const MAX_DATABASES: usize = 16;

/// A pool of connections to a database.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseState {
    /// Name of the database, and its servers, at most [`MAX_DATABASE_NAME`] bytes.
    pub name: String,
    /// Most connections.
    pub limit: u32,
    /// Connections that exist or are being made.
    pub connections: u32,
    /// Requests in work or in the queue.
    pub outstanding: u32,
    /// Requests that failed because there was no connection, or in time none that was free, since
    /// the worker began.
    pub errors: u64,
}

/// Longest name in bytes of a [`DatabaseState`].
pub const MAX_DATABASE_NAME: usize = 128;

/// Direction from the supervisor to a zygote.
#[derive(Debug)]
pub enum ToZygote {}
impl Direction for ToZygote {
    type Message<'a> = ZygoteOrder;
}

/// Orders for a zygote, in the order in which they are sent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ZygoteOrder {
    /// Runs the script. This is the first order; the zygote answers with `Declared` or `Failed`.
    /// The message carries the zygote's opener ([`crate::dictionary`]).
    Load {
        /// Number of the generation, which the process shows in its title.
        generation: u64,
        /// Absolute path of config.lua.
        config: PathBuf,
        /// Whether to call the script's function `reload` afterwards.
        reload: bool,
        /// FileDescriptorNames of the sockets that systemd passed, one entry for each socket.
        systemd: Vec<String>,
        /// Name of this run of the supervisor, the first part of every mail's id.
        instance: String,
        /// The account that the zygote becomes before the script runs, if the command line names
        /// one.
        account: Option<Account>,
    },
    /// Forks a worker. The message carries the worker's job socket, its control socket, its opener
    /// ([`crate::dictionary`]) and, if there is one, the memory of its flight recorder
    /// ([`crate::flight`]), in this order.
    Fork {
        /// Number of the new worker.
        worker: WorkerId,
    },
    /// Forks a standby of this zygote. The message carries the standby's end of a new channel.
    Standby,
}

/// Direction from a zygote to the supervisor.
#[derive(Debug)]
pub enum FromZygote {}
impl Direction for FromZygote {
    type Message<'a> = ZygoteReport;
}

/// A report of a zygote, in most cases the answer to an order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ZygoteReport {
    /// The script has run; the value is what the script wants.
    Declared(Box<Declaration>),
    /// The script can't be used; the text has file, line and cause.
    Failed {
        /// The error, for the administrator.
        message: String,
        /// Whether trying again later may help.
        may_pass: bool,
    },
    /// The worker runs, as a child of the supervisor.
    Forked {
        /// Number of the worker, from the order.
        worker: WorkerId,
        /// Process id of the new process.
        pid: i32,
    },
    /// The worker could not be forked.
    ForkFailed {
        /// Number of the worker, from the order.
        worker: WorkerId,
        /// The cause.
        message: String,
    },
    /// The standby runs, as a child of the supervisor.
    StandbyForked {
        /// Process id of the new process.
        pid: i32,
    },
    /// The standby could not be forked.
    StandbyFailed {
        /// The cause.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mails_id_is_hexadecimal() {
        for job in [0, 1, 0xf, 0x10, 0xabc, u64::MAX] {
            assert_eq!(&*mail_id("5f-2a", JobId(job)), format!("5f-2a-{job:x}"));
        }
        let last = JobId(u64::MAX);
        let longest = "f".repeat(INSTANCE_MAX);
        assert_eq!(&*mail_id(&longest, last), format!("{longest}-{:x}", last.0));
        assert!(mail_id(&"f".repeat(100), last).starts_with('-'));
    }
}
