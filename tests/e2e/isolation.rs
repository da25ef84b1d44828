//! Bad handlers. A bad handler costs its own mail and a moment of its worker, but no other mails.
//! The log names the handler that was to blame, which is called the culprit here.
//!
//! Every case runs twice: with one worker, in which a probe (an ordinary mail) waits behind the
//! culprit, and with two workers and a steady stream of probes. The answers of the probes say in
//! which worker they ran.
//!
//! # Failure
//! A failing case is named by the Lua code of its handler.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::harness::{Client, Daemon, Mail, Outcome, PATIENCE, eventually, processes, submit};

/// Time limits of the daemons under test, in seconds.
const HANDLER_TIMEOUT: f64 = 0.4;
const HANG_TIMEOUT: f64 = 0.7;

/// A `hang_timeout` in seconds that no worker reaches, however busy the machine is.
const LONG: f64 = 10.0;

/// Interval at which the supervisor asks its workers how long Lua has been held.
const PING: Duration = Duration::from_millis(250);

/// Delay that the machine may add, which has two cores and other tests to run. Handlers were seen
/// to be stopped 5 ms late at a load of 7. The machine may be slower for a moment, so a case has
/// several [`ATTEMPTS`]; a fault of qrelay shows in each of them.
const JITTER: Duration = Duration::from_millis(100);
const ATTEMPTS: usize = 3;

/// Delay that C code may add in a debug build, because no hook interrupts it: copying the largest
/// string that fits (256 MiB of fresh pages: up to 1.2 s were seen at a load of 9), and unwinding
/// the deepest stack (280 ms).
const UNINTERRUPTED: Duration = Duration::from_secs(2);

/// The cost of a bad handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cost {
    /// The mail gets `Zscript failed`, and nothing else happens.
    Mail,
    /// The worker dies, and the clients of its mails are told to try again.
    Worker,
}

impl Cost {
    /// Returns the longest permitted wait of other mails in the same worker.
    fn delay(self) -> Duration {
        JITTER
            + match self {
                Self::Mail => Duration::from_secs_f64(HANDLER_TIMEOUT),
                Self::Worker => Duration::from_secs_f64(HANG_TIMEOUT) + PING,
            }
    }
}

/// Place of the culprit's code in config.lua, as tracebacks show it.
const LINE: &str = "config.lua:8:";

/// Returns a configuration whose handler runs `code` for a mail from bad@x, after it has created a
/// file. Every other mail is answered with a number that is different in each worker.
fn config(workers: usize, cost: Cost, settings: &str, code: &str) -> String {
    let hang_timeout = if cost == Cost::Worker { HANG_TIMEOUT } else { LONG };
    format!(
        "settings{{workers={workers}, handler_timeout={HANDLER_TIMEOUT},
            hang_timeout={hang_timeout}, {settings}}}
         qmqp_listen('$DIR/in', function(m)
           if m.sender ~= 'bad@x' then
             me = me or math.random(1 << 50)
             return m:discard(me)
           end local f = io.open('$DIR/started', 'w') f:close()
           {code}
         end)"
    )
}

fn bad() -> Mail {
    Mail::new("x").from("bad@x")
}

fn probe(daemon: &Daemon) -> Outcome {
    submit(daemon.path("in"), &Mail::new("x").from("probe@x"))
}

/// Sends a mail from bad@x, and waits until its handler runs.
#[track_caller]
fn begin(daemon: &Daemon) -> Client {
    let started = daemon.path("started");
    let mut client = Client::connect(daemon.path("in"));
    client.send(&bad().request());
    eventually("the handler", || started.exists().then_some(()));
    std::fs::remove_file(started).expect("removed");
    client
}

/// Runs `code` as the handler of a mail, with probes behind it in the same worker and beside it in
/// another. The log must contain `culprit`.
#[track_caller]
fn assert_isolated(code: &str, cost: Cost, culprit: &str) {
    assert_isolated_within(code, cost, culprit, cost.delay());
}

/// Like [`assert_isolated`], but the mails behind the culprit may wait for `most`.
#[track_caller]
fn assert_isolated_within(code: &str, cost: Cost, culprit: &str, most: Duration) {
    let daemon = behind_within(code, cost, culprit, most);
    if cost == Cost::Mail {
        // The traceback names the line of the code.
        daemon.wait_for_log(LINE);
    }
    beside(code, cost);
}

