//! Connection strings as libpq reads them: `key = value` pairs or a URI.
//!
//! Contract: text in, parameters out; nothing is connected, and no file is read.
//!
//! # Failure
//! [`ConnInfoError`].

use crate::lua::library::pg::parameters::{ConnInfoError, Parameters};
use crate::lua::library::pg::uri;

/// Reads a connection string.
///
/// # Errors
/// See [`ConnInfoError`].
pub(super) fn parse(text: &str) -> Result<Parameters, ConnInfoError> {
    let mut parameters = Parameters::default();
    match uri::without_scheme(text) {
        Some(rest) => uri::parse(rest, &mut parameters)?,
        None => parse_pairs(text, &mut parameters)?,
    }
    Ok(parameters)
}

/// `key = value` pairs, values in quotes if need be, backslashes before quotes and backslashes.
fn parse_pairs(text: &str, parameters: &mut Parameters) -> Result<(), ConnInfoError> {
    let mut rest = text.trim_start();
    for position in 1.. {
        if rest.is_empty() {
            break;
        }
        let end = rest.find(|c: char| c == '=' || c.is_ascii_whitespace()).unwrap_or(rest.len());
        let (key, after) = rest.split_at(end);
        let Some(after) = after.trim_start().strip_prefix('=') else {
            return Err(ConnInfoError::MissingEquals(position));
        };
        let (value, after) = take_value(after.trim_start())?;
        parameters.set(key, value)?;
        rest = after.trim_start();
    }
    Ok(())
}

/// A value, and what follows it.
fn take_value(text: &str) -> Result<(String, &str), ConnInfoError> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut characters = text.char_indices().skip(usize::from(quoted));
    while let Some((position, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, &text[position + 1..])),
            c if !quoted && c.is_ascii_whitespace() => return Ok((value, &text[position..])),
            c => value.push(c),
        }
    }
    if quoted { Err(ConnInfoError::UnterminatedQuote) } else { Ok((value, "")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(text: &str, key: &str) -> Option<String> {
        parse(text).ok()?.get(key).map(str::to_owned)
    }

    #[test]
    fn pairs() {
        assert_eq!(get("dbname=foo", "dbname").as_deref(), Some("foo"));
        assert_eq!(get(" dbname = 'a b' user=c ", "dbname").as_deref(), Some("a b"));
        assert_eq!(get(r"password='it\'s \\' user=u", "password").as_deref(), Some(r"it's \"));
        assert_eq!(get(r"password=a\ b", "password").as_deref(), Some("a b"));
        assert_eq!(get("user=a user=b", "user").as_deref(), Some("b"));
        assert_eq!(get("user='' dbname=x", "user"), None);
        assert_eq!(get("", "user"), None);
    }

    #[test]
    fn what_is_no_connection_string() {
        let error = |text| parse(text).expect_err(text).to_string();
        assert!(error("foo").starts_with("missing '=' in parameter 1;"), "{}", error("foo"));
        assert_eq!(error("user='x"), "a quote is not closed");
        assert!(error("usr=x").contains("did you mean 'user'"), "{}", error("usr=x"));
        assert!(error("sslcert=x").contains("not supported"));
    }

    #[test]
    fn no_error_quotes_the_string() {
        for text in [
            "password=x s3cret",
            "user=me password=x s3cret=y",
            "password='s3cret",
            "s3cret",
            "postgresql://me:s3cret/x@host/db",
            "postgresql://me:x/s3cret@host/db",
            "postgresql://me:x?s3cret@host/db",
            "postgresql://me:x?s3cret=y@host/db",
            "postgresql://me:5/s3cret@host/db",
            "postgresql://me:%s3cret@host/db",
            "postgresql://h/db?password=x&s3cret=y",
            "postgresql://h/db?password=x&s3cret",
            "postgres:s3cret@host",
        ] {
            let target = parse(text).and_then(|parameters| {
                let logger = slog::Logger::root(slog::Discard, slog::o!());
                crate::lua::library::pg::target::Target::new(parameters, None, &logger)
            });
            let error = target.expect_err(text);
            assert!(!error.to_string().contains("s3cret"), "{text}: {error}");
        }
        let parameters = parse("user=me password=s3cret").expect("a string");
        assert_eq!(format!("{parameters:?}"), r#"{"password", "user"}"#);
    }
}
