//! The monitor: one thread at a time runs Lua, and a handler that waits lets go of it.
//!
//! Contract: [`Monitor::start`] runs a Lua function as a coroutine on the calling thread, until it
//! ends or yields an operation; [`Monitor::finish`], on the same thread or another, does that
//! blocking work with Lua free, resumes the coroutine, and so on to its end. Everything that may
//! take time is bounded by the deadline; running Lua is bounded by the budget. All Lua values of a
//! run are dropped when it ends: at once by a thread that has Lua, else by the next one that gets
//! it, since dropping one waits for Lua.
//!
//! # Failure
//! [`Stop`]. A coroutine that failed, or was given up, is left to the garbage collector.

use std::sync::Arc;
use std::time::Duration;

use mlua::{AnyUserData, Function, IntoLuaMulti, Lua, MultiValue, Thread, Value};
use parking_lot::{Mutex, MutexGuard};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::JobId;

use crate::lua::binding::error;
use crate::lua::binding::function;
use crate::lua::binding::operation::{Completion, Operation, Pending};
use crate::lua::engine::scope::Ending;
use crate::lua::engine::slot::Slot;
use crate::lua::engine::watch::Watch;

/// Finished coroutines that are kept for the next run; making one costs more.
const POOL: usize = 64;

/// Why a run ended without results.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The deadline passed before Lua could be had: the run has not begun.
    NotBegun,
    /// The deadline passed while it waited.
    Deadline,
    /// An error left the function, or it yielded to nobody.
    Error {
        /// The message in Lua's words.
        message: String,
        /// Where it was, one line per frame.
        traceback: Option<String>,
    },
}

/// The job of a run, and its time limits.
pub(crate) struct RunContext {
    /// The supervisor's number of the job, 0 if there is none.
    pub number: JobId,
    /// Index of the handler, if one runs.
    pub handler: Option<usize>,
    /// The mail, if it is for one.
    pub mail: Option<Arc<Slot>>,
    /// Ends waiting.
    pub deadline: Deadline,
    /// Running Lua; waiting doesn't count.
    pub budget: Duration,
}

/// Owner of Lua.
pub(crate) struct Monitor {
    lua: Lua,
    watch: Arc<Watch>,
    /// The lock of Lua: its holder may use the state. It holds the finished coroutines, ready to be
    /// used again.
    gate: Mutex<Vec<Thread>>,
    /// Lua values of runs that were given up while somebody else had Lua, dropped by the next one
    /// that passes the gate.
    abandoned: Mutex<Vec<(Thread, AnyUserData)>>,
    traceback: Function,
}

/// A run that waits for an operation, and what it has left.
pub(crate) struct Suspended {
    run: Waiting,
    budget: Duration,
    /// Ended when Lua is free.
    scope: Ending,
}

/// A coroutine that waits.
struct Waiting {
    thread: Thread,
    pending: AnyUserData,
    operation: Box<dyn Operation>,
}

/// How far a run has come.
pub(crate) enum Progress<R, W = Suspended> {
    /// To its end.
    Finished(R),
    /// Somebody has to wait for it.
    Waits(W),
}

impl<R> Progress<R, Waiting> {
    fn suspended(self, budget: Duration, scope: Ending) -> Progress<R> {
        match self {
            Self::Finished(results) => Progress::Finished(results),
            Self::Waits(run) => Progress::Waits(Suspended { run, budget, scope }),
        }
    }
}

/// Lua is held.
struct Hold<'a> {
    monitor: &'a Monitor,
    pool: MutexGuard<'a, Vec<Thread>>,
}

/// A coroutine stopped running.
enum Step {
    Finished(MultiValue),
    Waits(AnyUserData, Box<dyn Operation>),
}

