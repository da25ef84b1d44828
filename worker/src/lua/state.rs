//! One Lua state with one configuration: loaded once in the zygote, forked into
//! workers, shared by a worker's threads.
//!
//! Contract: [`State::load`] runs on a single-threaded process. Afterwards any
//! number of threads may call [`State::start`]; [`State::held`] and
//! [`State::exhausted`] take no lock. Nothing of Lua leaves this type.
//!
//! # Failure
//! [`ConfigError`] while loading, [`HandlerError`] per mail; the latter is
//! logged here, with the script's traceback.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mlua::state::{GcIncParams, GcMode};
use mlua::{Function, Lua, Table, Value};
use parking_lot::RwLock;
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::WorkerId;
use qrelay_shared::ipc::channel::SendError;
use qrelay_shared::settings::{Declaration, Settings};
use slog::Logger;

use crate::delivery::action::Action;
use crate::lua::binding::convert::{self, Argument, MAX_TIMEOUT};
use crate::lua::binding::error;
pub use crate::lua::binding::error::{ConfigError, HandlerError};
use crate::lua::binding::function::{self, Call};
use crate::lua::binding::operation::Sleep;
use crate::lua::engine::background::Background;
use crate::lua::engine::monitor::{Job, Monitor, Progress, Stop};
use crate::lua::engine::watch::{Held, Watch};
use crate::lua::library::action;
use crate::lua::library::address;
use crate::lua::library::cgroup;
use crate::lua::library::compat;
use crate::lua::library::control_client;
use crate::lua::library::dictionary_client::{self, Opener};
use crate::lua::library::every;
use crate::lua::library::json;
use crate::lua::library::jwt;
use crate::lua::library::listen;
use crate::lua::library::listen::{Draft, SharedDraft};
use crate::lua::library::log;
use crate::lua::library::mail::{self, MailObject, Slot};
use crate::lua::library::output::{self, Log};
use crate::lua::library::pg;
use crate::lua::library::shared;
use crate::lua::library::shared::SharedOpener;
use crate::lua::library::socket;
use crate::lua::library::sodium;
use crate::mail::Mail;
use crate::session::script::{Decision, Handling};

/// When the collector begins again, in percent of what it left. An object with a finalizer, as each
/// mail has some, survives the cycle that finds it dead, and counts as left. If a script keeps `s`
/// bytes and all garbage is such objects, each cycle leaves `s (p - 1) / (2 - p)` bytes of them with a
/// pause of `p` times what was left; with `p` = 2, Lua's own value, always more. With 1.4 Lua's memory
/// stays below 2.4 `s`.
const GC_PAUSE: i32 = 140;

/// How fast the collector works, where 200 is the rate of allocation: so fast that each cycle is
/// done at once, some 2 ms per MiB that the script keeps. Otherwise it falls behind: when Lua 5.3
/// gives a finalizer to an object that was made where a sweep begins (luaC_checkfinalizer in lgc.c),
/// it frees all dead objects up to the next living one, counts them as memory that may be taken
/// before the collector goes on, and so leaves as many of the next mails'. With a table of 300 KiB
/// and 20 times the rate of allocation a worker grew by 100 bytes per mail.
const GC_STEP_MULTIPLIER: i32 = 1_000_000_000;

/// Part of the memory limit that may be in use after a full collection.
const FULL: f64 = 0.9;

/// How a configuration is loaded.
pub struct LoadOptions {
    /// config.lua, absolute.
    pub config: PathBuf,
    /// Call the script's `reload` afterwards.
    pub reload: bool,
    /// FileDescriptorNames of the sockets that systemd passed, one entry each.
    pub systemd: Vec<String>,
    /// Where the script's output and its errors go.
    pub logger: Logger,
    /// The way to the shared dictionaries while the script loads.
    pub dictionaries: Opener,
}

/// A loaded configuration; one per process, shared by its threads.
pub struct State {
    lua: Lua,
    monitor: Arc<Monitor>,
    watch: Arc<Watch>,
    log: Arc<Log>,
    logger: Logger,
    handlers: Vec<Function>,
    settings: Settings,
    randomseed: Function,
    worker: AtomicU64,
    exhausted: AtomicBool,
    dictionaries: SharedOpener,
    pg: Arc<pg::Library>,
}

