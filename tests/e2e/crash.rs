//! Crashes of workers and zygotes. The mails of a crashed worker get `Z`, other mails are not
//! affected, and a moment later everything is as before.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::processes::{self, relaying, signal};
use crate::harness::{Client, Daemon, Mail, PATIENCE, Sink, eventually, full, submit};

fn relay(settings: &str) -> Daemon {
    Daemon::start(&format!(
        "settings{{{settings}}}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)"
    ))
}

#[test]
fn clients_of_a_killed_worker_are_told() {
    let mut daemon = relay("workers=1");
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let fds = daemon.idle_fd_count(1);
    let mut clients: Vec<_> = (0..20).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut clients {
        client.send(&Mail::new("in flight").request());
    }
    sink.record().wait_for_count(20);
    let workers = daemon.workers();
    signal(workers[0], Signal::SIGKILL);
    for client in &mut clients {
        assert_eq!(client.outcome(), "Ztry again later");
    }
    gate.open();
    daemon.wait_for_workers(1, &workers);
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
    daemon.wait_for_log(&workers[0].to_string());
    eventually("as many descriptors as before", || (daemon.fd_count() == fds).then_some(()));
    daemon.stop();
}

#[test]
fn the_line_of_a_lost_mail_says_what_it_was_and_where_it_was() {
    let daemon = Daemon::start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m)
           m.account = 'site'
           if m.sender == 'lua@x' then while true do sleep(1) end end
           m.recipients = {'a@x', 'b@x'}
           return m:connect('$DIR/out')
         end)",
    );
    let (sink, _gate) = Sink::gated(daemon.path("out"));
    let [mut reads, mut waits, mut relays] = ["reads@x", "lua@x", "relays@x"].map(|sender| {
        let mut client = Client::connect(daemon.path("in"));
        let request = Mail::new("lost").from(sender).to(&["r@x"]).request();
        let length = if sender == "reads@x" { 10 } else { request.len() };
        client.send(&request[..length]);
        client
    });
    sink.record().wait_for_count(1);
    let worker = daemon.workers()[0];
    // A client's socket, and for one mail the next hop's.
    eventually("all are in the worker", || (relaying_sockets(worker) == 4).then_some(()));
    signal(worker, Signal::SIGKILL);
    for client in [&mut reads, &mut waits, &mut relays] {
        assert_eq!(client.outcome(), "Ztry again later");
    }
    let next_hop = daemon.path("out").display().to_string();
    let all = ["account=site", "status=Z", "reply=\"try again later\""];
    let line = daemon.wait_for_log("lost_in=next_hop");
    let own = ["from=<relays@x>", "to=<a@x>", "recipients=2", &format!("next_hop={next_hop}")];
    assert!(all.iter().chain(&own).all(|field| line.contains(field)), "{line}");
    assert!(!line.contains("size=0"), "{line}");
    let line = daemon.wait_for_log("lost_in=lua_waits");
    let own = ["from=<lua@x>", "to=<r@x>", "recipients=1", "account=site"];
    assert!(own.iter().all(|field| line.contains(field)), "{line}");
    let line = daemon.wait_for_log("lost_in=reading");
    assert!(line.contains("from=<>") && line.contains("status=Z"), "{line}");
}

/// Counts the sockets of a worker beside its three channels to the supervisor.
fn relaying_sockets(worker: i32) -> usize {
    let is_socket = |path: &std::path::Path| path.to_string_lossy().starts_with("socket:");
    let all = processes::descriptors(worker);
    all.iter().filter(|(_, path)| is_socket(path)).count().saturating_sub(3)
}

