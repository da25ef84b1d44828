//! The supervisor's life: start, serve, reload, stop.
//!
//! `Daemon` owns the five owners, the queue of events, and the phase of life. A turn of the loop
//! reads what is ready and does what is due, hands every event to the owners concerned until none
//! is left, passes waiting connections to workers, and then ends what no connection waits for.
//!
//! # Failure
//! Before READY, a failure ends the start with one message and an exit status. Afterwards only
//! SIGTERM, SIGINT and `qrelay stop` end the daemon, or an epoll instance that fails.

mod commands;

use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::prctl;
use qrelay_shared::admin::{self, State};
use qrelay_shared::exit::Exit;
use qrelay_shared::ipc::message::MailRecord;
use qrelay_shared::log::Patience;
use qrelay_shared::settings::Account;
use qrelay_shared::sys::activation::{self, Passed};
use qrelay_shared::sys::inherited;
use qrelay_shared::sys::limits::{self, Limits};
use qrelay_shared::sys::title;
use slog::{Level, Logger, error, info, warn};

use crate::accept::{Acceptor, ProgramState, SocketFile};
use crate::admin::Admin;
use crate::event::{Asker, Event, Events, Programs};
use crate::generations::{Loading, Rollout};
use crate::ids::{JobId, WorkerId};
use crate::services::Services;
use crate::signals::{Caught, Signals};
use crate::system::{Linux, System};
use crate::watch::{Poller, Source};
use crate::workers::Workers;

/// How often the daemon looks for children that have ended, even if no signal says that one has: a
/// signal can get lost, for example when a debugger swallows it.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long after the end of a drain what is left is killed again.
const KILL_AGAIN: Duration = Duration::from_millis(100);

/// Options of the command line.
#[derive(Debug, Clone)]
pub struct Options {
    /// Absolute path of config.lua.
    pub config: PathBuf,
    /// Least severe level that is logged.
    pub level: Level,
    /// How long a script may take to declare itself.
    pub boot_timeout: Duration,
    /// The control socket.
    pub control: Control,
    /// The account that zygotes become before they run the script.
    pub account: Option<Account>,
}

/// Where the daemon listens for administrators' commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// At this path; if that isn't possible, the daemon doesn't start.
    At(PathBuf),
    /// At this path, if that is possible.
    Preferably(PathBuf),
    /// Nowhere.
    Off,
}

/// Where the daemon is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No generation has served yet.
    Starting,
    /// A generation serves, and systemd has been told READY.
    Serving,
    /// Mails under way are finished; workers that are left at the deadline are killed.
    Draining { deadline: Instant },
    /// The time for the drain is over: what is left is killed, and killed again at `again`.
    Killing { again: Instant, programs: Programs },
    /// Nothing is left to do.
    Ended(Exit),
}

/// The supervisor.
#[derive(Debug)]
struct Daemon {
    log: Logger,
    phase: Phase,
    events: Events,
    acceptor: Acceptor,
    workers: Workers,
    rollout: Rollout,
    services: Services,
    admin: Admin,
    /// The file of the control socket.
    control: Option<SocketFile>,
    started: Instant,
    /// The same moment as a number of seconds since the epoch.
    born: f64,
    config: PathBuf,
    instance: String,
    system: Rc<dyn System>,
    /// When the daemon looks for children that have ended.
    next_look: Instant,
}

/// Runs the daemon to its end.
pub fn run(options: Options) -> Exit {
    // A reload may be requested as soon as the process is there.
    let caught = Caught::catch().map_err(|error| format!("signals: {error}"));
    // Passed sockets are taken before anything is opened, because a wrong LISTEN_FDS must name no
    // descriptor of this process.
    let passed = inherited::discard()
        .map_err(|errno| format!("the launcher's descriptors can't be closed: {errno}"))
        .and_then(|()| activation::take());
    let log = qrelay_shared::log::init(options.level, "qrelay", Patience::None);
    let inherited = caught.and_then(|caught| Ok((caught, passed?)));
    match inherited.and_then(|inherited| start(options, inherited, log.clone())) {
        Ok((daemon, poller, signals)) => daemon.serve(poller, signals),
        Err(message) => {
            error!(log, "cannot start: {message}");
            Exit::System
        }
    }
}

