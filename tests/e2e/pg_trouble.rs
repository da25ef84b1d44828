//! PostgreSQL servers that don't answer, that go away and come back, and the notifications of
//! servers.

use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::postgres::Cluster;
use crate::harness::record::within;
use crate::harness::{Daemon, Mail, PATIENCE, Site, eventually, submit};

#[test]
fn a_server_that_does_not_answer_holds_a_mail_until_its_deadline() {
    let cluster = Cluster::start(&[]);
    let daemon = Daemon::start(&format!(
        "settings{{workers=1, relay_timeout=1}}
         local db = pg:new('{}')
         qmqp_listen('$DIR/in', function(m)
           return m:discard(assert(db:execute('SELECT 1')):fetch(nil, 'n')[1])
         end)",
        cluster.conninfo()
    ));
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "K1");
    cluster.signal_all(Signal::SIGSTOP);
    // There are more mails than connections and their replacements, and none waits longer than its
    // deadline.
    for _ in 0..6 {
        let started = Instant::now();
        let told = submit(daemon.path("in"), &Mail::new("x"));
        let took = started.elapsed();
        assert_eq!(told, "Zrelay failed");
        assert!(took >= Duration::from_millis(900), "{took:?}");
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
    let threads =
        |pid: i32| std::fs::read_dir(format!("/proc/{pid}/task")).expect("a living worker").count();
    // The limit has room for the main thread, some threads that serve, and twice two connections
    // with their cancellations.
    let count = threads(daemon.workers()[0]);
    assert!(count <= 16, "{count} threads");
    cluster.signal_all(Signal::SIGCONT);
    let back = within(Duration::from_secs(2), || {
        (submit(daemon.path("in"), &Mail::new("x")) == "K1").then_some(())
    });
    assert!(back.is_some(), "{}", daemon.text());
}

/// Starts a server that accepts connections, or leaves them in its backlog, and never sends
/// anything.
fn silent_server(path: &std::path::Path, accepts: bool) -> UnixListener {
    let listener = UnixListener::bind(path).expect("bind");
    if accepts {
        let accepting = listener.try_clone().expect("clone");
        std::thread::spawn(move || {
            // The connections stay open until the test is over.
            let mut connections = Vec::new();
            while let Ok((connection, _)) = accepting.accept() {
                connections.push(connection);
            }
        });
    }
    listener
}

#[test]
fn a_connect_that_is_never_answered_holds_a_mail_until_its_deadline() {
    for accepts in [false, true] {
        let site = Site::with(
            "settings{workers=1, relay_timeout=1}
             local db = pg:new('host=$DIR')
             qmqp_listen('$DIR/in', function(m)
               if m.sender == 'other@x' then return m:discard() end
               local r, e = db:execute('SELECT 1')
               return m:discard(tostring(r) .. ' ' .. e)
             end)",
        );
        let path = site.path(".s.PGSQL.5432");
        let listener = silent_server(&path, accepts);
        let daemon = site.start();
        // There are more mails than connections and their replacements.
        for _ in 0..5 {
            let started = Instant::now();
            let told = submit(daemon.path("in"), &Mail::new("x"));
            let took = started.elapsed();
            assert_eq!(told, "Zrelay failed", "accepts: {accepts}");
            assert!(took >= Duration::from_millis(900), "{took:?}");
            assert!(took < Duration::from_secs(2), "{took:?}");
        }
        let line = daemon.wait_for_log("waited_for=\"a new connection\"");
        assert!(line.contains(path.to_str().expect("path")), "{line}");
        // Mails that don't use the database aren't held up.
        assert_eq!(submit(daemon.path("in"), &Mail::new("x").from("other@x")), "Kdiscarded");
        if !accepts {
            // The server ends, and its backlog with it, so the mails that wait for it are free
            // again.
            drop(listener);
            std::fs::remove_file(&path).expect("remove");
            let told = within(Duration::from_secs(2), || {
                let told = submit(daemon.path("in"), &Mail::new("x")).to_string();
                told.starts_with("Knil cannot connect").then_some(())
            });
            assert!(told.is_some(), "{}", daemon.text());
        }
    }
}

