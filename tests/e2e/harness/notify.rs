//! The notification socket of a service manager, to which a daemon with NOTIFY_SOCKET reports
//! (sd_notify(3)).

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::record::{PATIENCE, Record};

/// A message of the daemon: one assignment, such as `READY=1`.
#[derive(Debug, Clone)]
pub struct Notice {
    /// The assignment.
    pub text: String,
    /// Time of arrival.
    pub at: Instant,
}

/// The receiving end of the socket.
#[derive(Debug)]
pub struct Notify {
    notices: Arc<Record<Notice>>,
}

impl Notify {
    /// Binds the socket, for daemons of every user. A thread receives until the test process ends.
    pub fn bind(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).expect("notify socket");
        let mode = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(path, mode).expect("mode");
        let notices = Arc::new(Record::default());
        let record = notices.clone();
        std::thread::spawn(move || {
            let mut datagram = [0; 8192];
            while let Ok(length) = socket.recv(&mut datagram) {
                let text = String::from_utf8_lossy(&datagram[..length]).into_owned();
                // An empty datagram ends the thread.
                if text.is_empty() {
                    break;
                }
                for line in text.lines() {
                    record.push(Notice { text: line.into(), at: Instant::now() });
                }
            }
        });
        Self { notices }
    }

    /// Returns all messages so far.
    pub fn all(&self) -> Vec<String> {
        self.notices.all().into_iter().map(|notice| notice.text).collect()
    }

    /// Returns the messages with their times.
    pub fn record(&self) -> &Record<Notice> {
        &self.notices
    }

    /// Returns the number of messages so far, for [`Notify::after`].
    pub fn mark(&self) -> usize {
        self.notices.len()
    }

    /// Waits for a message after `mark` that satisfies `wanted`, and returns it; `what` names it in
    /// the panic.
    #[track_caller]
    pub fn after(&self, mark: usize, what: &str, wanted: impl Fn(&str) -> bool) -> Notice {
        match self.try_after(mark, PATIENCE, wanted) {
            Some(notice) => notice,
            None => panic!("waited for {what}, got {:?}", &self.all()[mark..]),
        }
    }

    /// Waits for `timeout` at most for a message after `mark` that satisfies `wanted`; `None` if
    /// none came.
    pub fn try_after(
        &self,
        mark: usize,
        timeout: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Option<Notice> {
        self.notices.wait_for(timeout, |notices| {
            notices[mark..].iter().find(|notice| wanted(&notice.text)).cloned()
        })
    }
}
