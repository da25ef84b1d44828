//! The table of scenarios: what handler qrelay runs, and what it is compared with.
//!
//! Contract: one scenario is one entry of `SCENARIOS`; nothing else has to change for a new one. A script
//! finds two locals, `socket` (path to listen on) and `next_hop` (the sink's address). What else it needs,
//! such as a database, it takes from the environment with `os.getenv`, which a scenario's `about` names.
//!
//! # Failure
//! A script that doesn't load ends the benchmark when qrelay ends; `--log` shows why.

/// What a scenario's numbers are divided by.
#[derive(Clone, Copy, Debug)]
pub enum Baseline {
    /// The bare relay (and floor.c beside it, where it can be had).
    Bare,
    /// qrelay with this script.
    Script(&'static str),
}

/// A claim about the ratio of qrelay's numbers to the baseline's.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Mails per second, at least this share.
    RateAtLeast(f64),
    /// CPU time per mail, at most this multiple.
    CpuAtMost(f64),
    /// CPU time per mail, at most so many microseconds more.
    CpuAddedAtMost(f64),
}

/// One comparison.
#[derive(Debug)]
pub struct Scenario {
    /// Name on the command line.
    pub name: &'static str,
    /// One line for `--list`.
    pub about: &'static str,
    /// The script, after `socket` and `next_hop` have been defined.
    pub script: &'static str,
    /// What it is compared with.
    pub baseline: Baseline,
    /// What the median of the pairs should show.
    pub target: Target,
}

/// The plainest handler there is.
const RELAY: &str = "
qmqp_listen(socket, function(m)
  return m:connect(next_hop)
end)
";

/// All scenarios; the first is the default.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "relay",
        about: "a handler that relays, against the bare relay",
        script: RELAY,
        baseline: Baseline::Bare,
        target: Target::RateAtLeast(0.9),
    },
    Scenario {
        name: "attributes",
        about: "reads every attribute and inserts three headers, against one that just relays",
        script: "
qmqp_listen(socket, function(m)
  local id, sender, recipients, size = m.id, m.sender, m.recipients, m.size
  local pid, uid, gid, peer, listener = m.pid, m.uid, m.gid, m.peer, m.listener
  local account, cgroup = m.account, m.cgroup
  m:insert_header('X-Id', id)
  m:insert_header('X-Uid', uid)
  m:insert_header('X-Cgroup', cgroup and cgroup.path or 'none')
  return m:connect(next_hop)
end)
",
        baseline: Baseline::Script(RELAY),
        target: Target::CpuAtMost(1.15),
    },
    Scenario {
        name: "cgroup",
        about: "looks at the client's control group, against one that just relays",
        script: "
qmqp_listen(socket, function(m)
  local cgroup = m.cgroup
  m.account = cgroup and cgroup.path or 'none'
  return m:connect(next_hop)
end)
",
        baseline: Baseline::Script(RELAY),
        target: Target::CpuAddedAtMost(20.0),
    },
    Scenario {
        name: "incr",
        about: "counts every mail in a shared dictionary, against one that just relays",
        script: "
local mails = shared:new('mails')
qmqp_listen(socket, function(m)
  mails:incr('uid-' .. m.uid, 1, 3600)
  return m:connect(next_hop)
end)
",
        baseline: Baseline::Script(RELAY),
        target: Target::RateAtLeast(0.75),
    },
    Scenario {
        name: "pg",
        about: "one indexed SELECT per mail, against no database (PGHOST and so on say where; makes a table)",
        script: "
local db = pg:new('', nil, {max_connections=8})
assert(db:execute([[
  CREATE TABLE IF NOT EXISTS qrelay_bench (id int PRIMARY KEY, name text);
  INSERT INTO qrelay_bench SELECT i, 'name ' || i FROM generate_series(1, 10000) AS i
    ON CONFLICT DO NOTHING]]))
local number = 0
qmqp_listen(socket, function(m)
  number = number % 10000 + 1
  local result = assert(db:execute('SELECT name FROM qrelay_bench WHERE id=$1', {number}))
  m.account = result:fetch().name
  return m:connect(next_hop)
end)
",
        baseline: Baseline::Script(RELAY),
        target: Target::CpuAddedAtMost(100.0),
    },
    Scenario {
        name: "pg-pool",
        about: "queries of 5 ms over 2 workers with 8 connections each, against 1 with 1",
        script: "
settings{workers=2}
local db = pg:new('', nil, {max_connections=8})
qmqp_listen(socket, function(m)
  assert(db:execute('SELECT pg_sleep(0.005)'))
  return m:connect(next_hop)
end)
",
        baseline: Baseline::Script(
            "
settings{workers=1}
local db = pg:new('', nil, {max_connections=1})
qmqp_listen(socket, function(m)
  assert(db:execute('SELECT pg_sleep(0.005)'))
  return m:connect(next_hop)
end)
",
        ),
        target: Target::RateAtLeast(10.0),
    },
];

impl Target {
    /// The claim in words, for the report.
    pub fn describe(self) -> String {
        match self {
            Self::RateAtLeast(share) => format!("mails/s at least {share:.2} of the baseline"),
            Self::CpuAtMost(multiple) => {
                format!("CPU per mail at most {multiple:.2} of the baseline")
            }
            Self::CpuAddedAtMost(microseconds) => {
                format!("CPU per mail at most {microseconds:.0} µs more than the baseline")
            }
        }
    }

    /// Whether these medians meet the claim: the ratios, and the difference in CPU time per mail.
    pub fn is_met(self, rate: f64, cpu: f64, added: f64) -> bool {
        match self {
            Self::RateAtLeast(share) => rate >= share,
            Self::CpuAtMost(multiple) => cpu <= multiple,
            Self::CpuAddedAtMost(microseconds) => added <= microseconds,
        }
    }
}
