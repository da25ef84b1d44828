//! What can be seen in the text of a script that was written for LuaJIT, or for a daemon with a
//! single process. Pure.
//!
//! Contract: the text is read word by word, not understood. So a hint may be about code that is
//! right, and code may be wrong without a hint.
//!
//! # Failure
//! None: any text has words.

use std::collections::HashSet;

/// A word of a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word<'a> {
    Name(&'a str),
    Number,
    Text(&'a str),
    Symbol(&'a str),
}

/// Names of LuaJIT that raise when they are used.
const ABSENT: [&str; 6] = ["ffi", "jit", "setfenv", "getfenv", "newproxy", "module"];

/// Returns hints with the number of the line that each is about, in the order of lines.
pub(super) fn hints(source: &str) -> Vec<(usize, String)> {
    let words = words(source);
    let mut hints = Vec::new();
    for line in words.chunk_by(|(a, _), (b, _)| a == b) {
        let (number, line): (_, Vec<Word<'_>>) =
            (line[0].0, line.iter().map(|(_, word)| *word).collect());
        for hint in absent(&line).into_iter().chain(float_text(&line)) {
            hints.push((number, hint));
        }
    }
    hints.extend(changed(&words));
    hints.sort();
    hints.dedup();
    hints
}

/// Names that this Lua doesn't have.
fn absent(line: &[Word<'_>]) -> Option<String> {
    let used = |index: usize, name: &str| {
        let before = index.checked_sub(1).map(|before| line[before]);
        let own = [Word::Symbol("."), Word::Symbol(":"), Word::Name("local")];
        let is_used =
            matches!(line.get(index + 1), Some(Word::Symbol("(" | "." | "[") | Word::Text(_)));
        ABSENT.contains(&name) && is_used && before.is_none_or(|before| !own.contains(&before))
    };
    let name = line.iter().enumerate().find_map(|(index, word)| match word {
        Word::Name(name) if used(index, name) => Some(*name),
        _ => None,
    });
    if let Some(name) = name {
        return Some(format!("{name} is not available in Lua 5.3"));
    }
    if line
        .windows(3)
        .any(|words| words == [Word::Name("debug"), Word::Symbol("."), Word::Name("sethook")])
    {
        return Some("debug.sethook isn't there: it would switch the time limit off".into());
    }
    let paces = ["setpause", "setstepmul"];
    let sets_pace = line.contains(&Word::Name("collectgarbage"))
        && line.iter().any(|word| matches!(word, Word::Text(text) if paces.contains(text)));
    sets_pace.then(|| "leave the collector's pace to qrelay: see docs/migrating.md".into())
}

/// A quotient or power that becomes text.
fn float_text(line: &[Word<'_>]) -> Option<String> {
    let has = |symbol| line.contains(&Word::Symbol(symbol));
    let operator = ["/", "^"].into_iter().find(|symbol| has(symbol))?;
    let formats = line.iter().any(|word| matches!(word, Word::Text(text) if text.contains("%d")));
    if formats {
        return Some(format!(
            "the result of '{operator}' is a float, and '%d' refuses one with a fraction: use //, \
             or math.floor"
        ));
    }
    let becomes_text = has("..") || line.contains(&Word::Name("tostring"));
    becomes_text.then(|| {
        format!(
            "the result of '{operator}' is a float, which becomes text with a fraction: 10/2 is \
             '5.0'; use //, or math.tointeger"
        )
    })
}

/// Variables that a function counts with although they aren't its own.
fn changed(words: &[(usize, Word<'_>)]) -> Vec<(usize, String)> {
    let mut hints = Vec::new();
    // The names that each open function has declared, and the open blocks in it.
    let mut functions: Vec<(HashSet<&str>, usize)> = Vec::new();
    for (index, (line, word)) in words.iter().enumerate() {
        let next = |n: usize| words.get(index + n).map(|(_, word)| *word);
        match word {
            Word::Name("function") => {
                let names = words[index..].iter().map(|(_, word)| *word);
                let parameters = names
                    .skip_while(|word| *word != Word::Symbol("("))
                    .take_while(|word| *word != Word::Symbol(")"));
                let own = parameters.filter_map(|word| match word {
                    Word::Name(name) => Some(name),
                    _ => None,
                });
                functions.push((own.collect(), 0));
            }
            Word::Name("do" | "then" | "repeat") => {
                if let Some((_, blocks)) = functions.last_mut() {
                    *blocks += 1;
                }
            }
            // `elseif` ends one block and its `then` begins another.
            Word::Name("end" | "until" | "elseif") => match functions.last_mut() {
                Some((_, 0)) => drop(functions.pop()),
                Some((_, blocks)) => *blocks -= 1,
                None => {}
            },
            Word::Name("local" | "for") => {
                if let Some((own, _)) = functions.last_mut() {
                    let declared = words[index + 1..].iter().map(|(_, word)| *word);
                    own.extend(
                        declared
                            .map_while(|word| match word {
                                Word::Name(name) if name != "in" && name != "function" => {
                                    Some(Some(name))
                                }
                                Word::Symbol(",") => Some(None),
                                _ => None,
                            })
                            .flatten(),
                    );
                }
            }
            Word::Name(name) => {
                let counts = next(1) == Some(Word::Symbol("="))
                    && next(2) == Some(Word::Name(name))
                    && matches!(next(3), Some(Word::Symbol("+" | "-" | "..")))
                    && !matches!(
                        index.checked_sub(1).map(|before| words[before].1),
                        Some(Word::Symbol("." | ":" | "," | "{") | Word::Name("local"))
                    );
                let own = functions.iter().any(|(own, _)| own.contains(name));
                if counts && !functions.is_empty() && !own {
                    hints.push((*line, format!(
                        "{name} is changed in a function: each worker has a variable of its own; a \
                         shared dictionary counts for all of them"
                    )));
                }
            }
            _ => {}
        }
    }
    hints
}

/// Takes the text apart, without comments, each word with its line.
fn words(source: &str) -> Vec<(usize, Word<'_>)> {
    let mut found = Vec::new();
    let (mut rest, mut line) = (source, 1);
    while let Some(first) = rest.chars().next() {
        let (length, word) = match first {
            '\'' | '"' => {
                let length = quoted(rest, first);
                (length, Some(Word::Text(rest[1..length].trim_end_matches(first))))
            }
            '[' if long(rest).is_some() => {
                let length = long(rest).unwrap_or(1);
                (length, Some(Word::Text(&rest[..length])))
            }
            '-' if rest.starts_with("--") => {
                let end = || rest.find('\n').unwrap_or(rest.len());
                (long(&rest[2..]).map_or_else(end, |length| length + 2), None)
            }
            c if c.is_ascii_digit() => {
                let length = span(rest, |c| c.is_ascii_alphanumeric() || c == '.');
                (length, Some(Word::Number))
            }
            c if c.is_ascii_alphabetic() || c == '_' => {
                let length = span(rest, |c| c.is_ascii_alphanumeric() || c == '_');
                (length, Some(Word::Name(&rest[..length])))
            }
            c if c.is_whitespace() => (c.len_utf8(), None),
            c => {
                let known = ["...", "..", "//", "==", "~=", "<=", ">=", "::", "<<", ">>"];
                let length = known.iter().find(|symbol| rest.starts_with(**symbol));
                let length = length.map_or(c.len_utf8(), |symbol| symbol.len());
                (length, Some(Word::Symbol(&rest[..length])))
            }
        };
        if let Some(word) = word {
            found.push((line, word));
        }
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    found
}

fn span(text: &str, belongs: impl Fn(char) -> bool) -> usize {
    text.find(|c| !belongs(c)).unwrap_or(text.len())
}

/// Returns the length of a text in quotes, which ends at the end of its line at the latest.
fn quoted(text: &str, quote: char) -> usize {
    let mut characters = text.char_indices().skip(1);
    while let Some((at, c)) = characters.next() {
        match c {
            '\\' => drop(characters.next()),
            '\n' => return at,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Returns the length of a text in long brackets, if one begins here.
fn long(text: &str) -> Option<usize> {
    let level = span(text.strip_prefix('[')?, |c| c == '=');
    text[1 + level..].strip_prefix('[')?;
    let end = format!("]{}]", "=".repeat(level));
    Some(text.find(&end).map_or(text.len(), |at| at + end.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(source: &str) -> Vec<(usize, &'static str)> {
        let kinds = [
            ("not available", "absent"),
            ("sethook", "hook"),
            ("pace", "pace"),
            ("'%d'", "format"),
            ("with a fraction", "text"),
            ("is changed in a function", "changed"),
        ];
        let kind = |hint: &str| kinds.iter().find(|(part, _)| hint.contains(part)).map(|(_, k)| *k);
        hints(source).iter().map(|(line, hint)| (*line, kind(hint).unwrap_or("?"))).collect()
    }

    #[test]
    fn what_is_seen() {
        for (source, expected) in [
            ("local x = ffi.new('int')", (1, "absent")),
            ("\nsetfenv(1, {})", (2, "absent")),
            ("--[[ a\nb ]] require 'x'\nmodule('y')", (3, "absent")),
            ("x = 'a' .. n / 2", (1, "text")),
            ("x = tostring(2^3)", (1, "text")),
            ("string.format('%d', a / b)", (1, "format")),
            ("debug.sethook(f)", (1, "hook")),
            ("collectgarbage('setpause', 100)", (1, "pace")),
            ("n = 0\nfunction f(m)\n  n = n + 1\nend", (3, "changed")),
            (
                "function f(m) if m then local n = 1 end end\nlocal g = function() n = n + 1 end",
                (2, "changed"),
            ),
        ] {
            assert_eq!(lines(source), [expected], "{source}");
        }
    }

    #[test]
    fn what_is_no_reason_for_a_hint() {
        for source in [
            "",
            "-- x = 'a' .. n / 2\n--[==[ ffi.new() ]] ]==]",
            "s = 'ffi.new()' t = [[ 'a' .. 1/2 ]] u = \"it's \\\" .. 1/2\"",
            "x = 'a' .. n // 2\ny = n / 2\nz = 'b' .. 'c'",
            "x = m.module local jit = 5 y = {module = 1}",
            "function f(n) n = n + 1 end",
            "function f() local n, k = 0, 1 for i = 1, 2 do n = n + i k = k + 1 end end",
            "n = 0 n = n + 1",
            "function f() t.n = n + 1 return {n = n + 1} end",
            "function f() if a then b() elseif c then d() else e() end end n = n + 1",
            "return 'unfinished",
            "[==[ unfinished",
            "ä = ö / '\u{20ac}",
        ] {
            assert_eq!(lines(source), [], "{source}");
        }
    }
}
