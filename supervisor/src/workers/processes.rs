//! The workers' processes: asked for, watched, pinged, signalled, given up.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use qrelay_shared::admin;
use qrelay_shared::ipc::channel::{Channel, RecvBuffer, RecvError};
use qrelay_shared::ipc::message::{
    Control, DatabaseState, FromControl, MAX_DATABASE_NAME, MAX_DATABASES, Report, ToControl,
    ToJobs, ToReports, mail_id,
};
use qrelay_shared::sys::recorder;
use qrelay_shared::system_error::shown;
use slog::{debug, error, warn};

use crate::event::{Asker, Event, Events, NewAsker, NewWorker, OpenerChannel, Recorder, Teller};
use crate::ids::{GenerationId, JobId, WorkerId};
use crate::system::describe;
use crate::watch::Source;
use crate::workers::Workers;
use crate::workers::pool::{Death, End, Hang, Health, LONGEST_LIMIT, Pool};
use crate::workers::told::{self, Belief, Fork, Program};

/// How long a worker that closed a channel may take to end.
const CLOSED_GRACE: Duration = Duration::from_millis(500);
/// Datagrams that are read from one worker before everybody else has a turn. What is left wakes the
/// loop again.
const PER_TURN: usize = 64;
/// Datagrams that are read of a worker whose end is being settled. More than a socket can hold at
/// once, so only a process that still writes has more, and that is no honest worker.
const LAST_WORDS: usize = 4096;
/// Slots of the flight recorder beyond a worker's credit, for jobs that a generation on its way out
/// gets whatever its credit.
const SPARE_SLOTS: usize = 64;

/// The supervisor's side of a worker.
#[derive(Debug)]
pub(super) struct Process {
    /// The process id, as soon as the zygote has told it.
    pub(super) pid: Option<Pid>,
    /// Jobs go out, reports come in.
    pub(super) jobs: Channel<ToJobs, ToReports>,
    /// Orders go out, pongs come in.
    pub(super) control: Channel<ToControl, FromControl>,
    /// The programs that the worker has told, one for a job at most.
    pub(super) children: Vec<Program>,
    /// The jobs that have had a program.
    pub(super) started: BTreeSet<JobId>,
    /// The jobs with a time limit of their own.
    pub(super) limited: BTreeSet<JobId>,
    /// The worker has reported that it can take jobs.
    pub(super) ready: bool,
    /// Pings that the worker has not answered.
    pub(super) pings: u32,
    /// The worker has lied: it is killed, and not listened to.
    pub(super) lied: bool,
    /// What the worker notes of its mails, if it can.
    pub(super) flights: Option<OwnedFd>,
    /// When the worker was asked for.
    pub(super) asked: Instant,
    /// How the worker has answered.
    pub(super) answers: admin::Answers,
    /// Memory of its Lua state in bytes, as it has told.
    pub(super) lua_bytes: u64,
    /// Its pools of connections to databases, as it has told.
    pub(super) databases: Vec<DatabaseState>,
}

impl Process {
    fn new(
        jobs: Channel<ToJobs, ToReports>,
        control: Channel<ToControl, FromControl>,
        flights: Option<OwnedFd>,
        asked: Instant,
    ) -> Self {
        Self {
            pid: None,
            jobs,
            control,
            children: Vec::new(),
            started: BTreeSet::new(),
            limited: BTreeSet::new(),
            ready: false,
            pings: 0,
            lied: false,
            flights,
            asked,
            answers: admin::Answers::default(),
            lua_bytes: 0,
            databases: Vec::new(),
        }
    }

    fn forget_job(&mut self, job: JobId) {
        self.started.remove(&job);
        self.limited.remove(&job);
    }
}

/// Why a worker is no longer listened to.
enum Fault {
    Closed,
    Malformed(String),
}

impl Workers {
    /// Makes the channels to a new worker, and has the generation's zygote fork it.
    pub(super) fn spawn(
        &mut self,
        generation: GenerationId,
        worker: WorkerId,
        now: Instant,
        events: &mut Events,
    ) {
        match self.connect(generation, worker, now, events) {
            Ok(new) => events.push_back(Event::WorkerMissing(Box::new(new))),
            Err(error) => {
                warn!(self.log, "cannot fork a worker: {error}"; "worker" => worker);
                self.not_forked(worker, now, events);
            }
        }
    }

