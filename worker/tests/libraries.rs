//! The libraries of the script. Libraries that only compute are tested in Lua (tests/lua), the
//! others with real sockets, threads and a log.

#[allow(dead_code, reason = "the other tests of scripts need more of it")]
mod support;

use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use qrelay_shared::ids::WorkerId;
use qrelay_worker::delivery::action::Action;
use qrelay_worker::session::script::HandlerError;
use support::{Options, Script, config_error, mail};

/// Runs a test in Lua twice: while the script loads, and as a handler.
fn passes(source: &str) {
    let script = Script::load(&format!(
        "settings{{handler_timeout = 100, hang_timeout = 200}}
         local function test() {source}\nend test()
         qmqp_listen('/a', function(m) test() return m:discard() end)"
    ));
    let (_, action) = script.handle(0, mail());
    assert!(action.is_ok(), "{}", script.log());
}

/// Runs the handler, which must reject the mail, and returns the text of the rejection.
fn says(script: &Script) -> String {
    match script.handle(0, mail()).1 {
        Ok(Action::Reject(Some(text))) => text.to_string(),
        other => panic!("{other:?}\n{}", script.log()),
    }
}

/// Prepares the script as a worker does after its fork.
fn become_worker(script: &Script) {
    script.state.after_fork(WorkerId(1), None);
}

/// Creates a temporary directory for the sockets of a test.
fn scratch() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().to_owned();
    (directory, path)
}

/// Waits until a condition becomes true; `what` names the condition in the panic.
fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_true() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn received(socket: &UdpSocket) -> Vec<u8> {
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
    let mut buffer = [0; 2000];
    let length = socket.recv(&mut buffer).expect("a datagram");
    buffer[..length].to_vec()
}

#[test]
fn sodium() {
    passes(include_str!("lua/sodium.lua"));
}

#[test]
fn json() {
    passes(include_str!("lua/json.lua"));
}

#[test]
fn jwt() {
    passes(include_str!("lua/jwt.lua"));
}

#[test]
fn a_socket_of_a_handler() {
    let server = TcpListener::bind("127.0.0.1:0").expect("bind");
    let script = Script::load(&format!(
        "qmqp_listen('/a', function(m)
           local s = assert(socket:connect('{}'))
           assert(s:send('hello') == 5)
           assert(s:send(12, 2) == 1)
           assert(s:close() and s:close())
           local n, message = s:send('x')
           assert(n == nil and message == 'the socket is closed')
           return m:discard()
         end)",
        server.local_addr().expect("address")
    ));
    let (_, action) = script.handle(0, mail());
    assert!(action.is_ok(), "{}", script.log());
    let (mut peer, _) = server.accept().expect("accept");
    assert_eq!(std::io::read_to_string(&mut peer).expect("text"), "hello2");
}

#[test]
fn packets_keep_their_bounds() {
    let (_directory, path) = scratch();
    let datagrams = UnixDatagram::bind(path.join("dgram")).expect("bind");
    let script = Script::load(&format!(
        "qmqp_listen('/a', function(m)
           local s = assert(socket:connect('{0}/dgram', {{type = 'dgram'}}))
           assert(s:send('one') == 3 and s:send('') == 0 and s:send('three') == 5)
           local s, message = socket:connect('{0}/dgram', {{type = 'seqpacket'}})
           assert(s == nil and message:find('Protocol wrong type', 1, true), message)
           return m:discard()
         end)",
        path.display()
    ));
    let (_, action) = script.handle(0, mail());
    assert!(action.is_ok(), "{}", script.log());
    let mut buffer = [0; 10];
    let lengths: Vec<_> = (0..3).map(|_| datagrams.recv(&mut buffer).expect("message")).collect();
    assert_eq!(lengths, [3, 0, 5]);
}

#[test]
fn failures_at_run_time_are_returned() {
    let (_directory, path) = scratch();
    let script = Script::load(&format!(
        "qmqp_listen('/a', function(m)
           local s, message = socket:connect('{}/none')
           return m:reject(message)
         end)",
        path.display()
    ));
    let said = says(&script);
    assert!(said.ends_with("/none: No such file or directory"), "{said}");
}

