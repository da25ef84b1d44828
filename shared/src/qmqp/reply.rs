//! A reply: a netstring of a status byte and human-readable text.
//!
//! Contract: [`Reply::encode`] writes a form that every client accepts: at most 255 bytes of text,
//! otherwise unchanged. [`parse_reply`] is lenient with the reply of a next hop or a child program:
//! the first netstring counts, later bytes are ignored, and leading zeros in its length are
//! tolerated.
//!
//! # Failure
//! Bytes that can't become a reply within [`MAX_REPLY`] bytes are [`ReplyProgress::Malformed`].

use serde::{Deserialize, Serialize};

use crate::netstring::{append_digit, header};
use crate::qmqp::{MAX_REPLY, MAX_REPLY_TEXT};

/// The result of a mail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Status {
    /// `K`: the server has taken responsibility for the mail.
    Accepted,
    /// `Z`: not now; the client tries again later.
    Temporary,
    /// `D`: never; the client bounces the mail.
    Permanent,
}

impl Status {
    /// Returns the first byte of a reply with this status.
    pub fn code(self) -> u8 {
        match self {
            Self::Accepted => b'K',
            Self::Temporary => b'Z',
            Self::Permanent => b'D',
        }
    }

    /// Returns the status for the first byte of a reply, or `None` if the byte is no status.
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        match code {
            b'K' => Some(Self::Accepted),
            b'Z' => Some(Self::Temporary),
            b'D' => Some(Self::Permanent),
            _ => None,
        }
    }
}

/// A reply. Its text may come from another program, and so may contain any bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The status of the mail.
    pub status: Status,
    /// The text after the status byte.
    pub text: Vec<u8>,
}

impl Reply {
    /// Returns a reply `K` with this text.
    pub fn accepted(text: impl Into<Vec<u8>>) -> Self {
        Self { status: Status::Accepted, text: text.into() }
    }

    /// Returns a reply `Z` with this text.
    pub fn temporary(text: impl Into<Vec<u8>>) -> Self {
        Self { status: Status::Temporary, text: text.into() }
    }

    /// Returns a reply `D` with this text.
    pub fn permanent(text: impl Into<Vec<u8>>) -> Self {
        Self { status: Status::Permanent, text: text.into() }
    }

    /// Returns the netstring for the client, with the text cut to [`MAX_REPLY_TEXT`] bytes.
    pub fn encode(&self) -> Vec<u8> {
        let text = &self.text[..self.text.len().min(MAX_REPLY_TEXT)];
        let head = header(text.len() + 1);
        let mut out = Vec::with_capacity(head.as_bytes().len() + text.len() + 2);
        out.extend_from_slice(head.as_bytes());
        out.push(self.status.code());
        out.extend_from_slice(text);
        out.push(b',');
        out
    }
}

/// The progress of a reply that arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplyProgress {
    /// The reply is incomplete, and the bytes so far are valid.
    NeedMore,
    /// The reply is complete.
    Complete(Reply),
    /// The bytes can't become a reply.
    Malformed,
}

/// Parses a reply from all bytes that have arrived so far.
///
/// The result is never [`ReplyProgress::NeedMore`] for [`MAX_REPLY`] bytes or more.
pub fn parse_reply(input: &[u8]) -> ReplyProgress {
    let input = &input[..input.len().min(MAX_REPLY)];
    match read(input) {
        Some(Some(reply)) => ReplyProgress::Complete(reply),
        Some(None) if input.len() < MAX_REPLY => ReplyProgress::NeedMore,
        _ => ReplyProgress::Malformed,
    }
}

/// Parses the bytes of a reply. `Some(None)` means that it is incomplete, `None` that it is
/// malformed.
fn read(input: &[u8]) -> Option<Option<Reply>> {
    let mut len: usize = 0;
    for (at, &byte) in input.iter().enumerate() {
        match byte {
            b'0'..=b'9' => len = append_digit(len, byte).filter(|&len| len <= MAX_REPLY)?,
            b':' if at > 0 => return body(&input[at + 1..], len, MAX_REPLY - at - 1),
            _ => return None,
        }
    }
    Some(None)
}

