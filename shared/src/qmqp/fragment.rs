//! What can be told of a request that is no mail, because it is refused or never became complete.
//!
//! Contract: the parser takes what it finds, and breaks none of its own limits for that: it goes
//! from netstring to netstring until one isn't there. It runs once, for the log.
//!
//! # Failure
//! None: of foreign bytes nothing is told but how they begin.

use crate::address::{self, MAX_ADDRESS, complete, escape_for_log, printable};
use crate::netstring::{Head, parse_head};
use crate::qmqp::request::{Limits, RequestError};
use crate::qmqp::{ENVELOPE_ALLOWANCE, MAX_RECIPIENTS};

/// How many recipients are told.
const SHOWN: usize = 5;

/// Most bytes that are shown of what is no request.
const BEGINNING: usize = 32;

/// The parts of a request that have arrived.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Fragment<'a> {
    input: &'a [u8],
    /// Length of the request's payload, as announced.
    payload: Option<usize>,
    /// Length of the message, as announced.
    message: Option<usize>,
    /// The sender.
    pub sender: Option<&'a [u8]>,
    /// The first recipients.
    pub recipients: Vec<&'a [u8]>,
    /// Number of all recipients.
    pub count: u32,
    /// The first recipient that isn't valid.
    bad: Option<&'a [u8]>,
}

impl<'a> Fragment<'a> {
    /// Finds the parts. Addresses without a domain have the default domain.
    pub fn of(input: &'a [u8], default_domain: Option<&str>) -> Self {
        let mut fragment = Self { input, ..Self::default() };
        let Some((payload, rest)) = head(input) else { return fragment };
        fragment.payload = Some(payload);
        let rest = &rest[..rest.len().min(payload)];
        let Some((message, _)) = head(rest) else { return fragment };
        fragment.message = Some(message);
        let Some((_, rest)) = item(rest) else { return fragment };
        let Some((sender, mut rest)) = item(rest) else { return fragment };
        fragment.sender = Some(sender);
        while let Some((recipient, after)) = item(rest) {
            fragment.count = fragment.count.saturating_add(1);
            if fragment.recipients.len() < SHOWN {
                fragment.recipients.push(recipient);
            }
            if fragment.bad.is_none() && !address::is_valid(&complete(recipient, default_domain)) {
                fragment.bad = Some(recipient);
            }
            rest = after;
        }
        fragment
    }

    /// Returns which rule the request breaks, and with what.
    pub fn cause(&self, error: RequestError, limits: &Limits<'_>) -> String {
        let (max_size, bytes) = (limits.max_size, self.input.len());
        let named = |kind: &str, addr: &[u8]| {
            let rule = fault(&complete(addr, limits.default_domain));
            format!("{kind} <{}>: {rule}", escape_for_log(addr))
        };
        let valid =
            |sender: &[u8]| address::is_valid_sender(&complete(sender, limits.default_domain));
        match error {
            RequestError::MessageTooLarge => match (self.message, self.payload) {
                (Some(message), _) if message > max_size => {
                    format!("a message of {message} bytes, max_size={max_size}")
                }
                (_, Some(payload)) => {
                    let most = max_size.saturating_add(ENVELOPE_ALLOWANCE);
                    format!("a request of {payload} bytes, at most {most}")
                }
                (_, None) => format!("a length that begins with {}", self.beginning()),
            },
            RequestError::TooManyRecipients => {
                format!("{} recipients, at most {MAX_RECIPIENTS}", self.count)
            }
            RequestError::BadAddress => match (self.sender, self.bad) {
                (Some(sender), _) if !valid(sender) => named("sender", sender),
                (_, Some(bad)) => named("recipient", bad),
                (_, None) => "a bad address".to_owned(),
            },
            RequestError::Malformed if self.sender.is_some() && self.count == 0 => {
                "no recipient".to_owned()
            }
            RequestError::Malformed if self.sender.is_some() => {
                format!("no netstring after {} recipients", self.count)
            }
            RequestError::Malformed => {
                format!("{bytes} bytes that are no request: {}", self.beginning())
            }
        }
    }

    /// Returns how much of the request has arrived.
    pub fn progress(&self) -> String {
        let bytes = self.input.len();
        match self.payload {
            Some(payload) => format!("{bytes} bytes of a request of {payload}"),
            None => format!("{bytes} bytes: {}", self.beginning()),
        }
    }

    fn beginning(&self) -> String {
        let shown = printable(&self.input[..self.input.len().min(BEGINNING)]);
        format!("'{shown}{}'", if self.input.len() > BEGINNING { "…" } else { "" })
    }
}