/// Runs `code` in the only worker, and checks how long the next mail waits.
#[track_caller]
fn behind(code: &str, cost: Cost, culprit: &str) -> Daemon {
    behind_within(code, cost, culprit, cost.delay())
}

#[track_caller]
fn behind_within(code: &str, cost: Cost, culprit: &str, most: Duration) -> Daemon {
    let mut waited = Vec::new();
    for _ in 0..ATTEMPTS {
        let (daemon, took) = wait_behind(code, cost, culprit);
        if took < most {
            return daemon;
        }
        waited.push(took);
    }
    panic!("{waited:?}, not {most:?}, behind {code}");
}

/// Returns how long a mail waits behind the culprit.
#[track_caller]
fn wait_behind(code: &str, cost: Cost, culprit: &str) -> (Daemon, Duration) {
    let daemon = Daemon::start(&config(1, cost, "", code));
    let workers = daemon.workers();
    let (mut culprits, started) = (begin(&daemon), Instant::now());
    let told = probe(&daemon);
    let waited = started.elapsed();
    match cost {
        Cost::Mail => {
            assert_eq!(culprits.outcome(), "Zscript failed", "{code}");
            assert_eq!(told.status(), 'K', "{told} behind {code}");
            assert_eq!(daemon.workers(), workers, "{code}");
        }
        Cost::Worker => {
            assert_eq!(culprits.outcome(), "Ztry again later", "{code}");
            assert!(told.status() == 'K' || told == "Ztry again later", "{told} behind {code}");
            daemon.wait_for_workers(1, &workers);
        }
    }
    assert_eq!(probe(&daemon).status(), 'K', "after {code}");
    assert_named(&daemon, cost, culprit);
    (daemon, waited)
}

/// Checks that the log has `culprit`, the mail's id, and where the mail came from or how it ended.
#[track_caller]
fn assert_named(daemon: &Daemon, cost: Cost, culprit: &str) {
    daemon.wait_for_log(culprit);
    let first = match cost {
        Cost::Mail => daemon.wait_for_log("script failed: "),
        Cost::Worker => daemon.wait_for_log("lost_in="),
    };
    let id = first.split(' ').find_map(|word| word.strip_prefix("id=")).expect("an id");
    if cost == Cost::Mail {
        assert!(first.contains(&format!("listener={}", daemon.path("in").display())), "{first}");
        let about = format!("id={id} from=<bad@x>");
        assert!(daemon.wait_for_log(&about).contains("status=Z"), "{about}");
    }
}

/// Runs `code` in one of two workers, and checks that mails in the other worker don't wait.
#[track_caller]
fn beside(code: &str, cost: Cost) {
    let mut slowest = Vec::new();
    for _ in 0..ATTEMPTS {
        let took = slowest_beside(code, cost);
        // A mail that waited for the culprit would take all of HANDLER_TIMEOUT.
        if took < Duration::from_secs_f64(HANDLER_TIMEOUT) / 2 {
            return;
        }
        slowest.push(took);
    }
    panic!("{slowest:?} beside {code}");
}

/// Waits until so many workers take mails. The daemon is ready as soon as its first one is.
fn wait_until_ready(daemon: &Daemon, count: usize) {
    eventually("workers that take mails", || {
        daemon.signal(Signal::SIGUSR1);
        let text = daemon.text();
        let ready: BTreeSet<&str> = text
            .lines()
            .filter(|line| line.contains("status of a worker") && line.contains("state=ready"))
            .filter_map(|line| line.split(' ').find(|word| word.starts_with("worker=")))
            .collect();
        (ready.len() >= count).then_some(())
    });
}