/// The one call that mlua asks to be marked: only so does it load Lua's whole standard library, of
/// which `debug` can break the binding's invariants. The script is the administrator's, and the
/// process is there to be replaced.
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
        let LoadOptions { config, reload, systemd, logger, dictionaries } = options;
        let dictionaries = Arc::new(RwLock::new(dictionaries));
        let watch = Watch::new();
        let log = Log::new(logger.clone(), Arc::clone(&watch));
        let draft = Draft::new(systemd);
        let pg = pg::Library::new(logger.clone());
        let (lua, monitor) =
            set_up(&watch, &log, &logger, &draft, &dictionaries, &pg).map_err(internal)?;
        let result = run_script(&lua, &config, reload, &draft);
        log.flush(None);
        // Nothing of this may be inherited: each process has its own ways.
        pg.close();
        dictionary_client::hang_up();
        *dictionaries.write() = Box::new(|_| Err(SendError::Closed));
        result?;
        socket::release(&lua);
        std::env::set_current_dir("/")
            .map_err(|e| ConfigError::Internal(format!("cannot change to /: {e}")))?;
        let (declaration, handlers) = draft
            .lock()
            .finish(&lua)
            .map_err(|message| ConfigError::Declaration { path: config, message })?;
        if draft.lock().listens_in_vain() {
            slog::warn!(logger, "the script listens on systemd, which passed no sockets for it");
        }
        let settings = declaration.settings.clone();
        limit_memory(&lua, settings.lua_memory_limit).map_err(internal)?;
        let randomseed = math_randomseed(&lua).map_err(internal)?;
        let state = Self {
            lua,
            monitor: Arc::new(monitor),
            watch,
            log,
            logger,
            handlers,
            settings,
            randomseed,
            worker: AtomicU64::new(0),
            exhausted: AtomicBool::new(false),
            dictionaries,
            pg,
        };
        Ok((state, declaration))
    }

    /// To be called in a freshly forked worker: other random numbers, other log lines, a way of its
    /// own to the shared dictionaries, and the threads of `every` and of `db:listen`.
    pub fn after_fork(&self, worker: WorkerId, dictionaries: Opener) {
        *self.dictionaries.write() = dictionaries;
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
        let (monitor, log) = (Arc::clone(&self.monitor), Arc::clone(&self.log));
        let (settings, logger) = (self.settings.clone(), self.logger.clone());
        let background = Arc::new(Background::new(monitor, log, logger, settings, worker));
        every::start(&self.lua, &background);
        self.pg.start(&background);
    }

    /// Runs the listener's handler for a mail as long as it doesn't wait; the rest of it, with
    /// what it waits for, is for a thread that may. The mail comes back whatever happens, with all
    /// of its Lua values dropped.
    pub fn start(
        self: Arc<Self>,
        listener: usize,
        mail: Box<Mail>,
        deadline: Deadline,
    ) -> Handling {
        let Some(function) = self.handlers.get(listener) else {
            slog::error!(self.logger, "no handler for listener {}", listener; "id" => &*mail.id);
            return Handling::Decided((mail, Err(HandlerError::Script)));
        };
        let number = mail.job;
        let slot = Slot::new(mail);
        let budget = self.settings.handler_timeout;
        let job = Job { number, mail: Some(Arc::clone(&slot)), deadline, budget };
        let object = MailObject::new(Arc::clone(&slot));
        let argument = |lua: &Lua| lua.create_any_userdata(object).map(Value::UserData);
        match self.monitor.start(&job, function, argument, mail::decision) {
            Ok(Progress::Waits(suspended)) => Handling::Waits(Box::new(move || {
                let result = self.monitor.finish(&job, suspended, mail::decision);
                self.decided(&slot, result)
            })),
            Ok(Progress::Finished(decision)) => {
                Handling::Decided(self.decided(&slot, Ok(decision)))
            }
            Err(stop) => Handling::Decided(self.decided(&slot, Err(stop))),
        }
    }

    /// Takes the mail back from a handler that has ended.
    fn decided(&self, slot: &Slot, result: Result<Result<Action, String>, Stop>) -> Decision {
        let mail = slot.take().expect("nobody else takes the mail out of its slot");
        self.log.flush(Some(&mail.id));
        let result = match result {
            Ok(Ok(action)) => Ok(action),
            Ok(Err(message)) => Err(Stop::Error { message, traceback: None }),
            Err(stop) => Err(stop),
        };
        let result = result.map_err(|stop| self.failed(&mail, stop));
        (mail, result)
    }

    /// How long Lua has been held, and by which job; takes no lock.
    pub fn held(&self) -> Held {
        self.watch.held()
    }

    /// The memory limit was reached even after a full collection: this process should be replaced.
    pub fn exhausted(&self) -> bool {
        self.exhausted.load(Ordering::Relaxed)
    }

    /// Logs why a handler failed.
    fn failed(&self, mail: &Mail, stop: Stop) -> HandlerError {
        self.check_memory();
        match stop {
            Stop::Deadline => {
                slog::warn!(self.logger, "the mail's time was over while its handler waited";
                    "id" => &*mail.id, "worker" => self.worker.load(Ordering::Relaxed),
                    "listener" => &*mail.listener);
                HandlerError::Deadline
            }
            Stop::Error { message, traceback } => {
                let worker = self.worker.load(Ordering::Relaxed);
                slog::error!(self.logger, "script failed: {}", message;
                    "id" => &*mail.id, "worker" => worker, "listener" => &*mail.listener);
                for frame in traceback.iter().flat_map(|text| text.lines()) {
                    slog::error!(self.logger, "  {}", frame.trim_start(); "id" => &*mail.id);
                }
                HandlerError::Script
            }
        }
    }

    /// After a failure: is it that Lua's memory is full of what the script keeps?
    fn check_memory(&self) {
        let full = self.settings.lua_memory_limit as f64 * FULL;
        let is_full = || self.lua.used_memory() as f64 > full;
        if !is_full() {
            return;
        }
        // The first cycle may have begun before the garbage became garbage.
        let collected = self.lua.gc_collect().and_then(|()| self.lua.gc_collect());
        if (collected.is_err() || is_full()) && !self.exhausted.swap(true, Ordering::Relaxed) {
            slog::error!(self.logger, "the script's memory limit is reached";
                "lua_memory_limit" => self.settings.lua_memory_limit);
        }
    }
}

