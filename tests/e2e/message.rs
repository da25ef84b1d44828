//! What a mail is to qrelay and to its next hops: where the inserted lines stand in a message and
//! how they end, which lines are its header, and which addresses its envelope may have.

use std::fs;

use crate::harness::{Daemon, Mail, Sink, submit};

/// A relay that inserts the line `X: 1` into every mail, by each action that passes mails on.
struct Relays {
    daemon: Daemon,
    sink: Sink,
}

impl Relays {
    fn start() -> Self {
        let daemon = Daemon::start(
            "local relays = {
               connect = function(m) return m:connect('$DIR/out') end,
               exec = function(m) return m:exec('/bin/sh', '-c', 'cat >$DIR/got; printf 1:K,') end,
               exec_raw = function(m) return m:exec_raw('/bin/dd', 'of=$DIR/raw', 'status=none') end
             }
             for name, relay in pairs(relays) do
               qmqp_listen('$DIR/' .. name, function(m)
                 m:insert_header('X', 1)
                 return relay(m)
               end)
             end",
        );
        let sink = Sink::answering(daemon.path("out"), "K");
        Self { daemon, sink }
    }

    /// Relays a message by each action, which all pass on the same, and returns the message as it
    /// arrived.
    #[track_caller]
    fn relayed(&self, message: &str) -> String {
        let mut mail = Mail::new("");
        mail.message = message.into();
        for action in ["connect", "exec", "exec_raw"] {
            assert_eq!(submit(self.daemon.path(action), &mail), "K", "{action} {message:?}");
        }
        let raw = fs::read(self.daemon.path("raw")).expect("the input of exec_raw");
        let connected = self.sink.mails().pop().expect("a mail");
        assert_eq!(connected.message, raw, "{message:?}");
        let executed = fs::read(self.daemon.path("got")).expect("the input of exec");
        assert_eq!(executed, connected.request(), "{message:?}");
        String::from_utf8(raw).expect("text")
    }
}

#[test]
fn lines_in_front_of_a_message_end_as_its_first_line_does() {
    let relays = Relays::start();
    let received = format!("Received: from PID={} UID=0 with QMQP", std::process::id());
    for (message, end) in [
        ("Subject: x\n\nbody\n", "\n"),
        ("Subject: x\n\nbody\r\n", "\n"),
        ("Subject: x\r\n\r\nbody\r\n", "\r\n"),
        ("Subject: x\r\nTo: y\n\nbody\n", "\r\n"),
        ("Subject: x\rTo: y\n\nbody\n", "\n"),
        ("Subject: x", "\n"),
        ("", "\n"),
    ] {
        let expected = format!("X: 1{end}{received}{end}{message}");
        assert_eq!(relays.relayed(message), expected, "{message:?}");
    }
}

#[test]
fn lines_in_front_of_a_message_leave_its_parts_what_they_are() {
    let relays = Relays::start();
    let received = format!("Received: from PID={} UID=0 with QMQP", std::process::id());
    for (mbox, end, apart, rest) in [
        // Lines of a mailbox file stay the beginning.
        ("From a@b Mon Jan  1\n", "\n", "", "Subject: x\n\nFrom here\n"),
        (">From a@b Mon Jan  1\r\n", "\r\n", "", "Subject: x\r\n\r\nbody\r\n"),
        ("From a\n>From b\n", "\n", "", "\nbody\n"),
        ("", "\n", "", "From: a@b\n\nbody\n"),
        // What looks folded isn't folded into our line.
        ("", "\n", "\n", " Subject: x\n\nbody\n"),
        ("", "\r\n", "\r\n", "\tx\r\n"),
        ("From a\n", "\n", "\n", " x\nSubject: x\n\n"),
    ] {
        let message = format!("{mbox}{rest}");
        let expected = format!("{mbox}X: 1{end}{received}{end}{apart}{rest}");
        assert_eq!(relays.relayed(&message), expected, "{message:?}");
    }
}

/// Returns the answer of a handler for this message, and how the message was relayed.
#[track_caller]
fn handled(code: &str, message: &str) -> String {
    let daemon = Daemon::start(&format!(
        "qmqp_listen('$DIR/in', function(m) {code} return m:exec_raw('/bin/dd', 'of=$DIR/raw',
         'status=none') end)"
    ));
    let mut mail = Mail::new("");
    mail.message = message.into();
    assert_eq!(submit(daemon.path("in"), &mail), "K", "{code}\n{}", daemon.text());
    let raw = fs::read(daemon.path("raw")).expect("the input");
    let raw = String::from_utf8(raw).expect("text");
    let received = format!("Received: from PID={} UID=0 with QMQP\n", std::process::id());
    raw.strip_prefix(&received).expect("the line").to_owned()
}

