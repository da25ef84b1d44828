//! Running a program with a mail on its standard input, until it ends or has to be ended.
//!
//! Contract: the input is complete before the program starts. The output is read all the time, so
//! that the program never waits for the worker; output beyond [`MAX_REPLY`] bytes is dropped. The
//! program is over when its own process has ended. Processes that it left in the background may go
//! on, and their output counts only for [`LINGER`]. When the time is over or the client has gone,
//! the program's process group is ended as [`process_group`] says, with all that is left of it,
//! whether or not the program itself has ended by then. The mail is over as soon as nothing is
//! left.
//!
//! # Failure
//! A program that doesn't start is an errno. One that not even SIGKILL ends (it waits for a dead
//! file server, or is another user's) is left to itself.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::sys::time::TimeSpec;
use nix::unistd::pipe2;
use qrelay_shared::address::printable;
use qrelay_shared::deadline::Deadline;
use qrelay_shared::flight::Phase;
use qrelay_shared::ipc::message::MailId;
use qrelay_shared::qmqp::{MAX_REPLY, Reply, Status};
use qrelay_shared::sys::process_group::{self, Ending, Others, Step};
use qrelay_shared::sys::{input, spawn};
use qrelay_shared::texts;
use slog::{Logger, error, warn};

use crate::delivery::Delivery;
use crate::delivery::action::Exec;
use crate::delivery::children::{Child, Children, ProgramExit};
use crate::flight::Flight;
use crate::mail::Mail;

/// How long output is awaited from processes that a program left behind, such as `| logger`.
const LINGER: Duration = Duration::from_millis(100);
/// Pause after a failure of poll(2), which means a shortage of memory.
const PAUSE: Duration = Duration::from_millis(10);

/// Exit status `EX_NOPERM` of sysexits.h.
const NO_PERMISSION: i32 = 77;
/// What the log says about a program that may lack the rights of a set-id bit.
const HINT: &str = "set-id programs get no rights here: sandbox=false in settings{} allows them, \
                    if the unit has no NoNewPrivileges=";

/// The context in which programs run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProgramContext<'a> {
    /// The programs that run.
    pub children: &'a Arc<Children>,
    /// The mail's deadline.
    pub deadline: Deadline,
    /// The log, for causes that the client isn't told.
    pub logger: &'a Logger,
    /// The mail's notes.
    pub flight: &'a Flight,
}

/// The difference between the actions that run a program.
pub(crate) struct ProgramAction<'a> {
    /// The complete input.
    pub input: &'a [&'a [u8]],
    /// Whether standard error goes where standard output goes.
    pub joined: bool,
    /// Whether this output needs no more.
    pub enough: fn(&[u8]) -> bool,
    /// The reply for an end and an output.
    pub verdict: fn(ProgramExit, &[u8]) -> Reply,
}

/// How a program ended.
enum End {
    /// The program ended by itself.
    Exit(ProgramExit),
    /// The program was ended, because its time was over.
    Late,
    /// The program was ended, because the client had gone.
    Canceled,
}

/// Runs a program for a mail. Whatever happens, the result has a reply.
pub(crate) fn deliver(
    host: &ProgramContext<'_>,
    mail: &Mail,
    action: &Exec,
    kind: &ProgramAction<'_>,
) -> Delivery {
    let late = if action.timeout.is_some() { texts::TIMEOUT } else { texts::RELAY_FAILED };
    let deadline = action.timeout.map_or(host.deadline, Deadline::after);
    let program: Option<Arc<str>> =
        action.arguments.first().map(|path| printable(path.as_bytes()).into());
    host.flight.next_hop(program.as_deref().unwrap_or_default());
    host.flight.enter(Phase::Program);
    let delivery = |reply, attempted, canceled| Delivery {
        reply,
        next_hop: program.clone(),
        attempted,
        canceled,
    };
    if deadline.expired() {
        return delivery(Reply::temporary(late), false, false);
    }
    let mut run = match Run::start(host, mail, action, kind, deadline) {
        Ok(run) => run,
        Err(error) => {
            let denied = matches!(error, Errno::EACCES | Errno::EPERM);
            error!(host.logger, # "program,error", "program can't be started"; "id" => &*mail.id(),
                "program" => program.as_deref(), "error" => error.desc(),
                "hint" => hint(action, denied));
            return delivery(Reply::temporary(texts::INTERNAL_ERROR), false, false);
        }
    };
    let end = run.finish(kind.enough);
    let (reply, cause) = match &end {
        End::Exit(exit) => ((kind.verdict)(*exit, &run.output.kept), exit.to_string()),
        End::Late => (Reply::temporary(late), "timeout".to_owned()),
        End::Canceled => (Reply::temporary(late), "the client has gone".to_owned()),
    };
    if reply.status != Status::Accepted || !run.errors.kept.is_empty() {
        let said = [one_line(&run.output.kept), one_line(&run.errors.kept)];
        let denied = said.iter().any(|text| denial(text))
            || matches!(end, End::Exit(ProgramExit::Status(NO_PERMISSION)));
        let [output, errors] = said;
        warn!(host.logger, # "program,end,output,errors", "program complained"; "id" => &*mail.id(),
            "program" => program.as_deref(), "end" => cause, "output" => output,
            "errors" => errors, "hint" => hint(action, denied));
    }
    delivery(reply, true, matches!(end, End::Canceled))
}

