//! The header of a raw message (RFC 5322 2.2), read without changing or copying the message.
//!
//! Contract: a header consists of fields. A field is a line and the folded lines after it, which
//! begin with a space or tab. Lines end in LF or CRLF. The header ends at the first empty line, or
//! with the message. A line that is no field, because it has no colon or no valid name, is skipped
//! together with its folded lines. Stopping at such a line would hide the fields behind it, which a
//! next hop might still see. The time is linear in the size of the header.
//!
//! # Failure
//! None: any bytes are a message, possibly without fields.

use std::ops::Range;

use memchr::memchr;

/// Longest value in bytes that [`header_value`] and [`headers`] return, because a Lua pattern on a
/// hostile megabyte would hang a worker.
pub(crate) const MAX_HEADER_VALUE: usize = 8192;
/// Highest number of values that [`headers`] returns.
pub(crate) const MAX_HEADERS: usize = 1000;

/// A header field, as ranges into the message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// The name, without colon.
    pub name: Range<usize>,
    /// Everything after the colon, still folded, including the end of the last line.
    pub value: Range<usize>,
}

impl Field {
    /// Returns the range of the whole field, including its folded lines and the end of the last
    /// one.
    pub fn whole(&self) -> Range<usize> {
        self.name.start..self.value.end
    }
}

/// Returns the fields of a message's header, in their order.
pub fn fields(message: &[u8]) -> impl Iterator<Item = Field> {
    Lines { message, at: 0 }.filter_map(|line| line.field(message))
}

/// Returns the fields with this name, in upper or lower case.
fn named<'a>(message: &'a [u8], name: &'a [u8]) -> impl Iterator<Item = Field> + 'a {
    let may_be = move |line: &Line| {
        let start = message[line.first.clone()].get(..name.len());
        start.is_some_and(|start| start.eq_ignore_ascii_case(name))
    };
    // Most lines can be excluded by their first bytes, without parsing them.
    let lines = Lines { message, at: 0 }.filter(may_be);
    lines.filter_map(|line| line.field(message)).filter(|field| field.name.len() == name.len())
}

/// A line of a header, and the lines that are folded into it.
struct Line {
    /// The line itself, including its end.
    first: Range<usize>,
    /// Index of the first byte after the last folded line.
    end: usize,
}

impl Line {
    /// Returns the field in this line, if there is one. Spaces between name and colon are obsolete
    /// (RFC 5322 4.5), but next hops accept them.
    fn field(&self, message: &[u8]) -> Option<Field> {
        let start = self.first.start;
        let text = &message[self.first.clone()];
        let colon = memchr(b':', text)?;
        let name = text[..colon].trim_ascii_end();
        let (name, value) = (start..start + name.len(), start + colon + 1..self.end);
        valid_header_name(&message[name.clone()]).then_some(Field { name, value })
    }
}

/// Iterator over the lines of a header.
struct Lines<'a> {
    message: &'a [u8],
    at: usize,
}

impl Iterator for Lines<'_> {
    type Item = Line;

    fn next(&mut self) -> Option<Line> {
        let start = self.at;
        let first = start..self.line_end();
        if matches!(&self.message[first.clone()], b"" | b"\n" | b"\r\n") {
            return None;
        }
        self.at = first.end;
        while matches!(self.message.get(self.at), Some(b' ' | b'\t')) {
            self.at = self.line_end();
        }
        Some(Line { first, end: self.at })
    }
}

impl Lines<'_> {
    /// Returns the index after the end of the line that begins at `at`.
    fn line_end(&self) -> usize {
        let rest = &self.message[self.at..];
        self.at + memchr(b'\n', rest).map_or(rest.len(), |lf| lf + 1)
    }
}

/// Returns the value of the first field with this name: unfolded, without the surrounding white
/// space, and cut to `MAX_HEADER_VALUE` bytes.
pub fn header_value(message: &[u8], name: &[u8]) -> Option<Vec<u8>> {
    named(message, name).next().map(|field| unfold(&message[field.value]))
}

