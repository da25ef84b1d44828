//! Descriptors whose last close waits, passed to sockets and channels. No test of this file may
//! start a process, because the new process would close such descriptors when it executes a
//! program, and wait.

use std::io::{IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use qrelay_shared::ipc::channel::{Channel, RecvBuffer, RecvError};
use qrelay_shared::ipc::message::{FromControl, Pong, ToControl};
use qrelay_shared::sys::rights::{Look, MoreInput, PeerError, PeerSocket, Rights, refuse};

/// Returns a socket whose last close waits for an hour, and its peer, which doesn't read.
fn stuck() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let mut socket = TcpStream::connect(listener.local_addr().expect("name")).expect("connect");
    let (peer, _) = listener.accept().expect("accept");
    socket.set_nonblocking(true).expect("option");
    while socket.write(&[b'x'; 65_536]).is_ok() {}
    let linger = libc::linger { l_onoff: 1, l_linger: 3600 };
    setsockopt(&socket, sockopt::Linger, &linger).expect("SO_LINGER");
    (socket, peer)
}

/// Closes this process's copy of a descriptor that is in a queue.
fn drop_copy(socket: TcpStream) {
    at_once(|| drop(socket));
}

fn pass(to: &impl AsFd, bytes: &[u8], flags: MsgFlags) -> (TcpStream, Result<usize, Errno>) {
    let (socket, peer) = stuck();
    let fds = [socket.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let sent = sendmsg::<()>(to.as_fd().as_raw_fd(), &[IoSlice::new(bytes)], &rights, flags, None);
    if sent.is_err() {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&socket, sockopt::Linger, &linger).expect("SO_LINGER");
    }
    (peer, sent)
}

/// Waits until the peer of a stuck socket sees the socket closed: the kernel sends what is left.
fn assert_closed(mut peer: TcpStream) {
    peer.set_read_timeout(Some(Duration::from_secs(10))).expect("option");
    let mut chunk = vec![0; 1 << 20];
    while peer.read(&mut chunk).expect("the end") > 0 {}
}

fn pair() -> (UnixStream, PeerSocket) {
    let (client, server) = UnixStream::pair().expect("pair");
    (client, PeerSocket::new(server.into(), Rights::Possible))
}

/// Runs `what`, which must not take long.
fn at_once<R>(what: impl FnOnce() -> R) -> R {
    let started = Instant::now();
    let result = what();
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    result
}

#[test]
fn the_kernel_refuses_or_the_socket_looks_first() {
    let name = std::env::temp_dir().join(format!("qrelay-rights-{}", std::process::id()));
    let listener = UnixListener::bind(&name).expect("bind");
    let rights = refuse(listener.as_fd());
    let client = UnixStream::connect(&name).expect("connect");
    std::fs::remove_file(&name).expect("removed");
    let server = PeerSocket::new(listener.accept().expect("accept").0.into(), rights);
    for flags in [MsgFlags::empty(), MsgFlags::MSG_OOB] {
        let (peer, sent) = pass(&client, b"x", flags);
        match rights {
            Rights::Refused => assert_eq!(sent, Err(Errno::EPERM)),
            Rights::Possible => assert_eq!(sent, Ok(1)),
        }
        drop(peer);
    }
    at_once(|| drop(server));
}

#[test]
fn bytes_with_descriptors_are_never_read() {
    for flags in [MsgFlags::empty(), MsgFlags::MSG_OOB] {
        let (mut client, server) = pair();
        client.write_all(b"before").expect("write");
        let (peer, sent) = pass(&client, b"x", flags);
        assert_eq!(sent, Ok(1));
        client.write_all(b"after").expect("write");
        at_once(|| {
            let mut buffer = vec![0; 100];
            // A read stops before the mark of urgent data.
            if !flags.is_empty() {
                assert_eq!(server.recv(&mut buffer, MsgFlags::MSG_DONTWAIT), Ok(6));
            }
            let mut appended = Vec::with_capacity(100);
            for _ in 0..3 {
                let refused = server.recv(&mut buffer, MsgFlags::MSG_DONTWAIT);
                assert_eq!(refused, Err(PeerError::Rights));
                let refused = server.recv_append(&mut appended, MsgFlags::MSG_DONTWAIT);
                assert_eq!(refused, Err(PeerError::Rights));
            }
            assert!(appended.is_empty());
            drop(server);
        });
        assert_closed(peer);
        let mut rest = Vec::new();
        assert_eq!(client.read_to_end(&mut rest).expect("no reset"), 0);
    }
}

