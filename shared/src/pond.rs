//! The log datagram of the Pond protocol; each mail has one.
//!
//! Contract: a datagram consists of the magic number, the attributes (a byte with the id, then the
//! payload) in the original program's order, and a CRC-32. Integers are big-endian. Strings end
//! with a NUL and contain no control characters. The message stays below 32 KiB ([`MAX_MESSAGE`]),
//! so that a datagram always fits; a message that had to be cut has the attribute TRUNCATED.
//!
//! # Failure
//! None: every text of a client or next hop can be put into a record.

use serde::{Deserialize, Serialize};

use crate::address::{escape_for_log, printable};

/// The magic number: the first four bytes of a datagram.
const MAGIC: u32 = 0x6304_6103;
/// Value of the attribute TYPE for the submission of a mail.
const TYPE_SUBMISSION: u8 = 3;
/// Size in bytes that the attribute MESSAGE stays below.
pub const MAX_MESSAGE: usize = 32 * 1024;
/// Longest other string in bytes, and longest text at the end of a message.
const MAX_TEXT: usize = 4096;

/// Ids of the attributes.
mod id {
    pub(super) const TIMESTAMP: u8 = 1;
    pub(super) const REMOTE_HOST: u8 = 2;
    pub(super) const SITE: u8 = 3;
    pub(super) const LENGTH: u8 = 9;
    pub(super) const TRAFFIC: u8 = 10;
    pub(super) const DURATION: u8 = 11;
    pub(super) const MESSAGE: u8 = 13;
    pub(super) const FORWARDED_TO: u8 = 14;
    pub(super) const TYPE: u8 = 15;
    pub(super) const TRUNCATED: u8 = 20;
}

/// The attribute MESSAGE: `from=<S> to=<R1>,<R2>,… TEXT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The text, printable and shorter than [`MAX_MESSAGE`] when made by [`Message::new`].
    pub text: String,
    /// Whether a part of the text was cut.
    pub truncated: bool,
}

impl Message {
    /// Builds a message. `text` is the reply without its first byte, or `canceled`.
    ///
    /// Recipients that don't fit are counted instead: `<R1>,… +N more`.
    pub fn new<R>(sender: &[u8], recipients: R, text: &[u8]) -> Self
    where
        R: IntoIterator<Item: AsRef<[u8]>>,
    {
        let (end, text_cut) = cut(printable(text).into_owned(), MAX_TEXT);
        let (from, from_cut) = cut(escape_for_log(sender).into_owned(), MAX_TEXT);
        let mut message = format!("from=<{from}> to=");
        // The recipients are followed by at most: ",… +18446744073709551615 more", a space, the
        // text.
        let room = MAX_MESSAGE - end.len() - 33;
        let more = push_recipients(&mut message, recipients, room);
        message.push(' ');
        message.push_str(&end);
        Self { text: message, truncated: text_cut || from_cut || more }
    }
}

/// Appends recipients while `message` stays within `room` bytes. Returns whether some were left
/// out.
fn push_recipients<R>(message: &mut String, recipients: R, room: usize) -> bool
where
    R: IntoIterator<Item: AsRef<[u8]>>,
{
    let mut recipients = recipients.into_iter();
    let mut separator = "";
    while let Some(recipient) = recipients.next() {
        let shown = escape_for_log(recipient.as_ref());
        if message.len() + separator.len() + shown.len() + 2 > room {
            let left = 1 + recipients.count();
            message.push_str(&format!("{separator}… +{left} more"));
            return true;
        }
        message.push_str(&format!("{separator}<{shown}>"));
        separator = ",";
    }
    false
}

/// Cuts a text to `max` bytes at a character boundary. Returns the text, and whether it was cut.
fn cut(mut text: String, max: usize) -> (String, bool) {
    let whole = text.len();
    if whole > max {
        let boundary = (0..=max).rev().find(|&at| text.is_char_boundary(at));
        text.truncate(boundary.unwrap_or(0));
    }
    let shorter = text.len() < whole;
    (text, shorter)
}

