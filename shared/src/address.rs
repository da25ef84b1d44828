//! E-mail addresses: the check whether an address is valid, and the display of text from other
//! programs.
//!
//! Contract: an address is `local@domain`, at most 254 bytes (RFC 5321 4.5.3.1.3, less the angle
//! brackets), split at the last `@`. The local part is a dot-atom of RFC 5322 atext, or a quoted
//! string of the bytes 33–126 without `"`. A local part may be longer than the 64 bytes of RFC 5321
//! 4.5.3.1.1, because senders of SRS, BATV and VERP are, and refusing them would lose mail. The
//! domain is an address literal (RFC 5321 4.1.3) or consists of labels of letters, digits, `-` and
//! `_`, because domains with `_` exist. Every function takes time linear in the length of its
//! input.
//!
//! # Failure
//! The checks return a boolean. The functions that make text printable accept any bytes.

use std::borrow::Cow;
use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Longest address in bytes.
pub const MAX_ADDRESS: usize = 254;
/// Longest label of a domain name in bytes (RFC 1035 2.3.4).
const MAX_LABEL: usize = 63;

/// A set of bytes. A table lookup per byte is fast, and makes up most of the check of an address.
type Set = [bool; 256];

/// The bytes of an atom: atext of RFC 5322 3.2.3.
const ATEXT: Set = alphanumeric_and(b"!#$%&'*+-/=?^_`{|}~");
/// The bytes of a label of a domain name.
const LABEL: Set = alphanumeric_and(b"-_");
/// The bytes that [`printable`] leaves as they are: printable ASCII.
const PLAIN: Set = plain_without(b"");
/// The bytes that [`escape_for_log`] leaves as they are: printable ASCII without [`LIST_SYNTAX`].
const PLAIN_IN_LIST: Set = plain_without(LIST_SYNTAX);

/// The bytes that delimit addresses in logs and Pond records, and the byte that escapes them.
const LIST_SYNTAX: &[u8] = b"\\<>,";

const fn alphanumeric_and(others: &[u8]) -> Set {
    let mut set = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        set[byte] = (byte as u8).is_ascii_alphanumeric();
        byte += 1;
    }
    with(set, others, true)
}

const fn plain_without(others: &[u8]) -> Set {
    let mut set = [false; 256];
    let mut byte = b' ';
    while byte <= b'~' {
        set[byte as usize] = true;
        byte += 1;
    }
    with(set, others, false)
}

const fn with(mut set: Set, bytes: &[u8], member: bool) -> Set {
    let mut at = 0;
    while at < bytes.len() {
        set[bytes[at] as usize] = member;
        at += 1;
    }
    set
}

fn all_in(text: &[u8], set: &Set) -> bool {
    text.iter().all(|&byte| set[usize::from(byte)])
}

/// Returns whether `addr` is an address that mail can be sent to.
pub fn is_valid(addr: &[u8]) -> bool {
    if addr.len() > MAX_ADDRESS {
        return false;
    }
    let Some(at) = addr.iter().rposition(|&b| b == b'@') else { return false };
    is_local_part(&addr[..at]) && is_domain(&addr[at + 1..])
}

/// Returns whether `addr` is valid as a sender. The empty sender (the null reverse-path of bounces,
/// RFC 5321 4.5.5) is valid, and so are the special senders of qmail.
pub fn is_valid_sender(addr: &[u8]) -> bool {
    addr.is_empty() || is_valid(addr) || is_qmail_sender(addr)
}

/// Returns whether `addr` is a special sender of qmail: `#@[]` (the bounce of a bounce), or a local
/// part or address with `-@[]` behind it, of which a next hop makes one sender per recipient (VERP,
/// <https://cr.yp.to/proto/verp.txt>).
fn is_qmail_sender(addr: &[u8]) -> bool {
    let Some(local) = addr.strip_suffix(b"@[]").filter(|_| addr.len() <= MAX_ADDRESS) else {
        return false;
    };
    let list = local.strip_suffix(b"-");
    local == b"#" || list.is_some_and(|list| is_dot_atom(local) || is_valid(list))
}

/// Returns `addr` with the default domain, if there is one and `addr` is a local part alone.
pub fn complete<'a>(addr: &'a [u8], default_domain: Option<&str>) -> Cow<'a, [u8]> {
    match default_domain {
        Some(domain) if !addr.is_empty() && !addr.contains(&b'@') => {
            Cow::Owned([addr, b"@", domain.as_bytes()].concat())
        }
        _ => Cow::Borrowed(addr),
    }
}

fn is_local_part(local: &[u8]) -> bool {
    is_dot_atom(local) || is_quoted_string(local)
}

fn is_dot_atom(text: &[u8]) -> bool {
    text.split(|&b| b == b'.').all(|atom| !atom.is_empty() && all_in(atom, &ATEXT))
}

