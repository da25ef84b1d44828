//! SIGHUP: either a new generation takes over without a client noticing, or the old generation
//! serves on as if nothing had happened.

use std::os::unix::fs::MetadataExt;

use nix::sys::signal::Signal;

use crate::harness::daemon::is_socket;
use crate::harness::{Client, Daemon, Mail, Sink, Site, Target, eventually, submit};

/// Returns a script that answers `K` and `text`, and counts its runs and its reloads in files.
fn counting(text: &str) -> String {
    format!(
        "local function note(name)
           local f = assert(io.open('$DIR/' .. name, 'a')) f:write('x') f:close()
         end
         note('loads')
         function reload() note('reloads') end
         settings{{workers=2}}
         qmqp_listen('$DIR/in', function(m) return m:discard('{text}') end)"
    )
}

fn answering(text: &str) -> String {
    format!(
        "settings{{workers=1}} qmqp_listen('$DIR/in', function(m) return m:discard('{text}') end)"
    )
}

/// Returns how often a script has called `note(name)`.
fn count(daemon: &Daemon, name: &str) -> u64 {
    daemon.path(name).metadata().map_or(0, |found| found.len())
}

#[track_caller]
fn asks(daemon: &Daemon) -> String {
    submit(daemon.path("in"), &Mail::new("x")).to_string()
}

#[test]
fn the_new_configuration_takes_over() {
    let mut daemon = Daemon::start(&counting("one"));
    assert_eq!(asks(&daemon), "Kone");
    daemon.wait_for_workers(2, &[]);
    let (inode, fds) =
        (daemon.path("in").metadata().expect("socket").ino(), daemon.idle_fd_count(2));
    let (workers, zygotes) = (daemon.workers(), daemon.zygotes());
    assert_eq!((count(&daemon, "loads"), count(&daemon, "reloads")), (1, 0));

    daemon.site().configure(&counting("two"));
    assert!(daemon.reload(), "{}", daemon.text());
    assert_eq!(asks(&daemon), "Ktwo");
    assert_eq!((count(&daemon, "loads"), count(&daemon, "reloads")), (2, 1));
    daemon.wait_for_workers(2, &workers);
    eventually("the old zygotes' end", || {
        let now = daemon.zygotes();
        (now.len() == zygotes.len() && now.iter().all(|pid| !zygotes.contains(pid))).then_some(())
    });
    assert_eq!(daemon.path("in").metadata().expect("socket").ino(), inode, "same socket");
    eventually("as many descriptors as before", || (daemon.fd_count() == fds).then_some(()));
    daemon.stop();
}

#[test]
fn broken_scripts_change_nothing() {
    let daemon = Daemon::start(&counting("one"));
    let workers = daemon.wait_for_workers(2, &[]);
    let zygotes = eventually("zygote and standby", || {
        Some(daemon.zygotes()).filter(|zygotes| zygotes.len() == 2)
    });
    let fds = daemon.idle_fd_count(2);
    let blocked = Sink::answering(daemon.path("taken"), "Kother");
    for (script, reason) in [
        ("local x = = 1", "config.lua:1:"),
        ("error('my own words')", "my own words"),
        ("-- no listener", "qmqp_listen"),
        ("settings{nonsense=1}", "nonsense"),
        (
            "qmqp_listen('$DIR/in', function(m) end) function reload() error('not today') end",
            "not today",
        ),
        ("qmqp_listen('$DIR/taken', function(m) end)", "in use"),
        ("qmqp_listen('$DIR/missing/in', function(m) end)", "missing/in"),
        ("os.exit(0)", "config.lua:1: os.exit"),
        ("qmqp_listen('$DIR/in', print) function reload() os.exit(0) end", "os.exit"),
    ] {
        daemon.site().configure(script);
        let mark = daemon.notify().mark();
        daemon.reload();
        let status = daemon.notify().after(mark, "a status with the reason", |line| {
            line.starts_with("STATUS=") && line.contains(reason)
        });
        daemon.wait_for_log(reason);
        assert_eq!(asks(&daemon), "Kone", "after {script}: {status:?}");
        assert_eq!(daemon.workers(), workers, "after {script}");
    }
    std::fs::remove_file(daemon.path("config.lua")).expect("config");
    daemon.reload();
    assert_eq!(asks(&daemon), "Kone");
    eventually("the failed zygotes' end", || (daemon.zygotes() == zygotes).then_some(()));
    eventually("as many descriptors as before", || (daemon.fd_count() == fds).then_some(()));
    assert!(Target::from(daemon.path("taken")).is_alive());
    drop(blocked);

    daemon.site().configure(&counting("two"));
    assert!(daemon.reload());
    assert_eq!(asks(&daemon), "Ktwo");
}