#[test]
fn many_descriptors_are_closed_soon() {
    let (client, server) = pair();
    let peers: Vec<TcpStream> = (0..100)
        .map(|_| {
            let (peer, sent) = pass(&client, b"x", MsgFlags::empty());
            assert_eq!(sent, Ok(1));
            peer
        })
        .collect();
    at_once(|| drop(server));
    peers.into_iter().for_each(assert_closed);
}

#[test]
fn what_is_passed_after_the_answer_is_left_to_the_closer() {
    for input in [MoreInput::Unlikely, MoreInput::Likely] {
        let (client, server) = pair();
        let (early, sent) = pass(&client, b"x", MsgFlags::empty());
        assert_eq!(sent, Ok(1));
        server.end_output(input);
        let (late, sent) = pass(&client, b"x", MsgFlags::MSG_NOSIGNAL);
        assert_eq!(sent.is_ok(), input == MoreInput::Likely);
        at_once(|| drop(server));
        assert_closed(early);
        if sent.is_ok() {
            assert_closed(late);
        }
    }
}

#[test]
fn ordinary_input_is_read_to_its_end() {
    for rights in [Rights::Refused, Rights::Possible] {
        let (mut client, server) = UnixStream::pair().expect("pair");
        let server = PeerSocket::new(server.into(), rights);
        assert_eq!(server.look(), Err(PeerError::Os(Errno::EAGAIN)));
        client.write_all(b"hello").expect("write");
        let mut first = [0; 2];
        assert_eq!(server.recv(&mut first, MsgFlags::MSG_DONTWAIT), Ok(2));
        let mut rest = Vec::with_capacity(100);
        assert_eq!(server.recv_append(&mut rest, MsgFlags::MSG_DONTWAIT), Ok(3));
        assert_eq!((&first, &rest[..]), (b"he", &b"llo"[..]));
        drop(client);
        assert_eq!(server.look(), Ok(Look::End));
        assert_eq!(server.recv_append(&mut rest, MsgFlags::MSG_DONTWAIT), Ok(0));
        assert_eq!(server.recv(&mut first, MsgFlags::MSG_DONTWAIT), Ok(0));
    }
}

type Ours = Channel<ToControl, FromControl>;

#[test]
fn a_channel_leaves_descriptors_to_the_closer() {
    let (ours, theirs) = Ours::pair().expect("pair");
    let pong = Pong { sequence: 1, ..Pong::default() };
    let mut buffer = RecvBuffer::new();
    // Received with a message, which nobody takes them from; then instead of a message.
    let (socket, with_message) = stuck();
    theirs.send(&pong, &[socket.as_fd()]).expect("room");
    drop_copy(socket);
    at_once(|| drop(ours.try_recv(&mut buffer).expect("a message")));
    let (empty, sent) = pass(&theirs.as_fd(), b"", MsgFlags::empty());
    assert_eq!(sent, Ok(0));
    at_once(|| assert!(matches!(ours.try_recv(&mut buffer), Err(RecvError::Closed))));
    [with_message, empty].into_iter().for_each(assert_closed);
}

#[test]
fn a_channel_without_descriptors_gets_none() {
    let (ours, theirs) = Ours::pair().expect("pair");
    let ours = ours.foreign();
    let (peer, sent) = pass(&theirs.as_fd(), b"x", MsgFlags::empty());
    let mut buffer = RecvBuffer::new();
    let received = at_once(|| ours.try_recv(&mut buffer).expect_err("no message"));
    match sent {
        // Since Linux 6.16.
        Err(error) => {
            assert_eq!(error, Errno::EPERM);
            assert!(matches!(received, RecvError::Empty), "{received:?}");
        }
        Ok(_) => assert!(matches!(received, RecvError::Rights), "{received:?}"),
    }
    at_once(|| drop(ours));
    if sent.is_ok() {
        assert_closed(peer);
    }
}
