//! The parameters of a connection, as libpq names them.
//!
//! Contract: a parameter that is given twice has its last value. What isn't given comes from the
//! environment variable that libpq reads for it; the built-in defaults are those of
//! [`Target`](super::target::Target).
//!
//! # Failure
//! [`ConnInfoError`]. An unknown parameter is an error, never ignored.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::lua::binding::nearest::nearest;

/// The parameters that are understood, each with libpq's environment variable for it (PostgreSQL
/// documentation, 34.1.2 and 34.15).
const KEYWORDS: &[(&str, Option<&str>)] = &[
    ("host", Some("PGHOST")),
    ("hostaddr", Some("PGHOSTADDR")),
    ("port", Some("PGPORT")),
    ("dbname", Some("PGDATABASE")),
    ("user", Some("PGUSER")),
    ("password", Some("PGPASSWORD")),
    ("passfile", Some("PGPASSFILE")),
    ("options", Some("PGOPTIONS")),
    ("application_name", Some("PGAPPNAME")),
    ("fallback_application_name", None),
    ("connect_timeout", Some("PGCONNECT_TIMEOUT")),
    ("client_encoding", Some("PGCLIENTENCODING")),
    ("keepalives", None),
    ("keepalives_idle", None),
    ("keepalives_interval", None),
    ("keepalives_count", None),
    ("tcp_user_timeout", None),
    ("sslmode", Some("PGSSLMODE")),
    ("sslrootcert", Some("PGSSLROOTCERT")),
    ("gssencmode", Some("PGGSSENCMODE")),
    ("channel_binding", Some("PGCHANNELBINDING")),
    ("target_session_attrs", Some("PGTARGETSESSIONATTRS")),
    ("load_balance_hosts", Some("PGLOADBALANCEHOSTS")),
];

/// Why a connection string can't be used. No text quotes the string: what is mistaken for a name or
/// a port may be a part of a password.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum ConnInfoError {
    /// The parameter at this position, counted from 1, has no value.
    #[error("missing '=' in parameter {0}; a value with blanks needs quotes")]
    MissingEquals(usize),
    /// A value that begins with a quote and doesn't end with one.
    #[error("a quote is not closed")]
    UnterminatedQuote,
    /// The parameter doesn't exist, or isn't supported.
    #[error("a parameter is not supported{hint}")]
    UnknownParameter {
        /// The nearest supported name, if one is near, or all of them.
        hint: String,
    },
    /// The parameter's value is wrong or isn't supported.
    #[error("{key}: expected {expected}")]
    InvalidValue {
        /// The parameter.
        key: &'static str,
        /// The allowed values.
        expected: String,
    },
    /// The URI is malformed.
    #[error("malformed URI: {0}")]
    MalformedUri(&'static str),
    /// A file that a parameter names can't be used.
    #[error("{key}: cannot use {}: {reason}", path.as_deref().unwrap_or("the file"))]
    UnusableFile {
        /// The parameter.
        key: &'static str,
        /// The file, if the string doesn't name it.
        path: Option<String>,
        /// Why.
        reason: String,
    },
}

/// Parameters by name.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Parameters(BTreeMap<&'static str, String>);

impl std::fmt::Debug for Parameters {
    /// Shows the names alone, because values contain passwords.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Parameters {
    /// Sets a parameter.
    ///
    /// # Errors
    /// There is no such parameter.
    pub(super) fn set(&mut self, key: &str, value: String) -> Result<(), ConnInfoError> {
        match KEYWORDS.iter().find(|(known, _)| *known == key) {
            Some((known, _)) => {
                self.0.insert(known, value);
                Ok(())
            }
            None => Err(unknown(key)),
        }
    }

    /// Takes missing parameters from the environment.
    pub(super) fn complete(&mut self, environment: impl Fn(&str) -> Option<String>) {
        for (key, variable) in KEYWORDS {
            if !self.0.contains_key(key)
                && let Some(value) = variable.and_then(&environment)
            {
                self.0.insert(key, value);
            }
        }
    }

    /// Returns a parameter's value; an empty value counts as none, as in libpq.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }
}

fn unknown(key: &str) -> ConnInfoError {
    let known: Vec<&str> = KEYWORDS.iter().map(|(known, _)| *known).collect();
    let hint = match nearest(key, &known) {
        Some(near) => format!("; did you mean '{near}'?"),
        None => format!("; there is {}", known.join(", ")),
    };
    ConnInfoError::UnknownParameter { hint }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_fills_gaps() {
        let mut parameters = Parameters::default();
        parameters.set("user", "me".into()).expect("known");
        parameters.complete(|name| Some(name.to_ascii_lowercase()));
        assert_eq!(parameters.get("user"), Some("me"));
        assert_eq!(parameters.get("dbname"), Some("pgdatabase"));
        assert_eq!(parameters.get("keepalives"), None);
    }
}
