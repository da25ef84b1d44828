//! The owner of workers without a process: the test plays the system, the zygote and the workers.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use qrelay_shared::ipc::channel::{Batch, Channel, RecvError, SendError};
use qrelay_shared::ipc::message::{
    DatabaseState, FromControl, Job, MailRecord, Peer, Pong, Report, ToControl, ToJobs, ToReports,
};
use qrelay_shared::settings::Settings;
use qrelay_shared::sys::limits::Limits;
use qrelay_shared::sys::rights::Rights;

use super::*;
use crate::connected::Connected;
use crate::event::{Asker, NewWorker, Teller};
use crate::ids::{ListenerId, ZygoteId};
use crate::system::ZygotePids;
use crate::system::fake::{Fake, OUTSIDE};
use crate::watch::Poller;

/// Checks that the test of the daemon makes between two turns.
impl Workers {
    /// Panics if what is counted twice doesn't agree.
    pub(crate) fn assert_consistent(&self) {
        self.pool.assert_consistent();
    }

    /// Returns the connections that wait for a worker.
    pub(crate) fn waiting_jobs(&self) -> BTreeSet<JobId> {
        self.pool.waiting_jobs().chain(self.dispatches.bound_jobs()).collect()
    }

    /// Returns whether a worker, or a program of a dead one, answers for a job.
    pub(crate) fn answers_for(&self, job: JobId, worker: WorkerId) -> bool {
        let lives = self.processes.contains_key(&worker) && self.pool.has(job, worker);
        lives || self.orphans.concerns(job)
    }

    /// Counts the jobs that only programs of dead workers have.
    pub(crate) fn orphaned_jobs(&self) -> usize {
        self.orphans.jobs().into_iter().filter(|&job| !self.pool.is_assigned(job)).count()
    }

    /// Counts the current generation's workers that take jobs.
    pub(crate) fn serving(&self) -> usize {
        self.pool.serving()
    }
}

const FIRST: GenerationId = GenerationId(1);
const CLIENT: Client = Client::Uid(7);
/// The zygote that forks the workers.
const TELLER: Teller = Teller { zygote: ZygoteId(1), generation: FIRST };

/// Connections that a test holds.
#[derive(Debug, Default)]
struct Held(BTreeMap<JobId, Rc<UnixStream>>);

impl Connected for Held {
    fn job(&self, job: JobId, _: GenerationId) -> Option<Job> {
        let peer = Peer::Local { pid: None, uid: 7, gid: 7 };
        let listening = ListenerId(1);
        self.0.contains_key(&job).then_some(Job {
            job,
            listener: 0,
            listening,
            peer,
            rights: Rights::Refused,
            accepted: 0,
            spoke: 0,
        })
    }

    fn socket(&self, job: JobId) -> Option<BorrowedFd<'_>> {
        self.0.get(&job).map(|socket| socket.as_fd())
    }
}

/// The other side of a worker.
struct Other {
    id: WorkerId,
    pid: Pid,
    jobs: Channel<ToReports, ToJobs>,
    control: Channel<FromControl, ToControl>,
}

impl Other {
    fn report(&self, report: &Report<'_>) {
        self.jobs.try_send(report, &[]).expect("the supervisor reads");
    }

    /// Takes one datagram of jobs; `None` at the end.
    fn take(&self) -> Option<Vec<JobId>> {
        let mut buffer = RecvBuffer::new();
        match self.jobs.try_recv_batch(&mut buffer) {
            Ok(jobs) => Some(jobs.map(|job| job.expect("a job").job).collect()),
            Err(RecvError::Empty) => Some(Vec::new()),
            Err(_) => None,
        }
    }
}

struct Site {
    fake: Rc<Fake>,
    workers: Workers,
    held: Held,
    events: Events,
    now: Instant,
}

impl Site {
    fn new() -> Self {
        Self::with_log(Logger::root(slog::Discard, slog::o!()))
    }

    fn with_log(log: Logger) -> Self {
        let fake = Rc::new(Fake::default());
        Self::over(Rc::clone(&fake) as Rc<dyn System>, fake, log)
    }

    fn over(system: Rc<dyn System>, fake: Rc<Fake>, log: Logger) -> Self {
        let poller = Poller::new().expect("epoll");
        let workers = Workers::new(log, "run".into(), poller.watcher(), system);
        let (held, events) = (Held::default(), Events::new());
        Self { fake, workers, held, events, now: Instant::now() }
    }

    /// Starts a generation, and forks its workers as a zygote would.
    fn start(&mut self, generation: GenerationId, workers: u32, credit: u32) -> Vec<Other> {
        let declaration =
            declared(Settings { workers, worker_connections: credit, ..Settings::default() });
        self.workers.start(generation, &declaration, self.now, &mut self.events);
        self.fork()
    }

    /// Forks the workers that are missing.
    fn fork(&mut self) -> Vec<Other> {
        let missing = self.missing();
        missing.into_iter().map(|new| self.fork_one(new)).collect()
    }

    fn missing(&mut self) -> Vec<NewWorker> {
        let taken = self.events.drain(..).filter_map(|event| match event {
            Event::WorkerMissing(new) => Some(*new),
            _ => None,
        });
        taken.collect()
    }

    fn fork_one(&mut self, new: NewWorker) -> Other {
        let NewWorker { worker: id, jobs, control, .. } = new;
        let pid = self.fake.start();
        self.workers.forked(TELLER, id, pid, self.now, &mut self.events);
        Other { id, pid, jobs: Channel::from_fd(jobs), control: Channel::from_fd(control) }
    }

