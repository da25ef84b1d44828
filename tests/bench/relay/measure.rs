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

use std::time::Duration;

use crate::{
    error::BenchError,
    load,
    outcome::{Answers, Outcome},
    process::{Sink, Subject, generate},
};

/// The size of a run.
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
}

/// The measurements of one slot.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// Result that the load generator reported.
    pub outcome: Outcome,
    /// CPU time of the relay, all its processes included.
    pub cpu: Duration,
    /// CPU time of the sink.
    pub sink_cpu: Duration,
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
    let warm_up = Extent { slot: extent.slot / 4, ..*extent };
    for subject in subjects {
        answers += slot(subject, sink, &warm_up)?.outcome.answers;
    }
    for round in 0..extent.rounds {
        let mut order: Vec<usize> = (0..subjects.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let slot = slot(&subjects[index], sink, extent)?;
            answers += slot.outcome.answers;
            slots[index].push(slot);
        }
    }
    Ok(Series { slots, answers })
}

fn slot(subject: &Subject, sink: &Sink, extent: &Extent) -> Result<Slot, BenchError> {
    let before = (subject.cpu(), sink.cpu());
    let outcome = generate(&load::Plan {
        socket: &subject.socket,
        clients: extent.clients,
        threads: extent.threads,
        size: extent.size,
        duration: extent.slot,
        mails: u64::MAX,
    })?;
    // A process that dies between the two readings can make the sum smaller.
    let cpu = subject.cpu().saturating_sub(before.0);
    Ok(Slot { outcome, cpu, sink_cpu: sink.cpu().saturating_sub(before.1) })
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
