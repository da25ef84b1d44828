//! The process `qrelay zygote`: evaluates config.lua once, and forks workers and one standby
//! zygote. The orders come over a socket that is the zygote's standard input.
//!
//! Contract: a zygote has a single thread to its end, because it forks. Every process that it forks
//! becomes a child of the supervisor, and keeps nothing of the zygote but the script. A zygote and
//! its workers disregard every signal that tells a process to end, except for SIGKILL and SIGABRT.
//! A zygote ends with the supervisor.
//!
//! # Failure
//! A script that can't be used is reported, and so are a panic while it loads and a fork that
//! fails. The end of the channel is the end of the process.

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::exit::Exit;
use qrelay_shared::ids::WorkerId;
use qrelay_shared::ipc::channel::{Channel, Received, RecvBuffer, RecvError, SendError};
use qrelay_shared::ipc::message::{FromZygote, ToZygote, ZygoteOrder, ZygoteReport};
use qrelay_shared::log::Patience;
use qrelay_shared::settings::{Account, Declaration, Sandbox, Separation, Settings};
use qrelay_shared::sys::inherited::reset_signals;
use qrelay_shared::sys::limits::{self, Limits};
use qrelay_shared::sys::process::{Forked, fork_orphan, take_stdin, tame_malloc};
use qrelay_shared::sys::seccomp::spare_other_processes;
use qrelay_shared::sys::signals::{disregard, disregard_strays};
use qrelay_shared::sys::title;
use qrelay_shared::sys::wait::wait;
use slog::{Level, Logger, error};

use crate::lua::config::{ConfigError, require_safe};
use crate::lua::state::{LoadOptions, Purpose, State};
use crate::process::logging::Current;
use crate::process::worker::{self, Birth};
use crate::process::{account, sandbox};

/// How long a standby waits for the supervisor to become its parent.
const ADOPTION_TIME: Duration = Duration::from_secs(1);

/// How often the standby looks meanwhile.
const ADOPTION_POLL: Duration = Duration::from_micros(100);

/// Characters that are reported of a complaint that doesn't fit in a message. The log shows fewer.
const LONGEST_COMPLAINT: usize = 4096;

type ZygoteChannel = Channel<FromZygote, ToZygote>;

/// A script that has been evaluated.
struct Loaded {
    state: State,
    declaration: Declaration,
    instance: String,
    generation: u64,
}

/// The role of this process after it has obeyed an order.
enum Life {
    /// A zygote whose channel has ended.
    Ended,
    /// A worker.
    Worker(Birth),
    /// A standby zygote, with a channel of its own.
    Standby(ZygoteChannel),
}

/// Runs the zygote to its end, and so every process that the zygote forks. Programs get `limits`.
pub fn main(level: Level, limits: Limits) -> Exit {
    let supervisor = getppid();
    limits.remember();
    let logger =
        Current::new(qrelay_shared::log::init(level, "qrelay-zygote", Patience::Unlimited));
    match prepare(supervisor) {
        Ok(true) => {}
        Ok(false) => return Exit::Success,
        Err(errno) => {
            error!(logger.logger(), "zygote can't start"; "error" => errno.desc());
            return Exit::System;
        }
    }
    log_panics(logger.logger());
    match take_stdin() {
        Ok(stdin) => live(Channel::from_fd(stdin), supervisor, level, &logger),
        Err(errno) => {
            error!(logger.logger(), "no channel on standard input"; "error" => errno.desc());
            Exit::System
        }
    }
}

/// Makes this process a zygote. Returns whether the supervisor is still there.
fn prepare(supervisor: Pid) -> Result<bool, Errno> {
    prctl::set_name(c"qrelay-zygote")?;
    limits::leave_descriptors()?;
    tame_malloc();
    disregard_strays();
    let meant_for_others = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
    meant_for_others.into_iter().for_each(disregard);
    disregard(Signal::SIGPIPE);
    reset_signals();
    end_with(supervisor)
}

/// Has this process end with its parent. Returns whether the parent is the supervisor.
fn end_with(supervisor: Pid) -> Result<bool, Errno> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    Ok(getppid() == supervisor)
}

