//! The supervisor's life: start, serve, reload, stop.
//!
//! [`Daemon`] owns everything; each of its duties is an `impl` in the file named
//! after it: `dispatch` (clients to workers), `workers` (their processes and
//! reports), `rollout` (generations and zygotes). Decisions come from the pure
//! modules `pool` and `generation`.
//!
//! # Failure
//! Before READY, a failure ends the start with one message and an exit status.
//! Afterwards nothing ends the daemon but SIGTERM and SIGINT.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::exit::Exit;
use qrelay_shared::ipc::channel::RecvBuffer;
use qrelay_shared::qmqp::Reply;
use qrelay_shared::sys::process::{ended_child, reap};
use qrelay_shared::texts;
use slog::{Level, Logger, debug, error, info, warn};

use crate::accept::connections::Connections;
use crate::accept::listeners::Listeners;
use crate::accept::throttle::Throttle;
use crate::event::{Source, Watcher};
use crate::generations::reload::Generations;
use crate::generations::rollout::{Ending, Generation};
use crate::generations::zygote::Zygote;
use crate::ids::{GenerationId, JobId, WorkerId, ZygoteId};
use crate::services::dictionary_server::DictionaryServer;
use crate::services::pond::PondSender;
use crate::services::systemd::Systemd;
use crate::signals::Signals;
use crate::workers::dispatch::Dispatches;
use crate::workers::orphans::Orphans;
use crate::workers::pool::Pool;
use crate::workers::processes::Worker;

/// Longest sleep of the loop when nothing is due.
const IDLE: Duration = Duration::from_secs(60);

/// What the command line says.
#[derive(Debug, Clone)]
pub struct Options {
    /// Absolute path of config.lua.
    pub config: PathBuf,
    /// What is logged.
    pub level: Level,
    /// How long a script may take to declare itself.
    pub boot_timeout: Duration,
}

/// Where the daemon is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not ready yet.
    Starting,
    /// READY.
    Serving,
    /// Finishing; killed at the deadline.
    Stopping {
        /// What is left then is killed; a dead worker's programs still have their time.
        deadline: Instant,
        /// They haven't, since we were told to stop a second time.
        at_once: bool,
        /// The drain is over: nothing extends the deadline any more.
        over: bool,
    },
    /// Nothing is left to do.
    Ended(Exit),
}

/// The supervisor.
pub struct Daemon {
    pub(crate) log: Logger,
    pub(crate) options: Options,
    /// Makes this run's mail ids unique.
    pub(crate) instance: String,
    pub(crate) phase: Phase,
    pub(crate) watcher: Watcher,
    pub(crate) signals: Signals,
    pub(crate) systemd: Systemd,
    pub(crate) buffer: Option<RecvBuffer>,

    pub(crate) listeners: Listeners,
    /// Those whose backlog could not be emptied yet.
    pub(crate) ending: Vec<Ending>,
    pub(crate) connections: Connections,
    /// Listeners are unwatched until then.
    pub(crate) disarmed: Option<Instant>,
    pub(crate) exhausted: Throttle,
    /// Scratch list, kept for its memory.
    pub(crate) accepted: Vec<JobId>,
    pub(crate) dispatches: Dispatches,

    pub(crate) dictionaries: DictionaryServer,
    /// Of the current generation, if it has a log server.
    pub(crate) pond: Option<PondSender>,

    pub(crate) pool: Pool,
    pub(crate) workers: BTreeMap<WorkerId, Worker>,
    pub(crate) generations: Generations,
    pub(crate) loaded: BTreeMap<GenerationId, Generation>,
    pub(crate) zygotes: BTreeMap<ZygoteId, Zygote>,
    pub(crate) last_zygote: ZygoteId,
    /// Children that ended before we knew what they were.
    pub(crate) strangers: HashMap<Pid, WaitStatus>,
    /// Programs that dead workers left behind.
    pub(crate) orphans: Orphans,
}

/// Runs the daemon to its end.
pub fn run(options: Options) -> Exit {
    let log = qrelay_shared::log::init(options.level, "qrelay");
    match Daemon::start(options, log.clone()) {
        Ok(mut daemon) => daemon.serve(),
        Err(message) => {
            error!(log, "cannot start: {message}");
            Exit::System
        }
    }
}

