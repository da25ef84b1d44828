//! One connection, from its first byte to its `Done`.
//!
//! Contract: [`Session::begin`] waits for nothing but Lua, [`Session::finish`] for whatever it takes;
//! another thread may do that. A complete request gets exactly one answer, and `K` only when the next hop
//! has said so or the handler wants it pretended. Everything that waits ends at the mail's
//! deadline, which starts with the last byte of the request, or at a limit of its own. `Done`
//! is the last that happens.
//!
//! # Failure
//! Of a session: a reply `Z` or `D`, or none to a client that is gone. Nothing propagates.

pub(crate) mod record;
pub(crate) mod reply;
pub(crate) mod request;
pub mod script;

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use qrelay_shared::deadline::Deadline;
use qrelay_shared::header::received_count;
use qrelay_shared::ipc::message::{Job, MailRecord, mail_id};
use qrelay_shared::qmqp::{Limits, Reply, Request, RequestError, parse};
use qrelay_shared::texts;

use crate::client::socket::ClientSocket;
use crate::delivery::action::Action;
use crate::delivery::connect;
use crate::delivery::exec;
use crate::delivery::exec_raw;
use crate::delivery::program::ProgramContext;
use crate::mail::{Mail, Origin};
use crate::session::record::Outcome;
use crate::session::record::age;
use crate::session::record::record;
use crate::session::reply::{answer, drop_surplus, linger};
use crate::session::request::{Incoming, Terms};
use crate::session::script::{HandlerError, Handling};
use crate::threads::pool::{Listener, Worker};

/// What may still be unread when the answer is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unread {
    /// Nothing that we know of.
    Unknown,
    /// The rest of the request, or more than that.
    Some,
}

/// How far a session has come when somebody has to wait: for its client, the next hop, a program.
pub enum Stage {
    /// There may be more of the request than these bytes.
    Request(Vec<u8>),
    /// There is no mail, and this is the answer.
    Refused(Reply, Unread),
    /// The mail is not for its handler to decide about.
    Settled(Box<Mail>, Reply, Unread),
    /// The handler has begun, and usually has decided.
    Handled(Handling, Deadline, Unread),
    /// The client left.
    Gone,
}

impl Stage {
    /// Nothing has been read.
    pub fn untouched() -> Self {
        Self::Request(Vec::new())
    }

    /// The handler has begun and waits.
    pub fn waits(&self) -> bool {
        matches!(self, Self::Handled(Handling::Waits(_), ..))
    }

    /// Something is wrong with this program.
    pub fn failed() -> Self {
        Self::Refused(Reply::temporary(texts::INTERNAL_ERROR), Unread::Some)
    }
}

/// One client's connection and what it came with.
pub struct Session<'w> {
    worker: &'w Worker,
    job: &'w Job,
    client: &'w Arc<OwnedFd>,
    /// The connection to the next hop, closed when the client has its answer.
    spent: Cell<Option<OwnedFd>>,
}

impl<'w> Session<'w> {
    /// A session for a job that has been received.
    pub fn new(worker: &'w Worker, job: &'w Job, client: &'w Arc<OwnedFd>) -> Self {
        Self { worker, job, client, spent: Cell::new(None) }
    }

    /// As far as it goes without waiting: of what is needed to get there, Lua above all, much is in
    /// the processor's caches when it is done for several mails in turn.
    pub fn begin(&self) -> Stage {
        let Some((listener, terms)) = self.terms() else {
            return Stage::failed();
        };
        let mut buffer = self.worker.buffers.take();
        match terms.try_read(self.client, &mut buffer) {
            Some(incoming) => self.received(listener, &terms.limits, incoming, buffer),
            None => Stage::Request(buffer),
        }
    }

    /// Serves the client to the end.
    pub fn finish(&self, stage: Stage) {
        match stage {
            Stage::Request(mut buffer) => {
                let Some((listener, terms)) = self.terms() else {
                    return self.finish(Stage::failed());
                };
                let (incoming, memory) = terms.read(self.client, &mut buffer);
                self.finish(self.received(listener, &terms.limits, incoming, buffer));
                // Its buffer has been freed: others may use the memory.
                drop(memory);
            }
            Stage::Refused(reply, unread) => self.refuse(&reply, unread),
            Stage::Settled(mail, reply, unread) => {
                self.conclude(mail, &Outcome::refused(reply), unread);
            }
            Stage::Handled(handling, deadline, unread) => {
                let (mail, decision) = handling.finish();
                let outcome = match decision {
                    Ok(action) => self.carry_out(&mail, &action, deadline),
                    Err(HandlerError::Script) => {
                        Outcome::failed(Reply::temporary(texts::SCRIPT_FAILED))
                    }
                    Err(HandlerError::Deadline) => {
                        Outcome::failed(Reply::temporary(texts::RELAY_FAILED))
                    }
                };
                self.conclude(mail, &outcome, unread);
            }
            Stage::Gone => self.done(None),
        }
    }

    fn terms(&self) -> Option<(&'w Listener, Terms<'w>)> {
        let worker = self.worker;
        let listener = worker.listeners.get(self.job.listener as usize)?;
        let limits = Limits { max_size: listener.max_size };
        Some((listener, Terms::new(limits, &worker.settings, &worker.budget)))
    }

