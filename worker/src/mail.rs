//! A mail: the request as received, and the changes of its handler. No Lua, no I/O.

mod kept;
pub(crate) mod memory;
pub(crate) mod received;

use std::borrow::Cow;
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;

use qrelay_shared::address::complete;
use qrelay_shared::flight::Writer;
use qrelay_shared::header;
use qrelay_shared::ids::JobId;
use qrelay_shared::ipc::message::{MailId, Peer};
use qrelay_shared::qmqp::Request;

use crate::client::process::Client;
use crate::client::socket::ClientSocket;

/// The origin of a mail.
#[derive(Debug)]
pub struct Origin {
    /// Unique, in every log line about the mail.
    pub id: MailId,
    /// The listener's address as written in the configuration.
    pub listener: Arc<str>,
    /// The client's identity, as the kernel reported it when the client connected.
    pub peer: Peer,
    /// The client's socket.
    pub socket: ClientSocket,
}

/// What a trial assumes about a client that has no connection.
#[derive(Debug, Clone)]
pub(crate) enum Assumed {
    /// The client is the process that has the number now.
    Process,
    /// The client is in the control group with this path, which needs not exist.
    Group(Arc<[u8]>),
}

/// A complete, valid request with its origin, and what its handler changed.
#[derive(Debug)]
pub struct Mail {
    origin: Origin,
    /// The whole request as received; all ranges point into it.
    buffer: Vec<u8>,
    request: Request,
    /// The handler's replacements for the received values.
    sender: Option<Vec<u8>>,
    recipients: Option<Vec<Vec<u8>>>,
    account: Option<String>,
    inserted: Inserted,
    /// Whole fields, as ranges in the message, sorted, disjoint.
    removed: Vec<Range<usize>>,
    client: Option<Arc<Client>>,
    assumed: Option<Assumed>,
    notes: Option<Writer<'static>>,
    default_domain: Option<Arc<str>>,
}

impl Mail {
    /// A mail as received: `request` says where its parts are in `buffer`.
    pub fn new(origin: Origin, buffer: Vec<u8>, request: Request) -> Self {
        Self {
            origin,
            buffer,
            request,
            sender: None,
            recipients: None,
            account: None,
            inserted: Inserted::default(),
            removed: Vec::new(),
            client: None,
            assumed: None,
            notes: None,
            default_domain: None,
        }
    }

    /// Adds this domain to the addresses that have none, now and when the handler sets others.
    pub(crate) fn complete_addresses(&mut self, domain: &Arc<str>) {
        self.default_domain = Some(Arc::clone(domain));
        let sender = self.complete(self.sender());
        let recipients: Vec<_> = self.recipients().map(|address| self.complete(address)).collect();
        let changed = recipients.iter().any(|address| matches!(address, Cow::Owned(_)));
        let recipients = changed.then(|| recipients.into_iter().map(Cow::into_owned).collect());
        self.sender = Some(sender.into_owned());
        self.recipients = recipients;
    }

