//! qrelay as the units in systemd/ run it, under a real systemd: what the units restrict takes
//! nothing away that qrelay needs.
//!
//! Contract: [`faults`] tries everything and lists what doesn't work. Nothing is to be listed for
//! the unit as it is, and something for a unit that restricts more; so the list itself is tested.

use std::fs;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;

use crate::harness::control_group::set_attribute;
use crate::harness::machine::{Machine, SERVICE, UNITS};
use crate::harness::network::in_own_network;
use crate::harness::postgres::Cluster;
use crate::harness::web;
use crate::harness::{Client, Daemon, Mail, PATIENCE, Sink, Target, eventually, submit};

const SOCKET: &str = "/run/cm4all/qrelay/qrelay.sock";

/// No capability, as /proc/PID/status has it.
const NOTHING: &str = "0000000000000000";

/// What the client is told for each name in front of the sender's `@`.
const ACTIONS: [(&str, &str); 16] = [
    ("inet", "Kinet"),
    ("inet6", "Kinet6"),
    ("abstract", "Kabstract"),
    ("path", "Kpath"),
    ("crash", "Ztry again later"),
    ("exec", "Kexec"),
    ("raw", "Kraw"),
    ("late", "Ztimeout"),
    ("popen", "Kpopen"),
    ("execute", "Ktrue"),
    ("file", "Kfile"),
    ("shared", "K1"),
    ("pg", "K42"),
    ("netlink", "Kup"),
    ("nice", "K5"),
    ("limit", "K1024"),
];

/// Servers of the test that a machine's qrelay reaches.
struct Peers {
    database: Cluster,
    hops: [Sink; 3],
    log: UdpSocket,
}

impl Peers {
    fn start() -> Self {
        let log = UdpSocket::bind("127.0.0.1:0").expect("bind");
        log.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let [inet, inet6] = ["127.0.0.1:6280", "[::1]:6280"]
            .map(|address| Target::Inet(address.parse().expect("an address")));
        let hops = [
            Sink::answering(inet, "Kinet"),
            Sink::answering(inet6, "Kinet6"),
            Sink::answering(Target::unique_abstract(), "Kabstract"),
        ];
        Self { database: Cluster::start(&[]), hops, log }
    }

    /// Returns a configuration that uses everything.
    fn config(&self) -> String {
        let text = "
            log_server = 'LOG'
            settings{workers=2}
            local db = pg:new('host=127.0.0.1 port=PORT user=postgres dbname=postgres')
            local numbers = shared:new('numbers')
            local function run(m, script, ...) return m:exec_raw('/bin/sh', '-c', script, ...) end
            local actions = {
              inet = function(m) return m:connect('INET4') end,
              inet6 = function(m) return m:connect('INET6') end,
              crash = function() os.exit(1) end,
              path = function(m) return m:connect('/run/hop') end,
              abstract = function(m) return m:connect('LOCAL') end,
              exec = function(m)
                return m:exec('/bin/sh', '-c', 'cat >/dev/null; printf 5:Kexec,')
              end,
              raw = function(m) return run(m, 'echo raw') end,
              late = function(m) return run(m, 'sleep 1000 & wait', {timeout=0.3}) end,
              popen = function(m)
                local pipe = io.popen('echo popen')
                local line = pipe:read('l')
                pipe:close()
                return m:discard(line)
              end,
              execute = function(m) return m:discard(tostring(os.execute('true'))) end,
              file = function(m)
                assert(io.open('/tmp/file', 'w')):write('file'):close()
                return m:discard(io.open('/tmp/file'):read('a'))
              end,
              shared = function(m) return m:discard(tostring(numbers:incr(m.id))) end,
              pg = function(m) return m:discard(db:execute('SELECT 42 AS n'):fetch().n) end,
              -- The kernel tells about networks as about sockets: by AF_NETLINK.
              netlink = function(m) return run(m, 'ip link show lo >/dev/null && echo up') end,
              writable = function(m)
                return run(m, 'find / -maxdepth 3 -path /proc -prune -o ' ..
                  '-type d -writable -print 2>/dev/null; true')
              end,
              gate = function(m)
                return run(m, 'cd /run/cm4all/qrelay; touch begun; ' ..
                  'until test -e go; do sleep 0.01; done; echo gate')
              end,
              nice = function(m) return run(m, 'nice -n 5 nice') end,
              limit = function(m) return run(m, 'ulimit -n') end,
              who = function(m)
                local group = m.cgroup
                return m:discard(m.uid .. ' ' .. m.pid .. ' ' .. group.path .. ' ' ..
                  tostring(group.parent.xattr.account))
              end,
            }
            qmqp_listen('SOCKET', function(m) return actions[m.sender:match('^[^@]+')](m) end)
        ";
        let address = |hop: usize| self.hops[hop].address().to_string();
        text.replace("SOCKET", SOCKET)
            .replace("LOG", &self.log.local_addr().expect("address").to_string())
            .replace("INET4", &address(0))
            .replace("INET6", &address(1))
            .replace("LOCAL", &address(2))
            .replace("PORT", &self.database.port().to_string())
    }
}

