//! What the page's charts show of the last minutes.
//!
//! Pure. Contract: a point each second, and none older than [`KEPT`] points, so the memory is
//! bounded. A browser that loads the page gets all points.

use std::collections::VecDeque;

use qrelay_shared::admin::Status;
use serde::Serialize;

/// Number of points, one each second: 15 minutes.
pub const KEPT: usize = 900;

/// What is kept of a status.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// When the daemon was asked, in seconds since the epoch.
    now: f64,
    /// What the daemon said; `None` if it could not be asked.
    #[serde(flatten)]
    said: Option<Said>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Said {
    /// When the daemon started.
    started: f64,
    /// Answers `K`, `Z`, `D` and none since the daemon's start.
    accepted: u64,
    temporary: u64,
    permanent: u64,
    unanswered: u64,
    /// Mails that workers have.
    in_flight: u64,
    /// Connections that have begun to speak, and that no worker has.
    waiting: u64,
    /// Times of the last minute's mails in seconds.
    p50: Option<f64>,
    p99: Option<f64>,
}

impl Point {
    /// Returns the point for what the daemon said at `now`.
    pub fn new(now: f64, status: Option<&Status>) -> Self {
        let said = status.map(|status| Said {
            started: status.started,
            accepted: status.answers.accepted,
            temporary: status.answers.temporary,
            permanent: status.answers.permanent,
            unanswered: status.answers.unanswered,
            in_flight: status.in_flight,
            waiting: status.waiting,
            p50: status.times.all.p50,
            p99: status.times.all.p99,
        });
        Self { now: status.map_or(now, |status| status.now), said }
    }
}

/// The latest points, oldest first.
#[derive(Debug, Default)]
pub struct History(VecDeque<Point>);

impl History {
    /// Adds a point, and forgets the oldest one if there are too many.
    pub fn add(&mut self, point: Point) {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(point);
    }

    /// Returns all points as a JSON array.
    pub fn json(&self) -> String {
        serde_json::to_string(&self.0).unwrap_or_else(|_| "[]".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_points_are_forgotten() {
        let mut history = History::default();
        for second in 0..2 * KEPT {
            history.add(Point::new(second as f64, None));
        }
        assert_eq!(history.0.len(), KEPT);
        assert_eq!(history.0.front().map(|point| point.now), Some(KEPT as f64));
        assert!(history.json().starts_with(r#"[{"now":900.0},{"now":901.0},"#));
    }
}