/// Takes over signals and the passed sockets, and begins with the first generation.
fn start(
    options: Options,
    (caught, passed): (Caught, Vec<Passed>),
    log: Logger,
) -> Result<(Daemon, Poller, Signals), String> {
    // Neither a worker nor another process of the same user can trace the supervisor, read its
    // memory or take its descriptors.
    prctl::set_dumpable(false).map_err(|error| format!("PR_SET_DUMPABLE: {error}"))?;
    prctl::set_child_subreaper(true).map_err(|error| format!("PR_SET_CHILD_SUBREAPER: {error}"))?;
    // Only what ps shows depends on it.
    let _ = prctl::set_name(c"qrelay");
    title::set("qrelay: supervisor");
    let limits = own_limits(&log).map_err(|error| format!("limits: {error}"))?;
    let signals = Signals::new(caught).map_err(|error| format!("signals: {error}"))?;
    let poller = Poller::new().map_err(|error| format!("epoll: {error}"))?;
    let watcher = poller.watcher();
    watcher.add(&signals, Source::Signals).map_err(|error| format!("epoll: {error}"))?;
    let system = Rc::new(Linux { level: options.level, limits });
    let acceptor = Acceptor::new(log.clone(), watcher, passed, system.descriptor_limit())
        .map_err(|error| error.to_string())?;
    let now = Instant::now();
    let mut daemon = Daemon::new(&options, log, acceptor, &poller, system, now);
    daemon.listen_for_commands(&options.control)?;
    daemon.boot(now);
    Ok((daemon, poller, signals))
}

/// Sets the limits of this process and of all zygotes and workers. Returns the limits before, which
/// programs get.
fn own_limits(log: &Logger) -> nix::Result<Limits> {
    let original = Limits::now()?;
    if let Err(errno) = limits::raise_descriptors() {
        warn!(log, "the limit of descriptors can't be raised"; "error" => errno.desc());
    }
    if let Err(errno) = limits::forbid_core_dumps() {
        warn!(log, "core dumps that go to a program are possible, and they contain mail; \
            set LimitCORE=1 or the hard limit to 1"; "error" => errno.desc());
    }
    Ok(original)
}

impl Daemon {
    fn new(
        options: &Options,
        log: Logger,
        acceptor: Acceptor,
        poller: &Poller,
        system: Rc<dyn System>,
        now: Instant,
    ) -> Self {
        info!(log, "qrelay {} starts", env!("CARGO_PKG_VERSION");
            "config" => options.config.display());
        let watcher = poller.watcher();
        let descriptors = system.descriptor_limit();
        let instance = instance();
        let loading = Loading {
            config: options.config.clone(),
            boot_timeout: options.boot_timeout,
            instance: instance.clone(),
            account: options.account.clone(),
            passed: acceptor.passed_names(),
        };
        Self {
            phase: Phase::Starting,
            events: Events::new(),
            acceptor,
            workers: Workers::new(
                log.clone(),
                instance.clone(),
                watcher.clone(),
                Rc::clone(&system),
            ),
            rollout: Rollout::new(log.clone(), loading, watcher.clone(), Rc::clone(&system)),
            admin: Admin::new(log.clone(), watcher.clone(), Rc::clone(&system), now),
            control: None,
            services: Services::new(log.clone(), instance.clone(), watcher, descriptors, now),
            log,
            started: now,
            born: admin::now(),
            config: options.config.clone(),
            instance,
            system,
            next_look: now + LOOK_AGAIN,
        }
    }

    /// Begins with the first generation.
    fn boot(&mut self, now: Instant) {
        self.rollout.boot(now, &mut self.events);
        self.settle(now);
    }

    /// The event loop.
    fn serve(mut self, mut poller: Poller, mut signals: Signals) -> Exit {
        let mut sources = Vec::new();
        loop {
            if let Phase::Ended(exit) = self.phase {
                self.clean_up(exit);
                // The end of the process closes what is left. Only then no close waits, whatever
                // clients and workers have passed.
                std::mem::forget(self);
                return exit;
            }
            let now = Instant::now();
            let timeout = self.next_deadline().saturating_duration_since(now);
            if let Err(error) = poller.wait(timeout, &mut sources) {
                error!(self.log, "epoll_wait: {error}");
                self.phase = Phase::Ended(Exit::System);
            }
            let now = Instant::now();
            for source in sources.drain(..) {
                match source {
                    Source::Signals => self.on_signals(&mut signals),
                    other => self.on_source(other, now),
                }
                self.settle(now);
            }
            self.turn(Instant::now());
        }
    }

