//! The request as a client writes it.
//!
//! Contract: the message itself is never copied for a relay. [`outgoing`] makes the two small
//! pieces around it, so that one `writev` of head, message and tail is the whole request. The
//! envelope is written as given: whoever calls has validated the addresses.
//!
//! # Failure
//! None.

use crate::netstring::{MAX_PREFIX, encode_into, header};

/// What stands around the message in a request: one piece of memory, so that it is taken once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    bytes: Vec<u8>,
    start: usize,
    middle: usize,
}

impl Outgoing {
    /// Heads of the outer and the message's netstring, and the inserted header lines.
    pub fn head(&self) -> &[u8] {
        &self.bytes[self.start..self.middle]
    }

    /// The message's comma, sender, recipients, and the last comma.
    pub fn tail(&self) -> &[u8] {
        &self.bytes[self.middle..]
    }
}

/// Bytes that all around the message of a usual mail fits in.
const ROOM: usize = 512;

/// Bytes that the two heads take at most; they are known last and stand first.
const HEADS: usize = 2 * MAX_PREFIX;

/// Builds the pieces around a message of `message_len` bytes that begins with what `prefix`
/// appends: the inserted header lines.
///
/// The `message_len` bytes that are to be sent between head and tail may come in several pieces,
/// say where header fields are left out.
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

/// The whole request in one piece.
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
            let request = parse(&whole, &Limits { max_size: 100_000 }).expect("valid");
            assert_eq!(&whole[request.message], [&prefix[..], &message].concat());
            assert!(request.sender.is_empty());
            assert_eq!(request.recipients.len(), 2);
            assert_eq!(request.payload.end + 1, whole.len());
        }
    }
}
