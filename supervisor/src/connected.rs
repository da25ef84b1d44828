//! The clients' connections as a dispatcher sees them.

use std::os::fd::BorrowedFd;

use qrelay_shared::ipc::message::Job;

use crate::ids::{GenerationId, JobId};

/// Connections, for reading only.
pub(crate) trait Connected {
    /// Returns what a worker of the generation is told about a connection. `None`: the connection
    /// is gone, or the generation lacks the connection's listener.
    fn job(&self, job: JobId, generation: GenerationId) -> Option<Job>;

    /// Returns the socket of a connection.
    fn socket(&self, job: JobId) -> Option<BorrowedFd<'_>>;
}