/// Returns the longest time of a mail in the other worker.
#[track_caller]
fn slowest_beside(code: &str, cost: Cost) -> Duration {
    let daemon = Daemon::start(&config(2, cost, "", code));
    let workers = daemon.wait_for_workers(2, &[]);
    wait_until_ready(&daemon, 2);
    let over = AtomicBool::new(false);
    let (probes, told) = std::thread::scope(|scope| {
        let mut client = begin(&daemon);
        let stream = scope.spawn(|| {
            let mut probes = Vec::new();
            while !over.load(Ordering::Relaxed) || probes.len() < 20 {
                let started = Instant::now();
                probes.push((probe(&daemon).to_string(), started.elapsed()));
            }
            probes
        });
        let told = client.outcome();
        over.store(true, Ordering::Relaxed);
        (stream.join().expect("probes"), told)
    });
    match cost {
        Cost::Mail => {
            assert_eq!(told, "Zscript failed", "{code}");
            assert_eq!(daemon.workers(), workers, "{code}");
        }
        Cost::Worker => {
            assert_eq!(told, "Ztry again later", "{code}");
            eventually("a new worker", || {
                let now = daemon.workers();
                let kept = now.iter().filter(|pid| workers.contains(pid)).count();
                (kept == 1 && now.len() == 2).then_some(())
            });
            assert_eq!(daemon.count_log("worker died"), 1, "{code}");
        }
    }
    slowest_of_the_best(probes, cost, code)
}

/// Returns the slowest answer of the worker that answered quickest, which is not the culprit's.
#[track_caller]
fn slowest_of_the_best(probes: Vec<(String, Duration)>, cost: Cost, code: &str) -> Duration {
    let mut by_worker: BTreeMap<String, Vec<Duration>> = BTreeMap::new();
    for (told, took) in probes {
        let retry = told == "Ztry again later" && cost == Cost::Worker;
        assert!(told.starts_with('K') || retry, "{told} beside {code}");
        by_worker.entry(told).or_default().push(took);
    }
    // At most one probe may have followed the culprit before the supervisor knew.
    let retried = by_worker.remove("Ztry again later").unwrap_or_default();
    assert!(retried.len() <= 1, "{} told to try again beside {code}", retried.len());
    let slowest = by_worker
        .values()
        .filter(|times| times.len() >= 5)
        .map(|times| times.iter().max().copied().unwrap_or_default());
    slowest.min().expect("five probes in one worker")
}

const STOPPED: &str = "stopped: the handler ran longer than handler_timeout";

#[test]
fn an_endless_loop() {
    assert_isolated("while true do end", Cost::Mail, STOPPED);
}

#[test]
fn an_endless_loop_in_pcall() {
    let code = "while true do pcall(function() while true do end end) end";
    assert_isolated(code, Cost::Mail, STOPPED);
}

#[test]
fn an_endless_comparison() {
    let code = "local t = {} for i = 1, 50 do t[i] = i end \
        while true do pcall(table.sort, t, function() while true do end end) end";
    assert_isolated(code, Cost::Mail, STOPPED);
}

#[test]
fn an_endless_loop_in_nested_coroutines() {
    let code = "local function nest(n) if n == 0 then while true do end end \
        return coroutine.wrap(function() while true do pcall(nest, n - 1) end end)() end nest(5)";
    assert_isolated(code, Cost::Mail, STOPPED);
}

#[test]
fn an_endless_loop_where_no_hook_reaches() {
    let code = "xpcall(error, function() while true do end end)";
    assert_isolated(code, Cost::Worker, "worker hangs in Lua: killing it");
}

#[test]
fn a_string_of_a_gibibyte() {
    let code = "return m:discard(#(('x'):rep(1 << 30)))";
    assert_isolated(code, Cost::Mail, "not enough memory");
}

#[test]
fn a_string_that_doubles() {
    let code = "local s = 'x' while true do s = s .. s end";
    let most = Cost::Mail.delay() + UNINTERRUPTED;
    assert_isolated_within(code, Cost::Mail, "not enough memory", most);
}

#[test]
fn recursion_without_end() {
    // In a debug build, two hundred thousand frames take long: the time limit or the memory limit
    // may be reached first.
    let code = "local function f() return 1 + f() end return f()";
    let most = Cost::Mail.delay() + UNINTERRUPTED;
    assert_isolated_within(code, Cost::Mail, "script failed: ", most);
}

#[test]
fn recursion_through_gsub() {
    let code = "local function f() return (('x'):gsub('.', f)) end f()";
    assert_isolated(code, Cost::Mail, "C stack overflow");
}

#[test]
fn recursion_through_tostring() {
    let code = "tostring(setmetatable({}, {__tostring = function(t) return tostring(t) end}))";
    assert_isolated(code, Cost::Mail, "C stack overflow");
}

