//! The Lua state with its configuration: loaded once in the zygote, forked into workers, shared by
//! a worker's threads.
//!
//! Contract: [`State::load`] runs on a single-threaded process. Afterwards any number of threads
//! may call [`State::start`]; [`State::held`] and [`State::exhausted`] take no lock. Nothing of Lua
//! leaves this type.
//!
//! # Failure
//! [`ConfigError`] while loading, [`HandlerError`] per mail; the latter is logged here, with the
//! script's traceback.

use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mlua::{Function, Lua, Table, Value};
use parking_lot::RwLock;
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::WorkerId;
use qrelay_shared::ipc::message::DatabaseState;
use qrelay_shared::settings::{Declaration, Settings};
use qrelay_shared::system_error::shown;
use slog::Logger;

use crate::delivery::action::Action;
use crate::lua::binding::error;
use crate::lua::config::{self, ConfigError};
use crate::lua::engine::background::Background;
use crate::lua::engine::collector;
use crate::lua::engine::monitor::{Monitor, Progress, RunContext, Stop};
use crate::lua::engine::output::Output;
use crate::lua::engine::prelude;
use crate::lua::engine::slot::Slot;
use crate::lua::engine::watch::{Held, Watch};
use crate::lua::library::action_object;
use crate::lua::library::dictionary_client::{self, Opener};
use crate::lua::library::every;
pub use crate::lua::library::listen::Purpose;
use crate::lua::library::listen::{Draft, SharedDraft};
use crate::lua::library::mail_object::MailObject;
use crate::lua::library::pg;
use crate::lua::library::shared::SharedOpener;
use crate::lua::library::socket;
use crate::lua::library::{self, Libraries};
use crate::mail::Mail;
use crate::session::script::{Decision, HandlerError, Handling};

/// How a configuration is loaded.
pub struct LoadOptions {
    /// config.lua, absolute.
    pub config: PathBuf,
    /// Call the script's `reload` afterwards.
    pub reload: bool,
    /// FileDescriptorNames of the sockets that systemd passed, one entry each; `None` if any socket
    /// counts as passed.
    pub systemd: Option<Vec<String>>,
    /// What the script runs for.
    pub purpose: Purpose,
    /// Where the script's output and its errors go.
    pub logger: Logger,
    /// The channel on which channels to the shared dictionaries are asked for while the script
    /// loads.
    pub dictionaries: Option<OwnedFd>,
}

/// A loaded configuration; one per process, shared by its threads.
pub struct State {
    lua: Lua,
    monitor: Arc<Monitor>,
    watch: Arc<Watch>,
    output: Arc<Output>,
    logger: Logger,
    handlers: Vec<Handler>,
    settings: Settings,
    randomseed: Function,
    worker: AtomicU64,
    exhausted: AtomicBool,
    /// Lua's memory in bytes when a handler was called last.
    memory: AtomicU64,
    dictionaries: SharedOpener,
    pg: Arc<pg::Library>,
    draft: SharedDraft,
    warnings: Vec<String>,
}

/// A handler that has ended: its mail, and its action or why there is none.
pub(crate) type Ended = (Box<Mail>, Result<Action, Stop>);

/// A listener's handler.
struct Handler {
    function: Function,
    /// File and line of the function.
    place: String,
}

impl Handler {
    fn new(function: Function) -> Self {
        let info = function.info();
        let place =
            match (info.source.as_deref().and_then(|s| s.strip_prefix('@')), info.line_defined) {
                (Some(file), Some(line)) => format!("{file}:{line}"),
                _ => "handler".to_owned(),
            };
        Self { function, place }
    }
}

/// Makes a state with Lua's whole standard library. mlua marks the call as unsafe, because the
/// library `debug` can break the binding's invariants. The script is the administrator's, and a
/// process that breaks is replaced.
#[expect(unsafe_code, reason = "mlua offers the debug library in no other way")]
fn new_lua() -> Lua {
    // SAFETY: C modules and the debug library are the script's own risk: config.lua is as trusted
    // as the program that its `exec` runs.
    unsafe { Lua::unsafe_new() }
}

