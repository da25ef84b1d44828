//! The log records of mails: one Pond datagram per mail. The tests check the bytes against the
//! original program's, every kind of address of a log server, and that a log server in trouble
//! costs records but never mails.
//!
//! # Failure
//! A malformed datagram (magic, attributes, CRC) panics in [`Record::parse`].

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as LocalAddr, UnixDatagram};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;

use crate::harness::network::{in_own_network, ip};
use crate::harness::processes::signal;
use crate::harness::{Client, Daemon, Mail, PATIENCE, Sink, Site, Target, eventually, submit};

/// Datagrams of the original program for a relayed, a rejected and a discarded mail.
const VECTORS: [&str; 3] = [
    "6304610301000660ff6bc4ca1a03616363743432000d66726f6d3d3c616363406578616d706c652e636f6d3e\
     20746f3d3c7231406578616d706c652e6f72673e2c3c7232406578616d706c652e6f72673e206f6b00090000\
     00000000001a0a000000000000004d00000000000000550b00000000000001d50f03e13a0bc1",
    "6304610301000660ff6bc4cb810d66726f6d3d3c72656a406578616d706c652e636f6d3e20746f3d3c723140\
     6578616d706c652e6f72673e2072656a6563746564000900000000000000120a000000000000003b00000000\
     000000000b000000000000001a0f03d055ac87",
    "6304610301000660ff6bc4cc950d66726f6d3d3c64406578616d706c652e636f6d3e20746f3d3c7231406578\
     616d706c652e6f72673e20646973636172646564000900000000000000120a00000000000000390000000000\
     0000000b000000000000001a0f0382f3f8bf",
];

/// Numbers of the attributes, from the description of the protocol.
mod id {
    pub const TIMESTAMP: u8 = 1;
    pub const REMOTE_HOST: u8 = 2;
    pub const SITE: u8 = 3;
    pub const LENGTH: u8 = 9;
    pub const TRAFFIC: u8 = 10;
    pub const DURATION: u8 = 11;
    pub const MESSAGE: u8 = 13;
    pub const FORWARDED_TO: u8 = 14;
    pub const TYPE: u8 = 15;
    pub const TRUNCATED: u8 = 20;
}

/// Computes the CRC-32 (IEEE) bit by bit, without a table that could have the same mistake as
/// qrelay's.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1)))
    })
}

fn unhex(text: &str) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).expect("hex");
    (0..text.len()).step_by(2).map(byte).collect()
}

/// The attributes of a datagram in their order; strings are without their NUL.
#[derive(Debug, PartialEq, Eq)]
struct Record {
    attributes: Vec<(u8, Vec<u8>)>,
}

impl Record {
    #[track_caller]
    fn parse(datagram: &[u8]) -> Self {
        let (content, crc) = datagram.split_at(datagram.len() - 4);
        assert_eq!(content[..4], [0x63, 0x04, 0x61, 0x03], "magic");
        assert_eq!(crc, crc32(&content[4..]).to_be_bytes(), "CRC");
        let mut rest = &content[4..];
        let mut attributes = Vec::new();
        while let [id, after @ ..] = rest {
            let (length, skip) = match *id {
                id::TIMESTAMP | id::LENGTH | id::DURATION => (8, 0),
                id::TRAFFIC => (16, 0),
                id::TYPE | id::TRUNCATED => (1, 0),
                _ => (after.iter().position(|&byte| byte == 0).expect("a string's end"), 1),
            };
            attributes.push((*id, after[..length].to_vec()));
            rest = &after[length + skip..];
        }
        Self { attributes }
    }

    fn get(&self, id: u8) -> Option<&[u8]> {
        self.attributes.iter().find(|(found, _)| *found == id).map(|(_, value)| &**value)
    }

    fn text(&self, id: u8) -> Option<String> {
        self.get(id).map(|value| String::from_utf8_lossy(value).into_owned())
    }

