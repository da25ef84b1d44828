//! Rows as they come from the server.

use postgres::SimpleQueryRow;

use crate::lua::library::pg::statement::Parameter;

/// A row of a result.
#[derive(Debug)]
pub(super) enum ResultRow {
    /// A row of the simple query protocol.
    Text(SimpleQueryRow),
    /// Names of columns and their texts.
    Values(Vec<(String, Parameter)>),
}

/// The last result of a request.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// The rows, each with its columns' names.
    pub rows: Vec<ResultRow>,
    /// Rows that were affected or returned.
    pub affected: u64,
}
