//! The handling of one connection by a worker.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use qrelay_shared::deadline::Deadline;
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::ids::{JobId, ListenerId};
use qrelay_shared::ipc::channel::{RecvBuffer, RecvError};
use qrelay_shared::ipc::message::{Job, Peer, Report};
use qrelay_shared::qmqp::{Status, encode_request};
use qrelay_shared::settings::Settings;
use qrelay_shared::sys::rights::Rights;
use qrelay_worker::delivery::action::{Action, Connect};
use qrelay_worker::mail::Mail;
use qrelay_worker::session::script::{HandlerError, Handling, Script};

use crate::harness::{Finished, Harness, discard, read_reply, request};

#[test]
fn answers_and_reports() {
    let mut harness = Harness::new(discard);
    assert_eq!(harness.submit(&request()), "10:Kdiscarded,");
    let record = (Some(Status::Accepted), "discard".into(), "discarded".into(), false);
    assert_eq!(harness.finished(), Finished { job: 1, record: Some(record) });
    harness.end();
}

#[test]
fn actions_and_errors_have_their_texts() {
    let texts: [(&str, &str); 5] = [
        ("reject@x", "9:Drejected,"),
        ("defer@x", "9:Zdeferred,"),
        ("own@x", "7:Dno way,"),
        ("error@x", "14:Zscript failed,"),
        ("late@x", "13:Zrelay failed,"),
    ];
    let mut harness = Harness::new(|mail| match mail.sender() {
        b"reject@x" => Ok(Action::Reject(None)),
        b"defer@x" => Ok(Action::Defer(None)),
        b"own@x" => Ok(Action::Reject(Some("no way".into()))),
        b"late@x" => Err(HandlerError::Deadline),
        _ => Err(HandlerError::Script),
    });
    for (sender, expected) in texts {
        let request = encode_request(b"", sender.as_bytes(), ["r@x"]);
        assert_eq!(harness.submit(&request), expected);
        assert!(harness.finished().record.is_some());
    }
    harness.end();
}

#[test]
fn bad_requests() {
    let mut harness = Harness::new(discard);
    let hops = "Received: x\n".repeat(51);
    let many = vec!["r@x"; 1025];
    let table: Vec<(Vec<u8>, &str)> = vec![
        (b"EHLO x\r\n".to_vec(), "16:Dmalformed input,"),
        (b"99999999:".to_vec(), "18:Dmessage too large,"),
        (encode_request(b"", b"nobody", ["r@x"]), "12:Dbad address,"),
        (encode_request(b"", b"", &many), "20:Dtoo many recipients,"),
        (encode_request(hops.as_bytes(), b"", ["r@x"]), "14:Dtoo many hops,"),
    ];
    for (bytes, expected) in table {
        let mut client = harness.connect();
        client.write_all(&bytes).expect("write");
        client.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_reply(&mut client), expected);
        let record = harness.finished().record.expect("a record");
        assert_eq!((record.0, record.3), (Some(Status::Permanent), true), "{expected}");
    }
    harness.end();
}

#[test]
fn a_client_that_leaves_gets_nothing() {
    let mut harness = Harness::new(discard);
    let request = request();
    for length in [0, 10, request.len() - 1] {
        let mut client = harness.connect();
        client.write_all(&request[..length]).expect("write");
        client.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_reply(&mut client), "");
        // What a client has begun is logged. It was told nothing, and there is no mail.
        let record = harness.finished().record.map(|record| (record.0, record.3));
        assert_eq!(record, (length > 0).then_some((None, true)), "after {length} bytes");
    }
    // The mail of a client that leaves after its request is handled nevertheless.
    let mut client = harness.connect();
    client.write_all(&request).expect("write");
    drop(client);
    assert_eq!(harness.finished().record.expect("a record").1, "discard");
    harness.end();
}

#[test]
fn the_reply_survives_whatever_else_is_sent() {
    let mut harness = Harness::new(discard);
    let surplus = [request(), b"surplus".to_vec()].concat();
    for (first, expected) in [(surplus, "10:Kdiscarded,"), (b"x".to_vec(), "16:Dmalformed input,")]
    {
        let mut client = harness.connect();
        client.write_all(&first).expect("write");
        let mut sender = client.try_clone().expect("clone");
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for _ in 0..100 {
                    sender.write_all(&[b'x'; 10_000]).expect("write");
                }
                sender.shutdown(Shutdown::Write).expect("shutdown");
            });
            assert_eq!(read_reply(&mut client), expected);
        });
        assert!(harness.finished().record.is_some());
    }
    harness.end();
}

#[test]
fn the_reply_survives_what_is_sent_while_it_is_awaited() {
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let mut harness = Harness::new(move |_| {
        let _ = gate.recv();
        Ok(Action::Discard(None))
    });
    let mut client = harness.connect();
    client.write_all(&request()).expect("write");
    // Whether or not the handler runs already, the surplus bytes are there before the answer.
    client.write_all(b"surplus").expect("write");
    release.send(()).expect("send");
    client.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    harness.finished();
    harness.end();
}

