//! `qrelay sendmail`: the interface of /usr/sbin/sendmail, for PHP, cron, git and their like.
//!
//! Contract: the message is read from stdin, completed, and submitted over QMQP as one mail to all
//! recipients. Nothing is queued: when the command ends, the exit status says what became of the
//! mail. On success nothing is printed. Options of other implementations that mean nothing here are
//! accepted; modes that need more than a submission are refused.
//!
//! A program that dies while it writes the message leaves the same end of file as one that has
//! written all of it. Nothing can tell them apart, unless the caller ends its message with a line
//! that has a single dot.
//!
//! # Failure
//! The cause is printed on stderr. The exit status is 64 if the command line is wrong, 65 if there
//! is no recipient, an address is bad or the message can't be read to its end, 69 if the mail is
//! refused for good, 75 if the caller should try again, and 78 if the machine has no usable name.

mod addresses;
mod ignored;
mod message;
mod origin;

use std::ffi::OsString;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io::BufReader;
use std::os::unix::ffi::OsStrExt as _;
use std::time::{SystemTime, UNIX_EPOCH};

use qrelay_shared::address::{is_domain, is_valid, is_valid_sender, printable};
use qrelay_shared::exit::Exit;
use qrelay_shared::qmqp::{MAX_RECIPIENTS, Status};
use thiserror::Error;

use crate::client::date::date_time;
use crate::client::input::stdin;
use crate::client::say;
use crate::client::sendmail::addresses::{Address, ListError};
use crate::client::sendmail::ignored::Ignored;
use crate::client::sendmail::message::{Defaults, Message, MessageError};
use crate::client::server::{Server, SubmitError, exit_status};

/// Submit the mail that is read from standard input, as /usr/sbin/sendmail does.
///
/// Options of other sendmails that mean nothing here are accepted and ignored: -A -B -C -G -L -N -O
/// -R -U -V -X -e -h -m -n -o -p -v.
#[derive(Debug, Clone, clap::Args)]
#[command(
    args_override_self = true,
    disable_help_flag = true,
    after_help = "\
Exit status: 0 accepted (K), 64 usage, 65 no recipient, bad address or unreadable message,
69 refused for good (D), 75 not now (Z) or no answer, 78 the machine has no usable name.

Examples:
  qrelay sendmail -i root < report
  qrelay sendmail -t -i -f bounces@example.com < mail"
)]
pub struct Args {
    #[command(flatten)]
    server: Server,
    /// Domain of addresses that have none [default: /etc/mailname, or else the host's name].
    #[arg(long, value_name = "DOMAIN", value_parser = domain)]
    domain: Option<String>,
    /// The fields To, Cc and Bcc name recipients, too.
    #[arg(short = 't')]
    from_header: bool,
    /// Envelope sender ('' or '<>' for a bounce) [default: the user who runs the command].
    #[arg(short = 'f', short_alias = 'r', value_name = "ADDRESS", allow_hyphen_values = true)]
    sender: Option<String>,
    /// Name in the field From, if the message has no such field.
    #[arg(short = 'F', value_name = "NAME", allow_hyphen_values = true)]
    name: Option<OsString>,
    /// A line with a single dot doesn't end the message (also -oi).
    #[arg(short = 'i')]
    dots: bool,
    /// What to do: 'm', submit a mail, is the only mode.
    #[arg(short = 'b', value_name = "MODE", value_parser = mode)]
    mode: Option<()>,
    /// Do nothing: there is no queue that could be run.
    // A mail that comes with it must not be dropped silently.
    #[arg(
        short = 'q', value_name = "INTERVAL", num_args = 0..=1, value_parser = interval,
        conflicts_with_all = ["from_header", "recipients"]
    )]
    queue: Option<Option<()>>,
    #[command(flatten)]
    ignored: Ignored,
    /// Print help.
    #[arg(long, action = clap::ArgAction::Help)]
    help: Option<bool>,
    /// Envelope recipients, each a list of addresses.
    #[arg(value_name = "RECIPIENT")]
    recipients: Vec<String>,
}

fn domain(text: &str) -> Result<String, String> {
    match is_domain(text.as_bytes()) {
        true => Ok(text.to_owned()),
        false => Err("expected a domain, such as example.com".to_owned()),
    }
}

fn mode(text: &str) -> Result<(), String> {
    match text {
        "m" => Ok(()),
        _ => Err("qrelay has no such mode: it submits a mail (-bm), and has no queue, no aliases \
                  and no SMTP server"
            .to_owned()),
    }
}

/// Accepts the time between two runs of a queue. Anything else behind `-q` may be a recipient,
/// whose mail must not be dropped.
fn interval(text: &str) -> Result<(), String> {
    match text.starts_with(|c: char| c.is_ascii_digit()) {
        true => Ok(()),
        false => Err("expected a time, such as 30m; there is no queue".to_owned()),
    }
}

