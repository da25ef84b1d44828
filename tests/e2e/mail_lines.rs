//! The log has one `mail` line for each client that said anything, whatever became of it.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::harness::mail::netstring;
use crate::harness::{Client, Daemon, Mail, Outcome, PATIENCE, Sink, Target, submit};

/// Starts a relay with one worker and short time limits for clients.
fn relay(options: &str) -> Daemon {
    Daemon::start(&format!(
        "settings{{workers=1, client_timeout=1, request_timeout=2}}
         qmqp_listen('$DIR/in', function(m) return m:discard() end, {{{options}}})"
    ))
}

/// Returns the request with this sender and these recipients.
fn request(message: &[u8], sender: &str, recipients: &[&str]) -> Vec<u8> {
    let mut mail = Mail::new("").from(sender).to(recipients);
    mail.message = message.to_vec();
    mail.request()
}

/// Waits for the line of the only client, and checks that the line has all `parts`.
#[track_caller]
fn only_line(daemon: &Daemon, parts: &[&str]) -> String {
    let line = daemon.wait_for_log(": mail id=");
    for part in parts {
        assert!(line.contains(part), "no {part} in {line}");
    }
    assert_eq!(daemon.count_log(": mail id="), 1);
    line
}

#[test]
fn a_refused_request_names_sender_rule_and_offender() {
    let recipients: Vec<_> = (0..1025).map(|number| format!("r{number}@x")).collect();
    let many: Vec<_> = recipients.iter().map(String::as_str).collect();
    for (request, parts) in [
        (
            request(b"m", "s@x", &["r@x", "q r\t<@y", "t@z"]),
            &[
                r#"from=<s@x> to="<r@x>,<q r?\\x3c@y>,<t@z>" recipients=3 "#,
                r#" status=D reply="bad address" "#,
                r#" cause="recipient <q r?\\x3c@y>: no valid local part""#,
            ][..],
        ),
        (
            request(b"m", "nobody", &["r@x"]),
            &["from=<nobody> to=<r@x> recipients=1 ", r#" cause="sender <nobody>: no @""#],
        ),
        (
            request(b"m", "s@x", &many),
            &[
                "from=<s@x> to=<r0@x>,<r1@x>,<r2@x>,<r3@x>,<r4@x> recipients=1025 ",
                r#" status=D reply="too many recipients" "#,
                r#" cause="1025 recipients, at most 1024""#,
            ],
        ),
        (
            request(&[b'm'; 2001], "s@x", &["r@x"]),
            &[
                r#" status=D reply="message too large" "#,
                r#" cause="a message of 2001 bytes, max_size=2000""#,
            ],
        ),
        (
            b"302001:".to_vec(),
            &[
                r#" reply="message too large" "#,
                r#" cause="a request of 302001 bytes, at most 302000""#,
            ],
        ),
        (
            b"GET / HTTP/1.0\r\n\r\n".to_vec(),
            &[r#" status=D reply="malformed input" "#, "no request: 'GET / HTTP/1.0????'"],
        ),
        (netstring(b"1:m,3:s@x,"), &["from=<s@x> ", r#" cause="no recipient""#]),
        (
            netstring(b"1:m,3:s@x,3:r@x,junk"),
            &["from=<s@x> to=<r@x> recipients=1 ", r#" cause="no netstring after 1 recipients""#],
        ),
    ] {
        let daemon = relay("max_size=2000");
        Client::connect(daemon.path("in")).send(&request).outcome();
        let line = only_line(&daemon, parts);
        let listener = format!(" listener={} ", daemon.path("in").display());
        assert!(line.contains(&listener) && line.contains(" uid=0 "), "{line}");
        assert!(!line.contains("Malformed") && !line.contains("Local"), "{line}");
    }
}

#[test]
fn a_client_that_is_too_slow() {
    let daemon = relay("");
    let whole = Mail::new("x").request();
    let mut client = Client::connect(daemon.path("in"));
    assert_eq!(client.send(&whole[..whole.len() - 1]).outcome(), "Zrequest timed out");
    let cause = format!(
        " cause=\"timed out after {} bytes of a request of {}\"",
        whole.len() - 1,
        whole.len() - 4
    );
    let from = "from=<sender@example.com> to=<recipient@example.org> recipients=1 ";
    only_line(&daemon, &[" status=Z reply=\"request timed out\" ", from, &cause]);
}

#[test]
fn a_client_that_leaves() {
    for part in [1, 50] {
        let daemon = relay("");
        Client::connect(daemon.path("in")).send(&Mail::new("x").request()[..part]);
        let cause = format!(" cause=\"the client left after {part} bytes");
        only_line(&daemon, &[" status=- reply=canceled ", &cause]);
    }
}

#[test]
fn a_client_that_says_nothing_has_no_line() {
    let daemon = relay("");
    drop(Client::connect(daemon.path("in")));
    assert_eq!(Client::connect(daemon.path("in")).half_close().outcome(), Outcome::Silence);
    assert_eq!(Client::connect(daemon.path("in")).outcome(), "Zrequest timed out");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    only_line(&daemon, &[" status=K "]);
}

#[test]
fn a_client_that_no_worker_serves() {
    let daemon = Daemon::start(
        "settings{workers=1, worker_connections=1, client_share=1, relay_timeout=1}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out', {timeout=30}) end)",
    );
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mut first = Client::connect(daemon.path("in"));
    first.send(&Mail::new("first").request());
    sink.record().wait_for_count(1);
    let mut second = Client::connect(daemon.path("in"));
    second.send(&Mail::new("second").request());
    assert_eq!(second.outcome(), "Ztry again later");
    let cause = " cause=\"no worker was free in time\"";
    only_line(&daemon, &[" status=Z reply=\"try again later\" ", cause, " uid=0 ", " listener="]);
    gate.open();
    assert_eq!(first.outcome().status(), 'K');
}

#[test]
fn a_client_that_is_not_let_in() {
    let address = Target::free_port();
    let daemon = Daemon::start(&format!(
        "qmqp_listen('{address}', function(m) return m:discard() end, {{allow={{'192.0.2.1'}}}})"
    ));
    // Whether the client was refused before it had said something isn't up to this test.
    let mut client = Client::connect(address);
    let _ = client.try_send(&Mail::new("x").request());
    assert_eq!(client.outcome(), "Zaccess denied");
    daemon.wait_for_log("connection refused: address not allowed");
    let mails = daemon.count_log(": mail id=");
    assert_eq!(mails, daemon.count_log(" cause=\"address not allowed\""));
}

#[test]
fn message_id_listener_and_recipients() {
    let address = Target::free_port();
    let daemon = Daemon::start(&format!(
        "qmqp_listen('{address}', function(m) m.account = 'a' return m:discard() end)"
    ));
    let recipients = ["a@x", "b@x", "c@x", "d@x", "e@x", "f@x"];
    let message = b"Subject: x\nMESSAGE-id: <1.2@\x1bx>\n\nMessage-ID: <no>\n";
    let mut client = Client::connect(address);
    assert_eq!(client.send(&request(message, "s@x", &recipients)).outcome(), "Kdiscarded");
    only_line(
        &daemon,
        &[
            " to=<a@x>,<b@x>,<c@x>,<d@x>,<e@x> recipients=6 ",
            &format!(" peer=127.0.0.1 listener={address} account=a message_id=<1.2@ "),
        ],
    );
}

#[test]
fn a_stop_answers_and_logs_those_that_wait() {
    let daemon = Daemon::start(
        "settings{workers=1, worker_connections=1, client_share=1, drain_timeout=1}
         qmqp_listen('$DIR/in', function(m) sleep(30) return m:discard() end)",
    );
    let mut clients: Vec<_> = (0..3).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut clients {
        client.send(&Mail::new("x").request());
    }
    daemon.signal(Signal::SIGTERM);
    for client in &mut clients {
        assert_eq!(client.outcome(), "Ztry again later");
    }
    let all = crate::harness::record::within(PATIENCE + Duration::from_secs(5), || {
        (daemon.count_log(": mail id=") == 3).then_some(())
    });
    assert!(all.is_some(), "{}", daemon.text());
}
