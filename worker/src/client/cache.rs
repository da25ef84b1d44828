//! The processes of clients with mails under way.
//!
//! Contract: mails of a client that are under way share a descriptor of its process if they came
//! through one listening socket, because opening and closing a descriptor costs some 3 µs. A
//! process that connected to the same socket before this client, with the same number, and still
//! has the number, is this client: a socket yields connections in the order in which they were
//! made, so the process had the number when this client connected, and no other process can have
//! got the number since.
//!
//! # Failure
//! [`IdentityError`].

use std::os::fd::AsFd as _;
use std::sync::{Arc, LazyLock, Weak};

use nix::unistd::Pid;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::client::process::{Client, IdentityError};
use crate::client::socket::ClientSocket;
use qrelay_shared::ids::{JobId, ListenerId};

/// Number of entries at which entries of ended clients are removed for the first time.
const MANY: usize = 1024;

/// Returns the table of this process.
pub(crate) fn clients() -> &'static Clients {
    static UNDER_WAY: LazyLock<Clients> = LazyLock::new(Clients::default);
    &UNDER_WAY
}

/// The processes of clients with mails under way, shared by all threads.
#[derive(Debug, Default)]
pub(crate) struct Clients(Mutex<Table>);

/// The listening socket's number, and the process'.
type Key = (ListenerId, Pid);

/// The clients with mails under way, and some that are gone.
#[derive(Debug)]
struct Table {
    known: FxHashMap<Key, Known>,
    /// Number of entries at which entries of ended clients are removed.
    many: usize,
}

/// The process behind a connection.
#[derive(Debug)]
struct Known {
    job: JobId,
    client: Weak<Client>,
}

impl Default for Table {
    fn default() -> Self {
        Self { known: FxHashMap::default(), many: MANY }
    }
}

impl Clients {
    /// Returns the process that connected this socket, whose number was `pid` then, and the id of
    /// its control group as [`Client::check`] tells it. Other mails find the process as long as a
    /// mail keeps it.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub(crate) fn of(
        &self,
        socket: &ClientSocket,
        pid: Pid,
    ) -> Result<(Arc<Client>, Option<u64>), IdentityError> {
        let key = (socket.listening, pid);
        if let Some(client) = self.earlier(key, socket.job) {
            match client.check() {
                Ok(group) => return Ok((client, group)),
                // The process may not be this client. No mail will find it alive again.
                Err(IdentityError::Exited) => self.forget(key, &client),
                Err(IdentityError::Hidden | IdentityError::Os(..)) => {}
            }
        }
        let client = Arc::new(Client::of(socket.descriptor.as_fd(), pid, socket.accepted)?);
        let group = client.check()?;
        self.remember(key, socket.job, &client);
        Ok((client, group))
    }

    /// Returns the process with this number that connected to this socket no later.
    fn earlier(&self, key: Key, job: JobId) -> Option<Arc<Client>> {
        let table = self.0.lock();
        table.known.get(&key).filter(|known| known.job <= job)?.client.upgrade()
    }

    fn forget(&self, key: Key, client: &Arc<Client>) {
        let mut table = self.0.lock();
        let is_it = |known: &Known| known.client.as_ptr() == Arc::as_ptr(client);
        if table.known.get(&key).is_some_and(is_it) {
            table.known.remove(&key);
        }
    }

    /// Adds a client, unless an earlier one is there, which is of more use.
    fn remember(&self, key: Key, job: JobId, client: &Arc<Client>) {
        let mut table = self.0.lock();
        if table.known.len() >= table.many {
            table.known.retain(|_, known| known.client.strong_count() > 0);
            table.many = MANY.max(2 * table.known.len());
        }
        let earlier = |known: &Known| known.job <= job && known.client.strong_count() > 0;
        if !table.known.get(&key).is_some_and(earlier) {
            table.known.insert(key, Known { job, client: Arc::downgrade(client) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use qrelay_shared::sys::rights::{PeerSocket, Rights};

    /// Returns a socket of this process.
    fn socket(job: JobId, listening: ListenerId) -> ClientSocket {
        accepted(job, listening, u64::MAX)
    }

    /// Returns a socket of this process, with the time when the connection was accepted. Before
    /// Linux 6.5 a process that has started later isn't the client.
    fn accepted(job: JobId, listening: ListenerId, accepted: u64) -> ClientSocket {
        let (socket, _) = UnixStream::pair().expect("pair");
        let descriptor = Arc::new(PeerSocket::new(socket.into(), Rights::Refused));
        ClientSocket { descriptor, job, listening, accepted }
    }

    #[test]
    fn who_shares_a_process() {
        let clients = Clients::default();
        let of = |job, listening| {
            let found = clients.of(&socket(job, listening), Pid::this());
            found.expect("it is us").0
        };
        let first = of(JobId(10), ListenerId(1));
        let later = of(JobId(11), ListenerId(1));
        assert!(Arc::ptr_eq(&first, &later));
        assert!(Arc::ptr_eq(&first, &of(JobId(10), ListenerId(1))), "asked again");
        assert!(!Arc::ptr_eq(&first, &of(JobId(12), ListenerId(2))), "connected to another socket");
        let earlier = of(JobId(9), ListenerId(1));
        assert!(!Arc::ptr_eq(&first, &earlier), "connected earlier");
        assert!(Arc::ptr_eq(&earlier, &of(JobId(11), ListenerId(1))), "of most use");
        let other = clients.of(&accepted(JobId(13), ListenerId(1), 0), Pid::parent());
        assert_eq!(other.err(), Some(IdentityError::Exited), "not the process that connected");
    }

    #[test]
    fn one_that_is_gone_makes_room() {
        let clients = Clients::default();
        let of = |job| clients.of(&socket(job, ListenerId(1)), Pid::this()).expect("it is us").0;
        let ours = socket(JobId(1), ListenerId(1)).descriptor;
        let mut process = Command::new("/bin/sleep").arg("60").spawn().expect("a process");
        let pid = Pid::from_raw(process.id().cast_signed());
        let gone = Arc::new(Client::of(ours.as_fd(), pid, u64::MAX).expect("it lives"));
        process.kill().expect("kill");
        process.wait().expect("wait");
        clients.remember((ListenerId(1), Pid::this()), JobId(1), &gone);
        let next = of(JobId(2));
        assert!(!Arc::ptr_eq(&gone, &next));
        assert!(Arc::ptr_eq(&next, &of(JobId(3))));
    }

    #[test]
    fn looks_for_those_that_are_gone_seldom_enough() {
        let clients = Clients::default();
        let (one, _) = clients.of(&socket(JobId(1), ListenerId(0)), Pid::this()).expect("it is us");
        for number in 1..=MANY as u64 {
            clients.remember((ListenerId(number), Pid::this()), JobId(1), &one);
        }
        let table = clients.0.lock();
        assert_eq!((table.known.len(), table.many), (MANY + 1, 2 * MANY));
    }

    #[test]
    fn kept_no_longer_than_its_mails() {
        let clients = Clients::default();
        for number in 0..10 * MANY as u64 {
            clients.of(&socket(JobId(1), ListenerId(number)), Pid::this()).expect("it is us");
            assert!(clients.earlier((ListenerId(number), Pid::this()), JobId(1)).is_none());
            assert!(clients.0.lock().known.len() <= MANY);
        }
    }
}
