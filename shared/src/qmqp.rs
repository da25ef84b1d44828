//! QMQP (<https://cr.yp.to/proto/qmqp.html>): requests and replies as bytes and values.
//!
//! A request is one netstring that holds the message as a netstring, the sender as a netstring,
//! and one netstring per recipient. A reply is one netstring whose first byte is the status.
//! [`request`](progress) is what a server reads, [`outgoing`](outgoing()) what a client writes,
//! and [`Reply`] what goes the other way.
//!
//! Contract: bytes in, values out. As server we are strict, as client lenient with the reply.
//!
//! # Failure
//! A request that breaks a rule is a [`RequestError`] with the text for the client; all of them
//! are permanent (`D`). A reply that breaks one is [`ReplyProgress::Malformed`].

mod outgoing;
mod reply;
mod request;

pub use outgoing::{Outgoing, encode_request, outgoing};
pub use reply::{Reply, ReplyProgress, Status, parse_reply};
pub use request::{Limits, Progress, Request, RequestError, parse, progress};

/// Most recipients of one mail (docs/protocol/qmqp).
pub const MAX_RECIPIENTS: usize = 1024;
/// Bytes that a request may have beyond the message limit: 1024 recipients of 254 bytes, their
/// netstring framing, and some room.
pub const ENVELOPE_ALLOWANCE: usize = 300_000;
/// Bytes that are read of a reply, its netstring framing included.
pub const MAX_REPLY: usize = 4096;
/// Bytes of text, without the status byte, that are sent to a client: the original program in
/// front of us takes no more.
pub const MAX_REPLY_TEXT: usize = 255;
