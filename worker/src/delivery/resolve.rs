//! Host names into addresses, by the system's resolver.
//!
//! Contract: the resolver has no time limit, so a look-up that has a deadline runs on a thread of
//! its own, which is abandoned at the deadline. [`Names`] are looked up when a mail needs them, and
//! kept for [`KEPT`] per process.
//!
//! # Failure
//! [`LookupError`]. A failure isn't kept.

use std::collections::HashMap;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use qrelay_shared::deadline::Deadline;
use qrelay_shared::sys::lookup;
use qrelay_shared::sys::thread::spawn;
use qrelay_shared::system_error::shown;
use thiserror::Error;

/// How long the addresses of a name are used again.
const KEPT: Duration = Duration::from_secs(10);
/// Most names whose addresses are kept.
const MAX_KEPT: usize = 256;
/// Stack of a look-up's thread: the C library's resolver wants room for large answers.
const STACK_SIZE: usize = 256 << 10;

/// Why a name has no address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum LookupError {
    /// The resolver's answer, or the system has no thread.
    #[error("{0}")]
    Failed(String),
    /// No resolver answered, or the system lacked something, which may pass by itself.
    #[error("{0}")]
    Unanswered(String),
    /// The deadline passed.
    #[error("the look-up takes too long")]
    TimedOut,
}

/// Looks a name up on the calling thread, however long it takes. The addresses are at least one.
///
/// # Errors
/// [`LookupError::Failed`] or [`LookupError::Unanswered`].
pub(crate) fn look_up(host: &str, port: u16) -> Result<Vec<SocketAddr>, LookupError> {
    let message = |cause: &str| format!("cannot resolve '{host}': {cause}");
    match (host, port).to_socket_addrs().map(Vec::from_iter) {
        Ok(found) if found.is_empty() => Err(LookupError::Failed(message("it has no address"))),
        Ok(found) => Ok(found),
        Err(error) if lookup::may_pass(&error) => {
            Err(LookupError::Unanswered(message(&reason(&error))))
        }
        Err(error) => Err(LookupError::Failed(message(&reason(&error)))),
    }
}

/// Looks a name up until the deadline. The addresses are at least one.
///
/// # Errors
/// See [`LookupError`].
pub(crate) fn look_up_until(
    host: &str,
    port: u16,
    deadline: Deadline,
) -> Result<Vec<SocketAddr>, LookupError> {
    let (answer, answered) = crossbeam_channel::bounded(1);
    let name = host.to_owned();
    let ask = move || {
        // Nobody listens any more when the deadline has passed.
        let _ = answer.send(look_up(&name, port));
    };
    let failed = |cause: &str| LookupError::Failed(format!("cannot resolve '{host}': {cause}"));
    spawn("resolve", STACK_SIZE, ask)
        .map_err(|error| failed(&format!("no thread: {}", shown(&error))))?;
    match answered.recv_deadline(deadline.instant()) {
        Ok(found) => found,
        Err(crossbeam_channel::RecvTimeoutError::Timeout) => Err(LookupError::TimedOut),
        Err(crossbeam_channel::RecvTimeoutError::Disconnected) => Err(failed("the look-up failed")),
    }
}

/// Returns the resolver's own words, without Rust's prefix.
fn reason(error: &std::io::Error) -> String {
    let text = shown(error);
    let prefix = "failed to lookup address information: ";
    text.strip_prefix(prefix).unwrap_or(&text).to_owned()
}

/// The addresses of names that were looked up lately.
static NAMES: Mutex<Option<Names>> = Mutex::new(None);

/// Addresses by name and port, with the time of the look-up.
type Names = HashMap<(Arc<str>, u16), (Instant, Vec<SocketAddr>)>;

/// Returns the addresses of a name, which may have been looked up at most [`KEPT`] ago.
///
/// # Errors
/// See [`LookupError`].
pub(crate) fn addresses(
    host: &Arc<str>,
    port: u16,
    deadline: Deadline,
) -> Result<Vec<SocketAddr>, LookupError> {
    let key = (Arc::clone(host), port);
    if let Some((when, addresses)) = NAMES.lock().get_or_insert_default().get(&key)
        && when.elapsed() < KEPT
    {
        return Ok(addresses.clone());
    }
    let found = look_up_until(host, port, deadline)?;
    let mut names = NAMES.lock();
    let names = names.get_or_insert_default();
    if names.len() >= MAX_KEPT {
        names.clear();
    }
    names.insert(key, (Instant::now(), found.clone()));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_looked_up_until_the_deadline() {
        let soon = Deadline::after(Duration::from_secs(20));
        let found = addresses(&"localhost".into(), 628, soon).expect("localhost");
        assert!(found.iter().all(|address| address.port() == 628 && address.ip().is_loopback()));
        let late = Deadline::after(Duration::ZERO);
        assert_eq!(addresses(&"localhost".into(), 628, late), Ok(found), "kept");
        let error = look_up("no-such-host.invalid", 1).expect_err("there is none").to_string();
        assert!(error.starts_with("cannot resolve 'no-such-host.invalid': "), "{error}");
        assert!(!error.contains("failed to lookup"), "{error}");
    }
}
