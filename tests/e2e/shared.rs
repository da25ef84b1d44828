//! The dictionaries that all workers and generations share. No operation is lost or done twice,
//! whichever process is killed or reloaded, and a dictionary never takes more memory than it may.
//!
//! `QRELAY_FULL=1` runs with the numbers of the requirement; otherwise they are smaller.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::processes::{self, signal};
use crate::harness::{Client, Daemon, Mail, eventually, full, submit};

/// Number of increments by each mail of the counting tests.
const PER_MAIL: u64 = 10;

/// Body of a handler that increments a count ten times and answers with the ten results.
const COUNT: &str = "local told = {}
     for i = 1, 10 do told[i] = assert(d:incr('count')) end
     return m:discard(table.concat(told, ' '))";

/// Returns a configuration whose handler runs `body` with the dictionary `d` and the mail `m`. A
/// mail from sum@x is answered with the count.
fn counter(settings: &str, body: &str) -> String {
    format!(
        "settings{{{settings}, client_share=1}}
         local d = shared:new('d')
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'sum@x' then return m:discard(d:get('count') or 'nil') end
           {body}
         end)"
    )
}

#[track_caller]
fn sum(daemon: &Daemon) -> u64 {
    let told = submit(daemon.path("in"), &Mail::new("x").from("sum@x")).to_string();
    told[1..].parse().expect("a number")
}

/// Parses the answer of a handler with [`COUNT`].
#[track_caller]
fn numbers(told: &str) -> Vec<u64> {
    assert!(told.starts_with('K'), "{told}");
    told[1..].split(' ').map(|number| number.parse().expect("a number")).collect()
}

#[test]
fn every_increment_counts_once() {
    let full = full();
    let mails = if full { 10_000 } else { 1000 };
    let daemon = Daemon::start(&counter("workers=4, worker_connections=64", COUNT));
    daemon.wait_for_workers(4, &[]);
    let left = AtomicU64::new(mails);
    let one = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
    let client = || {
        let mut told = Vec::new();
        while one().is_ok() {
            told.extend(numbers(&submit(daemon.path("in"), &Mail::new("x")).to_string()));
        }
        told
    };
    let told: Vec<u64> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4 * 64).map(|_| scope.spawn(client)).collect();
        clients.into_iter().flat_map(|client| client.join().expect("client")).collect()
    });
    assert_eq!(sum(&daemon), mails * PER_MAIL);
    let distinct: BTreeSet<_> = told.iter().copied().collect();
    assert_eq!(distinct, (1..=mails * PER_MAIL).collect(), "each number was told once");
    assert_eq!(told.len(), distinct.len());
}

#[test]
fn a_dictionary_outlives_workers_and_generations() {
    let daemon = Daemon::start(&counter("workers=2", COUNT));
    let (done, tried, accepted) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    tried.fetch_add(1, Ordering::Relaxed);
                    let told = submit(daemon.path("in"), &Mail::new("x"));
                    match told.status() {
                        'K' => accepted.fetch_add(1, Ordering::Relaxed),
                        _ => {
                            assert_eq!(told, "Ztry again later");
                            0
                        }
                    };
                }
            });
        }
        for _ in 0..4 {
            let more = accepted.load(Ordering::Relaxed) + 50;
            eventually("mails", || (accepted.load(Ordering::Relaxed) > more).then_some(()));
            if let Some(&worker) = daemon.workers().last() {
                signal(worker, Signal::SIGKILL);
            }
            let more = accepted.load(Ordering::Relaxed) + 50;
            eventually("mails", || (accepted.load(Ordering::Relaxed) > more).then_some(()));
            assert!(daemon.reload());
        }
        done.store(true, Ordering::Relaxed);
    });
    let (tried, accepted) = (tried.into_inner(), accepted.into_inner());
    let sum = sum(&daemon);
    println!("{sum} counted by {tried} mails, {accepted} of them accepted");
    assert!(daemon.count_log("worker died") > 0);
    assert!(accepted * PER_MAIL <= sum && sum <= tried * PER_MAIL, "{accepted} {sum} {tried}");
    // The dictionary survives a generation that names it and doesn't use it.
    let none = "qmqp_listen('$DIR/in', function(m) return m:discard('none') end)";
    daemon.site().configure(&format!("shared:new('d') {none}"));
    reload_and_end(&daemon);
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Knone");
    daemon.site().configure(&counter("workers=3", COUNT));
    reload_and_end(&daemon);
    assert_eq!(self::sum(&daemon), sum);
}

