//! Two numbers that no slot shows: how fast a worker is replaced, and what an idle connection
//! costs.
//!
//! Contract: every kind is one entry of `KINDS`. It prints its claims, whether they hold, and
//! returns them for JSON.
//!
//! # Failure
//! The run ends with an error if qrelay doesn't come back, or doesn't hold all connections.

use std::{
    io::{self, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    error::{BenchError, system},
    load,
    process::{Build, Helper, Program, Sink, Subject},
    report::{Spread, claim},
    usage,
};

/// A measurement.
#[derive(Debug)]
pub struct Kind {
    /// Name on the command line, among the scenarios.
    pub name: &'static str,
    /// Description in one line, for `--list` and the report.
    pub about: &'static str,
    measure: fn(&Subject, u32, f64) -> Result<Vec<Value>, BenchError>,
}

pub const KINDS: [Kind; 2] = [
    Kind {
        name: "respawn",
        about: "time from the death of the only worker to the next mail that is accepted",
        measure: respawn,
    },
    Kind { name: "idle", about: "what 4,000 connections cost that say nothing", measure: idle },
];

/// Script with one worker, so that no other one serves while it is replaced.
const SCRIPT: &str = "
settings{workers=1}
qmqp_listen(socket, function(m)
  return m:connect(next_hop)
end)
";

/// Workers killed per round.
const KILLS: u32 = 5;

/// Connections that say nothing.
const CONNECTIONS: usize = 4000;

/// Longest wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// Starts a qrelay with one worker, and measures.
pub fn run(kind: &Kind, rounds: u32, slot: f64, log: Option<&Path>) -> Result<Value, BenchError> {
    println!("scenario {}: {}", kind.name, kind.about);
    let dir = tempfile::tempdir().map_err(system("temporary directory"))?;
    let sink = Sink::start(1, Duration::ZERO, None)?;
    let program = Program::Qrelay {
        build: Build::Ours,
        script: SCRIPT.to_owned(),
        log: log.map(Path::to_owned),
        descriptors: None,
        callgrind: None,
    };
    let qrelay = Subject::start("qrelay", &program, dir.path(), &sink.surroundings())?;
    let targets = (kind.measure)(&qrelay, rounds, slot)?;
    println!();
    Ok(json!({ "name": kind.name, "about": kind.about, "targets": targets }))
}

fn respawn(qrelay: &Subject, rounds: u32, _: f64) -> Result<Vec<Value>, BenchError> {
    let mut times = Vec::new();
    for _ in 0..rounds * KILLS {
        let worker = qrelay.memory().into_iter().find(|process| process.name == "qrelay-worker");
        let worker = worker.ok_or(BenchError::Replaced)?;
        let begin = Instant::now();
        // The process is a child of a qrelay that this benchmark runs, which has not reaped it.
        kill(Pid::from_raw(worker.pid.cast_signed()), Signal::SIGKILL).map_err(system("kill"))?;
        wait_until("a mail is accepted again", || accepts(qrelay))?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let times = Spread::new(times);
    Ok(vec![claim("median at most 10 ms", times, times.median <= 10.0)])
}

/// Whether a mail is accepted. Those that the dead worker had are answered `Z`.
fn accepts(qrelay: &Subject) -> bool {
    let answer = load::submit(&qrelay.socket, 2 << 10);
    answer.is_ok_and(|answer| load::verdict(&answer) == Some(b'K'))
}

fn idle(qrelay: &Subject, _: u32, slot: f64) -> Result<Vec<Value>, BenchError> {
    let supervisor = || qrelay.memory().into_iter().next().ok_or(BenchError::Replaced);
    let before = supervisor()?;
    let _clients = Helper::start("idle", |command| {
        command.arg(&qrelay.socket).arg(CONNECTIONS.to_string());
    })?;
    wait_until("all connections are accepted", || usage::entries(before.pid, "fd") >= CONNECTIONS)?;
    let memory = supervisor()?.private.saturating_sub(before.private);
    let each = Spread::new([memory as f64 / CONNECTIONS as f64]);
    let cpu = qrelay.cpu();
    // What is measured is that nothing happens, so time has to pass. CPU time is counted in units
    // of 10 ms.
    let time = Duration::from_secs_f64(slot * 5.0);
    thread::sleep(time);
    let cpu = (qrelay.cpu() - cpu).as_secs_f64() / time.as_secs_f64() * 100.0;
    let cpu = Spread::new([cpu]);
    Ok(vec![
        claim("KiB of supervisor memory each at most 1", each, each.median <= 1.0),
        claim("percent of a CPU at most 0.5", cpu, cpu.median <= 0.5),
    ])
}

fn wait_until(what: &str, condition: impl Fn() -> bool) -> Result<(), BenchError> {
    let begin = Instant::now();
    while !condition() {
        if begin.elapsed() > PATIENCE {
            return Err(system(what)(io::Error::from(io::ErrorKind::TimedOut)));
        }
        thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// The life of the helper `idle`: opens connections and says nothing.
pub fn hold(socket: &Path, connections: usize) -> io::Result<()> {
    let _clients: Vec<UnixStream> =
        (0..connections).map(|_| UnixStream::connect(socket)).collect::<Result<_, _>>()?;
    println!("ready");
    io::stdout().flush()?;
    loop {
        thread::park();
    }
}
