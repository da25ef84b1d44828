//! The one log line per mail.

use std::time::Instant;

use qrelay_shared::ipc::message::{JobId, MailRecord, Peer, WorkerId};
use qrelay_shared::qmqp::Status;
use slog::{info, warn};

use crate::daemon::Daemon;
use crate::dispatch::TRY_AGAIN;

impl Daemon {
    /// The id under which a worker and its script know a mail.
    pub(crate) fn mail_id(&self, job: JobId) -> String {
        format!("{}-{job:x}", self.instance)
    }

    /// A mail is finished.
    pub(crate) fn log_mail(&mut self, worker: WorkerId, job: JobId, mail: &MailRecord<'_>) {
        let (uid, pid, address) = match self.connections.get(job).map(|c| c.peer) {
            Some(Peer::Local { pid, uid, .. }) => (Some(uid), pid, None),
            Some(Peer::Remote(address)) => (None, None, Some(address.to_string())),
            None => (None, None, None),
        };
        let status = mail.status.map_or("-", |status| match status {
            Status::Accepted => "K",
            Status::Temporary => "Z",
            Status::Permanent => "D",
        });
        info!(self.log, "mail";
            "id" => format_args!("{}-{job:x}", self.instance),
            "from" => format_args!("<{}>", mail.sender),
            "to" => mail.recipients.split(',').next(),
            "recipients" => mail.recipient_count,
            "uid" => uid,
            "pid" => pid,
            "peer" => address,
            "account" => mail.account.as_deref(),
            "action" => &*mail.action,
            "next_hop" => mail.next_hop.as_deref(),
            "status" => status,
            "reply" => &*mail.text,
            "size" => mail.size,
            "ms" => format_args!("{}.{}", mail.duration / 1000, mail.duration / 100 % 10),
            "worker" => worker);
        let peer = self.connections.get(job).map(|connection| connection.peer);
        if let Some(pond) = &mut self.pond {
            pond.send(mail, peer, &self.log);
        }
    }

    /// A mail's worker died; of the mail itself nothing is known. Nor is the answer, if the client
    /// can't be `told` to try again: it may have been `K`.
    pub(crate) fn log_lost(
        &mut self,
        worker: WorkerId,
        job: JobId,
        peer: Peer,
        accepted: Instant,
        told: bool,
    ) {
        let ms = accepted.elapsed().as_secs_f64() * 1000.0;
        let outcome = match told {
            true => "the client is told to try again",
            false => "the client had been answered or had gone",
        };
        warn!(self.log, "mail lost its worker, {outcome}";
            "id" => self.mail_id(job), "peer" => ?peer,
            "ms" => format_args!("{ms:.1}"), "worker" => worker);
        let record = MailRecord {
            sender: "".into(),
            recipients: "".into(),
            recipient_count: 0,
            recipients_cut: 0,
            account: None,
            action: "-".into(),
            next_hop: None,
            status: told.then_some(Status::Temporary),
            text: if told { TRY_AGAIN } else { "lost" }.into(),
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
