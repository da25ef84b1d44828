//! The library `pg`: PostgreSQL.
//!
//! From the script down: [`database`] and [`result`] are what a script sees, [`listen`] runs its
//! callbacks. [`pool`] gives a [`task`] to a [`connection`], which is a thread with a [`session`];
//! [`extended`] is for what a session can't prepare, and both return [`rows`]. [`text`] knows where
//! a statement begins. [`mod@target`] and
//! [`tls`] connect, and [`pooler`] finds out to what. [`conninfo`] and [`uri`] read [`parameters`],
//! [`passfile`] the passwords. [`statement`] and [`mod@array`] are a script's values as text.
//!
//! Contract: connections are opened when they are needed, in each worker. Those that were opened
//! while the script was loaded are closed, and their threads have ended, before anything forks.
//!
//! # Failure
//! Misuse raises; an error of the server or of the network is `nil, message`.

mod array;
mod connection;
mod conninfo;
mod database;
mod extended;
mod listen;
mod parameters;
mod passfile;
mod pool;
mod pooler;
mod result;
mod rows;
mod session;
mod statement;
mod target;
mod task;
mod text;
mod tls;
mod uri;

use std::sync::{Arc, OnceLock};

use mlua::{Function, IntoLua, Lua, Value};
use parking_lot::Mutex;
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ipc::message::{DatabaseState, MAX_DATABASES};
use slog::Logger;

use crate::lua::binding::convert::{self, Argument, Options};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::Class;
use crate::lua::engine::background::Background;
use crate::lua::engine::watch::Watch;
use crate::lua::library::listen::Purpose;
use crate::lua::library::pg::database::{DatabaseObject, WeakPool};
use crate::lua::library::pg::listen::Channel;
use crate::lua::library::pg::pool::Pool;
use crate::lua::library::pg::target::Target;

/// Connections per `pg:new`, unless it says how many.
const DEFAULT_CONNECTIONS: u64 = 2;
/// Most of them: each is a thread here and a process on the server.
const MAX_CONNECTIONS: u64 = 1000;

/// The state of the library beside the script's objects.
pub(crate) struct Library {
    logger: Logger,
    /// The pools, those of this worker and those that were made while the script was loading.
    pools: Mutex<Vec<WeakPool>>,
    /// The channels that each worker listens on, per database.
    channels: Mutex<Vec<(Arc<Target>, Vec<Channel>)>>,
    /// Set when the worker begins.
    background: OnceLock<Arc<Background>>,
}

impl Library {
    /// Nothing declared.
    pub(crate) fn new(logger: Logger) -> Arc<Self> {
        Arc::new(Self {
            logger,
            pools: Mutex::default(),
            channels: Mutex::default(),
            background: OnceLock::new(),
        })
    }

    /// Closes, after loading, the connections that the script opened, and waits at most
    /// [`pool::CLOSE_TIME`] for the end of their threads. Only a process that forks has to have a
    /// single thread.
    pub(crate) fn close(&self, purpose: Purpose) {
        let deadline = Deadline::after(pool::CLOSE_TIME);
        let pools: Vec<_> = self.pools.lock().iter().filter_map(WeakPool::upgrade).collect();
        pools.iter().for_each(|pool| pool.close(deadline));
        if !pools.is_empty() && purpose == Purpose::Serve {
            wait_for_single_thread(deadline);
        }
    }

    /// Describes the first pools; `None` if that would have to wait.
    pub(crate) fn databases(&self) -> Option<Vec<DatabaseState>> {
        let pools = self.pools.try_lock()?;
        let living = pools.iter().filter_map(WeakPool::upgrade);
        living.take(MAX_DATABASES).map(|pool| pool.described()).collect()
    }

    /// Remembers a pool.
    fn add(&self, pool: &Arc<Pool>) {
        let mut pools = self.pools.lock();
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Arc::downgrade(pool));
    }

    /// Starts to listen, in a worker.
    pub(crate) fn start(&self, background: &Arc<Background>) {
        // It is set once: a process becomes a worker once.
        let _ = self.background.set(Arc::clone(background));
        for (target, channels) in std::mem::take(&mut *self.channels.lock()) {
            listen::start(target, channels, background);
        }
    }

    /// Calls the callback for each notification of the channel.
    fn listen(&self, target: &Arc<Target>, name: String, callback: Function) {
        let channel = Channel { name, callback };
        if let Some(background) = self.background.get() {
            return listen::start(Arc::clone(target), vec![channel], background);
        }
        let mut channels = self.channels.lock();
        match channels.iter_mut().find(|(other, _)| Arc::ptr_eq(other, target)) {
            Some((_, list)) => list.push(channel),
            None => channels.push((Arc::clone(target), vec![channel])),
        }
    }
}

