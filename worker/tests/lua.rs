//! The interface between a script and the rest of the worker, with temporary scripts, real mails
//! and real threads.

mod configuration;
mod support;

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use qrelay_worker::delivery::action::Action;
use qrelay_worker::session::script::HandlerError;
use support::{Script, mail, remote_mail};

/// Loads a script of `tests/lua/` and runs all its handlers, whose assertions must hold.
fn run(file: &str) -> Script {
    let path = format!("{}/tests/lua/{file}", env!("CARGO_MANIFEST_DIR"));
    let source = std::fs::read_to_string(path).expect("the test's script");
    let script = Script::load(&source);
    for listener in 0..script.declaration.listeners.len() {
        let (_, action) = script.handle(listener, mail());
        assert!(action.is_ok(), "{}", script.log());
    }
    script
}

#[test]
fn mail_objects() {
    run("mail.lua");
}

#[test]
fn actions() {
    run("action.lua");
}

#[test]
fn surplus_arguments() {
    run("arguments.lua");
}

#[test]
fn addresses() {
    run("address.lua");
}

#[test]
fn the_standard_library() {
    run("standard.lua");
}

#[test]
fn output_goes_to_the_log() {
    let log = run("output.lua").log();
    for line in [
        "INFO loading\t1\tnil\ttrue\n",
        "INFO no line enda1\n",
        "INFO in the handler id=id-1\n",
        "INFO second line id=id-1\n",
        "WARN warning id=id-1\n",
        "INFO unfinished id=id-1\n",
    ] {
        assert!(log.contains(line), "{line:?} is not in:\n{log}");
    }
}

#[test]
fn a_mail_comes_back_changed() {
    let script = Script::load(
        "qmqp_listen('/a', function(m)
           m.sender = ''
           m.recipients = {'x@example.net'}
           m.account = 'alice'
           m:insert_header('X-One', 1)
           m:insert_header('X-Two', 2)
           m:remove_header('x-spam')
           return m:connect('@next')
         end)",
    );
    let (mail, action) = script.handle(0, mail());
    assert!(action.is_ok(), "{}", script.log());
    assert_eq!(mail.sender(), b"");
    assert_eq!(mail.recipients().collect::<Vec<_>>(), [b"x@example.net"]);
    assert_eq!(mail.account(), Some("alice"));
    let inserted: Vec<_> = mail.inserted().lines().collect();
    assert_eq!(inserted, [b"X-Two: 2", b"X-One: 1"]);
    let kept: Vec<_> = mail.kept().collect();
    assert_eq!(kept, [&b"Subject: one\r\n"[..], b"\r\nbody X-Spam: d\r\n"]);
}

#[test]
fn remote_clients_have_no_ids() {
    let script = Script::load(
        "qmqp_listen('/a', function(m)
           assert(m.pid == nil and m.uid == nil and m.gid == nil and m.peer == '192.0.2.7')
           return m:discard()
         end)",
    );
    let (_, action) = script.handle(0, remote_mail());
    assert!(action.is_ok(), "{}", script.log());
}

/// Checks that the handler fails, and that the log has the reason and the mail's id.
fn failure(handler: &str, reason: &str) {
    let script = Script::load(&format!("qmqp_listen('/a', {handler})"));
    let (_, action) = script.handle(0, mail());
    assert_eq!(action.err(), Some(HandlerError::Script), "{handler}");
    let log = script.log();
    assert!(log.contains(reason), "{reason:?} is not in:\n{log}");
    assert!(log.contains("id=id-1"), "{log}");
    assert!(!log.contains("[qrelay]"), "{log}");
}