/// Reloads, and waits until the generation before has ended.
#[track_caller]
fn reload_and_end(daemon: &Daemon) {
    let ended = daemon.count_log("generation has ended") + 1;
    assert!(daemon.reload(), "{}", daemon.text());
    // Generations before that one may be ending, too.
    let begun = daemon.count_log(" ready generation=") - 1;
    let ended = ended.max(begun);
    eventually("the end", || (daemon.count_log("generation has ended") >= ended).then_some(()));
}

#[test]
fn a_dictionary_ends_with_the_last_generation_that_names_or_uses_it() {
    let none = "qmqp_listen('$DIR/in', function(m) return m:discard('none') end)";
    let in_handler = "qmqp_listen('$DIR/in', function(m)
           return m:discard(shared:new('d'):incr('count'))
         end)";
    for script in [counter("workers=2", "return m:discard(d:incr('count'))"), in_handler.into()] {
        let daemon = Daemon::start(&script);
        for expected in ["K1", "K2"] {
            assert_eq!(submit(daemon.path("in"), &Mail::new("x")), expected);
        }
        daemon.site().configure(none);
        reload_and_end(&daemon);
        daemon.site().configure(&script);
        reload_and_end(&daemon);
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "K1");
    }
}

#[test]
fn all_dictionaries_together_stay_within_their_bound() {
    const BOUND: u64 = 4 << 20;
    let daemon = Daemon::start(
        "settings{workers=1, shared_memory=2^20, shared_memory_total=2^22, handler_timeout=20,
           hang_timeout=30}
         qmqp_listen('$DIR/in', function(m)
           for i = 1, 200 do
             local d = shared:new('d' .. i)
             for j = 1, 12 do assert(d:set(m.id .. j, ('v'):rep(60000))) end
           end
           local d = shared:new('d1')
           assert(d:set('last', 1) and d:get('last') == 1)
           return m:discard('done')
         end)",
    );
    let flood = || submit(daemon.path("in"), &Mail::new("x")).to_string();
    assert_eq!(flood(), "Kdone", "{}", daemon.text());
    let before = processes::memory(daemon.pid(), "status", "VmRSS");
    // Each flood has 137 MiB of values.
    for _ in 0..2 {
        assert_eq!(flood(), "Kdone");
    }
    let after = processes::memory(daemon.pid(), "status", "VmRSS");
    println!("supervisor: {} KiB, then {} KiB resident", before / 1024, after / 1024);
    assert!(after <= before + BOUND && after < 10 * BOUND, "{before} {after}");
}

#[test]
fn a_dictionary_works_while_the_script_loads() {
    let config = "local d = shared:new('d')
         local loads = d:incr('loads')
         function reload() d:incr('reloads') end
         settings{workers=2}
         qmqp_listen('$DIR/in', function(m)
           return m:discard(loads .. ' ' .. tostring(d:get('reloads')))
         end)";
    let daemon = Daemon::start(config);
    daemon.wait_for_workers(2, &[]);
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "K1 nil");
    assert!(daemon.reload());
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "K2 1");
}

