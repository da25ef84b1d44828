//! Statements with parameters that `PREPARE` doesn't take: `CALL`, `EXPLAIN` and everything else
//! that is no query.
//!
//! Contract: exactly one statement goes by the extended protocol, with its parameters beside it as
//! text without types, as libpq sends them. It runs without a name, so it can't be mistaken for
//! another client's behind a pooler. The client library asks for binary results, so only columns of
//! types whose binary form says what their text is can be had; those of other types make a failure,
//! after the statement was done.
//!
//! # Failure
//! The server's error, or the text that names the column.

use std::error::Error as StdError;

use bytes::BytesMut;
use postgres::fallible_iterator::FallibleIterator as _;
use postgres::types::{Format, FromSql, IsNull, Kind, ToSql, Type, to_sql_checked};
use postgres::{Client, Error, Row};

use crate::lua::library::pg::rows::{ResultRow, Rows};
use crate::lua::library::pg::statement::Parameter;
use crate::lua::library::pg::text::first_word;

/// The type of parameters whose types the server is to find.
const UNTYPED: Type = Type::UNKNOWN;

/// Whether `PREPARE` takes the statement: only statements that begin with one of these words.
pub(super) fn is_preparable(sql: &str) -> bool {
    const QUERIES: [&str; 8] =
        ["SELECT", "INSERT", "UPDATE", "DELETE", "MERGE", "VALUES", "WITH", "TABLE"];
    let first = first_word(sql);
    QUERIES.iter().any(|word| first.eq_ignore_ascii_case(word))
}

/// A parameter as the server's text.
#[derive(Debug)]
struct Text<'a>(&'a Parameter);

impl ToSql for Text<'_> {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        let Some(text) = self.0 else { return Ok(IsNull::Yes) };
        out.extend_from_slice(text);
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }

    to_sql_checked!();
}

/// A value in binary form, unchanged.
struct Binary<'a>(&'a [u8]);

impl<'a> FromSql<'a> for Binary<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        Ok(Self(raw))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// Returns why a statement can't be sent. After a COPY the server would wait for data, and no other
/// message would end the data.
pub(super) fn unsendable(sql: &str) -> Option<&'static str> {
    let is_copy = first_word(sql).eq_ignore_ascii_case("COPY");
    is_copy.then_some("COPY takes no parameters, not even an empty list")
}

/// Runs a statement to its end.
///
/// # Errors
/// The outer one is the server's or the connection's. The inner one names a column that has no
/// text, or says that the statement can't be sent.
pub(super) fn run(
    client: &mut Client,
    sql: &str,
    parameters: &[Parameter],
) -> Result<Result<Rows, String>, Error> {
    let parameters = parameters.iter().map(|parameter| (Text(parameter), UNTYPED));
    let parameters: Vec<_> = parameters.collect();
    let borrowed = parameters.iter().map(|(text, kind)| (text as &dyn ToSql, kind.clone()));
    let mut stream = client.query_typed_raw(sql, borrowed)?;
    let mut rows = Vec::new();
    while let Some(row) = stream.next()? {
        rows.push(result_row(&row)?);
    }
    let affected = stream.rows_affected().unwrap_or(0);
    let rows = rows.into_iter().collect::<Result<Vec<_>, String>>();
    Ok(rows.map(|rows| Rows { rows, affected }))
}

/// Lets the client library learn the types of the result before the result comes. The library asks
/// the server for types that are new to it. In the middle of a result it would wait for an answer
/// behind more rows than it buffers.
///
/// # Errors
/// The server's or the connection's.
pub(super) fn learn_types(client: &mut Client, sql: &str, parameters: usize) -> Result<(), Error> {
    client.prepare_typed(sql, &vec![UNTYPED; parameters]).map(drop)
}

fn result_row(row: &Row) -> Result<Result<ResultRow, String>, Error> {
    let mut values = Vec::with_capacity(row.len());
    for (index, column) in row.columns().iter().enumerate() {
        let name = column.name().to_owned();
        let text = match row.try_get::<_, Option<Binary<'_>>>(index)? {
            None => None,
            Some(Binary(bytes)) => match text(column.type_(), bytes) {
                Some(text) => Some(text),
                None => return Ok(Err(no_text(&name, column.type_()))),
            },
        };
        values.push((name, text));
    }
    Ok(Ok(ResultRow::Values(values)))
}

fn no_text(column: &str, kind: &Type) -> String {
    format!(
        "the statement was done, but column {column} has the type {kind}, which only SELECT, \
         INSERT, UPDATE, DELETE and MERGE can return; make it text"
    )
}

/// PostgreSQL's text for a value in its binary form, for types where that needs no settings. (The
/// server describes a domain as the type that it is made of.)
fn text(kind: &Type, binary: &[u8]) -> Option<Vec<u8>> {
    match *kind {
        Type::BOOL => Some(if binary == [0] { b"f" } else { b"t" }.to_vec()),
        Type::INT2 => Some(i16::from_be_bytes(binary.try_into().ok()?).to_string().into_bytes()),
        Type::INT4 => Some(i32::from_be_bytes(binary.try_into().ok()?).to_string().into_bytes()),
        Type::INT8 => Some(i64::from_be_bytes(binary.try_into().ok()?).to_string().into_bytes()),
        Type::OID => Some(u32::from_be_bytes(binary.try_into().ok()?).to_string().into_bytes()),
        // The first byte is the version of the binary form.
        Type::JSONB => binary.strip_prefix(&[1]).map(<[u8]>::to_vec),
        Type::VOID
        | Type::TEXT
        | Type::VARCHAR
        | Type::BPCHAR
        | Type::NAME
        | Type::UNKNOWN
        | Type::JSON
        | Type::XML => Some(binary.to_vec()),
        _ => matches!(kind.kind(), Kind::Enum(_)).then(|| binary.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_can_be_prepared() {
        for sql in [
            "SELECT 1",
            "select$1",
            "  (\n(Values (1)))",
            "-- CALL x\n WITH a AS (SELECT 1) TABLE a",
            "/* a /* CALL */ b */insert into x values (1)",
            "(/**/( select 1))",
            "-- CALL x\rSELECT 1",
            "merge into x",
        ] {
            assert!(is_preparable(sql), "{sql}");
        }
        for sql in ["", "CALL p($1)", "explain SELECT 1", "selects", "/* SELECT", "-- SELECT", ";"]
        {
            assert!(!is_preparable(sql), "{sql}");
        }
    }

    #[test]
    fn binary_values_become_text() {
        let table: [(Type, &[u8], Option<&str>); 9] = [
            (Type::BOOL, &[1], Some("t")),
            (Type::BOOL, &[0], Some("f")),
            (Type::INT2, &[0xff, 0xfe], Some("-2")),
            (Type::INT4, &[0, 0, 1, 0], Some("256")),
            (Type::INT4, &[0], None),
            (Type::INT8, &[0x80, 0, 0, 0, 0, 0, 0, 0], Some("-9223372036854775808")),
            (Type::JSONB, b"\x01{}", Some("{}")),
            (Type::TEXT, b"it's", Some("it's")),
            (Type::NUMERIC, &[0; 8], None),
        ];
        for (kind, binary, expected) in table {
            let text = text(&kind, binary).map(String::from_utf8);
            assert_eq!(text, expected.map(|text| Ok(text.to_owned())), "{kind} {binary:?}");
        }
    }
}