impl Monitor {
    /// The monitor of this Lua state, whose clock is `watch`.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub(crate) fn new(lua: Lua, watch: Arc<Watch>) -> mlua::Result<Self> {
        let debug: mlua::Table = lua.globals().get("debug")?;
        let traceback = debug.get("traceback")?;
        watch.install(&lua)?;
        Ok(Self { lua, watch, gate: Mutex::default(), abandoned: Mutex::default(), traceback })
    }

    /// Runs a function until it ends or has to wait; `argument` is made and `results` taken while
    /// Lua is held. A function whose deadline has passed isn't started, because it may have waited
    /// long for Lua, and the functions behind it should not wait longer in vain.
    ///
    /// # Errors
    /// See [`Stop`].
    pub(crate) fn start<R>(
        &self,
        job: &RunContext,
        function: &Function,
        argument: impl FnOnce(&Lua) -> mlua::Result<Value>,
        results: fn(MultiValue) -> R,
    ) -> Result<Progress<R>, Stop> {
        let scope = Ending::default();
        let mut budget = job.budget;
        let hold = self.hold(job.deadline).filter(|_| !job.deadline.expired());
        let mut hold = hold.ok_or(Stop::NotBegun)?;
        let thread = hold.coroutine(function).map_err(|e| stop(&e))?;
        let step = hold.resume(&thread, argument, job, &scope, &mut budget)?;
        Ok(hold.stopped(step, thread, results).suspended(budget, scope))
    }

    /// Runs a suspended function to its end on this thread, which does its blocking operations.
    ///
    /// # Errors
    /// See [`Stop`].
    pub(crate) fn finish<R>(
        &self,
        job: &RunContext,
        mut suspended: Suspended,
        results: fn(MultiValue) -> R,
    ) -> Result<R, Stop> {
        loop {
            match self.go_on(job, suspended, results)? {
                Progress::Finished(results) => return Ok(results),
                Progress::Waits(again) => suspended = again,
            }
        }
    }

    fn go_on<R>(
        &self,
        job: &RunContext,
        suspended: Suspended,
        results: fn(MultiValue) -> R,
    ) -> Result<Progress<R>, Stop> {
        let Suspended { scope, run, mut budget } = suspended;
        let outcome = run.operation.run(job.deadline);
        let again = match outcome {
            Completion::Expired => None,
            Completion::Done(_) | Completion::Passing(_) => self.hold(job.deadline),
        };
        let Some(mut hold) = again else {
            self.abandon(run.thread, run.pending);
            return Err(Stop::Deadline);
        };
        // Bound after `hold`, they are dropped before it, whatever happens.
        let (thread, pending) = (run.thread, run.pending);
        if let Ok(pending) = pending.borrow::<Pending>() {
            pending.finish(outcome);
        }
        let step = hold.resume(&thread, |_| Ok(()), job, &scope, &mut budget)?;
        drop(pending);
        Ok(hold.stopped(step, thread, results).suspended(budget, scope))
    }

    fn hold(&self, deadline: Deadline) -> Option<Hold<'_>> {
        let pool = self.gate.try_lock_until(deadline.instant())?;
        self.abandoned.lock().clear();
        Some(Hold { monitor: self, pool })
    }

    fn abandon(&self, thread: Thread, pending: AnyUserData) {
        let given_up = (thread, pending);
        match self.gate.try_lock() {
            Some(_held) => drop(given_up),
            None => self.abandoned.lock().push(given_up),
        }
    }
}

impl Hold<'_> {
    fn coroutine(&mut self, function: &Function) -> mlua::Result<Thread> {
        match self.pool.pop() {
            Some(thread) => thread.reset(function.clone()).map(|()| thread),
            None => self.monitor.lua.create_thread(function.clone()),
        }
    }

    /// A coroutine has returned or waits; Lua is free afterwards.
    fn stopped<R>(
        mut self,
        step: Step,
        thread: Thread,
        results: fn(MultiValue) -> R,
    ) -> Progress<R, Waiting> {
        match step {
            Step::Finished(values) => {
                let results = results(values);
                if self.pool.len() < POOL {
                    self.pool.push(thread);
                }
                Progress::Finished(results)
            }
            Step::Waits(pending, operation) => {
                Progress::Waits(Waiting { thread, pending, operation })
            }
        }
    }

    /// Runs Lua until the coroutine returns, fails or waits. Making the arguments belongs to it:
    /// the collector may run then, and with it finalizers of the script.
    fn resume<A: IntoLuaMulti>(
        &mut self,
        thread: &Thread,
        arguments: impl FnOnce(&Lua) -> mlua::Result<A>,
        job: &RunContext,
        scope: &Ending,
        budget: &mut Duration,
    ) -> Result<Step, Stop> {
        let Monitor { lua, watch, .. } = self.monitor;
        let turn = watch.begin(job.number, job.handler, job.mail.clone(), scope, *budget);
        let result = arguments(lua).and_then(|arguments| thread.resume::<MultiValue>(arguments));
        let (lasted, expired) = turn.end();
        *budget = budget.saturating_sub(lasted);
        if expired {
            watch.install(lua).map_err(|e| stop(&e))?;
        }
        let values = result.map_err(|e| self.failed(thread, &e))?;
        if !thread.is_resumable() {
            return Ok(Step::Finished(values));
        }
        match waits(&values) {
            Some((pending, operation)) => Ok(Step::Waits(pending, operation)),
            None => {
                let message = "the handler yielded, but there is nobody to yield to".to_owned();
                Err(Stop::Error { message, traceback: self.traceback(thread) })
            }
        }
    }

    fn failed(&self, thread: &Thread, error: &mlua::Error) -> Stop {
        let (message, traceback) = error::describe(error);
        let message = function::with_fields(&self.monitor.lua, message);
        Stop::Error { message, traceback: traceback.or_else(|| self.traceback(thread)) }
    }

    fn traceback(&self, thread: &Thread) -> Option<String> {
        let text = self.monitor.traceback.call::<String>(thread.clone()).ok()?;
        error::frames(&text)
    }
}

/// The operation that a coroutine yielded, if that's what it did: it comes after a mark.
fn waits(values: &MultiValue) -> Option<(AnyUserData, Box<dyn Operation>)> {
    let [Value::LightUserData(_), Value::UserData(object)] = values.as_slices().0 else {
        return None;
    };
    let operation = object.borrow::<Pending>().ok()?.take()?;
    Some((object.clone(), operation))
}

fn stop(error: &mlua::Error) -> Stop {
    let (message, traceback) = error::describe(error);
    Stop::Error { message, traceback }
}
