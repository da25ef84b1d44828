//! `qrelay web`: metrics, the page, and clients that misbehave. `tests/web/browser.py` looks at the
//! page in a browser.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::daemon::Launch;
use crate::harness::postgres::Cluster;
use crate::harness::processes::{memory, signal};
use crate::harness::record::within;
use crate::harness::web::Web;
use crate::harness::{Client, Daemon, Mail, PATIENCE, Sink, Site, eventually, run, submit};

#[test]
fn a_daemon_that_is_not_there_is_said_to_be_down() {
    let site = Site::new();
    let control = site.path("control");
    let web = Web::start(&control);
    assert!(web.announcement.contains("all users of this machine"), "{}", web.announcement);
    assert!(web.announcement.contains("no addresses of mails"), "{}", web.announcement);
    let metrics = web.get("/metrics");
    assert_eq!(metrics.status, 200);
    let samples: Vec<_> = metrics.body.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(samples, ["qrelay_up 0"]);
    let status = web.get("/status.json");
    assert_eq!(status.status, 503);
    assert!(status.body.contains(control.to_str().expect("UTF-8")), "{}", status.body);
    assert_eq!(web.get("/history.json").status, 200);
    assert_eq!(web.get("/").status, 200);
}

#[test]
fn the_page_is_locked_down() {
    let site = Site::new();
    let web = Web::start(&site.path("control"));
    let [one, other] = [web.get("/"), web.get("/")];
    assert_eq!(one.header("content-type"), "text/html; charset=utf-8");
    assert_eq!(one.header("x-content-type-options"), "nosniff");
    assert_eq!(one.header("cache-control"), "no-store");
    let policy = one.header("content-security-policy");
    for part in ["default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'"] {
        assert!(policy.contains(part), "{part} in {policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    assert_ne!(policy, other.header("content-security-policy"), "another nonce each time");
    let nonce = policy.split_once("script-src 'nonce-").and_then(|(_, rest)| rest.split_once('\''));
    let nonce = nonce.expect("a nonce").0;
    assert!(nonce.len() >= 32, "{nonce}");
    for tag in ["script", "style"] {
        let begin = format!("<{tag} nonce=\"{nonce}\">");
        assert_eq!(one.body.matches(&format!("<{tag}")).count(), 1, "{tag}");
        assert!(one.body.contains(&begin), "{begin}");
    }
    // Nothing is loaded from anywhere, and no attribute has script in it.
    for part in ["src=", "@import", "url(", "onclick", "onload", "onerror", "//cdn", "innerHTML"] {
        assert!(!one.body.contains(part), "{part}");
    }
}

#[test]
fn other_requests_are_refused() {
    let site = Site::new();
    let web = Web::start(&site.path("control"));
    let long = format!("GET / HTTP/1.1\r\nHost: localhost\r\nCookie: {}\r\n\r\n", "x".repeat(9000));
    let cases = [
        ("POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc", "405"),
        ("DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n", "405"),
        ("GET / HTTP/1.1\r\nHost: rebound.example.com\r\n\r\n", "421"),
        ("GET /status.json HTTP/1.1\r\nHost: 192.0.2.1:9628\r\n\r\n", "421"),
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("EHLO example.com\r\n\r\n", "400"),
        (&long, "431"),
        ("GET /mails.json HTTP/1.1\r\nHost: localhost\r\n\r\n", "404"),
        ("GET /../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", "404"),
        ("GET /metrics?x=y HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n", "200"),
        ("GET /metrics HTTP/1.1\r\nHost: [::1]\r\n\r\n", "200"),
        ("GET /metrics HTTP/1.0\r\n\r\n", "200"),
        ("", ""),
    ];
    for (request, status) in cases {
        let answer = web.raw(request.as_bytes());
        let start = if status.is_empty() { String::new() } else { format!("HTTP/1.1 {status} ") };
        assert!(answer.starts_with(&start), "{request:?}: {answer:?}");
        assert_eq!(answer.is_empty(), status.is_empty(), "{request:?}: {answer:?}");
    }
    let head = web.raw(b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"), "{head:?}");
    assert!(!head.contains("Content-Length: 0\r\n"), "{head:?}");
}

#[test]
fn metrics_come_in_the_form_that_is_asked_for() {
    let site = Site::new();
    let web = Web::start(&site.path("control"));
    let text = web.get("/metrics");
    assert!(text.header("content-type").starts_with("text/plain; version=0.0.4"));
    assert!(!text.body.contains("# EOF"));
    let open = web.ask("/metrics", &["Accept: application/openmetrics-text;version=1.0.0"]);
    assert!(open.header("content-type").starts_with("application/openmetrics-text; version=1.0.0"));
    assert!(open.body.ends_with("# EOF\n"));
}

#[test]
fn another_address_is_announced() {
    let site = Site::new();
    let web = Web::start_with(&site.path("control"), &["--mails", "--listen", "0.0.0.0:0"]);
    assert!(web.announcement.contains("everybody who reaches"), "{}", web.announcement);
    assert!(web.announcement.contains("senders and recipients"), "{}", web.announcement);
    // Its name isn't known, so any is taken.
    let answer = web.raw(b"GET /metrics HTTP/1.1\r\nHost: relay.example.com\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer:?}");
    assert_eq!(web.get("/mails.json").status, 503);
    // The address is taken now.
    let output = run(&["web", "--listen", &web.address.to_string()]);
    assert_eq!(output.status.code(), Some(71), "{output:?}");
    let output = run(&["web", "--listen", "/run/socket"]);
    assert_eq!(output.status.code(), Some(64), "{output:?}");
}

/// What a client that misbehaves sends. It reads nothing.
const MISCHIEF: [&[u8]; 5] = [
    b"",
    b"GET / HTTP/1.1\r\nHost: loc",
    b"\x00\xff\x16\x03\x01garbage",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\nxxxx",
];

#[test]
fn clients_that_misbehave_hold_up_nobody() {
    let site = Site::new();
    let web = Web::start(&site.path("control"));
    let mut crowd: Vec<TcpStream> = Vec::new();
    for round in 0..100 {
        for bytes in MISCHIEF {
            let mut stream = web.connect();
            // The connection may be closed already, to make room.
            let _ = stream.write_all(bytes);
            crowd.push(stream);
        }
        assert_eq!(web.get("/metrics").status, 200, "round {round}");
    }
    let threads = std::fs::read_dir(format!("/proc/{}/task", web.pid())).expect("it runs").count();
    assert!(threads <= 70, "{threads} threads");
    let resident = memory(web.pid(), "status", "VmRSS");
    assert!(resident < 48 << 20, "{resident}");
    // Silent clients make room long before their time of 5 s is over.
    let web = Web::start(&site.path("control"));
    let begun = Instant::now();
    let silent: Vec<_> = (0..70).map(|_| web.connect()).collect();
    assert_eq!(web.get("/metrics").status, 200);
    assert!(begun.elapsed() < Duration::from_secs(4), "they ended first");
    silent[69].set_nonblocking(true).expect("mode");
    let error = (&silent[69]).read(&mut [0; 1]).expect_err("the connection is open");
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    // A client that goes on sending is cut off.
    let mut endless = web.connect();
    let line = b"X: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n";
    endless.write_all(b"GET / HTTP/1.1\r\n").expect("sent");
    while endless.write_all(line).is_ok() {}
    let _ = endless.read(&mut [0; 1]);
    assert_eq!(web.get("/metrics").status, 200);
}

/// Passes on what is said on connections to `path` to the control socket `to`, and counts the
/// questions.
fn counting(path: &Path, to: PathBuf) -> Arc<AtomicU64> {
    let count = Arc::new(AtomicU64::new(0));
    let listener = UnixListener::bind(path).expect("bind");
    let counted = count.clone();
    thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.expect("a client");
            let daemon = UnixStream::connect(&to).expect("the daemon");
            let mut there = (client.try_clone().expect("dup"), daemon.try_clone().expect("dup"));
            thread::spawn(move || io::copy(&mut &daemon, &mut &client));
            let counted = counted.clone();
            thread::spawn(move || {
                for line in BufReader::new(&mut there.0).lines().map_while(Result::ok) {
                    counted.fetch_add(1, Ordering::Relaxed);
                    writeln!(there.1, "{line}").expect("sent");
                }
            });
        }
    });
    count
}

