//! What ps(1) and systemctl(1) show as the command line of this process.
//!
//! Contract: the kernel shows the memory that held the command line when the program began
//! (proc_pid_cmdline(5)), so a title is written over it. Nothing after it is touched: the
//! environment stays as it was.
//!
//! # Failure
//! Without /proc, and where a title has no room, the command line stays as it is.

/// Shows a title from now on. The process has a single thread. The arguments that
/// [`std::env::args`] returns from now on are parts of the title.
pub fn set(title: &str) {
    let Some((start, length)) = area().filter(|&(_, length)| title.len() < length) else { return };
    // SAFETY: the kernel has put the strings of the command line there, one after the other, and
    // the memory stays mapped and writable. Only the pointers in `argv` lead there, and no other
    // thread follows them. The last byte stays zero, so every string that begins there has an end.
    let memory = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, length) };
    memory.fill(0);
    memory[..title.len()].copy_from_slice(title.as_bytes());
}

/// Returns the address and the length of the memory into which the kernel has put the command line
/// (proc_pid_stat(5), fields 48 and 49).
fn area() -> Option<(usize, usize)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(45).map(str::parse::<usize>);
    let (start, end) = (fields.next()?.ok()?, fields.next()?.ok()?);
    // Linux puts nothing else at such addresses, and no longer command lines (execve(2)).
    (start > 0 && start < end && end - start < 1 << 24).then_some((start, end - start))
}