/// A worker that dies after it has sent its answer, and before anybody knows, must not make the
/// supervisor answer a second time.
#[test]
fn a_worker_that_dies_while_it_answers_yields_one_answer() {
    let daemon = relay("workers=1");
    let sink = Sink::answering(daemon.path("out"), "Kok");
    let worker = daemon.workers()[0];
    let trace = ["-f", "-qq", "-o", "/dev/null", "-e", "trace=shutdown"];
    let mut tracer = Command::new("strace")
        .args(trace)
        .args(["-e", "inject=shutdown:signal=SIGKILL", "-p", &worker.to_string()])
        .spawn()
        .expect("strace runs");
    eventually("every thread is traced", || {
        let tasks = std::fs::read_dir(format!("/proc/{worker}/task")).ok()?;
        let traced = |status: String| status.contains("\nTracerPid:\t0\n").then_some(());
        let untraced = tasks
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok())
            .find_map(traced);
        untraced.is_none().then_some(())
    });
    assert_eq!(submit(daemon.path("in"), &Mail::new("once")), "Kok");
    let line = daemon.wait_for_log("lost_in=answering");
    assert!(line.contains("status=-") && line.contains("from=<sender@example.com>"), "{line}");
    assert_eq!(sink.mails().len(), 1);
    tracer.wait().expect("strace ends with its process");
}

/// Workers are killed again and again under load. Every client gets one answer, or sees an end
/// without any if its worker died in the very act of answering.
#[test]
fn kills_under_load_never_give_a_second_answer() {
    let kills = if full() { 1000 } else { 60 };
    let daemon = relay("workers=2");
    let _sink = Sink::answering(daemon.path("out"), "Kok");
    let path = daemon.path("in");
    let over = AtomicBool::new(false);
    let outcomes: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let mut odd = Vec::new();
                    while !over.load(Ordering::Relaxed) {
                        let outcome = submit(&*path, &Mail::new("x")).to_string();
                        if outcome != "Kok" && outcome != "Ztry again later" {
                            odd.push(outcome);
                        }
                    }
                    odd
                })
            })
            .collect();
        for kill in 0..kills {
            let workers = daemon.wait_for_workers(2, &[]);
            signal(workers[kill % 2], Signal::SIGKILL);
            daemon.wait_for_workers(2, &workers[kill % 2..][..1]);
        }
        over.store(true, Ordering::Relaxed);
        clients.into_iter().flat_map(|client| client.join().expect("client")).collect()
    });
    println!("{kills} kills: {outcomes:?}");
    assert!(outcomes.iter().all(|outcome| outcome == "<silence>"), "{outcomes:?}");
    assert!(outcomes.len() <= (kills / 100).max(1), "{outcomes:?}");
}

#[test]
fn clients_in_the_middle_of_their_request_are_told() {
    let daemon = relay("workers=1");
    let _sink = Sink::answering(daemon.path("out"), "Kok");
    let request = Mail::of_size(1 << 20).request();
    let mut client = Client::connect(daemon.path("in"));
    client.try_send(&request[..600_000]).expect("the worker reads");
    let workers = daemon.workers();
    signal(workers[0], Signal::SIGKILL);
    client.try_send(&request[600_000..]).expect("the supervisor lingers");
    assert_eq!(client.outcome(), "Ztry again later");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
}

#[test]
fn other_workers_do_not_notice() {
    let daemon = relay("workers=2");
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let clients = load_both_workers(&daemon, &sink);
    let workers = daemon.workers();
    let hit = relaying(workers[0]);
    signal(workers[0], Signal::SIGKILL);
    gate.open();
    assert_told(clients, hit);
    assert!(daemon.workers().contains(&workers[1]));
}

/// Sends mails until each of two workers relays at least five. The daemon is ready as soon as its
/// first worker is, so the first mails all go to that worker.
fn load_both_workers(daemon: &Daemon, sink: &Sink) -> Vec<Client> {
    let mut clients = Vec::new();
    let both = |daemon: &Daemon| {
        let workers = daemon.workers();
        workers.len() == 2 && workers.iter().all(|&worker| relaying(worker) >= 5)
    };
    while !both(daemon) {
        assert!(clients.len() < 100, "one worker gets everything");
        let mut client = Client::connect(daemon.path("in"));
        client.send(&Mail::new("in flight").request());
        clients.push(client);
        sink.record().wait_for_count(clients.len());
    }
    clients
}

