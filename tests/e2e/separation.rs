//! The separation of the processes: what a program in a worker can do to the supervisor, the zygote
//! and other workers, as root, as another user, and without the sandbox.
//!
//! Contract: the expectations follow from the version of Landlock's ABI, which the test's own
//! program asks the kernel for. Without scoped signals (ABI 6) a worker can signal processes of its
//! user, and without Landlock it can also trace other workers.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::harness::daemon::{Launch, NOBODY, send_as_nobody};
use crate::harness::processes::{self, look};
use crate::harness::{Client, Daemon, Mail, Sink, Site, Target, eventually, run, submit};

const ATTACK: &str = include_str!("separation/attack.c");

/// Landlock can be used from this version of its ABI on.
const TRACE_ABI: u32 = 2;
/// Landlock scopes signals from this version of its ABI on.
const SIGNAL_ABI: u32 = 6;

/// Compiles the attacker into the directory, and returns the version of Landlock's ABI.
fn build(site: &Site) -> u32 {
    let source = site.path("attack.c");
    fs::write(&source, ATTACK).expect("source");
    let compiled = Command::new("cc")
        .args(["-Wall", "-Werror", "-o"])
        .args([&site.path("attack"), &source])
        .output()
        .expect("cc runs");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let abi = Command::new(site.path("attack")).arg("abi").output().expect("attack runs");
    String::from_utf8_lossy(&abi.stdout).trim().parse().expect("a number")
}

/// Returns a directory in which every user may write, with a script whose handler runs the shell
/// command in the file `command` by `os.execute`.
fn site(settings: &str) -> Site {
    let site = Site::with(&format!(
        "settings{{workers=2, {settings}}}
         qmqp_listen('$DIR/in', function(m)
           local file = io.open('$DIR/command')
           local command = file:read('a')
           file:close()
           return m:discard(tostring(os.execute(command)))
         end)"
    ));
    open(site.dir(), 0o1777);
    site
}

fn open(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
}

/// Runs an attack in a worker, against these processes.
#[track_caller]
fn attack(daemon: &Daemon, kind: &str, targets: &[i32]) -> Attacked {
    let targets: Vec<_> = targets.iter().map(i32::to_string).collect();
    let dir = daemon.site().dir().display();
    let result = daemon.path(kind);
    let command = format!("exec {dir}/attack {kind} {} >{dir}/{kind}", targets.join(" "));
    fs::write(daemon.path("command"), command).expect("command");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Ktrue", "{}", daemon.text());
    let text = fs::read_to_string(result).expect("result");
    let mut lines = text.lines();
    let own = lines.next().and_then(|line| line.strip_prefix("self ")?.parse().ok());
    let kind = kind.to_owned();
    let mut attacked = Attacked { kind, own: own.expect("a pid"), outcomes: BTreeMap::new() };
    for line in lines {
        let words: Vec<_> = line.split(' ').collect();
        let [pid, attempt, outcome] = words[..] else { panic!("{line}") };
        let outcomes = attacked.outcomes.entry(pid.parse().expect("a pid")).or_default();
        outcomes.push((attempt.to_owned(), outcome.to_owned()));
    }
    attacked
}

/// The outcome of an attack.
#[derive(Debug)]
struct Attacked {
    /// `trace`, `signal` or `limit`.
    kind: String,
    /// The worker that ran the attack.
    own: i32,
    /// Each attempt and its outcome, by process.
    outcomes: BTreeMap<i32, Vec<(String, String)>>,
}

impl Attacked {
    /// Checks that every attempt on the process was denied, and that there were as many.
    #[track_caller]
    fn assert_denied(&self, pid: i32) {
        let outcomes = &self.outcomes[&pid];
        let environment = usize::from(status(self.own, "Uid:")[0] != "0");
        let attempts = match &*self.kind {
            "trace" => 8 + environment,
            "limit" => 8,
            _ => 6,
        };
        assert_eq!(outcomes.len(), attempts, "{outcomes:?}");
        for (attempt, outcome) in outcomes {
            assert!(matches!(&**outcome, "EPERM" | "EACCES"), "{attempt} of {pid}: {outcome}");
        }
    }
}