    /// A generation that serves, with all its workers.
    fn serving(&mut self, workers: u32, credit: u32) -> Vec<Other> {
        let others = self.start(FIRST, workers, credit);
        for other in &others {
            other.report(&Report::Ready);
            self.read(other);
        }
        self.workers.switch(FIRST);
        self.events.clear();
        others
    }

    fn read(&mut self, other: &Other) -> usize {
        let mut records = 0;
        let record = &mut |_, _, _: &MailRecord<'_>| records += 1;
        self.workers.on_reports(other.id, self.now, record, &mut self.events);
        records
    }

    fn reap(&mut self, zygotes: &ZygotePids) {
        let record = &mut |_, _, _: &MailRecord<'_>| {};
        self.workers.reap(zygotes, self.now, record, &mut self.events);
    }

    /// Lets connections wait, and dispatches them.
    fn wait(&mut self, jobs: std::ops::RangeInclusive<u64>) {
        // Whose socket it is makes no difference here, and a socket for each would need more
        // descriptors than a process usually has.
        let (socket, _) = UnixStream::pair().expect("a pair");
        let socket = Rc::new(socket);
        for job in jobs.map(JobId) {
            self.held.0.insert(job, Rc::clone(&socket));
            self.workers.ready(job, CLIENT);
        }
        self.dispatch();
    }

    fn dispatch(&mut self) {
        self.workers.dispatch(&self.held, &mut self.events);
        self.workers.assert_consistent();
    }

    /// The events so far, in a short form, but for those about dictionaries.
    fn events(&mut self) -> Vec<String> {
        let events = self.events.drain(..).map(|event| format!("{event:?}"));
        let aside = |event: &String| event.starts_with("Asker") || event.starts_with("Incident");
        events.filter(|event| !aside(event)).collect()
    }
}

fn said(events: &[Event]) -> Vec<String> {
    events.iter().map(|event| format!("{event:?}")).collect()
}

fn dispatched(job: u64, worker: WorkerId) -> Event {
    Event::Dispatched { job: JobId(job), worker }
}

#[test]
fn jobs_go_out_together_and_end_with_a_report() {
    let mut site = Site::new();
    let others = site.serving(1, 16);
    let id = others[0].id;
    site.wait(1..=3);
    assert_eq!(site.events(), said(&[1, 2, 3].map(|job| dispatched(job, id))));
    assert_eq!(others[0].take(), Some(vec![JobId(1), JobId(2), JobId(3)]));
    assert_eq!(site.workers.in_flight(), 3);
    others[0].report(&Report::Done { job: JobId(2), record: None });
    assert_eq!(site.read(&others[0]), 0);
    others[0].report(&Report::Lost { job: JobId(1) });
    site.read(&others[0]);
    assert_eq!(site.events(), said(&[Event::Done(JobId(2)), Event::SocketLost(JobId(1))]));
    assert_eq!(site.workers.in_flight(), 1);
}

#[test]
fn a_worker_that_is_ready_is_reported() {
    let mut site = Site::new();
    let others = site.start(FIRST, 2, 4);
    assert!(site.events().is_empty());
    others[1].report(&Report::Ready);
    site.read(&others[1]);
    assert_eq!(site.events(), said(&[Event::WorkerReady(FIRST)]));
}

#[test]
fn a_job_socket_that_takes_no_more_counts_as_no_credit() {
    let mut site = Site::new();
    let others = site.serving(1, 4000);
    setsockopt(&site.workers.processes[&others[0].id].jobs, sockopt::SndBuf, &1).expect("socket");
    site.wait(1..=900);
    let sent = site.events().len() as u64;
    assert!((1..675).contains(&sent), "{sent}");
    assert_eq!(site.workers.in_flight() as u64, sent);
    assert_eq!(site.workers.waiting_jobs().first(), Some(&JobId(sent + 1)));
    let mut took = 0;
    while let Some(jobs) = others[0].take().filter(|jobs| !jobs.is_empty()) {
        took += jobs.len() as u64;
    }
    assert_eq!(took, sent);
    site.dispatch();
    let next = site.events().into_iter().next();
    assert_eq!(next, said(&[dispatched(sent + 1, others[0].id)]).pop(), "in their order");
}

#[test]
fn a_connection_that_is_gone_is_reported() {
    let mut site = Site::new();
    site.serving(1, 4);
    site.workers.ready(JobId(5), CLIENT);
    site.dispatch();
    assert_eq!(site.events(), said(&[Event::Unservable(JobId(5))]));
    assert_eq!(site.workers.in_flight(), 0);
}

#[test]
fn a_bound_connection_goes_to_its_generation_whatever_the_credit() {
    let mut site = Site::new();
    let old = site.serving(1, 1);
    site.wait(1..=3);
    site.events();
    site.workers.switch(GenerationId(2));
    site.workers.bound(JobId(2), CLIENT, FIRST);
    site.workers.bound(JobId(3), CLIENT, GenerationId(9));
    site.dispatch();
    let expected = [dispatched(2, old[0].id), Event::Unservable(JobId(3))];
    assert_eq!(site.events(), said(&expected));
    assert_eq!(site.workers.in_flight(), 2);
}

#[test]
fn a_connection_that_was_given_up_is_not_dispatched() {
    let mut site = Site::new();
    let others = site.serving(1, 1);
    site.wait(1..=2);
    site.events();
    site.workers.given_up(JobId(2), CLIENT);
    others[0].report(&Report::Done { job: JobId(1), record: None });
    site.read(&others[0]);
    site.events();
    site.dispatch();
    assert!(site.events().is_empty() && site.workers.waiting_jobs().is_empty());
}

