//! The workers' processes: forked by a zygote, watched, pinged, killed, reaped.
//!
//! # Failure
//! A worker that ends, or that says anything which can't be understood, costs
//! its clients a `Z` each, and is replaced.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use qrelay_shared::ipc::channel::{Channel, RecvBuffer, RecvError};
use qrelay_shared::ipc::message::{Control, FromControl, Report, ToControl, ToJobs, ToReports};
use qrelay_shared::qmqp::Reply;
use qrelay_shared::texts;
use slog::{debug, error, warn};

use crate::daemon::Daemon;
use crate::event::Source;
use crate::ids::{JobId, WorkerId};
use crate::workers::pool::{Command, Hang};

/// The supervisor's side of a worker.
#[derive(Debug)]
pub struct Worker {
    /// As soon as its zygote has told it.
    pub pid: Option<Pid>,
    /// Jobs go out, reports come in.
    pub jobs: Channel<ToJobs, ToReports>,
    /// Orders go out, pongs come in.
    pub control: Channel<ToControl, FromControl>,
    /// The child programs it runs, each leader of its process group.
    pub children: Vec<(JobId, Pid)>,
}

/// Why a worker is no longer listened to.
enum Fault {
    Closed,
    Malformed(String),
}

impl Daemon {
    /// Carries out what the pool has decided.
    pub(crate) fn command(&mut self, commands: Vec<Command>, now: Instant) {
        for command in commands {
            match command {
                Command::Spawn(generation, worker) => self.fork_worker(generation, worker, now),
                Command::Shut(worker) => self.shut_jobs(worker),
                Command::Ping(worker, sequence) => self.ping(worker, sequence),
                Command::Abort(worker) => self.signal_worker(worker, Signal::SIGABRT),
                Command::Kill(worker) => self.signal_worker(worker, Signal::SIGKILL),
            }
        }
    }

    fn shut_jobs(&self, worker: WorkerId) {
        if let Some(link) = self.workers.get(&worker) {
            // A worker that is dead already needs no order to finish.
            let _ = shutdown(link.jobs.as_fd().as_raw_fd(), Shutdown::Write);
        }
    }

    fn ping(&self, worker: WorkerId, sequence: u64) {
        let Some(link) = self.workers.get(&worker) else { return };
        if link.control.try_send(&Control::Ping { sequence }, &[]).is_err() {
            // It has stopped reading: the unanswered pings will be counted.
            debug!(self.log, "a ping could not be sent"; "worker" => worker);
        }
    }

    /// Only a child that hasn't been reaped is signalled, so no other process can be hit.
    pub(crate) fn signal_worker(&mut self, worker: WorkerId, signal: Signal) {
        if let Some(pid) = self.workers.get(&worker).and_then(|link| link.pid) {
            let _ = kill(pid, signal);
        } else {
            // Its pid isn't known: without its sockets it ends by itself.
            self.worker_ended(worker, None, Instant::now());
        }
    }

    pub(crate) fn kill_all_workers(&mut self) {
        let workers: Vec<_> = self.workers.keys().copied().collect();
        for worker in workers {
            self.signal_worker(worker, Signal::SIGKILL);
        }
    }

    /// The worker whose process this is.
    pub(crate) fn worker_of(&self, pid: Pid) -> Option<WorkerId> {
        self.workers.iter().find(|(_, link)| link.pid == Some(pid)).map(|(&id, _)| id)
    }

    /// A zygote has told the pid of a worker that may have ended meanwhile.
    pub(crate) fn worker_forked(&mut self, worker: WorkerId, pid: Pid, now: Instant) {
        if let Some(link) = self.workers.get_mut(&worker) {
            link.pid = Some(pid);
            debug!(self.log, "worker forked"; "worker" => worker, "pid" => pid.as_raw());
        }
        if let Some(status) = self.strangers.remove(&pid) {
            self.worker_ended(worker, Some(status), now);
        }
    }

    /// Pongs have come.
    pub(crate) fn on_pong(&mut self, worker: WorkerId) {
        let Some(mut buffer) = self.buffer.take() else { return };
        let fault = self.read_pongs(worker, &mut buffer);
        self.buffer = Some(buffer);
        if let Some(fault) = fault {
            self.distrust(worker, &fault);
        }
    }