/// Writes the messages of panics to the log, instead of raw to standard error.
fn log_panics(logger: Logger) {
    std::panic::set_hook(Box::new(move |panic| {
        error!(logger, "panic"; "cause" => %panic);
    }));
}

fn live(mut channel: ZygoteChannel, supervisor: Pid, level: Level, logger: &Current) -> Exit {
    let mut loaded = None;
    loop {
        match obey(&channel, &mut loaded, logger) {
            Life::Ended => return Exit::Success,
            Life::Worker(birth) => {
                drop(channel);
                let Some(Loaded { state, declaration, instance, generation }) = loaded else {
                    return Exit::System;
                };
                let worker = birth.worker;
                title::set(&format!("qrelay: worker {worker}, generation {generation}"));
                logger.replace(qrelay_shared::log::init(level, "qrelay-worker", Patience::None));
                return worker::run(birth, state, &declaration, instance, logger.logger());
            }
            Life::Standby(own) => {
                if let Some(Loaded { generation, .. }) = &loaded {
                    title::set(&format!("qrelay: standby zygote, generation {generation}"));
                }
                channel = own;
                logger.replace(qrelay_shared::log::init(
                    level,
                    "qrelay-zygote",
                    Patience::Unlimited,
                ));
                if !adopted(&channel, supervisor) || end_with(supervisor) != Ok(true) {
                    return Exit::Success;
                }
            }
        }
    }
}

/// Waits until the supervisor is this process's parent, so that the end of the intermediate process
/// isn't taken for the supervisor's. Returns whether the supervisor is still there.
fn adopted(channel: &ZygoteChannel, supervisor: Pid) -> bool {
    let deadline = Deadline::after(ADOPTION_TIME);
    while getppid() != supervisor {
        let pause = Deadline::after(ADOPTION_POLL);
        let quiet = wait(channel.as_fd(), PollFlags::empty(), pause).is_ok_and(|e| e.is_empty());
        if !quiet || deadline.expired() {
            return false;
        }
    }
    true
}

/// Obeys the supervisor until this process becomes another one or ends.
fn obey(channel: &ZygoteChannel, loaded: &mut Option<Loaded>, logger: &Current) -> Life {
    let mut buffer = RecvBuffer::new();
    loop {
        match channel.recv(&mut buffer) {
            Ok(received) => match execute(received, loaded, logger) {
                ControlFlow::Continue(report) => send(channel, &report),
                ControlFlow::Break(life) => return life,
            },
            Err(RecvError::Empty) => {}
            Err(RecvError::Closed) => return Life::Ended,
            Err(error) => {
                error!(logger.logger(), "order can't be received"; "error" => %error);
                return Life::Ended;
            }
        }
    }
}

/// Sends a report. If the supervisor is gone, the next receive notices.
fn send(channel: &ZygoteChannel, report: &ZygoteReport) {
    if let Err(SendError::TooLarge) = channel.send(report, &[]) {
        let message = match report {
            ZygoteReport::Failed { message, .. } => {
                message.chars().take(LONGEST_COMPLAINT).collect()
            }
            _ => "the listeners don't fit in a message: too many, or too long".into(),
        };
        let _ = channel.send(&refused(message), &[]);
    }
}

/// Carries out one order. Breaks in a process that the order has forked.
fn execute(
    received: Received<ZygoteOrder>,
    loaded: &mut Option<Loaded>,
    logger: &Current,
) -> ControlFlow<Life, ZygoteReport> {
    let Received { message, mut fds } = received;
    match message {
        ZygoteOrder::Load { generation, config, reload, systemd, instance, account } => {
            title::set(&format!("qrelay: zygote, generation {generation}"));
            let logger = logger.logger();
            let dictionaries = fds.take();
            let options = LoadOptions {
                config,
                reload,
                systemd: Some(systemd),
                purpose: Purpose::Serve,
                logger,
                dictionaries,
            };
            ControlFlow::Continue(load(options, (instance, generation), account.as_ref(), loaded))
        }
        ZygoteOrder::Fork { worker } => {
            let birth = match (fds.take(), fds.take(), fds.take()) {
                (Some(jobs), Some(control), Some(dictionaries)) => {
                    Birth { worker, jobs, control, dictionaries, flights: fds.take() }
                }
                _ => return failed(worker, "its sockets did not arrive".into()),
            };
            if loaded.is_none() {
                return failed(worker, "no script has been loaded".into());
            }
            match fork_orphan() {
                Ok(Forked::Child) => ControlFlow::Break(Life::Worker(birth)),
                Ok(Forked::Parent(pid)) => {
                    ControlFlow::Continue(ZygoteReport::Forked { worker, pid: pid.as_raw() })
                }
                Err(error) => failed(worker, error.to_string()),
            }
        }
        ZygoteOrder::Standby => {
            let Some(own) = fds.take() else {
                return no_standby("its channel did not arrive".into());
            };
            match fork_orphan() {
                Ok(Forked::Child) => ControlFlow::Break(Life::Standby(Channel::from_fd(own))),
                Ok(Forked::Parent(pid)) => {
                    ControlFlow::Continue(ZygoteReport::StandbyForked { pid: pid.as_raw() })
                }
                Err(error) => no_standby(error.to_string()),
            }
        }
    }
}