/// Returns what to try if the program, or one that it runs, may lack the rights of its set-user-id
/// or set-group-id bit: under `no_new_privs` such a bit has no effect.
fn hint(action: &Exec, denied: bool) -> Option<&'static str> {
    let in_force = matches!(prctl::get_no_new_privs(), Ok(true));
    (in_force && (denied || is_set_id(action))).then_some(HINT)
}

/// Whether the program has a set-user-id or set-group-id bit.
fn is_set_id(action: &Exec) -> bool {
    let path = action.arguments.first().map(|path| OsStr::from_bytes(path.as_bytes()));
    let bits = (Mode::S_ISUID | Mode::S_ISGID).bits();
    path.and_then(|path| std::fs::metadata(path).ok()).is_some_and(|m| m.mode() & bits != 0)
}

/// Whether a program's output has the C library's words for EACCES or EPERM.
fn denial(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    text.contains("permission denied") || text.contains("operation not permitted")
}

/// A program's output as one printable line: lines are joined by a space, empty ones left out.
pub(crate) fn one_line(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output).replace('\t', " ");
    let lines = text.split(['\n', '\r']).map(str::trim).filter(|line| !line.is_empty());
    printable(lines.collect::<Vec<_>>().join(" ").as_bytes()).into_owned()
}

/// A pipe that a program writes to, and the output that was kept.
#[derive(Default)]
struct Output {
    pipe: Option<File>,
    kept: Vec<u8>,
}

impl Output {
    /// A pipe and the end for the program.
    fn new() -> Result<(Self, OwnedFd), Errno> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        Ok((Self { pipe: Some(read.into()), kept: Vec::new() }, write))
    }

    /// Reads once from a pipe that has output or has ended.
    fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        let mut chunk = [0; MAX_REPLY];
        match pipe.read(&mut chunk) {
            Ok(length @ 1..) => {
                let room = MAX_REPLY - self.kept.len();
                self.kept.extend_from_slice(&chunk[..length.min(room)]);
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => self.pipe = None,
        }
    }
}

/// The event that ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// The program has ended.
    Ended,
    /// The client has closed or reset the connection. A client that only ends its sending is no
    /// event.
    Hangup,
    /// The deadline has passed.
    Late,
}

/// A running program.
struct Run<'a> {
    child: Option<Child>,
    process: OwnedFd,
    client: Option<BorrowedFd<'a>>,
    output: Output,
    errors: Output,
    deadline: Deadline,
    logger: &'a Logger,
    id: MailId,
}

impl<'a> Run<'a> {
    fn start(
        host: &ProgramContext<'a>,
        mail: &'a Mail,
        action: &Exec,
        kind: &ProgramAction<'_>,
        deadline: Deadline,
    ) -> Result<Self, Errno> {
        let input = input::sealed(mail.job(), kind.input)?;
        let (output, stdout) = Output::new()?;
        let (errors, stderr) = match kind.joined {
            true => (Output::default(), stdout.try_clone().map_err(as_errno)?),
            false => Output::new()?,
        };
        let (child, process) = host.children.start(
            mail.job(),
            &spawn::Program {
                arguments: &action.arguments,
                environment: &action.environment,
                stdio: [input.as_fd(), stdout.as_fd(), stderr.as_fd()],
            },
        )?;
        drop((input, stdout, stderr));
        let client = Some(mail.descriptor());
        let (logger, id) = (host.logger, mail.id());
        Ok(Self { child: Some(child), process, client, output, errors, deadline, logger, id })
    }

    /// Waits for the program's end, or ends it.
    fn finish(&mut self, enough: fn(&[u8]) -> bool) -> End {
        match self.wait(self.deadline) {
            Event::Ended => {
                self.last_words(enough);
                let exit = self.child.take().map_or(ProgramExit::Unknown, Child::reap);
                End::Exit(exit)
            }
            Event::Hangup => {
                self.end();
                End::Canceled
            }
            Event::Late => {
                self.end();
                End::Late
            }
        }
    }

    /// Ends the program with all of its process group.
    fn end(&mut self) {
        let Some(child) = self.child.take() else { return };
        self.client = None;
        child.signal_group(Signal::SIGTERM);
        let mut ending = Ending::asked(Instant::now());
        let mut others = Others::MayLive;
        loop {
            match ending.next(others, Instant::now()) {
                Step::Wait if ending.leader_runs() => {
                    if self.wait(Deadline::at(ending.due())) == Event::Ended {
                        ending.leader_ended();
                    }
                }
                Step::Wait => others = self.wait_for_group(&child, Deadline::at(ending.due())),
                Step::Kill => child.signal_group(Signal::SIGKILL),
                Step::KillAndReap => return child.reap_group(),
                Step::GiveUp | Step::Over => {
                    error!(self.logger, "program can't be killed"; "id" => &*self.id,
                        "pid" => child.pid().as_raw());
                    return child.abandon();
                }
            }
        }
    }

