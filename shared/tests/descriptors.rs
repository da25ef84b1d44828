//! Receiving descriptors while the process has room only for some of them. The test changes the
//! limit of its process, so it must stay the only test of this file.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use qrelay_shared::ids::{JobId, ListenerId};
use qrelay_shared::ipc::channel::{Batch, Channel, MAX_FDS, RecvBuffer};
use qrelay_shared::ipc::message::{Job, Peer, ToJobs, ToReports};
use qrelay_shared::sys::rights::Rights;

/// Returns the number of descriptors that this process can still open.
fn free() -> usize {
    let mut taken: Vec<OwnedFd> = Vec::new();
    loop {
        match nix::unistd::dup(std::io::stdin()) {
            Ok(fd) => taken.push(fd),
            Err(error) => {
                assert_eq!(error, Errno::EMFILE);
                return taken.len();
            }
        }
    }
}

fn job(job: u64) -> Job {
    Job {
        job: JobId(job),
        listener: 0,
        listening: ListenerId(0),
        peer: Peer::Local { pid: Some(1), uid: 2, gid: 3 },
        rights: Rights::Refused,
        accepted: 0,
        spoke: 0,
    }
}

#[test]
fn the_first_descriptors_arrive_and_none_leaks() {
    let (ours, theirs) = Channel::<ToJobs, ToReports>::pair().expect("pair");
    let file = File::open("/dev/null").expect("open");
    let fds: [BorrowedFd<'_>; MAX_FDS] = [file.as_fd(); MAX_FDS];
    let mut batch = Batch::default();
    (0..MAX_FDS as u64).for_each(|number| batch.push(&job(number)).expect("room"));

    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    setrlimit(Resource::RLIMIT_NOFILE, 64, hard).expect("limit");
    let held: Vec<OwnedFd> = (3..free()).map(|_| nix::unistd::dup(&file).expect("dup")).collect();
    assert_eq!(free(), 3);

    let mut buffer = RecvBuffer::small();
    for _ in 0..3 {
        ours.try_send_batch(&batch, &fds).expect("send");
        let mut messages = theirs.recv_batch(&mut buffer).expect("a datagram");
        assert!(messages.descriptor_lost);
        let arrived: Vec<bool> = std::iter::from_fn(|| {
            let message = messages.next()?;
            message.expect("a job");
            Some(messages.fds.take().is_some())
        })
        .collect();
        assert_eq!(arrived, [true, true, true, false, false, false, false, false]);
        drop(messages);
        assert_eq!(free(), 3, "nothing stays open");
    }
    drop(held);
    ours.try_send_batch(&batch, &fds).expect("send");
    let mut messages = theirs.recv_batch(&mut buffer).expect("a datagram");
    assert!(!messages.descriptor_lost);
    assert_eq!(std::iter::from_fn(|| messages.fds.take()).count(), MAX_FDS);
}