#[test]
fn a_bare_cr_ends_a_line_of_the_header() {
    let code = "
        local function list(name) return table.concat(m:headers(name), ',') end
        assert(m:header('B') == '2', m:header('B'))
        assert(m:header('F') == 'a  b', m:header('F'))
        assert(list('x') == '1,2', list('x'))
        assert(m:header('Y') == nil)
        assert(m:remove_header('X') == 2)
        assert(m:remove_header('Y') == 0)";
    let left = handled(code, "A: 1\rX: 1\rB: 2\nF: a\r  b\rX: 2\nC: 3\r\rY: body\n\nX: body\n");
    assert_eq!(left, "A: 1\rB: 2\nF: a\r  b\r\nC: 3\r\rY: body\n\nX: body\n");
}

#[test]
fn no_next_hop_sees_a_removed_field() {
    // For a next hop that takes a bare CR as a character, the header doesn't end before `X: 2`.
    let code = "assert(m:remove_header('X') == 2) assert(m:header('X') == '1')";
    let left = handled(code, "A: 1\rX: 1\nB: 2\r\r\nX: 2\r\r\nC: 3\r\rbody\n\nX: body\n");
    assert_eq!(left, "A: 1\r\nB: 2\r\r\nC: 3\r\rbody\n\nX: body\n");
}

#[test]
fn the_value_of_any_field_can_be_inserted() {
    let code = "m:insert_header('X-Subject', m:header('Subject'))
        assert(not pcall(m.insert_header, m, 'X', 'a\\rB: c'))
        return m:exec_raw('/usr/bin/tee', '$DIR/raw')";
    let daemon = Daemon::start(&format!("qmqp_listen('$DIR/in', function(m) {code} end)"));
    let mut mail = Mail::new("");
    mail.message = b"Subject: a\n\tb\n\n".to_vec();
    assert_eq!(submit(daemon.path("in"), &mail).status(), 'K', "{}", daemon.text());
    let raw = fs::read(daemon.path("raw")).expect("the input");
    assert!(raw.starts_with(b"X-Subject: a\tb\nReceived:"), "{}", raw.escape_ascii());
}

#[test]
fn senders_of_mailing_lists_and_forwarders_are_relayed() {
    let daemon =
        Daemon::start("qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)");
    let sink = Sink::answering(daemon.path("out"), "Kok");
    let srs = format!("SRS0=HHH=TT=example.org={}@example.com", "l".repeat(150));
    let senders = [
        "#@[]",
        "-@[]",
        "list-@[]",
        "list-return-7-@example.com-@[]",
        &srs,
        "prvs=1-x@example.com",
    ];
    for sender in senders {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x").from(sender)), "Kok", "{sender}");
        assert_eq!(sink.mails().pop().expect("a mail").sender, sender.as_bytes());
    }
    assert_eq!(submit(daemon.path("in"), &Mail::new("x").to(&[&srs])), "Kok");
    for sender in &senders[..4] {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x").to(&[sender])), "Dbad address");
    }
    for sender in ["@[]", "list@[]", "a b-@[]", "##@[]"] {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x").from(sender)), "Dbad address");
    }
}

#[test]
fn addresses_without_a_domain_get_the_default_domain() {
    let daemon = Daemon::start(
        "settings{default_domain='example.com'}
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'root@example.com' then
             assert(m.recipients[1] == 'ops@example.com' and m.recipients[2] == 'r@example.org')
           else
             m.sender = 'www-data'
             m.recipients = {'r@example.org', 'admin'}
             assert(m.sender == 'www-data@example.com')
             assert(not pcall(function() m.recipients = {'a b'} end))
           end
           return m:connect('$DIR/out')
         end)",
    );
    let sink = Sink::answering(daemon.path("out"), "Kok");
    for (mail, sender, recipients) in [
        (
            Mail::new("x").from("root").to(&["ops", "r@example.org"]),
            "root@example.com",
            ["ops@example.com", "r@example.org"],
        ),
        (Mail::new("x").from(""), "www-data@example.com", ["r@example.org", "admin@example.com"]),
    ] {
        assert_eq!(submit(daemon.path("in"), &mail), "Kok", "{}", daemon.text());
        let relayed = sink.mails().pop().expect("a mail");
        assert_eq!(relayed, mail.relayed().from(sender).to(&recipients));
    }
    daemon.wait_for_log("from=<root@example.com> to=<ops@example.com>");
    for (sender, recipient) in [("a b", "r"), ("root@", "r"), ("root", ""), ("root", "@x")] {
        let mail = Mail::new("x").from(sender).to(&[recipient]);
        assert_eq!(submit(daemon.path("in"), &mail), "Dbad address", "{sender} {recipient}");
    }
}
