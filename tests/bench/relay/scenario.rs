//! The table of scenarios: which handler qrelay runs, under which load, and what it is compared
//! with.
//!
//! Contract: one scenario is one entry of `SCENARIOS`; a new scenario needs no other change. A
//! script can use three locals: `socket` (path to listen on), `next_hop` (address of the sink) and
//! `program` (path of a program for `exec`). Scripts that need a database find it by the
//! environment, as libpq does.
//!
//! # Failure
//! A script that doesn't load ends qrelay and so the benchmark; `--log` shows the reason.

/// What qrelay is compared with in a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// The bare relay.
    Bare,
    /// The bare relay of qrelay's shape.
    Shape,
    /// The daemon of `--peer`, with the scenario's script.
    Peer,
    /// A loop that starts the program.
    Spawn,
    /// qrelay with this script.
    Script(&'static str),
}

impl Rival {
    /// Returns the name in the report, and that of a second copy.
    pub fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Bare => (BARE, "bare relay again"),
            Self::Shape => (SHAPE, "same shape again"),
            Self::Peer => (PEER, "peer again"),
            Self::Spawn => (SPAWN, "spawn loop again"),
            Self::Script(_) => (BASELINE, "qrelay, baseline again"),
        }
    }
}

const BARE: &str = "bare relay";
const SHAPE: &str = "same shape";
const PEER: &str = "peer";
const SPAWN: &str = "spawn loop";
const BASELINE: &str = "qrelay, baseline";

/// A number of qrelay's that has a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Mails per second, as a share of the rival's.
    Rate,
    /// CPU time per mail, as a multiple of the rival's.
    Cpu,
    /// CPU time per mail in microseconds, beyond the rival's.
    AddedCpu,
    /// The time that one mail in a hundred exceeds, as a multiple of the rival's.
    P99,
    /// The same, as a multiple of clients / (mails/s), the mean of a closed loop.
    Turns,
    /// Mails per second, as a share of what the next hop's delay allows.
    Delayed,
    /// Peak of memory above idle, as a share of 1.1 × size × mails in flight + 8 MiB.
    Memory,
}

/// A claim about a number of qrelay's.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The number.
    pub quantity: Quantity,
    /// Name of the rival, or an empty name if the number is compared with none.
    pub against: &'static str,
    /// The bound.
    pub bound: f64,
}

const fn rate(against: &'static str, bound: f64) -> Target {
    Target { quantity: Quantity::Rate, against, bound }
}

const fn cpu(against: &'static str, bound: f64) -> Target {
    Target { quantity: Quantity::Cpu, against, bound }
}

const fn target(quantity: Quantity, bound: f64) -> Target {
    Target { quantity, against: "", bound }
}

impl Target {
    /// Returns the claim in words, for the report.
    pub fn describe(&self) -> String {
        let Self { quantity, against, bound } = self;
        match quantity {
            Quantity::Rate => format!("mails/s at least {bound:.2} of {against}"),
            Quantity::Cpu => format!("CPU per mail at most {bound:.2} of {against}"),
            Quantity::AddedCpu => {
                format!("CPU per mail at most {bound:.0} µs more than {against}")
            }
            Quantity::P99 => format!("p99 at most {bound:.2} of {against}"),
            Quantity::Turns => format!("p99 at most {bound:.2} × clients / (mails/s)"),
            Quantity::Delayed => format!("mails/s at least {bound:.2} of clients / delay"),
            Quantity::Memory => {
                format!("peak memory at most {bound:.2} of 1.1 × size × clients + 8 MiB")
            }
        }
    }

    /// Whether this value of the number meets the claim.
    pub fn is_met(&self, value: f64) -> bool {
        match self.quantity {
            Quantity::Rate | Quantity::Delayed => value >= self.bound,
            _ => value <= self.bound,
        }
    }
}

/// Where the sink listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// On a port of 127.0.0.1.
    Tcp,
    /// On a local socket.
    Local,
    /// Nowhere: the relays discard.
    Nowhere,
}

