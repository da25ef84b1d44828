//! `every(seconds, fn)`: functions that every worker runs again and again.
//!
//! Contract: each has a thread of its own, which begins with the worker and ends
//! with it; the zygote and `qrelay check` have none. A run begins one period after
//! the one before began, or when that has ended if it took longer: it never
//! overlaps itself, and what was missed is left out. A run may use as much Lua as
//! a handler, and wait as long as a mail.
//!
//! # Failure
//! A run that fails is logged with its traceback, and the next one comes in its
//! time. A thread that can't be had is logged.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use mlua::{Function, Lua, Value};
use qrelay_shared::ipc::message::WorkerId;
use qrelay_shared::settings::Settings;
use slog::Logger;

use super::convert::Argument;
use super::error::Raise;
use super::function::function;
use super::monitor::{Job, Monitor, Stop};
use super::output::Log;
use super::watch::Watch;
use crate::deadline::Deadline;
use crate::serve::{STACK_SIZE, block_signals};

/// Shortest period in seconds; a shorter one would keep Lua from the mails.
const MIN_PERIOD: f64 = 0.01;
/// Longest period: a day.
const MAX_PERIOD: f64 = 86_400.0;
/// Most functions, since each has a thread.
const MAX_TIMERS: usize = 64;

/// What a script has asked for, as application data of the Lua state.
#[derive(Default)]
struct Timers(Vec<Timer>);

struct Timer {
    period: Duration,
    function: Function,
}

/// Makes the global `every`.
///
/// # Errors
/// Lua is out of memory.
pub fn register(lua: &Lua, watch: &Arc<Watch>) -> mlua::Result<()> {
    lua.set_app_data(Timers::default());
    let watch = Arc::clone(watch);
    let every = function(lua, move |lua, (seconds, function): (Value, Value)| {
        if !watch.is_loading() {
            return Err("every can only be called while the script is loaded".into());
        }
        add(lua, &seconds, &function)
    })?;
    lua.globals().set("every", every)
}

fn add(lua: &Lua, seconds: &Value, function: &Value) -> Result<(), Raise> {
    let seconds = Argument::new("every", 1, "seconds").number(seconds, MIN_PERIOD, MAX_PERIOD)?;
    let Value::Function(function) = function else {
        return Err(Argument::new("every", 2, "fn").wrong("a function", function));
    };
    let Some(mut timers) = lua.app_data_mut::<Timers>() else { return Ok(()) };
    if timers.0.len() >= MAX_TIMERS {
        return Err(format!("every: at most {MAX_TIMERS} functions").into());
    }
    let period = Duration::from_secs_f64(seconds);
    timers.0.push(Timer { period, function: function.clone() });
    Ok(())
}

/// What the runs of a worker have in common.
pub struct Terms {
    /// Owner of Lua.
    pub monitor: Arc<Monitor>,
    /// How long a run may take.
    pub settings: Settings,
    /// Where failures go.
    pub logger: Logger,
    /// Unfinished lines of output.
    pub log: Arc<Log>,
    /// Who runs them.
    pub worker: WorkerId,
}

/// To be called in a worker: starts the threads.
pub fn start(lua: &Lua, terms: Terms) {
    let timers = lua.remove_app_data::<Timers>().unwrap_or_default();
    let terms = Arc::new(terms);
    for timer in timers.0 {
        let own = Arc::clone(&terms);
        let thread = thread::Builder::new().name("every".into()).stack_size(STACK_SIZE);
        if let Err(error) = thread.spawn(move || run(&timer, &own)) {
            slog::error!(terms.logger, "every: no thread"; "error" => %error);
        }
    }
}

fn run(timer: &Timer, terms: &Terms) {
    block_signals();
    let mut next = Instant::now();
    loop {
        next = (next + timer.period).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
        // A panic has been logged; it costs this run only.
        let _ = catch_unwind(AssertUnwindSafe(|| once(timer, terms)));
    }
}

fn once(timer: &Timer, terms: &Terms) {
    let job = Job {
        function: &timer.function,
        number: 0,
        mail: None,
        deadline: Deadline::after(terms.settings.relay_timeout),
        budget: terms.settings.handler_timeout,
    };
    let result = terms.monitor.run(&job, |_| Ok(Value::Nil), drop);
    terms.log.flush(None);
    if let Err(stop) = result {
        failed(terms, stop);
    }
}

fn failed(terms: &Terms, stop: Stop) {
    let Terms { logger, worker, settings, .. } = terms;
    match stop {
        Stop::Deadline => {
            let limit = settings.relay_timeout.as_secs_f64();
            slog::error!(logger, "every: given up after waiting for {} s", limit; "worker" => worker);
        }
        Stop::Error { message, traceback } => {
            slog::error!(logger, "every: {}", message; "worker" => worker);
            for frame in traceback.iter().flat_map(|text| text.lines()) {
                slog::error!(logger, "  {}", frame.trim_start(); "worker" => worker);
            }
        }
    }
}
