//! `pg:new`'s database object, and transactions.
//!
//! Contract: a request waits as an operation, with Lua unlocked. A transaction holds one connection
//! from its begin to its end; it ends with the function that was called for it, and at the latest
//! with the handler.
//!
//! # Failure
//! Misuse raises; an error of the server or of the network is `nil, message`.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};

use mlua::{Function, IntoLua, Lua, Value};
use parking_lot::Mutex;
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ipc::message::MailId;

use crate::lua::binding::arguments::{self, Arguments, Name};
use crate::lua::binding::convert::{self, Argument};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::{self, Call, Class};
use crate::lua::binding::operation::{Completion, Operation};
use crate::lua::engine::scope::{Resource, Scope};
use crate::lua::engine::watch::Watch;
use crate::lua::library::pg::Library;
use crate::lua::library::pg::pool::{Lease, Pool, Refusal};
use crate::lua::library::pg::result::ResultObject;
use crate::lua::library::pg::rows::Rows;
use crate::lua::library::pg::session::Request;
use crate::lua::library::pg::statement;

/// Longest name of a notification channel in bytes (`NAMEDATALEN` - 1).
const MAX_CHANNEL: usize = 63;

/// The userdata of a database.
pub(super) struct DatabaseObject {
    pool: Arc<Pool>,
    /// The channels that have a callback.
    channels: Mutex<BTreeSet<String>>,
}

impl DatabaseObject {
    /// A database with these connections.
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Self { pool, channels: Mutex::default() }
    }
}

impl IntoLua for DatabaseObject {
    fn into_lua(self, lua: &Lua) -> mlua::Result<Value> {
        lua.create_any_userdata(self).map(Value::UserData)
    }
}

/// The connection of a transaction; `None` while a request is under way, and after the end.
struct Transaction(Mutex<Option<Lease>>);

impl Resource for Transaction {
    fn end(&self) {
        let lease = self.0.lock().take();
        drop(lease);
    }
}

/// The userdata of a transaction.
struct TransactionObject(Arc<Transaction>);

impl IntoLua for TransactionObject {
    fn into_lua(self, lua: &Lua) -> mlua::Result<Value> {
        lua.create_any_userdata(self).map(Value::UserData)
    }
}

/// Makes the classes of databases and transactions.
///
/// # Errors
/// Lua is out of memory.
pub(super) fn register(lua: &Lua, watch: &Arc<Watch>, library: &Arc<Library>) -> mlua::Result<()> {
    let mut class = Class::new(lua, "transaction")?;
    class.blocking_method("execute", |_, (this, sql, parameters): (Value, Value, Value)| {
        let transaction = transaction(&this)?;
        Ok(match request(&sql, &parameters)? {
            Ok(request) => Call::Later(Box::new(Continue { transaction, request })),
            Err(message) => Call::Now((None::<ResultObject>, Some(message))),
        })
    })?;
    class.register::<TransactionObject>(|_| ())?;

    let mut class = Class::new(lua, "database")?;
    let running = Arc::clone(watch);
    class.blocking_method(
        "execute",
        move |_, (this, sql, parameters): (Value, Value, Value)| {
            let pool = with(&this, |database| Ok(Arc::clone(&database.pool)))?;
            let id = running.mail().and_then(|mail| mail.id());
            Ok(match request(&sql, &parameters)? {
                Ok(request) => Call::Later(Box::new(Execute { pool, request, id })),
                Err(message) => Call::Now((None::<ResultObject>, Some(message))),
            })
        },
    )?;
    class.lua_method("transaction", transaction_function(lua, watch)?)?;
    let library = Arc::clone(library);
    class.method("listen", move |_, (this, name, callback): (Value, Value, Value)| {
        let name = channel(&name)?;
        let Value::Function(callback) = callback else {
            return Err(Argument::new("listen", 2, "callback").wrong("a function", &callback));
        };
        with(&this, |database| {
            if !database.channels.lock().insert(name.clone()) {
                return Err(format!("'{name}' has a listener already").into());
            }
            library.listen(database.pool.target(), name, callback);
            Ok(())
        })
    })?;
    class.register::<DatabaseObject>(|_| ())
}

fn with<R>(
    object: &Value,
    f: impl FnOnce(&DatabaseObject) -> Result<R, Raise>,
) -> Result<R, Raise> {
    match object.as_userdata().and_then(|object| object.borrow::<DatabaseObject>().ok()) {
        Some(database) => f(&database),
        None => {
            let got = convert::describe(object);
            let hint = "call its methods with a colon, as in db:execute(…)";
            Err(format!("expected a database, got {got}; {hint}").into())
        }
    }
}

fn transaction(object: &Value) -> Result<Arc<Transaction>, Raise> {
    match object.as_userdata().and_then(|object| object.borrow::<TransactionObject>().ok()) {
        Some(transaction) => Ok(Arc::clone(&transaction.0)),
        None => {
            let got = convert::describe(object);
            let hint = "call its methods with a colon, as in tx:execute(…)";
            Err(format!("expected a transaction, got {got}; {hint}").into())
        }
    }
}

fn channel(name: &Value) -> Result<String, Raise> {
    let argument = Argument::new("listen", 1, "name");
    let text = argument.text(name)?;
    let valid = str::from_utf8(&text)
        .ok()
        .filter(|text| (1..=MAX_CHANNEL).contains(&text.len()) && !text.contains('\0'));
    let expected = || format!("1 to {MAX_CHANNEL} bytes of text");
    valid.map(str::to_owned).ok_or_else(|| argument.wrong(&expected(), name))
}