/// A traceback has what the script wrote, and nothing of what qrelay has in Lua itself.
#[test]
fn tracebacks_are_the_scripts() {
    let script = Script::load(
        "local function deep() local co = coroutine.wrap(function() sleep('x') end) co() end
         qmqp_listen('/a', function(m) deep() end)
         qmqp_listen('/b', function(m)
           local ok, trace = xpcall(function() socket:connect({}) end, debug.traceback)
           assert(not trace:find('[qrelay]', 1, true) and trace:find('config.lua:4: in', 1, true))
           assert(trace:find('connect', 1, true), trace)
           assert(debug.traceback('x', 1):find('^x\\nstack traceback:\\n\\t.*config.lua:7: in'))
           assert(debug.traceback({}) ~= nil and type(debug.traceback({})) == 'table')
           return m:discard()
         end)
         qmqp_listen('/c', function(m) m.foo = 5 end)",
    );
    assert!(script.handle(0, mail()).1.is_err());
    assert!(script.handle(1, mail()).1.is_ok(), "{}", script.log());
    assert!(script.handle(2, mail()).1.is_err());
    let log = script.log();
    assert!(log.contains("config.lua:1: in ") && !log.contains("[qrelay]"), "{log}");
    assert!(!log.contains("upvalue 'unknown'"), "{log}");
}

#[test]
fn failures_are_logged_with_their_cause() {
    failure("function(m) end", "returned nil, expected an action");
    failure("function(m) return 5 end", "returned 5, expected an action");
    let place = "config.lua:2: the handler returned";
    let nil = "nil, expected an action such as m:connect(address); did you forget 'return'?";
    failure("\nfunction(m)\nm:discard() end", &format!("{place} {nil}"));
    let function = "a function, expected an action such as m:connect(address); did you forget to";
    failure("\nfunction(m)\nreturn m.discard end", &format!("{place} {function} call it?"));
    failure("\nfunction(m)\nreturn 'x' end", &format!("{place} 'x', expected an action"));
    failure(
        "function(m) error({code = 5, text = 'a\\nb', [1] = {}}) end",
        "{[1] = table, code = 5, text =",
    );
    failure(
        "function(m) error(setmetatable({}, {__tostring = function() return 'mine' end})) end",
        "script failed: mine",
    );
    failure("function(m) shared.new('x') end", "as in shared:new(…); got 'x'");
    failure("function(m) socket.connect('/x') end", "as in socket:connect(…); got '/x'");
    failure("function(m) control_client.new('/x') end", "as in control_client:new(…); got");
    failure("function(m) shared:new('x').get('k') end", "call 'get' with a colon, as in d:get(…)");
    failure("function(m) m:exec_raw({'/bin/cat'}) end", "as in m:exec_raw('/usr/sbin/sendmail'");
    failure("function(m) m:exec({}) end", "got a table, expected the program and its arguments");
    failure("function(m) qmpq_listen() end", "(global 'qmpq_listen'); did you mean 'qmqp_listen'?");
    failure("function(m) sodium.randmbytes(5) end", "; did you mean 'randombytes'?");
    failure(
        "function(m) nothing_like_it() end",
        "a nil value (global 'nothing_like_it') traceback=",
    );
    failure("function(m) return m:discard(), 'x' end", "returned 'x', expected an action");
    failure("function(m) error('boom') end", "config.lua:1: boom");
    failure("function(m) error({}) end", "script failed: table: 0x");
    failure("function(m) error() end", "script failed: nil");
    failure("function(m) local x = nil; x.y = 1 end", "attempt to index a nil value (local 'x')");
    failure("function(m) return m:connect('a.host:x') end", "config.lua:1: bad argument #1");
    failure("function(m) coroutine.yield() end", "yielded, but there is nobody");
    failure("function(m) coroutine.yield(m) end", "yielded, but there is nobody");
    failure("function(m) sleep('x') end", "config.lua:1: bad argument #1 to 'sleep'");
    failure("function(m) local function f() return f() + 1 end f() end", "stack overflow");
    failure("function(m) return ('x'):rep(1 << 30) end", "not enough memory");
}