#[test]
fn a_mail_that_gives_up_cancels_its_statement() {
    let cluster = Cluster::shared();
    let daemon = Daemon::start(&format!(
        "settings{{workers=1, relay_timeout=0.5}}
         local db = pg:new('{}')
         qmqp_listen('$DIR/in', function(m)
           assert(db:execute('SELECT pg_sleep(300) /* forgotten */'))
           return m:discard()
         end)",
        cluster.conninfo()
    ));
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zrelay failed");
    let line = daemon.wait_for_log("a mail's time is over");
    assert!(line.contains("statement=\"SELECT pg_sleep(300) /* forgotten */\""), "{line}");
    let id = line.split(" id=").nth(1).and_then(|rest| rest.split(' ').next()).expect("an id");
    daemon.wait_for_log(&format!("mail id={id} "));
    let running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(300)%'";
    eventually("the end of the statement", || (cluster.psql(running) == "0\n").then_some(()));
}

#[test]
fn an_unreachable_server_is_a_failure() {
    let daemon = Daemon::start(
        "settings{workers=1}
         local db = pg:new('host=127.0.0.1 port=1 sslmode=disable')
         qmqp_listen('$DIR/in', function(m)
           local r, e = db:execute('SELECT 1')
           return m:discard(tostring(r) .. ' ' .. e)
         end)",
    );
    let told = submit(daemon.path("in"), &Mail::new("x")).to_string();
    assert!(told.starts_with("Knil cannot connect to 127.0.0.1, port 1: "), "{told}");
}

#[test]
fn a_broken_connection_costs_no_mail() {
    let cluster = Cluster::start(&[]);
    let daemon = Daemon::start(&format!(
        "settings{{workers=1}}
         local db = pg:new('{}')
         qmqp_listen('$DIR/in', function(m)
           return m:discard(assert(db:execute('SELECT $1', {{m.sender}})):fetch(nil, 'n')[1])
         end)",
        cluster.conninfo()
    ));
    for sender in ["a@x", "b@x", "c@x"] {
        let told = submit(daemon.path("in"), &Mail::new("x").from(sender));
        assert_eq!(told.to_string(), format!("K{sender}"), "{}", daemon.text());
        cluster.restart();
    }
}

#[test]
fn a_restart_under_load_is_survived() {
    let cluster = Cluster::start(&[]);
    let daemon = Daemon::start(&format!(
        "settings{{workers=2, relay_timeout=10}}
         local db = pg:new('{}', nil, {{max_connections=4}})
         qmqp_listen('$DIR/in', function(m)
           local r = assert(db:execute('SELECT $1::int + 1', {{1}}))
           return m:discard(r:fetch(nil, 'n')[1])
         end)",
        cluster.conninfo()
    ));
    let over = AtomicBool::new(false);
    let work = || {
        let mut served = 0_u32;
        while !over.load(Ordering::Relaxed) {
            let told = submit(daemon.path("in"), &Mail::new("x"));
            assert!(told == "K2" || told.status() == 'Z', "{told}");
            served += u32::from(told == "K2");
        }
        served
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(work)).collect();
        for _ in 0..2 {
            cluster.restart();
            // Every worker gets all its connections back within two seconds.
            let since = Instant::now();
            let mut last_failure = since;
            while since.elapsed() < Duration::from_millis(2500) {
                if submit(daemon.path("in"), &Mail::new("x")) != "K2" {
                    last_failure = Instant::now();
                }
            }
            let took = last_failure - since;
            assert!(took < Duration::from_secs(2), "{took:?}\n{}", daemon.text());
        }
        over.store(true, Ordering::Relaxed);
        for client in clients {
            assert!(client.join().expect("client") > 0);
        }
    });
}