    /// Waits, after the end of the program, for the rest of its group, and reads what they write.
    fn wait_for_group(&mut self, child: &Child, grace: Deadline) -> Others {
        let (ended, mut pause) = (Instant::now(), process_group::FIRST_PAUSE);
        while child.others(ended) == Others::MayLive {
            if grace.expired() {
                return Others::MayLive;
            }
            let next = grace.at_most(pause);
            while !next.expired() {
                self.read_ready(next);
            }
            pause = process_group::next_pause(pause);
        }
        Others::Gone
    }

    /// Reads output until something happens.
    fn wait(&mut self, deadline: Deadline) -> Event {
        loop {
            let ready = self.poll(deadline);
            if ready.ended {
                return Event::Ended;
            }
            if ready.hangup {
                return Event::Hangup;
            }
            if deadline.expired() {
                return Event::Late;
            }
        }
    }

    /// Reads, after the program's end, its remaining output, and for [`LINGER`] what others may
    /// still write.
    fn last_words(&mut self, enough: fn(&[u8]) -> bool) {
        let linger = Deadline::after(LINGER);
        while self.output.pipe.is_some() || self.errors.pipe.is_some() {
            let until =
                if enough(&self.output.kept) { Deadline::after(Duration::ZERO) } else { linger };
            if !self.read_ready(until) || linger.expired() {
                return;
            }
        }
    }

    /// Waits for anything, and reads what output there is.
    fn poll(&mut self, deadline: Deadline) -> Ready {
        let mut polled = Polled::default();
        polled.add(Source::Process, self.process.as_fd(), PollFlags::POLLIN);
        if let Some(client) = self.client {
            // No events but errors and hang-ups, which poll(2) always reports.
            polled.add(Source::Client, client, PollFlags::empty());
        }
        polled.add_outputs(&self.output, &self.errors);
        let happened = polled.wait(deadline);
        self.read(&happened);
        Ready {
            ended: happened.contains(&Source::Process),
            hangup: happened.contains(&Source::Client),
        }
    }

    /// Waits for output and reads it; says whether there was any.
    fn read_ready(&mut self, deadline: Deadline) -> bool {
        let mut polled = Polled::default();
        polled.add_outputs(&self.output, &self.errors);
        let happened = polled.wait(deadline);
        self.read(&happened);
        !happened.is_empty()
    }

    fn read(&mut self, happened: &[Source]) {
        for source in happened {
            match source {
                Source::Output => self.output.read(),
                Source::Errors => self.errors.read(),
                Source::Process | Source::Client => {}
            }
        }
    }
}

/// The events that poll(2) reported.
struct Ready {
    ended: bool,
    hangup: bool,
}

/// A source of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Process,
    Client,
    Output,
    Errors,
}

/// Descriptors for poll(2) with their meaning.
#[derive(Default)]
struct Polled<'f> {
    sources: Vec<Source>,
    fds: Vec<PollFd<'f>>,
}

impl<'f> Polled<'f> {
    fn add(&mut self, source: Source, fd: BorrowedFd<'f>, events: PollFlags) {
        self.sources.push(source);
        self.fds.push(PollFd::new(fd, events));
    }

    fn add_outputs(&mut self, output: &'f Output, errors: &'f Output) {
        for (source, output) in [(Source::Output, output), (Source::Errors, errors)] {
            if let Some(pipe) = &output.pipe {
                self.add(source, pipe.as_fd(), PollFlags::POLLIN);
            }
        }
    }

    /// Waits for events and returns their sources; none when the deadline has passed.
    fn wait(mut self, deadline: Deadline) -> Vec<Source> {
        match ppoll(&mut self.fds, Some(TimeSpec::from(deadline.remaining())), None) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Vec::new(),
            Err(_) => {
                std::thread::sleep(PAUSE);
                return Vec::new();
            }
        }
        let happened = self.fds.iter().map(|fd| fd.any().unwrap_or(true));
        self.sources
            .iter()
            .zip(happened)
            .filter(|(_, any)| *any)
            .map(|(source, _)| *source)
            .collect()
    }
}

fn as_errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn denials_are_recognized_in_what_a_program_says() {
        assert!(denial("postdrop: warning: create file maildrop/1.2: Permission denied"));
        assert!(denial("kill: Operation not permitted"));
        assert!(!denial("no such user") && !denial(""));
    }

    #[test]
    fn output_becomes_one_line() {
        let table: [(&[u8], &str); 7] = [
            (b"", ""),
            (b"\n\r\n \n", ""),
            (b"one\n", "one"),
            (b"one  two\r\n\r\n  three\tfour\n", "one  two three four"),
            (b"a\x1b[31mb\0", "a?[31mb?"),
            (b"caf\xc3\xa9 \xff", "caf\u{e9} \u{fffd}"),
            (b"4:Kok,", "4:Kok,"),
        ];
        for (output, line) in table {
            assert_eq!(one_line(output), line, "{output:?}");
        }
    }
}
