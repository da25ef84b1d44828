//! What administrators' commands order and ask, and the answers, which need all owners.

use std::time::Instant;

use nix::unistd::Pid;
use qrelay_shared::address::escape_for_log;
use qrelay_shared::admin::{self, Body, Command, InFlight, State, Status};
use qrelay_shared::flight::Flight;
use qrelay_shared::ipc::message::{Peer, mail_id};
use slog::{info, warn};

use crate::accept::{Shown, bind_private};
use crate::daemon::{Control, Daemon, Phase};
use crate::event::{Cursor, Event};
use crate::ids::{AdminId, WorkerId};
use crate::system::boottime;

/// Waiting connections that are listed at a time.
const PART: usize = 64;

impl Daemon {
    /// Opens the control socket.
    ///
    /// # Errors
    /// The socket can't be bound, and the daemon isn't to start without it.
    pub(super) fn listen_for_commands(&mut self, control: &Control) -> Result<(), String> {
        let (Control::At(path) | Control::Preferably(path)) = control else { return Ok(()) };
        match bind_private(path) {
            Ok((listener, file)) => {
                self.control = Some(file);
                self.admin.listen(listener);
            }
            Err(error) if matches!(control, Control::At(_)) => {
                return Err(format!("the control socket: {error}"));
            }
            Err(error) => warn!(
                self.log,
                "no control socket, so qrelay status and qrelay reload \
                don't work: {error}; --control names another path or none"
            ),
        }
        Ok(())
    }

    /// Loads the configuration anew, and makes the control socket anew if its file is gone.
    pub(super) fn reload(&mut self, now: Instant) {
        if let Some(file) = self.control.as_ref().filter(|file| file.is_gone()) {
            let path = file.path().to_owned();
            match bind_private(&path) {
                Ok((listener, file)) => {
                    warn!(self.log, "the socket file was gone: bound again";
                        "path" => path.display());
                    self.control = Some(file);
                    self.admin.listen(listener);
                }
                Err(error) => warn!(self.log, "the control socket is gone: {error}"),
            }
        }
        self.rollout.reload(now, &mut self.events);
    }

    /// Does what a command orders.
    pub(super) fn obey(&mut self, client: AdminId, command: Command, now: Instant) {
        match command {
            Command::Status => {
                let begun = Instant::now();
                let status = self.status(now);
                self.admin.answer(client, Body::Status(Box::new(status)), now);
                self.admin.took(begun.elapsed(), now);
            }
            // The list is given in parts.
            Command::Mails => {}
            Command::Reload => {
                let last = self.rollout.last();
                if self.admin.await_reload(client, last, now) {
                    self.events.push_back(Event::ReloadRequested);
                }
            }
            Command::Stop { now: at_once } => {
                let in_flight = self.workers.in_flight() as u64;
                info!(self.log, "told to stop over the control socket"; "at_once" => at_once);
                self.admin.await_stop(client, in_flight, now);
                // During a drain, a further order to stop ends it.
                let orders = match self.phase {
                    Phase::Starting | Phase::Serving => 1 + usize::from(at_once),
                    Phase::Draining { .. } | Phase::Killing { .. } => usize::from(at_once),
                    Phase::Ended(_) => 0,
                };
                self.events.extend((0..orders).map(|_| Event::StopRequested));
            }
        }
    }

    /// Returns where the daemon is in its life.
    pub(super) fn state(&self) -> State {
        match self.phase {
            Phase::Starting => State::Starting,
            Phase::Serving => State::Serving,
            Phase::Draining { .. } | Phase::Killing { .. } | Phase::Ended(_) => State::Stopping,
        }
    }

