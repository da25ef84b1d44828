//! The script's view of a mail: its attributes, the actions, and the cost of the script's mistakes.

use std::time::{Duration, Instant};

use crate::harness::{Daemon, Mail, Sink, Target, burst, submit};

/// Starts a daemon with one worker whose handler is `body`, with the mail as `m`.
fn handler(body: &str) -> Daemon {
    handler_with("", body)
}

fn handler_with(settings: &str, body: &str) -> Daemon {
    Daemon::start(&format!(
        "settings{{workers=1, {settings}}}
         qmqp_listen('$DIR/in', function(m) {body} end)"
    ))
}

/// Starts a daemon whose handler runs the Lua code in the mail's field `X-Code`.
fn evaluator() -> Daemon {
    handler("return assert(load('local m = ... ' .. m:header('X-Code')))(m)")
}

/// Returns the mail with `code` in a field `X-Code` at its front.
fn with_code(code: &str, mail: &Mail) -> Mail {
    let mut mail = mail.clone();
    mail.message.splice(0..0, format!("X-Code: {code}\n").into_bytes());
    mail
}

#[test]
fn attributes() {
    let daemon = handler(
        "return m:discard(table.concat({m.sender, table.concat(m.recipients, ','), m.size,
            tostring(m.pid), tostring(m.uid), tostring(m.gid), m.listener,
            tostring(m.account)}, ' '))",
    );
    let mail = Mail::new("x").from("s@x").to(&["a@x", "b@y"]);
    let told = submit(daemon.path("in"), &mail);
    let expected = format!(
        "Ks@x a@x,b@y {} {} 0 0 {} nil",
        mail.message.len(),
        std::process::id(),
        daemon.path("in").display()
    );
    assert_eq!(told.to_string(), expected);
}

#[test]
fn remote_clients_have_no_ids() {
    let address = Target::free_port();
    let daemon = Daemon::start(&format!(
        "qmqp_listen('{address}', function(m)
           m:insert_header('X-Peer', m.peer)
           return m:discard(tostring(m.pid) .. tostring(m.uid) .. tostring(m.gid) .. ' ' .. m.peer)
         end)"
    ));
    let told = submit(address, &Mail::new("x")).to_string();
    assert!(told.starts_with("Knilnilnil 127.0.0.1"), "{told}");
    drop(daemon);
}

#[test]
fn other_users_are_told_apart() {
    let daemon = handler("return m:discard(m.uid .. ' ' .. m.gid)");
    let output = crate::harness::daemon::send_as_nobody(&daemon.path("in"), "s@x");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "65534 65534", "{output:?}");
}

#[test]
fn ids_are_unique_and_in_the_log() {
    let daemon = handler("return m:discard(m.id)");
    let mut ids: Vec<_> = (0..20)
        .map(|_| submit(daemon.path("in"), &Mail::new("x")).to_string()[1..].to_owned())
        .collect();
    for id in &ids {
        assert!(!id.is_empty());
        daemon.wait_for_log(id);
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 20);
}

#[test]
fn envelope_can_be_rewritten() {
    let daemon = handler(
        "local r = m.recipients
         r[1] = 'changed@x'
         assert(m.recipients[1] == 'recipient@example.org', 'a fresh list each time')
         r[2] = 'added@x'
         m.recipients = r
         m.sender = ''
         return m:connect('$DIR/out')",
    );
    let sink = Sink::answering(daemon.path("out"), "Kok");
    let mail = Mail::new("x");
    assert_eq!(submit(daemon.path("in"), &mail), "Kok");
    assert_eq!(sink.only(), mail.relayed().from("").to(&["changed@x", "added@x"]));
}

