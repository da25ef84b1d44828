//! How long Lua runs: the clock that stops a runaway handler from inside, and what the control
//! thread may know without taking a lock.
//!
//! Contract: between [`Watch::begin`] and the end of the [`Turn`], the thread that holds Lua runs
//! it for one job. A count hook looks at the clock every `COUNT` instructions. Once the turn's
//! limit has passed it raises an error at every instruction, since a `pcall` swallows a single one,
//! until the turn is over. A Lua thread has a hook of its own, and one that resumes others would
//! get to its next count late, so `coroutine.resume` and `wrap` look at the flag `expired` and call
//! [`Watch::stop`], too. Threads that a handler leaves behind with the hook of every instruction
//! get the normal one back the next time it fires.
//!
//! # Failure
//! A loop inside a C function or in an `xpcall` message handler is not reached by the hook; it
//! shows in [`Watch::held`], and the supervisor ends the worker.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use mlua::{HookTriggers, Lua, Table, VmState};
use parking_lot::Mutex;
use qrelay_shared::ids::JobId;

use crate::lua::engine::scope::{Ending, Scope};
use crate::lua::engine::slot::Slot;

/// Instructions between two looks at the clock: some 100 µs.
const COUNT: u32 = 10_000;

/// No limit on the running turn.
const NEVER: u64 = u64::MAX;
/// No handler runs.
const NO_HANDLER: usize = usize::MAX;

/// How long Lua has been held, and for which job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    /// Zero when Lua is free.
    pub duration: Duration,
    /// The job that holds it, 0 when it is free or held by none.
    pub job: JobId,
}

/// The clock of one Lua state.
#[derive(Debug)]
pub(crate) struct Watch {
    epoch: Instant,
    /// Nanoseconds after the epoch, 0 when Lua is free.
    since: AtomicU64,
    job: AtomicU64,
    /// Index of the handler, [`NO_HANDLER`] if none runs.
    handler: AtomicUsize,
    /// Nanoseconds after the epoch.
    limit: AtomicU64,
    /// Whether the limit of the running turn has passed.
    expired: AtomicBool,
    /// Whether a Lua thread may have the hook of every instruction.
    tightened: AtomicBool,
    /// For `prelude.lua`: whether the limit of the running turn passed.
    flags: OnceLock<Table>,
    /// Whether something has failed, in a call that blocked Lua, that may pass by itself.
    passing: AtomicBool,
    /// The mail whose handler runs.
    mail: Mutex<Option<Arc<Slot>>>,
    /// The resources that end with the run.
    scope: Mutex<Option<Arc<Scope>>>,
}