    fn read_pongs(&mut self, worker: WorkerId, buffer: &mut RecvBuffer) -> Option<Fault> {
        let now = Instant::now();
        loop {
            let pong = match self.workers.get(&worker)?.control.try_recv(buffer) {
                Ok(received) => received.message,
                Err(error) => return fault(error),
            };
            let held = Duration::from_millis(pong.held);
            if let Some(hang) = self.pool.pong(worker, held, pong.exhausted, now) {
                self.log_hang(worker, hang, Some(pong.job));
                self.signal_worker(worker, Signal::SIGABRT);
            }
        }
    }

    /// Reports have come.
    pub(crate) fn on_reports(&mut self, worker: WorkerId) {
        let Some(mut buffer) = self.buffer.take() else { return };
        let fault = self.read_reports(worker, &mut buffer);
        self.buffer = Some(buffer);
        self.rearm();
        if let Some(fault) = fault {
            self.distrust(worker, &fault);
        }
    }

    fn read_reports(&mut self, worker: WorkerId, buffer: &mut RecvBuffer) -> Option<Fault> {
        loop {
            let mut reports = match self.workers.get(&worker)?.jobs.try_recv_batch(buffer) {
                Ok(reports) => reports,
                Err(error) => return fault(error),
            };
            while let Some(report) = reports.next() {
                let report = match report {
                    Ok(report) => report,
                    Err(error) => return fault(error),
                };
                if matches!(report, Report::Dictionary) {
                    match reports.fds.take() {
                        Some(fd) => self.dictionaries.add_line(fd, &self.watcher),
                        // We had no descriptor for it: its other end sees it closed, and the
                        // script is told.
                        None if reports.descriptor_lost => {}
                        None => return Some(Fault::Malformed("a channel is missing".into())),
                    }
                } else if let Some(complaint) = self.on_report(worker, report) {
                    return Some(Fault::Malformed(complaint));
                }
            }
        }
    }

    /// Acts on one report; a complaint means that the worker broke the protocol.
    fn on_report(&mut self, worker: WorkerId, report: Report<'_>) -> Option<String> {
        match report {
            // Comes with a channel, and goes to the dictionaries.
            Report::Dictionary => {}
            Report::Ready => self.worker_ready(worker, Instant::now()),
            Report::Done { job, record } => {
                if !self.pool.done(job, worker) {
                    return Some(format!("it reported job {job}, which it doesn't have"));
                }
                if let Some(record) = record {
                    self.log_mail(worker, job, &record);
                }
                self.connections.close(job, &self.watcher);
            }
            Report::Lost { job } => {
                if !self.pool.done(job, worker) {
                    return Some(format!("it lost job {job}, which it doesn't have"));
                }
                warn!(self.log, "worker out of descriptors"; "worker" => worker);
                self.connections.answer(job, &Reply::temporary(texts::TRY_AGAIN), &self.watcher);
            }
            Report::Child { job, pid } => {
                if pid <= 1 || !self.pool.has(job, worker) {
                    return Some(format!("it reported child {pid} of job {job}"));
                }
                if let Some(link) = self.workers.get_mut(&worker) {
                    link.children.push((job, Pid::from_raw(pid)));
                }
            }
            Report::ChildGone { job } => {
                if let Some(link) = self.workers.get_mut(&worker) {
                    link.children.retain(|&(other, _)| other != job);
                }
            }
            Report::Timeout { job, milliseconds } => {
                if !self.pool.has(job, worker) {
                    return Some(format!("it reported a timeout of job {job}"));
                }
                let limit = Duration::from_millis(milliseconds).min(Duration::from_secs(3600));
                let until = Instant::now() + limit;
                self.pool.explicit_timeout(worker, until);
                self.extend_stop(until);
            }
        }
        None
    }

    fn worker_ready(&mut self, worker: WorkerId, now: Instant) {
        let Some(generation) = self.pool.generation_of(worker) else { return };
        debug!(self.log, "worker ready"; "worker" => worker, "generation" => generation);
        let commands = self.pool.ready(worker, now);
        self.command(commands, now);
        let commands = self.generations.worker_ready(generation, now);
        self.roll_out(commands, now);
    }

    /// The worker has closed a channel or sent nonsense: it is killed, if it isn't ending anyway.
    fn distrust(&mut self, worker: WorkerId, fault: &Fault) {
        let Some(link) = self.workers.get(&worker) else { return };
        self.watcher.remove(&link.jobs);
        self.watcher.remove(&link.control);
        match fault {
            Fault::Closed if self.pool.is_retiring(worker) => {}
            Fault::Closed => self.pool.condemn(worker, Instant::now() + Duration::from_millis(500)),
            Fault::Malformed(complaint) => {
                error!(self.log, "worker killed: {complaint}"; "worker" => worker);
                self.pool.condemn(worker, Instant::now());
            }
        }
    }