/// Returns the length of the netstring at the start of `input`, and what follows its head.
fn head(input: &[u8]) -> Option<(usize, &[u8])> {
    match parse_head(input, usize::MAX) {
        Ok(Head::Complete { len, header }) => Some((len, &input[header..])),
        _ => None,
    }
}

/// Returns the netstring at the start of `input`, if all of it is there, and what follows it.
fn item(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = head(input)?;
    let (item, rest) = rest.split_at_checked(length)?;
    Some((item, rest.strip_prefix(b",")?))
}

/// Returns the rule that an address breaks.
fn fault(address: &[u8]) -> &'static str {
    if address.len() > MAX_ADDRESS {
        return "longer than 254 bytes";
    }
    let Some(at) = address.iter().rposition(|&byte| byte == b'@') else { return "no @" };
    match address::is_valid(&[b"x", &address[at..]].concat()) {
        true => "no valid local part",
        false => "no valid domain",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmqp::{encode_request, parse};

    const LIMITS: Limits<'_> = Limits { max_size: 100, default_domain: None };

    fn cause(input: &[u8]) -> String {
        let error = parse(input, &LIMITS).expect_err("a bad request");
        Fragment::of(input, None).cause(error, &LIMITS)
    }

    #[test]
    fn the_rule_is_named_with_what_breaks_it() {
        let request = |sender: &[u8], recipients: &[&[u8]]| {
            encode_request(b"m", sender, recipients.iter().copied())
        };
        for (input, expected) in [
            (request(b"s", &[b"r@x"]), "sender <s>: no @"),
            (request(b"a b@x", &[b"r@x"]), "sender <a b@x>: no valid local part"),
            (
                request(b"", &[b"r@x", b"<q\n>@y"]),
                "recipient <\\x3cq?\\x3e@y>: no valid local part",
            ),
            (request(b"", &[b"r@x", b"r@-y"]), "recipient <r@-y>: no valid domain"),
            (request(b"", &[b""]), "recipient <>: no @"),
            (
                request(b"", &[&[b'r'; 255]]),
                &format!("recipient <{}>: longer than 254 bytes", "r".repeat(255)),
            ),
            (request(b"", &[]), "no recipient"),
            (request(b"", &vec![&b"r@x"[..]; 1025]), "1025 recipients, at most 1024"),
            (encode_request(&[b'm'; 101], b"", [b"r@x"]), "a message of 101 bytes, max_size=100"),
            (b"300101:".to_vec(), "a request of 300101 bytes, at most 300100"),
            (
                b"99999999999999999999999:".to_vec(),
                "a length that begins with '99999999999999999999999:'",
            ),
            (b"9:1:m,0:,x,".to_vec(), "no recipient"),
            (b"15:1:m,0:,3:r@x,x,".to_vec(), "no netstring after 1 recipients"),
            (
                b"GET / HTTP/1.0\r\nHost: example.org\r\n\r\n".to_vec(),
                "37 bytes that are no request: 'GET / HTTP/1.0??Host: example.or…'",
            ),
        ] {
            assert_eq!(cause(&input), expected);
        }
    }

    #[test]
    fn addresses_have_the_default_domain() {
        let limits = Limits { default_domain: Some("example.com"), ..LIMITS };
        let input = encode_request(b"m", b"root", [&b"nobody"[..], b"a b"]);
        let error = parse(&input, &limits).expect_err("a bad recipient");
        let cause = Fragment::of(&input, limits.default_domain).cause(error, &limits);
        assert_eq!(cause, "recipient <a b>: no valid local part");
    }

    #[test]
    fn the_envelope_is_told_as_far_as_it_is_there() {
        let input = encode_request(b"m", b"s@x", (0..7).map(|n| format!("r{n}@x")));
        let whole = Fragment::of(&input, None);
        assert_eq!((whole.sender, whole.count), (Some(&b"s@x"[..]), 7));
        assert_eq!(whole.recipients, [b"r0@x", b"r1@x", b"r2@x", b"r3@x", b"r4@x"]);
        let mut last = 0;
        for end in 0..input.len() {
            let part = Fragment::of(&input[..end], None);
            assert!(part.count >= last && part.count <= 7, "{end}");
            last = part.count;
        }
        assert_eq!(Fragment::of(&input[..9], None).progress(), "9 bytes of a request of 59");
        assert_eq!(Fragment::of(b"59", None).progress(), "2 bytes: '59'");
    }
}