#[test]
fn many_clients_are_as_dear_to_the_daemon_as_one() {
    let site = Site::with("qmqp_listen('$DIR/in', function(m) return m:discard() end)");
    let (daemon, _web) = watched(site.launch());
    let count = counting(&daemon.path("counting"), daemon.path("control-socket"));
    let begun = Instant::now();
    let web = Web::start(&daemon.path("counting"));
    thread::scope(|scope| {
        for path in ["/metrics", "/status.json", "/metrics", "/status.json", "/history.json"] {
            let web = &web;
            scope.spawn(move || {
                (0..100).for_each(|_| assert_eq!(web.get(path).status, 200, "{path}"));
            });
        }
    });
    let most = begun.elapsed().as_millis() as u64 / 50 + 2;
    let asked = count.load(Ordering::Relaxed);
    assert!((1..=most).contains(&asked), "{asked} questions, at most {most}");
    let status: serde_json::Value =
        serde_json::from_str(&web.get("/status.json").body).expect("JSON");
    assert_eq!(status["state"], "serving", "{status}");
}

#[test]
fn mails_in_flight_are_shown_to_whom_it_was_said() {
    let site = Site::with("qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)");
    let (daemon, web) = watched(site.launch());
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mut client = begin(&daemon, "secret");
    sink.record().wait_for_count(1);
    let told =
        Web::start_with(&daemon.path("control-socket"), &["--mails", "--listen", "127.0.0.1:0"]);
    eventually("the mail", || {
        let mails: serde_json::Value =
            serde_json::from_str(&told.get("/mails.json").body).expect("JSON");
        (mails[0]["from"] == "secret@x" && mails[0]["phase"] == "next_hop").then_some(())
    });
    for path in ["/status.json", "/metrics", "/history.json", "/mails.json"] {
        assert!(!web.get(path).body.contains("secret"), "{path}");
    }
    gate.open();
    assert_eq!(client.outcome(), "Kok");
}

