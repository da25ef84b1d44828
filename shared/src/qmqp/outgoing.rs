//! The request as a client writes it.
//!
//! Contract: the message itself is never copied for a relay. [`outgoing`] makes the two small
//! pieces around it, so that one `writev` of head, message and tail is the whole request. The
//! envelope is written as given: whoever calls has validated the addresses.
//!
//! # Failure
//! None.

use crate::netstring::{encode_into, header};

/// What stands around the message in a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Heads of the outer and the message's netstring, and the inserted header lines.
    pub head: Vec<u8>,
    /// The message's comma, sender, recipients, and the last comma.
    pub tail: Vec<u8>,
}

/// Bytes that the envelope of a usual mail fits in.
const TAIL_ROOM: usize = 256;

/// Builds the pieces around a message of `message_len` bytes that begins with `prefix`.
///
/// `prefix` holds the inserted header lines. The `message_len` bytes that are to be sent between
/// head and tail may come in several pieces, say where header fields are left out.
pub fn outgoing<R>(prefix: &[u8], message_len: usize, sender: &[u8], recipients: R) -> Outgoing
where
    R: IntoIterator<Item: AsRef<[u8]>>,
{
    let mut tail = Vec::with_capacity(TAIL_ROOM);
    tail.push(b',');
    encode_into(&mut tail, sender);
    for recipient in recipients {
        encode_into(&mut tail, recipient.as_ref());
    }
    let message_len = prefix.len() + message_len;
    let inner = header(message_len);
    let outer = header(inner.as_bytes().len() + message_len + tail.len());
    tail.push(b',');
    Outgoing { head: [outer.as_bytes(), inner.as_bytes(), prefix].concat(), tail }
}

/// The whole request in one piece.
pub fn encode_request<R>(message: &[u8], sender: &[u8], recipients: R) -> Vec<u8>
where
    R: IntoIterator<Item: AsRef<[u8]>>,
{
    let Outgoing { head, tail } = outgoing(b"", message.len(), sender, recipients);
    [&head, message, &tail].concat()
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
            let Outgoing { head, tail } = outgoing(prefix, len, b"", recipients.iter());
            let whole = [&head, &message[..], &tail].concat();
            let request = parse(&whole, &Limits { max_size: 100_000 }).expect("valid");
            assert_eq!(&whole[request.message], [&prefix[..], &message].concat());
            assert!(request.sender.is_empty());
            assert_eq!(request.recipients.len(), 2);
            assert_eq!(request.payload.end + 1, whole.len());
        }
    }
}
