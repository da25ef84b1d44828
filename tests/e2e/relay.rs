//! The behaviours of a next hop, and what the client is told in each case. The client is told `K`
//! only if the next hop sent `K` after it had received the whole request.

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::mail::netstring;
use crate::harness::network::in_own_network;
use crate::harness::sink::{Behaviour, answer};
use crate::harness::{
    Client, Daemon, Mail, Reply, Sink, Site, Target, eventually, processes, submit,
};

/// Starts a relay whose handler returns `m:connect(ARGUMENTS)`.
fn relay(settings: &str, arguments: &str) -> Daemon {
    Daemon::start(&format!(
        "settings{{workers=1, {settings}}}
         qmqp_listen('$DIR/in', function(m) return m:connect({arguments}) end)"
    ))
}

/// Returns a mail that is larger than the kernel's buffers on the way to a next hop that doesn't
/// read.
fn big() -> Mail {
    Mail::of_size(8 << 20)
}

#[test]
fn replies_are_passed_on() {
    let daemon = relay("", "'$DIR/out'");
    let sink = Sink::start(
        daemon.path("out"),
        answer(|mail| {
            let text = String::from_utf8_lossy(&mail.message);
            Reply::text(text.lines().last().expect("the body"))
        }),
    );
    for reply in ["Kok 1234 queued", "Ztry later (#4.3.0)", "Dno such user (#5.1.1)", "K"] {
        assert_eq!(submit(daemon.path("in"), &Mail::new(reply)), reply);
    }
    assert_eq!(sink.mails().len(), 4);
    let long = format!("D{}", "x".repeat(1000));
    let cut = &long[..256];
    assert_eq!(submit(daemon.path("in"), &Mail::new(&long)), cut);
}

#[test]
fn reply_text_is_unchanged_for_the_client_and_harmless_in_the_log() {
    let daemon = relay("", "'$DIR/out'");
    let text = b"D\x1b[31m\xff\x00\r\n<evil>";
    let _sink = Sink::start(daemon.path("out"), answer(|_| Reply::Raw(netstring(text))));
    let mut client = Client::connect(daemon.path("in"));
    let outcome = client.send(&Mail::new("x").request()).outcome();
    assert_eq!(outcome, crate::harness::Outcome::Reply(text.to_vec()));
    daemon.wait_for_log("evil");
    assert!(!daemon.text().contains('\x1b'));
}

#[test]
fn unusual_replies_are_understood() {
    let daemon = relay("", "'$DIR/out'");
    let _sink = Sink::start(
        daemon.path("out"),
        answer(|mail| match &mail.sender[..] {
            b"zeros@x" => Reply::Raw(b"0003:Kok,".to_vec()),
            _ => Reply::Raw(b"3:Kok,4:Dbad,and more".to_vec()),
        }),
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x").from("zeros@x")), "Kok");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x").from("more@x")), "Kok");
}

#[test]
fn malformed_replies() {
    let daemon = relay("", "'$DIR/out'");
    let replies: [&[u8]; 8] =
        [b"250 ok\r\n", b"3:Kok;", b"2:Xa,", b"0:,", b":Kok,", b"-3:Kok,", b"9999:Kxxx", b"3Kok,"];
    let sink = Sink::start(
        daemon.path("out"),
        answer(move |mail| {
            let number = String::from_utf8_lossy(&mail.sender[..1]).parse::<usize>();
            Reply::Raw(replies[number.expect("a digit")].to_vec())
        }),
    );
    for (number, reply) in replies.iter().enumerate() {
        let mail = Mail::new("x").from(&format!("{number}@x"));
        let shown = String::from_utf8_lossy(reply);
        assert_eq!(submit(daemon.path("in"), &mail), "Zmalformed relay response", "{shown:?}");
    }
    assert_eq!(sink.mails().len(), replies.len());
}

#[test]
fn a_reply_without_end() {
    let daemon = relay("", "'$DIR/out'");
    let endless = [b"4095:K".to_vec(), vec![b'x'; 10_000]].concat();
    let _sink = Sink::start(daemon.path("out"), answer(move |_| Reply::Raw(endless.clone())));
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zmalformed relay response");
}

