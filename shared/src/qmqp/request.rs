//! A request as a server reads it.
//!
//! Contract: a server calls [`progress`] after each read with all bytes so far; the call takes the
//! same time however much has arrived. The server calls [`parse`] once, at the end. Both agree: an
//! input that `progress` refuses is refused by `parse` with the same error, and no beginning of a
//! valid request is ever refused. Nothing is copied: a [`Request`] consists of ranges into the
//! input.
//!
//! # Failure
//! Every error is a [`RequestError`], returned as early as the bytes show it: for a length over a
//! limit at the digit that exceeds it, so that no memory is reserved for that length, and for a
//! wrong comma as soon as it is there.

use std::ops::Range;

use smallvec::SmallVec;
use thiserror::Error;

use crate::address;
use crate::netstring::{Head, NetstringError, parse_head};
use crate::qmqp::{ENVELOPE_ALLOWANCE, MAX_RECIPIENTS};
use crate::texts;

/// The requests that a listener accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits<'d> {
    /// Largest message in bytes.
    pub max_size: usize,
    /// The domain of addresses without a domain; without it they are refused.
    pub default_domain: Option<&'d str>,
}

impl Limits<'_> {
    /// Returns the largest payload of the whole request in bytes.
    fn max_payload(&self) -> usize {
        self.max_size.saturating_add(ENVELOPE_ALLOWANCE)
    }
}

/// The reason why a request is refused for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RequestError {
    /// The input is no QMQP request, or a request without a recipient.
    #[error("{}", texts::MALFORMED_INPUT)]
    Malformed,
    /// The message exceeds `max_size`, or the request exceeds `max_size` plus
    /// `ENVELOPE_ALLOWANCE`.
    #[error("{}", texts::MESSAGE_TOO_LARGE)]
    MessageTooLarge,
    /// The request has more than [`MAX_RECIPIENTS`] recipients.
    #[error("{}", texts::TOO_MANY_RECIPIENTS)]
    TooManyRecipients,
    /// The sender or a recipient is no valid address.
    #[error("{}", texts::BAD_ADDRESS)]
    BadAddress,
}

impl RequestError {
    /// Returns the text for the client, to be sent with
    /// [`Status::Permanent`](super::Status::Permanent).
    pub fn reply_text(&self) -> &'static str {
        match self {
            Self::Malformed => texts::MALFORMED_INPUT,
            Self::MessageTooLarge => texts::MESSAGE_TOO_LARGE,
            Self::TooManyRecipients => texts::TOO_MANY_RECIPIENTS,
            Self::BadAddress => texts::BAD_ADDRESS,
        }
    }
}

impl From<NetstringError> for RequestError {
    fn from(error: NetstringError) -> Self {
        match error {
            NetstringError::Malformed => Self::Malformed,
            NetstringError::TooLarge => Self::MessageTooLarge,
        }
    }
}

/// The progress of a request that arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The request is incomplete, and the bytes so far are valid.
    NeedMore {
        /// Length of the whole request in bytes, if known.
        total: Option<usize>,
    },
    /// The request is complete. Bytes after `total` don't belong to it.
    Complete {
        /// Length of the whole netstring in bytes, including head and final comma.
        total: usize,
    },
}

/// Returns the progress of a request, given all of its bytes so far.
///
/// # Errors
/// Returns [`RequestError::Malformed`] or [`RequestError::MessageTooLarge`]; [`parse`] finds the
/// other errors.
pub fn progress(input: &[u8], limits: &Limits<'_>) -> Result<Progress, RequestError> {
    let Some(payload) = frame(input, limits.max_payload())? else {
        return Ok(Progress::NeedMore { total: None });
    };
    let arrived = &input[payload.start..payload.end.min(input.len())];
    match frame(arrived, limits.max_size)? {
        Some(message) if message.end >= payload.len() => return Err(RequestError::Malformed),
        None if arrived.len() == payload.len() => return Err(RequestError::Malformed),
        _ => {}
    }
    let total = payload.end + 1;
    if input.len() < total {
        return Ok(Progress::NeedMore { total: Some(total) });
    }
    Ok(Progress::Complete { total })
}

