//! The processes zygote, standby and worker, driven by this program in place of a supervisor. The
//! program starts itself again as the zygote, so it has a `main` of its own.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use qrelay_shared::dictionary::{FromOpener, ToOpener};
use qrelay_shared::ids::{JobId, ListenerId, WorkerId};
use qrelay_shared::ipc::channel::{Channel, RecvBuffer};
use qrelay_shared::ipc::message::{
    Control, FromControl, FromZygote, Job, Peer, Pong, Report, ToControl, ToJobs, ToReports,
    ToZygote, ZygoteOrder, ZygoteReport,
};
use qrelay_shared::qmqp::encode_request;
use qrelay_shared::settings::Declaration;
use qrelay_shared::sys::limits::Limits;
use qrelay_shared::sys::recorder;
use qrelay_shared::sys::rights::Rights;

/// Environment variable that tells a new process of this program its role.
const ROLE: &str = "QRELAY_TEST_ROLE";
/// Longest wait for the end of a process.
const LIMIT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    match std::env::var(ROLE).as_deref() {
        Ok("zygote") => {
            let limits = Limits::now().expect("limits");
            return qrelay_worker::process::zygote::main(slog::Level::Critical, limits).into();
        }
        Ok("supervisor") => doomed_supervisor(),
        _ => tests(),
    }
    ExitCode::SUCCESS
}

fn tests() {
    prctl::set_child_subreaper(true).expect("subreaper");
    let tests: [(&str, fn()); 7] = [
        ("a script that can't be used", broken_script),
        ("a worker's whole life", whole_life),
        ("signals are no orders", signals),
        ("the standby takes over", standby),
        ("a zygote keeps no sockets of its workers", no_descriptors_kept),
        ("everything ends with the supervisor", orphans),
        ("a worker finishes its mail when the supervisor is gone", last_mail),
    ];
    for (name, test) in tests {
        test();
        println!("test {name} ... ok");
    }
}

/// Returns a command that runs this program again in a role.
fn again(role: &str, stdin: impl Into<Stdio>) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("path of this program"));
    command.env(ROLE, role).stdin(stdin);
    command
}

struct Zygote {
    channel: Channel<ToZygote, FromZygote>,
    pid: Pid,
}

impl Zygote {
    #[expect(clippy::zombie_processes, reason = "waited for by pid, in `reap`")]
    fn spawn() -> Self {
        let (channel, theirs) = Channel::<ToZygote, FromZygote>::pair().expect("pair");
        let child: Child = again("zygote", OwnedFd::from(theirs)).spawn().expect("spawn");
        Self { channel, pid: Pid::from_raw(child.id() as i32) }
    }

    fn loaded(script: &str) -> Self {
        let zygote = Self::spawn();
        match zygote.load(script) {
            ZygoteReport::Declared(_) => zygote,
            other => panic!("{other:?}"),
        }
    }

    fn load(&self, script: &str) -> ZygoteReport {
        let directory = tempfile::tempdir().expect("directory");
        let config = directory.path().join("config.lua");
        std::fs::write(&config, script).expect("write");
        let (_, dictionaries) = Channel::<FromOpener, ToOpener>::pair().expect("pair");
        self.order(
            &ZygoteOrder::Load {
                generation: 1,
                config,
                reload: false,
                systemd: vec![],
                instance: "t".into(),
                account: None,
            },
            &[&dictionaries.into()],
        )
    }

    fn order(&self, order: &ZygoteOrder, fds: &[&OwnedFd]) -> ZygoteReport {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        self.channel.send(order, &fds).expect("send");
        self.channel.recv(&mut RecvBuffer::new()).expect("report").message
    }

    fn fork(&self, worker: WorkerId) -> Worker {
        let (jobs, their_jobs) = Channel::<ToJobs, ToReports>::pair().expect("pair");
        let (control, their_control) = Channel::<ToControl, FromControl>::pair().expect("pair");
        let (_, dictionaries) = Channel::<FromOpener, ToOpener>::pair().expect("pair");
        let flights = recorder::create(8).expect("memory");
        let fds = [their_jobs.into(), their_control.into(), dictionaries.into(), flights];
        match self.order(&ZygoteOrder::Fork { worker }, &fds.each_ref()) {
            ZygoteReport::Forked { worker: same, pid } if same == worker => {
                Worker { jobs, control, pid: Pid::from_raw(pid) }
            }
            other => panic!("{other:?}"),
        }
    }

