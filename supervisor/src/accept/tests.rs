//! Who is let in, who is answered, and what the owner of connections tells the others.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};

use qrelay_shared::settings::{ListenerDecl, Settings};

use super::*;
use crate::watch::Poller;

const FIRST: GenerationId = GenerationId(1);
const SECOND: GenerationId = GenerationId(2);
const WORKER: WorkerId = WorkerId(1);

/// Checks that the test of the daemon makes between two turns.
impl Acceptor {
    /// Panics if what is counted twice doesn't agree.
    pub(crate) fn assert_consistent(&self) {
        self.connections.assert_consistent();
    }

    /// Returns the connections that wait for a worker.
    pub(crate) fn waiting_jobs(&self) -> BTreeSet<JobId> {
        let waiting = self.connections.unserved().filter(|(_, c)| c.state == State::Waiting);
        waiting.map(|(job, _)| job).collect()
    }

    /// Returns the connections that workers have.
    pub(crate) fn dispatched_jobs(&self) -> BTreeMap<JobId, WorkerId> {
        self.connections.with_workers().collect()
    }

    /// Returns whether the current generation accepts on this address.
    pub(crate) fn is_open(&self, address: &ListenAddress) -> bool {
        let Some((current, _)) = self.current else { return false };
        self.intake != Intake::Over
            && self
                .listeners
                .with(current)
                .iter()
                .any(|&id| self.listeners.get(id).is_some_and(|listener| listener.serves(address)))
    }
}

/// An acceptor, the poller that it is watched by, and the queue that it fills.
struct Site {
    name: &'static str,
    poller: Poller,
    acceptor: Acceptor,
    events: Events,
    now: Instant,
}

impl Site {
    /// An acceptor for which nothing listens yet.
    fn empty(name: &'static str) -> Self {
        Self::of(name, 65_536)
    }

    fn of(name: &'static str, descriptors: u64) -> Self {
        let poller = Poller::new().expect("epoll");
        let log = Logger::root(slog::Discard, slog::o!());
        let acceptor =
            Acceptor::new(log, poller.watcher(), Vec::new(), descriptors).expect("no sockets");
        Self { name, poller, acceptor, events: Events::new(), now: Instant::now() }
    }

    /// The first generation listens at place 0.
    fn serving(name: &'static str, settings: Settings) -> Self {
        let mut site = Self::empty(name);
        site.switch(FIRST, None, &[0], settings);
        assert!(site.events().is_empty());
        site
    }

    fn address(&self, place: u32) -> Vec<u8> {
        format!("qrelay-accept-{}-{}-{place}", self.name, std::process::id()).into_bytes()
    }

    fn declaration(&self, places: &[u32], settings: Settings) -> Declaration {
        let listener = |&place: &u32| ListenerDecl {
            address: ListenAddress::Abstract(self.address(place)),
            mode: 0o600,
            owner: None,
            group: None,
            backlog: 128,
            max_size: 1 << 20,
            allow: None,
        };
        Declaration {
            listeners: places.iter().map(listener).collect(),
            settings,
            ..Declaration::default()
        }
    }

    fn switch(
        &mut self,
        new: GenerationId,
        old: Option<GenerationId>,
        places: &[u32],
        settings: Settings,
    ) {
        let declaration = self.declaration(places, settings);
        self.acceptor.listen(new, &declaration, &mut self.events);
        assert!(matches!(self.events.pop_front(), Some(Event::Listening(id)) if id == new));
        self.acceptor.switch((new, &declaration), old, self.now, &mut self.events);
    }

    fn connect(&self, place: u32, request: &[u8]) -> UnixStream {
        let address = SocketAddr::from_abstract_name(self.address(place)).expect("a name");
        let mut stream = UnixStream::connect_addr(&address).expect("a listener");
        stream.set_nonblocking(true).expect("non-blocking");
        stream.write_all(request).expect("a socket");
        stream
    }

    /// Lets the acceptor read what is ready.
    fn poll(&mut self) {
        let mut sources = Vec::new();
        self.poller.wait(Duration::ZERO, &mut sources).expect("epoll_wait");
        for source in sources {
            match source {
                crate::watch::Source::Listener(id) => {
                    self.acceptor.on_listener(id, self.now, &mut self.events);
                }
                crate::watch::Source::Connection(job) => {
                    self.acceptor.on_connection(job, self.now, &mut self.events);
                }
                other => panic!("{other:?}"),
            }
        }
        self.acceptor.assert_consistent();
    }

