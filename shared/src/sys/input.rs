//! What a program reads on its standard input: a file in memory that holds all of it.
//!
//! Contract: the file is complete and sealed before anybody sees it, so that a program gets
//! everything or doesn't start, whatever happens to the process that started it. Its name says
//! which mail it is for; so the supervisor recognizes a program whose worker died before it
//! could report it.
//!
//! # Failure
//! The errno of the call that failed; nothing is left behind.

use crate::ids::JobId;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;

/// How the kernel shows the name of a file in memory, up to our own part of it.
const LINK: &str = "/memfd:qrelay-mail-";
/// What the kernel appends, since no directory has the file.
const NOWHERE: &str = " (deleted)";

/// A sealed file with these bytes, close-on-exec, to be read from its beginning.
///
/// # Errors
/// As memfd_create(2), pwrite(2), fcntl(2): usually out of descriptors or memory.
pub fn sealed(job: JobId, pieces: &[&[u8]]) -> Result<File, Errno> {
    let file = create(job)?;
    let mut at = 0;
    for piece in pieces {
        // Written by position: the reader's offset is ours, and stays 0.
        file.write_all_at(piece, at)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
        at += piece.len() as u64;
    }
    let seals = SealFlag::F_SEAL_SEAL
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

fn create(job: JobId) -> Result<File, Errno> {
    let name = format!("qrelay-mail-{job}");
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    // A system may insist on this (vm.memfd_noexec=2); before Linux 6.3 it isn't known.
    let never_executed = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
    let fd = memfd_create(name.as_str(), flags | never_executed).or_else(|error| match error {
        Errno::EINVAL => memfd_create(name.as_str(), flags),
        other => Err(other),
    })?;
    Ok(File::from(fd))
}

/// The mail that a process has on its standard input, if it is one of these files.
pub fn mail_of(pid: Pid) -> Option<JobId> {
    named(&std::fs::read_link(format!("/proc/{pid}/fd/0")).ok()?)
}

/// All mails that a process has open in such files: more than one only in a copy of a worker
/// that is about to become a program.
pub fn mails_of(pid: Pid) -> Vec<JobId> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let links = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    links.filter_map(|link| named(&link)).collect()
}

fn named(link: &Path) -> Option<JobId> {
    link.to_str()?.strip_prefix(LINK)?.strip_suffix(NOWHERE)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn holds_everything_and_never_changes() {
        let mut file = sealed(JobId(7), &[b"hello ", b"", b"world"]).expect("sealed");
        let mut text = String::new();
        file.read_to_string(&mut text).expect("read");
        assert_eq!(text, "hello world");
        assert!(file.write(b"!").is_err());
        assert!(file.set_len(3).is_err());
    }

    #[test]
    fn says_whose_it_is() {
        let _file = sealed(JobId(123_456_789), &[b"x"]).expect("sealed");
        assert!(mails_of(Pid::this()).contains(&JobId(123_456_789)));
        for other in ["/memfd:qrelay-mail-1", "/memfd:qrelay-mail-x (deleted)", "/dev/null"] {
            assert_eq!(named(Path::new(other)), None, "{other}");
        }
    }
}