/// Parses the part after the colon, of which at most `room` bytes may be read, including the comma.
/// The result is as that of [`read`].
fn body(input: &[u8], len: usize, room: usize) -> Option<Option<Reply>> {
    if len == 0 || len >= room {
        return None;
    }
    let Some(&code) = input.first() else { return Some(None) };
    let status = Status::from_code(code)?;
    match input.get(len) {
        Some(b',') => Some(Some(Reply { status, text: input[1..len].to_vec() })),
        Some(_) => None,
        None => Some(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netstring::encode_into;

    #[test]
    fn codes() {
        for status in [Status::Accepted, Status::Temporary, Status::Permanent] {
            assert_eq!(Status::from_code(status.code()), Some(status));
        }
        for code in [b'k', b'z', b'd', b'X', 0, 255] {
            assert_eq!(Status::from_code(code), None);
        }
    }

    #[test]
    fn encodes() {
        assert_eq!(Reply::accepted("ok").encode(), b"3:Kok,");
        assert_eq!(Reply::temporary("").encode(), b"1:Z,");
        assert_eq!(Reply::permanent(b"\0\xff,".to_vec()).encode(), b"4:D\0\xff,,");
        let long = Reply::accepted(vec![b'x'; 256]).encode();
        assert!(long.starts_with(b"256:Kxx") && long.ends_with(b"x,"));
        assert_eq!(long.len(), 4 + 256 + 1);
    }

    #[test]
    fn parses() {
        use ReplyProgress::{Complete, Malformed, NeedMore};
        let table: &[(&[u8], ReplyProgress)] = &[
            (b"3:Kok,", Complete(Reply::accepted("ok"))),
            (b"1:Z,", Complete(Reply::temporary(""))),
            (b"3:Dno,1:K,", Complete(Reply::permanent("no"))),
            (b"3:Dno,\0\0", Complete(Reply::permanent("no"))),
            (b"0003:Kok,", Complete(Reply::accepted("ok"))),
            (b"4:K,,,,", Complete(Reply::accepted(",,,"))),
            (b"", NeedMore),
            (b"3", NeedMore),
            (b"0", NeedMore),
            (b"3:", NeedMore),
            (b"3:K", NeedMore),
            (b"3:Kok", NeedMore),
            (b"4090:", NeedMore),
            (b"4091:", Malformed),
            (b"04090:", Malformed),
            (b"4096:", Malformed),
            (b"4097", Malformed),
            (b"99999999999999999999999999999", Malformed),
            (b"0:", Malformed),
            (b"0:,", Malformed),
            (b"000:", Malformed),
            (b":", Malformed),
            (b"K", Malformed),
            (b"Kok\n", Malformed),
            (b"-1:", Malformed),
            (b" 1:K,", Malformed),
            (b"1 :K,", Malformed),
            (b"2:X", Malformed),
            (b"2:kx,", Malformed),
            (b"2:Kok,", Malformed),
            (b"2:Ko\n", Malformed),
        ];
        for (input, expected) in table {
            let shown = String::from_utf8_lossy(input);
            assert_eq!(parse_reply(input), *expected, "{shown:?}");
        }
    }

    #[test]
    fn the_longest_reply_fills_the_limit() {
        let text = vec![b'x'; 4089];
        let mut input = Vec::new();
        encode_into(&mut input, &[b"K", &text[..]].concat());
        assert_eq!(input.len(), MAX_REPLY);
        assert_eq!(parse_reply(&input), ReplyProgress::Complete(Reply::accepted(text)));
        assert_eq!(parse_reply(&input[..MAX_REPLY - 1]), ReplyProgress::NeedMore);
    }

    #[test]
    fn zeros_end_at_the_limit() {
        assert_eq!(parse_reply(&[b'0'; MAX_REPLY - 1]), ReplyProgress::NeedMore);
        assert_eq!(parse_reply(&[b'0'; MAX_REPLY]), ReplyProgress::Malformed);
        assert_eq!(parse_reply(&[b'0'; MAX_REPLY + 9]), ReplyProgress::Malformed);
    }
}
