//! A session on a connection: statements in, results out, all blocking.
//!
//! Contract: every value of a result is PostgreSQL's text, so statements go by the simple query
//! protocol. A statement with parameters is prepared first, by a `PREPARE` through the extended
//! protocol, which refuses several statements in one text. The statement stays prepared, so the
//! next time it costs one round trip. Statements that can't be prepared go through [`extended`]. A
//! session stays in a transaction only between [`Request::Begin`] and its end. Behind a pooler in
//! transaction mode a statement with parameters has a transaction of its own, and no prepared
//! statement lasts longer than the transaction.
//!
//! # Failure
//! [`Answer::Failed`] with the server's message while the connection can go on, [`Answer::Lost`]
//! when it can't.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::{Duration, Instant};

use postgres::error::{Severity, SqlState};
use postgres::{Client, Error, SimpleQueryMessage};

use crate::lua::library::pg::extended;
use crate::lua::library::pg::pooler::Pooling;
use crate::lua::library::pg::rows::{ResultRow, Rows};
use crate::lua::library::pg::statement::{self, Parameter};
use crate::lua::library::pg::target::describe;
use crate::lua::library::pg::text;

/// Most statements that stay prepared per connection; beyond, the least recently used one is
/// dropped.
const PREPARED_MAX: usize = 128;

/// Most names that are tried for a statement of the client library behind a pooler: each client may
/// have left one in a session of the server.
const NAMES_MAX: usize = 1000;

/// A connection that was idle for longer is tested before the next statement, because the server or
/// a router may have closed it. With so little traffic the time of another round trip doesn't
/// matter, and no server restarts faster (85 ms were seen).
const TRUSTED: Duration = Duration::from_millis(20);

/// Longest time of the test.
const TRIAL: Duration = Duration::from_secs(5);

/// A request to a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Statements without parameters.
    Query(String),
    /// A single statement with parameters.
    Execute {
        /// The statement.
        sql: String,
        /// For `$1`, `$2` … in it.
        parameters: Vec<Parameter>,
    },
    /// Begins a transaction, which lasts over several requests.
    Begin,
    /// Commits the transaction.
    Commit,
    /// Rolls the transaction back.
    Rollback,
}

impl Request {
    /// Returns the statement, for the log.
    pub(super) fn statement(&self) -> &str {
        match self {
            Self::Query(sql) | Self::Execute { sql, .. } => sql,
            Self::Begin => "BEGIN",
            Self::Commit => "COMMIT",
            Self::Rollback => "ROLLBACK",
        }
    }
}

/// How a request ended.
#[derive(Debug)]
pub(super) enum Answer {
    /// The request was done.
    Done(Rows),
    /// The server refused.
    Failed(String),
    /// There is no connection, which may pass by itself.
    Unreachable(String),
    /// The connection is gone.
    Lost {
        /// Why.
        message: String,
        /// The request never left, so it may be sent again.
        unsent: bool,
    },
}

/// A connection with its prepared statements.
pub(super) struct Session {
    client: Client,
    /// Prepared statements by their text: the number in the name, and the counter at the last use.
    prepared: HashMap<String, (u64, u64)>,
    /// First part of the names of prepared statements, unique per session. Behind a pooler that
    /// changes connections between statements, equal names of different clients would be mistaken
    /// for each other.
    prefix: String,
    counter: u64,
    in_transaction: bool,
    /// Value of `counter` when the transaction began.
    began: u64,
    pooling: Pooling,
    last_used: Instant,
}

impl Session {
    /// A fresh connection's session.
    pub(super) fn new(client: Client, pooling: Pooling) -> Self {
        let unique = RandomState::new().build_hasher().finish();
        Self {
            client,
            prepared: HashMap::new(),
            prefix: format!("qrelay_{unique:x}"),
            counter: 0,
            in_transaction: false,
            began: 0,
            pooling,
            last_used: Instant::now(),
        }
    }

    /// Whether a transaction was begun and not ended.
    pub(super) fn is_in_transaction(&self) -> bool {
        self.in_transaction
    }

