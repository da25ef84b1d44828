//! The sockets that systemd passed to the process (sd_listen_fds(3)).

use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// A passed descriptor and its FileDescriptorName.
pub(crate) type Passed = (OwnedFd, String);

/// Takes the passed sockets, and removes the variables about them from the environment, so that no
/// child inherits them. Returns an empty list if none were passed. The function must be called only
/// once, before any thread exists, because it changes the environment.
///
/// # Errors
/// Returns a text that says what is wrong with LISTEN_FDS or a related variable.
pub fn take() -> Result<Vec<Passed>, String> {
    if std::env::var_os("LISTEN_FDS").is_none() {
        return Ok(Vec::new());
    }
    let descriptors = libsystemd::activation::receive_descriptors_with_names(true)
        .map_err(|error| error.to_string())?;
    descriptors
        .into_iter()
        .map(|(descriptor, name)| {
            // SAFETY: these descriptors were opened for this process before it started, and
            // libsystemd hands out each of them once.
            let fd = unsafe { OwnedFd::from_raw_fd(descriptor.into_raw_fd()) };
            fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
                .map_err(|error| format!("passed socket '{name}': {error}"))?;
            Ok((fd, name))
        })
        .collect()
}