/// Attacks the supervisor, the zygotes and the other worker, and checks that everything is denied
/// that the kernel can deny, and that the log says the level.
#[track_caller]
fn assert_separated(daemon: &Daemon, abi: u32, supervisor_is_another_user: bool) {
    let level = match abi {
        SIGNAL_ABI.. => "sandbox=full",
        TRACE_ABI.. => "sandbox=\"ptrace only\"",
        _ => "sandbox=none",
    };
    assert!(daemon.wait_for_log(" ready ").contains(level), "{}", daemon.text());
    let lacks = daemon.count_log("the sandbox is not complete");
    assert_eq!(lacks, usize::from(abi < SIGNAL_ABI), "{}", daemon.text());

    let workers = daemon.wait_for_workers(2, &[]);
    let zygotes = daemon.zygotes();
    let targets = [&[daemon.pid()], &zygotes[..], &workers[..]].concat();
    let traced = attack(daemon, "trace", &targets);
    traced.assert_denied(daemon.pid());
    let others = targets.iter().filter(|&&pid| pid != traced.own && pid != daemon.pid());
    for &pid in others.filter(|_| abi >= TRACE_ABI) {
        traced.assert_denied(pid);
    }
    let starved = attack(daemon, "limit", &targets);
    for &pid in targets.iter().filter(|&&pid| pid != starved.own) {
        starved.assert_denied(pid);
    }
    if abi < SIGNAL_ABI && !supervisor_is_another_user {
        return;
    }
    let hit = if abi < SIGNAL_ABI { &targets[..1] } else { &targets[..] };
    let signalled = attack(daemon, "signal", hit);
    for &pid in hit.iter().filter(|&&pid| pid != signalled.own) {
        signalled.assert_denied(pid);
        let state = look(pid).expect("alive").state;
        assert!(matches!(state, 'S' | 'R' | 'D'), "{pid} is in state {state}");
    }
    assert_eq!(daemon.workers(), workers);
    assert_eq!(daemon.zygotes(), zygotes);
}

/// Runs the daemon as nobody from its start.
fn as_nobody(launch: Launch) -> Launch {
    as_user(NOBODY, launch)
}

/// Runs the daemon as this user, and as the group of the same number, from its start.
fn as_user(id: u32, launch: Launch) -> Launch {
    let id = id.to_string();
    launch.through(&["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups"])
}

/// Returns the values of a line of /proc/PID/status.
fn status(pid: i32, name: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("process is there");
    let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
    line.split_whitespace().map(str::to_owned).collect()
}

fn ids(pid: i32) -> (Vec<String>, Vec<String>, Vec<String>) {
    (status(pid, "Uid:"), status(pid, "Gid:"), status(pid, "Groups:"))
}

#[test]
fn a_worker_of_the_same_user_can_not_hit_others() {
    let site = site("");
    let abi = build(&site);
    let daemon = as_nobody(site.launch()).ready();
    assert_eq!(status(daemon.pid(), "Uid:"), vec![NOBODY.to_string(); 4]);
    assert_separated(&daemon, abi, false);
    assert!(daemon.reload(), "{}", daemon.text());
    daemon.wait_for_log(" ready generation=2 ");
    let lacks = daemon.count_log("the sandbox is not complete");
    assert_eq!(lacks, usize::from(abi < SIGNAL_ABI), "once per start");
    assert_eq!(daemon.count_log("run as root"), 0);
}

/// Passes as many descriptors as the kernel allows to itself, by several processes at once.
const PASSES: &str = "
import array, os, resource, socket, sys, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
with open(sys.argv[2], 'w') as worker: worker.write(str(os.getppid()))
for _ in range(3): os.fork()
descriptors = array.array('i', [0] * 253)
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
pairs = []
try:
    while True:
        pairs.append(socket.socketpair())
        pairs[-1][0].setblocking(False)
        try:
            while True: pairs[-1][0].sendmsg([b'x'], rights)
        except BlockingIOError: pass
except OSError as error:
    with open(sys.argv[1], 'a') as full: full.write(os.strerror(error.errno) + '\\n')
