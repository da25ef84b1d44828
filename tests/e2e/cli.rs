//! The command line: `check`, `send`, `sink`, `--version`, `--help`, and wrong usage.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStderr, Output, Stdio};

use nix::sys::signal::Signal;

use crate::harness::daemon::{QRELAY, command, is_socket};
use crate::harness::processes::signal;
use crate::harness::sink::Behaviour;
use crate::harness::{Client, Daemon, Mail, Sink, Site, Target, run, submit};

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn version_and_help() {
    let version = run(&["--version"]);
    assert_eq!(stdout(&version).trim(), concat!("qrelay ", env!("CARGO_PKG_VERSION")));
    let help = run(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    for word in ["check", "try", "send", "sink", "--config", "--log-level", "Example"] {
        assert!(stdout(&help).contains(word), "{word} in\n{}", stdout(&help));
    }
    for command in ["check", "try", "send", "sink"] {
        let help = run(&[command, "--help"]);
        assert_eq!(help.status.code(), Some(0), "{command}");
        assert!(stdout(&help).contains("Usage"), "{command}:\n{}", stdout(&help));
    }
}

#[test]
fn wrong_usage_is_64() {
    for args in [&["--no-such-option"][..], &["no-such-command"], &["try"], &["send"], &["sink"]] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(64), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("Usage"), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn check_prints_listeners_and_settings_and_binds_nothing() {
    let site = Site::with(
        "settings{workers=3, client_timeout=2.5}
         local function handler(m) return m:discard() end
         qmqp_listen('$DIR/in', handler, {mode='0640'})
         qmqp_listen('@qrelay-check', handler)
         qmqp_listen('127.0.0.1:6289', handler)",
    );
    let output = run(&["check", "--config", text(&site.path("config.lua"))]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let shown = stdout(&output);
    for part in [text(&site.path("in")), "@qrelay-check", "127.0.0.1:6289", "workers", "2.5"] {
        assert!(shown.contains(part), "{part} in\n{shown}");
    }
    assert!(!is_socket(&site.path("in")));
}

#[test]
fn check_says_first_whether_the_script_is_sound() {
    let site = Site::with(
        "settings{workers=3, client_timeout=2.5, shared_memory=2^25}
         log_server = '192.0.2.9'
         local function handler(m) return m:discard() end
         qmqp_listen('/run/in', handler, {mode='0660', owner='root', group=65533})
         qmqp_listen('/run/all', handler)
         qmqp_listen('127.0.0.1:6289', handler, {max_size=2^20})
         qmqp_listen(systemd['web'], handler, {allow={'192.0.2.0/24'}})",
    );
    let expected = "config.lua is sound: 4 listeners\n\
        \n\
        listener /run/in\n\
        \x20 mode 0660, owner root, group 65533\n\
        \x20 may connect: user root, group 65533\n\
        listener /run/all\n\
        \x20 mode 0666, owner the daemon's user, group the daemon's group\n\
        \x20 may connect: every local user\n\
        listener 127.0.0.1:6289\n\
        \x20 may connect: loopback addresses only\n\
        \x20 max_size 1 MiB\n\
        listener systemd['web']\n\
        \x20 may connect: 192.0.2.0/24\n\
        \n\
        log_server = 192.0.2.9:5479\n\
        workers = 3 (default N)\n\
        client_timeout = 2.5 s (default 5 s)\n\
        shared_memory = 32 MiB (default 16 MiB)\n\
        19 settings have their defaults (--all shows them)\n";
    for named in [&["config.lua"][..], &["--config", "config.lua"]] {
        let mut check = command(QRELAY);
        let output = check.arg("check").args(named).current_dir(site.dir()).output();
        let shown = stdout(&output.expect("runs"));
        // The default is the number of processors.
        let default = shown.split("workers = 3 (default ").nth(1).and_then(|s| s.split(')').next());
        let default = format!("(default {})", default.expect("the setting"));
        assert_eq!(shown.replacen(&default, "(default N)", 1), expected);
    }
    let all = stdout(&check(&site).arg("--all").output().expect("runs"));
    for part in ["\nrelay_timeout = 55 s\n", "\nlua_memory_limit = 256 MiB\n", "backlog 1024\n"] {
        assert!(all.contains(part), "{part:?} in\n{all}");
    }
    let both = check(&site).arg("config.lua").output().expect("runs");
    assert_eq!(both.status.code(), Some(64), "{}", stderr(&both));
}

#[test]
fn check_warns_of_places_where_no_socket_can_be_made() {
    let site = Site::with(
        "local function handler(m) return m:discard() end
         qmqp_listen('$DIR/missing/in', handler)
         qmqp_listen('$DIR/config.lua', handler)
         qmqp_listen('$DIR/in', handler)",
    );
    let (missing, config) = (site.path("missing"), site.path("config.lua"));
    let output = check(&site).output().expect("runs");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let warnings = |output: &Output| {
        let told = stderr(output);
        let warnings = told.lines().filter_map(|line| line.strip_prefix("qrelay: warning: "));
        warnings.map(str::to_owned).collect::<Vec<_>>()
    };
    let [first, second] = &warnings(&output)[..] else { panic!("{}", stderr(&output)) };
    assert!(first.starts_with(&format!("the directory {} doesn't exist", missing.display())));
    assert!(second.starts_with(&format!("{} is there already", config.display())), "{second}");
    let mut as_nobody = command("setpriv");
    as_nobody.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", QRELAY, "check"]);
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(site.dir(), mode).expect("mode");
    let output = as_nobody.arg(&config).output().expect("runs");
    let told = format!("the directory {} can't be written by the user", site.dir().display());
    assert_eq!(warnings(&output).iter().filter(|line| line.starts_with(&told)).count(), 2);
}

#[test]
fn check_shows_file_and_line_of_an_error() {
    let site = Site::with("local x = 1\nqmqp_listen(x)\n");
    let output = command(QRELAY)
        .args(["check", "--config", "config.lua"])
        .current_dir(site.dir())
        .output()
        .expect("runs");
    assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
    assert!(stderr(&output).contains("config.lua:2:"), "{}", stderr(&output));
}

#[test]
fn relative_config_path() {
    let site = Site::with("qmqp_listen('$DIR/in', function(m) return m:discard('here') end)");
    let mut launch = site.launch();
    let dir = launch.site().dir().to_owned();
    let mut command = command(QRELAY);
    command.args(["--config", "config.lua"]).current_dir(dir);
    *launch.command() = command;
    let daemon = launch.ready();
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Khere");
}

/// Runs `qrelay send` with `message` on stdin.
fn send(args: &[&str], message: &[u8]) -> Output {
    let mut child = command(QRELAY)
        .arg("send")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("runs");
    // Writing fails when the command refuses its arguments, because it doesn't read stdin then.
    let _ = child.stdin.take().expect("piped").write_all(message);
    child.wait_with_output().expect("ends")
}

#[test]
fn send_delivers_and_reports_the_answer() {
    let site = Site::new();
    let message = b"Subject: \xff\x00 binary\r\n\r\n.\r\nno newline at the end";
    for (answer, code) in [("Kfine", 0), ("Znot\x1b[1m now", 75), ("Dnever", 69)] {
        let at = site.path(answer.get(..1).expect("status"));
        let sink = Sink::answering(at.clone(), answer);
        let args = ["--to", text(&at), "--sender", "s@example.com", "a@example.com", "b@x"];
        let output = send(&args, message);
        assert_eq!(output.status.code(), Some(code), "{answer}: {}", stderr(&output));
        assert_eq!(stdout(&output).trim_end(), answer[1..].replace('\x1b', "?"));
        let mut mail = Mail::new("").from("s@example.com").to(&["a@example.com", "b@x"]);
        mail.message = message.to_vec();
        assert_eq!(sink.only(), mail);
    }
}

#[test]
fn send_over_every_kind_of_socket() {
    let site = Site::new();
    let local = Sink::answering(site.path("out"), "Kok");
    let hidden = Sink::answering(Target::unique_abstract(), "Kok");
    let tcp = Sink::tcp(crate::harness::sink::answer(|_| crate::harness::Reply::text("Kok")));
    for sink in [local, hidden, tcp] {
        let to = sink.address().to_string();
        let output = send(&["--to", &to, "--sender", "", "r@example.com"], b"x\n");
        assert_eq!(output.status.code(), Some(0), "{to}: {}", stderr(&output));
        assert_eq!(sink.only().sender, b"");
    }
}

#[test]
fn send_without_an_answer_is_75_with_the_cause() {
    let site = Site::new();
    let behaviours = [
        ("close", Behaviour::Abort(0, Vec::new())),
        ("garbage", Behaviour::Early(b"220 smtp ready\r\n".to_vec())),
        // A `K` before the whole request was read is no promise to rely on.
        ("early", Behaviour::Abort(1, b"3:Kok,".to_vec())),
    ];
    let big = vec![b'x'; 4 << 20];
    for (name, behaviour) in behaviours {
        let _sink = Sink::start(site.path(name), behaviour);
        let at = site.path(name);
        let output = send(&["--to", text(&at), "--sender", "s@x", "r@x"], &big);
        assert_eq!(output.status.code(), Some(75), "{name}: {}", stderr(&output));
        assert!(stderr(&output).contains(text(&at)), "{name}: {}", stderr(&output));
    }
    let nobody = site.path("nobody");
    let output = send(&["--to", text(&nobody), "--sender", "s@x", "r@x"], b"x");
    assert_eq!(output.status.code(), Some(75));
    assert!(stderr(&output).contains("No such file"), "{}", stderr(&output));
}

#[test]
fn send_passes_on_an_early_refusal() {
    let site = Site::new();
    let _sink = Sink::start(site.path("out"), Behaviour::Abort(1, b"5:Dbusy,".to_vec()));
    let out = site.path("out");
    let output = send(&["--to", text(&out), "--sender", "s@x", "r@x"], &vec![b'x'; 4 << 20]);
    assert_eq!(output.status.code(), Some(69), "{}", stderr(&output));
    assert_eq!(stdout(&output).trim_end(), "busy");
}

#[test]
fn send_refuses_what_is_no_address() {
    for (args, told) in [
        (&["--to", "/x", "--sender", "nobody", "r@x"][..], "the sender 'nobody' is not a mail"),
        (&["--to", "/x", "--sender", "s@x", "a b@x"], "the recipient 'a b@x' is not a mail"),
        (&["--to", "/x", "--sender", "s@x"], ""),
        (&["--to", "", "--sender", "s@x", "r@x"], ""),
    ] {
        let output = send(args, b"x");
        assert_eq!(output.status.code(), Some(64), "{args:?}");
        assert!(stderr(&output).contains(told), "{}", stderr(&output));
    }
}

/// A running `qrelay sink`.
struct SinkCommand {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl SinkCommand {
    /// Starts the command and waits until it reports that it listens.
    fn start(args: &[&str]) -> Self {
        let mut child = command(QRELAY)
            .arg("sink")
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("runs");
        let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        stderr.read_line(&mut line).expect("stderr");
        assert!(line.contains("listening"), "{line}");
        Self { child, stderr }
    }

    /// Ends the command by SIGTERM, and returns what it has written to stdout and stderr since its
    /// start.
    fn end(mut self) -> (String, String) {
        signal(self.child.id().cast_signed(), Signal::SIGTERM);
        let mut shown = String::new();
        let stdout = self.child.stdout.take().expect("piped");
        std::io::Read::read_to_string(&mut BufReader::new(stdout), &mut shown).expect("UTF-8");
        let mut log = String::new();
        std::io::Read::read_to_string(&mut self.stderr, &mut log).expect("UTF-8");
        assert_eq!(self.child.wait().expect("ends").code(), Some(0), "{log}");
        (shown, log)
    }
}

impl Drop for SinkCommand {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn sink_shows_mails_harmlessly() {
    let site = Site::new();
    let sink = SinkCommand::start(&["--listen", text(&site.path("out"))]);
    assert_eq!(submit(site.path("out"), &Mail::new("\x1b[31m red\u{9b}0m")).status(), 'K');
    let (shown, _) = sink.end();
    assert!(shown.contains("?[31m red"), "{shown}");
    assert!(shown.contains("sender@example.com") && shown.contains("recipient@example.org"));
    assert!(shown.chars().all(|c| !c.is_control() || c == '\n'), "{shown:?}");
    assert!(!is_socket(&site.path("out")), "socket file left");
}

#[test]
fn sink_stores_each_mail_in_a_file() {
    let site = Site::new();
    std::fs::create_dir(site.path("mails")).expect("directory");
    let (at, mails) = (site.path("out"), site.path("mails"));
    let sink = SinkCommand::start(&["--listen", text(&at), "--output", text(&mails)]);
    for size in [100, 1 << 20] {
        assert_eq!(submit(at.clone(), &Mail::of_size(size)).status(), 'K');
    }
    sink.end();
    let mut sizes: Vec<_> = std::fs::read_dir(mails)
        .expect("directory")
        .map(|entry| std::fs::read(entry.expect("entry").path()).expect("mail"))
        .map(|file| {
            let found = [100, 1 << 20].into_iter().find(|&size| {
                file.ends_with(&Mail::of_size(size).message) && file.len() < size + 200
            });
            found.expect("one of the mails, whole")
        })
        .collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [100, 1 << 20]);
}

#[test]
fn sink_appends_to_a_file() {
    let site = Site::new();
    let file = site.path("mbox");
    for round in 0..2 {
        let at = Target::free_port().to_string();
        let sink = SinkCommand::start(&["--listen", &at, "--output", text(&file)]);
        let to: std::net::SocketAddr = at.parse().expect("address");
        assert_eq!(submit(to, &Mail::new(&format!("round {round}\nFrom here"))).status(), 'K');
        sink.end();
    }
    let stored = std::fs::read_to_string(file).expect("mbox");
    assert!(stored.contains("\nround 0\n>From here\n") && stored.contains("\nround 1\n"));
    assert_eq!(stored.matches("From sender@example.com").count(), 2, "{stored}");
}

#[test]
fn sink_refuses_on_demand_and_stores_nothing_then() {
    let site = Site::new();
    let (at, file) = (site.path("out"), site.path("mbox"));
    for (answer, status) in [("Z", 'Z'), ("D", 'D'), ("K", 'K')] {
        let options = ["--listen", text(&at), "--answer", answer, "--output", text(&file)];
        let sink = SinkCommand::start(&options);
        assert_eq!(submit(at.clone(), &Mail::new("x")).status(), status);
        let (_, log) = sink.end();
        assert!(log.contains("sender@example.com"), "{log}");
        let stored = std::fs::metadata(&file).expect("file").len();
        assert_eq!(stored > 0, status == 'K', "{answer}");
    }
}

#[test]
fn sink_says_z_when_it_cannot_store() {
    let site = Site::new();
    let at = site.path("out");
    let sink = SinkCommand::start(&["--listen", text(&at), "--output", "/dev/full"]);
    assert_eq!(submit(at, &Mail::new("x")).status(), 'Z');
    let (_, log) = sink.end();
    assert!(log.contains("No space left"), "{log}");
}

#[test]
fn sink_judges_as_the_daemon_does() {
    let site = Site::new();
    let at = site.path("out");
    let sink = SinkCommand::start(&["--listen", text(&at)]);
    assert_eq!(Client::connect(at.clone()).send(b"GET /").outcome(), "Dmalformed input");
    assert_eq!(submit(at.clone(), &Mail::new("x").from("nobody")), "Dbad address");
    assert_eq!(Client::connect(at).send(b"10:").half_close().outcome(), "<silence>");
    sink.end();
}

#[test]
fn sink_cannot_listen_where_somebody_does() {
    let site = Site::new();
    let _other = Sink::answering(site.path("out"), "Kok");
    let output = run(&["sink", "--listen", text(&site.path("out"))]);
    assert_eq!(output.status.code(), Some(71));
    assert!(stderr(&output).contains("in use"), "{}", stderr(&output));
    assert!(Target::from(site.path("out")).is_alive());
}

#[test]
fn send_daemon_and_sink_work_together() {
    let site = Site::new();
    let out = site.path("out");
    let sink = SinkCommand::start(&["--listen", text(&out)]);
    let daemon = Daemon::start(&format!(
        "qmqp_listen('$DIR/in', function(m) return m:connect('{}') end)",
        out.display()
    ));
    let to = daemon.path("in");
    let output = send(&["--to", text(&to), "--sender", "s@x", "r@x"], b"Subject: hi\n\nhello\n");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let (shown, _) = sink.end();
    assert!(shown.contains("hello") && shown.contains("Received: from PID="), "{shown}");
}

/// Returns a command that checks a script.
fn check(site: &Site) -> std::process::Command {
    let mut check = command(QRELAY);
    check.args(["check", "--config", text(&site.path("config.lua"))]);
    check
}

const LISTEN: &str = "qmqp_listen('$DIR/in', function(m) return m:discard() end)";

#[test]
fn check_ends_within_the_boot_timeout() {
    for endless in ["while true do end", "sleep(3600)"] {
        let site = Site::with(&format!("{LISTEN}\n{endless}"));
        for before in [true, false] {
            let mut check = command(QRELAY);
            let (timeout, verb) = (["--boot-timeout", "0.3"], ["check"]);
            match before {
                true => check.args(timeout).args(verb),
                false => check.args(verb).args(timeout),
            };
            check.args(["--config", text(&site.path("config.lua"))]);
            let output = check.output().expect("runs");
            assert_eq!(output.status.code(), Some(78), "{endless}: {}", stderr(&output));
            let told = stderr(&output);
            assert!(told.contains("config.lua") && told.contains("--boot-timeout"), "{told}");
            assert_eq!(stdout(&output), "");
        }
    }
}

#[test]
fn check_refuses_a_script_that_calls_os_exit() {
    for leave in ["os.exit(0)", "os.exit()", "pcall(os.exit, 0)"] {
        let site = Site::with(&format!("{LISTEN}\n{leave}"));
        let output = check(&site).output().expect("runs");
        assert_eq!(output.status.code(), Some(78), "{leave}: {}", stderr(&output));
        assert!(stderr(&output).contains("os.exit"), "{leave}: {}", stderr(&output));
        assert!(stderr(&output).contains("config.lua:2"), "{leave}: {}", stderr(&output));
    }
}

#[test]
fn check_takes_the_sockets_of_systemd_as_given() {
    let site = Site::with(
        "qmqp_listen(systemd, function(m) return m:discard() end)
         qmqp_listen(systemd['web'], function(m) return m:discard() end)",
    );
    let output = check(&site).env_remove("LISTEN_FDNAMES").output().expect("runs");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("listener systemd['web']"), "{}", stdout(&output));
    assert!(!stderr(&output).contains("listens on systemd"), "{}", stderr(&output));
    // Under systemd the names are known.
    let output = check(&site).env("LISTEN_FDNAMES", "wob").output().expect("runs");
    assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
    assert!(stderr(&output).contains("no socket named 'web'"), "{}", stderr(&output));
}

#[test]
fn check_survives_a_reader_that_is_gone() {
    let site = Site::with(LISTEN);
    let (reader, writer) = std::io::pipe().expect("pipe");
    drop(reader);
    let output = check(&site).stdout(writer).stderr(Stdio::piped()).output().expect("runs");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let output = check(&site).stdout(full).stderr(Stdio::piped()).output().expect("runs");
    assert_eq!(output.status.code(), Some(71), "{}", stderr(&output));
    assert!(stderr(&output).contains("No space left"), "{}", stderr(&output));
}

#[test]
fn check_by_root_says_what_that_means() {
    let site = Site::with(&format!("settings{{user='nobody'}}\n{LISTEN}"));
    let told = stderr(&check(&site).output().expect("runs"));
    assert!(told.contains("as root") && told.contains("'nobody'"), "{told}");
    assert!(told.contains("files that it makes belong to root"), "{told}");
    let mut as_nobody = command("setpriv");
    as_nobody.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", QRELAY, "check"]);
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(site.dir(), mode).expect("mode");
    let output = as_nobody.args(["--config", text(&site.path("config.lua"))]).output();
    let told = stderr(&output.expect("runs"));
    assert!(!told.contains("as root"), "{told}");
}

#[test]
fn check_warns_of_globals_that_have_no_effect() {
    let site = Site::with(&format!(
        "{LISTEN}
         settings = {{workers=4}}
         max_size = 1 << 20
         reload = 'now'
         drain_timeout = 5
         default_domain = 'example.com'"
    ));
    let output = check(&site).output().expect("runs");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let told = stderr(&output);
    assert_eq!(told.matches("qrelay: warning: ").count(), 5, "{told}");
    for part in [
        "settings was assigned, so it set nothing: call it, as in settings{…}",
        "max_size was set to 1048576 after the last qmqp_listen",
        "reload is 'now', but must be a function",
        "the global variable drain_timeout sets nothing: write settings{drain_timeout = 5}",
        "default_domain sets nothing: write settings{default_domain = 'example.com'}",
    ] {
        assert!(told.contains(part), "{part:?} is not in:\n{told}");
    }
    let quiet = Site::with(&format!("max_size = max_size * 2\n{LISTEN}\nmax_size = nil"));
    let output = check(&quiet).output().expect("runs");
    assert!(!stderr(&output).contains("warn"), "{}", stderr(&output));
}

#[test]
fn sink_writes_to_devices() {
    let site = Site::new();
    for output in ["/dev/null", "/dev/stdout"] {
        let at = site.path("sink");
        let mut sink = command(QRELAY);
        sink.args(["sink", "--listen", text(&at), "--output", output]);
        let mut sink = sink.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runs");
        crate::harness::eventually("the sink", || {
            std::os::unix::net::UnixStream::connect(&at).ok()
        });
        assert_eq!(submit(at.clone(), &Mail::new("x")).status(), 'K', "{output}");
        signal(sink.id().cast_signed(), Signal::SIGTERM);
        sink.wait().expect("ends");
        let _ = std::fs::remove_file(&at);
    }
}

#[test]
fn check_hints_at_what_works_differently_here() {
    let site = Site::with(&format!(
        "{LISTEN}\nlocal n = 0\nfunction count(m)\n  n = n + 1\n  return 'mail ' .. n / 2\nend"
    ));
    let output = check(&site).output().expect("runs");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let told = stderr(&output);
    assert!(told.contains("config.lua:4: n is changed in a function"), "{told}");
    assert!(told.contains("config.lua:5: the result of '/' is a float"), "{told}");
    let quiet = Site::with(LISTEN);
    let told = stderr(&check(&quiet).output().expect("runs"));
    assert!(!told.contains("hint"), "{told}");
}
