//! The table of scenarios: which handler qrelay runs, and what it is compared with.
//!
//! Contract: one scenario is one entry of `SCENARIOS`; a new scenario needs no other change. A
//! script can use two locals, `socket` (path to listen on) and `next_hop` (address of the sink). A
//! script that needs more, such as a database, reads the environment with `os.getenv`, and the
//! scenario's `about` names the variables.
//!
//! # Failure
//! A script that doesn't load ends qrelay and so the benchmark; `--log` shows the reason.

/// The relay whose numbers a scenario's numbers are divided by.
#[derive(Clone, Copy, Debug)]
pub enum Baseline {
    /// The bare relay, and beside it floor.c if its source and gcc are there.
    Bare,
    /// qrelay with this script.
    Script(&'static str),
}

/// A claim about the ratio of qrelay's numbers to the baseline's.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Mails per second are at least this share of the baseline's.
    RateAtLeast(f64),
    /// CPU time per mail is at most this multiple of the baseline's.
    CpuAtMost(f64),
    /// CPU time per mail is at most this many microseconds above the baseline's.
    CpuAddedAtMost(f64),
}

/// A comparison of qrelay with a baseline.
#[derive(Debug)]
pub struct Scenario {
    /// Name on the command line.
    pub name: &'static str,
    /// Description in one line, for `--list` and the report.
    pub about: &'static str,
    /// Script of qrelay, which runs after the definition of `socket` and `next_hop`.
    pub script: &'static str,
    /// The relay to compare with.
    pub baseline: Baseline,
    /// The claim about the median of the pairs.
    pub target: Target,
}

/// Script with the simplest handler that relays.
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
        about: "one indexed SELECT per mail, against no database (server: PGHOST…; makes a table)",
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
    /// Returns the claim in words, for the report.
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

    /// Returns whether these medians meet the claim: the two ratios, and the difference in CPU time
    /// per mail in microseconds.
    pub fn is_met(self, rate: f64, cpu: f64, added: f64) -> bool {
        match self {
            Self::RateAtLeast(share) => rate >= share,
            Self::CpuAtMost(multiple) => cpu <= multiple,
            Self::CpuAddedAtMost(microseconds) => added <= microseconds,
        }
    }
}
