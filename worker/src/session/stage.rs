//! How far a session has come when a thread has to wait for the rest.

use qrelay_shared::deadline::Deadline;
use qrelay_shared::qmqp::Reply;
use qrelay_shared::texts;

use crate::mail::Mail;
use crate::session::record::Outcome;
use crate::session::refusal::Refusal;
use crate::session::script::Handling;

/// Data of the client that may be unread when the answer is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unread {
    /// Nothing is known to be unread.
    Unknown,
    /// Bytes after the request, or the rest of a request that the client will send again.
    Some,
    /// The rest of a request that was refused for good.
    Refused,
}

/// A point in a session where the next step may wait: for the client, the next hop or a program.
pub(crate) enum Stage {
    /// There may be more of the request than these bytes.
    Request(Vec<u8>),
    /// There is no mail.
    Refused(Box<Refusal>, Unread),
    /// The mail is answered without asking its handler.
    Settled(Box<Mail>, Outcome, Unread),
    /// The handler has begun, and usually has decided.
    Handled(Handling, Deadline, Unread),
    /// The client left without having said anything.
    Gone,
    /// Nothing is left to do.
    Over,
}

impl Stage {
    /// Nothing has been read.
    pub(crate) fn untouched() -> Self {
        Self::Request(Vec::new())
    }

    /// Returns whether nothing has to be waited for, as far as is known.
    pub(crate) fn is_settled(&self) -> bool {
        match self {
            Self::Settled(_, _, unread) => *unread == Unread::Unknown,
            Self::Handled(handling, _, unread) => {
                *unread == Unread::Unknown && handling.is_settled()
            }
            Self::Gone | Self::Over => true,
            Self::Request(_) | Self::Refused(..) => false,
        }
    }

    /// qrelay itself has failed, and the client is told so.
    pub(crate) fn failed() -> Self {
        let reply = Reply::temporary(texts::INTERNAL_ERROR);
        Self::Refused(Box::new(Refusal::unread(reply, "an error in qrelay")), Unread::Some)
    }
}