    #[track_caller]
    fn message(&self) -> String {
        self.text(id::MESSAGE).expect("MESSAGE")
    }

    /// Returns the bytes received and sent.
    #[track_caller]
    fn traffic(&self) -> (u64, u64) {
        let (received, sent) = self.get(id::TRAFFIC).expect("TRAFFIC").split_at(8);
        let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("8 bytes"));
        (number(received), number(sent))
    }

    #[track_caller]
    fn number(&self, id: u8) -> u64 {
        let bytes = self.get(id).and_then(|value| value.try_into().ok());
        u64::from_be_bytes(bytes.expect("a number"))
    }
}

/// Returns the datagram without its CRC and FORWARDED_TO, and with zeros for TIMESTAMP and
/// DURATION. All other bytes are unchanged.
#[track_caller]
fn comparable(datagram: &[u8]) -> Vec<u8> {
    let mut out = datagram[..4].to_vec();
    for (id, value) in Record::parse(datagram).attributes {
        match id {
            id::TIMESTAMP | id::DURATION => out.extend([&[id][..], &[0; 8]].concat()),
            id::FORWARDED_TO => {}
            id::REMOTE_HOST | id::SITE | id::MESSAGE => out.extend([&[id], &*value, &[0]].concat()),
            _ => out.extend([&[id], &*value].concat()),
        }
    }
    out
}

/// Longest datagram in bytes that a Pond server takes.
const LONGEST: usize = 4095;

/// A log server: a socket that receives datagrams.
#[derive(Debug)]
enum LogServer {
    Local(UnixDatagram),
    Udp(UdpSocket),
}

impl LogServer {
    fn at(path: &Path) -> Self {
        Self::local(UnixDatagram::bind(path).expect("bind"))
    }

    fn local(socket: UnixDatagram) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
        Self::Local(socket)
    }

    fn udp(address: &str) -> (Self, u16) {
        let socket = UdpSocket::bind(address).expect("bind");
        socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let port = socket.local_addr().expect("address").port();
        (Self::Udp(socket), port)
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut datagram = vec![0; 100_000];
        let length = match self {
            Self::Local(socket) => socket.recv(&mut datagram)?,
            Self::Udp(socket) => socket.recv(&mut datagram)?,
        };
        datagram.truncate(length);
        Ok(datagram)
    }

    #[track_caller]
    fn datagram(&self) -> Vec<u8> {
        match self.receive() {
            Ok(datagram) => datagram,
            Err(error) => panic!("no log record: {error}"),
        }
    }

    #[track_caller]
    fn record(&self) -> Record {
        Record::parse(&self.datagram())
    }

    /// Receives records until one has this message, and returns the number of those before it.
    /// Earlier records may still be on their way, because a client is answered before its record is
    /// sent.
    #[track_caller]
    fn skip_to(&self, message: &str) -> usize {
        (0..).take_while(|_| self.record().message() != message).count()
    }

    fn wait_no_more(&self) {
        match self {
            Self::Local(socket) => socket.set_nonblocking(true),
            Self::Udp(socket) => socket.set_nonblocking(true),
        }
        .expect("flag");
    }

    /// Receives all records that are there, and returns their number.
    fn rest(&self) -> usize {
        self.wait_no_more();
        std::iter::from_fn(|| self.receive().ok()).inspect(|one| drop(Record::parse(one))).count()
    }

    /// Checks that no datagram is left.
    #[track_caller]
    fn assert_empty(&self) {
        self.wait_no_more();
        let more = self.receive();
        assert!(more.is_err(), "unasked: {:?}", more.map(|datagram| Record::parse(&datagram)));
    }
}

/// Returns a configuration that discards mails and logs to `server`, a Lua expression.
fn logging_to(server: &str) -> String {
    format!(
        "log_server = {server}
         settings{{workers=1}}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)"
    )
}

