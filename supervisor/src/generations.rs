//! Generations: loading a configuration, switching to it, ending it.
//!
//! [`Rollout`] owns the loaded configurations and the zygotes that can fork their workers. What is
//! tried and when is decided in `reload`; `zygotes` talks to the zygotes.
//!
//! # Failure
//! A generation that fails before its first worker is ready leaves no trace but a log line and the
//! systemd status. At the start of the daemon it ends the daemon instead.

mod reload;
mod zygotes;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use qrelay_shared::admin;
use qrelay_shared::exit::Exit;
use qrelay_shared::ipc::channel::RecvBuffer;
use qrelay_shared::ipc::message::ZygoteOrder;
use qrelay_shared::settings::{Account, Declaration};
use slog::{Logger, error, info};

use crate::event::{Asker, Cause, Event, Events, NewAsker, OpenerChannel};
use crate::generations::reload::{Command, Generations};
use crate::generations::zygotes::{Order, Zygote};
use crate::ids::{GenerationId, ZygoteId};
use crate::system::System;
use crate::watch::Watcher;

/// Facts that are the same for every generation.
#[derive(Debug)]
pub(crate) struct Loading {
    /// Absolute path of config.lua.
    pub(crate) config: PathBuf,
    /// How long a script may take to declare itself.
    pub(crate) boot_timeout: Duration,
    /// Names this run of the supervisor in the ids of mails.
    pub(crate) instance: String,
    /// The account that zygotes become before they run the script.
    pub(crate) account: Option<Account>,
    /// FileDescriptorNames of the sockets that systemd passed.
    pub(crate) passed: Vec<String>,
}

/// A configuration that was, or is being, loaded.
#[derive(Debug, Default)]
struct Generation {
    declaration: Declaration,
    zygote: Option<ZygoteId>,
    standby: Option<ZygoteId>,
    standby_due: Option<Instant>,
    /// Why the generation can't be used, for the one message about it.
    failure: Option<(Exit, String)>,
    /// The generation got new connections.
    served: bool,
    /// New connections go to a later generation, so no further zygote is of use.
    superseded: bool,
}

/// The owner of generations and zygotes.
#[derive(Debug)]
pub(crate) struct Rollout {
    log: Logger,
    loading: Loading,
    watcher: Watcher,
    system: Rc<dyn System>,
    /// Taken while it is read from.
    buffer: Option<RecvBuffer>,
    reload: Generations,
    loaded: BTreeMap<GenerationId, Generation>,
    zygotes: BTreeMap<ZygoteId, Zygote>,
    last_zygote: ZygoteId,
}

impl Rollout {
    /// Starts without a generation.
    pub(crate) fn new(
        log: Logger,
        loading: Loading,
        watcher: Watcher,
        system: Rc<dyn System>,
    ) -> Self {
        Self {
            log,
            reload: Generations::new(loading.boot_timeout),
            loading,
            watcher,
            system,
            buffer: Some(RecvBuffer::new()),
            loaded: BTreeMap::new(),
            zygotes: BTreeMap::new(),
            last_zygote: ZygoteId::default(),
        }
    }

    /// Loads the first generation.
    pub(crate) fn boot(&mut self, now: Instant, events: &mut Events) {
        let commands = self.reload.boot(now);
        self.carry_out(commands, now, events);
    }

    /// Loads a new generation, as soon as that is possible.
    pub(crate) fn reload(&mut self, now: Instant, events: &mut Events) {
        info!(self.log, "reload requested");
        let commands = self.reload.reload(now);
        self.carry_out(commands, now, events);
    }

    /// Gives up the generation that is being tried, and tries no other.
    pub(crate) fn stop(&mut self, now: Instant, events: &mut Events) {
        let commands = self.reload.stop();
        self.carry_out(commands, now, events);
    }

    /// Counts the generations that serve, finish or are being loaded.
    pub(crate) fn count(&self) -> usize {
        self.loaded.len()
    }

    /// Returns the generation that was tried last, or is being tried.
    pub(crate) fn last(&self) -> GenerationId {
        self.reload.last()
    }

