//! The control group of the client, tested with real groups that have real extended attributes.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType};

use crate::harness::control_group::{Group, mount};
use crate::harness::daemon::QRELAY;
use crate::harness::mail::split;
use crate::harness::processes::{self, signal};
use crate::harness::{Client, Daemon, Mail, PATIENCE, Site, Target, eventually, submit};

/// Starts a daemon whose handler runs `body` with the mail as `m`, and discards the mail with the
/// returned text.
fn handler(body: &str) -> Daemon {
    Daemon::start(&format!(
        "settings{{workers=1}}
         kept = {{}}
         local function handler(m)
           return m:discard((function() {body} end)())
         end
         qmqp_listen('$DIR/in', handler)"
    ))
}

#[test]
fn path_and_parents() {
    let group = Group::new();
    let inner = group.below("inner.scope");
    let daemon = handler(
        "local c = m.cgroup
         assert(c.parent.path == c.path:match('^(.*)/[^/]*$') and c.parent.parent == nil)
         assert(rawequal(c, m.cgroup) and rawequal(m.cgroup, m.cgroup))
         assert(c == m.cgroup and c ~= c.parent and c.parent == m.cgroup.parent)
         assert(c ~= c.path and c.xattr == m.cgroup.xattr and c.xattr ~= c.parent.xattr)
         assert(tostring(c) == c.path and type(c) == 'userdata')
         assert(c.nothing == nil and c[1] == nil)
         assert(not pcall(function() c.path = '/' end))
         m:insert_header('X-Cgroup', c)
         return c.path",
    );
    assert_eq!(inner.submit(&daemon.path("in")), inner.path());
}