/// Returns the range of the payload of the netstring at the start of `input`, also if the payload
/// has not arrived yet, or `None` if the head is incomplete. The final comma is checked if it is
/// there.
fn frame(input: &[u8], max: usize) -> Result<Option<Range<usize>>, RequestError> {
    // The sum of head, payload and comma must not overflow.
    let max = max.min(usize::MAX - 64);
    let Head::Complete { len, header } = parse_head(input, max)? else { return Ok(None) };
    let payload = header..header + len;
    match input.get(payload.end) {
        Some(b',') | None => Ok(Some(payload)),
        Some(_) => Err(RequestError::Malformed),
    }
}

/// The ranges of the recipients, stored without the heap for one recipient, as most mails have.
pub(crate) type Recipients = SmallVec<[Range<usize>; 1]>;

/// The parts of a request, as ranges into its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The message: header, empty line, body.
    pub message: Range<usize>,
    /// The sender's address; empty for the null reverse-path.
    pub sender: Range<usize>,
    /// The recipients' addresses, 1 to [`MAX_RECIPIENTS`].
    pub recipients: Recipients,
    /// The payload of the outer netstring.
    pub payload: Range<usize>,
}

/// Parses a complete request. Bytes after its netstring are ignored. The addresses are those that
/// the client sent; the caller adds the default domain ([`address::complete`]).
///
/// # Errors
/// Returns any [`RequestError`]. Errors of the syntax come before errors of the addresses.
pub fn parse(input: &[u8], limits: &Limits<'_>) -> Result<Request, RequestError> {
    let Progress::Complete { total } = progress(input, limits)? else {
        return Err(RequestError::Malformed);
    };
    let end = total - 1;
    let payload = frame(input, limits.max_payload())?.ok_or(RequestError::Malformed)?;
    let message = item(input, payload.start..end, limits.max_size)?;
    let sender = item(input, message.end + 1..end, usize::MAX)?;
    let recipients = recipients(input, sender.end + 1..end)?;
    let complete =
        |addr: &Range<usize>| address::complete(&input[addr.clone()], limits.default_domain);
    if !address::is_valid_sender(&complete(&sender))
        || !recipients.iter().all(|recipient| address::is_valid(&complete(recipient)))
    {
        return Err(RequestError::BadAddress);
    }
    Ok(Request { message, sender, recipients, payload })
}

fn recipients(input: &[u8], mut rest: Range<usize>) -> Result<Recipients, RequestError> {
    let mut found = Recipients::new();
    while !rest.is_empty() {
        if found.len() == MAX_RECIPIENTS {
            return Err(RequestError::TooManyRecipients);
        }
        let recipient = item(input, rest.clone(), usize::MAX)?;
        rest.start = recipient.end + 1;
        found.push(recipient);
    }
    if found.is_empty() { Err(RequestError::Malformed) } else { Ok(found) }
}