#[test]
fn a_dead_worker_costs_its_clients_a_retry_and_is_replaced() {
    let mut site = Site::new();
    let others = site.serving(1, 4);
    let worker = others[0].id;
    site.wait(1..=2);
    others[0].report(&Report::Done { job: JobId(1), record: None });
    site.events();
    site.fake.exit(others[0].pid, 1);
    site.reap(&ZygotePids::default());
    let expected = [
        Event::Done(JobId(1)),
        Event::Orphaned { job: JobId(2), worker, flight: None },
        Event::WorkerEnded(FIRST),
    ];
    assert_eq!(site.events(), said(&expected), "its last report counts");
    site.workers.tick(site.now, &mut site.events);
    assert_eq!(site.missing().len(), 1);
}

#[test]
fn a_worker_that_dies_before_it_is_ready_fails_its_generation() {
    let mut site = Site::new();
    let others = site.start(FIRST, 1, 4);
    site.fake.exit(others[0].pid, 1);
    site.reap(&ZygotePids::default());
    let expected = [Event::WorkerFailed(FIRST), Event::WorkerEnded(FIRST)];
    assert_eq!(site.events(), said(&expected));
}

#[test]
fn a_worker_that_lies_is_killed() {
    let mut site = Site::new();
    let others = site.serving(2, 4);
    others[0].report(&Report::Done { job: JobId(77), record: None });
    site.read(&others[0]);
    site.workers.tick(site.now, &mut site.events);
    assert_eq!(site.fake.signals(), [(others[0].pid, Signal::SIGKILL)]);
}

#[test]
fn a_worker_that_passes_descriptors_for_no_reason_is_killed() {
    let file = std::fs::File::open("/dev/null").expect("open");
    let mut site = Site::new();
    let others = site.serving(1, 4);
    site.wait(1..=1);
    let report = Report::Done { job: JobId(1), record: None };
    match others[0].jobs.try_send(&report, &[file.as_fd()]) {
        Ok(()) => {
            site.read(&others[0]);
            site.workers.tick(site.now, &mut site.events);
            assert_eq!(site.fake.signals(), [(others[0].pid, Signal::SIGKILL)]);
        }
        // The kernel refuses the descriptor.
        Err(error) => assert!(matches!(error, SendError::Os(Errno::EPERM)), "{error:?}"),
    }
    let mut site = Site::new();
    let others = site.serving(1, 4);
    let pong = Pong { sequence: 1, ..Pong::default() };
    match others[0].control.try_send(&pong, &[file.as_fd()]) {
        Ok(()) => {
            site.workers.on_pong(others[0].id, site.now, &mut site.events);
            site.workers.tick(site.now, &mut site.events);
            assert_eq!(site.fake.signals(), [(others[0].pid, Signal::SIGKILL)]);
        }
        // The kernel refuses the descriptor.
        Err(error) => assert!(matches!(error, SendError::Os(Errno::EPERM)), "{error:?}"),
    }
}

#[test]
fn a_worker_whose_leader_makes_no_progress_is_aborted() {
    let mut site = Site::new();
    let others = site.serving(1, 4);
    let stuck = Settings::default().hang_timeout.as_millis() as u64 + 1;
    let pong = Pong { sequence: 1, stuck, ..Pong::default() };
    site.workers.ping(others[0].id, 1);
    others[0].control.try_send(&pong, &[]).expect("the supervisor reads");
    site.workers.on_pong(others[0].id, site.now, &mut site.events);
    assert_eq!(site.fake.signals(), [(others[0].pid, Signal::SIGABRT)]);
}

#[test]
fn a_worker_that_hangs_in_lua_is_aborted() {
    let mut site = Site::new();
    let others = site.serving(1, 4);
    let held = Settings::default().hang_timeout.as_millis() as u64 + 1;
    let pong = Pong { sequence: 1, held, ..Pong::default() };
    site.workers.ping(others[0].id, 1);
    others[0].control.try_send(&pong, &[]).expect("the supervisor reads");
    site.workers.on_pong(others[0].id, site.now, &mut site.events);
    assert_eq!(site.fake.signals(), [(others[0].pid, Signal::SIGABRT)]);
}

#[test]
fn a_retired_generation_ends_with_its_last_worker() {
    let mut site = Site::new();
    let others = site.serving(2, 4);
    site.workers.retire(FIRST, site.now, &mut site.events);
    assert!(others.iter().all(|other| other.take().is_none()), "their job sockets are shut");
    for other in &others {
        assert!(site.events().is_empty());
        site.fake.exit(other.pid, 0);
        site.reap(&ZygotePids::default());
        assert_eq!(site.events(), said(&[Event::WorkerEnded(FIRST)]));
        site.workers.finish(FIRST, site.now, &mut site.events);
    }
    assert_eq!(site.events(), said(&[Event::Drained(FIRST)]));
    assert!(site.workers.is_idle());
}

#[test]
fn workers_that_a_zygote_never_forked_end_with_it() {
    let mut site = Site::new();
    let declaration = declared(Settings { workers: 2, ..Settings::default() });
    site.workers.start(FIRST, &declaration, site.now, &mut site.events);
    assert_eq!(site.missing().len(), 2);
    site.workers.retire(FIRST, site.now, &mut site.events);
    assert!(site.events().is_empty(), "the zygote may still fork them");
    site.workers.zygotes_ended(FIRST, site.now, &mut site.events);
    assert_eq!(site.events().len(), 4);
    site.workers.finish(FIRST, site.now, &mut site.events);
    assert_eq!(site.events(), said(&[Event::Drained(FIRST)]));
}