    /// Turns the signals that have come into events.
    fn on_signals(&mut self, signals: &mut Signals) {
        let pending = signals.take();
        let events = [
            (pending.child, Event::ChildEnded),
            (pending.stop, Event::StopRequested),
            (pending.reload, Event::ReloadRequested),
            (pending.status, Event::StatusRequested),
        ];
        self.events.extend(events.into_iter().filter(|(came, _)| *came).map(|(_, event)| event));
    }

    /// Has the owner of a descriptor read what is ready.
    fn on_source(&mut self, source: Source, now: Instant) {
        let Self { events, acceptor, workers, rollout, services, admin, .. } = self;
        match source {
            Source::Signals => {}
            Source::Listener(id) => acceptor.on_listener(id, now, events),
            Source::Connection(job) => acceptor.on_connection(job, now, events),
            Source::Jobs(worker) => {
                workers.on_reports(worker, now, &mut recorder(services, acceptor, now), events);
            }
            Source::Control(worker) => workers.on_pong(worker, now, events),
            Source::Zygote(zygote) => rollout.on_zygote(zygote, now, events),
            Source::Dictionary(channel) => services.on_dictionary(channel, now, events),
            Source::AdminListener => admin.on_listener(now),
            Source::Admin(client) => admin.on_client(client, now),
        }
    }

    /// Does what is due, and what follows from what has happened: first every event, then the
    /// dispatch of waiting connections, and only then the end of what no connection waits for.
    fn turn(&mut self, now: Instant) {
        if self.next_look <= now {
            self.next_look = now + LOOK_AGAIN;
            self.events.push_back(Event::ChildEnded);
            self.settle(now);
        }
        self.services.tick(self.workers.in_flight(), now);
        self.acceptor.tick(now, &mut self.events);
        self.workers.tick(now, &mut self.events);
        self.rollout.tick(now, &mut self.events);
        self.admin.tick(now, &mut self.events);
        self.settle(now);
        self.workers.dispatch(&self.acceptor, &mut self.events);
        self.settle(now);
        self.acceptor.settle(now, &mut self.events);
        self.settle(now);
        self.tick(now);
        self.settle(now);
    }

    /// Hands on events until none is left.
    fn settle(&mut self, now: Instant) {
        while let Some(event) = self.events.pop_front() {
            self.on_event(event, now);
        }
    }

