//! Addresses of sockets, in the form in which a configuration has them.
//!
//! Contract: `192.0.2.1`, `192.0.2.1:628`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:628`,
//! IPv6 with a `%scope`, `/path`, `@abstract` are [`Endpoint`]s. `host` and `host:port` are
//! returned as [`Parsed::Host`], because this module resolves no names. The only request to the
//! system is for the index of the interface that a `%scope` names.
//!
//! # Failure
//! Every error is an [`EndpointError`], which tells the author of a configuration what was
//! expected.

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nix::net::if_::if_nametoindex;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::address::{is_domain_name, printable};

/// Port of QMQP, registered with IANA.
pub const QMQP_PORT: u16 = 628;
/// Port of the Pond log server.
pub const POND_PORT: u16 = 5479;
/// Port of beng-proxy's control protocol.
pub const CONTROL_PORT: u16 = 5478;

/// Longest path in bytes, and longest abstract name without its `@`. `sun_path` has 108 bytes, one
/// of which is a NUL, after the path or before the name (unix(7)).
pub(crate) const MAX_LOCAL_NAME: usize = 107;
/// Longest host name in bytes (RFC 1035 2.3.4, in its written form).
const MAX_HOST: usize = 253;

/// The address of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Wire", into = "Wire")]
pub enum Endpoint {
    /// An IP address and a port.
    Inet(SocketAddr),
    /// A local socket with an absolute path.
    Path(PathBuf),
    /// A local socket with an abstract name; neither the `@` nor the NUL are part of it.
    Abstract(Vec<u8>),
}

/// The meaning of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// An address that can be used right away.
    Endpoint(Endpoint),
    /// A name that has to be looked up first.
    Host {
        /// The name, as written.
        host: String,
        /// The port, written or default.
        port: u16,
    },
}

/// The reason why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EndpointError {
    /// The text is empty.
    #[error("empty address; expected an IP address, a host name, /path or @name")]
    Empty,
    /// The path or the abstract name doesn't fit a socket address.
    #[error("too long; a socket's path or @name has at most {MAX_LOCAL_NAME} bytes")]
    TooLong,
    /// Nothing follows the `@` of an abstract name.
    #[error("expected a name after '@'")]
    NoName,
    /// The path or the abstract name contains a NUL.
    #[error("a socket's path or @name can't contain a NUL byte")]
    Nul,
    /// The text is neither an IP address nor a host name.
    #[error("expected an IP address, a host name, /path or @name")]
    Syntax,
    /// The text consists of digits and dots, but is no IPv4 address.
    #[error("expected an IPv4 address of the form 192.0.2.1")]
    Ipv4,
    /// The text has colons or brackets, but is no IPv6 address.
    #[error("expected an IPv6 address, in brackets if a port follows: [2001:db8::1]:628")]
    Ipv6,
    /// The scope is neither a number nor the name of an interface.
    #[error("no network interface of the name that follows '%'")]
    Scope,
    /// The text after the last colon is no port.
    #[error("the port must be a number from 1 to 65535")]
    Port,
    /// The text has no port, and there is no default.
    #[error("expected a port after the address, such as 127.0.0.1:628 or [::1]:628")]
    PortMissing,
}

/// Parses an address. A text without a port gets `default_port`, or an error if that is 0.
///
/// # Errors
/// Returns every [`EndpointError`].
pub fn parse(text: &[u8], default_port: u16) -> Result<Parsed, EndpointError> {
    match text {
        [] => Err(EndpointError::Empty),
        [b'/', ..] => {
            let path = local_name(text)?.to_vec();
            Ok(Parsed::Endpoint(Endpoint::Path(OsString::from_vec(path).into())))
        }
        [b'@'] => Err(EndpointError::NoName),
        [b'@', name @ ..] => Ok(Parsed::Endpoint(Endpoint::Abstract(local_name(name)?.to_vec()))),
        _ => {
            network_address(str::from_utf8(text).map_err(|_| EndpointError::Syntax)?, default_port)
        }
    }
}