#[test]
fn an_abandoned_generation_without_workers_ends_at_once() {
    let mut site = Site::new();
    site.workers.abandon(FIRST, site.now, &mut site.events);
    assert_eq!(site.events(), said(&[Event::Drained(FIRST)]));
}

#[test]
fn a_standby_is_asked_again_for_workers_that_are_not_there() {
    let mut site = Site::new();
    site.start(FIRST, 2, 4);
    site.workers.zygote_lost(FIRST, site.now, &mut site.events);
    assert_eq!(site.missing().len(), 2);
}

#[test]
fn a_worker_may_end_before_its_process_id_is_known() {
    let mut site = Site::new();
    let declaration = declared(Settings { workers: 1, ..Settings::default() });
    site.workers.start(FIRST, &declaration, site.now, &mut site.events);
    let new = site.missing().pop().expect("one");
    let pid = site.fake.start();
    site.fake.exit(pid, 1);
    site.reap(&ZygotePids::default());
    assert!(site.events().is_empty());
    site.workers.forked(TELLER, new.worker, pid, site.now, &mut site.events);
    let expected = [Event::WorkerFailed(FIRST), Event::WorkerEnded(FIRST)];
    assert_eq!(site.events(), said(&expected));
}

#[test]
fn a_standby_that_ended_before_its_process_id_was_known_is_reported() {
    let mut site = Site::new();
    let (zygote, pid) = (ZygoteId(4), site.fake.start());
    site.fake.exit(pid, 1);
    site.reap(&ZygotePids { known: Vec::new(), unknown: 1 });
    site.workers.standby_forked(TELLER, zygote, pid, &mut site.events);
    let other = site.fake.start();
    site.workers.standby_forked(TELLER, zygote, other, &mut site.events);
    let expected = [Event::StandbyEnded(zygote), Event::StandbyRuns { zygote, pid: other }];
    assert_eq!(site.events(), said(&expected));
}

#[test]
fn zygotes_are_left_to_their_owner() {
    let mut site = Site::new();
    let zygote = site.fake.start();
    site.fake.exit(zygote, 0);
    site.reap(&ZygotePids { known: vec![zygote], unknown: 0 });
    assert!(site.fake.any_ended());
    site.reap(&ZygotePids::default());
    assert!(!site.fake.any_ended(), "a stranger is reaped without a word");
}

#[test]
fn a_storm_of_children_that_end_leaves_turns_to_others() {
    let mut site = Site::new();
    for _ in 0..1000 {
        let stranger = site.fake.start();
        site.fake.exit(stranger, 0);
    }
    site.reap(&ZygotePids::default());
    assert!(site.fake.any_ended(), "others have their turn");
    let mut turns = 1;
    while site.fake.any_ended() {
        assert!(site.workers.next_deadline().is_some_and(|at| at <= site.now), "at once");
        site.workers.tick(site.now, &mut site.events);
        assert_eq!(site.events(), said(&[Event::ChildEnded]));
        site.reap(&ZygotePids::default());
        turns += 1;
    }
    assert!((5..100).contains(&turns), "{turns}");
    site.workers.tick(site.now, &mut site.events);
    site.events();
    assert_eq!(site.workers.next_deadline(), None);
}

#[test]
fn a_clients_answer_waits_for_the_program_of_a_dead_worker() {
    let mut site = Site::new();
    let others = site.serving(1, 4);
    let worker = others[0].id;
    site.wait(1..=1);
    let program = site.fake.start_under(others[0].pid);
    others[0].report(&Report::Child { job: JobId(1), pid: program.as_raw() });
    site.read(&others[0]);
    site.events();
    site.fake.exit(others[0].pid, 1);
    site.reap(&ZygotePids::default());
    assert_eq!(site.fake.signals(), [(program, Signal::SIGTERM)]);
    let expected =
        [Event::ProgramRuns { job: JobId(1), worker, flight: None }, Event::WorkerEnded(FIRST)];
    assert_eq!(site.events(), said(&expected));
    assert!(!site.workers.is_idle());
    site.reap(&ZygotePids::default());
    site.now += Duration::from_millis(1);
    site.workers.tick(site.now, &mut site.events);
    let ended = site.events();
    assert!(ended.contains(&format!("{:?}", Event::ProgramEnded(JobId(1)))), "{ended:?}");
}

#[test]
fn a_program_is_held_although_its_workers_end_is_not_seen_yet() {
    let mut site = Site::new();
    let others = site.serving(1, 4);
    site.wait(1..=1);
    let program = site.fake.start_under(others[0].pid);
    others[0].report(&Report::Child { job: JobId(1), pid: program.as_raw() });
    site.fake.leave(others[0].pid);
    site.fake.exit(program, 1);
    site.reap(&ZygotePids::default());
    assert!(site.fake.any_ended(), "its number still names the group");
    assert!(site.workers.orphans.concerns(JobId(1)));
}

#[test]
fn what_is_left_is_killed_when_the_drain_is_over() {
    let mut site = Site::new();
    let others = site.serving(2, 4);
    site.workers.kill_all(Programs::Spared, site.now, &mut site.events);
    let killed = others.iter().map(|other| (other.pid, Signal::SIGKILL)).collect::<Vec<_>>();
    assert_eq!(site.fake.signals(), killed);
}