    /// Hands one event to the owners concerned.
    fn on_event(&mut self, event: Event, now: Instant) {
        let Self { events, acceptor, workers, rollout, services, admin, .. } = self;
        match event {
            Event::ChildEnded => self.reap(now),
            Event::ReloadRequested => self.reload(now),
            Event::StopRequested => self.stop(now),
            Event::StatusRequested => self.log_status(now),
            Event::DrainEnded(programs) => {
                acceptor.give_up(now, events);
                workers.kill_all(programs, now, events);
            }

            Event::Ready { job, client } => workers.ready(job, client),
            Event::Bound { job, client, generation } => workers.bound(job, client, generation),
            Event::GivenUp { job, client } => workers.given_up(job, client),
            Event::BacklogTaken(generation) => workers.retire(generation, now, events),
            Event::Dispatched { job, worker } => acceptor.dispatched(job, worker),
            Event::Unservable(job) => acceptor.unservable(job, now, events),
            Event::DispatchFailed(error) => acceptor.dispatch_failed(&error.to_string(), now),
            Event::Done(job) => acceptor.done(job, now),
            Event::SocketLost(job) => acceptor.socket_lost(job, now, events),
            Event::ProgramEnded(job) => acceptor.program_ended(job, now),
            Event::Orphaned { job, worker, flight } => {
                acceptor.orphaned((job, worker), ProgramState::Ended, flight, now, events);
            }
            Event::ProgramRuns { job, worker, flight } => {
                acceptor.orphaned((job, worker), ProgramState::Runs, flight, now, events);
            }
            Event::MailLost(mail) => services.mail_lost(&mail, now),
            Event::Unserved(client) => services.unserved(&client, now),
            Event::TimeLimitSet(until) => self.extend_drain(until),
            Event::AskerCame(new) => services.asker_came(new),
            Event::AskerGone(asker) => services.asker_gone(asker),
            Event::AskerLied { asker: Asker::Worker(worker), complaint } => {
                workers.worker_lied(worker, complaint, now, events);
            }
            Event::AskerLied { asker: Asker::Zygote(zygote), complaint } => {
                rollout.zygote_lied(zygote, complaint, now, events);
            }

            Event::WorkerMissing(new) => rollout.fork_worker(&new, now, events),
            Event::WorkerForked { teller, worker, pid } => {
                workers.forked(teller, worker, pid, now, events);
            }
            Event::WorkerRefused { teller, worker } => {
                workers.refused(teller, worker, now, events);
            }
            Event::WorkerNotForked(worker) => workers.not_forked(worker, now, events),
            Event::WorkerReady(generation) => rollout.worker_ready(generation, now, events),
            Event::WorkerFailed(generation) => rollout.worker_failed(generation, now, events),
            Event::WorkerEnded(generation) => workers.finish(generation, now, events),
            Event::Drained(generation) => rollout.drained(generation, now, events),

            Event::Declared(generation) => {
                if let Some(declaration) = rollout.starting(generation) {
                    services.declared(generation, declaration);
                    acceptor.listen(generation, declaration, events);
                }
            }
            Event::Listening(generation) => {
                if let Some(declaration) = rollout.starting(generation) {
                    workers.start(generation, declaration, now, events);
                }
            }
            Event::ListenFailed(generation, message) => {
                rollout.fail(generation, (Exit::System, message), now, events);
            }
            Event::Abandoned(generation) => {
                acceptor.abandon(generation);
                workers.abandon(generation, now, events);
            }
            Event::Switched { new, old } => {
                if let Some(declaration) = rollout.declaration(new) {
                    workers.switch(new);
                    acceptor.switch((new, declaration), old, now, events);
                    services.switch(new, declaration, workers.in_flight(), now);
                }
                if let Some(load) = services.last_load() {
                    admin.loaded(load, now);
                }
                self.ready();
            }
            Event::GenerationEnded(generation) => {
                acceptor.generation_ended(generation);
                services.generation_ended(generation);
            }
            Event::ZygoteLost(generation) => workers.zygote_lost(generation, now, events),
            Event::ZygotesEnded(generation) => workers.zygotes_ended(generation, now, events),
            Event::StandbyForked { teller, zygote, pid } => {
                workers.standby_forked(teller, zygote, pid, events);
            }
            Event::ZygoteLied { zygote, complaint } => {
                rollout.zygote_lied(zygote, &complaint, now, events);
            }
            Event::StandbyRuns { zygote, pid } => rollout.standby_runs(zygote, pid),
            Event::StandbyEnded(zygote) => rollout.standby_ended(zygote, now, events),
            Event::ReloadBegan => services.reload_began(),
            Event::NoZygoteLeft => services.no_zygote_left(workers.in_flight(), now),
            Event::ReloadFailed(cause, load) => {
                services.reload_failed(cause, &load, workers.in_flight(), now);
                admin.loaded(&load, now);
            }
            Event::StartFailed(exit) => self.phase = Phase::Ended(exit),

            Event::Incident(kind, text) => services.incident(kind, text),
            Event::Ordered { client, command } => self.obey(client, command, now),
            Event::MailsWanted { client, cursor } => self.list_mails(client, cursor, now),
        }
    }

    /// Reaps every child that has ended, zygotes first.
    fn reap(&mut self, now: Instant) {
        let Self { events, acceptor, workers, rollout, services, .. } = self;
        rollout.reap(now, events);
        let record = &mut recorder(services, acceptor, now);
        workers.reap(&rollout.zygote_pids(), now, record, events);
    }

