//! The declarations of a script while it loads, and the errors of scripts that can't be used.

use std::time::Duration;

use crate::support::{Options, Script, config_error, mail};
use qrelay_worker::lua::state::{LoadOptions, Purpose, State};

#[test]
fn globals_are_no_settings() {
    for name in ["max_size", "log_server"] {
        let error = config_error(&format!("\nsettings{{{name}=1}}"), Options::default());
        let told = format!("config.lua:2: {name} is no setting but a global variable");
        assert!(error.starts_with(&told), "{error}");
    }
}

#[test]
fn declarations() {
    let options = Options { systemd: vec!["web".into()], ..Options::default() };
    let (script, log) = Script::load_with(
        "max_size = '2048.7'
         log_server = '127.0.0.1'
         settings{workers=3, handler_timeout=0.5, client_share='0.5'}
         settings{workers=4}
         qmqp_listen('/run//x/./y', print)
         max_size = nil
         qmqp_listen('@name', print, {backlog=5})
         qmqp_listen('127.0.0.1:628', print, {allow={'10.0.0.0/8', '::1'}, max_size=4096})
         qmqp_listen('/z', print, {mode='0600', owner='root', group=0})
         qmqp_listen(systemd['web'], print)
         qmqp_listen(systemd, print)
         assert(tostring(systemd['web']) == \"systemd['web']\" and tostring(systemd) == 'systemd')",
        options,
    );
    let script = script.expect("a good configuration");
    assert!(log.contains("listens on systemd, which passed no sockets"), "{log}");
    let declaration = &script.declaration;
    let addresses: Vec<_> =
        declaration.listeners.iter().map(|listener| listener.address.to_string()).collect();
    assert_eq!(
        addresses,
        ["/run/x/y", "@name", "127.0.0.1:628", "/z", "systemd['web']", "systemd"]
    );
    assert_eq!(declaration.listeners[0].max_size, 2048);
    assert_eq!(declaration.listeners[1].max_size, 16 << 20);
    assert_eq!(declaration.listeners[1].backlog, 5);
    assert_eq!(declaration.listeners[2].max_size, 4096);
    assert_eq!(declaration.listeners[2].allow.as_ref().map(Vec::len), Some(2));
    assert_eq!(declaration.listeners[3].mode, 0o600);
    assert_eq!(
        (declaration.listeners[3].owner, declaration.listeners[3].group),
        (Some(0), Some(0))
    );
    assert_eq!(declaration.settings.workers, 4);
    assert_eq!(declaration.settings.handler_timeout, Duration::from_millis(500));
    assert_eq!(
        declaration.log_server.as_ref().map(ToString::to_string).as_deref(),
        Some("127.0.0.1:5479")
    );
}

#[test]
fn bad_configurations_name_file_line_and_cause() {
    let listen = "\nqmqp_listen('/a', print)";
    for (source, expected) in [
        ("-- nothing to listen on", "config.lua: no listener"),
        ("x = )", "config.lua:1: unexpected symbol near ')'"),
        ("\n\nerror('boom')", "config.lua:3: boom"),
        ("#!/usr/bin/lua\nerror('boom')", "config.lua:2: boom"),
        ("\nerror({})", "config.lua:2: table: 0x"),
        ("error('bare', 0)", "config.lua:1: bare"),
        ("\nerror({code = 7})", "{code = 7}"),
        ("qmpq_listen('/a', print)", "'qmpq_listen'); did you mean 'qmqp_listen'?"),
        ("\nlocal function f() error('here', 2) end\nf()", "config.lua:3: here"),
        ("qmqp_listen()", "config.lua:1: bad argument #1 to 'qmqp_listen' (where: expected"),
        (
            "qmqp_listen('/a')",
            "config.lua:1: bad argument #2 to 'qmqp_listen' \
             (handler: expected a function, got nil)",
        ),
        ("qmqp_listen('a/b', print)", "where: expected an absolute path"),
        ("qmqp_listen('localhost:1', print)", "where: expected an absolute path"),
        ("qmqp_listen('127.0.0.1', print)", "expected a port after the address"),
        ("qmqp_listen('systemd', print)", "did you mean the variable systemd, without quotes?"),
        ("qmqp_listen(systemd.web, print)", "systemd has no socket named 'web'"),
        ("qmqp_listen('@', print)", "expected a name after '@'"),
        ("qmqp_listen('/' .. ('x'):rep(107), print)", "at most 107 bytes"),
        ("qmqp_listen('/a', print) qmqp_listen('//a', print)", "/a is already listened on"),
        (
            "qmqp_listen('/a', print, {mod='1'})",
            "qmqp_listen has no option 'mod'; did you mean 'mode'?",
        ),
        (
            "qmqp_listen('/a', print, {mode=660})",
            "expected an octal string from '0' to '0777', such as '0660', got 660",
        ),
        ("qmqp_listen('/a', print, {mode='0880'})", "got '0880'"),
        (
            "qmqp_listen('@a', print, {mode='0660'})",
            "bad option 'mode' of 'qmqp_listen' (only a listener with a path has it)",
        ),
        (
            "qmqp_listen('/a', print, {owner='no-such-user'})",
            "'no-such-user': there is no such user",
        ),
        ("qmqp_listen('/a', print, {group='no-such-group'})", "there is no such group"),
        ("qmqp_listen('/a', print, {backlog=0})", "expected a number from 1 to 65535, got 0"),
        ("qmqp_listen('/a', print, {backlog=1.5})", "expected an integer from 1 to 65535, got 1.5"),
        (
            "qmqp_listen('/a', print, {max_size=1})",
            "bad option 'max_size' of 'qmqp_listen' (expected a number from 1024",
        ),
        ("qmqp_listen('/a', print, {allow={'::1'}})", "only a listener on an IP address"),
        (
            "qmqp_listen('[::1]:1', print, {allow={'10.0.0.1/8'}})",
            "host bits are set; the network is 10.0.0.0/8",
        ),
        ("qmqp_listen('[::1]:1', print, {allow='::1'})", "expected a list, got '::1'"),
        ("max_size = 'big'", "config.lua:2: bad value for 'max_size' (expected a number from 1024"),
        ("max_size = 1 << 31", "got 2147483648"),
        (
            "settings{worker=1}",
            "config.lua:1: settings has no key 'worker'; did you mean 'workers'?",
        ),
        ("settings{5}", "settings has no key 1"),
        ("settings(5)", "bad argument #1 to 'settings' (settings: expected a table, got 5)"),
        (
            "settings{workers=0}",
            "bad option 'workers' of 'settings' (expected a number from 1 to 256, got 0)",
        ),
        ("settings{workers='many'}", "got 'many'"),
        ("settings{client_share=0}", "expected a number above 0, at most 1, got 0"),
        ("settings{relay_timeout=0}", "expected seconds, more than 0 and at most 86400, got 0"),
        (
            "settings{hang_timeout=1}",
            "hang_timeout (1 s) must be longer than handler_timeout (2 s)",
        ),
        (
            "settings{mail_memory=1 << 20}",
            "mail_memory (1048576 bytes) must be at least max_size + 300000",
        ),
        (
            "log_server = 'log.example.net'",
            "log_resolve('log.example.net') makes an address object",
        ),
        (
            "log_server = {}",
            "config.lua: bad value for 'log_server' \
             (expected a string or an address object, got a table)",
        ),
        ("require 'missing'", "module 'missing' not found"),
        ("coroutine.yield()", "attempt to yield from outside a coroutine"),
    ] {
        let error = config_error(
            &format!("{source}{}", if source.contains("listen") { "" } else { listen }),
            Options::default(),
        );
        assert!(error.contains(expected), "{source}\n  expected {expected}\n  got      {error}");
        assert!(!error.contains("runtime error") && !error.contains("[qrelay]"), "{error}");
    }
}

#[test]
fn mail_memory_fits_the_largest_message_unless_it_is_set() {
    let listen = "max_size = 1 << 30 qmqp_listen('/a', print, {max_size = 1024})
        qmqp_listen('/b', print) settings{workers = 3}";
    let script = Script::load_with(listen, Options::default()).0.expect("a good configuration");
    assert_eq!(script.declaration.settings.mail_memory, (1 << 30) + 300_000);
    let small = "qmqp_listen('/a', print, {max_size = 1024}) settings{mail_memory = 1 << 20}";
    let script = Script::load_with(small, Options::default()).0.expect("a good configuration");
    assert_eq!(script.declaration.settings.mail_memory, 1 << 20);
    let error =
        config_error(&format!("settings{{mail_memory = 1 << 29}} {listen}"), Options::default());
    assert!(error.contains("mail_memory (536870912 bytes) must be at least"), "{error}");
}

#[test]
fn max_size_is_preset() {
    let script = "max_size = max_size * 2 qmqp_listen('/a', print) max_size = nil
        qmqp_listen('/b', print) assert(max_size == nil)";
    let script = Script::load_with(script, Options::default()).0.expect("a good configuration");
    let sizes = script.declaration.listeners.iter().map(|listener| listener.max_size);
    assert_eq!(sizes.collect::<Vec<_>>(), [32 << 20, 16 << 20]);
}

#[test]
fn reload_runs_after_the_script() {
    let reload = || Options { reload: true, ..Options::default() };
    let source = "qmqp_listen('/a', print) function reload() print('reloaded') end";
    let (script, log) = Script::load_with(source, reload());
    assert!(script.is_ok() && log.contains("INFO reloaded"), "{log}");
    let (script, log) = Script::load_with(source, Options::default());
    assert!(script.is_ok() && !log.contains("reloaded"), "{log}");
    let error =
        config_error("qmqp_listen('/a', print)\nfunction reload() error('no') end", reload());
    assert_eq!(error, "config.lua:2: no (in function 'reload')");
    let error = config_error(
        "qmqp_listen('/a', print) function reload() qmqp_listen('/b', print) end",
        reload(),
    );
    assert!(error.contains("qmqp_listen can't be called in reload()"), "{error}");
    let error = config_error("qmqp_listen('/a', print) reload = 5", reload());
    assert!(error.contains("the global reload must be a function, but it is 5"), "{error}");
}

#[test]
fn declaring_ends_with_loading() {
    let script = Script::load(
        "qmqp_listen('/a', function(m)
           local ok, message = pcall(qmqp_listen, '/b', print)
           assert(not ok and message:find('only be called while the script loads'), message)
           ok, message = pcall(settings, {})
           assert(not ok and message:find('only be called while the script loads'), message)
           return m:discard()
         end)",
    );
    let (_, action) = script.handle(0, mail());
    assert!(action.is_ok(), "{}", script.log());
}

#[test]
fn files_that_cannot_be_read() {
    let log = slog::Logger::root(slog::Discard, slog::o!());
    for (path, expected) in [
        (
            "/nonexistent/config.lua",
            "cannot read /nonexistent/config.lua: No such file or directory",
        ),
        ("/", "cannot read /: Is a directory"),
    ] {
        let options = LoadOptions {
            config: path.into(),
            reload: false,
            systemd: Some(Vec::new()),
            purpose: Purpose::Serve,
            logger: log.clone(),
            dictionaries: None,
        };
        match State::load(options) {
            Ok(_) => panic!("{path} was accepted"),
            Err(error) => assert_eq!(error.to_string(), expected),
        }
    }
}
