//! How many I/O threads a worker has: pure counting.
//!
//! Contract: as long as the limit allows, one thread waits for jobs or is about to; a thread
//! that has waited for nothing ends if another one waits. The last one to end says so.

/// The counts. Every method is one event in the life of a thread.
#[derive(Debug)]
pub struct Census {
    limit: usize,
    living: usize,
    waiting: usize,
}

impl Census {
    /// The first thread is about to start. `limit` is at least 1.
    pub fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), living: 1, waiting: 1 }
    }

    /// A waiting thread has taken a job. True: another one is to be started, and is counted
    /// as living and waiting from now on.
    pub fn took_job(&mut self) -> bool {
        self.waiting = self.waiting.saturating_sub(1);
        let start = self.waiting == 0 && self.living < self.limit;
        if start {
            self.living += 1;
            self.waiting += 1;
        }
        start
    }

    /// The thread that was to be started couldn't be.
    pub fn not_started(&mut self) {
        self.living = self.living.saturating_sub(1);
        self.waiting = self.waiting.saturating_sub(1);
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

    #[test]
    fn grows_to_the_limit() {
        let mut census = Census::new(3);
        assert!(census.took_job());
        assert!(census.took_job());
        assert!(!census.took_job());
        assert_eq!((census.living, census.waiting), (3, 0));
        census.came_back();
        assert!(!census.took_job());
    }

    #[test]
    fn starts_nobody_while_somebody_waits() {
        let mut census = Census::new(10);
        assert!(census.took_job());
        census.came_back();
        assert!(!census.took_job());
        assert_eq!((census.living, census.waiting), (2, 1));
    }

    #[test]
    fn a_thread_that_cannot_be_had_is_tried_again() {
        let mut census = Census::new(10);
        assert!(census.took_job());
        census.not_started();
        assert_eq!((census.living, census.waiting), (1, 0));
        census.came_back();
        assert!(census.took_job());
    }

    #[test]
    fn one_always_waits() {
        let mut census = Census::new(10);
        assert!(census.took_job());
        assert!(!census.may_end());
        census.came_back();
        assert!(census.may_end());
        assert!(!census.ended());
        assert!(!census.may_end());
        assert!(census.ended());
    }
}
