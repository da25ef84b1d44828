//! The programs of a run: starting them, waiting until they answer, ending them.
//!
//! Contract: a `Subject` is a relay that has answered a mail with `K`. A `Subject` and the sink
//! live until they are dropped. The benchmark's own parts (load generator, sink, bare relay) are
//! this executable, run again with `ROLE` as first argument, because the kernel counts CPU time per
//! process.
//!
//! # Failure
//! A program that can't be started, ends early or doesn't answer within `START` is an error that
//! names the program. A program that doesn't end within `STOP` of SIGTERM is killed, with a
//! message.

use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    error::{BenchError, system},
    hop::NextHop,
    instructions::Callgrind,
    load,
    outcome::Outcome,
    usage,
};

/// First argument of the executable when it runs as a part of the benchmark.
pub const ROLE: &str = "--role";

/// Longest time from starting a program to its first answer.
const START: Duration = Duration::from_secs(30);

/// Longest time from SIGTERM to the end of a program.
const STOP: Duration = Duration::from_secs(20);

/// Pause between two checks of a condition that no event announces.
const POLL: Duration = Duration::from_millis(1);

/// Something that can be measured.
#[derive(Clone, Debug)]
pub enum Program {
    /// The bare relay of this benchmark, or the one of qrelay's shape, with so many threads per
    /// process.
    Bare(Shape, usize),
    /// The same in C, already compiled.
    Floor(PathBuf, usize),
    /// Another QMQP daemon: its command, and where it listens if its script doesn't say that.
    Peer { command: String, socket: Option<PathBuf>, script: String },
    /// A loop that starts this program.
    Spawn(PathBuf),
    /// A build of qrelay with this script.
    Qrelay {
        build: Build,
        script: String,
        log: Option<PathBuf>,
        /// RLIMIT_NOFILE, if it isn't to be the benchmark's own.
        descriptors: Option<u32>,
        /// Counts qrelay's instructions, if they are to be counted.
        callgrind: Option<Callgrind>,
    },
}

/// How a bare relay is built; the value is the name of its role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One process with threads.
    Single,
    /// A supervisor that passes the clients to workers.
    Passing,
}

/// What a script finds, besides its socket.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The next hop.
    pub hop: NextHop,
    /// A program for `exec`.
    pub program: PathBuf,
    /// Variables by which a script finds a database.
    pub environment: Vec<(&'static str, String)>,
}

/// Which build of qrelay runs.
#[derive(Clone, Debug)]
pub enum Build {
    /// The build that cargo made for this benchmark.
    Ours,
    /// Another executable, to compare with.
    Other(PathBuf),
}

impl Build {
    /// Returns the path of the executable.
    pub fn executable(&self) -> &Path {
        match self {
            Self::Ours => Path::new(env!("CARGO_BIN_EXE_qrelay")),
            Self::Other(executable) => executable,
        }
    }
}

impl Program {
    fn command(
        &self,
        dir: &Path,
        socket: &Path,
        around: &Surroundings,
    ) -> Result<Command, BenchError> {
        Ok(match self {
            Self::Bare(shape, threads) => {
                let mut command = role(match shape {
                    Shape::Single => "bare",
                    Shape::Passing => "shape",
                })?;
                command.arg(socket).arg(around.hop.to_string()).arg(threads.to_string());
                command
            }
            Self::Floor(executable, threads) => {
                let port = match &around.hop {
                    NextHop::Tcp(port) => *port,
                    NextHop::Local(_) | NextHop::Nowhere => 0,
                };
                let mut command = Command::new(executable);
                command.arg(socket).arg(threads.to_string()).arg(port.to_string());
                command
            }
            Self::Peer { command, script, .. } => {
                let config = write_config(dir, socket, around, script)?;
                let fill = |word: &str| {
                    word.replace("{config}", &config.display().to_string())
                        .replace("{socket}", &socket.display().to_string())
                        .replace("{next_hop}", &around.hop.to_string())
                };
                let mut words = command.split_ascii_whitespace().map(fill);
                let mut command = Command::new(words.next().unwrap_or_default());
                command.args(words).stderr(Stdio::null());
                command
            }
            Self::Spawn(program) => Command::new(program),
            Self::Qrelay { build, script, log, descriptors, callgrind } => {
                let mut command = match (callgrind, descriptors) {
                    (Some(callgrind), _) => callgrind.command(build.executable()),
                    (None, None) => Command::new(build.executable()),
                    (None, Some(limit)) => {
                        let mut command = Command::new("prlimit");
                        command.arg(format!("--nofile={limit}:{limit}")).arg(build.executable());
                        command
                    }
                };
                if matches!(build, Build::Ours) {
                    // The machine's own qrelay may have the default one. Older builds have none.
                    command.args(["--control", "none"]);
                }
                command.arg("--config").arg(write_config(dir, socket, around, script)?);
                command.stderr(log_file(log.as_deref())?);
                command
            }
        })
    }
}

