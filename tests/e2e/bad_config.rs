//! Broken configurations. Each one ends the start with one clear message and the right exit status,
//! and leaves nothing behind. The exit status is 78 when config.lua has to be changed, 75 when it
//! needs something that may be there later, and 71 when the system refuses.

use std::net::UdpSocket;
use std::os::unix::fs::MetadataExt;

use crate::harness::daemon::{is_socket, run, send_as_nobody};
use crate::harness::network::in_own_network;
use crate::harness::postgres::Cluster;
use crate::harness::target::make_stale;
use crate::harness::{Daemon, Mail, Sink, Site, Target, eventually, submit};

const CONFIG: i32 = 78;
const SYSTEM: i32 = 71;
const TEMPORARY: i32 = 75;

/// Starts a daemon whose start must fail. Checks its exit status, that stderr contains all `parts`,
/// and that nothing is left.
#[track_caller]
fn fails(site: Site, code: i32, parts: &[&str]) -> Daemon {
    ended(site.launch().spawn(), code, parts)
}

#[track_caller]
fn ended(mut daemon: Daemon, code: i32, parts: &[&str]) -> Daemon {
    let status = daemon.wait_exit();
    let log = daemon.complete_text();
    assert_eq!(status.code(), Some(code), "exit status; log:\n{log}");
    for part in parts {
        assert!(log.contains(part), "{part:?} in the log:\n{log}");
    }
    assert!(!log.contains("panicked"), "{log}");
    let complaints = log.lines().filter(|line| line.contains(" error ")).count();
    assert_eq!(complaints, 1, "one clear message:\n{log}");
    assert!(!daemon.notify().all().iter().any(|line| line == "READY=1"));
    assert!(daemon.processes().is_empty(), "{:?}", daemon.processes());
    daemon
}

#[track_caller]
fn script_fails(script: &str, parts: &[&str]) {
    fails(Site::with(script), CONFIG, parts).assert_nothing_left();
}

#[test]
fn missing_file() {
    fails(Site::new(), CONFIG, &["config.lua", "No such file"]);
}

#[test]
fn directory() {
    let site = Site::new();
    std::fs::create_dir(site.path("config.lua")).expect("directory");
    fails(site, CONFIG, &["config.lua", "directory"]);
}

#[test]
fn syntax_error() {
    script_fails("local x = 1\n\nlocal y = = 2\n", &["config.lua:3:", "unexpected symbol"]);
}

#[test]
fn not_text() {
    let site = Site::new();
    std::fs::write(site.path("config.lua"), b"\x1bLua\x53\x00\xff").expect("config");
    fails(site, CONFIG, &["config.lua"]);
}

#[test]
fn runtime_errors() {
    script_fails("local t\nt.x = 1", &["config.lua:2:", "attempt to index"]);
    script_fails("error('my own words')", &["config.lua:1:", "my own words"]);
    script_fails("error({})", &["config.lua"]);
    script_fails("local function f() return f() + 1 end f()", &["stack overflow"]);
}

#[test]
fn no_listener() {
    script_fails("local nothing = 1", &["qmqp_listen"]);
}