impl Daemon {
    /// Takes over signals and passed sockets, and begins with the first generation.
    fn start(options: Options, log: Logger) -> Result<Self, String> {
        let passed = qrelay_shared::sys::activation::take()?;
        prctl::set_child_subreaper(true)
            .map_err(|error| format!("PR_SET_CHILD_SUBREAPER: {error}"))?;
        // Only the name in ps; the process works without it.
        let _ = prctl::set_name(c"qrelay");
        raise_descriptor_limit();
        let now = Instant::now();
        let signals = Signals::register().map_err(|error| format!("signals: {error}"))?;
        let watcher = Watcher::new().map_err(|error| format!("epoll: {error}"))?;
        watcher.add(&signals, Source::Signals).map_err(|error| format!("epoll: {error}"))?;
        let mut daemon = Self {
            generations: Generations::new(options.boot_timeout),
            log,
            options,
            instance: instance(),
            phase: Phase::Starting,
            watcher,
            signals,
            systemd: Systemd::new(now),
            buffer: Some(RecvBuffer::new()),
            listeners: Listeners::default(),
            ending: Vec::new(),
            connections: Connections::default(),
            disarmed: None,
            exhausted: Throttle::new(Duration::from_secs(1)),
            accepted: Vec::new(),
            dispatches: Dispatches::default(),
            dictionaries: DictionaryServer::default(),
            pond: None,
            pool: Pool::default(),
            workers: BTreeMap::new(),
            loaded: BTreeMap::new(),
            zygotes: BTreeMap::new(),
            last_zygote: ZygoteId::default(),
            strangers: HashMap::new(),
            orphans: Orphans::default(),
        };
        daemon.listeners.adopt(passed).map_err(|error| error.to_string())?;
        info!(daemon.log, "qrelay {} starts", env!("CARGO_PKG_VERSION");
            "config" => daemon.options.config.display());
        let commands = daemon.generations.boot(now);
        daemon.roll_out(commands, now);
        Ok(daemon)
    }

