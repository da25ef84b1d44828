//! Extended attributes of an open file (xattr(7)).
//!
//! # Failure
//! Every error is the errno of the failed call. A missing attribute is no error.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// Largest value, and largest list of names, in bytes (XATTR_SIZE_MAX and XATTR_LIST_MAX of
/// include/uapi/linux/limits.h).
const MAX: usize = 65_536;
/// Size in bytes of the first buffer that is tried; most values are short.
const USUAL: usize = 256;

/// Returns the value of an attribute, or `None` if the file has no such attribute or its file
/// system has no attributes at all.
///
/// # Errors
/// As fgetxattr(2).
pub fn get(file: BorrowedFd<'_>, name: &CStr) -> Result<Option<Vec<u8>>, Errno> {
    let read = |buffer: &mut [u8]| {
        // SAFETY: the kernel writes at most `buffer.len()` bytes to it and reads the name up to its
        // NUL; both outlive the call.
        unsafe {
            libc::fgetxattr(
                file.as_raw_fd(),
                name.as_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
            )
        }
    };
    match whole(read) {
        Ok(value) => Ok(Some(value)),
        Err(Errno::ENODATA | Errno::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the names of all attributes that this process may see.
///
/// # Errors
/// As flistxattr(2).
pub fn list(file: BorrowedFd<'_>) -> Result<Vec<CString>, Errno> {
    let read = |buffer: &mut [u8]| {
        // SAFETY: the kernel writes at most `buffer.len()` bytes to it, which outlives the call.
        unsafe { libc::flistxattr(file.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) }
    };
    let names = match whole(read) {
        Ok(names) => names,
        Err(Errno::EOPNOTSUPP) => Vec::new(),
        Err(error) => return Err(error),
    };
    let names = names.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    Ok(names.filter_map(|name| CString::new(name).ok()).collect())
}

/// Returns everything that `read` writes into a large enough buffer. `read` returns the number of
/// bytes that it wrote, or -1 as a system call does.
fn whole(read: impl Fn(&mut [u8]) -> libc::ssize_t) -> Result<Vec<u8>, Errno> {
    for size in [USUAL, MAX] {
        let mut buffer = vec![0; size];
        match Errno::result(read(&mut buffer)) {
            Ok(length) => {
                buffer.truncate(usize::try_from(length).unwrap_or(0));
                return Ok(buffer);
            }
            Err(Errno::ERANGE) if size < MAX => {}
            Err(error) => return Err(error),
        }
    }
    Err(Errno::ERANGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_file_without_attributes() {
        let file = std::fs::File::open("/proc/self").expect("/proc");
        assert_eq!(get(file.as_fd(), c"user.none"), Ok(None));
        assert_eq!(list(file.as_fd()), Ok(Vec::new()));
    }

    #[test]
    fn grows_up_to_the_limit() {
        let long = |length: usize| {
            move |buffer: &mut [u8]| {
                if buffer.len() < length {
                    Errno::ERANGE.set();
                    return -1;
                }
                buffer[..length].fill(b'x');
                length as libc::ssize_t
            }
        };
        for length in [0, 1, USUAL, USUAL + 1, MAX] {
            assert_eq!(whole(long(length)).map(|value| value.len()), Ok(length));
        }
        assert_eq!(whole(long(MAX + 1)), Err(Errno::ERANGE));
    }
}
