//! One connection, from its first byte to its `Done`.
//!
//! Contract: a [`Session`] is built when its job arrives and moves from thread to thread with what
//! has been done so far. [`Session::begin`] waits for nothing but Lua. [`Session::finish`] waits
//! for everything else; another thread may call it. A complete request gets exactly one answer;
//! the answer is `K` only if the next hop or the program has accepted the mail, or the handler
//! discards it.
//! Every wait ends at the mail's deadline, which starts with the last byte of the request, or at a
//! limit of its own. `Done` is reported last, and exactly once.
//!
//! # Failure
//! A session that fails answers `Z` or `D`, or nothing if its client is gone. A panic is logged
//! and costs its own mail: the client gets `Zinternal server error` unless it has been answered.

mod context;
pub(crate) mod progress;
mod readings;
mod record;
mod refusal;
mod reply;
mod request;
pub mod script;
mod stage;

use std::any::Any;
use std::mem;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use qrelay_shared::deadline::Deadline;
use qrelay_shared::flight::{Envelope, Phase};
use qrelay_shared::header::received_count;
use qrelay_shared::ipc::message::{Job, MailRecord, mail_id};
use qrelay_shared::qmqp::{Limits, Reply, Request, parse};
use qrelay_shared::sys::rights::{MoreInput, PeerSocket};
use qrelay_shared::texts;
use slog::error;

pub use self::context::Context;

use crate::client::socket::ClientSocket;
use crate::clock::age;
use crate::delivery::action::{self, Action};
use crate::delivery::connect;
use crate::delivery::exec;
use crate::delivery::exec_raw;
use crate::delivery::lead::Lead;
use crate::delivery::program::ProgramContext;
use crate::flight::Flight;
use crate::mail::{Mail, Origin};
use crate::session::context::Listener;
use crate::session::progress::Step;
use crate::session::record::{Answered, Outcome, record, refusal};
use crate::session::refusal::Refusal;
use crate::session::reply::{answer, has_surplus, linger};
use crate::session::request::{Incoming, Terms};
use crate::session::script::{HandlerError, Handling};
use crate::session::stage::{Stage, Unread};

/// Why a request can't be read whose client has attached descriptors.
const PASSED: &str = "the client has passed descriptors";

/// Returns the answer to a mail with too many `Received` fields, and the cause for the log.
pub(crate) fn loops(mail: &Mail, max_hops: u32) -> Option<(Reply, String)> {
    let hops = received_count(mail.message());
    (hops > max_hops as usize).then(|| {
        let cause = format!("{hops} Received fields, max_hops={max_hops}");
        (Reply::permanent(texts::TOO_MANY_HOPS), cause)
    })
}

/// The messages that a session still owes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    /// The client's answer, then `Done`.
    Answer,
    /// `Done`: the client has its answer.
    Done,
    /// Nothing: the session is over.
    Nothing,
}

/// One client's connection, and how far it has come.
pub(crate) struct Session {
    job: Job,
    stage: Stage,
    due: Due,
    /// When the client had its answer.
    answered: Option<Answered>,
    /// The connection to the next hop, closed when the client has its answer.
    spent: Option<PeerSocket>,
    client: Arc<PeerSocket>,
    flight: Flight,
}

impl Session {
    /// Returns the session of a job that has been received, with the client's socket.
    pub(crate) fn new(context: &Context, job: Job, client: OwnedFd) -> Self {
        let flight = Flight::new(&context.recorder, &job);
        let client = Arc::new(PeerSocket::prepared(client, job.rights));
        Self {
            job,
            stage: Stage::untouched(),
            due: Due::Answer,
            answered: None,
            spent: None,
            client,
            flight,
        }
    }

    /// Returns when the client's first byte was there: nanoseconds of CLOCK_BOOTTIME.
    pub(crate) fn spoke(&self) -> u64 {
        self.job.spoke
    }

    /// Returns whether the handler has begun and waits.
    pub(crate) fn handler_waits(&self) -> bool {
        matches!(self.stage, Stage::Handled(Handling::Waits(_), ..))
    }

