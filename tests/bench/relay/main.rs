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
mod instructions;
mod load;
mod measure;
mod netstring;
mod outcome;
mod process;
mod report;
mod scenario;
mod sink;
mod usage;

use std::{
    env, io,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clap::{Parser, builder::PossibleValuesParser};
use nix::sys::{prctl::set_pdeathsig, signal::Signal};

use crate::{
    error::{BenchError, system},
    measure::Extent,
    process::{Build, Program, Sink, Subject},
    scenario::{Baseline, SCENARIOS, Scenario, Target},
};

/// Measures qrelay against a bare relay.
#[derive(Debug, Parser)]
struct Options {
    /// Scenarios to run
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
    /// Clients that send at the same time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4000))]
    clients: u32,
    /// Bytes per message
    #[arg(long, default_value_t = 2048)]
    size: usize,
    /// Threads of load generator and sink each [default: a half of the CPUs]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Appends qrelay's log to this file instead of /dev/null
    #[arg(long)]
    log: Option<PathBuf>,
    /// Measures the bare relay, floor.c and A/A alone, without qrelay
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

fn names() -> PossibleValuesParser {
    let names = SCENARIOS.iter().map(|scenario| scenario.name);
    let growth = growth::KINDS.iter().map(|kind| kind.name);
    names.chain(growth).chain([flood::NAME, instructions::NAME]).collect::<Vec<_>>().into()
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number from 0.1 to 600 is needed".to_owned()),
    }
}

impl Options {
    /// What the ratio of qrelay to the baseline should be in a scenario.
    fn target(&self, scenario: &Scenario) -> Target {
        if self.against.is_some() { AGAINST } else { scenario.target }
    }

    fn extent(&self) -> Extent {
        let half = thread::available_parallelism().map_or(1, |cpus| (cpus.get() / 2).max(1));
        let clients = self.clients as usize;
        Extent {
            rounds: self.rounds as usize,
            slot: Duration::from_secs_f64(self.slot),
            clients,
            threads: self.threads.map_or(half, |threads| threads as usize).min(clients),
            size: self.size,
        }
    }
}

fn main() -> ExitCode {
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

/// Runs this process as load generator, sink or bare relay. The kernel kills it when the measuring
/// process ends.
fn run_role(role: &str, arguments: &[String]) -> Result<(), BenchError> {
    set_pdeathsig(Signal::SIGKILL).map_err(system("prctl"))?;
    let number = |index: usize| -> Result<u64, BenchError> {
        let word = arguments.get(index).and_then(|word| word.parse().ok());
        word.ok_or_else(|| system(format!("argument {index} of {role}"))(invalid()))
    };
    match role {
        "sink" => sink::run(number(0)? as usize).map_err(system("sink")),
        "bare" => {
            let port = u16::try_from(number(1)?).map_err(|_| system("port")(invalid()))?;
            bare::run(Path::new(&arguments[0]), port).map_err(system("bare relay"))
        }
        "attack" => {
            let begin = arguments.get(3).map_or("", String::as_str);
            flood::attack(Path::new(&arguments[0]), number(1)? as usize, number(2)? as usize, begin)
                .map_err(system("attack"))
        }
        _ => {
            let outcome = load::run(&load::Plan {
                clients: number(1)? as usize,
                threads: number(2)? as usize,
                size: number(3)? as usize,
                duration: Duration::from_micros(number(4)?),
                mails: number(5)?,
                socket: Path::new(&arguments[0]),
            });
            println!("{}", outcome.map_err(system("load generator"))?);
            Ok(())
        }
    }
}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

fn run_all(options: &Options) -> Result<(), BenchError> {
    if options.list {
        let known = SCENARIOS.iter().map(|scenario| (scenario.name, scenario.about));
        let more = growth::KINDS.iter().map(|kind| (kind.name, kind.about));
        let others = [(flood::NAME, flood::ABOUT), (instructions::NAME, instructions::ABOUT)];
        for (name, about) in known.chain(more).chain(others) {
            println!("{name:<12} {about}");
        }
        return Ok(());
    }
    let chosen = |scenario: &&Scenario| options.scenarios.iter().any(|name| name == scenario.name);
    let mut failed = 0;
    for scenario in SCENARIOS.iter().filter(chosen) {
        failed += run_scenario(scenario, options)?;
    }
    if failed > 0 {
        return Err(BenchError::NotAccepted(failed));
    }
    for kind in growth::KINDS.iter().filter(|kind| options.scenarios.iter().any(|n| n == kind.name))
    {
        growth::run(kind, options.mails, &options.extent(), options.log.as_deref())?;
    }
    if options.scenarios.iter().any(|name| name == flood::NAME) {
        flood::run(&options.extent(), options.log.as_deref())?;
    }
    if options.scenarios.iter().any(|name| name == instructions::NAME) {
        let counts = Path::new(env!("CARGO_MANIFEST_DIR")).join(COUNTS);
        instructions::run(&counts, options.write, options.log.as_deref())?;
    }
    Ok(())
}

/// Returns the relays of a scenario in the order of their slots, each next to the baseline.
fn line_up(
    scenario: &Scenario,
    options: &Options,
    dir: &Path,
) -> Result<Vec<(&'static str, Program)>, BenchError> {
    let qrelay = |build, script: &str| Program::Qrelay {
        build,
        script: script.to_owned(),
        log: options.log.clone(),
        descriptors: None,
        callgrind: None,
    };
    let mut relays = Vec::new();
    let (name, again, baseline) = match (&options.against, scenario.baseline) {
        (Some(executable), _) => {
            let other = qrelay(Build::Other(executable.clone()), scenario.script);
            ("qrelay, other build", "qrelay, other again", other)
        }
        (None, Baseline::Bare) => {
            let floor = process::compile_floor(dir)?;
            relays.extend(floor.map(|executable| (FLOOR, Program::Floor(executable))));
            ("bare relay", "bare relay again", Program::Bare)
        }
        (None, Baseline::Script(script)) => {
            ("qrelay, baseline", "qrelay, baseline again", qrelay(Build::Ours, script))
        }
    };
    relays.push((name, baseline.clone()));
    if !options.floor_only {
        relays.push(("qrelay", qrelay(Build::Ours, scenario.script)));
    }
    relays.push((again, baseline));
    Ok(relays)
}

/// The recorded counts of instructions, from the directory of the package.
const COUNTS: &str = "../tests/bench/instructions.json";

/// Name of the C relay in the report.
const FLOOR: &str = "floor.c";

/// What two builds of qrelay are expected to differ by at most; less is noise.
const AGAINST: Target = Target::RateAtLeast(0.98);

/// Measures one scenario and prints its report; returns the number of answers that weren't `K`.
fn run_scenario(scenario: &Scenario, options: &Options) -> Result<u64, BenchError> {
    let extent = options.extent();
    report::opening(scenario, &extent);
    let dir = tempfile::tempdir().map_err(system("temporary directory"))?;
    let sink = Sink::start(extent.threads)?;
    let subjects: Vec<Subject> = line_up(scenario, options, dir.path())?
        .iter()
        .map(|(name, program)| Subject::start(name, program, dir.path(), sink.port))
        .collect::<Result<_, _>>()?;
    let qrelay = subjects.iter().find(|subject| subject.name == "qrelay");
    if let Some(qrelay) = qrelay {
        wait_until_settled(qrelay);
        report::processes("idle", qrelay, &qrelay.memory());
    }
    let series = measure::run(&subjects, &sink, &extent)?;
    report::table(&subjects, &series);
    compare(options.target(scenario), &subjects, &series);
    report::headroom(&series, &extent);
    if let Some(qrelay) = qrelay {
        println!();
        report::processes("after the load", qrelay, &qrelay.memory());
    }
    println!("answers: {}", series.answers);
    Ok(series.answers.failed())
}

/// Prints every comparison with the baseline.
fn compare(target: Target, subjects: &[Subject], series: &measure::Series) {
    let slots = |index: usize| series.slots[index].as_slice();
    let baseline = usize::from(subjects[0].name == FLOOR);
    let name = subjects[baseline].name;
    if baseline == 1 {
        report::comparison("bare relay / floor.c", slots(1), slots(0));
    }
    let last = subjects.len() - 1;
    report::comparison("A/A (the baseline, twice)", slots(last), slots(baseline));
    if last > baseline + 1 {
        let what = format!("qrelay / {name}");
        let (rate, cpu) = report::comparison(&what, slots(baseline + 1), slots(baseline));
        let added = report::added_cpu(slots(baseline + 1), slots(baseline));
        let verdict = if target.is_met(rate, cpu, added) { "met" } else { "MISSED" };
        println!("target: {}: {verdict}", target.describe());
    }
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
