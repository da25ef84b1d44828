//! What the daemon gets from whoever starts it, and what programs get from the daemon: descriptors,
//! signals, limits.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::signal::Signal;

use crate::harness::daemon::Launch;
use crate::harness::{Daemon, Mail, Site, eventually, processes, submit};

const DISCARD: &str = "
    settings{workers=2}
    qmqp_listen('$DIR/in', function(m) return m:discard() end)";

/// Runs statements of Python in the process that becomes the daemon.
fn after(launch: Launch, statements: &str) -> Launch {
    let become_daemon = "\nos.execv(sys.argv[1], sys.argv[1:])";
    let code = format!("import fcntl, os, signal, sys\n{statements}{become_daemon}");
    launch.through(&["python3", "-c", &code])
}

/// Returns the pids of the supervisor, its zygotes and its workers.
fn all(daemon: &Daemon) -> Vec<i32> {
    [vec![daemon.pid()], daemon.zygotes(), daemon.workers()].concat()
}

/// Returns what the descriptors of a process lead to.
fn targets(pid: i32) -> Vec<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors");
    entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()).collect()
}

/// Returns a field of a process's status.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.strip_prefix(":")).expect("field").trim().to_owned()
}

#[test]
fn descriptors_that_the_launcher_left_open_reach_no_process() {
    let site = Site::with(DISCARD);
    fs::write(site.path("secret"), "").expect("file");
    let secret = site.path("secret");
    let open = format!(
        "fd = os.open('{}', os.O_RDWR)
for high in (3, 17, 900): os.dup2(fd, high, inheritable=True)",
        secret.display()
    );
    let daemon = after(site.launch(), &open).ready();
    eventually("a standby", || (daemon.zygotes().len() == 2).then_some(()));
    for pid in all(&daemon) {
        assert!(!targets(pid).contains(&secret), "{pid}: {:?}", targets(pid));
    }
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
}

#[test]
fn closed_standard_descriptors_are_not_used_for_something_else() {
    let mut launch = Site::with(DISCARD).launch();
    launch.command().stdin(std::process::Stdio::null());
    let daemon = after(launch, "os.close(0); os.close(1)").ready();
    for pid in all(&daemon) {
        for number in [0, 1] {
            let target = fs::read_link(format!("/proc/{pid}/fd/{number}")).expect("open");
            let is_channel = number == 0 && target.to_string_lossy().starts_with("socket:");
            assert!(target == Path::new("/dev/null") || is_channel, "{pid}: {target:?}");
        }
    }
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
}

/// Blocks and ignores every signal that a process can block or ignore.
const DEAF: &str = "
every = [s for s in signal.valid_signals() if s not in (signal.SIGKILL, signal.SIGSTOP)]
for s in every: signal.signal(s, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, every)";

#[test]
fn signals_that_the_launcher_blocked_or_ignored_work() {
    let mut daemon = after(Site::with(DISCARD).launch(), DEAF).ready();
    daemon.wait_for_workers(2, &[]);
    for pid in all(&daemon) {
        // A process that has just been forked lets signals through when it is ready for them.
        let status = eventually("a process that blocks no signal", || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
            (field(&status, "SigBlk") == "0000000000000000").then_some(status)
        });
        // Rust's runtime ignores SIGPIPE in the supervisor.
        let ignored = if pid == daemon.pid() { "0000000000001000" } else { "0000000000000000" };
        assert_eq!(field(&status, "SigIgn"), ignored, "{pid}");
    }
    let workers = daemon.wait_for_workers(2, &[]);
    workers.iter().for_each(|&pid| processes::signal(pid, Signal::SIGKILL));
    daemon.wait_for_workers(2, &workers);
    assert!(daemon.reload());
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    daemon.stop();
}

/// Sends this process a signal that the launcher blocks, so that the signal comes with the first
/// instruction of the daemon that unblocks it.
fn pending(signal: &str) -> String {
    format!(
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.{signal}])
os.kill(os.getpid(), signal.{signal})"
    )
}

#[test]
fn a_reload_is_a_reload_from_the_start() {
    let mut daemon = after(Site::with(DISCARD).launch(), &pending("SIGHUP")).ready();
    daemon.wait_for_log("ready generation=2");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    daemon.stop();
}