/// Returns a mail with the message of the vectors.
fn mail(sender: &str, recipients: &[&str]) -> Mail {
    let mut mail = Mail::new("").from(sender).to(recipients);
    mail.message = b"Subject: x\n\nhello\n".to_vec();
    mail
}

#[test]
fn datagrams_equal_those_of_the_original() {
    let site = Site::new();
    let server = LogServer::at(&site.path("log"));
    site.configure(
        "log_server = '$DIR/log'
         settings{workers=1}
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'rej@example.com' then return m:reject() end
           if m.sender == 'd@example.com' then return m:discard() end
           m.account = 'acct42'
           m:insert_header('X-A', 'b')
           return m:connect('$DIR/next')
         end)",
    );
    let _sink = Sink::answering(site.path("next"), "Kok");
    let daemon = site.start();
    let mails = [
        (mail("acc@example.com", &["r1@example.org", "r2@example.org"]), "Kok"),
        (mail("rej@example.com", &["r1@example.org"]), "Drejected"),
        (mail("d@example.com", &["r1@example.org"]), "Kdiscarded"),
    ];
    for ((mail, told), vector) in mails.iter().zip(VECTORS) {
        let before = SystemTime::now().duration_since(UNIX_EPOCH).expect("clock").as_micros();
        let started = Instant::now();
        assert_eq!(submit(daemon.path("in"), mail), *told);
        let datagram = server.datagram();
        let took = started.elapsed().as_micros();
        let after = SystemTime::now().duration_since(UNIX_EPOCH).expect("clock").as_micros();
        assert_eq!(comparable(&datagram), comparable(&unhex(vector)), "{told}");

        let record = Record::parse(&datagram);
        let stamp = u128::from(record.number(id::TIMESTAMP));
        assert!((before..=after).contains(&stamp), "{before} {stamp} {after}");
        assert!((1..=took).contains(&u128::from(record.number(id::DURATION))), "{took}");
        let next = (*told == "Kok").then(|| daemon.path("next").display().to_string());
        assert_eq!(record.text(id::FORWARDED_TO), next);
    }
    server.assert_empty();
}

#[test]
fn attributes_are_in_order() {
    let (server, port) = LogServer::udp("127.0.0.1:0");
    let address = Target::free_port();
    let next = Sink::tcp(crate::harness::sink::slowly(Duration::ZERO, "Kok"));
    let _daemon = Daemon::start(&format!(
        "log_server = '127.0.0.1:{port}'
         qmqp_listen('{address}', function(m) m.account = 'a' return m:connect('{}') end)",
        next.address()
    ));
    // Together the recipients are longer than a datagram may be.
    let recipients: Vec<_> =
        (0..1000).map(|i| format!("{}{i}@example.org", "r".repeat(50))).collect();
    let recipients: Vec<_> = recipients.iter().map(String::as_str).collect();
    assert_eq!(submit(address, &mail("s@x", &recipients)), "Kok");
    let datagram = server.datagram();
    let record = Record::parse(&datagram);
    let ids: Vec<_> = record.attributes.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [1, 2, 3, 14, 13, 9, 10, 11, 15, 20]);
    assert_eq!(record.text(id::REMOTE_HOST).as_deref(), Some("127.0.0.1"));
    assert_eq!(record.text(id::FORWARDED_TO), Some(next.address().to_string()));
    assert_eq!(record.get(id::TRUNCATED), Some(&[id::MESSAGE][..]));
    let message = record.message();
    assert!((3900..=LONGEST).contains(&datagram.len()), "{}", datagram.len());
    let listed = message.matches("<r").count();
    assert!(listed > 50, "{listed}");
    assert!(message.ends_with(&format!(",… +{} more ok", 1000 - listed)), "{message}");
}

