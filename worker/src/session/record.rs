//! The record of a finished mail, from which the supervisor makes a log line and a Pond message.
//!
//! Contract: every text from outside is made printable, and there are no more recipients than fit
//! in a Pond record. Bytes are counted as the original qrelay counts them: qrelay's own `Received`
//! line counts neither in `size` nor in `sent`, and the end of an inserted line has two bytes.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use memchr::memchr;
use qrelay_shared::address::{escape_for_log, printable};
use qrelay_shared::ipc::message::{MailRecord, Times};
use qrelay_shared::pond;
use qrelay_shared::qmqp::Reply;

use crate::clock::age;
use crate::delivery::Delivery;
use crate::mail::Mail;
use crate::session::refusal::Refusal;

/// Stands for the action when there was none.
const NO_ACTION: &str = "-";

/// Stands for the reply when the client left before it was due.
const CANCELED: &str = "canceled";

/// How far `Message-ID` is looked for, in bytes: a usual header is much smaller.
const HEADER: usize = 16 * 1024;

/// Most bytes that are shown of a `Message-ID`.
const MESSAGE_ID: usize = 250;

/// Bytes that the recipients of a usual mail need.
const ROOM: usize = 128;

/// How a mail ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// For the client.
    pub(crate) reply: Reply,
    action: &'static str,
    next_hop: Option<Arc<str>>,
    /// Whether the action was to hand the mail on.
    relays: bool,
    /// Whether the mail began to go out.
    forwarded: bool,
    canceled: bool,
    /// Why the handler never ran.
    cause: Option<String>,
}

impl Outcome {
    /// Returns the outcome of a mail whose handler never ran.
    pub(crate) fn refused(reply: Reply, cause: &str) -> Self {
        Self { cause: Some(cause.to_owned()), ..Self::own(NO_ACTION, reply) }
    }

    /// Returns the outcome of a mail whose handler came to no decision.
    pub(crate) fn failed(reply: Reply) -> Self {
        Self::own(NO_ACTION, reply)
    }

    /// Returns the outcome of an action that hands the mail to nobody.
    pub(crate) fn own(action: &'static str, reply: Reply) -> Self {
        Self {
            reply,
            action,
            next_hop: None,
            relays: false,
            forwarded: false,
            canceled: false,
            cause: None,
        }
    }

    /// Returns the outcome of an action that handed the mail on, or tried.
    pub(crate) fn delivery(action: &'static str, delivery: Delivery) -> Self {
        let Delivery { reply, next_hop, attempted, canceled } = delivery;
        Self { next_hop, relays: true, forwarded: attempted, canceled, ..Self::own(action, reply) }
    }
}

/// The moment at which a client had its answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answered {
    /// Microseconds since the connection was accepted.
    duration: u64,
    /// Microseconds since the epoch.
    at: u64,
    /// What the time until then went by with.
    times: Times,
}

impl Answered {
    /// Returns this moment, for a connection that was accepted at `accepted` (see [`age`]).
    pub(crate) fn now(accepted: u64, times: Times) -> Self {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        Self { duration: micros(age(accepted)), at: epoch.map_or(0, micros), times }
    }
}

/// Returns the record of a mail.
pub(crate) fn record<'m>(
    mail: &'m Mail,
    outcome: &'m Outcome,
    answered: Answered,
) -> MailRecord<'m> {
    let sender = escape_for_log(mail.sender());
    let text = match outcome.canceled {
        true => CANCELED.into(),
        false => printable(&outcome.reply.text),
    };
    let recipients = Recipients::join(mail.recipients(), pond::MAX_DATAGRAM);
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
        forwarded: outcome.forwarded,
        status: (!outcome.canceled).then_some(outcome.reply.status),
        text,
        size: mail.relayed_length() as u64,
        received,
        sent: if outcome.relays { received + inserted } else { 0 },
        duration: answered.duration,
        answered: answered.at,
        times: answered.times,
        message_id: message_id(mail.message()),
        cause: outcome.cause.as_deref(),
        refused: outcome.cause.is_some(),
    }
}

/// Returns the record of a request that never became a mail.
pub(crate) fn refusal(refusal: &Refusal, answered: Answered) -> MailRecord<'_> {
    let reply = refusal.reply.as_ref();
    MailRecord {
        sender: (&*refusal.sender).into(),
        recipients: (&*refusal.recipients).into(),
        recipient_count: refusal.count,
        recipients_cut: 0,
        account: None,
        action: NO_ACTION,
        next_hop: None,
        forwarded: false,
        status: reply.map(|reply| reply.status),
        text: reply.map_or(CANCELED.into(), |reply| printable(&reply.text)),
        size: 0,
        received: refusal.received,
        sent: 0,
        duration: answered.duration,
        answered: answered.at,
        times: answered.times,
        message_id: None,
        cause: Some(&refusal.cause),
        refused: true,
    }
}