/// A Lua state with everything a script may use.
fn set_up(
    watch: &Arc<Watch>,
    log: &Arc<Log>,
    logger: &Logger,
    draft: &SharedDraft,
    dictionaries: &SharedOpener,
    pg: &Arc<pg::Library>,
) -> mlua::Result<(Lua, Monitor)> {
    let lua = new_lua();
    let pace = GcIncParams::default().pause(GC_PAUSE).step_multiplier(GC_STEP_MULTIPLIER);
    lua.gc_set_mode(GcMode::Incremental(pace));
    lua.set_memory_limit(Settings::default().lua_memory_limit)?;
    let monitor = Monitor::new(lua.clone(), Arc::clone(watch))?;
    function::install(&lua, watch)?;
    output::register(&lua, log)?;
    compat::register(&lua)?;
    listen::register(&lua, draft)?;
    address::register(&lua, watch)?;
    action::register(&lua)?;
    cgroup::register(&lua)?;
    mail::register(&lua)?;
    shared::register(&lua, dictionaries)?;
    sodium::register(&lua)?;
    json::register(&lua)?;
    jwt::register(&lua)?;
    socket::register(&lua, watch)?;
    control_client::register(&lua, watch)?;
    log::register(&lua, logger, watch)?;
    every::register(&lua, watch)?;
    pg::register(&lua, watch, pg)?;
    let sleep = function::blocking_function(&lua, "sleep", |_, seconds: Value| {
        let argument = Argument::new("sleep", 1, "seconds");
        let seconds = argument.number(&seconds, 0.0, MAX_TIMEOUT)?;
        Ok(Call::<()>::Later(Box::new(Sleep(std::time::Duration::from_secs_f64(seconds)))))
    })?;
    lua.globals().set("sleep", sleep)?;
    Ok((lua, monitor))
}

fn run_script(
    lua: &Lua,
    config: &Path,
    reload: bool,
    draft: &SharedDraft,
) -> Result<(), ConfigError> {
    let source = std::fs::read(config)
        .map_err(|cause| ConfigError::Unreadable { path: config.to_owned(), cause })?;
    let directory = config.parent().unwrap_or(Path::new("/"));
    std::env::set_current_dir(directory)
        .map_err(|cause| ConfigError::Unreadable { path: directory.to_owned(), cause })?;
    let name = format!("@{}", config.display());
    let failed = |e: mlua::Error| ConfigError::Script(located(&e, config));
    lua.load(without_shebang(&source)).set_name(name).exec().map_err(failed)?;
    if reload {
        draft.lock().enter_reload();
        run_reload(lua).map_err(|e| ConfigError::Reload(located(&e, config)))?;
    }
    Ok(())
}

fn run_reload(lua: &Lua) -> mlua::Result<()> {
    match lua.globals().get("reload")? {
        Value::Nil => Ok(()),
        Value::Function(reload) => reload.call(()),
        other => {
            let got = convert::describe(&other);
            let message = format!("the global reload must be a function, but it is {got}");
            Err(mlua::Error::RuntimeError(message))
        }
    }
}

/// As `lua` does: a first line that begins with `#` is for the shell. The line end stays, so that
/// lines keep their numbers.
fn without_shebang(source: &[u8]) -> &[u8] {
    let source = source.strip_prefix(b"\xef\xbb\xbf").unwrap_or(source);
    match source.first() {
        Some(b'#') => &source[memchr::memchr(b'\n', source).unwrap_or(source.len())..],
        _ => source,
    }
}

/// The message with file and line; Lua's own usually has them.
fn located(error: &mlua::Error, config: &Path) -> String {
    let (message, traceback) = error::describe(error);
    // `config.lua:12: …`, or `lua: config.lua:12: …` where a module failed to load.
    let has_position = message.split(": ").next().is_some_and(|position| {
        position.rsplit(':').next().is_some_and(|line| line.parse::<u32>().is_ok())
    });
    if has_position {
        return message;
    }
    match traceback.as_deref().and_then(error::position) {
        Some(position) => format!("{position}: {message}"),
        None => format!("{}: {message}", config.display()),
    }
}

/// The limit holds from now on, and what loading left behind is collected.
fn limit_memory(lua: &Lua, limit: usize) -> mlua::Result<()> {
    lua.gc_collect()?;
    lua.gc_collect()?;
    lua.set_memory_limit(limit).map(|_| ())
}

fn math_randomseed(lua: &Lua) -> mlua::Result<Function> {
    lua.globals().get::<Table>("math")?.get("randomseed")
}

fn internal(error: mlua::Error) -> ConfigError {
    ConfigError::Internal(error::describe(&error).0)
}
