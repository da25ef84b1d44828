//! Lists of addresses, as a message's header has them (RFC 5322 3.4 and 4.4). Pure.
//!
//! Contract: a list has addresses, with or without a name in front, and groups of them; comments,
//! quoted strings, folded lines, encoded words and routes may occur. Names may have any bytes, such
//! as dots and UTF-8. As in the lists that programs write, `;` separates addresses like `,`, and
//! the `;` behind the last group may be missing. An address may lack its domain. What the address
//! itself consists of isn't checked here. Every function takes time linear in the length of its
//! input.
//!
//! # Failure
//! A text that isn't a list is a [`ListError`]. No part of such a text is used, because an address
//! that was cut at the wrong place may be somebody else's.

use std::mem;

use thiserror::Error;

/// An address in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The address without comments and spaces.
    pub text: Vec<u8>,
    /// Whether the domain is missing.
    pub bare: bool,
    /// Index of the byte behind the address, in the list's text.
    pub end: usize,
}

/// Why a text is no list of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ListError {
    /// A quoted string, a comment, a literal or an address in angle brackets doesn't end.
    #[error("'{0}' is opened and not closed")]
    Unclosed(char),
    /// A character stands where it means nothing.
    #[error("unexpected '{0}'")]
    Unexpected(char),
    /// Two words follow each other where an address is expected.
    #[error("a comma or '<' is missing between two words")]
    Separator,
    /// The angle brackets are empty.
    #[error("the address '<>' is empty")]
    Empty,
}

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// An atom, with its dots, or a quoted string, with its quotes.
    Word,
    /// A domain literal, with its brackets.
    Literal,
    /// One of `<>:;@,`.
    Special(u8),
}

/// A piece of a list between spaces and comments.
#[derive(Debug, Clone, Copy)]
struct Token<'a> {
    kind: Kind,
    text: &'a [u8],
    /// Index of the byte behind the piece, in the list's text.
    end: usize,
}

/// Returns the addresses of a list, in their order.
pub fn parse(list: &[u8]) -> Result<Vec<Address>, ListError> {
    let mut tokens = Tokens { list, at: 0 };
    let mut found = Vec::new();
    // The words since the last separator, which are an address, or the name of one or of a group.
    let mut words = Vec::new();
    let mut in_group = false;
    while let Some(token) = tokens.next()? {
        match token.kind {
            Kind::Special(b'<') => {
                found.push(in_brackets(&mut tokens)?);
                words.clear();
                match tokens.next()?.map(|token| token.kind) {
                    None => {}
                    Some(Kind::Special(b',')) => {}
                    Some(Kind::Special(b';')) => in_group = false,
                    Some(Kind::Special(other)) => return Err(ListError::Unexpected(other.into())),
                    Some(Kind::Word | Kind::Literal) => return Err(ListError::Separator),
                }
            }
            Kind::Special(separator @ (b',' | b';')) => {
                found.extend(address(&mem::take(&mut words))?);
                in_group &= separator == b',';
            }
            Kind::Special(b':') if !in_group && is_name(&words) => {
                in_group = true;
                words.clear();
            }
            Kind::Special(other @ (b':' | b'>')) => {
                return Err(ListError::Unexpected(other.into()));
            }
            Kind::Special(_) | Kind::Word | Kind::Literal => words.push(token),
        }
    }
    found.extend(address(&words)?);
    Ok(found)
}

/// Returns whether these words may be the name of a group. An address is no name: what follows
/// would be taken for the address instead.
fn is_name(words: &[Token<'_>]) -> bool {
    !words.is_empty() && words.iter().all(|word| word.kind == Kind::Word)
}

/// Returns the address in angle brackets, the first of which has been read. A route in front of the
/// address (RFC 5322 4.4) is left out.
fn in_brackets<'a>(tokens: &mut Tokens<'a>) -> Result<Address, ListError> {
    let mut words: Vec<Token<'a>> = Vec::new();
    loop {
        let token = tokens.next()?.ok_or(ListError::Unclosed('<'))?;
        let is_route = || words.first().is_some_and(|first| first.kind == Kind::Special(b'@'));
        match token.kind {
            Kind::Special(b'>') => return address(&words)?.ok_or(ListError::Empty),
            Kind::Special(b':') if is_route() => words.clear(),
            Kind::Special(b',') if words.is_empty() || is_route() => {}
            Kind::Special(b'@') | Kind::Word | Kind::Literal => words.push(token),
            Kind::Special(other) => return Err(ListError::Unexpected(other.into())),
        }
    }
}

