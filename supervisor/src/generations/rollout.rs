//! Generations put into practice: zygotes and standbys, listeners, the switch
//! from one generation to the next, and the way back when one can't be used.
//!
//! # Failure
//! A generation that fails before its first worker is ready leaves no trace but
//! a log line and the systemd status; at boot it ends the daemon instead.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use qrelay_shared::exit::Exit;
use qrelay_shared::ipc::channel::{Channel, RecvError};
use qrelay_shared::ipc::message::{ZygoteOrder, ZygoteReport};
use qrelay_shared::settings::{Declaration, ListenAddress};
use slog::{debug, error, info, warn};

use crate::accept::connections::State;
use crate::accept::fairness::Client;
use crate::accept::listeners::Socket;
use crate::daemon::{Daemon, Phase};
use crate::event::Source;
use crate::generations::reload::{Cause, Command};
use crate::generations::zygote::{Zygote, ZygoteChannel};
use crate::ids::{GenerationId, ListenerId, WorkerId, ZygoteId};
use crate::workers::processes::{Worker, describe};

/// How long until a standby that died is forked again.
const STANDBY_RETRY: Duration = Duration::from_secs(1);

/// A configuration that was, or is being, loaded.
#[derive(Debug, Default)]
pub(crate) struct Generation {
    /// What its script wants.
    pub(crate) declaration: Declaration,
    zygote: Option<ZygoteId>,
    standby: Option<ZygoteId>,
    standby_due: Option<Instant>,
    /// Why it can't be used, for the one message about it.
    failure: Option<(Exit, String)>,
    /// It was the one that gets new connections.
    served: bool,
    /// New connections go to a later one; retired once it has none of its own left.
    superseded: bool,
}

/// A local listener that takes nothing new, and whose backlog could not be emptied: descriptors ran out.
#[derive(Debug)]
pub(crate) struct Ending {
    listener: ListenerId,
    last: Option<(GenerationId, u32)>,
}

impl Ending {
    /// Whether a generation, which is the current one or not, must serve what is in the backlog.
    fn needs(&self, generation: GenerationId, current: bool) -> bool {
        self.last.map_or(current, |(last, _)| last == generation)
    }
}

impl Daemon {
    /// Carries out what the reload's state machine has decided.
    pub(crate) fn roll_out(&mut self, commands: Vec<Command>, now: Instant) {
        for command in commands {
            match command {
                Command::Load(generation, cause) => self.load(generation, cause, now),
                Command::Start(generation) => self.start_generation(generation, now),
                Command::Switch(new, old) => self.switch(new, old, now),
                Command::Abandon(generation, cause) => self.abandon(generation, cause, now),
            }
        }
    }

    fn load(&mut self, generation: GenerationId, cause: Cause, now: Instant) {
        self.loaded.insert(generation, Generation::default());
        if cause != Cause::Boot {
            self.systemd.reloading();
        }
        let zygote = match Zygote::spawn(generation, self.options.level) {
            Ok(zygote) => zygote,
            Err(error) => {
                return self.fail(
                    generation,
                    Exit::System,
                    format!("cannot start a zygote: {error}"),
                    now,
                );
            }
        };
        let order = ZygoteOrder::Load {
            config: self.options.config.clone(),
            reload: cause == Cause::Reload,
            systemd: self.listeners.adopted_names(),
            instance: self.instance.clone(),
        };
        let sent = zygote.channel.try_send(&order, &[]).map_err(|error| error.to_string());
        let id = self.add_zygote(zygote);
        if let Some(entry) = self.loaded.get_mut(&generation) {
            entry.zygote = Some(id);
        }
        if let Err(error) = sent {
            self.fail(generation, Exit::System, format!("cannot order the zygote: {error}"), now);
        }
    }

    fn add_zygote(&mut self, zygote: Zygote) -> ZygoteId {
        let id = self.last_zygote.advance();
        if let Err(error) = self.watcher.add(&zygote.channel, Source::Zygote(id)) {
            error!(self.log, "epoll_ctl: {error}");
        }
        self.zygotes.insert(id, zygote);
        id
    }

