//! The result of a trial, for people and for programs. Pure.

use std::ffi::CString;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use qrelay_shared::address::printable;
use qrelay_shared::qmqp::{MAX_REPLY_TEXT, Reply};
use serde::Serialize;

use crate::delivery::action::{self, Action, Place};
use crate::mail::Mail;
use crate::process::trial::records::Record;

/// What became of a mail, as far as the handler decides it. What doesn't apply is left out.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Name of the action; none if the handler has not run or has failed.
    pub action: Option<&'static str>,
    /// The listener that the mail came through.
    pub listener: String,
    /// The next hops of `connect`, in the order of the script.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub next_hops: Vec<String>,
    /// Whether the next hops are tried in random order.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub random_order: bool,
    /// Time limit of the action itself, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<f64>,
    /// Time limit for each next hop, in seconds, if the action has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_timeout: Option<f64>,
    /// The program of `exec` or `exec_raw`, and its arguments.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub program: Vec<String>,
    /// The program's environment.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<String>,
    /// The client's answer, if it doesn't depend on others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<Answer>,
    /// The account that the handler has set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    /// The sender as the mail leaves.
    pub sender: String,
    /// The recipients as the mail leaves.
    pub recipients: Vec<String>,
    /// The parts of the envelope that are not as given: `sender`, `recipients`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub changed: Vec<&'static str>,
    /// The lines that the handler has inserted, in the order in which they will stand.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inserted: Vec<String>,
    /// The fields that the handler has removed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<String>,
    /// What was logged, while the script was loaded and while its handler ran.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<Record>,
    /// Why the handler has not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// Why the handler has decided nothing, with file and line where they are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The calls that led to the error, the innermost first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub traceback: Vec<String>,
    /// How long the handler took, in seconds.
    pub seconds: f64,
}

/// An answer to the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// `K`, `Z` or `D`.
    pub status: char,
    /// Text, as the client gets it.
    pub text: String,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        let sent = reply.text.len().min(MAX_REPLY_TEXT);
        let text = printable(&reply.text[..sent]).into_owned();
        Self { status: char::from(reply.status.code()), text }
    }
}

impl Report {
    /// Returns the report as a JSON object, with a line end.
    pub fn json(&self) -> String {
        // Strings and numbers can always be written.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// Notes an action.
    pub(super) fn decide(&mut self, action: &Action) {
        self.action = Some(action.name());
        self.timeout = action.timeout().map(|limit| limit.as_secs_f64());
        match action {
            Action::Connect(connect) => {
                self.next_hops = connect.places.iter().map(place).collect();
                self.random_order = connect.random;
                self.connect_timeout = connect.connect_timeout.map(|limit| limit.as_secs_f64());
            }
            Action::Exec(program) | Action::ExecRaw(program) => {
                self.program = program.arguments.iter().map(text).collect();
                self.environment = program.environment.iter().map(text).collect();
            }
            Action::Discard(own) => self.answer = Some(action::discarded(own).into()),
            Action::Reject(own) => self.answer = Some(action::rejected(own).into()),
            Action::Defer(own) => self.answer = Some(action::deferred(own).into()),
        }
    }

    /// Notes what the handler has made of a mail that was given with this envelope.
    pub(super) fn show(&mut self, mail: &Mail) {
        let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (sender, recipients) = (lossy(mail.sender()), mail.recipients().map(lossy).collect());
        if sender != self.sender {
            self.changed.push("sender");
            self.sender = sender;
        }
        if recipients != self.recipients {
            self.changed.push("recipients");
            self.recipients = recipients;
        }
        self.account = mail.account().map(str::to_owned);
        self.inserted = mail.inserted().lines().map(lossy).collect();
        let field = |field: &[u8]| lossy(field.trim_ascii_end());
        self.removed = mail.removed().map(field).collect();
    }
}

fn place(place: &Place) -> String {
    match place {
        Place::Address(hop) => Arc::clone(&hop.name).to_string(),
        Place::Name { host, port } => format!("{host}:{port}"),
    }
}

fn text(text: &CString) -> String {
    text.to_string_lossy().into_owned()
}

/// Width of the first column.
const COLUMN: usize = 17;

/// One line per item: its name, and its value. The last line is the time that the handler took.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: &str| {
            writeln!(f, "{name:COLUMN$}{}", printable(value.trim_end().as_bytes()))
        };
        line("action", self.action.unwrap_or("none"))?;
        for hop in &self.next_hops {
            line("next hop", hop)?;
        }
        if self.random_order {
            line("order", "random")?;
        }
        if !self.program.is_empty() {
            let words: Vec<_> = self.program.iter().map(|word| quoted(word)).collect();
            line("program", &words.join(" "))?;
        }
        for variable in &self.environment {
            line("environment", &quoted(variable))?;
        }
        for (name, limit) in [("timeout", self.timeout), ("connect timeout", self.connect_timeout)]
        {
            if let Some(seconds) = limit {
                line(name, &format!("{seconds} s"))?;
            }
        }
        if let Some(Answer { status, text }) = &self.answer {
            line("answer", &format!("{status} {text}"))?;
        }
        if let Some(cause) = &self.cause {
            line("cause", cause)?;
        }
        if let Some(error) = &self.error {
            line("error", error)?;
        }
        for frame in &self.traceback {
            line("traceback", frame)?;
        }
        if let Some(account) = &self.account {
            line("account", account)?;
        }
        if self.changed.contains(&"sender") {
            line("sender", if self.sender.is_empty() { "''" } else { &self.sender })?;
        }
        if self.changed.contains(&"recipients") {
            for recipient in &self.recipients {
                line("recipient", recipient)?;
            }
        }
        for inserted in &self.inserted {
            line("inserted", inserted)?;
        }
        for removed in &self.removed {
            line("removed", &removed.replace("\r\n", "\n").replace('\n', " "))?;
        }
        for record in &self.log {
            line("log", &record.to_string())?;
        }
        line("time", &format!("{:.1} ms", 1e3 * self.seconds))
    }
}