    /// Returns whether serving the client to the end waits for a next hop at most.
    pub(crate) fn is_brief(&self) -> bool {
        matches!(&self.stage, Stage::Handled(handling, _, Unread::Unknown) if handling.is_brief())
    }

    /// Returns whether nothing is left to do.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Over)
    }

    /// Goes as far as possible without waiting: to the end if the mail is handed to nobody. Several
    /// sessions that one thread begins in turn cost less than others, because what they need, Lua
    /// above all, stays in the processor's caches.
    pub(crate) fn begin(&mut self, context: &Context, lead: &dyn Lead) {
        let begun = catch_unwind(AssertUnwindSafe(|| {
            let stage = self.try_begin(context);
            if !stage.is_settled() {
                return stage;
            }
            self.serve(context, stage, lead);
            Stage::Over
        }));
        self.stage = begun.unwrap_or_else(|panic| {
            self.log_panic(context, &*panic);
            Stage::failed()
        });
    }

    fn try_begin(&self, context: &Context) -> Stage {
        let Some((listener, terms)) = self.terms(context) else {
            return Stage::failed();
        };
        self.flight.enter(Phase::Reading);
        let mut buffer = context.buffers.take();
        match terms.try_read(&self.client, &mut buffer) {
            Some(incoming) => {
                context.leader.note(Step::InLua);
                let stage = self.received(context, listener, &terms.limits, incoming, buffer);
                context.leader.note(Step::Begins);
                stage
            }
            None => Stage::Request(buffer),
        }
    }

    /// Serves the client to the end.
    pub(crate) fn finish(mut self, context: &Context, lead: &dyn Lead) {
        let stage = mem::replace(&mut self.stage, Stage::Over);
        let finished = catch_unwind(AssertUnwindSafe(|| self.serve(context, stage, lead)));
        if let Err(panic) = finished {
            self.log_panic(context, &*panic);
            self.serve(context, Stage::failed(), lead);
        }
    }

    fn serve(&mut self, context: &Context, stage: Stage, lead: &dyn Lead) {
        match stage {
            Stage::Request(mut buffer) => {
                let Some((listener, terms)) = self.terms(context) else {
                    return self.serve(context, Stage::failed(), lead);
                };
                lead.give_up();
                let (incoming, memory) = terms.read(&self.client, &mut buffer);
                let stage = self.received(context, listener, &terms.limits, incoming, buffer);
                self.serve(context, stage, lead);
                // The buffer has been freed or is kept: other sessions may use the memory.
                drop(memory);
            }
            Stage::Refused(refusal, unread) => self.refuse(context, &refusal, (unread, lead)),
            Stage::Settled(mail, outcome, unread) => {
                self.conclude(context, mail, &outcome, (unread, lead));
            }
            Stage::Handled(handling, deadline, unread) => {
                if !handling.is_brief() && !handling.is_settled() {
                    lead.give_up();
                }
                let (mail, decision) = handling.finish();
                let outcome = match decision {
                    Ok(action) => self.carry_out(context, &mail, &action, deadline, lead),
                    Err(error @ HandlerError::NotBegun) => {
                        Outcome::refused(error.reply(), "no worker was free in time")
                    }
                    Err(error) => Outcome::failed(error.reply()),
                };
                self.conclude(context, mail, &outcome, (unread, lead));
            }
            Stage::Gone => self.done(context, None),
            Stage::Over => {}
        }
    }

    fn terms<'c>(&self, context: &'c Context) -> Option<(&'c Listener, Terms<'c>)> {
        let listener = context.listeners.get(self.job.listener as usize)?;
        let settings = &context.settings;
        let terms = Terms {
            limits: Limits {
                max_size: listener.max_size,
                default_domain: context.default_domain.as_deref(),
            },
            client_timeout: settings.client_timeout,
            request_timeout: settings.request_timeout,
            min_rate: settings.request_min_rate,
            memory_timeout: settings.relay_timeout,
            client: self.job.peer.into(),
            budget: &context.budget,
            buffers: &context.buffers,
            readings: &context.readings,
        };
        Some((listener, terms))
    }

    /// Parses what has been read of a request, and asks the handler if it is a mail.
    fn received(
        &self,
        context: &Context,
        listener: &Listener,
        limits: &Limits<'_>,
        incoming: Incoming,
        mut buffer: Vec<u8>,
    ) -> Stage {
        let no_mail = |buffer, refusal, unread| {
            // A large buffer is freed, because its memory isn't counted any more.
            drop(context.buffers.give(buffer));
            Stage::Refused(Box::new(refusal), unread)
        };
        let (total, at_once) = match incoming {
            Incoming::Complete { total, at_once } => (total, at_once),
            Incoming::Invalid(error) => {
                let refusal = Refusal::invalid(&buffer, error, limits);
                return no_mail(buffer, refusal, Unread::Refused);
            }
            Incoming::Refused(reply, why) => {
                let refusal = Refusal::incomplete(&buffer, Some(reply), why);
                return no_mail(buffer, refusal, Unread::Some);
            }
            Incoming::Rights => {
                let reply = Reply::permanent(texts::MALFORMED_INPUT);
                let refusal = Refusal::incomplete(&buffer, Some(reply), PASSED);
                return no_mail(buffer, refusal, Unread::Some);
            }
            Incoming::Gone if buffer.is_empty() => {
                context.buffers.give(buffer);
                return Stage::Gone;
            }
            Incoming::Gone => {
                let refusal = Refusal::incomplete(&buffer, None, "the client left");
                return no_mail(buffer, refusal, Unread::Some);
            }
        };
        let deadline = self.deadline(context, at_once);
        let unread = if buffer.len() > total { Unread::Some } else { Unread::Unknown };
        buffer.truncate(total);
        match parse(&buffer, limits) {
            Ok(request) => {
                let mail = self.mail(context, listener, buffer, request);
                self.handle(context, mail, deadline, unread)
            }
            Err(error) => {
                let refusal = Refusal::invalid(&buffer, error, limits);
                no_mail(buffer, refusal, unread)
            }
        }
    }

    /// Returns the mail's deadline: `relay_timeout` after the last byte of its request. Of a
    /// request that was there at once only the time of its first byte is known, which is safely
    /// earlier.
    fn deadline(&self, context: &Context, at_once: bool) -> Deadline {
        let limit = context.settings.relay_timeout;
        let age = if at_once { age(self.job.spoke) } else { Duration::ZERO };
        Deadline::after(limit.saturating_sub(age))
    }

    fn mail(
        &self,
        context: &Context,
        listener: &Listener,
        buffer: Vec<u8>,
        request: Request,
    ) -> Box<Mail> {
        let origin = Origin {
            id: mail_id(&context.instance, self.job.job),
            listener: Arc::clone(&listener.name),
            peer: self.job.peer,
            socket: ClientSocket {
                descriptor: Arc::clone(&self.client),
                job: self.job.job,
                listening: self.job.listening,
                accepted: self.job.accepted,
            },
        };
        let mut mail = Box::new(Mail::new(origin, buffer, request));
        mail.note_in(self.flight.writer());
        if let Some(domain) = &context.default_domain {
            mail.complete_addresses(domain);
        }
        mail
    }

    /// Asks the handler about a mail.
    fn handle(
        &self,
        context: &Context,
        mail: Box<Mail>,
        deadline: Deadline,
        unread: Unread,
    ) -> Stage {
        if let Some((reply, cause)) = loops(&mail, context.settings.max_hops) {
            return Stage::Settled(mail, Outcome::refused(reply, &cause), unread);
        }
        self.note(&mail);
        self.flight.enter(Phase::Lua);
        let listener = self.job.listener as usize;
        let script = Arc::clone(&context.script);
        let handling = script.start(listener, mail, deadline);
        if let Handling::Waits(_) = handling {
            self.flight.enter(Phase::LuaWaits);
        }
        Stage::Handled(handling, deadline, unread)
    }

    /// Notes a mail's envelope.
    fn note(&self, mail: &Mail) {
        self.flight.envelope(Envelope {
            sender: mail.sender(),
            recipients: mail.recipients(),
            account: mail.account().unwrap_or_default(),
            size: mail.relayed_length() as u64,
            received: mail.payload_length() as u64,
        });
    }

    /// Answers the mail's client, and reports the mail to the supervisor.
    fn conclude(
        &mut self,
        context: &Context,
        mail: Box<Mail>,
        outcome: &Outcome,
        (unread, lead): (Unread, &dyn Lead),
    ) {
        self.answer(context, &outcome.reply, unread, lead);
        self.done(context, Some(record(&mail, outcome, self.answered())));
        context.give_back(mail.into_buffer());
    }

    /// Reports the end of the job to the supervisor, unless that was done before a panic.
    fn done(&mut self, context: &Context, record: Option<MailRecord<'_>>) {
        if self.due != Due::Nothing {
            context.reports.done(self.job.job, record, self.flight.land());
            self.due = Due::Nothing;
        }
    }

    fn carry_out(
        &mut self,
        context: &Context,
        mail: &Mail,
        action: &Action,
        deadline: Deadline,
        lead: &dyn Lead,
    ) -> Outcome {
        let timeout = action.timeout().filter(|&limit| limit > context.settings.drain_timeout);
        if let Some(timeout) = timeout {
            // A drain waits for this action. The report may wait for memory.
            lead.give_up();
            context.reports.timeout(self.job.job, timeout);
        }
        self.note(mail);
        let name = action.name();
        let flight = &self.flight;
        let host = ProgramContext {
            children: &context.children,
            deadline,
            logger: &context.logger,
            flight,
        };
        match action {
            Action::Discard(own) => Outcome::own(name, action::discarded(own)),
            Action::Reject(own) => Outcome::own(name, action::rejected(own)),
            Action::Defer(own) => Outcome::own(name, action::deferred(own)),
            Action::Connect(target) => {
                let limit = context.settings.connect_timeout;
                let (delivery, spent) =
                    connect::relay(mail, target, limit, deadline, &context.logger, (flight, lead));
                self.spent = spent;
                Outcome::delivery(name, delivery)
            }
            Action::Exec(program) => Outcome::delivery(name, exec::run(&host, mail, program)),
            Action::ExecRaw(program) => {
                Outcome::delivery(name, exec_raw::run(&host, mail, program))
            }
        }
    }

    /// Answers a request that never became a mail, unless its client left.
    fn refuse(
        &mut self,
        context: &Context,
        refused: &Refusal,
        (unread, lead): (Unread, &dyn Lead),
    ) {
        if let Some(reply) = &refused.reply {
            self.answer(context, reply, unread, lead);
        }
        self.done(context, Some(refusal(refused, self.answered())));
    }

    /// Returns when the client had its answer.
    fn answered(&self) -> Answered {
        self.answered.unwrap_or_else(|| Answered::now(self.job.accepted, self.flight.times()))
    }

    /// Answers the client, unless that was done before a panic.
    fn answer(&mut self, context: &Context, reply: &Reply, unread: Unread, lead: &dyn Lead) {
        if self.due != Due::Answer {
            return;
        }
        self.due = Due::Done;
        let input = match unread {
            Unread::Unknown => MoreInput::Unlikely,
            Unread::Some | Unread::Refused => MoreInput::Likely,
        };
        self.flight.enter(Phase::Answering(reply.status));
        answer(&self.client, reply, input, lead);
        self.flight.enter(Phase::Answered(reply.status));
        self.answered = Some(Answered::now(self.job.accepted, self.flight.times()));
        match unread {
            Unread::Unknown if !has_surplus(&self.client) => {}
            Unread::Refused => {
                lead.give_up();
                if let Some((_, terms)) = self.terms(context) {
                    terms.drop_rest(&self.client);
                }
            }
            Unread::Unknown | Unread::Some => {
                lead.give_up();
                drop(self.spent.take());
                linger(&self.client);
            }
        }
    }

    fn log_panic(&self, context: &Context, panic: &(dyn Any + Send)) {
        let cause = panic.downcast_ref::<String>().map(String::as_str);
        let cause = cause.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
        error!(context.logger, # "panic", "internal error";
            "id" => &*mail_id(&context.instance, self.job.job), "panic" => cause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use qrelay_shared::ids::{JobId, ListenerId};
    use qrelay_shared::ipc::channel::{Channel, RecvBuffer, RecvError};
    use qrelay_shared::ipc::message::{Peer, Report, ToJobs, ToReports};
    use qrelay_shared::settings::Declaration;
    use qrelay_shared::sys::rights::Rights;
    use slog::{Discard, Logger};

    use crate::delivery::lead::Follower;
    use crate::flight::Recorder;
    use crate::job_channel::Reports;
    use crate::session::script::Script;

    /// A step before the panic.
    type Step = fn(&mut Session, &Context, &Reply);

    /// A script that no test asks.
    struct Unasked;

    impl Script for Unasked {
        fn start(self: Arc<Self>, _: usize, _: Box<Mail>, _: Deadline) -> Handling {
            unreachable!("no test asks")
        }

        fn held(&self) -> (Duration, JobId) {
            Default::default()
        }

        fn exhausted(&self) -> bool {
            false
        }
    }

    #[test]
    fn a_panic_after_any_step_adds_no_second_answer_and_no_second_done() {
        let (supervisor, theirs) = Channel::<ToJobs, ToReports>::pair().expect("pair");
        let reports = Reports::new(theirs, Duration::ZERO).expect("socket");
        let (declaration, logger) = (Declaration::default(), Logger::root(Discard, slog::o!()));
        let context = Context::new(
            &declaration,
            "test".into(),
            Arc::new(Unasked),
            reports,
            Recorder::new(&[]),
            logger,
        );
        let rejected = Reply::permanent("rejected");
        let failed = "22:Zinternal server error,";
        let table: [(&str, Step, &str); 3] = [
            ("nothing", |_, _, _| {}, failed),
            (
                "answered",
                |session, context, reply| {
                    session.answer(context, reply, Unread::Unknown, &Follower);
                },
                "9:Drejected,",
            ),
            (
                "done",
                |session, context, reply| {
                    let refusal = Refusal::unread(reply.clone(), "test");
                    session.refuse(context, &refusal, (Unread::Unknown, &Follower));
                },
                "9:Drejected,",
            ),
        ];
        for (step, before, expected) in table {
            let (mut client, server) = UnixStream::pair().expect("pair");
            client.shutdown(std::net::Shutdown::Write).expect("shutdown");
            let peer = Peer::Local { pid: None, uid: 1, gid: 1 };
            let (job, listening) = (JobId(1), ListenerId(1));
            let rights = Rights::Refused;
            let job = Job { job, listener: 0, listening, peer, rights, accepted: 0, spoke: 0 };
            let mut session = Session::new(&context, job, server.into());
            before(&mut session, &context, &rejected);
            // As after a panic.
            session.serve(&context, Stage::failed(), &Follower);
            drop(session);
            let mut answer = String::new();
            client.read_to_string(&mut answer).expect("an end of stream");
            assert_eq!(answer, expected, "{step}");
            context.reports.flush();
            let mut buffer = RecvBuffer::new();
            let report = supervisor.recv_batch(&mut buffer).expect("a report");
            let jobs = report.map(|report| match report.expect("a report") {
                Report::Done { job, record } => (job, record.is_some()),
                other => panic!("{other:?}"),
            });
            assert_eq!(jobs.collect::<Vec<_>>(), [(JobId(1), true)], "{step}");
            assert!(matches!(supervisor.try_recv(&mut buffer), Err(RecvError::Empty)), "{step}");
        }
    }
}