    /// A zygote has something to say.
    pub(crate) fn on_zygote(&mut self, id: ZygoteId) {
        let now = Instant::now();
        let Some(mut buffer) = self.buffer.take() else { return };
        let mut fault = None;
        while let Some(zygote) = self.zygotes.get(&id) {
            let generation = zygote.generation;
            match zygote.channel.try_recv(&mut buffer) {
                Ok(mut received) => match received.fds.take() {
                    Some(fd) => self.dictionaries.add_line(fd, &self.watcher),
                    None => self.on_zygote_report(generation, received.message, now),
                },
                Err(RecvError::Empty) => break,
                // A channel to the dictionaries that we had no descriptor for: the script is told.
                Err(RecvError::DescriptorLost) => {}
                Err(error) => {
                    fault = Some(error);
                    break;
                }
            }
        }
        self.buffer = Some(buffer);
        if let Some(error) = fault {
            self.distrust_zygote(id, &error.to_string(), now);
        }
    }

    /// A zygote that doesn't speak any more is ended; its exit status, when it is reaped, tells
    /// more than the end of its channel.
    fn distrust_zygote(&mut self, id: ZygoteId, cause: &str, now: Instant) {
        match self.zygotes.get(&id).map(|zygote| (zygote.pid, &zygote.channel)) {
            Some((Some(pid), channel)) => {
                self.watcher.remove(channel);
                // Ours, and not reaped: the pid can't be anybody else's.
                let _ = kill(pid, Signal::SIGKILL);
            }
            _ => self.lose_zygote(id, cause, now),
        }
    }

    fn on_zygote_report(&mut self, generation: GenerationId, report: ZygoteReport, now: Instant) {
        match report {
            ZygoteReport::Declared(declaration) => {
                if let Some(entry) = self.loaded.get_mut(&generation) {
                    entry.declaration = *declaration;
                }
                self.fork_standby(generation, now);
                let commands = self.generations.declared(generation);
                self.roll_out(commands, now);
            }
            ZygoteReport::Dictionary => {
                warn!(self.log, "out of descriptors for a shared dictionary");
            }
            ZygoteReport::Failed { message } => self.fail(generation, Exit::Config, message, now),
            ZygoteReport::Forked { worker, pid } => {
                self.worker_forked(worker, Pid::from_raw(pid), now);
            }
            ZygoteReport::ForkFailed { worker, message } => {
                warn!(self.log, "cannot fork a worker: {message}"; "worker" => worker);
                self.worker_ended(worker, None, now);
            }
            ZygoteReport::StandbyForked { pid } => {
                self.standby_forked(generation, Pid::from_raw(pid), now);
            }
            ZygoteReport::StandbyFailed { message } => {
                warn!(self.log, "cannot fork a standby: {message}"; "generation" => generation);
                if let Some(standby) = self.loaded.get(&generation).and_then(|g| g.standby) {
                    self.lose_zygote(standby, "not forked", now);
                }
            }
        }
    }

    /// Asks the zygote for a process that can take its place.
    fn fork_standby(&mut self, generation: GenerationId, now: Instant) {
        let Some(entry) = self.loaded.get_mut(&generation) else { return };
        entry.standby_due = None;
        let Some(zygote) = entry.zygote.and_then(|id| self.zygotes.get(&id)) else { return };
        let sent =
            ZygoteChannel::pair().map_err(|error| error.to_string()).and_then(|(ours, theirs)| {
                zygote
                    .channel
                    .try_send(&ZygoteOrder::Standby, &[theirs.as_fd()])
                    .map_err(|error| error.to_string())?;
                Ok(ours)
            });
        match sent {
            Ok(channel) => {
                let id = self.add_zygote(Zygote { generation, pid: None, channel });
                if let Some(entry) = self.loaded.get_mut(&generation) {
                    entry.standby = Some(id);
                }
            }
            Err(error) => {
                warn!(self.log, "cannot ask for a standby: {error}"; "generation" => generation);
                entry.standby_due = Some(now + STANDBY_RETRY);
            }
        }
    }

    fn standby_forked(&mut self, generation: GenerationId, pid: Pid, now: Instant) {
        let standby = self.loaded.get(&generation).and_then(|entry| entry.standby);
        if let Some(zygote) = standby.and_then(|id| self.zygotes.get_mut(&id)) {
            zygote.pid = Some(pid);
        }
        if self.strangers.remove(&pid).is_some()
            && let Some(id) = standby
        {
            self.lose_zygote(id, "it ended at once", now);
        }
    }