#[test]
fn misuse_of_sockets_raises() {
    passes(
        "local function raises(expected, f, ...)
           local ok, message = pcall(f, ...)
           assert(not ok and message:find(expected, 1, true), tostring(message))
         end
         raises('expected a port', socket.connect, socket, '127.0.0.1')
         raises('qmqp_resolve', socket.connect, socket, 'localhost:1')
         raises('with a colon, as in socket:connect(…)', socket.connect, '127.0.0.1:1')
         raises(\"'stream', 'dgram' or 'seqpacket'\", socket.connect, socket, '@x', {type = 'raw'})
         raises('did you mean', socket.connect, socket, '@x', {typ = 'dgram'})
         raises('got nil', control_client.new, control_client)
         raises('control_resolve', control_client.new, control_client, 'localhost')",
    );
}

/// The mail's deadline comes before the ten seconds of an operation.
#[test]
fn sending_ends_with_the_mail() {
    let (_directory, path) = scratch();
    let _deaf = UnixListener::bind(path.join("s")).expect("bind");
    let script = Script::load(&format!(
        "qmqp_listen('/a', function(m)
           local s = assert(socket:connect('{}/s'))
           s:send(('x'):rep(8 << 20))
           return m:discard()
         end)",
        path.display()
    ));
    let (_, action) = script.handle_within(0, mail(), Duration::from_millis(50));
    assert_eq!(action.err(), Some(HandlerError::Deadline));
}

#[test]
fn sockets_made_while_loading_connect_when_they_are_used() {
    let (_directory, path) = scratch();
    let script = Script::load(&format!(
        "s = socket:connect('{0}/s', {{type = 'dgram'}})
         assert(not s:send('too early'))
         qmqp_listen('/a', function(m) return m:reject(tostring(s:send('x'))) end)",
        path.display()
    ));
    let server = UnixDatagram::bind(path.join("s")).expect("bind");
    assert_eq!(says(&script), "1");
    drop(server);
    assert_eq!(says(&script), "nil");
    std::fs::remove_file(path.join("s")).expect("remove");
    let _server = UnixDatagram::bind(path.join("s")).expect("bind");
    assert_eq!(says(&script), "1");
}

/// Workers don't inherit a connection that the script used while it loaded.
#[test]
fn no_connection_outlives_loading() {
    let server = TcpListener::bind("127.0.0.1:0").expect("bind");
    let script = Script::load(&format!(
        "s = socket:connect('{}')
         s:send('loading')
         qmqp_listen('/a', function(m) s:send('handler') s:close() return m:discard() end)",
        server.local_addr().expect("address")
    ));
    let text = || std::io::read_to_string(server.accept().expect("accept").0).expect("text");
    // The connection ends although the script still has the socket.
    assert_eq!(text(), "loading");
    assert!(script.handle(0, mail()).1.is_ok(), "{}", script.log());
    assert_eq!(text(), "handler");
}

#[test]
fn control_commands_byte_by_byte() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let script = Script::load(&format!(
        "local c = control_client:new('{}')
         local all = c:build()
           :fade_children('a', 'tag2'):flush_filter_cache(''):discard_session('id')
           :flush_http_cache('x'):terminate_children('x'):disconnect_database('x')
           :reset_limiter('x')
           :reject_client('192.0.2.1'):tarpit_client(7):cancel_job('part', 'j1')
         assert(c:send(all) == 100)
         qmqp_listen('/a', function(m)
           assert(control_client:new(control_resolve('{}')):send(all) == 100)
           assert(c:send(c:build():fade_children('again')))
           return m:discard()
         end)
         local function raises(expected, f, ...)
           local ok, message = pcall(f, ...)
           assert(not ok and message:find(expected, 1, true), tostring(message))
         end
         local b = c:build()
         raises('at least one', b.fade_children, b)
         raises('got a table', b.fade_children, b, 'x', {{}})
         raises('a partition and a job id, got 1', b.cancel_job, b, 'x')
         raises('NUL', b.cancel_job, b, 'a\\0', 'x')
         raises('longer than 65507', b.fade_children, b, 'x', ('x'):rep(65600))
         raises('with a colon', b.fade_children, 'x')
         raises('did you mean', function() return b.fade_childs end)
         raises('no commands', c.send, c, b)
         raises('what c:build() returns', c.send, c, 'x')",
        server.local_addr().expect("address"),
        server.local_addr().expect("address"),
    ));
    let expected: &[u8] = b"\x63\x04\x61\x01\
        \0\x01\0\x08a\0\0\0\0\x04\0\x08tag2\0\0\0\x0c\0\x02\0\x0eid\0\0\
        \0\x01\0\x0fx\0\0\0\0\x01\0\x10x\0\0\0\0\x01\0\x14x\0\0\0\0\x01\0\x16x\0\0\0\
        \0\x09\0\x17192.0.2.1\0\0\0\0\x01\0\x187\0\0\0\0\x07\0\x19part\0j1\0";
    assert_eq!(received(&server), expected);
    assert!(script.handle(0, mail()).1.is_ok(), "{}", script.log());
    assert_eq!(received(&server), expected);
    assert_eq!(received(&server), b"\x63\x04\x61\x01\0\x05\0\x08again\0\0\0");
}

