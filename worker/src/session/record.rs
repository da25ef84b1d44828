//! The record of a finished mail, from which the supervisor makes a log line and a Pond message.
//!
//! Contract: every text from outside is made printable, and the recipients are cut so that a Pond
//! message (`from=<S> to=<R1>,… TEXT`) stays under 32 KiB. Bytes are counted as the original qrelay
//! counts them: qrelay's own `Received` line counts neither in `size` nor in `sent`.

use std::sync::Arc;

use qrelay_shared::address::{escape_for_log, printable};
use qrelay_shared::ipc::message::{MailRecord, Times};
use qrelay_shared::pond;
use qrelay_shared::qmqp::Reply;

use crate::clock::age;
use crate::delivery::Delivery;
use crate::mail::Mail;

/// Stands for the action when there was none.
const NO_ACTION: &str = "-";

/// Stands for the reply when the client left before it was due.
const CANCELED: &str = "canceled";

/// Bytes of a Pond message that are neither sender, recipients nor reply:
/// `from=<> to= ` and ` … +1024 more`, with some room.
const FRAME: usize = 64;

/// Bytes that the recipients of a usual mail need.
const ROOM: usize = 128;

/// How a mail ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// For the client.
    pub(crate) reply: Reply,
    action: &'static str,
    next_hop: Option<Arc<str>>,
    attempted: bool,
    canceled: bool,
    refused: bool,
}

impl Outcome {
    /// Returns the outcome of a mail whose handler never ran.
    pub(crate) fn refused(reply: Reply) -> Self {
        Self { refused: true, ..Self::own(NO_ACTION, reply) }
    }

    /// Returns the outcome of a mail whose handler came to no decision.
    pub(crate) fn failed(reply: Reply) -> Self {
        Self::own(NO_ACTION, reply)
    }

    /// Returns the outcome of an action that hands the mail to nobody.
    pub(crate) fn own(action: &'static str, reply: Reply) -> Self {
        Self { reply, action, next_hop: None, attempted: false, canceled: false, refused: false }
    }

    /// Returns the outcome of an action that handed the mail on, or tried.
    pub(crate) fn delivery(action: &'static str, delivery: Delivery) -> Self {
        let Delivery { reply, next_hop, attempted, canceled } = delivery;
        Self { reply, action, next_hop, attempted, canceled, refused: false }
    }
}

/// Returns the record of a mail.
pub(crate) fn record<'m>(mail: &'m Mail, outcome: &'m Outcome, times: Times) -> MailRecord<'m> {
    let sender = escape_for_log(mail.sender());
    let text = match outcome.canceled {
        true => CANCELED.into(),
        false => printable(&outcome.reply.text),
    };
    let room = pond::MAX_MESSAGE.saturating_sub(FRAME + sender.len() + text.len());
    let recipients = Recipients::join(mail.recipients(), room);
    let received = mail.payload_length() as u64;
    let inserted = mail.inserted().size() as u64;
    MailRecord {
        sender,
        recipients: recipients.text.into(),
        recipient_count: recipients.count,
        recipients_cut: recipients.cut,
        account: mail.account(),
        action: outcome.action,
        next_hop: outcome.next_hop.as_deref(),
        status: (!outcome.canceled).then_some(outcome.reply.status),
        text,
        size: mail.relayed_length() as u64,
        received,
        sent: if outcome.attempted { received + inserted } else { 0 },
        duration: since(mail.socket().accepted),
        times,
        refused: outcome.refused,
    }
}

/// Returns the record of a request that was refused before there was a mail.
pub(crate) fn refusal(reply: &Reply, accepted: u64, times: Times) -> MailRecord<'_> {
    MailRecord {
        sender: "".into(),
        recipients: "".into(),
        recipient_count: 0,
        recipients_cut: 0,
        account: None,
        action: NO_ACTION,
        next_hop: None,
        status: Some(reply.status),
        text: printable(&reply.text),
        size: 0,
        received: 0,
        sent: 0,
        duration: since(accepted),
        times,
        refused: true,
    }
}

/// Returns the microseconds since a connection was accepted.
fn since(accepted: u64) -> u64 {
    u64::try_from(age(accepted).as_micros()).unwrap_or(u64::MAX)
}