    /// Carries out a request.
    pub(super) fn answer(&mut self, request: &Request) -> Answer {
        if !self.in_transaction
            && self.last_used.elapsed() > TRUSTED
            && let Err(error) = self.client.is_valid(TRIAL)
        {
            return Answer::Lost { message: describe(&error), unsent: true };
        }
        let result = match request {
            Request::Query(sql) => self.query(sql),
            Request::Execute { sql, parameters } => self.execute(sql, parameters),
            Request::Begin => self.begin(),
            Request::Commit => self.commit(),
            Request::Rollback => self.rollback(),
        };
        self.last_used = Instant::now();
        result.unwrap_or_else(|error| failure(&error, self.client.is_closed()))
    }

    fn query(&mut self, sql: &str) -> Result<Answer, Error> {
        if self.in_transaction && text::controls_transaction(sql) {
            return Ok(Answer::Failed(HELD.into()));
        }
        let result = self.client.simple_query(sql);
        self.finish(sql, result.map(|messages| Ok(last_result(messages))))
    }

    /// The answer to a statement that was done, unless it wants to copy or has left a transaction
    /// open. (One that can be prepared does neither.)
    fn finish(
        &mut self,
        sql: &str,
        result: Result<Result<Rows, String>, Error>,
    ) -> Result<Answer, Error> {
        if let Err(error) = &result
            && error.as_db_error().is_none()
            && !self.client.is_closed()
        {
            // An answer that the client library doesn't know: the server wants to copy. It may wait
            // for data until something else comes, and the connection's end for the server.
            let _ = self.client.prepare("");
            return Ok(Answer::Lost { message: NO_COPY.into(), unsent: false });
        }
        if !self.in_transaction && mentions_transaction(sql) && !self.client.is_closed() {
            let left_open = self.is_inside_transaction()?;
            if left_open {
                self.client.batch_execute("ROLLBACK")?;
            }
            if left_open && result.is_ok() {
                return Ok(Answer::Failed(HINT.into()));
            }
        }
        Ok(result?.map_or_else(Answer::Failed, Answer::Done))
    }

    /// Whether a transaction that an earlier statement began still goes on. Outside of one, a
    /// statement is a transaction of its own, which began when the statement came.
    fn is_inside_transaction(&mut self) -> Result<bool, Error> {
        let question = "SELECT pg_catalog.now() OPERATOR(pg_catalog.<>) \
                        pg_catalog.statement_timestamp()";
        match self.client.simple_query(question) {
            Ok(messages) => Ok(messages.iter().any(|message| match message {
                SimpleQueryMessage::Row(row) => row.try_get(0).ok().flatten() == Some("t"),
                _ => false,
            })),
            Err(error) if error.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => Ok(true),
            Err(error) => {
                // Such as a cancellation: there may be a transaction.
                if is_refusal(&error) {
                    self.client.batch_execute("ROLLBACK")?;
                }
                Err(error)
            }
        }
    }

    fn execute(&mut self, sql: &str, parameters: &[Parameter]) -> Result<Answer, Error> {
        if !extended::is_preparable(sql) {
            if self.in_transaction && text::controls_transaction(sql) {
                return Ok(Answer::Failed(HELD.into()));
            }
            if let Some(message) = extended::unsendable(sql) {
                return Ok(Answer::Failed(message.into()));
            }
            if let Some(lost) = self.learn_types(sql, parameters.len())? {
                return Ok(lost);
            }
            let result = extended::run(&mut self.client, sql, parameters);
            return self.finish(sql, result);
        }
        let parameters = &statement::literals(parameters);
        let rows = match (self.in_transaction, self.pooling) {
            (true, _) => self.execute_within(sql, parameters)?,
            (false, Pooling::Transaction | Pooling::Unknown) => {
                self.execute_alone(sql, parameters)?
            }
            (false, Pooling::Session) => match self.execute_prepared(sql, parameters) {
                // The prepared statement is gone, or a table has changed. Nothing was done yet.
                Err(error) if is_outdated(&error) => {
                    self.forget(sql)?;
                    self.execute_alone(sql, parameters)?
                }
                other => other?,
            },
        };
        Ok(Answer::Done(rows))
    }

    /// Executes a statement in a transaction of its own, in which it is prepared anew. Behind a
    /// pooler, only a transaction keeps the server's session from changing between the two steps.
    fn execute_alone(&mut self, sql: &str, parameters: &str) -> Result<Rows, Error> {
        self.begin()?;
        let result = self.execute_prepared(sql, parameters);
        match &result {
            Ok(_) => self.commit()?,
            Err(error) if is_refusal(error) => self.rollback()?,
            Err(_) => return result,
        };
        result
    }