    /// Returns what a loaded generation has declared.
    pub(crate) fn declaration(&self, generation: GenerationId) -> Option<&Declaration> {
        self.loaded.get(&generation).map(|entry| &entry.declaration)
    }

    /// Returns what the generation has declared, if it is still the one that is being tried.
    pub(crate) fn starting(&self, generation: GenerationId) -> Option<&Declaration> {
        self.declaration(generation).filter(|_| self.reload.is_starting(generation))
    }

    /// Returns the longest time that a loaded generation allows for a drain.
    pub(crate) fn drain_timeout(&self) -> Duration {
        let entries = self.loaded.values();
        entries.map(|entry| entry.declaration.settings.drain_timeout).max().unwrap_or_default()
    }

    /// Notes that a worker can take jobs: the first one of a generation makes it the current one.
    pub(crate) fn worker_ready(
        &mut self,
        generation: GenerationId,
        now: Instant,
        events: &mut Events,
    ) {
        let commands = self.reload.worker_ready(generation, now);
        self.carry_out(commands, now, events);
    }

    /// Notes that a worker died before it was ready.
    pub(crate) fn worker_failed(
        &mut self,
        generation: GenerationId,
        now: Instant,
        events: &mut Events,
    ) {
        let commands = self.reload.worker_died(generation, now);
        self.carry_out(commands, now, events);
    }

    /// Gives a generation up that can't be used.
    pub(crate) fn fail(
        &mut self,
        generation: GenerationId,
        (exit, message): (Exit, String),
        now: Instant,
        events: &mut Events,
    ) {
        if let Some(entry) = self.loaded.get_mut(&generation) {
            entry.failure.get_or_insert((exit, message));
        }
        let commands = self.reload.failed(generation, now);
        self.carry_out(commands, now, events);
    }

    /// Forgets a generation whose last worker is gone.
    pub(crate) fn drained(&mut self, generation: GenerationId, now: Instant, events: &mut Events) {
        let Some(entry) = self.loaded.remove(&generation) else { return };
        for id in [entry.zygote, entry.standby].into_iter().flatten() {
            self.end_zygote(id, events);
        }
        if entry.served {
            info!(self.log, "generation has ended"; "generation" => generation);
        }
        events.push_back(Event::GenerationEnded(generation));
        let commands = self.reload.drained(generation, now);
        self.carry_out(commands, now, events);
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, now: Instant, events: &mut Events) {
        let (commands, late) = self.reload.tick(now);
        if let Some(entry) = late.and_then(|generation| self.loaded.get_mut(&generation)) {
            let limit = self.loading.boot_timeout.as_secs_f64();
            let message = format!("the script was not done after {limit} s (--boot-timeout)");
            entry.failure.get_or_insert((Exit::Temporary, message));
        }
        self.carry_out(commands, now, events);
        let due = |entry: &Generation| entry.standby_due.is_some_and(|at| at <= now);
        let standbys = self.loaded.iter().filter(|(_, entry)| due(entry)).map(|(&id, _)| id);
        for generation in standbys.collect::<Vec<_>>() {
            self.fork_standby(generation, now);
        }
        self.give_up_stuck(now, events);
    }