#[test]
fn a_full_memory_is_noticed() {
    let script = Script::load(
        "settings{lua_memory_limit=8 << 20}
         local kept = {}
         qmqp_listen('/garbage', function(m) return ('x'):rep(16 << 20) end)
         qmqp_listen('/kept', function(m)
           while true do kept[#kept + 1] = ('x'):rep(1 << 10) .. #kept end
         end)",
    );
    let (_, action) = script.handle(0, mail());
    assert_eq!(action.err(), Some(HandlerError::Script));
    assert!(!script.state.exhausted());
    let (_, action) = script.handle(1, mail());
    assert_eq!(action.err(), Some(HandlerError::Script));
    assert!(script.state.exhausted(), "{}", script.log());
}

/// The collector of Lua 5.3 may fall behind if a script keeps a large table, while each mail leaves
/// some objects with finalizers.
#[test]
fn objects_of_mails_are_collected_in_time() {
    let script = Script::load(
        "local kept = {}
         for i = 1, 300 do
           kept[i] = table.pack(string.byte(('x'):rep(60), 1, -1))
         end
         collectgarbage()
         collectgarbage()
         local start, most, mails = collectgarbage('count'), 0, 0
         qmqp_listen('/a', function(m)
           mails = mails + 1
           if mails % 100 == 0 then most = math.max(most, collectgarbage('count')) end
           if mails < 100000 then return m:discard() end
           return m:discard(string.format('%.0f', most / start * 100))
         end)",
    );
    let mut percent = None;
    for _ in 0..100_000 {
        let (_, action) = script.handle(0, mail());
        if let Ok(Action::Discard(Some(text))) = action {
            percent = text.parse::<u32>().ok();
        }
    }
    assert!(percent.is_some_and(|percent| percent < 300), "{percent:?} % of what the script keeps");
}

/// The collector may run wherever memory is allocated, also while the mail's object is created.
#[test]
fn finalizers_never_run_as_if_the_script_were_loading() {
    let script = Script::load(
        "local mails, wrong, ran = 0, 0, 0
         local function arm()
           setmetatable({}, {__gc = function()
             if mails > 0 then
               ran = ran + 1
               if pcall(every, 60, print) then wrong = wrong + 1 end
               arm()
             end
           end})
         end
         qmqp_listen('/a', function(m)
           mails = mails + 1
           if mails == 1 then arm() end
           if mails < 20000 then return m:discard() end
           mails = 0
           return m:discard(wrong .. ' of ' .. (ran > 10 and 'many' or ran))
         end)",
    );
    let mut told = None;
    for _ in 0..20_000 {
        match script.handle(0, mail()).1 {
            Ok(Action::Discard(text)) => told = text,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(told.as_deref(), Some("0 of many"));
}

#[test]
fn a_handler_decides() {
    let script = Script::load(
        "qmqp_listen('/a', function(m) return m:connect('127.0.0.1:628') end)
         qmqp_listen('/b', function(m) return 1, m:reject('no') end)",
    );
    let (_, action) = script.handle(0, mail());
    assert!(matches!(action, Ok(Action::Connect(_))), "{action:?}");
    let (_, action) = script.handle(1, mail());
    assert!(matches!(&action, Ok(Action::Reject(Some(text))) if &**text == "no"), "{action:?}");
}

/// Runs 200 handlers that each wait 0.2 s at a place that the script chooses, and checks that they
/// wait at the same time.
fn many_sleepers(handler: &str) {
    let script = Script::load(&format!("qmqp_listen('/a', {handler})"));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..200 {
            scope.spawn(|| {
                let (_, action) = script.handle(0, mail());
                assert!(matches!(action, Ok(Action::Discard(_))), "{action:?}\n{}", script.log());
            });
        }
    });
    let elapsed = start.elapsed();
    assert!(elapsed < Duration::from_secs(2), "{elapsed:?}");
}

#[test]
fn sleeping_handlers_run_at_the_same_time() {
    many_sleepers("function(m) sleep(0.2) return m:discard() end");
}

#[test]
fn handlers_that_sleep_inside_pcall_run_at_the_same_time() {
    many_sleepers("function(m) assert(pcall(sleep, 0.2)) return m:discard() end");
    many_sleepers(
        "function(m) assert(xpcall(function() sleep(0.2) end, print)) return m:discard() end",
    );
}

#[test]
fn handlers_that_sleep_inside_coroutines_run_at_the_same_time() {
    many_sleepers(
        "function(m)
           local co = coroutine.create(function(a)
             sleep(0.1)
             local b = coroutine.yield(a + 1)
             sleep(0.1)
             return b + 1
           end)
           local ok, x = coroutine.resume(co, 1)
           assert(ok and x == 2)
           local ok, y = coroutine.resume(co, 10)
           assert(ok and y == 11)
           assert(coroutine.status(co) == 'dead')
           return m:discard()
         end",
    );
    many_sleepers(
        "function(m)
           for x in coroutine.wrap(function()
             for i = 1, 4 do
               coroutine.wrap(function() sleep(0.05) end)()
               coroutine.yield(i)
             end
           end) do end
           return m:discard()
         end",
    );
}

#[test]
fn handlers_that_sleep_inside_metamethods_and_iterators_run_at_the_same_time() {
    many_sleepers(
        "function(m)
           local t = setmetatable({}, {__index = function(t, k) sleep(0.1) return k end})
           assert(t.x == 'x')
           for _ in function(s, c) if not c then sleep(0.1) return 1 end end do end
           return m:discard()
         end",
    );
}

#[test]
fn sleep_blocks_where_yielding_is_impossible() {
    let script = Script::load(
        "sleep(0.01)
         qmqp_listen('/a', function(m)
           table.sort({3, 2, 1}, function(a, b) sleep(0.01) return a < b end)
           return m:discard()
         end)",
    );
    let (_, action) = script.handle(0, mail());
    assert!(action.is_ok(), "{}", script.log());
}

#[test]
fn a_mail_whose_time_is_over_is_not_begun() {
    let script =
        Script::load("qmqp_listen('/a', function(m) print('begun') return m:discard() end)");
    let (_, action) = script.handle_within(0, mail(), Duration::ZERO);
    assert_eq!(action.err(), Some(HandlerError::NotBegun));
    assert!(!script.log().contains("begun"), "{}", script.log());
}

#[test]
fn the_deadline_ends_waiting() {
    let script = Script::load("qmqp_listen('/a', function(m) sleep(60) return m:discard() end)");
    let start = Instant::now();
    let (_, action) = script.handle_within(0, mail(), Duration::from_millis(50));
    assert_eq!(action.err(), Some(HandlerError::Deadline));
    assert!(start.elapsed() < Duration::from_secs(1));
}

/// Returns the CPU time of this thread.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock").into()
}