#[test]
fn an_actions_own_time_limit_is_reported() {
    let mut site = Site::new();
    let others = site.serving(1, 4);
    site.wait(1..=1);
    site.events();
    others[0].report(&Report::Timeout { job: JobId(1), milliseconds: 5000 });
    site.read(&others[0]);
    let until = site.now + Duration::from_secs(5);
    assert_eq!(site.events(), said(&[Event::TimeLimitSet(until)]));
    assert_eq!(site.workers.latest_time_limit(), Some(until));
}

/// The log lines of a test.
#[derive(Debug, Clone, Default)]
struct Lines(std::sync::Arc<std::sync::Mutex<Vec<String>>>);

impl slog::Drain for Lines {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
        self.0.lock().expect("no panic").push(record.msg().to_string());
        Ok(())
    }
}

impl Site {
    /// A worker that serves and has one job, and its log.
    fn with_a_job() -> (Self, Other, Lines) {
        let lines = Lines::default();
        let mut site = Self::with_log(Logger::root(lines.clone(), slog::o!()));
        let other = site.serving(1, 4).pop().expect("one");
        site.wait(1..=1);
        site.events();
        (site, other, lines)
    }

    fn child(&mut self, other: &Other, pid: Pid) {
        other.report(&Report::Child { job: JobId(1), pid: pid.as_raw() });
    }

    /// The worker is ended, because of what it has told, and nobody else is signalled then or when
    /// it has ended.
    fn assert_ends_only(&mut self, other: &Other, lines: &Lines) {
        self.workers.tick(self.now, &mut self.events);
        assert_eq!(self.fake.signals(), [(other.pid, Signal::SIGKILL)]);
        let named = |line: &String| line.starts_with("worker killed: it ");
        assert!(lines.0.lock().expect("no panic").iter().any(named), "{lines:?}");
        self.reap(&ZygotePids::default());
        self.workers.kill_all(Programs::Killed, self.now, &mut self.events);
        self.now += Duration::from_secs(60);
        self.workers.tick(self.now, &mut self.events);
        self.reap(&ZygotePids::default());
        assert_eq!(self.fake.signals(), []);
        let events = self.events();
        let orphaned = Event::Orphaned { job: JobId(1), worker: other.id, flight: None };
        assert!(events.contains(&format!("{orphaned:?}")), "{events:?}");
    }
}

#[test]
fn a_worker_that_tells_a_process_which_is_none_of_its_programs_is_ended() {
    type Choice = fn(&Site, &Other) -> Pid;
    let choices: [(&str, Choice); 9] = [
        ("all processes", |_, _| Pid::from_raw(-1)),
        ("our group, as kill(2) says it", |_, _| Pid::from_raw(0)),
        ("init", |_, _| OUTSIDE),
        ("this process and its group", |site, _| site.fake.own_pid()),
        ("a neighbour of the same user", |site, _| site.fake.start_under(OUTSIDE)),
        ("itself", |_, other| other.pid),
        ("a sibling", |site, _| site.fake.start()),
        ("a program of its program", |site, other| {
            site.fake.start_under(site.fake.start_under(other.pid))
        }),
        ("what another program has left behind", |site, _| {
            site.fake.start_under(site.fake.own_pid())
        }),
    ];
    for (name, choice) in choices {
        let (mut site, other, lines) = Site::with_a_job();
        let pid = choice(&site, &other);
        site.child(&other, pid);
        site.read(&other);
        site.assert_ends_only(&other, &lines);
        if pid.as_raw() > 1 && pid != other.pid {
            assert!(site.fake.is_alive(pid), "{name}");
        }
    }
}

#[test]
fn a_worker_that_dies_right_after_its_lie_hurts_nobody() {
    let (mut site, other, lines) = Site::with_a_job();
    let neighbour = site.fake.start_under(OUTSIDE);
    site.child(&other, neighbour);
    site.fake.exit(other.pid, 1);
    site.reap(&ZygotePids::default());
    assert_eq!(site.fake.signals(), []);
    let named = |line: &String| line.starts_with("worker died with a false report: it ");
    assert!(lines.0.lock().expect("no panic").iter().any(named), "{lines:?}");
    assert!(site.workers.is_idle() && site.fake.is_alive(neighbour));
}

#[test]
fn the_number_of_a_program_that_was_reaped_in_silence_hurts_nobody() {
    for parent in [OUTSIDE, Fake::default().own_pid()] {
        let (mut site, other, _) = Site::with_a_job();
        let program = site.fake.start_under(other.pid);
        site.child(&other, program);
        site.read(&other);
        site.fake.reuse(program, parent, program);
        site.fake.exit(other.pid, 1);
        site.reap(&ZygotePids::default());
        assert_eq!(site.fake.signals(), [], "{parent}");
        assert!(site.fake.is_alive(program) && site.workers.is_idle());
    }
}

#[test]
fn a_program_that_is_gone_before_its_report_is_read_is_no_lie() {
    let (mut site, other, lines) = Site::with_a_job();
    let program = site.fake.start_under(other.pid);
    site.child(&other, program);
    other.report(&Report::ChildGone { job: JobId(1) });
    site.fake.reuse(program, OUTSIDE, program);
    site.read(&other);
    site.workers.tick(site.now, &mut site.events);
    assert_eq!(site.fake.signals(), []);
    assert!(!lines.0.lock().expect("no panic").iter().any(|line| line.contains("killed")));
}

