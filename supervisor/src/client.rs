//! Words about clients that several owners share: whom credits are counted for, and what a worker
//! is given with a client's connection.

use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use qrelay_shared::ipc::message::{Job, Peer};

use crate::ids::{GenerationId, JobId};

/// Whom connections and credits are counted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Client {
    /// All processes of a user.
    Uid(u32),
    /// All connections from an address.
    Ip(IpAddr),
}

impl From<Peer> for Client {
    fn from(peer: Peer) -> Self {
        match peer {
            Peer::Local { uid, .. } => Self::Uid(uid),
            Peer::Remote(address) => Self::Ip(address),
        }
    }
}

/// The connections as a dispatcher sees them, for reading only.
pub(crate) trait Connected {
    /// Returns what a worker of the generation is told about a connection. `None`: the connection
    /// is gone, or the generation lacks the connection's listener.
    fn job(&self, job: JobId, generation: GenerationId) -> Option<Job>;

    /// Returns the socket of a connection.
    fn socket(&self, job: JobId) -> Option<BorrowedFd<'_>>;
}
