//! A service manager's notification socket, as seen by a daemon with NOTIFY_SOCKET (sd_notify(3)).

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::record::{PATIENCE, Record};

/// One assignment, such as `READY=1`, and when it came.
#[derive(Debug, Clone)]
pub struct Notice {
    /// The line.
    pub text: String,
    /// Its arrival.
    pub at: Instant,
}

/// The receiving end.
#[derive(Debug)]
pub struct Notify {
    notices: Arc<Record<Notice>>,
}

impl Notify {
    /// Binds the socket; a thread receives until the test process ends.
    pub fn bind(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).expect("notify socket");
        let notices = Arc::new(Record::default());
        let record = notices.clone();
        std::thread::spawn(move || {
            let mut datagram = [0; 8192];
            while let Ok(length) = socket.recv(&mut datagram) {
                let text = String::from_utf8_lossy(&datagram[..length]).into_owned();
                // An empty datagram is the end, sent by `Drop`.
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

    /// All lines so far.
    pub fn all(&self) -> Vec<String> {
        self.notices.all().into_iter().map(|notice| notice.text).collect()
    }

    /// The lines and their times.
    pub fn record(&self) -> &Record<Notice> {
        &self.notices
    }

    /// How many lines there are, to be given to [`Notify::after`].
    pub fn mark(&self) -> usize {
        self.notices.len()
    }

    /// Waits for a line that satisfies `wanted`, among those after `mark`.
    #[track_caller]
    pub fn after(&self, mark: usize, what: &str, wanted: impl Fn(&str) -> bool) -> Notice {
        match self.try_after(mark, PATIENCE, wanted) {
            Some(notice) => notice,
            None => panic!("waited for {what}, got {:?}", &self.all()[mark..]),
        }
    }

    /// The same, with a time limit and without a panic.
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
