//! `qrelay status`: the state of the daemon on one screen.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::path::Path;
use std::time::Duration;

use qrelay_shared::address::printable;
use qrelay_shared::admin::{Body, Command, Status};
use qrelay_shared::exit::Exit;
use qrelay_shared::system_error::shown;

use crate::admin::screen::{Table, count, duration, optional, size};
use crate::admin::{Connection, Failure, PATIENCE};
use crate::output::print;

/// How often `--watch` shows the state.
const INTERVAL: Duration = Duration::from_secs(1);

/// Incidents that are shown, the latest ones.
const SHOWN: usize = 8;

/// Shows the state once.
///
/// # Errors
/// See [`Failure`].
pub(super) fn show(path: &Path) -> Result<Exit, Failure> {
    let status = get(path)?;
    Ok(match print(&text(&status)) {
        Exit::Success => exit(&status),
        other => other,
    })
}

/// Prints the state as JSON, as the daemon has sent it, so that fields which this program doesn't
/// know are there, too.
///
/// # Errors
/// See [`Failure`].
pub(super) fn print_json(path: &Path) -> Result<Exit, Failure> {
    let (line, status) = get_json(path)?;
    Ok(match print(&format!("{line}\n")) {
        Exit::Success => exit(&status),
        other => other,
    })
}

/// Shows the state again and again, in place on a terminal.
///
/// # Errors
/// The daemon can't be asked at the beginning. Later it is waited for.
pub(super) fn watch(path: &Path, json: bool) -> Result<Exit, Failure> {
    let once = || match json {
        true => get_json(path).map(|(line, _)| format!("{line}\n")),
        false => get(path).map(|status| text(&status)),
    };
    let mut screen = once()?;
    loop {
        let drawn = match !json && io::stdout().is_terminal() {
            true => draw(&screen),
            false => io::stdout().write_all(screen.as_bytes()).and_then(|()| io::stdout().flush()),
        };
        if drawn.is_err() {
            // The reader is gone.
            return Ok(Exit::Success);
        }
        std::thread::sleep(INTERVAL);
        screen = match once() {
            Ok(screen) => screen,
            Err(failure) if json => return Err(failure),
            Err(failure) => format!("{}\n", shown(&failure)),
        };
    }
}

