//! What the supervisor does beside relaying: logs, shared dictionaries, systemd.
//!
//! `Services` owns all of it.
//!
//! # Failure
//! Nothing here delays or fails a mail: what can't be sent is lost, and counted where it matters.

mod dictionaries;
pub mod dictionary_server;
mod mail_log;
mod notifier;
mod pond;
mod separation;
mod systemd;

use std::time::Instant;

use qrelay_shared::ipc::message::MailRecord;
use qrelay_shared::log;
use qrelay_shared::settings::Declaration;
use slog::{Logger, info};

use crate::event::{Asker, Cause, Events, LostMail, NewAsker, Origin, Unserved};
use crate::ids::{ChannelId, GenerationId, JobId, WorkerId};
use crate::services::dictionary_server::DictionaryServer;
use crate::services::mail_log::{Answers, MailLog};
use crate::services::separation::Announcements;
use crate::services::systemd::Systemd;
use crate::watch::Watcher;

/// The owner of logs, dictionaries and the channel to systemd.
#[derive(Debug)]
pub(crate) struct Services {
    log: Logger,
    systemd: Systemd,
    mails: MailLog,
    dictionaries: DictionaryServer,
    announcements: Announcements,
    /// The generation that gets new connections, and how many workers it has.
    serving: Option<(GenerationId, u32)>,
}

impl Services {
    /// Reads what systemd wants from the environment. This process may have `descriptors`
    /// descriptors.
    pub(crate) fn new(
        log: Logger,
        instance: String,
        watcher: Watcher,
        descriptors: u64,
        now: Instant,
    ) -> Self {
        Self {
            systemd: Systemd::new(&log, now),
            mails: MailLog::new(log.clone(), instance),
            log,
            dictionaries: DictionaryServer::new(watcher, descriptors),
            announcements: Announcements::default(),
            serving: None,
        }
    }

    /// Logs a finished mail.
    pub(crate) fn mail_done(
        &mut self,
        worker: WorkerId,
        job: JobId,
        origin: Option<Origin>,
        record: &MailRecord<'_>,
    ) {
        self.mails.done(worker, job, origin.as_ref(), record);
    }

    /// Logs a mail whose worker died.
    pub(crate) fn mail_lost(&mut self, mail: &LostMail, now: Instant) {
        self.mails.lost(mail, now);
    }

    /// Logs a client that had said something and was answered without a worker.
    pub(crate) fn unserved(&mut self, client: &Unserved, now: Instant) {
        self.mails.unserved(client, now);
    }

    /// Returns how the mails so far were answered.
    pub(crate) fn answers(&self) -> Answers {
        self.mails.answers()
    }

    /// Learns what a generation has declared, before its workers start.
    pub(crate) fn declared(&mut self, generation: GenerationId, declaration: &Declaration) {
        self.dictionaries.declared(generation, declaration);
    }

    /// Forgets a generation of which nothing is left.
    pub(crate) fn generation_ended(&mut self, generation: GenerationId) {
        self.dictionaries.generation_ended(generation);
    }

    /// Lets a process ask the dictionaries.
    pub(crate) fn asker_came(&mut self, new: NewAsker) {
        self.dictionaries.asker_came(new);
    }

    /// Closes the channels of a process to the dictionaries.
    pub(crate) fn asker_gone(&mut self, asker: Asker) {
        self.dictionaries.asker_gone(asker);
    }

    /// Answers what a process asks the dictionaries.
    pub(crate) fn on_dictionary(&mut self, channel: ChannelId, now: Instant, events: &mut Events) {
        self.dictionaries.on_ready(channel, now, events);
    }

    /// Tells systemd that another configuration is being loaded.
    pub(crate) fn reload_began(&mut self) {
        self.systemd.reloading();
    }

    /// Follows the settings of a generation that serves from now on, and says that it does.
    pub(crate) fn switch(&mut self, generation: GenerationId, declaration: &Declaration) {
        let workers = declaration.settings.workers;
        self.serving = Some((generation, workers));
        self.dictionaries.set_bounds(&declaration.settings);
        self.mails.send_to(declaration.log_server.clone());
        let separation = declaration.separation;
        self.announcements.switch(&self.log, separation);
        info!(self.log, "ready"; "generation" => generation, "workers" => workers,
            "sandbox" => separation.sandbox.level(),
            "user" => separation.user.map(|(user, _)| user));
        let line = self.status_line();
        self.systemd.ready(&line);
    }

    /// Tells systemd that a configuration can't be used, and that the old one serves on.
    pub(crate) fn reload_failed(&mut self, cause: Cause, message: &str) {
        let line = self.status_line();
        self.systemd.ready(&match cause {
            Cause::Recovery => format!("{line}; no zygote is left, loading failed: {message}"),
            Cause::Boot | Cause::Reload => format!("{line}; reload failed: {message}"),
        });
    }

    /// Tells systemd that no process can fork workers of the serving generation.
    pub(crate) fn no_zygote_left(&mut self) {
        let line = self.status_line();
        self.systemd.status(&format!("{line}; no zygote is left"));
    }

    /// Tells systemd that the daemon stops.
    pub(crate) fn stop(&mut self, in_flight: usize, now: Instant) {
        self.systemd.stopping(&format!("Stopping: {in_flight} mails in flight"), now);
    }

    /// Reports what has not been reported: the daemon ends.
    pub(crate) fn close(&mut self) {
        self.mails.send_to(None);
        log::report_rest(&self.log);
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.dictionaries.begin_turn(now);
        self.systemd.tick(now);
        self.mails.tick(now);
        log::report_repeats(&self.log, now);
    }

    /// Returns when [`Self::tick`] has something to do, if ever.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let deadlines = [
            self.systemd.next_tick(),
            self.mails.next_tick(),
            self.dictionaries.next_turn(),
            log::next_report(),
        ];
        deadlines.into_iter().flatten().min()
    }

    /// Returns one line for `systemctl status`.
    fn status_line(&self) -> String {
        let (generation, workers) = self.serving.unwrap_or_default();
        format!("Generation {generation} serves with {workers} workers")
    }
}