#[test]
fn a_program_that_has_ended_and_is_not_reaped_is_its_workers() {
    let (mut site, other, _) = Site::with_a_job();
    let program = site.fake.start_under(other.pid);
    site.fake.exit(program, 0);
    site.child(&other, program);
    site.read(&other);
    site.workers.tick(site.now, &mut site.events);
    assert_eq!(site.fake.signals(), []);
    site.fake.exit(other.pid, 1);
    site.reap(&ZygotePids::default());
    assert_eq!(site.fake.signals(), [(program, Signal::SIGTERM)], "its group may live");
}

#[test]
fn a_second_program_and_a_program_that_never_was_are_lies() {
    let (mut site, other, lines) = Site::with_a_job();
    other.report(&Report::ChildGone { job: JobId(1) });
    site.read(&other);
    site.assert_ends_only(&other, &lines);

    let (mut site, other, lines) = Site::with_a_job();
    for _ in 0..2 {
        let program = site.fake.start_under(other.pid);
        site.child(&other, program);
    }
    site.read(&other);
    site.workers.tick(site.now, &mut site.events);
    assert_eq!(site.fake.signals(), [(other.pid, Signal::SIGKILL)]);
    assert!(lines.0.lock().expect("no panic").iter().any(|line| line.contains("beside another")));
}

#[test]
fn a_worker_may_tell_a_program_before_its_own_process_id_is_known() {
    let mut site = Site::new();
    let declaration =
        declared(Settings { workers: 1, worker_connections: 4, ..Settings::default() });
    site.workers.start(FIRST, &declaration, site.now, &mut site.events);
    let NewWorker { worker: id, jobs, control, .. } = site.missing().pop().expect("one");
    let pid = site.fake.start();
    let other = Other { id, pid, jobs: Channel::from_fd(jobs), control: Channel::from_fd(control) };
    other.report(&Report::Ready);
    site.read(&other);
    site.workers.switch(FIRST);
    site.wait(1..=1);
    let program = site.fake.start_under(pid);
    site.child(&other, program);
    site.read(&other);
    site.workers.forked(TELLER, id, pid, site.now, &mut site.events);
    site.fake.exit(pid, 1);
    site.reap(&ZygotePids::default());
    assert_eq!(site.fake.signals(), [(program, Signal::SIGTERM)]);
}

fn declared(settings: Settings) -> Declaration {
    Declaration { settings, ..Declaration::default() }
}

/// Starts a generation, and returns a worker whose process id nobody has told.
fn untold(site: &mut Site) -> NewWorker {
    let declaration = declared(Settings { workers: 1, ..Settings::default() });
    site.workers.start(FIRST, &declaration, site.now, &mut site.events);
    site.missing().pop().expect("one")
}

#[test]
fn a_zygote_that_tells_a_process_which_it_did_not_fork_is_not_believed() {
    type Choice = fn(&mut Site) -> Pid;
    let choices: [(&str, Choice); 7] = [
        ("all processes", |_| Pid::from_raw(-1)),
        ("our group, as kill(2) says it", |_| Pid::from_raw(0)),
        ("init", |_| OUTSIDE),
        ("this process", |site| site.fake.own_pid()),
        ("a neighbour", |site| site.fake.start_under(OUTSIDE)),
        ("what a program has left behind", |site| site.fake.start_under(site.fake.own_pid())),
        ("nobody", |site| {
            let pid = site.fake.start();
            site.fake.exit(pid, 0);
            site.fake.reap(pid);
            pid
        }),
    ];
    for (name, choice) in choices {
        let mut site = Site::new();
        let new = untold(&mut site);
        let pid = choice(&mut site);
        site.workers.forked(TELLER, new.worker, pid, site.now, &mut site.events);
        site.workers.standby_forked(TELLER, ZygoteId(2), pid, &mut site.events);
        let events = site.events();
        let lie = |event: &String| {
            event.starts_with("ZygoteLied { zygote: ZygoteId(1), complaint: \"it told")
        };
        assert!(events.len() == 2 && events.iter().all(lie), "{name}: {events:?}");
        site.workers.kill_all(Programs::Killed, site.now, &mut site.events);
        site.workers.close();
        assert_eq!(site.fake.signals(), [], "{name}");
    }
}

#[test]
fn a_zygote_that_tells_a_worker_twice_or_anothers_worker_is_not_believed() {
    let mut site = Site::new();
    let others = site.serving(2, 4);
    let pid = site.fake.start();
    let other = Teller { zygote: ZygoteId(9), generation: GenerationId(9) };
    let new = untold(&mut site);
    site.events();
    site.workers.forked(TELLER, others[0].id, pid, site.now, &mut site.events);
    site.workers.forked(other, new.worker, pid, site.now, &mut site.events);
    site.workers.forked(TELLER, new.worker, others[1].pid, site.now, &mut site.events);
    site.workers.refused(TELLER, others[0].id, site.now, &mut site.events);
    site.workers.refused(other, new.worker, site.now, &mut site.events);
    site.workers.standby_forked(TELLER, ZygoteId(2), others[0].pid, &mut site.events);
    let events = site.events();
    let lie = |event: &String| event.starts_with("ZygoteLied");
    assert!(events.len() == 6 && events.iter().all(lie), "{events:?}");
    assert_eq!(site.workers.worker_of(others[0].pid), Some(others[0].id));
    assert_eq!(site.workers.worker_of(pid), None);
}

