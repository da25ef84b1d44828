//! The distribution of jobs to the threads of a worker.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::JobId;
use qrelay_shared::ipc::channel::RecvBuffer;
use qrelay_shared::ipc::message::Report;
use qrelay_shared::settings::Settings;
use qrelay_worker::delivery::action::Action;
use qrelay_worker::mail::Mail;
use qrelay_worker::session::script::{Handling, Script};
use qrelay_worker::threads::pool::Pool;

use crate::harness::{Harness, discard, read_reply, request};

#[test]
fn jobs_that_come_together_are_served_side_by_side() {
    let barrier = Arc::new(Barrier::new(8));
    let all = Arc::clone(&barrier);
    let mut harness = Harness::new(move |_| {
        all.wait();
        Ok(Action::Discard(None))
    });
    // In the first round the threads have to be started; later, threads wait already.
    for _ in 0..3 {
        for mut client in harness.submit_at_once(8, 0) {
            assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
        }
    }
    let mut jobs: Vec<u64> = (0..24).map(|_| harness.finished().job).collect();
    jobs.sort_unstable();
    assert_eq!(jobs, (1..=24).collect::<Vec<_>>());
    harness.end();
}

#[test]
fn a_report_does_not_wait_for_the_next_mails() {
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let first = AtomicBool::new(true);
    let settings = Settings { worker_connections: 1, ..Settings::default() };
    let mut harness = Harness::with(settings, move |_| {
        if !first.swap(false, Ordering::Relaxed) {
            let _ = gate.recv();
        }
        Ok(Action::Discard(None))
    });
    let clients = harness.submit_at_once(3, 0);
    assert_eq!(harness.finished().job, 1, "while the only thread serves the second");
    drop(release);
    for mut client in clients {
        assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    }
    assert_eq!((harness.finished().job, harness.finished().job), (2, 3));
    harness.end();
}

#[test]
fn a_job_without_a_socket_is_handed_back_alone() {
    let mut harness = Harness::new(discard);
    let clients = harness.submit_at_once(3, 1);
    for mut client in clients.into_iter().take(2) {
        assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    }
    let (mut buffer, mut lost, mut done) = (RecvBuffer::new(), Vec::new(), Vec::new());
    while lost.len() + done.len() < 3 {
        for report in harness.jobs.recv_batch(&mut buffer).expect("reports") {
            match report.expect("a report") {
                Report::Lost { job } => lost.push(job.0),
                Report::Done { job, .. } => done.push(job.0),
                other => panic!("{other:?}"),
            }
        }
    }
    done.sort_unstable();
    assert_eq!((lost, done), (vec![3], vec![1, 2]));
    harness.end();
}

#[test]
fn threads_come_as_needed_and_go() {
    let (entered, entries) = channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let mut harness = Harness::new(move |_| {
        entered.send(()).expect("send");
        let _ = gate.recv();
        Ok(Action::Discard(None))
    });
    let clients = harness.submit_several(9);
    for _ in 0..8 {
        entries.recv_timeout(Duration::from_secs(10)).expect("eight at once");
    }
    // The limit is eight threads, so the ninth mail waits.
    let ninth = entries.recv_timeout(Duration::from_millis(50));
    assert_eq!(ninth, Err(RecvTimeoutError::Timeout));
    for _ in 0..9 {
        release.send(()).expect("send");
    }
    for mut client in clients {
        assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
        harness.finished();
    }
    let one_is_left = |pool: &Pool| format!("{pool:?}").contains("living: 1, waiting: 0");
    let start = Instant::now();
    while !one_is_left(&harness.pool) {
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", harness.pool);
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(release);
    assert_eq!(harness.submit(&request()), "10:Kdiscarded,");
    harness.finished();
    harness.end();
}

/// A script that computes for long for the first mail. For the others it decides when the gate is
/// gone.
struct SlowAtFirst(crossbeam_channel::Receiver<()>);

impl Script for SlowAtFirst {
    fn start(self: Arc<Self>, _: usize, mail: Box<Mail>, _: Deadline) -> Handling {
        match mail.job() {
            JobId(1) => std::thread::sleep(Duration::from_millis(50)),
            _ => drop(self.0.recv_timeout(Duration::from_secs(20))),
        }
        Handling::Decided((mail, Ok(Action::Discard(None))))
    }

    fn held(&self) -> (Duration, JobId) {
        (Duration::ZERO, JobId(0))
    }

    fn exhausted(&self) -> bool {
        false
    }
}

#[test]
fn a_slow_mail_is_answered_before_others_are_begun() {
    let (release, gate) = crossbeam_channel::bounded(0);
    let settings = Settings { worker_connections: 1, ..Settings::default() };
    let mut harness = Harness::with_script(settings, Arc::new(SlowAtFirst(gate)));
    let mut clients = harness.submit_at_once(3, 0);
    assert_eq!(read_reply(&mut clients[0]), "10:Kdiscarded,");
    drop(release);
    for client in &mut clients[1..] {
        assert_eq!(read_reply(client), "10:Kdiscarded,");
    }
    (0..3).for_each(|_| drop(harness.finished()));
    harness.end();
}

#[test]
fn jobs_are_received_while_all_threads_are_busy() {
    let (entered, entries) = channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let settings = Settings { worker_connections: 2, ..Settings::default() };
    let mut harness = Harness::with(settings, move |_| {
        entered.send(()).expect("send");
        let _ = gate.recv();
        Ok(Action::Discard(None))
    });
    let mut clients = harness.submit_at_once(2, 0);
    for _ in 0..2 {
        entries.recv_timeout(Duration::from_secs(10)).expect("two at once");
    }
    clients.extend(harness.submit_at_once(3, 0));
    // The new jobs wait in the worker, not in the kernel.
    let start = Instant::now();
    while !format!("{:?}", harness.pool).contains("tasks: 3") {
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", harness.pool);
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(release);
    for mut client in clients {
        assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
        harness.finished();
    }
    harness.end();
}

#[test]
fn queued_jobs_are_served_before_the_end() {
    let mut harness = Harness::new(|_| {
        std::thread::sleep(Duration::from_millis(1));
        Ok(Action::Discard(None))
    });
    let clients = harness.submit_several(100);
    harness.end();
    for mut client in clients {
        assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    }
}

#[test]
fn without_a_supervisor_mails_are_finished() {
    let (entered, entries) = channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let mut harness = Harness::new(move |_| {
        entered.send(()).expect("send");
        let _ = gate.recv();
        Ok(Action::Discard(None))
    });
    let mut client = harness.connect();
    client.write_all(&request()).expect("write");
    entries.recv_timeout(Duration::from_secs(10)).expect("handler runs");
    let Harness { jobs, ended, .. } = harness;
    drop(jobs);
    release.send(()).expect("send");
    assert_eq!(read_reply(&mut client), "10:Kdiscarded,");
    ended.recv_timeout(Duration::from_secs(10)).expect("the last thread ends");
}
