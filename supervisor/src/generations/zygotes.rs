//! The zygotes: what they report, what they are asked for, and their ends.
//!
//! A zygote is this same binary, executed anew. It runs the script of one generation and forks the
//! workers, and a standby of itself, which takes its place should it die. Both are children of the
//! supervisor.
//!
//! # Failure
//! A zygote that breaks the protocol, or tells a process id that can't be true, is killed. Its
//! standby takes over; without one, the configuration is loaded anew, and the living workers serve
//! on meanwhile.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use qrelay_shared::exit::Exit;
use qrelay_shared::ipc::channel::RecvError;
use qrelay_shared::ipc::message::{ZygoteOrder, ZygoteReport};
use slog::{debug, error, warn};

use crate::event::{Asker, Event, Events, NewWorker, Teller};
use crate::generations::Rollout;
use crate::ids::{GenerationId, WorkerId, ZygoteId};
use crate::system::{ZygoteChannel, ZygotePids, describe};
use crate::watch::Source;

/// How long until a standby that died is forked again.
const STANDBY_RETRY: Duration = Duration::from_secs(1);

/// How long a zygote may take for a fork: some milliseconds are usual, and a machine that swaps may
/// need a second. A zygote and its standby that are both stopped are found out one after the other.
const FORK_LIMIT: Duration = Duration::from_secs(5);
/// A look that comes this late says that this process was stopped itself.
const LATE: Duration = Duration::from_secs(1);

/// Reports that are read from one zygote before everybody else has a turn.
const PER_TURN: usize = 64;
/// Reports that are read of a zygote that has ended, more than a socket can hold at once.
const LAST_WORDS: usize = 4096;

/// An order that a zygote has not answered yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// To run the script.
    Load,
    /// To fork this worker.
    Fork(WorkerId),
    /// To fork this standby.
    Standby(ZygoteId),
}

impl Order {
    fn is_answered_by(self, report: &ZygoteReport) -> bool {
        match report {
            ZygoteReport::Declared(_) | ZygoteReport::Failed { .. } => self == Self::Load,
            ZygoteReport::Forked { worker, .. } | ZygoteReport::ForkFailed { worker, .. } => {
                self == Self::Fork(*worker)
            }
            ZygoteReport::StandbyForked { .. } | ZygoteReport::StandbyFailed { .. } => {
                matches!(self, Self::Standby(_))
            }
        }
    }
}

/// A process that can fork workers of one generation.
#[derive(Debug)]
pub(super) struct Zygote {
    /// The generation whose configuration the process holds.
    pub(super) generation: GenerationId,
    /// The process id. A standby's isn't known at once, and one that was reaped has none.
    pub(super) pid: Option<Pid>,
    /// Orders go out, reports come in.
    pub(super) channel: ZygoteChannel,
    /// The orders that the process has not answered. It answers each one once, in their order.
    orders: VecDeque<Order>,
    /// When the first of these orders has to be answered, if it is a fork.
    answer_due: Option<Instant>,
    /// The process id that was told for this standby, before anybody has checked it.
    pub(super) told: Option<Pid>,
    /// The process has lied: it is killed, and not listened to.
    pub(super) lied: bool,
}

impl Zygote {
    /// A zygote whose process id is known, or not yet.
    pub(super) fn new(generation: GenerationId, pid: Option<Pid>, channel: ZygoteChannel) -> Self {
        let orders = VecDeque::new();
        Self { generation, pid, channel, orders, answer_due: None, told: None, lied: false }
    }

    /// Notes an order that was sent, which the process has to answer.
    pub(super) fn ordered(&mut self, order: Order, now: Instant) {
        self.orders.push_back(order);
        if self.orders.len() == 1 {
            self.begin_to_wait(now);
        }
    }

    /// Takes the order that a report answers.
    fn answered(&mut self, now: Instant) -> Option<Order> {
        let order = self.orders.pop_front();
        self.begin_to_wait(now);
        order
    }

    fn begin_to_wait(&mut self, now: Instant) {
        // A script may load for as long as the boot timeout says.
        let fork = self.orders.front().is_some_and(|&order| order != Order::Load);
        self.answer_due = fork.then(|| now + FORK_LIMIT);
    }
}

impl Rollout {
    /// Returns the processes that are zygotes or standbys.
    pub(crate) fn zygote_pids(&self) -> ZygotePids {
        let known: Vec<Pid> = self.zygotes.values().filter_map(|zygote| zygote.pid).collect();
        ZygotePids { unknown: self.zygotes.len() - known.len(), known }
    }