#[test]
fn a_status_is_not_the_one_of_a_later_process_with_that_number() {
    let mut site = Site::new();
    let new = untold(&mut site);
    let pid = site.fake.start();
    site.fake.exit(pid, 1);
    site.reap(&ZygotePids::default());
    site.fake.reuse(pid, site.fake.own_pid(), site.fake.own_pid());
    site.workers.forked(TELLER, new.worker, pid, site.now, &mut site.events);
    assert_eq!(site.events(), Vec::<String>::new(), "the worker runs");
    site.workers.kill_all(Programs::Spared, site.now, &mut site.events);
    assert_eq!(site.fake.signals(), [(pid, Signal::SIGKILL)]);
}

#[test]
fn the_status_of_what_a_program_left_behind_is_not_a_workers() {
    let mut site = Site::new();
    let new = untold(&mut site);
    let left = site.fake.start_under(site.fake.own_pid());
    site.fake.exit(left, 1);
    site.reap(&ZygotePids::default());
    site.workers.forked(TELLER, new.worker, left, site.now, &mut site.events);
    let events = site.events();
    assert!(events.len() == 1 && events[0].starts_with("ZygoteLied"), "{events:?}");
}

/// Starts a process that waits: in the group of the test, as a worker, or as leader of its own.
fn waiting(group: Option<i32>) -> std::process::Child {
    use std::os::unix::process::CommandExt as _;
    let mut command = std::process::Command::new("/bin/sleep");
    command.arg("60");
    if let Some(group) = group {
        command.process_group(group);
    }
    command.spawn().expect("spawn")
}

#[test]
fn real_neighbours_of_a_lying_worker_live_on() {
    use std::os::unix::process::ExitStatusExt as _;
    let pid = |child: &std::process::Child| Pid::from_raw(child.id().cast_signed());
    let mut innocent = waiting(Some(0));
    let told = [nix::unistd::getpgrp(), nix::unistd::getppid(), Pid::this(), pid(&innocent)];
    for lie in told {
        let lines = Lines::default();
        let limits = Limits::now().expect("limits");
        let system = Rc::new(crate::system::Linux { level: slog::Level::Info, limits });
        let log = Logger::root(lines.clone(), slog::o!());
        let mut site = Site::over(system, Rc::default(), log);
        let NewWorker { worker: id, jobs, control, .. } = untold(&mut site);
        let mut worker = waiting(None);
        site.workers.forked(TELLER, id, pid(&worker), site.now, &mut site.events);
        assert_eq!(site.workers.worker_of(pid(&worker)), Some(id), "a child in our group");
        let (jobs, control) = (Channel::from_fd(jobs), Channel::from_fd(control));
        let other = Other { id, pid: pid(&worker), jobs, control };
        other.report(&Report::Ready);
        site.read(&other);
        site.workers.switch(FIRST);
        site.wait(1..=1);
        site.child(&other, lie);
        site.read(&other);
        site.workers.tick(site.now, &mut site.events);
        let status = worker.wait().expect("wait");
        assert_eq!(status.signal(), Some(Signal::SIGKILL as i32), "{lie}");
        let status = WaitStatus::Signaled(other.pid, Signal::SIGKILL, false);
        site.workers.ended(id, Some(status), site.now, &mut site.events);
        site.workers.kill_all(Programs::Killed, site.now, &mut site.events);
        assert!(site.workers.is_idle(), "no program was adopted");
        let named = |line: &String| line.contains(&format!("it told process id {lie}"));
        assert!(lines.0.lock().expect("no panic").iter().any(named), "{lines:?}");
        assert!(innocent.try_wait().expect("wait").is_none(), "{lie}");
    }
    innocent.kill().expect("kill");
    innocent.wait().expect("wait");
}

#[test]
fn a_real_process_in_another_group_is_no_worker() {
    let mut innocent = waiting(Some(0));
    let told = [nix::unistd::getppid().as_raw(), std::process::id().cast_signed(), 1, 0, -1];
    for pid in told.into_iter().chain([innocent.id().cast_signed()]) {
        let limits = Limits::now().expect("limits");
        let system = Rc::new(crate::system::Linux { level: slog::Level::Info, limits });
        let log = Logger::root(slog::Discard, slog::o!());
        let mut site = Site::over(system, Rc::default(), log);
        let new = untold(&mut site);
        site.workers.forked(TELLER, new.worker, Pid::from_raw(pid), site.now, &mut site.events);
        let events = site.events();
        assert!(events.len() == 1 && events[0].starts_with("ZygoteLied"), "{pid}: {events:?}");
        site.workers.close();
    }
    assert!(innocent.try_wait().expect("wait").is_none());
    innocent.kill().expect("kill");
    innocent.wait().expect("wait");
}

#[test]
fn a_job_has_one_time_limit_of_at_most_an_hour() {
    let (mut site, other, lines) = Site::with_a_job();
    other.report(&Report::Timeout { job: JobId(1), milliseconds: u64::MAX });
    site.read(&other);
    let until = site.now + Duration::from_secs(3600);
    assert_eq!(site.workers.latest_time_limit(), Some(until));
    assert_eq!(site.events(), said(&[Event::TimeLimitSet(until)]));
    site.now += Duration::from_secs(1);
    other.report(&Report::Timeout { job: JobId(1), milliseconds: u64::MAX });
    site.read(&other);
    assert_eq!(site.workers.latest_time_limit(), Some(until));
    site.assert_ends_only(&other, &lines);
}