#[test]
fn closed_without_an_answer() {
    let daemon = relay("", "'$DIR/out'");
    let _sink = Sink::start(
        daemon.path("out"),
        answer(|mail| match &mail.sender[..] {
            b"half@x" => Reply::Raw(b"3:Ko".to_vec()),
            _ => Reply::Close,
        }),
    );
    assert_eq!(submit(daemon.path("in"), &Mail::new("x").from("none@x")), "Zrelay failed");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x").from("half@x")), "Zrelay failed");
}

#[test]
fn early_replies() {
    // The next hop answers at once and then reads the whole request.
    for (reply, told) in
        [("Kok", "Zrelay failed"), ("Zbusy", "Zbusy"), ("Dtoo large for me", "Dtoo large for me")]
    {
        let daemon = relay("", "'$DIR/out'");
        let bytes = netstring(reply.as_bytes());
        let _sink = Sink::start(daemon.path("out"), Behaviour::Early(bytes));
        assert_eq!(submit(daemon.path("in"), &big()), told, "early {reply}");
    }
}

#[test]
fn broken_off_while_writing() {
    // The next hop reads a part, answers or not, and closes with the rest unread.
    let tcp = |behaviour| Sink::tcp(behaviour);
    let local = |behaviour| Sink::start(Target::unique_abstract(), behaviour);
    for start in [&tcp as &dyn Fn(Behaviour) -> Sink, &local] {
        for (reply, told) in [
            ("", "Zrelay failed"),
            ("3:Kok,", "Zrelay failed"),
            ("5:Zbusy,", "Zbusy"),
            ("5:Dhuge,", "Dhuge"),
            ("5:Dhu", "Zrelay failed"),
        ] {
            let sink = start(Behaviour::Abort(1000, reply.into()));
            let daemon = relay("", &format!("'{}'", sink.address()));
            assert_eq!(submit(daemon.path("in"), &big()), told, "{reply:?} at {}", sink.address());
        }
    }
}

#[test]
fn silent_next_hops() {
    for (behaviour, mail) in
        [(answer(|_| Reply::Silence), Mail::new("x")), (Behaviour::Deaf, big())]
    {
        let daemon = Daemon::start(
            "settings{workers=1, relay_timeout=0.7}
             qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)
             qmqp_listen('$DIR/own', function(m) return m:connect('$DIR/out', {timeout=0.3}) end)",
        );
        let _sink = Sink::start(daemon.path("out"), behaviour);
        let started = Instant::now();
        assert_eq!(submit(daemon.path("own"), &mail), "Ztimeout");
        assert!(started.elapsed() >= Duration::from_millis(300));
        assert_eq!(submit(daemon.path("in"), &mail), "Zrelay failed");
    }
}

#[test]
fn an_actions_own_timeout_may_exceed_the_budget() {
    let daemon = relay("relay_timeout=0.2", "'$DIR/out', {timeout=30}");
    let slow = crate::harness::sink::slowly(Duration::from_millis(600), "Kat last");
    let _sink = Sink::start(daemon.path("out"), slow);
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kat last");
}

#[test]
fn unreachable_next_hops() {
    let port = Target::free_port();
    let daemon = relay("", "{'$DIR/nobody', '@qrelay-nobody', '127.0.0.1:{port}'}");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zscript failed", "a port of letters");
    let list = format!("{{'$DIR/nobody', '@qrelay-nobody', '{port}'}}");
    let daemon = relay("", &list);
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Zconnect failed");
}