#[test]
fn bad_listeners() {
    let handler = "local function h(m) return m:discard() end\n";
    let table = [
        ("qmqp_listen('systemd', h)", &["config.lua:2:", "systemd"][..]),
        ("qmqp_listen('relative/path', h)", &["config.lua:2:"]),
        ("qmqp_listen('localhost:628', h)", &["config.lua:2:"]),
        ("qmqp_listen('@', h)", &["config.lua:2:"]),
        ("qmqp_listen('127.0.0.1', h)", &["config.lua:2:"]),
        ("qmqp_listen('127.0.0.1:70000', h)", &["config.lua:2:"]),
        ("qmqp_listen('$DIR/in', 'h')", &["config.lua:2:", "function"]),
        ("qmqp_listen('$DIR/in')", &["config.lua:2:", "function"]),
        ("qmqp_listen(systemd['nope'], h)", &["config.lua:2:", "nope"]),
        ("qmqp_listen('$DIR/in', h) qmqp_listen('$DIR/in', h)", &["config.lua:2:", "$DIR/in"]),
        ("qmqp_listen('$DIR/in', h, {mode=0660})", &["config.lua:2:", "mode"]),
        ("qmqp_listen('$DIR/in', h, {mode='9'})", &["config.lua:2:", "mode"]),
        ("qmqp_listen('$DIR/in', h, {moed='0660'})", &["config.lua:2:", "moed"]),
        ("qmqp_listen('$DIR/in', h, {owner='no-such-user'})", &["config.lua:2:", "no-such-user"]),
        ("qmqp_listen('$DIR/in', h, {group='no-such-group'})", &["config.lua:2:", "no-such-group"]),
        ("qmqp_listen('$DIR/in', h, {max_size=1})", &["config.lua:2:", "max_size"]),
        ("qmqp_listen('127.0.0.1:6281', h, {allow={'10.0.0.1/8'}})", &["config.lua:2:", "10.0.0"]),
        ("qmqp_listen('127.0.0.1:6281', h, {allow={'10.0.0.0/33'}})", &["config.lua:2:"]),
        ("max_size = 'big' qmqp_listen('$DIR/in', h)", &["config.lua:2:", "max_size"]),
        ("max_size = 1023 qmqp_listen('$DIR/in', h)", &["config.lua:2:", "max_size"]),
        ("max_size = 1 << 31 qmqp_listen('$DIR/in', h)", &["config.lua:2:", "max_size"]),
    ];
    for (script, parts) in table {
        let site = Site::with(&format!("{handler}{script}"));
        let dir = site.dir().to_str().expect("UTF-8").to_owned();
        let parts: Vec<_> = parts.iter().map(|part| part.replace("$DIR", &dir)).collect();
        let parts: Vec<_> = parts.iter().map(String::as_str).collect();
        fails(site, CONFIG, &parts).assert_nothing_left();
    }
}

#[test]
fn bad_settings() {
    let table = [
        ("settings{wrokers=2}", &["config.lua:1:", "wrokers", "workers"][..]),
        ("settings{workers=0}", &["config.lua:1:", "workers"]),
        ("settings{workers='many'}", &["config.lua:1:", "workers"]),
        ("settings{client_timeout=-1}", &["config.lua:1:", "client_timeout"]),
        ("settings{client_share=1.5}", &["config.lua:1:", "client_share"]),
        ("settings(5)", &["config.lua:1:"]),
        ("settings{[1]=2}", &["config.lua:1:"]),
    ];
    for (script, parts) in table {
        let listen = "qmqp_listen('$DIR/in', function(m) return m:discard() end)";
        script_fails(&format!("{script}\n{listen}"), parts);
    }
}

fn listen(at: &str) -> String {
    format!("qmqp_listen('{at}', function(m) return m:discard('mine') end)")
}

#[test]
fn unwritable_directory() {
    let site = Site::new();
    std::fs::write(site.path("file"), "").expect("file");
    site.configure(&listen("$DIR/file/in"));
    fails(site, SYSTEM, &["file/in"]);
    let missing = Site::with(&listen("$DIR/missing/in"));
    let parts = ["/missing doesn't exist", "missing/in", "RuntimeDirectory="];
    let daemon = fails(missing, SYSTEM, &parts);
    assert!(!daemon.text().contains(".lock") && !daemon.text().contains("os error"));
    fails(Site::with(&listen("/proc/self/in")), SYSTEM, &["/proc/self/in"]);
}

#[test]
fn path_too_long() {
    let name = "x".repeat(120);
    fails(Site::with(&listen(&format!("$DIR/{name}"))), CONFIG, &["config.lua:1:", "too long"]);
}

#[test]
fn live_socket_is_left_alone() {
    let site = Site::with(&listen("$DIR/in"));
    let other = Sink::answering(site.path("in"), "Kother");
    let inode = site.path("in").metadata().expect("socket").ino();
    let daemon = fails(site, SYSTEM, &["already in use", "/in"]);
    assert_eq!(daemon.path("in").metadata().expect("socket").ino(), inode);
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kother");
    drop(other);
}