/// Returns what doesn't work in a machine whose service has been started.
fn faults(machine: &Machine, peers: &Peers, sandbox: &str) -> Vec<String> {
    let hop = machine.path("/run/hop");
    let _ = fs::remove_file(&hop);
    let _hop = Sink::answering(hop.clone(), "Kpath");
    fs::set_permissions(hop, fs::Permissions::from_mode(0o666)).expect("mode");
    let mut faults = Vec::new();
    let mut note = |what: &str, got: &str, expected: &str| {
        if got != expected {
            faults.push(format!("{what}: {got}"));
        }
    };
    for (name, answer) in ACTIONS {
        let mail = Mail::new("x").from(&format!("{name}@x"));
        note(name, &submit(machine.path(SOCKET), &mail).to_string(), answer);
    }
    let (told, own) = client(machine);
    note("client", &told, &format!("1 {own} /system.slice/client.service shop"));
    let journal = machine.journal();
    let ready = journal.lines().find(|line| line.starts_with("ready ")).unwrap_or_default();
    note("sandbox", ready, &format!("ready generation=1 workers=2 sandbox={sandbox}"));
    for line in ["the sandbox is not complete", "can't be raised", "can't be killed"] {
        note("journal", if journal.contains(line) { line } else { "" }, "");
    }
    // Waiting for a datagram that may never come tells nothing more.
    if faults.is_empty() {
        let received = peers.log.recv(&mut [0; 1024]);
        faults.extend(received.err().map(|error| format!("log_server: {error}")));
    }
    faults
}

/// Sends a mail from a service of the user daemon. Returns what the client was told, and its pid.
#[track_caller]
fn client(machine: &Machine) -> (String, String) {
    let unit = format!(
        "[Service]\nType=oneshot\nUser=daemon\nStandardOutput=truncate:/run/client\n\
         ExecStart=/bin/sh -c 'echo $$$$; \
         exec qrelay send --to {SOCKET} --sender who@x who@x </dev/null'\n"
    );
    machine.write("/etc/systemd/system/client.service", &unit);
    set_attribute(&machine.path("/sys/fs/cgroup/system.slice"), "user.account", "shop");
    machine.succeed(&["systemctl", "daemon-reload"]);
    machine.run(&["systemctl", "start", "client.service"]);
    let text = fs::read_to_string(machine.path("/run/client")).expect("output");
    let (own, told) = text.trim().split_once('\n').unwrap_or((text.trim(), ""));
    (told.to_owned(), own.to_owned())
}