    /// A child that ended was a zygote.
    pub(crate) fn zygote_ended(&mut self, pid: Pid, status: WaitStatus, now: Instant) -> bool {
        let Some(id) = self.zygotes.iter().find(|(_, z)| z.pid == Some(pid)).map(|(&id, _)| id)
        else {
            return false;
        };
        // Its last words come first: the reason why a script can't be used.
        self.on_zygote(id);
        if let Some(zygote) = self.zygotes.get_mut(&id) {
            zygote.pid = None;
            if let (WaitStatus::Exited(_, code), Some(entry)) =
                (status, self.loaded.get_mut(&zygote.generation))
            {
                // Only the script can end its process in an orderly way.
                entry.failure.get_or_insert_with(|| {
                    let hint = "does the script call os.exit()?";
                    (Exit::Config, format!("the zygote ended with exit status {code}; {hint}"))
                });
            }
            self.lose_zygote(id, &describe(status), now);
        }
        true
    }

    /// A zygote is of no use any more: its standby takes over, or a new generation must.
    fn lose_zygote(&mut self, id: ZygoteId, cause: &str, now: Instant) {
        let Some(generation) = self.drop_zygote(id) else { return };
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
        if self.generations.attempt().is_some_and(|(attempt, _)| attempt == generation)
            && entry.zygote.is_none()
        {
            return self.fail(generation, Exit::System, format!("the zygote ended: {cause}"), now);
        }
        if entry.superseded {
            return;
        }
        if entry.zygote.is_some() {
            warn!(self.log, "zygote lost: {cause}; its standby takes over"; "generation" => generation);
            self.fork_standby(generation, now);
        } else {
            error!(self.log, "zygote lost: {cause}; no standby: loading the configuration anew";
                "generation" => generation);
            self.systemd.status(format!("{}; no zygote is left", self.status_line()));
            self.generations.zygotes_lost(generation, now);
        }
        self.refork(generation, now);
    }

    /// Asks again for the workers that a lost zygote may not have forked.
    fn refork(&mut self, generation: GenerationId, now: Instant) {
        for worker in self.pool.starting(generation) {
            self.workers.remove(&worker);
            self.pool.restart(worker, now);
            self.fork_worker(generation, worker, now);
        }
    }

    /// Ends a zygote and forgets it.
    fn drop_zygote(&mut self, id: ZygoteId) -> Option<GenerationId> {
        let zygote = self.zygotes.remove(&id)?;
        self.watcher.remove(&zygote.channel);
        if let Some(pid) = zygote.pid {
            // Ours, and not reaped: the pid can't be anybody else's.
            let _ = kill(pid, Signal::SIGKILL);
        }
        Some(zygote.generation)
    }

    /// Sends a new worker's sockets to the generation's zygote.
    pub(crate) fn fork_worker(&mut self, generation: GenerationId, worker: WorkerId, now: Instant) {
        let result = self.try_fork_worker(generation, worker);
        if let Err(error) = result {
            debug!(self.log, "cannot ask for a worker: {error}"; "worker" => worker);
            self.worker_ended(worker, None, now);
        }
    }

    fn try_fork_worker(
        &mut self,
        generation: GenerationId,
        worker: WorkerId,
    ) -> Result<(), String> {
        let zygote = self
            .loaded
            .get(&generation)
            .and_then(|entry| entry.zygote)
            .and_then(|id| self.zygotes.get(&id))
            .ok_or("no zygote")?;
        let (jobs, their_jobs) = Channel::pair().map_err(|error| format!("socketpair: {error}"))?;
        let (control, their_control) =
            Channel::pair().map_err(|error| format!("socketpair: {error}"))?;
        zygote
            .channel
            .try_send(&ZygoteOrder::Fork { worker }, &[their_jobs.as_fd(), their_control.as_fd()])
            .map_err(|error| error.to_string())?;
        self.workers.insert(worker, Worker { pid: None, jobs, control, children: Vec::new() });
        self.watch_worker(worker).map_err(|error| format!("epoll_ctl: {error}"))
    }

    /// The script has declared itself: its sockets, then its workers.
    fn start_generation(&mut self, generation: GenerationId, now: Instant) {
        let Some(entry) = self.loaded.get(&generation) else { return };
        let wants_passed = entry
            .declaration
            .listeners
            .iter()
            .any(|declared| matches!(declared.address, ListenAddress::Systemd(_)));
        if wants_passed && self.listeners.adopted_names().is_empty() {
            warn!(self.log, "qmqp_listen(systemd): systemd has passed no socket");
        }
        if let Err(error) = self.listeners.prepare(generation, &entry.declaration) {
            return self.fail(generation, Exit::System, error.to_string(), now);
        }
        let commands = self.pool.start(generation, &entry.declaration.settings, now);
        self.command(commands, now);
    }

