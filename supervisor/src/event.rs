//! What has happened: the facts that one owner learns and other owners act on.
//!
//! An owner never calls another owner. It appends events to the queue that it is given, and the
//! daemon hands each event to the owners concerned after the first one has returned. So no owner
//! acts on state that another is still changing. Events of the mails' path are small copies; what
//! is seldom and large is boxed.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use nix::unistd::Pid;
use qrelay_shared::admin;
use qrelay_shared::client::Client;
use qrelay_shared::dictionary::{FromOpener, ToOpener};
use qrelay_shared::exit::Exit;
use qrelay_shared::flight::Flight;
use qrelay_shared::ipc::channel::{Channel, SendError};
use qrelay_shared::ipc::message::{MailRecord, Peer};
use qrelay_shared::qmqp::Status;

use crate::ids::{AdminId, GenerationId, JobId, WorkerId, ZygoteId};

/// One fact.
#[derive(Debug)]
pub(crate) enum Event {
    /// SIGCHLD, or nobody has looked for a while.
    ChildEnded,
    /// SIGHUP, or an administrator's command.
    ReloadRequested,
    /// SIGTERM, SIGINT, or an administrator's command.
    StopRequested,
    /// SIGUSR1.
    StatusRequested,
    /// The time for the drain is over, or a second request to stop came.
    DrainEnded(Programs),

    /// A client has sent its first byte and waits for a worker.
    Ready { job: JobId, client: Client },
    /// The connection's listener is gone, so only this generation can serve the connection.
    Bound { job: JobId, client: Client, generation: GenerationId },
    /// A client that waited for a worker was answered without one.
    GivenUp { job: JobId, client: Client },
    /// No connection is left, here or in a backlog, that waits for this generation's workers.
    BacklogTaken(GenerationId),
    /// A worker has got the connection.
    Dispatched { job: JobId, worker: WorkerId },
    /// No worker can serve the connection.
    Unservable(JobId),
    /// The kernel refused to pass connections on.
    DispatchFailed(SendError),
    /// A worker has answered the client and closed the connection.
    Done(JobId),
    /// A worker received the job without its socket.
    SocketLost(JobId),
    /// The connection's worker died, and no program of the job runs.
    Orphaned { job: JobId, worker: WorkerId, flight: Option<Box<Flight>> },
    /// The connection's worker died, and a program of the job still runs.
    ProgramRuns { job: JobId, worker: WorkerId, flight: Option<Box<Flight>> },
    /// The last program of a job whose worker died has ended.
    ProgramEnded(JobId),
    /// A mail's worker died; the client's part of it is settled.
    MailLost(Box<LostMail>),
    /// A client that had said something was answered without a worker.
    Unserved(Box<Unserved>),
    /// An action has a time limit of its own, which a drain waits for.
    TimeLimitSet(Instant),
    /// A process starts that may ask the shared dictionaries.
    AskerCame(NewAsker),
    /// A process will ask nothing more, or must not: its channels are to be closed.
    AskerGone(Asker),
    /// A process has done on its channels to the dictionaries what no honest process does; they are
    /// closed already.
    AskerLied { asker: Asker, complaint: &'static str },

    /// The pool lacks a worker: the zygote has to fork it.
    WorkerMissing(Box<NewWorker>),
    /// A zygote tells that it has forked a worker.
    WorkerForked { teller: Teller, worker: WorkerId, pid: Pid },
    /// A zygote tells that it could not fork a worker.
    WorkerRefused { teller: Teller, worker: WorkerId },
    /// There will be no such worker process.
    WorkerNotForked(WorkerId),
    /// A worker can take jobs.
    WorkerReady(GenerationId),
    /// A worker is gone.
    WorkerEnded(GenerationId),
    /// A worker died before it could take jobs.
    WorkerFailed(GenerationId),
    /// The last worker of a generation that takes no more jobs has ended.
    Drained(GenerationId),

    /// A script has declared what it wants.
    Declared(GenerationId),
    /// Every listener of a declaration is bound.
    Listening(GenerationId),
    /// A listener of a declaration can't be bound.
    ListenFailed(GenerationId, String),
    /// A generation that never served is given up.
    Abandoned(GenerationId),
    /// New connections go to `new`; `old` finishes.
    Switched { new: GenerationId, old: Option<GenerationId> },
    /// Nothing of a generation is left.
    GenerationEnded(GenerationId),
    /// A standby has taken a lost zygote's place, or none is left: what was asked of the lost one
    /// may not have been done.
    ZygoteLost(GenerationId),
    /// No process can fork workers of this generation, and none will.
    ZygotesEnded(GenerationId),
    /// A zygote has told its standby's process id.
    StandbyForked { teller: Teller, zygote: ZygoteId, pid: Pid },
    /// A zygote has told something that can't be true: the text says what.
    ZygoteLied { zygote: ZygoteId, complaint: String },
    /// The standby had not ended when its process id became known.
    StandbyRuns { zygote: ZygoteId, pid: Pid },
    /// The standby had ended before its process id was known.
    StandbyEnded(ZygoteId),
    /// A configuration is being loaded while another one serves.
    ReloadBegan,
    /// The serving generation has no process left that can fork workers.
    NoZygoteLeft,
    /// A new configuration can't be used, and the old one serves on.
    ReloadFailed(Cause, Box<admin::Reload>),
    /// The first configuration can't be used.
    StartFailed(Exit),

    /// Something that an administrator may want to see has happened.
    Incident(admin::IncidentKind, String),
    /// An administrator's command orders or asks something.
    Ordered { client: AdminId, command: admin::Command },
    /// An administrator's command wants the next part of the list of mails.
    MailsWanted { client: AdminId, cursor: Cursor },
}

/// A zygote that tells something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Teller {
    /// The zygote.
    pub(crate) zygote: ZygoteId,
    /// The generation whose workers the zygote forks.
    pub(crate) generation: GenerationId,
}

