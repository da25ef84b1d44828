//! The header of a raw message (RFC 5322 2.2), read without changing or copying the message.
//!
//! Contract: a header consists of fields. A field is a line and the folded lines after it, which
//! begin with a space or tab. The header ends at the first empty line, or with the message. A line
//! that is no field, because it has no colon or no valid name, is skipped together with its folded
//! lines. Stopping at such a line would hide the fields behind it, which a next hop might still
//! see. The time is linear in the size of the header.
//!
//! Lines end in LF or CRLF, and also in a bare CR, one that no LF follows: some next hops send it
//! on as the end of a line, and for others it is a character. So the fields are those that either
//! kind of next hop sees. An empty line that a bare CR makes (`\r\r`) ends the header up to the
//! next LF; what begins behind that LF is still the header for the second kind.
//!
//! # Failure
//! None: any bytes are a message, possibly without fields.

use std::iter;
use std::ops::Range;

use memchr::{memchr, memchr2};

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
        let mut first = self.line();
        while let [b'\r' | b'\n', ..] = self.message[first.clone()] {
            if matches!(&self.message[first.clone()], b"\n" | b"\r\n") {
                return None;
            }
            let rest = &self.message[first.start..];
            self.at = first.start + memchr(b'\n', rest).map_or(rest.len(), |lf| lf + 1);
            first = self.line();
        }
        if first.is_empty() {
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
    /// Returns the line that begins at `at`, with its end.
    fn line(&self) -> Range<usize> {
        self.at..self.line_end()
    }

    /// Returns the index after the end of the line that begins at `at`.
    fn line_end(&self) -> usize {
        let rest = &self.message[self.at..];
        let end = memchr2(b'\r', b'\n', rest).map(|end| end + ending(&rest[end..]));
        self.at + end.unwrap_or(rest.len())
    }
}

/// Returns the length of the line end that `text` begins with. CRs before an LF belong to it.
fn ending(text: &[u8]) -> usize {
    let crs = text.iter().take_while(|&&b| b == b'\r').count();
    if text.get(crs) == Some(&b'\n') { crs + 1 } else { 1 }
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

/// Returns the ranges of all fields with this name, including folded lines and line ends.
/// [`without`] leaves them out.
pub fn field_ranges(message: &[u8], name: &[u8]) -> Vec<Range<usize>> {
    named(message, name).map(|field| field.whole()).collect()
}

/// Returns the pieces of a message that are left without some of its fields; none of them is empty.
/// `removed` has the ranges of the fields in their order, each range once.
///
/// The LF at the end of a field stays if the line before, which is left, ends in a bare CR: a next
/// hop for which that CR is a character would otherwise see two lines as one.
pub fn without<'m>(
    message: &'m [u8],
    removed: &'m [Range<usize>],
) -> impl Iterator<Item = &'m [u8]> {
    let whole = message.len();
    let (mut at, mut bare) = (0, false);
    removed.iter().cloned().chain(iter::once(whole..whole)).filter_map(move |field| {
        let lf = usize::from(bare && message[..at].ends_with(b"\n"));
        let piece = message.get(at - lf..field.start).filter(|piece| !piece.is_empty());
        at = field.end;
        bare = piece.map_or(bare, |piece| piece.ends_with(b"\r"));
        piece
    })
}

/// Returns the number of hops that a message has passed: its `Received` fields (RFC 5321 6.3).
pub fn received_count(message: &[u8]) -> usize {
    named(message, b"Received").count()
}

/// Removes line ends, and keeps the white space that follows them (RFC 5322 2.2.3).
fn unfold(value: &[u8]) -> Vec<u8> {
    let bytes = value.trim_ascii().iter().copied().filter(|b| !matches!(b, b'\r' | b'\n'));
    let mut out: Vec<u8> = bytes.take(MAX_HEADER_VALUE).collect();
    out.truncate(out.trim_ascii_end().len());
    out
}

/// Returns whether `name` is a field name: one or more of the bytes 33–126 without `:` (RFC 5322
/// 3.6.8).
pub fn valid_header_name(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|&b| matches!(b, b'!'..=b'~') && b != b':')
}

/// Returns whether `value` may be the value of an inserted field: printable ASCII, spaces and tabs
/// only, so that the value can't add further lines. A tab is what the value of a folded field can
/// have.
pub fn valid_header_value(value: &[u8]) -> bool {
    value.iter().all(|b| matches!(b, b'\t' | b' '..=b'~'))
}

/// Returns the length of the lines `From ` and `>From ` at the very beginning of a message, which
/// some programs write there as in a mailbox file (mbox) and next hops treat in their own ways. As
/// for the next hops, only LF ends these lines, and a line may have several `>`.
pub fn mbox_lines(message: &[u8]) -> usize {
    let mut at = 0;
    loop {
        let rest = &message[at..];
        let quotes = rest.iter().take_while(|&&b| b == b'>').count();
        match memchr(b'\n', rest) {
            Some(lf) if rest[quotes..].starts_with(b"From ") => at += lf + 1,
            _ => return at,
        }
    }
}

