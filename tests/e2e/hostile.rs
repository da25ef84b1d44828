//! A worker or a zygote that has been taken over, and floods the supervisor over the sockets that
//! it has from it: who does what no honest process does is killed and named, who only asks too much
//! gets its share, and other clients' mails are served all the while.
//!
//! `hostile/hostile.c` has the attacks. docs/threat-model.md has a row for each.

use std::fs;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::harness::processes::{self, look};
use crate::harness::{Client, Daemon, Mail, Site, eventually, submit};

const HOSTILE: &str = include_str!("hostile/hostile.c");

/// Mails of another client, one after the other, that must be served during an attack.
const MAILS: usize = 50;
/// Mails at once per worker, so that few channels are allowed.
const CREDIT: usize = 32;
/// Channels to the dictionaries that a worker may have beside its credit.
const SPARE: usize = 16;
/// Descriptors that may come and go with a worker, a zygote or a mail.
const BESIDES: usize = 20;
/// What the supervisor may need beside the dictionaries, in bytes.
const MEMORY: u64 = 64 << 20;
/// Memory of all dictionaries, in bytes.
const DICTIONARIES: u64 = 16 << 20;

/// A configuration whose handler loads the attack that the sender names, and then serves the mail
/// as any other. If the sender has a second word, the mail creates the file of that name and stays
/// until there is a file with `.end` behind that name. `load` runs while the script loads.
fn script(load: &str) -> String {
    format!(
        "settings{{workers=2, worker_connections={CREDIT}, handler_timeout=0.5, hang_timeout=3,
           shared_memory={DICTIONARIES}, shared_memory_total={DICTIONARIES}}}
         local function attack(name)
           assert(package.loadlib('$DIR/hostile.so', name))()
         end
         local counts = shared:new('counts')
         {load}
         qmqp_listen('$DIR/in', function(m)
           local name = m.sender:match('^%l+')
           if name ~= 'mail' then attack(name) end
           local file = m.sender:match('%.(%l+)')
           if file then
             io.open('$DIR/' .. file, 'w'):close()
             repeat sleep(0.01) until io.open('$DIR/' .. file .. '.end')
           end
           return m:discard(tostring(math.type(counts:incr('mails'))))
         end)"
    )
}

/// Returns a directory with the library of attacks.
fn site() -> Site {
    let site = Site::with(&script(""));
    let source = site.path("hostile.c");
    fs::write(&source, HOSTILE).expect("source");
    let compiled = Command::new("cc")
        .args(["-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread", "-o"])
        .args([&site.path("hostile.so"), &source])
        .output()
        .expect("cc runs");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    site
}

/// The supervisor before an attack.
struct Before {
    workers: Vec<i32>,
    descriptors: usize,
    memory: u64,
}

impl Before {
    fn look(daemon: &Daemon) -> Self {
        let workers = daemon.wait_for_workers(2, &[]);
        let descriptors = daemon.idle_fd_count(2);
        Self { workers, descriptors, memory: memory(daemon) }
    }

    /// Checks that other clients' mails are served, and what the supervisor needs meanwhile.
    /// Returns how many of the mails' handlers could use a dictionary.
    #[track_caller]
    fn assert_served(&self, daemon: &Daemon, attack: &str) -> usize {
        let mut counted = 0;
        for _ in 0..MAILS {
            let told = submit(daemon.path("in"), &Mail::new("x").from("mail@x"));
            assert_eq!(told.status(), 'K', "{attack}: {told}: {}", daemon.text());
            counted += usize::from(told == "Kinteger");
            let memory = memory(daemon);
            assert!(memory < self.memory + MEMORY + DICTIONARIES, "{attack}: {memory}");
            let most = self.descriptors + CREDIT + SPARE + BESIDES;
            let descriptors = daemon.fd_count();
            assert!(descriptors <= most, "{attack}: {descriptors}, {}", self.descriptors);
        }
        counted
    }
}

fn memory(daemon: &Daemon) -> u64 {
    processes::memory(daemon.pid(), "status", "VmRSS")
}

/// Has a worker attack, which may cost the worker's own mail.
fn attack(daemon: &Daemon, name: &str) {
    let told = submit(daemon.path("in"), &Mail::new("x").from(&format!("{name}@x")));
    assert!(told.status() == 'K' || told == "Ztry again later", "{name}: {told}");
}

/// Plays attacks that cost the worker its life, each with the line that names it.
#[track_caller]
fn assert_ended(daemon: &Daemon, attacks: &[(&str, &str)]) {
    for (name, line) in attacks {
        let before = Before::look(daemon);
        let (said, died) = (daemon.count_log(line), daemon.count_log("worker died: "));
        attack(daemon, name);
        eventually(name, || (daemon.count_log("worker died: ") > died).then_some(()));
        assert!(daemon.count_log(line) > said, "{name}: {}", daemon.text());
        assert_eq!(before.assert_served(daemon, name), MAILS, "{name}: {}", daemon.text());
        daemon.wait_for_workers(2, &[]);
        let alive = |&&pid: &&i32| look(pid).is_some_and(|process| process.state != 'Z');
        assert_eq!(before.workers.iter().filter(alive).count(), 1, "{name}: one was replaced");
    }
    assert_eq!(daemon.count_log("worker died: "), attacks.len(), "nobody else: {}", daemon.text());
    assert_eq!(daemon.count_log("worker died with"), 0, "named once: {}", daemon.text());
}

/// The number of lines that a flood may leave in the log.
#[track_caller]
fn assert_quiet(daemon: &Daemon, attacks: usize) {
    let lines = daemon.text().lines().filter(|line| !line.contains(" mail id=")).count();
    assert!(lines < 20 + 10 * attacks, "{lines} lines: {}", daemon.text());
}

