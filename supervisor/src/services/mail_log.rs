//! One log line per mail and per refused request, and one record for the Pond log server.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use qrelay_shared::address::{escape_for_log, printable};
use qrelay_shared::admin::Deliveries;
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::flight::Phase;
use qrelay_shared::ipc::message::{MailRecord, Peer, Times, mail_id};
use qrelay_shared::qmqp::Status;
use qrelay_shared::texts;
use slog::{Logger, info};

use crate::event::{LostAnswer, LostMail, Origin, Unserved};
use crate::ids::{JobId, WorkerId};
use crate::services::figures::Figures;
use crate::services::pond::PondSender;

/// Bytes that a usual mail's sender and time fit in.
const ROOM: usize = 128;

/// Most recipients in a line.
const SHOWN: usize = 5;

/// Logs mails.
#[derive(Debug)]
pub(super) struct MailLog {
    log: Logger,
    figures: Figures,
    /// Names this run of the supervisor in the ids of mails.
    instance: String,
    /// The log server of the current generation, if it has one.
    pond: Option<PondSender>,
}

impl MailLog {
    /// Starts without a log server.
    pub(super) fn new(log: Logger, instance: String, now: Instant) -> Self {
        Self { log, figures: Figures::new(now), instance, pond: None }
    }

    /// Returns the figures about the mails so far.
    pub(super) fn figures(&self) -> &Figures {
        &self.figures
    }

    /// Counts the records for the log server, if there is one.
    pub(super) fn pond(&self) -> Option<Deliveries> {
        self.pond.as_ref().map(PondSender::deliveries)
    }

    /// Sends records to this server from now on.
    pub(super) fn send_to(&mut self, server: Option<Endpoint>) {
        if server.as_ref() == self.pond.as_ref().map(PondSender::server) {
            return;
        }
        if let Some(mut old) = std::mem::replace(&mut self.pond, server.map(PondSender::new)) {
            old.report_rest(&self.log);
        }
    }

    /// Reports lost records, when that is due.
    pub(super) fn tick(&mut self, now: Instant) {
        if let Some(pond) = &mut self.pond {
            pond.tick(now, &self.log);
        }
    }

