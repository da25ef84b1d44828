//! Datagrams to the service manager (sd_notify(3)).
//!
//! Contract: sending never waits. A value is one line of at most [`VALUE_MAX`] bytes, whatever text
//! it has, so that no text can be taken for another assignment.
//!
//! # Failure
//! Without NOTIFY_SOCKET nothing is sent. What the service manager doesn't take is kept and sent
//! again; when too much is kept, the oldest datagram is lost. The log has one line when the trouble
//! begins, and one with the number of lost datagrams when it is over.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, sendto, socket};
use slog::{Logger, info, warn};

use crate::backoff::Backoff;

/// Longest value in bytes. systemd drops datagrams of more than 4096 bytes (NOTIFY_BUFFER_MAX).
const VALUE_MAX: usize = 1024;

/// Most datagrams that are kept: what a reload and a stop say.
const MOST_KEPT: usize = 8;

/// The end of a value that has been cut.
const CUT: &str = "…";

/// The socket of the service manager.
#[derive(Debug)]
pub(super) struct Notifier {
    log: Logger,
    channel: Option<(OwnedFd, UnixAddr)>,
    /// Datagrams that the service manager has not taken yet, oldest first.
    kept: VecDeque<String>,
    lost: u64,
    /// The service manager did not take the latest datagram.
    refused: bool,
    retry: Instant,
    backoff: Backoff,
}

impl Notifier {
    /// Opens a channel to the address that the environment has as NOTIFY_SOCKET.
    pub(super) fn new(log: Logger, address: Option<&str>, now: Instant) -> Self {
        let channel = address.and_then(|address| match open(address) {
            Ok(channel) => Some(channel),
            Err(errno) => {
                warn!(log, "the service manager can't be notified";
                    "NOTIFY_SOCKET" => address, "error" => errno.desc());
                None
            }
        });
        let (kept, backoff) = (VecDeque::new(), Backoff::default());
        Self { log, channel, kept, lost: 0, refused: false, retry: now, backoff }
    }

    /// Sends a datagram as soon as the service manager takes it.
    pub(super) fn tell(&mut self, datagram: String) {
        self.kept.push_back(datagram);
        if !self.refused {
            self.send_kept();
        }
        while self.kept.len() > MOST_KEPT {
            self.kept.pop_front();
            self.lost += 1;
        }
    }

    /// Sends a datagram now or never, because there will be another one like it.
    pub(super) fn mention(&mut self, datagram: &str) {
        match self.send(datagram) {
            Ok(()) => self.over(),
            Err(errno) => {
                self.lost += 1;
                self.trouble(errno);
            }
        }
    }

    /// Tries again to send what is kept, when that is due.
    pub(super) fn tick(&mut self, now: Instant) {
        if self.next_tick().is_some_and(|at| at <= now) {
            self.send_kept();
            if self.refused {
                self.retry = now + self.backoff.failed();
            }
        }
    }

    /// Returns when [`Self::tick`] has something to do, if ever.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        (!self.kept.is_empty()).then_some(self.retry)
    }

    fn send_kept(&mut self) {
        while let Some(datagram) = self.kept.front() {
            match self.send(datagram) {
                Ok(()) => self.kept.pop_front(),
                Err(errno) => return self.trouble(errno),
            };
        }
        self.over();
    }

    fn send(&self, datagram: &str) -> Result<(), Errno> {
        let Some((socket, address)) = &self.channel else { return Ok(()) };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendto(socket.as_raw_fd(), datagram.as_bytes(), address, flags).map(drop)
    }

    fn trouble(&mut self, errno: Errno) {
        if !std::mem::replace(&mut self.refused, true) {
            warn!(self.log, "the service manager takes no notifications"; "error" => errno.desc());
        }
    }

    /// Reports the end of the trouble, if there was any and nothing is kept any more.
    fn over(&mut self) {
        if !self.kept.is_empty() || !std::mem::take(&mut self.refused) {
            return;
        }
        self.backoff.succeeded();
        info!(self.log, "the service manager takes notifications again"; "lost" => self.lost);
        self.lost = 0;
    }
}

/// Returns `NAME=value` with the value on one line, cut to [`VALUE_MAX`] bytes.
pub(super) fn assignment(name: &str, value: &str) -> String {
    let mut text = format!("{name}=");
    let end = text.len() + VALUE_MAX;
    text.extend(value.chars().take(VALUE_MAX + 1).map(|c| if c.is_control() { ' ' } else { c }));
    if text.len() > end {
        let fits = (0..=end - CUT.len()).rev().find(|&at| text.is_char_boundary(at));
        text.truncate(fits.unwrap_or(0));
        text.push_str(CUT);
    }
    text
}

/// Returns a socket and the address to send to: a path, or a name of the abstract namespace with
/// `@` in front.
fn open(address: &str) -> Result<(OwnedFd, UnixAddr), Errno> {
    let address = match address.strip_prefix('@') {
        Some(name) => UnixAddr::new_abstract(name.as_bytes())?,
        None if address.starts_with('/') => UnixAddr::new(address)?,
        None => return Err(Errno::EAFNOSUPPORT),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok((socket(AddressFamily::Unix, SockType::Datagram, flags, None)?, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_one_short_line() {
        for (value, shown) in [
            ("plain", "STATUS=plain"),
            ("a\nSTOPPING=1\r\n\tb\u{7f}", "STATUS=a STOPPING=1   b "),
            ("é", "STATUS=é"),
        ] {
            assert_eq!(assignment("STATUS", value), shown);
        }
        for (value, length) in [
            ("x".repeat(1024), 1024),
            ("x".repeat(1025), 1024),
            ("é".repeat(4000), 1023),
            ("x".repeat(200_000), 1024),
        ] {
            let text = assignment("STATUS", &value);
            assert_eq!(text.len(), "STATUS=".len() + length, "{text}");
            assert_eq!(text.ends_with(CUT), value.len() > 1024);
        }
    }

    #[test]
    fn a_socket_of_another_kind_is_an_error() {
        for address in ["", "relative", "vsock:2:1234", &format!("/{}", "x".repeat(200))] {
            assert!(open(address).is_err(), "{address}");
        }
        assert!(open("@name").is_ok() && open("/path").is_ok());
    }
}