#[test]
fn misuse_raises() {
    let daemon = evaluator();
    for wrong in [
        "m.sender = 'nobody'",
        "m.sender = nil",
        "m.sender = 'a@x\\n'",
        "m.recipients = {}",
        "m.recipients = {'nobody'}",
        "m.recipients = 'r@x'",
        "m.recipients = {''}",
        "m.account = ''",
        "m.account = ('x'):rep(256)",
        "m.account = 'a\\nb'",
        "m.pid = 1",
        "m.id = 'x'",
        "m.nonsense = 1",
        "local x = m.nonsense",
        "m:nonsense()",
        "m:connect()",
        "m:connect({})",
        "m:connect('')",
        "m:connect('relative/path')",
        "m:connect('@')",
        "m:connect('127.0.0.1:99999')",
        "m:connect('/x', {timeout=0})",
        "m:connect('/x', {timeout=3601})",
        "m:connect('/x', {tiemout=1})",
        "m:connect('/x', {order='sideways'})",
        "m:discard({})",
        "m:insert_header('X', 'a\\r\\nEvil: b')",
        "m:insert_header('X', 'a\\n b')",
        "m:insert_header('X', '\\xc3\\xa4')",
        "m:insert_header('X Y', 'a')",
        "m:insert_header('X:', 'a')",
        "m:insert_header('', 'a')",
        "m:insert_header('X')",
        "m:insert_header('X', ('x'):rep(996))",
        "sleep(-1)",
        "sleep('soon')",
        "qmqp_listen('/x', function() end)",
        "settings{workers=2}",
    ] {
        let code = format!(
            "local ok, message = pcall(function() {wrong} end) \
             if ok then return m:reject('was accepted') end return m:discard(tostring(message))"
        );
        let told = submit(daemon.path("in"), &with_code(&code, &Mail::new("x")));
        assert_eq!(told.status(), 'K', "{wrong}: {told}");
    }
}

#[test]
fn headers_are_read() {
    let mut mail = Mail::new("");
    mail.message =
        b"Subject: hello\r\n  folded\r\n\tworld\r\nX-One: 1\nx-one: 2\nEmpty:\n\nBody: no\n"
            .to_vec();
    let daemon = evaluator();
    let says = |expression: &str, mail: &Mail| {
        let code = format!("return m:discard(tostring({expression}))");
        submit(daemon.path("in"), &with_code(&code, mail)).to_string()
    };
    assert_eq!(says("(m:header('SUBJECT'):gsub('[ \\t]+', '_'))", &mail), "Khello_folded_world");
    assert_eq!(says("m:header('x-ONE')", &mail), "K1");
    assert_eq!(says("'<' .. m:header('empty') .. '>'", &mail), "K<>");
    assert_eq!(says("m:header('Body')", &mail), "Knil");
    let inserted = "(function() m:insert_header('X-One', 'mine') return m:header('X-One') end)()";
    assert_eq!(says(inserted, &mail), "K1");
}

#[test]
fn headers_are_inserted() {
    let daemon = handler(
        "m:insert_header('X-First', 'one')
         m:insert_header('X-Second', 2)
         m:insert_header('X-Third', setmetatable({}, {__tostring = function() return 'three' end}))
         return m:connect('$DIR/out')",
    );
    let sink = Sink::answering(daemon.path("out"), "Kok");
    let mail = Mail::of_size(3000);
    assert_eq!(submit(daemon.path("in"), &mail), "Kok");
    let lines = "X-Third: three\nX-Second: 2\nX-First: one\n";
    assert_eq!(sink.only(), mail.relayed_from(std::process::id(), 0, lines));
}

#[test]
fn sixteen_headers_and_no_more() {
    let daemon = handler(
        "for i = 1, 16 do m:insert_header('X-' .. i, ('v'):rep(990)) end
         assert(not pcall(m.insert_header, m, 'X-17', 'v'))
         return m:connect('$DIR/out')",
    );
    let sink = Sink::answering(daemon.path("out"), "Kok");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
    assert!(sink.only().message.starts_with(b"X-16: vvv"));
}

#[test]
fn actions_without_a_next_hop() {
    let daemon = evaluator();
    for (action, told) in [
        ("m:discard()", "Kdiscarded"),
        ("m:discard('eaten')", "Keaten"),
        ("m:reject()", "Drejected"),
        ("m:reject('not here')", "Dnot here"),
        ("m:defer()", "Zdeferred"),
        ("m:defer('come back')", "Zcome back"),
        ("m:discard(), m:reject('the last counts')", "Dthe last counts"),
    ] {
        let mail = with_code(&format!("return {action}"), &Mail::new("x"));
        assert_eq!(submit(daemon.path("in"), &mail), told, "{action}");
    }
}

#[test]
fn an_action_belongs_to_no_mail() {
    let daemon = Daemon::start(
        "settings{workers=1}
         local kept
         qmqp_listen('$DIR/in', function(m)
           kept = kept or m:discard('kept from ' .. m.sender)
           return kept
         end)",
    );
    for sender in ["a@x", "b@x"] {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x").from(sender)), "Kkept from a@x");
    }
}