    /// Executes a statement in the transaction that the script has begun. A statement that was
    /// prepared before may be outdated, and an error would spoil the transaction. So its first use
    /// has a savepoint.
    fn execute_within(&mut self, sql: &str, parameters: &str) -> Result<Rows, Error> {
        let older = self.prepared.get(sql).is_some_and(|(_, used)| *used <= self.began);
        if !older {
            return self.execute_prepared(sql, parameters);
        }
        let execute = self.execution(sql, parameters)?;
        let guarded = format!("SAVEPOINT qrelay; {execute}; RELEASE qrelay");
        match self.client.simple_query(&guarded) {
            Err(error) if is_outdated(&error) => {
                self.client.batch_execute("ROLLBACK TO qrelay; RELEASE qrelay")?;
                self.forget(sql)?;
                self.execute_prepared(sql, parameters)
            }
            Err(error) => Err(error),
            Ok(mut messages) => {
                // The last message is about RELEASE.
                messages.pop();
                Ok(last_result(messages))
            }
        }
    }

    /// Lets the client library learn the types of a result before the result comes. Behind a pooler
    /// that takes a transaction, because the library prepares statements, each under a new name,
    /// which another client may have left in this session of the server. The connection is of no
    /// use any more if an earlier such statement is in another session.
    fn learn_types(&mut self, sql: &str, parameters: usize) -> Result<Option<Answer>, Error> {
        if self.in_transaction || self.pooling == Pooling::Session {
            return extended::learn_types(&mut self.client, sql, parameters).map(|()| None);
        }
        for _ in 0..NAMES_MAX {
            self.begin()?;
            let result = extended::learn_types(&mut self.client, sql, parameters);
            self.rollback()?;
            match result {
                Ok(()) => return Ok(None),
                Err(error) if error.code() == Some(&SqlState::DUPLICATE_PSTATEMENT) => {}
                Err(error) if error.code() != Some(&SqlState::INVALID_SQL_STATEMENT_NAME) => {
                    return Err(error);
                }
                Err(_) => break,
            }
        }
        let message = "the pooler mixes the sessions of its clients up";
        Ok(Some(Answer::Lost { message: message.into(), unsent: true }))
    }

    fn execute_prepared(&mut self, sql: &str, parameters: &str) -> Result<Rows, Error> {
        let execute = self.execution(sql, parameters)?;
        self.client.simple_query(&execute).map(last_result)
    }

    /// Returns the command that executes a prepared statement, which is prepared if need be.
    fn execution(&mut self, sql: &str, parameters: &str) -> Result<String, Error> {
        self.counter += 1;
        let number = match self.prepared.get_mut(sql) {
            Some((number, used)) => {
                *used = self.counter;
                *number
            }
            None => self.prepare(sql)?,
        };
        Ok(format!("EXECUTE {}_{number}{parameters}", self.prefix))
    }

    fn prepare(&mut self, sql: &str) -> Result<u64, Error> {
        if self.prepared.len() >= PREPARED_MAX && !self.in_transaction {
            let oldest = self.prepared.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(oldest) = oldest.map(|(sql, _)| sql.clone()) {
                self.forget(&oldest)?;
            }
        }
        let number = self.counter;
        // The line end closes a comment at the end of the statement.
        let prepare = format!("PREPARE {}_{number} AS {sql}\n", self.prefix);
        self.client.execute_typed(&prepare, &[])?;
        self.prepared.insert(sql.to_owned(), (number, self.counter));
        Ok(number)
    }

    /// Drops a prepared statement, here and on the server.
    fn forget(&mut self, sql: &str) -> Result<(), Error> {
        let Some((number, _)) = self.prepared.remove(sql) else { return Ok(()) };
        if self.in_transaction {
            // If the statement is gone, dropping it would spoil the transaction.
            return Ok(());
        }
        match self.client.batch_execute(&format!("DEALLOCATE {}_{number}", self.prefix)) {
            Err(error) if error.code() != Some(&SqlState::INVALID_SQL_STATEMENT_NAME) => Err(error),
            _ => Ok(()),
        }
    }

    fn begin(&mut self) -> Result<Answer, Error> {
        self.client.batch_execute("BEGIN")?;
        self.in_transaction = true;
        self.began = self.counter;
        Ok(Answer::Done(Rows::default()))
    }

