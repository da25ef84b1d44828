//! `cargo bench`: qrelay beside a bare relay, with the same load generator and the same sink.
//!
//! Contract: `cargo bench -- [SCENARIO…] [OPTIONS]` measures and prints; docs/benchmark.md says how
//! to read the report. The load generator, the sink and the bare relay are this executable too,
//! started again with `process::ROLE`.
//!
//! # Failure
//! The exit status is 1 if a measurement failed, an answer wasn't `K` or qrelay grew, and 2 for a
//! wrong command line. A missed target is printed and doesn't change the exit status, because
//! meeting it depends on the machine.

#![forbid(unsafe_code)]

mod bare;
mod error;
mod flood;
mod growth;
mod hop;
mod instructions;
mod life;
mod load;
mod measure;
mod netstring;
mod outcome;
mod plot;
mod postgres;
mod process;
mod report;
mod scenario;
mod shape;
mod sink;
mod spawn;
mod usage;

use std::{
    env, io,
    path::{Path, PathBuf},
    process::ExitCode,
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use clap::{Parser, builder::PossibleValuesParser};
use nix::sys::{
    prctl::set_pdeathsig,
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal,
};
use serde_json::{Value, json};

use crate::{
    error::{BenchError, system},
    hop::NextHop,
    measure::{Extent, QRELAY},
    postgres::Cluster,
    process::{Build, Program, Shape, Sink, Subject, Surroundings},
    scenario::{Hop, Quantity, Rival, SCENARIOS, Scenario, Target},
};

/// Measures qrelay against a bare relay.
#[derive(Debug, Parser)]
struct Options {
    /// Scenarios to run; `all` are those that measure time
    #[arg(default_value = SCENARIOS[0].name, value_parser = names())]
    scenarios: Vec<String>,
    /// Lists the scenarios
    #[arg(long)]
    list: bool,
    /// Rounds: one slot of every relay each
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds per slot
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    slot: f64,
    /// Clients that send at the same time, instead of the scenario's number
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4000))]
    clients: Option<u32>,
    /// Bytes per message, instead of the scenario's number
    #[arg(long)]
    size: Option<usize>,
    /// Threads of load generator and sink each [default: a half of the CPUs]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Writes all numbers to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draws rate and CPU time against clients, size and workers into this directory
    #[arg(long, value_name = "DIRECTORY")]
    plots: Option<PathBuf>,
    /// Another QMQP daemon to compare with; {config}, {socket} and {next_hop} are filled in
    #[arg(long, value_name = "COMMAND")]
    peer: Option<String>,
    /// Where the peer listens, if {config} or {socket} doesn't tell it
    #[arg(long, value_name = "PATH", requires = "peer")]
    peer_socket: Option<PathBuf>,
    /// Appends qrelay's log to this file instead of /dev/null
    #[arg(long)]
    log: Option<PathBuf>,
    /// Measures the bare relays alone, also those in C, without qrelay
    #[arg(long)]
    floor_only: bool,
    /// Compares with this executable of qrelay, which gets the same script, instead of the
    /// scenario's baseline
    #[arg(long, value_name = "QRELAY", conflicts_with = "floor_only")]
    against: Option<PathBuf>,
    /// Mails that `growth` and `growth-plain` send
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(10..))]
    mails: u64,
    /// Records the counts of `instructions` instead of comparing with them
    #[arg(long)]
    write: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// The scenarios that aren't in the table, with a line about each.
fn others() -> impl Iterator<Item = (&'static str, &'static str)> {
    let growth = growth::KINDS.iter().map(|kind| (kind.name, kind.about));
    let more = [(flood::NAME, flood::ABOUT), (instructions::NAME, instructions::ABOUT)];
    life::KINDS.iter().map(|kind| (kind.name, kind.about)).chain(growth).chain(more)
}

/// Name of all scenarios that measure time.
const ALL: &str = "all";

fn names() -> PossibleValuesParser {
    let names = SCENARIOS.iter().map(|scenario| scenario.name);
    names.chain(others().map(|(name, _)| name)).chain([ALL]).collect::<Vec<_>>().into()
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number from 0.1 to 600 is needed".to_owned()),
    }
}