/// Checks that a handler is stopped soon after its time is over, and that the next one runs
/// normally.
fn runaway(handler: &str) {
    let script = Script::load(&format!(
        "settings{{handler_timeout=0.2, hang_timeout=5}}
         qmqp_listen('/a', {handler})
         survivor = coroutine.wrap(function()
           while true do
             local n = 0
             for i = 1, 100000 do n = n + i end
             coroutine.yield(n)
           end
         end)
         qmqp_listen('/b', function(m)
           local n = 0
           for i = 1, 100000 do n = n + i end
           pcall(survivor)
           return m:discard()
         end)"
    ));
    let (start, cpu) = (Instant::now(), cpu_time());
    let (_, action) = script.handle(0, mail());
    let (elapsed, cpu) = (start.elapsed(), cpu_time() - cpu);
    assert_eq!(action.err(), Some(HandlerError::Script));
    assert!(elapsed >= Duration::from_millis(200), "{elapsed:?}");
    // The limit is for this thread alone, because other tests run at the same time.
    assert!(cpu < Duration::from_millis(450), "{cpu:?}");
    assert!(script.log().contains("handler_timeout"), "{}", script.log());
    let (_, action) = script.handle(1, mail());
    assert!(action.is_ok(), "{}", script.log());
}

#[test]
fn a_plain_loop_is_stopped() {
    runaway("function(m) while true do end end");
}

#[test]
fn a_loop_with_pcall_is_stopped() {
    runaway("function(m) while true do pcall(function() while true do end end) end end");
}

#[test]
fn a_sort_with_pcall_is_stopped() {
    runaway(
        "function(m)
           while true do
             pcall(table.sort, {5, 4, 3, 2, 1}, function(a, b)
               while true do pcall(error) end
             end)
           end
         end",
    );
}

