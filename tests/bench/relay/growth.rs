//! The growth test: many mails of every kind through one worker, and what qrelay's processes hold
//! meanwhile.
//!
//! Contract: the mails come in ten steps. After each step, when all is quiet again, the report
//! shows memory, descriptors and threads of worker and supervisor. At the end, neither process may
//! have more descriptors than after the first step, nor more memory than `SHARE` and `ALLOWANCE`
//! permit. The script limits the worker to as many threads as it starts while jobs come, so that
//! all their stacks exist after the first step.
//!
//! # Failure
//! The run ends with an error on growth, on a mail without an answer, and when the worker was
//! replaced, which would hide growth.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::{
    error::{BenchError, system},
    load,
    measure::Extent,
    outcome::Answers,
    process::{Build, Program, Sink, Subject, generate},
    usage,
};

/// A kind of load for the growth test.
#[derive(Debug)]
pub struct Kind {
    /// Name on the command line, among the scenarios.
    pub name: &'static str,
    /// Description in one line, for `--list` and the report.
    pub about: &'static str,
    script: &'static str,
}

pub const KINDS: [Kind; 2] = [
    Kind {
        name: "growth",
        about: "mails of every kind through one worker (--mails): does it grow?",
        script: MIXED,
    },
    Kind {
        name: "growth-plain",
        about: "like growth, but the handler leaves Lua's collector hardly anything but finalizers",
        script: PLAIN,
    },
];

/// Number of steps of a run.
const STEPS: u64 = 10;

/// Highest memory at the end, as a multiple of the memory after the first step.
const SHARE: f64 = 1.1;

/// Memory in KiB that a process may gain in addition to `SHARE`, because it depends on when Lua's
/// garbage collector last ran.
const ALLOWANCE: f64 = 1024.0;

/// Time limit of one step, for a run that makes no progress.
const STEP_LIMIT: Duration = Duration::from_secs(3600);

/// Time without a change in the number of descriptors after which a process counts as quiet.
const QUIET: Duration = Duration::from_millis(500);

/// Longest wait for the processes to become quiet.
const PATIENCE: Duration = Duration::from_secs(10);

