//! The log datagram of the Pond protocol; each mail has one.
//!
//! Contract: a datagram consists of the magic number, the attributes (a byte with the id, then the
//! payload) in the original program's order, and a CRC-32. Integers are big-endian. Strings end
//! with a NUL and contain no control characters. A datagram has at most [`MAX_DATAGRAM`] bytes,
//! because a Pond server drops longer ones without a word. What doesn't fit of the attribute
//! MESSAGE is cut: its text to what the client gets of it, then the recipients; TRUNCATED says so.
//!
//! # Failure
//! None: every text of a client or next hop can be put into a record.

use crate::address::printable;
use crate::qmqp::MAX_REPLY_TEXT;

/// Longest datagram in bytes: Pond 0.42 drops any of 4096 bytes or more (tried).
pub const MAX_DATAGRAM: usize = 4095;

/// The magic number: the first four bytes of a datagram.
const MAGIC: u32 = 0x6304_6103;
/// Value of the attribute TYPE for the submission of a mail.
const TYPE_SUBMISSION: u8 = 3;
/// Longest string in bytes beside MESSAGE. An account has at most 255 bytes, and an address fewer.
const MAX_STRING: usize = 255;
/// Longest sender in bytes: 254, each escaped as `\xNN`.
const MAX_SENDER: usize = 4 * 254;
/// Bytes that the number of the recipients that were left out may take: `,… +4294967295 more`.
const MORE: usize = 21;
/// Bytes of a datagram that follow MESSAGE: LENGTH, TRAFFIC, DURATION, TYPE, TRUNCATED, CRC.
const TAIL: usize = 9 + 17 + 9 + 2 + 2 + 4;

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
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// The sender, escaped.
    pub sender: &'a str,
    /// The recipients `<R1>,<R2>,…`, each escaped, or as many of them as are known.
    pub recipients: &'a str,
    /// Number of all recipients.
    pub recipient_count: u32,
    /// The reply without its first byte, or a word in its place.
    pub text: &'a str,
}

impl Message<'_> {
    /// Returns the text of the attribute in at most `room` bytes, which is enough for the longest
    /// sender and text, and whether something was cut.
    ///
    /// Recipients that don't fit are counted instead: `<R1>,… +N more`.
    fn fit(&self, room: usize) -> (String, bool) {
        let (from, from_cut) = cut(self.sender, MAX_SENDER);
        let (text, text_cut) = cut(self.text, MAX_REPLY_TEXT);
        let mut message = format!("from=<{from}> to=");
        let space = usize::from(!text.is_empty());
        let room = room.saturating_sub(space + text.len());
        let left_out = push_recipients(&mut message, self.recipients, self.recipient_count, room);
        message.push_str(&" "[..space]);
        message.push_str(text);
        (message, from_cut || text_cut || left_out)
    }
}

/// Appends recipients while `message` stays within `room` bytes. Returns whether some of them were
/// left out.
fn push_recipients(message: &mut String, recipients: &str, count: u32, room: usize) -> bool {
    let given = recipients.split(',').filter(|recipient| !recipient.is_empty());
    let whole = message.len() + recipients.len() <= room && given.clone().count() >= count as usize;
    let room = if whole { room } else { room.saturating_sub(MORE) };
    let (mut listed, mut separator) = (0, "");
    for recipient in given {
        if message.len() + separator.len() + recipient.len() > room {
            break;
        }
        message.push_str(separator);
        message.push_str(recipient);
        (listed, separator) = (listed + 1, ",");
    }
    if !whole {
        let left = count.saturating_sub(listed);
        message.push_str(&format!("{separator}… +{left} more"));
    }
    !whole
}