/// Returns the address that consists of these words; `None` if there are none. Spaces and comments
/// may stand between its parts (RFC 5322 4.4), but words need a dot between them.
fn address(words: &[Token<'_>]) -> Result<Option<Address>, ListError> {
    let Some(last) = words.last() else { return Ok(None) };
    let mut text: Vec<u8> = Vec::new();
    let mut bare = true;
    let mut before = Kind::Special(b',');
    for word in words {
        match (before, word.kind) {
            (_, Kind::Special(b'@')) if !bare => return Err(ListError::Unexpected('@')),
            (_, Kind::Special(_)) => bare = false,
            (Kind::Special(_), _) => {}
            _ if text.ends_with(b".") || word.text.starts_with(b".") => {}
            _ => return Err(ListError::Separator),
        }
        text.extend_from_slice(word.text);
        before = word.kind;
    }
    Ok(Some(Address { text, bare, end: last.end }))
}

/// The tokens of a list.
struct Tokens<'a> {
    list: &'a [u8],
    at: usize,
}

impl<'a> Tokens<'a> {
    /// Returns the next token; `None` at the end.
    fn next(&mut self) -> Result<Option<Token<'a>>, ListError> {
        self.skip()?;
        let start = self.at;
        let Some(&first) = self.list.get(start) else { return Ok(None) };
        let kind = match first {
            b'"' => {
                self.at = self.closing(b'"').ok_or(ListError::Unclosed('"'))?;
                Kind::Word
            }
            b'[' => {
                self.at = self.closing(b']').ok_or(ListError::Unclosed('['))?;
                Kind::Literal
            }
            b')' | b']' => return Err(ListError::Unexpected(first.into())),
            b'<' | b'>' | b':' | b';' | b'@' | b',' => {
                self.at += 1;
                Kind::Special(first)
            }
            _ => {
                let rest = &self.list[start..];
                let length = rest.iter().position(|&byte| ends_an_atom(byte));
                self.at += length.unwrap_or(rest.len());
                Kind::Word
            }
        };
        Ok(Some(Token { kind, text: &self.list[start..self.at], end: self.at }))
    }

    /// Skips spaces, line ends and comments.
    fn skip(&mut self) -> Result<(), ListError> {
        let mut depth = 0_usize;
        while let Some(&byte) = self.list.get(self.at) {
            match byte {
                b'(' => depth += 1,
                b')' if depth > 0 => depth -= 1,
                b'\\' if depth > 0 => self.at += 1,
                _ if depth > 0 || is_space(byte) => {}
                _ => break,
            }
            self.at += 1;
        }
        if depth > 0 { Err(ListError::Unclosed('(')) } else { Ok(()) }
    }

    /// Returns the index behind the byte that ends what begins here. A backslash takes the next
    /// byte its meaning.
    fn closing(&self, end: u8) -> Option<usize> {
        let mut at = self.at + 1;
        loop {
            match *self.list.get(at)? {
                b'\\' => at += 2,
                byte if byte == end => return Some(at + 1),
                _ => at += 1,
            }
        }
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

fn ends_an_atom(byte: u8) -> bool {
    is_space(byte) || b"()<>[]:;@,\"".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the addresses, those without a domain with a `!` behind them.
    fn list(text: &str) -> Result<Vec<String>, ListError> {
        let shown = |address: Address| {
            let text = String::from_utf8(address.text).expect("text");
            if address.bare { text + "!" } else { text }
        };
        Ok(parse(text.as_bytes())?.into_iter().map(shown).collect())
    }

    #[test]
    fn reads_lists() {
        let table: &[(&str, &[&str])] = &[
            ("", &[]),
            (" \r\n\t ", &[]),
            (",, ,", &[]),
            ("(nobody)", &[]),
            ("a@b", &["a@b"]),
            ("a@b, c@d", &["a@b", "c@d"]),
            ("a@b,c@d,", &["a@b", "c@d"]),
            ("root", &["root!"]),
            ("root,daemon", &["root!", "daemon!"]),
            ("<root>", &["root!"]),
            ("Root <root>", &["root!"]),
            ("Name <a@b>", &["a@b"]),
            ("John Q. Public <j.q@x.org>, <k@x.org>", &["j.q@x.org", "k@x.org"]),
            ("\"Public, John\" <j@x>", &["j@x"]),
            ("\"a \\\" <evil@x>, \" <j@x>", &["j@x"]),
            ("=?utf-8?Q?J=C3=B6rg=2C?= <j@x>", &["j@x"]),
            ("Jörg Ö <j@x>", &["j@x"]),
            ("a@b <c@d>", &["c@d"]),
            ("[List] <c@d>", &["c@d"]),
            ("O'Brien <o'brien@x>", &["o'brien@x"]),
            ("\"\" <a@b>", &["a@b"]),
            ("\"a b\"@x", &["\"a b\"@x"]),
            ("\"a@b\"", &["\"a@b\"!"]),
            ("joe.\"q\".x@y", &["joe.\"q\".x@y"]),
            ("a@b (Name)", &["a@b"]),
            ("(x) a (y) @ (z) b (a (nested) \\) comment)", &["a@b"]),
            ("a (<evil@x>, ) <b@c>", &["b@c"]),
            ("john . public @ example . org", &["john.public@example.org"]),
            ("a@[192.0.2.1], b@[IPv6:2001:db8::1]", &["a@[192.0.2.1]", "b@[IPv6:2001:db8::1]"]),
            ("<@relay.example,@b:c@d>", &["c@d"]),
            ("Name <,@relay.example:c@d>", &["c@d"]),
            ("a@b,\r\n\tc@d\n (folded)", &["a@b", "c@d"]),
            ("undisclosed-recipients:;", &[]),
            ("undisclosed recipients:", &[]),
            ("undisclosed-recipients", &["undisclosed-recipients!"]),
            ("Friends: a@b, Name <c@d>;", &["a@b", "c@d"]),
            ("Friends: a@b; x@y, Others: <c@d>;, e@f", &["a@b", "x@y", "c@d", "e@f"]),
            ("a@b; c@d;", &["a@b", "c@d"]),
            ("-f@b", &["-f@b"]),
        ];
        for (text, expected) in table {
            let expected: Vec<_> = expected.iter().map(|&text| text.to_owned()).collect();
            assert_eq!(list(text), Ok(expected), "{text:?}");
        }
    }

    #[test]
    fn refuses_what_is_no_list() {
        use ListError::{Empty, Separator, Unclosed, Unexpected};
        for (text, error) in [
            ("\"a", Unclosed('"')),
            ("\"a\\\"", Unclosed('"')),
            ("\"a\\", Unclosed('"')),
            ("a@b (c", Unclosed('(')),
            ("a@b (c\\)", Unclosed('(')),
            ("a@b (\\", Unclosed('(')),
            ("a@[192.0.2.1", Unclosed('[')),
            ("Name <a@b", Unclosed('<')),
            ("Name <a@b, c@d", Unexpected(',')),
            ("Name <a@b <c@d>", Unexpected('<')),
            ("a@b>", Unexpected('>')),
            ("a@b)", Unexpected(')')),
            ("a@b]", Unexpected(']')),
            ("a@b@c", Unexpected('@')),
            (": a@b", Unexpected(':')),
            ("a@b Bcc: c@d", Unexpected(':')),
            ("x: y: a@b;", Unexpected(':')),
            ("<a@b>: c@d", Unexpected(':')),
            ("<a@b> <c@d>", Unexpected('<')),
            ("<a@b> c@d", Separator),
            ("a@b c@d", Separator),
            ("root daemon", Separator),
            ("<a b@c>", Separator),
            ("a@b [192.0.2.1]", Separator),
            ("<>", Empty),
            ("Name < (nobody) >", Empty),
        ] {
            assert_eq!(list(text), Err(error), "{text:?}");
        }
    }

    #[test]
    fn says_where_addresses_end() {
        for (text, ends) in [
            ("root", &[4][..]),
            ("root (Cron Daemon) , x", &[4, 22]),
            ("Root < root > ,a@b", &[11, 18]),
            ("a @ (x) b\n", &[9]),
        ] {
            let found: Vec<_> =
                parse(text.as_bytes()).expect("list").iter().map(|found| found.end).collect();
            assert_eq!(found, ends, "{text:?}");
        }
    }

    /// Whatever a text has, its addresses are complete: each is the same when it is read alone.
    #[test]
    fn any_text_has_whole_addresses() {
        const PIECES: &[u8] = b"ab.@@,;:<>()[]\"\\ \n\0\xff";
        let mut state = 1_u64;
        let mut found = 0;
        for _ in 0..50_000 {
            let text: Vec<u8> = (0..12)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    PIECES[(state >> 33) as usize % PIECES.len()]
                })
                .collect();
            for address in parse(&text).unwrap_or_default() {
                let shown = text.escape_ascii();
                let alone = Address { end: address.text.len(), ..address.clone() };
                assert_eq!(parse(&address.text), Ok(vec![alone]), "{shown}");
                assert!(address.end <= text.len(), "{shown}");
                found += 1;
            }
        }
        assert!(found > 1000, "only {found} addresses");
    }

    /// The work for a list must not grow faster than the list, or a mail could hold its sender up.
    #[test]
    fn long_lists_are_read() {
        let many = "Name <a@b>, ".repeat(50_000);
        assert_eq!(parse(many.as_bytes()).map(|found| found.len()), Ok(50_000));
        let nested = ["(".repeat(500_000), ")".repeat(500_000)].concat();
        assert_eq!(parse(nested.as_bytes()).map(|found| found.len()), Ok(0));
        assert_eq!(parse("<".repeat(500_000).as_bytes()), Err(ListError::Unexpected('<')));
    }
}