/// A connection to the dictionary that was opened while the script loaded would be shared by all
/// workers, so no worker may use it.
#[test]
fn every_worker_gets_the_answers_to_its_own_operations() {
    let script = counter(
        "workers=4",
        "for i = 1, 20 do
           assert(d:set(m.id, m.id .. i))
           local got = d:get(m.id)
           if got ~= m.id .. i then return m:reject(tostring(got)) end
         end
         return m:discard('all')",
    );
    let daemon = Daemon::start(&format!("assert(shared:new('d'):set('loads', 'x'))\n{script}"));
    daemon.wait_for_workers(4, &[]);
    let request = Mail::new("x").request();
    let mut clients: Vec<_> = (0..200).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut clients {
        client.send(&request);
    }
    for client in &mut clients {
        assert_eq!(client.outcome().to_string(), "Kall");
    }
}

#[test]
fn add_has_one_winner() {
    let daemon = Daemon::start(&counter(
        "workers=4",
        "local added = d:add(m.sender, m.id)
         return m:discard(tostring(added) .. ' ' .. m.id .. ' ' .. d:get(m.sender))",
    ));
    daemon.wait_for_workers(4, &[]);
    for round in 0..5 {
        let request = Mail::new("x").from(&format!("lock{round}@x")).request();
        let mut clients: Vec<_> = (0..100).map(|_| Client::connect(daemon.path("in"))).collect();
        for client in &mut clients {
            client.send(&request);
        }
        let told: Vec<_> = clients.iter_mut().map(|client| client.outcome().to_string()).collect();
        let winners: Vec<_> = told.iter().filter(|told| told.starts_with("Ktrue ")).collect();
        assert_eq!(winners.len(), 1, "{told:?}");
        let winner = winners[0].split(' ').nth(1).expect("an id");
        // Every mail sees the winner's value at once.
        assert!(told.iter().all(|told| told.ends_with(winner)), "{winner}: {told:?}");
    }
}

#[test]
fn a_window_begins_with_its_first_use_and_ends_whatever_happens_in_it() {
    let window = Duration::from_millis(500);
    let daemon = Daemon::start(&counter("workers=2", "return m:discard(d:incr('w', 1, 0.5))"));
    daemon.wait_for_workers(2, &[]);
    let mut sent = Instant::now();
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "K1");
    let mut told_by = Instant::now();
    let mut last = 1;
    for _ in 0..2 {
        loop {
            let asked = Instant::now();
            let told = submit(daemon.path("in"), &Mail::new("x")).to_string();
            let count: u64 = told[1..].parse().expect("a number");
            if count == 1 {
                assert!(sent.elapsed() >= window, "too early: {:?}", sent.elapsed());
                (sent, told_by, last) = (asked, Instant::now(), 1);
                break;
            }
            assert_eq!(count, last + 1);
            assert!(asked < told_by + window, "an increment doesn't extend the window");
            last = count;
        }
    }
}

#[test]
fn a_flood_of_keys_stays_within_the_bound() {
    const BOUND: u64 = 1 << 20;
    let daemon = Daemon::start(&counter(
        "workers=2, shared_memory=1048576, handler_timeout=20, hang_timeout=30",
        "local size, count = m.sender:match('(%d+)x(%d+)')
         d:get('used')
         for i = 1, count do
           assert(d:set(m.id .. i, ('v'):rep(size + 0)))
           if i % 10 == 0 then d:get('used') end
         end
         return m:discard(tostring(d:get('used')) .. ' ' .. tostring(d:get('unused')))",
    ));
    // After this first flood, the process has everything that a dictionary of this size needs in
    // addition to its content.
    let flood = |size: u64, count: u64| {
        let mail = Mail::new("x").from(&format!("{size}x{count}@x"));
        submit(daemon.path("in"), &mail).to_string()
    };
    assert_eq!(flood(65_536, 10), "Knil nil");
    let before = processes::memory(daemon.pid(), "status", "VmRSS");
    // The floods have 64 MiB of values, and 20,000 keys with hardly any value.
    for _ in 0..10 {
        flood(65_536, 100);
        flood(1, 2000);
    }
    let after = processes::memory(daemon.pid(), "status", "VmRSS");
    println!("supervisor: {} KiB, then {} KiB resident", before / 1024, after / 1024);
    assert!(after <= before + 2 * BOUND, "{before} {after}");
}

