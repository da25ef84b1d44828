//! The standard input of a program: a file in memory that contains all of the input.
//!
//! Contract: the file is complete and sealed before any other process sees it. So a program gets
//! all of its input or doesn't start, whatever happens to the process that started it. The name of
//! the file contains the number of the job. By that name the supervisor recognizes a program whose
//! worker died before it could report the program.
//!
//! # Failure
//! Every error is the errno of the failed call, and nothing is left behind.

use crate::ids::JobId;
use crate::sys::memfd;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::unistd::Pid;

/// Start of the name of such a file as the kernel shows it, before the number of the job.
const LINK: &str = "/memfd:qrelay-mail-";
/// Text that the kernel appends to the name, because no directory has the file.
const NOWHERE: &str = " (deleted)";

/// Returns a sealed, close-on-exec file that contains `pieces`, to be read from its beginning.
///
/// # Errors
/// As memfd_create(2), pwrite(2), fcntl(2): usually a lack of descriptors or memory.
pub fn sealed(job: JobId, pieces: &[&[u8]]) -> Result<File, Errno> {
    let file = File::from(memfd::create(&format!("qrelay-mail-{job}"))?);
    let mut at = 0;
    for piece in pieces {
        // The file is written by position, because the program shares the offset of the file, which
        // must stay 0.
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

/// Returns the job whose mail a process has on its standard input, if the input is one of these
/// files.
pub fn mail_of(pid: Pid) -> Option<JobId> {
    named(&std::fs::read_link(format!("/proc/{pid}/fd/0")).ok()?)
}

/// Returns the jobs of all such files that a process has open. There is more than one only in a
/// copy of a worker that is about to become a program.
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