#[test]
fn a_mail_object_is_dead_after_its_mail() {
    let daemon = Daemon::start(
        "settings{workers=1}
         local kept
         qmqp_listen('$DIR/in', function(m)
           if not kept then kept = m return m:discard('first') end
           local ok, message = pcall(function() return kept.sender end)
           return m:discard(tostring(ok) .. ' ' .. tostring(message))
         end)",
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kfirst");
    let told = submit(daemon.path("in"), &Mail::new("x")).to_string();
    assert!(told.starts_with("Kfalse") && told.contains("Stale object"), "{told}");
}

#[test]
fn mistakes_are_answered_with_z_and_logged() {
    for (body, logged) in [
        ("error('my own words')", "my own words"),
        ("local t = nil; t.x = 1", "attempt to index"),
        ("error({})", "config.lua"),
        ("return 1", "action"),
        ("return nil", "action"),
        ("", "action"),
        ("return 'Kok'", "action"),
        ("coroutine.yield()", "yield"),
        ("local function f() return f() + 1 end return f()", "stack overflow"),
    ] {
        let daemon = handler(body);
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zscript failed", "{body}");
        daemon.wait_for_log(logged);
        // The worker has survived the mistake.
        let workers = daemon.workers();
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zscript failed", "{body}");
        assert_eq!(daemon.workers(), workers);
    }
}

#[test]
fn tracebacks_name_the_callers() {
    let daemon = Daemon::start(
        "settings{workers=1}
         local function inner(m) error('deep down') end
         local function outer(m) inner(m) return 1 end
         qmqp_listen('$DIR/in', function(m) outer(m) end)",
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zscript failed");
    daemon.wait_for_log("config.lua:2: deep down");
    daemon.wait_for_log("config.lua:3:");
    daemon.wait_for_log("config.lua:4:");
}

#[test]
fn output_reaches_the_log_line_by_line_and_harmless() {
    let daemon = Daemon::start(
        "print('while loading')
         settings{workers=1}
         qmqp_listen('$DIR/in', function(m)
           print('from the handler', 42, nil)
           io.write('written ', 1, '\\n')
           io.stderr:write('to stderr\\n')
           print('red \\27[31m text')
           return m:discard()
         end)",
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    for part in ["while loading", "from the handler\t42\tnil", "written 1", "to stderr", " text"] {
        let part = part.split('\t').next().expect("not empty");
        daemon.wait_for_log(part);
    }
    assert!(!daemon.text().contains('\x1b'), "{}", daemon.text());
    assert_eq!(daemon.count_log("while loading"), 1, "the script runs once");
}

#[test]
fn the_script_runs_in_its_directory_and_handlers_in_the_root() {
    let site = crate::harness::Site::new();
    std::fs::write(site.path("part.lua"), "return 'from part.lua'").expect("file");
    site.configure(
        "local text = dofile('part.lua')
         qmqp_listen('$DIR/in', function(m)
           return m:discard(text .. ' ' .. tostring(io.open('part.lua') == nil))
         end)",
    );
    let daemon = site.start();
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kfrom part.lua true");
}

#[test]
fn sleeping_handlers_delay_nobody() {
    for body in [
        "sleep(0.2)",
        "assert(pcall(sleep, 0.2))",
        "assert(coroutine.wrap(function() sleep(0.2) return true end)())",
        "local c = coroutine.create(function() pcall(sleep, 0.2) coroutine.yield() end)
         assert(coroutine.resume(c)) assert(coroutine.status(c) == 'suspended')",
        "local t = setmetatable({}, {__index = function() sleep(0.2) return 1 end})
         assert(t.x == 1)",
        "for x in function(_, last) if not last then sleep(0.2) return 1 end end do end",
    ] {
        let settings = "worker_connections=256, client_share=1";
        let daemon = handler_with(settings, &format!("{body} return m:discard('slept')"));
        let took = burst(&daemon, "Kslept", 200);
        assert!(took < Duration::from_secs(2), "{took:?} for {body}");
        assert!(took >= Duration::from_millis(200), "{took:?} for {body}");
    }
}

#[test]
fn sleep_blocks_where_it_cannot_yield() {
    let daemon = handler(
        "local t = {3, 1, 2}
         table.sort(t, function(a, b) sleep(0.01) return a < b end)
         return m:discard(table.concat(t))",
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "K123");
}

#[test]
fn runaway_handlers_are_stopped() {
    for body in [
        "while true do end",
        "while true do pcall(function() while true do end end) end",
        "while true do pcall(error) end",
        "local t = {} for i = 1, 50 do t[i] = i end
         while true do pcall(table.sort, t, function() while true do end end) end",
        "local function nest(n)
           if n == 0 then while true do end end
           return coroutine.wrap(function() while true do pcall(nest, n - 1) end end)()
         end
         nest(5)",
        "while true do coroutine.wrap(function() while true do end end)() end",
    ] {
        let daemon = handler_with(
            "handler_timeout=0.3",
            &format!("if m.sender == 'good@x' then return m:discard('good') end {body}"),
        );
        let workers = daemon.workers();
        let started = Instant::now();
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zscript failed", "{body}");
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(300), "{took:?} for {body}");
        assert!(took < Duration::from_secs(3), "{took:?} for {body}");
        assert_eq!(submit(daemon.path("in"), &Mail::new("x").from("good@x")), "Kgood", "{body}");
        assert_eq!(daemon.workers(), workers, "the worker survived {body}");
    }
}

#[test]
fn mails_behind_runaways_are_answered_in_time() {
    let daemon = handler_with(
        "workers=1, relay_timeout=1, handler_timeout=0.5",
        "while true do end return m:discard()",
    );
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                let reply = submit(daemon.path("in"), &Mail::new("x"));
                // Handlers of mails whose time was over before their turn are not asked.
                let expected = ["Zscript failed", "Zrelay failed", "Ztry again later"];
                assert!(expected.iter().any(|text| reply == *text), "{reply:?}");
            });
        }
    });
    // The last handler begins just before its mail's time is over.
    let took = started.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn the_hook_cannot_be_removed() {
    let daemon = handler_with(
        "handler_timeout=0.3",
        "if debug.sethook then pcall(debug.sethook) end while true do end",
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zscript failed");
}

#[test]
fn waiting_is_not_running() {
    let daemon = handler_with("handler_timeout=0.2", "sleep(0.6) return m:discard('slept')");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kslept");
}

#[test]
fn the_time_budget_ends_waiting() {
    let daemon = handler_with("relay_timeout=0.4", "sleep(30) return m:discard('slept')");
    let started = Instant::now();
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zrelay failed");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[test]
fn a_handler_that_eats_memory() {
    let daemon = handler_with(
        "lua_memory_limit=16*1024*1024",
        "if m.sender == 'good@x' then return m:discard('good') end
         local t = {} for i = 1, 1e9 do t[i] = ('x'):rep(1000) .. i end",
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zscript failed");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x").from("good@x")), "Kgood");
}