#[test]
fn the_least_recently_used_keys_go_first() {
    let daemon = Daemon::start(&counter(
        "workers=1, shared_memory=1048576",
        "d:set('used', 'still') d:set('unused', 'still')
         for i = 1, 500 do
           assert(d:set('k' .. i, ('v'):rep(10000)))
           assert(d:get('used') == 'still')
         end
         return m:discard(tostring(d:get('unused')) .. ' ' .. #d:keys())",
    ));
    let told = submit(daemon.path("in"), &Mail::new("x")).to_string();
    let (unused, keys) = told.split_once(' ').expect("two words");
    assert_eq!(unused, "Knil");
    let keys: usize = keys.parse().expect("a number");
    assert!((90..=105).contains(&keys), "{keys} keys of 10,000 bytes in 1 MiB");
}

#[test]
fn misuse_raises_and_values_come_back_as_they_were() {
    let daemon = Daemon::start(&counter(
        "workers=1",
        r#"local function raises(part, name, ...)
             local ok, message = pcall(d[name], d, ...)
             assert(not ok and message:find(part, 1, true), name .. ': ' .. tostring(message))
           end
           raises("'get' (key: expected a string, got nil)", 'get')
           raises("'get' (key: expected at most 256 bytes, got 257)", 'get', ('k'):rep(257))
           raises("'set' (value: expected a string, a number or a boolean, got nil)", 'set', 'k')
           raises("'set' (value: expected a string, a number or a boolean, got a table)",
             'set', 'k', {})
           raises("'add' (value: expected at most 65536 bytes, got 65537)",
             'add', 'k', ('v'):rep(65537))
           raises("'set' (ttl: expected seconds, more than 0", 'set', 'k', 1, 0)
           raises("'incr' (by: expected a number, got 'x')", 'incr', 'k', 'x')
           raises("'incr' (ttl: expected seconds", 'incr', 'k', 1, -1)
           raises("'delete' (key: expected a string, got true)", 'delete', true)
           raises("'keys' (max: expected a number from 1", 'keys', 0)
           assert(not pcall(d.get, 'k'), 'with a dot')
           for _, name in ipairs{'', 'A', 'a b', ('n'):rep(65)} do
             assert(not pcall(shared.new, shared, name), name)
           end
           assert(#d:keys() == 0, 'nothing of that was done')
           local values = {'', 'a\0\255', ('v'):rep(65536), 0, -5, 1.5, 2^53, 1/0, true, false}
           for i, value in ipairs(values) do
             local key = i % 2 == 0 and i or ('k'):rep(255) .. i % 10
             assert(d:set(key, value) == true)
             local got = d:get(key)
             assert(got == value and math.type(got) == math.type(value), tostring(value))
             assert(d:add(key, 'other') == false and d:get(key) == value)
             assert(d:delete(key) == true and d:delete(key) == false and d:get(key) == nil)
             assert(d:add(key, value) == true and d:delete(key))
           end
           assert(d:get('7') == nil and d:set(7, 'by number') and d:get('7') == 'by number')
           assert(d:incr('n') == 1 and d:incr('n', 2.5) == 3.5 and d:incr('n', '2') == 5.5)
           local none, message = d:incr('7')
           assert(none == nil and message == 'not a number', message)
           assert(d:get('7') == 'by number')
           for i = 1, 5 do d:set('key' .. i, i) end
           assert(#d:keys() == 7 and #d:keys(3) == 3)
           return m:discard('done')"#,
    ));
    let told = submit(daemon.path("in"), &Mail::new("x"));
    assert_eq!(told, "Kdone", "{}", daemon.text());
}