fn local_name(name: &[u8]) -> Result<&[u8], EndpointError> {
    if name.contains(&0) {
        Err(EndpointError::Nul)
    } else if name.len() > MAX_LOCAL_NAME {
        Err(EndpointError::TooLong)
    } else {
        Ok(name)
    }
}

fn network_address(text: &str, default_port: u16) -> Result<Parsed, EndpointError> {
    let (host, port) = split_port(text)?;
    let port = match port {
        Some(digits) => port_number(digits)?,
        None if default_port == 0 => return Err(EndpointError::PortMissing),
        None => default_port,
    };
    if host.contains(':') {
        let address = ipv6(host, port)?;
        return Ok(Parsed::Endpoint(Endpoint::Inet(address.into())));
    }
    if let Ok(v4) = host.parse::<Ipv4Addr>() {
        return Ok(Parsed::Endpoint(Endpoint::Inet((IpAddr::from(v4), port).into())));
    }
    host_name(host)?;
    Ok(Parsed::Host { host: host.to_owned(), port })
}

/// Separates the port, if there is one, from the host, and removes the brackets of the host.
fn split_port(text: &str) -> Result<(&str, Option<&str>), EndpointError> {
    if let Some(inner) = text.strip_prefix('[') {
        let (host, rest) = inner.split_once(']').ok_or(EndpointError::Ipv6)?;
        if !host.contains(':') {
            return Err(EndpointError::Ipv6);
        }
        return match rest.strip_prefix(':') {
            Some(port) => Ok((host, Some(port))),
            None if rest.is_empty() => Ok((host, None)),
            None => Err(EndpointError::Ipv6),
        };
    }
    match text.split_once(':') {
        // A text with several colons and no brackets is an address without a port.
        Some((_, rest)) if rest.contains(':') => Ok((text, None)),
        Some((host, port)) => Ok((host, Some(port))),
        None => Ok((text, None)),
    }
}

fn port_number(digits: &str) -> Result<u16, EndpointError> {
    // `parse` alone would also accept a sign.
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|&port| plain && port != 0).ok_or(EndpointError::Port)
}

fn ipv6(text: &str, port: u16) -> Result<SocketAddrV6, EndpointError> {
    let (address, scope) = match text.split_once('%') {
        Some((address, scope)) => (address, scope_id(scope)?),
        None => (text, 0),
    };
    let address: Ipv6Addr = address.parse().map_err(|_| EndpointError::Ipv6)?;
    Ok(SocketAddrV6::new(address, port, 0, scope))
}

/// Returns the index of the interface for a scope, which is the index or the name of the interface
/// (RFC 4007 11).
fn scope_id(scope: &str) -> Result<u32, EndpointError> {
    if !scope.is_empty() && scope.bytes().all(|b| b.is_ascii_digit()) {
        return scope.parse().map_err(|_| EndpointError::Scope);
    }
    if_nametoindex(scope).map_err(|_| EndpointError::Scope)
}

fn host_name(host: &str) -> Result<(), EndpointError> {
    let name = host.strip_suffix('.').unwrap_or(host);
    if name.len() > MAX_HOST || !is_domain_name(name.as_bytes()) {
        return Err(EndpointError::Syntax);
    }
    // No top-level domain is a number, so the text is a mistyped IPv4 address.
    let last = name.rsplit('.').next().unwrap_or(name);
    if last.bytes().all(|b| b.is_ascii_digit()) { Err(EndpointError::Ipv4) } else { Ok(()) }
}

impl fmt::Display for Endpoint {
    /// Writes the address as a configuration has it, always with the port. Control characters
    /// become `?`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(address) => address.fmt(f),
            Self::Path(path) => f.write_str(&printable(path.as_os_str().as_bytes())),
            Self::Abstract(name) => write!(f, "@{}", printable(name)),
        }
    }
}