/// Returns the values of all fields with this name, each as from [`header_value`], and
/// `MAX_HEADERS` of them at most.
pub fn headers(message: &[u8], name: &[u8]) -> Vec<Vec<u8>> {
    named(message, name).take(MAX_HEADERS).map(|field| unfold(&message[field.value])).collect()
}

/// Returns the ranges of all fields with this name, including folded lines and line ends. Leaving
/// out these bytes removes the fields.
pub fn field_ranges(message: &[u8], name: &[u8]) -> Vec<Range<usize>> {
    named(message, name).map(|field| field.whole()).collect()
}

/// Returns the number of hops that a message has passed: its `Received` fields (RFC 5321 6.3).
pub fn received_count(message: &[u8]) -> usize {
    named(message, b"Received").count()
}

/// Removes line ends, and keeps the white space that follows them (RFC 5322 2.2.3).
fn unfold(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for line in value.trim_ascii().split(|&b| b == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let room = MAX_HEADER_VALUE - out.len();
        out.extend_from_slice(&line[..line.len().min(room)]);
        if line.len() >= room {
            break;
        }
    }
    out.truncate(out.trim_ascii_end().len());
    out
}

/// Returns whether `name` is a field name: one or more of the bytes 33–126 without `:` (RFC 5322
/// 3.6.8).
pub fn valid_header_name(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|&b| matches!(b, b'!'..=b'~') && b != b':')
}

