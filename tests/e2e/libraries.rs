//! The libraries `every`, `socket`, `control_client` and `log` in real workers. The tests of the
//! crate qrelay-worker check how the functions are called, and what happens on wrong arguments.

use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;

use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::harness::processes::signal;
use crate::harness::{Client, Daemon, Mail, PATIENCE, Site, eventually, submit};

/// Returns the pids of those processes `name` that have logged `text` at least `times` times.
fn loggers(daemon: &Daemon, name: &str, text: &str, times: usize) -> BTreeSet<i32> {
    let log = daemon.text();
    let wanted = |line: &&str| line.ends_with(text);
    let pid = |line: &str| {
        let after = line.split_once(&format!(" {name}["))?.1;
        after.split_once(']')?.0.parse::<i32>().ok()
    };
    let pids: Vec<_> = log.lines().filter(wanted).filter_map(pid).collect();
    let often = |pid: &i32| pids.iter().filter(|other| *other == pid).count() >= times;
    pids.iter().copied().filter(often).collect()
}

#[test]
fn every_runs_in_every_worker_and_in_its_successor() {
    let script = |text: &str| {
        format!(
            "settings{{workers=2}}
             every(0.02, function() print('{text}') end)
             qmqp_listen('$DIR/in', function(m) return m:discard() end)"
        )
    };
    let daemon = Daemon::start(&script("tick"));
    let workers = daemon.wait_for_workers(2, &[]);
    let ticking = |text: &str, workers: &[i32]| {
        eventually("all workers tick", || {
            let ticking = loggers(&daemon, "qrelay-worker", text, 3);
            workers.iter().all(|worker| ticking.contains(worker)).then_some(())
        });
    };
    ticking("tick", &workers);
    signal(workers[0], Signal::SIGKILL);
    let successor = eventually("a successor", || {
        let now = daemon.workers();
        now.iter().copied().find(|worker| !workers.contains(worker))
    });
    ticking("tick", &[successor]);

    daemon.site().configure(&script("tock"));
    assert!(daemon.reload());
    let new = daemon.wait_for_workers(2, &[workers[1], successor]);
    ticking("tock", &new);
    let old = loggers(&daemon, "qrelay-worker", "tick", 1);
    assert!(new.iter().all(|worker| !old.contains(worker)));
    assert_eq!(loggers(&daemon, "qrelay-zygote", "tick", 1), BTreeSet::new());
}

/// Accepts a connection, and returns it with the pid of the process that made it.
#[track_caller]
fn accept(listener: &UnixListener) -> (i32, std::os::unix::net::UnixStream) {
    let (stream, _) = listener.accept().expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    (getsockopt(&stream, PeerCredentials).expect("credentials").pid(), stream)
}

#[track_caller]
fn assert_reads(stream: &mut impl Read, expected: &str) {
    let mut text = vec![0; expected.len()];
    stream.read_exact(&mut text).expect("text");
    assert_eq!(String::from_utf8_lossy(&text), expected);
}

