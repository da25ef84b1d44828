//! Clients whose input is malformed, oversized, truncated or slow, and clients that vanish or do
//! something unusual. Each client gets the answer that the protocol page says. Only complete mails
//! are relayed, and the daemon serves on.

use std::time::{Duration, Instant};

use crate::harness::mail::netstring;
use crate::harness::record::within;
use crate::harness::{Client, Daemon, Mail, PATIENCE, Sink, Target, submit};

/// Starts a relay with one worker and short time limits for clients, and a next hop that accepts
/// everything.
fn relay() -> (Daemon, Sink) {
    relay_with("client_timeout=1, request_timeout=2", "")
}

fn relay_with(settings: &str, options: &str) -> (Daemon, Sink) {
    let daemon = Daemon::start(&format!(
        "settings{{workers=1, {settings}}}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end, {{{options}}})"
    ));
    let sink = Sink::answering(daemon.path("out"), "Kok");
    (daemon, sink)
}

/// Checks that the daemon still relays, and that the next hop has received nothing but this check's
/// mail.
#[track_caller]
fn serves_only_this(daemon: &Daemon, sink: &Sink) {
    let mail = Mail::new("after all that");
    assert_eq!(submit(daemon.path("in"), &mail), "Kok");
    assert_eq!(sink.only(), mail.relayed());
}

#[test]
fn malformed() {
    let (daemon, sink) = relay();
    let wrapped = |payload: &[u8]| netstring(payload);
    let requests: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.0\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00".to_vec(),
        b":".to_vec(),
        b"-1:".to_vec(),
        b"+1:".to_vec(),
        b" 1:".to_vec(),
        b"01:".to_vec(),
        b"1 :".to_vec(),
        b"0x10:".to_vec(),
        wrapped(b""),
        wrapped(b"1:m,"),
        wrapped(b"1:m,3:s@x,"),
        wrapped(b"1:m,3:s@x,3:r@x"),
        wrapped(b"1:m,3:s@x,3:r@x;"),
        wrapped(b"1:m,3:s@x,4:r@x,"),
        wrapped(b"1:m,3:s@x,03:r@x,"),
        wrapped(b"1:m,3:s@x,3:r@x,junk"),
        wrapped(b"01:m,3:s@x,3:r@x,"),
        wrapped(b"1;m,3:s@x,3:r@x,"),
        wrapped(b"99:m,3:s@x,3:r@x,"),
        b"19:1:m,3:s@x,3:r@x,xyz;".to_vec(),
    ];
    for request in requests {
        let shown = String::from_utf8_lossy(&request).into_owned();
        let answer = Client::connect(daemon.path("in")).send(&request).outcome();
        assert_eq!(answer, "Dmalformed input", "{shown:?}");
    }
    serves_only_this(&daemon, &sink);
}

#[test]
fn oversized() {
    let (daemon, sink) = relay_with("request_timeout=5", "max_size=2000");
    for head in ["302001:", "99999999999999999999999999:", "18446744073709551617:", "9999:2001:"] {
        let answer = Client::connect(daemon.path("in")).send(head.as_bytes()).outcome();
        assert_eq!(answer, "Dmessage too large", "{head}");
    }
    assert_eq!(submit(daemon.path("in"), &Mail::of_size(2001)), "Dmessage too large");
    assert_eq!(submit(daemon.path("in"), &Mail::of_size(300_000)), "Dmessage too large");
    assert_eq!(submit(daemon.path("in"), &Mail::of_size(2000)), "Kok");
    assert_eq!(sink.only(), Mail::of_size(2000).relayed());
}

#[test]
fn refused_early_but_heard_late() {
    // The refusal is due after the first bytes, but the client sends 8 MiB before it reads.
    let (daemon, sink) = relay();
    for head in [&b"x"[..], b"999999999999:"] {
        let mut request = head.to_vec();
        request.resize(8 << 20, b'x');
        let mut client = Client::connect(daemon.path("in"));
        client.try_send(&request).expect("the rest is read and dropped");
        assert_eq!(client.half_close().outcome().status(), 'D');
    }
    serves_only_this(&daemon, &sink);
}