/// Draws over what is on the terminal, as much as it has room for.
fn draw(screen: &str) -> io::Result<()> {
    let size = terminal_size::terminal_size();
    let (columns, rows) = size.map_or((80, 24), |(w, h)| (usize::from(w.0), usize::from(h.0)));
    let mut text = "\x1b[H".to_owned();
    let lines: Vec<&str> = screen.lines().take(rows.saturating_sub(1)).collect();
    for line in lines {
        text.extend(line.chars().take(columns));
        text.push_str("\x1b[K\r\n");
    }
    text.push_str("\x1b[J");
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn get(path: &Path) -> Result<Box<Status>, Failure> {
    get_json(path).map(|(_, status)| status)
}

fn get_json(path: &Path) -> Result<(String, Box<Status>), Failure> {
    ask(&mut Connection::open(path)?)
}

/// Asks for the state. Returns the state as the daemon has sent it, too.
///
/// # Errors
/// See [`Failure`].
pub fn ask(connection: &mut Connection) -> Result<(String, Box<Status>), Failure> {
    connection.ask(Command::Status)?;
    let line = connection.line(Some(PATIENCE))?;
    match connection.parse(&line)? {
        Body::Status(status) => {
            let object = serde_json::from_str::<serde_json::Value>(&line);
            let object = object.ok().and_then(|mut object| Some(object.get_mut("status")?.take()));
            let line = object.unwrap_or_default().to_string();
            Ok((line, status))
        }
        body => Err(connection.unexpected(&body)),
    }
}

fn exit(status: &Status) -> Exit {
    match status.state {
        qrelay_shared::admin::State::Serving => Exit::Success,
        _ => Exit::Refused,
    }
}

/// Returns the screen.
fn text(status: &Status) -> String {
    let mut text = String::new();
    // Writing into memory can't fail.
    let _ = head(&mut text, status);
    let tables = [listeners(status), workers(status), next_hops(status), databases(status)];
    for table in tables.into_iter().chain([dictionaries(status), incidents(status)]) {
        let table = table.text();
        if !table.is_empty() {
            text.push('\n');
            text.push_str(&table);
        }
    }
    text
}

fn head(text: &mut String, status: &Status) -> std::fmt::Result {
    let state = match status.state {
        qrelay_shared::admin::State::Starting => "starting",
        qrelay_shared::admin::State::Serving => "serving",
        qrelay_shared::admin::State::Stopping => "stopping",
    };
    let up = duration(status.now - status.started);
    writeln!(text, "qrelay {}: {state}, up {up}, pid {}", status.program, status.pid)?;
    write!(text, "config    {}", status.config)?;
    if let Some(generation) = status.generation {
        write!(text, ", generation {generation}")?;
        match status.generations.saturating_sub(1) {
            0 => {}
            others => write!(text, " ({others} more finish or are being loaded)")?,
        }
    }
    writeln!(text)?;
    if let Some(load) = &status.last_load {
        let ago = duration(status.now - load.at);
        match &load.failure {
            None => writeln!(text, "loaded    {ago} ago")?,
            Some(message) => {
                writeln!(text, "REFUSED   {ago} ago: {}", printable(message.as_bytes()))?;
            }
        }
    }
    if let Some(level) = &status.sandbox {
        let user = status.user.map(|user| format!(", workers are user {user}"));
        writeln!(text, "sandbox   {level}{}", user.unwrap_or_default())?;
    }
    let rates = &status.rates;
    writeln!(
        text,
        "rate      {:.1}/s now, {:.1}/s in 1 min, {:.1}/s in 15 min",
        rates.second, rates.minute, rates.quarter
    )?;
    writeln!(
        text,
        "mails     {} in flight, {} wait for a worker; {} silent connections",
        count(status.in_flight),
        count(status.waiting),
        count(status.held.saturating_sub(status.waiting)),
    )?;
    let answers = &status.answers;
    writeln!(
        text,
        "answers   K {}, Z {}, D {}, none {}",
        count(answers.accepted),
        count(answers.temporary),
        count(answers.permanent),
        count(answers.unanswered),
    )?;
    let times = &status.times;
    let both = |histogram: &qrelay_shared::admin::Histogram| {
        format!("{} / {}", optional(histogram.p50), optional(histogram.p99))
    };
    writeln!(
        text,
        "p50/p99   queue {}, read {}, lua {}, hop {}, all {}",
        both(&times.queue),
        both(&times.read),
        both(&times.lua),
        both(&times.hop),
        both(&times.all),
    )?;
    let ends = &status.ends;
    if ends.crashes > 0 || ends.hangs > 0 || ends.lost_mails > 0 {
        writeln!(
            text,
            "workers   {} crashed, {} of them hung; {} mails were to try again",
            ends.crashes, ends.hangs, ends.lost_mails
        )?;
    }
    let pond = status.pond.map_or_else(String::new, |pond| {
        format!("; {} Pond records, {} lost", count(pond.sent), count(pond.lost))
    });
    writeln!(
        text,
        "log       {} records, {} lost{pond}",
        count(status.log.sent),
        count(status.log.lost)
    )?;
    let own = &status.supervisor;
    writeln!(
        text,
        "itself    {}, {} of CPU time, at most {} descriptors",
        own.rss_bytes.map_or_else(|| "-".to_owned(), size),
        optional(own.cpu),
        own.descriptor_limit
    )
}

fn listeners(status: &Status) -> Table {
    let mut table = Table::new(&["<LISTENER", ">MODE", ">CONNECTIONS", ">WAIT", ">BACKLOG"]);
    for listener in &status.listeners {
        let backlog = match (listener.backlog, listener.backlog_limit) {
            (Some(length), Some(limit)) => format!("{length}/{limit}"),
            _ => "-".to_owned(),
        };
        table.row([
            listener.address.clone(),
            listener.mode.clone().unwrap_or_else(|| "-".to_owned()),
            count(listener.connections),
            count(listener.held),
            backlog,
        ]);
    }
    table
}

fn workers(status: &Status) -> Table {
    let mut table = Table::new(&[
        ">WORKER",
        ">PID",
        ">GENERATION",
        "<STATE",
        ">IN FLIGHT",
        ">K",
        ">Z",
        ">D",
        ">LUA",
        ">RSS",
        ">THREADS",
        ">AGE",
    ]);
    for worker in &status.workers {
        table.row([
            worker.worker.to_string(),
            worker.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            worker.generation.to_string(),
            worker.state.clone(),
            format!("{}/{}", worker.in_flight, worker.credit),
            count(worker.answers.accepted),
            count(worker.answers.temporary),
            count(worker.answers.permanent),
            size(worker.lua_bytes),
            worker.rss_bytes.map_or_else(|| "-".to_owned(), size),
            worker.threads.map_or_else(|| "-".to_owned(), |threads| threads.to_string()),
            duration(worker.age as f64),
        ]);
    }
    table
}

fn next_hops(status: &Status) -> Table {
    let mut table =
        Table::new(&["<NEXT HOP", ">IN FLIGHT", ">K", ">Z", ">D", ">NOT REACHED", ">P50", ">P99"]);
    for hop in &status.next_hops {
        table.row([
            hop.next_hop.clone(),
            count(hop.in_flight),
            count(hop.answers.accepted),
            count(hop.answers.temporary),
            count(hop.answers.permanent),
            count(hop.connect_failures),
            optional(hop.times.p50),
            optional(hop.times.p99),
        ]);
    }
    table
}

fn databases(status: &Status) -> Table {
    let mut table = Table::new(&["<DATABASE", ">CONNECTIONS", ">BUSY", ">WAIT", ">NOT REACHED"]);
    for database in &status.databases {
        table.row([
            database.database.clone(),
            format!("{}/{}", database.connections, database.limit),
            count(database.busy),
            count(database.waiting),
            count(database.errors),
        ]);
    }
    table
}

fn dictionaries(status: &Status) -> Table {
    let mut table =
        Table::new(&["<DICTIONARY", ">KEYS", ">MEMORY", ">LIMIT", ">HITS", ">MISSES", ">EVICTED"]);
    for dictionary in &status.dictionaries {
        table.row([
            dictionary.dictionary.clone(),
            count(dictionary.keys),
            size(dictionary.bytes),
            size(dictionary.limit_bytes),
            count(dictionary.hits),
            count(dictionary.misses),
            count(dictionary.evictions),
        ]);
    }
    table
}

fn incidents(status: &Status) -> Table {
    let mut table = Table::new(&["<LATELY", ">AGO", "<WHAT"]);
    for incident in status.incidents.iter().rev().take(SHOWN) {
        let kind = serde_json::to_value(incident.kind).ok();
        let kind = kind.as_ref().and_then(|kind| kind.as_str()).unwrap_or_default();
        let ago = duration(status.now - incident.at);
        table.row([kind.to_owned(), ago, incident.text.clone()]);
    }
    table
}
