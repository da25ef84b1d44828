//! `qrelay try`: what a script decides about a mail that nobody has sent.

use std::fs::Permissions;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};

use crate::harness::control_group::Group;
use crate::harness::daemon::{QRELAY, command};
use crate::harness::{Daemon, Mail, Site, eventually, submit};

const MESSAGE: &str = "From: a@example.com\nSubject: one\nX-Spam: yes\n\nHello.\n";

/// The result of the command: exit status, standard output without its last line, which is the
/// time, and standard error.
#[derive(Debug)]
struct Tried {
    code: Option<i32>,
    shown: String,
    told: String,
}

impl From<Output> for Tried {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut shown = text(&output.stdout);
        if let Some(at) = shown.find("time             ") {
            let time = shown.split_off(at);
            assert!(time.ends_with(" ms\n") && time.lines().count() == 1, "{time}");
        }
        Self { code: output.status.code(), shown, told: text(&output.stderr) }
    }
}

fn try_command(site: &Site, arguments: &[&str]) -> Command {
    let mut try_command = command(QRELAY);
    try_command.args(["try", "--config"]).arg(site.path("config.lua")).args(arguments);
    try_command
}

/// Runs a command with a message on standard input.
fn give(command: &mut Command, message: &str) -> Tried {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("runs");
    // Writing fails if the command refuses its arguments, because it doesn't read stdin then.
    let _ = child.stdin.take().expect("piped").write_all(message.as_bytes());
    child.wait_with_output().expect("ends").into()
}

/// Tries a mail from a@example.com to b@example.org, with these arguments before the envelope.
fn attempt(site: &Site, arguments: &[&str]) -> Tried {
    let envelope = ["--sender", "a@example.com", "b@example.org"];
    give(&mut try_command(site, &[arguments, &envelope].concat()), MESSAGE)
}

/// Returns a script whose only handler has this body.
fn handler(body: &str) -> Site {
    Site::with(&format!("qmqp_listen('$DIR/in', function(m)\n{body}\nend)"))
}

#[test]
fn every_action_is_shown_and_none_is_carried_out() {
    let site = Site::new();
    let hop = UnixListener::bind(site.path("next")).expect("a next hop");
    hop.set_nonblocking(true).expect("non-blocking");
    let (next, touched) = (site.path("next"), site.path("touched"));
    let (next, touched) = (next.display(), touched.display());
    for (body, expected) in [
        (
            format!("return m:connect('{next}')"),
            format!("action           connect\nnext hop         {next}\n"),
        ),
        (
            "return m:connect({'192.0.2.1', 'relay.invalid:99'},
               {order='random', timeout=30, connect_timeout=0.5})"
                .into(),
            "action           connect\n\
             next hop         192.0.2.1:628\n\
             next hop         relay.invalid:99\n\
             order            random\n\
             timeout          30 s\n\
             connect timeout  0.5 s\n"
                .into(),
        ),
        (
            format!("return m:exec('/bin/touch', '{touched}', 'a b', {{timeout=5}})"),
            format!(
                "action           exec\n\
                 program          /bin/touch {touched} 'a b'\n\
                 timeout          5 s\n"
            ),
        ),
        (
            format!("return m:exec_raw('/bin/touch', '{touched}', {{env={{A='b'}}}})"),
            format!(
                "action           exec_raw\n\
                 program          /bin/touch {touched}\n\
                 environment      A=b\n"
            ),
        ),
        (
            "return m:discard()".into(),
            "action           discard\nanswer           K discarded\n".into(),
        ),
        (
            "return m:reject('no\\n')".into(),
            "action           reject\nanswer           D no?\n".into(),
        ),
        ("return m:defer()".into(), "action           defer\nanswer           Z deferred\n".into()),
    ] {
        site.configure(&format!("qmqp_listen('$DIR/in', function(m) {body} end)"));
        let tried = attempt(&site, &[]);
        assert_eq!((tried.code, &tried.shown), (Some(0), &expected), "{body}: {}", tried.told);
        assert_eq!(tried.told, "", "{body}");
    }
    assert!(!site.path("touched").exists() && !site.path("in").exists());
    assert_eq!(hop.accept().expect_err("nobody").kind(), ErrorKind::WouldBlock);
}