fn is_quoted_string(text: &[u8]) -> bool {
    let [b'"', inner @ .., b'"'] = text else { return false };
    !inner.is_empty() && inner.iter().all(|&b| b.is_ascii_graphic() && b != b'"')
}

/// Returns whether `domain` may be the domain of an address.
pub fn is_domain(domain: &[u8]) -> bool {
    if let [b'[', inner @ .., b']'] = domain {
        is_address_literal(inner)
    } else {
        is_domain_name(domain)
    }
}

/// Returns whether the text between the brackets is an IPv4 address, or `IPv6:` (in upper or lower
/// case, as in ABNF) and an IPv6 address.
fn is_address_literal(inner: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(inner) else { return false };
    match text.split_at_checked(5) {
        Some((tag, v6)) if tag.eq_ignore_ascii_case("IPv6:") => v6.parse::<Ipv6Addr>().is_ok(),
        _ => text.parse::<Ipv4Addr>().is_ok(),
    }
}

/// Returns whether a name consists of labels of letters, digits, `-` and `_`, 1–63 bytes each, that
/// neither start nor end with `-`.
pub(crate) fn is_domain_name(name: &[u8]) -> bool {
    name.split(|&b| b == b'.').all(is_label)
}

fn is_label(label: &[u8]) -> bool {
    (1..=MAX_LABEL).contains(&label.len())
        && all_in(label, &LABEL)
        && !label.starts_with(b"-")
        && !label.ends_with(b"-")
}

/// Returns an address as it appears in logs and Pond records, where `<`, `>` and `,` delimit
/// addresses.
///
/// `\`, `<`, `>`, `,` and bytes that are not UTF-8 become `\xNN`. Control characters become `?`.
pub fn escape_for_log(addr: &[u8]) -> Cow<'_, str> {
    if let Some(text) = plain(addr, &PLAIN_IN_LIST) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(addr.len());
    for chunk in addr.utf8_chunks() {
        for c in chunk.valid().chars() {
            match u8::try_from(c) {
                Ok(byte) if LIST_SYNTAX.contains(&byte) => push_escaped(&mut out, byte),
                _ => out.push(shown(c)),
            }
        }
        chunk.invalid().iter().for_each(|&byte| push_escaped(&mut out, byte));
    }
    Cow::Owned(out)
}

fn push_escaped(out: &mut String, byte: u8) {
    // Writing to a `String` can't fail.
    let _ = write!(out, "\\x{byte:02x}");
}

/// Returns text from another program (a reply, a name) as one printable line. Control characters
/// become `?`, and bytes that are not UTF-8 become the replacement character U+FFFD.
pub fn printable(text: &[u8]) -> Cow<'_, str> {
    match plain(text, &PLAIN) {
        Some(text) => Cow::Borrowed(text),
        None => String::from_utf8_lossy(text).chars().map(shown).collect(),
    }
}

/// Returns the text as it is if it consists of bytes in `shown` only, as nearly every address and
/// reply does.
fn plain<'t>(text: &'t [u8], shown: &Set) -> Option<&'t str> {
    all_in(text, shown).then(|| str::from_utf8(text).ok()).flatten()
}

