//! `every(seconds, fn)`: functions that every worker runs again and again.
//!
//! Contract: each function has a thread of its own, which begins and ends with the worker; the
//! zygote and `qrelay check` have none. A run begins one period after the start of the previous
//! run, or at its end if it took longer. Runs of one function never overlap, and missed runs are
//! left out. A run may use as much Lua time as a handler, and wait as long as a mail.
//!
//! # Failure
//! A run that fails is logged with its traceback, and the next one begins on time. A thread that
//! can't be started is logged.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use mlua::{Function, Lua, Value};
use qrelay_shared::sys::thread::{LUA_STACK, spawn};

use crate::lua::binding::convert::Argument;
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::function;
use crate::lua::engine::background::Background;
use crate::lua::engine::watch::Watch;

/// Shortest period in seconds; a shorter one would keep Lua from the mails.
const MIN_PERIOD: f64 = 0.01;
/// Longest period: a day.
const MAX_PERIOD: f64 = 86_400.0;
/// Most functions, because each has a thread.
const MAX_TIMERS: usize = 64;

/// The timers of a script, as application data of the Lua state.
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
pub(crate) fn register(lua: &Lua, watch: &Arc<Watch>) -> mlua::Result<()> {
    lua.set_app_data(Timers::default());
    let watch = Arc::clone(watch);
    let every = function(lua, "every", move |lua, (seconds, function): (Value, Value)| {
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

/// Starts the threads, in a worker.
pub(crate) fn start(lua: &Lua, background: &Arc<Background>) {
    let timers = lua.remove_app_data::<Timers>().unwrap_or_default();
    for timer in timers.0 {
        let own = Arc::clone(background);
        if let Err(error) = spawn("every", LUA_STACK, move || run(&timer, &own)) {
            slog::error!(background.logger(), "every: no thread"; "error" => %error);
        }
    }
}

fn run(timer: &Timer, background: &Background) {
    let mut next = Instant::now();
    loop {
        next = (next + timer.period).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
        background.call("every", &timer.function, |_| Ok(Value::Nil));
    }
}