/// What `/metrics` has shown so far.
#[derive(Default)]
struct Shown {
    /// Name, type and labels of each family.
    families: BTreeMap<String, (String, BTreeSet<String>)>,
    /// The families of which a sample was above zero.
    moved: BTreeSet<String>,
}

impl Shown {
    /// Looks at the metrics of a daemon. Returns the names of the families that are above zero.
    fn look(&mut self, web: &Web) -> BTreeSet<String> {
        let answer = web.get("/metrics");
        let mut family = String::new();
        let mut above = BTreeSet::new();
        for line in answer.body.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a type");
                family = name.to_owned();
                self.families.entry(family.clone()).or_default().0 = kind.to_owned();
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').expect("a value");
                let labels = series.split_once('{').map_or("", |(_, labels)| labels);
                let names = labels.split("\",").filter_map(|label| label.split_once("=\""));
                let known = &mut self.families.get_mut(&family).expect("a type before samples").1;
                known.extend(names.map(|(name, _)| name.to_owned()).filter(|name| name != "le"));
                if value.parse::<f64>().expect("a number") > 0.0 {
                    above.insert(family.clone());
                }
            }
        }
        self.moved.extend(above.clone());
        above
    }

    /// Waits until all these families are above zero at once.
    #[track_caller]
    fn wait_for(&mut self, web: &Web, names: &[&str]) {
        let all = |above: BTreeSet<String>| names.iter().all(|name| above.contains(*name));
        if within(PATIENCE, || all(self.look(web)).then_some(())).is_none() {
            panic!("{names:?} aren't above zero:\n{}", web.get("/metrics").body);
        }
    }
}

/// A handler that does what the sender's local part says.
const BUSY: &str = "
    log_server = '$DIR/log'
    settings{workers=1, worker_connections=4, handler_timeout=0.5, hang_timeout=1,
        shared_memory=65536}
    local d = shared:new('d')
    local db = pg:new('$DATABASE', '', {max_connections=1})
    local none = pg:new('host=$DIR dbname=none')
    local tasks = {
      out = function(m) return m:connect('$DIR/out') end,
      slow = function(m) return m:connect('$DIR/slow') end,
      nowhere = function(m) return m:connect('$DIR/nowhere') end,
      keys = function(m)
        for i = 1, 400 do d:set('k' .. i, ('x'):rep(200)) end
        return m:discard(tostring(d:get('k400') and not d:get('other')))
      end,
      query = function(m) db:execute('SELECT pg_sleep(2)') return m:discard() end,
      none = function(m) return m:discard(tostring(none:execute('SELECT 1'))) end,
      hang = function(m) return m:discard((('a'):rep(40)):find(('a-'):rep(40) .. 'b')) end,
    }
    qmqp_listen('$DIR/in', function(m) return tasks[m.sender:match('^[a-z]+')](m) end)";

/// Starts a daemon, and `qrelay web` for it.
fn watched(launch: Launch) -> (Daemon, Web) {
    let daemon = launch.ready();
    let web = Web::start(&daemon.path("control-socket"));
    (daemon, web)
}

/// Sends a request without waiting for the answer.
fn begin(daemon: &Daemon, task: &str) -> Client {
    let mut client = Client::connect(daemon.path("in"));
    client.send(&Mail::new("x").from(&format!("{task}@x")).request());
    client
}

