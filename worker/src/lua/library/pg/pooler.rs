//! Whether a connection leads to the server itself or to a pooler, such as PgBouncer.
//!
//! Contract: a pooler in transaction mode gives each transaction of a client any of its connections
//! to the server, so nothing that belongs to a session lasts: no prepared statement, no search
//! path, no LISTEN. A pooler in session mode is as good as the server. Two properties tell the
//! three apart. A server stores every parameter of its own form that a client sends when it
//! connects; a pooler refuses the parameter or drops it. And two clients of a server never have the
//! same process of the server at the same time; two clients of a pooler in transaction mode soon
//! do.
//!
//! # Failure
//! The server's or the connection's error. A pooler that is too busy to tell is unknown: nothing is
//! prepared there, because another client's statement might have the same name, and the next
//! connection asks again.

use std::time::Duration;

use postgres::error::SqlState;
use postgres::{Client, Config, Error, SimpleQueryMessage};

/// The parameter that a pooler doesn't know.
const MARK: &str = "qrelay.direct";

/// Pairs of questions that are asked to find out which process of the server answers.
const QUESTIONS: usize = 8;

/// Longest wait for a second connection of a pooler. In transaction mode one is free whenever a
/// transaction ends.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a connection leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pooling {
    /// Each connection has a session of its own.
    Session,
    /// Each transaction may have another session.
    Transaction,
    /// One of both.
    Unknown,
}

/// Returns the configuration with the mark.
pub(super) fn marked(config: &Config) -> Config {
    let options = config.get_options().unwrap_or_default();
    let mut marked = config.clone();
    marked.options(format!("{options} -c {MARK}=yes").trim_start());
    marked
}

/// Whether a pooler refused the mark.
pub(super) fn is_refusal(error: &Error) -> bool {
    error.code() == Some(&SqlState::PROTOCOL_VIOLATION)
}

/// Whether the mark of the connection has arrived at the server.
///
/// # Errors
/// See the module.
pub(super) fn is_direct(client: &mut Client) -> Result<bool, Error> {
    let question = format!("SELECT pg_catalog.current_setting('{MARK}', true)");
    Ok(value(client, &question)?.as_deref() == Some("yes"))
}

/// Returns how the pooler of two connections treats them.
///
/// # Errors
/// See the module.
pub(super) fn pooling(one: &mut Client, other: &mut Client) -> Result<Pooling, Error> {
    // In session mode the other connection may wait for one that ends; in any mode for a pooler
    // that is busy.
    if other.is_valid(PATIENCE).is_err() {
        return Ok(Pooling::Unknown);
    }
    let process = "SELECT pg_catalog.pg_backend_pid()";
    let (first, second) = (value(one, process)?, value(other, process)?);
    for _ in 0..QUESTIONS {
        if first == second || value(one, process)? != first || value(other, process)? != second {
            return Ok(Pooling::Transaction);
        }
    }
    Ok(Pooling::Session)
}

/// Returns the only value of a query, if it isn't NULL.
fn value(client: &mut Client, query: &str) -> Result<Option<String>, Error> {
    let messages = client.simple_query(query)?;
    Ok(messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    }))
}