/// Returns a word as a shell reads it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "@%+=:,./-_".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// The time of a handler, in the unit of a report.
pub(super) fn seconds(time: Duration) -> f64 {
    // Microseconds are as exact as such a measurement is.
    time.as_micros() as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::action::{Connect, Exec};
    use crate::mail::test::mail;
    use qrelay_shared::endpoint::Endpoint;

    fn report(action: &Action) -> String {
        let mut report = Report::default();
        report.decide(action);
        let text = report.to_string();
        text.strip_suffix("time             0.0 ms\n").expect("the time").to_owned()
    }

    #[test]
    fn actions() {
        let address = Endpoint::Inet(([192, 0, 2, 1], 628).into());
        let connect = Connect {
            places: vec![address.into(), Place::Name { host: "relay".into(), port: 6280 }],
            random: true,
            timeout: Some(Duration::from_millis(1500)),
            connect_timeout: Some(Duration::from_secs(2)),
        };
        assert_eq!(
            report(&Action::Connect(Arc::new(connect))),
            "action           connect\n\
             next hop         192.0.2.1:628\n\
             next hop         relay:6280\n\
             order            random\n\
             timeout          1.5 s\n\
             connect timeout  2 s\n"
        );
        let exec = Exec {
            arguments: vec![c"/bin/x".into(), c"".into(), c"a b's".into(), c"a@b".into()],
            environment: vec![c"PATH=/bin".into()],
            timeout: None,
        };
        assert_eq!(
            report(&Action::ExecRaw(Arc::new(exec))),
            "action           exec_raw\n\
             program          /bin/x '' 'a b'\\''s' a@b\n\
             environment      PATH=/bin\n"
        );
        assert_eq!(
            report(&Action::Reject(None)),
            "action           reject\nanswer           D rejected\n"
        );
    }

    #[test]
    fn an_answer_is_as_long_as_the_client_gets_it() {
        let answer = Answer::from(Reply::temporary("x".repeat(300)));
        assert_eq!((answer.status, answer.text.len()), ('Z', 255));
    }

    #[test]
    fn changes() {
        let mut changed = mail(b"A: 1\nB: 2\n x\nC: 3\n\n", b"s@x", &[b"r@x", b"q@x"]);
        let given = || Report {
            sender: "s@x".into(),
            recipients: vec!["r@x".into(), "q@x".into()],
            ..Report::default()
        };
        let mut report = given();
        report.show(&changed);
        assert_eq!(report.to_string(), "action           none\ntime             0.0 ms\n");
        changed.insert_header(b"X", b"\xff1");
        changed.insert_header(b"Y", b"2");
        changed.remove_fields(Some(5..13));
        changed.set_account(Some("shop".into()));
        changed.set_sender(Vec::new());
        changed.set_recipients(vec![b"n@x".to_vec()]);
        let mut report = given();
        report.show(&changed);
        assert_eq!(
            report.to_string(),
            "action           none\n\
             account          shop\n\
             sender           ''\n\
             recipient        n@x\n\
             inserted         Y: 2\n\
             inserted         X: \u{fffd}1\n\
             removed          B: 2  x\n\
             time             0.0 ms\n"
        );
    }
}