    fn events(&mut self) -> Vec<String> {
        let shown = |event| match event {
            Event::Unserved(client) => unserved(client.job.0, client.cause),
            event => format!("{event:?}"),
        };
        self.events.drain(..).map(shown).collect()
    }

    /// The jobs that wait for a worker.
    fn waiting(&self) -> Vec<JobId> {
        self.acceptor.waiting_jobs().into_iter().collect()
    }
}

fn answer(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    // An end after the answer, or nothing more for now.
    let _ = stream.read_to_string(&mut text);
    text
}

fn client() -> Client {
    Client::Uid(nix::unistd::getuid().as_raw())
}

/// The event of a client that no worker serves, in short.
fn unserved(job: u64, cause: &str) -> String {
    format!("unserved {job}: {cause}")
}

fn ready(job: u64) -> String {
    format!("{:?}", Event::Ready { job: JobId(job), client: client() })
}

#[test]
fn a_silent_client_that_can_not_be_watched_waits_for_a_worker() {
    let mut site = Site::serving("unwatched", Settings::default());
    site.poller.watcher().full.set(true);
    let (_first, _second) = (site.connect(0, b""), site.connect(0, b""));
    site.poll();
    let ready = |job| {
        let client = Client::Uid(nix::unistd::getuid().as_raw());
        format!("{:?}", Event::Ready { job: JobId(job), client })
    };
    assert_eq!(site.events(), [ready(1), ready(2)]);
    let _third = site.connect(0, b"x");
    site.poll();
    assert_eq!(site.events(), [ready(3)], "the listener is still watched");
}

#[test]
fn a_client_waits_for_a_worker_as_soon_as_it_has_spoken() {
    let mut site = Site::serving("spoken", Settings::default());
    let _first = site.connect(0, b"x");
    let mut second = site.connect(0, b"");
    site.poll();
    assert_eq!(site.events(), [ready(1)]);
    second.write_all(b"x").expect("a socket");
    site.poll();
    assert_eq!(site.events(), [ready(2)]);
    assert_eq!(site.waiting(), [JobId(1), JobId(2)]);
    assert!(!site.acceptor.is_idle());
    site.acceptor.dispatched(JobId(1), WORKER);
    site.acceptor.dispatched(JobId(2), WORKER);
    assert!(site.acceptor.is_idle() && site.waiting().is_empty());
}

#[test]
fn a_client_that_leaves_before_it_speaks_is_forgotten() {
    let mut site = Site::serving("leaves", Settings::default());
    drop(site.connect(0, b""));
    let second = site.connect(0, b"");
    site.poll();
    drop(second);
    site.poll();
    assert!(site.events().is_empty() && site.acceptor.is_idle());
}

#[test]
fn times_are_limited_before_a_worker_has_the_connection() {
    let mut site = Site::serving("times", Settings::default());
    let settings = Settings::default();
    let (mut silent, mut waits) = (site.connect(0, b""), site.connect(0, b"x"));
    site.poll();
    site.events();
    site.acceptor.settle(site.now, &mut site.events);
    assert_eq!(site.acceptor.next_deadline(), Some(site.now + settings.client_timeout));
    let late = site.now + settings.client_timeout;
    site.acceptor.tick(late, &mut site.events);
    assert!(answer(&mut silent).contains("Zrequest timed out"));
    assert!(site.events().is_empty());
    let late = site.now + settings.relay_timeout;
    site.acceptor.tick(late, &mut site.events);
    assert!(answer(&mut waits).contains("Ztry again later"));
    let given_up = Event::GivenUp { job: JobId(2), client: client() };
    let unserved = unserved(2, "no worker was free in time");
    assert_eq!(site.events(), [format!("{given_up:?}"), unserved]);
}

#[test]
fn one_uid_has_no_more_connections_than_it_may() {
    let settings = Settings { max_connections_per_uid: 1, ..Settings::default() };
    let mut site = Site::serving("limit", settings);
    let _first = site.connect(0, b"x");
    site.poll();
    let mut second = site.connect(0, b"x");
    site.poll();
    assert_eq!(site.events(), [ready(1), unserved(2, "max_connections_per_uid")]);
    assert!(answer(&mut second).contains("Ztry again later"));
}