/// Returns the request of `execute`, or the reason why it can't be sent.
fn request(sql: &Value, parameters: &Value) -> Result<Result<Request, String>, Raise> {
    let text = Argument::new("execute", 1, "sql").text(sql)?;
    if memchr::memchr(0, &text).is_some() {
        return Ok(Err("the statement contains a NUL".into()));
    }
    let Ok(sql) = String::from_utf8(text.to_vec()) else {
        return Ok(Err("the statement is not UTF-8 (22021)".into()));
    };
    if parameters.is_nil() {
        return Ok(Ok(Request::Query(sql)));
    }
    let argument = Argument::new("execute", 2, "params");
    Ok(match statement::parameters(&argument, argument.table(parameters)?)? {
        Ok(parameters) => Ok(Request::Execute { sql, parameters }),
        Err(number) => Err(format!("parameter {number} contains a NUL (22021)")),
    })
}

fn outcome<R: IntoLua + Send + 'static>(
    result: Result<Rows, Refusal>,
    value: impl FnOnce(Rows) -> R,
) -> Completion {
    match result {
        Ok(rows) => Completion::values(value(rows)),
        Err(refusal) => refused(refusal),
    }
}

fn refused(refusal: Refusal) -> Completion {
    match refusal {
        Refusal::Failed(message) => Completion::failure(message),
        Refusal::Unreachable(message) => Completion::failure(message).passing(),
        Refusal::Expired => Completion::Expired,
    }
}

/// `db:execute`.
struct Execute {
    pool: Arc<Pool>,
    request: Request,
    id: Option<MailId>,
}

impl Operation for Execute {
    fn run(self: Box<Self>, deadline: Deadline) -> Completion {
        outcome(self.pool.ask(self.request, self.id, deadline), ResultObject::new)
    }
}

/// The beginning of `db:transaction`.
struct Begin {
    pool: Arc<Pool>,
    scope: Option<Arc<Scope>>,
    id: Option<MailId>,
}

impl Operation for Begin {
    fn run(self: Box<Self>, deadline: Deadline) -> Completion {
        match self.pool.begin(self.id, deadline) {
            Ok(lease) => {
                let transaction = Arc::new(Transaction(Mutex::new(Some(lease))));
                if let Some(scope) = self.scope {
                    scope.add(&transaction);
                }
                Completion::values(TransactionObject(transaction))
            }
            Err(refusal) => refused(refusal),
        }
    }
}

/// A request of a transaction.
struct Continue {
    transaction: Arc<Transaction>,
    request: Request,
}

impl Continue {
    fn ask(self, deadline: Deadline) -> Result<Rows, Refusal> {
        let Some(lease) = self.transaction.0.lock().take() else {
            return Err(Refusal::Failed("the transaction is over, or another request runs".into()));
        };
        let over = matches!(self.request, Request::Commit | Request::Rollback);
        let result = lease.ask(self.request, deadline);
        if !over {
            *self.transaction.0.lock() = Some(lease);
        }
        result
    }
}

impl Operation for Continue {
    fn run(self: Box<Self>, deadline: Deadline) -> Completion {
        match self.request {
            Request::Commit | Request::Rollback => outcome(self.ask(deadline), |_| true),
            _ => outcome(self.ask(deadline), ResultObject::new),
        }
    }
}

/// Makes `db:transaction`, which is written in Lua because it calls Lua.
fn transaction_function(lua: &Lua, watch: &Arc<Watch>) -> mlua::Result<Function> {
    let check = lua.create_function(|_, raw: <(Value, Value) as Arguments>::Raw| {
        let checked = arguments::checked(Name::Method("transaction"), raw);
        match checked.and_then(|(this, f)| is_callable(&this, &f)) {
            Ok(()) => Ok(None),
            Err(Raise::Text(problem)) => Ok(Some(problem)),
            Err(Raise::Lua(error)) => Err(error),
        }
    })?;
    let watch = Arc::clone(watch);
    let begin = function::blocking_function(
        lua,
        "transaction",
        move |_, this: Value| -> Result<Call<()>, Raise> {
            let pool = with(&this, |database| Ok(Arc::clone(&database.pool)))?;
            let id = watch.mail().and_then(|mail| mail.id());
            Ok(Call::Later(Box::new(Begin { pool, scope: watch.scope(), id })))
        },
    )?;
    let ending = |request: Request| {
        function::blocking_function(
            lua,
            "transaction",
            move |_, this: Value| -> Result<Call<()>, Raise> {
                let (transaction, request) = (transaction(&this)?, request.clone());
                Ok(Call::Later(Box::new(Continue { transaction, request })))
            },
        )
    };
    let (commit, rollback) = (ending(Request::Commit)?, ending(Request::Rollback)?);
    lua.load(include_str!("transaction.lua"))
        .set_name("=[qrelay]")
        .call((check, begin, commit, rollback))
}

/// Whether the function can be called in a transaction of this database.
fn is_callable(this: &Value, f: &Value) -> Result<(), Raise> {
    with(this, |_| Ok(()))?;
    if f.is_function() {
        return Ok(());
    }
    Err(Argument::new("transaction", 1, "function").wrong("a function", f))
}

/// A pool that may be gone.
pub(super) type WeakPool = Weak<Pool>;
