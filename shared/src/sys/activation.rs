//! The sockets that systemd passed to the process (sd_listen_fds(3)).

use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// The number of the first passed descriptor.
pub(crate) const FIRST: u32 = 3;

/// A passed descriptor and its FileDescriptorName.
pub type Passed = (OwnedFd, String);

/// The name of a socket without a name, as in sd_listen_fds_with_names(3).
const UNNAMED: &str = "unknown";

/// Variables that say what was passed, and to whom. No child may take them for its own.
pub const VARIABLES: [&str; 4] = ["LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// Returns how many descriptors were passed to this process. Variables that are meant for another
/// process count as 0.
///
/// # Errors
/// Returns a text about LISTEN_FDS, which is no number of descriptors.
pub(crate) fn count() -> Result<u32, String> {
    let (Ok(pid), Ok(count)) = (std::env::var("LISTEN_PID"), std::env::var("LISTEN_FDS")) else {
        return Ok(0);
    };
    match pid.parse() == Ok(std::process::id()) {
        true => parse_count(&count),
        false => Ok(0),
    }
}

fn parse_count(text: &str) -> Result<u32, String> {
    let count = text.parse().ok().filter(|&count| count <= RawFd::MAX as u32 - FIRST);
    count.ok_or_else(|| format!("LISTEN_FDS is '{text}', which is no number of descriptors"))
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
    for variable in VARIABLES {
        // SAFETY: the process has a single thread, so nobody reads the environment meanwhile.
        unsafe { std::env::remove_var(variable) };
    }
    let count = count?;
    if let Some(last) = count.checked_sub(1).map(|last| FIRST + last)
        && !is_open(last)
    {
        return Err(format!("LISTEN_FDS is {count}, but descriptor {last} is not open"));
    }
    let names = names_of(count, names.as_deref())?;
    (FIRST..).zip(names).map(|(number, name)| take_one(number, name)).collect()
}

fn is_open(number: u32) -> bool {
    RawFd::try_from(number).is_ok_and(|number| {
        // SAFETY: F_GETFD only looks at the number.
        unsafe { libc::fcntl(number, libc::F_GETFD) != -1 }
    })
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
    fn a_count_is_a_number_of_descriptors() {
        for (text, count) in [("0", 0), ("1", 1), ("2147483644", 2_147_483_644)] {
            assert_eq!(parse_count(text), Ok(count));
        }
        for text in ["", "-1", "x", "1.0", "2147483645", "4294967295", "99999999999"] {
            assert!(parse_count(text).is_err_and(|error| error.contains(&format!("'{text}'"))));
        }
    }

    #[test]
    fn a_closed_descriptor_is_refused() {
        let refused = take_one(1_000_000, "x".into()).expect_err("nothing is open there");
        assert_eq!(refused, "passed socket 'x': EBADF: Bad file number");
        assert!(take_one(u32::MAX, "x".into()).is_err());
    }
}
