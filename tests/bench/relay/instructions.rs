//! The instruction counts: how many instructions qrelay executes per mail, as callgrind counts
//! them.
//!
//! Contract: one entry of `CELLS` is one count. Valgrind runs the supervisor and all its children,
//! with one worker and one client that waits for each answer. Everything runs on one CPU, so that
//! the processes take turns in the same order in every run; the counts of two runs then differ by
//! about one percent, less on a quiet machine. Each cell runs twice, with few and with many mails.
//! The difference of the two is free of what starting and stopping costs. Instructions of the
//! kernel don't count, nor do those of programs that qrelay runs.
//!
//! Valgrind starts a traced child by the program that `VALGRIND_LAUNCHER` names, and would give
//! its own executable to a child that starts as /proc/self/exe, as qrelay's zygote does. So the
//! launcher is a script that puts the path of qrelay in its place.
//!
//! # Failure
//! The run fails if a count exceeds the recorded one by more than `TOLERANCE`, and if a mail isn't
//! accepted. Counts of another compiler, C library, processor or valgrind aren't comparable: then
//! the differences are only printed.

use std::{
    collections::BTreeMap,
    env, fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    error::{BenchError, system},
    load,
    process::{Build, Program, Sink, Subject, Surroundings},
    scenario, spawn,
};

/// Name on the command line, among the scenarios.
pub const NAME: &str = "instructions";

/// Description in one line, for `--list` and the report.
pub const ABOUT: &str = "instructions per mail, counted by valgrind, against the recorded counts";

/// Highest share by which a count may exceed the recorded one.
const TOLERANCE: f64 = 0.03;

/// Mails of the shorter run of each cell: all memory that is kept has been allocated by then.
const FEW: u64 = 200;

/// Settings of every script. Valgrind traces its processes, which the sandbox would prevent.
const SETTINGS: &str = "settings{workers=1, sandbox=false}\n";

/// Directory of valgrind's tools.
const TOOLS: &str = "/usr/libexec/valgrind";

/// Descriptors of qrelay. Valgrind refuses to lower the hard limit, which qrelay does if it is
/// 4096 or more.
const DESCRIPTORS: u32 = 1024;

/// One count.
struct Cell {
    name: &'static str,
    /// The scenario whose script runs.
    scenario: &'static str,
    /// Bytes per message.
    size: usize,
    /// Mails of the longer run, in addition to `FEW`.
    mails: u64,
}

const CELLS: &[Cell] = &[
    Cell { name: "relay", scenario: "relay", size: 2 << 10, mails: 3000 },
    Cell { name: "relay, 64 KiB", scenario: "relay", size: 64 << 10, mails: 1000 },
    Cell { name: "relay, 1 MiB", scenario: "relay", size: 1 << 20, mails: 800 },
    Cell { name: "attributes", scenario: "attributes", size: 2 << 10, mails: 2000 },
    Cell { name: "discard", scenario: "discard", size: 2 << 10, mails: 3000 },
    Cell { name: "exec-raw", scenario: "exec-raw", size: 2 << 10, mails: 300 },
    Cell { name: "incr", scenario: "incr", size: 2 << 10, mails: 2000 },
];

/// How valgrind runs qrelay.
#[derive(Clone, Debug)]
pub struct Callgrind {
    /// Directory of the launcher and of the files with the counts.
    dir: PathBuf,
}

impl Callgrind {
    fn new(dir: &Path, executable: &Path) -> io::Result<Self> {
        let launcher = dir.join("launcher");
        let text = format!(
            "#!/bin/sh\nwhile [ \"$1\" != /proc/self/exe ]; do shift; done\nshift\n\
             exec valgrind --tool=callgrind '{}' \"$@\"\n",
            executable.display()
        );
        fs::write(&launcher, text)?;
        fs::set_permissions(&launcher, fs::Permissions::from_mode(0o755))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Returns a command that runs an executable under valgrind.
    pub fn command(&self, executable: &Path) -> Command {
        let arch = match env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let mut command = Command::new("prlimit");
        command.env("VALGRIND_LAUNCHER", self.dir.join("launcher")).env("VALGRIND_LIB", TOOLS);
        command.arg(format!("--nofile={DESCRIPTORS}:{DESCRIPTORS}"));
        command.arg(format!("{TOOLS}/callgrind-{arch}-linux"));
        // Options on the command line would be lost: qrelay writes its title over them. So the
        // launcher gets an empty word for `--tool`.
        let counts = format!("--callgrind-out-file={}/counts.%p", self.dir.display());
        command.arg("--tool=callgrind").env(
            "VALGRIND_OPTS",
            format!("--quiet --trace-children=yes --trace-children-skip=*/program {counts}"),
        );
        command.arg(executable);
        command
    }

    /// Returns the sum of the instructions of all processes, which must have ended.
    fn sum(&self) -> io::Result<u64> {
        let mut sum = 0;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.file_stem().is_some_and(|stem| stem == "counts") {
                let text = fs::read_to_string(&path)?;
                let totals = text.lines().filter_map(|line| line.strip_prefix("totals: "));
                sum += totals.filter_map(|number| number.parse::<u64>().ok()).sum::<u64>();
            }
        }
        Ok(sum)
    }
}