time.sleep(600)";

/// The kernel counts the descriptors that a user's processes are passing.
#[test]
fn a_program_that_passes_descriptors_shuts_nobody_out() {
    let site = Site::with(
        "settings{workers=2}
         qmqp_listen('$DIR/in', function(m)
           if m.sender ~= 'attack@x' then return m:discard() end
           return m:exec('/usr/bin/python3', '$DIR/passes.py', '$DIR/full', '$DIR/worker',
                         {timeout=600})
         end)",
    );
    fs::write(site.path("passes.py"), PASSES).expect("script");
    open(site.dir(), 0o1777);
    // What other tests' daemons pass is counted for another user.
    let daemon = as_user(NOBODY - 2, site.launch()).ready();
    let workers = daemon.wait_for_workers(2, &[]);
    let mut client = Client::connect(daemon.path("in"));
    client.send(&Mail::new("attack").from("attack@x").request());
    let full = eventually("all processes are refused", || {
        let full = fs::read_to_string(daemon.path("full")).ok()?;
        (full.lines().count() == 8).then_some(full)
    });
    assert!(full.lines().all(|line| line.contains("Too many references")), "{full}");
    for _ in 0..20 {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded", "{}", daemon.text());
    }
    // A worker gets its channels in the same way.
    let hostile = fs::read_to_string(daemon.path("worker")).expect("a pid");
    let (hostile, others): (Vec<_>, Vec<_>) =
        workers.into_iter().partition(|pid| pid.to_string() == hostile);
    processes::signal(others[0], Signal::SIGKILL);
    assert!(daemon.wait_for_workers(2, &others).contains(&hostile[0]));
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded", "{}", daemon.text());
}

#[test]
fn a_worker_of_another_user_can_not_hit_others() {
    let site = site("user='nobody'");
    let abi = build(&site);
    let daemon = site.start();
    assert_separated(&daemon, abi, true);
}

#[test]
fn a_worker_of_root_can_not_hit_others() {
    let site = site("");
    let abi = build(&site);
    let daemon = site.start();
    // Without Landlock nothing stops root.
    if abi >= TRACE_ABI {
        assert_separated(&daemon, abi, false);
    }
    assert!(daemon.reload(), "{}", daemon.text());
    daemon.wait_for_log(" ready generation=2 ");
    assert_eq!(daemon.count_log("zygote, workers and programs run as root"), 1, "once per start");
}

#[test]
fn without_the_sandbox_the_attack_works_but_not_on_the_supervisors_memory() {
    let site = site("sandbox=false");
    build(&site);
    let daemon = as_nobody(site.launch()).ready();
    assert!(daemon.wait_for_log(" ready ").contains("sandbox=none"), "{}", daemon.text());
    assert_eq!(daemon.count_log("the sandbox is off"), 1);
    let workers = daemon.wait_for_workers(2, &[]);
    let targets = [&[daemon.pid()], &workers[..]].concat();
    let traced = attack(&daemon, "trace", &targets);
    traced.assert_denied(daemon.pid());
    let other = workers.iter().find(|&&pid| pid != traced.own).expect("another worker");
    let succeeded = traced.outcomes[other].iter().filter(|(_, outcome)| outcome == "OK").count();
    assert!(succeeded > 5, "{traced:?}");
    assert_eq!(status(traced.own, "NoNewPrivs:"), ["0"]);
    assert!(daemon.reload(), "{}", daemon.text());
    daemon.wait_for_log(" ready generation=2 ");
    assert_eq!(daemon.count_log("the sandbox is off"), 2, "once per load");
}