#[test]
fn a_reload_right_after_the_start() {
    // The last workers of the first generation may not have been forked yet.
    let script = counting("one").replace("workers=2", "workers=8");
    for _ in 0..5 {
        let mut daemon = Daemon::start(&script);
        assert!(daemon.reload());
        let started = std::time::Instant::now();
        daemon.wait_for_log("generation has ended generation=1");
        let took = started.elapsed();
        assert!(took < std::time::Duration::from_secs(5), "{took:?}: long before a ping is missed");
        daemon.wait_for_workers(8, &[]);
        daemon.stop();
    }
}

#[test]
fn a_script_that_never_ends_is_given_up() {
    let site = Site::with(&answering("one"));
    let daemon = site.launch().arg("--boot-timeout").arg("1").ready();
    daemon.site().configure("while true do end");
    daemon.reload();
    assert_eq!(asks(&daemon), "Kone");
    eventually("the endless zygote's end", || (daemon.zygotes().len() <= 2).then_some(()));
}

#[test]
fn mails_on_their_way_are_finished_by_the_old_generation() {
    let relay = |text: &str| {
        format!(
            "settings{{workers=1}}
             qmqp_listen('$DIR/in', function(m)
               m:insert_header('X-Generation', '{text}')
               return m:connect('$DIR/out')
             end)"
        )
    };
    let daemon = Daemon::start(&relay("one"));
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let old = daemon.workers();
    let mut first = Client::connect(daemon.path("in"));
    first.send(&Mail::new("first").request());
    sink.record().wait_for_count(1);
    // Half of this mail has been sent when the reload comes.
    let mut slow = Client::connect(daemon.path("in"));
    let request = Mail::new("slow").request();
    slow.send(&request[..10]);

    daemon.site().configure(&relay("two"));
    assert!(daemon.reload());
    let mut second = Client::connect(daemon.path("in"));
    second.send(&Mail::new("second").request());
    slow.send(&request[10..]);
    sink.record().wait_for_count(3);
    assert!(daemon.workers().contains(&old[0]), "the old worker still has a mail");
    gate.open();
    for client in [&mut first, &mut second, &mut slow] {
        assert_eq!(client.outcome(), "Kok");
    }
    let generation = |body: &str| {
        let mails = sink.mails();
        let ends = |mail: &&Mail| mail.message.ends_with(format!("{body}\n").as_bytes());
        let found = mails.iter().find(ends).expect("arrived").message.clone();
        String::from_utf8_lossy(&found).lines().next().expect("a line").to_owned()
    };
    assert_eq!(generation("first"), "X-Generation: one");
    assert_eq!(generation("second"), "X-Generation: two");
    daemon.wait_for_workers(1, &old);
}

#[test]
fn a_drain_has_an_end() {
    let script = "settings{workers=1, drain_timeout=0.5}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)";
    let daemon = Daemon::start(script);
    let (sink, _gate) = Sink::gated(daemon.path("out"));
    let old = daemon.workers();
    let mut client = Client::connect(daemon.path("in"));
    client.send(&Mail::new("stuck").request());
    sink.record().wait_for_count(1);
    assert!(daemon.reload());
    assert_eq!(client.outcome(), "Ztry again later");
    daemon.wait_for_workers(1, &old);
}

#[test]
fn an_explicit_timeout_outlasts_the_drain() {
    let script = "settings{workers=1, drain_timeout=0.2}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out', {timeout=30}) end)";
    let daemon = Daemon::start(script);
    let slow = crate::harness::sink::slowly(std::time::Duration::from_millis(900), "Kat last");
    let sink = Sink::start(daemon.path("out"), slow);
    let mut client = Client::connect(daemon.path("in"));
    client.send(&Mail::new("slow").request());
    sink.record().wait_for_count(1);
    assert!(daemon.reload());
    assert_eq!(client.outcome(), "Kat last");
}

