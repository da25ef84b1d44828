//! The lines in front of a relayed message: the lines that the script inserted, and the `Received`
//! line, which says where the mail came from.
//!
//! Contract: the last inserted line comes first; then exactly one `Received` line. Inserted lines
//! are checked when they are inserted.
//!
//! - Every line ends as the message's first line does, because next hops keep line ends: in
//!   Postfix' queue a CRLF among LFs is a space at the end of the line, and qmail sends the CRLF on
//!   as CR CR LF.
//! - Lines `From ` of a mailbox file stay the beginning, because next hops know them only there.
//! - What begins with a space or tab behind these lines isn't a part of `Received`: an empty line
//!   comes in between.

use std::io::Write;
use std::mem;

use qrelay_shared::header::mbox_lines;
use qrelay_shared::ipc::message::Peer;

use crate::mail::Mail;

/// The beginning of a message as it leaves.
#[derive(Debug)]
pub(crate) struct Front<'m> {
    mail: &'m Mail,
    /// The lines `From `.
    mbox: &'m [u8],
    /// Whether an empty line keeps the rest apart.
    apart: bool,
}

impl<'m> Front<'m> {
    /// The beginning of this mail's message.
    pub(crate) fn of(mail: &'m Mail) -> Self {
        let first = mail.kept().next().unwrap_or_default();
        let (mbox, rest) = first.split_at(mbox_lines(first));
        Self { mail, mbox, apart: matches!(rest, [b' ' | b'\t', ..]) }
    }

    /// Appends the beginning.
    ///
    /// A local client in a foreign pid namespace has no pid here; its line says `PID=0`, as the
    /// kernel does, so that the line keeps its form.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let ending = self.mail.line_ending();
        out.extend_from_slice(self.mbox);
        for line in self.mail.inserted().lines() {
            out.extend_from_slice(line);
            out.extend_from_slice(ending);
        }
        out.extend_from_slice(b"Received: from ");
        match self.mail.peer() {
            Peer::Local { pid, uid, .. } => {
                let mut digits = itoa::Buffer::new();
                out.extend_from_slice(b"PID=");
                out.extend_from_slice(digits.format(pid.unwrap_or(0)).as_bytes());
                out.extend_from_slice(b" UID=");
                out.extend_from_slice(digits.format(*uid).as_bytes());
            }
            // Writing to a `Vec` can't fail.
            Peer::Remote(address) => _ = write!(out, "[{address}]"),
        }
        out.extend_from_slice(b" with QMQP");
        out.extend_from_slice(ending);
        if self.apart {
            out.extend_from_slice(ending);
        }
    }

    /// Returns the pieces of the message behind the beginning; none of them is empty.
    pub(crate) fn rest(&self) -> impl Iterator<Item = &'m [u8]> + use<'m> {
        let mut written = self.mbox.len();
        self.mail.kept().filter_map(move |piece| {
            let piece = &piece[mem::take(&mut written)..];
            (!piece.is_empty()).then_some(piece)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mail::test::{mail, mail_from};

    const LOCAL: &str = "Received: from PID=1 UID=2 with QMQP";

    fn whole(mail: &Mail) -> String {
        let front = Front::of(mail);
        let mut bytes = Vec::new();
        front.write(&mut bytes);
        front.rest().for_each(|piece| bytes.extend_from_slice(piece));
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn names_the_client() {
        let local = |pid, uid| Peer::Local { pid, uid, gid: 7 };
        for (peer, line) in [
            (local(Some(42), 1000), "Received: from PID=42 UID=1000 with QMQP\n"),
            (local(None, 0), "Received: from PID=0 UID=0 with QMQP\n"),
            (Peer::Remote([192, 0, 2, 1].into()), "Received: from [192.0.2.1] with QMQP\n"),
            (
                Peer::Remote("2001:db8::1".parse().expect("address")),
                "Received: from [2001:db8::1] with QMQP\n",
            ),
        ] {
            assert_eq!(whole(&mail_from(peer, b"", b"s@x", &[b"r@x"])), line);
        }
    }

    #[test]
    fn lines_end_as_the_first_line_does() {
        for (message, ending) in [
            ("", "\n"),
            ("A: b", "\n"),
            ("A: b\n\nbody\r\n", "\n"),
            ("A: b\r\n\r\nbody\n", "\r\n"),
            ("\r\nbody", "\r\n"),
            ("A: b\rC: d\n", "\n"),
        ] {
            let mut mail = mail(message.as_bytes(), b"", &[b"r@x"]);
            mail.insert_header(b"X", b"1");
            mail.insert_header(b"Y", b"a\tb");
            let front = format!("Y: a\tb{ending}X: 1{ending}{LOCAL}{ending}");
            assert_eq!(whole(&mail), front + message, "{message:?}");
        }
    }

    #[test]
    fn mbox_lines_stay_the_beginning() {
        for (mbox, ending, rest) in [
            ("From a@b Mon\n", "\n", "A: b\n\nFrom c\n"),
            (">From a@b Mon\r\n", "\r\n", "A: b\r\n"),
            ("From a\n>From b\n>>From c\n", "\n", "\nFrom c\n"),
            ("From a\n", "\n", ""),
            ("", "\n", "From: a@b\n"),
            ("", "\n", "From a@b"),
        ] {
            let mut mail = mail([mbox, rest].concat().as_bytes(), b"", &[b"r@x"]);
            mail.insert_header(b"X", b"1");
            let expected = format!("{mbox}X: 1{ending}{LOCAL}{ending}{rest}");
            assert_eq!(whole(&mail), expected, "{mbox:?}");
        }
    }

    #[test]
    fn what_begins_with_a_space_is_kept_apart() {
        for (mbox, ending, rest) in [
            ("", "\n", " a: b\nC: d\n"),
            ("", "\r\n", "\ta\r\n"),
            ("", "\n", " "),
            ("From a\n", "\n", " folded\nC: d\n"),
        ] {
            let mail = mail([mbox, rest].concat().as_bytes(), b"", &[b"r@x"]);
            let expected = format!("{mbox}{LOCAL}{ending}{ending}{rest}");
            assert_eq!(whole(&mail), expected, "{rest:?}");
        }
    }

    #[test]
    fn removed_fields_are_left_out() {
        let mut mail = mail(b"From : a@b\nFrom c\nX: 1\n y\nA: b\n", b"", &[b"r@x"]);
        mail.remove_fields([0..11, 18..26]);
        assert_eq!(whole(&mail), format!("From c\n{LOCAL}\nA: b\n"));
        mail.remove_fields(Some(26..31));
        assert_eq!(whole(&mail), format!("From c\n{LOCAL}\n"));
    }
}