/// A process that may ask the shared dictionaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Asker {
    /// A worker, while it lives.
    Worker(WorkerId),
    /// A zygote, while its script loads.
    Zygote(ZygoteId),
}

/// The supervisor's end of a channel on which a process asks for channels to the dictionaries.
pub(crate) type OpenerChannel = Channel<FromOpener, ToOpener>;

/// The way of a new process to the shared dictionaries.
#[derive(Debug)]
pub(crate) struct NewAsker {
    /// The process.
    pub(crate) asker: Asker,
    /// The generation of the process.
    pub(crate) generation: GenerationId,
    /// The channel on which the process asks for others.
    pub(crate) opener: OpenerChannel,
}

/// A place in the list of mails in flight: what comes before it has been listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cursor {
    /// After this connection, of those that wait for a worker.
    Waiting(JobId),
    /// At this place in the notes of this worker, or of the next one if there is no such worker.
    Worker(WorkerId, usize),
}

impl Default for Cursor {
    fn default() -> Self {
        Self::Waiting(JobId::default())
    }
}

/// Why a generation is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The daemon starts: a failure ends it.
    Boot,
    /// SIGHUP or a command: the script's `reload` is called.
    Reload,
    /// The current generation has lost its zygote and its standby.
    Recovery,
}

/// Treatment of the programs of dead workers when a drain's time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Programs {
    /// The programs have the time that they were given.
    Spared,
    /// The programs are killed at once.
    Killed,
}

/// A client that had said something and was answered without a worker.
#[derive(Debug)]
pub(crate) struct Unserved {
    /// The mail.
    pub(crate) job: JobId,
    /// The client.
    pub(crate) origin: Origin,
    /// When the connection was accepted.
    pub(crate) accepted: Instant,
    /// The answer, unless the client had left.
    pub(crate) reply: Option<(Status, &'static str)>,
    /// Why no worker serves the client.
    pub(crate) cause: &'static str,
}

/// Where a mail came from.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    /// The client.
    pub(crate) peer: Peer,
    /// The address of the listener.
    pub(crate) listener: Arc<str>,
}

/// A mail whose worker died.
#[derive(Debug)]
pub(crate) struct LostMail {
    /// The dead worker.
    pub(crate) worker: WorkerId,
    /// The mail.
    pub(crate) job: JobId,
    /// The client.
    pub(crate) origin: Origin,
    /// When the connection was accepted.
    pub(crate) accepted: Instant,
    /// The answer that the client gets.
    pub(crate) answer: LostAnswer,
    /// What the worker has noted of the mail.
    pub(crate) flight: Option<Box<Flight>>,
}

/// The answer that the client of a lost mail gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LostAnswer {
    /// To try again: now, or when the job's program has ended.
    TryAgain,
    /// The worker had given the whole answer, which had this status.
    Given(Status),
    /// Unknown, since the client is gone or the worker died while it answered; perhaps with `K`.
    Unknown,
}

/// The other ends of a new worker's sockets.
#[derive(Debug)]
pub(crate) struct NewWorker {
    /// Whose zygote forks the worker.
    pub(crate) generation: GenerationId,
    /// The worker.
    pub(crate) worker: WorkerId,
    /// Jobs in, reports out.
    pub(crate) jobs: OwnedFd,
    /// Orders in, pongs out.
    pub(crate) control: OwnedFd,
    /// Wishes for channels to the shared dictionaries out, channels in.
    pub(crate) dictionaries: OwnedFd,
    /// The memory of its flight recorder, if there is one.
    pub(crate) flights: Option<OwnedFd>,
}

/// Events that no owner has acted on yet, oldest first. The memory is kept when it is empty.
pub(crate) type Events = VecDeque<Event>;

/// Takes the record of a finished mail at once, because the record borrows from the datagram that
/// it came in.
pub(crate) type Recorder<'a> = dyn FnMut(WorkerId, JobId, &MailRecord<'_>) + 'a;
