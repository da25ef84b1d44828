//! Every text with which qrelay itself answers a client. The answers of next hops, programs and
//! scripts are passed on and are not listed here.
//!
//! Administrators search their logs for these texts, so a changed text belongs in the CHANGELOG,
//! and docs/lua/actions.md says what each of them means.

/// `D`: the bytes are no QMQP request, or descriptors came with them.
pub const MALFORMED_INPUT: &str = "malformed input";
/// `D`: the message exceeds `max_size`.
pub(crate) const MESSAGE_TOO_LARGE: &str = "message too large";
/// `D`: the request names too many recipients.
pub(crate) const TOO_MANY_RECIPIENTS: &str = "too many recipients";
/// `D`: the sender or a recipient is no valid address.
pub(crate) const BAD_ADDRESS: &str = "bad address";
/// `D`: the message has more `Received` lines than `max_hops`, so it probably goes in circles.
pub const TOO_MANY_HOPS: &str = "too many hops";
/// `Z`: the request did not come, or not completely, in time.
pub const REQUEST_TIMED_OUT: &str = "request timed out";
/// `Z`: the listener's `allow` does not name the client's address.
pub const ACCESS_DENIED: &str = "access denied";
/// `Z`: no worker finished the mail: overload, a dead worker, a stop.
pub const TRY_AGAIN: &str = "try again later";

/// `K`, unless the handler gives a text of its own: the mail was discarded.
pub const DISCARDED: &str = "discarded";
/// `D`, unless the handler gives a text of its own: the mail was rejected.
pub const REJECTED: &str = "rejected";
/// `Z`, unless the handler gives a text of its own: the mail was deferred.
pub const DEFERRED: &str = "deferred";
/// `Z`: the handler raised an error, or decided nothing.
pub const SCRIPT_FAILED: &str = "script failed";

/// `Z`: no next hop could be connected to.
pub const CONNECT_FAILED: &str = "connect failed";
/// `Z`: the next hop broke off, or the mail's time was over.
pub const RELAY_FAILED: &str = "relay failed";
/// `Z`: the next hop's answer is no QMQP reply.
pub const MALFORMED_RESPONSE: &str = "malformed relay response";
/// `Z`: the time limit of the action itself was over.
pub const TIMEOUT: &str = "timeout";
/// `Z`, or `D` if a program's exit status says so: a program could not be started or ended badly,
/// or qrelay has a bug.
pub const INTERNAL_ERROR: &str = "internal server error";