impl Options {
    fn chooses(&self, name: &str) -> bool {
        self.scenarios.iter().any(|chosen| chosen == name)
    }

    fn chooses_all(&self) -> bool {
        self.chooses(ALL)
    }

    fn extent(&self, scenario: &Scenario) -> Extent {
        let half = thread::available_parallelism().map_or(1, |cpus| (cpus.get() / 2).max(1));
        let clients = self.clients.map_or(scenario.clients, |clients| clients as usize);
        let reload = Duration::from_secs(scenario.reload);
        // At the end of a slot each client waits for its last answer, on average for half of the
        // next hop's delay longer than the slot: 1 % of 50 delays.
        let delays = Duration::from_millis(scenario.delay) * 50;
        let slot = Duration::from_secs_f64(self.slot).max(reload * 2).max(delays);
        Extent {
            rounds: self.rounds as usize,
            slot,
            clients,
            threads: self.threads.map_or(half, |threads| threads as usize).min(clients),
            size: self.size.unwrap_or(scenario.size),
            open: scenario.open,
            reload,
        }
    }
}

fn main() -> ExitCode {
    raise_descriptors();
    let arguments: Vec<String> = env::args().collect();
    let result = match arguments.get(1..) {
        Some([flag, role, rest @ ..]) if flag == process::ROLE => run_role(role, rest),
        _ => run_all(&Options::parse()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("benchmark: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Raises the limit of descriptors as far as possible: each client needs one. With a lower limit
/// the scenarios with fewer clients work.
fn raise_descriptors() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Runs this process as a part of the benchmark. The kernel kills it when the measuring process
/// ends.
fn run_role(role: &str, words: &[String]) -> Result<(), BenchError> {
    set_pdeathsig(Signal::SIGKILL).map_err(system("prctl"))?;
    let wrong = |index: usize| system(format!("argument {index} of {role}"))(invalid());
    fn parse<T: FromStr>(words: &[String], index: usize) -> Option<T> {
        words.get(index)?.parse().ok()
    }
    let number = |index| parse::<u64>(words, index).ok_or_else(|| wrong(index));
    let hop = |index| parse::<NextHop>(words, index).ok_or_else(|| wrong(index));
    let path = |index: usize| words.get(index).map(Path::new).ok_or_else(|| wrong(index));
    let result = match role {
        "sink" => {
            let delay = Duration::from_micros(number(1)?);
            sink::run(number(0)? as usize, delay, words.get(2).map(Path::new))
        }
        "bare" => bare::run(path(0)?, &hop(1)?, number(2)? as usize),
        "shape" => shape::run(path(0)?, &hop(1)?, number(2)? as usize),
        "shape-worker" => shape::work(&hop(0)?, number(1)? as usize),
        "attack" => {
            let begin = words.get(3).map_or("", String::as_str);
            flood::attack(path(0)?, number(1)? as usize, number(2)? as usize, begin)
        }
        "idle" => life::hold(path(0)?, number(1)? as usize),
        _ => {
            let plan = load::Plan {
                socket: path(0)?,
                clients: number(1)? as usize,
                threads: number(2)? as usize,
                size: number(3)? as usize,
                duration: Duration::from_micros(number(4)?),
                mails: number(5)?,
                rate: number(6)? as f64,
            };
            let outcome = match role {
                "spawn" => spawn::run(plan.socket, plan.clients, plan.size, plan.duration),
                _ => load::run(&plan),
            };
            outcome.map(|outcome| println!("{outcome}"))
        }
    };
    result.map_err(system(role))
}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

fn run_all(options: &Options) -> Result<(), BenchError> {
    if options.list {
        let known = SCENARIOS.iter().map(|scenario| (scenario.name, scenario.about));
        for (name, about) in known.chain(others()) {
            println!("{name:<12} {about}");
        }
        return Ok(());
    }
    let mut records = Vec::new();
    let mut failed = 0;
    for scenario in SCENARIOS {
        if options.chooses(scenario.name) || options.chooses_all() {
            let (record, refused) = run_scenario(scenario, options)?;
            records.push(record);
            failed += refused;
        }
    }
    let log = options.log.as_deref();
    for kind in &life::KINDS {
        if options.chooses(kind.name) || options.chooses_all() {
            records.push(life::run(kind, options.rounds, options.slot, log)?);
        }
    }
    write_records(options, &records)?;
    if failed > 0 {
        return Err(BenchError::NotAccepted(failed));
    }
    let extent = options.extent(&SCENARIOS[0]);
    for kind in growth::KINDS.iter().filter(|kind| options.chooses(kind.name)) {
        growth::run(kind, options.mails, &extent, log)?;
    }
    if options.chooses(flood::NAME) {
        flood::run(&extent, log)?;
    }
    if options.chooses(instructions::NAME) {
        let counts = Path::new(env!("CARGO_MANIFEST_DIR")).join(COUNTS);
        instructions::run(&counts, options.write, log)?;
    }
    Ok(())
}

/// Writes what was measured to the files that the options name.
fn write_records(options: &Options, records: &[Value]) -> Result<(), BenchError> {
    if let Some(file) = &options.json {
        let machine = usage::machine();
        let run = json!({ "machine": machine, "rounds": options.rounds, "slot_s": options.slot });
        let text = format!("{:#}\n", json!({ "run": run, "scenarios": records }));
        std::fs::write(file, text).map_err(system(file.display().to_string()))?;
    }
    match &options.plots {
        Some(directory) => plot::draw(directory, records),
        None => Ok(()),
    }
}

/// The relays of a scenario in the order of their slots, and which of them are compared.
struct LineUp {
    relays: Vec<(&'static str, Program)>,
    /// Names of two relays whose ratio is printed.
    pairs: Vec<(&'static str, &'static str)>,
}

/// Returns the relays of a scenario: rivals, qrelay, and a second copy of the first rival.
fn line_up(
    scenario: &Scenario,
    options: &Options,
    dir: &Path,
    program: &Path,
) -> Result<LineUp, BenchError> {
    let qrelay = |build, script: &str| Program::Qrelay {
        build,
        script: script.to_owned(),
        log: options.log.clone(),
        descriptors: None,
        callgrind: None,
    };
    let mut relays = Vec::new();
    let mut pairs = Vec::new();
    let mut again = None;
    if let Some(executable) = &options.against {
        let other = qrelay(Build::Other(executable.clone()), scenario.script);
        relays.push((OTHER, other.clone()));
        pairs.push((QRELAY, OTHER));
        again = Some((OTHER, OTHER_AGAIN, other));
    }
    for rival in scenario.rivals.iter().filter(|_| options.against.is_none()) {
        let relay = match (rival, &options.peer) {
            (Rival::Bare, _) => Program::Bare(Shape::Single, scenario.threads),
            (Rival::Shape, _) => Program::Bare(Shape::Passing, scenario.threads),
            (Rival::Spawn, _) => Program::Spawn(program.to_owned()),
            (Rival::Script(script), _) => qrelay(Build::Ours, script),
            (Rival::Peer, Some(command)) => Program::Peer {
                command: command.clone(),
                socket: options.peer_socket.clone(),
                script: scenario.script.to_owned(),
            },
            (Rival::Peer, None) => continue,
        };
        let (name, second) = rival.names();
        pairs.push((QRELAY, name));
        again = again.or_else(|| Some((name, second, relay.clone())));
        relays.push((name, relay));
    }
    if options.floor_only {
        pairs.clear();
        // Of the two programs, floor2.c also discards, and both relay over TCP only.
        let floors = match scenario.hop {
            Hop::Tcp => FLOORS.as_slice(),
            Hop::Nowhere => &FLOORS[1..],
            Hop::Local => &[],
        };
        for (variable, name, rival) in floors {
            if let Some(executable) = process::compile_floor(dir, variable)? {
                relays.push((name, Program::Floor(executable, scenario.threads)));
                pairs.push((rival.names().0, name));
            }
        }
    } else {
        relays.push((QRELAY, qrelay(Build::Ours, scenario.script)));
    }
    if let Some((first, second, relay)) = again {
        relays.push((second, relay));
        pairs.insert(0, (second, first));
    }
    Ok(LineUp { relays, pairs })
}

/// The recorded counts of instructions, from the directory of the package.
const COUNTS: &str = "../tests/bench/instructions.json";

/// The bare relays in C: the variable with the path of the source, the name in the report, and the
/// relay that should be as fast.
const FLOORS: [(&str, &str, Rival); 2] =
    [("QRELAY_FLOOR_C", "floor.c", Rival::Bare), ("QRELAY_FLOOR2_C", "floor2.c", Rival::Shape)];

/// Name of another build of qrelay in the report, and of its second copy.
const OTHER: &str = "qrelay, other build";
const OTHER_AGAIN: &str = "qrelay, other again";

/// What two builds of qrelay are expected to differ by at most; less is noise.
const AGAINST: &[Target] = &[Target { quantity: Quantity::Rate, against: OTHER, bound: 0.98 }];

/// Measures one scenario and prints its report; returns its record and the number of answers that
/// weren't `K`.
fn run_scenario(scenario: &Scenario, options: &Options) -> Result<(Value, u64), BenchError> {
    let extent = options.extent(scenario);
    report::opening(scenario, &extent);
    let dir = tempfile::tempdir().map_err(system("temporary directory"))?;
    let path = dir.path().join("sink");
    let path = (scenario.hop == Hop::Local).then_some(path.as_path());
    let sink = Sink::start(extent.threads, Duration::from_millis(scenario.delay), path)?;
    let program = spawn::compile(dir.path())?;
    let line_up = line_up(scenario, options, dir.path(), &program)?;
    let database = Cluster::for_script(scenario.script)?;
    let hop = if scenario.hop == Hop::Nowhere { NextHop::Nowhere } else { sink.hop.clone() };
    let environment = database.iter().flat_map(Cluster::environment).collect();
    let around = Surroundings { hop, program, environment };
    let subjects: Vec<Subject> = line_up
        .relays
        .iter()
        .map(|(name, program)| Subject::start(name, program, dir.path(), &around))
        .collect::<Result<_, _>>()?;
    let qrelay = subjects.iter().find(|subject| subject.name == QRELAY);
    if let Some(qrelay) = qrelay {
        wait_until_settled(qrelay);
        report::processes("idle", qrelay, &qrelay.memory());
    }
    let series = measure::run(&subjects, &sink, &extent)?;
    let relays = report::table(&subjects, &series);
    let slots = |name: &str| {
        let index = subjects.iter().position(|subject| subject.name == name)?;
        Some(series.slots[index].as_slice())
    };
    let compare = |(a, b): &(&str, &str)| {
        let what = format!("{a} / {b}");
        Some(report::comparison(&what, slots(a)?, slots(b)?))
    };
    let comparisons: Vec<Value> = line_up.pairs.iter().filter_map(compare).collect();
    let targets = if options.against.is_some() { AGAINST } else { scenario.targets };
    let verdict = |target| report::verdict(target, scenario, &extent, &subjects, &series);
    let verdicts: Vec<Value> = targets.iter().filter_map(verdict).collect();
    report::headroom(&subjects, &series, &extent);
    if let Some(qrelay) = qrelay {
        println!();
        report::processes("after the load", qrelay, &qrelay.memory());
    }
    println!("answers: {}\n", series.answers);
    let record = json!({
        "name": scenario.name,
        "about": scenario.about,
        "clients": extent.clients,
        "size": extent.size,
        "curves": scenario.curves,
        "relays": relays,
        "comparisons": comparisons,
        "targets": verdicts,
    });
    Ok((record, series.answers.failed()))
}

/// Waits until the processes of a relay have stayed the same for 300 ms, but at most 5 s, so that
/// the memory shown as idle includes all workers.
fn wait_until_settled(subject: &Subject) {
    let pids = || subject.memory().iter().map(|process| process.pid).collect::<Vec<_>>();
    let begin = Instant::now();
    let mut known = pids();
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(300) && begin.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(20));
        let now = pids();
        if now != known {
            (known, since) = (now, Instant::now());
        }
    }
}