    fn connect(
        &mut self,
        generation: GenerationId,
        worker: WorkerId,
        now: Instant,
        events: &mut Events,
    ) -> Result<NewWorker, String> {
        let socketpair = |error| format!("socketpair: {error}");
        let (jobs, their_jobs) = Channel::pair().map_err(socketpair)?;
        let (control, their_control) = Channel::pair().map_err(socketpair)?;
        let (opener, their_opener) = OpenerChannel::pair().map_err(socketpair)?;
        let (flights, their_flights) = self.make_recorder(generation, worker);
        let jobs = jobs.foreign();
        let control = control.foreign();
        self.watcher
            .add(&jobs, Source::Jobs(worker))
            .and_then(|()| self.watcher.add(&control, Source::Control(worker)))
            .map_err(|error| format!("epoll_ctl: {error}"))?;
        self.processes.insert(worker, Process::new(jobs, control, flights, now));
        let (asker, opener) = (Asker::Worker(worker), opener.foreign());
        events.push_back(Event::AskerCame(NewAsker { asker, generation, opener }));
        Ok(NewWorker {
            generation,
            worker,
            jobs: their_jobs.into(),
            control: their_control.into(),
            dictionaries: their_opener.into(),
            flights: their_flights,
        })
    }

    /// Makes the memory of a worker's flight recorder: the supervisor's descriptor, and the
    /// worker's. Without it (a limit of file sizes counts for memory, too) the worker serves all
    /// the same.
    fn make_recorder(
        &self,
        generation: GenerationId,
        worker: WorkerId,
    ) -> (Option<OwnedFd>, Option<OwnedFd>) {
        let slots = self.pool.credit(generation) + SPARE_SLOTS;
        let made = recorder::create(slots).map_err(io::Error::from);
        match made.and_then(|ours| Ok((ours.try_clone()?, ours))) {
            Ok((theirs, ours)) => (Some(ours), Some(theirs)),
            Err(error) => {
                warn!(self.log, "what happens to mails can't be noted"; "worker" => worker,
                    "error" => shown(&error));
                (None, None)
            }
        }
    }

    /// Learns the process id of a worker, which may have ended meanwhile.
    pub(crate) fn forked(
        &mut self,
        teller: Teller,
        worker: WorkerId,
        pid: Pid,
        now: Instant,
        events: &mut Events,
    ) {
        let fork = self.judge_fork(pid);
        // A worker that was given up meanwhile ends by itself.
        let Some(process) = self.processes.get_mut(&worker) else { return };
        if let Some(complaint) = not_asked(&self.pool, process, teller, worker) {
            return lied(teller, complaint, events);
        }
        let status = match fork {
            Fork::Lie(complaint) => return lied(teller, complaint, events),
            Fork::Ended(status) => Some(status),
            Fork::Runs => None,
        };
        debug!(self.log, "worker forked"; "worker" => worker, "pid" => pid.as_raw());
        process.pid = Some(pid);
        if status.is_some() {
            self.ended(worker, status, now, events);
        } else {
            self.look_again(worker);
        }
    }

    /// Judges the process id that a zygote has told, and forgets the status of that number.
    pub(super) fn judge_fork(&mut self, pid: Pid) -> Fork {
        let remembered = self.strangers.remove(&pid);
        told::judge_fork(&*self.system, pid, self.is_taken(pid), remembered)
    }

    /// Returns whether this is the number of a worker, or of a dead worker's program that isn't
    /// reaped. A number that a worker has only told doesn't count: a lie would take it from others.
    fn is_taken(&self, pid: Pid) -> bool {
        self.worker_of(pid).is_some() || self.orphans.has(pid)
    }

    /// Looks at the programs that a worker told before its own process id was known.
    fn look_again(&mut self, worker: WorkerId) {
        let system = &*self.system;
        let Some(process) = self.processes.get_mut(&worker) else { return };
        for program in &mut process.children {
            if program.belief == Belief::Unchecked {
                program.belief = told::look_at_program(system, process.pid, program.pid, false);
            }
        }
    }

    /// Gives up a worker that a zygote could not fork.
    pub(crate) fn refused(
        &mut self,
        teller: Teller,
        worker: WorkerId,
        now: Instant,
        events: &mut Events,
    ) {
        let Some(process) = self.processes.get(&worker) else { return };
        match not_asked(&self.pool, process, teller, worker) {
            Some(complaint) => lied(teller, complaint, events),
            None => self.not_forked(worker, now, events),
        }
    }