/// Counts all cells, and compares with the counts of the file, or writes them to it.
pub fn run(file: &Path, write: bool, log: Option<&Path>) -> Result<(), BenchError> {
    println!("scenario {NAME}: {ABOUT}\n");
    let what = || file.display().to_string();
    let known: Value = match write {
        true => Value::Null,
        false => {
            let text = fs::read_to_string(file).map_err(system(what()))?;
            serde_json::from_str(&text).map_err(system(what()))?
        }
    };
    stay_on_one_cpu().map_err(system("sched_setaffinity"))?;
    let dir = tempfile::tempdir().map_err(system("temporary directory"))?;
    let sink = Sink::start(1, Duration::ZERO, None)?;
    let around = Surroundings { program: spawn::compile(dir.path())?, ..sink.surroundings() };
    let mut counts = BTreeMap::new();
    let mut exceeded = 0;
    println!("{:<16} {:>10} {:>10} {:>7}", "instructions", "per mail", "recorded", "");
    for cell in CELLS {
        let recorded = known["per_mail"][cell.name].as_u64();
        let ratio_of = |count| recorded.map(|recorded| count as f64 / recorded as f64);
        let grown = |count| ratio_of(count).is_some_and(|ratio| ratio > 1.0 + TOLERANCE);
        let mut count = per_mail(cell, &around, log)?;
        if grown(count) {
            // A busy machine may disturb a run, but hardly two of them.
            count = count.min(per_mail(cell, &around, log)?);
        }
        counts.insert(cell.name, count);
        let ratio = ratio_of(count);
        let verdict = match ratio {
            None => "not recorded",
            Some(_) if grown(count) => "MORE",
            Some(ratio) if ratio < 1.0 - TOLERANCE => "less: record it",
            Some(_) => "ok",
        };
        exceeded += u32::from(ratio.is_none() || grown(count));
        let recorded = recorded.unwrap_or_default();
        println!(
            "{:<16} {count:>10} {recorded:>10} {:>7.3} {verdict}",
            cell.name,
            ratio.unwrap_or(0.0)
        );
    }
    println!();
    let toolchain = toolchain();
    if write {
        let text = format!("{:#}\n", json!({ "toolchain": toolchain, "per_mail": counts }));
        return fs::write(file, text).map_err(system(what()));
    }
    if known["toolchain"] != toolchain {
        println!(
            "note: counts not compared: recorded with {}, this is {toolchain}",
            known["toolchain"]
        );
        return Ok(());
    }
    if exceeded > 0 { Err(BenchError::Instructions(exceeded)) } else { Ok(()) }
}

/// Returns the instructions per mail of one cell.
fn per_mail(cell: &Cell, around: &Surroundings, log: Option<&Path>) -> Result<u64, BenchError> {
    let few = total(cell, FEW, around, log)?;
    let many = total(cell, FEW + cell.mails, around, log)?;
    Ok(many.saturating_sub(few) / cell.mails)
}

/// Returns the instructions of a qrelay from its start to its end, with this number of mails.
fn total(
    cell: &Cell,
    mails: u64,
    around: &Surroundings,
    log: Option<&Path>,
) -> Result<u64, BenchError> {
    let dir = tempfile::tempdir().map_err(system("temporary directory"))?;
    let callgrind =
        Callgrind::new(dir.path(), Build::Ours.executable()).map_err(system("launcher"))?;
    let script = scenario::SCENARIOS.iter().find(|scenario| scenario.name == cell.scenario);
    let script = script.map_or("", |scenario| scenario.script);
    let program = Program::Qrelay {
        build: Build::Ours,
        script: format!("{SETTINGS}{script}"),
        log: log.map(Path::to_owned),
        descriptors: None,
        callgrind: Some(callgrind.clone()),
    };
    let qrelay = Subject::start("qrelay", &program, dir.path(), around)?;
    for _ in 0..mails {
        let answer = load::submit(&qrelay.socket, cell.size).map_err(system("mail"))?;
        if load::verdict(&answer) != Some(b'K') {
            return Err(BenchError::NotAccepted(1));
        }
    }
    drop(qrelay);
    callgrind.sum().map_err(system("counts"))
}

/// Moves this process, and so all that it starts, to one of its CPUs.
fn stay_on_one_cpu() -> nix::Result<()> {
    let own = sched_getaffinity(Pid::from_raw(0))?;
    let last = (0..CpuSet::count()).rev().find(|&cpu| own.is_set(cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(last.unwrap_or(0))?;
    sched_setaffinity(Pid::from_raw(0), &one)
}

/// Describes what the counts depend on besides qrelay's source.
fn toolchain() -> Value {
    let version = |program: &str, argument| {
        let output = Command::new(program).arg(argument).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        text.unwrap_or_default().lines().next().unwrap_or_default().to_owned()
    };
    // The C library has several copies of functions such as memcpy for different processors.
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
    let level = if has("avx2") { "avx2" } else { "no avx2" };
    json!({
        "rustc": version("rustc", "--version"),
        "cc": version("cc", "--version"),
        "libc": version("getconf", "GNU_LIBC_VERSION"),
        "valgrind": version("valgrind", "--version"),
        "processor": format!("{} {level}", env::consts::ARCH),
    })
}
