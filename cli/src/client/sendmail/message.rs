//! A message as a program hands it to sendmail, and the message that is sent.
//!
//! Contract: the message is in memory once. Lines may end in LF or CRLF, and are sent with LF. A
//! line with a single dot ends the message if `dot_ends`. Lines `From ` of a mailbox file in front
//! are dropped. The header ends at the first empty line, or in front of the first line that is no
//! field. In the header, a bare CR becomes a space, because some next hops take it for the end of a
//! line. Bcc is removed, addresses without a domain get one, and `Date`, `Message-ID` and `From`
//! are appended if they are missing.
//!
//! # Failure
//! A message that can't be read to its end, or that is too large, is a [`MessageError`].

use std::io::{self, BufRead};
use std::ops::Range;

use qrelay_shared::address::printable;
use qrelay_shared::header;
use thiserror::Error;

use crate::client::sendmail::addresses::{self, Address, ListError};

/// Largest message in bytes: the highest `max_size` of a daemon.
const MAX_MESSAGE: u64 = 1 << 30;
/// Largest header in bytes, which has room for more recipients than a mail may have.
const MAX_HEADER: usize = 1 << 20;

/// Fields whose addresses get a domain.
const ADDRESS_FIELDS: [&str; 10] = [
    "From",
    "Sender",
    "Reply-To",
    "To",
    "Cc",
    "Resent-From",
    "Resent-Sender",
    "Resent-To",
    "Resent-Cc",
    "Resent-Reply-To",
];
/// Fields that nobody but their sender sees.
const BLIND_FIELDS: [&str; 2] = ["Bcc", "Resent-Bcc"];
/// Fields that name the recipients of a message, and of one that is sent once more.
const RECIPIENT_FIELDS: [&str; 3] = ["To", "Cc", "Bcc"];
const RESENT_FIELDS: [&str; 3] = ["Resent-To", "Resent-Cc", "Resent-Bcc"];

/// Why a message can't be sent.
#[derive(Debug, Error)]
pub enum MessageError {
    /// Reading failed, so the rest of the message is unknown.
    #[error("can't read the message to its end, so it isn't sent: {0}")]
    Input(#[source] io::Error),
    /// The message is larger than any daemon takes.
    #[error("the message is larger than {MAX_MESSAGE} bytes")]
    TooLarge,
    /// The header is too large.
    #[error("the message's header is larger than {MAX_HEADER} bytes")]
    LargeHeader,
    /// A field with recipients can't be understood.
    #[error("the field {name} is no list of addresses: {cause}")]
    Field {
        name: String,
        #[source]
        cause: ListError,
    },
}

/// The values of the fields that are appended if they are missing.
#[derive(Debug, Clone, Copy)]
pub struct Defaults<'a> {
    /// The domain of addresses that have none.
    pub domain: &'a str,
    pub date: &'a str,
    pub message_id: &'a str,
    pub from: &'a str,
}

/// A message that has been read.
#[derive(Debug, Default)]
pub struct Message {
    /// Whole fields, each with its LF.
    header: Vec<u8>,
    /// The empty line behind the header, and everything after it.
    body: Vec<u8>,
}

impl Message {
    /// Reads a message to its end.
    pub fn read(input: impl BufRead, dot_ends: bool) -> Result<Self, MessageError> {
        let mut lines = Lines { input: input.take(MAX_MESSAGE), dot_ends, ended: false };
        let mut message = Self::default();
        while let Some(line) = lines.next(&mut message.header)? {
            let start = line.start;
            for byte in &mut message.header[line.clone()] {
                if *byte == b'\r' {
                    *byte = b' ';
                }
            }
            match &message.header[line] {
                b"\n" => {
                    message.header.truncate(start);
                    break;
                }
                line if start == 0 && is_mailbox_line(line) => message.header.clear(),
                [b' ' | b'\t', ..] if start > 0 => {}
                line if header::fields(line).next().is_some() => {}
                _ => {
                    message.body.push(b'\n');
                    message.body.extend(message.header.drain(start..));
                    break;
                }
            }
            if message.header.len() > MAX_HEADER {
                return Err(MessageError::LargeHeader);
            }
        }
        if message.body.is_empty() {
            message.body.push(b'\n');
        }
        while lines.next(&mut message.body)?.is_some() {}
        Ok(message)
    }

    /// Returns the recipients that the header names. If the message is sent once more and says to
    /// whom, the recipients of the first time get nothing.
    pub fn recipients(&self) -> Result<Vec<Address>, MessageError> {
        let resent = self.named(&RESENT_FIELDS).next().is_some();
        let names = if resent { &RESENT_FIELDS } else { &RECIPIENT_FIELDS };
        let mut found = Vec::new();
        for field in self.named(names) {
            found.extend(addresses::parse(&self.header[field.value]).map_err(|cause| {
                let name = printable(&self.header[field.name.clone()]).into_owned();
                MessageError::Field { name, cause }
            })?);
        }
        Ok(found)
    }