    /// Gives up a worker that has no process, or none that is known.
    pub(crate) fn not_forked(&mut self, worker: WorkerId, now: Instant, events: &mut Events) {
        self.ended(worker, None, now, events);
    }

    /// Has a worker finish its jobs and end.
    pub(super) fn shut_jobs(&self, worker: WorkerId) {
        if let Some(process) = self.processes.get(&worker) {
            // A worker that is dead already needs no order to finish.
            let _ = shutdown(process.jobs.as_fd().as_raw_fd(), Shutdown::Write);
        }
    }

    /// Asks a worker how long its Lua has been held.
    pub(super) fn ping(&mut self, worker: WorkerId, sequence: u64) {
        let Some(process) = self.processes.get_mut(&worker) else { return };
        match process.control.try_send(&Control::Ping { sequence }, &[]) {
            Ok(()) => process.pings += 1,
            // The worker has stopped reading: the unanswered pings will be counted.
            Err(_) => debug!(self.log, "a ping could not be sent"; "worker" => worker),
        }
    }

    pub(super) fn abort(&mut self, worker: WorkerId, now: Instant, events: &mut Events) {
        self.signal(worker, Signal::SIGABRT, now, events);
    }

    pub(super) fn kill(&mut self, worker: WorkerId, now: Instant, events: &mut Events) {
        self.signal(worker, Signal::SIGKILL, now, events);
    }

    /// Signals a worker. Only a child that hasn't been reaped is signalled, so no other process can
    /// be hit.
    fn signal(&mut self, worker: WorkerId, signal: Signal, now: Instant, events: &mut Events) {
        match self.processes.get(&worker).and_then(|process| process.pid) {
            Some(pid) => self.system.signal(pid, signal),
            // Without its sockets the worker ends by itself.
            None => self.not_forked(worker, now, events),
        }
    }

    /// Returns the worker whose process this is.
    pub(super) fn worker_of(&self, pid: Pid) -> Option<WorkerId> {
        self.processes.iter().find(|(_, process)| process.pid == Some(pid)).map(|(&id, _)| id)
    }

    /// Forgets a process and closes the channels to it.
    pub(super) fn forget_process(
        &mut self,
        worker: WorkerId,
        events: &mut Events,
    ) -> Option<Process> {
        let process = self.processes.remove(&worker)?;
        for database in &process.databases {
            self.past_errors.add(&database.name, database.errors);
        }
        events.push_back(Event::AskerGone(Asker::Worker(worker)));
        self.watcher.remove(&process.jobs);
        self.watcher.remove(&process.control);
        Some(process)
    }

    /// Reads a worker's pongs.
    pub(crate) fn on_pong(&mut self, worker: WorkerId, now: Instant, events: &mut Events) {
        let Some(mut buffer) = self.buffer.take() else { return };
        let fault = self.read_pongs(worker, &mut buffer, now, events);
        self.buffer = Some(buffer);
        if let Some(fault) = fault {
            self.distrust(worker, &fault, now, events);
        }
    }

    fn read_pongs(
        &mut self,
        worker: WorkerId,
        buffer: &mut RecvBuffer,
        now: Instant,
        events: &mut Events,
    ) -> Option<Fault> {
        for _ in 0..PER_TURN {
            let process = self.processes.get_mut(&worker).filter(|process| !process.lied)?;
            let pong = match process.control.try_recv(buffer) {
                Ok(received) => received.message,
                Err(error) => return fault(error),
            };
            let Some(pings) = process.pings.checked_sub(1) else {
                return Some(Fault::Malformed("it answered a ping that it didn't get".into()));
            };
            process.pings = pings;
            if !is_modest(&pong.databases) {
                return Some(Fault::Malformed("it told too much about its databases".into()));
            }
            process.lua_bytes = pong.lua_bytes;
            process.databases = pong.databases;
            let held = Duration::from_millis(pong.held);
            let stuck = Duration::from_millis(pong.stuck);
            let health = Health { held, stuck, exhausted: pong.exhausted };
            if let Some(hang) = self.pool.pong(worker, health, now) {
                self.note_hang(worker, hang, (Some(pong.job), &pong.place), events);
                self.abort(worker, now, events);
            }
        }
        None
    }

