//! What a browser or Prometheus asks for: the head of an HTTP request, taken apart and judged.
//!
//! Pure. Contract: bytes in, a [`Request`] or a refusal out. Only GET and HEAD are known. A body is
//! never read.
//!
//! # Failure
//! Every head that isn't understood or isn't allowed has a [`Refusal`], which is an HTTP status.

use std::net::IpAddr;

/// Most bytes of a request's head. Browsers send a tenth of that.
pub const HEAD_MAX: usize = 8 * 1024;
/// Most header lines of a request.
const HEADERS_MAX: usize = 64;

/// A request that may be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Whether only the head of the answer is wanted.
    pub head_only: bool,
    /// The path, without a query.
    pub path: String,
    /// The form in which metrics are wanted.
    pub format: Format,
}

/// The forms of `/metrics`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Prometheus's text format, version 0.0.4.
    Text,
    /// OpenMetrics, version 1.0.0.
    OpenMetrics,
}

impl Format {
    /// Returns the value of the header line Content-Type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Why a request isn't answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The head is no HTTP.
    Malformed,
    /// The method is neither GET nor HEAD.
    Method,
    /// The head is too long or has too many lines.
    TooLong,
    /// The name of the host isn't one of this machine's own.
    Host,
}

/// Which hosts a request may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hosts {
    /// Only names of the loopback interface. A page from elsewhere whose name was made to resolve
    /// to 127.0.0.1 (DNS rebinding) can't read what is shown here.
    Loopback,
    /// Any name. Whoever reaches the address may see what is shown there.
    Any,
}

/// Takes the head of a request apart. Returns `None` while it isn't complete.
///
/// # Errors
/// Returns why the request is refused.
pub fn parse(bytes: &[u8], hosts: Hosts) -> Result<Option<Request>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Request::new(&mut headers);
    match head.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if bytes.len() >= HEAD_MAX => return Err(Refusal::TooLong),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Refusal::TooLong),
        Err(_) => return Err(Refusal::Malformed),
    }
    let head_only = match head.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Err(Refusal::Method),
    };
    let mut names = values(head.headers, "host");
    match (names.next(), names.next()) {
        (Some(name), None) if host_allowed(name, hosts) => {}
        (Some(_), None) => return Err(Refusal::Host),
        // No browser sends the old version of HTTP, which has no host.
        (None, _) if head.version == Some(0) => {}
        _ => return Err(Refusal::Malformed),
    }
    let target = head.path.unwrap_or("/");
    Ok(Some(Request {
        head_only,
        path: target.split(['?', '#']).next().unwrap_or("/").to_owned(),
        format: format(values(head.headers, "accept")),
    }))
}

/// Returns the values of all header lines of that name. Values that are no text are left out.
fn values<'h>(
    headers: &'h [httparse::Header<'h>],
    name: &'h str,
) -> impl Iterator<Item = &'h str> + 'h {
    headers
        .iter()
        .filter(move |header| header.name.eq_ignore_ascii_case(name))
        .map(|header| str::from_utf8(header.value).unwrap_or("").trim())
}

fn host_allowed(host: &str, hosts: Hosts) -> bool {
    match hosts {
        Hosts::Any => true,
        Hosts::Loopback => {
            let name = without_port(host);
            name.eq_ignore_ascii_case("localhost")
                || name.parse().is_ok_and(|address: IpAddr| address.to_canonical().is_loopback())
        }
    }
}

/// Returns a host without its port, and an IPv6 address without its brackets.
fn without_port(host: &str) -> &str {
    if let Some((address, _)) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return address;
    }
    host.rsplit_once(':').map_or(host, |(name, _)| name)
}