#[test]
fn no_record_is_too_long_for_a_server() {
    let site = Site::new();
    let server = LogServer::at(&site.path("log"));
    site.configure(
        "log_server = '$DIR/log'
         qmqp_listen('$DIR/in', function(m)
           m.account = ('a'):rep(255)
           return m:connect('$DIR/next')
         end)",
    );
    let text = "t".repeat(3000);
    let _sink = Sink::answering(site.path("next"), &format!("D{text}"));
    let daemon = site.start();
    // Each byte of these local parts is escaped.
    let address = format!("\"{}\"@example.org", "\\".repeat(240));
    let escaped = format!("\"{}\"@example.org", "\\x5c".repeat(240));
    for (count, end) in [(1, String::new()), (2, String::new()), (1024, ",… +1022 more".into())] {
        let mail = mail(&address, &vec![address.as_str(); count]);
        assert_eq!(submit(daemon.path("in"), &mail).status(), 'D');
        let datagram = server.datagram();
        assert!(datagram.len() <= LONGEST, "{count} {}", datagram.len());
        let record = Record::parse(&datagram);
        let recipients = vec![format!("<{escaped}>"); count.min(2)].join(",");
        let text = &text[..255];
        let expected = format!("from=<{escaped}> to={recipients}{end} {text}");
        assert_eq!(record.message(), expected);
        assert_eq!(record.get(id::TRUNCATED), Some(&[id::MESSAGE][..]));
    }
}

#[test]
fn a_message_without_text_ends_with_the_recipients() {
    let site = Site::new();
    let server = LogServer::at(&site.path("log"));
    site.configure(
        "log_server = '$DIR/log'
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/next') end)",
    );
    let _sink = Sink::answering(site.path("next"), "K");
    let daemon = site.start();
    assert_eq!(submit(daemon.path("in"), &mail("s@x", &["r@x"])), "K");
    let record = server.record();
    assert_eq!(record.message(), "from=<s@x> to=<r@x>");
    assert_eq!(record.get(id::TRUNCATED), None);
}

#[test]
fn times_end_with_the_answer() {
    let site = Site::new();
    let server = LogServer::at(&site.path("log"));
    site.configure(&logging_to("'$DIR/log'"));
    let daemon = site.start();
    // The client sends more than its request, and doesn't close: the daemon waits for the rest.
    let surplus = [mail("s@x", &["r@x"]).request(), b"surplus".to_vec()].concat();
    let mut client = Client::connect(daemon.path("in"));
    let started = Instant::now();
    client.send(&surplus);
    assert_eq!(client.outcome(), "Kdiscarded");
    let record = server.record();
    let took = started.elapsed();
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).expect("clock");
    let waited = Duration::from_secs(1);
    let duration = Duration::from_micros(record.number(id::DURATION));
    assert!(duration + waited < took, "{duration:?} {took:?}");
    let stamp = Duration::from_micros(record.number(id::TIMESTAMP));
    assert!(stamp + waited < wall, "{stamp:?} {wall:?}");
    let line = daemon.wait_for_log("from=<s@x>");
    let ms = line.split(" ms=").nth(1).and_then(|rest| rest.split(' ').next());
    let ms = Duration::from_secs_f64(ms.expect("a time").parse::<f64>().expect("ms") / 1000.0);
    assert!(ms + waited < took, "{line}");
}

#[test]
fn every_kind_of_address() {
    in_own_network(log_to_every_kind_of_address);
}

