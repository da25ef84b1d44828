//! A request that never became a mail, as its answer and its record need it.

use qrelay_shared::address::escape_for_log;
use qrelay_shared::qmqp::{Fragment, Limits, Reply, RequestError};

/// A request that never became a mail.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// For the client; `None` when it left.
    pub(crate) reply: Option<Reply>,
    /// Which rule the request breaks and with what, or how far it came.
    pub(crate) cause: String,
    /// The sender, as far as it is known, escaped as in a record.
    pub(crate) sender: String,
    /// The first recipients, escaped and separated as in a record.
    pub(crate) recipients: String,
    /// Number of recipients that are known.
    pub(crate) count: u32,
    /// Bytes that have arrived.
    pub(crate) received: u64,
}

impl Refusal {
    /// Returns the refusal of these bytes, which break a rule.
    pub(crate) fn invalid(input: &[u8], error: RequestError, limits: &Limits<'_>) -> Self {
        let fragment = Fragment::of(input, limits.default_domain);
        let reply = Reply::permanent(error.reply_text());
        Self::of(Some(reply), fragment.cause(error, limits), &fragment, input)
    }

    /// Returns the refusal of a request of which only these bytes are used; `why` says why.
    pub(crate) fn incomplete(input: &[u8], reply: Option<Reply>, why: &str) -> Self {
        let fragment = Fragment::of(input, None);
        let cause = format!("{why} after {}", fragment.progress());
        Self::of(reply, cause, &fragment, input)
    }

    /// Returns a refusal that has nothing to do with the request.
    pub(crate) fn unread(reply: Reply, cause: &str) -> Self {
        Self::of(Some(reply), cause.to_owned(), &Fragment::default(), &[])
    }

    fn of(reply: Option<Reply>, cause: String, fragment: &Fragment<'_>, input: &[u8]) -> Self {
        let shown = |recipient: &&[u8]| format!("<{}>", escape_for_log(recipient));
        let recipients: Vec<_> = fragment.recipients.iter().map(shown).collect();
        Self {
            reply,
            cause,
            sender: escape_for_log(fragment.sender.unwrap_or_default()).into_owned(),
            recipients: recipients.join(","),
            count: fragment.count,
            received: input.len() as u64,
        }
    }
}