#[test]
fn a_dead_workers_client_is_answered_once_its_program_has_ended() {
    let mut site = Site::serving("orphan", Settings::default());
    let (mut first, mut second) = (site.connect(0, b"x"), site.connect(0, b"x"));
    site.poll();
    site.events();
    for job in [JobId(1), JobId(2)] {
        site.acceptor.dispatched(job, WORKER);
    }
    let (now, events) = (site.now, &mut site.events);
    site.acceptor.orphaned((JobId(1), WORKER), ProgramState::Ended, None, now, events);
    site.acceptor.orphaned((JobId(2), WORKER), ProgramState::Runs, None, now, events);
    let lost = |event: Event| match event {
        Event::MailLost(mail) => Some((mail.job, mail.answer)),
        _ => None,
    };
    let lost: Vec<_> = site.events.drain(..).map(lost).collect();
    let told = |job| Some((JobId(job), LostAnswer::TryAgain));
    assert_eq!(lost, [told(1), told(2)]);
    assert!(answer(&mut first).contains("Ztry again later"));
    assert_eq!(answer(&mut second), "");
    site.acceptor.program_ended(JobId(2), site.now);
    assert!(answer(&mut second).contains("Ztry again later"));
}

#[test]
fn a_worker_may_have_answered_just_before_it_died() {
    let mut site = Site::serving("answered", Settings::default());
    let mut stream = site.connect(0, b"x");
    site.poll();
    site.acceptor.dispatched(JobId(1), WORKER);
    site.events();
    let socket = site.acceptor.socket(JobId(1)).expect("a socket").try_clone_to_owned();
    let mut workers = UnixStream::from(socket.expect("a descriptor"));
    workers.write_all(b"3:Kok,").expect("a socket");
    workers.shutdown(std::net::Shutdown::Write).expect("a socket");
    site.acceptor.orphaned(
        (JobId(1), WORKER),
        ProgramState::Ended,
        None,
        site.now,
        &mut site.events,
    );
    let answered = match site.events.pop_front() {
        Some(Event::MailLost(mail)) => mail.answer,
        other => panic!("{other:?}"),
    };
    assert_eq!(answered, LostAnswer::Unknown);
    assert_eq!(answer(&mut stream), "3:Kok,");
}

#[test]
fn a_stop_accepts_the_backlog_before_it_says_that_nobody_waits() {
    let mut site = Site::serving("stop", Settings::default());
    let _streams: Vec<_> = (0..100).map(|_| site.connect(0, b"x")).collect();
    site.acceptor.stop(site.now, &mut site.events);
    let expected: Vec<_> = (1..=100).map(ready).collect();
    assert_eq!(site.events(), expected, "more than one batch");
    site.acceptor.settle(site.now, &mut site.events);
    assert!(site.events().is_empty(), "they wait for a worker");
    for job in site.waiting() {
        site.acceptor.dispatched(job, WORKER);
    }
    site.acceptor.settle(site.now, &mut site.events);
    assert_eq!(site.events(), [format!("{:?}", Event::BacklogTaken(FIRST))]);
    site.acceptor.settle(site.now, &mut site.events);
    assert!(site.events().is_empty(), "once");
    let address = SocketAddr::from_abstract_name(site.address(0)).expect("a name");
    assert!(UnixStream::connect_addr(&address).is_err());
}

#[test]
fn the_backlog_of_a_listener_that_is_gone_is_for_the_old_generation() {
    let mut site = Site::empty("gone");
    site.switch(FIRST, None, &[0, 1], Settings::default());
    let _kept = site.connect(0, b"x");
    let _accepted = site.connect(1, b"x");
    site.poll();
    assert_eq!(site.events().len(), 2);
    let (_backlog, mut silent) = (site.connect(1, b"x"), site.connect(1, b""));
    site.switch(SECOND, Some(FIRST), &[0], Settings::default());
    let of = |event: &Event| match *event {
        Event::Bound { job, generation, .. } => Some((job, generation)),
        _ => None,
    };
    let bound: BTreeSet<_> = site.events.iter().filter_map(of).collect();
    let accepted = *bound.first().expect("the accepted one");
    assert_eq!(bound.len(), 2, "what was accepted before, and what was in the backlog");
    assert!(bound.iter().all(|&(_, generation)| generation == FIRST));
    site.events();
    for (job, _) in bound {
        assert_eq!(site.acceptor.job(job, FIRST).expect("a job").listener, 1);
        site.acceptor.dispatched(job, WORKER);
    }
    site.acceptor.settle(site.now, &mut site.events);
    assert!(site.events().is_empty(), "a silent client may still speak");
    silent.write_all(b"x").expect("a socket");
    site.poll();
    let job = JobId(4);
    assert!(accepted.0 < job);
    let expected = Event::Bound { job, client: client(), generation: FIRST };
    assert_eq!(site.events(), [format!("{expected:?}")]);
    site.acceptor.dispatched(job, WORKER);
    site.acceptor.settle(site.now, &mut site.events);
    assert_eq!(site.events(), [format!("{:?}", Event::BacklogTaken(FIRST))]);
}