    /// Returns the two pieces of the message as it is sent: header and body.
    pub fn complete(self, defaults: &Defaults<'_>) -> (Vec<u8>, Vec<u8>) {
        let mut header = Vec::with_capacity(self.header.len() + 256);
        for field in header::fields(&self.header) {
            let name = &self.header[field.name.clone()];
            if is_one_of(name, &BLIND_FIELDS) {
                continue;
            }
            let value = field.value.clone();
            let bare = if is_one_of(name, &ADDRESS_FIELDS) {
                // A field that can't be understood, and has no recipients, is sent as it is.
                addresses::parse(&self.header[value.clone()]).unwrap_or_default()
            } else {
                Vec::new()
            };
            let mut at = field.name.start;
            for address in bare.into_iter().filter(|address| address.bare) {
                let end = value.start + address.end;
                header.extend_from_slice(&self.header[at..end]);
                header.extend_from_slice(b"@");
                header.extend_from_slice(defaults.domain.as_bytes());
                at = end;
            }
            header.extend_from_slice(&self.header[at..value.end]);
        }
        for (name, value) in
            [("Date", defaults.date), ("Message-ID", defaults.message_id), ("From", defaults.from)]
        {
            if self.named(&[name]).next().is_none() {
                header.extend_from_slice(format!("{name}: {value}\n").as_bytes());
            }
        }
        (header, self.body)
    }

    /// Returns the fields with one of these names.
    fn named(&self, names: &[&str]) -> impl Iterator<Item = header::Field> {
        header::fields(&self.header)
            .filter(|field| is_one_of(&self.header[field.name.clone()], names))
    }
}

fn is_one_of(name: &[u8], names: &[&str]) -> bool {
    names.iter().any(|other| name.eq_ignore_ascii_case(other.as_bytes()))
}

/// Returns whether a line is the first of a mailbox file's entry.
fn is_mailbox_line(line: &[u8]) -> bool {
    header::mbox_lines(line) > 0
}

/// The lines of a message, up to its end.
struct Lines<R> {
    input: io::Take<R>,
    dot_ends: bool,
    /// A line with a single dot has been read.
    ended: bool,
}