/// Returns whether `value` may be the value of an inserted field: printable ASCII and spaces only,
/// so that the value can't add further lines.
pub fn valid_header_value(value: &[u8]) -> bool {
    value.iter().all(|b| matches!(b, b' '..=b'~'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(message: &[u8]) -> Vec<(&[u8], &[u8])> {
        fields(message).map(|f| (&message[f.name], &message[f.value])).collect()
    }

    #[test]
    fn finds_fields() {
        type Expected<'a> = &'a [(&'a [u8], &'a [u8])];
        let table: &[(&[u8], Expected)] = &[
            (b"", &[]),
            (b"\n", &[]),
            (b"\r\n", &[]),
            (b"\nA: b\n", &[]),
            (b"A: b", &[(b"A", b" b")]),
            (b"A: b\n", &[(b"A", b" b\n")]),
            (b"A:b\r\nC:d\r\n\r\nE:f\r\n", &[(b"A", b"b\r\n"), (b"C", b"d\r\n")]),
            (b"A:b\nC:d\n\nE:f\n", &[(b"A", b"b\n"), (b"C", b"d\n")]),
            (b"A:b\r\nC:d\n\r\nE:f\n", &[(b"A", b"b\r\n"), (b"C", b"d\n")]),
            (b"A: b\n c\n\td\nE: f\n", &[(b"A", b" b\n c\n\td\n"), (b"E", b" f\n")]),
            // A line of white space is folded into the line before, and doesn't end the header.
            (b"A: b\n \nC: d\n", &[(b"A", b" b\n \n"), (b"C", b" d\n")]),
            (b"A:\n", &[(b"A", b"\n")]),
            (b"A:", &[(b"A", b"")]),
            (b"A : b\nC\t: d\n", &[(b"A", b" b\n"), (b"C", b" d\n")]),
            (b"A:b:c\n", &[(b"A", b"b:c\n")]),
            // Lines that are no fields are skipped.
            (b"From x y\nA: b\n", &[(b"A", b" b\n")]),
            (b">From x 12:00\nA: b\n", &[(b"A", b" b\n")]),
            (b" folded: x\nA: b\n", &[(b"A", b" b\n")]),
            (b"garbage\n folded: x\nA: b\n", &[(b"A", b" b\n")]),
            (b": x\nA: b\n", &[(b"A", b" b\n")]),
            (b"\xff: x\nA: b\n", &[(b"A", b" b\n")]),
            (b"\0\0:\0\nA: \0\n", &[(b"A", b" \0\n")]),
            // A bare CR ends neither a line nor the header.
            (b"A: b\rC: d\n\r\n", &[(b"A", b" b\rC: d\n")]),
            (b"\r\r\nA: b\n", &[(b"A", b" b\n")]),
            (b"A: b\n\r", &[(b"A", b" b\n")]),
        ];
        for (message, expected) in table {
            assert_eq!(list(message), *expected, "{}", String::from_utf8_lossy(message));
        }
    }

    #[test]
    fn the_end_stays_the_end() {
        let mut fields = fields(b"A: b\n\nC: d\n");
        assert!(fields.next().is_some());
        assert!(fields.next().is_none());
        assert!(fields.next().is_none());
    }

    #[test]
    fn reads_values() {
        let message = b"Subject:  a\r\n  b\r\n\tc \r\nsubject: second\r\n\
            Empty:\r\nBlank: \r\n \r\n\r\nBody: x\r\n";
        assert_eq!(header_value(message, b"subject").as_deref(), Some(&b"a  b\tc"[..]));
        assert_eq!(headers(message, b"SUBJECT"), [&b"a  b\tc"[..], b"second"]);
        assert_eq!(header_value(message, b"Empty").as_deref(), Some(&b""[..]));
        assert_eq!(header_value(message, b"Blank").as_deref(), Some(&b""[..]));
        assert_eq!(header_value(message, b"Body"), None);
        assert_eq!(header_value(message, b""), None);
        assert_eq!(header_value(message, b"Sub"), None);
        assert!(headers(message, b"nothing").is_empty());
    }

    #[test]
    fn values_are_bounded() {
        let long = [b"A: ", &[b'x'; 10_000][..], b"\n"].concat();
        assert_eq!(header_value(&long, b"a").map(|v| v.len()), Some(MAX_HEADER_VALUE));
        let folded = [b"A: x".to_vec(), b"\r\n y".repeat(10_000), b"\r\n".to_vec()].concat();
        let value = header_value(&folded, b"a").expect("there");
        assert!(value.len() <= MAX_HEADER_VALUE && value.starts_with(b"x y y y"));
        let exact = [b"A: ", &[b'x'; MAX_HEADER_VALUE][..], b"\n y\n"].concat();
        assert_eq!(header_value(&exact, b"a").map(|v| v.len()), Some(MAX_HEADER_VALUE));
        assert_eq!(headers(&b"A: b\n".repeat(1001), b"A").len(), MAX_HEADERS);
    }

    #[test]
    fn ranges_remove_fields() {
        let message = b"X-A: 1\r\n folded\r\nB: 2\r\nx-a : 3\nC: 4\n\nX-A: body\n";
        let ranges = field_ranges(message, b"X-A");
        assert_eq!(ranges, [0..17, 23..31]);
        let mut left = message.to_vec();
        for range in ranges.into_iter().rev() {
            left.drain(range);
        }
        assert_eq!(left, b"B: 2\r\nC: 4\n\nX-A: body\n");
    }

    #[test]
    fn counts_hops() {
        let message =
            b"Received: a\n b\nreceived: c\nX-Received: d\nReceived-SPF: e\n\nReceived: f\n";
        assert_eq!(received_count(message), 2);
        assert_eq!(received_count(b""), 0);
    }

    #[test]
    fn judges_names_and_values() {
        for name in ["A", "X-Cgroup", "!~", "a,b"] {
            assert!(valid_header_name(name.as_bytes()), "{name}");
        }
        for name in ["", "A:", "A B", "A\n", "\x7f", "ä"] {
            assert!(!valid_header_name(name.as_bytes()), "{name}");
        }
        for value in ["", " ", "a b", "~!:\\\""] {
            assert!(valid_header_value(value.as_bytes()), "{value}");
        }
        for value in ["a\r\nB: c", "\n", "\t", "\0", "\x7f", "ä"] {
            assert!(!valid_header_value(value.as_bytes()), "{value}");
        }
    }
}