#[test]
fn recursion_through_sort_and_metamethods() {
    for code in [
        "local function f() table.sort({1, 2, 3}, f) end f()",
        "local t = setmetatable({}, {__index = function(t, k) return t[k + 1] end}) return t[1]",
        "local function f() return coroutine.wrap(f)() end f()",
        "local function f() return pcall(f) end f() error('over')",
        "local function f() error(setmetatable({}, {__tostring = f})) end f()",
    ] {
        assert_isolated(code, Cost::Mail, "script failed: ");
    }
}

#[test]
fn errors_of_every_type() {
    for code in [
        "error({})",
        "error()",
        "error(nil)",
        "error(42)",
        "error(print)",
        "error(setmetatable({}, {__tostring = function() error('again') end}))",
        "error(setmetatable({}, {__metatable = false, __name = 7}))",
        "error(('long '):rep(1 << 20))",
        "error('\\27[31m red \\0 nothing')",
        "error(m)",
        "error(coroutine.create(print))",
    ] {
        behind(code, Cost::Mail, "script failed: ").wait_for_log(LINE);
    }
    // This error also fails while its traceback is made.
    let code = "error(setmetatable({}, {__tostring = function() return {} end}))";
    behind(code, Cost::Mail, "'__tostring' must return a string");
    beside("error({})", Cost::Mail);
}

#[test]
fn a_to_string_that_never_ends() {
    let code = "error(setmetatable({}, {__tostring = function() while true do end end}))";
    behind(code, Cost::Mail, "script failed: ");
    beside(code, Cost::Mail);
}

#[test]
fn exit_in_a_handler() {
    assert_isolated("os.exit()", Cost::Worker, "worker died: exit status 0");
    assert_isolated("os.exit(3)", Cost::Worker, "worker died: exit status 3");
    assert_isolated("os.exit(3)", Cost::Worker, "os.exit ends this worker");
}

#[test]
fn a_crash_in_c() {
    // SIGILL is the signal that a faulty instruction in a library would raise.
    let code = "os.execute('kill -ILL $PPID') sleep(20)";
    assert_isolated(code, Cost::Worker, "worker died: SIGILL");
}

#[test]
fn a_pattern_that_runs_away() {
    let code = "string.find(('a'):rep(30), ('a*'):rep(30) .. 'b')";
    assert_isolated(code, Cost::Worker, "worker hangs in Lua: killing it");
}

/// The log line about a hang has the id of the mail.
#[test]
fn a_hang_names_its_mail() {
    let code = "string.find(('a'):rep(30), ('a*'):rep(30) .. 'b')";
    let daemon = Daemon::start(&config(1, Cost::Worker, "", code));
    assert_eq!(begin(&daemon).outcome(), "Ztry again later");
    let line = daemon.wait_for_log("worker hangs in Lua");
    let id = line.split(' ').find(|word| word.starts_with("id=")).expect("an id");
    let lost = daemon.wait_for_log("lost_in=lua");
    assert!(lost.contains(id), "{line}\n{lost}");
    let handler = line.split(' ').find_map(|word| word.strip_prefix("handler=")).expect("a place");
    let (file, number) = handler.rsplit_once(':').expect("a line");
    assert_eq!(file, daemon.path("config.lua").to_str().expect("UTF-8"));
    let script = std::fs::read_to_string(file).expect("the script");
    let number: usize = number.parse().expect("a number");
    assert!(script.lines().nth(number - 1).is_some_and(|line| line.contains("function")), "{line}");
}

/// Returns the number of descriptors of the only worker.
fn descriptors(daemon: &Daemon) -> usize {
    processes::descriptors(daemon.workers()[0]).len()
}

#[test]
fn coroutines_that_are_never_resumed() {
    let code = "for i = 1, 10 do coroutine.wrap(function() coroutine.yield(m.sender) end)() end \
        kept = kept or {} kept[#kept + 1] = coroutine.create(function() return m.sender end) \
        return m:discard('left')";
    let daemon = Daemon::start(&config(1, Cost::Mail, "lua_memory_limit=4*1024*1024", code));
    assert_eq!(submit(daemon.path("in"), &bad()), "Kleft");
    let (workers, before) = (daemon.workers(), descriptors(&daemon));
    for _ in 0..200 {
        assert_eq!(submit(daemon.path("in"), &bad()), "Kleft");
        assert_eq!(probe(&daemon).status(), 'K');
    }
    eventually("no more descriptors", || (descriptors(&daemon) <= before).then_some(()));
    assert_eq!(daemon.workers(), workers);
}