#[test]
fn changes_and_log_are_shown() {
    let site = handler(
        "m.account = 'shop42'
         m.sender = ''
         m.recipients = {'x@example.net', 'y@example.net'}
         m:insert_header('X-One', '1')
         m:insert_header('X-Two', '2')
         m:remove_header('x-spam')
         print('seen', m.size) log.warn('a word', {count=3})
         return m:discard()",
    );
    let expected = "action           discard\n\
        answer           K discarded\n\
        account          shop42\n\
        sender           ''\n\
        recipient        x@example.net\n\
        recipient        y@example.net\n\
        inserted         X-Two: 2\n\
        inserted         X-One: 1\n\
        removed          X-Spam: yes\n\
        log              info: seen\\t53\n\
        log              warn: a word count=3\n";
    assert_eq!(attempt(&site, &[]).shown, expected);
    let json = attempt(&site, &["--json"]).shown;
    for part in [
        "\"action\": \"discard\"",
        "\"answer\": {\n    \"status\": \"K\",\n    \"text\": \"discarded\"\n  }",
        "\"account\": \"shop42\"",
        "\"sender\": \"\"",
        "\"recipients\": [\n    \"x@example.net\",\n    \"y@example.net\"\n  ]",
        "\"changed\": [\n    \"sender\",\n    \"recipients\"\n  ]",
        "\"inserted\": [\n    \"X-Two: 2\",\n    \"X-One: 1\"\n  ]",
        "\"removed\": [\n    \"X-Spam: yes\"\n  ]",
        "\"fields\": {\n        \"count\": \"3\"\n      }",
        "\"seconds\": ",
    ] {
        assert!(json.contains(part), "{part} in\n{json}");
    }
    assert!(json.starts_with("{\n") && json.ends_with("\n}\n"), "{json}");
}

#[test]
fn an_expectation_is_compared_with_the_action() {
    let site = handler("if m.uid == 7 then return m:reject() end return m:exec_raw('/bin/true')");
    for (uid, expected, code) in [
        ("7", "reject", 0),
        ("7", "connect", 1),
        ("8", "exec_raw", 0),
        ("8", "exec", 1),
        ("8", "nonsense", 64),
    ] {
        let tried = attempt(&site, &["--uid", uid, "--expect", expected]);
        assert_eq!(tried.code, Some(code), "{uid} {expected}: {}", tried.told);
        if code == 1 {
            let told = format!("expected {expected}, but the action is");
            assert!(tried.told.contains(&told) && tried.shown.contains("action "), "{tried:?}");
        }
    }
}

#[test]
fn a_handler_that_fails_is_78_and_says_where() {
    for (body, answer, error) in [
        ("local x\nx()", "Z script failed", "config.lua:3: attempt to call a nil value"),
        ("m:reject()", "Z script failed", "config.lua:1: the handler returned nil"),
        ("while true do end", "Z script failed", "config.lua:2: stopped: the handler ran longer"),
        ("pcall(function() while true do end end)", "Z script failed", "config.lua:2: stopped"),
        ("sleep(60)", "Z relay failed", "config.lua:1: the mail's time was over"),
        (
            "string.find(('a'):rep(30), ('a*'):rep(30) .. 'b')",
            "Z try again later",
            "config.lua:1: the handler has held Lua for 0.4 s",
        ),
        ("\npcall(os.exit, 0) return m:discard()", "Z try again later", "config.lua:3: os.exit"),
        ("os.exit(3)", "Z try again later", "config.lua:2: os.exit"),
        ("return m.nothing", "Z script failed", "config.lua:2: "),
    ] {
        let site = Site::with(&format!(
            "qmqp_listen('$DIR/in', function(m)\n{body}\nend)
             settings{{handler_timeout=0.2, hang_timeout=0.4, relay_timeout=0.5}}"
        ));
        for expectation in [&[][..], &["--expect", "discard"]] {
            let tried = attempt(&site, expectation);
            assert_eq!(tried.code, Some(78), "{body}: {tried:?}");
            let shown =
                format!("action           none\nanswer           {answer}\nerror            ");
            assert!(tried.shown.starts_with(&shown), "{body}: {}", tried.shown);
            assert!(tried.shown.contains(error), "{body}: {}", tried.shown);
        }
        assert!(attempt(&site, &["--json"]).shown.contains(error), "{body}");
    }
}

