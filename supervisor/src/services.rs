//! What the supervisor does beside relaying: logs, shared dictionaries, systemd.
//!
//! `Services` owns all of it.
//!
//! # Failure
//! Nothing here delays or fails a mail: what can't be sent is lost, and counted where it matters.

mod dictionaries;
pub mod dictionary_server;
mod figures;
mod mail_log;
mod notifier;
mod pond;
mod separation;
mod systemd;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use qrelay_shared::admin::{Deliveries, Dictionary, Incident, IncidentKind, Reload};
use qrelay_shared::ipc::message::MailRecord;
use qrelay_shared::settings::Declaration;
use qrelay_shared::{admin, log};
use slog::{Logger, info};

use crate::event::{Asker, Cause, Events, LostMail, NewAsker, Origin, Unserved};
use crate::ids::{ChannelId, GenerationId, JobId, WorkerId};
use crate::services::dictionary_server::DictionaryServer;
use crate::services::figures::Figures;
use crate::services::mail_log::MailLog;
use crate::services::separation::Announcements;
use crate::services::systemd::Systemd;
use crate::watch::Watcher;

/// Most incidents that are remembered.
const MOST_INCIDENTS: usize = 64;

/// How often the line for `systemctl status` follows the figures.
const SHOW_EVERY: Duration = Duration::from_secs(5);

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
    /// Level of the workers' sandbox, and their user, if it isn't this process's.
    separation: Option<(&'static str, Option<u32>)>,
    /// The latest attempt to load a configuration that has come to an end.
    last_load: Option<Reload>,
    /// What follows the figures in the line for `systemctl status`.
    trouble: String,
    incidents: VecDeque<Incident>,
    lost_mails: u64,
    next_show: Option<Instant>,
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
            mails: MailLog::new(log.clone(), instance, now),
            log,
            dictionaries: DictionaryServer::new(watcher, descriptors),
            announcements: Announcements::default(),
            serving: None,
            separation: None,
            last_load: None,
            trouble: String::new(),
            incidents: VecDeque::new(),
            lost_mails: 0,
            next_show: None,
        }
    }

    /// Logs a finished mail.
    pub(crate) fn mail_done(
        &mut self,
        worker: WorkerId,
        job: JobId,
        origin: Option<Origin>,
        record: &MailRecord<'_>,
        now: Instant,
    ) {
        self.mails.done(worker, job, origin.as_ref(), record, now);
    }

    /// Logs a mail whose worker died.
    pub(crate) fn mail_lost(&mut self, mail: &LostMail, now: Instant) {
        self.lost_mails += 1;
        self.mails.lost(mail, now);
    }

    /// Logs a client that had said something and was answered without a worker.
    pub(crate) fn unserved(&mut self, client: &Unserved, now: Instant) {
        self.mails.unserved(client, now);
    }

    /// Returns the figures about the mails so far.
    pub(crate) fn figures(&self) -> &Figures {
        self.mails.figures()
    }

    /// Counts the mails whose workers died.
    pub(crate) fn lost_mails(&self) -> u64 {
        self.lost_mails
    }

    /// Counts the records for the Pond log server, if there is one.
    pub(crate) fn pond(&self) -> Option<Deliveries> {
        self.mails.pond()
    }

    /// Describes the shared dictionaries.
    pub(crate) fn dictionaries(&self) -> Vec<Dictionary> {
        self.dictionaries.shown()
    }

    /// Returns the generation that gets new connections.
    pub(crate) fn generation(&self) -> Option<GenerationId> {
        self.serving.map(|(generation, _)| generation)
    }

    /// Returns the level of the workers' sandbox, and their user if it isn't this process's.
    pub(crate) fn separation(&self) -> Option<(&'static str, Option<u32>)> {
        self.separation
    }

    /// Returns the latest attempt to load a configuration that has come to an end.
    pub(crate) fn last_load(&self) -> Option<&Reload> {
        self.last_load.as_ref()
    }

    /// Returns what has happened lately, oldest first.
    pub(crate) fn incidents(&self) -> Vec<Incident> {
        self.incidents.iter().cloned().collect()
    }

    /// Remembers that something has happened.
    pub(crate) fn incident(&mut self, kind: IncidentKind, text: String) {
        if self.incidents.len() >= MOST_INCIDENTS {
            self.incidents.pop_front();
        }
        self.incidents.push_back(Incident { at: admin::now(), kind, text });
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
    pub(crate) fn switch(
        &mut self,
        generation: GenerationId,
        declaration: &Declaration,
        in_flight: usize,
        now: Instant,
    ) {
        let workers = declaration.settings.workers;
        self.serving = Some((generation, workers));
        self.trouble.clear();
        self.dictionaries.set_bounds(&declaration.settings);
        self.mails.send_to(declaration.log_server.clone());
        let separation = declaration.separation;
        self.announcements.switch(&self.log, separation);
        let (level, user) = (separation.sandbox.level(), separation.user.map(|(user, _)| user));
        self.separation = Some((level, user));
        info!(self.log, "ready"; "generation" => generation, "workers" => workers,
            "sandbox" => level, "user" => user);
        let (at, generation) = (admin::now(), generation.0);
        self.last_load = Some(Reload { at, generation, failure: None, may_pass: false });
        self.incident(IncidentKind::Load, format!("generation {generation} serves"));
        self.next_show = Some(now + SHOW_EVERY);
        let line = self.status_line(in_flight, now);
        self.systemd.ready(&line);
    }

    /// Tells systemd that a configuration can't be used, and that the old one serves on.
    pub(crate) fn reload_failed(
        &mut self,
        cause: Cause,
        load: &Reload,
        in_flight: usize,
        now: Instant,
    ) {
        let message = load.failure.as_deref().unwrap_or_default();
        self.trouble = match cause {
            Cause::Recovery => format!("; no zygote is left, loading failed: {message}"),
            Cause::Boot | Cause::Reload => format!("; reload failed: {message}"),
        };
        self.incident(IncidentKind::LoadFailed, message.to_owned());
        self.last_load = Some(load.clone());
        let line = self.status_line(in_flight, now);
        self.systemd.ready(&line);
    }

    /// Tells systemd that no process can fork workers of the serving generation.
    pub(crate) fn no_zygote_left(&mut self, in_flight: usize, now: Instant) {
        "; no zygote is left".clone_into(&mut self.trouble);
        self.incident(IncidentKind::NoZygote, "no zygote is left".to_owned());
        let line = self.status_line(in_flight, now);
        self.systemd.status(&line);
    }

    /// Tells systemd that the daemon stops.
    pub(crate) fn stop(&mut self, in_flight: usize, now: Instant) {
        self.next_show = None;
        self.incident(IncidentKind::Stop, "told to stop".to_owned());
        self.systemd.stopping(&format!("Stopping: {in_flight} mails in flight"), now);
    }

    /// Reports what has not been reported: the daemon ends.
    pub(crate) fn close(&mut self) {
        self.mails.send_to(None);
        log::report_rest(&self.log);
    }

    /// Does what is due, while so many mails are in flight.
    pub(crate) fn tick(&mut self, in_flight: usize, now: Instant) {
        self.dictionaries.begin_turn(now);
        if self.next_show.is_some_and(|at| at <= now) {
            self.next_show = Some(now + SHOW_EVERY);
            let line = self.status_line(in_flight, now);
            self.systemd.mention_status(line);
        }
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
            self.next_show,
            log::next_report(),
        ];
        deadlines.into_iter().flatten().min()
    }

    /// Returns one line for `systemctl status`.
    fn status_line(&self, in_flight: usize, now: Instant) -> String {
        let (generation, workers) = self.serving.unwrap_or_default();
        let rate = self.figures().rates(now).minute;
        let trouble = &self.trouble;
        format!(
            "Generation {generation} serves with {workers} workers: {rate:.1} mails/s, \
             {in_flight} in flight{trouble}"
        )
    }
}