/// Checks that all clients were told `K`, except for `hit` clients that were told to try again.
#[track_caller]
fn assert_told(mut clients: Vec<Client>, hit: usize) {
    let answers: Vec<_> = clients.iter_mut().map(|c| c.outcome().to_string()).collect();
    let accepted = answers.iter().filter(|answer| *answer == "Kok").count();
    let told = answers.iter().filter(|answer| *answer == "Ztry again later").count();
    assert_eq!((accepted, told), (clients.len() - hit, hit), "{answers:?}");
}

#[test]
fn every_way_to_die_is_a_crash() {
    let daemon = Daemon::start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'good@x' then return m:discard('good') end
           if m.sender == 'zero@x' then os.exit(0) end
           if m.sender == 'one@x' then os.exit(1, true) end
         end)",
    );
    for sender in ["zero@x", "one@x"] {
        let workers = daemon.workers();
        let told = submit(daemon.path("in"), &Mail::new("x").from(sender));
        assert_eq!(told, "Ztry again later", "{sender}");
        daemon.wait_for_workers(1, &workers);
        assert_eq!(submit(daemon.path("in"), &Mail::new("x").from("good@x")), "Kgood");
    }
    for death in [Signal::SIGKILL, Signal::SIGABRT, Signal::SIGFPE] {
        let workers = daemon.workers();
        signal(workers[0], death);
        daemon.wait_for_workers(1, &workers);
        assert_eq!(submit(daemon.path("in"), &Mail::new("x").from("good@x")), "Kgood");
    }
}

#[test]
fn workers_ignore_the_usual_signals() {
    let daemon = relay("workers=1");
    let _sink = Sink::answering(daemon.path("out"), "Kok");
    let (workers, zygotes) = (daemon.workers(), daemon.zygotes());
    for ignored in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        for &pid in workers.iter().chain(&zygotes) {
            signal(pid, ignored);
        }
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
    }
    assert_eq!((daemon.workers(), daemon.zygotes()), (workers, zygotes));
}

#[test]
fn replacement_is_quick() {
    let daemon = relay("workers=1");
    let _sink = Sink::answering(daemon.path("out"), "Kok");
    let mut times: Vec<_> = (0..15)
        .map(|_| {
            assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
            let workers = daemon.workers();
            let died = Instant::now();
            signal(workers[0], Signal::SIGKILL);
            eventually("the dead worker's end", || {
                processes::look(workers[0]).is_none_or(|p| p.state == 'Z').then_some(())
            });
            // The dying worker may still be given a mail.
            eventually("a mail is accepted again", || {
                (submit(daemon.path("in"), &Mail::new("x")) == "Kok").then_some(())
            });
            died.elapsed()
        })
        .collect();
    times.sort();
    let median = times[times.len() / 2];
    println!("from the death of a worker to the next K: median {median:?}");
    // The requirement is 50 ms on a quiet machine. Without `QRELAY_FULL` other tests run at the
    // same time.
    let limit = if full() { 50 } else { 500 };
    assert!(median < Duration::from_millis(limit), "{times:?}");
}

#[test]
fn a_standby_takes_over_with_the_script_that_was_loaded() {
    let script = |text: &str| {
        format!(
            "local f = io.open('$DIR/loads', 'a') f:write('x') f:close()
             settings{{workers=1}}
             qmqp_listen('$DIR/in', function(m) return m:discard('{text}') end)"
        )
    };
    let mut daemon = Daemon::start(&script("loaded"));
    daemon.site().configure(&script("edited since"));
    for round in 0..3 {
        let zygotes = daemon.zygotes();
        assert_eq!(zygotes.len(), 2, "a zygote and its standby");
        // The rounds alternate between the older and the newer process, and either may be the
        // active zygote.
        signal(zygotes[round % 2], Signal::SIGKILL);
        eventually("a new standby", || {
            let now = daemon.zygotes();
            (now.len() == 2 && !now.contains(&zygotes[round % 2])).then_some(())
        });
        let workers = daemon.workers();
        signal(workers[0], Signal::SIGKILL);
        daemon.wait_for_workers(1, &workers);
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kloaded", "round {round}");
    }
    assert_eq!(std::fs::read(daemon.path("loads")).expect("file"), b"x", "the script ran once");
    daemon.stop();
}

