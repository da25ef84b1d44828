//! A worker process from its fork to its end.
//!
//! Contract: `Ready` is reported once jobs can be taken. After the end of the job socket the
//! process ends with its last job. If the supervisor is gone, the process ends after the drain time
//! at the latest.
//!
//! # Failure
//! A worker that can't enter its sandbox or start a single thread ends with a status other than 0.
//! A failure to set the process's name or its OOM score is logged, and the worker goes on.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::prctl;
use qrelay_shared::exit::Exit;
use qrelay_shared::ids::WorkerId;
use qrelay_shared::ipc::channel::Channel;
use qrelay_shared::settings::Declaration;
use qrelay_shared::sys::process::{exit_now, flush_stdio};
use qrelay_shared::sys::recorder::map;
use slog::{Logger, debug, error, warn};

use crate::flight::Recorder;
use crate::job_channel::Reports;
use crate::lua::state::State;
use crate::process::{control, sandbox};
use crate::session::Context;
use crate::session::script::Script;
use crate::threads::pool::{IDLE, Pool};

/// Added to oom_score_adj, whose scale ends at 1000: among processes of qrelay of like size the
/// kernel kills a worker, never the supervisor.
const OOM_PENALTY: i32 = 200;

/// Exit status when mails were still unfinished at the drain time.
const UNFINISHED: i32 = 1;

/// The name and the sockets that a worker gets from the supervisor.
#[derive(Debug)]
pub(crate) struct Birth {
    /// Names the worker.
    pub(crate) worker: WorkerId,
    /// The worker's end of the job socket.
    pub(crate) jobs: OwnedFd,
    /// The worker's end of the control socket.
    pub(crate) control: OwnedFd,
    /// The worker's end of the channel on which it asks for channels to the shared dictionaries.
    pub(crate) dictionaries: OwnedFd,
    /// The memory of the flight recorder, if the supervisor could make it.
    pub(crate) flights: Option<OwnedFd>,
}

/// Lives as a worker. Returns only if the worker can't start.
pub(crate) fn run(
    birth: Birth,
    state: State,
    declaration: &Declaration,
    instance: String,
    logger: Logger,
) -> Exit {
    let Birth { worker: id, jobs, control, dictionaries, flights } = birth;
    if let Err(error) = sandbox::enter_own(declaration.separation.sandbox) {
        error!(logger, "worker can't start"; "error" => error);
        return Exit::System;
    }
    settle(&logger);
    state.after_fork(id, Some(dictionaries));
    let script: Arc<dyn Script> = Arc::new(state);
    let recorder = recorder(flights, &logger);
    let pool = match start(jobs, declaration, instance, &script, recorder, &logger) {
        Ok(pool) => pool,
        Err(error) => {
            error!(logger, "worker can't start"; "error" => %error);
            return Exit::System;
        }
    };
    pool.context().reports.ready();
    control::run(&Channel::from_fd(control), pool.context());
    warn!(logger, "the supervisor is gone; finishing what is here");
    std::thread::sleep(declaration.settings.drain_timeout);
    // After this process nobody is left to end its programs.
    pool.context().children.kill_all();
    end(UNFINISHED, &logger)
}

/// Starts the threads that serve the jobs of this socket.
///
/// # Errors
/// The socket can't be set up, or the system has no thread.
fn start(
    jobs: OwnedFd,
    declaration: &Declaration,
    instance: String,
    script: &Arc<dyn Script>,
    recorder: Arc<Recorder>,
    logger: &Logger,
) -> io::Result<Arc<Pool>> {
    let reports = Reports::new(Channel::from_fd(jobs), IDLE)?;
    let script = Arc::clone(script);
    let context = Context::new(declaration, instance, script, reports, recorder, logger.clone());
    let logger = logger.clone();
    let pool = Pool::new(context, move || end(0, &logger));
    pool.run()?;
    Ok(pool)
}

/// Maps the memory of the flight recorder. Without it mails are served all the same, and their
/// times are noted.
fn recorder(flights: Option<OwnedFd>, logger: &Logger) -> Arc<Recorder> {
    let memory = flights.map_or(Ok(&[][..]), |flights| map(flights.as_fd()));
    Recorder::new(memory.unwrap_or_else(|errno| {
        warn!(logger, "what happens to mails can't be noted"; "error" => errno.desc());
        &[]
    }))
}

/// Ends the process without waiting for threads, and without running their exit handlers.
fn end(status: i32, logger: &Logger) -> ! {
    qrelay_shared::log::report_rest(logger);
    qrelay_shared::log::finish();
    flush_stdio();
    exit_now(status)
}

/// Sets what the rest of the machine sees of the process.
fn settle(logger: &Logger) {
    if let Err(errno) = prctl::set_name(c"qrelay-worker") {
        debug!(logger, "no process name"; "error" => errno.desc());
    }
    if let Err(error) = volunteer_for_oom() {
        debug!(logger, "oom_score_adj is unchanged"; "error" => %error);
    }
}

fn volunteer_for_oom() -> io::Result<()> {
    const PATH: &str = "/proc/self/oom_score_adj";
    let now: i32 = std::fs::read_to_string(PATH)?.trim().parse().map_err(io::Error::other)?;
    std::fs::write(PATH, (now + OOM_PENALTY).min(1000).to_string())
}