/// Chooses the form of metrics. OpenMetrics must be asked for by name, and be wanted at least as
/// much as text.
fn format<'h>(accept: impl Iterator<Item = &'h str>) -> Format {
    let (mut open, mut text) = (0.0_f32, 0.0_f32);
    for range in accept.flat_map(|line| line.split(',')) {
        let mut parts = range.split(';').map(str::trim);
        let kind = parts.next().unwrap_or("").to_ascii_lowercase();
        let quality = parts
            .filter_map(|part| part.split_once('='))
            .find(|(name, _)| name.trim().eq_ignore_ascii_case("q"))
            .map_or(1.0, |(_, value)| value.trim().parse().unwrap_or(0.0));
        match kind.as_str() {
            "application/openmetrics-text" => open = open.max(quality),
            "text/plain" => text = text.max(quality),
            _ => {}
        }
    }
    if open > 0.0 && open >= text { Format::OpenMetrics } else { Format::Text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(lines: &str) -> Result<Option<Request>, Refusal> {
        let head = format!("GET / HTTP/1.1\r\n{}\r\n", lines.replace('\n', "\r\n"));
        parse(head.as_bytes(), Hosts::Loopback)
    }

    #[test]
    fn a_head_is_read_when_it_is_complete() {
        let head = b"HEAD /metrics?x=1 HTTP/1.1\r\nHost: localhost:9628\r\n\r\n";
        for length in 0..head.len() {
            assert_eq!(parse(&head[..length], Hosts::Loopback), Ok(None), "{length}");
        }
        let request = parse(head, Hosts::Loopback).expect("allowed").expect("complete");
        assert_eq!(
            request,
            Request { head_only: true, path: "/metrics".into(), format: Format::Text }
        );
    }

    #[test]
    fn other_requests_are_refused() {
        let cases: [(&[u8], Refusal); 7] = [
            (b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", Refusal::Method),
            (b"GET / HTTP/1.1\r\n\r\n", Refusal::Malformed),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", Refusal::Malformed),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", Refusal::Malformed),
            (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", Refusal::Host),
            (&[b'G'; HEAD_MAX], Refusal::TooLong),
            (&[&b"GET / HTTP/1.1\r\n"[..], &b"A: b\r\n".repeat(99)].concat(), Refusal::TooLong),
        ];
        for (head, refusal) in cases {
            assert_eq!(parse(head, Hosts::Loopback), Err(refusal), "{}", head.escape_ascii());
        }
    }

    #[test]
    fn only_names_of_the_loopback_interface_are_taken_there() {
        let cases = [
            ("localhost", true),
            ("LOCALHOST:9628", true),
            ("127.0.0.1", true),
            ("127.0.0.1:9628", true),
            ("127.9.9.9:1", true),
            ("[::1]:9628", true),
            ("[::1]", true),
            ("[::ffff:127.0.0.1]:9628", true),
            ("[::ffff:192.0.2.1]", false),
            ("192.0.2.1", false),
            ("127.0.0.1.evil.example", false),
            ("localhost.evil.example:9628", false),
            ("evil.example", false),
            ("[::2]:9628", false),
            ("", false),
        ];
        for (host, allowed) in cases {
            assert_eq!(get(&format!("Host: {host}\n")).is_ok(), allowed, "{host}");
            assert!(host_allowed(host, Hosts::Any), "{host}");
        }
        assert!(parse(b"GET / HTTP/1.0\r\n\r\n", Hosts::Loopback).is_ok_and(|r| r.is_some()));
    }

    #[test]
    fn the_form_of_metrics_is_what_the_client_prefers() {
        let prometheus = "Accept: application/openmetrics-text;version=1.0.0;q=0.5,\
                          application/openmetrics-text;version=0.0.1;q=0.4,\
                          text/plain;version=0.0.4;q=0.3,*/*;q=0.2\n";
        let cases = [
            ("", Format::Text),
            (prometheus, Format::OpenMetrics),
            ("Accept: */*\n", Format::Text),
            ("Accept: text/html\n", Format::Text),
            ("Accept: application/openmetrics-text\n", Format::OpenMetrics),
            ("Accept: application/openmetrics-text; q=0\n", Format::Text),
            ("Accept: text/plain, application/openmetrics-text;q=0.9\n", Format::Text),
            (
                "accept: text/plain;q=0.1\nACCEPT: Application/OpenMetrics-Text\n",
                Format::OpenMetrics,
            ),
            ("Accept: application/openmetrics-text;q=much\n", Format::Text),
        ];
        for (lines, format) in cases {
            let request = get(&format!("Host: localhost\n{lines}"));
            assert_eq!(request.map(|r| r.map(|r| r.format)), Ok(Some(format)), "{lines}");
        }
    }
}