#[test]
fn each_worker_has_a_socket_of_its_own() {
    let site = Site::new();
    let listener = UnixListener::bind(site.path("server")).expect("bind");
    site.configure(
        "settings{workers=2}
         local s = socket:connect('$DIR/server')
         s:send('loading')
         every(0.05, function() s:send('tick') end)
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let daemon = site.start();
    let workers = daemon.wait_for_workers(2, &[]);
    let (loader, mut stream) = accept(&listener);
    assert!(!workers.contains(&loader));
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("the socket was closed before the first fork");
    assert_eq!(text, "loading");

    let mut connected: Vec<_> = (0..2).map(|_| accept(&listener)).collect();
    connected.sort_by_key(|(pid, _)| *pid);
    assert_eq!(connected.iter().map(|(pid, _)| *pid).collect::<Vec<_>>(), workers);
    for (_, stream) in &mut connected {
        assert_reads(stream, "ticktick");
    }
    signal(workers[0], Signal::SIGKILL);
    let (successor, mut stream) = accept(&listener);
    assert!(!workers.contains(&successor) && daemon.workers().contains(&successor));
    assert_reads(&mut stream, "ticktick");
    // The connection of the other worker is still the same.
    assert_reads(&mut connected[1].1, "tick");
}

/// Submits mails until one is answered with `wanted`. Returns the number of other answers.
#[track_caller]
fn until(to: &Path, wanted: &str) -> usize {
    let mut others = 0;
    eventually(wanted, || {
        let told = submit(to, &Mail::new("x"));
        let good = told == wanted;
        others += usize::from(!good);
        assert!(told.status() == 'K', "a failure is a result, not an error: {told}");
        good.then_some(())
    });
    others
}

#[test]
fn a_socket_connects_again_after_its_server_was_restarted() {
    let site = Site::new();
    let listener = UnixListener::bind(site.path("server")).expect("bind");
    site.configure(
        "settings{workers=1}
         local s = socket:connect('$DIR/server')
         qmqp_listen('$DIR/in', function(m) return m:discard(tostring(s:send('hello'))) end)",
    );
    let daemon = site.start();
    let to = daemon.path("in");
    for _ in 0..2 {
        assert_eq!(submit(&*to, &Mail::new("x")), "K5");
    }
    let (worker, mut stream) = accept(&listener);
    assert_reads(&mut stream, "hellohello");
    drop((listener, stream));
    std::fs::remove_file(daemon.path("server")).expect("remove");
    assert!(until(&to, "Knil") <= 1, "the server is gone");
    assert_eq!(submit(&*to, &Mail::new("x")), "Knil");

    let listener = UnixListener::bind(daemon.path("server")).expect("bind");
    assert_eq!(until(&to, "K5"), 0, "the first mail connects again");
    let (again, mut stream) = accept(&listener);
    assert_eq!(again, worker);
    assert_reads(&mut stream, "hello");
}

#[test]
fn control_commands_reach_a_server_and_its_successor() {
    let site = Site::new();
    let bind = |path: &Path| {
        let server = UnixDatagram::bind(path).expect("bind");
        server.set_read_timeout(Some(PATIENCE)).expect("timeout");
        server
    };
    let received = |server: &UnixDatagram| {
        let mut datagram = [0; 1000];
        let length = server.recv(&mut datagram).expect("a datagram");
        datagram[..length].to_vec()
    };
    let server = bind(&site.path("control"));
    site.configure(
        "settings{workers=2}
         local c = control_client:new('$DIR/control')
         local all = c:build():fade_children('site-1'):cancel_job('part', 'j1')
         qmqp_listen('$DIR/in', function(m)
           m.account = m.sender:match('^[^@]*')
           assert(c:send(all))
           return m:discard(tostring(c:send(c:build():reset_limiter(m.account))))
         end)
         qmqp_listen('$DIR/retry', function(m) return m:discard(tostring(c:send(all))) end)",
    );
    let daemon = site.start();
    let declared: &[u8] = b"\x63\x04\x61\x01\0\x06\0\x08site-1\0\0\0\x07\0\x19part\0j1\0";
    let reset: &[u8] = b"\x63\x04\x61\x01\0\x05\0\x16alice\0\0\0";
    for _ in 0..4 {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x").from("alice@x")), "K16");
        assert_eq!(received(&server), declared);
        assert_eq!(received(&server), reset);
    }
    drop(server);
    std::fs::remove_file(daemon.path("control")).expect("remove");
    assert_eq!(submit(daemon.path("retry"), &Mail::new("x")), "Knil");
    let server = bind(&daemon.path("control"));
    // A worker that hasn't noticed the end of the old server notices it with this mail.
    assert!(until(&daemon.path("retry"), "K28") <= 1);
    assert_eq!(received(&server), declared);
}

/// Returns the value of a field in a log line.
#[track_caller]
fn field<'l>(line: &'l str, name: &str) -> &'l str {
    let found = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    found.unwrap_or_else(|| panic!("no {name} in {line}"))
}

#[test]
fn log_lines_have_the_id_of_their_mail() {
    let site = Site::with(
        "settings{workers=1}
         log.info('loading', {version = 7})
         local once = true
         every(0.01, function() if once then log.warn('timer') end once = false end)
         qmqp_listen('$DIR/in', function(m)
           log.debug('looking', {who = m.sender})
           -- The three handlers wait for each other, so that their mails overlap.
           local mails = shared:new('mails')
           mails:incr('waiting')
           while mails:get('waiting') < 3 do sleep(0.005) end
           log.error('seen', {who = m.sender, own = m.id, ['end'] = true, text = 'a\\nb'})
           coroutine.wrap(function() log.warn('inside', {who = m.sender}) end)()
           return m:discard()
         end)",
    );
    let daemon = site.launch().arg("--log-level").arg("debug").ready();
    let senders = ["a@x", "b@x", "c@x"];
    let mut clients: Vec<_> = senders.iter().map(|_| Client::connect(daemon.path("in"))).collect();
    for (client, sender) in clients.iter_mut().zip(senders) {
        client.send(&Mail::new("x").from(sender).request());
    }
    for client in &mut clients {
        assert_eq!(client.outcome(), "Kdiscarded");
    }
    for sender in senders {
        let mail = daemon.wait_for_log(&format!(" from=<{sender}>"));
        let id = field(&mail, "id");
        for (level, text) in [("debug", "looking"), ("error", "seen"), ("warn", "inside")] {
            let log = daemon.text();
            let line = log
                .lines()
                .find(|line| line.contains(&format!(": {text} id={id} ")))
                .unwrap_or_else(|| panic!("no {text} of {id}:\n{log}"));
            assert!(line.contains(&format!(" {level} qrelay-worker[")), "{line}");
            assert_eq!(field(line, "who"), sender);
        }
        let seen = daemon.wait_for_log(&format!(": seen id={id} "));
        assert_eq!((field(&seen, "own"), field(&seen, "end")), (id, "true"));
        assert!(seen.ends_with(&format!(" text=a\\nb who={sender}")), "in order of names: {seen}");
    }
    let loading = daemon.wait_for_log(": loading");
    assert!(loading.contains(" info qrelay-zygote[") && loading.ends_with(": loading version=7"));
    assert!(daemon.wait_for_log(": timer").ends_with(": timer"), "no mail, no id");
}

#[test]
fn levels_that_are_not_wanted_are_not_written() {
    let daemon = Daemon::start(
        "settings{workers=1}
         log.debug('hidden at loading')
         qmqp_listen('$DIR/in', function(m)
           log.debug('hidden in a handler')
           log.info('shown')
           return m:discard()
         end)",
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    daemon.wait_for_log(": shown id=");
    assert_eq!(daemon.count_log("hidden"), 0, "{}", daemon.text());
}