    /// Takes a request apart that has come as far as it does, and asks the handler.
    fn received(
        &self,
        listener: &Listener,
        limits: &Limits,
        incoming: Incoming,
        mut buffer: Vec<u8>,
    ) -> Stage {
        let (total, at_once) = match incoming {
            Incoming::Complete { total, at_once } => (total, at_once),
            Incoming::Refused(reply) => return self.no_mail(buffer, reply, Unread::Some),
            Incoming::Gone => {
                self.worker.buffers.give(buffer);
                return Stage::Gone;
            }
        };
        let deadline = self.deadline(at_once);
        let unread = if buffer.len() > total { Unread::Some } else { Unread::Unknown };
        buffer.truncate(total);
        match parse(&buffer, limits) {
            Ok(request) => self.handle(self.mail(listener, buffer, request), deadline, unread),
            Err(error) => self.no_mail(buffer, refusal(error), unread),
        }
    }

    fn no_mail(&self, buffer: Vec<u8>, reply: Reply, unread: Unread) -> Stage {
        self.worker.buffers.give(buffer);
        Stage::Refused(reply, unread)
    }

    /// The mail's: `relay_timeout` after the last byte of its request. Of a request that was
    /// there at once only the time of its first byte is known, which is safely earlier.
    fn deadline(&self, at_once: bool) -> Deadline {
        let limit = self.worker.settings.relay_timeout;
        let age = if at_once { age(self.job.spoke) } else { Duration::ZERO };
        Deadline::after(limit.saturating_sub(age))
    }

    fn mail(&self, listener: &Listener, buffer: Vec<u8>, request: Request) -> Box<Mail> {
        let origin = Origin {
            id: mail_id(&self.worker.instance, self.job.job),
            listener: Arc::clone(&listener.name),
            peer: self.job.peer,
            socket: ClientSocket {
                descriptor: Arc::clone(self.client),
                job: self.job.job,
                listening: self.job.listening,
                accepted: self.job.accepted,
            },
        };
        Box::new(Mail::new(origin, buffer, request))
    }

    /// Asks the handler about a mail.
    fn handle(&self, mail: Box<Mail>, deadline: Deadline, unread: Unread) -> Stage {
        let hops = received_count(mail.message());
        if hops > self.worker.settings.max_hops as usize {
            return Stage::Settled(mail, Reply::permanent(texts::TOO_MANY_HOPS), unread);
        }
        let listener = self.job.listener as usize;
        let script = Arc::clone(&self.worker.script);
        Stage::Handled(script.start(listener, mail, deadline), deadline, unread)
    }

    /// Answers the mail's client, and tells the supervisor.
    fn conclude(&self, mail: Box<Mail>, outcome: &Outcome, unread: Unread) {
        self.answer(&outcome.reply, unread);
        self.done(Some(record(&mail, outcome)));
        self.worker.buffers.give(mail.into_buffer());
    }

    /// The last that the supervisor is told about the job.
    fn done(&self, record: Option<MailRecord<'_>>) {
        self.worker.reports.done(self.job.job, record);
    }

    fn carry_out(&self, mail: &Mail, action: &Action, deadline: Deadline) -> Outcome {
        self.announce_timeout(action);
        let name = action.name();
        let text =
            |own: &Option<Arc<str>>, default: &str| own.as_deref().unwrap_or(default).to_owned();
        match action {
            Action::Discard(own) => {
                Outcome::own(name, Reply::accepted(text(own, texts::DISCARDED)))
            }
            Action::Reject(own) => Outcome::own(name, Reply::permanent(text(own, texts::REJECTED))),
            Action::Defer(own) => Outcome::own(name, Reply::temporary(text(own, texts::DEFERRED))),
            Action::Connect(target) => {
                let limit = self.worker.settings.connect_timeout;
                let (delivery, spent) =
                    connect::relay(mail, target, limit, deadline, &self.worker.logger);
                self.spent.set(spent);
                Outcome::delivery(name, delivery)
            }
            Action::Exec(program) => {
                Outcome::delivery(name, exec::run(&self.host(deadline), mail, program))
            }
            Action::ExecRaw(program) => {
                Outcome::delivery(name, exec_raw::run(&self.host(deadline), mail, program))
            }
        }
    }

    /// What a program runs under.
    fn host(&self, deadline: Deadline) -> ProgramContext<'_> {
        ProgramContext { children: &self.worker.children, deadline, logger: &self.worker.logger }
    }

    /// Lets a drain wait for an action that may take longer than a drain does anyway.
    fn announce_timeout(&self, action: &Action) {
        if let Some(timeout) = action.timeout()
            && timeout > self.worker.settings.drain_timeout
        {
            self.worker.reports.timeout(self.job.job, timeout);
        }
    }

    /// Answers a request that never became a mail.
    fn refuse(&self, reply: &Reply, unread: Unread) {
        self.answer(reply, unread);
        self.done(Some(record::refusal(reply, self.job.accepted)));
    }

    fn answer(&self, reply: &Reply, unread: Unread) {
        answer(self.client, reply);
        match unread {
            Unread::Unknown => drop_surplus(self.client),
            Unread::Some => {
                drop(self.spent.take());
                linger(self.client);
            }
        }
    }
}

fn refusal(error: RequestError) -> Reply {
    Reply::permanent(error.reply_text())
}
