//! Answers to HTTP requests.
//!
//! Pure. Contract: an answer is complete in memory and is the last one of its connection. Its
//! header lines forbid browsers to keep it, to guess its type, to show it within another page, and
//! to run anything but the page's own script.

use std::sync::Arc;

use crate::web::request::Refusal;

/// Header lines that every answer has.
const ALWAYS: &str = "Connection: close\r\n\
                      Cache-Control: no-store\r\n\
                      X-Content-Type-Options: nosniff\r\n\
                      X-Frame-Options: DENY\r\n\
                      Referrer-Policy: no-referrer\r\n\
                      Cross-Origin-Opener-Policy: same-origin\r\n\
                      Cross-Origin-Resource-Policy: same-origin\r\n";
/// The policy of what is no page: nothing may be loaded or run.
const NO_CONTENT: &str = "default-src 'none'; frame-ancestors 'none'";

/// An answer.
#[derive(Debug, Clone)]
pub struct Response {
    status: &'static str,
    content_type: &'static str,
    policy: String,
    body: Arc<str>,
}

impl Response {
    /// Returns an answer with a body of this type.
    pub fn new(content_type: &'static str, body: Arc<str>) -> Self {
        Self { status: "200 OK", content_type, policy: NO_CONTENT.to_owned(), body }
    }

    /// Returns a page whose one script and one style have this nonce.
    pub fn page(body: String, nonce: &str) -> Self {
        let policy = format!(
            "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
             connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
             frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
        );
        Self { policy, ..Self::new("text/html; charset=utf-8", body.into()) }
    }

    /// Returns an answer that says in one line why there is no other.
    pub fn failure(status: &'static str, text: &str) -> Self {
        Self { status, ..Self::new("text/plain; charset=utf-8", format!("{text}\n").into()) }
    }

    /// Returns the lines in front of the body.
    pub fn head(&self) -> String {
        let Self { status, content_type, policy, body } = self;
        let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\
             Content-Security-Policy: {policy}\r\n{allow}{ALWAYS}\r\n",
            body.len()
        )
    }

    /// Returns the body.
    pub fn body(&self) -> &[u8] {
        self.body.as_bytes()
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Malformed => Self::failure("400 Bad Request", "this is no HTTP request"),
            Refusal::Method => {
                Self::failure("405 Method Not Allowed", "only GET and HEAD are known")
            }
            Refusal::TooLong => {
                Self::failure("431 Request Header Fields Too Large", "the request is too long")
            }
            Refusal::Host => Self::failure(
                "421 Misdirected Request",
                "this address answers only to localhost and addresses of the loopback interface",
            ),
        }
    }
}