/// A load on qrelay, and what it is compared with.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Name on the command line.
    pub name: &'static str,
    /// Description in one line, for `--list` and the report.
    pub about: &'static str,
    /// Script of qrelay, which runs after the definition of the locals.
    pub script: &'static str,
    /// Number of clients that send at the same time.
    pub clients: usize,
    /// Size of each message in bytes.
    pub size: usize,
    /// The next hop.
    pub hop: Hop,
    /// Milliseconds that the next hop waits before it answers.
    pub delay: u64,
    /// Threads of each process of a bare relay. A thread carries one mail at a time.
    pub threads: usize,
    /// Whether mails come at random moments, half as many as the slowest relay can carry, instead
    /// of one after the other from each client.
    pub open: bool,
    /// Seconds between two reloads of qrelay, 0 for none. Its rivals aren't reloaded.
    pub reload: u64,
    /// What qrelay is compared with. A second copy of the first one shows the noise.
    pub rivals: &'static [Rival],
    /// The claims about the medians of the rounds.
    pub targets: &'static [Target],
    /// The plots to which this scenario adds a point, and where on their axis.
    pub curves: &'static [(&'static str, f64)],
}

/// Script with the simplest handler that relays.
const RELAY: &str = "
qmqp_listen(socket, function(m)
  return m:connect(next_hop)
end)
";

/// What most scenarios have in common: mails of 2 KiB from 64 clients, relayed over TCP.
const RELAYING: Scenario = Scenario {
    name: "",
    about: "",
    script: RELAY,
    clients: 64,
    size: 2 << 10,
    hop: Hop::Tcp,
    delay: 0,
    threads: 32,
    open: false,
    reload: 0,
    rivals: &[Rival::Bare, Rival::Shape, Rival::Peer],
    targets: &[],
    curves: &[],
};

/// The targets of a crowd of clients.
const CROWD: &[Target] = &[rate(SHAPE, 1.05), cpu(SHAPE, 1.0), target(Quantity::Turns, 1.5)];

/// The targets of large mails.
const LARGE: &[Target] = &[rate(BARE, 0.92), cpu(BARE, 1.15), target(Quantity::Memory, 1.0)];

