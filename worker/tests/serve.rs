//! The threads of a worker, driven as the supervisor drives them, with a script in Rust.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::ipc::channel::{Batch, Channel, RecvBuffer, RecvError};
use qrelay_shared::ipc::message::{Job, MailRecord, Peer, Report, ToJobs, ToReports};
use qrelay_shared::qmqp::{Status, encode_request};
use qrelay_shared::settings::{Declaration, ListenAddress, ListenerDecl, Settings};
use qrelay_worker::action::{Action, Connect};
use qrelay_worker::deadline::Deadline;
use qrelay_worker::lua::state::HandlerError;
use qrelay_worker::mail::Mail;
use qrelay_worker::report::Reports;
use qrelay_worker::script::{Handling, Script};
use qrelay_worker::serve::Worker;

type Decision = Result<Action, HandlerError>;
type Handler = dyn Fn(&mut Mail) -> Decision + Send + Sync;

struct FakeScript(Box<Handler>);

impl Script for FakeScript {
    fn start(self: Arc<Self>, _: usize, mut mail: Box<Mail>, _: Deadline) -> Handling {
        Handling::Waits(Box::new(move || {
            let decision = (self.0)(&mut mail);
            (mail, decision)
        }))
    }

    fn held(&self) -> (Duration, u64) {
        (Duration::ZERO, 0)
    }

    fn exhausted(&self) -> bool {
        false
    }
}

/// The supervisor's side of a worker.
struct Harness {
    jobs: Channel<ToJobs, ToReports>,
    next: u64,
    ended: Receiver<()>,
    worker: Arc<Worker>,
    /// Came with others.
    finished: VecDeque<Finished>,
}

/// What a test keeps of a `Done`.
#[derive(Debug, PartialEq)]
struct Finished {
    job: u64,
    record: Option<(Option<Status>, String, String, bool)>,
}

impl Harness {
    fn new(handler: impl Fn(&mut Mail) -> Decision + Send + Sync + 'static) -> Self {
        Self::with(Settings { worker_connections: 8, ..Settings::default() }, handler)
    }

    fn with(
        settings: Settings,
        handler: impl Fn(&mut Mail) -> Decision + Send + Sync + 'static,
    ) -> Self {
        Self::with_script(settings, Arc::new(FakeScript(Box::new(handler))))
    }

    fn with_script(settings: Settings, script: Arc<dyn Script>) -> Self {
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
        let worker = Worker::new(
            &declaration,
            "test".into(),
            script,
            Reports::new(theirs, Duration::from_millis(20)).expect("socket"),
            slog::Logger::root(slog::Discard, slog::o!()),
            move || {
                let _ = end.send(());
            },
        );
        worker.run().expect("thread");
        Self { jobs, next: 1, ended, worker, finished: VecDeque::new() }
    }

    /// Dispatches a connection whose client's end is returned.
    fn connect(&mut self) -> UnixStream {
        let (client, server) = UnixStream::pair().expect("pair");
        client.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        self.dispatch(&server, 0);
        client
    }

    fn dispatch(&mut self, server: &UnixStream, listener: u32) {
        let job = self.job(listener);
        self.jobs.send(&job, &[server.as_fd()]).expect("send");
    }

    fn job(&mut self, listener: u32) -> Job {
        let peer = Peer::Local { pid: Some(1), uid: 2, gid: 3 };
        let job = Job { job: self.next, listener, socket: 0, peer, accepted: 0, spoke: u64::MAX };
        self.next += 1;
        job
    }

