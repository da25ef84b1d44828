//! The values of options: what several commands read alike. Pure.
//!
//! # Failure
//! A value that can't be used is an error whose text says what was expected; clap shows it.

use std::time::Duration;

use qrelay_shared::endpoint::{self, Endpoint, Parsed, QMQP_PORT};

/// Reads the address of a QMQP server.
pub fn socket(text: &str) -> Result<Endpoint, String> {
    match endpoint::parse(text.as_bytes(), QMQP_PORT) {
        Ok(Parsed::Endpoint(endpoint)) => Ok(endpoint),
        Ok(Parsed::Host { .. }) => {
            Err("expected a path (/… ), @abstract or a numeric IP address".to_owned())
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Reads a time limit in seconds.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected a number of seconds".to_owned())?;
    if seconds > 0.0 && seconds <= 86_400.0 {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("expected more than 0 and at most 86400 seconds".to_owned())
    }
}