/// Script of `growth`. Of a thousand mails, 400 are relayed, 9 go to a program, one makes the
/// script fail, and qrelay itself answers the others.
const MIXED: &str = "
settings{workers=1, worker_connections=5, client_share=1}
local mails, kept = shared:new('mails'), {}
local function inspect(m, number)
  m.account = 'account-' .. number % 100
  m:insert_header('X-Client',
    string.format('%s %s %s %s %s', m.pid, m.uid, m.gid, m.peer, m.listener))
  m:insert_header('X-Mail', string.format('%s %s %d %d', m.id, m.sender, m.size, #m.recipients))
  m:insert_header('X-Subject', m:header('Subject'))
  m:remove_header('Subject')
  kept[number % 100] = m:headers('To')
  m.recipients = {m.recipients[1], 'c@example.net'}
end
qmqp_listen(socket, function(m)
  local number = mails:incr('all')
  mails:incr('of-' .. number % 1000, 1, 3600)
  local kind = number % 1000
  if kind < 200 then return m:connect(next_hop) end
  inspect(m, number)
  if kind < 400 then return m:connect(next_hop) end
  if kind < 600 then return m:discard() end
  if kind < 790 then return m:reject('rejected ' .. number) end
  if kind < 799 then return m:exec_raw('/bin/true', number) end
  if kind < 800 then error('failed ' .. number) end
  return m:defer()
end)
";

/// Script of `growth-plain`. All garbage consists of qrelay's objects, which the collector frees
/// only in the cycle after their finalizers. The script also keeps some 300 KiB, so that a cycle
/// leaves much garbage at a time.
const PLAIN: &str = "
settings{workers=1, worker_connections=5, client_share=1}
local kept = {}
for i = 1, 300 do kept[i] = table.pack(string.byte(('x'):rep(60), 1, -1)) end
qmqp_listen(socket, function(m) return #kept > 0 and m:discard() end)
";

/// The resources that one process holds.
#[derive(Clone, Copy, Debug)]
struct Holding {
    pid: u32,
    /// Resident set in KiB.
    resident: u64,
    descriptors: usize,
    threads: usize,
}

/// The resources of worker and supervisor at one moment.
#[derive(Clone, Copy, Debug)]
struct Look {
    worker: Holding,
    supervisor: Holding,
}

/// Sends `mails` mails, prints what the processes hold after each step, and checks their growth.
pub fn run(kind: &Kind, mails: u64, extent: &Extent, log: Option<&Path>) -> Result<(), BenchError> {
    println!("scenario {}: {}", kind.name, kind.about);
    println!("{mails} mails of {} bytes from {} clients\n", extent.size, extent.clients);
    let dir = tempfile::tempdir().map_err(system("temporary directory"))?;
    let sink = Sink::start(extent.threads, Duration::ZERO, None)?;
    let log = log.map(Path::to_owned);
    let program = Program::Qrelay {
        build: Build::Ours,
        script: kind.script.to_owned(),
        log,
        descriptors: None,
        callgrind: None,
    };
    let qrelay = Subject::start("qrelay", &program, dir.path(), &sink.surroundings())?;
    println!("{:>9} {:>7}  {:^34}  {:^34}", "", "", "worker", "supervisor");
    let columns = format!("{:>12} {:>11} {:>9}", "RSS MiB", "descriptors", "threads");
    println!("{:>9} {:>7}  {columns}  {columns}", "mails", "mails/s");
    let mut first = None;
    for step in 1..=STEPS {
        let done = mails * (step - 1) / STEPS;
        let now = mails * step / STEPS;
        let rate = send(now - done, &qrelay, extent)?;
        let look = Look::when_quiet(&qrelay)?;
        println!("{now:>9} {rate:>7.0}  {}  {}", look.worker, look.supervisor);
        let first = first.get_or_insert(look);
        if first.worker.pid != look.worker.pid {
            return Err(BenchError::Replaced);
        }
        if step == STEPS {
            look.worker.compare("worker", &first.worker)?;
            look.supervisor.compare("supervisor", &first.supervisor)?;
        }
    }
    println!("no growth since the first {}\n", mails / STEPS);
    Ok(())
}

/// Sends `mails` mails, each of which must be answered, and returns their number per second.
fn send(mails: u64, qrelay: &Subject, extent: &Extent) -> Result<f64, BenchError> {
    let outcome = generate(
        &load::Plan {
            socket: &qrelay.socket,
            clients: extent.clients,
            threads: extent.threads,
            size: extent.size,
            duration: STEP_LIMIT,
            mails,
            rate: 0.0,
        },
        false,
    )?;
    let Answers { accepted, temporary, permanent, silent } = outcome.answers;
    let answered = accepted + temporary + permanent;
    if silent > 0 || answered != mails {
        return Err(BenchError::Unanswered { mails, answered });
    }
    Ok(mails as f64 / outcome.elapsed.as_secs_f64())
}

impl Look {
    /// Returns what the processes hold once their descriptors have been the same for `QUIET`, or
    /// after `PATIENCE` at the latest.
    fn when_quiet(qrelay: &Subject) -> Result<Self, BenchError> {
        let begin = Instant::now();
        let mut look = Self::now(qrelay)?;
        let mut since = Instant::now();
        while since.elapsed() < QUIET && begin.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(20));
            let now = Self::now(qrelay)?;
            if now.counts() != look.counts() {
                since = Instant::now();
            }
            look = now;
        }
        Ok(look)
    }

    fn now(qrelay: &Subject) -> Result<Self, BenchError> {
        let processes = qrelay.memory();
        let holding = |process: &usage::Memory| Holding {
            pid: process.pid,
            resident: process.resident,
            descriptors: usage::entries(process.pid, "fd"),
            threads: usage::entries(process.pid, "task"),
        };
        let worker = processes.iter().find(|process| process.name == "qrelay-worker");
        let (worker, supervisor) = worker.zip(processes.first()).ok_or(BenchError::Replaced)?;
        Ok(Self { worker: holding(worker), supervisor: holding(supervisor) })
    }

    fn counts(&self) -> [usize; 2] {
        [self.worker.descriptors, self.supervisor.descriptors]
    }
}

impl Holding {
    /// Returns an error if the process holds more than it may after holding `before`.
    fn compare(&self, name: &'static str, before: &Self) -> Result<(), BenchError> {
        let limit = before.resident as f64 * SHARE + ALLOWANCE;
        if self.resident as f64 > limit {
            let (before, after) = (before.resident, self.resident);
            return Err(BenchError::Grew { name, what: "KiB of memory", before, after });
        }
        if self.descriptors > before.descriptors {
            let (before, after) = (before.descriptors as u64, self.descriptors as u64);
            return Err(BenchError::Grew { name, what: "descriptors", before, after });
        }
        Ok(())
    }
}

impl std::fmt::Display for Holding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let resident = self.resident as f64 / 1024.0;
        write!(f, "{resident:>12.2} {:>11} {:>9}", self.descriptors, self.threads)
    }
}