#[test]
fn second_daemon_is_refused_and_the_first_serves_on() {
    let first = Daemon::start(&listen("$DIR/in"));
    let path = first.path("in").display().to_string();
    fails(Site::with(&listen(&path)), SYSTEM, &["already in use"]);
    assert_eq!(submit(first.path("in"), &Mail::new("x")), "Kmine");
}

#[test]
fn a_failing_second_listener_takes_the_first_with_it() {
    let site = Site::new();
    std::fs::write(site.path("file"), "precious").expect("file");
    site.configure(&format!("{}\n{}", listen("$DIR/in"), listen("$DIR/file")));
    let daemon = fails(site, SYSTEM, &["/file"]);
    assert!(!is_socket(&daemon.path("in")), "the first socket was left behind");
}

/// Several limits in a row, so that the descriptors run out at each step of binding a path.
#[test]
fn more_listeners_than_descriptors() {
    for limit in 60..66 {
        let site = Site::with(
            "for n = 1, 40 do
               qmqp_listen('$DIR/' .. n, function(m) return m:discard() end)
             end",
        );
        let limits = format!("--nofile={limit}:{limit}");
        let daemon = site.launch().through(&["prlimit", &limits]).spawn();
        ended(daemon, SYSTEM, &["cannot start: cannot ", "Too many open files"])
            .assert_nothing_left();
    }
}

/// Whatever the descriptors don't suffice for, the log says what is lacking.
#[test]
fn hardly_any_descriptors() {
    let mut served = 0;
    for limit in 12..30 {
        let site = Site::with(&format!("settings{{workers=1}} {}", listen("$DIR/in")));
        let limits = format!("--nofile={limit}:{limit}");
        let mut daemon = site.launch().through(&["prlimit", &limits]).spawn();
        let ready = eventually("an end or a ready daemon", || {
            let ready = daemon.notify().all().iter().any(|line| line == "READY=1");
            (ready || daemon.exited().is_some()).then_some(ready)
        });
        if ready {
            served += 1;
            assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kmine", "{limit}");
        } else {
            ended(daemon, SYSTEM, &["cannot start: ", "Too many open files"]).assert_nothing_left();
        }
    }
    assert!(served > 0);
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    for kind in ["file", "directory", "link"] {
        let site = Site::with(&listen("$DIR/in"));
        let at = site.path("in");
        match kind {
            "file" => std::fs::write(&at, "precious").expect("file"),
            "directory" => std::fs::create_dir(&at).expect("directory"),
            _ => std::os::unix::fs::symlink(site.path("target"), &at).expect("link"),
        }
        let before = at.symlink_metadata().expect("there").ino();
        let daemon = fails(site, SYSTEM, &["/in"]);
        assert_eq!(at.symlink_metadata().expect("still there").ino(), before, "{kind}");
        drop(daemon);
    }
}

#[test]
fn stale_socket_is_replaced() {
    let site = Site::with(&listen("$DIR/in"));
    make_stale(&site.path("in"));
    let daemon = site.start();
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kmine");
}

#[test]
fn of_many_daemons_that_start_at_once_one_wins() {
    let home = Site::new();
    let path = home.path("in");
    make_stale(&path);
    let script = listen(path.to_str().expect("UTF-8"));
    let mut daemons: Vec<_> = (0..5).map(|_| Site::with(&script).launch().spawn()).collect();
    let is_ready = |daemon: &Daemon| daemon.notify().all().iter().any(|line| line == "READY=1");
    eventually("one serves, the others have ended", || {
        let ended = daemons.iter_mut().filter_map(Daemon::exited).count();
        (ended == 4 && daemons.iter().any(is_ready)).then_some(())
    });
    for daemon in &mut daemons {
        match is_ready(daemon) {
            true => assert!(daemon.exited().is_none()),
            false => assert_eq!(daemon.wait_exit().code(), Some(SYSTEM), "{}", daemon.text()),
        }
    }
    assert_eq!(submit(path, &Mail::new("x")), "Kmine");
}