/// The form of an endpoint in messages. serde's own formats would drop the scope of an IPv6 address
/// and refuse a path that isn't UTF-8.
#[derive(Serialize, Deserialize)]
enum Wire {
    V4(Ipv4Addr, u16),
    V6(Ipv6Addr, u16, u32),
    Path(Vec<u8>),
    Abstract(Vec<u8>),
}

impl From<Wire> for Endpoint {
    fn from(wire: Wire) -> Self {
        match wire {
            Wire::V4(address, port) => Self::Inet((address, port).into()),
            Wire::V6(address, port, scope) => {
                Self::Inet(SocketAddrV6::new(address, port, 0, scope).into())
            }
            Wire::Path(path) => Self::Path(OsString::from_vec(path).into()),
            Wire::Abstract(name) => Self::Abstract(name),
        }
    }
}

impl From<Endpoint> for Wire {
    fn from(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Inet(SocketAddr::V4(v4)) => Self::V4(*v4.ip(), v4.port()),
            Endpoint::Inet(SocketAddr::V6(v6)) => Self::V6(*v6.ip(), v6.port(), v6.scope_id()),
            Endpoint::Path(path) => Self::Path(path.into_os_string().into_vec()),
            Endpoint::Abstract(name) => Self::Abstract(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_endpoints() {
        let table = [
            ("192.0.2.1", "192.0.2.1:628"),
            ("192.0.2.1:25", "192.0.2.1:25"),
            ("0.0.0.0:65535", "0.0.0.0:65535"),
            ("::1", "[::1]:628"),
            ("::", "[::]:628"),
            ("2001:db8::1", "[2001:db8::1]:628"),
            // Without brackets the last group is a part of the address, not a port.
            ("2001:db8::1:25", "[2001:db8::1:25]:628"),
            ("[::1]", "[::1]:628"),
            ("[::1]:4321", "[::1]:4321"),
            ("::ffff:192.0.2.1", "[::ffff:192.0.2.1]:628"),
            ("fe80::1%7", "[fe80::1%7]:628"),
            ("[fe80::1%7]:25", "[fe80::1%7]:25"),
            ("fe80::1%lo", "[fe80::1%1]:628"),
            ("/run/server5.sock", "/run/server5.sock"),
            ("/", "/"),
            ("/with:colon", "/with:colon"),
            ("@server4", "@server4"),
            ("@/x:y", "@/x:y"),
        ];
        for (text, shown) in table {
            match parse(text.as_bytes(), QMQP_PORT) {
                Ok(Parsed::Endpoint(endpoint)) => {
                    assert_eq!(endpoint.to_string(), shown, "{text}");
                    // The displayed form parses to the same endpoint again.
                    let again = parse(shown.as_bytes(), CONTROL_PORT);
                    assert_eq!(again, Ok(Parsed::Endpoint(endpoint)), "{shown}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn reads_hosts() {
        let table = [
            ("localhost", "localhost", 5479),
            ("server1.local:1234", "server1.local", 1234),
            ("a-b_c.example.", "a-b_c.example.", 5479),
            ("1and1.example", "1and1.example", 5479),
            ("host:1", "host", 1),
            ("::1.example:1", "", 0),
        ];
        for (text, host, port) in table {
            let expected = if host.is_empty() {
                Err(EndpointError::Ipv6)
            } else {
                Ok(Parsed::Host { host: host.to_owned(), port })
            };
            assert_eq!(parse(text.as_bytes(), POND_PORT), expected, "{text}");
        }
    }

    #[test]
    fn refuses() {
        use EndpointError::*;
        let table: &[(&[u8], EndpointError)] = &[
            (b"", Empty),
            (b"@", NoName),
            (b"/a\0b", Nul),
            (b"@a\0b", Nul),
            (b" ", Syntax),
            (b" localhost", Syntax),
            (b"relative/path", Syntax),
            (b"./socket", Syntax),
            (b"host name", Syntax),
            (b"-x", Syntax),
            (b"a..b", Syntax),
            (b".", Syntax),
            (b":628", Syntax),
            (b"\xff", Syntax),
            ("münchen.example".as_bytes(), Syntax),
            (b"localhost\n", Syntax),
            (b"192.0.2.1%lo", Syntax),
            (b"192.0.2", Ipv4),
            (b"192.0.2.256", Ipv4),
            (b"192.0.2.01:25", Ipv4),
            (b"1234", Ipv4),
            (b"[::1", Ipv6),
            (b"[]", Ipv6),
            (b"[::1]x", Ipv6),
            (b"[::1]628", Ipv6),
            (b"[::g]:628", Ipv6),
            (b"[192.0.2.1]:628", Ipv6),
            (b"[host]:628", Ipv6),
            (b"1:2:3", Ipv6),
            (b"a:b:c", Ipv6),
            (b"::1]:5", Ipv6),
            (b"fe80::1%", Scope),
            (b"fe80::1%no-such-if", Scope),
            (b"fe80::1%99999999999", Scope),
            (b"fe80::1%a\0b", Scope),
            (b"host:", Port),
            (b"host:0", Port),
            (b"host:65536", Port),
            (b"host:+25", Port),
            (b"host: 25", Port),
            (b"host:smtp", Port),
            (b"[::1]:", Port),
            (b"192.0.2.1:-1", Port),
        ];
        for (text, error) in table {
            let shown = String::from_utf8_lossy(text);
            assert_eq!(parse(text, QMQP_PORT), Err(error.clone()), "{shown:?}");
        }
    }

    #[test]
    fn a_default_of_zero_demands_a_port() {
        for text in ["127.0.0.1", "::1", "[::1]", "host"] {
            assert_eq!(parse(text.as_bytes(), 0), Err(EndpointError::PortMissing), "{text}");
        }
        for text in ["127.0.0.1:1", "[::1]:1", "host:1", "/path", "@name"] {
            assert!(parse(text.as_bytes(), 0).is_ok(), "{text}");
        }
    }

    #[test]
    fn names_have_a_longest() {
        let path = |n: usize| format!("/{}", "p".repeat(n - 1));
        assert!(parse(path(107).as_bytes(), 1).is_ok());
        assert_eq!(parse(path(108).as_bytes(), 1), Err(EndpointError::TooLong));
        let name = |n: usize| format!("@{}", "n".repeat(n));
        assert!(parse(name(107).as_bytes(), 1).is_ok());
        assert_eq!(parse(name(108).as_bytes(), 1), Err(EndpointError::TooLong));
        let host = |n: usize| format!("{}{}", "h.".repeat(n / 2), "h".repeat(n % 2));
        assert!(parse(host(253).as_bytes(), 1).is_ok());
        assert_eq!(parse(host(255).as_bytes(), 1), Err(EndpointError::Syntax));
    }

    #[test]
    fn shows_no_control_characters() {
        let path = Endpoint::Path(OsString::from_vec(b"/a\x1b\n".to_vec()).into());
        assert_eq!(path.to_string(), "/a??");
        assert_eq!(Endpoint::Abstract(b"\r".to_vec()).to_string(), "@?");
    }

    #[test]
    fn travels() {
        let texts: [&[u8]; 5] =
            [b"192.0.2.1:25", b"[fe80::1%7]:25", b"/a\xff", b"@b\xfe", b"[::1]:1"];
        for text in texts {
            let Ok(Parsed::Endpoint(endpoint)) = parse(text, 1) else { panic!("{text:?}") };
            let bytes = postcard::to_stdvec(&endpoint).expect("encodes");
            assert_eq!(postcard::from_bytes::<Endpoint>(&bytes), Ok(endpoint));
        }
    }
}