#[test]
fn without_zygotes_the_workers_serve_on() {
    let script = |text: &str| {
        format!(
            "function reload() local f = io.open('$DIR/reloads', 'a') f:write('x') f:close() end
             settings{{workers=1}}
             qmqp_listen('$DIR/in', function(m) return m:discard('{text}') end)"
        )
    };
    let daemon = Daemon::start(&script("old"));
    daemon.site().configure("broken broken");
    let zygotes = daemon.zygotes();
    // The processes are stopped first, so that none can fork another before it dies.
    for &pid in &zygotes {
        processes::stop(pid);
    }
    for &pid in &zygotes {
        signal(pid, Signal::SIGKILL);
    }
    eventually("the zygotes' end", || {
        zygotes.iter().all(|&pid| processes::look(pid).is_none()).then_some(())
    });
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kold");
    daemon.notify().after(0, "a status about it", |line| {
        line.starts_with("STATUS=") && line.contains("zygote")
    });
    // Once the file is good again, the supervisor starts a new generation by itself.
    daemon.site().configure(&script("new"));
    eventually("a new generation", || {
        (submit(daemon.path("in"), &Mail::new("x")) == "Knew").then_some(())
    });
    assert!(!daemon.path("reloads").exists(), "reload() is for SIGHUP");
    eventually("zygote and standby", || (daemon.zygotes().len() == 2).then_some(()));
}

/// A zygote that is stopped forks nobody, and its standby takes over; if both are stopped, the
/// configuration is loaded anew.
#[test]
fn a_stopped_zygote_is_given_up() {
    for stopped in [1, 2] {
        let mut daemon = Daemon::start(
            "settings{workers=1}
             qmqp_listen('$DIR/in', function(m) return m:discard() end)",
        );
        // The first zygote has the lower number.
        let zygotes = daemon.zygotes();
        for &pid in &zygotes[..stopped] {
            processes::stop(pid);
        }
        let workers = daemon.workers();
        signal(workers[0], Signal::SIGKILL);
        eventually("the worker's end", || processes::look(workers[0]).is_none().then_some(()));
        // A mail that comes now waits for a worker.
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded", "{stopped}");
        daemon.wait_for_log("zygote doesn't fork: killing it");
        eventually("zygote and standby", || {
            let now = daemon.zygotes();
            (now.len() == 2 && now.iter().all(|pid| !zygotes[..stopped].contains(pid)))
                .then_some(())
        });
        daemon.stop();
    }
}

#[test]
fn a_stopped_worker_is_found_out() {
    let daemon = relay("workers=2, handler_timeout=0.5, hang_timeout=1");
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let clients = load_both_workers(&daemon, &sink);
    let workers = daemon.workers();
    let hit = relaying(workers[0]);
    processes::stop(workers[0]);
    gate.open();
    assert_told(clients, hit);
    eventually("the replacement of the stopped worker", || {
        let now = daemon.workers();
        (now.len() == 2 && !now.contains(&workers[0])).then_some(())
    });
    daemon.wait_for_log(&workers[0].to_string());
    assert!(daemon.workers().contains(&workers[1]), "the other worker is left alone");
}

#[test]
fn a_pattern_that_runs_away_in_c_is_found_out() {
    let daemon = Daemon::start(
        "settings{workers=2, handler_timeout=0.3, hang_timeout=1}
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'good@x' then return m:discard('good') end
           return m:discard(tostring((('a'):rep(40)):find(('a-'):rep(40) .. 'b')))
         end)",
    );
    let workers = daemon.wait_for_workers(2, &[]);
    let mut stuck = Client::connect(daemon.path("in"));
    stuck.send(&Mail::new("x").request());
    // The other worker serves meanwhile. The supervisor asks every 250 ms, and avoids a worker
    // whose Lua has been held for 250 ms. Until then a mail may follow the stuck one into the same
    // worker, and its client waits for that worker's end: hence several clients.
    let started = Instant::now();
    let client = || {
        let mut served = 0;
        while daemon.workers() == workers && started.elapsed() < PATIENCE {
            let noticed = started.elapsed() > Duration::from_millis(600);
            let told = submit(daemon.path("in"), &Mail::new("x").from("good@x"));
            assert!(told == "Kgood" || !noticed, "{told}");
            served += usize::from(told == "Kgood");
        }
        served
    };
    let served: usize = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(client)).collect();
        clients.into_iter().map(|client| client.join().expect("a client")).sum()
    });
    assert!(served > 0);
    assert_eq!(stuck.outcome(), "Ztry again later");
    daemon.wait_for_log("hang");
}

