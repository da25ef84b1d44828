//! How many I/O threads a worker has: pure counting.
//!
//! Contract: few threads that are busy all the time cost less than many of which one is always
//! asleep, because a thread that finds its next job in the queue needn't be woken. So threads
//! are started as jobs come only up to [`EAGER`]; more are started when jobs have to wait:
//! one by whoever takes a job that is [`STALE`], and as many as there are when no job was taken
//! for a while although some are queued ([`Census::stuck`]). A thread that has waited for
//! nothing ends if another one waits. The last one to end says so.

use std::time::Duration;

/// Threads that are started without a job having had to wait.
pub const EAGER: usize = 8;

/// A job that has waited this long shows that there are too few threads.
pub const STALE: Duration = Duration::from_millis(20);

/// The counts. Every method is one event in the life of a thread.
#[derive(Debug)]
pub struct Census {
    limit: usize,
    living: usize,
    waiting: usize,
    taken: u64,
}

impl Census {
    /// The first thread is about to start. `limit` is at least 1.
    pub fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), living: 1, waiting: 1, taken: 0 }
    }

    /// A waiting thread has taken a job of this age. True: another one is to be started, and is
    /// counted as living and waiting from now on.
    pub fn took_job(&mut self, age: Duration) -> bool {
        self.taken += 1;
        self.waiting = self.waiting.saturating_sub(1);
        let start = self.is_short() && (self.living < EAGER || age > STALE);
        if start {
            self.living += 1;
            self.waiting += 1;
        }
        start
    }

    /// Nobody waits for jobs.
    pub fn all_busy(&self) -> bool {
        self.waiting == 0
    }

    /// Nobody waits for jobs, and there could be more threads.
    pub fn is_short(&self) -> bool {
        self.all_busy() && self.living < self.limit
    }

    /// Jobs taken so far.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// There are jobs, and since `taken` of them nobody has taken one. So many threads are to be
    /// started, and are counted as living and waiting from now on.
    pub fn stuck(&mut self, taken: u64) -> usize {
        if !self.is_short() || self.taken != taken {
            return 0;
        }
        let start = self.living.min(self.limit - self.living);
        self.living += start;
        self.waiting += start;
        start
    }

    /// The thread that was to be started couldn't be. True: there is none left.
    pub fn not_started(&mut self) -> bool {
        self.waiting = self.waiting.saturating_sub(1);
        self.ended()
    }

    /// A thread is through with its job and waits again.
    pub fn came_back(&mut self) {
        self.waiting += 1;
    }

    /// A waiting thread had nothing to do for long. True: it is to end, and isn't counted as
    /// waiting any more.
    pub fn may_end(&mut self) -> bool {
        let others = self.waiting > 1;
        if others {
            self.waiting -= 1;
        }
        others
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

    #[test]
    fn grows_to_the_limit() {
        let mut census = Census::new(3);
        assert!(census.took_job(NOW));
        assert!(census.took_job(NOW));
        assert!(!census.took_job(NOW));
        assert_eq!((census.living, census.waiting), (3, 0));
        assert_eq!(census.stuck(3), 0);
        census.came_back();
        assert!(!census.took_job(NOW));
    }

    #[test]
    fn starts_nobody_while_somebody_waits() {
        let mut census = Census::new(10);
        assert!(census.took_job(NOW));
        census.came_back();
        assert!(!census.took_job(NOW));
        assert_eq!((census.living, census.waiting), (2, 1));
    }

    #[test]
    fn beyond_a_few_only_waiting_jobs_start_threads() {
        let mut census = Census::new(100);
        let started = (0..EAGER).filter(|_| census.took_job(NOW)).count();
        assert_eq!((started, census.living, census.waiting), (EAGER - 1, EAGER, 0));
        census.came_back();
        assert!(!census.took_job(STALE));
        census.came_back();
        assert!(census.took_job(STALE + Duration::from_millis(1)));
    }

    #[test]
    fn when_nobody_takes_jobs_the_number_doubles() {
        let mut census = Census::new(EAGER * 3);
        for _ in 0..EAGER {
            census.took_job(NOW);
        }
        assert_eq!(census.stuck(census.taken() - 1), 0, "one was taken");
        assert_eq!(census.stuck(census.taken()), EAGER);
        assert_eq!(census.stuck(census.taken()), 0, "somebody waits");
        for _ in 0..EAGER {
            census.took_job(NOW);
        }
        assert_eq!(census.stuck(census.taken()), EAGER);
        assert_eq!(census.living, EAGER * 3);
    }

    #[test]
    fn a_thread_that_cannot_be_had_is_tried_again() {
        let mut census = Census::new(10);
        assert!(census.took_job(NOW));
        census.not_started();
        assert_eq!((census.living, census.waiting), (1, 0));
        census.came_back();
        assert!(census.took_job(NOW));
    }

    #[test]
    fn one_always_waits() {
        let mut census = Census::new(10);
        assert!(census.took_job(NOW));
        assert!(!census.may_end());
        census.came_back();
        assert!(census.may_end());
        assert!(!census.ended());
        assert!(!census.may_end());
        assert!(census.ended());
    }
}