#[test]
fn failover() {
    let port = Target::free_port();
    let daemon = relay("", &format!("{{'$DIR/nobody', '{port}', '$DIR/out', '$DIR/out2'}}"));
    let first = Sink::answering(daemon.path("out"), "Kfirst");
    let second = Sink::answering(daemon.path("out2"), "Ksecond");
    let mail = Mail::new("x");
    assert_eq!(submit(daemon.path("in"), &mail), "Kfirst");
    assert_eq!(first.only(), mail.relayed());
    drop(first);
    fs::remove_file(daemon.path("out")).expect("socket");
    assert_eq!(submit(daemon.path("in"), &mail), "Ksecond");
    assert_eq!(second.only(), mail.relayed());
}

#[test]
fn no_failover_once_the_request_is_on_its_way() {
    let daemon = relay("", "{'$DIR/out', '$DIR/out2'}");
    let _first = Sink::start(daemon.path("out"), Behaviour::Abort(0, Vec::new()));
    let second = Sink::answering(daemon.path("out2"), "Ksecond");
    assert_eq!(submit(daemon.path("in"), &big()), "Zrelay failed");
    let _z = Sink::answering(daemon.path("out3"), "Znot now");
    assert_eq!(second.mails().len(), 0);
}

#[test]
fn a_next_hop_that_does_not_accept() {
    let daemon = relay("connect_timeout=0.3", "{'$DIR/full', '$DIR/out'}");
    let _sink = Sink::answering(daemon.path("out"), "Kok");
    let full = UnixListener::bind(daemon.path("full")).expect("bind");
    nix::sys::socket::listen(&full, nix::sys::socket::Backlog::new(0).expect("fits"))
        .expect("smaller backlog");
    let _fill = UnixStream::connect(daemon.path("full")).expect("the only place");
    let started = Instant::now();
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
    assert!(started.elapsed() >= Duration::from_millis(300), "{:?}", started.elapsed());
}

#[test]
fn every_kind_of_address() {
    in_own_network(relay_to_every_kind_of_address);
}

fn relay_to_every_kind_of_address() {
    let reply = |_: &Mail| Reply::text("Kok");
    let daemon = Daemon::start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m) return m:connect(m:header('X-To')) end)",
    );
    let ipv6 = std::net::TcpListener::bind("[::1]:0").expect("IPv6 loopback");
    let port = ipv6.local_addr().expect("local address");
    drop(ipv6);
    let sinks = [
        Sink::start(daemon.path("out"), answer(reply)),
        Sink::start(Target::unique_abstract(), answer(reply)),
        Sink::tcp(answer(reply)),
        Sink::start(port, answer(reply)),
    ];
    for sink in &sinks {
        let mut mail = Mail::new("x");
        mail.message = format!("X-To: {}\n\nx\n", sink.address()).into_bytes();
        assert_eq!(submit(daemon.path("in"), &mail), "Kok", "{}", sink.address());
        assert_eq!(sink.only(), mail.relayed());
    }
}

#[test]
fn a_host_name_is_looked_up_when_a_mail_is_relayed() {
    let port = Target::free_port().port();
    let sink =
        Sink::start(SocketAddr::from(([127, 0, 0, 9], port)), answer(|_| Reply::text("Kok")));
    let site = Site::with(&format!(
        "local kept
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'list@x' then
             return m:connect({{'other.test', 'several.test:{port}'}}, {{timeout = 10}})
           end
           kept = kept or m:connect('next.test:{port}')
           return m.sender == 'none@x' and m:connect('other.test') or kept
         end)"
    ));
    // The first address of the second name accepts no connection.
    let names = "127.0.0.9 next.test\n127.0.0.8 several.test\n127.0.0.9 several.test\n";
    let names =
        [("hosts", names), ("nsswitch.conf", "hosts: files\n"), ("host.conf", "multi on\n")];
    let daemon = site.launch().with_etc(&names).ready();
    for _ in 0..2 {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok", "{}", daemon.text());
    }
    daemon.wait_for_log(&format!("next_hop=127.0.0.9:{port} "));
    let told = submit(daemon.path("in"), &Mail::new("x").from("list@x"));
    assert_eq!(told, "Kok", "{}", daemon.text());
    assert_eq!(sink.mails().len(), 3);
    let told = submit(daemon.path("in"), &Mail::new("x").from("none@x"));
    assert_eq!(told, "Zconnect failed");
    let line = daemon.wait_for_log("connect failed");
    assert!(line.contains("cannot resolve 'other.test': "), "{line}");
}