#[test]
fn at_most_four_generations_drain() {
    let script = "local f = io.open('$DIR/loads', 'a') f:write('x') f:close()
         settings{workers=1}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)";
    let daemon = Daemon::start(script);
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mut clients = Vec::new();
    let mut hold_one = || {
        let mut client = Client::connect(daemon.path("in"));
        client.send(&Mail::new("held").request());
        clients.push(client);
        sink.record().wait_for_count(clients.len());
    };
    for _ in 0..4 {
        hold_one();
        assert!(daemon.reload());
    }
    hold_one();
    let workers = daemon.workers();
    assert_eq!(workers.len(), 5, "four drain, one serves");
    daemon.signal(Signal::SIGHUP);
    // When this mail has been served, the signal has been handled, too.
    hold_one();
    assert_eq!(count(&daemon, "loads"), 5, "the fifth reload waits");
    assert_eq!(daemon.workers(), workers);
    gate.open();
    for client in &mut clients {
        assert_eq!(client.outcome(), "Kok");
    }
    eventually("the fifth reload", || (count(&daemon, "loads") == 6).then_some(()));
    daemon.wait_for_workers(1, &workers);
}

#[test]
fn listeners_come_and_go() {
    let listen = |names: &[&str]| {
        let one = |name: &&str| {
            format!("qmqp_listen('$DIR/{name}', function(m) return m:discard('{name}') end)\n")
        };
        format!("settings{{workers=1}}\n{}", names.iter().map(one).collect::<String>())
    };
    let mut daemon = Daemon::start(&listen(&["a", "b"]));
    let inode = |name: &str| daemon.path(name).metadata().expect("socket").ino();
    let kept = inode("b");
    daemon.site().configure(&listen(&["b", "c"]));
    assert!(daemon.reload());
    eventually("the removed socket is unlinked", || (!is_socket(&daemon.path("a"))).then_some(()));
    assert_eq!(inode("b"), kept);
    for name in ["b", "c"] {
        assert_eq!(submit(daemon.path(name), &Mail::new("x")).to_string(), format!("K{name}"));
    }
    // Order and numbers of the listeners have changed, but the handlers must not be mixed up.
    daemon.site().configure(&listen(&["c", "a", "b"]));
    assert!(daemon.reload());
    for name in ["a", "b", "c"] {
        assert_eq!(submit(daemon.path(name), &Mail::new("x")).to_string(), format!("K{name}"));
    }
    assert_eq!(inode("b"), kept);
    daemon.stop();
}

/// Number of mails, more than the job socket (278) and the threads (4) of the only old worker hold.
const CROWD: usize = 700;

#[test]
fn a_crowd_at_a_removed_listener_is_served() {
    let daemon = Daemon::start(
        "settings{workers=1, worker_connections=4, client_share=1}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end, {backlog=1024})",
    );
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mut crowd: Vec<_> = (0..CROWD).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut crowd {
        client.send(&Mail::new("x").request());
    }
    sink.record().wait_for_count(4);
    daemon.site().configure("qmqp_listen('$DIR/other', function(m) return m:discard() end)");
    assert!(daemon.reload(), "{}", daemon.text());
    eventually("the removed socket is unlinked", || (!is_socket(&daemon.path("in"))).then_some(()));
    gate.open();
    for client in &mut crowd {
        assert_eq!(client.outcome(), "Kok");
    }
    daemon.wait_for_log("generation has ended generation=1");
}

#[test]
fn other_kinds_of_listeners_come_and_go() {
    let (hidden, port) = (Target::unique_abstract(), Target::free_port());
    let daemon = Daemon::start(&answering("one"));
    let handler = "function(m) return m:discard('two') end";
    let more = format!("qmqp_listen('{hidden}', {handler}) qmqp_listen('{port}', {handler})");
    daemon.site().configure(&format!("{}\n{more}", answering("one")));
    assert!(daemon.reload());
    assert_eq!(submit(hidden.clone(), &Mail::new("x")), "Ktwo");
    assert_eq!(submit(port, &Mail::new("x")), "Ktwo");
    daemon.site().configure(&answering("three"));
    assert!(daemon.reload());
    eventually("both closed", || {
        (!hidden.is_alive() && !Target::from(port).is_alive()).then_some(())
    });
    assert_eq!(asks(&daemon), "Kthree");
}

