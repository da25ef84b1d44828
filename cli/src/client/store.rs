//! The places where `qrelay sink` puts a mail: the terminal, one file, or a directory.
//!
//! Contract: [`Store::put`] returns only when the mail is stored; in a file or directory it is also
//! synced to disk. Only then may `K` be sent. A file in a directory appears complete or not at all.
//! A file that is appended to holds whole mails only: the partial mail of a failed write is cut
//! off. Control characters other than line ends and tabs are not printed on the terminal.
//!
//! # Failure
//! Every error is an `io::Error`, and nothing of the mail is left behind.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use qrelay_shared::address::{escape_for_log, printable};

use crate::client::date::ctime;

/// A received mail.
#[derive(Debug, Clone, Copy)]
pub struct Mail<'a> {
    /// Header, empty line, body.
    pub message: &'a [u8],
    /// Envelope sender.
    pub sender: &'a [u8],
    /// Envelope recipients.
    pub recipients: &'a [&'a [u8]],
}

/// The place where mails are put.
#[derive(Debug)]
pub enum Store {
    /// Stdout: mails are printed.
    Terminal,
    /// A file in mbox format (RFC 4155): mails are appended, with `>From ` quoting that can be
    /// undone.
    File(Mutex<File>),
    /// A directory: each mail becomes a file of its own.
    Directory {
        path: PathBuf,
        /// Number of the next mail, which makes the file names of one second different.
        serial: AtomicU64,
    },
}

impl Store {
    /// Opens the place that `output` names: an existing directory, or else a file, which is created
    /// if it doesn't exist. `None` means stdout.
    pub fn open(output: Option<&Path>) -> io::Result<Self> {
        let Some(path) = output else { return Ok(Self::Terminal) };
        if path.is_dir() {
            return Ok(Self::Directory { path: path.to_owned(), serial: AtomicU64::new(0) });
        }
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        Ok(Self::File(Mutex::new(file)))
    }

    /// Stores or prints a mail.
    pub fn put(&self, mail: &Mail<'_>) -> io::Result<()> {
        match self {
            Self::Terminal => io::stdout().lock().write_all(shown(mail).as_bytes()),
            Self::File(file) => {
                append(&mut file.lock().unwrap_or_else(PoisonError::into_inner), &mbox(mail))
            }
            Self::Directory { path, serial } => {
                let serial = serial.fetch_add(1, Ordering::Relaxed);
                create(path, &file_name(serial), &with_envelope(mail))
            }
        }
    }
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Returns a file name that sorts by time and is unique among processes that share a directory.
fn file_name(serial: u64) -> String {
    format!("{}.{}-{serial}.eml", seconds(), std::process::id())
}

fn append(file: &mut File, text: &[u8]) -> io::Result<()> {
    let before = file.metadata()?;
    if !before.is_file() {
        // A device or a pipe has nothing to sync, and no content that a partial mail could spoil.
        return file.write_all(text);
    }
    let result = file.write_all(text).and_then(|()| file.sync_data());
    if result.is_err() {
        // The file keeps the partial mail only if the disk refuses even that.
        let _ = file.set_len(before.len());
    }
    result
}

fn create(directory: &Path, name: &str, text: &[u8]) -> io::Result<()> {
    let temporary = directory.join(format!(".{name}.tmp"));
    let result = write_synced(&temporary, text)
        .and_then(|()| fs::rename(&temporary, directory.join(name)))
        .and_then(|()| File::open(directory)?.sync_all());
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

fn write_synced(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(text)?;
    file.sync_all()
}

/// Returns the message preceded by its envelope, as the header lines that a final delivery adds
/// (RFC 5321 4.4).
fn with_envelope(mail: &Mail<'_>) -> Vec<u8> {
    let mut text = [b"Return-Path: <", mail.sender, b">\n"].concat();
    for recipient in mail.recipients {
        text.extend_from_slice(&[b"Delivered-To: ", *recipient, b"\n"].concat());
    }
    text.extend_from_slice(mail.message);
    text
}

fn mbox(mail: &Mail<'_>) -> Vec<u8> {
    let sender = if mail.sender.is_empty() { b"MAILER-DAEMON" } else { mail.sender };
    let mut text = [b"From ", sender, b" ", ctime(seconds()).as_bytes(), b"\n"].concat();
    for line in with_envelope(mail).split_inclusive(|&byte| byte == b'\n') {
        let quoted = line.iter().position(|&byte| byte != b'>').unwrap_or(line.len());
        if line[quoted..].starts_with(b"From ") {
            text.push(b'>');
        }
        text.extend_from_slice(line);
    }
    if !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    text.push(b'\n');
    text
}

fn shown(mail: &Mail<'_>) -> String {
    let recipients: Vec<_> = mail.recipients.iter().map(|r| escape_for_log(r)).collect();
    let mut text = format!(
        "--- from=<{}> to=<{}> {} bytes\n",
        escape_for_log(mail.sender),
        recipients.join(">,<"),
        mail.message.len()
    );
    for line in mail.message.split_inclusive(|&byte| byte == b'\n') {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let columns: Vec<_> = line.split(|&byte| byte == b'\t').map(printable).collect();
        text.push_str(&columns.join("\t"));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAIL: Mail<'_> = Mail {
        message: b"Subject: x\r\n\r\n\x1b[31mred\tand\nFrom here\n>From there",
        sender: b"s@example.com",
        recipients: &[b"a@example.com", b"b@example.com"],
    };

    #[test]
    fn terminal_gets_no_control_characters() {
        assert_eq!(
            shown(&MAIL),
            "--- from=<s@example.com> to=<a@example.com>,<b@example.com> 48 bytes\n\
             Subject: x\n\n?[31mred\tand\nFrom here\n>From there\n"
        );
    }

    #[test]
    fn mbox_quotes_and_separates() {
        let text = String::from_utf8(mbox(&MAIL)).expect("ASCII");
        assert!(text.starts_with("From s@example.com "), "{text}");
        assert!(text.ends_with("\n>From here\n>>From there\n\n"), "{text}");
        assert!(text.contains("\nReturn-Path: <s@example.com>\nDelivered-To: a@example.com\n"));
    }

    #[test]
    fn files_hold_whole_mails() {
        let directory = tempfile::tempdir().expect("directory");
        let directory = directory.path();
        let store = Store::open(Some(directory)).expect("directory");
        store.put(&MAIL).and_then(|()| store.put(&MAIL)).expect("stored");
        let names: Vec<_> = fs::read_dir(directory)
            .expect("directory")
            .map(|entry| entry.expect("entry").path())
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(fs::read(&names[0]).expect("mail").ends_with(MAIL.message));

        let file = directory.join("mbox");
        for _ in 0..2 {
            Store::open(Some(&file)).and_then(|store| store.put(&MAIL)).expect("appended");
        }
        let text = fs::read_to_string(&file).expect("ASCII");
        assert_eq!(text.matches("\n\nFrom ").count(), 1, "{text}");
    }
}
