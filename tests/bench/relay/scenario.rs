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
  local client = string.format('%s %s %s %s', m.pid, m.uid, m.gid, m.peer)
  local mail = string.format('%s %s %d %s', m.id, m.sender, m.size, m.listener)
  m.account = tostring(m.account or m.recipients[1])
  m:insert_header('X-Client', client)
  m:insert_header('X-Mail', mail)
  m:insert_header('X-Subject', m:header('Subject'))
  return m:connect(next_hop)
end)
",
        baseline: Baseline::Script(RELAY),
        target: Target::CpuAtMost(1.15),
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
        }
    }

    /// Whether these median ratios meet the claim.
    pub fn is_met(self, rate: f64, cpu: f64) -> bool {
        match self {
            Self::RateAtLeast(share) => rate >= share,
            Self::CpuAtMost(multiple) => cpu <= multiple,
        }
    }
}