#[test]
fn a_script_that_cannot_be_loaded() {
    for (script, code, told) in [
        ("print('before')\nerror('no')", 78, "qrelay: log: info: before\nqrelay: "),
        ("\nerror('no')", 78, "config.lua:2: no"),
        ("-- nothing", 78, "no listener"),
        ("qmqp_listen('$DIR/in', print)\nos.exit(0)", 78, "config.lua:2: os.exit"),
        ("qmqp_listen('$DIR/in', print) while true do end", 78, "--boot-timeout"),
        ("assert(pg:new('host=$DIR'):execute('SELECT 1'))", 75, "config.lua:1: "),
        ("qmqp_listen('$DIR/in', print) settings{user='no-such-user'}", 78, "no such user"),
    ] {
        let site = Site::with(script);
        let tried = attempt(&site, &["--boot-timeout", "0.5"]);
        assert_eq!((tried.code, &*tried.shown), (Some(code), ""), "{script}: {}", tried.told);
        assert!(tried.told.contains(told), "{script}: {}", tried.told);
    }
    // The limit is for loading only.
    let site = handler("sleep(0.7) return m:discard()");
    assert_eq!(attempt(&site, &["--boot-timeout", "0.5"]).code, Some(0));
}

#[test]
fn wrong_usage_is_64() {
    let site = Site::with(
        "qmqp_listen('$DIR/in', function(m) return m:discard() end)
         qmqp_listen('127.0.0.1:6289', function(m) return m:discard() end)",
    );
    let in_path = site.path("in");
    let path = in_path.to_str().expect("UTF-8");
    let known = format!("no listener has the address '/x'; there is {path}, 127.0.0.1:6289");
    for (arguments, told) in [
        (&["--listener", "/x"][..], &*known),
        (&["--peer", "192.0.2.1"], "are processes of this host"),
        (&["--listener", "127.0.0.1:6289", "--uid", "7"], "a client of 127.0.0.1:6289 has an IP"),
        (&["--peer", "192.0.2.1", "--uid", "7"], "cannot be used with"),
        (&["--peer", "relay.example"], "invalid"),
        (&["--uid", "no-such-user"], "there is no such user"),
        (&["--gid", "no-such-group"], "there is no such group"),
        (&["--pid", "0"], "0"),
        (&["--cgroup", "a/b"], "expected a path"),
        (&["not an address"], "the recipient 'not an address' is not a mail address"),
    ] {
        let tried = attempt(&site, arguments);
        assert_eq!((tried.code, &*tried.shown), (Some(64), ""), "{arguments:?}: {}", tried.told);
        assert!(tried.told.contains(told), "{arguments:?}: {}", tried.told);
    }
    for envelope in [&["--sender", "nobody", "b@x"][..], &["--sender", "a@x"], &["b@x"]] {
        let tried = give(&mut try_command(&site, envelope), MESSAGE);
        assert_eq!((tried.code, &*tried.shown), (Some(64), ""), "{envelope:?}: {}", tried.told);
    }
}

/// Returns the text of an answer.
fn answer(tried: &Tried) -> &str {
    let line = tried.shown.lines().find_map(|line| line.strip_prefix("answer           "));
    line.unwrap_or_else(|| panic!("no answer: {tried:?}"))
}

