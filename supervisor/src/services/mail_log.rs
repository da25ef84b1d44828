//! The one log line per mail.

use std::time::Instant;

use qrelay_shared::ipc::message::{MailId, MailRecord, Peer, mail_id};
use qrelay_shared::qmqp::Status;
use qrelay_shared::texts;
use slog::{info, warn};

use crate::daemon::Daemon;
use crate::ids::{JobId, WorkerId};

/// Bytes that a usual mail's sender and time fit in.
const ROOM: usize = 128;

impl Daemon {
    /// The id under which a worker and its script know a mail.
    pub(crate) fn mail_id(&self, job: JobId) -> MailId {
        mail_id(&self.instance, job)
    }

    /// A mail is finished.
    pub(crate) fn log_mail(&mut self, worker: WorkerId, job: JobId, mail: &MailRecord<'_>) {
        let peer = self.connections.get(job).map(|connection| connection.peer);
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
            "id" => &*self.mail_id(job),
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
            "id" => &*self.mail_id(job), "peer" => ?peer,
            "ms" => format_args!("{ms:.1}"), "worker" => worker);
        let record = MailRecord {
            sender: "".into(),
            recipients: "".into(),
            recipient_count: 0,
            recipients_cut: 0,
            account: None,
            action: "-",
            next_hop: None,
            status: told.then_some(Status::Temporary),
            text: if told { texts::TRY_AGAIN } else { "lost" }.into(),
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