/// A thread is still listed for a moment after its end.
fn wait_for_single_thread(deadline: Deadline) {
    let threads = || std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    while threads() > 1 && !deadline.expired() {
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
}

/// The userdata behind the global.
struct PgObject;

impl IntoLua for PgObject {
    fn into_lua(self, lua: &Lua) -> mlua::Result<Value> {
        lua.create_any_userdata(self).map(Value::UserData)
    }
}

/// Makes the classes and the global `pg`.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua, watch: &Arc<Watch>, library: &Arc<Library>) -> mlua::Result<()> {
    result::register(lua)?;
    database::register(lua, watch, library)?;
    let mut class = Class::new(lua, "pg")?;
    let (watch, library) = (Arc::clone(watch), Arc::clone(library));
    class.method("new", move |_, (this, conninfo, schema, options): Arguments| {
        check("new", &this)?;
        let target = target(&conninfo, &schema, &library.logger)?;
        if options.is_string() {
            return Err(
                Argument::new("new", 3, "options").invalid("expected a table, got a string")
            );
        }
        let options = Options::new("new", 3, &options, &["max_connections"])?;
        let max = match options.get("max_connections")? {
            Some((key, value)) => key.integer(&value, 1, MAX_CONNECTIONS)?,
            None => DEFAULT_CONNECTIONS,
        };
        let pool = Pool::new(Arc::new(target), max as usize, &library.logger);
        if watch.is_loading() {
            library.add(&pool);
        }
        Ok(DatabaseObject::new(pool))
    })?;
    class.method("encode_array", |lua, (this, table): (Value, Value)| {
        check("encode_array", &this)?;
        let argument = Argument::new("encode_array", 1, "array");
        let text = array::encode(&argument, argument.table(&table)?)?;
        Ok(lua.create_string(text)?)
    })?;
    class.method("decode_array", |lua, (this, text): (Value, Value)| {
        check("decode_array", &this)?;
        let text = Argument::new("decode_array", 1, "text").text(&text)?;
        match array::decode(&text) {
            Ok(list) => Ok((Some(array::to_table(lua, &list)?), None)),
            Err(error) => Ok((None, Some(error.to_string()))),
        }
    })?;
    class.register::<PgObject>(|_| ())?;
    lua.globals().raw_set("pg", PgObject)
}

type Arguments = (Value, Value, Value, Value);

fn check(method: &str, this: &Value) -> Result<(), Raise> {
    if this.as_userdata().is_some_and(mlua::AnyUserData::is::<PgObject>) {
        return Ok(());
    }
    // A string here is a connection string, which no message quotes.
    let got = if this.is_string() { "a string".into() } else { convert::describe(this) };
    Err(format!("expected pg, got {got}; call its functions with a colon, as in pg:{method}(…)")
        .into())
}

fn target(conninfo: &Value, schema: &Value, logger: &Logger) -> Result<Target, Raise> {
    let argument = Argument::new("new", 1, "conninfo");
    let text = utf8(&argument, conninfo)?;
    let schema = match schema {
        Value::Nil => None,
        schema => Some(utf8(&Argument::new("new", 2, "schema"), schema)?),
    };
    let parameters = conninfo::parse(&text).map_err(|e| argument.invalid(&e.to_string()))?;
    let target = Target::new(parameters, schema.as_deref(), logger);
    target.map_err(|error| argument.invalid(&error.to_string()))
}

fn utf8(argument: &Argument<'_>, value: &Value) -> Result<String, Raise> {
    let text = argument.text(value)?.to_vec();
    let text = String::from_utf8(text).ok().filter(|text| !text.contains('\0'));
    text.ok_or_else(|| argument.invalid("expected UTF-8 without NUL"))
}
