//! The sockets that systemd passed (sd_listen_fds(3)).

use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// A passed descriptor and its FileDescriptorName.
pub type Passed = (OwnedFd, String);

/// Takes them out of the environment, which no child inherits then. Call once,
/// before any thread exists. None passed is an empty list.
///
/// # Errors
/// A text that says what is wrong with LISTEN_FDS and its kind.
pub fn take() -> Result<Vec<Passed>, String> {
    if std::env::var_os("LISTEN_FDS").is_none() {
        return Ok(Vec::new());
    }
    let descriptors = libsystemd::activation::receive_descriptors_with_names(true)
        .map_err(|error| error.to_string())?;
    descriptors
        .into_iter()
        .map(|(descriptor, name)| {
            // SAFETY: these descriptors were opened for this process before it started,
            // and libsystemd hands out each of them once.
            let fd = unsafe { OwnedFd::from_raw_fd(descriptor.into_raw_fd()) };
            fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
                .map_err(|error| format!("passed socket '{name}': {error}"))?;
            Ok((fd, name))
        })
        .collect()
}