/// Why there is no answer.
#[derive(Debug, Error)]
enum SendmailError {
    #[error("no recipient: name some, or use -t for those of the message's header")]
    NoRecipientGiven,
    #[error("the message's header names no recipient")]
    NoRecipientFound,
    #[error("more than {MAX_RECIPIENTS} recipients")]
    TooMany,
    #[error("the {what} '{}' is not a mail address{}", printable(text), because(.cause.as_ref()))]
    Address { what: &'static str, text: Vec<u8>, cause: Option<ListError> },
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("{0}")]
    Domain(String),
    #[error(transparent)]
    Submit(#[from] SubmitError),
}

fn because(cause: Option<&ListError>) -> String {
    cause.map_or_else(String::new, |cause| format!(": {cause}"))
}

impl SendmailError {
    fn exit(&self) -> Exit {
        match self {
            Self::NoRecipientGiven => Exit::Usage,
            Self::NoRecipientFound | Self::TooMany | Self::Address { .. } => Exit::Data,
            Self::Message(_) => Exit::Data,
            Self::Domain(_) => Exit::Config,
            Self::Submit(_) => Exit::Temporary,
        }
    }
}

/// Runs the command on the stdin and stderr of this process.
pub fn run(args: &Args) -> Exit {
    if args.queue.is_some() {
        return Exit::Success;
    }
    submit(args).unwrap_or_else(|error| {
        say("sendmail", &error);
        error.exit()
    })
}

fn submit(args: &Args) -> Result<Exit, SendmailError> {
    let domain = match &args.domain {
        Some(domain) => domain.clone(),
        None => origin::domain().map_err(SendmailError::Domain)?,
    };
    let sender = match &args.sender {
        Some(text) => read_sender(text, &domain)?,
        None => origin::own_address(&domain),
    };
    let mut recipients = Vec::new();
    for text in &args.recipients {
        add(&mut recipients, list("recipient", text.as_bytes())?, &domain)?;
    }
    if recipients.is_empty() && !args.from_header {
        return Err(SendmailError::NoRecipientGiven);
    }

    let dot_ends = !args.dots && !args.ignored.dots();
    let input = stdin().map_err(MessageError::Input)?;
    let message = Message::read(BufReader::with_capacity(1 << 16, input), dot_ends)?;
    if args.from_header {
        add(&mut recipients, message.recipients()?, &domain)?;
    }
    if recipients.is_empty() {
        return Err(SendmailError::NoRecipientFound);
    }

    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let author = match is_valid(sender.as_bytes()) {
        true => sender.clone(),
        // The sender of a bounce is no address, but its author has one.
        false => origin::own_address(&domain),
    };
    let name = args.name.as_ref().map_or(&b""[..], |name| name.as_bytes());
    let (header, body) = message.complete(&Defaults {
        domain: &domain,
        date: &date_time(now.as_secs()),
        message_id: &format!("<{:x}.{:016x}@{domain}>", now.as_nanos(), random()),
        from: &origin::from_value(name, &author),
    });
    let reply = args.server.submit(&[&header, &body], sender.as_bytes(), &recipients)?;
    if reply.status != Status::Accepted {
        say("sendmail", &printable(&reply.text));
    }
    Ok(exit_status(reply.status))
}

/// Returns the envelope sender that an argument names. The senders that mailing lists and bounces
/// have are no addresses of a list.
fn read_sender(text: &str, domain: &str) -> Result<String, SendmailError> {
    let text = text.trim();
    if text == "<>" {
        return Ok(String::new());
    }
    if is_valid_sender(text.as_bytes()) {
        return Ok(text.to_owned());
    }
    let bad =
        || SendmailError::Address { what: "sender", text: text.as_bytes().to_vec(), cause: None };
    match <[Address; 1]>::try_from(list("sender", text.as_bytes())?) {
        Ok([address]) => String::from_utf8(complete("sender", address, domain)?).map_err(|_| bad()),
        Err(_) => Err(bad()),
    }
}

/// Returns the addresses of an argument.
fn list(what: &'static str, text: &[u8]) -> Result<Vec<Address>, SendmailError> {
    addresses::parse(text).map_err(|cause| SendmailError::Address {
        what,
        text: text.to_vec(),
        cause: Some(cause),
    })
}

/// Adds addresses to the recipients, each once.
fn add(
    recipients: &mut Vec<Vec<u8>>,
    found: Vec<Address>,
    domain: &str,
) -> Result<(), SendmailError> {
    for address in found {
        let address = complete("recipient", address, domain)?;
        if recipients.contains(&address) {
            continue;
        }
        if recipients.len() == MAX_RECIPIENTS {
            return Err(SendmailError::TooMany);
        }
        recipients.push(address);
    }
    Ok(())
}

/// Returns an address with its domain.
fn complete(what: &'static str, address: Address, domain: &str) -> Result<Vec<u8>, SendmailError> {
    let mut text = address.text;
    if address.bare {
        text.extend_from_slice(b"@");
        text.extend_from_slice(domain.as_bytes());
    }
    if is_valid(&text) { Ok(text) } else { Err(SendmailError::Address { what, text, cause: None }) }
}

/// Returns a number that no other mail has in its Message-ID.
fn random() -> u64 {
    // The keys of a hasher are random.
    RandomState::new().build_hasher().finish()
}
