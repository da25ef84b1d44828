//! The messages between supervisor, zygote and workers.
//!
//! Messages travel in datagrams on a `SOCK_SEQPACKET` pair: jobs, and reports of
//! finished mails, several in one when there are several, all others alone. The two directions
//! of a pair carry different types, and [`super::channel::Channel`] holds a
//! pair's end by both, so sending the wrong way doesn't compile. Descriptors
//! travel beside a message: which, is said with it.
//!
//! # Failure
//! Decoding foreign bytes yields an error, never a panic; whoever gets one
//! ends the process at the other end.

use std::borrow::Cow;
use std::net::IpAddr;
use std::path::PathBuf;

use arrayvec::ArrayString;
use serde::{Deserialize, Serialize};

use crate::ids::{JobId, ListenerId, WorkerId};
use crate::qmqp::Status;
use crate::settings::Declaration;

/// Messages of one direction; the view borrows from the buffer it was decoded from.
pub trait Direction {
    /// The message as read from or written to a datagram.
    type Message<'a>: Serialize + Deserialize<'a>;
}

/// The name of a mail in every log.
pub type MailId = ArrayString<{ INSTANCE_MAX + 1 + 16 }>;

/// Longest name of a supervisor's run: its time and its process id in hexadecimal.
const INSTANCE_MAX: usize = 32;

/// The name of this job's mail: the supervisor's run and the job in hexadecimal.
pub fn mail_id(instance: &str, job: JobId) -> MailId {
    let mut id = MailId::new();
    // What doesn't fit is no name that a supervisor gives itself.
    let _ = id.try_push_str(instance);
    let _ = id.try_push('-');
    let digits = (u64::BITS - job.0.leading_zeros()).div_ceil(4).max(1);
    for place in (0..digits).rev() {
        let digit = job.0 >> (4 * place) & 0xf;
        let _ = id.try_push(char::from(b"0123456789abcdef"[digit as usize]));
    }
    id
}

/// Who is at the other end of a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Peer {
    /// A local process, from SO_PEERCRED. `pid` is `None` in a foreign pid namespace.
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

/// Supervisor → worker on the job socket.
#[derive(Debug)]
pub enum ToJobs {}
impl Direction for ToJobs {
    type Message<'a> = Job;
}

/// An accepted connection for a worker; carries the client's socket.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Names the connection in every later message.
    pub job: JobId,
    /// Index into [`Declaration::listeners`] of the worker's generation.
    pub listener: u32,
    /// The supervisor's number of the listening socket; a listener may have several.
    pub listening: ListenerId,
    /// The client.
    pub peer: Peer,
    /// When it was accepted: nanoseconds of CLOCK_BOOTTIME, comparable with
    /// process start times in /proc.
    pub accepted: u64,
    /// When its first byte was there, on the same clock.
    pub spoke: u64,
}

/// Worker → supervisor on the job socket.
#[derive(Debug)]
pub enum ToReports {}
impl Direction for ToReports {
    type Message<'a> = Report<'a>;
}

/// What a worker tells about its jobs.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report<'a> {
    /// The worker can take jobs. Sent once.
    Ready,
    /// The worker wants one more way to the shared dictionaries; carries the supervisor's end of a
    /// channel ([`crate::dictionary`]).
    Dictionary,
    /// A child program, leader of its own process group, runs for this job.
    Child {
        /// The mail it handles.
        job: JobId,
        /// Its process id, equal to its process group.
        pid: i32,
    },
    /// That child has ended and is about to be reaped: from now on its number may become
    /// another process'.
    ChildGone {
        /// The mail it handled.
        job: JobId,
    },
    /// The job's action has a time limit of its own, which a drain waits for.
    Timeout {
        /// The mail.
        job: JobId,
        /// Milliseconds from now.
        milliseconds: u64,
    },
    /// The job came without its socket, because this process had no descriptor free:
    /// the client is to be answered from the supervisor's duplicate. No `Done` follows.
    Lost {
        /// The job.
        job: JobId,
    },
    /// The client's socket is answered and finished with.
    Done {
        /// The mail.
        job: JobId,
        /// What to log, absent when the client left, or was lost, before an answer was due.
        #[serde(borrow)]
        record: Option<MailRecord<'a>>,
    },
}