#[test]
fn the_umask_does_not_matter() {
    let site = Site::with(&listen("$DIR/in"));
    let daemon = site.launch().through(&["sh", "-c", "umask 077; exec \"$@\"", "sh"]).ready();
    let mode = daemon.path("in").metadata().expect("socket").mode();
    assert_eq!(mode & 0o777, 0o666);
    let output = send_as_nobody(&daemon.path("in"), "s@x");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn a_mode_keeps_others_out() {
    let script = "qmqp_listen('$DIR/in', function(m) return m:discard() end, {mode='0600'})";
    let daemon = Daemon::start(script);
    let output = send_as_nobody(&daemon.path("in"), "s@x");
    assert_eq!(output.status.code(), Some(75), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("Permission denied"), "{output:?}");
}

#[test]
fn port_in_use() {
    let other = Sink::start(Target::free_port(), crate::harness::sink::Behaviour::Deaf);
    let address = other.address().to_string();
    fails(Site::with(&listen(&address)), SYSTEM, &["in use", &address]);
}

#[test]
fn abstract_name_in_use() {
    let other = Sink::answering(Target::unique_abstract(), "Kother");
    let address = other.address().to_string();
    fails(Site::with(&listen(&address)), SYSTEM, &["in use", &address]);
}

#[test]
fn a_script_that_never_ends() {
    let site = Site::with(&format!("{}\nwhile true do end", listen("$DIR/in")));
    let daemon = site.launch().arg("--boot-timeout").arg("0.5").spawn();
    ended(daemon, TEMPORARY, &["config.lua"]).assert_nothing_left();
}

/// Starts a daemon with a resolver at 127.0.0.1 that has its answers from nobody else.
fn with_resolver(script: &str) -> Daemon {
    let files = [
        ("nsswitch.conf", "hosts: dns\n"),
        ("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"),
    ];
    Site::with(script).launch().with_etc(&files).spawn()
}

#[test]
fn a_name_that_no_resolver_answers_for() {
    in_own_network(|| {
        let script =
            format!("local hop = qmqp_resolve('relay.example.com')\n{}", listen("$DIR/in"));
        ended(with_resolver(&script), TEMPORARY, &["config.lua:1:", "relay.example.com"]);
        let script = "assert(pg:new('host=db.example.com user=u'):execute('SELECT 1'))";
        ended(with_resolver(script), TEMPORARY, &["config.lua:1:", "db.example.com"]);
    });
}

#[test]
fn a_name_that_does_not_exist() {
    in_own_network(|| {
        let server = UdpSocket::bind("127.0.0.1:53").expect("bind");
        let answers = server.try_clone().expect("clone");
        std::thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((length, client)) = answers.recv_from(&mut query) {
                // A response without records: recursion is available, and there is no such name.
                query[2..4].copy_from_slice(&[0x81, 0x83]);
                let _ = answers.send_to(&query[..length], client);
            }
        });
        let script = "qmqp_resolve('relay.example.com')";
        ended(with_resolver(script), CONFIG, &["config.lua:1:", "relay.example.com"]);
        let script = "assert(pg:new('host=db.example.com user=u'):execute('SELECT 1'))";
        ended(with_resolver(script), CONFIG, &["config.lua:1:", "db.example.com"]);
    });
}

#[test]
fn a_server_that_is_not_up() {
    for script in [
        "assert(pg:new('host=$DIR'):execute('SELECT 1'))",
        "local ok, why = pg:new('host=127.0.0.1 port=1'):execute('SELECT 1')
         if not ok then error('cannot read the list of sites: ' .. why) end",
        "assert(pg:new('host=$DIR'):transaction(function() end))",
        "assert(socket:connect('$DIR/nobody'):send('x'))",
    ] {
        fails(Site::with(script), TEMPORARY, &["config.lua:"]).assert_nothing_left();
        let site = Site::with(script);
        let config = site.path("config.lua");
        let output = run(&["check", "--config", config.to_str().expect("UTF-8")]);
        assert_eq!(output.status.code(), Some(TEMPORARY), "{script} {output:?}");
    }
}

