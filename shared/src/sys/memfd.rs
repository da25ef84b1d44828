//! Files in memory that no directory has.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Returns an empty, close-on-exec file that can be sealed. /proc shows its name.
///
/// # Errors
/// As memfd_create(2): usually a lack of descriptors or memory.
pub(crate) fn create(name: &str) -> Result<OwnedFd, Errno> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    // A system may require this flag (vm.memfd_noexec=2); Linux before 6.3 doesn't know it.
    let never_executed = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
    memfd_create(name, flags | never_executed).or_else(|error| match error {
        Errno::EINVAL => memfd_create(name, flags),
        other => Err(other),
    })
}

/// Returns a close-on-exec file that is empty and stays so.
///
/// # Errors
/// As memfd_create(2) and fcntl(2).
pub(crate) fn empty(name: &str) -> Result<OwnedFd, Errno> {
    let file = create(name)?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}
