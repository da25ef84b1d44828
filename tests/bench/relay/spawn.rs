//! A loop that runs a program: the floor for the actions `exec` and `exec_raw`.
//!
//! Contract: every thread starts the program with a mail as standard input and waits for its end,
//! as often as the time allows. The program is `PROGRAM`, compiled by the benchmark.
//!
//! # Failure
//! A program that fails counts as silent.

use std::{
    io::{self, Seek as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{
    error::{BenchError, system},
    load::own_cpu,
    netstring::request,
    outcome::{Answers, Outcome},
};

/// A program that costs as little as a program can: reads its input, and accepts the mail.
const PROGRAM: &str = "#include <unistd.h>
int main(void) {
  static char buffer[65536];
  while (read(0, buffer, sizeof buffer) > 0) {}
  return write(1, \"3:Kok,\", 6) != 6;
}
";

/// Compiles the program into `dir`, and returns its path.
pub fn compile(dir: &Path) -> Result<PathBuf, BenchError> {
    let source_file = dir.join("program.c");
    std::fs::write(&source_file, PROGRAM).map_err(system("program.c"))?;
    let program = dir.join("program");
    let mut compiler = Command::new("cc");
    compiler.args(["-O2", "-static", "-o"]).arg(&program).arg(&source_file);
    let status = compiler.status().map_err(system("cc"))?;
    match status.success() {
        true => Ok(program),
        false => Err(BenchError::Compiler { source_file, status }),
    }
}

/// Runs `program` in `threads` threads for a time, each time with a mail of `size` bytes.
pub fn run(program: &Path, threads: usize, size: usize, time: Duration) -> io::Result<Outcome> {
    let start = Instant::now();
    let input = request(size);
    let results = thread::scope(|scope| {
        let one = || {
            let (mut answers, mut latencies) = (Answers::default(), Vec::new());
            while start.elapsed() < time {
                let begin = Instant::now();
                answers.count(if run_once(program, &input)? { b'K' } else { 0 });
                latencies.push(begin.elapsed());
            }
            Ok((answers, latencies))
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .map(|result| result.unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))
            .collect::<io::Result<Vec<_>>>()
    })?;
    let elapsed = start.elapsed();
    let mut answers = Answers::default();
    let mut latencies = Vec::new();
    for (some, times) in results {
        answers += some;
        latencies.extend(times);
    }
    Ok(Outcome::new(answers, elapsed, &mut latencies, own_cpu()?))
}

fn run_once(program: &Path, input: &[u8]) -> io::Result<bool> {
    // A file in memory, as qrelay's programs have.
    let mut file = std::fs::File::from(memfd_create(c"mail", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(input)?;
    file.rewind()?;
    let mut command = Command::new(program);
    command.stdin(Stdio::from(file)).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command.status()?.success())
}
