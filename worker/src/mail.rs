//! One mail on its way through a worker: the request as received and what the
//! handler changed about it. No Lua, no I/O.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use qrelay_shared::ipc::message::{MailId, Peer};
use qrelay_shared::qmqp::Request;

/// A complete, valid request with its context.
#[derive(Debug)]
pub struct Mail {
    /// Unique, in every log line about this mail.
    pub id: MailId,
    /// The supervisor's number of the job.
    pub job: u64,
    /// The whole request as received; the ranges of `request` point into it.
    pub buffer: Vec<u8>,
    /// Where message, sender and recipients are in `buffer`.
    pub request: Request,
    /// The sender, if the handler replaced it.
    pub sender: Option<Vec<u8>>,
    /// The recipients, if the handler replaced them.
    pub recipients: Option<Vec<Vec<u8>>>,
    /// The account, if the handler set it.
    pub account: Option<String>,
    /// Inserted header lines without line ends, in the order of the calls.
    pub inserted: Vec<Vec<u8>>,
    /// Ranges of `buffer` that are left out when relaying: whole fields, sorted, disjoint.
    pub removed: Vec<std::ops::Range<usize>>,
    /// The client.
    pub peer: Peer,
    /// The client's socket, for SO_PEERPIDFD.
    pub socket: Arc<OwnedFd>,
    /// When the connection was accepted: nanoseconds of CLOCK_BOOTTIME.
    pub accepted: u64,
    /// The listener's address as written in the configuration.
    pub listener: Arc<str>,
}

#[cfg(test)]
pub(crate) mod test {
    //! Mails for unit tests.

    use super::*;
    use qrelay_shared::ipc::message::mail_id;
    use qrelay_shared::qmqp::{Limits, encode_request, parse};

    /// A mail from pid 1, uid 2 whose socket leads nowhere.
    pub(crate) fn mail(message: &[u8], sender: &[u8], recipients: &[&[u8]]) -> Mail {
        let buffer = encode_request(message, sender, recipients);
        let request = parse(&buffer, &Limits { max_size: 1 << 30 }).expect("valid");
        let (socket, _) = std::os::unix::net::UnixStream::pair().expect("pair");
        Mail {
            id: mail_id("test", 1),
            job: 1,
            buffer,
            request,
            sender: None,
            recipients: None,
            account: None,
            inserted: Vec::new(),
            removed: Vec::new(),
            peer: Peer::Local { pid: Some(1), uid: 2, gid: 3 },
            socket: Arc::new(socket.into()),
            accepted: 0,
            listener: "/test".into(),
        }
    }
}
