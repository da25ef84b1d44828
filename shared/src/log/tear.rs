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
        self.write_some(line, write) == line.len()
    }

    /// Writes lines as [`Self::write`] does. Returns how many bytes of them were written.
    pub(super) fn write_some(
        &self,
        lines: &[u8],
        write: impl Fn(&[IoSlice<'_>]) -> nix::Result<usize>,
    ) -> usize {
        let begin: &[u8] = if self.0.load(Ordering::Relaxed) { b"\n" } else { b"" };
        let parts = [IoSlice::new(begin), IoSlice::new(lines)];
        let result = loop {
            match write(&parts) {
                Err(Errno::EINTR) => {}
                other => break other,
            }
        };
        let (written, torn) = match result {
            Ok(n) => {
                let written = n.saturating_sub(begin.len());
                let torn = match lines[..written].last() {
                    Some(&last) => last != b'\n',
                    None => n < begin.len(),
                };
                (written, torn)
            }
            Err(Errno::EAGAIN) => return 0,
            // A full disk may have cut the line of another process, which has the same file.
            Err(_) => (0, true),
        };
        self.0.store(torn, Ordering::Relaxed);
        written
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
    fn of_several_lines_some_may_be_written() {
        for (room, written, file) in
            [(3, 3, "one\nlast\n"), (4, 4, "one\nlast\n"), (6, 6, "one\ntw\nlast\n")]
        {
            let (tear, mut disk) = (Tear::default(), Disk { file: RefCell::default(), room });
            assert_eq!(tear.write_some(b"one\ntwo\n", |parts| disk.write(parts)), written);
            disk.room = 100;
            assert!(tear.write(b"last\n", |parts| disk.write(parts)));
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