#[test]
fn globals_are_per_worker_and_handlers_may_share_code() {
    let daemon = Daemon::start(
        "settings{workers=1}
         local count = 0
         function handler(m) count = count + 1 return m:discard(m.listener .. ' ' .. count) end
         qmqp_listen('$DIR/a', handler)
         qmqp_listen('$DIR/b', handler)",
    );
    for (count, name) in ["a", "b", "a"].into_iter().enumerate() {
        let told = format!("K{} {}", daemon.path(name).display(), count + 1);
        assert_eq!(submit(daemon.path(name), &Mail::new("x")).to_string(), told);
    }
}

#[test]
fn too_many_hops() {
    let daemon = handler_with("max_hops=3", "return m:discard()");
    let with = |hops: usize| {
        let mut mail = Mail::new("x");
        mail.message.splice(0..0, "Received: by x\n".repeat(hops).into_bytes());
        mail
    };
    assert_eq!(submit(daemon.path("in"), &with(3)), "Kdiscarded");
    assert_eq!(submit(daemon.path("in"), &with(4)), "Dtoo many hops");
}

#[test]
fn a_stale_control_group_is_stale_by_every_name() {
    let daemon = Daemon::start(
        "local kept
         qmqp_listen('$DIR/in', function(m)
           local old = kept
           kept = assert(m.cgroup)
           assert(kept.no_such_name == nil and kept[1] == nil)
           if not old then return m:discard('kept') end
           for _, name in ipairs{'path', 'no_such_name', 1} do
             local ok, message = pcall(function() return old[name] end)
             assert(not ok and message:find('Stale object', 1, true), tostring(name))
           end
           return m:discard('stale')
         end)
         settings{workers = 1}",
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kkept");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kstale");
}