/// Starts a daemon with three workers, each of which writes the notifications that it receives into
/// a file of its own, one line per call.
fn listening(cluster: &Cluster) -> Daemon {
    Daemon::start(&format!(
        "settings{{workers=3}}
         local db = pg:new('{}')
         local function write(text)
           local f = io.open('/proc/self/stat') local pid = f:read('n') f:close()
           f = io.open('$DIR/heard.' .. math.tointeger(pid), 'a')
           f:write(text, '\\n') f:close()
         end
         db:listen('odd \"name\"', function(payload)
           if payload == 'fail' then error('no good') end
           if payload == 'query' then payload = db:execute('SELECT 7'):fetch(nil, 'n')[1] end
           write(tostring(payload))
         end)
         local running = 0
         db:listen('slow', function(payload)
           running = running + 1
           sleep(0.02)
           write('slow ' .. running)
           running = running - 1
         end)
         assert(not pcall(db.listen, db, 'slow', print))
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
        cluster.conninfo()
    ))
}

fn heard(daemon: &Daemon) -> Vec<Vec<String>> {
    let read = |pid: &i32| std::fs::read_to_string(daemon.path(&format!("heard.{pid}")));
    let files = daemon.workers().iter().map(read).collect::<Result<Vec<_>, _>>();
    let lines = |text: String| text.lines().map(str::to_owned).collect();
    files.unwrap_or_default().into_iter().map(lines).collect()
}

/// Waits until every worker has received `text` at least `times` times, and returns the time that
/// took.
fn wait_until_heard(daemon: &Daemon, text: &str, times: usize) -> Duration {
    let started = Instant::now();
    let count = |lines: &Vec<String>| lines.iter().filter(|line| *line == text).count();
    let all = within(PATIENCE, || {
        let heard = heard(daemon);
        (heard.len() == 3 && heard.iter().all(|lines| count(lines) >= times)).then_some(())
    });
    assert!(all.is_some(), "not {times} × {text:?}: {:?}\n{}", heard(daemon), daemon.text());
    started.elapsed()
}

/// Checks that a notification reaches every worker within 100 ms. The machine has two cores and
/// other tests to run, so it may be late now and then, but not in each of ten attempts.
#[track_caller]
fn assert_heard_at_once(cluster: &Cluster, daemon: &Daemon, text: &str) {
    let mut times = Vec::new();
    let good = (0..10).any(|number| {
        cluster.psql(&format!("NOTIFY \"odd \"\"name\"\"\", '{text} {number}'"));
        let took = wait_until_heard(daemon, &format!("{text} {number}"), 1);
        times.push(took);
        took < Duration::from_millis(100)
    });
    assert!(good, "{times:?}");
}

#[test]
fn notifications_reach_every_worker() {
    let cluster = Cluster::start(&[]);
    let daemon = listening(&cluster);
    // The function is called once after LISTEN, without a payload.
    wait_until_heard(&daemon, "nil", 1);
    assert_heard_at_once(&cluster, &daemon, "call");
    // An error of the function is logged, and the next notification calls it again.
    cluster.psql("NOTIFY \"odd \"\"name\"\"\", 'fail'; NOTIFY \"odd \"\"name\"\"\"");
    wait_until_heard(&daemon, "", 1);
    daemon.wait_for_log("no good");
    cluster.psql("NOTIFY \"odd \"\"name\"\"\", 'query'");
    wait_until_heard(&daemon, "7", 1);
    // Calls for one name never overlap.
    cluster.psql("SELECT pg_notify('slow', i::text) FROM generate_series(1, 20) AS i");
    wait_until_heard(&daemon, "slow 1", 21);
    assert!(!heard(&daemon).concat().contains(&"slow 2".to_owned()));
    // A worker that replaces another one listens, too.
    let workers = daemon.workers();
    crate::harness::processes::signal(workers[0], Signal::SIGKILL);
    daemon.wait_for_workers(3, &workers[..1]);
    wait_until_heard(&daemon, "nil", 1);
    // After a restart of the server all workers listen again.
    cluster.restart();
    let took = wait_until_heard(&daemon, "nil", 2);
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_heard_at_once(&cluster, &daemon, "again");
}