#[test]
fn a_worker_that_floods_has_its_share_of_a_turn() {
    let mut site = Site::new();
    let other = site.serving(1, 200).pop().expect("one");
    site.wait(1..=150);
    site.events();
    for job in (1..=150).map(JobId) {
        other.report(&Report::Done { job, record: None });
    }
    let mut done = Vec::new();
    for _ in 0..3 {
        site.read(&other);
        done.push(site.events().len());
    }
    assert_eq!(done, [64, 64, 22]);
    site.read(&other);
    assert!(site.events().is_empty());
}

#[test]
fn the_last_words_of_a_worker_are_all_read() {
    let mut site = Site::new();
    let other = site.serving(1, 200).pop().expect("one");
    site.wait(1..=150);
    site.events();
    for job in (1..=150).map(JobId) {
        other.report(&Report::Done { job, record: None });
    }
    site.fake.exit(other.pid, 1);
    site.reap(&ZygotePids::default());
    let events = site.events();
    assert_eq!(events.iter().filter(|event| event.starts_with("Done(")).count(), 150);
    assert!(!events.iter().any(|event| event.starts_with("Orphaned")), "{events:?}");
}

/// Makes a report that no honest worker makes.
type Nonsense = fn(&mut Site, &Other);

#[test]
fn a_worker_that_reports_what_nothing_calls_for_is_ended() {
    let cases: [(&str, Nonsense); 5] = [
        ("ready again", |_, other| other.report(&Report::Ready)),
        ("a second program", |site, other| {
            for _ in 0..2 {
                let program = site.fake.start_under(other.pid);
                site.child(other, program);
                other.report(&Report::ChildGone { job: JobId(1) });
            }
        }),
        ("the end of no program", |_, other| other.report(&Report::ChildGone { job: JobId(1) })),
        ("a lost job that it doesn't have", |_, other| {
            other.report(&Report::Lost { job: JobId(2) });
        }),
        ("a time limit of no job", |_, other| {
            other.report(&Report::Timeout { job: JobId(2), milliseconds: 1 });
        }),
    ];
    for (name, report) in cases {
        let (mut site, other, lines) = Site::with_a_job();
        report(&mut site, &other);
        site.read(&other);
        println!("{name}");
        site.assert_ends_only(&other, &lines);
    }
}

#[test]
fn a_worker_whose_datagrams_have_more_reports_than_any_workers_is_ended() {
    for (reports, ends) in [(8, false), (9, true)] {
        let mut site = Site::new();
        let other = site.serving(1, 16).pop().expect("one");
        site.wait(1..=16);
        let mut batch = Batch::default();
        for job in (1..=reports).map(JobId) {
            batch.push(&Report::Done { job, record: None }).expect("room");
        }
        other.jobs.try_send_batch(&batch, &[]).expect("the supervisor reads");
        site.read(&other);
        site.workers.tick(site.now, &mut site.events);
        assert_eq!(!site.fake.signals().is_empty(), ends, "{reports}");
    }
}

#[test]
fn a_worker_that_answers_more_pings_than_it_got_is_ended() {
    let (mut site, other, lines) = Site::with_a_job();
    let pong = Pong { sequence: 1, ..Pong::default() };
    site.workers.ping(other.id, 1);
    other.control.try_send(&pong, &[]).expect("the supervisor reads");
    site.workers.on_pong(other.id, site.now, &mut site.events);
    site.workers.tick(site.now, &mut site.events);
    assert_eq!(site.fake.signals(), []);
    other.control.try_send(&pong, &[]).expect("the supervisor reads");
    site.workers.on_pong(other.id, site.now, &mut site.events);
    site.assert_ends_only(&other, &lines);
}

#[test]
fn a_worker_that_tells_too_much_of_its_databases_is_ended() {
    let long = DatabaseState { name: "x".repeat(129), ..DatabaseState::default() };
    for databases in [vec![DatabaseState::default(); 17], vec![long]] {
        let (mut site, other, lines) = Site::with_a_job();
        site.workers.ping(other.id, 1);
        let pong = Pong { sequence: 1, databases, ..Pong::default() };
        other.control.try_send(&pong, &[]).expect("the supervisor reads");
        site.workers.on_pong(other.id, site.now, &mut site.events);
        site.assert_ends_only(&other, &lines);
    }
}

#[test]
fn a_worker_may_ask_the_dictionaries_until_its_end_or_its_lie() {
    let mut site = Site::new();
    let declaration = declared(Settings { workers: 2, ..Settings::default() });
    site.workers.start(FIRST, &declaration, site.now, &mut site.events);
    let askers = |site: &Site| {
        let asker = |event: &Event| match event {
            Event::AskerCame(new) => Some((new.asker, "came")),
            Event::AskerGone(asker) => Some((*asker, "gone")),
            _ => None,
        };
        site.events.iter().filter_map(asker).collect::<Vec<_>>()
    };
    let workers = [1, 2].map(|number| Asker::Worker(WorkerId(number)));
    assert_eq!(askers(&site), workers.map(|worker| (worker, "came")));
    let others = site.fork();
    site.events.clear();
    site.workers.worker_lied(others[0].id, "it lied", site.now, &mut site.events);
    assert_eq!(askers(&site), [(workers[0], "gone")]);
    site.workers.tick(site.now, &mut site.events);
    assert_eq!(site.fake.signals(), [(others[0].pid, Signal::SIGKILL)]);
    site.events.clear();
    site.fake.exit(others[1].pid, 1);
    site.reap(&ZygotePids::default());
    assert!(askers(&site).contains(&(workers[1], "gone")));
}
