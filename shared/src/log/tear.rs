//! Lines of which only a part could be written, as on a disk that is full.

use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

/// Whether the output may end in the middle of a line.
#[derive(Default)]
pub(super) struct Tear(AtomicBool);

impl Tear {
    /// Writes a line by the system call `write`, in front of it a newline if there is a tear.
    /// Returns whether the whole line was written.
    pub(super) fn write(
        &self,
        line: &[u8],
        write: impl Fn(&[IoSlice<'_>]) -> nix::Result<usize>,
    ) -> bool {
        let begin: &[u8] = if self.0.load(Ordering::Relaxed) { b"\n" } else { b"" };
        let parts = [IoSlice::new(begin), IoSlice::new(line)];
        let result = loop {
            match write(&parts) {
                Err(Errno::EINTR) => {}
                other => break other,
            }
        };
        let (whole, torn) = match result {
            Ok(n) if n == begin.len() + line.len() => (true, false),
            Ok(n) => (false, n > begin.len() || (n == 0 && !begin.is_empty())),
            Err(Errno::EAGAIN) => return false,
            // A full disk may have cut the line of another process, which has the same file.
            Err(_) => (false, true),
        };
        self.0.store(torn, Ordering::Relaxed);
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// A file with this much room.
    struct Disk {
        file: RefCell<Vec<u8>>,
        room: usize,
    }

    impl Disk {
        fn write(&self, parts: &[IoSlice<'_>]) -> nix::Result<usize> {
            let mut file = self.file.borrow_mut();
            let all: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
            let fits = all.len().min(self.room.saturating_sub(file.len()));
            file.extend(&all[..fits]);
            if fits == 0 { Err(Errno::ENOSPC) } else { Ok(fits) }
        }
    }

    #[test]
    fn no_line_is_glued_to_half_a_line() {
        let whole = "one\n";
        for (room, file) in [
            (4, "one\n\nthree\n"),
            (5, "one\nt\nthree\n"),
            (7, "one\ntwo\nthree\n"),
            (8, "one\ntwo\nthree\n"),
        ] {
            let (tear, mut disk) = (Tear::default(), Disk { file: RefCell::default(), room });
            assert!(tear.write(whole.as_bytes(), |parts| disk.write(parts)));
            assert_eq!(tear.write(b"two\n", |parts| disk.write(parts)), room == 8);
            disk.room = 100;
            assert!(tear.write(b"three\n", |parts| disk.write(parts)));
            assert_eq!(String::from_utf8_lossy(&disk.file.borrow()), file, "{room}");
        }
    }

    #[test]
    fn the_newline_alone_mends_the_tear() {
        let (tear, mut disk) = (Tear::default(), Disk { file: RefCell::default(), room: 2 });
        assert!(!tear.write(b"one\n", |parts| disk.write(parts)));
        disk.room = 3;
        assert!(!tear.write(b"two\n", |parts| disk.write(parts)));
        disk.room = 100;
        assert!(tear.write(b"three\n", |parts| disk.write(parts)));
        assert_eq!(String::from_utf8_lossy(&disk.file.borrow()), "on\nthree\n");
    }
}