#[test]
fn a_worker_that_floods_its_job_socket_is_ended() {
    let daemon = site().start();
    let attacks = [
        ("ready", "worker killed: it reported again that it is ready"),
        ("batch", "worker killed: it reported again that it is ready"),
        ("nonsense", "worker killed: malformed message"),
        ("toolarge", "worker killed: malformed message"),
        ("done", "worker killed: it reported job 127, which it doesn't have"),
        ("lost", "worker killed: it lost job 127, which it doesn't have"),
        ("child", "worker killed: it reported child 1 of job 127"),
        ("timelimit", "worker killed: it reported a timeout of job 127"),
        ("empty", "worker died: "),
        ("hangup", "worker died: "),
    ];
    assert_ended(&daemon, &attacks);
    assert_quiet(&daemon, attacks.len());
}

#[test]
fn a_worker_that_floods_its_control_socket_or_is_silent_is_ended() {
    let daemon = site().start();
    let attacks = [
        ("pongs", "worker killed: it answered a ping that it didn't get"),
        ("controlnonsense", "worker killed: malformed message"),
        ("controlhangup", "worker died: "),
        ("silent", "worker doesn't answer: killing it"),
    ];
    assert_ended(&daemon, &attacks);
    assert_quiet(&daemon, attacks.len());
}

#[test]
fn a_worker_that_floods_a_dictionary_without_reading_is_ended() {
    let daemon = site().start();
    let attacks = [
        ("wishes", "worker killed: it doesn't read what a dictionary answers"),
        ("openernonsense", "worker killed: it sent nonsense to a dictionary"),
        ("unread", "worker killed: it doesn't read what a dictionary answers"),
        ("asknonsense", "worker killed: it sent nonsense to a dictionary"),
    ];
    assert_ended(&daemon, &attacks);
    assert_quiet(&daemon, attacks.len());
}

#[test]
fn a_worker_that_passes_descriptors_is_ended_or_the_kernel_refuses_them() {
    let daemon = site().launch().env("QRELAY_TEST_PASSRIGHTS", "off").ready();
    let attacks = [
        ("jobrights", "worker killed: descriptors that nobody has asked for"),
        ("controlrights", "worker killed: descriptors that nobody has asked for"),
        ("openerrights", "worker killed: it passed descriptors to a dictionary"),
        ("askrights", "worker killed: it passed descriptors to a dictionary"),
    ];
    assert_ended(&daemon, &attacks);
    assert_quiet(&daemon, attacks.len());
}

#[test]
fn a_worker_that_only_asks_too_much_gets_its_share() {
    for name in ["hoard", "openandclose", "dear"] {
        let daemon = site().start();
        let before = Before::look(&daemon);
        // The first worker is busy when the attack begins, and free afterwards. The second one is
        // hostile and stays busy, so that it gets no other mails.
        let mut clients = ["mail.first", &format!("{name}.second")].map(|sender| {
            let mut client = Client::connect(daemon.path("in"));
            client.send(&Mail::new("x").from(&format!("{sender}@x")).request());
            let file = sender.rsplit('.').next().expect("a name");
            eventually(sender, || daemon.path(file).exists().then_some(()));
            client
        });
        fs::write(daemon.path("first.end"), "").expect("file");
        assert_eq!(clients[0].outcome(), "Kinteger", "{name}: {}", daemon.text());
        let counted = before.assert_served(&daemon, name) + before.assert_served(&daemon, name);
        // While the other worker's reports are on their way, a mail may go to the hostile one.
        assert!(counted >= 2 * MAILS - 4, "{name}: {counted} {}", daemon.text());
        assert_eq!(daemon.count_log("worker died: "), 0, "{name}: {}", daemon.text());
        assert_quiet(&daemon, 1);
        // What the worker had is gone with it.
        let workers = daemon.wait_for_workers(2, &[]);
        workers.iter().for_each(|&pid| processes::signal(pid, Signal::SIGKILL));
        daemon.wait_for_workers(2, &workers);
        assert_eq!(clients[1].outcome(), "Ztry again later");
        drop(clients);
        assert!(daemon.idle_fd_count(2) <= before.descriptors, "{name}");
    }
}

#[test]
fn a_zygote_that_floods_costs_no_more_than_the_reload() {
    let daemon = site().launch().env("QRELAY_TEST_PASSRIGHTS", "off").ready();
    let attacks = [
        ("zforked", "zygote killed: it reported what nobody asked it for"),
        ("zfailed", "the old configuration serves on: x"),
        ("znonsense", "zygote killed: malformed message"),
        ("zrights", "zygote killed: descriptors that nobody has asked for"),
        ("zwishes", "zygote killed: it doesn't read what a dictionary answers"),
        ("zunread", "zygote killed: it doesn't read what a dictionary answers"),
        // Ends the zygote, because a process with a second thread forks no workers.
        ("zdear", "the old configuration serves on"),
    ];
    for (name, line) in attacks {
        let before = Before::look(&daemon);
        let said = daemon.count_log(line);
        // The script waits to be killed, as a hostile script might.
        let waits = if name == "zdear" { 1 } else { 20 };
        daemon.site().configure(&script(&format!("attack('{name}') sleep({waits})")));
        assert!(!daemon.reload(), "{name}: {}", daemon.text());
        eventually(line, || (daemon.count_log(line) > said).then_some(()));
        assert_eq!(before.assert_served(&daemon, name), MAILS, "{name}: {}", daemon.text());
        assert_eq!(daemon.workers(), before.workers, "{name}");
    }
    assert_eq!(daemon.count_log("worker died: "), 0);
    daemon.site().configure(&script(""));
    assert!(daemon.reload(), "{}", daemon.text());
}