    /// Reads a worker's reports, but no more than its share of a turn. The records of finished
    /// mails go to `record`.
    pub(crate) fn on_reports(
        &mut self,
        worker: WorkerId,
        now: Instant,
        record: &mut Recorder<'_>,
        events: &mut Events,
    ) {
        if let Some(fault) = self.take_reports(worker, PER_TURN, now, record, events) {
            self.distrust(worker, &fault, now, events);
        }
    }

    /// Reads every report that a worker has sent by now.
    pub(super) fn on_all_reports(
        &mut self,
        worker: WorkerId,
        now: Instant,
        record: &mut Recorder<'_>,
        events: &mut Events,
    ) {
        if let Some(fault) = self.take_reports(worker, LAST_WORDS, now, record, events) {
            self.distrust(worker, &fault, now, events);
        }
    }

    /// Reads what a worker managed to report before it died.
    pub(super) fn take_last_reports(
        &mut self,
        worker: WorkerId,
        now: Instant,
        record: &mut Recorder<'_>,
        events: &mut Events,
    ) {
        if let Some(Fault::Malformed(complaint)) =
            self.take_reports(worker, LAST_WORDS, now, record, events)
        {
            // The worker has ended, so its last words can't be worse than that.
            error!(self.log, "worker died with a false report: {complaint}"; "worker" => worker);
        }
    }

    fn take_reports(
        &mut self,
        worker: WorkerId,
        most: usize,
        now: Instant,
        record: &mut Recorder<'_>,
        events: &mut Events,
    ) -> Option<Fault> {
        let mut buffer = self.buffer.take()?;
        let fault = self.read_reports((worker, most), &mut buffer, now, record, events);
        self.buffer = Some(buffer);
        fault
    }

    /// Reads at most `most` datagrams.
    fn read_reports(
        &mut self,
        (worker, most): (WorkerId, usize),
        buffer: &mut RecvBuffer,
        now: Instant,
        record: &mut Recorder<'_>,
        events: &mut Events,
    ) -> Option<Fault> {
        for _ in 0..most {
            let process = self.processes.get(&worker).filter(|process| !process.lied)?;
            let reports = match process.jobs.try_recv_batch(buffer) {
                Ok(reports) => reports,
                Err(error) => {
                    return match fault(error) {
                        Some(Fault::Malformed(complaint)) => Some(Fault::Malformed(complaint)),
                        other => self.lie_of(worker).map(Fault::Malformed).or(other),
                    };
                }
            };
            for report in reports {
                let report = match report {
                    Ok(report) => report,
                    Err(error) => return fault(error),
                };
                if let Err(complaint) = self.on_report(worker, report, now, record, events) {
                    return Some(Fault::Malformed(complaint));
                }
            }
        }
        None
    }

