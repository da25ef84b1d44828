//! `qrelay send`: submits mails over QMQP.
//!
//! Contract: each message is sent unchanged, with the envelope of the command line. The message
//! comes from stdin, and the text of the reply is printed on stdout with control characters
//! replaced. Or each of several files is a message: every mail that isn't accepted has a line on
//! stderr, and a summary is printed on stdout. On a terminal a bar shows how far several files are.
//!
//! # Failure
//! The exit status says what to do next: 64 the arguments are wrong, 66 a file can't be read, 69
//! the mail is refused for good, 75 try again. Without an answer, whatever the reason, the exit
//! status is 75 and the cause is printed on stderr. For several files the worst of all counts, in
//! the order 66, 69, 75, 0. If a file's mail can't be submitted because nobody accepts the
//! connection, the files behind it aren't tried.

use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use qrelay_shared::address::{is_valid, is_valid_sender, printable};
use qrelay_shared::exit::Exit;
use qrelay_shared::qmqp::{Reply, Status};
use thiserror::Error;

use crate::client::input::stdin;
use crate::client::say;
use crate::client::server::{Server, SubmitError, exit_status};

/// Submit the mail that is read from standard input, and print the text of the answer; or submit
/// files, one mail each.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  qrelay send --to /run/qrelay.sock --sender a@example.com b@example.org < mail
  qrelay send --sender a@example.com b@example.org --file mails/*.eml")]
pub struct Args {
    #[command(flatten)]
    server: Server,
    /// Envelope sender ('' for a bounce).
    #[arg(long)]
    sender: String,
    /// Files to submit, each as a mail of its own [default: one mail from standard input].
    #[arg(long, value_name = "FILE", num_args = 1..)]
    file: Vec<PathBuf>,
    /// Envelope recipients of every mail.
    #[arg(required = true, value_name = "RECIPIENT")]
    recipients: Vec<String>,
}

/// Why there is no answer.
#[derive(Debug, Error)]
enum SendError {
    /// The envelope sender is not a valid mail address.
    #[error("the sender '{}' is not a mail address", printable(.0.as_bytes()))]
    Sender(String),
    /// An envelope recipient is not a valid mail address.
    #[error("the recipient '{}' is not a mail address", printable(.0.as_bytes()))]
    Recipient(String),
    /// Reading the message from stdin failed.
    #[error("can't read the message from stdin: {0}")]
    Input(#[source] io::Error),
    /// There was no answer.
    #[error(transparent)]
    Submit(#[from] SubmitError),
}

impl SendError {
    /// Returns the exit status for this error.
    fn exit(&self) -> Exit {
        match self {
            Self::Sender(_) | Self::Recipient(_) => Exit::Usage,
            Self::Input(_) | Self::Submit(_) => Exit::Temporary,
        }
    }
}

/// Runs the command on the stdin, stdout and stderr of this process.
pub fn run(args: &Args) -> Exit {
    let result = check_envelope(args).and_then(|()| match &args.file[..] {
        [] => send_input(args),
        files => Ok(send_files(args, files)),
    });
    result.unwrap_or_else(|error| {
        say("send", &error);
        error.exit()
    })
}

fn check_envelope(args: &Args) -> Result<(), SendError> {
    if !is_valid_sender(args.sender.as_bytes()) {
        return Err(SendError::Sender(args.sender.clone()));
    }
    match args.recipients.iter().find(|address| !is_valid(address.as_bytes())) {
        Some(bad) => Err(SendError::Recipient(bad.clone())),
        None => Ok(()),
    }
}

fn submit(args: &Args, message: &[u8]) -> Result<Reply, SubmitError> {
    args.server.submit(&[message], args.sender.as_bytes(), &args.recipients)
}

/// Submits the mail on stdin.
fn send_input(args: &Args) -> Result<Exit, SendError> {
    let mut message = Vec::new();
    stdin().and_then(|mut input| input.read_to_end(&mut message)).map_err(SendError::Input)?;
    let reply = submit(args, &message)?;
    print(&printable(&reply.text));
    Ok(exit_status(reply.status))
}

/// Prints a line on stdout. Writing fails only if nobody reads stdout; the exit status carries the
/// result in any case.
fn print(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// What became of the files so far.
#[derive(Debug, Default)]
struct Tally {
    accepted: usize,
    /// Mails with the reply `Z`, or without an answer.
    later: usize,
    /// Mails with the reply `D`.
    never: usize,
    unreadable: usize,
    untried: usize,
}

impl Tally {
    fn summary(&self) -> String {
        let mut text = format!("{} accepted", self.accepted);
        for (count, what) in [
            (self.later, "refused for now"),
            (self.never, "refused for good"),
            (self.unreadable, "unreadable"),
            (self.untried, "not tried"),
        ] {
            if count > 0 {
                text += &format!(", {count} {what}");
            }
        }
        text
    }

    fn exit(&self) -> Exit {
        match self {
            Self { unreadable: 1.., .. } => Exit::NoInput,
            Self { never: 1.., .. } => Exit::Unavailable,
            Self { later: 1.., .. } => Exit::Temporary,
            _ => Exit::Success,
        }
    }
}

/// Submits every file.
fn send_files(args: &Args, files: &[PathBuf]) -> Exit {
    let bar = bar(files.len());
    let mut tally = Tally::default();
    for (at, path) in files.iter().enumerate() {
        let trouble = match fs::read(path) {
            Err(error) => {
                tally.unreadable += 1;
                Some(error.to_string())
            }
            Ok(message) => match submit(args, &message) {
                Ok(Reply { status: Status::Accepted, .. }) => {
                    tally.accepted += 1;
                    None
                }
                Ok(Reply { status: Status::Permanent, text }) => {
                    tally.never += 1;
                    Some(format!("refused for good: {}", printable(&text)))
                }
                Ok(Reply { status: Status::Temporary, text }) => {
                    tally.later += 1;
                    Some(format!("refused for now: {}", printable(&text)))
                }
                Err(error) => {
                    tally.later += 1;
                    if matches!(error, SubmitError::Connect { .. }) {
                        tally.untried = files.len() - at - 1;
                    }
                    Some(error.to_string())
                }
            },
        };
        if let Some(trouble) = trouble {
            let path = path.to_string_lossy();
            let line = format!("{}: {trouble}", printable(path.as_bytes()));
            bar.suspend(|| say("send", &line));
        }
        bar.inc(1);
        if tally.untried > 0 {
            break;
        }
    }
    bar.finish_and_clear();
    print(&tally.summary());
    tally.exit()
}

/// Returns a bar on stderr, which shows nothing unless stderr is a terminal and there are several
/// files.
fn bar(files: usize) -> ProgressBar {
    if files < 2 {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(files as u64);
    // The template is a constant, so it is known to be valid.
    if let Ok(style) =
        ProgressStyle::with_template("{bar:40} {pos} of {len}, {per_sec}, {eta} left")
    {
        bar.set_style(style);
    }
    bar
}