#[test]
fn a_generation_that_serves_after_the_stop_ends_as_well() {
    let mut site = Site::serving("late", Settings::default());
    let declaration = site.declaration(&[0, 1], Settings::default());
    site.acceptor.listen(SECOND, &declaration, &mut site.events);
    site.acceptor.stop(site.now, &mut site.events);
    let new = (SECOND, &declaration);
    site.acceptor.switch(new, Some(FIRST), site.now, &mut site.events);
    site.events();
    site.acceptor.settle(site.now, &mut site.events);
    let expected = [FIRST, SECOND].map(Event::BacklogTaken);
    assert_eq!(site.events(), expected.map(|event| format!("{event:?}")));
    let address = SocketAddr::from_abstract_name(site.address(1)).expect("a name");
    assert!(UnixStream::connect_addr(&address).is_err());
}

#[test]
fn after_a_failed_dispatch_nothing_is_accepted_until_a_job_is_done() {
    let mut site = Site::serving("pause", Settings::default());
    let _first = site.connect(0, b"x");
    site.poll();
    site.events();
    site.acceptor.dispatched(JobId(1), WORKER);
    site.acceptor.dispatch_failed("ETOOMANYREFS", site.now);
    let _second = site.connect(0, b"x");
    site.poll();
    assert!(site.events().is_empty());
    assert_eq!(site.acceptor.next_deadline(), Some(site.now + DISARM));
    site.acceptor.done(JobId(1), site.now);
    site.poll();
    assert_eq!(site.events(), [ready(2)]);
}

/// Serves as many connections that have sent `request` as may be held, and one that comes late and
/// has sent a byte. Returns what each of them is told.
fn overfull(name: &'static str, request: &[u8]) -> (Site, Vec<String>) {
    let settings = Settings { workers: 2, ..Settings::default() };
    let descriptors = 137;
    let mut site = Site::of(name, descriptors);
    let held = allot(descriptors, &site.declaration(&[0], settings.clone())).held;
    site.switch(FIRST, None, &[0], settings);
    let mut streams: Vec<_> = (0..held).map(|_| site.connect(0, request)).collect();
    // A half is accepted at a time.
    site.poll();
    site.poll();
    assert_eq!(site.acceptor.connections.held(), held);
    site.events();
    streams.push(site.connect(0, b"x"));
    site.poll();
    assert!(site.acceptor.connections.held() <= held);
    let told = streams.iter_mut().map(answer).collect();
    (site, told)
}

#[test]
fn who_comes_late_takes_the_place_of_the_one_that_has_been_silent_for_longest() {
    let (mut site, told) = overfull("evict", b"");
    let (first, others) = told.split_first().expect("answers");
    assert!(first.contains("Ztry again later"), "{told:?}");
    assert!(others.iter().all(String::is_empty), "{told:?}");
    assert_eq!(site.events(), [ready(23)]);
}

#[test]
fn of_those_that_wait_the_last_one_gives_way() {
    let (mut site, told) = overfull("evict_waiting", b"x");
    let (late, first) = told.split_last().expect("answers");
    assert!(first.iter().all(String::is_empty), "{told:?}");
    assert!(late.contains("Ztry again later"), "{told:?}");
    let given_up = format!("{:?}", Event::GivenUp { job: JobId(23), client: client() });
    let expected = [ready(23), given_up, unserved(23, "gave way to other clients")];
    assert_eq!(site.events(), expected);
}

#[test]
fn a_listener_that_cannot_be_bound_fails_the_generation_only() {
    let mut site = Site::serving("in_use", Settings::default());
    let other = Site::serving("in_use_2", Settings::default());
    let mut declaration = site.declaration(&[0, 1], Settings::default());
    declaration.listeners[1].address = ListenAddress::Abstract(other.address(0));
    site.acceptor.listen(SECOND, &declaration, &mut site.events);
    let failed = matches!(site.events.pop_front(), Some(Event::ListenFailed(SECOND, _)));
    assert!(failed);
    let _stream = site.connect(0, b"x");
    site.poll();
    assert_eq!(site.events(), [ready(1)]);
}
