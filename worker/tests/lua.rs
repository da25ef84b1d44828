//! The script as the rest of the worker sees it: temporary scripts, real mails, real threads.

mod support;

use std::time::{Duration, Instant};

use qrelay_worker::action::Action;
use qrelay_worker::lua::error::HandlerError;
use support::{Script, mail};

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

/// 200 handlers that each wait 0.2 s; the script says where.
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
fn also_inside_pcall() {
    many_sleepers("function(m) assert(pcall(sleep, 0.2)) return m:discard() end");
    many_sleepers(
        "function(m) assert(xpcall(function() sleep(0.2) end, print)) return m:discard() end",
    );
}

#[test]
fn also_inside_coroutines_of_the_script() {
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
fn also_inside_metamethods_and_iterators() {
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
fn where_yielding_is_impossible_it_blocks() {
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
fn the_deadline_ends_waiting() {
    let script = Script::load("qmqp_listen('/a', function(m) sleep(60) return m:discard() end)");
    let start = Instant::now();
    let (_, action) = script.handle_within(0, mail(), Duration::from_millis(50));
    assert_eq!(action.err(), Some(HandlerError::Deadline));
    assert!(start.elapsed() < Duration::from_secs(1));
}

/// The handler is stopped soon after its time is over, and the next one runs normally.
fn runaway(handler: &str) {
    let script = Script::load(&format!(
        "settings{{handler_timeout=0.2, hang_timeout=5}}
         qmqp_listen('/a', {handler})
         survivor = coroutine.wrap(function()
           while true do
             local n = 0
             for i = 1, 1000000 do n = n + i end
             coroutine.yield(n)
           end
         end)
         qmqp_listen('/b', function(m)
           local n = 0
           for i = 1, 1000000 do n = n + i end
           pcall(survivor)
           return m:discard()
         end)"
    ));
    let start = Instant::now();
    let (_, action) = script.handle(0, mail());
    let elapsed = start.elapsed();
    assert_eq!(action.err(), Some(HandlerError::Script));
    assert!(elapsed >= Duration::from_millis(200), "{elapsed:?}");
    assert!(elapsed < Duration::from_millis(450), "{elapsed:?}");
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
fn a_loop_in_a_surviving_coroutine_is_stopped() {
    runaway("function(m) while true do pcall(survivor) end end");
}