    /// Adds the default domain to an address that has none, if there is a default domain.
    pub(crate) fn complete<'a>(&self, address: &'a [u8]) -> Cow<'a, [u8]> {
        complete(address, self.default_domain.as_deref())
    }

    /// Unique, in every log line about the mail.
    pub fn id(&self) -> MailId {
        self.origin.id
    }

    /// The supervisor's number of the job.
    pub fn job(&self) -> JobId {
        self.origin.socket.job
    }

    /// The listener's address as written in the configuration.
    pub(crate) fn listener(&self) -> &Arc<str> {
        &self.origin.listener
    }

    /// The client's identity, as the kernel reported it when the client connected.
    pub(crate) fn peer(&self) -> &Peer {
        &self.origin.peer
    }

    /// The client's socket and where it came from.
    pub(crate) fn socket(&self) -> &ClientSocket {
        &self.origin.socket
    }

    /// The descriptor of the client's socket.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.origin.socket.descriptor.as_fd()
    }

    /// Keeps the client's process as long as the mail, for other mails of the same client.
    pub(crate) fn keep_client(&mut self, client: Arc<Client>) -> &Client {
        self.client.insert(client)
    }

    /// Has the client be looked for where it is assumed, instead of at the other end of its socket.
    pub(crate) fn assume(&mut self, client: Assumed) {
        self.assumed = Some(client);
    }

    /// Returns what is assumed about a client that has no connection.
    pub(crate) fn assumed(&self) -> Option<&Assumed> {
        self.assumed.as_ref()
    }

    /// The message as received, with every field.
    pub(crate) fn message(&self) -> &[u8] {
        &self.buffer[self.request.message.clone()]
    }

    /// Bytes of the message with inserted lines, but without qrelay's own `Received` line.
    pub(crate) fn relayed_length(&self) -> usize {
        self.message().len() + self.inserted().size()
    }

    /// Bytes of message and envelope as received.
    pub(crate) fn payload_length(&self) -> usize {
        self.request.payload.len()
    }

    /// The envelope's sender: the handler's, else the client's.
    pub fn sender(&self) -> &[u8] {
        self.sender.as_deref().unwrap_or(&self.buffer[self.request.sender.clone()])
    }

    /// Replaces the sender; it has been checked.
    pub(crate) fn set_sender(&mut self, sender: Vec<u8>) {
        self.sender = Some(sender);
    }

    /// The envelope's recipients: the handler's, else the client's.
    pub fn recipients(&self) -> impl Iterator<Item = &[u8]> {
        let (replaced, received) = match &self.recipients {
            Some(replaced) => (&replaced[..], &[][..]),
            None => (&[][..], &self.request.recipients[..]),
        };
        let received = received.iter().map(|range| &self.buffer[range.clone()]);
        replaced.iter().map(Vec::as_slice).chain(received)
    }

    /// Replaces the recipients; they have been checked.
    pub(crate) fn set_recipients(&mut self, recipients: Vec<Vec<u8>>) {
        self.recipients = Some(recipients);
    }

    /// The account that the handler set for the mail log.
    pub fn account(&self) -> Option<&str> {
        self.account.as_deref()
    }

    /// Has the account noted in the flight recorder when it is set.
    pub(crate) fn note_in(&mut self, notes: Option<Writer<'static>>) {
        self.notes = notes;
    }

    /// Sets the account, or takes it back.
    pub(crate) fn set_account(&mut self, account: Option<String>) {
        if let Some(notes) = self.notes {
            notes.account(account.as_deref().unwrap_or_default());
        }
        self.account = account;
    }

    /// The header lines that the handler inserted.
    pub fn inserted(&self) -> &Inserted {
        &self.inserted
    }

    /// Inserts a header line before the others; it has been checked.
    pub fn insert_header(&mut self, name: &[u8], value: &[u8]) {
        self.inserted.insert(name, value);
    }

    /// Leaves out whole fields of the message, given by their ranges in it, when it is relayed.
    pub(crate) fn remove_fields(&mut self, fields: impl IntoIterator<Item = Range<usize>>) {
        self.removed.extend(fields);
        self.removed.sort_by_key(|range: &Range<usize>| range.start);
        self.removed.dedup();
    }

    /// The pieces of the message that `remove_fields` leaves; none of them is empty.
    pub fn kept(&self) -> impl Iterator<Item = &[u8]> {
        header::without(self.message(), &self.removed)
    }

    /// Returns the fields that `remove_fields` leaves out.
    pub(crate) fn removed(&self) -> impl Iterator<Item = &[u8]> {
        self.removed.iter().map(|range| &self.message()[range.clone()])
    }

    /// How many ranges of the message are left out at most.
    pub(crate) fn removed_count(&self) -> usize {
        self.removed.len()
    }

    /// The end of the lines that are put in front of the message.
    pub fn line_ending(&self) -> &'static [u8] {
        header::line_ending(self.message())
    }

    /// Ends the mail; its buffer can be used again.
    pub(crate) fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }
}

/// First capacity for inserted lines, in bytes: a few lines.
const ROOM: usize = 256;

/// Inserted header lines.
#[derive(Debug, Default)]
pub struct Inserted {
    /// Each line ends in LF.
    text: Vec<u8>,
    count: usize,
}

impl Inserted {
    fn insert(&mut self, name: &[u8], value: &[u8]) {
        if self.count == 0 {
            self.text.reserve(ROOM);
        }
        let before = self.text.len();
        for part in [name, b": ", value, b"\n"] {
            self.text.extend_from_slice(part);
        }
        let length = self.text.len() - before;
        self.text.rotate_right(length);
        self.count += 1;
    }

    /// Returns the number of inserted lines.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Returns the inserted lines as they will stand in the message, the last one first, without
    /// their ends.
    pub fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.text.split_inclusive(|&b| b == b'\n').map(|line| &line[..line.len() - 1])
    }

    /// Returns the size of the inserted lines in bytes, each with CR and LF, as the original
    /// program has them.
    pub(crate) fn size(&self) -> usize {
        self.text.len() + self.count
    }
}

#[cfg(test)]
pub(crate) mod test {
    //! Mails for unit tests.

    use super::*;
    use qrelay_shared::ids::ListenerId;
    use qrelay_shared::ipc::message::mail_id;
    use qrelay_shared::qmqp::{Limits, encode_request, parse};
    use qrelay_shared::sys::rights::{PeerSocket, Rights};

    /// A mail from pid 1, uid 2 whose socket leads nowhere.
    pub(crate) fn mail(message: &[u8], sender: &[u8], recipients: &[&[u8]]) -> Mail {
        mail_from(Peer::Local { pid: Some(1), uid: 2, gid: 3 }, message, sender, recipients)
    }

    /// A mail whose socket leads nowhere.
    pub(crate) fn mail_from(
        peer: Peer,
        message: &[u8],
        sender: &[u8],
        recipients: &[&[u8]],
    ) -> Mail {
        let buffer = encode_request(message, sender, recipients);
        let request =
            parse(&buffer, &Limits { max_size: 1 << 30, default_domain: None }).expect("valid");
        let (socket, _) = std::os::unix::net::UnixStream::pair().expect("pair");
        let origin = Origin {
            id: mail_id("test", JobId(1)),
            listener: "/test".into(),
            peer,
            socket: ClientSocket {
                descriptor: Arc::new(PeerSocket::new(socket.into(), Rights::Refused)),
                job: JobId(1),
                listening: ListenerId(0),
                accepted: 0,
            },
        };
        Mail::new(origin, buffer, request)
    }
}