/// The content of a record about a mail.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// TIMESTAMP: microseconds since the epoch.
    pub timestamp: u64,
    /// REMOTE_HOST: the IP address of a client on the network.
    pub remote_host: Option<&'a str>,
    /// SITE: the account that the script set.
    pub site: Option<&'a [u8]>,
    /// FORWARDED_TO: the address of the next hop, if the mail was relayed.
    pub forwarded_to: Option<&'a str>,
    /// MESSAGE, and TRUNCATED if the message was cut.
    pub message: &'a Message,
    /// LENGTH: bytes of the message and the inserted header lines.
    pub length: u64,
    /// TRAFFIC, first part: bytes of the request's payload.
    pub received: u64,
    /// TRAFFIC, second part: bytes of the request's payload and the inserted header lines if
    /// relaying was attempted, else 0.
    pub sent: u64,
    /// DURATION in microseconds.
    pub duration: u64,
}

/// Returns the datagram for a record.
///
/// A message from another process is cut and made printable again, because that process may be
/// faulty.
pub fn encode(record: &Record<'_>) -> Vec<u8> {
    let (message, cut_again) =
        cut(printable(record.message.text.as_bytes()).into_owned(), MAX_MESSAGE - 1);
    let mut out = Vec::with_capacity(128 + message.len());
    out.extend_from_slice(&MAGIC.to_be_bytes());
    push_u64(&mut out, id::TIMESTAMP, &[record.timestamp]);
    push_optional(&mut out, id::REMOTE_HOST, record.remote_host.map(str::as_bytes));
    push_optional(&mut out, id::SITE, record.site);
    push_optional(&mut out, id::FORWARDED_TO, record.forwarded_to.map(str::as_bytes));
    push_string(&mut out, id::MESSAGE, &message);
    push_u64(&mut out, id::LENGTH, &[record.length]);
    push_u64(&mut out, id::TRAFFIC, &[record.received, record.sent]);
    push_u64(&mut out, id::DURATION, &[record.duration]);
    out.extend_from_slice(&[id::TYPE, TYPE_SUBMISSION]);
    if record.message.truncated || cut_again {
        out.extend_from_slice(&[id::TRUNCATED, id::MESSAGE]);
    }
    let crc = crc32fast::hash(&out[size_of_val(&MAGIC)..]);
    out.extend_from_slice(&crc.to_be_bytes());
    out
}

fn push_u64(out: &mut Vec<u8>, id: u8, values: &[u64]) {
    out.push(id);
    values.iter().for_each(|value| out.extend_from_slice(&value.to_be_bytes()));
}

fn push_optional(out: &mut Vec<u8>, id: u8, text: Option<&[u8]>) {
    if let Some(text) = text {
        push_string(out, id, &cut(printable(text).into_owned(), MAX_TEXT).0);
    }
}

