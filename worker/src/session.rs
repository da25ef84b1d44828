//! One connection, from its first byte to its `Done`.
//!
//! Contract: a complete request gets exactly one answer, and `K` only when the next hop has
//! said so or the handler wants it pretended. Everything that waits ends at the mail's
//! deadline, which starts with the last byte of the request, or at a limit of its own. `Done`
//! is the last that happens.
//!
//! # Failure
//! Of a session: a reply `Z` or `D`, or none to a client that is gone. Nothing propagates.

use std::cell::Cell;
use std::fmt::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use qrelay_shared::ipc::message::{Job, MailRecord};
use qrelay_shared::mail::received_count;
use qrelay_shared::qmqp::{Limits, Reply, Request, RequestError, parse};

use crate::action::Action;
use crate::deadline::Deadline;
use crate::lua::state::HandlerError;
use crate::mail::Mail;
use crate::record::{Outcome, age, record};
use crate::relay::program::Host;
use crate::relay::{connect, exec, exec_raw};
use crate::reply::{answer, drop_surplus, linger};
use crate::request::{Incoming, Terms, recycle};
use crate::serve::{Listener, Worker};

/// What may still be unread when the answer is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unread {
    /// Nothing that we know of.
    Unknown,
    /// The rest of the request, or more than that.
    Some,
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
    /// A session for a job that has just been received.
    pub fn new(worker: &'w Worker, job: &'w Job, client: &'w Arc<OwnedFd>) -> Self {
        Self { worker, job, client, spent: Cell::new(None) }
    }

    /// Serves the client to the end. `buffer` is the thread's, empty before and after.
    pub fn run(&self, buffer: &mut Vec<u8>) {
        match self.worker.listeners.get(self.job.listener as usize) {
            Some(listener) => self.serve(listener, buffer),
            None => self.refuse(&Reply::temporary("internal server error"), Unread::Some),
        }
        drop(self.spent.take());
        recycle(buffer);
    }

    fn serve(&self, listener: &Listener, buffer: &mut Vec<u8>) {
        let worker = self.worker;
        let limits = Limits { max_size: listener.max_size };
        match Terms::new(limits, &worker.settings, &worker.budget).read(self.client, buffer) {
            Incoming::Gone => self.done(None),
            Incoming::Refused(reply) => self.refuse(&reply, Unread::Some),
            Incoming::Complete { total, at_once, memory } => {
                let deadline = self.deadline(at_once);
                let unread = if buffer.len() > total { Unread::Some } else { Unread::Unknown };
                buffer.truncate(total);
                match parse(buffer, &limits) {
                    Ok(request) => self.mail(listener, buffer, request, deadline, unread),
                    Err(error) => self.refuse(&refusal(error), unread),
                }
                // The buffer shrinks before others may use its memory.
                recycle(buffer);
                drop(memory);
            }
        }
    }

    /// The mail's: `relay_timeout` after the last byte of its request. Of a request that was
    /// there at once only the time of its first byte is known, which is safely earlier.
    fn deadline(&self, at_once: bool) -> Deadline {
        let limit = self.worker.settings.relay_timeout;
        let age = if at_once { age(self.job.spoke) } else { Duration::ZERO };
        Deadline::after(limit.saturating_sub(age))
    }

    /// Handles a valid request.
    fn mail(
        &self,
        listener: &Listener,
        buffer: &mut Vec<u8>,
        request: Request,
        deadline: Deadline,
        unread: Unread,
    ) {
        let mail = Mail {
            id: self.id(),
            job: self.job.job,
            buffer: std::mem::take(buffer),
            request,
            sender: None,
            recipients: None,
            account: None,
            inserted: Vec::new(),
            removed: Vec::new(),
            peer: self.job.peer,
            socket: Arc::clone(self.client),
            accepted: self.job.accepted,
            listener: Arc::clone(&listener.name),
        };
        let (mail, outcome) = self.decide(mail, deadline);
        self.answer(&outcome.reply, unread);
        self.done(Some(record(&mail, &outcome)));
        *buffer = mail.buffer;
    }

    /// The name of the mail in every log.
    fn id(&self) -> String {
        let instance = &self.worker.instance;
        // Enough for any number.
        let mut id = String::with_capacity(instance.len() + 17);
        id.push_str(instance);
        // Writing to a `String` can't fail.
        let _ = write!(id, "-{:x}", self.job.job);
        id
    }

    /// The last that the supervisor is told about the job.
    fn done(&self, record: Option<MailRecord<'_>>) {
        self.worker.reports.done(self.job.job, record);
    }

    /// Asks the handler and does what it says.
    fn decide(&self, mail: Mail, deadline: Deadline) -> (Mail, Outcome) {
        let hops = received_count(&mail.buffer[mail.request.message.clone()]);
        if hops > self.worker.settings.max_hops as usize {
            return (mail, Outcome::refused(Reply::permanent("too many hops")));
        }
        let listener = self.job.listener as usize;
        let (mail, decision) = self.worker.script.handle(listener, mail, deadline);
        let outcome = match decision {
            Ok(action) => self.carry_out(&mail, &action, deadline),
            Err(HandlerError::Script) => Outcome::failed(Reply::temporary("script failed")),
            Err(HandlerError::Deadline) => Outcome::failed(Reply::temporary("relay failed")),
        };
        (mail, outcome)
    }

    fn carry_out(&self, mail: &Mail, action: &Action, deadline: Deadline) -> Outcome {
        self.announce_timeout(action);
        let name = action.name();
        let text =
            |own: &Option<Arc<str>>, default: &str| own.as_deref().unwrap_or(default).to_owned();
        match action {
            Action::Discard(own) => Outcome::own(name, Reply::accepted(text(own, "discarded"))),
            Action::Reject(own) => Outcome::own(name, Reply::permanent(text(own, "rejected"))),
            Action::Defer(own) => Outcome::own(name, Reply::temporary(text(own, "deferred"))),
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
    fn host(&self, deadline: Deadline) -> Host<'_> {
        Host { children: &self.worker.children, deadline, logger: &self.worker.logger }
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
        self.done(Some(crate::record::refusal(reply, self.job.accepted)));
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