    /// A failed transaction would answer COMMIT with ROLLBACK, and no error; but it refuses
    /// everything else. Whatever is refused here, COMMIT may not have been reached.
    fn commit(&mut self) -> Result<Answer, Error> {
        let last = self.last_words();
        let result = self.client.batch_execute(&format!("SELECT; {last}COMMIT"));
        if let Err(error) = &result
            && is_refusal(error)
        {
            self.end_badly(&last)?;
        }
        self.in_transaction = false;
        result.map(|()| Answer::Done(Rows::default()))
    }

    fn rollback(&mut self) -> Result<Answer, Error> {
        let last = self.last_words();
        self.end_badly(&last)?;
        self.in_transaction = false;
        Ok(Answer::Done(Rows::default()))
    }

    /// Returns the commands that drop the statements that must not outlast their transaction.
    fn last_words(&mut self) -> String {
        if self.pooling == Pooling::Session {
            return String::new();
        }
        let numbers = self.prepared.drain().map(|(_, (number, _))| number);
        numbers.map(|number| format!("DEALLOCATE {}_{number}; ", self.prefix)).collect()
    }

    /// Rolls back; the statements of `last` may be gone already.
    fn end_badly(&mut self, last: &str) -> Result<(), Error> {
        match self.client.batch_execute(&format!("ROLLBACK; {last}")) {
            Err(error) if error.code() != Some(&SqlState::INVALID_SQL_STATEMENT_NAME) => Err(error),
            _ => Ok(()),
        }
    }
}

/// The message for a script that leaves a transaction open.
const HINT: &str = "a transaction can't be left open, it was rolled back; \
                    use db:transaction(function(tx) … end)";

/// The message for a script that ends or begins a transaction inside of one.
const HELD: &str = "db:transaction itself begins and ends the transaction: return commits, \
                    error() rolls back; a SAVEPOINT can be rolled back to";

const NO_COPY: &str = "COPY from or to the client isn't possible";

fn is_outdated(error: &Error) -> bool {
    let code = error.code();
    code == Some(&SqlState::INVALID_SQL_STATEMENT_NAME)
        || code == Some(&SqlState::FEATURE_NOT_SUPPORTED)
}

/// Whether the text may begin a transaction: only texts with one of these words do.
fn mentions_transaction(sql: &str) -> bool {
    sql.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .any(|word| word.eq_ignore_ascii_case("begin") || word.eq_ignore_ascii_case("transaction"))
}

fn failure(error: &Error, closed: bool) -> Answer {
    let message = describe(error);
    match error.as_db_error() {
        Some(_) if !closed && is_refusal(error) => Answer::Failed(message),
        Some(_) => Answer::Lost { message, unsent: false },
        None => Answer::Lost { message, unsent: is_unsent(error) },
    }
}

/// Whether the server refused the statement and the connection can go on.
fn is_refusal(error: &Error) -> bool {
    error
        .as_db_error()
        .is_some_and(|db| !matches!(db.parsed_severity(), Some(Severity::Fatal | Severity::Panic)))
}

/// Whether nothing was sent, because the socket was already shut down.
fn is_unsent(error: &Error) -> bool {
    std::error::Error::source(error)
        .and_then(|cause| cause.downcast_ref::<std::io::Error>())
        .is_some_and(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Returns the last of several results.
fn last_result(messages: Vec<SimpleQueryMessage>) -> Rows {
    let mut result = Rows::default();
    let mut complete = false;
    for message in messages {
        match message {
            SimpleQueryMessage::Row(row) => {
                if std::mem::take(&mut complete) {
                    result.rows.clear();
                }
                result.rows.push(ResultRow::Text(row));
            }
            SimpleQueryMessage::CommandComplete(affected) => {
                if std::mem::replace(&mut complete, true) {
                    result.rows.clear();
                }
                result.affected = affected;
            }
            _ => {}
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_begin_transactions() {
        for sql in ["BEGIN", "select 1; begin", "START TRANSACTION", "/**/Begin/**/;"] {
            assert!(mentions_transaction(sql), "{sql}");
        }
        for sql in ["SELECT begin_at, \"start\" FROM beginnings", "SELECT transaction_id"] {
            assert!(!mentions_transaction(sql), "{sql}");
        }
    }
}