#[test]
fn truncated_at_every_byte() {
    let (daemon, sink) = relay();
    let request = Mail::new("x").request();
    for end in 0..request.len() {
        let mut client = Client::connect(daemon.path("in"));
        let answer = client.send(&request[..end]).half_close().outcome();
        assert_eq!(answer, "<silence>", "after {end} of {} bytes", request.len());
    }
    serves_only_this(&daemon, &sink);
}

#[test]
fn vanishing_at_every_byte() {
    let (daemon, sink) = relay();
    let request = Mail::new("x").request();
    for end in 0..request.len() {
        Client::connect(daemon.path("in")).send(&request[..end]);
    }
    serves_only_this(&daemon, &sink);
}

#[test]
fn resetting() {
    let address = Target::free_port();
    let daemon = Daemon::start(&format!(
        "settings{{workers=1}}
         qmqp_listen('{address}', function(m) return m:connect('$DIR/out') end)"
    ));
    let sink = Sink::answering(daemon.path("out"), "Kok");
    let request = Mail::new("x").request();
    for end in 0..request.len() {
        let mut client = Client::connect(address);
        client.send(&request[..end]);
        client.stream.reset();
    }
    assert_eq!(submit(address, &Mail::new("x")), "Kok");
    assert_eq!(sink.mails().len(), 1);
}

#[test]
fn slow_clients_are_told() {
    let (daemon, sink) = relay();
    let request = Mail::new("x").request();
    let started = Instant::now();
    let mut nothing = Client::connect(daemon.path("in"));
    let mut half = Client::connect(daemon.path("in"));
    half.send(&request[..request.len() / 2]);
    let mut all_but_one = Client::connect(daemon.path("in"));
    all_but_one.send(&request[..request.len() - 1]);
    for client in [&mut half, &mut all_but_one, &mut nothing] {
        assert_eq!(client.outcome(), "Zrequest timed out");
    }
    assert!(started.elapsed() >= Duration::from_millis(900), "{:?}", started.elapsed());
    serves_only_this(&daemon, &sink);
}

#[test]
fn a_client_that_thinks_first() {
    // `relay_timeout` begins with the complete request, not with the connection.
    let (daemon, sink) = relay_with("relay_timeout=0.3, client_timeout=10", "");
    let mut client = Client::connect(daemon.path("in"));
    let nothing = client.outcome_within(Duration::from_millis(700));
    assert_eq!(nothing, crate::harness::Outcome::Timeout);
    assert_eq!(client.send(&Mail::new("x").request()).outcome(), "Kok");
    assert_eq!(sink.mails().len(), 1);
}

#[test]
fn dripping_clients_are_told() {
    // The client is never silent for client_timeout, but isn't done within request_timeout either.
    let (daemon, sink) = relay();
    let mut client = Client::connect(daemon.path("in"));
    let request = Mail::new(&"x".repeat(1000)).request();
    let mut rest = request.iter();
    let answer = within(PATIENCE, || {
        client.send(&[*rest.next().expect("told before the end")]);
        match client.outcome_within(Duration::from_millis(100)) {
            crate::harness::Outcome::Timeout => None,
            answer => Some(answer),
        }
    });
    assert_eq!(answer.expect("an answer"), "Zrequest timed out");
    serves_only_this(&daemon, &sink);
}

#[test]
fn byte_by_byte() {
    let (daemon, sink) = relay();
    let mail = Mail::new("byte by byte");
    let mut client = Client::connect(daemon.path("in"));
    for byte in mail.request() {
        client.send(&[byte]);
    }
    assert_eq!(client.outcome(), "Kok");
    assert_eq!(sink.only(), mail.relayed());
}