    /// This generation can't be used.
    fn fail(&mut self, generation: GenerationId, exit: Exit, message: String, now: Instant) {
        if let Some(entry) = self.loaded.get_mut(&generation) {
            entry.failure.get_or_insert((exit, message));
        }
        let commands = self.generations.failed(generation, now);
        self.roll_out(commands, now);
    }

    /// The first worker of `new` is ready: it gets everything from now on.
    fn switch(&mut self, new: GenerationId, old: Option<GenerationId>, now: Instant) {
        self.pool.switch(new);
        if let Some(entry) = self.loaded.get_mut(&new) {
            entry.served = true;
            let server = entry.declaration.log_server.clone();
            for error in self.listeners.activate(new, &entry.declaration) {
                error!(self.log, "listener: {error}");
            }
            self.log_to(server);
        }
        if let Some(old) = old {
            self.drop_missing_listeners(new, old);
            self.supersede(old);
        }
        self.watch_listeners();
        if self.phase == Phase::Starting {
            self.phase = Phase::Serving;
        }
        info!(self.log, "ready"; "generation" => new, "workers" => self.settings_workers(new));
        self.systemd.ready(self.status_line());
        self.retire_finished(now);
    }

    fn settings_workers(&self, generation: GenerationId) -> u32 {
        self.loaded.get(&generation).map_or(0, |entry| entry.declaration.settings.workers)
    }

    /// One line for `systemctl status`.
    fn status_line(&self) -> String {
        let current = self.generations.current().unwrap_or_default();
        format!("Generation {current} serves with {} workers", self.settings_workers(current))
    }

    /// Listeners that only the old generation has: what waits there is still served by it.
    fn drop_missing_listeners(&mut self, new: GenerationId, old: GenerationId) {
        for id in self.listeners.without(new) {
            match self.listeners.get(id).and_then(|listener| listener.number(old)) {
                Some(number) => self.end_listener(id, Some((old, number))),
                None => self.listeners.close(id),
            }
        }
    }

    /// Nothing new gets into a backlog; what waits there is taken, at once if there are
    /// descriptors enough. `last` is the generation that must serve it, and the listener's number
    /// there; none at a stop, when there is only one.
    fn end_listener(&mut self, id: ListenerId, last: Option<(GenerationId, u32)>) {
        if let Some(listener) = self.listeners.get_mut(id) {
            if std::mem::take(&mut listener.watched) {
                self.watcher.remove(&listener.socket);
            }
            listener.refuse_new();
        }
        self.empty_backlog(Ending { listener: id, last });
    }

    fn empty_backlog(&mut self, ending: Ending) {
        let Ending { listener: id, last } = ending;
        let emptied = self.accept_all(id);
        if let Some((generation, number)) = last {
            self.serve_with(id, generation, number);
        }
        if let Some(listener) = self.listeners.get(id) {
            // A TCP port can't be kept from getting more without losing what it has.
            if !emptied && matches!(listener.socket, Socket::Unix(_)) {
                return self.ending.push(ending);
            }
            listener.stop_listening();
        }
        if last.is_some() {
            self.listeners.close(id);
        }
    }

    /// Binds the listener's unserved connections to the generation that knows it.
    fn serve_with(&mut self, listener: ListenerId, generation: GenerationId, number: u32) {
        let mut waiting = Vec::new();
        for (job, connection) in self.connections.unserved() {
            if connection.listener == listener && connection.last_chance.is_none() {
                connection.last_chance = Some((generation, number));
                if connection.state == State::Waiting {
                    waiting.push((job, Client::from(connection.peer)));
                }
            }
        }
        for (job, client) in waiting {
            self.pool.forget(client, job);
            self.serve_last(job);
        }
    }

    /// The generation gets no new connections; its zygotes are of no use any more.
    fn supersede(&mut self, generation: GenerationId) {
        let Some(entry) = self.loaded.get_mut(&generation) else { return };
        entry.superseded = true;
        entry.standby_due = None;
        for id in [entry.zygote.take(), entry.standby.take()].into_iter().flatten() {
            self.drop_zygote(id);
        }
    }