/// The resolver waits for a name server that never answers.
#[test]
fn a_look_up_that_is_never_answered_holds_up_its_own_mail_only() {
    in_own_network(|| {
        let _server = UdpSocket::bind("127.0.0.1:53").expect("bind");
        let site = Site::with(
            "settings{workers=1, relay_timeout=1}
             qmqp_listen('$DIR/in', function(m)
               if m.sender == 'slow@x' then return m:connect('slow.test') end
               return m:discard('quick')
             end)",
        );
        let resolver = "nameserver 127.0.0.1\noptions timeout:30\n";
        let files = [("resolv.conf", resolver), ("nsswitch.conf", "hosts: dns\n")];
        let daemon = site.launch().with_etc(&files).ready();
        let mut slow = Client::connect(daemon.path("in"));
        slow.send(&Mail::new("x").from("slow@x").request());
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kquick");
        assert_eq!(slow.outcome(), "Zrelay failed", "{}", daemon.text());
        daemon.wait_for_log("the look-up takes too long");
    });
}

#[test]
fn host_names_are_resolved_at_loading_and_in_handlers() {
    let port = Target::free_port().port();
    let sink =
        Sink::start(SocketAddr::from(([127, 0, 0, 9], port)), answer(|_| Reply::text("Kok")));
    let site = Site::with(&format!(
        "settings{{workers=1}}
         local function resolve()
           local ok, message = pcall(qmqp_resolve, 'other.test')
           assert(not ok and message:find(\"cannot resolve 'other.test': \", 1, true), message)
           return qmqp_resolve('next.test:{port}')
         end
         local next_hop = resolve()
         assert(tostring(next_hop) == '127.0.0.9:{port}', tostring(next_hop))
         qmqp_listen('$DIR/in', function(m)
           assert(resolve() == next_hop)
           return m:connect(next_hop)
         end)"
    ));
    let names = [("hosts", "127.0.0.9 next.test\n"), ("nsswitch.conf", "hosts: files\n")];
    let daemon = site.launch().with_etc(&names).ready();
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok", "{}", daemon.text());
    assert_eq!(sink.mails().len(), 1);
}

#[test]
fn many_at_once() {
    let daemon = relay("", "'$DIR/out'");
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mails: Vec<_> = (0..150).map(|i| Mail::new(&format!("mail {i}"))).collect();
    let mut clients: Vec<_> = mails
        .iter()
        .map(|mail| {
            let mut client = Client::connect(daemon.path("in"));
            client.send(&mail.request());
            client
        })
        .collect();
    sink.record().wait_for_count(150);
    gate.open();
    assert!(clients.iter_mut().all(|client| client.outcome() == "Kok"));
    let got = sink.mails();
    assert!(mails.iter().all(|mail| got.contains(&mail.relayed())));
}

#[test]
fn one_log_line_per_mail() {
    let daemon = Daemon::start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m)
           m.account = 'customer-7'
           return m:connect('$DIR/out')
         end)",
    );
    let _sink = Sink::answering(daemon.path("out"), "Kqueued as 99");
    let mail = Mail::new("x").from("s@example.com").to(&["first@example.org", "second@x"]);
    assert_eq!(submit(daemon.path("in"), &mail), "Kqueued as 99");
    let line = daemon.wait_for_log("queued as 99");
    let out = daemon.path("out").display().to_string();
    for part in ["s@example.com", "first@example.org", "2", "customer-7", "connect", &out] {
        assert!(line.contains(part), "{part:?} in {line:?}");
    }
    assert_eq!(daemon.count_log("queued as 99"), 1);
}