/// Returns the level of the sandbox that this kernel has, as a daemon without a unit reports it.
fn level() -> String {
    let daemon = Daemon::start(
        "settings{workers=1} qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let line = daemon.wait_for_log(" ready ");
    line.split_once("sandbox=").expect("a field").1.trim_end().to_owned()
}

/// Returns an example of a drop-in.
fn example(name: &str) -> String {
    fs::read_to_string(format!("{UNITS}/examples/{name}.conf")).expect("an example")
}

/// The script answers with a variable of the environment file, and the options there count.
#[test]
fn options_and_variables_come_from_a_file() {
    let machine = Machine::boot(&format!(
        "qmqp_listen('{SOCKET}', function(m) return m:discard(os.getenv('GREETING')) end)"
    ));
    machine.write(
        "/etc/default/cm4all-qrelay",
        "QRELAY_OPTIONS=\"--log-level debug --boot-timeout 20\"\nGREETING=hello\n",
    );
    assert!(machine.restart(), "{}", machine.journal());
    assert_eq!(submit(machine.path(SOCKET), &Mail::new("x")), "Khello");
    machine.wait_for_log("worker ready");
}

#[test]
fn everything_works_as_the_unit_runs_it() {
    in_own_network(|| {
        let peers = Peers::start();
        let machine = Machine::boot(&peers.config());
        assert!(machine.restart(), "{}", machine.journal());
        assert_eq!(faults(&machine, &peers, &level()), [""; 0], "{}", machine.journal());
        for (name, value) in
            [("NoNewPrivs", "1"), ("Seccomp", "2"), ("CapBnd", NOTHING), ("CapPrm", NOTHING)]
        {
            assert_eq!(machine.status(name), value, "{name}");
        }
        assert_ne!(machine.status("Uid").split('\t').next(), Some("0"));

        let found = machine.succeed(&["journalctl", "-o", "cat", "QRELAY_FROM=<inet6@x>"]);
        assert!(found.starts_with("mail id="), "{found}");

        machine.configure(&peers.config().replace("echo raw", "echo reloaded"));
        machine.succeed(&["systemctl", "reload", SERVICE]);
        machine.wait_for_log("ready generation=2 ");
        assert_eq!(submit(machine.path(SOCKET), &Mail::new("x").from("raw@x")), "Kreloaded");

        let told = submit(machine.path(SOCKET), &Mail::new("x").from("writable@x")).to_string();
        let mut writable: Vec<_> = told.trim_start_matches('K').split(' ').collect();
        writable.sort_unstable();
        assert_eq!(writable, ["/dev/shm", "/run/cm4all/qrelay", "/tmp", "/var/tmp"]);

        let main = machine.property("MainPID");
        let children = machine.path(&format!("/proc/{main}/task/{main}/children"));
        let children = fs::read_to_string(children).expect("children");
        let read = |pid: &str, file: &str| {
            let text = fs::read_to_string(machine.path(&format!("/proc/{pid}/{file}")));
            text.expect("a process").trim().to_owned()
        };
        let workers =
            children.split_whitespace().filter(|pid| read(pid, "comm") == "qrelay-worker");
        let chosen: Vec<i32> =
            workers.map(|pid| read(pid, "oom_score_adj").parse().expect("a number")).collect();
        assert!(chosen.len() >= 2 && chosen.iter().all(|&score| score > 0), "{chosen:?}");
        assert_eq!(read(&main, "oom_score_adj"), "0");

        // A mail that a program has at the stop is finished.
        let mut client = Client::connect(machine.path(SOCKET));
        client.send(&Mail::new("x").from("gate@x").request());
        let begun = machine.path("/run/cm4all/qrelay/begun");
        eventually("the program", || begun.exists().then_some(()));
        machine.succeed(&["systemctl", "stop", "--no-block", SERVICE]);
        machine.wait_for_log("stopping in_flight=1");
        machine.write("/run/cm4all/qrelay/go", "");
        assert_eq!(client.outcome(), "Kgate");
        machine.succeed(&["systemctl", "stop", SERVICE]);
        assert_eq!(machine.property("Result"), "success");
        assert_eq!(machine.property("ExecMainStatus"), "0");
        assert!(!machine.path(SOCKET).exists());
    });
}

#[test]
fn a_unit_that_takes_more_away_is_noticed() {
    in_own_network(|| {
        let peers = Peers::start();
        let machine = Machine::boot(&peers.config());
        let level = level();
        for (restriction, fault) in [
            ("RestrictAddressFamilies=~AF_NETLINK", "netlink: "),
            ("RestrictAddressFamilies=~AF_INET", "inet: "),
            ("RestrictAddressFamilies=~AF_INET6", "inet6: "),
            ("RestrictAddressFamilies=~AF_UNIX", "start"),
            ("SystemCallFilter=~landlock_create_ruleset", "sandbox: "),
            ("SystemCallFilter=~seccomp", "journal: the sandbox is not complete"),
            ("SystemCallFilter=~@resources", "nice: "),
            ("SystemCallFilter=~@process", "start"),
            ("SystemCallFilter=~@io-event", "start"),
            ("SystemCallFilter=~@file-system", "start"),
            ("SystemCallFilter=~memfd_create", "exec: "),
            ("ProtectProc=invisible", "client: "),
            ("PrivateUsers=yes", "client: "),
            ("PrivateNetwork=yes", "inet: "),
            ("ReadOnlyPaths=/tmp", "file: "),
            ("LimitNOFILE=65536", "limit: "),
            ("InaccessiblePaths=/sys/fs/cgroup", "client: "),
        ] {
            machine.drop_in(&format!("[Service]\n{restriction}\n"));
            let found = if machine.restart() {
                faults(&machine, &peers, &level)
            } else {
                vec!["start".to_owned()]
            };
            assert!(
                found.iter().any(|found| found.starts_with(fault)),
                "{restriction}: {found:?} {}",
                machine.journal()
            );
        }
        machine.drop_in("");
        assert!(machine.restart(), "{}", machine.journal());
        assert_eq!(faults(&machine, &peers, &level), [""; 0], "{}", machine.journal());
    });
}

#[test]
fn the_socket_unit_starts_the_service() {
    // A service manager raises this limit at its start, if it may.
    let limit = || fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen").expect("a limit");
    let before = limit();
    let machine = Machine::boot(
        "qmqp_listen(systemd['qrelay'], function(m) return m:discard(m.listener) end)",
    );
    assert_eq!(limit(), before, "the machine has changed the kernel of this one");
    machine.succeed(&["systemctl", "start", "cm4all-qrelay.socket"]);
    assert_eq!(machine.property("ActiveState"), "inactive");
    assert_eq!(submit(machine.path(SOCKET), &Mail::new("x")).status(), 'K');
    assert_eq!(machine.property("ActiveState"), "active");
    // The socket stays while the service is away.
    machine.succeed(&["systemctl", "kill", "--kill-whom=main", "-s", "KILL", SERVICE]);
    assert_eq!(submit(machine.path(SOCKET), &Mail::new("x")).status(), 'K');
}

#[test]
fn the_page_has_a_unit_of_its_own() {
    let machine = Machine::boot("qmqp_listen('/run/cm4all/qrelay/in', function() end)");
    assert!(machine.restart(), "{}", machine.journal());
    let free = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = free.local_addr().expect("address").port();
    drop(free);
    let start = format!("ExecStart=\nExecStart=/usr/bin/qrelay web --listen 127.0.0.1:{port}");
    let unit = "cm4all-qrelay-web.service";
    machine.write(
        &format!("/etc/systemd/system/{unit}.d/test.conf"),
        &format!("[Service]\n{start}\n"),
    );
    machine.succeed(&["systemctl", "daemon-reload"]);
    machine.succeed(&["systemctl", "start", unit]);
    eventually("the port", || TcpStream::connect(("127.0.0.1", port)).ok());
    let metrics = web::get(port, "/metrics").body;
    assert!(metrics.contains("\nqrelay_up 1\n"), "{metrics}");
    assert_eq!(web::get(port, "/").status, 200);
    // The page outlives the daemon, and says that the daemon is down.
    machine.succeed(&["systemctl", "stop", SERVICE]);
    eventually("a daemon that is down", || {
        web::get(port, "/metrics").body.contains("\nqrelay_up 0\n").then_some(())
    });
    machine.succeed(&["systemctl", "is-active", unit]);
}

#[test]
fn a_set_group_id_sendmail_needs_the_example() {
    let config = |sandbox: bool| {
        format!(
            "settings{{workers=1, sandbox={sandbox}}}
             qmqp_listen('{SOCKET}', function(m)
               local arguments = {{'-i', '-f', m.sender, '--', m.recipients[1]}}
               arguments[#arguments + 1] = {{env={{PATH='/usr/bin:/bin'}}}}
               return m:exec_raw('/usr/sbin/sendmail', table.unpack(arguments))
             end)"
        )
    };
    let machine = Machine::boot(&config(true));
    machine.write("/etc/postfix/main.cf", "compatibility_level = 3.6\nmyhostname = mx.example\n");
    let queue = machine.path("/var/spool/postfix/maildrop");
    let queued = || fs::read_dir(&queue).expect("Postfix's queue").count();
    let before = queued();
    let send = |dropped_in: bool, sandbox: bool| {
        machine.configure(&config(sandbox));
        machine.drop_in(&if dropped_in { example("set-id-sendmail") } else { String::new() });
        assert!(machine.restart(), "{}", machine.journal());
        let mut client = Client::connect(machine.path(SOCKET));
        client.send(&Mail::new("x").request());
        client
    };
    for (dropped_in, sandbox) in [(false, true), (false, false), (true, true)] {
        let client = send(dropped_in, sandbox);
        // postdrop tries again and again.
        machine.wait_for_log("warning: mail_queue_enter: create file maildrop/");
        drop(client);
        let line = machine.wait_for_log("program complained");
        assert!(line.contains("sandbox=false in settings{}"), "{line}");
    }
    assert_eq!(queued(), before);
    assert_eq!(send(true, false).outcome().status(), 'K', "{}", machine.journal());
    assert_eq!(queued(), before + 1);
    assert_eq!(machine.status("NoNewPrivs"), "0");
    assert_eq!(machine.status("CapBnd"), NOTHING);
}

#[test]
fn the_service_starts_as_root_with_the_example() {
    let machine = Machine::boot(&format!(
        "assert(io.open('/etc/shadow'))
         settings{{workers=1, user='cm4all-qrelay'}}
         qmqp_listen('{SOCKET}', function(m)
           return m:exec_raw('/usr/bin/id', '-un')
         end, {{owner='daemon'}})"
    ));
    let example = example("start-as-root");
    machine.drop_in(&example);
    assert!(machine.restart(), "{}", machine.journal());
    assert_eq!(submit(machine.path(SOCKET), &Mail::new("x")), "Kcm4all-qrelay");
    let kept = machine.wait_for_log("the supervisor keeps root's user id");
    let named: Vec<_> =
        example.split(['=', ' ', '\n']).filter(|word| word.starts_with("CAP_")).collect();
    assert!(named.len() == 8 && named.iter().all(|name| kept.contains(name)), "{kept}");
    assert_eq!(machine.status("NoNewPrivs"), "1");
    machine.succeed(&["systemctl", "reload", SERVICE]);
    machine.wait_for_log("ready generation=2 ");
    machine.succeed(&["systemctl", "stop", SERVICE]);
    assert_eq!(machine.property("Result"), "success");
}

#[test]
fn what_the_documentation_says_to_add_is_enough() {
    in_own_network(|| {
        let machine = Machine::boot("");
        for directory in ["/srv/mail", "/home/someone", "/tmp"] {
            machine.write(&format!("{directory}/file"), "text");
            let everybody = fs::Permissions::from_mode(0o777);
            fs::set_permissions(machine.path(directory), everybody).expect("mode");
        }
        for (addition, listener, script) in [
            ("ReadWritePaths=/srv/mail", "", "echo >/srv/mail/new"),
            ("ProtectHome=read-only", "", "cat /home/someone/file"),
            ("ProtectHome=no\nReadWritePaths=/home", "", "echo >/home/someone/new"),
            ("PrivateTmp=no\nReadWritePaths=/tmp", "", "cat /tmp/file && echo >/tmp/new"),
            ("SupplementaryGroups=mail", "'/run/cm4all/qrelay/b', f, {group='mail'}", "true"),
            (
                "AmbientCapabilities=CAP_NET_BIND_SERVICE\n\
                 CapabilityBoundingSet=CAP_NET_BIND_SERVICE",
                "'127.0.0.1:628', f",
                "true",
            ),
        ] {
            let operations = fs::read_to_string(format!("{UNITS}/../docs/operations.md"));
            let operations = operations.expect("the documentation");
            for line in addition.lines() {
                assert!(operations.contains(&format!("`{line}`")), "{line} isn't documented");
            }
            let other = if listener.is_empty() { "" } else { "qmqp_listen(OTHER)" };
            machine.configure(&format!(
                "local function f(m) return m:exec_raw('/bin/sh', '-c', '{script}') end
                 qmqp_listen('{SOCKET}', f) {}",
                other.replace("OTHER", listener)
            ));
            let works = || {
                let accepts = || submit(machine.path(SOCKET), &Mail::new("x")).status() == 'K';
                machine.restart() && accepts()
            };
            machine.drop_in("");
            assert!(!works(), "{addition} isn't needed: {}", machine.journal());
            machine.drop_in(&format!("[Service]\n{addition}\n"));
            assert!(works(), "{addition}: {}", machine.journal());
        }
    });
}