fn failed(worker: WorkerId, message: String) -> ControlFlow<Life, ZygoteReport> {
    ControlFlow::Continue(ZygoteReport::ForkFailed { worker, message })
}

fn no_standby(message: String) -> ControlFlow<Life, ZygoteReport> {
    ControlFlow::Continue(ZygoteReport::StandbyFailed { message })
}

/// Runs the script. A process runs one script in its life.
fn load(
    options: LoadOptions,
    (instance, generation): (String, u64),
    account: Option<&Account>,
    loaded: &mut Option<Loaded>,
) -> ZygoteReport {
    if loaded.is_some() {
        return refused("a script has been loaded already".into());
    }
    // Before this process is another user: the supervisor, as root, binds what the script declares.
    if let Err(error) = require_safe(&options.config) {
        return unusable(&error);
    }
    let supervisor = getppid();
    let before = match account.map_or(Ok(None), |account| become_account(account, supervisor)) {
        Ok(user) => user,
        Err(message) => return refused(message),
    };
    match catch_unwind(AssertUnwindSafe(|| State::load(options))) {
        Ok(Ok((state, mut declaration))) => {
            match separate(&declaration.settings, supervisor) {
                Ok(separation) => {
                    let user = separation.user.or(before);
                    declaration.separation = Separation { user, ..separation };
                }
                Err(message) => return refused(message),
            }
            *loaded =
                Some(Loaded { state, declaration: declaration.clone(), instance, generation });
            ZygoteReport::Declared(Box::new(declaration))
        }
        Ok(Err(error)) => unusable(&error),
        Err(_) => refused("internal error while loading".into()),
    }
}

/// Reports that this process can't run a script, and that trying again won't help.
fn refused(message: String) -> ZygoteReport {
    ZygoteReport::Failed { message, may_pass: false }
}

fn unusable(error: &ConfigError) -> ZygoteReport {
    ZygoteReport::Failed { message: error.to_string(), may_pass: error.may_pass() }
}

/// Becomes the user that the script has declared, and enters the sandbox unless the script has
/// declared otherwise. The workers inherit both.
///
/// # Errors
/// A text for the administrator; this process must not fork then.
fn separate(settings: &Settings, supervisor: Pid) -> Result<Separation, String> {
    let user = match account::declared(settings) {
        Some(account) => become_account(&account, supervisor)?,
        None => None,
    };
    if !settings.sandbox {
        return Ok(Separation { sandbox: Sandbox::Off, filtered: false, user });
    }
    let sandbox = sandbox::enter()?;
    Ok(Separation { sandbox, filtered: spare_other_processes().is_ok(), user })
}

/// Becomes an account, and goes on to end with the supervisor. Returns the new ids, if they
/// changed.
fn become_account(account: &Account, supervisor: Pid) -> Result<Option<(u32, u32)>, String> {
    let user = account::become_account(account)?;
    // The change has taken the signal at the supervisor's end away.
    match end_with(supervisor) {
        Ok(true) => Ok(user),
        Ok(false) => Err("the supervisor is gone".into()),
        Err(error) => Err(format!("PR_SET_PDEATHSIG: {}", error.desc())),
    }
}
