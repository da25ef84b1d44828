//! Whether the leader, the thread that receives and begins jobs, makes progress.
//!
//! The leader notes each step with one store. The control thread looks at the note whenever the
//! supervisor asks, and adds up for how long the note has been the same. While the leader waits for
//! Lua, nothing counts: who holds Lua for too long is found by other means, and a wait behind many
//! short calls is no fault.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest time between two looks that counts: a machine that was suspended, or a process that was
/// stopped, is no leader without progress.
const LONGEST: Duration = Duration::from_millis(500);

/// What the leader does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// No thread leads.
    None = 0,
    /// The leader waits for jobs.
    Receives = 1,
    /// The leader begins a job.
    Begins = 2,
    /// The leader waits for Lua, or runs it.
    InLua = 3,
}

/// The leader's note: a number that is new with each step, and the [`Step`] in its lowest two bits.
#[derive(Debug, Default)]
pub(crate) struct Progress(AtomicU64);

impl Progress {
    /// Notes the leader's next step. There is one leader at a time.
    pub(crate) fn note(&self, step: Step) {
        let number = (self.0.load(Ordering::Relaxed) >> 2).wrapping_add(1);
        self.0.store(number << 2 | step as u64, Ordering::Relaxed);
    }

    /// Returns the present note.
    pub(crate) fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the control thread remembers of its last look. Pure.
#[derive(Debug)]
pub(crate) struct Observer {
    note: u64,
    counted: bool,
    at: Instant,
    stuck: Duration,
}

impl Observer {
    /// Returns an observer that has seen no leader.
    pub(crate) fn new(now: Instant) -> Self {
        Self { note: 0, counted: false, at: now, stuck: Duration::ZERO }
    }

    /// Returns for how long the leader has made no progress with a job. `has_job` says whether a
    /// job waits to be received.
    pub(crate) fn look(
        &mut self,
        note: u64,
        has_job: impl FnOnce() -> bool,
        now: Instant,
    ) -> Duration {
        let counts = match note & 3 {
            step if step == Step::Begins as u64 => true,
            step if step == Step::Receives as u64 => has_job(),
            _ => false,
        };
        let passed = now.saturating_duration_since(self.at).min(LONGEST);
        let same = counts && self.counted && note == self.note;
        self.stuck = if same { self.stuck + passed } else { Duration::ZERO };
        (self.note, self.counted, self.at) = (note, counts, now);
        self.stuck
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_leader_in_one_step_is_stuck() {
        let quarter = Duration::from_millis(250);
        // Per look: the steps before it, whether a job waits, and the time that counts, in quarters
        // of a second.
        let table: [(&[Step], bool, u32); 14] = [
            (&[], true, 0),
            (&[Step::Receives], false, 0),
            (&[], false, 0),
            (&[], true, 0),
            (&[], true, 1),
            (&[], true, 2),
            (&[Step::Begins, Step::Receives], true, 0),
            (&[Step::Begins], false, 0),
            (&[], false, 1),
            (&[Step::InLua], true, 0),
            (&[], true, 0),
            (&[Step::Begins], true, 0),
            (&[Step::None], true, 0),
            (&[], true, 0),
        ];
        let progress = Progress::default();
        let mut now = Instant::now();
        let mut observer = Observer::new(now);
        for (number, (steps, has_job, stuck)) in table.into_iter().enumerate() {
            steps.iter().for_each(|step| progress.note(*step));
            now += quarter;
            let seen = observer.look(progress.read(), || has_job, now);
            assert_eq!(seen, quarter * stuck, "look {number}");
        }
    }

    #[test]
    fn a_pause_of_the_whole_process_hardly_counts() {
        let progress = Progress::default();
        progress.note(Step::Begins);
        let now = Instant::now();
        let mut observer = Observer::new(now);
        observer.look(progress.read(), || false, now);
        let later = now + Duration::from_secs(3600);
        assert_eq!(observer.look(progress.read(), || false, later), LONGEST);
    }
}