    /// Acts on one report.
    ///
    /// # Errors
    /// The worker broke the protocol; the text says how.
    fn on_report(
        &mut self,
        worker: WorkerId,
        report: Report<'_>,
        now: Instant,
        record: &mut Recorder<'_>,
        events: &mut Events,
    ) -> Result<(), String> {
        match report {
            Report::Ready => {
                let process = self.processes.get_mut(&worker);
                if process.is_some_and(|process| std::mem::replace(&mut process.ready, true)) {
                    return Err("it reported again that it is ready".into());
                }
                self.on_ready(worker, now, events);
            }
            Report::Done { job, record: mail } => {
                if !self.pool.done(job, worker) {
                    return Err(format!("it reported job {job}, which it doesn't have"));
                }
                let process = self.processes.get_mut(&worker);
                if let Some(process) = process {
                    process.forget_job(job);
                    if let Some(mail) = &mail {
                        process.answers.count(mail.status);
                    }
                }
                if let Some(mail) = mail {
                    record(worker, job, &mail);
                }
                events.push_back(Event::Done(job));
            }
            Report::Lost { job } => {
                if !self.pool.done(job, worker) {
                    return Err(format!("it lost job {job}, which it doesn't have"));
                }
                if let Some(process) = self.processes.get_mut(&worker) {
                    process.forget_job(job);
                }
                warn!(self.log, # "worker", "worker out of descriptors"; "worker" => worker);
                events.push_back(Event::SocketLost(job));
            }
            Report::Child { job, pid } => {
                if pid <= 1 || !self.pool.has(job, worker) {
                    return Err(format!("it reported child {pid} of job {job}"));
                }
                self.on_child(worker, job, Pid::from_raw(pid))?;
            }
            Report::ChildGone { job } => {
                let Some(process) = self.processes.get_mut(&worker) else { return Ok(()) };
                let at = process.children.iter().position(|program| program.job == job);
                let at =
                    at.ok_or_else(|| format!("it has no child of job {job} that could end"))?;
                process.children.swap_remove(at);
            }
            Report::Timeout { job, milliseconds } => {
                let process = self.processes.get_mut(&worker);
                let has = process.filter(|_| self.pool.has(job, worker));
                if !has.is_some_and(|process| process.limited.insert(job)) {
                    return Err(format!("it reported a timeout of job {job}"));
                }
                let until = now + Duration::from_millis(milliseconds).min(LONGEST_LIMIT);
                self.pool.explicit_timeout(worker, until);
                events.push_back(Event::TimeLimitSet(until));
            }
        }
        Ok(())
    }

    /// Learns of a program.
    ///
    /// # Errors
    /// The worker has told a program for this job, or this process id, already. A job has one
    /// program in its life, so the worker can't have the system searched again and again.
    fn on_child(&mut self, worker: WorkerId, job: JobId, pid: Pid) -> Result<(), String> {
        let taken = self.is_taken(pid);
        let Some(process) = self.processes.get_mut(&worker) else { return Ok(()) };
        let known = process.children.iter().any(|program| program.pid == pid);
        if known || !process.started.insert(job) {
            return Err(format!("it reported child {pid} of job {job}, beside another one"));
        }
        let belief = told::look_at_program(&*self.system, process.pid, pid, taken);
        process.children.push(Program { job, pid, belief });
        Ok(())
    }

    /// Returns the lie of a worker that has told a process id which is none of its programs', when
    /// everything is read that the worker had sent by the time of the look. An honest worker
    /// reports that a program is gone before it frees the number, so such a report has been read by
    /// now.
    fn lie_of(&self, worker: WorkerId) -> Option<String> {
        let process = self.processes.get(&worker)?;
        process.children.iter().find_map(|program| match &program.belief {
            Belief::Doubted(complaint) => Some(complaint.clone()),
            _ => None,
        })
    }

    fn on_ready(&mut self, worker: WorkerId, now: Instant, events: &mut Events) {
        let Some(generation) = self.pool.generation_of(worker) else { return };
        debug!(self.log, "worker ready"; "worker" => worker, "generation" => generation);
        let commands = self.pool.ready(worker, now);
        self.carry_out(commands, now, events);
        events.push_back(Event::WorkerReady(generation));
    }

    /// Has a worker killed that has done what no honest worker does.
    pub(crate) fn worker_lied(
        &mut self,
        worker: WorkerId,
        complaint: &str,
        now: Instant,
        events: &mut Events,
    ) {
        self.distrust(worker, &Fault::Malformed(complaint.to_owned()), now, events);
    }

    /// Has a worker killed that has closed a channel or sent nonsense, unless it is ending anyway.
    fn distrust(&mut self, worker: WorkerId, fault: &Fault, now: Instant, events: &mut Events) {
        let process = self.processes.get_mut(&worker);
        let Some(process) = process.filter(|process| !process.lied) else { return };
        self.watcher.remove(&process.jobs);
        self.watcher.remove(&process.control);
        match fault {
            Fault::Closed if self.pool.is_retiring(worker) => {}
            Fault::Closed => self.pool.condemn(worker, now + CLOSED_GRACE),
            Fault::Malformed(complaint) => {
                process.lied = true;
                error!(self.log, "worker killed: {complaint}"; "worker" => worker);
                events.push_back(Event::AskerGone(Asker::Worker(worker)));
                self.pool.condemn(worker, now);
            }
        }
    }

    /// Settles what a worker leaves behind whose process is gone (`status`) or never came: its
    /// programs are told to end, its clients are answered, and it is replaced.
    pub(super) fn ended(
        &mut self,
        worker: WorkerId,
        status: Option<WaitStatus>,
        now: Instant,
        events: &mut Events,
    ) {
        let process = self.forget_process(worker, events);
        let end = if status.is_some() { End::Died } else { End::NotForked };
        let Some(death) = self.pool.died(worker, end, now) else { return };
        let mut flights = Vec::new();
        if let Some(process) = process {
            if !death.jobs.is_empty() {
                // Without the notes the clients are answered all the same.
                let read = process.flights.as_ref().map(recorder::flights);
                flights = read.and_then(Result::ok).unwrap_or_default();
            }
            self.note_death(worker, process.pid, status, &death, events);
            let inherited = |program: &&Program| {
                told::is_inherited(&*self.system, program) && !self.is_taken(program.pid)
            };
            let programs = process.children.iter().filter(inherited);
            let programs: Vec<_> = programs.map(|program| (program.job, program.pid)).collect();
            self.orphans.adopt(&programs, now);
        }
        if !death.jobs.is_empty() {
            self.orphans.adopt_unreported(&death.jobs, now);
        }
        for &job in &death.jobs {
            let flight = flights.iter().position(|flight| flight.job == job);
            let flight = flight.map(|at| Box::new(flights.swap_remove(at)));
            // A client whose program still runs is answered when the program has ended.
            events.push_back(match self.orphans.concerns(job) {
                true => Event::ProgramRuns { job, worker, flight },
                false => Event::Orphaned { job, worker, flight },
            });
        }
        if !death.was_ready {
            events.push_back(Event::WorkerFailed(death.generation));
        }
        events.push_back(Event::WorkerEnded(death.generation));
    }

    /// Logs and counts the end of a worker.
    fn note_death(
        &mut self,
        worker: WorkerId,
        pid: Option<Pid>,
        status: Option<WaitStatus>,
        death: &Death,
        events: &mut Events,
    ) {
        let pid = pid.map_or(0, Pid::as_raw);
        let cause = status.map_or_else(|| "not forked".to_owned(), describe);
        if death.unexpected {
            error!(self.log, "worker died: {cause}"; "worker" => worker, "pid" => pid,
                "generation" => death.generation, "mails_lost_to_retry" => death.jobs.len());
            self.ends.crashes += 1;
            let text = format!("worker {worker} died: {cause}");
            events.push_back(Event::Incident(admin::IncidentKind::Crash, text));
        } else {
            self.ends.finished += u64::from(status.is_some());
            debug!(self.log, "worker ended: {cause}"; "worker" => worker, "pid" => pid,
                "generation" => death.generation);
        }
    }

    /// Logs why a worker is ended; `job` is the mail that held Lua, if that is known, and `place`
    /// the handler's file and line.
    pub(super) fn log_hang(&self, worker: WorkerId, hang: Hang, job: Option<JobId>, place: &str) {
        let mail = job
            .filter(|&job| job != JobId::default())
            .map(|job| mail_id(&self.instance, job))
            .unwrap_or_default();
        match hang {
            Hang::Held(held) => error!(self.log, "worker hangs in Lua: killing it";
                "worker" => worker, "held_seconds" => held.as_secs_f64(), "id" => &*mail,
                "handler" => place),
            Hang::Stuck(stuck) => error!(self.log, "worker begins no mail: killing it";
                "worker" => worker, "stuck_seconds" => stuck.as_secs_f64(),
                "in_flight" => self.pool.jobs_of(worker)),
            Hang::Silent(pings) => error!(self.log, "worker doesn't answer: killing it";
                "worker" => worker, "pings" => pings, "in_flight" => self.pool.jobs_of(worker)),
            Hang::NotReady => error!(self.log, "worker doesn't become ready: killing it";
                "worker" => worker),
            Hang::DrainOver => warn!(self.log, "drain time is over: killing worker";
                "worker" => worker, "in_flight" => self.pool.jobs_of(worker)),
        }
    }
}

/// Returns what makes a zygote's report about this worker impossible, if anything does.
fn not_asked(pool: &Pool, process: &Process, teller: Teller, worker: WorkerId) -> Option<String> {
    if pool.generation_of(worker) != Some(teller.generation) {
        return Some(format!("it reported about worker {worker} of another generation"));
    }
    process.pid.map(|pid| format!("it reported again about worker {worker}, which is {pid}"))
}

/// Returns whether there are as many databases as an honest worker tells of.
fn is_modest(databases: &[DatabaseState]) -> bool {
    databases.len() <= MAX_DATABASES
        && databases.iter().all(|database| database.name.len() <= MAX_DATABASE_NAME)
}

fn lied(teller: Teller, complaint: String, events: &mut Events) {
    events.push_back(Event::ZygoteLied { zygote: teller.zygote, complaint });
}

fn fault(error: RecvError) -> Option<Fault> {
    match error {
        RecvError::Empty => None,
        RecvError::Closed => Some(Fault::Closed),
        other => Some(Fault::Malformed(other.to_string())),
    }
}