/// Returns a command that runs this executable in a role.
pub fn role(name: &str) -> Result<Command, BenchError> {
    let executable = env::current_exe().map_err(system("own executable"))?;
    let mut command = Command::new(executable);
    command.arg(ROLE).arg(name);
    Ok(command)
}

fn write_config(
    dir: &Path,
    socket: &Path,
    around: &Surroundings,
    script: &str,
) -> Result<PathBuf, BenchError> {
    let path = dir.join("config.lua");
    let text = format!(
        "local socket, next_hop = '{}', '{}'\nlocal program = '{}'\n{script}",
        socket.display(),
        around.hop,
        around.program.display()
    );
    fs::write(&path, text).map_err(system(path.display().to_string()))?;
    Ok(path)
}

/// Opens the file for qrelay's log. Without a path the log goes to /dev/null, so that qrelay writes
/// its line per mail in any case.
fn log_file(path: Option<&Path>) -> Result<File, BenchError> {
    let path = path.unwrap_or(Path::new("/dev/null"));
    let file = File::options().append(true).create(true).open(path);
    file.map_err(system(path.display().to_string()))
}

/// A running program, ended when it is dropped.
struct Process {
    child: Child,
}

impl Process {
    fn spawn(mut command: Command) -> Result<Self, BenchError> {
        let child = command.stdin(Stdio::null()).spawn();
        let what = command.get_program().to_string_lossy().into_owned();
        Ok(Self { child: child.map_err(system(what))? })
    }

    fn ended_within(&mut self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return true;
            }
            thread::sleep(POLL);
        }
        false
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = self.child.id();
        // The pid of a child stays its own until the child is waited for, so the signal can't hit
        // another process.
        let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
        if !self.ended_within(STOP) {
            eprintln!("process {pid} didn't end within {STOP:?} of SIGTERM: killed");
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A relay under test that has answered its first mail, or a loop that starts a program.
pub struct Subject {
    /// Name in the report.
    pub name: &'static str,
    /// Time from starting the program to its first answer.
    pub start: Duration,
    /// Path of the socket on which the relay listens; of the program if there is no relay.
    pub socket: PathBuf,
    /// Resident memory before the first load, of all processes, in KiB.
    pub idle: u64,
    process: Option<Process>,
}

impl Subject {
    /// Starts `program` in a directory of its own below `dir` and waits for its first `K`.
    pub fn start(
        name: &'static str,
        program: &Program,
        dir: &Path,
        around: &Surroundings,
    ) -> Result<Self, BenchError> {
        let dir = tempfile::tempdir_in(dir).map_err(system("temporary directory"))?.keep();
        let socket = match program {
            Program::Spawn(program) => {
                let (start, socket) = (Duration::ZERO, program.clone());
                return Ok(Self { name, start, socket, idle: 0, process: None });
            }
            Program::Peer { socket: Some(socket), .. } => socket.clone(),
            _ => dir.join("q.sock"),
        };
        let mut command = program.command(&dir, &socket, around)?;
        command.stdout(Stdio::null()).envs(around.environment.iter().cloned());
        let begin = Instant::now();
        let mut process = Process::spawn(command)?;
        wait_for_answer(name, &mut process, &socket, begin)?;
        let mut subject =
            Self { name, start: begin.elapsed(), socket, idle: 0, process: Some(process) };
        subject.idle = subject.memory().iter().map(|process| process.resident).sum();
        Ok(subject)
    }

    fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.child.id())
    }

    /// Returns the CPU time that the program and all its children have used so far.
    pub fn cpu(&self) -> Duration {
        self.pid().map_or(Duration::ZERO, usage::cpu)
    }

    /// Returns the memory of each process of the program, the first process first.
    pub fn memory(&self) -> Vec<usage::Memory> {
        self.pid().map_or_else(Vec::new, usage::memory)
    }

    /// Lets the peak of the memory begin anew.
    pub fn reset_peak(&self) {
        if let Some(pid) = self.pid() {
            usage::reset_peak(pid);
        }
    }

    /// Returns the peak of the memory in KiB beyond that before the first load. The peaks of the
    /// processes count together, also if they weren't at the same moment.
    pub fn peak(&self) -> u64 {
        self.pid().map_or(0, usage::peak).saturating_sub(self.idle)
    }

    /// Whether this is a loop that starts a program.
    pub fn is_loop(&self) -> bool {
        self.process.is_none()
    }

    /// Sends a signal to the program's first process.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            // The child hasn't been waited for, so the pid is its own.
            let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
        }
    }
}

