//! Netstrings: `len:payload,` (<https://cr.yp.to/proto/netstrings.txt>).
//!
//! Contract: the writer is exact, and the reader is strict. A length is decimal, without sign,
//! space or leading zero (except for `0` itself). The reader compares the length with the caller's
//! limit digit by digit, so that no caller reserves memory for a length over its limit. A reader
//! that tolerates more (leading zeros in the length of a reply) is in [`crate::qmqp`].
//!
//! # Failure
//! No function panics on foreign bytes: invalid bytes return a [`NetstringError`], at the first
//! byte that no valid continuation can repair.

use thiserror::Error;

/// The reason why bytes are no acceptable netstring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NetstringError {
    /// The bytes break the syntax, whatever may follow.
    #[error("malformed netstring")]
    Malformed,
    /// The length exceeds the limit given by the caller.
    #[error("netstring too large")]
    TooLarge,
}

/// The head of a netstring, as far as it has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// The colon has not arrived yet, and the bytes so far are valid.
    NeedMore,
    /// The head is complete, and the length is known.
    Complete {
        /// Length of the payload in bytes.
        len: usize,
        /// Length of the head in bytes: digits and colon.
        header: usize,
    },
}

/// Longest head in bytes: the digits of the largest `usize` (20 with 64 bits) and the colon.
pub(crate) const MAX_PREFIX: usize = 21;

/// The head `len:` of a netstring, stored without the heap, so that it can be one piece of a
/// `writev`.
#[derive(Debug, Clone, Copy)]
pub struct Prefix {
    buf: [u8; MAX_PREFIX],
    len: u8,
}

impl Prefix {
    /// Returns the digits and the colon.
    pub fn as_bytes(&self) -> &[u8] {
        &self.buf[..usize::from(self.len)]
    }
}