    /// Returns when [`Self::tick`] has something to do, if ever.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        self.pond.as_ref().and_then(PondSender::next_tick)
    }

    /// Logs a finished mail.
    pub(super) fn done(
        &mut self,
        worker: WorkerId,
        job: JobId,
        origin: Option<&Origin>,
        mail: &MailRecord<'_>,
        now: Instant,
    ) {
        self.figures.count(mail, origin.map(|origin| &origin.listener), now);
        self.write(Some(worker), job, origin, mail, None);
    }

    /// Writes the line of a mail, and its Pond record. `lost` says what a mail was doing when its
    /// worker died.
    fn write(
        &mut self,
        worker: Option<WorkerId>,
        job: JobId,
        origin: Option<&Origin>,
        mail: &MailRecord<'_>,
        lost: Option<&str>,
    ) {
        let peer = origin.map(|origin| origin.peer);
        let (uid, pid, address) = match peer {
            Some(Peer::Local { pid, uid, .. }) => (Some(uid), pid, None),
            Some(Peer::Remote(address)) => (None, None, Some(address.to_string())),
            None => (None, None, None),
        };
        let status = mail.status.map_or("-", |status| match status {
            Status::Accepted => "K",
            Status::Temporary => "Z",
            Status::Permanent => "D",
        });
        let mut text = String::with_capacity(ROOM);
        text.extend(["<", &mail.sender, ">"]);
        let from = text.len();
        let mut ends = [0; 5];
        let Times { queue, read, lua, hop } = mail.times;
        for (end, time) in ends.iter_mut().zip([queue, read, lua, hop, mail.duration]) {
            push_milliseconds(&mut text, time);
            *end = text.len();
        }
        let [queue, read, lua, hop, all] = ends;
        info!(self.log, "mail";
            "id" => &*mail_id(&self.instance, job),
            "from" => &text[..from],
            "to" => first_recipients(&mail.recipients),
            "recipients" => mail.recipient_count,
            "uid" => uid,
            "pid" => pid,
            "peer" => address,
            "listener" => origin.map(|origin| &*origin.listener),
            "account" => mail.account,
            "message_id" => mail.message_id,
            "action" => mail.action,
            "next_hop" => mail.next_hop,
            "status" => status,
            "reply" => &*mail.text,
            "cause" => mail.cause,
            "size" => mail.size,
            "queue" => &text[from..queue],
            "read" => &text[queue..read],
            "lua" => &text[read..lua],
            "hop" => &text[lua..hop],
            "ms" => &text[hop..all],
            "lost_in" => lost,
            "worker" => worker);
        if let Some(pond) = &mut self.pond {
            pond.send(mail, peer, &self.log);
        }
    }

    /// Logs a mail whose worker died, with what the worker had noted of it.
    pub(super) fn lost(&mut self, mail: &LostMail, now: Instant) {
        let LostMail { worker, job, origin, accepted, answer, flight } = mail;
        let status = match answer {
            LostAnswer::TryAgain => Some(Status::Temporary),
            LostAnswer::Given(status) => Some(*status),
            LostAnswer::Unknown => None,
        };
        let flight = flight.as_deref();
        let duration = now.saturating_duration_since(*accepted).as_micros();
        let sent = flight.is_some_and(|flight| match flight.phase {
            Phase::NextHop | Phase::Program => true,
            Phase::Answering(_) | Phase::Answered(_) => !flight.next_hop.is_empty(),
            _ => false,
        });
        let received = flight.map_or(0, |flight| flight.received);
        let mut recipients = String::new();
        for recipient in flight.iter().flat_map(|flight| &flight.recipients) {
            let separator = if recipients.is_empty() { "<" } else { ",<" };
            recipients.extend([separator, &escape_for_log(recipient), ">"]);
        }
        let count = flight.map_or(0, |flight| flight.recipient_count);
        let noted = flight.map_or(0, |flight| flight.recipients.len() as u32);
        let text = |text: Option<&String>| text.filter(|text| !text.is_empty()).map(printable_text);
        let (account, next_hop) = (
            text(flight.map(|flight| &flight.account)),
            text(flight.map(|flight| &flight.next_hop)),
        );
        let record = MailRecord {
            sender: flight.map_or("".into(), |flight| escape_for_log(&flight.sender)),
            recipients: recipients.into(),
            recipient_count: count,
            recipients_cut: count.saturating_sub(noted),
            account: account.as_deref(),
            action: "-",
            next_hop: next_hop.as_deref(),
            forwarded: sent,
            status,
            text: match answer {
                LostAnswer::TryAgain => texts::TRY_AGAIN.into(),
                LostAnswer::Given(_) | LostAnswer::Unknown => "lost".into(),
            },
            size: flight.map_or(0, |flight| flight.size),
            received,
            sent: if sent { received } else { 0 },
            duration: u64::try_from(duration).unwrap_or(u64::MAX),
            answered: now_micros(),
            times: Times::default(),
            message_id: None,
            cause: None,
            // A worker notes the envelope of a complete request, just before its handler runs.
            refused: count == 0,
        };
        let lost =
            Some(flight.map_or_else(|| "unknown".to_owned(), |flight| flight.phase.to_string()));
        self.figures.count(&record, Some(&origin.listener), now);
        self.write(Some(*worker), *job, Some(origin), &record, lost.as_deref());
    }

    /// Logs a client that had said something and was answered without a worker.
    pub(super) fn unserved(&mut self, client: &Unserved, now: Instant) {
        let Unserved { job, origin, accepted, reply, cause } = client;
        let duration = now.saturating_duration_since(*accepted).as_micros();
        let duration = u64::try_from(duration).unwrap_or(u64::MAX);
        let record = MailRecord {
            sender: "".into(),
            recipients: "".into(),
            recipient_count: 0,
            recipients_cut: 0,
            account: None,
            action: "-",
            next_hop: None,
            forwarded: false,
            status: reply.map(|(status, _)| status),
            text: reply.map_or("canceled", |(_, text)| text).into(),
            size: 0,
            received: 0,
            sent: 0,
            duration,
            answered: now_micros(),
            times: Times { queue: duration, ..Times::default() },
            message_id: None,
            cause: Some(cause),
            refused: true,
        };
        self.figures.count(&record, Some(&origin.listener), now);
        self.write(None, *job, Some(origin), &record, None);
    }
}

/// Returns the time in microseconds since the epoch.
fn now_micros() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// Returns the first [`SHOWN`] of recipients that are separated by commas.
fn first_recipients(recipients: &str) -> &str {
    let end = recipients.match_indices(',').nth(SHOWN - 1).map_or(recipients.len(), |(at, _)| at);
    &recipients[..end]
}

/// Appends a time in milliseconds, to a tenth.
fn push_milliseconds(text: &mut String, microseconds: u64) {
    text.push_str(itoa::Buffer::new().format(microseconds / 1000));
    text.push('.');
    text.push_str(itoa::Buffer::new().format(microseconds / 100 % 10));
}

fn printable_text(text: &String) -> String {
    printable(text.as_bytes()).into_owned()
}