fn wait_for_answer(
    name: &str,
    process: &mut Process,
    socket: &Path,
    begin: Instant,
) -> Result<(), BenchError> {
    loop {
        let last = match load::submit(socket, 2048) {
            Ok(answer) if load::verdict(&answer) == Some(b'K') => return Ok(()),
            Ok(answer) => String::from_utf8_lossy(&answer).into_owned(),
            Err(error) => error.to_string(),
        };
        let status = process.child.try_wait().map_err(system(name))?;
        if let Some(status) = status {
            return Err(BenchError::Ended { name: name.to_owned(), status });
        }
        if begin.elapsed() > START {
            let socket = socket.to_owned();
            return Err(BenchError::NoAnswer { name: name.to_owned(), socket, last });
        }
        thread::sleep(POLL);
    }
}

/// A part of the benchmark that runs until it is dropped.
pub struct Helper {
    line: String,
    process: Process,
}

impl Helper {
    /// Starts a role, which `prepare` gives its arguments, and waits for its first line.
    pub fn start(
        name: &'static str,
        prepare: impl FnOnce(&mut Command),
    ) -> Result<Self, BenchError> {
        let mut command = role(name)?;
        prepare(&mut command);
        command.stdout(Stdio::piped());
        let mut process = Process::spawn(command)?;
        let mut line = String::new();
        if let Some(stdout) = process.child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line).map_err(system(name))?;
        }
        match line.is_empty() {
            true => Err(BenchError::Report { role: name, line }),
            false => Ok(Self { line, process }),
        }
    }
}

/// The running next hop.
pub struct Sink {
    /// Address of the sink.
    pub hop: NextHop,
    helper: Helper,
}

impl Sink {
    /// Starts the sink with `threads` threads and waits until it has printed its address. It
    /// listens on TCP, or on the local socket `path`.
    pub fn start(threads: usize, delay: Duration, path: Option<&Path>) -> Result<Self, BenchError> {
        let helper = Helper::start("sink", |command| {
            command.arg(threads.to_string()).arg(delay.as_micros().to_string()).args(path);
        })?;
        let hop = helper.line.trim().parse();
        let hop =
            hop.map_err(|_| BenchError::Report { role: "sink", line: helper.line.clone() })?;
        Ok(Self { hop, helper })
    }

    /// Returns what a script finds that only relays.
    pub fn surroundings(&self) -> Surroundings {
        Surroundings { hop: self.hop.clone(), program: PathBuf::new(), environment: Vec::new() }
    }

    /// Returns the CPU time that the sink has used so far.
    pub fn cpu(&self) -> Duration {
        usage::cpu(self.helper.process.child.id())
    }
}

/// Runs the load generator in a process of its own, or the loop that starts a program.
pub fn generate(plan: &load::Plan<'_>, is_loop: bool) -> Result<Outcome, BenchError> {
    let mut command = role(if is_loop { "spawn" } else { "load" })?;
    command.arg(plan.socket);
    for number in [plan.clients, plan.threads, plan.size] {
        command.arg(number.to_string());
    }
    command.arg(plan.duration.as_micros().to_string()).arg(plan.mails.to_string());
    command.arg(plan.rate.ceil().to_string());
    let output = command.stderr(Stdio::inherit()).output().map_err(system("load generator"))?;
    let line = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
    line.parse().map_err(|line| BenchError::Report { role: "load generator", line })
}

/// Compiles the relay in C whose source the environment variable names into `dir`. Returns `None`
/// without such a variable.
pub fn compile_floor(dir: &Path, variable: &str) -> Result<Option<PathBuf>, BenchError> {
    let Some(source_file) = env::var_os(variable).map(PathBuf::from) else { return Ok(None) };
    let executable = dir.join(variable);
    let mut gcc = Command::new("cc");
    gcc.args(["-O2", "-w", "-pthread", "-o"]).arg(&executable).arg(&source_file);
    let status = gcc.status().map_err(system("cc"))?;
    match status.success() {
        true => Ok(Some(executable)),
        false => Err(BenchError::Compiler { source_file, status }),
    }
}