#[test]
fn a_stop_is_a_stop_from_the_start() {
    let mut daemon = after(Site::with(DISCARD).launch(), &pending("SIGTERM")).spawn();
    assert_eq!(daemon.wait_exit().code(), Some(0));
    daemon.assert_nothing_left();
}

/// Has descriptors 3 and 4 listen, and says that systemd passed them.
fn listening(paths: [&Path; 2]) -> String {
    let [first, second] = paths.map(|path| path.display().to_string());
    format!(
        "import socket
for number, path in ((3, '{first}'), (4, '{second}')):
    s = socket.socket(socket.AF_UNIX)
    s.bind(path)
    s.listen()
    os.dup2(s.detach(), number)
    os.set_inheritable(number, True)
os.environ['LISTEN_PID'] = str(os.getpid())
os.environ['LISTEN_FDS'] = '2'"
    )
}

/// Returns the inodes of the sockets that a process has.
fn sockets(pid: i32) -> Vec<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors");
    entries.filter_map(|entry| fs::metadata(entry.ok()?.path()).ok()).map(|m| m.ino()).collect()
}

#[test]
fn passed_sockets_without_names_serve_and_reach_no_child() {
    let site = Site::with("qmqp_listen(systemd, function(m) return m:discard() end)");
    let (first, second) = (site.path("first"), site.path("second"));
    let daemon = after(site.launch(), &listening([&first, &second])).ready();
    for path in [&first, &second] {
        assert_eq!(submit(path.clone(), &Mail::new("x")), "Kdiscarded");
    }
    let passed: Vec<_> = [3, 4]
        .map(|number| fs::metadata(format!("/proc/{}/fd/{number}", daemon.pid())).expect("fd"))
        .iter()
        .map(MetadataExt::ino)
        .collect();
    for pid in [daemon.zygotes(), daemon.workers()].concat() {
        let has: Vec<_> = sockets(pid).into_iter().filter(|ino| passed.contains(ino)).collect();
        assert_eq!(has, Vec::<u64>::new(), "{pid}");
    }
    assert!(!daemon.text().contains("systemd has passed no socket"), "{}", daemon.text());
}

#[test]
fn variables_of_the_service_manager_reach_no_child() {
    let site = Site::with("qmqp_listen(systemd, function(m) return m:discard() end)");
    let code = listening([&site.path("first"), &site.path("second")]);
    let more = "
os.environ['LISTEN_FDNAMES'] = 'one:two'
os.environ['LISTEN_PIDFDID'] = '4711'
os.environ['WATCHDOG_PID'] = str(os.getpid())
os.environ['WATCHDOG_USEC'] = '30000000'";
    let daemon = after(site.launch(), &format!("{code}{more}")).ready();
    daemon.notify().after(0, "food for the watchdog", |line| line == "WATCHDOG=1");
    for pid in [daemon.zygotes(), daemon.workers()].concat() {
        let environment = fs::read(format!("/proc/{pid}/environ")).expect("environment");
        let environment = String::from_utf8_lossy(&environment);
        let of_manager = |entry: &&str| {
            ["LISTEN_", "WATCHDOG_", "NOTIFY_"].iter().any(|prefix| entry.starts_with(prefix))
        };
        assert_eq!(environment.split('\0').find(of_manager), None, "of {pid}");
    }
}

#[test]
fn variables_for_another_process_pass_no_sockets() {
    let site = Site::with(DISCARD);
    let socket = site.path("passed");
    let code = listening([&socket, &site.path("other")]).replace("os.getpid()", "1");
    let daemon = after(site.launch(), &code).ready();
    let mut refused = std::os::unix::net::UnixStream::connect(&socket);
    eventually("the end of the foreign socket", || {
        let over = refused.is_err().then_some(());
        refused = std::os::unix::net::UnixStream::connect(&socket);
        over
    });
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
}

#[test]
fn fewer_names_than_sockets_end_the_start() {
    let site = Site::with(DISCARD);
    let code = listening([&site.path("first"), &site.path("second")]);
    let code = format!("{code}\nos.environ['LISTEN_FDNAMES'] = 'one'");
    let mut daemon = after(site.launch(), &code).spawn();
    assert_eq!(daemon.wait_exit().code(), Some(71));
    let text = daemon.complete_text();
    assert!(text.contains("LISTEN_FDNAMES has 1 names, LISTEN_FDS is 2"), "{text}");
}