fn log_to_every_kind_of_address() {
    let (v4, v4_port) = LogServer::udp("127.0.0.1:0");
    let (v6, v6_port) = LogServer::udp("[::1]:0");
    let name = format!("qrelay-pond-{}", std::process::id());
    let hidden = LocalAddr::from_abstract_name(&name).expect("name");
    let hidden = LogServer::local(UnixDatagram::bind_addr(&hidden).expect("bind"));
    let site = Site::new();
    let file = LogServer::at(&site.path("log"));
    let servers = [
        (&v4, format!("'127.0.0.1:{v4_port}'")),
        (&v4, format!("log_resolve('127.0.0.1:{v4_port}')")),
        (&v6, format!("'[::1]:{v6_port}'")),
        (&v6, format!("log_resolve('[::1]:{v6_port}')")),
        (&hidden, format!("'@{name}'")),
        (&hidden, format!("log_resolve('@{name}')")),
        (&file, "'$DIR/log'".into()),
        (&file, "log_resolve('$DIR/log')".into()),
    ];
    site.configure(&logging_to("nil"));
    let daemon = site.start();
    // Each address is declared by a reload, so the loop also shows that a reload changes the
    // server.
    for (server, address) in &servers {
        daemon.site().configure(&logging_to(address));
        assert!(daemon.reload(), "{address}");
        let mail = mail("s@x", &["r@x"]);
        assert_eq!(submit(daemon.path("in"), &mail), "Kdiscarded");
        assert_eq!(server.record().message(), "from=<s@x> to=<r@x> discarded", "{address}");
    }
    // A server that can't be declared leaves the old one in place; nil means no server.
    daemon.site().configure(&logging_to("42"));
    assert!(!daemon.reload());
    assert_eq!(submit(daemon.path("in"), &mail("kept@x", &["r@x"])), "Kdiscarded");
    assert_eq!(file.record().message(), "from=<kept@x> to=<r@x> discarded");
    daemon.site().configure(&logging_to("nil"));
    assert!(daemon.reload());
    assert_eq!(submit(daemon.path("in"), &mail("none@x", &["r@x"])), "Kdiscarded");
    daemon.wait_for_log("none@x");
    for (server, _) in &servers {
        server.assert_empty();
    }
}

/// Runs in a network of its own, because tests can't rely on the machine's routes for multicast.
#[test]
fn multicast() {
    in_own_network(|| {
        ip(&["route", "add", "224.0.0.0/4", "dev", "lo"]);
        let (server, _) = LogServer::udp("224.0.0.99:5479");
        let LogServer::Udp(socket) = &server else { panic!("UDP") };
        let loopback = Ipv4Addr::LOCALHOST;
        socket.join_multicast_v4(&Ipv4Addr::new(224, 0, 0, 99), &loopback).expect("joins");
        let daemon = Daemon::start(&logging_to("'224.0.0.99:5479'"));
        assert_eq!(submit(daemon.path("in"), &mail("s@x", &["r@x"])), "Kdiscarded");
        assert_eq!(server.record().message(), "from=<s@x> to=<r@x> discarded");
    });
}

/// A datagram to a group of an interface or a link needs the name of the interface, because every
/// interface has such groups.
#[test]
fn multicast_of_ipv6_has_a_scope() {
    in_own_network(|| {
        ip(&["-6", "route", "add", "multicast", "ff01::/16", "dev", "lo", "table", "local"]);
        let (server, _) = LogServer::udp("[ff01::99%1]:5479");
        let LogServer::Udp(socket) = &server else { panic!("UDP") };
        socket.join_multicast_v6(&"ff01::99".parse().expect("address"), 1).expect("joins");
        for address in ["'[ff01::99%lo]:5479'", "'ff01::99%1'", "log_resolve('ff01::99%lo')"] {
            let daemon = Daemon::start(&logging_to(address));
            assert_eq!(submit(daemon.path("in"), &mail("s@x", &["r@x"])), "Kdiscarded");
            let message = server.record().message();
            assert_eq!(message, "from=<s@x> to=<r@x> discarded", "{address}");
        }
        let daemon = Daemon::start(&logging_to("'[ff01::99]:5479'"));
        assert_eq!(submit(daemon.path("in"), &mail("s@x", &["r@x"])), "Kdiscarded");
        let line = daemon.wait_for_log("lost=1");
        assert!(line.contains("[ff01::99]:5479"), "{line}");
        server.assert_empty();
    });
}

#[test]
fn remote_hosts_are_named_and_local_clients_are_not() {
    in_own_network(name_remote_hosts);
}