    /// Logs one line about the daemon, and one about each worker.
    fn log_status(&self, now: Instant) {
        let answers = self.services.figures().answers();
        let state = match self.state() {
            State::Starting => "starting",
            State::Serving => "serving",
            State::Stopping => "stopping",
        };
        info!(self.log, "status"; "state" => state,
            "seconds" => now.saturating_duration_since(self.started).as_secs(),
            "generations" => self.rollout.count(),
            "held" => self.acceptor.held(),
            "in_flight" => self.workers.in_flight(),
            "K" => answers.accepted, "Z" => answers.temporary, "D" => answers.permanent,
            "unanswered" => answers.unanswered);
        self.workers.log_status();
    }

    /// Notes that a generation serves.
    fn ready(&mut self) {
        if self.phase == Phase::Starting {
            self.phase = Phase::Serving;
        }
    }

    /// Begins the drain, or ends it when the daemon is told to stop a second time.
    fn stop(&mut self, now: Instant) {
        match self.phase {
            Phase::Draining { .. } | Phase::Killing { .. } => {
                warn!(self.log, "told to stop a second time: killing what is left";
                    "in_flight" => self.workers.in_flight());
                self.end_drain(Programs::Killed, now);
            }
            Phase::Starting | Phase::Serving => self.begin_drain(now),
            Phase::Ended(_) => {}
        }
    }

    fn begin_drain(&mut self, now: Instant) {
        let drain = self.rollout.drain_timeout();
        let in_flight = self.workers.in_flight();
        info!(self.log, "stopping"; "in_flight" => in_flight,
            "drain_timeout" => drain.as_secs_f64());
        let limit = self.workers.latest_time_limit();
        let deadline = limit.max(Some(now + drain)).unwrap_or(now);
        self.phase = Phase::Draining { deadline };
        self.services.stop(in_flight, now);
        self.admin.stop(now);
        self.rollout.stop(now, &mut self.events);
        self.acceptor.stop(now, &mut self.events);
    }

    /// Lengthens a drain to the time limit that an action has set for itself. The end of a drain is
    /// not put off.
    fn extend_drain(&mut self, until: Instant) {
        if let Phase::Draining { deadline } = &mut self.phase {
            *deadline = until.max(*deadline);
        }
    }

    fn end_drain(&mut self, programs: Programs, now: Instant) {
        self.phase = Phase::Killing { again: now + KILL_AGAIN, programs };
        self.events.push_back(Event::DrainEnded(programs));
    }

    /// Ends the daemon when nothing is left to finish, or the drain when its time is over.
    fn tick(&mut self, now: Instant) {
        let (due, programs) = match self.phase {
            Phase::Draining { deadline } => (deadline, Programs::Spared),
            Phase::Killing { again, programs } => (again, programs),
            Phase::Starting | Phase::Serving | Phase::Ended(_) => return,
        };
        if self.workers.is_idle() && self.acceptor.is_idle() {
            self.phase = Phase::Ended(Exit::Success);
        } else if due <= now {
            self.end_drain(programs, now);
        }
    }

    fn next_deadline(&self) -> Instant {
        let phase = match self.phase {
            Phase::Draining { deadline } => Some(deadline),
            Phase::Killing { again, .. } => Some(again),
            Phase::Starting | Phase::Serving | Phase::Ended(_) => None,
        };
        [
            self.services.next_deadline(),
            self.acceptor.next_deadline(),
            self.workers.next_deadline(),
            self.rollout.next_deadline(),
            self.admin.next_deadline(),
            phase,
        ]
        .into_iter()
        .flatten()
        .fold(self.next_look, Instant::min)
    }

    /// Ends what is left when the loop has ended.
    fn clean_up(&mut self, exit: Exit) {
        self.acceptor.close();
        self.rollout.close();
        self.workers.close();
        self.services.close();
        if let Some(file) = self.control.take() {
            file.unlink();
        }
        if exit == Exit::Success {
            info!(self.log, "stopped");
        }
        self.admin.close_all(Instant::now());
    }
}

/// Returns what logs the record of a finished mail while the record is being read.
fn recorder(
    services: &mut Services,
    acceptor: &Acceptor,
    now: Instant,
) -> impl FnMut(WorkerId, JobId, &MailRecord<'_>) {
    move |worker, job, record| services.mail_done(worker, job, acceptor.origin(job), record, now)
}

/// Names this run on this host: seconds since the epoch, and the process id.
fn instance() -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    format!("{seconds:x}-{:x}", std::process::id())
}

#[cfg(test)]
#[path = "daemon_tests.rs"]
mod tests;