/// Returns the range of the payload of the netstring at the start of `input[within]`, which must
/// contain the whole netstring.
fn item(input: &[u8], within: Range<usize>, max: usize) -> Result<Range<usize>, RequestError> {
    let text = &input[within.clone()];
    let payload = match frame(text, max) {
        Ok(Some(payload)) if payload.end < text.len() => payload,
        // Only the message has a limit of its own; any other item is just longer than the space for
        // it.
        Err(RequestError::MessageTooLarge) if max < usize::MAX => {
            return Err(RequestError::MessageTooLarge);
        }
        _ => return Err(RequestError::Malformed),
    };
    Ok(within.start + payload.start..within.start + payload.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmqp::encode_request;

    const SMALL: Limits<'_> = Limits { max_size: 1024, default_domain: None };

    fn wrap(payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        crate::netstring::encode_into(&mut out, payload);
        out
    }

    #[test]
    fn takes_a_request_apart() {
        let input = b"31:6:a: b\n\n,5:s@x.y,3:r@x,5:q@x.y,,trailing";
        let request = parse(input, &SMALL).expect("valid");
        assert_eq!(&input[request.message], b"a: b\n\n");
        assert_eq!(&input[request.sender], b"s@x.y");
        let recipients: Vec<_> = request.recipients.iter().map(|r| &input[r.clone()]).collect();
        assert_eq!(recipients, [&b"r@x"[..], b"q@x.y"]);
        assert_eq!(request.payload, 3..34);
        assert_eq!(progress(input, &SMALL), Ok(Progress::Complete { total: 35 }));
    }

    #[test]
    fn null_sender_and_empty_message() {
        let input = encode_request(b"", b"", [b"r@x"]);
        let request = parse(&input, &SMALL).expect("valid");
        assert!(request.message.is_empty() && request.sender.is_empty());
    }

    #[test]
    fn no_beginning_of_a_valid_request_is_refused() {
        let input = encode_request(&[b'm'; 300], b"s@x", [&b"r@x"[..], b"q@[192.0.2.1]"]);
        let mut known = None;
        for end in 0..input.len() {
            match progress(&input[..end], &SMALL) {
                Ok(Progress::NeedMore { total }) => {
                    assert!(known.is_none() || known == total, "total changed at {end}");
                    known = total;
                }
                other => panic!("{other:?} after {end} bytes"),
            }
            assert_eq!(parse(&input[..end], &SMALL), Err(RequestError::Malformed));
        }
        assert_eq!(known, Some(input.len()));
        assert_eq!(progress(&input, &SMALL), Ok(Progress::Complete { total: input.len() }));
    }

    #[test]
    fn progress_refuses_early() {
        use RequestError::{Malformed, MessageTooLarge};
        let table: &[(&[u8], RequestError)] = &[
            (b"G", Malformed),
            (b":", Malformed),
            (b"-1", Malformed),
            (b"00", Malformed),
            (b"012:", Malformed),
            (b"12 ", Malformed),
            // Over the limit of the whole request: 1024 + 300,000.
            (b"301025", MessageTooLarge),
            (b"99999999999999999999999", MessageTooLarge),
            // Over the limit of the message.
            (b"2000:1025", MessageTooLarge),
            (b"2000:9999", MessageTooLarge),
            // Without room for a message, or for the parts after it.
            (b"0:", Malformed),
            (b"1:1", Malformed),
            (b"2:1:", Malformed),
            (b"9:9:", Malformed),
            (b"8:6:", Malformed),
            (b"2:12", Malformed),
            (b"20:01", Malformed),
            (b"20:x", Malformed),
            // With a wrong byte in place of a comma.
            (b"20:1:ab", Malformed),
            (b"14:0:,0:,5:a@b.c,;", Malformed),
        ];
        for (input, error) in table {
            let shown = String::from_utf8_lossy(input);
            assert_eq!(progress(input, &SMALL), Err(*error), "{shown}");
            assert_eq!(parse(input, &SMALL), Err(*error), "{shown}");
        }
    }

    #[test]
    fn progress_waits_while_nothing_is_wrong() {
        let table: &[(&[u8], Option<usize>)] = &[
            (b"", None),
            (b"3", None),
            (b"301024", None),
            (b"301024:", Some(301_032)),
            (b"2000:1024:", Some(2006)),
            (b"9:6:", Some(12)),
            (b"1:", Some(4)),
            (b"20:", Some(24)),
            (b"20:1:a", Some(24)),
            (b"20:1:a,", Some(24)),
        ];
        for (input, total) in table {
            let shown = String::from_utf8_lossy(input);
            let expected = Ok(Progress::NeedMore { total: *total });
            assert_eq!(progress(input, &SMALL), expected, "{shown}");
        }
    }

    #[test]
    fn parse_refuses() {
        use RequestError::{BadAddress, Malformed, MessageTooLarge};
        let table: &[(&[u8], RequestError)] = &[
            (b"", Malformed),
            (b"1:m,", Malformed),
            (b"1:m,3:s@x,", Malformed),
            (b"1:m,3:s@x,3:r@x", Malformed),
            (b"1:m,3:s@x,3:r@x;", Malformed),
            (b"1:m,3:s@x,4:r@x,", Malformed),
            (b"1:m,3:s@x,03:r@x,", Malformed),
            (b"1:m,3:s@x,3:r@x,x", Malformed),
            (b"1:m,3:s@x,99999999999999999999999:r@x,", Malformed),
            (b"1:m,99999999999999999999999:s@x,3:r@x,", Malformed),
            (b"1025:m,3:s@x,3:r@x,", MessageTooLarge),
            (b"1:m,1:s,3:r@x,", BadAddress),
            (b"1:m,3:s@x,0:,", BadAddress),
            (b"1:m,0:,3:r@x,0:,", BadAddress),
            (b"1:m,3:s@x,3:r x,", BadAddress),
            // The error about the syntax comes first, whatever the addresses are.
            (b"1:m,1:s,3:r@x,x", Malformed),
        ];
        for (payload, error) in table {
            let shown = String::from_utf8_lossy(payload);
            assert_eq!(parse(&wrap(payload), &SMALL), Err(*error), "{shown}");
        }
    }

    #[test]
    fn counts_recipients() {
        let recipient = format!("{}@x", "r".repeat(64));
        let most = vec![recipient.as_bytes(); MAX_RECIPIENTS];
        let input = encode_request(&[b'm'; 1024], b"", &most);
        let request = parse(&input, &SMALL).expect("as many as allowed");
        assert_eq!(request.recipients.len(), MAX_RECIPIENTS);
        let input = encode_request(b"m", b"", most.iter().chain([&&b"r@x"[..]]));
        assert_eq!(parse(&input, &SMALL), Err(RequestError::TooManyRecipients));
    }

    #[test]
    fn allowance_holds_the_largest_envelope() {
        let longest = format!("{}@{}{}", "l".repeat(64), "d.".repeat(94), "d");
        assert_eq!(longest.len(), address::MAX_ADDRESS);
        let most = vec![longest.as_bytes(); MAX_RECIPIENTS];
        let input = encode_request(&[b'm'; 1024], longest.as_bytes(), &most);
        assert!(parse(&input, &SMALL).is_ok());
    }

    #[test]
    fn a_default_domain_completes_addresses() {
        let limits = Limits { default_domain: Some("example.com"), ..SMALL };
        let input = encode_request(b"m", b"root", [&b"www-data"[..], b"r@x"]);
        assert_eq!(parse(&input, &SMALL), Err(RequestError::BadAddress));
        let request = parse(&input, &limits).expect("completed");
        assert_eq!(&input[request.sender], b"root");
        let longest = "r".repeat(address::MAX_ADDRESS - "@example.com".len());
        for (sender, recipient, valid) in
            [("", longest.clone(), true), ("", longest + "r", false), ("a b", "r".into(), false)]
        {
            let input = encode_request(b"m", sender.as_bytes(), [&recipient]);
            assert_eq!(parse(&input, &limits).is_ok(), valid, "{recipient}");
        }
        let input = encode_request(b"m", b"", [b""]);
        assert_eq!(parse(&input, &limits), Err(RequestError::BadAddress));
    }

    #[test]
    fn limits_without_bound_do_not_overflow() {
        let limits = Limits { max_size: usize::MAX, default_domain: None };
        let input = format!("{}:{}:", usize::MAX, usize::MAX);
        assert_eq!(progress(input.as_bytes(), &limits), Err(RequestError::MessageTooLarge));
    }

    #[test]
    fn texts() {
        use RequestError::{BadAddress, Malformed, MessageTooLarge, TooManyRecipients};
        for error in [BadAddress, Malformed, MessageTooLarge, TooManyRecipients] {
            assert_eq!(error.to_string(), error.reply_text());
        }
    }
}