fn name_remote_hosts() {
    let (server, port) = LogServer::udp("127.0.0.1:0");
    let v4 = Target::free_port();
    let daemon = Daemon::start(&format!(
        "log_server = '127.0.0.1:{port}'
         local function handler(m) return m:discard() end
         qmqp_listen('{v4}', handler)
         qmqp_listen('[::1]:{}', handler)
         qmqp_listen('$DIR/in', handler)",
        v4.port()
    ));
    let v6 = std::net::SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, v4.port()));
    for (client, host) in [
        (Target::from(v4), Some("127.0.0.1")),
        (Target::from(v6), Some("::1")),
        (Target::from(daemon.path("in")), None),
    ] {
        assert_eq!(submit(client, &mail("s@x", &["r@x"])), "Kdiscarded");
        assert_eq!(server.record().text(id::REMOTE_HOST).as_deref(), host);
    }
}

#[test]
fn refused_requests_have_no_record() {
    let site = Site::new();
    let server = LogServer::at(&site.path("log"));
    site.configure(
        "log_server, max_size = '$DIR/log', 2000
         settings{workers=1, max_hops=2}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let daemon = site.start();
    let mut looping = mail("s@x", &["r@x"]);
    looping.message.splice(0..0, b"Received: by x\n".repeat(3));
    for (request, told) in [
        (b"3:abc,".to_vec(), "Dmalformed input"),
        (b"hello".to_vec(), "Dmalformed input"),
        (mail("nobody", &["r@x"]).request(), "Dbad address"),
        (mail("s@x", &[""]).request(), "Dbad address"),
        (mail("s@x", &["r@x"; 1025]).request(), "Dtoo many recipients"),
        (Mail::of_size(3000).request(), "Dmessage too large"),
        (looping.request(), "Dtoo many hops"),
    ] {
        let mut client = Client::connect(daemon.path("in"));
        assert_eq!(client.send(&request).half_close().outcome(), told);
    }
    // One client breaks off, the other never sends anything.
    for start in [&b"100:1"[..], b""] {
        Client::connect(daemon.path("in")).send(start).half_close().outcome();
    }
    assert_eq!(submit(daemon.path("in"), &mail("good@x", &["r@x"])), "Kdiscarded");
    assert_eq!(server.record().message(), "from=<good@x> to=<r@x> discarded");
    assert!(daemon.reload(), "the reload: all earlier records have been sent");
    server.assert_empty();
}

#[test]
fn every_end_has_its_text() {
    let site = Site::new();
    let server = LogServer::at(&site.path("log"));
    site.configure(
        "log_server = '$DIR/log'
         settings{workers=1}
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'wrong@x' then error('wrong') end
           if m.sender == 'later@x' then return m:defer() end
           if m.sender == 'gone@x' then return m:exec_raw('/bin/sleep', 30) end
           return m:connect('$DIR/nowhere')
         end)",
    );
    let daemon = site.start();
    for (sender, told) in [
        ("wrong@x", "Zscript failed"),
        ("later@x", "Zdeferred"),
        ("unlucky@x", "Zconnect failed"),
        ("", "Zconnect failed"),
    ] {
        assert_eq!(submit(daemon.path("in"), &mail(sender, &["r@x"])), told);
        let record = server.record();
        assert_eq!(record.message(), format!("from=<{sender}> to=<r@x> {}", &told[1..]));
        assert_eq!(record.get(id::FORWARDED_TO), None, "nothing was forwarded");
        // A failed connect counts as an attempt, with the whole payload.
        let (received, sent) = record.traffic();
        assert_eq!(sent, if told == "Zconnect failed" { received } else { 0 }, "{told}");
    }
    let mut client = Client::connect(daemon.path("in"));
    client.send(&mail("gone@x", &["r@x"]).request());
    let worker = daemon.workers()[0];
    eventually("the program", || {
        let sleeping = crate::harness::processes::children_named(worker, "sleep");
        (!sleeping.is_empty()).then_some(())
    });
    drop(client);
    assert_eq!(server.record().message(), "from=<gone@x> to=<r@x> canceled");
}