#[test]
fn half_close_after_the_request() {
    let (daemon, sink) = relay();
    let mail = Mail::new("half");
    let answer = Client::connect(daemon.path("in")).send(&mail.request()).half_close().outcome();
    assert_eq!(answer, "Kok");
    assert_eq!(sink.only(), mail.relayed());
}

#[test]
fn bytes_after_the_request() {
    let address = Target::free_port();
    let daemon = Daemon::start(&format!(
        "settings{{workers=1}}
         local function relay(m) return m:connect('$DIR/out') end
         qmqp_listen('$DIR/in', relay) qmqp_listen('{address}', relay)"
    ));
    let sink = Sink::answering(daemon.path("out"), "Kok");
    for to in [Target::from(daemon.path("in")), address.into()] {
        for extra in [1, 100, 1 << 20] {
            let mut request = Mail::new("trailing").request();
            request.resize(request.len() + extra, b'!');
            let mut client = Client::connect(to.clone());
            client.try_send(&request).expect("bytes after the request are read");
            assert_eq!(client.outcome(), "Kok", "{extra} bytes to {to}");
        }
    }
    assert!(sink.mails().iter().all(|mail| mail.message.ends_with(b"trailing\n")));
    assert_eq!(sink.mails().len(), 6);
}

#[test]
fn a_second_request_is_not_a_second_mail() {
    let (daemon, sink) = relay();
    let (first, second) = (Mail::new("first"), Mail::new("second"));
    let both = [first.request(), second.request()].concat();
    assert_eq!(Client::connect(daemon.path("in")).send(&both).outcome(), "Kok");
    assert_eq!(sink.only(), first.relayed());
}

#[test]
fn clients_that_do_not_read() {
    let (daemon, sink) = relay();
    let mut deaf: Vec<_> = (0..64).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut deaf {
        client.send(&Mail::new("deaf").request());
    }
    sink.record().wait_for_count(64);
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
    // The replies have waited in the sockets' buffers.
    for client in &mut deaf {
        assert_eq!(client.outcome(), "Kok");
    }
}

#[test]
fn clients_that_never_stop_sending() {
    // After its reply the daemon reads on only for a limited time, although the client neither
    // reads nor ends.
    let (daemon, _sink) = relay();
    let mut client = Client::connect(daemon.path("in"));
    client.send(b"x");
    let endless = vec![b'x'; 1 << 16];
    let cut = within(PATIENCE, || client.try_send(&endless).err());
    assert!(cut.is_some(), "the daemon reads for ever");
}

#[test]
fn recipients() {
    let (daemon, sink) = relay();
    let many = |count: usize| {
        let mut mail = Mail::new("many");
        mail.recipients = (0..count).map(|i| format!("r{i}@example.org").into_bytes()).collect();
        mail
    };
    assert_eq!(submit(daemon.path("in"), &many(1025)), "Dtoo many recipients");
    assert_eq!(submit(daemon.path("in"), &many(5000)), "Dtoo many recipients");
    assert_eq!(submit(daemon.path("in"), &many(0)), "Dmalformed input");
    assert_eq!(submit(daemon.path("in"), &many(1024)), "Kok");
    assert_eq!(sink.only(), many(1024).relayed());
}

#[test]
fn big_mails() {
    let address = Target::free_port();
    let daemon = Daemon::start(&format!(
        "max_size = 1048576
         local function relay(m) return m:connect('$DIR/out') end
         qmqp_listen('$DIR/in', relay)
         qmqp_listen('{address}', function(m) return m:connect('$DIR/out') end)"
    ));
    let sink = Sink::answering(daemon.path("out"), "Kok");
    let mail = Mail::of_size(1 << 20);
    assert_eq!(submit(daemon.path("in"), &mail), "Kok");
    assert_eq!(sink.only(), mail.relayed());
    assert_eq!(submit(address, &mail), "Kok");
    let head = b"Received: from [127.0.0.1] with QMQP\n";
    let second = sink.mails().remove(1);
    assert!(second.message.starts_with(head) && second.message.ends_with(&mail.message));
    assert_eq!(second.message.len(), head.len() + mail.message.len());
    assert_eq!(submit(address, &Mail::of_size((1 << 20) + 1)), "Dmessage too large");
    // Many mails at once, each larger than the socket buffers in both directions.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(submit(daemon.path("in"), &mail), "Kok"));
        }
    });
    assert!(sink.mails()[2..].iter().all(|got| *got == mail.relayed()));
}