impl<R: BufRead> Lines<R> {
    /// Appends the next line to `text`, with LF as its end, and returns its range; `None` at the
    /// end of the message.
    fn next(&mut self, text: &mut Vec<u8>) -> Result<Option<Range<usize>>, MessageError> {
        let start = text.len();
        if self.ended {
            return Ok(None);
        }
        self.input.read_until(b'\n', text).map_err(MessageError::Input)?;
        if self.input.limit() == 0 {
            return Err(MessageError::TooLarge);
        }
        if text.len() == start {
            return Ok(None);
        }
        if text.ends_with(b"\n") {
            text.pop();
        }
        while text[start..].ends_with(b"\r") {
            text.pop();
        }
        if self.dot_ends && &text[start..] == b"." {
            text.truncate(start);
            self.ended = true;
            return Ok(None);
        }
        text.push(b'\n');
        Ok(Some(start..text.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Message {
        Message::read(text.as_bytes(), true).expect("message")
    }

    /// Returns header and body, with a bar between them.
    fn parts(message: &Message) -> String {
        let both = [&message.header[..], b"|", &message.body].concat();
        String::from_utf8(both).expect("text")
    }

    #[test]
    fn divides_header_and_body() {
        for (text, expected) in [
            ("", "|\n"),
            ("\n", "|\n"),
            ("A: b", "A: b\n|\n"),
            ("A: b\n\nbody", "A: b\n|\nbody\n"),
            ("A: b\r\nC : d\r\n\r\nbody\r\n", "A: b\nC : d\n|\nbody\n"),
            ("A: b\r\r\n\r\r\nbody\r\r\n", "A: b\n|\nbody\n"),
            ("A: b\n c\n\td\n\nx", "A: b\n c\n\td\n|\nx\n"),
            ("A: b\n \nC: d\n", "A: b\n \nC: d\n|\n"),
            ("hello\nworld\n", "|\nhello\nworld\n"),
            ("hello world: x\n", "|\nhello world: x\n"),
            (" A: b\n", "|\n A: b\n"),
            ("A: b\nhello\n\nworld", "A: b\n|\nhello\n\nworld\n"),
            ("From a Mon\n>From b\nA: b\n\nFrom c\n", "A: b\n|\nFrom c\n"),
            ("A: b\nFrom a\n\n", "A: b\n|\nFrom a\n\n"),
            ("A: b\rBcc: c\n\nx\ry\n", "A: b Bcc: c\n|\nx\ry\n"),
            ("A: b\n\nx\n.\ny\n", "A: b\n|\nx\n"),
            ("A: b\n\nx\n.\r\ny\n", "A: b\n|\nx\n"),
            ("A: b\n\nx\n.", "A: b\n|\nx\n"),
            ("A: b\n.\nC: d\n", "A: b\n|\n"),
            (".\nC: d\n", "|\n"),
            ("A: b\n\n..\n.x\n .\n", "A: b\n|\n..\n.x\n .\n"),
        ] {
            assert_eq!(parts(&read(text)), expected, "{text:?}");
        }
        let kept = Message::read(&b"A: b\n\nx\n.\ny"[..], false).expect("message");
        assert_eq!(parts(&kept), "A: b\n|\nx\n.\ny\n");
    }

    #[test]
    fn finds_recipients() {
        for (text, expected) in [
            ("", &[][..]),
            ("To: a@b\n", &["a@b"][..]),
            ("to: a@b\nCC: Name <c@d>,\n e@f\nbcc: g\nTo: h\n", &["a@b", "c@d", "e@f", "g", "h"]),
            ("To: a@b\nResent-To: c@d\nResent-Bcc: e@f\nBcc: g@h\n", &["c@d", "e@f"]),
            ("X-To: a@b\nFrom: c@d\nApparently-To: e@f\n\nTo: g@h\n", &[]),
            ("To: undisclosed-recipients:;\nBcc: a@b\n", &["a@b"]),
        ] {
            let found = read(text).recipients().expect("lists");
            let found: Vec<_> = found.into_iter().map(|found| found.text).collect();
            let expected: Vec<_> = expected.iter().map(|text| text.as_bytes().to_vec()).collect();
            assert_eq!(found, expected, "{text:?}");
        }
        let error = read("To: a@b\nCC: c@d (e\n").recipients().expect_err("no list");
        assert_eq!(
            error.to_string(),
            "the field CC is no list of addresses: '(' is opened and not closed"
        );
    }

    #[test]
    fn completes() {
        let defaults =
            Defaults { domain: "host", date: "today", message_id: "<1@host>", from: "me@host" };
        let added = "Date: today\nMessage-ID: <1@host>\nFrom: me@host\n";
        for (text, header) in [
            ("", added.to_owned()),
            ("A: b\n", format!("A: b\n{added}")),
            (
                "date: x\nFROM: y@z\nMessage-Id: <2>\n",
                "date: x\nFROM: y@z\nMessage-Id: <2>\n".into(),
            ),
            ("A: b\nBcc: a@b,\n c@d\nResent-Bcc: x\nC: d\n", format!("A: b\nC: d\n{added}")),
            (
                "From: root (Cron)\nTo: a@b, Root <root>,\n \"x\"\nX-To: root\n",
                "From: root@host (Cron)\nTo: a@b, Root <root@host>,\n \"x\"@host\nX-To: root\n\
                 Date: today\nMessage-ID: <1@host>\n"
                    .into(),
            ),
            ("Reply-To: <root\n", format!("Reply-To: <root\n{added}")),
        ] {
            let (completed, body) = read(text).complete(&defaults);
            assert_eq!(String::from_utf8(completed).expect("text"), header, "{text:?}");
            assert_eq!(body, b"\n");
        }
    }

    #[test]
    fn a_header_is_bounded() {
        let short = "A: b\n".repeat(MAX_HEADER / 5);
        assert_eq!(read(&short).header.len(), short.len());
        let long = "A: b\n".repeat(MAX_HEADER / 5 + 1);
        let error = Message::read(long.as_bytes(), true).expect_err("too large");
        assert!(matches!(error, MessageError::LargeHeader), "{error}");
        assert!(Message::read(format!("\n{long}").as_bytes(), true).is_ok());
    }

    /// Gives some bytes, and then fails.
    struct Failing<'a>(&'a [u8]);

    impl io::Read for Failing<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer) {
                Ok(0) => Err(io::Error::other("gone")),
                read => read,
            }
        }
    }

    #[test]
    fn a_message_without_its_end_is_none() {
        for text in ["", "A: b", "A: b\n", "A: b\n\n", "A: b\n\nbody\n"] {
            let input = io::BufReader::new(Failing(text.as_bytes()));
            let error = Message::read(input, true).expect_err("fails");
            assert!(matches!(error, MessageError::Input(_)), "{error}");
        }
    }
}
