//! How many I/O threads a worker has: pure counting.
//!
//! Contract: one thread leads, that is, it waits for jobs; the others serve mails or wait for
//! something to do. Few threads that are busy all the time cost less than many of which one is
//! always asleep, because a thread that finds its next job in the queue needn't be woken. So
//! threads are started as jobs come only up to [`EAGER`], or twice as many if their handlers wait;
//! more are started when jobs have to wait: one by whoever takes a job that is [`STALE`], and as many as there are when no job was
//! taken for a while although some are queued ([`Census::stuck`]). The last one to end says so.

use std::time::Duration;

/// Threads beside the leader that are started without a job having had to wait.
pub const EAGER: usize = 5;

/// The same if their jobs' handlers wait, which takes a mail twice through the queue: with a
/// question to a shared dictionary per mail, twice as many threads relay a twentieth more.
const EAGER_IF_WAITING: usize = 2 * EAGER;

/// A job that has waited this long shows that there are too few threads.
pub const STALE: Duration = Duration::from_millis(20);

/// The counts. Every method is one event in the life of a thread.
#[derive(Debug)]
pub struct Census {
    limit: usize,
    living: usize,
    waiting: usize,
    serving: usize,
    taken: u64,
}

impl Census {
    /// The first thread is about to start. At most `connections` are served at a time.
    pub fn new(connections: usize) -> Self {
        // One more, to lead.
        Self { limit: connections.max(1) + 1, living: 1, waiting: 1, serving: 0, taken: 0 }
    }

    /// A thread waits for something to do.
    pub fn waits(&mut self) {
        self.waiting += 1;
    }

    /// A thread doesn't wait any more, or has just started.
    pub fn woke(&mut self) {
        self.waiting = self.waiting.saturating_sub(1);
    }

    /// Somebody waits.
    pub fn has_waiting(&self) -> bool {
        self.waiting > 0
    }

    /// A thread that neither waits nor serves may stop leading: there is another, or there can be.
    pub fn can_replace(&self) -> bool {
        self.waiting > 0 || self.living <= EAGER.min(self.limit - 1)
    }

    /// A thread has taken a job of this age, whose handler `waits` or not; `leaderless` if nobody
    /// leads. True: another one is to be started, and is counted as living and waiting from now on.
    pub fn took_job(&mut self, age: Duration, waits: bool, leaderless: bool) -> bool {
        self.taken += 1;
        self.serving += 1;
        let start = self.waiting == 0
            && self.living < self.limit
            && (age > STALE
                || leaderless && self.living <= EAGER
                || waits && self.living <= EAGER_IF_WAITING);
        if start {
            self.living += 1;
            self.waiting += 1;
        }
        start
    }

    /// A thread is through with its job.
    pub fn came_back(&mut self) {
        self.serving = self.serving.saturating_sub(1);
    }

    /// All but a leader serve mails.
    pub fn all_busy(&self) -> bool {
        self.waiting == 0 && self.serving > 0
    }

    /// Jobs taken so far.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// There are jobs, and since `taken` of them nobody has taken one. So many threads are to be
    /// started, and are counted as living and waiting from now on.
    pub fn stuck(&mut self, taken: u64) -> usize {
        if !self.all_busy() || self.taken != taken {
            return 0;
        }
        let start = self.living.min(self.limit.saturating_sub(self.living));
        self.living += start;
        self.waiting += start;
        start
    }

    /// The thread that was to be started couldn't be. True: there is none left.
    pub fn not_started(&mut self) -> bool {
        self.woke();
        self.ended()
    }

    /// A thread ends. True: it was the last.
    pub fn ended(&mut self) -> bool {
        self.living = self.living.saturating_sub(1);
        self.living == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    /// The first of at most `connections` and a leader has started and looks for a job.
    fn one(connections: usize) -> Census {
        let mut census = Census::new(connections);
        census.woke();
        census
    }

    #[test]
    fn grows_to_the_limit_and_one_leads() {
        let mut census = one(2);
        for living in 2..=3 {
            assert!(census.can_replace());
            assert!(census.took_job(NOW, false, true));
            census.woke();
            assert_eq!((census.living, census.waiting), (living, 0));
        }
        assert!(!census.can_replace());
        assert_eq!(census.stuck(2), 0);
        census.came_back();
        assert!(!census.took_job(NOW, false, false));
    }

    #[test]
    fn starts_nobody_while_somebody_waits() {
        let mut census = one(10);
        assert!(census.took_job(NOW, false, true));
        census.woke();
        census.came_back();
        census.waits();
        assert!(census.can_replace());
        assert!(!census.took_job(NOW, false, true));
        assert_eq!((census.living, census.waiting), (2, 1));
    }

    #[test]
    fn beyond_a_few_only_waiting_jobs_start_threads() {
        let mut census = one(100);
        for _ in 0..EAGER {
            assert!(census.took_job(NOW, false, true));
            census.woke();
        }
        assert_eq!(census.living, EAGER + 1);
        assert!(!census.can_replace());
        census.came_back();
        assert!(!census.took_job(STALE, false, false));
        census.came_back();
        assert!(census.took_job(STALE + Duration::from_millis(1), false, false));
    }

    #[test]
    fn handlers_that_wait_start_some_more() {
        let mut census = one(100);
        let started = (0..100)
            .filter(|_| {
                let start = census.took_job(NOW, true, true);
                census.woke();
                start
            })
            .count();
        assert_eq!(started, EAGER_IF_WAITING);
    }

    #[test]
    fn when_nobody_takes_jobs_the_number_doubles() {
        let mut census = one(EAGER * 3);
        for _ in 0..EAGER {
            census.took_job(NOW, false, true);
            census.woke();
        }
        let living = EAGER + 1;
        assert_eq!(census.stuck(census.taken() - 1), 0, "one was taken");
        assert_eq!(census.stuck(census.taken()), living);
        assert_eq!(census.stuck(census.taken()), 0, "somebody waits");
        for _ in 0..living {
            census.woke();
            census.took_job(NOW, false, false);
        }
        assert_eq!(census.stuck(census.taken()), EAGER * 3 + 1 - 2 * living);
        assert_eq!(census.living, EAGER * 3 + 1);
    }

    #[test]
    fn a_thread_that_cannot_be_had_is_tried_again() {
        let mut census = one(10);
        assert!(census.took_job(NOW, false, true));
        census.not_started();
        assert_eq!((census.living, census.waiting), (1, 0));
        census.came_back();
        assert!(census.took_job(NOW, false, true));
    }

    #[test]
    fn the_last_one_says_so() {
        let mut census = one(10);
        assert!(census.took_job(NOW, false, true));
        assert!(!census.ended());
        assert!(census.ended());
    }
}
