//! The control socket and the commands that use it: `status`, `mails`, `reload`, `stop`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Output, Stdio};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::daemon::{NOBODY, QRELAY, Site, command, run};
use crate::harness::{Client, Daemon, Mail, PATIENCE, Sink, eventually, processes, submit};

const DISCARD: &str = "qmqp_listen('$DIR/in', function(m) return m:discard() end)";
const RELAY: &str = "qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)";

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Connects to a daemon's control socket.
fn connect(daemon: &Daemon) -> UnixStream {
    let stream = UnixStream::connect(daemon.path("control-socket")).expect("the control socket");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

/// Sends bytes, and returns all that comes back.
fn exchange(daemon: &Daemon, request: &[u8]) -> String {
    let mut stream = connect(daemon);
    let _ = stream.write_all(request);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// Returns the command lines of a daemon's processes, without the zero bytes.
fn titles(daemon: &Daemon) -> Vec<String> {
    let shown = |process: processes::Process| {
        let line = fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        String::from_utf8_lossy(&line).trim_end_matches('\0').to_owned()
    };
    let mut titles: Vec<_> = daemon.processes().into_iter().map(shown).collect();
    titles.sort();
    titles
}

#[test]
fn a_reload_answers_with_its_outcome() {
    let daemon = Daemon::start(DISCARD);
    let output = daemon.command(&["reload"]);
    assert_eq!((output.status.code(), &*stdout(&output)), (Some(0), "generation 2 serves\n"));
    daemon.site().configure(&format!("{DISCARD}\nlocal x = nil + 1"));
    let output = daemon.command(&["reload"]);
    assert_eq!(output.status.code(), Some(1));
    let expected = "config.lua:2: attempt to perform arithmetic on a nil value";
    assert!(stderr(&output).contains(expected), "{output:?}");
    assert!(stderr(&output).contains("the old configuration serves on"), "{output:?}");
    assert_eq!(submit(daemon.path("in"), &Mail::new("")), "Kdiscarded");
    let status = daemon.status();
    assert_eq!(status["generation"], 2);
    assert_eq!(status["last_load"]["generation"], 3);
    assert!(status["last_load"]["failure"].as_str().expect("text").contains(expected));
    let kinds: Vec<_> = status["incidents"].as_array().expect("list").iter().collect();
    let kinds: Vec<_> = kinds.iter().map(|incident| incident["kind"].as_str()).collect();
    assert_eq!(kinds, [Some("load"), Some("load"), Some("load-failed")]);
}

#[test]
fn reloads_at_the_same_time_all_learn_an_outcome() {
    let daemon = Daemon::start(DISCARD);
    let requests: Vec<_> = (0..8)
        .map(|_| {
            command(QRELAY)
                .arg("reload")
                .arg("--control")
                .arg(daemon.path("control-socket"))
                .stdout(Stdio::piped())
                .spawn()
                .expect("the binary runs")
        })
        .collect();
    for request in requests {
        let output = request.wait_with_output().expect("ended");
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(stdout(&output).ends_with(" serves\n"), "{output:?}");
    }
}

#[test]
fn a_stop_waits_for_the_mails_in_flight() {
    let mut daemon = Daemon::start(RELAY);
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mut client = Client::connect(daemon.path("in"));
    client.send(&Mail::new("").request());
    sink.record().wait_for_count(1);
    let stop = command(QRELAY)
        .arg("stop")
        .arg("--control")
        .arg(daemon.path("control-socket"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    daemon.wait_for_log("told to stop over the control socket");
    assert_eq!(daemon.status()["state"], "stopping");
    assert_eq!(daemon.command(&["status"]).status.code(), Some(1));
    let refused = daemon.command(&["reload"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("the daemon stops"), "{refused:?}");
    gate.open();
    assert_eq!(client.outcome(), "Kok");
    let output = stop.wait_with_output().expect("ended");
    assert_eq!((output.status.code(), &*stdout(&output)), (Some(0), "stopped\n"));
    assert!(stderr(&output).contains("waiting for the mails in flight: 1\n"), "{output:?}");
    assert!(daemon.wait_exit().success());
    assert!(!daemon.path("control-socket").exists());
}

#[test]
fn a_stop_now_gives_mails_up() {
    let mut daemon = Daemon::start(RELAY);
    let (sink, _gate) = Sink::gated(daemon.path("out"));
    let mut client = Client::connect(daemon.path("in"));
    client.send(&Mail::new("").request());
    sink.record().wait_for_count(1);
    let output = daemon.command(&["stop", "--now"]);
    assert_eq!((output.status.code(), &*stdout(&output)), (Some(0), "stopped\n"));
    assert_eq!(client.outcome(), "Ztry again later");
    assert!(daemon.wait_exit().success());
}

#[test]
fn status_shows_what_happens() {
    let daemon = Daemon::start(
        "settings{workers=2}
         local seen = shared:new('seen')
         qmqp_listen('$DIR/in', function(m)
           seen:incr('mails', 1)
           seen:get('nothing')
           if m.sender == 'never@x' then return m:reject('no') end
           if m.sender == 'gone@x' then return m:connect('$DIR/nowhere') end
           return m:connect('$DIR/out')
         end, {mode='0600'})",
    );
    let sink = Sink::answering(daemon.path("out"), "Kok");
    for (sender, status) in [("a@x", 'K'), ("b@x", 'K'), ("never@x", 'D'), ("gone@x", 'Z')] {
        let outcome = submit(daemon.path("in"), &Mail::new("").from(sender));
        assert_eq!(outcome.status(), status, "{outcome}");
    }
    // What a worker tells of its Lua comes with its next pong.
    let status = eventually("the figures", || {
        let status = daemon.status();
        let lua = status["workers"].as_array()?.iter().map(|w| w["lua_bytes"].as_u64());
        (lua.flatten().sum::<u64>() > 0).then_some(status)
    });
    assert_eq!(status["state"], "serving");
    assert_eq!(status["pid"], daemon.pid());
    assert_eq!(status["answers"]["accepted"], 2);
    assert_eq!(status["answers"]["permanent"], 1);
    assert_eq!(status["answers"]["temporary"], 1);
    let listener = &status["listeners"][0];
    assert_eq!(listener["address"].as_str(), daemon.path("in").to_str());
    assert_eq!(listener["mode"], "0600");
    assert_eq!((&listener["backlog"], &listener["held"]), (&Value::from(0), &Value::from(0)));
    assert!(listener["backlog_limit"].as_u64() > Some(0));
    let workers = status["workers"].as_array().expect("list");
    assert_eq!(workers.len(), 2);
    let pids: Vec<_> = workers.iter().filter_map(|worker| worker["pid"].as_i64()).collect();
    let mut expected: Vec<_> = daemon.workers().into_iter().map(i64::from).collect();
    expected.sort_unstable();
    let mut sorted = pids;
    sorted.sort_unstable();
    assert_eq!(sorted, expected);
    let answered = |key: &str| -> u64 {
        workers.iter().filter_map(|worker| worker["answers"][key].as_u64()).sum()
    };
    assert_eq!((answered("accepted"), answered("permanent"), answered("temporary")), (2, 1, 1));
    assert!(workers.iter().all(|worker| worker["rss_bytes"].as_u64() > Some(1 << 20)));
    assert!(workers.iter().all(|worker| worker["threads"].as_u64() > Some(0)));
    let hops = status["next_hops"].as_array().expect("list");
    let hop = |name: &str| hops.iter().find(|hop| hop["next_hop"] == name).expect(name).clone();
    assert_eq!(hop(&sink.address().to_string())["answers"]["accepted"], 2);
    let nowhere = daemon.path("nowhere").display().to_string();
    assert_eq!(hop(&nowhere)["connect_failures"], 1);
    assert!(status["times"]["all"]["p99"].as_f64() > Some(0.0));
    let buckets = status["times"]["all"]["buckets"].as_array().expect("list");
    assert_eq!(buckets.iter().filter_map(Value::as_u64).sum::<u64>(), 4);
    let dictionary = &status["dictionaries"][0];
    assert_eq!(dictionary["dictionary"], "seen");
    assert_eq!((&dictionary["keys"], &dictionary["misses"]), (&1.into(), &4.into()));
    assert!(status["log"]["sent"].as_u64() >= Some(5));
    assert!(status["supervisor"]["rss_bytes"].as_u64() > Some(1 << 20));
    let screen = stdout(&daemon.command(&["status"]));
    for part in ["serving, up ", "answers   K 2, Z 1, D 1, none 0", "0600", "seen", &nowhere[..8]] {
        assert!(screen.contains(part), "no {part} in\n{screen}");
    }
}

#[test]
fn status_is_shown_again_and_again() {
    let mut daemon = Daemon::start(DISCARD);
    let mut watch = command(QRELAY)
        .args(["status", "--watch", "--json", "--control"])
        .arg(daemon.path("control-socket"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
    let mut next = || lines.next().map(|line| line.expect("UTF-8"));
    let mails = |line: Option<String>| {
        let status: Value = serde_json::from_str(&line.expect("a line")).expect("JSON");
        status["answers"]["accepted"].as_u64()
    };
    assert_eq!(mails(next()), Some(0));
    assert_eq!(submit(daemon.path("in"), &Mail::new("")), "Kdiscarded");
    while mails(next()) != Some(1) {}
    daemon.stop();
    assert_eq!(next(), None);
    assert_eq!(watch.wait().expect("ended").code(), Some(3));
}

#[test]
fn mails_in_flight_are_listed() {
    let daemon = Daemon::start(
        "settings{workers=1, worker_connections=2, client_share=1}
         qmqp_listen('$DIR/in', function(m)
           m.account = 'site'
           return m:connect('$DIR/out')
         end)",
    );
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mail = Mail::new("body").from("sender@x").to(&["r1@x", "r2@x"]);
    let mut served = Client::connect(daemon.path("in"));
    served.send(&mail.request());
    sink.record().wait_for_count(1);
    let mut reading = Client::connect(daemon.path("in"));
    reading.send(b"100:");
    let mut queued = Client::connect(daemon.path("in"));
    queued.send(&mail.request());
    let listed = || -> Vec<Value> {
        let text = stdout(&daemon.command(&["mails", "--json"]));
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };
    let mails = eventually("three mails", || {
        let mails = listed();
        let phases: Vec<_> = mails.iter().filter_map(|mail| mail["phase"].as_str()).collect();
        (phases.len() == 3 && phases.contains(&"next_hop")).then_some(mails)
    });
    let of = |phase: &str| mails.iter().find(|mail| mail["phase"] == phase).expect(phase);
    let mail = of("next_hop");
    assert_eq!(mail["from"], "sender@x");
    assert_eq!(mail["to"], serde_json::json!(["r1@x", "r2@x"]));
    assert_eq!((&mail["recipients"], &mail["uid"]), (&2.into(), &0.into()));
    assert_eq!(mail["pid"], std::process::id());
    assert_eq!(mail["next_hop"].as_str(), Some(&*sink.address().to_string()));
    assert_eq!(mail["worker"], 1);
    assert!(mail["age"].as_f64() >= mail["phase_age"].as_f64());
    assert!(of("reading")["worker"] == 1 && of("queued")["worker"].is_null());
    let text = stdout(&daemon.command(&["mails"]));
    assert!(text.contains("<sender@x>") && text.contains("r1@x +1"), "{text}");
    assert!(text.ends_with("3 mails\n") && text.contains(" site "), "{text}");
    gate.open();
    assert_eq!(served.outcome(), "Kok");
    reading.half_close().outcome();
    assert_eq!(queued.outcome(), "Kok");
    eventually("no mail", || listed().is_empty().then_some(()));
    assert_eq!(stdout(&daemon.command(&["mails"])), "no mail is in flight\n");
}

#[test]
fn processes_show_who_they_are() {
    let daemon = Daemon::start(&format!("settings{{workers=2}} {DISCARD}"));
    let expected = |generation, workers: [u32; 2]| {
        let mut titles = vec![
            "qrelay: supervisor".to_owned(),
            format!("qrelay: zygote, generation {generation}"),
            format!("qrelay: standby zygote, generation {generation}"),
        ];
        titles.extend(workers.map(|w| format!("qrelay: worker {w}, generation {generation}")));
        titles.sort();
        titles
    };
    eventually("the titles", || (titles(&daemon) == expected(1, [1, 2])).then_some(()));
    assert!(daemon.reload());
    eventually("the new titles", || (titles(&daemon) == expected(2, [3, 4])).then_some(()));
}

#[test]
fn without_a_daemon_a_command_says_what_to_do() {
    let site = Site::new();
    let nowhere = site.path("control");
    let text = nowhere.to_str().expect("UTF-8");
    let verbs = ["status", "mails", "reload", "stop"];
    for verb in verbs {
        let output = run(&[verb, "--control", text]);
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        assert!(stderr(&output).starts_with("qrelay: qrelay isn't running, or"), "{output:?}");
        assert_eq!(stderr(&output).lines().count(), 1);
    }
    // A socket that a dead daemon has left behind.
    drop(UnixListener::bind(&nowhere).expect("bind"));
    for verb in verbs {
        assert_eq!(run(&[verb, "--control", text]).status.code(), Some(3));
    }
    // Another program listens.
    fs::remove_file(&nowhere).expect("removed");
    let listener = UnixListener::bind(&nowhere).expect("bind");
    let fake = std::thread::spawn(move || {
        let answers = [
            "hello\n",
            "{\"version\":2,\"status\":{}}\n",
            "{\"version\":1,\"error\":{\"message\":\"no such command\"}}\n",
            "",
        ];
        for answer in answers {
            let (stream, _) = listener.accept().expect("accept");
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).expect("a request");
            (&stream).write_all(answer.as_bytes()).expect("an answer");
        }
    });
    for (status, part) in [
        (76, "is no qrelay, or one of another version"),
        (76, "speaks version 2 of the protocol, not 1"),
        (1, "the daemon refuses: no such command"),
        (75, "has closed the connection"),
    ] {
        let output = run(&["status", "--control", text]);
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        assert!(stderr(&output).contains(part), "{output:?}");
    }
    fake.join().expect("four requests");
}

#[test]
fn only_root_and_the_daemons_user_may_ask() {
    let daemon = Daemon::start(DISCARD);
    let mode = fs::metadata(daemon.path("control-socket")).expect("a file").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let output = command(QRELAY)
        .args(["reload", "--control"])
        .arg(daemon.path("control-socket"))
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .expect("the binary runs");
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(stderr(&output).contains("as root or as the daemon's user"), "{output:?}");
}

/// The tests run as root, so programs of the script may connect, too.
#[test]
fn programs_of_the_script_give_no_orders() {
    let daemon = Daemon::start(&format!(
        "local program = [[{QRELAY} stop --control $DIR/control-socket 2>&1; echo; exec 2>&1;
           (setsid {QRELAY} reload --control $DIR/control-socket) ]]
         qmqp_listen('$DIR/in', function(m)
           local pipe = io.popen(program)
           log.info(pipe:read('a'))
           return m:discard()
         end)"
    ));
    assert_eq!(submit(daemon.path("in"), &Mail::new("")), "Kdiscarded");
    let line = daemon.wait_for_log("can't give orders");
    assert_eq!(line.matches("can't give orders").count(), 2, "{line}");
    assert_eq!(daemon.status()["generation"], 1);
}

#[test]
fn nonsense_is_answered_by_an_error() {
    let daemon = Daemon::start(DISCARD);
    for (request, part) in [
        (&b"hello\n"[..], "no JSON object"),
        (b"GET / HTTP/1.1\r\n\r\n", "no JSON object"),
        (b"{\"version\":1,\"command\":\"explode\"}", "unknown variant"),
        (b"{\"version\":9,\"command\":\"status\"}\n", "version 1 of the protocol, not 9"),
        (&[b'['; 200_000], "at most 65536 bytes"),
    ] {
        let answer = exchange(&daemon, request);
        assert!(answer.contains(part), "{answer}");
        assert!(answer.starts_with("{\"version\":1,\"error\":"), "{answer}");
    }
    assert_eq!(exchange(&daemon, b""), "");
    let answer = exchange(&daemon, &b"{\"version\":1,\"command\":\"mails\"}\n".repeat(3));
    assert_eq!(answer.matches("{\"version\":1,\"end\":{\"mails\":0}}\n").count(), 3, "{answer}");
}

/// Clients of all kinds hold up neither mails nor an administrator, and cost little memory.
#[test]
fn a_crowd_at_the_control_socket_harms_nobody() {
    let daemon = Daemon::start(DISCARD);
    let rss = || daemon.status()["supervisor"]["rss_bytes"].as_u64().expect("known");
    let before = rss();
    let crowd = || -> Vec<UnixStream> {
        let attempts = (0..200).map(|number| {
            let stream = UnixStream::connect(daemon.path("control-socket")).ok()?;
            stream.set_nonblocking(true).ok()?;
            let bytes: &[u8] = match number % 4 {
                0 => b"",
                1 => &[b'x'; 65_000],
                2 => b"{\"version\":1,\"command\":\"status\"}\n{\"version\":1,",
                _ => b"{\"version\":1,",
            };
            let _ = (&stream).write(bytes);
            Some(stream)
        });
        attempts.flatten().collect()
    };
    for _ in 0..5 {
        let clients = crowd();
        assert_eq!(submit(daemon.path("in"), &Mail::new("")), "Kdiscarded");
        assert_eq!(daemon.command(&["status"]).status.code(), Some(0));
        drop(clients);
    }
    assert!(rss() < before + (8 << 20), "{} bytes, {before} before", rss());
    assert_eq!(daemon.command(&["reload"]).status.code(), Some(0));
}

#[test]
fn a_lost_socket_file_is_made_anew_by_a_reload() {
    let daemon = Daemon::start(DISCARD);
    fs::remove_file(daemon.path("control-socket")).expect("removed");
    assert_eq!(daemon.command(&["status"]).status.code(), Some(3));
    assert!(daemon.reload());
    assert_eq!(daemon.command(&["status"]).status.code(), Some(0));
}

#[test]
fn where_the_control_socket_is_may_be_chosen() {
    // A path that can't be bound ends the start, because somebody relies on it.
    let site = Site::with(DISCARD);
    let config = site.path("config.lua").display().to_string();
    let output = run(&["--config", &config, "--control", "/nonexistent/control"]);
    assert_eq!(output.status.code(), Some(71), "{output:?}");
    assert!(stderr(&output).contains("the control socket: "), "{output:?}");
    assert!(stderr(&output).contains("/nonexistent"), "{output:?}");
    let output = run(&["status", "--control", "none"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
}

#[test]
fn a_crash_and_a_hang_are_remembered() {
    let daemon = Daemon::start(
        "settings{workers=1, handler_timeout=0.5, hang_timeout=1}
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'loop@x' then string.find(('a'):rep(30), ('a*'):rep(30) .. 'b') end
           return m:discard()
         end)",
    );
    let first = daemon.wait_for_workers(1, &[]);
    processes::signal(first[0], Signal::SIGKILL);
    let second = daemon.wait_for_workers(1, &first);
    let status = daemon.status();
    assert_eq!(status["ends"]["crashes"], 1);
    let incident = status["incidents"].as_array().and_then(|list| list.last()).expect("one");
    assert_eq!(incident["kind"], "crash");
    assert_eq!(incident["text"], "worker 1 died: SIGKILL");
    let mut client = Client::connect(daemon.path("in"));
    client.send(&Mail::new("").from("loop@x").request());
    assert_eq!(client.outcome_within(PATIENCE * 2), "Ztry again later");
    daemon.wait_for_workers(1, &second);
    let ends = daemon.status()["ends"].clone();
    assert_eq!((&ends["hangs"], &ends["lost_mails"]), (&1.into(), &1.into()), "{ends}");
}

/// docs/status.md has every field of the protocol's objects, and no other one.
#[test]
fn every_field_is_documented() {
    let source = include_str!("../../shared/src/admin.rs");
    let page = include_str!("../../docs/status.md");
    // The two lines themselves are documented as examples.
    let lines = ["Request", "Answer"];
    let objects = source.split("pub struct ").skip(1).map(|object| {
        let (name, rest) = object.split_once(" {").expect("a struct");
        (name, rest.split("\n}").next().expect("its fields"))
    });
    let mut expected: Vec<_> = objects
        .filter(|(name, _)| !lines.contains(name))
        .flat_map(|(_, fields)| fields.lines())
        .filter_map(|line| line.trim().strip_prefix("pub ")?.split_once(':'))
        .map(|(field, _)| field)
        .collect();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    let rows = rows.filter_map(|row| row.split_once("` |")).map(|(field, _)| field);
    let mut documented: Vec<_> = rows.filter(|field| !field.starts_with('{')).collect();
    expected.sort_unstable();
    documented.sort_unstable();
    assert_eq!(documented, expected);
}