#[test]
fn attributes() {
    let group = Group::new();
    let inner = group.below("inner");
    inner.set("user.site", "example.org");
    inner.set("trusted.binary", "0x00ff0a");
    inner.set("user.a.b", "dotted");
    inner.set("user.empty", "");
    group.set("user.site", "of the parent");
    let daemon = handler(
        "local x = m.cgroup.xattr
         assert(x.site == 'example.org' and x['user.site'] == x.site)
         assert(x['trusted.binary'] == '\\0\\xff\\n')
         assert(x['user.a.b'] == 'dotted' and x['a.b'] == nil)
         assert(x.empty == '')
         assert(x.none == nil and x[''] == nil and x['a\\0b'] == nil and x[1] == nil)
         assert(x[true] == nil and x[('x'):rep(300)] == nil)
         assert(not pcall(function() x.site = 'y' end))
         assert(m.cgroup.parent.xattr.site == 'of the parent')
         local all = {}
         for name, value in pairs(x) do all[#all + 1] = name .. '=' .. #value end
         table.sort(all)
         return table.concat(all, ' ')",
    );
    let told = inner.submit(&daemon.path("in"));
    assert_eq!(told, "trusted.binary=3 user.a.b=6 user.empty=0 user.site=11");
}

#[test]
fn a_large_value() {
    let group = Group::new();
    group.set("user.large", &"x".repeat(3000));
    let daemon = handler("return #m.cgroup.xattr.large");
    assert_eq!(group.submit(&daemon.path("in")), "3000");
}

#[test]
fn objects_of_an_answered_mail_are_stale_and_hold_nothing() {
    let group = Group::new();
    let inner = group.below("inner");
    inner.set("user.a", "1");
    let daemon = handler(
        "local c = m.cgroup
         for _, old in ipairs(kept) do
           for _, use in ipairs{
             function() return old.path end, function() return old.parent end,
             function() return old.xattr end, function() return kept.xattr.a end,
             function() for _ in pairs(kept.xattr) do end end,
             function() return kept.mail.cgroup end,
           } do
             local ok, message = pcall(use)
             assert(not ok and message:find('Stale object', 1, true), message)
           end
           assert(tostring(old) == c.path and type(old) == 'userdata' and old == c)
         end
         kept[#kept + 1], kept.mail, kept.xattr = c, m, c.xattr
         return #kept .. c.xattr.a .. c.parent.path:sub(1, 1)",
    );
    for count in 1..=3 {
        assert_eq!(inner.submit(&daemon.path("in")), format!("{count}1/"));
    }
    let worker = daemon.workers()[0];
    let held = || -> Vec<_> {
        let mut all = processes::descriptors(worker);
        all.retain(|(_, link)| {
            let group = link.starts_with(mount()) && *link != mount();
            group || link.to_string_lossy().contains("pidfd")
        });
        all
    };
    // The worker releases a mail only after its client has the answer.
    eventually("the worker holds no control group and no process", || {
        held().is_empty().then_some(())
    });
}

#[test]
fn a_client_that_has_exited_has_no_cgroup() {
    let group = Group::new();
    let daemon = handler(
        "print('waiting')
         local deadline = os.time() + 10
         while io.open('$DIR/gone') == nil and os.time() < deadline do sleep(0.01) end
         pcall(function() return m.cgroup end)
         local ok, message = pcall(function() return m.cgroup end)
         print('asked: ' .. tostring(ok) .. ' ' .. tostring(message))",
    );
    let mut command = group.command();
    command.arg(QRELAY).arg("send").arg("--to").arg(daemon.path("in"));
    command.args(["--sender", "a@example.com", "b@example.org"]);
    let mut client = command.stdin(Stdio::null()).spawn().expect("send");
    daemon.wait_for_log("waiting");
    client.kill().expect("kill");
    client.wait().expect("wait");
    fs::write(daemon.path("gone"), "").expect("write");
    let line = daemon.wait_for_log("asked:");
    assert!(line.contains("false") && line.contains("the client has exited"), "{line}");
}

#[test]
fn a_client_from_the_network_has_no_cgroup() {
    let port = Target::free_port();
    let daemon = Daemon::start(&format!(
        "qmqp_listen('{port}', function(m) return m:discard(tostring(m.cgroup)) end)"
    ));
    assert_eq!(submit(port, &Mail::new("x")), "Knil");
    drop(daemon);
}

#[test]
fn the_group_is_that_of_the_process_that_connected() {
    // This process connects in its own group. Another process in another group must not change the
    // result.
    let group = Group::new();
    let daemon = handler("return m.cgroup.path");
    let mut command = group.command();
    command.args(["/bin/sleep", "1000"]);
    let mut other = command.spawn().expect("spawn");
    let own = fs::read_to_string("/proc/self/cgroup").expect("cgroup");
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).expect("version 2");
    let mut client = Client::connect(daemon.path("in"));
    assert_eq!(client.send(&Mail::new("x").request()).outcome().to_string(), format!("K{own}"));
    signal(other.id().cast_signed(), Signal::SIGKILL);
    other.wait().expect("wait");
}

#[test]
fn a_group_of_another_namespace_has_a_path_but_no_attributes() {
    let (ours, theirs) = (Group::new(), Group::new());
    theirs.set("user.site", "secret");
    let site = Site::with(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m)
           local c = m.cgroup
           assert(c.xattr.site == nil)
           for _ in pairs(c.xattr) do error('an attribute') end
           assert(c.parent == nil)
           return m:discard(c.path)
         end)",
    );
    let script = format!("echo $$ >{} && exec unshare --cgroup \"$@\"", ours.procs());
    let mut daemon = site.launch().through(&["/bin/sh", "-c", &script, "sh"]).ready();
    assert_eq!(theirs.submit(&daemon.path("in")), format!("/..{}", theirs.path()));
    daemon.stop();
}

/// A handler that answers with what it learns about the client's group.
const ASK: &str = "
    settings{workers=1}
    qmqp_listen('$DIR/in', function(m)
      local ok, cgroup = pcall(function() return m.cgroup end)
      local seen, site = pcall(function() return cgroup.xattr.site end)
      return m:discard(('%s %s %s %s %s'):format(m.pid, ok, cgroup, seen, site))
    end)";