    /// Adds a zygote and watches its channel.
    pub(super) fn add_zygote(&mut self, zygote: Zygote) -> ZygoteId {
        let id = self.last_zygote.advance();
        if let Err(error) = self.watcher.add(&zygote.channel, Source::Zygote(id)) {
            error!(self.log, "epoll_ctl: {error}");
        }
        self.zygotes.insert(id, zygote);
        id
    }

    /// Reads a zygote's reports, but no more than its share of a turn.
    pub(crate) fn on_zygote(&mut self, id: ZygoteId, now: Instant, events: &mut Events) {
        self.read_zygote(id, PER_TURN, now, events);
    }

    /// Reads at most `most` reports.
    fn read_zygote(&mut self, id: ZygoteId, most: usize, now: Instant, events: &mut Events) {
        let Some(mut buffer) = self.buffer.take() else { return };
        let mut fault = None;
        for _ in 0..most {
            let Some(zygote) = self.zygotes.get(&id).filter(|zygote| !zygote.lied) else { break };
            let generation = zygote.generation;
            match zygote.channel.try_recv(&mut buffer) {
                Ok(received) => {
                    let teller = Teller { zygote: id, generation };
                    self.on_report(teller, received.message, now, events);
                }
                Err(RecvError::Empty) => break,
                Err(error) => {
                    fault = Some(error);
                    break;
                }
            }
        }
        self.buffer = Some(buffer);
        match fault {
            Some(RecvError::Closed) => self.distrust(id, "end of channel", now, events),
            Some(error) => self.zygote_lied(id, &error.to_string(), now, events),
            None => {}
        }
    }

    /// Kills a zygote that doesn't speak any more: its exit status, when it is reaped, tells more
    /// than the end of its channel.
    fn distrust(&mut self, id: ZygoteId, cause: &str, now: Instant, events: &mut Events) {
        match self.zygotes.get(&id).map(|zygote| (zygote.pid, &zygote.channel)) {
            Some((Some(pid), channel)) => {
                events.push_back(Event::AskerGone(Asker::Zygote(id)));
                self.watcher.remove(channel);
                // A child that isn't reaped, so the number can't be another process'.
                self.system.signal(pid, Signal::SIGKILL);
            }
            _ => self.lose_zygote(id, cause, now, events),
        }
    }

    /// Kills a zygote that has told something which can't be true, and says so.
    pub(crate) fn zygote_lied(
        &mut self,
        id: ZygoteId,
        complaint: &str,
        now: Instant,
        events: &mut Events,
    ) {
        let Some(zygote) = self.zygotes.get_mut(&id) else {
            error!(self.log, "zygote killed: {complaint}"; "zygote" => id);
            return;
        };
        if zygote.lied {
            return;
        }
        zygote.lied = true;
        error!(self.log, "zygote killed: {complaint}"; "zygote" => id,
            "pid" => zygote.pid.map_or(0, Pid::as_raw), "generation" => zygote.generation);
        self.distrust(id, complaint, now, events);
    }

    /// Returns what makes a report about a fork impossible, before the process itself is looked at:
    /// nobody has asked this process, or the process id is taken.
    fn complaint(&self, teller: Teller, pid: Option<i32>) -> Option<String> {
        let entry = self.loaded.get(&teller.generation);
        if entry.and_then(|entry| entry.zygote) != Some(teller.zygote) {
            return Some("it reported a fork that nobody asked it for".into());
        }
        let pid = pid.map(Pid::from_raw)?;
        let mut zygotes = self.zygotes.values();
        let taken = zygotes.any(|zygote| zygote.pid == Some(pid) || zygote.told == Some(pid));
        taken.then(|| format!("it told process id {pid}, which is a zygote's"))
    }