    /// Retires generations that no connection needs, and removes those that have ended.
    pub(crate) fn retire_finished(&mut self, now: Instant) {
        let stopping = matches!(self.phase, Phase::Stopping { .. });
        let candidates: Vec<_> = self
            .loaded
            .iter()
            .filter(|(_, entry)| entry.superseded || stopping)
            .map(|(&generation, _)| generation)
            .collect();
        for generation in candidates {
            let current = self.generations.current() == Some(generation);
            let free = self.connections.none_unserved(|connection| match connection.last_chance {
                Some((wanted, _)) => wanted == generation,
                None => current,
            });
            let free = free && !self.ending.iter().any(|ending| ending.needs(generation, current));
            if free {
                let commands = self.pool.retire(generation, now);
                self.command(commands, now);
                self.end_unborn(generation, now);
            }
            let known = self.loaded.contains_key(&generation);
            if free && known && self.pool.is_empty(generation) {
                self.remove_generation(generation, now);
            }
        }
    }

    /// Gives up the workers that the generation's zygote was asked for and hasn't delivered: it is
    /// gone. One that it did fork ends by itself, its sockets being closed.
    fn end_unborn(&mut self, generation: GenerationId, now: Instant) {
        if self.loaded.get(&generation).is_none_or(|entry| entry.zygote.is_some()) {
            return;
        }
        for worker in self.workers_of(generation) {
            if self.workers.get(&worker).is_none_or(|link| link.pid.is_none()) {
                self.worker_ended(worker, None, now);
            }
        }
    }

    fn remove_generation(&mut self, generation: GenerationId, now: Instant) {
        self.supersede(generation);
        self.pool.remove(generation);
        self.listeners.forget(generation);
        if self.loaded.remove(&generation).is_some_and(|entry| entry.served) {
            info!(self.log, "generation has ended"; "generation" => generation);
        }
        let commands = self.generations.drained(generation, now);
        self.roll_out(commands, now);
    }

    /// Takes back everything a failed generation has got.
    fn abandon(&mut self, generation: GenerationId, cause: Cause, now: Instant) {
        self.listeners.abandon(generation);
        self.supersede(generation);
        for worker in self.workers_of(generation) {
            self.signal_worker(worker, Signal::SIGKILL);
        }
        let commands = self.pool.retire(generation, now);
        self.command(commands, now);
        let failure = self.loaded.get_mut(&generation).and_then(|entry| entry.failure.take());
        let (exit, message) = failure
            .unwrap_or_else(|| (Exit::System, "its workers died before they were ready".into()));
        match cause {
            _ if matches!(self.phase, Phase::Stopping { .. }) => {}
            Cause::Boot => {
                error!(self.log, "cannot start: {message}");
                self.phase = Phase::Ended(exit);
            }
            Cause::Reload => {
                error!(self.log, "reload failed, the old configuration serves on: {message}");
                let line = self.status_line();
                self.systemd.ready(format!("{line}; reload failed: {message}"));
            }
            Cause::Recovery => {
                error!(self.log, "no zygote is left, and loading anew failed: {message}");
                let line = self.status_line();
                self.systemd.ready(format!("{line}; no zygote is left, loading failed: {message}"));
            }
        }
    }

    fn workers_of(&self, generation: GenerationId) -> Vec<WorkerId> {
        self.pool.all().filter(|&id| self.pool.generation_of(id) == Some(generation)).collect()
    }

    /// Does what is due.
    pub(crate) fn rollout_due(&mut self, now: Instant) {
        let (commands, late) = self.generations.tick(now);
        if let Some(entry) = late.and_then(|generation| self.loaded.get_mut(&generation)) {
            let limit = self.options.boot_timeout.as_secs_f64();
            let message = format!("the script was not done after {limit} s (--boot-timeout)");
            entry.failure.get_or_insert((Exit::Config, message));
        }
        self.roll_out(commands, now);
        let standbys: Vec<_> = self
            .loaded
            .iter()
            .filter(|(_, entry)| entry.standby_due.is_some_and(|at| at <= now))
            .map(|(&generation, _)| generation)
            .collect();
        for generation in standbys {
            self.fork_standby(generation, now);
        }
        for ending in std::mem::take(&mut self.ending) {
            self.empty_backlog(ending);
        }
        self.retire_finished(now);
    }

    /// Takes what waits in all backlogs, then closes and unlinks the sockets.
    pub(crate) fn close_listeners(&mut self) {
        let Some(current) = self.generations.current() else {
            return;
        };
        for id in self.listeners.with(current) {
            self.end_listener(id, None);
        }
    }
}