impl AsRef<[u8]> for Prefix {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

/// Returns the head of a netstring whose payload has `len` bytes, without a heap allocation.
pub fn header(len: usize) -> Prefix {
    let mut digits = itoa::Buffer::new();
    let digits = digits.format(len).as_bytes();
    let mut buf = [b':'; MAX_PREFIX];
    buf[..digits.len()].copy_from_slice(digits);
    // The length is at most MAX_PREFIX, so it fits a `u8`.
    Prefix { buf, len: digits.len() as u8 + 1 }
}

/// Appends `payload` as a netstring to `out`.
pub fn encode_into(out: &mut Vec<u8>, payload: &[u8]) {
    let head = header(payload.len());
    out.reserve(head.as_bytes().len() + payload.len() + 1);
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(payload);
    out.push(b',');
}

/// Parses the head of a netstring from the bytes that have arrived so far.
///
/// `max` is the largest acceptable payload in bytes. The function reads at most as many bytes as
/// `max` has digits, plus one.
///
/// # Errors
/// Returns [`NetstringError::TooLarge`] as soon as the digits so far exceed `max`, and
/// [`NetstringError::Malformed`] at the first byte that can't be part of a length.
pub(crate) fn parse_head(input: &[u8], max: usize) -> Result<Head, NetstringError> {
    let mut len: usize = 0;
    for (at, &byte) in input.iter().enumerate() {
        match byte {
            b'0'..=b'9' if at > 0 && len == 0 => return Err(NetstringError::Malformed),
            b'0'..=b'9' => {
                len = append_digit(len, byte).ok_or(NetstringError::TooLarge)?;
                if len > max {
                    return Err(NetstringError::TooLarge);
                }
            }
            b':' if at > 0 => return Ok(Head::Complete { len, header: at + 1 }),
            _ => return Err(NetstringError::Malformed),
        }
    }
    Ok(Head::NeedMore)
}

/// Returns `len` with one more decimal digit, or `None` if the result exceeds `usize`.
pub(crate) fn append_digit(len: usize, digit: u8) -> Option<usize> {
    len.checked_mul(10)?.checked_add(usize::from(digit - b'0'))
}

/// Splits the first netstring off an input that is known to be complete, and returns `(payload,
/// rest)`.
///
/// # Errors
/// Returns [`NetstringError::Malformed`], also for a netstring that reaches beyond the input.
pub fn split(input: &[u8]) -> Result<(&[u8], &[u8]), NetstringError> {
    let Ok(Head::Complete { len, header }) = parse_head(input, input.len()) else {
        return Err(NetstringError::Malformed);
    };
    let body = &input[header..];
    // `len` is at most the size of a slice, so adding one can't overflow.
    if body.len() < len + 1 || body[len] != b',' {
        return Err(NetstringError::Malformed);
    }
    Ok((&body[..len], &body[len + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_writes_every_length() {
        for len in [0, 1, 9, 10, 99, 100, 4095, 16_777_216, usize::MAX] {
            assert_eq!(header(len).as_bytes(), format!("{len}:").as_bytes());
            assert_eq!(header(len).as_ref(), header(len).as_bytes());
        }
    }

    #[test]
    fn encodes() {
        let mut out = b"x".to_vec();
        encode_into(&mut out, b"");
        encode_into(&mut out, b"hello, world");
        assert_eq!(out, b"x0:,12:hello, world,");
    }

    #[test]
    fn heads() {
        use NetstringError::{Malformed, TooLarge};
        let complete = |len, header| Ok(Head::Complete { len, header });
        let more = Ok(Head::NeedMore);
        let table: &[(&[u8], usize, Result<Head, NetstringError>)] = &[
            (b"", 10, more),
            (b"0", 10, more),
            (b"0:", 10, complete(0, 2)),
            (b"0:,", 0, complete(0, 2)),
            (b"1", 10, more),
            (b"10:", 10, complete(10, 3)),
            (b"10", 10, more),
            (b"11", 10, Err(TooLarge)),
            (b"11:", 10, Err(TooLarge)),
            (b"2", 1, Err(TooLarge)),
            (b"1:", 0, Err(TooLarge)),
            (b"99999999999999999999999999999", usize::MAX, Err(TooLarge)),
            (b"18446744073709551616", usize::MAX, Err(TooLarge)),
            (b"00", 10, Err(Malformed)),
            (b"00:", 10, Err(Malformed)),
            (b"01:a,", 10, Err(Malformed)),
            (b":", 10, Err(Malformed)),
            (b"+1:", 10, Err(Malformed)),
            (b"-", 10, Err(Malformed)),
            (b" 1:", 10, Err(Malformed)),
            (b"1 :", 10, Err(Malformed)),
            (b"1,", 10, Err(Malformed)),
            (b"\0", 10, Err(Malformed)),
            (b"GET / HTTP/1.0\r\n", 10, Err(Malformed)),
            (b"\xd9\xa1:", 10, Err(Malformed)),
        ];
        for (input, max, expected) in table {
            let shown = String::from_utf8_lossy(input);
            assert_eq!(parse_head(input, *max), *expected, "{shown:?} up to {max}");
        }
    }

    #[test]
    fn splits() {
        type Split<'a> = Option<(&'a [u8], &'a [u8])>;
        let table: &[(&[u8], Split)] = &[
            (b"0:,", Some((b"", b""))),
            (b"3:abc,", Some((b"abc", b""))),
            (b"3:abc,1:d,", Some((b"abc", b"1:d,"))),
            (b"3:a,c,x", Some((b"a,c", b"x"))),
            (b"", None),
            (b"3", None),
            (b"3:", None),
            (b"3:abc", None),
            (b"3:abcd", None),
            (b"03:abc,", None),
            (b"18446744073709551615:", None),
        ];
        for (input, expected) in table {
            let shown = String::from_utf8_lossy(input);
            assert_eq!(split(input).ok(), *expected, "{shown:?}");
        }
    }
}