    /// Dispatches connections with a request each, all at once; the last `lost` of them without
    /// their sockets.
    fn submit_at_once(&mut self, count: usize, lost: usize) -> Vec<UnixStream> {
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

    /// One whole exchange.
    fn submit(&mut self, bytes: &[u8]) -> String {
        let mut client = self.connect();
        client.write_all(bytes).expect("write");
        read_reply(&mut client)
    }

    fn finished(&mut self) -> Finished {
        let mut buffer = RecvBuffer::new();
        while self.finished.is_empty() {
            for report in self.jobs.recv_batch(&mut buffer).expect("reports") {
                match report.expect("a report") {
                    Report::Done { job, record } => {
                        self.finished.push_back(Finished { job, record: record.map(shown) });
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        self.finished.pop_front().expect("one is there")
    }

    /// Ends the queue of jobs, and waits for the last thread.
    fn end(self) {
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

fn read_reply(client: &mut UnixStream) -> String {
    let mut reply = String::new();
    client.read_to_string(&mut reply).expect("an end of stream, no reset");
    reply
}

fn request() -> Vec<u8> {
    encode_request(b"Subject: x\n\nbody\n", b"s@x", ["r@x"])
}

fn discard(_: &mut Mail) -> Decision {
    Ok(Action::Discard(None))
}

#[test]
fn answers_and_reports() {
    let mut harness = Harness::new(discard);
    assert_eq!(harness.submit(&request()), "10:Kdiscarded,");
    let record = (Some(Status::Accepted), "discard".into(), "discarded".into(), false);
    assert_eq!(harness.finished(), Finished { job: 1, record: Some(record) });
    harness.end();
}

#[test]
fn actions_and_errors_have_their_texts() {
    let texts: [(&str, &str); 5] = [
        ("reject@x", "9:Drejected,"),
        ("defer@x", "9:Zdeferred,"),
        ("own@x", "7:Dno way,"),
        ("error@x", "14:Zscript failed,"),
        ("late@x", "13:Zrelay failed,"),
    ];
    let mut harness = Harness::new(|mail| match &mail.buffer[mail.request.sender.clone()] {
        b"reject@x" => Ok(Action::Reject(None)),
        b"defer@x" => Ok(Action::Defer(None)),
        b"own@x" => Ok(Action::Reject(Some("no way".into()))),
        b"late@x" => Err(HandlerError::Deadline),
        _ => Err(HandlerError::Script),
    });
    for (sender, expected) in texts {
        let request = encode_request(b"", sender.as_bytes(), ["r@x"]);
        assert_eq!(harness.submit(&request), expected);
        assert!(harness.finished().record.is_some());
    }
    harness.end();
}

#[test]
fn bad_requests() {
    let mut harness = Harness::new(discard);
    let hops = "Received: x\n".repeat(51);
    let many = vec!["r@x"; 1025];
    let table: Vec<(Vec<u8>, &str)> = vec![
        (b"EHLO x\r\n".to_vec(), "16:Dmalformed input,"),
        (b"99999999:".to_vec(), "18:Dmessage too large,"),
        (encode_request(b"", b"nobody", ["r@x"]), "12:Dbad address,"),
        (encode_request(b"", b"", &many), "20:Dtoo many recipients,"),
        (encode_request(hops.as_bytes(), b"", ["r@x"]), "14:Dtoo many hops,"),
    ];
    for (bytes, expected) in table {
        let mut client = harness.connect();
        client.write_all(&bytes).expect("write");
        client.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_reply(&mut client), expected);
        let record = harness.finished().record.expect("a record");
        assert_eq!((record.0, record.3), (Some(Status::Permanent), true), "{expected}");
    }
    harness.end();
}

#[test]
fn a_client_that_leaves_gets_nothing() {
    let mut harness = Harness::new(discard);
    let request = request();
    for length in [0, 10, request.len() - 1] {
        let mut client = harness.connect();
        client.write_all(&request[..length]).expect("write");
        client.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_reply(&mut client), "");
        assert_eq!(harness.finished().record, None);
    }
    // One that leaves after its request has its mail handled all the same.
    let mut client = harness.connect();
    client.write_all(&request).expect("write");
    drop(client);
    assert_eq!(harness.finished().record.expect("a record").1, "discard");
    harness.end();
}

#[test]
fn the_reply_survives_whatever_else_is_sent() {
    let mut harness = Harness::new(discard);
    let surplus = [request(), b"surplus".to_vec()].concat();
    for (first, expected) in [(surplus, "10:Kdiscarded,"), (b"x".to_vec(), "16:Dmalformed input,")]
    {
        let mut client = harness.connect();
        client.write_all(&first).expect("write");
        let mut sender = client.try_clone().expect("clone");
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for _ in 0..100 {
                    sender.write_all(&[b'x'; 10_000]).expect("write");
                }
                sender.shutdown(Shutdown::Write).expect("shutdown");
            });
            assert_eq!(read_reply(&mut client), expected);
        });
        assert!(harness.finished().record.is_some());
    }
    harness.end();
}

#[test]
fn the_reply_survives_what_is_sent_while_it_is_awaited() {
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let mut harness = Harness::new(move |_| {
        let _ = gate.recv();
        Ok(Action::Discard(None))
    });
    let mut client = harness.connect();
    client.write_all(&request()).expect("write");
    // The handler may be running or not: the rest is there before the answer in any case.
    client.write_all(b"surplus").expect("write");
    release.send(()).expect("send");
    client.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    harness.finished();
    harness.end();
}

#[test]
fn a_client_that_half_closes_gets_its_reply() {
    let mut harness = Harness::new(discard);
    let mut client = harness.connect();
    client.write_all(&request()).expect("write");
    client.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    harness.finished();
    harness.end();
}

#[test]
fn a_panic_costs_one_mail() {
    let mut harness = Harness::new(|mail| match mail.job {
        1 => panic!("on purpose"),
        _ => Ok(Action::Discard(None)),
    });
    assert_eq!(harness.submit(&request()), "22:Zinternal server error,");
    let Finished { job, record } = harness.finished();
    let (status, action, text, refused) = record.expect("it is logged");
    assert_eq!((job, status, &*action, refused), (1, Some(Status::Temporary), "-", true));
    assert_eq!(text, "internal server error");
    assert_eq!(harness.submit(&request()), "10:Kdiscarded,");
    harness.finished();
    harness.end();
}

#[test]
fn an_unknown_listener_costs_one_mail() {
    let mut harness = Harness::new(discard);
    let (mut client, server) = UnixStream::pair().expect("pair");
    harness.dispatch(&server, 7);
    drop(server);
    client.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(read_reply(&mut client), "22:Zinternal server error,");
    assert!(harness.finished().record.is_some());
    harness.end();
}

#[test]
fn jobs_that_come_together_are_served_side_by_side() {
    let barrier = Arc::new(Barrier::new(8));
    let all = Arc::clone(&barrier);
    let mut harness = Harness::new(move |_| {
        all.wait();
        Ok(Action::Discard(None))
    });
    // First of threads that have to be started, then of some that wait.
    for _ in 0..3 {
        for mut client in harness.submit_at_once(8, 0) {
            assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
        }
    }
    let mut jobs: Vec<u64> = (0..24).map(|_| harness.finished().job).collect();
    jobs.sort_unstable();
    assert_eq!(jobs, (1..=24).collect::<Vec<_>>());
    harness.end();
}

#[test]
fn a_report_does_not_wait_for_the_next_mails() {
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let first = AtomicBool::new(true);
    let settings = Settings { worker_connections: 1, ..Settings::default() };
    let mut harness = Harness::with(settings, move |_| {
        if !first.swap(false, Ordering::Relaxed) {
            let _ = gate.recv();
        }
        Ok(Action::Discard(None))
    });
    let clients = harness.submit_at_once(3, 0);
    assert_eq!(harness.finished().job, 1, "while the only thread serves the second");
    drop(release);
    for mut client in clients {
        assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    }
    assert_eq!((harness.finished().job, harness.finished().job), (2, 3));
    harness.end();
}

#[test]
fn who_comes_without_a_socket_is_handed_back_alone() {
    let mut harness = Harness::new(discard);
    let clients = harness.submit_at_once(3, 1);
    for mut client in clients.into_iter().take(2) {
        assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    }
    let (mut buffer, mut lost, mut done) = (RecvBuffer::new(), Vec::new(), Vec::new());
    while lost.len() + done.len() < 3 {
        for report in harness.jobs.recv_batch(&mut buffer).expect("reports") {
            match report.expect("a report") {
                Report::Lost { job } => lost.push(job),
                Report::Done { job, .. } => done.push(job),
                other => panic!("{other:?}"),
            }
        }
    }
    done.sort_unstable();
    assert_eq!((lost, done), (vec![3], vec![1, 2]));
    harness.end();
}

#[test]
fn threads_come_as_needed_and_go() {
    let (entered, entries) = channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let mut harness = Harness::new(move |_| {
        entered.send(()).expect("send");
        let _ = gate.recv();
        Ok(Action::Discard(None))
    });
    let clients: Vec<UnixStream> = (0..9)
        .map(|_| {
            let mut client = harness.connect();
            client.write_all(&request()).expect("write");
            client
        })
        .collect();
    for _ in 0..8 {
        entries.recv_timeout(Duration::from_secs(10)).expect("eight at once");
    }
    // The limit is eight: the ninth waits.
    let ninth = entries.recv_timeout(Duration::from_millis(50));
    assert_eq!(ninth, Err(RecvTimeoutError::Timeout));
    for _ in 0..9 {
        release.send(()).expect("send");
    }
    for mut client in clients {
        assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
        harness.finished();
    }
    let one_is_left = |worker: &Worker| format!("{worker:?}").contains("living: 1, waiting: 0");
    let start = Instant::now();
    while !one_is_left(&harness.worker) {
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", harness.worker);
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(release);
    assert_eq!(harness.submit(&request()), "10:Kdiscarded,");
    harness.finished();
    harness.end();
}

/// Computes for long about the first mail, and decides about the others when the gate is gone.
struct SlowAtFirst(crossbeam_channel::Receiver<()>);

impl Script for SlowAtFirst {
    fn start(self: Arc<Self>, _: usize, mail: Box<Mail>, _: Deadline) -> Handling {
        match mail.job {
            1 => std::thread::sleep(Duration::from_millis(50)),
            _ => drop(self.0.recv_timeout(Duration::from_secs(20))),
        }
        Handling::Decided((mail, Ok(Action::Discard(None))))
    }

    fn held(&self) -> (Duration, u64) {
        (Duration::ZERO, 0)
    }

    fn exhausted(&self) -> bool {
        false
    }
}

#[test]
fn a_slow_mail_is_answered_before_others_are_begun() {
    let (release, gate) = crossbeam_channel::bounded(0);
    let settings = Settings { worker_connections: 1, ..Settings::default() };
    let mut harness = Harness::with_script(settings, Arc::new(SlowAtFirst(gate)));
    let mut clients = harness.submit_at_once(3, 0);
    assert_eq!(read_reply(&mut clients[0]), "10:Kdiscarded,");
    drop(release);
    for client in &mut clients[1..] {
        assert_eq!(read_reply(client), "10:Kdiscarded,");
    }
    (0..3).for_each(|_| drop(harness.finished()));
    harness.end();
}

#[test]
fn jobs_are_received_though_all_are_busy() {
    let (entered, entries) = channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let settings = Settings { worker_connections: 2, ..Settings::default() };
    let mut harness = Harness::with(settings, move |_| {
        entered.send(()).expect("send");
        let _ = gate.recv();
        Ok(Action::Discard(None))
    });
    let mut clients = harness.submit_at_once(2, 0);
    for _ in 0..2 {
        entries.recv_timeout(Duration::from_secs(10)).expect("two at once");
    }
    clients.extend(harness.submit_at_once(3, 0));
    // They wait in the worker, not in the kernel.
    let start = Instant::now();
    while !format!("{:?}", harness.worker).contains("tasks: 3") {
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", harness.worker);
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(release);
    for mut client in clients {
        assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
        harness.finished();
    }
    harness.end();
}

#[test]
fn what_is_queued_is_served_before_the_end() {
    let mut harness = Harness::new(|_| {
        std::thread::sleep(Duration::from_millis(1));
        Ok(Action::Discard(None))
    });
    let clients: Vec<UnixStream> = (0..100)
        .map(|_| {
            let mut client = harness.connect();
            client.write_all(&request()).expect("write");
            client
        })
        .collect();
    harness.end();
    for mut client in clients {
        assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    }
}

#[test]
fn without_a_supervisor_mails_are_finished() {
    let (entered, entries) = channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let mut harness = Harness::new(move |_| {
        entered.send(()).expect("send");
        let _ = gate.recv();
        Ok(Action::Discard(None))
    });
    let mut client = harness.connect();
    client.write_all(&request()).expect("write");
    entries.recv_timeout(Duration::from_secs(10)).expect("handler runs");
    let Harness { jobs, ended, .. } = harness;
    drop(jobs);
    release.send(()).expect("send");
    assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    ended.recv_timeout(Duration::from_secs(10)).expect("the last thread ends");
}

#[test]
fn relays_and_announces_long_timeouts() {
    let next_hop = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = next_hop.local_addr().expect("address");
    let connect = Arc::new(Connect {
        addresses: vec![Endpoint::Inet(address).into()],
        random: false,
        timeout: Some(Duration::from_secs(61)),
        connect_timeout: None,
    });
    let mut harness = Harness::new(move |mail| {
        mail.inserted.insert(b"X-A", b"b");
        Ok(Action::Connect(Arc::clone(&connect)))
    });
    let mut client = harness.connect();
    client.write_all(&request()).expect("write");
    let (mut stream, _) = next_hop.accept().expect("accept");
    let mut bytes = [0; 1000];
    let length = stream.read(&mut bytes).expect("read");
    let text = String::from_utf8_lossy(&bytes[..length]);
    assert!(
        text.contains(":X-A: b\r\nReceived: from PID=1 UID=2 with QMQP\r\nSubject: x\n\nbody\n,"),
        "{text}"
    );
    stream.write_all(b"7:Kpassed,").expect("write");
    stream.write_all(b"later bytes").expect("write");
    assert_eq!(read_reply(&mut client), "7:Kpassed,");
    let mut buffer = RecvBuffer::new();
    let announced = harness.jobs.recv(&mut buffer).expect("report");
    assert!(matches!(announced.message, Report::Timeout { job: 1, milliseconds: 61_000 }));
    harness.finished();
    harness.end();
}

#[test]
fn a_lost_descriptor_is_handed_back() {
    let mut harness = Harness::new(discard);
    let job = Job {
        job: 42,
        listener: 0,
        socket: 0,
        peer: Peer::Remote([192, 0, 2, 1].into()),
        accepted: 0,
        spoke: u64::MAX,
    };
    harness.jobs.send(&job, &[]).expect("send");
    let mut buffer = RecvBuffer::new();
    let report = harness.jobs.recv(&mut buffer).expect("report");
    assert!(matches!(report.message, Report::Lost { job: 42 }));
    assert_eq!(harness.submit(&request()), "10:Kdiscarded,");
    harness.finished();
    assert!(matches!(harness.jobs.try_recv(&mut buffer), Err(RecvError::Empty)));
    harness.end();
}
