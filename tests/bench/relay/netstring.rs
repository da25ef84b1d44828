//! The little QMQP that the load generator, the sink and the bare relay share: a request to send, and
//! where a netstring ends.
//!
//! Contract: no I/O. It is deliberately not qrelay's own codec, so that a mistake there can't hide by being
//! made on both sides.
//!
//! # Failure
//! A length that is malformed or absurd is `Extent::Malformed`; the caller hangs up.

/// What the first bytes of a connection tell about its netstring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The length isn't complete yet.
    Unknown,
    /// The netstring ends after this many bytes, counted from its first digit to its comma.
    Total(usize),
    /// This is no netstring.
    Malformed,
}

/// Digits that a length may have here: 1 GiB, the largest `max_size`, has ten.
const MAX_DIGITS: usize = 10;

/// Reads the length of the netstring that starts with `bytes`.
pub fn extent(bytes: &[u8]) -> Extent {
    let mut length = 0usize;
    for (index, byte) in bytes.iter().take(MAX_DIGITS + 1).enumerate() {
        match byte {
            b'0'..=b'9' if index < MAX_DIGITS => length = length * 10 + usize::from(byte - b'0'),
            b':' if index > 0 => return Extent::Total(index + 1 + length + 1),
            _ => return Extent::Malformed,
        }
    }
    Extent::Unknown
}

/// `payload` as a netstring.
pub fn encode(payload: &[u8]) -> Vec<u8> {
    let mut out = format!("{}:", payload.len()).into_bytes();
    out.extend_from_slice(payload);
    out.push(b',');
    out
}

/// A complete QMQP request whose message has exactly `size` bytes (at least its header's 60).
pub fn request(size: usize) -> Vec<u8> {
    let mut message =
        b"From: <a@example.com>\nTo: <b@example.net>\nSubject: benchmark\n\n".to_vec();
    while message.len() < size {
        let column = message.len() % 72;
        message.push(if column == 71 { b'\n' } else { b'a' + (column % 26) as u8 });
    }
    let mut payload = encode(&message);
    payload.extend(encode(b"a@example.com"));
    payload.extend(encode(b"b@example.net"));
    encode(&payload)
}
