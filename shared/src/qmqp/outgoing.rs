//! A request as a client writes it.
//!
//! Contract: the message itself is never copied for a relay. [`outgoing`] builds the two small
//! pieces around the message, so that one `writev` of head, message and tail is the whole request.
//! The envelope is written as given; the caller has validated the addresses.
//!
//! # Failure
//! None.

use crate::netstring::{MAX_PREFIX, encode_into, header};

/// The bytes around the message in a request, in one allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    bytes: Vec<u8>,
    start: usize,
    middle: usize,
}

impl Outgoing {
    /// Returns the bytes before the message: the heads of the outer netstring and of the message's,
    /// and the inserted header lines.
    pub fn head(&self) -> &[u8] {
        &self.bytes[self.start..self.middle]
    }

    /// Returns the bytes after the message: its comma, sender, recipients, and the last comma.
    pub fn tail(&self) -> &[u8] {
        &self.bytes[self.middle..]
    }
}

/// Memory in bytes that is enough for everything around the message of a usual mail.
const ROOM: usize = 512;

/// Memory in bytes that is reserved for the two heads, because they come first but are known last.
const HEADS: usize = 2 * MAX_PREFIX;

/// Builds the pieces around a message of `message_len` bytes. `prefix` appends the inserted header
/// lines, which become the start of the message.
///
/// The `message_len` bytes that are sent between head and tail may consist of several pieces, for
/// example where header fields are left out.
pub fn outgoing<R>(
    prefix: impl FnOnce(&mut Vec<u8>),
    message_len: usize,
    sender: &[u8],
    recipients: R,
) -> Outgoing
where
    R: IntoIterator<Item: AsRef<[u8]>>,
{
    let mut bytes = Vec::with_capacity(ROOM);
    bytes.resize(HEADS, 0);
    prefix(&mut bytes);
    let middle = bytes.len();
    bytes.push(b',');
    encode_into(&mut bytes, sender);
    for recipient in recipients {
        encode_into(&mut bytes, recipient.as_ref());
    }
    let message_len = middle - HEADS + message_len;
    let inner = header(message_len);
    let outer = header(inner.as_bytes().len() + message_len + bytes.len() - middle);
    bytes.push(b',');
    let mut start = HEADS;
    for head in [inner.as_bytes(), outer.as_bytes()] {
        let end = start;
        start -= head.len();
        bytes[start..end].copy_from_slice(head);
    }
    Outgoing { bytes, start, middle }
}

/// Returns a whole request in one piece.
pub fn encode_request<R>(message: &[u8], sender: &[u8], recipients: R) -> Vec<u8>
where
    R: IntoIterator<Item: AsRef<[u8]>>,
{
    let around = outgoing(|_| (), message.len(), sender, recipients);
    [around.head(), message, around.tail()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmqp::{Limits, parse};

    #[test]
    fn encodes() {
        let request = encode_request(b"a: b\n\n", b"s@x.y", ["r@x", "q@x.y"]);
        assert_eq!(request, b"31:6:a: b\n\n,5:s@x.y,3:r@x,5:q@x.y,,");
    }

    #[test]
    fn pieces_make_a_request() {
        let prefix = b"X-A: b\r\nReceived: from PID=1 UID=2 with QMQP\r\n";
        for len in [0, 1, 9, 10, 99, 100, 999, 1000, 70_000] {
            let message = vec![b'm'; len];
            let recipients = [b"r@x".to_vec(), b"q@y".to_vec()];
            let insert = |out: &mut Vec<u8>| out.extend_from_slice(prefix);
            let around = outgoing(insert, len, b"", recipients.iter());
            let whole = [around.head(), &message, around.tail()].concat();
            let request =
                parse(&whole, &Limits { max_size: 100_000, default_domain: None }).expect("valid");
            assert_eq!(&whole[request.message], [&prefix[..], &message].concat());
            assert!(request.sender.is_empty());
            assert_eq!(request.recipients.len(), 2);
            assert_eq!(request.payload.end + 1, whole.len());
        }
    }
}
