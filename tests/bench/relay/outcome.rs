//! The result of a run of the load generator, and its form on the line between the two processes.
//!
//! Contract: `FromStr` restores what `Display` has written.
//!
//! # Failure
//! A line that isn't an outcome is rejected as a whole.

use std::{fmt, ops::AddAssign, str::FromStr, time::Duration};

/// Number of mails by the kind of their answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// `K`.
    pub accepted: u64,
    /// `Z`.
    pub temporary: u64,
    /// `D`.
    pub permanent: u64,
    /// No complete answer, or an answer with another first byte.
    pub silent: u64,
}

impl Answers {
    /// Counts one answer by its first byte.
    pub fn count(&mut self, verdict: u8) {
        match verdict {
            b'K' => self.accepted += 1,
            b'Z' => self.temporary += 1,
            b'D' => self.permanent += 1,
            _ => self.silent += 1,
        }
    }

    /// Returns the number of mails that were not accepted.
    pub fn failed(&self) -> u64 {
        self.temporary + self.permanent + self.silent
    }
}

impl AddAssign for Answers {
    fn add_assign(&mut self, other: Self) {
        self.accepted += other.accepted;
        self.temporary += other.temporary;
        self.permanent += other.permanent;
        self.silent += other.silent;
    }
}

impl fmt::Display for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { accepted, temporary, permanent, silent } = self;
        write!(f, "{accepted} K, {temporary} Z, {permanent} D, {silent} silent")
    }
}

/// The result of one slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// How the mails were answered.
    pub answers: Answers,
    /// Time from the first connect to the last answer, in whole microseconds.
    pub elapsed: Duration,
    /// Median time from connect to answer, in whole microseconds.
    pub p50: Duration,
    /// Time from connect to answer that one mail in a hundred exceeds, in whole microseconds.
    pub p99: Duration,
    /// User and system time of the load generator, in whole microseconds.
    pub cpu: Duration,
}

impl Outcome {
    /// Sums up a slot, and sorts `latencies` on the way.
    pub fn new(
        answers: Answers,
        elapsed: Duration,
        latencies: &mut [Duration],
        cpu: Duration,
    ) -> Self {
        latencies.sort_unstable();
        let quantile = |percent: usize| {
            latencies.get(latencies.len() * percent / 100).copied().unwrap_or_default()
        };
        Self { answers, elapsed, p50: quantile(50), p99: quantile(99), cpu }
    }

    /// Returns the number of accepted mails per second.
    pub fn rate(&self) -> f64 {
        self.answers.accepted as f64 / self.elapsed.as_secs_f64()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Answers { accepted, temporary, permanent, silent } = self.answers;
        write!(f, "{accepted} {temporary} {permanent} {silent}")?;
        [self.elapsed, self.p50, self.p99, self.cpu]
            .iter()
            .try_for_each(|time| write!(f, " {}", time.as_micros()))
    }
}

impl FromStr for Outcome {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let numbers: Option<Vec<u64>> = line.split(' ').map(|word| word.parse().ok()).collect();
        let Some([accepted, temporary, permanent, silent, elapsed, p50, p99, cpu]) =
            numbers.as_deref()
        else {
            return Err(line.to_owned());
        };
        Ok(Self {
            answers: Answers {
                accepted: *accepted,
                temporary: *temporary,
                permanent: *permanent,
                silent: *silent,
            },
            elapsed: Duration::from_micros(*elapsed),
            p50: Duration::from_micros(*p50),
            p99: Duration::from_micros(*p99),
            cpu: Duration::from_micros(*cpu),
        })
    }
}