    /// What the worker managed to report before it died counts.
    pub(crate) fn take_last_reports(&mut self, worker: WorkerId) {
        let Some(mut buffer) = self.buffer.take() else { return };
        let _ = self.read_reports(worker, &mut buffer);
        self.buffer = Some(buffer);
    }

    /// The process is gone: its programs are ended, its clients answered, and it is replaced.
    pub(crate) fn worker_ended(
        &mut self,
        worker: WorkerId,
        status: Option<WaitStatus>,
        now: Instant,
    ) {
        let link = self.workers.remove(&worker);
        let Some(death) = self.pool.died(worker, status.is_none(), now) else { return };
        let mut busy = Vec::new();
        if let Some(link) = link {
            self.watcher.remove(&link.jobs);
            self.watcher.remove(&link.control);
            self.log_death(worker, link.pid, status, &death);
            busy = self.orphans.adopt(&link.children, now);
        }
        if !death.jobs.is_empty() {
            busy.extend(self.orphans.adopt_unreported(&death.jobs, now));
        }
        for &job in &death.jobs {
            let reply = Reply::temporary(texts::TRY_AGAIN);
            // Whose program still runs is answered when it has ended.
            let client = self.connections.get(job).map(|c| (c.peer, c.accepted));
            let runs = busy.contains(&job) || self.orphans.concerns(job);
            let told = runs || self.connections.answer(job, &reply, &self.watcher);
            if let Some((peer, accepted)) = client {
                self.log_lost(worker, job, peer, accepted, told);
            }
        }
        if !death.was_ready {
            let commands = self.generations.worker_died(death.generation, now);
            self.roll_out(commands, now);
        }
        self.retire_finished(now);
    }

    fn log_death(
        &self,
        worker: WorkerId,
        pid: Option<Pid>,
        status: Option<WaitStatus>,
        death: &crate::workers::pool::Death,
    ) {
        let pid = pid.map_or(0, Pid::as_raw);
        let cause = status.map_or_else(|| "not forked".to_owned(), describe);
        if death.unexpected {
            error!(self.log, "worker died: {cause}"; "worker" => worker, "pid" => pid,
                "generation" => death.generation, "mails_lost_to_retry" => death.jobs.len());
        } else {
            debug!(self.log, "worker ended: {cause}"; "worker" => worker, "pid" => pid,
                "generation" => death.generation);
        }
    }

    /// Does what the pool finds due.
    pub(crate) fn workers_due(&mut self, now: Instant) {
        let (commands, hangs) = self.pool.tick(now);
        for (worker, hang) in hangs {
            self.log_hang(worker, hang, None);
        }
        self.command(commands, now);
    }

    fn log_hang(&self, worker: WorkerId, hang: Hang, job: Option<JobId>) {
        let mail = job
            .filter(|&job| job != JobId::default())
            .map(|job| self.mail_id(job))
            .unwrap_or_default();
        match hang {
            Hang::Held(held) => error!(self.log, "worker hangs in Lua: killing it";
                "worker" => worker, "held_seconds" => held.as_secs_f64(), "id" => &*mail),
            Hang::Silent(pings) => error!(self.log, "worker doesn't answer: killing it";
                "worker" => worker, "pings" => pings, "in_flight" => self.pool.jobs_of(worker)),
            Hang::NotReady => error!(self.log, "worker doesn't become ready: killing it";
                "worker" => worker),
            Hang::DrainOver => warn!(self.log, "drain time is over: killing worker";
                "worker" => worker, "in_flight" => self.pool.jobs_of(worker)),
        }
    }

    /// Starts to watch a worker's channels.
    pub(crate) fn watch_worker(&mut self, worker: WorkerId) -> nix::Result<()> {
        let Some(link) = self.workers.get(&worker) else { return Ok(()) };
        self.watcher.add(&link.jobs, Source::Jobs(worker))?;
        self.watcher.add(&link.control, Source::Control(worker))
    }
}

fn fault(error: RecvError) -> Option<Fault> {
    match error {
        RecvError::Empty => None,
        RecvError::Closed => Some(Fault::Closed),
        other => Some(Fault::Malformed(other.to_string())),
    }
}

/// A wait status in words.
pub(crate) fn describe(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("exit status {code}"),
        WaitStatus::Signaled(_, signal, core) => {
            format!("{signal}{}", if core { " (core dumped)" } else { "" })
        }
        other => format!("{other:?}"),
    }
}