/// All scenarios; the first is the default.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "relay",
        about: "a handler that relays",
        targets: &[rate(SHAPE, 1.10), cpu(SHAPE, 0.92), rate(BARE, 0.92)],
        curves: &[("clients", 64.0), ("size", 2048.0)],
        ..RELAYING
    },
    Scenario {
        name: "clients-1",
        about: "one client",
        clients: 1,
        targets: &[rate(PEER, 1.0), rate(SHAPE, 0.95), cpu(SHAPE, 1.05)],
        curves: &[("clients", 1.0)],
        ..RELAYING
    },
    Scenario {
        name: "clients-16",
        about: "16 clients",
        clients: 16,
        curves: &[("clients", 16.0)],
        ..RELAYING
    },
    Scenario {
        name: "clients-256",
        about: "256 clients",
        clients: 256,
        curves: &[("clients", 256.0)],
        ..RELAYING
    },
    Scenario {
        name: "clients-512",
        about: "512 clients",
        clients: 512,
        targets: CROWD,
        curves: &[("clients", 512.0)],
        ..RELAYING
    },
    Scenario {
        name: "clients-1000",
        about: "1,000 clients",
        clients: 1000,
        targets: CROWD,
        curves: &[("clients", 1000.0)],
        ..RELAYING
    },
    Scenario {
        name: "size-64k",
        about: "mails of 64 KiB",
        size: 64 << 10,
        targets: &[rate(BARE, 0.97), cpu(BARE, 1.08)],
        curves: &[("size", 65536.0)],
        ..RELAYING
    },
    Scenario {
        name: "size-1m",
        about: "mails of 1 MiB from 16 clients",
        size: 1 << 20,
        clients: 16,
        targets: LARGE,
        curves: &[("size", 1_048_576.0)],
        ..RELAYING
    },
    Scenario {
        name: "size-16m",
        about: "mails of 16 MiB from 4 clients",
        size: 16 << 20,
        clients: 4,
        targets: LARGE,
        curves: &[("size", 16_777_216.0)],
        ..RELAYING
    },
    Scenario {
        name: "local",
        about: "the next hop on a local socket",
        hop: Hop::Local,
        ..RELAYING
    },
    Scenario {
        name: "local-1m",
        about: "the next hop on a local socket, mails of 1 MiB from 16 clients",
        hop: Hop::Local,
        size: 1 << 20,
        clients: 16,
        ..RELAYING
    },
    Scenario {
        name: "discard",
        about: "a handler that discards, against relays that discard",
        script: "
qmqp_listen(socket, function(m)
  return m:discard()
end)
",
        hop: Hop::Nowhere,
        targets: &[rate(SHAPE, 1.10), cpu(SHAPE, 0.92)],
        ..RELAYING
    },
    Scenario {
        name: "exec-raw",
        about: "a tiny program for each mail, against a loop that starts the same program",
        script: "
qmqp_listen(socket, function(m)
  return m:exec_raw(program)
end)
",
        clients: 16,
        hop: Hop::Nowhere,
        rivals: &[Rival::Spawn, Rival::Peer],
        targets: &[rate(SPAWN, 0.9)],
        ..RELAYING
    },
    Scenario {
        name: "exec",
        about: "the same by exec, which reads the program's answer",
        script: "
qmqp_listen(socket, function(m)
  return m:exec(program)
end)
",
        clients: 16,
        hop: Hop::Nowhere,
        rivals: &[Rival::Spawn, Rival::Peer],
        ..RELAYING
    },
    Scenario {
        name: "open",
        about: "mails at random moments, half of the rate that all relays can carry",
        clients: 1000,
        open: true,
        ..RELAYING
    },
    Scenario {
        name: "slow",
        about: "1,000 clients and a next hop that answers after 100 ms",
        script: "
settings{workers=2, worker_connections=1000}
qmqp_listen(socket, function(m)
  return m:connect(next_hop)
end)
",
        clients: 1000,
        delay: 100,
        threads: 1000,
        rivals: &[Rival::Bare, Rival::Shape],
        targets: &[target(Quantity::Delayed, 0.95)],
        ..RELAYING
    },
    Scenario {
        name: "lua",
        about: "about 1 ms of Lua per mail, in 2 workers against 1",
        script: "
settings{workers=2}
qmqp_listen(socket, function(m)
  local sum = 0
  for i = 1, 100000 do sum = sum + i end
  return m:connect(next_hop)
end)
",
        rivals: &[Rival::Script(
            "
settings{workers=1}
qmqp_listen(socket, function(m)
  local sum = 0
  for i = 1, 100000 do sum = sum + i end
  return m:connect(next_hop)
end)
",
        )],
        targets: &[rate(BASELINE, 1.9)],
        ..RELAYING
    },
    Scenario {
        name: "workers-1",
        about: "1 worker",
        script: "
settings{workers=1}
qmqp_listen(socket, function(m)
  return m:connect(next_hop)
end)
",
        rivals: &[Rival::Shape],
        curves: &[("workers", 1.0)],
        ..RELAYING
    },
    Scenario {
        name: "workers-2",
        about: "2 workers",
        script: "
settings{workers=2}
qmqp_listen(socket, function(m)
  return m:connect(next_hop)
end)
",
        rivals: &[Rival::Shape],
        curves: &[("workers", 2.0)],
        ..RELAYING
    },
    Scenario {
        name: "workers-4",
        about: "4 workers",
        script: "
settings{workers=4}
qmqp_listen(socket, function(m)
  return m:connect(next_hop)
end)
",
        rivals: &[Rival::Shape],
        curves: &[("workers", 4.0)],
        ..RELAYING
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
        rivals: &[Rival::Script(RELAY)],
        targets: &[cpu(BASELINE, 1.08)],
        ..RELAYING
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
        rivals: &[Rival::Script(RELAY)],
        targets: &[Target { quantity: Quantity::AddedCpu, against: BASELINE, bound: 20.0 }],
        ..RELAYING
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
        rivals: &[Rival::Script(RELAY)],
        targets: &[rate(BASELINE, 0.85)],
        ..RELAYING
    },
    Scenario {
        name: "pg",
        about: "one indexed SELECT per mail, against no database (makes a table)",
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
        rivals: &[Rival::Script(RELAY)],
        targets: &[Target { quantity: Quantity::AddedCpu, against: BASELINE, bound: 80.0 }],
        ..RELAYING
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
        rivals: &[Rival::Script(
            "
settings{workers=1}
local db = pg:new('', nil, {max_connections=1})
qmqp_listen(socket, function(m)
  assert(db:execute('SELECT pg_sleep(0.005)'))
  return m:connect(next_hop)
end)
",
        )],
        targets: &[rate(BASELINE, 10.0)],
        ..RELAYING
    },
    Scenario {
        name: "reload",
        about: "a reload every 2 s, at half of the rate that qrelay can carry, against no reload",
        open: true,
        clients: 1000,
        reload: 2,
        rivals: &[Rival::Script(RELAY)],
        targets: &[Target { quantity: Quantity::P99, against: BASELINE, bound: 2.0 }],
        ..RELAYING
    },
];
