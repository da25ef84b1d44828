//! Connection URIs: `postgresql://user:password@host:port,host:port/dbname?key=value`.
//!
//! Contract: the part after the scheme in, parameters out. Every part may be percent-encoded, so a
//! socket's directory is written `%2Fvar%2Frun%2Fpostgresql`.
//!
//! # Failure
//! [`ConnInfoError`].

use crate::lua::library::pg::parameters::{ConnInfoError, Parameters};

/// Returns what follows the scheme, if the text is a connection URI.
pub(super) fn without_scheme(text: &str) -> Option<&str> {
    text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://"))
}

/// Reads what follows the scheme.
///
/// # Errors
/// The URI is malformed, or has a parameter that isn't supported.
pub(super) fn parse(text: &str, parameters: &mut Parameters) -> Result<(), ConnInfoError> {
    let (text, query) = text.split_once('?').unwrap_or((text, ""));
    let (authority, database) = text.split_once('/').unwrap_or((text, ""));
    let hosts = match authority.rsplit_once('@') {
        Some((credentials, hosts)) => {
            set_credentials(credentials, parameters)?;
            hosts
        }
        None => authority,
    };
    // The first '/' may belong to a password. The rest of the password would then be taken for a
    // database, and show in messages.
    if !authority.contains('@') && database.contains('@') {
        return Err(ConnInfoError::MalformedUri(
            "an '@' comes after the first '/'; write %2F for a '/' in a password, %40 for an '@'",
        ));
    }
    set_hosts(hosts, parameters)?;
    set_decoded(parameters, "dbname", database)?;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) =
            pair.split_once('=').ok_or(ConnInfoError::MalformedUri("a query key has no value"))?;
        match (decode(key)?.as_str(), decode(value)?) {
            // As written for JDBC.
            ("ssl", value) if value == "true" => parameters.set("sslmode", "require".into())?,
            (key, value) => parameters.set(key, value)?,
        }
    }
    Ok(())
}

fn set_credentials(text: &str, parameters: &mut Parameters) -> Result<(), ConnInfoError> {
    let (user, password) = text.split_once(':').unwrap_or((text, ""));
    set_decoded(parameters, "user", user)?;
    set_decoded(parameters, "password", password)
}

/// Sets a parameter unless the URI leaves it out.
fn set_decoded(
    parameters: &mut Parameters,
    key: &'static str,
    value: &str,
) -> Result<(), ConnInfoError> {
    if value.is_empty() { Ok(()) } else { parameters.set(key, decode(value)?) }
}

fn set_hosts(text: &str, parameters: &mut Parameters) -> Result<(), ConnInfoError> {
    if text.is_empty() {
        return Ok(());
    }
    let (mut hosts, mut ports) = (Vec::new(), Vec::new());
    for part in text.split(',') {
        let (host, port) = host_and_port(part)?;
        hosts.push(decode(host)?);
        ports.push(decode(port)?);
    }
    if hosts.iter().any(|host| !host.is_empty()) {
        parameters.set("host", hosts.join(","))?;
    }
    if ports.iter().any(|port| !port.is_empty()) {
        parameters.set("port", ports.join(","))?;
    }
    Ok(())
}

/// `host`, `host:port`, `[IPv6]` or `[IPv6]:port`.
fn host_and_port(text: &str) -> Result<(&str, &str), ConnInfoError> {
    let Some(rest) = text.strip_prefix('[') else {
        return Ok(text.split_once(':').unwrap_or((text, "")));
    };
    let (host, after) =
        rest.split_once(']').ok_or(ConnInfoError::MalformedUri("a bracket is not closed"))?;
    match after.strip_prefix(':') {
        Some(port) => Ok((host, port)),
        None if after.is_empty() => Ok((host, "")),
        None => Err(ConnInfoError::MalformedUri("after a bracket comes ':' or the host's end")),
    }
}

fn decode(text: &str) -> Result<String, ConnInfoError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first != b'%' {
            bytes.push(first);
            rest = after;
            continue;
        }
        let digits = after.get(..2).and_then(|digits| str::from_utf8(digits).ok());
        // from_str_radix would take a sign.
        let digits = digits.filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) if byte != 0 => bytes.push(byte),
            _ => return Err(ConnInfoError::MalformedUri("'%' needs two hexadecimal digits")),
        }
        rest = &after[2..];
    }
    String::from_utf8(bytes).map_err(|_| ConnInfoError::MalformedUri("it is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Parameters, ConnInfoError> {
        let mut parameters = Parameters::default();
        parse(without_scheme(text).expect("a URI"), &mut parameters)?;
        Ok(parameters)
    }

    fn all(text: &str) -> Vec<(&'static str, String)> {
        let keys = ["user", "password", "host", "port", "dbname", "sslmode", "connect_timeout"];
        let parameters = read(text).expect(text);
        let value = |key: &'static str| parameters.get(key).map(|value| (key, value.to_owned()));
        keys.into_iter().filter_map(value).collect()
    }

    fn pairs(list: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
        list.iter().map(|(key, value)| (*key, (*value).to_owned())).collect()
    }

    #[test]
    fn every_part_may_be_missing() {
        assert_eq!(all("postgresql://"), []);
        assert_eq!(all("postgres:///mydb"), pairs(&[("dbname", "mydb")]));
        assert_eq!(all("postgresql://localhost"), pairs(&[("host", "localhost")]));
        assert_eq!(
            all("postgresql://u:p%40ss@h:5433/db?connect_timeout=10&ssl=true"),
            pairs(&[
                ("user", "u"),
                ("password", "p@ss"),
                ("host", "h"),
                ("port", "5433"),
                ("dbname", "db"),
                ("sslmode", "require"),
                ("connect_timeout", "10"),
            ])
        );
    }

    #[test]
    fn several_hosts_addresses_and_sockets() {
        assert_eq!(all("postgresql://a:1,b/x")[..2], pairs(&[("host", "a,b"), ("port", "1,")]));
        assert_eq!(all("postgresql://[2001:db8::1]:5/x")[..1], pairs(&[("host", "2001:db8::1")]));
        assert_eq!(all("postgresql://u@h/a@b")[2..], pairs(&[("dbname", "a@b")]));
        assert_eq!(all("postgresql://%2Frun%2Fpg/x")[..1], pairs(&[("host", "/run/pg")]));
    }

    #[test]
    fn malformed_ones() {
        for text in [
            "postgresql://[::1/x",
            "postgresql://[::1]x/y",
            "postgresql://h/%zz",
            "postgresql://h/%+1",
            "postgresql://h/a%00",
            "postgresql://h/a%f",
            "postgresql://h?user",
            "postgresql://h?usr=x",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
