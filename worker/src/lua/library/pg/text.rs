//! Reading SQL as far as its statements and their first words. Pure.
//!
//! Contract: strings, quoted names and comments are skipped as the server does with its default
//! settings. The server decides what a statement is; nothing depends on this module for safety.
//!
//! # Failure
//! None: text that isn't SQL has words, too.

/// Returns the first word of the first statement, empty if there is none.
pub(super) fn first_word(sql: &str) -> &str {
    word(after_prefix(sql))
}

/// Returns the first two words of each statement.
pub(super) fn beginnings(sql: &str) -> Vec<[&str; 2]> {
    let mut found = Vec::new();
    let mut rest = sql;
    while !rest.is_empty() {
        let statement = after_prefix(rest);
        let first = word(statement);
        found.push([first, word(after_prefix(&statement[first.len()..]))]);
        rest = after_statement(statement);
    }
    found
}

/// Whether a text has a statement that begins or ends a transaction. Inside of a transaction, a
/// `ROLLBACK TO` a savepoint does neither.
pub(super) fn controls_transaction(sql: &str) -> bool {
    const WORDS: [&str; 6] = ["BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT"];
    let is = |word: &str, name: &str| word.eq_ignore_ascii_case(name);
    // The body of a function in standard SQL has statements, and an END.
    let has_body = sql.split_ascii_whitespace().any(|word| is(word, "atomic"));
    beginnings(sql).iter().any(|[first, second]| {
        let controls = WORDS.iter().any(|name| is(first, name));
        let ends = controls && !is(second, "TO") && !(has_body && is(first, "END"));
        ends || (is(first, "PREPARE") && is(second, "TRANSACTION"))
    })
}

fn word(sql: &str) -> &str {
    let end = sql.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(sql.len());
    &sql[..end]
}

/// Skips white space, parentheses and comments before a statement. (Comments in `/*` and `*/` can
/// be nested.)
fn after_prefix(mut sql: &str) -> &str {
    loop {
        sql = sql.trim_start_matches(|c: char| c.is_whitespace() || c == '(');
        if let Some(comment) = sql.strip_prefix("--") {
            sql = comment.split_once(['\n', '\r']).map_or("", |(_, rest)| rest);
        } else if sql.starts_with("/*") {
            sql = after_comment(sql);
        } else {
            return sql;
        }
    }
}

fn after_comment(sql: &str) -> &str {
    let mut depth = 0;
    let mut at = 0;
    while let Some(two) = sql.as_bytes().get(at..at + 2) {
        match two {
            b"/*" => depth += 1,
            b"*/" => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return &sql[at..];
        }
    }
    ""
}

/// Skips a statement and the semicolon after it.
fn after_statement(mut sql: &str) -> &str {
    loop {
        let Some(at) = sql.find(|c| ";'\"$-/".contains(c)) else { return "" };
        let escapes = sql[..at].ends_with(['e', 'E']);
        let from = &sql[at..];
        sql = match from.as_bytes()[0] {
            b';' => return &from[1..],
            b'\'' => after_quoted(&from[1..], '\'', escapes),
            b'"' => after_quoted(&from[1..], '"', false),
            b'$' => after_dollars(from),
            _ if from.starts_with("--") || from.starts_with("/*") => after_prefix(from),
            _ => &from[1..],
        };
    }
}

/// Skips the rest of a text in quotes. A doubled quote begins another text, which is skipped next.
fn after_quoted(sql: &str, quote: char, escapes: bool) -> &str {
    let mut characters = sql.char_indices();
    while let Some((at, c)) = characters.next() {
        if c == quote {
            return &sql[at + 1..];
        }
        if c == '\\' && escapes {
            characters.next();
        }
    }
    ""
}

/// Skips a text in `$tag$`; a parameter such as `$1` isn't one.
fn after_dollars(sql: &str) -> &str {
    let Some(end) = sql[1..].find('$').map(|end| end + 2) else { return &sql[1..] };
    let tag = &sql[..end];
    let is_tag = tag[1..end - 1].chars().all(|c| c.is_alphanumeric() || c == '_')
        && !tag[1..].starts_with(|c: char| c.is_ascii_digit());
    if !is_tag {
        return &sql[1..];
    }
    sql[end..].split_once(tag).map_or("", |(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_that_begin_or_end_a_transaction() {
        for sql in [
            "COMMIT",
            "commit;",
            "/* a /* b */ */ -- c\n rollback",
            "SELECT 1; Begin",
            "START TRANSACTION",
            "SELECT 'it''s; ' || $$;$$ || \"a;b\" || E'\\';' ; END",
            "SELECT $1; abort",
            "SELECT 1 -- ;\n;COMMIT",
            "PREPARE TRANSACTION 'x'",
            "ROLLBACK AND CHAIN",
        ] {
            assert!(controls_transaction(sql), "{sql}");
        }
        for sql in [
            "",
            ";;",
            "ROLLBACK TO SAVEPOINT a",
            "SAVEPOINT begin",
            "SELECT 'x; COMMIT'",
            "SELECT $$; COMMIT$$, $a$; COMMIT $b$; COMMIT $a$",
            "SELECT 1 /* ; COMMIT */ -- ; COMMIT",
            "SELECT \"; COMMIT\"",
            "SELECT E'\\'; COMMIT'",
            "INSERT INTO commit VALUES ($1)",
            "beginning",
            "PREPARE transactional AS SELECT 1",
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END",
            "SELECT 'open; COMMIT",
            "SELECT 5-3/2; SELECT $1",
        ] {
            assert!(!controls_transaction(sql), "{sql}");
        }
    }

    #[test]
    fn first_words() {
        for (sql, expected) in
            [("", ""), ("/* x */ (select 1)", "select"), ("-- a\r\nCALL p()", "CALL"), (";", "")]
        {
            assert_eq!(first_word(sql), expected, "{sql}");
        }
    }
}
