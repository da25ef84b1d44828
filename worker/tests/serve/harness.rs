//! The supervisor's side of a worker, and the client's side of a connection.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::{JobId, ListenerId};
use qrelay_shared::ipc::channel::{Batch, Channel, RecvBuffer};
use qrelay_shared::ipc::message::{Job, MailRecord, Peer, Report, ToJobs, ToReports};
use qrelay_shared::qmqp::{Status, encode_request};
use qrelay_shared::settings::{Declaration, ListenAddress, ListenerDecl, Settings};
use qrelay_shared::sys::rights::Rights;
use qrelay_worker::delivery::action::Action;
use qrelay_worker::flight::Recorder;
use qrelay_worker::job_channel::Reports;
use qrelay_worker::mail::Mail;
use qrelay_worker::session::Context;
use qrelay_worker::session::script::{HandlerError, Handling, Script};
use qrelay_worker::threads::pool::Pool;

pub type Decision = Result<Action, HandlerError>;
type Handler = dyn Fn(&mut Mail) -> Decision + Send + Sync;

struct FakeScript(Box<Handler>);

impl Script for FakeScript {
    fn start(self: Arc<Self>, _: usize, mut mail: Box<Mail>, _: Deadline) -> Handling {
        Handling::Waits(Box::new(move || {
            let decision = (self.0)(&mut mail);
            (mail, decision)
        }))
    }

    fn held(&self) -> (Duration, JobId) {
        (Duration::ZERO, JobId::default())
    }

    fn exhausted(&self) -> bool {
        false
    }
}

/// The supervisor's side of a worker.
pub struct Harness {
    pub jobs: Channel<ToJobs, ToReports>,
    next: u64,
    pub ended: Receiver<()>,
    pub pool: Arc<Pool>,
    /// Jobs of a datagram with several reports that no test has asked for yet.
    finished: VecDeque<Finished>,
}

/// The part of a `Done` that tests look at: status, action, text, and whether the request was
/// refused.
#[derive(Debug, PartialEq)]
pub struct Finished {
    pub job: u64,
    pub record: Option<(Option<Status>, String, String, bool)>,
}

impl Harness {
    pub fn new(handler: impl Fn(&mut Mail) -> Decision + Send + Sync + 'static) -> Self {
        Self::with(Settings { worker_connections: 8, ..Settings::default() }, handler)
    }

    pub fn with(
        settings: Settings,
        handler: impl Fn(&mut Mail) -> Decision + Send + Sync + 'static,
    ) -> Self {
        Self::with_script(settings, Arc::new(FakeScript(Box::new(handler))))
    }

    pub fn with_script(settings: Settings, script: Arc<dyn Script>) -> Self {
        let (jobs, theirs) = Channel::<ToJobs, ToReports>::pair().expect("pair");
        let patience = TimeVal::seconds(10);
        setsockopt(&jobs.as_fd(), sockopt::ReceiveTimeout, &patience).expect("timeout");
        let listener = ListenerDecl {
            address: ListenAddress::Abstract(b"test".to_vec()),
            mode: 0o666,
            owner: None,
            group: None,
            backlog: 1,
            max_size: 100_000,
            allow: None,
        };
        let declaration =
            Declaration { listeners: vec![listener], settings, ..Declaration::default() };
        let (end, ended) = channel();
        let reports = Reports::new(theirs, Duration::from_millis(20)).expect("socket");
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let context =
            Context::new(&declaration, "test".into(), script, reports, Recorder::new(&[]), logger);
        let pool = Pool::new(context, move || {
            let _ = end.send(());
        });
        pool.run().expect("thread");
        Self { jobs, next: 1, ended, pool, finished: VecDeque::new() }
    }

    /// Dispatches a new connection, and returns the client's end.
    pub fn connect(&mut self) -> UnixStream {
        let (client, server) = UnixStream::pair().expect("pair");
        client.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        self.dispatch(&server, 0);
        client
    }

    /// Dispatches a connection whose server's end is `server`.
    pub fn dispatch(&mut self, server: &UnixStream, listener: u32) {
        let job = self.job(listener);
        self.jobs.send(&job, &[server.as_fd()]).expect("send");
    }

    fn job(&mut self, listener: u32) -> Job {
        let peer = Peer::Local { pid: Some(1), uid: 2, gid: 3 };
        let job = Job {
            job: JobId(self.next),
            listener,
            listening: ListenerId(0),
            peer,
            rights: Rights::Refused,
            accepted: 0,
            spoke: u64::MAX,
        };
        self.next += 1;
        job
    }

    /// Dispatches `count` connections with a request each in one datagram, the last `lost` of them
    /// without their sockets. Returns the clients' ends.
    pub fn submit_at_once(&mut self, count: usize, lost: usize) -> Vec<UnixStream> {
        let pairs: Vec<_> = (0..count).map(|_| UnixStream::pair().expect("pair")).collect();
        let mut batch = Batch::default();
        for (client, _) in &pairs {
            (&*client).write_all(&request()).expect("write");
            client.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
            batch.push(&self.job(0)).expect("room");
        }
        let fds: Vec<_> = pairs.iter().take(count - lost).map(|(_, ours)| ours.as_fd()).collect();
        self.jobs.try_send_batch(&batch, &fds).expect("send");
        pairs.into_iter().map(|(client, _)| client).collect()
    }

    /// Dispatches `count` connections with a request each, one after the other. Returns the
    /// clients' ends.
    pub fn submit_several(&mut self, count: usize) -> Vec<UnixStream> {
        let submit = |_| {
            let mut client = self.connect();
            client.write_all(&request()).expect("write");
            client
        };
        (0..count).map(submit).collect()
    }

    /// Dispatches a connection, sends `bytes`, and returns the whole reply.
    pub fn submit(&mut self, bytes: &[u8]) -> String {
        let mut client = self.connect();
        client.write_all(bytes).expect("write");
        read_reply(&mut client)
    }

    /// Waits for the next `Done`.
    pub fn finished(&mut self) -> Finished {
        let mut buffer = RecvBuffer::new();
        while self.finished.is_empty() {
            for report in self.jobs.recv_batch(&mut buffer).expect("reports") {
                match report.expect("a report") {
                    Report::Done { job, record } => {
                        self.finished.push_back(Finished { job: job.0, record: record.map(shown) });
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        self.finished.pop_front().expect("one is there")
    }

    /// Shuts down the queue of jobs, and waits until the last thread has ended.
    pub fn end(self) {
        nix::sys::socket::shutdown(
            self.jobs.as_fd().as_raw_fd(),
            nix::sys::socket::Shutdown::Write,
        )
        .expect("shutdown");
        self.ended.recv_timeout(Duration::from_secs(10)).expect("the last thread ends");
    }
}

fn shown(record: MailRecord<'_>) -> (Option<Status>, String, String, bool) {
    (record.status, record.action.to_owned(), record.text.into_owned(), record.refused)
}

pub fn read_reply(client: &mut UnixStream) -> String {
    let mut reply = String::new();
    client.read_to_string(&mut reply).expect("an end of stream, no reset");
    reply
}

pub fn request() -> Vec<u8> {
    encode_request(b"Subject: x\n\nbody\n", b"s@x", ["r@x"])
}

pub fn discard(_: &mut Mail) -> Decision {
    Ok(Action::Discard(None))
}