impl State {
    /// Runs the script in its directory, then `reload` if that is asked for, and builds the
    /// declaration. The working directory is `/` afterwards.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(options: LoadOptions) -> Result<(Self, Declaration), ConfigError> {
        let LoadOptions { config, reload, systemd, purpose, logger, dictionaries } = options;
        let dictionaries = Arc::new(RwLock::new(Opener::new(dictionaries)));
        let watch = Watch::new();
        let output = Output::new(logger.clone(), Arc::clone(&watch));
        let draft = Draft::new(systemd, purpose);
        let pg = pg::Library::new(logger.clone());
        let libraries = Libraries {
            watch: &watch,
            output: &output,
            logger: &logger,
            draft: &draft,
            dictionaries: &dictionaries,
            pg: &pg,
        };
        let (lua, monitor) = set_up(&watch, &libraries).map_err(internal)?;
        let result = config::run(&lua, &config, reload, &draft);
        output.flush(None);
        // No channel or connection may be inherited: each process has its own.
        pg.close(purpose);
        dictionary_client::close_idle();
        *dictionaries.write() = Opener::default();
        result.map_err(|error| match watch.has_failed_for_now() {
            true => ConfigError::ForNow(Box::new(error)),
            false => error,
        })?;
        socket::release(&lua);
        std::env::set_current_dir("/")
            .map_err(|e| ConfigError::Internal(format!("cannot change to /: {}", shown(&e))))?;
        let (declaration, handlers) = draft
            .lock()
            .finish(&lua)
            .map_err(|message| ConfigError::Declaration { path: config, message })?;
        let warnings = draft.lock().oddities(&lua).map_err(internal)?;
        if purpose == Purpose::Serve {
            warnings.iter().for_each(|warning| slog::warn!(logger, "{}", warning));
        }
        let settings = declaration.settings.clone();
        collector::limit_memory(&lua, settings.lua_memory_limit).map_err(internal)?;
        let randomseed = math_randomseed(&lua).map_err(internal)?;
        let state = Self {
            lua,
            monitor: Arc::new(monitor),
            watch,
            output,
            logger,
            handlers: handlers.into_iter().map(Handler::new).collect(),
            settings,
            randomseed,
            worker: AtomicU64::new(0),
            exhausted: AtomicBool::new(false),
            memory: AtomicU64::new(0),
            dictionaries,
            pg,
            draft,
            warnings,
        };
        Ok((state, declaration))
    }

    /// Prepares the state in a freshly forked worker: other random numbers, the worker's number in
    /// log lines, a way of its own to the shared dictionaries, and the threads of `every` and of
    /// `db:listen`.
    pub fn after_fork(&self, worker: WorkerId, dictionaries: Option<OwnedFd>) {
        *self.dictionaries.write() = Opener::new(dictionaries);
        self.worker.store(worker.0, Ordering::Relaxed);
        let mut seed = [0; 4];
        let random = std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut seed));
        if let Err(error) = random {
            slog::warn!(self.logger, "cannot read /dev/urandom: {}", error);
            seed = std::process::id().to_ne_bytes();
        }
        if let Err(error) = self.randomseed.call::<()>(u32::from_ne_bytes(seed)) {
            slog::warn!(self.logger, "math.randomseed: {}", error::describe(&error).0);
        }
        let (monitor, output) = (Arc::clone(&self.monitor), Arc::clone(&self.output));
        let (settings, logger) = (self.settings.clone(), self.logger.clone());
        let background = Arc::new(Background::new(monitor, output, logger, settings, worker));
        every::start(&self.lua, &background);
        self.pg.start(&background);
    }

    /// Runs the listener's handler for a mail until it has to wait. A thread that may wait does the
    /// rest. The mail comes back whatever happens, with all of its Lua values dropped.
    pub fn start(
        self: Arc<Self>,
        listener: usize,
        mail: Box<Mail>,
        deadline: Deadline,
    ) -> Handling {
        let Some(handler) = self.handlers.get(listener) else {
            slog::error!(self.logger, "no handler for listener {}", listener; "id" => &*mail.id());
            return Handling::Decided((mail, Err(HandlerError::Script)));
        };
        let (job, slot) = self.context(listener, mail, deadline);
        match self.begin(handler, &job, &slot) {
            Ok(Progress::Waits(suspended)) => Handling::Waits(Box::new(move || {
                let result = self.monitor.finish(&job, suspended, action_object::decision);
                self.decided(self.ended(listener, &slot, result))
            })),
            Ok(Progress::Finished(decision)) => {
                Handling::Decided(self.decided(self.ended(listener, &slot, Ok(decision))))
            }
            Err(stop) => Handling::Decided(self.decided(self.ended(listener, &slot, Err(stop)))),
        }
    }

    /// Runs the listener's handler for a mail to its end, waits included, and logs no failure. The
    /// listener is one that the script has declared.
    pub(crate) fn handle(&self, listener: usize, mail: Box<Mail>, deadline: Deadline) -> Ended {
        let (job, slot) = self.context(listener, mail, deadline);
        let result = match self.begin(&self.handlers[listener], &job, &slot) {
            Ok(Progress::Waits(suspended)) => {
                self.monitor.finish(&job, suspended, action_object::decision)
            }
            Ok(Progress::Finished(decision)) => Ok(decision),
            Err(stop) => Err(stop),
        };
        self.ended(listener, &slot, result)
    }

    /// Returns what a run of the listener's handler needs to know, and the place of the mail.
    fn context(
        &self,
        listener: usize,
        mail: Box<Mail>,
        deadline: Deadline,
    ) -> (RunContext, Arc<Slot>) {
        let number = mail.job();
        let slot = Slot::new(mail);
        let budget = self.settings.handler_timeout;
        let mail = Some(Arc::clone(&slot));
        (RunContext { number, handler: Some(listener), mail, deadline, budget }, slot)
    }

    fn begin(
        &self,
        handler: &Handler,
        job: &RunContext,
        slot: &Arc<Slot>,
    ) -> Result<Progress<Result<Action, String>>, Stop> {
        let object = MailObject::new(Arc::clone(slot));
        let argument = |lua: &Lua| {
            self.memory.store(lua.used_memory() as u64, Ordering::Relaxed);
            lua.create_any_userdata(object).map(Value::UserData)
        };
        self.monitor.start(job, &handler.function, argument, action_object::decision)
    }

    /// Takes the mail back from a handler that has ended.
    fn ended(
        &self,
        listener: usize,
        slot: &Slot,
        result: Result<Result<Action, String>, Stop>,
    ) -> Ended {
        let mail = slot.take().expect("nobody else takes the mail out of its slot");
        self.output.flush(Some(&mail.id()));
        let result = match result {
            Ok(Ok(action)) => Ok(action),
            Ok(Err(message)) => {
                let place = self.handler_place(listener);
                Err(Stop::Error { message: format!("{place}: {message}"), traceback: None })
            }
            Err(stop) => Err(stop),
        };
        (mail, result)
    }

    /// Logs a failure.
    fn decided(&self, (mail, result): Ended) -> Decision {
        let result = result.map_err(|stop| self.failed(&mail, stop));
        (mail, result)
    }

    /// Returns what the script has declared without effect. If the script serves, the log has it.
    pub(crate) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns the place of a call of `os.exit` that was refused.
    pub(crate) fn left(&self) -> Option<String> {
        self.draft.lock().left().map(str::to_owned)
    }

    /// Returns how long Lua has been held, and by which job. Takes no lock.
    pub fn held(&self) -> Held {
        self.watch.held()
    }

    /// Returns file and line of the handler that holds Lua, empty if none does. Takes no lock.
    pub fn place(&self) -> &str {
        let handler = self.watch.handler().and_then(|index| self.handlers.get(index));
        handler.map_or("", |handler| handler.place.as_str())
    }

    /// Returns file and line of a listener's handler.
    pub(crate) fn handler_place(&self, listener: usize) -> &str {
        self.handlers.get(listener).map_or("handler", |handler| handler.place.as_str())
    }

    /// Whether the memory limit was reached even after a full collection; the process should then
    /// be replaced.
    pub fn exhausted(&self) -> bool {
        self.exhausted.load(Ordering::Relaxed)
    }

    /// Returns Lua's memory in bytes when a handler was called last. Takes no lock.
    pub fn memory(&self) -> u64 {
        self.memory.load(Ordering::Relaxed)
    }

    /// Describes the pools of connections to databases; `None` if that would have to wait.
    pub fn databases(&self) -> Option<Vec<DatabaseState>> {
        self.pg.databases()
    }

    /// Logs why a handler failed.
    fn failed(&self, mail: &Mail, stop: Stop) -> HandlerError {
        self.check_memory();
        match stop {
            Stop::NotBegun => {
                slog::warn!(self.logger, # "listener", "no worker was free in time";
                    "id" => &*mail.id(), "worker" => self.worker.load(Ordering::Relaxed),
                    "listener" => &**mail.listener());
                HandlerError::NotBegun
            }
            Stop::Deadline => {
                slog::warn!(self.logger, # "listener",
                    "the mail's time was over while its handler waited";
                    "id" => &*mail.id(), "worker" => self.worker.load(Ordering::Relaxed),
                    "listener" => &**mail.listener());
                HandlerError::Deadline
            }
            Stop::Error { message, traceback } => {
                let worker = self.worker.load(Ordering::Relaxed);
                slog::error!(self.logger, # "listener", "script failed: {}", message;
                    "id" => &*mail.id(), "worker" => worker, "listener" => &**mail.listener(),
                    "traceback" => traceback.as_deref().map(error::in_one_line));
                HandlerError::Script
            }
        }
    }

    /// Checks, after a failure, whether Lua's memory is full of what the script keeps.
    fn check_memory(&self) {
        let limit = self.settings.lua_memory_limit;
        if collector::is_full(&self.lua, limit) && !self.exhausted.swap(true, Ordering::Relaxed) {
            slog::error!(self.logger, "the script's memory limit is reached";
                "lua_memory_limit" => limit);
        }
    }
}

/// A Lua state with everything a script may use.
fn set_up(watch: &Arc<Watch>, libraries: &Libraries<'_>) -> mlua::Result<(Lua, Monitor)> {
    let lua = new_lua();
    collector::set_up(&lua, Settings::default().lua_memory_limit)?;
    let monitor = Monitor::new(lua.clone(), Arc::clone(watch))?;
    prelude::install(&lua, watch)?;
    library::register(&lua, libraries)?;
    Ok((lua, monitor))
}

fn math_randomseed(lua: &Lua) -> mlua::Result<Function> {
    lua.globals().get::<Table>("math")?.get("randomseed")
}

fn internal(error: mlua::Error) -> ConfigError {
    ConfigError::Internal(error::describe(&error).0)
}