#[test]
fn a_database_that_will_never_do() {
    let cluster = Cluster::shared();
    for (more, sql) in
        [("dbname=missing", "SELECT 1"), ("", "SELEKT"), ("user=nobody_", "SELECT 1")]
    {
        let conninfo = format!("{} {more}", cluster.conninfo());
        fails(
            Site::with(&format!("assert(pg:new(\"{conninfo}\"):execute('{sql}'))")),
            CONFIG,
            &["config.lua:1:"],
        );
    }
}

#[test]
fn a_reload_that_may_work_later_says_so() {
    const HINT: &str = "trying again may help";
    let daemon = Daemon::start(&listen("$DIR/in"));
    for (script, hinted) in [
        ("error('wrong')", false),
        ("assert(pg:new('host=$DIR'):execute('SELECT 1'))", true),
        ("qmqp_listen('$DIR/missing/in', function(m) return m:discard() end)", true),
    ] {
        let before = daemon.count_log("reload failed");
        daemon.site().configure(script);
        assert!(!daemon.reload(), "{script}");
        eventually("the reason", || (daemon.count_log("reload failed") > before).then_some(()));
        let text = daemon.text();
        let line = text.lines().rfind(|line| line.contains("reload failed")).expect("a line");
        assert_eq!(line.contains(HINT), hinted, "{line}");
    }
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kmine");
}

#[test]
fn a_script_that_leaves_by_itself() {
    for leave in ["os.exit(0)", "os.exit(71)", "pcall(os.exit)", "dofile 'part.lua'"] {
        let site = Site::with(&format!("{}\n{leave}", listen("$DIR/in")));
        std::fs::write(site.path("part.lua"), "\nos.exit()").expect("a part");
        let place = if leave.starts_with("dofile") { "part.lua:2" } else { "config.lua:2" };
        fails(site, CONFIG, &[place, "os.exit"]).assert_nothing_left();
    }
    // A library in C can end the process nevertheless.
    let exit = "package.loadlib('libc.so.6', 'exit')()";
    fails(Site::with(exit), CONFIG, &["the zygote ended with exit status", "has called ended it"]);
}

#[test]
fn a_port_that_only_root_may_bind() {
    in_own_network(|| {
        let listen = listen("127.0.0.1:625");
        let without =
            ["setpriv", "--bounding-set", "-net_bind_service", "--inh-caps", "-net_bind_service"];
        let launch = Site::with(&listen).launch().through(&without);
        ended(launch.spawn(), SYSTEM, &["127.0.0.1:625", "CAP_NET_BIND_SERVICE", "socket unit"]);
    });
}

/// Whatever fails, the message has the system's words and no number.
#[test]
fn messages_have_no_error_numbers() {
    let site = Site::new();
    let (long, socket) = (site.path("none/x"), site.path("s"));
    let (long, socket) = (long.to_str().expect("UTF-8"), socket.to_str().expect("UTF-8"));
    for arguments in [
        &["send", "--to", socket, "--sender", "a@x", "b@x"][..],
        &["sink", "--listen", long],
        &["sink", "--listen", socket, "--output", long],
        &["check", "--config", long],
        &["--config", long],
    ] {
        let output = run(arguments);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && told.contains("No such file"), "{arguments:?}: {told}");
        assert!(!told.contains("os error"), "{arguments:?}: {told}");
    }
    let daemon = Daemon::start(
        "qmqp_listen('$DIR/in', function(m)
           local r, e = pg:new('host=127.0.0.1 port=1'):execute('SELECT 1')
           log.warn(e)
           return m:discard(e)
         end)",
    );
    let told = submit(daemon.path("in"), &Mail::new("x")).to_string();
    assert!(told.contains("Connection refused") && !told.contains("os error"), "{told}");
    assert!(!daemon.text().contains("os error"), "{}", daemon.text());
}
