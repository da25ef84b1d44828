//! The password file: lines of `host:port:database:user:password` (PostgreSQL documentation,
//! 34.16).
//!
//! Contract: the first line that matches counts; `*` matches everything, a backslash makes the next
//! character an ordinary one. As with libpq, a file that others may read is not used.
//!
//! # Failure
//! A file that can't be used counts as empty; the log says why.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use slog::{Logger, warn};

/// Permissions of group and others.
const OTHERS: u32 = 0o077;

/// The server, database and user that a password is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Access<'a> {
    /// Name or address; `localhost` stands for the default socket directory.
    pub host: &'a str,
    /// The server's port.
    pub port: &'a str,
    /// The database.
    pub database: &'a str,
    /// The user.
    pub user: &'a str,
}

/// Returns the contents of a password file, or an empty text if the file can't be used.
pub(super) fn read(path: &Path, logger: &Logger) -> String {
    let unusable = |reason: &str| {
        warn!(logger, "the password file is not used";
            "file" => %path.display(), "reason" => reason);
        String::new()
    };
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => unusable(&error.to_string()),
        Ok(metadata) if !metadata.is_file() => unusable("it is no plain file"),
        Ok(metadata) if metadata.mode() & OTHERS != 0 => {
            unusable("group or others have access to it; its mode should be 0600")
        }
        Ok(_) => std::fs::read_to_string(path).unwrap_or_else(|error| unusable(&error.to_string())),
    }
}

/// The password for this access.
pub(super) fn find(contents: &str, access: &Access<'_>) -> Option<String> {
    let wanted = [access.host, access.port, access.database, access.user];
    contents.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut rest = line;
        for value in wanted {
            let (field, after) = take_field(rest)?;
            if field != "*" && unescape(field) != value {
                return None;
            }
            rest = after;
        }
        Some(unescape(rest))
    })
}

/// Splits a text at the next colon that has no backslash before it.
fn take_field(text: &str) -> Option<(&str, &str)> {
    let mut escaped = false;
    let end = text.find(|c: char| {
        let ends = c == ':' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    })?;
    Some((&text[..end], &text[end + 1..]))
}

fn unescape(field: &str) -> String {
    let mut characters = field.chars();
    std::iter::from_fn(|| match characters.next()? {
        '\\' => characters.next(),
        other => Some(other),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_matching_line_counts() {
        let file =
            "# comment:*:*:*:no\nother:5432:db:me:no\nh:*:db:m\\:e:it\\:s \\\\ me\n*:*:*:*:any\n";
        let access = Access { host: "h", port: "5432", database: "db", user: "m:e" };
        assert_eq!(find(file, &access).as_deref(), Some("it:s \\ me"));
        assert_eq!(find(file, &Access { user: "you", ..access }).as_deref(), Some("any"));
        assert_eq!(find("h:5432:db:me\n", &Access { user: "me", ..access }), None);
        assert_eq!(find("", &access), None);
    }
}
