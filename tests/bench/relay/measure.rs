//! The measurement: rounds of slots, one slot per relay and round.
//!
//! Contract: all relays of a comparison run all the time, but only one at a time gets load. Every
//! relay gets one slot per round. The order is reversed in every other round, so that a drift of
//! the machine favours no relay. A ratio compares two slots of one round, and the median of the
//! ratios counts. A short slot per relay warms up before the first round; only its answers are
//! used.
//!
//! # Failure
//! Answers that aren't `K` don't end the run: they are counted, and `main` reports them at the end
//! as an error.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;

use crate::{
    error::BenchError,
    load,
    outcome::{Answers, Outcome},
    process::{Sink, Subject, generate},
};

/// The size of a measurement.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Number of rounds, and so of pairs per comparison.
    pub rounds: usize,
    /// Duration of one slot.
    pub slot: Duration,
    /// Number of clients that send at the same time.
    pub clients: usize,
    /// Number of threads of the load generator, and also of the sink.
    pub threads: usize,
    /// Size of each message in bytes.
    pub size: usize,
    /// Whether mails come in an open loop.
    pub open: bool,
    /// Time between two reloads of the subject named `qrelay`; zero for none.
    pub reload: Duration,
}

/// Name of the subject that the benchmark is about.
pub const QRELAY: &str = "qrelay";

/// Clients of the warm-up of an open loop.
const WARM_UP: usize = 64;

/// The measurements of one slot.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// Result that the load generator reported.
    pub outcome: Outcome,
    /// CPU time of the relay, all its processes included.
    pub cpu: Duration,
    /// CPU time of the sink.
    pub sink_cpu: Duration,
    /// Peak of the relay's memory in KiB, beyond that before the first load.
    pub peak: u64,
}

impl Slot {
    /// Returns the number of accepted mails per second.
    pub fn rate(&self) -> f64 {
        self.outcome.rate()
    }

    /// Returns the relay's CPU time per accepted mail, in microseconds.
    pub fn cpu_per_mail(&self) -> f64 {
        self.per_mail(self.cpu)
    }

    /// Returns the time that one mail in a hundred exceeds, in milliseconds.
    pub fn p99(&self) -> f64 {
        self.outcome.p99.as_secs_f64() * 1e3
    }

    /// Returns the peak of the memory beyond that before the first load, in MiB.
    pub fn peak_mib(&self) -> f64 {
        self.peak as f64 / 1024.0
    }

    /// Returns `time` per accepted mail, in microseconds.
    pub fn per_mail(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1e6 / self.outcome.answers.accepted.max(1) as f64
    }
}

/// The slots of all relays.
pub struct Series {
    /// For each subject, in the order given, its slot of every round.
    pub slots: Vec<Vec<Slot>>,
    /// All answers, including the warm-up's.
    pub answers: Answers,
}

/// Runs the warm-up and all rounds.
pub fn run(subjects: &[Subject], sink: &Sink, extent: &Extent) -> Result<Series, BenchError> {
    let mut slots: Vec<Vec<Slot>> = subjects.iter().map(|_| Vec::new()).collect();
    let mut answers = Answers::default();
    // The rate of an open loop comes from its warm-up.
    let warm_up = if extent.open { extent.slot } else { extent.slot / 4 };
    let warm_up = Extent { slot: warm_up, ..*extent };
    let mut capacity = f64::INFINITY;
    for subject in subjects {
        let outcome = slot(subject, sink, &warm_up, 0.0)?.outcome;
        answers += outcome.answers;
        capacity = capacity.min(outcome.rate());
    }
    // All relays get the same load, so the slowest one decides.
    let rate = if extent.open { capacity / 2.0 } else { 0.0 };
    for round in 0..extent.rounds {
        let mut order: Vec<usize> = (0..subjects.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let slot = slot(&subjects[index], sink, extent, rate)?;
            answers += slot.outcome.answers;
            slots[index].push(slot);
        }
    }
    Ok(Series { slots, answers })
}

/// Measures one slot, at `rate` mails per second, or as many as possible if that is 0.
fn slot(subject: &Subject, sink: &Sink, extent: &Extent, rate: f64) -> Result<Slot, BenchError> {
    subject.reset_peak();
    let before = (subject.cpu(), sink.cpu());
    let plan = load::Plan {
        socket: &subject.socket,
        // A closed loop of as many clients as an open one needs at most would be no warm-up.
        clients: if extent.open && rate == 0.0 { WARM_UP } else { extent.clients },
        threads: extent.threads,
        size: extent.size,
        duration: extent.slot,
        mails: u64::MAX,
        rate,
    };
    let outcome = thread::scope(|scope| {
        let (stop, stopped) = mpsc::channel::<()>();
        if !extent.reload.is_zero() && subject.name == QRELAY {
            scope.spawn(move || {
                // The first reload comes early, so that slots have the same number of them. The
                // channel's end, when the load is over, ends the loop.
                let mut wait = extent.reload / 2;
                while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                    subject.signal(Signal::SIGHUP);
                    wait = extent.reload;
                }
            });
        }
        let outcome = generate(&plan, subject.is_loop());
        drop(stop);
        outcome
    })?;
    // A process that dies between the two readings can make the sum smaller.
    let cpu = match subject.is_loop() {
        true => outcome.cpu,
        false => subject.cpu().saturating_sub(before.0),
    };
    let sink_cpu = sink.cpu().saturating_sub(before.1);
    Ok(Slot { outcome, cpu, sink_cpu, peak: subject.peak() })
}

/// Returns the median of `numbers`, or 0 if there are none.
pub fn median(numbers: impl IntoIterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.into_iter().collect();
    numbers.sort_by(f64::total_cmp);
    match (numbers.len(), numbers.len() / 2) {
        (0, _) => 0.0,
        (length, half) if length % 2 == 1 => numbers[half],
        (_, half) => (numbers[half - 1] + numbers[half]) / 2.0,
    }
}