/// Returns the value of a message's `Message-ID`, as far as it is printable ASCII. Looks at the
/// first bytes of each line of the header, and no further than [`HEADER`].
fn message_id(message: &[u8]) -> Option<&str> {
    const NAME: &[u8] = b"Message-ID:";
    let mut rest = &message[..message.len().min(HEADER)];
    while !matches!(rest, [] | [b'\n', ..] | [b'\r', b'\n', ..]) {
        if rest.get(..NAME.len()).is_some_and(|name| name.eq_ignore_ascii_case(NAME)) {
            let value = unfolded(&rest[NAME.len()..]);
            let value = &value[..value.len().min(MESSAGE_ID)];
            let end = value.iter().position(|b| !b.is_ascii_graphic()).unwrap_or(value.len());
            return str::from_utf8(&value[..end]).ok().filter(|text| !text.is_empty());
        }
        rest = memchr(b'\n', rest).map_or(&[], |lf| &rest[lf + 1..]);
    }
    None
}

/// Returns a field's value without the white space before it, and without the end of a line that is
/// folded there.
fn unfolded(mut value: &[u8]) -> &[u8] {
    loop {
        value = match value {
            [b' ' | b'\t' | b'\r', after @ ..] => after,
            [b'\n', b' ' | b'\t', after @ ..] => after,
            _ => return value,
        };
    }
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
        let record = record(&mail, &outcome, Answered::now(0, Times::default()));
        assert_eq!((record.size, record.received, record.sent), (26, 77, 85));
        assert_eq!(record.recipients, "<r1@example.org>,<r2@example.org>");
        assert_eq!((record.recipient_count, record.recipients_cut), (2, 0));
        assert_eq!(record.account, Some("acct42"));
        assert_eq!((&*record.text, record.status), ("o?k", Some(Status::Accepted)));
        assert!(!record.refused && record.duration > 0);
    }

    #[test]
    fn the_message_id_is_found_in_the_header() {
        let long = [b"Message-ID: <", &[b'x'; 300][..], b">\n\n"].concat();
        for (message, expected) in [
            (&b"Message-ID: <a@b>\n\n"[..], &b"<a@b>"[..]),
            (b"Subject: x\r\nmessage-id:<a@b>\r\n\r\n", b"<a@b>"),
            (b"Message-Id:\n <a@b> (x)\nX: y\n\n", b"<a@b>"),
            (b"Message-ID:\n\nbody", b""),
            (b"Message-ID: <a\x1b[0m@b>\n", b"<a"),
            (b"X: y\n\nMessage-ID: <a@b>\n", b""),
            (b"X: y\r\n\r\nMessage-ID: <a@b>\n", b""),
            (b"X-Message-ID: <a@b>", b""),
            (b"Message-ID", b""),
            (b"", b""),
            (&long, &long[12..12 + MESSAGE_ID]),
        ] {
            let found = message_id(message).unwrap_or_default();
            assert_eq!(found.as_bytes(), expected, "{}", message.escape_ascii());
        }
    }

    #[test]
    fn what_was_not_relayed_was_not_sent() {
        let mail = mail(b"", b"", &[b"r@x"]);
        let outcome = Outcome::own("reject", Reply::permanent("rejected"));
        let record = record(&mail, &outcome, Answered::now(0, Times::default()));
        assert_eq!((record.sent, record.action, &*record.sender), (0, "reject", ""));
    }

    #[test]
    fn a_client_that_left_was_told_nothing() {
        let reply = Reply::temporary("timeout");
        let delivery = Delivery { reply, next_hop: None, attempted: true, canceled: true };
        let mail = mail(b"", b"", &[b"r@x"]);
        let outcome = Outcome::delivery("exec", delivery);
        let record = record(&mail, &outcome, Answered::now(0, Times::default()));
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
    fn a_failed_connect_was_an_attempt_to_relay() {
        let reply = Reply::temporary("connect failed");
        let delivery = Delivery { reply, next_hop: None, attempted: false, canceled: false };
        let mail = mail(b"A: b\n", b"", &[b"r@x"]);
        let outcome = Outcome::delivery("connect", delivery);
        let record = record(&mail, &outcome, Answered::now(0, Times::default()));
        assert_eq!((record.sent, record.forwarded), (record.received, false));
    }

    #[test]
    fn a_record_of_many_recipients_has_as_many_as_a_pond_record() {
        let address = [b"\\".repeat(64), b"@".to_vec(), b"x".repeat(63)].concat();
        let recipients: Vec<&[u8]> = vec![&address; 1024];
        let mut mail = mail(b"", b"s@x", &[b"r@x"]);
        mail.set_recipients(recipients.iter().map(|r| r.to_vec()).collect());
        let outcome = Outcome::own("discard", Reply::accepted(vec![b'x'; 4000]));
        let record = record(&mail, &outcome, Answered::now(0, Times::default()));
        assert!((3700..=pond::MAX_DATAGRAM).contains(&record.recipients.len()));
        assert_eq!(record.recipient_count, 1024);
        assert_eq!(record.recipients_cut, 1024 - record.recipients.matches('<').count() as u32);
    }
}