    /// The event loop.
    fn serve(&mut self) -> Exit {
        let mut sources = Vec::new();
        loop {
            if let Phase::Ended(exit) = self.phase {
                self.clean_up();
                return exit;
            }
            let now = Instant::now();
            let timeout = self.next_deadline().map_or(IDLE, |at| at.saturating_duration_since(now));
            if let Err(error) = self.watcher.wait(timeout, &mut sources) {
                error!(self.log, "epoll_wait: {error}");
                self.phase = Phase::Ended(Exit::System);
            }
            for source in sources.drain(..) {
                self.handle(source);
            }
            self.tick(Instant::now());
            self.dispatch_late();
            self.dispatch_waiting();
            self.limit_waiting();
        }
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Signals => self.on_signals(),
            Source::Listener(id) => self.on_listener(id),
            Source::Connection(id) => self.on_connection(id),
            Source::Jobs(worker) => self.on_reports(worker),
            Source::Control(worker) => self.on_pong(worker),
            Source::Zygote(zygote) => self.on_zygote(zygote),
            Source::Dictionary(line) => self.on_dictionary(line),
        }
    }

    fn on_signals(&mut self) {
        let now = Instant::now();
        let pending = self.signals.take();
        if pending.child {
            self.reap(now);
        }
        if pending.stop {
            self.stop(now);
        }
        if pending.reload {
            info!(self.log, "reload requested");
            let commands = self.generations.reload(now);
            self.roll_out(commands, now);
        }
    }

    /// Does everything that is due.
    fn tick(&mut self, now: Instant) {
        self.systemd.tick(now);
        self.connections_due(now);
        self.workers_due(now);
        self.rollout_due(now);
        self.reap_orphans(now);
        self.answer_orphans(now);
        self.pond_due(now);
        self.stopping_due(now);
    }

    fn next_deadline(&self) -> Option<Instant> {
        let stopping = match self.phase {
            Phase::Stopping { deadline, .. } => Some(deadline),
            _ => None,
        };
        [
            self.systemd.next_tick(),
            self.connections.next_deadline(),
            self.disarmed,
            self.pool.next_tick(),
            self.generations.next_tick(),
            self.orphans.next_deadline(),
            self.pond.as_ref().and_then(PondSender::next_tick),
            stopping,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// SIGTERM: drain. A second one: at once.
    fn stop(&mut self, now: Instant) {
        match self.phase {
            Phase::Stopping { .. } => {
                warn!(self.log, "told to stop a second time: killing what is left";
                    "in_flight" => self.pool.in_flight());
                self.phase = Phase::Stopping { deadline: now, at_once: true, over: true };
            }
            Phase::Starting | Phase::Serving => {
                let drain = self.drain_timeout();
                info!(self.log, "stopping"; "in_flight" => self.pool.in_flight(),
                    "drain_timeout" => drain.as_secs_f64());
                let explicit = self.pool.latest_explicit();
                let deadline = explicit.map_or(now + drain, |until| until.max(now + drain));
                self.phase = Phase::Stopping { deadline, at_once: false, over: false };
                self.systemd
                    .stopping(format!("Stopping: {} mails in flight", self.pool.in_flight()), now);
                let commands = self.generations.stop();
                self.roll_out(commands, now);
                self.close_listeners();
            }
            Phase::Ended(_) => {}
        }
    }

    fn drain_timeout(&self) -> Duration {
        self.loaded
            .values()
            .map(|generation| generation.declaration.settings.drain_timeout)
            .max()
            .unwrap_or(Duration::ZERO)
    }

    fn stopping_due(&mut self, now: Instant) {
        let Phase::Stopping { deadline, at_once, .. } = self.phase else { return };
        self.retire_finished(now);
        let answered = self.connections.held() == 0 && self.orphans.is_empty();
        if self.workers.is_empty() && answered && self.ending.is_empty() {
            self.phase = Phase::Ended(Exit::Success);
        } else if deadline <= now {
            self.give_up_unserved(now);
            self.kill_all_workers();
            if at_once {
                self.orphans.kill_all(now);
            }
            let deadline = now + Duration::from_millis(100);
            self.phase = Phase::Stopping { deadline, at_once, over: true };
        }
    }

    /// An action's own time limit counts for a drain that has begun, but not for its end.
    pub(crate) fn extend_stop(&mut self, until: Instant) {
        if let Phase::Stopping { deadline, over: false, .. } = &mut self.phase {
            *deadline = until.max(*deadline);
        }
    }

    /// The drain is over: whoever has no worker yet gets none, and no worker is replaced.
    fn give_up_unserved(&mut self, now: Instant) {
        let unserved: Vec<_> =
            self.connections.unserved().map(|(job, connection)| (job, connection.peer)).collect();
        for (job, peer) in unserved {
            self.pool.forget(peer.into(), job);
            self.connections.answer(job, &Reply::temporary(texts::TRY_AGAIN), &self.watcher);
        }
        self.ending.clear();
        self.retire_finished(now);
    }

    /// Reaps every child that has ended.
    fn reap(&mut self, now: Instant) {
        while let Some(worker) = self.ended_worker() {
            if !self.reap_child(worker, now) {
                break;
            }
        }
        while let Some(pid) = ended_child(None) {
            if self.orphans.holds(pid) {
                // It hides the others that have ended. For those that end from now on there will be
                // another signal.
                for pid in self.orphans.ended_besides(now) {
                    self.reap_after_workers(pid, now);
                }
                return;
            }
            if !self.reap_after_workers(pid, now) {
                return;
            }
        }
    }

    /// Reaps a child, and every worker that has ended before: its programs have become our
    /// children, and if one of them went first, its number could be another process' by the time
    /// the dead worker's programs are told to end. Says whether it was there.
    fn reap_after_workers(&mut self, pid: Pid, now: Instant) -> bool {
        while let Some(worker) = self.ended_worker() {
            if !self.reap_child(worker, now) {
                return false;
            }
            if worker == pid {
                return true;
            }
        }
        self.reap_child(pid, now)
    }

    fn ended_worker(&self) -> Option<Pid> {
        let mut workers = self.workers.values().filter_map(|worker| worker.pid);
        workers.find(|&worker| ended_child(Some(worker)).is_some())
    }

    /// Reaps a child that has ended, now or later; false if it isn't there, so that nobody waits.
    fn reap_child(&mut self, pid: Pid, now: Instant) -> bool {
        if ended_child(Some(pid)).is_none() {
            return false;
        }
        // Its process group can be named only until it is reaped.
        if self.orphans.ended(pid, now) || self.adopt_early(pid, now) {
            return true;
        }
        let Ok(status) = reap(pid) else { return false };
        if let Some(worker) = self.worker_of(pid) {
            self.take_last_reports(worker);
            self.worker_ended(worker, Some(status), now);
        } else if !self.zygote_ended(pid, status, now) {
            self.remember_stranger(pid, status);
        }
        true
    }

    /// A child that has ended, unless it is a worker or zygote, may be the program of a worker that
    /// is about to end: the kernel gives us a process' children before its last thread is gone. It
    /// is held then as if the worker had ended.
    fn adopt_early(&mut self, pid: Pid, now: Instant) -> bool {
        let is_zygote = self.zygotes.values().any(|zygote| zygote.pid == Some(pid));
        if is_zygote || self.worker_of(pid).is_some() {
            return false;
        }
        let workers: Vec<WorkerId> = self.workers.keys().copied().collect();
        for worker in workers {
            // Its start may not have been read yet, or that its worker has reaped it.
            self.on_reports(worker);
            if let Some(link) = self.workers.get_mut(&worker)
                && let Some(at) = link.children.iter().position(|&(_, child)| child == pid)
            {
                let child = link.children.swap_remove(at);
                self.orphans.adopt(&[child], now);
                return self.orphans.ended(pid, now);
            }
        }
        false
    }

    /// Reaps programs of mails whose worker died, when nothing is left of their groups.
    fn reap_orphans(&mut self, now: Instant) {
        for pid in self.orphans.kill_overdue(now) {
            error!(self.log, "a dead worker's program can't be killed"; "pid" => pid.as_raw());
        }
        let reaped = self.orphans.to_reap(now);
        for &pid in &reaped {
            // It has ended and is ours, so this neither waits nor fails.
            let _ = reap(pid);
            debug!(self.log, "a dead worker's program has ended"; "pid" => pid.as_raw());
        }
        if !reaped.is_empty() || self.orphans.hides(now) {
            self.reap(now);
        }
    }

    /// Programs of mails whose worker died are over: their clients may try again.
    fn answer_orphans(&mut self, now: Instant) {
        for job in self.orphans.over(now) {
            self.connections.answer(job, &Reply::temporary(texts::TRY_AGAIN), &self.watcher);
        }
    }

    /// Log records that could not be sent are reported.
    fn pond_due(&mut self, now: Instant) {
        if let Some(pond) = &mut self.pond {
            pond.tick(now, &self.log);
        }
    }

    /// Log records go to this server from now on.
    pub(crate) fn log_to(&mut self, server: Option<Endpoint>) {
        if server.as_ref() == self.pond.as_ref().map(PondSender::server) {
            return;
        }
        if let Some(mut old) = std::mem::replace(&mut self.pond, server.map(PondSender::new)) {
            old.report_rest(&self.log);
        }
    }

    /// A child that isn't known may be a worker whose pid its zygote has yet to tell.
    fn remember_stranger(&mut self, pid: Pid, status: WaitStatus) {
        let expected = self.workers.values().any(|worker| worker.pid.is_none())
            || self.zygotes.values().any(|zygote| zygote.pid.is_none());
        if expected {
            self.strangers.insert(pid, status);
        } else {
            self.strangers.clear();
        }
    }

    /// Ends what is left when the loop has ended.
    fn clean_up(&mut self) {
        self.close_listeners();
        self.kill_all_workers();
        for zygote in std::mem::take(&mut self.zygotes).into_values() {
            if let Some(pid) = zygote.pid {
                // It may have ended by itself.
                let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
                let _ = waitpid(pid, None);
            }
        }
        for (_, worker) in std::mem::take(&mut self.workers) {
            if let Some(pid) = worker.pid {
                let _ = waitpid(pid, None);
            }
        }
        self.log_to(None);
        if self.phase == Phase::Ended(Exit::Success) {
            info!(self.log, "stopped");
        }
    }
}

/// As many descriptors as the hard limit allows; workers and programs that they
/// run inherit it.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // It works with the soft limit too, for fewer clients.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Seconds since the epoch and the process id: unique to this run on this host.
fn instance() -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    format!("{seconds:x}-{:x}", std::process::id())
}
