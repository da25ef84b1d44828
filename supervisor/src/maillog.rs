//! The one log line per mail.

use qrelay_shared::ipc::message::{JobId, MailRecord, Peer, WorkerId};
use qrelay_shared::qmqp::Status;
use slog::{KV, Record, Serializer, info, warn};

use crate::daemon::Daemon;

/// The record as fields, in the order in which one reads them.
struct Fields<'a>(&'a MailRecord<'a>, Option<Peer>);

impl KV for Fields<'_> {
    fn serialize(&self, _: &Record<'_>, out: &mut dyn Serializer) -> slog::Result {
        let Self(mail, peer) = self;
        out.emit_arguments("from", &format_args!("<{}>", mail.sender))?;
        let first = mail.recipients.split(',').next().unwrap_or_default();
        out.emit_arguments("to", &format_args!("{first}"))?;
        out.emit_u32("recipients", mail.recipient_count)?;
        match peer {
            Some(Peer::Local { pid, uid, .. }) => {
                out.emit_u32("uid", *uid)?;
                if let Some(pid) = pid {
                    out.emit_i32("pid", *pid)?;
                }
            }
            Some(Peer::Remote(address)) => {
                out.emit_arguments("peer", &format_args!("{address}"))?
            }
            None => {}
        }
        if let Some(account) = &mail.account {
            out.emit_str("account", account)?;
        }
        out.emit_str("action", &mail.action)?;
        if let Some(next_hop) = &mail.next_hop {
            out.emit_str("next_hop", next_hop)?;
        }
        let status = mail.status.map_or("-", |status| match status {
            Status::Accepted => "K",
            Status::Temporary => "Z",
            Status::Permanent => "D",
        });
        out.emit_str("status", status)?;
        out.emit_str("reply", &mail.text)?;
        out.emit_u64("size", mail.size)?;
        out.emit_arguments("ms", &format_args!("{:.1}", mail.duration as f64 / 1000.0))
    }
}

impl Daemon {
    /// The id under which a worker and its script know a mail.
    pub(crate) fn mail_id(&self, job: JobId) -> String {
        format!("{}-{job:x}", self.instance)
    }

    /// A mail is finished.
    pub(crate) fn log_mail(&self, worker: WorkerId, job: JobId, record: &MailRecord<'_>) {
        let peer = self.connections.get(job).map(|connection| connection.peer);
        info!(self.log, "mail"; "worker" => worker, Fields(record, peer), "id" => self.mail_id(job));
    }

    /// A mail's worker died; of the mail itself nothing is known.
    pub(crate) fn log_lost(&self, worker: WorkerId, job: JobId) {
        let Some(connection) = self.connections.get(job) else { return };
        let ms = connection.accepted.elapsed().as_secs_f64() * 1000.0;
        warn!(self.log, "mail lost its worker, the client is told to try again"; "worker" => worker,
            "ms" => format_args!("{ms:.1}"), "peer" => ?connection.peer, "id" => self.mail_id(job));
    }
}