    fn standby(&self) -> Self {
        let (channel, theirs) = Channel::<ToZygote, FromZygote>::pair().expect("pair");
        match self.order(&ZygoteOrder::Standby, &[&theirs.into()]) {
            ZygoteReport::StandbyForked { pid } => Self { channel, pid: Pid::from_raw(pid) },
            other => panic!("{other:?}"),
        }
    }

    fn end(self) {
        drop(self.channel);
        assert_eq!(reap(self.pid), WaitStatus::Exited(self.pid, 0));
    }
}

struct Worker {
    jobs: Channel<ToJobs, ToReports>,
    control: Channel<ToControl, FromControl>,
    pid: Pid,
}

impl Worker {
    fn ready(&self) {
        let mut buffer = RecvBuffer::new();
        let report = self.jobs.recv(&mut buffer).expect("report").message;
        assert!(matches!(report, Report::Ready), "{report:?}");
    }

    fn ping(&self, sequence: u64) -> Pong {
        self.control.send(&Control::Ping { sequence }, &[]).expect("send");
        self.control.recv(&mut RecvBuffer::new()).expect("pong").message
    }

    fn dispatch(&self, job: u64) -> UnixStream {
        let (mut client, server) = UnixStream::pair().expect("pair");
        client.write_all(&encode_request(b"A: b\n", b"", ["r@x"])).expect("write");
        let peer = Peer::Local { pid: Some(1), uid: 2, gid: 3 };
        let job = Job {
            job: JobId(job),
            listener: 0,
            listening: ListenerId(0),
            peer,
            rights: Rights::Refused,
            accepted: 0,
            spoke: u64::MAX,
        };
        self.jobs.send(&job, &[server.as_fd()]).expect("send");
        client
    }

    fn done(&self) {
        let mut buffer = RecvBuffer::new();
        let report = self.jobs.recv(&mut buffer).expect("report").message;
        assert!(matches!(report, Report::Done { record: Some(_), .. }), "{report:?}");
    }

    /// Shuts down the queue of jobs, and waits until the worker has ended with status 0.
    fn retire(self) {
        shutdown(self.jobs.as_fd().as_raw_fd(), Shutdown::Write).expect("shutdown");
        assert_eq!(reap(self.pid), WaitStatus::Exited(self.pid, 0));
    }
}

fn reply(mut client: UnixStream) -> String {
    let mut reply = String::new();
    client.read_to_string(&mut reply).expect("reply");
    reply
}

/// Waits for the end of a child or of a process that will become one.
fn reap(pid: Pid) -> WaitStatus {
    let start = Instant::now();
    loop {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => {}
            // The process may be about to become a child, since this process is a subreaper.
            Err(nix::errno::Errno::ECHILD) if start.elapsed() < LIMIT => {}
            other => return other.expect("a child"),
        }
        assert!(start.elapsed() < LIMIT, "process {pid} doesn't end");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn comm(pid: Pid) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/comm")).expect("comm");
    text.trim().to_owned()
}

fn descriptors(pid: Pid) -> usize {
    std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd")).expect("fds").count()
}

const DISCARD: &str = "qmqp_listen('@qrelay-zygote-test', function(m) return m:discard() end)";
const SLOW: &str =
    "qmqp_listen('@qrelay-zygote-test', function(m) sleep(0.3) return m:discard() end)";

