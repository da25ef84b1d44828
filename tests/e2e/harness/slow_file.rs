//! A file whose server answers when the test likes: one regular file, as a FUSE file system.
//!
//! Contract: a write returns when the server has answered it. A server that is stalled reads no
//! request, so that a process which waits for an answer can be killed.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Options for mount(8) whose standard input is the server's end.
pub const OPTIONS: &str = "fd=0,rootmode=100644,user_id=0,group_id=0,allow_other";

/// Most bytes of a request: a write of the largest size that the server allows, and two headers.
const LARGEST: usize = (64 << 10) + 4096;

/// Opcodes of linux/fuse.h.
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;

#[derive(Debug, Default)]
struct State {
    stalled: bool,
    content: Vec<u8>,
}

/// The server of the file.
#[derive(Debug)]
pub struct SlowFile {
    state: Arc<Mutex<State>>,
}

impl SlowFile {
    /// Starts a server. Returns it, and the descriptor to mount the file with.
    pub fn serve() -> (Self, File) {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits());
        let device = options.open("/dev/fuse").expect("/dev/fuse");
        let ours = device.try_clone().expect("descriptor");
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        std::thread::spawn(move || while answer_one(&ours, &shared) {});
        (Self { state }, device)
    }

    /// Stops or goes on answering.
    pub fn stall(&self, stalled: bool) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stalled = stalled;
    }

    /// Returns what has been written.
    pub fn text(&self) -> String {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&state.content).into_owned()
    }
}

/// Answers a request if there is one. Returns whether the file system may have more.
fn answer_one(mut device: &File, state: &Mutex<State>) -> bool {
    // The file system isn't mounted yet as long as this fails.
    let _ = poll(&mut [PollFd::new(device.as_fd(), PollFlags::POLLIN)], PollTimeout::from(10u8));
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    if state.stalled {
        drop(state);
        std::thread::sleep(std::time::Duration::from_millis(10));
        return true;
    }
    let mut request = vec![0; LARGEST];
    match device.read(&mut request) {
        Ok(length) => request.truncate(length),
        Err(error) => return error.raw_os_error() != Some(Errno::ENODEV as i32),
    }
    if let Some(reply) = reply(&request, &mut state.content) {
        let _ = device.write_all(&reply);
    }
    true
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Returns the reply to a request, as linux/fuse.h has them.
fn reply(request: &[u8], content: &mut Vec<u8>) -> Option<Vec<u8>> {
    const HEADER: usize = 40;
    let mut body: Vec<u8> = Vec::new();
    let mut error = 0i32;
    match number(request, 4) {
        FORGET | INTERRUPT => return None,
        // Version 7.31, no read-ahead, no flags, limits of requests, and what is reserved.
        INIT => {
            body.extend([7u32, 31, 0, 0].map(u32::to_ne_bytes).concat());
            body.extend([16u16, 12].map(u16::to_ne_bytes).concat());
            body.extend([64u32 << 10, 1].map(u32::to_ne_bytes).concat());
            body.resize(64, 0);
        }
        // How long the attributes are valid, then the attributes: inode, size, times, mode, links.
        GETATTR => {
            body.extend(
                [0u64, 0, 1, content.len() as u64, 0, 0, 0, 0].map(u64::to_ne_bytes).concat(),
            );
            body.extend(
                [0u32, 0, 0, 0o100_644, 1, 0, 0, 0, 4096, 0].map(u32::to_ne_bytes).concat(),
            );
        }
        // A handle, FOPEN_DIRECT_IO, and FOPEN_NOFLUSH, because a close would wait for a flush.
        OPEN => body.extend([0u32, 0, 1 | 1 << 5, 0].map(u32::to_ne_bytes).concat()),
        WRITE => {
            let size = number(request, HEADER + 16);
            content.extend(&request[HEADER + 40..][..size as usize]);
            body.extend([size, 0].map(u32::to_ne_bytes).concat());
        }
        RELEASE => {}
        _ => error = -(Errno::ENOSYS as i32),
    }
    let mut reply = (16 + body.len() as u32).to_ne_bytes().to_vec();
    reply.extend(error.to_ne_bytes());
    // The number of the request.
    reply.extend(&request[8..16]);
    reply.extend(body);
    Some(reply)
}