    fn on_report(
        &mut self,
        teller: Teller,
        report: ZygoteReport,
        now: Instant,
        events: &mut Events,
    ) {
        let Teller { zygote: id, generation } = teller;
        let order = self.zygotes.get_mut(&id).and_then(|zygote| zygote.answered(now));
        let Some(order) = order.filter(|order| order.is_answered_by(&report)) else {
            return self.zygote_lied(id, "it reported what nobody asked it for", now, events);
        };
        if order == Order::Load {
            // The script has run, and only the script asks.
            events.push_back(Event::AskerGone(Asker::Zygote(id)));
        }
        let complaint = match report {
            ZygoteReport::Forked { pid, .. } | ZygoteReport::StandbyForked { pid } => {
                self.complaint(teller, Some(pid))
            }
            ZygoteReport::ForkFailed { .. } | ZygoteReport::StandbyFailed { .. } => {
                self.complaint(teller, None)
            }
            _ => None,
        };
        let complaint = match &report {
            ZygoteReport::Declared(declaration) => {
                let name = declaration.settings.out_of_limits();
                name.map(|name| format!("it declared {name} out of its limits"))
            }
            _ => complaint,
        };
        if let Some(complaint) = complaint {
            return self.zygote_lied(id, &complaint, now, events);
        }
        match report {
            ZygoteReport::Declared(declaration) => {
                if let Some(entry) = self.loaded.get_mut(&generation) {
                    entry.declaration = *declaration;
                }
                self.fork_standby(generation, now);
                let commands = self.reload.declared(generation);
                self.carry_out(commands, now, events);
            }
            ZygoteReport::Failed { message, may_pass } => {
                let exit = if may_pass { Exit::Temporary } else { Exit::Config };
                self.fail(generation, (exit, message), now, events);
            }
            ZygoteReport::Forked { worker, pid } => {
                events.push_back(Event::WorkerForked { teller, worker, pid: Pid::from_raw(pid) });
            }
            ZygoteReport::ForkFailed { worker, message } => {
                warn!(self.log, "cannot fork a worker: {message}"; "worker" => worker);
                events.push_back(Event::WorkerRefused { teller, worker });
            }
            ZygoteReport::StandbyForked { pid } => {
                let Order::Standby(zygote) = order else { return };
                let Some(standby) = self.zygotes.get_mut(&zygote) else { return };
                let pid = Pid::from_raw(pid);
                standby.told = Some(pid);
                events.push_back(Event::StandbyForked { teller, zygote, pid });
            }
            ZygoteReport::StandbyFailed { message } => {
                warn!(self.log, "cannot fork a standby: {message}"; "generation" => generation);
                if let Order::Standby(standby) = order {
                    self.lose_zygote(standby, "not forked", now, events);
                }
            }
        }
    }

    /// Asks the generation's zygote for a process that can take its place.
    pub(super) fn fork_standby(&mut self, generation: GenerationId, now: Instant) {
        let Some(entry) = self.loaded.get_mut(&generation) else { return };
        entry.standby_due = None;
        let Some(asked) = entry.zygote else { return };
        let Some(zygote) = self.zygotes.get(&asked) else { return };
        let sent =
            ZygoteChannel::pair().map_err(|error| error.to_string()).and_then(|(ours, theirs)| {
                let ours = ours.foreign();
                zygote
                    .channel
                    .try_send(&ZygoteOrder::Standby, &[theirs.as_fd()])
                    .map_err(|error| error.to_string())?;
                Ok(ours)
            });
        match sent {
            Ok(channel) => {
                let id = self.add_zygote(Zygote::new(generation, None, channel));
                if let Some(entry) = self.loaded.get_mut(&generation) {
                    entry.standby = Some(id);
                }
                if let Some(zygote) = self.zygotes.get_mut(&asked) {
                    zygote.ordered(Order::Standby(id), now);
                }
            }
            Err(error) => {
                warn!(self.log, "cannot ask for a standby: {error}"; "generation" => generation);
                entry.standby_due = Some(now + STANDBY_RETRY);
            }
        }
    }

    /// Learns the process id of a standby that had not ended when its id became known.
    pub(crate) fn standby_runs(&mut self, id: ZygoteId, pid: Pid) {
        if let Some(standby) = self.zygotes.get_mut(&id) {
            standby.pid = Some(pid);
        }
    }

    /// Gives up a standby that had ended before its process id was known.
    pub(crate) fn standby_ended(&mut self, id: ZygoteId, now: Instant, events: &mut Events) {
        self.lose_zygote(id, "it ended at once", now, events);
    }

    /// Sends a new worker's sockets to the generation's zygote.
    pub(crate) fn fork_worker(&mut self, new: &NewWorker, now: Instant, events: &mut Events) {
        if let Err(error) = self.try_fork_worker(new, now) {
            debug!(self.log, "cannot ask for a worker: {error}"; "worker" => new.worker);
            events.push_back(Event::WorkerNotForked(new.worker));
        }
    }

    fn try_fork_worker(&mut self, new: &NewWorker, now: Instant) -> Result<(), String> {
        let entry = self.loaded.get(&new.generation);
        let zygote = entry.and_then(|entry| entry.zygote);
        let zygote = zygote.and_then(|id| self.zygotes.get_mut(&id)).ok_or("no zygote")?;
        let order = ZygoteOrder::Fork { worker: new.worker };
        let NewWorker { jobs, control, dictionaries, flights, .. } = new;
        let fds = [jobs, control, dictionaries].into_iter().chain(flights).map(AsFd::as_fd);
        let fds: Vec<BorrowedFd<'_>> = fds.collect();
        zygote.channel.try_send(&order, &fds).map_err(|error| error.to_string())?;
        zygote.ordered(Order::Fork(new.worker), now);
        Ok(())
    }