/// Has programs of every kind show their signals and limits in `$DIR/NAME`. The first program is
/// started while the script loads, the others by a handler, whose thread blocks signals.
const PROGRAMS: &str = "
    local show = [[(cat /proc/self/status; ulimit -Sn; ulimit -Sc) > $DIR/]]
    assert(os.execute(show .. 'loading'))
    qmqp_listen('$DIR/in', function(m)
      sleep(0.01)
      assert(os.execute(show .. 'execute'))
      assert(io.popen(show .. 'popen'):close())
      return m:exec_raw('/bin/sh', '-c', show .. 'exec')
    end)";

/// Returns a limit as the kernel and prlimit(1) write it.
fn shown(limit: u64) -> String {
    match limit {
        RLIM_INFINITY => "unlimited".to_owned(),
        limit => limit.to_string(),
    }
}

#[test]
fn programs_get_the_launchers_limits_and_default_signals() {
    let site = Site::with(PROGRAMS);
    // Even root may be unable to raise a hard limit, and sudo lowers this one to 0.
    let (_, hard) = getrlimit(Resource::RLIMIT_CORE).expect("a limit");
    let soft = hard.min(51_200);
    let core = format!("--core={soft}:{}", shown(hard));
    let daemon = site.launch().through(&["prlimit", "--nofile=300:4000", &core]).ready();
    let outcome = submit(daemon.path("in"), &Mail::new("x"));
    assert_eq!(outcome.status(), 'K', "{outcome}: {}", daemon.text());
    for name in ["loading", "execute", "popen", "exec"] {
        let status = fs::read_to_string(daemon.path(name)).expect(name);
        assert_eq!(field(&status, "SigBlk"), "0000000000000000", "{name}");
        // The C library's posix_spawn ignores the two signals that it keeps for itself.
        let ignored = u64::from_str_radix(&field(&status, "SigIgn"), 16).expect("hexadecimal");
        let own = if name == "exec" { 0 } else { 0b11 << 31 };
        assert_eq!(ignored & !own, 0, "{name}: {ignored:x}");
        // A unit of `ulimit -c` has 512 bytes.
        assert!(status.ends_with(&format!("\n300\n{}\n", soft / 512)), "{name}: {status}");
    }
    for pid in all(&daemon) {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
        let line = |name| limits.lines().find(|line| line.starts_with(name)).expect("limit");
        let words: Vec<_> = line("Max core file size").split_whitespace().collect();
        let process = processes::look(pid);
        let own = hard.min(1).to_string();
        assert_eq!(words[4..6], [&*own, &*shown(hard)], "{process:?}");
        let words: Vec<_> = line("Max open files").split_whitespace().collect();
        assert_eq!(words[3..5], ["4000", "4000"], "{process:?}");
    }
}

#[test]
fn shell_functions_are_luas_own_otherwise() {
    let daemon = Daemon::start(
        "assert(os.execute() == true)
         local ok, how, code = os.execute('exit 3')
         assert(ok == nil and how == 'exit' and code == 3)
         ok, how, code = os.execute('kill -9 $$')
         assert(ok == nil and how == 'signal' and code == 9)
         assert(os.execute('true', 'surplus'), 'surplus')
         local pipe = io.popen('echo one; echo two', 'r')
         assert(io.type(pipe) == 'file' and pipe:read('a') == 'one\\ntwo\\n')
         ok, how, code = pipe:close()
         assert(ok == true and how == 'exit' and code == 0)
         pipe = io.popen('cat > $DIR/written', 'w')
         pipe:write('text')
         assert(pipe:close())
         ok, how = pcall(os.execute, {})
         assert(not ok and how:find('execute', 1, true), how)
         ok, how = pcall(io.popen, 'true', 'x')
         assert(not ok and how:find('mode', 1, true), how)
         os.execute('(yes; echo $? > $DIR/yes) | head -n 1 > /dev/null')
         -- The shell counts lines of the command only.
         pipe = io.popen('no-such-program 2>&1')
         local complaint = pipe:read('a')
         assert(complaint:find(' 1: no-such-program', 1, true), complaint)
         assert(not pipe:close())
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    assert_eq!(fs::read_to_string(daemon.path("written")).expect("written"), "text");
    // A program that writes to a closed pipe ends by SIGPIPE (128 + 13), as in a terminal.
    assert_eq!(fs::read_to_string(daemon.path("yes")).expect("yes"), "141\n");
}