    /// Describes the daemon.
    fn status(&self, now: Instant) -> Status {
        let Self { acceptor, workers, rollout, services, .. } = self;
        let figures = services.figures();
        let separation = services.separation();
        let own = self.system.usage(Pid::this());
        let next_hops = figures.next_hops(now, &workers.at_next_hops());
        Status {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            pid: Pid::this().as_raw(),
            instance: self.instance.clone(),
            state: self.state(),
            started: self.born,
            now: admin::now(),
            config: self.config.display().to_string(),
            generation: services.generation().map(|generation| generation.0),
            generations: rollout.count() as u64,
            last_load: services.last_load().cloned(),
            sandbox: separation.map(|(level, _)| level.to_owned()),
            user: separation.and_then(|(_, user)| user),
            held: acceptor.held() as u64,
            waiting: acceptor.waiting() as u64,
            in_flight: workers.in_flight() as u64,
            answers: figures.answers(),
            rates: figures.rates(now),
            times: figures.times(now),
            mails: figures.mails(),
            listeners: acceptor.shown(),
            workers: workers.shown(now),
            ends: admin::Ends { lost_mails: services.lost_mails(), ..workers.ends() },
            next_hops,
            databases: workers.databases(),
            dictionaries: services.dictionaries(),
            log: qrelay_shared::log::deliveries(),
            pond: services.pond(),
            supervisor: admin::Supervisor {
                rss_bytes: own.map(|usage| usage.rss),
                cpu: own.map(|usage| usage.cpu.as_secs_f64()),
                descriptor_limit: self.system.descriptor_limit(),
            },
            incidents: services.incidents(),
        }
    }

    /// Gives a client the next part of the list of mails in flight.
    pub(super) fn list_mails(&mut self, client: AdminId, cursor: Cursor, now: Instant) {
        let begun = Instant::now();
        let part = match cursor {
            Cursor::Waiting(after) => {
                let waiting = self.acceptor.waiting_after(after, PART);
                let next = match waiting.last() {
                    Some(last) if waiting.len() == PART => Cursor::Waiting(last.job),
                    _ => Cursor::Worker(WorkerId::default(), 0),
                };
                let mails = waiting.iter().map(|shown| self.in_flight(shown, None, now));
                (mails.collect(), Some(next))
            }
            Cursor::Worker(worker, slot) => match self.workers.flights(worker, slot) {
                Some((worker, flights, next)) => {
                    let mails = flights.iter().filter_map(|flight| {
                        let shown = self.acceptor.connection(flight.job)?;
                        Some(self.in_flight(&shown, Some((worker, flight)), now))
                    });
                    (mails.collect(), Some(next))
                }
                None => (Vec::new(), None),
            },
        };
        self.admin.list(client, part, now);
        self.admin.took(begun.elapsed(), now);
    }

    /// Describes a mail: where it came from, and what its worker has noted.
    fn in_flight(
        &self,
        shown: &Shown,
        noted: Option<(WorkerId, &Flight)>,
        now: Instant,
    ) -> InFlight {
        let age = now.saturating_duration_since(shown.accepted).as_secs_f64();
        let (uid, pid, peer) = match shown.origin.peer {
            Peer::Local { pid, uid, .. } => (Some(uid), pid, None),
            Peer::Remote(address) => (None, None, Some(address.to_string())),
        };
        let queued = InFlight {
            id: mail_id(&self.instance, shown.job).to_string(),
            age,
            phase: "queued".to_owned(),
            phase_age: age,
            from: String::new(),
            to: Vec::new(),
            recipients: 0,
            uid,
            pid,
            peer,
            listener: shown.origin.listener.to_string(),
            account: None,
            next_hop: None,
            size: 0,
            worker: None,
        };
        let Some((worker, flight)) = noted else { return queued };
        let text = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
        let since = boottime().saturating_sub(flight.since);
        InFlight {
            phase: flight.phase.to_string(),
            phase_age: age.min(since as f64 / 1e9),
            from: escape_for_log(&flight.sender).into_owned(),
            to: flight.recipients.iter().map(|to| escape_for_log(to).into_owned()).collect(),
            recipients: flight.recipient_count.into(),
            account: text(&flight.account),
            next_hop: text(&flight.next_hop),
            size: flight.size,
            worker: Some(worker.0),
            ..queued
        }
    }
}