#[test]
fn a_worker_is_replaced_after_its_share_of_mails() {
    let daemon = relay("workers=1, worker_max_mails=20");
    let _sink = Sink::answering(daemon.path("out"), "Kok");
    let workers = daemon.workers();
    for _ in 0..60 {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
    }
    daemon.wait_for_workers(1, &workers);
}

#[test]
fn orphans_are_reaped_and_not_killed() {
    let daemon = Daemon::start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m)
           os.execute('(until test -e $DIR/go; do sleep 0.02; done; echo > $DIR/gone) &')
           return m:discard()
         end)",
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    let shells = || processes::children_named(daemon.pid(), "sh");
    eventually("the orphan comes to the supervisor", || (shells().len() == 1).then_some(()));
    assert!(daemon.reload());
    assert_eq!(shells().len(), 1, "the daemon must not kill an orphan");
    std::fs::write(daemon.path("go"), "").expect("file");
    eventually("the orphan ends by itself", || daemon.path("gone").exists().then_some(()));
    eventually("no zombie stays", || {
        let children = processes::children(daemon.pid());
        children.iter().all(|child| child.name.starts_with("qrelay-")).then_some(())
    });
    assert_eq!(daemon.count_log("worker died"), 0);
}

#[test]
fn start_is_quick() {
    let mut times: Vec<_> = (0..5)
        .map(|_| {
            let started = Instant::now();
            let daemon = relay("workers=2");
            let ready = daemon.notify().after(0, "READY=1", |line| line == "READY=1");
            ready.at - started
        })
        .collect();
    times.sort();
    println!("from exec to READY: median {:?}", times[2]);
    // The requirement is 100 ms on a quiet machine. Without `QRELAY_FULL` other tests run at the
    // same time.
    let limit = if full() { 100 } else { 1000 };
    assert!(times[2] < Duration::from_millis(limit), "{times:?}");
}

#[test]
fn names_and_scores_tell_who_is_who() {
    let daemon = relay("workers=2");
    let name = |pid: i32| processes::look(pid).expect("there").name;
    assert_eq!(name(daemon.pid()), "qrelay");
    let score = |pid: i32| -> i32 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("there");
        text.trim().parse().expect("a number")
    };
    for worker in daemon.workers() {
        assert!(score(worker) > score(daemon.pid()));
    }
    let rest: Vec<_> = processes::children(daemon.pid())
        .into_iter()
        .filter(|p| !p.name.starts_with("qrelay-"))
        .collect();
    assert!(rest.is_empty(), "{rest:?}");
}

#[test]
fn memory_stays_small() {
    let daemon = relay("workers=2");
    let _sink = Sink::answering(daemon.path("out"), "Kok");
    for _ in 0..50 {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
    }
    let memory = |name| processes::memory(daemon.pid(), "status", name);
    let (resident, own) = (memory("VmRSS"), memory("RssAnon"));
    println!("supervisor: {} KiB resident, {} KiB its own", resident / 1024, own / 1024);
    // The requirement is 6 MiB, code included. The code of a debug build is larger.
    let limit = if cfg!(debug_assertions) { 12 } else { 6 };
    assert!(resident <= limit << 20, "{resident}");
    assert!(own <= 3 << 19, "{own}");
    for worker in daemon.workers() {
        let private = processes::memory(worker, "smaps_rollup", "Private_Dirty");
        println!("worker: {} KiB private", private / 1024);
        assert!(private <= 3 << 20, "{private}");
    }
}