#[test]
fn a_standby_that_takes_over_forks_workers_in_domains_of_their_own() {
    let site = site("");
    let abi = build(&site);
    let daemon = site.start();
    // A chain of standbys longer than the 16 domains that the kernel allows inside each other.
    let takeovers = || daemon.count_log("its standby takes over");
    let standbys = || daemon.count_log("standby lost");
    let mut lost = Vec::new();
    while takeovers() < 18 {
        let zygotes = eventually("a zygote and a standby", || {
            let zygotes = daemon.zygotes();
            let new = zygotes.iter().all(|pid| !lost.contains(pid));
            (zygotes.len() == 2 && new).then_some(zygotes)
        });
        // The standby was forked later, so it has the higher number, unless the numbers have begun
        // anew. A standby that is killed instead of its zygote shows that.
        let zygote = zygotes[standbys() % 2];
        lost.push(zygote);
        processes::signal(zygote, Signal::SIGKILL);
        eventually("the line", || (takeovers() + standbys() >= lost.len()).then_some(()));
    }
    let before = daemon.wait_for_workers(2, &[]);
    before.iter().for_each(|&pid| processes::signal(pid, Signal::SIGKILL));
    let workers = daemon.wait_for_workers(2, &before);
    let traced = attack(&daemon, "trace", &workers);
    let other = workers.iter().find(|&&pid| pid != traced.own).expect("another worker");
    if abi >= TRACE_ABI {
        traced.assert_denied(*other);
    }
}

#[test]
fn everything_that_a_script_does_works_in_the_sandbox() {
    let abstract_name = format!("qrelay-e2e-separation-{}", std::process::id());
    let site = Site::with(&format!(
        "qmqp_listen('$DIR/in', function(m)
           local what = m.sender:match('^[^@]+')
           if what == 'abstract' then return m:connect('@{abstract_name}') end
           if what == 'exec' then
             return m:exec('/bin/sh', '-c', 'cat >/dev/null; printf 5:Kexec,')
           end
           if what == 'raw' then return m:exec_raw('/bin/sh', '-c', 'echo raw') end
           if what == 'late' then
             return m:exec_raw('/bin/sh', '-c', 'echo $$ >$1/pid; sleep 1000 & wait', 'sh', '$DIR',
               {{timeout=0.3}})
           end
           if what == 'kill' then
             return m:exec_raw('/bin/sh', '-c', 'sleep 1000 & kill $! && echo killed')
           end
           if what == 'popen' then
             local pipe = io.popen('echo popen')
             local line = pipe:read('l')
             pipe:close()
             return m:discard(line)
           end
           if what == 'file' then
             local file = io.open('$DIR/new', 'w')
             file:write('x')
             file:close()
             os.execute('mkdir -p $DIR/other')
             return m:discard(tostring(os.rename('$DIR/new', '$DIR/other/new')))
           end
           if what == 'cgroup' then return m:discard(m.cgroup and 'cgroup' or 'none') end
         end)"
    ));
    let _sink = Sink::answering(Target::Abstract(abstract_name), "Kabstract");
    let daemon = site.start();
    for (what, answer) in [
        ("abstract", "Kabstract"),
        ("exec", "Kexec"),
        ("raw", "Kraw"),
        ("late", "Ztimeout"),
        ("kill", "Kkilled"),
        ("popen", "Kpopen"),
        ("file", "Ktrue"),
    ] {
        let told = submit(daemon.path("in"), &Mail::new("x").from(&format!("{what}@x")));
        assert_eq!(told, answer, "{what}: {}", daemon.text());
    }
    // The program whose time was over is gone, so its worker could signal its group.
    let pid: i32 =
        fs::read_to_string(daemon.path("pid")).expect("pid").trim().parse().expect("pid");
    assert!(look(pid).is_none_or(|process| process.state == 'Z'));
    let told = submit(daemon.path("in"), &Mail::new("x").from("cgroup@x"));
    assert!(told == "Kcgroup" || told == "Knone", "{told}");
}

#[test]
fn a_dead_workers_program_is_ended_by_the_supervisor() {
    for settings in ["user='nobody'", ""] {
        let site = Site::with(&format!(
            "settings{{workers=1, {settings}}}
             qmqp_listen('$DIR/in', function(m)
               return m:exec_raw('/bin/sh', '-c', 'echo $$ >$1/pid; exec sleep 1000', 'sh', '$DIR')
             end)"
        ));
        open(site.dir(), 0o1777);
        let daemon = site.start();
        let mut client = Client::connect(daemon.path("in"));
        client.send(&Mail::new("x").request());
        let pid: i32 = eventually("a program", || {
            fs::read_to_string(daemon.path("pid")).ok()?.trim().parse().ok()
        });
        daemon.workers().iter().for_each(|&pid| processes::signal(pid, Signal::SIGKILL));
        assert_eq!(client.outcome(), "Ztry again later", "{settings}");
        assert!(look(pid).is_none_or(|process| process.state == 'Z'), "{settings}");
    }
}