    /// Gives up the zygotes that don't fork what they were asked for: they are stopped, or held by
    /// the kernel. Such a process may not even die, so nobody waits for its end.
    pub(super) fn give_up_stuck(&mut self, now: Instant, events: &mut Events) {
        let due = |zygote: &Zygote| zygote.answer_due.filter(|&due| due <= now);
        let stuck = self.zygotes.iter().filter_map(|(&id, zygote)| Some((id, due(zygote)?)));
        for (id, due) in stuck.collect::<Vec<_>>() {
            let Some(zygote) = self.zygotes.get_mut(&id) else { continue };
            if now.saturating_duration_since(due) > LATE {
                zygote.begin_to_wait(now);
                continue;
            }
            error!(self.log, "zygote doesn't fork: killing it"; "zygote" => id,
                "pid" => zygote.pid.map_or(0, Pid::as_raw), "generation" => zygote.generation);
            self.lose_zygote(id, "it was stuck", now, events);
        }
    }

    /// Returns when [`Self::give_up_stuck`] has something to do, if ever.
    pub(super) fn next_answer_due(&self) -> Option<Instant> {
        self.zygotes.values().filter_map(|zygote| zygote.answer_due).min()
    }

    /// Reaps the zygotes that have ended.
    pub(crate) fn reap(&mut self, now: Instant, events: &mut Events) {
        for id in self.zygotes.keys().copied().collect::<Vec<_>>() {
            // The end of another one may have changed this one.
            let pid = self.zygotes.get(&id).and_then(|zygote| zygote.pid);
            if let Some(pid) = pid.and_then(|pid| self.system.ended(Some(pid))) {
                // The last words come first: they are the reason why a script can't be used.
                self.read_zygote(id, LAST_WORDS, now, events);
                if let Some(status) = self.system.reap(pid) {
                    self.zygote_ended(id, status, now, events);
                }
            }
        }
    }

    fn zygote_ended(
        &mut self,
        id: ZygoteId,
        status: WaitStatus,
        now: Instant,
        events: &mut Events,
    ) {
        let Some(zygote) = self.zygotes.get_mut(&id) else { return };
        zygote.pid = None;
        if let (WaitStatus::Exited(_, code), Some(entry)) =
            (status, self.loaded.get_mut(&zygote.generation))
        {
            entry.failure.get_or_insert_with(|| {
                // A zygote that can't work ends with this status. Any other one comes from what the
                // script runs, such as a library in C; `os.exit` only raises an error.
                let (exit, cause) = match code == Exit::System as i32 {
                    true => (Exit::System, "its own error is in the log"),
                    false => (Exit::Config, "something that the script has called ended it"),
                };
                (exit, format!("the zygote ended with exit status {code}: {cause}"))
            });
        }
        self.lose_zygote(id, &describe(status), now, events);
    }

    /// Replaces a zygote that is of no use any more: its standby takes over, or a new generation
    /// must.
    fn lose_zygote(&mut self, id: ZygoteId, cause: &str, now: Instant, events: &mut Events) {
        let Some(generation) = self.end_zygote(id, events) else { return };
        let Some(entry) = self.loaded.get_mut(&generation) else { return };
        if entry.standby == Some(id) {
            entry.standby = None;
            entry.standby_due = Some(now + STANDBY_RETRY);
            warn!(self.log, "standby lost: {cause}"; "generation" => generation);
            return;
        }
        if entry.zygote != Some(id) {
            return;
        }
        entry.zygote = entry.standby.take();
        if self.reload.attempt().is_some_and(|(attempt, _)| attempt == generation)
            && entry.zygote.is_none()
        {
            let failure = (Exit::System, format!("the zygote ended: {cause}"));
            return self.fail(generation, failure, now, events);
        }
        if entry.superseded {
            return;
        }
        if entry.zygote.is_some() {
            warn!(self.log, "zygote lost: {cause}; its standby takes over";
                "generation" => generation);
            self.fork_standby(generation, now);
        } else {
            error!(self.log, "zygote lost: {cause}; no standby: loading the configuration anew";
                "generation" => generation);
            events.push_back(Event::NoZygoteLeft);
            self.reload.zygotes_lost(generation, now);
        }
        events.push_back(Event::ZygoteLost(generation));
    }

    /// Kills and forgets a zygote; returns its generation.
    pub(super) fn end_zygote(&mut self, id: ZygoteId, events: &mut Events) -> Option<GenerationId> {
        let zygote = self.zygotes.remove(&id)?;
        events.push_back(Event::AskerGone(Asker::Zygote(id)));
        self.watcher.remove(&zygote.channel);
        if let Some(pid) = zygote.pid {
            // A child that isn't reaped, so the number can't be another process'.
            self.system.signal(pid, Signal::SIGKILL);
        }
        Some(zygote.generation)
    }
}
