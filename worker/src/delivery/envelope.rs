//! A mail in the form in which it leaves: with inserted lines, without removed fields, with the
//! envelope that the handler left.
//!
//! Contract: the message is not copied; [`Envelope::pieces`] borrows it where it was received.

use std::io::IoSlice;

use qrelay_shared::qmqp::{Outgoing, outgoing};

use crate::mail::Mail;
use crate::mail::received::Front;

/// A request for the next hop.
#[derive(Debug)]
pub(super) struct Envelope<'m> {
    mail: &'m Mail,
    front: Front<'m>,
    around: Outgoing,
}

impl<'m> Envelope<'m> {
    /// The request for a mail as its handler left it.
    pub(super) fn new(mail: &'m Mail) -> Self {
        let front = Front::of(mail);
        let length = front.rest().map(<[u8]>::len).sum();
        let around = outgoing(|out| front.write(out), length, mail.sender(), mail.recipients());
        Self { mail, front, around }
    }

    /// Returns all bytes of the request in order; none of the pieces is empty.
    pub(super) fn pieces(&self) -> Vec<IoSlice<'_>> {
        let mut pieces = Vec::with_capacity(self.mail.removed_count() + 3);
        pieces.push(IoSlice::new(self.around.head()));
        pieces.extend(self.front.rest().map(IoSlice::new));
        pieces.push(IoSlice::new(self.around.tail()));
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mail::test::mail;

    fn bytes(mail: &Mail) -> String {
        let envelope = Envelope::new(mail);
        let bytes = envelope.pieces().iter().flat_map(|piece| piece.to_vec()).collect();
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn as_received() {
        let mail = mail(b"A: 1\n\nbody\n", b"s@x", &[b"r@x", b"q@y"]);
        let message = "Received: from PID=1 UID=2 with QMQP\nA: 1\n\nbody\n";
        let payload = format!("{}:{message},3:s@x,3:r@x,3:q@y,", message.len());
        assert_eq!(bytes(&mail), format!("{}:{payload},", payload.len()));
    }

    #[test]
    fn as_changed() {
        let mut mail = mail(b"A: 1\nB: 2\nC: 3\n\nbody\n", b"s@x", &[b"r@x"]);
        mail.remove_fields([0..5, 10..15]);
        mail.insert_header(b"X", b"y");
        mail.set_sender(Vec::new());
        mail.set_recipients(vec![b"new@x".to_vec()]);
        let sent = bytes(&mail);
        let message = "X: y\nReceived: from PID=1 UID=2 with QMQP\nB: 2\n\nbody\n";
        assert!(sent.ends_with(&format!("{}:{message},0:,5:new@x,,", message.len())), "{sent}");
    }
}