#[test]
fn zygotes_end_with_the_supervisor() {
    for settings in ["user='nobody'", ""] {
        let site = site(settings);
        let mut daemon = site.start();
        let zygotes = eventually("a zygote and a standby", || {
            let zygotes = daemon.zygotes();
            (zygotes.len() == 2).then_some(zygotes)
        });
        daemon.signal(Signal::SIGKILL);
        daemon.wait_exit();
        eventually("the zygotes' end", || {
            zygotes.iter().all(|&pid| look(pid).is_none_or(|p| p.state == 'Z')).then_some(())
        });
    }
}

#[test]
fn the_settings_change_the_user_after_the_script_and_the_option_before() {
    let script = |settings: &str| {
        format!(
            "assert(io.open('$DIR/secret'))
             settings{{workers=1, {settings}}}
             qmqp_listen('$DIR/in', function(m)
               local id = io.popen('id -u; id -g; id -G; grep -c ^CapPrm:.0*$ /proc/self/status')
               local text = id:read('a'):gsub('\\n', ' ')
               id:close()
               return m:discard(text .. tostring(io.open('$DIR/secret')))
             end)"
        )
    };
    let secret = |site: &Site| {
        fs::write(site.path("secret"), "x").expect("secret");
        open(&site.path("secret"), 0o600);
    };
    for user in ["'nobody'", "65534"] {
        let site = Site::with(&script(&format!("user={user}, group='daemon'")));
        secret(&site);
        let daemon = site.start();
        let told = submit(daemon.path("in"), &Mail::new("x")).to_string();
        assert!(told.starts_with("K65534 1 1 1 nil"), "{told}");
        let own = [NOBODY.to_string(), NOBODY.to_string(), NOBODY.to_string(), NOBODY.to_string()];
        let group = vec!["1".to_owned(); 4];
        for pid in [daemon.workers(), daemon.zygotes()].concat() {
            let (users, groups, all) = ids(pid);
            assert_eq!((users, groups), (own.to_vec(), group.clone()));
            assert_eq!(all, ["1"]);
        }
        let line = daemon.wait_for_log("the supervisor keeps root's user id");
        assert!(line.contains("CAP_NET_BIND_SERVICE") && !line.contains("SYS_ADMIN"), "{line}");
        let kept = u64::from_str_radix(&status(daemon.pid(), "CapEff:")[0], 16).expect("a mask");
        assert!(kept.count_ones() <= 6 && kept >> 10 & 1 == 1, "{kept:x}");
        // The next zygote begins as root again, and reads the secret again.
        assert!(daemon.reload(), "{}", daemon.text());
        daemon.wait_for_log(" ready generation=2 ");
        assert_eq!(daemon.count_log("run as root"), 0);
    }
    let site = Site::with(&script(""));
    secret(&site);
    let mut daemon = site.launch().arg("--user").arg("nobody").spawn();
    assert_eq!(daemon.wait_exit().code(), Some(78), "{}", daemon.text());
    daemon.wait_for_log("config.lua:1: ");

    let site = Site::with(&script("user='nobody'"));
    secret(&site);
    open(&site.path("secret"), 0o644);
    let daemon = site.launch().arg("--user=nobody").ready();
    assert!(daemon.wait_for_log(" ready ").contains("user=65534"), "{}", daemon.text());
    let told = submit(daemon.path("in"), &Mail::new("x")).to_string();
    assert!(told.starts_with("K65534 65534 65534 1 file"), "{told}");
    let output = send_as_nobody(&daemon.path("in"), "a@example.com");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_reload_changes_the_user_also_without_new_privileges() {
    let launch = site("user='nobody'").launch();
    let daemon = launch.through(&["setpriv", "--no-new-privs"]).ready();
    let kept = daemon.wait_for_log("the supervisor keeps root's user id");
    assert!(kept.contains("CAP_SETGID") && kept.contains("CAP_SETUID"), "{kept}");
    let before = daemon.wait_for_workers(2, &[]);
    assert!(daemon.reload(), "{}", daemon.text());
    let id = NOBODY.to_string();
    for pid in daemon.wait_for_workers(2, &before) {
        assert_eq!(status(pid, "Uid:"), vec![id.clone(); 4]);
        assert_eq!(status(pid, "CapPrm:"), ["0000000000000000"]);
    }
}

#[test]
fn workers_have_the_users_supplementary_groups() {
    // Debian's package of PostgreSQL puts its user into a second group.
    let expected = Command::new("id").args(["-G", "postgres"]).output().expect("id").stdout;
    let expected = String::from_utf8(expected).expect("UTF-8");
    let mut expected: Vec<_> = expected.split_whitespace().map(str::to_owned).collect();
    expected.sort();
    let daemon = site("user='postgres'").start();
    for pid in daemon.workers() {
        let mut groups = status(pid, "Groups:");
        groups.sort();
        assert_eq!(groups, expected);
    }
    assert!(expected.len() > 1, "{expected:?}");
}

#[test]
fn accounts_that_cannot_be_used_are_configuration_errors() {
    for (settings, message) in [
        ("user='no-such-user'", "user 'no-such-user': there is no such user"),
        ("user='nobody', group='no-such'", "group 'no-such': there is no such group"),
        ("user='root'", "user 'root' is root"),
        ("group='daemon'", "group needs user"),
        ("user={}", "expected a string"),
        ("sandbox=0", "expected true or false"),
    ] {
        let site = site(settings);
        let config = site.path("config.lua");
        let config = config.to_str().expect("UTF-8");
        let output = run(&["check", "--config", config]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(78) && text.contains(message), "{settings}: {text}");
        let mut daemon = site.launch().spawn();
        assert_eq!(daemon.wait_exit().code(), Some(78), "{settings}");
        daemon.wait_for_log(message);
    }
    let site = site("user='daemon'");
    let mut daemon = as_nobody(site.launch()).spawn();
    assert_eq!(daemon.wait_exit().code(), Some(78));
    daemon.wait_for_log("only root can change to it");
    // The own account is no change.
    let site = self::site("user='nobody', group='nogroup'");
    let daemon = as_nobody(site.launch()).ready();
    daemon.wait_for_log(" ready ");
}

#[test]
fn a_set_id_program_that_fails_names_the_setting() {
    let config = "settings{workers=1, sandbox=SANDBOX}
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'denied@x' then
             return m:exec_raw('/bin/sh', '-c', 'echo postdrop: Permission denied; exit 75')
           end
           if m.sender == 'not@x' then return m:exec_raw('$DIR/in') end
           if m.sender == 'plain@x' then return m:exec_raw('/bin/false') end
           return m:exec_raw('$DIR/false')
         end)";
    for (sandbox, hinted) in [("true", true), ("false", false)] {
        let site = Site::with(&config.replace("SANDBOX", sandbox));
        fs::copy("/bin/false", site.path("false")).expect("copy");
        open(&site.path("false"), 0o2755);
        let daemon = site.start();
        for (sender, line, hint) in [
            ("denied@x", "program complained", hinted),
            ("not@x", "program can't be started", hinted),
            ("setgid@x", "program complained", hinted),
            ("plain@x", "program complained", false),
        ] {
            let before = daemon.count_log(line);
            let told = submit(daemon.path("in"), &Mail::new("x").from(sender));
            assert_eq!(told.status(), 'Z', "{sender}");
            let line = eventually("the line", || {
                let text = daemon.text();
                let mut lines = text.lines().filter(|found| found.contains(line));
                lines.nth(before).map(str::to_owned)
            });
            let has = line.contains("sandbox=false in settings{}") && line.contains("NoNewPriv");
            assert_eq!(has, hint, "{sandbox} {sender}: {line}");
        }
    }
}
