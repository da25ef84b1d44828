//! One log line per mail and per refused request, and one record for the Pond log server.

use std::time::Instant;

use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::ipc::message::{MailRecord, Peer, mail_id};
use qrelay_shared::qmqp::Status;
use qrelay_shared::texts;
use slog::{Logger, info, warn};

use crate::event::{LostAnswer, LostMail};
use crate::ids::{JobId, WorkerId};
use crate::services::pond::PondSender;

/// Bytes that a usual mail's sender and time fit in.
const ROOM: usize = 128;

/// How many clients got which answer since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Answers {
    /// `K`.
    pub(crate) accepted: u64,
    /// `Z`.
    pub(crate) temporary: u64,
    /// `D`.
    pub(crate) permanent: u64,
    /// None, or one that isn't known.
    pub(crate) unanswered: u64,
}

impl Answers {
    fn count(&mut self, status: Option<Status>) {
        *match status {
            Some(Status::Accepted) => &mut self.accepted,
            Some(Status::Temporary) => &mut self.temporary,
            Some(Status::Permanent) => &mut self.permanent,
            None => &mut self.unanswered,
        } += 1;
    }
}

/// Logs mails.
#[derive(Debug)]
pub(super) struct MailLog {
    log: Logger,
    answers: Answers,
    /// Names this run of the supervisor in the ids of mails.
    instance: String,
    /// The log server of the current generation, if it has one.
    pond: Option<PondSender>,
}

impl MailLog {
    /// Starts without a log server.
    pub(super) fn new(log: Logger, instance: String) -> Self {
        Self { log, answers: Answers::default(), instance, pond: None }
    }

    /// Returns how the mails so far were answered.
    pub(super) fn answers(&self) -> Answers {
        self.answers
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
        peer: Option<Peer>,
        mail: &MailRecord<'_>,
    ) {
        self.answers.count(mail.status);
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
        text.push_str(itoa::Buffer::new().format(mail.duration / 1000));
        text.push('.');
        text.push_str(itoa::Buffer::new().format(mail.duration / 100 % 10));
        info!(self.log, "mail";
            "id" => &*mail_id(&self.instance, job),
            "from" => &text[..from],
            "to" => mail.recipients.split(',').next(),
            "recipients" => mail.recipient_count,
            "uid" => uid,
            "pid" => pid,
            "peer" => address,
            "account" => mail.account,
            "action" => mail.action,
            "next_hop" => mail.next_hop,
            "status" => status,
            "reply" => &*mail.text,
            "size" => mail.size,
            "ms" => &text[from..],
            "worker" => worker);
        if let Some(pond) = &mut self.pond {
            pond.send(mail, peer, &self.log);
        }
    }

    /// Logs a mail whose worker died. Nothing is known of the mail itself. If the client can't be
    /// told to try again, its answer isn't known either: it may have been `K`.
    pub(super) fn lost(&mut self, mail: &LostMail, now: Instant) {
        let &LostMail { worker, job, peer, accepted, answer } = mail;
        let ms = now.saturating_duration_since(accepted).as_secs_f64() * 1000.0;
        let (outcome, status, text) = match answer {
            LostAnswer::TryAgain => {
                let status = Some(Status::Temporary);
                ("the client is told to try again", status, texts::TRY_AGAIN)
            }
            LostAnswer::Unknown => ("the client had been answered or had gone", None, "lost"),
        };
        self.answers.count(status);
        warn!(self.log, "mail lost its worker, {outcome}";
            "id" => &*mail_id(&self.instance, job), "peer" => ?peer,
            "ms" => format_args!("{ms:.1}"), "worker" => worker);
        let record = MailRecord {
            sender: "".into(),
            recipients: "".into(),
            recipient_count: 0,
            recipients_cut: 0,
            account: None,
            action: "-",
            next_hop: None,
            status,
            text: text.into(),
            size: 0,
            received: 0,
            sent: 0,
            duration: (ms * 1000.0) as u64,
            refused: false,
        };
        if let Some(pond) = &mut self.pond {
            pond.send(&record, Some(peer), &self.log);
        }
    }
}