#[test]
fn nested_coroutines_are_stopped() {
    runaway(
        "function(m)
           local function nest(n)
             if n == 0 then while true do pcall(error) end end
             while true do
               local co = coroutine.create(nest)
               pcall(coroutine.resume, co, n - 1)
             end
           end
           nest(5)
         end",
    );
}

#[test]
fn coroutines_that_catch_everything_are_stopped() {
    runaway(
        "function(m)
           local function nest(n)
             while true do
               if n == 0 then pcall(error)
               else pcall(coroutine.wrap(pcall), pcall, nest, n - 1) end
             end
           end
           nest(5)
         end",
    );
}

#[test]
fn waiting_is_not_running() {
    let script = Script::load(
        "settings{handler_timeout=0.1, hang_timeout=5}
         qmqp_listen('/a', function(m) for i = 1, 4 do sleep(0.1) end return m:discard() end)",
    );
    let (_, action) = script.handle(0, mail());
    assert!(action.is_ok(), "{}", script.log());
}

#[test]
fn a_loop_in_a_surviving_coroutine_is_stopped() {
    runaway("function(m) while true do pcall(survivor) end end");
}

#[test]
fn finalizers_may_use_the_mail() {
    let script = Script::load(
        "collectgarbage('setpause', 50)
         settings{handler_timeout=60, hang_timeout=90}
         qmqp_listen('/a', function(m)
           for i = 1, 20000 do
             setmetatable({}, {__gc = function() return m.sender, m.recipients, print end})
             local x = m.sender .. i, m.recipients, m:header('subject')
             m.account = i
           end
           return m:discard()
         end)",
    );
    let (_, action) = script.handle(0, mail());
    assert!(action.is_ok(), "{}", script.log());
}

#[test]
fn endless_recursion_is_an_error() {
    failure("function(m) local function f(s) return (s:gsub('.', f)) end f('x') end", "overflow");
    failure(
        "function(m)
           local t = setmetatable({}, {__tostring = function(t) return tostring(t) end})
           return tostring(t)
         end",
        "overflow",
    );
    failure("function(m) local function f() return pcall(f) end error(tostring(f())) end", "");
    failure(
        "function(m)
           local function f() return coroutine.wrap(f)() end
           f()
         end",
        "overflow",
    );
}

/// Returns the resident memory of this process in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

/// Many threads run handlers that end in every possible way, and nothing accumulates.
#[test]
fn many_threads_leave_nothing_behind() {
    let script = Script::load(
        "settings{handler_timeout=0.05, hang_timeout=5}
         qmqp_listen('/0', function(m) sleep(0) return m:connect('@a') end)
         qmqp_listen('/1', function(m) sleep(10) return m:discard() end)
         qmqp_listen('/2', function(m) coroutine.wrap(function() sleep(0.001) end)() end)
         qmqp_listen('/3', function(m) error{} end)
         qmqp_listen('/4', function(m)
           m:insert_header('X-A', m.sender)
           local _ = m.recipients
           return m:connect{'@a', '@b'}
         end)
         local n = 0
         qmqp_listen('/5', function(m)
           n = n + 1
           if n % 50 == 0 then while true do pcall(error) end end
           return m:defer()
         end)",
    );
    let round = || {
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let script = &script;
                scope.spawn(move || {
                    for i in 0..100 {
                        let limit = Duration::from_millis(if i % 2 == 0 { 2 } else { 5000 });
                        let listener = (thread + i) % 6;
                        let limit = if listener == 1 { Duration::from_millis(2) } else { limit };
                        let (mail, _) = script.handle_within(listener, mail(), limit);
                        assert_eq!(&*mail.id(), "id-1");
                    }
                });
            }
        });
    };
    round();
    let before = resident();
    (0..10).for_each(|_| round());
    let after = resident();
    assert!(after < before + 16 * 1024, "{before} KiB before, {after} KiB after");
    let (_, action) = script.handle(0, mail());
    assert!(action.is_ok());
    assert_eq!(script.state.held().duration, Duration::ZERO);
}
