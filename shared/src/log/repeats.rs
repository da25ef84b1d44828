//! Which errors are logged, and which are only counted, because the same error has been logged a
//! moment ago. Pure.
//!
//! Contract: an error is logged when it happens for the first time. For [`WINDOW`] after that the
//! same error is counted, and then the number is reported. The table has at most [`MOST`] errors:
//! a further one takes the place of the error that was seen longest ago, whose number is reported
//! at once.

use std::time::{Duration, Instant};

use slog::Level;

/// How long an error is counted after it was logged.
pub(super) const WINDOW: Duration = Duration::from_secs(60);

/// Most errors that are counted at a time, so that the memory is limited.
const MOST: usize = 64;

/// What makes two errors the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    /// The level of its lines.
    pub(super) level: Level,
    /// First line of the message.
    pub(super) message: String,
    /// The fields that count.
    pub(super) fields: Vec<(String, String)>,
}

/// How often an error was counted.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Repeated {
    /// The error.
    pub(super) problem: Problem,
    /// How often the error happened after it was logged.
    pub(super) count: u64,
    /// Seconds since the error was logged.
    pub(super) seconds: u64,
}

/// The errors that were logged a moment ago.
#[derive(Debug)]
pub(super) struct Repeats {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    problem: Problem,
    logged: Instant,
    seen: Instant,
    count: u64,
}

impl Entry {
    /// Ends the count; an error that didn't happen again isn't reported.
    fn end(self, now: Instant) -> Option<Repeated> {
        let Self { problem, logged, count, .. } = self;
        let passed = now.saturating_duration_since(logged);
        let seconds = (passed.as_secs_f64().round() as u64).max(1);
        (count > 0).then_some(Repeated { problem, count, seconds })
    }
}

impl Repeats {
    /// Nothing has happened.
    pub(super) const fn new() -> Self {
        Self { entries: Vec::new() }
    }

    /// Notes an error. Returns whether it is to be logged, and adds to `ended` what is to be
    /// reported before.
    pub(super) fn note(
        &mut self,
        problem: Problem,
        now: Instant,
        ended: &mut Vec<Repeated>,
    ) -> bool {
        ended.extend(self.due(now));
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.problem == problem) {
            entry.count += 1;
            entry.seen = now;
            return false;
        }
        if self.entries.len() >= MOST {
            let oldest = (0..self.entries.len()).min_by_key(|&at| self.entries[at].seen);
            ended.extend(oldest.and_then(|at| self.entries.swap_remove(at).end(now)));
        }
        self.entries.push(Entry { problem, logged: now, seen: now, count: 0 });
        true
    }

    /// Returns what is to be reported because its time is over.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Repeated> {
        let over = |entry: &mut Entry| now.saturating_duration_since(entry.logged) >= WINDOW;
        self.entries.extract_if(.., over).filter_map(|entry| entry.end(now)).collect()
    }

    /// Returns all that has not been reported, because the process ends.
    pub(super) fn rest(&mut self, now: Instant) -> Vec<Repeated> {
        self.entries.drain(..).filter_map(|entry| entry.end(now)).collect()
    }

    /// Returns when something is to be reported, if ever.
    pub(super) fn next_report(&self) -> Option<Instant> {
        self.entries.iter().filter(|entry| entry.count > 0).map(|entry| entry.logged + WINDOW).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(message: &str) -> Problem {
        Problem { level: Level::Error, message: message.into(), fields: Vec::new() }
    }

    /// Notes the error and returns whether it is logged, and what is reported: message, count,
    /// seconds.
    fn note(repeats: &mut Repeats, message: &str, now: Instant) -> (bool, Vec<(String, u64, u64)>) {
        let mut ended = Vec::new();
        let logged = repeats.note(problem(message), now, &mut ended);
        (logged, shown(ended))
    }

    fn shown(ended: Vec<Repeated>) -> Vec<(String, u64, u64)> {
        ended.into_iter().map(|r| (r.problem.message, r.count, r.seconds)).collect()
    }

    fn at(start: Instant, seconds: f64) -> Instant {
        start + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn the_same_error_is_counted_for_a_minute() {
        let (mut repeats, start) = (Repeats::new(), Instant::now());
        assert_eq!(note(&mut repeats, "a", start), (true, vec![]));
        assert_eq!(repeats.next_report(), None);
        for second in 1..60 {
            assert_eq!(note(&mut repeats, "a", at(start, f64::from(second))), (false, vec![]));
        }
        assert_eq!(note(&mut repeats, "b", at(start, 59.0)), (true, vec![]));
        assert_eq!(repeats.next_report(), Some(start + WINDOW));
        assert_eq!(shown(repeats.due(at(start, 59.9))), vec![]);
        assert_eq!(shown(repeats.due(at(start, 60.2))), [("a".to_owned(), 59, 60)]);
        assert_eq!(shown(repeats.due(at(start, 60.2))), vec![]);
        assert_eq!(note(&mut repeats, "a", at(start, 60.3)), (true, vec![]), "a new minute");
    }

    #[test]
    fn without_a_look_at_the_clock_the_next_error_ends_the_minute() {
        let (mut repeats, start) = (Repeats::new(), Instant::now());
        note(&mut repeats, "a", start);
        note(&mut repeats, "a", start);
        let ended = note(&mut repeats, "a", at(start, 75.0));
        assert_eq!(ended, (true, vec![("a".to_owned(), 1, 75)]));
    }

    #[test]
    fn errors_differ_by_level_message_and_fields() {
        let (mut repeats, start) = (Repeats::new(), Instant::now());
        let hop = |hop: &str| vec![("next_hop".to_owned(), hop.to_owned())];
        let first = Problem { fields: hop("x"), ..problem("a") };
        let others = [
            Problem { level: Level::Warning, ..first.clone() },
            Problem { fields: hop("y"), ..first.clone() },
            Problem { message: "b".into(), ..first.clone() },
        ];
        for problem in [first.clone()].into_iter().chain(others) {
            assert!(repeats.note(problem, start, &mut Vec::new()));
        }
        assert!(!repeats.note(first, start, &mut Vec::new()));
    }

    #[test]
    fn the_error_seen_longest_ago_makes_room() {
        let (mut repeats, start) = (Repeats::new(), Instant::now());
        for number in 0..MOST {
            let now = at(start, number as f64 / 100.0);
            assert!(note(&mut repeats, &number.to_string(), now).0);
        }
        let now = at(start, 2.0);
        for again in ["0", "1", "1"] {
            assert!(!note(&mut repeats, again, now).0);
        }
        // The errors 2 to 63 happened once: nothing is said about them.
        for number in MOST..2 * MOST - 2 {
            let now = at(start, 3.0 + number as f64 / 100.0);
            assert_eq!(note(&mut repeats, &number.to_string(), now), (true, vec![]));
        }
        assert_eq!(note(&mut repeats, "x", at(start, 5.0)).1.len(), 1);
        assert_eq!(note(&mut repeats, "y", at(start, 5.0)).1.len(), 1);
        assert_eq!(repeats.entries.len(), MOST);
        assert_eq!(shown(repeats.rest(at(start, 6.0))), vec![]);
    }

    #[test]
    fn the_end_reports_the_rest() {
        let (mut repeats, start) = (Repeats::new(), Instant::now());
        for message in ["a", "a", "b", "a"] {
            note(&mut repeats, message, start);
        }
        assert_eq!(shown(repeats.rest(at(start, 0.1))), [("a".to_owned(), 2, 1)]);
        assert_eq!(shown(repeats.rest(at(start, 0.1))), vec![]);
        assert!(note(&mut repeats, "a", start).0);
    }
}