#[test]
fn a_leader_that_makes_no_progress_costs_its_worker() {
    let daemon = Daemon::start(&config(1, Cost::Worker, "", "return m:discard()"));
    let worker = daemon.wait_for_workers(1, &[])[0];
    // The thread that receives the jobs, the only one before the first mail, is stopped. The others
    // run, and answer pings.
    let leader = processes::thread_named(worker, "mail");
    ptrace::attach(leader).expect("attach");
    waitpid(leader, Some(WaitPidFlag::__WALL)).expect("stopped");
    let started = Instant::now();
    let mut client = Client::connect(daemon.path("in"));
    client.send(&bad().request());
    daemon.wait_for_log("worker begins no mail");
    // A thread that is traced is gone only when its tracer knows.
    while !matches!(
        waitpid(leader, Some(WaitPidFlag::__WALL)),
        Ok(WaitStatus::Signaled(..) | WaitStatus::Exited(..)) | Err(_)
    ) {
        let _ = ptrace::cont(leader, Signal::SIGABRT);
    }
    assert_eq!(client.outcome(), "Ztry again later");
    assert!(started.elapsed() > Duration::from_secs_f64(HANG_TIMEOUT));
    daemon.wait_for_workers(1, &[worker]);
    assert_eq!(probe(&daemon).status(), 'K');
}

#[test]
fn a_coroutine_that_waits_and_is_forgotten() {
    // The coroutine still waits in an operation when the handler has ended, and is never resumed.
    let code = "local c = coroutine.create(function() coroutine.yield() sleep(100) end) \
        coroutine.resume(c) return m:discard('left')";
    let daemon = Daemon::start(&config(1, Cost::Mail, "", code));
    for _ in 0..20 {
        let started = Instant::now();
        assert_eq!(submit(daemon.path("in"), &bad()), "Kleft");
        // The answer doesn't wait for the end of the coroutine.
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    }
}

#[test]
fn ten_thousand_objects_kept() {
    let code = "kept = kept or {} for i = 1, 10000 do kept[#kept + 1] = {i, m} end \
        return m:discard('kept')";
    // The default memory limit has room for all these objects.
    let daemon = Daemon::start(&config(1, Cost::Mail, "", code));
    let workers = daemon.workers();
    assert_eq!(submit(daemon.path("in"), &bad()), "Kkept");
    let before = descriptors(&daemon);
    for _ in 0..10 {
        assert_eq!(submit(daemon.path("in"), &bad()), "Kkept");
        assert_eq!(probe(&daemon).status(), 'K');
    }
    assert_eq!(daemon.workers(), workers);
    eventually("no more descriptors", || (descriptors(&daemon) <= before).then_some(()));
}

#[test]
fn objects_kept_until_memory_is_full_cost_their_own_mail_and_then_the_worker_is_replaced() {
    let code = "kept = kept or {} for i = 1, 10000 do kept[#kept + 1] = {i, m} end \
        return m:discard('kept')";
    let daemon = Daemon::start(&config(2, Cost::Mail, "lua_memory_limit=8*1024*1024", code));
    let workers = daemon.wait_for_workers(2, &[]);
    let started = Instant::now();
    let mut failed = 0;
    while daemon.workers().iter().filter(|pid| workers.contains(pid)).count() == 2 {
        assert!(started.elapsed() < PATIENCE, "never replaced; {failed} failed");
        let told = submit(daemon.path("in"), &bad());
        assert!(told == "Kkept" || told == "Zscript failed", "{told}");
        failed += usize::from(told.status() == 'Z');
        let told = probe(&daemon);
        // A full worker may fail one more mail before the supervisor knows that the worker is full.
        assert!(told.status() == 'K' || told == "Zscript failed", "{told}");
    }
    assert!(failed > 0);
    daemon.wait_for_log("memory limit is reached");
    let line = daemon.wait_for_log("script failed: not enough memory");
    assert!(line.contains(&format!("listener={}", daemon.path("in").display())), "{line}");
    assert_eq!(daemon.count_log("worker died"), 0, "replaced, not crashed");
    eventually("a mail is accepted again", || (probe(&daemon).status() == 'K').then_some(()));
}