/// Addresses as one text, and how many of all were left out.
#[derive(Debug, Default, PartialEq, Eq)]
struct Recipients {
    text: String,
    count: u32,
    cut: u32,
}

impl Recipients {
    /// Joins addresses while they fit in `room` bytes.
    fn join<R: AsRef<[u8]>>(addresses: impl IntoIterator<Item = R>, room: usize) -> Self {
        let text = String::with_capacity(ROOM.min(room));
        let mut joined = Self { text, ..Self::default() };
        for address in addresses {
            joined.count += 1;
            let shown = escape_for_log(address.as_ref());
            let separator = if joined.text.is_empty() { "" } else { "," };
            if joined.cut > 0 || joined.text.len() + separator.len() + shown.len() + 2 > room {
                joined.cut += 1;
                continue;
            }
            for part in [separator, "<", &shown, ">"] {
                joined.text.push_str(part);
            }
        }
        joined
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mail::test::mail;
    use qrelay_shared::qmqp::Status;

    #[test]
    fn counts_as_the_original_does() {
        // The first of the captured Pond datagrams.
        let mut mail = mail(
            b"Subject: x\n\nhello\n",
            b"acc@example.com",
            &[b"r1@example.org", b"r2@example.org"],
        );
        mail.set_account(Some("acct42".into()));
        mail.insert_header(b"X-A", b"b");
        let delivery = Delivery {
            reply: Reply::accepted("o\nk"),
            next_hop: Some("192.0.2.1:628".into()),
            attempted: true,
            canceled: false,
        };
        let outcome = Outcome::delivery("connect", delivery);
        let record = record(&mail, &outcome, Times::default());
        assert_eq!((record.size, record.received, record.sent), (26, 77, 85));
        assert_eq!(record.recipients, "<r1@example.org>,<r2@example.org>");
        assert_eq!((record.recipient_count, record.recipients_cut), (2, 0));
        assert_eq!(record.account, Some("acct42"));
        assert_eq!((&*record.text, record.status), ("o?k", Some(Status::Accepted)));
        assert!(!record.refused && record.duration > 0);
    }

    #[test]
    fn what_was_not_relayed_was_not_sent() {
        let mail = mail(b"", b"", &[b"r@x"]);
        let outcome = Outcome::own("reject", Reply::permanent("rejected"));
        let record = record(&mail, &outcome, Times::default());
        assert_eq!((record.sent, record.action, &*record.sender), (0, "reject", ""));
    }

    #[test]
    fn a_client_that_left_was_told_nothing() {
        let reply = Reply::temporary("timeout");
        let delivery = Delivery { reply, next_hop: None, attempted: true, canceled: true };
        let mail = mail(b"", b"", &[b"r@x"]);
        let outcome = Outcome::delivery("exec", delivery);
        let record = record(&mail, &outcome, Times::default());
        assert_eq!((record.status, &*record.text), (None, "canceled"));
    }

    #[test]
    fn recipients_are_cut() {
        let joined = Recipients::join(["a@b", "c@d", "e@f"], 11);
        let expected = Recipients { text: "<a@b>,<c@d>".into(), count: 3, cut: 1 };
        assert_eq!(joined, expected);
        let joined = Recipients::join(["a@bcd", "c@d"], 5);
        assert_eq!(joined, Recipients { text: String::new(), count: 2, cut: 2 });
    }

    #[test]
    fn a_record_of_many_recipients_fits_a_pond_message() {
        let address = [b"\\".repeat(64), b"@".to_vec(), b"x".repeat(63)].concat();
        let recipients: Vec<&[u8]> = vec![&address; 1024];
        let mut mail = mail(b"", b"s@x", &[b"r@x"]);
        mail.set_recipients(recipients.iter().map(|r| r.to_vec()).collect());
        let outcome = Outcome::own("discard", Reply::accepted(vec![b'x'; 4000]));
        let record = record(&mail, &outcome, Times::default());
        let whole = format!("from=<{}> to={} {}", record.sender, record.recipients, record.text);
        assert!(whole.len() + 20 < pond::MAX_MESSAGE);
        assert!(record.recipients.len() > 20_000);
        assert_eq!(record.recipient_count, 1024);
    }
}
