//! What the daemon says, asked for seldom and shown to many.
//!
//! Contract: however many clients there are, the daemon gets at most one question of a kind in
//! [`FRESH`], on one connection. Meanwhile all clients get the same answer, and text that was made
//! from it.
//!
//! # Failure
//! A daemon that can't be asked is an answer, too: a line that says why.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use qrelay_shared::admin::{Body, Command, InFlight, Status};
use qrelay_shared::system_error::shown;

use crate::admin::{Connection, Failure, PATIENCE, status};
use crate::web::metrics;
use crate::web::request::Format;

/// Age from which an answer isn't used any more.
const FRESH: Duration = Duration::from_millis(50);

/// The state of the daemon at a moment, or why it isn't known.
#[derive(Debug)]
pub struct Snapshot {
    answer: Result<Known, String>,
    text: OnceLock<Arc<str>>,
    open_metrics: OnceLock<Arc<str>>,
}

/// The state as the daemon has sent it, and taken apart.
#[derive(Debug)]
struct Known {
    json: Arc<str>,
    status: Box<Status>,
}

impl Snapshot {
    fn new(answer: Result<Known, String>) -> Self {
        Self { answer, text: OnceLock::new(), open_metrics: OnceLock::new() }
    }

    /// Returns the state, if it is known.
    pub fn status(&self) -> Option<&Status> {
        self.answer.as_ref().ok().map(|known| known.status.as_ref())
    }

    /// Returns the state as JSON.
    ///
    /// # Errors
    /// Returns why the daemon could not be asked.
    pub fn json(&self) -> Result<Arc<str>, &str> {
        self.answer.as_ref().map(|known| known.json.clone()).map_err(String::as_str)
    }

    /// Returns the metrics.
    pub fn metrics(&self, format: Format) -> Arc<str> {
        let made = match format {
            Format::Text => &self.text,
            Format::OpenMetrics => &self.open_metrics,
        };
        made.get_or_init(|| metrics::render(self.status(), format).into()).clone()
    }
}

/// The mails in flight as a JSON array, or why they aren't known.
pub type Mails = Result<Arc<str>, String>;

/// An answer, and when it came.
type Latest<T> = Mutex<Option<(Instant, Arc<T>)>>;

/// A daemon that is asked by its control socket.
#[derive(Debug)]
pub struct Source {
    control: PathBuf,
    connection: Mutex<Option<Connection>>,
    snapshot: Latest<Snapshot>,
    mails: Latest<Mails>,
}

impl Source {
    /// Returns the daemon with this control socket.
    pub fn new(control: PathBuf) -> Self {
        let (connection, snapshot, mails) = Default::default();
        Self { control, connection, snapshot, mails }
    }

    /// Returns the daemon's state.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        fresh(&self.snapshot, || Snapshot::new(self.ask(state)))
    }

    /// Returns the mails in flight.
    pub fn mails(&self) -> Arc<Mails> {
        fresh(&self.mails, || self.ask(in_flight))
    }

    /// Asks a question on the connection of the question before. A daemon that has closed the
    /// connection may have been started anew, or didn't want to wait for the next question.
    fn ask<T>(
        &self,
        question: impl Fn(&mut Connection) -> Result<T, Failure>,
    ) -> Result<T, String> {
        let mut kept = lock(&self.connection);
        let talk = |mut connection| question(&mut connection).map(|answer| (connection, answer));
        let anew = || Connection::open(&self.control).and_then(talk);
        let (connection, answer) = kept
            .take()
            .map_or_else(anew, |connection| match talk(connection) {
                Err(Failure::Closed) => anew(),
                other => other,
            })
            .map_err(|failure| shown(&failure))?;
        *kept = Some(connection);
        Ok(answer)
    }
}

fn state(connection: &mut Connection) -> Result<Known, Failure> {
    let (json, status) = status::ask(connection)?;
    Ok(Known { json: json.into(), status })
}

fn in_flight(connection: &mut Connection) -> Result<Arc<str>, Failure> {
    connection.ask(Command::Mails)?;
    let mut mails: Vec<InFlight> = Vec::new();
    loop {
        match connection.answer(Some(PATIENCE))? {
            Body::Mail(mail) => mails.push(*mail),
            Body::End { .. } => break,
            body => return Err(connection.unexpected(&body)),
        }
    }
    let json = serde_json::to_string(&mails);
    json.map(Arc::from).map_err(|error| Failure::Broken(error.into()))
}

/// Returns the latest answer, or asks if that is too old. Whoever comes while the daemon is being
/// asked waits for the same answer.
fn fresh<T>(latest: &Latest<T>, ask: impl FnOnce() -> T) -> Arc<T> {
    let mut latest = lock(latest);
    match &*latest {
        Some((at, answer)) if at.elapsed() < FRESH => answer.clone(),
        _ => {
            let answer = Arc::new(ask());
            *latest = Some((Instant::now(), answer.clone()));
            answer
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
