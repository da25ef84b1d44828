//! Errors that happen for every mail: the first one has a record with all about it, and the same
//! ones after it are counted.

use nix::sys::signal::Signal;

use crate::harness::postgres::Cluster;
use crate::harness::{Daemon, Mail, eventually, submit};

/// How many mails fail.
const MAILS: usize = 3000;

/// Fails for every mail: 3000 of them leave one `mail` line each and fewer than 100 others. The
/// record of the first failure has all of `first`. When the daemon has ended, every failure was
/// logged or counted.
#[track_caller]
fn fails(mut daemon: Daemon, told: &str, problem: &str, first: &[&str]) {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..MAILS / 4 {
                    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), told);
                }
            });
        }
    });
    // The last lines, which have the numbers, find room in the pipe once the others have been read.
    let mut seen = Vec::new();
    eventually("all of the log", || {
        seen.push(daemon.text().len());
        (seen.iter().rev().take_while(|&&length| Some(&length) == seen.last()).count() > 5)
            .then_some(())
    });
    daemon.stop();
    let text = daemon.complete_text();
    // The reader of the log may be too slow for all the lines, which are counted then.
    let lost: usize = text
        .lines()
        .filter_map(|line| line.split_once(": log lines were lost lost="))
        .map(|(_, lost)| lost.parse::<usize>().expect("a number"))
        .sum();
    let mails = text.lines().filter(|line| line.contains(": mail id=")).count();
    assert!(mails <= MAILS && mails + lost >= MAILS, "{mails} mails, {lost} lost");
    let lines = text.lines().count() + lost;
    assert!(lines < MAILS + 100, "{lines} lines");
    let found: Vec<_> = text.lines().filter(|line| line.contains(problem)).collect();
    for part in first {
        assert!(found[0].contains(part), "no {part} in {}", found[0]);
    }
    let counted: usize = found.iter().map(|line| repeated(line).unwrap_or(1)).sum();
    assert_eq!(counted, MAILS, "{found:#?}");
}

/// Returns how often the error of this line was repeated.
fn repeated(line: &str) -> Option<usize> {
    let (_, rest) = line.split_once(": repeated ")?;
    let (count, rest) = rest.split_once(" times in ").expect("a number");
    let (seconds, _) = rest.split_once(" s").expect("a time");
    assert!((1..=60).contains(&seconds.parse::<u64>().expect("seconds")), "{line}");
    Some(count.replace(',', "").parse().expect("a number"))
}

#[test]
fn an_error_in_the_script() {
    let daemon = Daemon::start(
        "settings{workers=2}
         local function inner(m) error('deep down\\nsecond line ' .. m.id) end
         qmqp_listen('$DIR/in', function(m) inner(m) return 1 end)",
    );
    let listener = format!("listener={}", daemon.path("in").display());
    let first = [
        "config.lua:2: deep down",
        " id=",
        " worker=",
        &listener,
        "traceback=",
        "config.lua:3: in",
    ];
    fails(daemon, "Zscript failed", "script failed: ", &first);
}

#[test]
fn a_next_hop_that_is_down() {
    let daemon = Daemon::start(
        "settings{workers=2}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/nobody') end)",
    );
    let next_hop = format!("next_hop={}", daemon.path("nobody").display());
    let first = [" id=", &next_hop, "error=\"No such file or directory\""];
    fails(daemon, "Zconnect failed", ": connect failed", &first);
}

#[test]
fn a_database_that_is_down() {
    let daemon = Daemon::start(
        "settings{workers=2}
         local db = pg:new('host=$DIR user=nobody dbname=x')
         qmqp_listen('$DIR/in', function(m) assert(db:execute('SELECT 1')) end)",
    );
    let first = ["config.lua:3: ", "No such file or directory", "traceback="];
    fails(daemon, "Zscript failed", "script failed: ", &first);
}

#[test]
fn a_database_that_does_not_answer() {
    let cluster = Cluster::start(&[]);
    let mut daemon = Daemon::start(&format!(
        "settings{{workers=1, relay_timeout=0.5}}
         local db = pg:new('{}')
         qmqp_listen('$DIR/in', function(m)
           return m:discard(assert(db:execute('SELECT 1')):fetch(nil, 'n')[1])
         end)",
        cluster.conninfo()
    ));
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "K1");
    cluster.signal_all(Signal::SIGSTOP);
    std::thread::scope(|scope| {
        for _ in 0..60 {
            let to = daemon.path("in");
            scope.spawn(move || assert_eq!(submit(to, &Mail::new("x")), "Zrelay failed"));
        }
    });
    cluster.signal_all(Signal::SIGCONT);
    daemon.stop();
    let text = daemon.complete_text();
    // What a mail waited for is one of three; each is one line and one count.
    let over: Vec<_> = text.lines().filter(|line| line.contains("pg: a mail's time is")).collect();
    assert!(over.len() <= 6, "{over:#?}");
    assert_eq!(over.iter().map(|line| repeated(line).unwrap_or(1)).sum::<usize>(), 60);
    assert!(over.iter().all(|line| line.contains("server=")), "{over:#?}");
}

#[test]
fn a_program_that_fails() {
    let daemon = Daemon::start(
        "settings{workers=2}
         qmqp_listen('$DIR/in', function(m)
           return m:exec('/bin/sh', '-c', 'cat >/dev/null; echo no disk >&2; exit 75')
         end)",
    );
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..10 {
                    let told = submit(daemon.path("in"), &Mail::new("x")).to_string();
                    assert!(told.starts_with('Z'), "{told}");
                }
            });
        }
    });
    // One line per worker at most, since a worker knows only its own mails.
    assert!((1..=2).contains(&daemon.count_log("program complained")), "{}", daemon.text());
    daemon.wait_for_log("errors=\"no disk\"");
}

#[test]
fn the_number_comes_when_the_minute_is_over() {
    let daemon = Daemon::start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m) error('always the same') end)",
    );
    for _ in 0..5 {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zscript failed");
    }
    assert_eq!(daemon.count_log("always the same"), 1);
    // Nothing else happens meanwhile.
    let patience = std::time::Duration::from_secs(80);
    let line = daemon.wait_for_log_within("always the same: repeated", patience);
    assert!(line.contains(": repeated 4 times in 60 s"), "{line}");
}
