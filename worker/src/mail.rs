//! One mail on its way through a worker: the request as received and what the
//! handler changed about it. No Lua, no I/O.

pub mod memory;
pub mod received;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use qrelay_shared::ids::{JobId, ListenerId};
use qrelay_shared::ipc::message::{MailId, Peer};
use qrelay_shared::qmqp::Request;

use crate::client::process::Client;

/// A complete, valid request with its context.
#[derive(Debug)]
pub struct Mail {
    /// Unique, in every log line about this mail.
    pub id: MailId,
    /// The supervisor's number of the job.
    pub job: JobId,
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
    /// The header lines that the handler inserted.
    pub inserted: Inserted,
    /// Ranges of `buffer` that are left out when relaying: whole fields, sorted, disjoint.
    pub removed: Vec<std::ops::Range<usize>>,
    /// The client.
    pub peer: Peer,
    /// The client's socket, for SO_PEERPIDFD.
    pub socket: Arc<OwnedFd>,
    /// The supervisor's number of the socket that the client connected to.
    pub listening: ListenerId,
    /// When the connection was accepted: nanoseconds of CLOCK_BOOTTIME.
    pub accepted: u64,
    /// The client's process, once it has been asked for. Kept as long as the mail, for others of
    /// the same client.
    pub client: Option<Arc<Client>>,
    /// The listener's address as written in the configuration.
    pub listener: Arc<str>,
}

/// Bytes to begin with: a few lines.
const ROOM: usize = 256;

/// Inserted header lines, as they will stand in the message: the last one first.
#[derive(Debug, Default)]
pub struct Inserted {
    text: Vec<u8>,
    count: usize,
}

impl Inserted {
    /// Puts a line before the others; it has been checked.
    pub fn insert(&mut self, name: &[u8], value: &[u8]) {
        if self.count == 0 {
            self.text.reserve(ROOM);
        }
        let before = self.text.len();
        for part in [name, b": ", value, b"\r\n"] {
            self.text.extend_from_slice(part);
        }
        let length = self.text.len() - before;
        self.text.rotate_right(length);
        self.count += 1;
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// All of them, each with its CRLF.
    pub fn text(&self) -> &[u8] {
        &self.text
    }
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
            id: mail_id("test", JobId(1)),
            job: JobId(1),
            buffer,
            request,
            sender: None,
            recipients: None,
            account: None,
            inserted: Inserted::default(),
            removed: Vec::new(),
            peer: Peer::Local { pid: Some(1), uid: 2, gid: 3 },
            socket: Arc::new(socket.into()),
            listening: ListenerId(0),
            accepted: 0,
            client: None,
            listener: "/test".into(),
        }
    }
}
