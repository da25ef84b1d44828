//! The flood test: the delay of a normal client, alone and beside clients at their worst.
//!
//! Contract: each attack is one entry of `ATTACKS`. Its clients run as other users, in processes of
//! their own, so root is needed. Every round measures the normal client alone and then beside the
//! attack; the report shows medians. The normal client is the user who runs the benchmark.
//!
//! # Failure
//! A mail of the normal client that isn't accepted ends the run. A missed target is printed.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream, process::CommandExt as _},
    path::Path,
    thread,
    time::Duration,
};

use crate::{
    error::{BenchError, system},
    load,
    measure::Extent,
    outcome::Outcome,
    process::{Build, Helper, Program, Sink, Subject, generate},
};

/// Name on the command line, among the scenarios.
pub const NAME: &str = "flood";

/// Description in one line, for `--list` and the report.
pub const ABOUT: &str = "the delay of a normal client beside floods of other users (needs root)";

/// The highest p99 beside an attack, as a multiple of the p99 alone, and in any case.
const TARGET: (f64, Duration) = (2.0, Duration::from_secs(1));

/// How many clients the normal user has.
const NORMAL: usize = 4;

/// Users that attack; Debian gives these numbers to nobody but nobody.
const ATTACKERS: [u32; 2] = [65_534, 65_533];

/// Pause between two bytes of an attacker's client.
const PACE: Duration = Duration::from_secs(1);

/// What one kind of flood does.
#[derive(Debug)]
struct Attack {
    name: &'static str,
    /// How many users attack.
    users: usize,
    /// Clients of each user.
    clients: usize,
    /// What each client sends first.
    begin: &'static str,
    /// How many bytes follow at once.
    bytes: usize,
    /// RLIMIT_NOFILE of qrelay, if it is to be low.
    descriptors: Option<u32>,
}

const ATTACKS: &[Attack] = &[
    Attack { name: "silent", users: 1, clients: 5300, begin: "", bytes: 0, descriptors: None },
    Attack {
        name: "descriptors",
        users: 1,
        clients: 300,
        begin: "",
        bytes: 0,
        descriptors: Some(128),
    },
    Attack {
        name: "waiting",
        users: 1,
        clients: 5300,
        begin: "9000000:8999000:",
        bytes: 0,
        descriptors: None,
    },
    Attack {
        name: "drips",
        users: 2,
        clients: 384,
        begin: "9000000:8999000:",
        bytes: 0,
        descriptors: None,
    },
    Attack {
        name: "announced",
        users: 1,
        clients: 64,
        begin: "16700000:16699000:",
        bytes: 66_000,
        descriptors: None,
    },
    Attack {
        name: "memory",
        users: 1,
        clients: 64,
        begin: "16700000:16699000:",
        bytes: 8_000_000,
        descriptors: None,
    },
    Attack {
        name: "programs",
        users: 1,
        clients: 384,
        begin: "20:1:x,5:s@x.y,3:r@x,,",
        bytes: 0,
        descriptors: None,
    },
];

/// Relays the mails of the normal client, and runs a slow program for everybody else's.
const SCRIPT: &str = "
qmqp_listen(socket, function(m)
  if m.uid > 65000 then return m:exec_raw('/bin/sleep', '20') end
  return m:connect(next_hop)
end)
";

/// Measures every attack.
pub fn run(extent: &Extent, log: Option<&Path>) -> Result<(), BenchError> {
    println!("scenario {NAME}: {ABOUT}");
    println!("{} rounds of {:?}, {NORMAL} normal clients\n", extent.rounds, extent.slot);
    println!("{:<12} {:>23}  {:>23}", "", "alone", "beside the attack");
    let columns = format!("{:>7} {:>7} {:>7}", "mails/s", "p50 ms", "p99 ms");
    println!("{:<12} {columns}  {columns}", "");
    let sink = Sink::start(extent.threads, Duration::ZERO, None)?;
    for attack in ATTACKS {
        measure(attack, &sink, extent, log)?;
    }
    println!();
    Ok(())
}