/// What a handler sees of its client.
const CLIENT: &str = "
    local known, group = pcall(function() return m.cgroup end)
    local path = known and group and group.path or tostring(group)
    return m:discard(table.concat({tostring(m.uid), tostring(m.gid), tostring(m.pid), m.peer,
      m.listener, path, m.size, m.sender, #m.recipients, m:header('subject')}, ' '))";

#[test]
fn the_handler_sees_what_it_sees_in_the_daemon() {
    let daemon = Daemon::start(&format!("qmqp_listen('$DIR/in', function(m) {CLIENT} end)"));
    let mut mail = Mail::new("").from("a@example.com").to(&["b@example.org"]);
    mail.message = MESSAGE.into();
    let real = submit(daemon.path("in"), &mail).to_string();
    let own = std::process::id().to_string();
    let tried = attempt(daemon.site(), &["--uid", "root", "--pid", &own]);
    assert_eq!(answer(&tried).replacen("K ", "K", 1), real);
    assert!(real.starts_with("K0 0 "), "{real}");
}

#[test]
fn clients_of_every_kind() {
    let site = Site::with(&format!(
        "local function handler(m) {CLIENT} end
         qmqp_listen('$DIR/in', handler)
         qmqp_listen('127.0.0.1:6289', handler, {{allow={{'127.0.0.0/8', '192.0.2.0/24'}}}})
         qmqp_listen(systemd['web'], handler)"
    ));
    let in_path = site.path("in");
    let path = in_path.to_str().expect("UTF-8");
    let rest = "53 a@example.com 1 one";
    let group = Group::new();
    let (inside, outside) = (group.path(), "/no-such-group/inside");
    let local =
        |numbers: &str, listener: &str, path: &str| format!("K {numbers} {listener} {path} {rest}");
    for (arguments, expected) in [
        (
            &["--uid", "4000000000", "--pid", "1", "--cgroup", &inside][..],
            local("4000000000 4000000000 1 PID=1 UID=4000000000", path, &inside),
        ),
        (
            &["--uid", "nobody", "--gid", "root", "--pid", "1", "--cgroup", outside],
            local("65534 0 1 PID=1 UID=65534", path, outside),
        ),
        (
            &["--uid", "7", "--gid", "8", "--pid", "4194303"],
            format!("K 7 8 4194303 PID=4194303 UID=7 {path} "),
        ),
        (
            &["--listener", "127.0.0.1:6289", "--peer", "192.0.2.7"],
            local("nil nil nil 192.0.2.7", "127.0.0.1:6289", "nil"),
        ),
        (
            &["--listener", "127.0.0.1:6289"],
            local("nil nil nil 127.0.0.1", "127.0.0.1:6289", "nil"),
        ),
        (&["--listener", "127.0.0.1:6289", "--peer", "192.0.3.7"], "Z access denied".into()),
        (
            &["--listener", "systemd['web']", "--peer", "2001:db8::1"],
            local("nil nil nil 2001:db8::1", "systemd['web']", "nil"),
        ),
    ] {
        let tried = attempt(&site, arguments);
        assert_eq!(tried.code, Some(0), "{arguments:?}: {}", tried.told);
        assert!(answer(&tried).starts_with(&expected), "{arguments:?}: {}", tried.shown);
    }
    let gone = attempt(&site, &["--pid", "4194303"]);
    assert!(answer(&gone).contains("the client has exited"), "{}", gone.shown);
}

/// The group of a process that is named by its number is that process' own.
#[test]
fn the_control_group_of_another_process() {
    let group = Group::new();
    let mut process = group.command().args(["/bin/sleep", "60"]).spawn().expect("a process");
    let pid = process.id().to_string();
    eventually("the process in the group", || {
        let joined = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        joined.contains(&group.path()).then_some(())
    });
    let site = handler("return m:discard(m.cgroup.path .. ' ' .. m.pid)");
    let tried = attempt(&site, &["--pid", &pid]);
    process.kill().expect("kill");
    process.wait().expect("wait");
    assert_eq!(answer(&tried), format!("K {} {pid}", group.path()), "{tried:?}");
}

#[test]
fn attributes_of_a_control_group() {
    let group = Group::new();
    let inner = group.below("inner");
    group.set("user.account", "shop42");
    let site = handler(
        "local all = {}
         local g = m.cgroup
         while g do all[#all + 1] = g.path .. '=' .. tostring(g.xattr.account) g = g.parent end
         return m:discard(table.concat(all, ' '))",
    );
    let (path, above) = (inner.path(), group.path());
    let tried = attempt(&site, &["--cgroup", &path]);
    assert_eq!(answer(&tried), format!("K {path}=nil {above}=shop42"));
    let tried = attempt(&site, &["--cgroup", "/no/such/group"]);
    assert_eq!(answer(&tried), "K /no/such/group=nil /no/such=nil /no=nil");
}

#[test]
fn mails_that_no_handler_sees() {
    let site = Site::with(
        "settings{max_hops=2}
         qmqp_listen('$DIR/in', function(m) return m:discard() end, {max_size=1024})",
    );
    let hops = "Received: x\n".repeat(3) + "\n";
    for (message, answer, cause) in [
        (&*hops, "D too many hops", "3 Received fields, max_hops=2"),
        (&"x".repeat(2000), "D message too large", "2000 bytes, max_size=1024, 1 recipients"),
    ] {
        let envelope = ["--expect", "discard", "--sender", "a@x", "b@x"];
        let tried = give(&mut try_command(&site, &envelope), message);
        assert_eq!(
            tried.shown,
            format!("action           none\nanswer           {answer}\ncause            {cause}\n")
        );
        assert_eq!(tried.code, Some(1));
        assert!(tried.told.contains("expected discard, but there is no action"), "{}", tried.told);
        let tried = give(&mut try_command(&site, &envelope[2..]), message);
        assert_eq!(tried.code, Some(0), "{}", tried.told);
    }
}

#[test]
fn addresses_without_a_domain() {
    let site = Site::with(
        "settings{default_domain='example.com'}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let tried = give(&mut try_command(&site, &["--sender", "root", "b@x", "bob"]), MESSAGE);
    assert_eq!(
        tried.shown,
        "action           discard\n\
         answer           K discarded\n\
         sender           root@example.com\n\
         recipient        b@x\n\
         recipient        bob@example.com\n"
    );
}

#[test]
fn libraries_work_as_in_a_worker() {
    let site = Site::with(
        "local d = shared:new('counts')
         d:set('a', 'of the script')
         local ticks = 0
         every(0.01, function() ticks = ticks + 1 d:incr('ticks', 1) end)
         qmqp_listen('$DIR/in', function(m)
           while ticks < 3 do sleep(0.01) end
           assert(d:get('ticks') >= 3 and d:incr('b', 2) == 2)
           local pk, sk = sodium.crypto_sign_keypair()
           assert(jwt.verify(jwt.sign(sk, {}, {sub=m.id}), pk).sub == m.id)
           assert(not pcall(qmqp_listen, '/x', print))
           return m:discard(d:get('a'))
         end)",
    );
    let tried = attempt(&site, &[]);
    assert_eq!(tried.shown, "action           discard\nanswer           K of the script\n");
}

/// The handler has the rights that it has in the daemon.
#[test]
fn the_handler_is_the_user_and_in_the_sandbox() {
    let site = Site::with(
        "settings{user='nobody'}
         qmqp_listen('$DIR/in', function(m)
           local user = io.popen('id -u'):read()
           local killed = os.execute('kill -0 ' .. m.pid .. ' 2>/dev/null')
           local new = io.popen('grep NoNewPrivs /proc/self/status'):read('a'):match('%d')
           return m:discard(user .. ' ' .. tostring(killed) .. ' ' .. new)
         end)",
    );
    std::fs::set_permissions(site.dir(), Permissions::from_mode(0o755)).expect("mode");
    let tried = attempt(&site, &["--pid", &std::process::id().to_string()]);
    assert_eq!(answer(&tried), "K 65534 nil 1", "{tried:?}");
    // Somebody who can't become another user may try the script all the same.
    let mut as_nobody = command("setpriv");
    as_nobody.args(["--reuid", "65533", "--regid", "65533", "--clear-groups", QRELAY, "try"]);
    as_nobody.arg("--config").arg(site.path("config.lua"));
    let tried = give(as_nobody.args(["--sender", "a@x", "b@x"]), MESSAGE);
    assert!(answer(&tried).starts_with("K 65533 "), "{tried:?}");
}
