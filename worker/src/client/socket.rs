//! The socket of a client's connection, and where it came from.

use std::sync::Arc;

use qrelay_shared::ids::{JobId, ListenerId};
use qrelay_shared::sys::rights::PeerSocket;

/// A client's socket, as the supervisor passed it.
#[derive(Debug, Clone)]
pub struct ClientSocket {
    /// The descriptor, shared with the thread that serves the client.
    pub descriptor: Arc<PeerSocket>,
    /// The supervisor's number of the job. Of two connections that came through the same listening
    /// socket, the earlier one has the smaller number.
    pub job: JobId,
    /// The supervisor's number of the listening socket.
    pub listening: ListenerId,
    /// When the connection was accepted: nanoseconds of CLOCK_BOOTTIME.
    pub accepted: u64,
}
