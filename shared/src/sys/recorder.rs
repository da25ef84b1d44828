//! The memory of the flight recorder ([`crate::flight`]).
//!
//! Contract: the supervisor makes the memory and seals its size, so that no worker can take pages
//! away from under a reader. The worker maps the memory; the supervisor never does, because an
//! access to a mapping can raise SIGBUS, and reads it by pread(2).
//!
//! # Failure
//! Every error is the errno of the failed call.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::stat::fstat;
use nix::sys::uio::pread;
use nix::unistd::ftruncate;

use crate::flight::{Flight, SLOT, read};
use crate::sys::memfd;

/// Makes memory for so many mails at a time. Memory is only used up by slots that were in use.
///
/// # Errors
/// As memfd_create(2), ftruncate(2), fcntl(2): usually a lack of descriptors or memory.
pub fn create(slots: usize) -> Result<OwnedFd, Errno> {
    let fd = memfd::create("qrelay-flights")?;
    ftruncate(&fd, i64::try_from(slots * SLOT).map_err(|_| Errno::EFBIG)?)?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(fd)
}

/// Maps the memory for the rest of this process's life.
///
/// # Errors
/// As fstat(2), mmap(2). `EINVAL`: the size of the memory isn't sealed.
pub fn map(fd: BorrowedFd<'_>) -> Result<&'static [AtomicU64], Errno> {
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS)?;
    let sealed = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
    if !SealFlag::from_bits_retain(seals).contains(sealed) {
        return Err(Errno::EINVAL);
    }
    let length = usize::try_from(fstat(fd)?.st_size).map_err(|_| Errno::EFBIG)?;
    let Some(size) = NonZeroUsize::new(length) else { return Ok(&[]) };
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: the kernel chooses the address, so that no other mapping is touched.
    let memory = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, fd, 0)? };
    // SAFETY: the mapping has `length` bytes, is aligned to a page, and is never unmapped. The
    // seals keep its pages there. Whoever else writes to it does so as to atomic words.
    Ok(unsafe {
        std::slice::from_raw_parts(memory.cast().as_ptr(), length / size_of::<AtomicU64>())
    })
}

/// Whether there are slots after those that were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum More {
    /// There may be.
    Yes,
    /// There are none.
    No,
}

/// Reads what the memory says about the mails in `count` slots, from slot `first` on.
///
/// # Errors
/// As pread(2).
pub fn part(memory: &impl AsFd, first: usize, count: usize) -> Result<(Vec<Flight>, More), Errno> {
    let mut bytes = vec![0; count * SLOT];
    let offset = i64::try_from(first * SLOT).map_err(|_| Errno::EFBIG)?;
    let length = pread(memory, &mut bytes, offset)?;
    let (slots, _) = bytes[..length].as_chunks::<SLOT>();
    let more = if length < bytes.len() { More::No } else { More::Yes };
    Ok((slots.iter().filter_map(read).collect(), more))
}

/// Reads what the memory says about all mails.
///
/// # Errors
/// As pread(2).
pub fn flights(memory: &impl AsFd) -> Result<Vec<Flight>, Errno> {
    const AT_ONCE: usize = 64;
    let mut flights = Vec::new();
    for first in (0..).step_by(AT_ONCE) {
        let (some, more) = part(memory, first, AT_ONCE)?;
        flights.extend(some);
        if more == More::No {
            break;
        }
    }
    Ok(flights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flight::Writer;
    use crate::ids::JobId;

    #[test]
    fn what_one_process_writes_another_reads() {
        let memory = create(200).expect("memory");
        let words = map(memory.as_fd()).expect("a mapping");
        for index in [0, 63, 64, 199] {
            Writer::new(words, index).expect("a slot").begin(JobId(index as u64 + 1), 0);
        }
        let jobs: Vec<_> = flights(&memory).expect("readable").iter().map(|f| f.job.0).collect();
        assert_eq!(jobs, [1, 64, 65, 200]);
        assert!(Writer::new(words, 200).is_none());
        assert_eq!(ftruncate(&memory, 0), Err(Errno::EPERM), "the size is sealed");
    }
}