    /// Returns when [`Self::tick`] has something to do, if ever.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let standbys = self.loaded.values().filter_map(|entry| entry.standby_due);
        let answers = self.next_answer_due();
        self.reload.next_tick().into_iter().chain(standbys).chain(answers).min()
    }

    /// Ends every zygote, and waits for their ends: the daemon ends.
    pub(crate) fn close(&mut self) {
        let zygotes = std::mem::take(&mut self.zygotes);
        let pids: Vec<Pid> = zygotes.values().filter_map(|zygote| zygote.pid).collect();
        self.system.kill_all(&pids);
    }

    /// Carries out what the reload's state machine has decided.
    fn carry_out(&mut self, commands: Vec<Command>, now: Instant, events: &mut Events) {
        for command in commands {
            match command {
                Command::Load(generation, cause) => self.load(generation, cause, now, events),
                Command::Start(generation) => events.push_back(Event::Declared(generation)),
                Command::Switch(new, old) => self.switch(new, old, events),
                Command::Abandon(generation, cause) => self.abandon(generation, cause, events),
            }
        }
    }

    /// Starts a zygote that runs the script.
    fn load(&mut self, generation: GenerationId, cause: Cause, now: Instant, events: &mut Events) {
        self.loaded.insert(generation, Generation::default());
        if cause != Cause::Boot {
            events.push_back(Event::ReloadBegan);
        }
        let (pid, channel) = match self.system.spawn_zygote() {
            Ok(spawned) => spawned,
            Err(error) => {
                let failure = (Exit::System, format!("cannot start a zygote: {error}"));
                return self.fail(generation, failure, now, events);
            }
        };
        let order = ZygoteOrder::Load {
            generation: generation.0,
            config: self.loading.config.clone(),
            reload: cause == Cause::Reload,
            systemd: self.loading.passed.clone(),
            instance: self.loading.instance.clone(),
            account: self.loading.account.clone(),
        };
        let opener = OpenerChannel::pair();
        let sent = opener.map_err(|error| error.to_string()).and_then(|(opener, theirs)| {
            let opener = opener.foreign();
            let sent = channel.try_send(&order, &[theirs.as_fd()]);
            sent.map(|()| opener).map_err(|error| error.to_string())
        });
        let id = self.add_zygote(Zygote::new(generation, Some(pid), channel));
        if let Some(entry) = self.loaded.get_mut(&generation) {
            entry.zygote = Some(id);
        }
        match sent {
            Ok(opener) => {
                let asker = Asker::Zygote(id);
                events.push_back(Event::AskerCame(NewAsker { asker, generation, opener }));
                if let Some(zygote) = self.zygotes.get_mut(&id) {
                    zygote.ordered(Order::Load, now);
                }
            }
            Err(error) => {
                let failure = (Exit::System, format!("cannot order the zygote: {error}"));
                self.fail(generation, failure, now, events);
            }
        }
    }

    /// Makes `new` the generation that gets new connections.
    fn switch(&mut self, new: GenerationId, old: Option<GenerationId>, events: &mut Events) {
        if let Some(entry) = self.loaded.get_mut(&new) {
            entry.served = true;
        }
        events.push_back(Event::Switched { new, old });
        if let Some(old) = old {
            self.supersede(old, events);
        }
    }

    /// Ends the zygotes of a generation that gets no new connections.
    fn supersede(&mut self, generation: GenerationId, events: &mut Events) {
        let Some(entry) = self.loaded.get_mut(&generation) else { return };
        entry.superseded = true;
        entry.standby_due = None;
        for id in [entry.zygote.take(), entry.standby.take()].into_iter().flatten() {
            self.end_zygote(id, events);
        }
        events.push_back(Event::ZygotesEnded(generation));
    }

    /// Ends the zygotes of a generation that never served, and says why it is given up.
    fn abandon(&mut self, generation: GenerationId, cause: Cause, events: &mut Events) {
        self.supersede(generation, events);
        events.push_back(Event::Abandoned(generation));
        if self.reload.is_stopping() {
            return;
        }
        let failure = self.loaded.get_mut(&generation).and_then(|entry| entry.failure.take());
        let (exit, message) = failure
            .unwrap_or_else(|| (Exit::System, "its workers died before they were ready".into()));
        match cause {
            Cause::Boot => {
                error!(self.log, "cannot start: {message}");
                events.push_back(Event::StartFailed(exit));
            }
            Cause::Reload => {
                let hint = if exit == Exit::Config { "" } else { "; trying again may help" };
                error!(self.log, "reload failed, the old configuration serves on: {message}{hint}");
            }
            Cause::Recovery => {
                error!(self.log, "no zygote is left, and loading anew failed: {message}");
            }
        }
        if cause != Cause::Boot {
            events.push_back(Event::ReloadFailed(
                cause,
                Box::new(admin::Reload {
                    at: admin::now(),
                    generation: generation.0,
                    failure: Some(message),
                    may_pass: exit != Exit::Config,
                }),
            ));
        }
    }
}

#[cfg(test)]
#[path = "generations/tests.rs"]
mod tests;