/// One finished mail, as logged by the supervisor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MailRecord<'a> {
    /// Envelope sender as relayed, escaped as in a Pond record, without `<` and `>`.
    #[serde(borrow)]
    pub sender: Cow<'a, str>,
    /// Envelope recipients as relayed, escaped and separated by commas as in a
    /// Pond record (`<a@b>,<c@d>`), as many as fit in 32 KiB.
    #[serde(borrow)]
    pub recipients: Cow<'a, str>,
    /// How many recipients there are in all.
    pub recipient_count: u32,
    /// How many of them `recipients` leaves out.
    pub recipients_cut: u32,
    /// The account the script set.
    pub account: Option<&'a str>,
    /// What was done: `connect`, `exec`, `exec_raw`, `discard`, `reject`, `defer`, or `-`
    /// when the request or the handler failed before that.
    pub action: &'a str,
    /// Address or program the mail was to go to; it did if `sent` isn't 0. Of several addresses
    /// the last that was tried.
    pub next_hop: Option<&'a str>,
    /// The answer; `None` when the client left before it was due.
    pub status: Option<Status>,
    /// The answer's text, printable.
    #[serde(borrow)]
    pub text: Cow<'a, str>,
    /// Bytes of the message with inserted header lines (without our own `Received`).
    pub size: u64,
    /// Bytes of the request's payload.
    pub received: u64,
    /// Bytes sent to the next hop: payload with inserted lines, 0 if it wasn't tried.
    pub sent: u64,
    /// Microseconds from accept to answer.
    pub duration: u64,
    /// The handler never ran; such a mail has no Pond record.
    pub refused: bool,
}

/// Supervisor → worker on the control socket.
#[derive(Debug)]
pub enum ToControl {}
impl Direction for ToControl {
    type Message<'a> = Control;
}

/// Orders for a worker. The end of this socket means that the supervisor is gone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Control {
    /// Answer at once with a [`Pong`].
    Ping {
        /// Comes back in the answer.
        sequence: u64,
    },
}

/// Worker → supervisor on the control socket.
#[derive(Debug)]
pub enum FromControl {}
impl Direction for FromControl {
    type Message<'a> = Pong;
}

/// How a worker is, sent by its control thread without taking any lock.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pong {
    /// Of the ping.
    pub sequence: u64,
    /// Milliseconds that Lua has been held by the call that runs now, 0 when free.
    pub held: u64,
    /// The job that holds it, 0 when unknown.
    pub job: JobId,
    /// The Lua state hit its memory limit even after a collection: replace this worker.
    pub exhausted: bool,
}

/// Supervisor → zygote.
#[derive(Debug)]
pub enum ToZygote {}
impl Direction for ToZygote {
    type Message<'a> = ZygoteOrder;
}

/// Orders for a zygote, in the order in which they are sent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ZygoteOrder {
    /// First of all: run the script, answer `Declared` or `Failed`.
    Load {
        /// Absolute path of config.lua.
        config: PathBuf,
        /// Call the script's `reload` afterwards.
        reload: bool,
        /// FileDescriptorNames of the sockets that systemd passed, one entry each.
        systemd: Vec<String>,
        /// Prefix of every mail's id, unique to this run of the supervisor.
        instance: String,
    },
    /// Fork a worker; carries its job socket and its control socket, in this order.
    Fork {
        /// Its name.
        worker: WorkerId,
    },
    /// Fork a standby of this zygote; carries that one's channel.
    Standby,
}

/// Zygote → supervisor.
#[derive(Debug)]
pub enum FromZygote {}
impl Direction for FromZygote {
    type Message<'a> = ZygoteReport;
}

/// What a zygote answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ZygoteReport {
    /// The script ran; this is what it wants.
    Declared(Box<Declaration>),
    /// The script uses a shared dictionary while it loads; carries the supervisor's end of a
    /// channel ([`crate::dictionary`]).
    Dictionary,
    /// The script can't be used; the text has file, line and cause.
    Failed {
        /// For the administrator.
        message: String,
    },
    /// The worker runs, as a child of the supervisor.
    Forked {
        /// As ordered.
        worker: WorkerId,
        /// Its process id.
        pid: i32,
    },
    /// The worker could not be forked.
    ForkFailed {
        /// As ordered.
        worker: WorkerId,
        /// The cause.
        message: String,
    },
    /// The standby runs, as a child of the supervisor.
    StandbyForked {
        /// Its process id.
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