/// Cuts a text to `max` bytes at a character boundary. Returns the text, and whether it was cut.
fn cut(text: &str, max: usize) -> (&str, bool) {
    let fits = |end: &usize| text.is_char_boundary(*end);
    let end = (0..=max.min(text.len())).rev().find(fits).unwrap_or(0);
    (&text[..end], end < text.len())
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
    pub message: Message<'a>,
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
/// Texts from another process are cut and made printable again, because that process may be faulty.
pub fn encode(record: &Record<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(MAX_DATAGRAM);
    out.extend_from_slice(&MAGIC.to_be_bytes());
    push_u64(&mut out, id::TIMESTAMP, &[record.timestamp]);
    push_optional(&mut out, id::REMOTE_HOST, record.remote_host.map(str::as_bytes));
    push_optional(&mut out, id::SITE, record.site);
    push_optional(&mut out, id::FORWARDED_TO, record.forwarded_to.map(str::as_bytes));
    let room = MAX_DATAGRAM - TAIL - out.len() - "\x0d\0".len();
    let Message { sender, recipients, text, .. } = record.message;
    let message = Message {
        sender: &printable(sender.as_bytes()),
        recipients: &printable(recipients.as_bytes()),
        text: &printable(text.as_bytes()),
        ..record.message
    };
    let (message, truncated) = message.fit(room);
    push_string(&mut out, id::MESSAGE, &message);
    push_u64(&mut out, id::LENGTH, &[record.length]);
    push_u64(&mut out, id::TRAFFIC, &[record.received, record.sent]);
    push_u64(&mut out, id::DURATION, &[record.duration]);
    out.extend_from_slice(&[id::TYPE, TYPE_SUBMISSION]);
    if truncated {
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
        push_string(out, id, cut(&printable(text), MAX_STRING).0);
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

    fn message<'a>(sender: &'a str, recipients: &'a str, text: &'a str) -> Message<'a> {
        let recipient_count = recipients.split(',').count() as u32;
        Message { sender, recipients, recipient_count, text }
    }

    fn record(message: Message<'_>) -> Record<'_> {
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
        let recipients = "<r1@example.org>,<r2@example.org>";
        let message = message("acc@example.com", recipients, "ok");
        let record = Record {
            site: Some(b"acct42"),
            length: 26,
            received: 77,
            sent: 85,
            duration: 0x1d5,
            ..record(message)
        };
        assert_eq!(hex(&encode(&record)), RELAYED);
    }

    #[test]
    fn equals_the_original_rejected() {
        let message = message("rej@example.com", "<r1@example.org>", "rejected");
        let record = Record { timestamp: 0x0006_60ff_6bc4_cb81, ..record(message) };
        assert_eq!(hex(&encode(&record)), REJECTED);
    }

    #[test]
    fn equals_the_original_discarded() {
        let message = message("d@example.com", "<r1@example.org>", "discarded");
        let record = Record { timestamp: 0x0006_60ff_6bc4_cc95, received: 57, ..record(message) };
        assert_eq!(hex(&encode(&record)), DISCARDED);
    }

    #[test]
    fn optional_attributes_have_their_places() {
        let message = Message { recipient_count: 2, ..message("s", "<r>", "") };
        let record = Record {
            remote_host: Some("192.0.2.1"),
            site: Some(b"a\0\n"),
            forwarded_to: Some("[::1]:628"),
            ..record(message)
        };
        let datagram = encode(&record);
        let strings = b"\x02192.0.2.1\0\x03a??\0\x0e[::1]:628\0\
            \x0dfrom=<s> to=<r>,\xe2\x80\xa6 +1 more\0\x09";
        assert_eq!(&datagram[13..13 + strings.len()], strings);
        let end = datagram.len() - 4;
        assert_eq!(&datagram[end - 4..end], [15, 3, 20, 13]);
        assert_eq!(datagram[end..], crc32fast::hash(&datagram[4..end]).to_be_bytes());
    }

    #[test]
    fn an_empty_text_leaves_no_space() {
        assert_eq!(message("s@x", "<r@x>", "").fit(1000).0, "from=<s@x> to=<r@x>");
        assert_eq!(message("", "<r@x>", "ok").fit(1000).0, "from=<> to=<r@x> ok");
        let none = Message { recipient_count: 0, ..message("", "", "lost") };
        assert_eq!(none.fit(1000), ("from=<> to= lost".to_owned(), false));
    }

    #[test]
    fn recipients_are_cut_and_counted() {
        let recipient = format!("<{}@example.com>", "r".repeat(50));
        for count in [1, 2, 50, 59, 60, 61, 62, 63, 64, 1024] {
            let recipients = vec![recipient.as_str(); count].join(",");
            let datagram = encode(&record(message("s@x", &recipients, "ok")));
            let shown = String::from_utf8_lossy(&datagram);
            let listed = shown.matches("<r").count();
            let truncated = datagram[datagram.len() - 6..datagram.len() - 4] == [20, 13];
            assert!(datagram.len() <= MAX_DATAGRAM);
            assert_eq!(truncated, listed < count, "{count}");
            let left = format!("{recipient},… +{} more ok\0", count - listed);
            let whole = format!("{recipient} ok\0");
            assert!(shown.contains(if truncated { &left } else { &whole }), "{count}: {shown}");
            if truncated {
                assert!(datagram.len() > MAX_DATAGRAM - 128, "{count}");
            }
        }
    }

    #[test]
    fn a_datagram_is_never_too_long_for_a_server() {
        // As long as its parts can be at once.
        let (sender, text) = ("\\x5c".repeat(254), "t".repeat(4000));
        let recipients = vec![format!("<{sender}>"); 1024].join(",");
        let record = Record {
            site: Some(&[b's'; 255]),
            remote_host: Some("2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff"),
            forwarded_to: Some("[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:62800"),
            ..record(message(&sender, &recipients, &text))
        };
        let datagram = encode(&record);
        let shown = String::from_utf8_lossy(&datagram);
        assert!((3500..=MAX_DATAGRAM).contains(&datagram.len()), "{}", datagram.len());
        let start = format!("from=<{sender}> to=<{sender}>,<{sender}>,… +1022 more tt");
        assert!(shown.contains(&start), "{shown}");
        assert!(shown.contains(&"t".repeat(255)) && !shown.contains(&"t".repeat(256)));
        assert_eq!(datagram[datagram.len() - 6..datagram.len() - 4], [20, 13]);
        // To the byte.
        for length in 3000..MAX_DATAGRAM {
            let recipient = format!("<{}>", "r".repeat(length));
            let datagram = encode(&self::record(message("s@x", &recipient, "ok")));
            assert!(datagram.len() <= MAX_DATAGRAM, "{length}");
            let fits = 4 + 9 + "\x0dfrom=<s@x> to= ok\0".len() + length + 2 + TAIL;
            let listed = datagram.len() > 3000;
            assert_eq!(listed, fits <= MAX_DATAGRAM, "{length} {fits}");
        }
    }

    #[test]
    fn texts_of_a_faulty_worker_are_bounded_and_harmless() {
        let huge = "ä\0".repeat(100_000);
        let record = Record {
            site: Some(huge.as_bytes()),
            remote_host: Some(&huge),
            forwarded_to: Some(&huge),
            ..record(message(&huge, &huge, &huge))
        };
        let datagram = encode(&record);
        assert!(datagram.len() <= MAX_DATAGRAM);
        assert_eq!(datagram[datagram.len() - 6..datagram.len() - 4], [20, 13]);
        let message = message("s\r\n@x", "<r\0@x>", "multi\r\nline\0");
        let datagram = encode(&self::record(message));
        let shown = String::from_utf8_lossy(&datagram);
        assert!(shown.contains("\rfrom=<s??@x> to=<r?@x> multi??line?\0"), "{shown}");
    }
}
