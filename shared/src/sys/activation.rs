//! The sockets that systemd passed to the process (sd_listen_fds(3)).

use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// The number of the first passed descriptor.
pub(crate) const FIRST: u32 = 3;

/// A passed descriptor and its FileDescriptorName.
pub type Passed = (OwnedFd, String);

/// The name of a socket without a name, as in sd_listen_fds_with_names(3).
const UNNAMED: &str = "unknown";

/// Returns how many descriptors were passed to this process. Variables that are meant for another
/// process, or can't be read, count as 0.
pub(crate) fn count() -> u32 {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return 0;
    }
    number("LISTEN_FDS").unwrap_or(0)
}

/// Takes the passed sockets, and removes the variables about them from the environment. So no child
/// inherits either. Returns an empty list if none were passed. The function must be called only
/// once, before the process opens anything and before any thread exists, because it changes the
/// environment.
///
/// # Errors
/// Returns a text that says what is wrong with LISTEN_FDS or a related variable.
pub fn take() -> Result<Vec<Passed>, String> {
    let (count, names) = (count(), std::env::var("LISTEN_FDNAMES").ok());
    for variable in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        // SAFETY: the process has a single thread, so nobody reads the environment meanwhile.
        unsafe { std::env::remove_var(variable) };
    }
    let names = names_of(count, names.as_deref())?;
    (FIRST..).zip(names).map(|(number, name)| take_one(number, name)).collect()
}

fn names_of(count: u32, names: Option<&str>) -> Result<Vec<String>, String> {
    let wanted = count as usize;
    match names {
        _ if count == 0 => Ok(Vec::new()),
        None => Ok(vec![UNNAMED.to_owned(); wanted]),
        Some(list) => {
            let names: Vec<String> = list.split(':').map(str::to_owned).collect();
            if names.len() == wanted {
                return Ok(names);
            }
            Err(format!("LISTEN_FDNAMES has {} names, LISTEN_FDS is {count}", names.len()))
        }
    }
}

fn take_one(number: u32, name: String) -> Result<Passed, String> {
    let invalid = |error| format!("passed socket '{name}': {error}");
    let number = RawFd::try_from(number).map_err(|_| invalid(nix::errno::Errno::EBADF))?;
    // SAFETY: F_GETFD only looks at the number.
    nix::errno::Errno::result(unsafe { libc::fcntl(number, libc::F_GETFD) }).map_err(invalid)?;
    // SAFETY: the descriptor is open, was opened for this process before the process started, and
    // is handed out once.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(invalid)?;
    Ok((fd, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_socket_has_a_name() {
        assert_eq!(names_of(0, Some("a:b")), Ok(vec![]));
        assert_eq!(names_of(2, None), Ok(vec!["unknown".into(), "unknown".into()]));
        assert_eq!(names_of(1, Some("")), Ok(vec![String::new()]));
        assert_eq!(names_of(2, Some("a:b")), Ok(vec!["a".into(), "b".into()]));
        assert!(names_of(3, Some("a:b")).is_err_and(|text| text.contains("has 2 names")));
    }

    #[test]
    fn a_closed_descriptor_is_refused() {
        let refused = take_one(1_000_000, "x".into()).expect_err("nothing is open there");
        assert_eq!(refused, "passed socket 'x': EBADF: Bad file number");
        assert!(take_one(u32::MAX, "x".into()).is_err());
    }
}
