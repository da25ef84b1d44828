//! `qrelay mails`: the mails in flight, one in a line.

use std::io::{self, Write};
use std::path::Path;

use qrelay_shared::admin::{Body, Command, InFlight};
use qrelay_shared::exit::Exit;

use crate::admin::screen::{Table, duration, size};
use crate::admin::{Connection, Failure, PATIENCE};
use crate::output::print;

/// Prints the mails in flight.
///
/// # Errors
/// See [`Failure`].
pub(super) fn list(path: &Path, json: bool) -> Result<Exit, Failure> {
    let mut connection = Connection::open(path)?;
    connection.ask(Command::Mails)?;
    let mut mails = Vec::new();
    loop {
        match connection.answer(Some(PATIENCE))? {
            Body::Mail(mail) if json => {
                // A reader that has read enough is gone.
                let line = serde_json::to_string(&mail).map_err(io::Error::other);
                if line.and_then(|line| writeln!(io::stdout(), "{line}")).is_err() {
                    return Ok(Exit::Success);
                }
            }
            Body::Mail(mail) => mails.push(*mail),
            Body::End { .. } if json => return Ok(Exit::Success),
            Body::End { .. } => return Ok(print(&text(&mut mails))),
            body => return Err(connection.unexpected(&body)),
        }
    }
}

/// Lists the mails, the oldest first.
fn text(mails: &mut [InFlight]) -> String {
    mails.sort_by(|one, other| other.age.total_cmp(&one.age));
    let mut table = Table::new(&[
        "<ID",
        ">AGE",
        "<PHASE",
        ">FOR",
        "<FROM",
        "<TO",
        ">SIZE",
        "<CLIENT",
        "<ACCOUNT",
        "<NEXT HOP",
        ">WORKER",
    ]);
    for mail in mails.iter() {
        let client = match (mail.uid, mail.pid, &mail.peer) {
            (Some(uid), Some(pid), _) => format!("uid {uid} pid {pid}"),
            (Some(uid), None, _) => format!("uid {uid}"),
            (None, _, peer) => peer.clone().unwrap_or_default(),
        };
        let known = mail.recipients > 0;
        let more = mail.recipients.saturating_sub(1);
        let first = mail.to.first().map_or("…", String::as_str);
        let to = match more {
            0 if known => first.to_owned(),
            0 => "-".to_owned(),
            more => format!("{first} +{more}"),
        };
        let from = if known { format!("<{}>", mail.from) } else { "-".to_owned() };
        let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        table.row([
            mail.id.clone(),
            duration(mail.age),
            mail.phase.clone(),
            duration(mail.phase_age),
            from,
            to,
            if known { size(mail.size) } else { "-".to_owned() },
            client,
            or_dash(&mail.account),
            or_dash(&mail.next_hop),
            mail.worker.map_or_else(|| "-".to_owned(), |worker| worker.to_string()),
        ]);
    }
    match mails.len() {
        0 => "no mail is in flight\n".to_owned(),
        1 => format!("{}1 mail\n", table.text()),
        count => format!("{}{count} mails\n", table.text()),
    }
}