#[test]
fn mode_and_owner_follow_the_configuration() {
    let listen = |options: &str| {
        format!("qmqp_listen('$DIR/in', function(m) return m:discard() end, {{{options}}})")
    };
    let daemon = Daemon::start(&listen(""));
    let found = || daemon.path("in").metadata().expect("socket");
    assert_eq!(found().mode() & 0o7777, 0o666);
    let inode = found().ino();
    daemon.site().configure(&listen("mode='0640', owner='nobody', group='nogroup'"));
    assert!(daemon.reload());
    assert_eq!(found().mode() & 0o7777, 0o640);
    assert_eq!((found().uid(), found().gid()), (65534, 65534));
    assert_eq!(found().ino(), inode);
}

/// Returns a script that counts its runs and then waits until the file `go` appears.
fn waiting() -> String {
    format!("{} while not io.open('$DIR/go') do end", counting("x"))
}

#[test]
fn hangups_during_a_reload_cause_exactly_one_more() {
    let daemon = Daemon::start(&counting("x"));
    daemon.site().configure(&waiting());
    let mark = daemon.notify().mark();
    daemon.signal(Signal::SIGHUP);
    eventually("the script runs again", || (count(&daemon, "loads") == 2).then_some(()));
    for _ in 0..3 {
        daemon.signal(Signal::SIGHUP);
    }
    std::fs::write(daemon.path("go"), "").expect("file");
    two_reloads(&daemon, mark);
    assert_eq!((count(&daemon, "loads"), count(&daemon, "reloads")), (3, 2));
    // A waiting third reload would have come before this one.
    assert!(daemon.reload());
    assert_eq!((count(&daemon, "loads"), count(&daemon, "reloads")), (4, 3));
}

/// Waits until two reloads since `mark` are over.
#[track_caller]
fn two_reloads(daemon: &Daemon, mark: usize) {
    let twice = daemon.notify().record().wait_for(crate::harness::PATIENCE, |notices| {
        let lines = notices[mark..].iter().map(|notice| notice.text.as_str());
        let turns: Vec<_> =
            lines.filter(|line| matches!(*line, "READY=1" | "RELOADING=1")).collect();
        (turns.len() >= 4).then_some(())
    });
    assert!(twice.is_some(), "{:?}", daemon.notify().all());
}

#[test]
fn a_hangup_before_ready_causes_exactly_one_reload() {
    let mut daemon = Site::with(&waiting()).launch().spawn();
    eventually("the script runs", || (count(&daemon, "loads") == 1).then_some(()));
    for _ in 0..3 {
        daemon.signal(Signal::SIGHUP);
    }
    std::fs::write(daemon.path("go"), "").expect("file");
    daemon.wait_ready();
    eventually("the reload", || (count(&daemon, "reloads") == 1).then_some(()));
    daemon.notify().after(0, "READY=1 after the reload", |line| line == "RELOADING=1");
    eventually("the reload is over", || {
        let lines = daemon.notify().all();
        (lines.iter().filter(|line| *line == "READY=1").count() == 2).then_some(())
    });
    assert_eq!(count(&daemon, "loads"), 2);
    assert!(daemon.reload());
    assert_eq!((count(&daemon, "loads"), count(&daemon, "reloads")), (3, 2));
}

#[test]
fn many_reloads_under_load_are_unnoticed() {
    let daemon = Daemon::start(
        "settings{workers=2}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
    );
    let sink = Sink::answering(daemon.path("out"), "Kok");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|client| {
                let (daemon, stop) = (&daemon, &stop);
                scope.spawn(move || {
                    let mut sent = Vec::new();
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        let mail = Mail::new(&format!("client {client} mail {}", sent.len()));
                        assert_eq!(submit(daemon.path("in"), &mail), "Kok");
                        sent.push(mail);
                    }
                    sent
                })
            })
            .collect();
        for _ in 0..10 {
            assert!(daemon.reload());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        clients.into_iter().flat_map(|c| c.join().expect("client")).collect::<Vec<_>>()
    });
    assert_eq!(sink.mails().len(), sent.len(), "none lost, none doubled");
}