/// Returns `?` for characters that would change a terminal or break a line: the control characters
/// of ASCII and Latin-1, Unicode's line separators, and its overrides of direction.
fn shown(c: char) -> char {
    let hidden = c.is_control()
        || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}');
    if hidden { '?' } else { c }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts() {
        let table = [
            "a@b",
            "root@localhost",
            "first.last@example.com",
            "user+tag@example.co.uk",
            "!#$%&'*+-/=?^_`{|}~@example.com",
            "\"a@b\"@example.com",
            "\"..\"@example.com",
            "\"back\\slash\"@example.com",
            "\"<>,;:\"@example.com",
            "a@_dmarc.example.com",
            "a@under_score.example",
            "a@1.2.3.4",
            "a@xn--nxasmq6b",
            "a@a--b.c-d",
            "a@[192.0.2.1]",
            "a@[IPv6:2001:db8::1]",
            "a@[ipv6:::1]",
            "a@[IPv6:::ffff:192.0.2.1]",
        ];
        for addr in table {
            assert!(is_valid(addr.as_bytes()), "{addr}");
            assert!(is_valid_sender(addr.as_bytes()), "{addr}");
        }
    }

    #[test]
    fn refuses() {
        let table: &[&[u8]] = &[
            b"",
            b"@",
            b"a",
            b"a@",
            b"@b",
            b"a@b@c",
            b".a@b",
            b"a.@b",
            b"a..b@c",
            b"a b@c",
            b"a\tb@c",
            b"a\0b@c",
            b"a\n@c",
            b"a@c\n",
            b" a@c",
            b"a@c ",
            b"a@b c",
            b"<a@b>",
            b"a,b@c",
            b"a;b@c",
            b"a\\b@c",
            b"\"\"@c",
            b"\"@c",
            b"\"a@c",
            b"a\"@c",
            b"\"a\"b\"@c",
            b"\"a b\"@c",
            b"\"a\x7f\"@c",
            b"\"a\"b@c",
            b"a@.b",
            b"a@b.",
            b"a@b..c",
            b"a@-b",
            b"a@b-",
            b"a@b.-c",
            b"a@b/c",
            b"a@b:25",
            b"\xc3\xa4@b",
            b"a@\xc3\xa4",
            b"a@\xff",
            b"a@[]",
            b"a@[192.0.2]",
            b"a@[192.0.2.256]",
            b"a@[192.0.2.1",
            b"a@192.0.2.1]",
            b"a@[2001:db8::1]",
            b"a@[IPv6:]",
            b"a@[IPv6:192.0.2.1]",
            b"a@[IPv6:fe80::1%1]",
            b"a@[IPv6]",
            b"a@[\xff\xff\xff\xff\xff\xff]",
            b"a@[x-tag:abc]",
        ];
        for addr in table {
            assert!(!is_valid(addr), "{}", String::from_utf8_lossy(addr));
            assert_eq!(is_valid_sender(addr), addr.is_empty());
        }
    }

    #[test]
    fn lengths() {
        let local = |n: usize| format!("{}@b", "a".repeat(n));
        assert!(is_valid(local(252).as_bytes()));
        assert!(!is_valid(local(253).as_bytes()));
        let quoted = |n: usize| format!("\"{}\"@b", "a".repeat(n));
        assert!(is_valid(quoted(250).as_bytes()));
        assert!(!is_valid(quoted(251).as_bytes()));
        let label = |n: usize| format!("a@{}.b", "a".repeat(n));
        assert!(is_valid(label(63).as_bytes()));
        assert!(!is_valid(label(64).as_bytes()));
        let whole = |n: usize| format!("{}{}", "a@", "b.".repeat(n)) + "bb";
        assert_eq!(whole(125).len(), 254);
        assert!(is_valid(whole(125).as_bytes()));
        assert!(!is_valid((whole(125) + "b").as_bytes()));
    }

    #[test]
    fn senders_of_qmail_are_senders_only() {
        let table = ["#@[]", "-@[]", "list-@[]", "a.list-@[]", "list-return-7-@example.com-@[]"];
        for sender in table {
            assert!(is_valid_sender(sender.as_bytes()), "{sender}");
            assert!(!is_valid(sender.as_bytes()), "{sender}");
        }
        for other in ["@[]", "##@[]", "list@[]", "a..b-@[]", "a b-@[]", "a@b@c-@[]", "a@-@[]"] {
            assert!(!is_valid_sender(other.as_bytes()), "{other}");
        }
        let verp = |n: usize| format!("{}-@[]", "a".repeat(n));
        assert!(is_valid_sender(verp(250).as_bytes()));
        assert!(!is_valid_sender(verp(251).as_bytes()));
    }

    #[test]
    fn completes() {
        for (addr, domain, completed) in [
            ("root", Some("example.com"), "root@example.com"),
            ("\"r\"", Some("[192.0.2.1]"), "\"r\"@[192.0.2.1]"),
            ("root", None, "root"),
            ("", Some("example.com"), ""),
            ("root@", Some("example.com"), "root@"),
            ("a@b", Some("example.com"), "a@b"),
            ("#@[]", Some("example.com"), "#@[]"),
        ] {
            assert_eq!(*complete(addr.as_bytes(), domain), *completed.as_bytes(), "{addr}");
        }
    }

    #[test]
    fn shows_addresses() {
        let table: &[(&[u8], &str)] = &[
            (b"", ""),
            (b"a@b", "a@b"),
            (b"a,b<c>d\\e@f", "a\\x2cb\\x3cc\\x3ed\\x5ce@f"),
            (b"a\0b\r\nc\x7f\x1b[1m", "a?b??c??[1m"),
            ("ä@b".as_bytes(), "ä@b"),
            (b"\xff\xc3@b", "\\xff\\xc3@b"),
            ("a\u{85}\u{202e}\u{2028}b".as_bytes(), "a???b"),
        ];
        for (addr, expected) in table {
            assert_eq!(escape_for_log(addr), *expected);
        }
    }

    #[test]
    fn shows_text() {
        assert_eq!(printable(b"ok <a>, \\ b"), "ok <a>, \\ b");
        assert_eq!(printable(b"a\r\n\tb\0\x1b\x7f"), "a???b???");
        assert_eq!(printable(b"\xffx"), "\u{fffd}x");
        assert_eq!(printable("grün \u{9b}".as_bytes()), "grün ?");
    }
}
