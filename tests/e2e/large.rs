//! Large mails, one after the other and several at once: every byte arrives, buffers are used for
//! several mails, and their memory is bounded and given back.

use std::path::Path;

use crate::harness::processes::{look, memory};
use crate::harness::sink::answer;
use crate::harness::{Client, Daemon, Mail, Reply, Sink, Target, eventually, submit};

/// A mebibyte.
const MIB: usize = 1 << 20;

/// The field that every mail of the tests has.
const SUBJECT: &[u8] = b"Subject: test\n";

/// Returns a mail whose message has exactly `size` bytes, and consists of this letter behind its
/// header.
fn mail_of(letter: u8, size: usize) -> Mail {
    let mut mail = Mail::new("");
    mail.message.resize(size, letter);
    mail
}

/// Returns how often a process has needed a page that it hadn't (proc_pid_stat(5), field 10).
fn minor_faults(pid: i32) -> usize {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("process is there");
    let tail = &stat[stat.rfind(')').expect("name") + 1..];
    tail.split_whitespace().nth(7).expect("field").parse().expect("a number")
}

/// Returns the memory of a worker's own: what is no part of a file.
fn own_memory(worker: i32) -> usize {
    memory(worker, "status", "RssAnon") as usize
}

#[test]
fn a_large_mail_arrives_byte_for_byte() {
    let accepting = || answer(|_| Reply::text("Kok"));
    for sink in [Sink::tcp(accepting()), Sink::start(Target::unique_abstract(), accepting())] {
        let daemon = Daemon::start(&format!(
            "settings{{workers=1}}
             qmqp_listen('$DIR/in', function(m)
               m:insert_header('X-A', 1)
               m:remove_header('Subject')
               m:insert_header('X-B', 2)
               return m:connect('{}')
             end)",
            sink.address()
        ));
        for size in [MIB, 16 * MIB, 3 * MIB + 17] {
            let mail = Mail::of_size(size);
            assert_eq!(submit(daemon.path("in"), &mail), "Kok");
            let mut expected = mail.clone();
            assert!(expected.message.starts_with(SUBJECT));
            expected.message.drain(..SUBJECT.len());
            let expected = expected.relayed_from(std::process::id(), 0, "X-B: 2\nX-A: 1\n");
            let got = sink.mails().pop().expect("a mail");
            assert!(got == expected, "{size} to {}: {got:?}", sink.address());
        }
    }
}

/// Mails of one worker, so that later ones get the buffers of earlier ones: longer and shorter
/// ones, some of whose clients leave early.
#[test]
fn nothing_of_one_mail_is_in_another() {
    let daemon = Daemon::start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
    );
    let sink = Sink::answering(daemon.path("out"), "Kok");
    let sizes = [30, 20, 25, 16, 30, 17, 22];
    for (letter, size) in (b'a'..).zip(sizes) {
        let mail = mail_of(letter, size * MIB / 10);
        let mut gone = Client::connect(daemon.path("in"));
        gone.send(&mail_of(b'!', size * MIB / 10).request()[..size * MIB / 20]);
        drop(gone);
        assert_eq!(submit(daemon.path("in"), &mail), "Kok");
        assert!(sink.mails().pop().expect("a mail") == mail.relayed(), "{size}");
    }
    assert_eq!(sink.mails().len(), sizes.len());
}

#[test]
fn a_buffer_is_used_for_several_mails_and_given_back() {
    let daemon = Daemon::start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let (mail, worker) = (mail_of(b'x', 4 * MIB), daemon.workers()[0]);
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    let (before, faults) = (own_memory(worker), minor_faults(worker));
    let request = mail.request();
    for _ in 0..20 {
        let mut client = Client::connect(daemon.path("in"));
        assert_eq!(client.send(&request).outcome(), "Kdiscarded");
    }
    let pages = 20 * mail.message.len() / 4096;
    let faults = minor_faults(worker) - faults;
    assert!(faults < pages / 2, "{faults} faults for {pages} pages");
    eventually("the memory is given back", || (own_memory(worker) < before + MIB).then_some(()));
}

/// Waves of mails of other sizes each, so that the buffers of one wave don't fit the next one, and
/// more of them than memory is there for.
#[test]
fn kept_buffers_stay_within_the_memory_for_mails() {
    const MEMORY: usize = 24 * MIB;
    let daemon = Daemon::start(&format!(
        "max_size = {}
         settings{{workers=1, mail_memory={MEMORY}, relay_timeout=60, client_share=1}}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
        3 * MIB
    ));
    let _sink = Sink::start(daemon.path("out"), answer(|_| Reply::text("Kok")));
    let (path, worker) = (daemon.path("in"), daemon.workers()[0]);
    let wave = |to: &Path, mail: &Mail| {
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..24).map(|_| scope.spawn(|| submit(to, mail))).collect();
            for client in clients {
                assert_eq!(client.join().expect("client"), "Kok");
            }
        });
    };
    // Threads and their small buffers are there afterwards.
    wave(&path, &Mail::new("x"));
    let before = memory(worker, "status", "VmRSS") as usize;
    for size in [300, 2900, 700, 1300, 2900, 300] {
        wave(&path, &mail_of(b'x', size * 1024));
    }
    let most = memory(worker, "status", "VmHWM") as usize;
    // A mail begins in a small buffer, which isn't counted.
    let small = 24 * 256 * 1024;
    assert!(most < before + MEMORY + 3 * MIB + small, "{before} bytes before, {most} at most");
    assert!(look(worker).is_some_and(|process| process.name == "qrelay-worker"));
}

/// Address space may be reserved for what a client has announced; memory is taken as bytes arrive.
#[test]
fn announced_bytes_take_no_memory() {
    let daemon = Daemon::start(
        "settings{workers=1, client_timeout=600, request_min_rate=0}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let worker = daemon.workers()[0];
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    let before = own_memory(worker);
    let begin = format!("16700000:16699000:{}", "x".repeat(600_000));
    let mut clients: Vec<_> = (0..16).map(|_| Client::connect(daemon.path("in"))).collect();
    // The kernel holds less than what each client sends, so the worker has read some of it.
    for client in &mut clients {
        client.try_send(begin.as_bytes()).expect("the worker reads");
    }
    let taken = own_memory(worker).saturating_sub(before);
    assert!(taken > 16 * 256 * 1024, "{taken} bytes: nothing has been read");
    assert!(taken < 16 * 2 * begin.len(), "{taken} bytes for 16 times {}", begin.len());
}