#[test]
fn every_metric_is_documented_and_moves() {
    let mut shown = Shown::default();
    let cluster = Cluster::shared();
    let site = Site::with(&BUSY.replace("$DATABASE", &cluster.conninfo()));
    let pond = UnixDatagram::bind(site.path("log")).expect("bind");
    let (daemon, web) = watched(site.launch());
    let _sink = Sink::answering(daemon.path("out"), "Kok");
    let (slow, gate) = Sink::gated(daemon.path("slow"));
    let submitted =
        |task: &str| submit(daemon.path("in"), &Mail::new("x").from(&format!("{task}@x")));
    assert_eq!(submitted("out"), "Kok");
    assert_eq!(submitted("nowhere").status(), 'Z');
    assert_eq!(submitted("keys"), "Ktrue");
    assert_eq!(submitted("none"), "Knil");
    shown.wait_for(&web, &["qrelay_database_errors_total", "qrelay_pond_datagrams_total"]);
    // Two queries, of which one waits for the other.
    let queries = ["query", "query"].map(|task| begin(&daemon, task));
    shown.wait_for(&web, &["qrelay_database_busy", "qrelay_database_waiting"]);
    for mut client in queries {
        assert_eq!(client.outcome(), "Kdiscarded");
    }
    // More mails than the worker takes.
    let clients: Vec<_> = (0..6).map(|_| begin(&daemon, "slow")).collect();
    slow.record().wait_for_count(1);
    shown.wait_for(
        &web,
        &["qrelay_next_hop_in_flight", "qrelay_connections_waiting", "qrelay_listener_held"],
    );
    // A crash, and then a worker that hangs.
    let workers = daemon.workers();
    signal(workers[0], Signal::SIGKILL);
    gate.open();
    for mut client in clients {
        client.outcome();
    }
    daemon.wait_for_workers(1, &workers);
    assert_eq!(submitted("hang"), "Ztry again later");
    shown.wait_for(&web, &["qrelay_worker_hangs_total", "qrelay_mails_lost_total"]);
    assert!(daemon.reload());
    shown.wait_for(&web, &["qrelay_worker_finishes_total"]);
    drop(pond);
    submitted("out");
    shown.wait_for(&web, &["qrelay_pond_datagrams_lost_total"]);

    // A log that nobody reads.
    let site = Site::with("qmqp_listen('$DIR/in', function(m) return m:discard() end)");
    let (unread, web) = watched(site.launch().unread_stderr());
    eventually("lost log records", || {
        submit(unread.path("in"), &Mail::new("x"));
        shown.look(&web).contains("qrelay_log_records_lost_total").then_some(())
    });

    // Clients come faster than they are accepted: with few descriptors each one takes another's
    // place.
    let site = Site::with("qmqp_listen('$DIR/in', function(m) return m:discard() end)");
    let few = ["sh", "-c", "ulimit -n 128 && exec \"$@\"", "sh"];
    let (crowded, web) = watched(site.launch().through(&few));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let crowd = (0..100).map(|_| UnixStream::connect(crowded.path("in")));
                    drop(crowd.collect::<Vec<_>>());
                }
            });
        }
        let seen =
            within(PATIENCE, || shown.look(&web).contains("qrelay_listener_backlog").then_some(()));
        over.store(true, Ordering::Relaxed);
        assert!(seen.is_some(), "no backlog was seen");
    });

    let page: BTreeMap<_, _> =
        documented().into_iter().map(|(name, kind, labels)| (name, (kind, labels))).collect();
    assert_eq!(page, shown.families);
    let still: Vec<_> = page.keys().filter(|name| !shown.moved.contains(*name)).collect();
    assert!(still.is_empty(), "never above zero: {still:?}");
}

/// Returns the rows of the tables of docs/metrics.md: name, type, labels.
fn documented() -> Vec<(String, String, BTreeSet<String>)> {
    let page = include_str!("../../docs/metrics.md");
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `qrelay_")?.split(" | ");
        let name = cells.next()?.trim_end_matches('`');
        let kind = cells.next()?.to_owned();
        let labels = cells.next()?.split(['`', ',', ' ', '–']).filter(|label| !label.is_empty());
        Some((format!("qrelay_{name}"), kind, labels.map(str::to_owned).collect()))
    };
    page.lines().filter_map(row).collect()
}

#[test]
fn dashboard_and_alerts_use_metrics_that_exist() {
    let mut samples = BTreeSet::new();
    for (name, kind, _) in documented() {
        if kind == "histogram" {
            samples.extend(["_bucket", "_sum", "_count"].map(|suffix| format!("{name}{suffix}")));
        } else {
            samples.insert(name);
        }
    }
    let labels: BTreeSet<_> = documented().into_iter().map(|(_, _, labels)| labels).collect();
    assert!(samples.len() > 40, "{samples:?}");
    assert!(labels.len() > 5, "{labels:?}");
    for (file, text) in [
        ("grafana.json", include_str!("../../docs/grafana.json")),
        ("alerts.yml", include_str!("../../docs/alerts.yml")),
    ] {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let used: BTreeSet<_> = words.filter(|word| word.starts_with("qrelay_")).collect();
        assert!(used.len() > 8, "{file}: {used:?}");
        for name in used {
            let named = samples.contains(name) || name == "qrelay_mail_phase_seconds";
            assert!(named, "{file} uses {name}, which docs/metrics.md doesn't list");
        }
    }
}