fn broken_script() {
    let zygote = Zygote::spawn();
    match zygote.load("local x =\n") {
        ZygoteReport::Failed { message, may_pass: false } => {
            assert!(message.contains("config.lua:"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    let report = zygote.order(&ZygoteOrder::Fork { worker: WorkerId(1) }, &[]);
    assert!(matches!(report, ZygoteReport::ForkFailed { worker: WorkerId(1), .. }), "{report:?}");
    let report = zygote.order(&ZygoteOrder::Standby, &[]);
    assert!(matches!(report, ZygoteReport::StandbyFailed { .. }), "{report:?}");
    zygote.end();
}

fn whole_life() {
    let zygote = Zygote::spawn();
    let declared: Box<Declaration> = match zygote.load(DISCARD) {
        ZygoteReport::Declared(declared) => declared,
        other => panic!("{other:?}"),
    };
    assert_eq!(declared.listeners.len(), 1);
    assert_eq!(comm(zygote.pid), "qrelay-zygote");
    let start = Instant::now();
    let worker = zygote.fork(WorkerId(7));
    worker.ready();
    println!("fork to ready: {:?}", start.elapsed());
    assert_eq!(comm(worker.pid), "qrelay-worker");
    let pong = worker.ping(42);
    assert_eq!((pong.sequence, pong.held, pong.exhausted), (42, 0, false));
    assert_eq!(reply(worker.dispatch(1)), "10:Kdiscarded,");
    worker.done();
    worker.retire();
    zygote.end();
}

fn signals() {
    let zygote = Zygote::loaded(DISCARD);
    let worker = zygote.fork(WorkerId(1));
    worker.ready();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        for pid in [zygote.pid, worker.pid] {
            kill(pid, signal).expect("kill");
        }
    }
    assert_eq!(worker.ping(1).sequence, 1);
    assert_eq!(reply(worker.dispatch(1)), "10:Kdiscarded,");
    worker.done();
    worker.retire();
    let other = zygote.fork(WorkerId(2));
    other.ready();
    other.retire();
    zygote.end();
}

fn standby() {
    let zygote = Zygote::loaded(DISCARD);
    let standby = zygote.standby();
    kill(zygote.pid, Signal::SIGKILL).expect("kill");
    reap(zygote.pid);
    let worker = standby.fork(WorkerId(1));
    worker.ready();
    assert_eq!(comm(standby.pid), "qrelay-zygote");
    let next = standby.standby();
    standby.end();
    // Workers and standbys don't depend on the zygote that forked them.
    assert_eq!(reply(worker.dispatch(1)), "10:Kdiscarded,");
    worker.done();
    worker.retire();
    let worker = next.fork(WorkerId(2));
    worker.ready();
    worker.retire();
    next.end();
}

fn no_descriptors_kept() {
    let zygote = Zygote::loaded(DISCARD);
    let workers: Vec<Worker> = (0..20).map(|n| zygote.fork(WorkerId(n))).collect();
    let standby = zygote.standby();
    let first = descriptors(workers[0].pid);
    for worker in workers {
        worker.ready();
        assert_eq!(descriptors(worker.pid), first);
        worker.retire();
    }
    let after = descriptors(zygote.pid);
    zygote.fork(WorkerId(21)).retire();
    assert_eq!(descriptors(zygote.pid), after);
    assert!(after < 12, "{after}");
    standby.end();
    zygote.end();
}

/// Starts zygote, standby and two workers, prints their pids, and waits to be killed.
fn doomed_supervisor() {
    prctl::set_child_subreaper(true).expect("subreaper");
    let zygote = Zygote::loaded(SLOW);
    let standby = zygote.standby();
    let idle = zygote.fork(WorkerId(1));
    idle.ready();
    let busy = zygote.fork(WorkerId(2));
    busy.ready();
    println!("{} {} {} {}", zygote.pid, standby.pid, idle.pid, busy.pid);
    let client = busy.dispatch(1);
    println!("{}", reply(client));
    std::thread::sleep(LIMIT);
}

fn orphans() {
    let mut supervisor =
        again("supervisor", Stdio::null()).stdout(Stdio::piped()).spawn().expect("spawn");
    let mut bytes = [0; 200];
    let stdout = supervisor.stdout.as_mut().expect("stdout");
    let length = stdout.read(&mut bytes).expect("read");
    let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
    let pids: Vec<Pid> =
        text.split_whitespace().map(|pid| Pid::from_raw(pid.parse().expect("a pid"))).collect();
    let start = Instant::now();
    supervisor.kill().expect("kill");
    supervisor.wait().expect("wait");
    for &pid in &pids[..2] {
        let status = reap(pid);
        let killed = WaitStatus::Signaled(pid, Signal::SIGKILL, false);
        assert!(status == killed || status == WaitStatus::Exited(pid, 0), "{status:?}");
    }
    assert_eq!(reap(pids[2]), WaitStatus::Exited(pids[2], 0));
    assert_eq!(reap(pids[3]), WaitStatus::Exited(pids[3], 0));
    println!("all gone after {:?}", start.elapsed());
}

fn last_mail() {
    let zygote = Zygote::loaded(SLOW);
    let worker = zygote.fork(WorkerId(1));
    worker.ready();
    let client = worker.dispatch(1);
    let Worker { jobs, control, pid } = worker;
    drop((jobs, control));
    assert_eq!(reply(client), "10:Kdiscarded,");
    assert_eq!(reap(pid), WaitStatus::Exited(pid, 0));
    zygote.end();
}