#[test]
fn a_mail_whose_worker_was_killed_has_a_record() {
    let site = Site::new();
    let server = LogServer::at(&site.path("log"));
    site.configure(
        "log_server = '$DIR/log'
         settings{workers=1}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/next') end)",
    );
    let (sink, gate) = Sink::gated(site.path("next"));
    let daemon = site.start();
    let mut clients: Vec<_> = (0..3).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut clients {
        client.send(&mail("s@x", &["r@x"]).request());
    }
    sink.record().wait_for_count(3);
    signal(daemon.workers()[0], Signal::SIGKILL);
    for client in &mut clients {
        assert_eq!(client.outcome(), "Ztry again later");
        let message = server.record().message();
        assert!(message.ends_with(" try again later"), "{message}");
    }
    gate.open();
    assert_eq!(submit(daemon.path("in"), &mail("s@x", &["r@x"])), "Kok");
    assert_eq!(server.record().message(), "from=<s@x> to=<r@x> ok");
    server.assert_empty();
}

#[test]
fn a_request_that_never_became_complete_has_no_record() {
    let site = Site::new();
    let server = LogServer::at(&site.path("log"));
    site.configure(
        "log_server = '$DIR/log'
         settings{workers=1, client_timeout=60}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let daemon = site.start();
    let request = mail("s@x", &["r@x"]).request();
    let mut client = Client::connect(daemon.path("in"));
    client.send(&request[..request.len() - 1]);
    // The only worker takes this mail later.
    assert_eq!(submit(daemon.path("in"), &mail("first@x", &["r@x"])), "Kdiscarded");
    assert_eq!(server.record().message(), "from=<first@x> to=<r@x> discarded");
    signal(daemon.workers()[0], Signal::SIGKILL);
    assert_eq!(client.outcome(), "Ztry again later");
    assert_eq!(submit(daemon.path("in"), &mail("second@x", &["r@x"])), "Kdiscarded");
    assert_eq!(server.record().message(), "from=<second@x> to=<r@x> discarded");
    server.assert_empty();
}

#[test]
fn a_mail_of_which_nobody_knows_the_answer_is_lost() {
    let site = Site::new();
    let server = LogServer::at(&site.path("log"));
    site.configure(
        "log_server = '$DIR/log'
         settings{workers=1}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/next') end)",
    );
    let (sink, gate) = Sink::gated(site.path("next"));
    let daemon = site.start();
    let mut client = Client::connect(daemon.path("in"));
    client.send(&mail("s@x", &["r@x"]).request());
    sink.record().wait_for_count(1);
    // A connect goes on when its client leaves, and then nobody can be told anything.
    drop(client);
    signal(daemon.workers()[0], Signal::SIGKILL);
    let message = server.record().message();
    assert!(message.ends_with(" lost"), "{message}");
    gate.open();
    assert_eq!(submit(daemon.path("in"), &mail("s@x", &["r@x"])), "Kok");
    assert_eq!(server.record().message(), "from=<s@x> to=<r@x> ok");
    server.assert_empty();
}

/// Sends 50 mails, which are not delayed, and waits for the report of lost records.
#[track_caller]
fn assert_costs_records_only(daemon: &Daemon, server: &str) {
    let mut times = Vec::new();
    for _ in 0..50 {
        let started = Instant::now();
        assert_eq!(submit(daemon.path("in"), &mail("s@x", &["r@x"])), "Kdiscarded", "{server}");
        times.push(started.elapsed());
    }
    times.sort();
    assert!(times[25] < Duration::from_millis(100), "{times:?}");
    // The record of a mail is sent directly after its log line.
    eventually("all lines", || (daemon.count_log(" from=<s@x> ") == 50).then_some(()));
    let line = daemon.wait_for_log("lost=");
    assert!(line.contains(server), "{line}");
    assert_eq!(daemon.count_log("lost="), 1, "once a minute:\n{}", daemon.text());
}

/// Stops the daemon. Returns the number of records that it has reported as lost, and the number of
/// these reports.
#[track_caller]
fn reported_by_the_end(mut daemon: Daemon) -> (usize, usize) {
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0), "{}", daemon.text());
    let text = daemon.complete_text();
    let reports = text.lines().filter(|line| line.contains("log records are lost"));
    let counts: Vec<usize> = reports
        .map(|line| line.rsplit_once("lost=").expect("a count").1.parse().expect("a number"))
        .collect();
    (counts.iter().sum(), counts.len())
}

