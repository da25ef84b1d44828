//! The bare relay of qrelay's shape: what a relay costs whose supervisor accepts the clients and
//! passes them to workers.
//!
//! Contract: one process accepts, looks for the first byte, asks who the client is, and passes the
//! socket by SCM_RIGHTS, one per datagram, to the one of `WORKERS` processes that has the fewest
//! mails. It keeps a duplicate of the socket until the worker has reported the end of the mail.
//! Each worker has as many threads as the bare relay, each of which receives a socket and carries
//! its mail. No Lua, no checks, no log.
//!
//! # Failure
//! The client of a failed mail is hung up on without an answer, and the benchmark fails.

use std::{
    env,
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
    thread,
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{
            AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown,
            SockFlag, SockType, getsockopt, listen, recv, recvmsg, send, sendmsg, shutdown,
            socketpair, sockopt::PeerCredentials,
        },
    },
    unistd::close,
};

use crate::{
    bare::{self, BACKLOG},
    hop::NextHop,
    process::ROLE,
};

/// Number of workers.
const WORKERS: usize = 2;

/// Key of the listener among the epoll events; the key of a worker is its index.
const LISTENER: u64 = u64::MAX;

/// Highest number of clients accepted in a row, before the workers' reports are looked at.
const ACCEPTS: usize = 16;

/// A worker, as the supervisor sees it.
struct Worker {
    channel: OwnedFd,
    mails: usize,
    _process: Child,
}

/// A client whose mail a worker has.
struct Held {
    _client: UnixStream,
    worker: usize,
}

/// Supervises the workers and passes clients to them until the process is ended.
pub fn run(path: &Path, hop: &NextHop, threads: usize) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut workers = (0..WORKERS).map(|_| start(hop, threads)).collect::<io::Result<Vec<_>>>()?;
    for (index, worker) in workers.iter().enumerate() {
        epoll.add(&worker.channel, EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
    }
    let mut held: Vec<Option<Held>> = Vec::new();
    let mut events = [EpollEvent::empty(); 16];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..count] {
            match event.data() {
                LISTENER => accept(&listener, &mut workers, &mut held)?,
                index => take_reports(index as usize, &mut workers, &mut held),
            }
        }
    }
}

fn start(hop: &NextHop, threads: usize) -> io::Result<Worker> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    let mut command = Command::new(env::current_exe()?);
    command.args([ROLE, "shape-worker"]).arg(hop.to_string()).arg(threads.to_string());
    command.stdin(Stdio::from(theirs));
    Ok(Worker { channel: ours, mails: 0, _process: command.spawn()? })
}

fn accept(
    listener: &UnixListener,
    workers: &mut [Worker],
    held: &mut Vec<Option<Held>>,
) -> io::Result<()> {
    for _ in 0..ACCEPTS {
        let Ok((client, _)) = listener.accept() else { break };
        let fd = client.as_raw_fd();
        // As in qrelay, neither result decides anything here: only the calls count.
        let _ = recv(fd, &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
        let _ = getsockopt(&client, PeerCredentials);
        let least = (0..workers.len()).min_by_key(|&index| workers[index].mails).unwrap_or(0);
        let worker = &mut workers[least];
        worker.mails += 1;
        let job = fd.to_ne_bytes();
        let pass = [ControlMessage::ScmRights(&[fd])];
        let flags = MsgFlags::empty();
        sendmsg::<()>(worker.channel.as_raw_fd(), &[IoSlice::new(&job)], &pass, flags, None)?;
        let slot = fd as usize;
        if held.len() <= slot {
            held.resize_with(slot + 1, || None);
        }
        held[slot] = Some(Held { _client: client, worker: least });
    }
    Ok(())
}

fn take_reports(index: usize, workers: &mut [Worker], held: &mut [Option<Held>]) {
    let mut job = RawFd::default().to_ne_bytes();
    while let Ok(4) = recv(workers[index].channel.as_raw_fd(), &mut job, MsgFlags::MSG_DONTWAIT) {
        if let Some(ended) = held[RawFd::from_ne_bytes(job) as usize].take() {
            workers[ended.worker].mails -= 1;
        }
    }
}

/// Serves as a worker, with the supervisor's channel as standard input.
pub fn work(hop: &NextHop, threads: usize) -> io::Result<()> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(|| carry(hop))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    })
}

fn carry(hop: &NextHop) -> io::Result<()> {
    let channel = io::stdin().as_raw_fd();
    let mut buffer = bare::buffer();
    let mut space = cmsg_space!(RawFd);
    loop {
        let mut job = RawFd::default().to_ne_bytes();
        let Some(client) = receive(channel, &mut job, &mut space)? else { return Ok(()) };
        // The load generator counts the missing answer, so the error needs no report here.
        let _ = bare::relay(client, hop, &mut buffer);
        let _ = shutdown(client, Shutdown::Write);
        close(client)?;
        send(channel, &job, MsgFlags::empty())?;
    }
}

fn receive(channel: RawFd, job: &mut [u8], space: &mut [u8]) -> Result<Option<RawFd>, Errno> {
    let mut parts = [IoSliceMut::new(job)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(channel, &mut parts, Some(space), flags)?;
    let fds = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    Ok(fds)
}