impl Watch {
    /// Returns a clock without a turn.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            epoch: Instant::now(),
            since: AtomicU64::new(0),
            job: AtomicU64::new(0),
            handler: AtomicUsize::new(NO_HANDLER),
            limit: AtomicU64::new(NEVER),
            expired: AtomicBool::new(false),
            tightened: AtomicBool::new(false),
            flags: OnceLock::new(),
            passing: AtomicBool::new(false),
            mail: Mutex::new(None),
            scope: Mutex::new(None),
        })
    }

    /// Nanoseconds since the epoch; never 0.
    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(NEVER - 1).max(1)
    }

    /// Starts a turn of at most `budget`; only the holder of Lua may.
    pub(crate) fn begin<'a>(
        &'a self,
        job: JobId,
        handler: Option<usize>,
        mail: Option<Arc<Slot>>,
        scope: &'a Ending,
        budget: Duration,
    ) -> Turn<'a> {
        let now = self.now();
        let budget = u64::try_from(budget.as_nanos()).unwrap_or(NEVER);
        self.expired.store(false, Ordering::Relaxed);
        self.limit.store(now.saturating_add(budget), Ordering::Relaxed);
        self.job.store(job.0, Ordering::Relaxed);
        self.handler.store(handler.unwrap_or(NO_HANDLER), Ordering::Relaxed);
        *self.mail.lock() = mail;
        *self.scope.lock() = scope.0.get().cloned();
        self.since.store(now, Ordering::Release);
        Turn { watch: self, scope, began: now }
    }

    /// How long the running turn has lasted, and whose it is.
    pub(crate) fn held(&self) -> Held {
        let since = self.since.load(Ordering::Acquire);
        if since == 0 {
            return Held::default();
        }
        let duration = Duration::from_nanos(self.now().saturating_sub(since));
        Held { duration, job: JobId(self.job.load(Ordering::Relaxed)) }
    }

    /// Returns the index of the handler that runs.
    pub(crate) fn handler(&self) -> Option<usize> {
        Some(self.handler.load(Ordering::Relaxed)).filter(|index| *index != NO_HANDLER)
    }

    /// Notes a failure that may pass by itself.
    pub(crate) fn note_passing(&self) {
        self.passing.store(true, Ordering::Relaxed);
    }

    /// Whether something has failed, while the script was loaded, that may pass by itself.
    pub(crate) fn has_failed_for_now(&self) -> bool {
        self.passing.load(Ordering::Relaxed)
    }

    /// Whether Lua, asking this, runs outside of any turn: the script loads.
    pub(crate) fn is_loading(&self) -> bool {
        self.since.load(Ordering::Relaxed) == 0
    }

    /// The mail whose handler runs.
    pub(crate) fn mail(&self) -> Option<Arc<Slot>> {
        self.mail.lock().clone()
    }

    /// Returns the scope of the current run; while the script loads there is none.
    pub(crate) fn scope(&self) -> Option<Arc<Scope>> {
        let running = !self.is_loading();
        running.then(|| Arc::clone(self.scope.lock().get_or_insert_default()))
    }

    /// Returns the time left for the running turn.
    pub(crate) fn remaining(&self) -> Duration {
        let limit = self.limit.load(Ordering::Relaxed);
        Duration::from_nanos(limit.saturating_sub(self.now()))
    }

    /// The table in whose field `expired` the script's wrappers see that the limit passed.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub(crate) fn flags(&self, lua: &Lua) -> mlua::Result<Table> {
        let flags = lua.create_table_from([("expired", false)])?;
        Ok(self.flags.get_or_init(|| flags).clone())
    }

    /// Gives all threads the count hook that asks this clock.
    ///
    /// # Errors
    /// None is known; the binding's type has one.
    pub(crate) fn install(self: &Arc<Self>, lua: &Lua) -> mlua::Result<()> {
        self.flag(false)?;
        self.set_hook(lua, COUNT)
    }

    fn flag(&self, expired: bool) -> mlua::Result<()> {
        // The key exists, so that setting it takes no memory.
        self.flags.get().map_or(Ok(()), |flags| flags.raw_set("expired", expired))
    }

    /// Does what the hook does, for a Lua thread that finds `expired` set.
    ///
    /// # Errors
    /// The error that ends the Lua thread, if the limit has passed.
    pub(crate) fn stop(self: &Arc<Self>, lua: &Lua) -> mlua::Result<()> {
        self.check(lua).map(|_| ())
    }

    fn set_hook(self: &Arc<Self>, lua: &Lua, count: u32) -> mlua::Result<()> {
        let watch = Arc::clone(self);
        lua.set_global_hook(HookTriggers::new().every_nth_instruction(count), move |lua, _| {
            watch.check(lua)
        })
    }

    /// Runs in the hook, for the thread it fired in.
    fn check(self: &Arc<Self>, lua: &Lua) -> mlua::Result<VmState> {
        if self.now() < self.limit.load(Ordering::Relaxed) {
            if self.tightened.load(Ordering::Relaxed) {
                self.set_hook(lua, COUNT)?;
            }
            return Ok(VmState::Continue);
        }
        self.expired.store(true, Ordering::Relaxed);
        self.tightened.store(true, Ordering::Relaxed);
        self.flag(true)?;
        self.set_hook(lua, 1)?;
        Err(mlua::Error::RuntimeError(
            "stopped: the handler ran longer than handler_timeout".into(),
        ))
    }
}

/// Lua runs for a job until this is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    watch: &'a Watch,
    scope: &'a Ending,
    began: u64,
}

impl Turn<'_> {
    /// Ends the turn: how long it lasted, and whether its limit passed. If it did, the caller
    /// installs the hook again before anything else runs.
    pub(crate) fn end(self) -> (Duration, bool) {
        let lasted = self.watch.now().saturating_sub(self.began);
        (Duration::from_nanos(lasted), self.watch.expired.load(Ordering::Relaxed))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.watch.since.store(0, Ordering::Release);
        self.watch.job.store(0, Ordering::Relaxed);
        self.watch.handler.store(NO_HANDLER, Ordering::Relaxed);
        self.watch.limit.store(NEVER, Ordering::Relaxed);
        *self.watch.mail.lock() = None;
        if let Some(scope) = self.watch.scope.lock().take() {
            // A scope that is set already is the same one.
            let _ = self.scope.0.set(scope);
        }
    }
}