#[test]
fn a_client_that_is_gone_does_not_cancel_a_relay() {
    let daemon = relay("workers=1", "'$DIR/out'");
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mut client = Client::connect(daemon.path("in"));
    client.send(&Mail::new("x").request());
    sink.record().wait_for_count(1);
    client.stream.reset();
    gate.open();
    let line = daemon.wait_for_log("action=connect");
    assert!(line.contains("status=K"), "{line}");
    assert_eq!(sink.mails(), [Mail::new("x").relayed()]);
}

/// The only thread of a quiet worker serves a mail itself. A next hop that answers half a reply
/// holds up its own mail, and no other one.
#[test]
fn half_a_reply_holds_up_no_other_mail() {
    let daemon = relay("", "'$DIR/out'");
    let listener = UnixListener::bind(daemon.path("out")).expect("bind");
    listener.set_nonblocking(true).expect("nonblocking");
    let accept = || eventually("a mail", || listener.accept().ok().map(|(stream, _)| stream));
    let mut first = begin(&daemon);
    let mut slow = accept();
    let worker = daemon.workers()[0];
    let thread = processes::thread_named(worker, "mail");
    let waits = || -> String {
        let status = fs::read_to_string(format!("/proc/{worker}/task/{thread}/status"));
        let status = status.expect("a thread");
        let waits = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches"));
        waits.expect("a count").to_owned()
    };
    let before = waits();
    slow.write_all(b"3:K").expect("half a reply");
    eventually("a thread that has read it and waits again", || (waits() != before).then_some(()));
    let mut second = begin(&daemon);
    accept().write_all(b"3:Kno,").expect("a reply");
    assert_eq!(second.outcome(), "Kno");
    slow.write_all(b"ok,").expect("the rest");
    assert_eq!(first.outcome(), "Kok");
}

/// Discards every mail, the first one when the test says so.
const SPINS: &str = "settings{workers=1}
    qmqp_listen('$DIR/in', function(m)
      if m.sender == 'first@example.com' then
        print('waiting')
        -- Without sleep, which would give the mail to another thread.
        while io.open('$DIR/go') == nil do end
      end
      return m:discard()
    end)";

/// The thread that receives jobs serves a mail that is handed to nobody at once. If the client
/// sends on, the thread reads that for a while, and another thread receives jobs.
#[test]
fn a_client_that_sends_on_holds_up_no_other_mail() {
    let daemon = Daemon::start(SPINS);
    let mut first = Client::connect(daemon.path("in"));
    first.send(&Mail { sender: b"first@example.com".into(), ..Mail::new("") }.request());
    daemon.wait_for_log("waiting");
    first.send(b"surplus");
    fs::write(daemon.path("go"), "").expect("written");
    assert_eq!(first.outcome(), "Kdiscarded");
    assert_eq!(submit(daemon.path("in"), &Mail::new("")), "Kdiscarded");
    daemon.wait_for_log("from=<sender@example.com>");
    assert_eq!(daemon.count_log("from=<first@example.com>"), 0, "its client may still send");
}

/// As above, for a mail that the worker has received together with the first one.
#[test]
fn a_client_that_sends_on_holds_up_no_mail_of_its_datagram() {
    let daemon = Daemon::start(SPINS);
    // The supervisor accepts both at once, and passes them on in one datagram.
    processes::stop(daemon.pid());
    let mut first = Client::connect(daemon.path("in"));
    first.send(&Mail { sender: b"first@example.com".into(), ..Mail::new("") }.request());
    let mut second = begin(&daemon);
    daemon.signal(Signal::SIGCONT);
    daemon.wait_for_log("waiting");
    first.send(b"surplus");
    fs::write(daemon.path("go"), "").expect("written");
    assert_eq!(first.outcome(), "Kdiscarded");
    assert_eq!(second.outcome(), "Kdiscarded");
    daemon.wait_for_log("from=<sender@example.com>");
    assert_eq!(daemon.count_log("from=<first@example.com>"), 0, "its client may still send");
}

/// Sends a mail whose next hop has not answered yet.
fn begin(daemon: &Daemon) -> Client {
    let mut client = Client::connect(daemon.path("in"));
    client.send(&Mail::new("").request());
    client
}