/// Returns a command that runs a shell script in the pid and mount namespaces of a process.
fn inside(process: i32, script: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["-t", &process.to_string(), "--pid", "--mount", "sh", "-c", script, "sh"]);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Runs a command and returns its output.
#[track_caller]
fn output(mut command: Command) -> String {
    let output = command.stderr(Stdio::inherit()).output().expect("runs");
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// A daemon in a pid namespace of its own, in which no other process takes pids.
struct Numbers {
    daemon: Daemon,
    /// Pid of the supervisor, seen from outside of its namespace.
    supervisor: i32,
}

impl Numbers {
    fn start(script: &str) -> Self {
        let wrapper = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
        let daemon = Site::with(script).launch().through(&wrapper).ready();
        let supervisor = processes::children_named(daemon.pid(), "qrelay")[0];
        Self { daemon, supervisor }
    }

    fn path(&self, socket: &str) -> String {
        self.daemon.path(socket).display().to_string()
    }

    /// Submits a mail from a client in `group`, and returns the text of the reply.
    fn submit(&self, group: &Group, sender: &str) -> String {
        let send = "echo 0 >\"$1\" && exec \"$2\" send --to \"$3\" --sender \"$4\" b@x.example";
        output(inside(self.supervisor, send, &[&group.procs(), QRELAY, &self.path("in"), sender]))
    }

    /// Connects a client in `group` to a socket of the daemon. Returns the connection, the client's
    /// pid within the namespace, and the process to wait for.
    fn connect(&self, group: &Group, socket: &str) -> (UnixStream, String, Child) {
        let flags = SockFlag::SOCK_CLOEXEC;
        let client = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .expect("socket");
        let connect = "echo 0 >\"$1\" && echo $$ && exec python3 -c '
import socket, sys, time
client = socket.socket(fileno=0)
client.connect(sys.argv[1])
print(\"connected\", flush=True)
time.sleep(1000)' \"$2\"";
        let mut connect = inside(self.supervisor, connect, &[&group.procs(), &self.path(socket)]);
        connect.stdin(client.try_clone().expect("dup")).stdout(Stdio::piped());
        let mut process = connect.spawn().expect("nsenter");
        let mut lines = BufReader::new(process.stdout.take().expect("a pipe")).lines();
        let pid = lines.next().expect("a number").expect("text");
        assert_eq!(lines.next().expect("a line").expect("text"), "connected");
        let client = UnixStream::from(client);
        client.set_read_timeout(Some(PATIENCE)).expect("timeout");
        (client, pid, process)
    }

    /// Kills a client, so that its pid becomes free.
    fn end(&self, pid: &str, mut process: Child) {
        output(inside(self.supervisor, "kill -9 $1", &[pid]));
        process.wait().expect("wait");
    }

    /// Starts a command in `group` that gets this pid within the namespace.
    fn again(&self, group: &Group, pid: &str, command: &[&str]) -> Child {
        let script = "echo 0 >\"$1\" && echo $(($2 - 1)) >/proc/sys/kernel/ns_last_pid &&
            shift 2 && { \"$@\" & } && echo $! && wait $!";
        let procs = group.procs();
        let mut arguments = vec![&*procs, pid];
        arguments.extend(command);
        let mut again = inside(self.supervisor, script, &arguments);
        let mut process = again.stdout(Stdio::piped()).spawn().expect("nsenter");
        assert_eq!(line(&mut process), pid, "the kernel gave the process another pid");
        process
    }

    /// Starts a client in `group` that gets this pid and submits a mail.
    fn submit_again(&self, group: &Group, pid: &str, sender: &str) -> Child {
        let to = self.path("in");
        let send = [QRELAY, "send", "--to", &*to, "--sender", sender, "b@x.example"];
        self.again(group, pid, &send)
    }
}

/// Returns the reply to a mail: status letter and text.
fn reply(mut client: &UnixStream) -> String {
    let mut reply = Vec::new();
    client.read_to_end(&mut reply).expect("reply");
    let (reply, _) = split(&reply).expect("a netstring");
    String::from_utf8_lossy(reply).into_owned()
}

/// The client ends, and another process gets its pid, before the client's mail is read.
#[test]
fn a_process_with_a_reused_pid_is_not_the_client() {
    let (ours, theirs) = (Group::new(), Group::new());
    theirs.set("user.site", "somebody else's");
    let numbers = Numbers::start(ASK);

    // The daemon knows a living client, also in this pid namespace.
    let told = numbers.submit(&theirs, "a@x.example");
    let (_, rest) = told.split_once(' ').expect("words");
    assert_eq!(rest, format!("true {} true somebody else's", theirs.path()));

    let (mut client, pid, process) = numbers.connect(&ours, "in");
    numbers.end(&pid, process);
    let mut other = numbers.again(&theirs, &pid, &["cat", "/proc/self/cgroup"]);
    let seen = read_all(&mut other);
    assert!(seen.contains(&format!("0::{}", theirs.path())), "{seen}");
    let other = numbers.again(&theirs, &pid, &["sleep", "1000"]);

    client.write_all(&Mail::new("x").request()).expect("request");
    let reply = reply(&client);
    assert!(reply.starts_with(&format!("K{pid} false ")), "{reply}");
    assert!(reply.contains("the client has exited") && !reply.contains("else"), "{reply}");
    numbers.end(&pid, other);
}

/// A handler that answers with the client's group and the mail's id. The mail of one sender stays
/// under way until the file `go` appears.
const KEEP: &str = "
    settings{workers=1}
    local function handler(m)
      local ok, path = pcall(function() return m.cgroup.path end)
      if m.sender == 'keep@x.example' then
        print('keeps ' .. path)
        while io.open('$DIR/go') == nil do sleep(0.01) end
      end
      return m:discard(('%s %s %s #%s'):format(m.pid, ok, path, m.id))
    end
    qmqp_listen('$DIR/in', handler)
    qmqp_listen('$DIR/other', handler)";

/// A client has exited while its mail is under way, and the next client gets the same pid.
#[test]
fn the_next_client_with_a_reused_pid_has_its_own_group() {
    let (ours, theirs) = (Group::new(), Group::new());
    let numbers = Numbers::start(KEEP);
    let (mut client, pid, process) = numbers.connect(&ours, "in");
    client.write_all(&Mail::new("x").from("keep@x.example").request()).expect("request");
    numbers.daemon.wait_for_log(&format!("keeps {}", ours.path()));
    numbers.end(&pid, process);
    let mut next = numbers.submit_again(&theirs, &pid, "a@x.example");
    let told = read_all(&mut next);
    assert!(told.starts_with(&format!("{pid} true {} #", theirs.path())), "{told}");
    fs::write(numbers.daemon.path("go"), "").expect("write");
    let told = reply(&client);
    assert!(told.starts_with(&format!("K{pid} true {} #", ours.path())), "{told}");
}

/// A client has connected and exited. The next client with the same pid has a mail under way when
/// the request of the first client comes.
#[test]
fn an_exited_client_does_not_get_the_group_of_a_later_one() {
    let (ours, theirs) = (Group::new(), Group::new());
    let numbers = Numbers::start(KEEP);
    let (mut client, pid, process) = numbers.connect(&ours, "in");
    numbers.end(&pid, process);
    let mut next = numbers.submit_again(&theirs, &pid, "keep@x.example");
    numbers.daemon.wait_for_log(&format!("keeps {}", theirs.path()));
    client.write_all(&Mail::new("x").request()).expect("request");
    let told = reply(&client);
    assert!(told.starts_with(&format!("K{pid} false ")), "{told}");
    assert!(told.contains("the client has exited"), "{told}");
    fs::write(numbers.daemon.path("go"), "").expect("write");
    let others = read_all(&mut next);
    assert!(others.starts_with(&format!("{pid} true {} #", theirs.path())), "{others}");
    assert!(job(&told) < job(&others), "the order is another one: {told}, {others}");
}

/// A client has connected to another socket and exited. Its connection is accepted after that of
/// the next client with the same pid, whose mail is under way. Without SO_PEERPIDFD (Linux 6.5) the
/// two can't be told apart.
#[test]
fn an_exited_client_of_another_socket_does_not_get_the_group_of_a_later_one() {
    let (ours, theirs) = (Group::new(), Group::new());
    let numbers = Numbers::start(KEEP);
    // The supervisor looks first at the socket that was the first to have a connection.
    signal(numbers.supervisor, Signal::SIGSTOP);
    let first = UnixStream::connect(numbers.daemon.path("in")).expect("connect");
    let (mut client, pid, process) = numbers.connect(&ours, "other");
    numbers.end(&pid, process);
    let send = "
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
print('connected', flush=True)
client.sendall(sys.argv[2].encode())
print(client.recv(1000).decode())";
    let to = numbers.path("in");
    let request = Mail::new("x").from("keep@x.example").request();
    let request = String::from_utf8(request).expect("text");
    let mut next = numbers.again(&theirs, &pid, &["python3", "-c", send, &to, &request]);
    assert_eq!(line(&mut next), "connected");
    signal(numbers.supervisor, Signal::SIGCONT);
    numbers.daemon.wait_for_log(&format!("keeps {}", theirs.path()));
    client.write_all(&Mail::new("x").request()).expect("request");
    let told = reply(&client);
    if linux() >= (6, 5) {
        assert!(told.starts_with(&format!("K{pid} false ")), "{told}");
        assert!(told.contains("the client has exited"), "{told}");
    } else {
        assert!(told.starts_with(&format!("K{pid} ")), "{told}");
    }
    fs::write(numbers.daemon.path("go"), "").expect("write");
    let others = read_all(&mut next);
    assert!(others.contains(&format!("K{pid} true {} #", theirs.path())), "{others}");
    assert!(job(&told) > job(&others), "the order is another one: {told}, {others}");
    drop(first);
}

/// Returns the first two numbers of the kernel's version.
fn linux() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("release");
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse().ok()).expect("a number");
    (next(), next())
}

/// Returns the number of the job in an answer of [`KEEP`]: the end of the mail's id.
fn job(told: &str) -> u64 {
    let digits = told.rsplit('-').next().expect("an id").trim_end_matches(['\n', ',']);
    u64::from_str_radix(digits, 16).expect("a number")
}

/// Returns the next line that a process prints. The bytes after the line stay unread.
fn line(process: &mut Child) -> String {
    let stdout = process.stdout.as_mut().expect("a pipe");
    let mut text = String::new();
    while !text.ends_with('\n') {
        let mut byte = [0];
        stdout.read_exact(&mut byte).expect("a line");
        text.push(byte[0].into());
    }
    text.trim_end().to_owned()
}

/// Waits until a process has ended, and returns the rest of what it printed.
fn read_all(process: &mut Child) -> String {
    let mut text = String::new();
    process.stdout.take().expect("a pipe").read_to_string(&mut text).expect("text");
    process.wait().expect("wait");
    text
}

/// Starts a daemon that sees no cgroup2 file system, and checks that a client has a path but no
/// attributes. The shell script `hide` changes the daemon's mount namespace; its first argument is
/// the client's group.
#[track_caller]
fn assert_has_path_but_no_attributes(hide: &str) {
    let group = Group::new();
    group.set("user.site", "hidden");
    let script = format!("{hide} && shift && exec \"$@\"");
    let wrapper = ["unshare", "--mount", "sh", "-c", &script, "sh", &group.path()];
    let mut daemon = Site::with(ASK).launch().through(&wrapper).ready();
    let told = group.submit(&daemon.path("in"));
    let (_, rest) = told.split_once(' ').expect("words");
    let expected = format!("true {} false ", group.path());
    assert!(rest.starts_with(&expected), "{told}");
    assert!(rest.contains("no cgroup2 file system is mounted"), "{told}");
    daemon.stop();
}

#[test]
fn without_a_cgroup2_mount_there_are_no_attributes() {
    assert_has_path_but_no_attributes("umount --lazy --all --types cgroup2");
}

/// The file system mounted over cgroup2 is not a group, even if it has a directory of the same
/// name.
#[test]
fn a_covered_cgroup2_mount_gives_no_attributes() {
    assert_has_path_but_no_attributes(
        "for mount in $(findmnt --noheadings --list --types cgroup2 --output TARGET); do
           mount -t tmpfs none \"$mount\" && mkdir -p \"$mount$1\"
         done",
    );
}

#[test]
fn reading_a_cgroup_leaks_no_descriptors() {
    let group = Group::new();
    group.set("user.a", "1");
    let daemon = handler("return m.cgroup.xattr.a .. tostring(m.cgroup.parent)");
    let worker = daemon.workers()[0];
    assert_eq!(group.submit(&daemon.path("in")), "1nil");
    let before = processes::descriptors(worker).len();
    for _ in 0..20 {
        assert_eq!(group.submit(&daemon.path("in")), "1nil");
    }
    eventually("no more descriptors than before", || {
        (processes::descriptors(worker).len() <= before).then_some(())
    });
}

/// A /proc that hides the processes of other users must not make a client look dead.
#[test]
fn a_client_that_proc_hides() {
    for option in ["hidepid=1", "hidepid=2"] {
        let script = format!("mount -t proc -o {option} proc /proc && exec \"$@\"");
        let site = Site::with(
            "settings{workers=1, user='nobody'}
             qmqp_listen('$DIR/in', function(m)
               return m:reject(select(2, pcall(function() return m.cgroup end)))
             end)",
        );
        let wrapper = ["unshare", "--mount", "sh", "-c", &script, "sh"];
        let daemon = site.launch().through(&wrapper).ready();
        let told = submit(daemon.path("in"), &Mail::new("x")).to_string();
        assert!(told.contains("/proc hides the client's process"), "{option}: {told}");
    }
}