#[test]
fn log_records() {
    let script = Script::load(
        "log.info('loaded', {b = 2.0, a = 'x y', on = true, at = qmqp_resolve('@q')})
         qmqp_listen('/a', function(m)
           log.warn('careful')
           log.error(42, {n = m.size})
           return m:discard()
         end)
         local function raises(expected, f, ...)
           local ok, message = pcall(f, ...)
           assert(not ok and message:find(expected, 1, true), tostring(message))
         end
         raises(\"bad argument #1 to 'info' (text: expected a string, got nil)\", log.info)
         raises('got a table', log.info, 'x', {a = {}})
         raises('names of letters', log.info, 'x', {'a'})
         raises('names of letters', log.info, 'x', {['a=b'] = 1})
         raises('got 1', log.info, 'x', 1)",
    );
    assert!(script.handle(0, mail()).1.is_ok(), "{}", script.log());
    let log = script.log();
    let lines: Vec<&str> = log.lines().collect();
    // The log of these tests shows the last field first.
    assert!(lines[0].starts_with("INFO loaded on=true b=2 at=@q a=x y"), "{log}");
    assert!(lines[1].starts_with("WARN careful") && lines[1].contains("id=id-1"), "{log}");
    assert!(lines[2].starts_with("ERRO 42") && lines[2].contains("n="), "{log}");
}

#[test]
fn every_runs_in_a_worker_and_goes_on_after_errors() {
    let script = Script::load(
        "local runs, inside, together, mails = 0, 0, 0, 0
         every(0.01, function()
           inside = inside + 1
           together = math.max(together, inside)
           sleep(0.03)
           inside = inside - 1
           runs = runs + 1
           if runs == 2 then error('the second') end
         end)
         every(0.01, function() print('other') end)
         qmqp_listen('/a', function(m) return m:reject(runs .. ' ' .. together) end)
         assert(not pcall(every, 0, print) and not pcall(every, 1))
         assert(not pcall(every, 86401, print))",
    );
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(says(&script), "0 0", "nothing runs in the zygote");
    become_worker(&script);
    let runs = || says(&script).split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    until("runs after the error", || runs() >= 4);
    assert!(says(&script).ends_with(" 1"), "two runs overlapped: {}", says(&script));
    let log = script.log();
    assert!(log.contains("the second") && log.contains("in function"), "{log}");
    assert!(log.contains("INFO other"), "{log}");
}

#[test]
fn every_has_the_budget_of_a_handler() {
    let script = Script::load(
        "settings{handler_timeout = 0.05, relay_timeout = 0.1}
         local loops, waits = 0, 0
         every(0.01, function() loops = loops + 1 if loops == 1 then while true do end end end)
         every(0.01, function() waits = waits + 1 if waits == 1 then sleep(60) end end)
         qmqp_listen('/a', function(m) return m:reject(math.min(loops, waits)) end)",
    );
    become_worker(&script);
    until("both go on", || says(&script).parse::<u32>().is_ok_and(|n| n >= 3));
    let log = script.log();
    assert!(log.contains("longer than handler_timeout"), "{log}");
    assert!(log.contains("given up after waiting for 0.1 s"), "{log}");
}

#[test]
fn every_belongs_to_loading() {
    let script = Script::load(
        "qmqp_listen('/a', function(m)
           local ok, message = pcall(every, 1, print)
           return m:reject(message)
         end)",
    );
    assert!(says(&script).ends_with("only be called while the script is loaded"));
    // reload() is a part of loading: a function that it adds runs like the others.
    let source = "local runs = 0
        function reload() every(0.01, function() runs = runs + 1 end) end
        qmqp_listen('/a', function(m) return m:reject(runs) end)";
    let options = Options { reload: true, ..Options::default() };
    let script = Script::load_with(source, options).0.expect("a good script");
    become_worker(&script);
    until("what reload added runs", || says(&script).parse::<u32>().is_ok_and(|n| n >= 2));
    let error = config_error("for _ = 1, 65 do every(1, print) end", Default::default());
    assert!(error.contains("at most 64 functions"), "{error}");
}