/// Returns the end of a message's first line, which the lines in front of the message have, too: LF
/// or CRLF, and LF if no line has an end.
pub fn line_ending(message: &[u8]) -> &'static [u8] {
    match memchr(b'\n', message) {
        Some(lf) if message[..lf].ends_with(b"\r") => b"\r\n",
        _ => b"\n",
    }
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
            // A bare CR ends a line, and two of them end the header.
            (b"A: b\rC: d\n\r\n", &[(b"A", b" b\r"), (b"C", b" d\n")]),
            (b"A: b\r c\r\td\rE: f", &[(b"A", b" b\r c\r\td\r"), (b"E", b" f")]),
            (b"A: b\r\rC: d\r\n\n", &[(b"A", b" b\r")]),
            (b"A: b\n\rC: d\n", &[(b"A", b" b\n")]),
            (b"\rA: b\n", &[]),
            (b"A: b\n\r", &[(b"A", b" b\n")]),
            // What follows the next LF may still be seen as the header.
            (b"A: b\r\rC: d\nE: f\n\nG: h\n", &[(b"A", b" b\r"), (b"E", b" f\n")]),
            (b"A: b\r\r\nC: d\r\r\n\r\nE: f", &[(b"A", b" b\r\r\n"), (b"C", b" d\r\r\n")]),
            (b"\r\r\nA: b\n", &[(b"A", b" b\n")]),
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
        let bare = b"Subject: a\r b\r\tc\rX: d\r\rX: body\n";
        assert_eq!(header_value(bare, b"subject").as_deref(), Some(&b"a b\tc"[..]));
        assert_eq!(headers(bare, b"X"), [b"d"]);
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
    fn removal_joins_no_lines() {
        let table: &[(&[u8], &[u8])] = &[
            (b"X: 1\n", b""),
            (b"A: b\rX: 1\n\nbody", b"A: b\r\n\nbody"),
            (b"A: b\rX: 1\r\n\nbody", b"A: b\r\n\nbody"),
            (b"A: b\rX: 1\rC: d\n", b"A: b\rC: d\n"),
            (b"A: b\rX: 1\rX: 2\nX: 3\nC: d\n", b"A: b\r\nC: d\n"),
            (b"X: 1\rX: 2\nC: d\n", b"C: d\n"),
            (b"A: b\nX: 1\rX: 2\nC: d\n", b"A: b\nC: d\n"),
            (b"A: b\rX: 1", b"A: b\r"),
            (b"A: b\r\r\nX: 1\r\r\nC: d\n", b"A: b\r\r\nC: d\n"),
        ];
        for (message, left) in table {
            let removed = field_ranges(message, b"X");
            let pieces: Vec<&[u8]> = without(message, &removed).collect();
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
            assert_eq!(pieces.concat(), *left, "{}", message.escape_ascii());
        }
    }

    #[test]
    fn finds_mbox_lines() {
        let table: &[(&[u8], usize)] = &[
            (b"", 0),
            (b"A: b\n", 0),
            (b"From: a@b\n", 0),
            (b"from x\n", 0),
            (b"From x\nA: b\n", 7),
            (b"From x\r\nA: b\n", 8),
            (b">From x\nFrom y\n>>From z\nA: b\n", 24),
            (b"From x\n", 7),
            (b"From x", 0),
            (b"From x\rA: b\n", 12),
            (b"A: b\nFrom x\n", 0),
            (b"\nFrom x\n", 0),
            (b">", 0),
        ];
        for (message, length) in table {
            assert_eq!(mbox_lines(message), *length, "{}", message.escape_ascii());
        }
    }

    #[test]
    fn finds_the_line_ending() {
        let table: &[(&[u8], &[u8])] = &[
            (b"", b"\n"),
            (b"A: b", b"\n"),
            (b"A: b\r", b"\n"),
            (b"A: b\nC: d\r\n", b"\n"),
            (b"A: b\r\nC: d\n", b"\r\n"),
            (b"A: b\rC: d\r\n", b"\r\n"),
            (b"\n", b"\n"),
            (b"\r\n", b"\r\n"),
        ];
        for (message, ending) in table {
            assert_eq!(line_ending(message), *ending, "{}", message.escape_ascii());
        }
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
        for value in ["", " ", "a b", "a\tb", "~!:\\\""] {
            assert!(valid_header_value(value.as_bytes()), "{value}");
        }
        for value in ["a\r\nB: c", "\n", "\r", "\x0b", "\0", "\x7f", "ä"] {
            assert!(!valid_header_value(value.as_bytes()), "{value}");
        }
    }
}