#[test]
fn a_client_that_half_closes_gets_its_reply() {
    let mut harness = Harness::new(discard);
    let mut client = harness.connect();
    client.write_all(&request()).expect("write");
    client.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    harness.finished();
    harness.end();
}

#[test]
fn a_panic_costs_one_mail() {
    let mut harness = Harness::new(|mail| match mail.job() {
        JobId(1) => panic!("on purpose"),
        _ => Ok(Action::Discard(None)),
    });
    assert_eq!(harness.submit(&request()), "22:Zinternal server error,");
    let Finished { job, record } = harness.finished();
    let (status, action, text, refused) = record.expect("it is logged");
    assert_eq!((job, status, &*action, refused), (1, Some(Status::Temporary), "-", true));
    assert_eq!(text, "internal server error");
    assert_eq!(harness.submit(&request()), "10:Kdiscarded,");
    harness.finished();
    harness.end();
}

/// Fails while the leader begins the first mail, and discards the others.
struct PanicsAtFirst;

impl Script for PanicsAtFirst {
    fn start(self: Arc<Self>, _: usize, mail: Box<Mail>, _: Deadline) -> Handling {
        assert_ne!(mail.job(), JobId(1), "on purpose");
        Handling::Decided((mail, Ok(Action::Discard(None))))
    }

    fn held(&self) -> (Duration, JobId) {
        (Duration::ZERO, JobId::default())
    }

    fn exhausted(&self) -> bool {
        false
    }
}

#[test]
fn a_panic_of_the_leader_costs_one_mail() {
    let mut harness = Harness::with_script(Settings::default(), Arc::new(PanicsAtFirst));
    let replies: Vec<_> = harness
        .submit_at_once(2, 0)
        .iter_mut()
        .map(|client| {
            client.shutdown(Shutdown::Write).expect("shutdown");
            read_reply(client)
        })
        .collect();
    assert_eq!(replies, ["22:Zinternal server error,", "10:Kdiscarded,"]);
    let mut jobs = [harness.finished().job, harness.finished().job];
    jobs.sort_unstable();
    assert_eq!(jobs, [1, 2]);
    let mut buffer = RecvBuffer::new();
    assert!(matches!(harness.jobs.try_recv(&mut buffer), Err(RecvError::Empty)));
    harness.end();
}

#[test]
fn an_unknown_listener_costs_one_mail() {
    let mut harness = Harness::new(discard);
    let (mut client, server) = UnixStream::pair().expect("pair");
    harness.dispatch(&server, 7);
    drop(server);
    client.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(read_reply(&mut client), "22:Zinternal server error,");
    assert!(harness.finished().record.is_some());
    harness.end();
}

#[test]
fn relays_and_announces_long_timeouts() {
    let next_hop = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = next_hop.local_addr().expect("address");
    let connect = Arc::new(Connect {
        places: vec![Endpoint::Inet(address).into()],
        random: false,
        timeout: Some(Duration::from_secs(61)),
        connect_timeout: None,
    });
    let mut harness = Harness::new(move |mail| {
        mail.insert_header(b"X-A", b"b");
        Ok(Action::Connect(Arc::clone(&connect)))
    });
    let mut client = harness.connect();
    client.write_all(&request()).expect("write");
    let (mut stream, _) = next_hop.accept().expect("accept");
    let mut bytes = [0; 1000];
    let length = stream.read(&mut bytes).expect("read");
    let text = String::from_utf8_lossy(&bytes[..length]);
    assert!(
        text.contains(":X-A: b\nReceived: from PID=1 UID=2 with QMQP\nSubject: x\n\nbody\n,"),
        "{text}"
    );
    stream.write_all(b"7:Kpassed,").expect("write");
    stream.write_all(b"later bytes").expect("write");
    assert_eq!(read_reply(&mut client), "7:Kpassed,");
    let mut buffer = RecvBuffer::new();
    let announced = harness.jobs.recv(&mut buffer).expect("report");
    assert!(matches!(announced.message, Report::Timeout { job: JobId(1), milliseconds: 61_000 }));
    harness.finished();
    harness.end();
}

#[test]
fn a_lost_descriptor_is_handed_back() {
    let mut harness = Harness::new(discard);
    let job = Job {
        job: JobId(42),
        listener: 0,
        listening: ListenerId(0),
        peer: Peer::Remote([192, 0, 2, 1].into()),
        rights: Rights::Refused,
        accepted: 0,
        spoke: u64::MAX,
    };
    harness.jobs.send(&job, &[]).expect("send");
    let mut buffer = RecvBuffer::new();
    let report = harness.jobs.recv(&mut buffer).expect("report");
    assert!(matches!(report.message, Report::Lost { job: JobId(42) }));
    assert_eq!(harness.submit(&request()), "10:Kdiscarded,");
    harness.finished();
    assert!(matches!(harness.jobs.try_recv(&mut buffer), Err(RecvError::Empty)));
    harness.end();
}
