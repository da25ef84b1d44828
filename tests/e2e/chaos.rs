//! Never lose mail: a load of unique mails while workers and zygotes are killed and the
//! configuration is reloaded, and a checker over the whole history.
//!
//! The history consists of every client's mails, answers and their times, and the mails that the
//! next hop received. The rules:
//! - a mail that got `K` is in the next hop, exactly as sent, once (or more often only if an
//!   earlier attempt had no `K`);
//! - a client that sent a complete request received one well-formed `K` or `Z`;
//! - at least 95 % of the answers are `K`, and outside of the time of the kills all are;
//! - the next hop has received only mails that were sent.
//!
//! `QRELAY_FULL=1` runs with the numbers of the requirement; otherwise they are smaller.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::harness::processes::{relaying, signal};
use crate::harness::sink::answer;
use crate::harness::{Daemon, Mail, Outcome, Reply, Sink, eventually, full, submit};

/// A mail that a client has sent, and its answer.
#[derive(Debug)]
struct Attempt {
    mail: Mail,
    outcome: Outcome,
    sent: Instant,
    told: Instant,
}

/// Creates a mail that is sent only once by only one client; the sizes vary.
fn unique(client: usize, number: usize) -> Mail {
    let filler = "x".repeat((client * 131 + number * 977) % 6000);
    let mut mail = Mail::new(&format!("client {client} mail {number} {filler}"));
    mail.sender = format!("c{client}-{number}@example.com").into_bytes();
    if number % 50 == 49 {
        mail.message.resize(400_000, b'y');
    }
    mail
}

/// Runs `clients` clients until `stop` is set, or until `limit` mails have been sent in all.
fn load(to: &Daemon, clients: usize, limit: usize, stop: &AtomicBool) -> Vec<Attempt> {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let run = |client: usize| {
            let next = &next;
            move || {
                let mut attempts = Vec::new();
                while !stop.load(Ordering::Relaxed) && next.fetch_add(1, Ordering::Relaxed) < limit
                {
                    let mail = unique(client, attempts.len());
                    let sent = Instant::now();
                    let outcome = submit(to.path("in"), &mail);
                    attempts.push(Attempt { mail, outcome, sent, told: Instant::now() });
                }
                attempts
            }
        };
        let threads: Vec<_> = (0..clients).map(|client| scope.spawn(run(client))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("client")).collect()
    })
}

/// The time of the faults: from the first kill until all effects of the kills are over.
type Span = (Instant, Instant);

/// Checks the whole history, and returns one line for each violation.
fn judge(attempts: &[Attempt], received: &[Mail], faults: Option<Span>) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut arrived: HashMap<&[u8], Vec<&Mail>> = HashMap::new();
    for mail in received {
        arrived.entry(&mail.sender).or_default().push(mail);
    }
    for attempt in attempts {
        let name = String::from_utf8_lossy(&attempt.mail.sender);
        let copies = arrived.remove(&attempt.mail.sender[..]).unwrap_or_default();
        let expected = attempt.mail.relayed();
        if copies.iter().any(|copy| **copy != expected) {
            wrong.push(format!("{name}: arrived changed"));
        }
        if copies.len() > 1 {
            wrong.push(format!("{name}: arrived {} times", copies.len()));
        }
        match attempt.outcome.status() {
            'K' if copies.is_empty() => wrong.push(format!("{name}: K, but it never arrived")),
            'K' => {}
            'Z' if faults.is_some_and(|(from, to)| attempt.told >= from && attempt.sent <= to) => {}
            _ => wrong.push(format!("{name}: told {}", attempt.outcome)),
        }
    }
    wrong.extend(
        arrived.keys().map(|sender| {
            format!("{}: arrived, but nobody sent it", String::from_utf8_lossy(sender))
        }),
    );
    wrong
}

#[track_caller]
fn assert_right(wrong: &[String], daemon: &Daemon) {
    let first = &wrong[..wrong.len().min(20)];
    assert!(wrong.is_empty(), "{} violations: {first:#?}\n{}", wrong.len(), daemon.text().len());
}

fn script(mark: usize) -> String {
    format!(
        "-- {mark}
         settings{{workers=4}}
         function reload() end
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)"
    )
}

/// Starts a next hop that takes a moment for each mail, so that there is always a job in flight.
fn next_hop(daemon: &Daemon) -> Sink {
    let behaviour = answer(|_| {
        std::thread::sleep(std::time::Duration::from_millis(3));
        Reply::text("Kok")
    });
    Sink::start(daemon.path("out"), behaviour)
}

/// A small random number generator (xorshift) with a fixed seed, so that a run can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

/// Waits until the next hop has received `more` further mails.
#[track_caller]
fn pass_mails(sink: &Sink, more: usize) {
    sink.record().wait_for_count(sink.record().len() + more);
}

/// Reloads once per round; the script of every fourth round is broken.
fn reload_often(daemon: &Daemon, sink: &Sink, rounds: std::ops::Range<usize>) {
    let end = rounds.end;
    for round in rounds {
        let broken = round % 4 == 3;
        match broken {
            true => daemon.site().configure("error('broken on purpose')"),
            false => daemon.site().configure(&script(round)),
        }
        let mark = daemon.notify().mark();
        daemon.reload();
        let failed = daemon.notify().all()[mark..].iter().any(|line| line.contains("on purpose"));
        assert_eq!(failed, broken, "round {round}");
        pass_mails(sink, 20);
    }
    daemon.site().configure(&script(end));
}

