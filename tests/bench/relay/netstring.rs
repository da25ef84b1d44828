//! The small part of QMQP that the load generator, the sink and the bare relay share: building a
//! request, and finding the end of a netstring.
//!
//! Contract: no I/O. The benchmark deliberately doesn't use qrelay's own codec, because a mistake
//! made on both sides would stay hidden.
//!
//! # Failure
//! A malformed or too long length is `Extent::Malformed`; the caller hangs up.

/// Extent of a netstring, as far as its first bytes tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The length isn't complete yet.
    Unknown,
    /// The netstring ends after this many bytes, counted from its first digit to its comma.
    Total(usize),
    /// The bytes are no netstring.
    Malformed,
}

/// Highest number of digits of a length. A length of 1 GiB, the largest `max_size`, has ten.
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

/// Returns `payload` as a netstring.
pub fn encode(payload: &[u8]) -> Vec<u8> {
    let mut out = format!("{}:", payload.len()).into_bytes();
    out.extend_from_slice(payload);
    out.push(b',');
    out
}

/// Returns a complete QMQP request whose message has exactly `size` bytes, but at least the 62 of
/// its header.
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
