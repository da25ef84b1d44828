//! QMQP (<https://cr.yp.to/proto/qmqp.html>): requests and replies as bytes and values.
//!
//! A request is one netstring that holds the message as a netstring, the sender as a netstring, and
//! one netstring per recipient. A reply is one netstring whose first byte is the status.
//! [`progress`] and [`parse`] read a request as a server, [`outgoing`](outgoing()) builds one as a
//! client, and [`Reply`] is the answer.
//!
//! Contract: bytes in, values out. qrelay is strict as a server, and lenient with replies as a
//! client.
//!
//! # Failure
//! A request that breaks a rule is a [`RequestError`] with the text for the client; every such
//! error is permanent (`D`). A reply that breaks a rule is [`ReplyProgress::Malformed`].

mod fragment;
mod outgoing;
mod reply;
mod request;

pub use fragment::Fragment;
pub use outgoing::{Outgoing, encode_request, outgoing};
pub use reply::{Reply, ReplyProgress, Status, parse_reply};
pub use request::{Limits, Progress, Request, RequestError, parse, progress};

/// Highest number of recipients of one mail (docs/protocol/qmqp.md).
pub const MAX_RECIPIENTS: usize = 1024;
/// Number of bytes that a request may have beyond the limit of its message: 1024 recipients of 254
/// bytes, their netstring framing, and some reserve.
pub(crate) const ENVELOPE_ALLOWANCE: usize = 300_000;
/// Number of bytes that are read of a reply, including its netstring framing.
pub const MAX_REPLY: usize = 4096;
/// Number of bytes of text, without the status byte, that are sent to a client. The original
/// program, which may be the client, takes no more.
pub const MAX_REPLY_TEXT: usize = 255;
