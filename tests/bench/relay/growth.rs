//! Whether qrelay grows: many mails of every kind through one worker, and what its processes hold meanwhile.
//!
//! Contract: the mails come in ten steps; after each, when all is quiet again, memory, descriptors and threads
//! of worker and supervisor are printed. Both must hold the same at the end as after the first step: as many
//! descriptors at most, and memory within `SHARE` and `ALLOWANCE`. The worker may have no more threads than
//! it starts as jobs come, so that their stacks are all there after the first step.
//!
//! # Failure
//! Growth, a mail without an answer, and a worker that was replaced (which would hide growth) end the run with
//! an error.

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
    process::{Program, Sink, Subject, generate},
    usage,
};

/// What kind of mails.
#[derive(Debug)]
pub struct Kind {
    /// Its name among the scenarios.
    pub name: &'static str,
    /// One line for `--list`.
    pub about: &'static str,
    script: &'static str,
}

/// All kinds.
pub const KINDS: [Kind; 2] = [
    Kind {
        name: "growth",
        about: "mails of every kind through one worker (--mails): does it grow?",
        script: MIXED,
    },
    Kind {
        name: "growth-plain",
        about: "the same with a handler that leaves hardly anything but finalizers to Lua's collector",
        script: PLAIN,
    },
];

/// Steps of a run.
const STEPS: u64 = 10;

/// How much larger a process may be at the end than after the first step.
const SHARE: f64 = 1.1;

/// KiB that it may be larger in any case: how long ago Lua's garbage collector ran.
const ALLOWANCE: f64 = 1024.0;

/// For a step that makes no progress.
const STEP_LIMIT: Duration = Duration::from_secs(3600);

/// How long descriptors must have been the same, and how long that is waited for.
const QUIET: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(10);

/// Of a thousand mails 400 are relayed, 9 go to a program, one makes the script fail, and the rest is answered
/// by qrelay itself.
const MIXED: &str = "
settings{workers=1, worker_connections=5, client_share=1}
local mails, kept = shared:new('mails'), {}
local function inspect(m, number)
  m.account = 'account-' .. number % 100
  m:insert_header('X-Client', string.format('%s %s %s %s %s', m.pid, m.uid, m.gid, m.peer, m.listener))
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

/// All garbage is objects of qrelay, which the collector frees only in the cycle after their end; and
/// some 300 KiB are kept, so that it is much at a time.
const PLAIN: &str = "
settings{workers=1, worker_connections=5, client_share=1}
local kept = {}
for i = 1, 300 do kept[i] = table.pack(string.byte(('x'):rep(60), 1, -1)) end
qmqp_listen(socket, function(m) return #kept > 0 and m:discard() end)
";

/// What a process holds.
#[derive(Clone, Copy, Debug)]
struct Holding {
    pid: u32,
    /// Resident set, KiB.
    resident: u64,
    descriptors: usize,
    threads: usize,
}

/// Worker and supervisor at one moment.
#[derive(Clone, Copy, Debug)]
struct Look {
    worker: Holding,
    supervisor: Holding,
}

/// Sends so many mails, prints, and judges.
pub fn run(kind: &Kind, mails: u64, extent: &Extent, log: Option<&Path>) -> Result<(), BenchError> {
    println!("scenario {}: {}", kind.name, kind.about);
    println!("{mails} mails of {} bytes from {} clients\n", extent.size, extent.clients);
    let dir = tempfile::tempdir().map_err(system("temporary directory"))?;
    let sink = Sink::start(extent.threads)?;
    let program = Program::Qrelay { script: kind.script, log: log.map(Path::to_owned) };
    let qrelay = Subject::start("qrelay", &program, dir.path(), sink.port)?;
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

/// Sends so many mails, every one of which must be answered; mails per second.
fn send(mails: u64, qrelay: &Subject, extent: &Extent) -> Result<f64, BenchError> {
    let outcome = generate(&load::Plan {
        socket: &qrelay.socket,
        clients: extent.clients,
        threads: extent.threads,
        size: extent.size,
        duration: STEP_LIMIT,
        mails,
    })?;
    let Answers { accepted, temporary, permanent, silent } = outcome.answers;
    let answered = accepted + temporary + permanent;
    if silent > 0 || answered != mails {
        return Err(BenchError::Unanswered { mails, answered });
    }
    Ok(mails as f64 / outcome.elapsed.as_secs_f64())
}

impl Look {
    /// What they hold once their descriptors have been the same for a while.
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
    /// Whether it is more than what it was.
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