#[test]
fn a_missing_server_costs_records_only() {
    let daemon = Daemon::start(&logging_to("'$DIR/log'"));
    let path = daemon.path("log").display().to_string();
    assert_costs_records_only(&daemon, &path);
    // A server that starts later gets the records from then on, and so does the next one.
    for sender in ["first@x", "second@x"] {
        let server = LogServer::at(&daemon.path("log"));
        assert_eq!(submit(daemon.path("in"), &mail(sender, &["r@x"])), "Kdiscarded");
        server.skip_to(&format!("from=<{sender}> to=<r@x> discarded"));
        drop(server);
        std::fs::remove_file(daemon.path("log")).expect("removed");
    }
}

#[test]
fn a_dead_server_costs_records_only() {
    let (server, port) = LogServer::udp("127.0.0.1:0");
    let daemon = Daemon::start(&logging_to(&format!("'127.0.0.1:{port}'")));
    drop(server);
    assert_costs_records_only(&daemon, &format!("127.0.0.1:{port}"));
    let (server, _) = LogServer::udp(&format!("127.0.0.1:{port}"));
    assert_eq!(submit(daemon.path("in"), &mail("back@x", &["r@x"])), "Kdiscarded");
    server.skip_to("from=<back@x> to=<r@x> discarded");
}

#[test]
fn a_full_server_costs_records_only() {
    let site = Site::new();
    let server = LogServer::at(&site.path("log"));
    site.configure(&logging_to("'$DIR/log'"));
    let daemon = site.start();
    let path = daemon.path("log").display().to_string();
    assert_costs_records_only(&daemon, &path);
    // The server's buffer has the records that fitted. Once the server reads, it also receives new
    // records: the last of the 50, which may still be on its way, and one more.
    for _ in 0..2 {
        assert_eq!(server.record().message(), "from=<s@x> to=<r@x> discarded");
    }
    assert_eq!(submit(daemon.path("in"), &mail("last@x", &["r@x"])), "Kdiscarded");
    let fitted = server.skip_to("from=<last@x> to=<r@x> discarded");
    assert!((1..48).contains(&fitted), "{fitted}");
    // The first loss has been reported, and the stop reports all others. No other record is
    // missing.
    let (lost, reports) = reported_by_the_end(daemon);
    assert_eq!((2 + fitted + server.rest() + lost, reports), (50, 2));
}

#[test]
fn lost_records_of_a_replaced_server_are_reported() {
    let daemon = Daemon::start(&logging_to("'$DIR/log'"));
    let path = daemon.path("log").display().to_string();
    assert_costs_records_only(&daemon, &path);
    daemon.site().configure(&logging_to("nil"));
    assert!(daemon.reload());
    daemon.wait_for_log("lost=49");
    assert_eq!(reported_by_the_end(daemon), (50, 2));
}

#[test]
fn every_lost_record_of_a_dead_server_is_reported() {
    let (server, port) = LogServer::udp("127.0.0.1:0");
    let daemon = Daemon::start(&logging_to(&format!("'127.0.0.1:{port}'")));
    drop(server);
    assert_costs_records_only(&daemon, &format!("127.0.0.1:{port}"));
    // The kernel reports a lost datagram when the next one is sent, and the last one at the end.
    assert_eq!(reported_by_the_end(daemon), (50, 2));
}