#[test]
fn a_refused_client_gets_its_answer_however_long_it_sends() {
    let (daemon, _sink) = relay_with("client_timeout=2, request_timeout=30", "max_size=2000");
    let mut client = Client::connect(daemon.path("in"));
    client.send(b"302001:");
    // Longer than any pause that a closed connection would survive.
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(4) {
        client.try_send(&[b'x'; 4096]).expect("the daemon reads on");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(client.half_close().outcome(), "Dmessage too large");
    // A client that goes on without an end is left after a while.
    let (daemon, _sink) = relay_with("client_timeout=1, request_timeout=2", "max_size=2000");
    let mut endless = Client::connect(daemon.path("in"));
    endless.send(b"302001:");
    let started = Instant::now();
    while endless.try_send(&[b'x'; 4096]).is_ok() {
        assert!(started.elapsed() < PATIENCE, "the daemon reads on for ever");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn empty_message_and_null_sender() {
    let (daemon, sink) = relay();
    let mut mail = Mail::new("").from("");
    mail.message.clear();
    assert_eq!(submit(daemon.path("in"), &mail), "Kok");
    assert_eq!(sink.only(), mail.relayed());
}

#[test]
fn address_syntax() {
    let (daemon, sink) = relay();
    let long_local = format!("{}@x", "l".repeat(253));
    let long = format!("a@{}x", "d.".repeat(126));
    let long_label = format!("a@{}", "d".repeat(64));
    let bad = [
        "nobody",
        "@x",
        "a@",
        "a b@x",
        "a@b c",
        "a..b@x",
        ".a@x",
        "a.@x",
        "a@-x",
        "a@x-",
        "a@x..y",
        "a@.x",
        "a@x.",
        "\"\"@x",
        "\"a b\"@x",
        "\"a\"b\"@x",
        "a@[",
        "a@[1.2.3]",
        "a@[IPv6:xyz]",
        "a\r\nRCPT TO:<b@x>",
        "a\0@x",
        "\u{e4}@x",
        "<a@x>",
        "a,b@x",
        &long_local,
        &long,
        &long_label,
    ];
    for address in bad {
        let mail = Mail::new("bad").to(&["r@x", address]);
        assert_eq!(submit(daemon.path("in"), &mail), "Dbad address", "{address:?}");
        let mail = Mail::new("bad").from(address);
        assert_eq!(submit(daemon.path("in"), &mail), "Dbad address", "{address:?}");
    }
    assert_eq!(submit(daemon.path("in"), &Mail::new("bad").to(&[""])), "Dbad address");
    let good = [
        "a@x",
        "a.b+c=d@example.com",
        "!#$%&'*+-/=?^_`{|}~@x",
        "\"a@b\"@x",
        "\"a..b\"@x",
        "a@b_c.d",
        "a@[192.0.2.1]",
        "a@[IPv6:2001:db8::1]",
        "A@EXAMPLE.COM",
        "a@1.2.3",
        "a@xn--bcher-kva.example",
    ];
    let mail = Mail::new("good").to(&good);
    assert_eq!(submit(daemon.path("in"), &mail), "Kok");
    assert_eq!(sink.only(), mail.relayed());
}

#[test]
fn strangers_are_refused() {
    let address = Target::free_port();
    let daemon = Daemon::start(&format!(
        "qmqp_listen('{address}', function(m) return m:discard() end, {{allow={{'10.0.0.0/8'}}}})"
    ));
    assert_eq!(submit(address, &Mail::new("x")), "Zaccess denied");
    daemon.wait_for_log("peer=127.0.0.1");
}