/// Appends a string attribute. `text` is printable, so it contains no NUL.
fn push_string(out: &mut Vec<u8>, id: u8, text: &str) {
    out.push(id);
    out.extend_from_slice(text.as_bytes());
    out.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    // Datagrams of the original program, captured on loopback.
    const RELAYED: &str = "\
        6304610301000660ff6bc4ca1a03616363743432000d66726f6d3d3c616363406578616d706c652e636f6d3e\
        20746f3d3c7231406578616d706c652e6f72673e2c3c7232406578616d706c652e6f72673e206f6b00090000\
        00000000001a0a000000000000004d00000000000000550b00000000000001d50f03e13a0bc1";
    const REJECTED: &str = "\
        6304610301000660ff6bc4cb810d66726f6d3d3c72656a406578616d706c652e636f6d3e20746f3d3c723140\
        6578616d706c652e6f72673e2072656a6563746564000900000000000000120a000000000000003b00000000\
        000000000b000000000000001a0f03d055ac87";
    const DISCARDED: &str = "\
        6304610301000660ff6bc4cc950d66726f6d3d3c64406578616d706c652e636f6d3e20746f3d3c7231406578\
        616d706c652e6f72673e20646973636172646564000900000000000000120a00000000000000390000000000\
        0000000b000000000000001a0f0382f3f8bf";

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn record(message: &Message) -> Record<'_> {
        Record {
            timestamp: 0x0006_60ff_6bc4_ca1a,
            remote_host: None,
            site: None,
            forwarded_to: None,
            message,
            length: 18,
            received: 59,
            sent: 0,
            duration: 26,
        }
    }

    #[test]
    fn equals_the_original_relayed() {
        let message = Message::new(b"acc@example.com", ["r1@example.org", "r2@example.org"], b"ok");
        let record = Record {
            site: Some(b"acct42"),
            length: 26,
            received: 77,
            sent: 85,
            duration: 0x1d5,
            ..record(&message)
        };
        assert_eq!(hex(&encode(&record)), RELAYED);
    }

    #[test]
    fn equals_the_original_rejected() {
        let message = Message::new(b"rej@example.com", ["r1@example.org"], b"rejected");
        let record = Record { timestamp: 0x0006_60ff_6bc4_cb81, ..record(&message) };
        assert_eq!(hex(&encode(&record)), REJECTED);
    }

    #[test]
    fn equals_the_original_discarded() {
        let message = Message::new(b"d@example.com", ["r1@example.org"], b"discarded");
        let record = Record { timestamp: 0x0006_60ff_6bc4_cc95, received: 57, ..record(&message) };
        assert_eq!(hex(&encode(&record)), DISCARDED);
    }

    #[test]
    fn optional_attributes_have_their_places() {
        let message = Message { text: "m".to_owned(), truncated: true };
        let record = Record {
            remote_host: Some("192.0.2.1"),
            site: Some(b"a\0\n"),
            forwarded_to: Some("[::1]:628"),
            ..record(&message)
        };
        let datagram = encode(&record);
        let strings = b"\x02192.0.2.1\0\x03a??\0\x0e[::1]:628\0\x0dm\0\x09";
        assert_eq!(&datagram[13..13 + strings.len()], strings);
        let end = datagram.len() - 4;
        assert_eq!(&datagram[end - 4..end], [15, 3, 20, 13]);
        assert_eq!(datagram[end..], crc32fast::hash(&datagram[4..end]).to_be_bytes());
    }

    #[test]
    fn foreign_text_is_made_harmless() {
        let message = Message::new(b"", [&b"a,b<c>\0@d"[..]], b"multi\r\nline\0");
        assert_eq!(message.text, "from=<> to=<a\\x2cb\\x3cc\\x3e?@d> multi??line?");
        assert!(!message.truncated);
    }

    #[test]
    fn recipients_are_cut_and_counted() {
        let recipient = format!("{}@example.com", "r".repeat(50));
        for count in [1, 2, 480, 500, 520, 530, 1024] {
            let message = Message::new(b"s@x", vec![&recipient; count], b"ok");
            let listed = message.text.matches('<').count() - 1;
            assert!(message.text.len() < MAX_MESSAGE);
            assert_eq!(message.truncated, listed < count, "{count}");
            let left = format!("<{recipient}>,… +{} more ok", count - listed);
            let whole = format!("<{recipient}> ok");
            let end = if message.truncated { left } else { whole };
            assert!(message.text.ends_with(&end), "{count}");
            if message.truncated {
                assert!(message.text.len() > MAX_MESSAGE - 128, "{count}");
            }
        }
    }

    #[test]
    fn everything_is_bounded() {
        let huge = "ä".repeat(100_000);
        let message = Message::new(huge.as_bytes(), [&huge, &huge], huge.as_bytes());
        assert!(message.truncated && message.text.len() < MAX_MESSAGE);
        assert!(message.text.contains("to=… +2 more ä"));
        let forged = Message { text: huge.clone() + "\0", truncated: false };
        let record = Record {
            site: Some(huge.as_bytes()),
            remote_host: Some(&huge),
            forwarded_to: Some(&huge),
            ..record(&forged)
        };
        let datagram = encode(&record);
        assert!(datagram.len() < 48 * 1024);
        assert_eq!(datagram[datagram.len() - 6..datagram.len() - 4], [20, 13]);
    }
}