fn measure(
    attack: &Attack,
    sink: &Sink,
    extent: &Extent,
    log: Option<&Path>,
) -> Result<(), BenchError> {
    let dir = tempfile::tempdir().map_err(system("temporary directory"))?;
    let program = Program::Qrelay {
        build: Build::Ours,
        script: SCRIPT.to_owned(),
        log: log.map(Path::to_owned),
        descriptors: attack.descriptors,
        callgrind: None,
    };
    let qrelay = Subject::start("qrelay", &program, dir.path(), &sink.surroundings())?;
    for dir in qrelay.socket.ancestors().skip(1).take(2) {
        let all = fs::Permissions::from_mode(0o755);
        fs::set_permissions(dir, all).map_err(system(dir.display().to_string()))?;
    }
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..extent.rounds {
        alone.push(send(&qrelay, extent)?);
        let attackers: Vec<Helper> = ATTACKERS[..attack.users]
            .iter()
            .map(|&uid| attackers(attack, uid, &qrelay.socket))
            .collect::<Result<_, _>>()?;
        beside.push(send(&qrelay, extent)?);
        drop(attackers);
    }
    let (alone, beside) = (median(&alone), median(&beside));
    let times = beside.p99.as_secs_f64() / alone.p99.as_secs_f64();
    let met = times <= TARGET.0 && beside.p99 <= TARGET.1;
    let verdict = if met { "met" } else { "MISSED" };
    println!("{:<12} {}  {}  {times:.2} × {verdict}", attack.name, alone, beside);
    Ok(())
}

/// Starts one user's clients and waits until all have begun.
fn attackers(attack: &Attack, uid: u32, socket: &Path) -> Result<Helper, BenchError> {
    Helper::start("attack", |command| {
        command.arg(socket).arg(attack.clients.to_string()).arg(attack.bytes.to_string());
        command.arg(attack.begin).uid(uid).gid(uid);
    })
}

/// Sends the normal client's mails for one slot.
fn send(qrelay: &Subject, extent: &Extent) -> Result<Outcome, BenchError> {
    let outcome = generate(
        &load::Plan {
            socket: &qrelay.socket,
            clients: NORMAL,
            threads: 1,
            size: extent.size,
            duration: extent.slot,
            mails: u64::MAX,
            rate: 0.0,
        },
        false,
    )?;
    match outcome.answers.failed() {
        0 => Ok(outcome),
        failed => Err(BenchError::NotAccepted(failed)),
    }
}

/// The medians of a normal client's slots.
struct Delay {
    rate: f64,
    p50: Duration,
    p99: Duration,
}

fn median(slots: &[Outcome]) -> Delay {
    fn middle<T: PartialOrd + Copy>(values: impl Iterator<Item = T>) -> T {
        let mut values: Vec<T> = values.collect();
        values.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
        values[values.len() / 2]
    }
    let rate = |slot: &Outcome| slot.answers.accepted as f64 / slot.elapsed.as_secs_f64();
    Delay {
        rate: middle(slots.iter().map(rate)),
        p50: middle(slots.iter().map(|slot| slot.p50)),
        p99: middle(slots.iter().map(|slot| slot.p99)),
    }
}

impl std::fmt::Display for Delay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        write!(f, "{:>7.0} {:>7.2} {:>7.2}", self.rate, ms(self.p50), ms(self.p99))
    }
}

/// The life of one attacking user: `clients` connections that send `begin` and `bytes` bytes at
/// once, and then a byte every `PACE`. A connection that was closed is made again.
pub fn attack(socket: &Path, clients: usize, bytes: usize, begin: &str) -> io::Result<()> {
    let connect = || -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_nonblocking(true)?;
        let first: Vec<u8> = begin.bytes().chain(std::iter::repeat_n(b'x', bytes)).collect();
        let mut rest = first.as_slice();
        // What isn't taken within a moment isn't sent.
        for _ in 0..100 {
            match stream.write(rest) {
                Ok(sent) => rest = &rest[sent..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(_) => break,
            }
            if rest.is_empty() {
                break;
            }
        }
        Ok(stream)
    };
    let mut streams: Vec<UnixStream> = (0..clients).map(|_| connect()).collect::<Result<_, _>>()?;
    println!("ready");
    io::stdout().flush()?;
    loop {
        thread::sleep(PACE);
        for stream in &mut streams {
            match stream.write(b"x") {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => *stream = connect()?,
                _ => {}
            }
        }
    }
}