/// Kills `count` random workers, one after the other, each while the next hop holds one of its
/// mails. In the middle, also kills a zygote.
fn kill_often(daemon: &Daemon, sink: &Sink, count: usize, random: &mut Random) {
    for round in 0..count {
        let victim = eventually("a worker with a job in flight", || {
            let workers = daemon.workers();
            let victim = *workers.get(random.below(workers.len().max(1)))?;
            (relaying(victim) > 0).then_some(victim)
        });
        signal(victim, Signal::SIGKILL);
        if round == count / 2 {
            signal(daemon.zygotes()[0], Signal::SIGKILL);
        }
        // Each dying worker takes a quarter of the 32 mails under way with it. To reach 95 % `K` in
        // all, many mails have to pass between two deaths.
        pass_mails(sink, 300);
    }
}

#[test]
fn kills_and_reloads_under_load() {
    let (kills, reloads) = if full() { (100, 20) } else { (25, 8) };
    let mut daemon = Daemon::start(&script(0));
    let sink = next_hop(&daemon);
    assert_eq!(submit(daemon.path("in"), &unique(1000, 0)), "Kok");
    let workers = 4;
    let fds = daemon.idle_fd_count(workers);
    let stop = AtomicBool::new(false);
    let faults = Mutex::new(None);

    let mut attempts = std::thread::scope(|scope| {
        let load = scope.spawn(|| load(&daemon, 32, usize::MAX, &stop));
        // If this thread panics, the clients must stop nevertheless.
        let end = StopOnDrop(&stop);
        reload_often(&daemon, &sink, 0..reloads / 2);
        let from = Instant::now();
        kill_often(&daemon, &sink, kills, &mut Random(0x2545_f491_4f6c_dd1d));
        eventually("all workers", || (daemon.workers().len() >= workers).then_some(()));
        // After one full turn of all clients, every answer that a kill caused has been read.
        pass_mails(&sink, 200);
        *faults.lock().expect("not poisoned") = Some((from, Instant::now()));
        reload_often(&daemon, &sink, reloads / 2..reloads);
        drop(end);
        load.join().expect("load")
    });
    let last = Instant::now();
    attempts.push(Attempt {
        mail: unique(1000, 0),
        outcome: Outcome::Reply(b"Kok".to_vec()),
        sent: last,
        told: last,
    });

    let faults = faults.into_inner().expect("not poisoned");
    let wrong = judge(&attempts, &sink.mails(), faults);
    let accepted = attempts.iter().filter(|attempt| attempt.outcome.status() == 'K').count();
    println!("{} mails, {accepted} K, {kills} kills, {reloads} reloads", attempts.len());
    assert_right(&wrong, &daemon);
    assert!(accepted * 100 >= attempts.len() * 95, "{accepted} K of {}", attempts.len());
    eventually("as many workers as before", || (daemon.workers().len() == workers).then_some(()));
    eventually("zygote and standby", || (daemon.zygotes().len() == 2).then_some(()));
    eventually("as many descriptors as before", || (daemon.fd_count() == fds).then_some(()));
    daemon.stop();
}

/// Stops the load when dropped, also by a panic.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn without_faults_every_mail_arrives_once() {
    let count = if full() { 100_000 } else { 8_000 };
    let mut daemon = Daemon::start(&script(0));
    let sink = Sink::answering(daemon.path("out"), "Kok");
    let started = Instant::now();
    let attempts = load(&daemon, 64, count, &AtomicBool::new(false));
    let rate = count as f64 / started.elapsed().as_secs_f64();
    println!("{count} mails, {rate:.0}/s");
    assert_eq!(attempts.len(), count);
    assert_right(&judge(&attempts, &sink.mails(), None), &daemon);
    assert_eq!(sink.mails().len(), count);
    daemon.stop();
}

#[test]
fn the_checker_finds_what_it_is_for() {
    let now = Instant::now();
    let attempt = |number: usize, outcome: &str| {
        let outcome = match outcome {
            "silence" => Outcome::Silence,
            text => Outcome::Reply(text.into()),
        };
        Attempt { mail: unique(0, number), outcome, sent: now, told: now }
    };
    let arrived = |number: usize| unique(0, number).relayed();
    let mut changed = arrived(0);
    changed.message.pop();
    let cases = [
        ("lost", "Kok", vec![], None),
        ("changed", "Kok", vec![changed], None),
        ("doubled", "Kok", vec![arrived(0), arrived(0)], None),
        ("unasked", "Kok", vec![arrived(0), arrived(1)], None),
        ("silence", "silence", vec![], Some((now, now))),
        ("refused", "Dno", vec![], Some((now, now))),
        ("Z without a fault", "Zlater", vec![], None),
    ];
    for (name, outcome, mails, faults) in cases {
        assert_eq!(judge(&[attempt(0, outcome)], &mails, faults).len(), 1, "{name}");
    }
    let fine = [attempt(0, "Kok"), attempt(1, "Zlater"), attempt(2, "Zlater")];
    let mails = [arrived(0), arrived(2)];
    assert_eq!(judge(&fine, &mails, Some((now, now))), Vec::<String>::new());
}
