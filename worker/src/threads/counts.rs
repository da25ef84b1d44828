//! How many I/O threads a worker has: the counts, and when another thread is started.
//!
//! Contract: one thread leads, that is, it waits for jobs; the others serve jobs or wait for
//! something to do. Few threads that are busy all the time cost less than many threads of which one
//! is always asleep, because a thread that finds its next job in the queue needn't be woken. So
//! threads are started as jobs arrive only up to [`EAGER`], or twice as many if the jobs' handlers
//! wait. More threads are started when jobs have to wait: one by a thread that takes a job older
//! than [`STALE`], and as many as there are when jobs are queued and no thread has taken one for a
//! while ([`Counts::stuck`]).
//!
//! A thread more helps only if those that exist wait for somebody: for a next hop that takes its
//! time, or while a processor is idle. In a crowd of clients that keeps the processors busy every
//! job is old, and more threads would only disturb each other. No clock, no lock, no I/O.

use std::time::Duration;

/// Threads beside the leader that are started although no job has had to wait.
const EAGER: usize = 5;

/// [`EAGER`] for jobs whose handlers wait, because such a handler takes a job twice through the
/// queue: with a question to a shared dictionary per mail, twice as many threads relay 5 % more.
const EAGER_IF_WAITING: usize = 2 * EAGER;

/// A job that has waited this long shows that there are too few threads.
const STALE: Duration = Duration::from_millis(20);

/// A job that has waited this long gets another thread in any case: the processors may be busy with
/// something else.
const FORGOTTEN: Duration = Duration::from_secs(1);

/// Jobs that are served for longer than this, on average, wait for somebody most of the time.
const SLOW: Duration = Duration::from_millis(10);

/// How long jobs are counted for that average.
const SPAN: Duration = Duration::from_millis(20);

/// The threads of a worker by what they do. Every method is one event in the life of a thread.
#[derive(Debug)]
pub(crate) struct Counts {
    limit: usize,
    living: usize,
    /// Those that wait for something to do, or have been woken or started and will ask soon.
    waiting: usize,
    /// Those of them that will ask soon.
    coming: usize,
    serving: usize,
    taken: u64,
    /// When the average was taken last, and how many jobs had been taken by then.
    span: (Duration, u64),
    /// How long a job is served, on average.
    service: Duration,
}

/// A job that a thread takes, as far as the counts depend on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    /// How long the job has waited.
    pub(crate) age: Duration,
    /// The job's handler has begun and waits.
    pub(crate) handler_waits: bool,
    /// No thread leads, although jobs may come.
    pub(crate) leaderless: bool,
    /// The moment.
    pub(crate) moment: Moment,
}

/// A moment, and what the machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment {
    /// The time.
    pub(crate) now: Duration,
    /// A processor has had nothing to do lately.
    pub(crate) idle: bool,
}

impl Counts {
    /// Returns the counts before the first thread starts. At most `connections` jobs are served at
    /// a time.
    pub(crate) fn new(connections: usize) -> Self {
        // One thread more, to lead.
        Self {
            limit: connections.max(1) + 1,
            living: 1,
            waiting: 1,
            coming: 1,
            serving: 0,
            taken: 0,
            span: (Duration::ZERO, 0),
            service: Duration::ZERO,
        }
    }

    /// A thread begins to wait for something to do.
    pub(crate) fn waits(&mut self) {
        self.waiting += 1;
    }

    /// A thread has been woken, or has just started.
    pub(crate) fn woke(&mut self) {
        self.waiting = self.waiting.saturating_sub(1);
        self.coming = self.coming.saturating_sub(1);
    }

    /// There is so much to do for threads that wait. Returns whether one more is to be woken; it
    /// counts as coming from now on.
    pub(crate) fn wake(&mut self, to_do: usize) -> bool {
        let wake = self.coming < to_do.min(self.waiting);
        if wake {
            self.coming += 1;
        }
        wake
    }

    /// All threads that wait are woken.
    pub(crate) fn wake_all(&mut self) {
        self.coming = self.waiting;
    }

    /// Returns how many threads will ask soon what to do.
    pub(crate) fn coming(&self) -> usize {
        self.coming
    }

    /// A thread is being started.
    fn start(&mut self) {
        self.living += 1;
        self.waiting += 1;
        self.coming += 1;
    }

    /// Returns whether a thread waits, or is being started.
    pub(crate) fn has_waiting(&self) -> bool {
        self.waiting > 0
    }

    /// Returns whether the leader may stop leading: another thread can lead, or can be started.
    pub(crate) fn can_replace(&self) -> bool {
        self.waiting > 0 || self.living <= EAGER.min(self.limit - 1)
    }

    /// A thread has taken a job. Returns whether another thread is to be started; the new thread
    /// counts as living and waiting from now on.
    pub(crate) fn took_job(&mut self, job: Taken) -> bool {
        self.taken += 1;
        self.serving += 1;
        self.look_back(job.moment.now);
        let start = self.waiting == 0
            && self.living < self.limit
            && (job.age > STALE && self.helps(job.moment.idle)
                || job.age > FORGOTTEN
                || job.leaderless && self.living <= EAGER
                || job.handler_waits && self.living <= EAGER_IF_WAITING);
        if start {
            self.start();
        }
        start
    }

    /// A thread has taken a job, and leads on: no other thread is needed.
    pub(crate) fn took_only_job(&mut self) {
        self.taken += 1;
        self.serving += 1;
    }

    /// Returns whether a thread serves a job.
    pub(crate) fn any_serving(&self) -> bool {
        self.serving > 0
    }

    /// Returns whether a thread is to be started that leads, because no other one waits; the new
    /// thread counts as living and waiting from now on.
    pub(crate) fn start_leader(&mut self) -> bool {
        let start = self.living < self.limit && self.living <= EAGER;
        if start {
            self.start();
        }
        start
    }

    /// Averages how long jobs are served: as many as are served now, and were taken since then
    /// (Little's law).
    fn look_back(&mut self, now: Duration) {
        let (since, before) = self.span;
        let passed = now.saturating_sub(since);
        if passed >= SPAN {
            let taken = u32::try_from(self.taken - before).unwrap_or(u32::MAX).max(1);
            let serving = u32::try_from(self.serving).unwrap_or(u32::MAX);
            self.service = passed.min(FORGOTTEN).saturating_mul(serving) / taken;
            self.span = (now, self.taken);
        }
    }

    /// Returns whether one more thread helps jobs that wait.
    fn helps(&self, idle: bool) -> bool {
        idle || self.service > SLOW
    }

    /// A thread has finished its job.
    pub(crate) fn came_back(&mut self) {
        self.serving = self.serving.saturating_sub(1);
    }

    /// Returns whether all threads but a leader serve jobs.
    pub(crate) fn all_busy(&self) -> bool {
        self.waiting == 0 && self.serving > 0
    }

    /// Returns how many jobs have been taken so far.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// Jobs are queued, and no thread has taken one since `taken` were. Returns how many threads
    /// are to be started; the new threads count as living and waiting from now on.
    pub(crate) fn stuck(&mut self, taken: u64, moment: Moment) -> usize {
        if !self.all_busy() || self.taken != taken {
            return 0;
        }
        self.look_back(moment.now);
        if !self.helps(moment.idle) {
            return 0;
        }
        let start = self.living.min(self.limit.saturating_sub(self.living));
        (0..start).for_each(|_| self.start());
        start
    }

    /// A thread that was to be started couldn't be. Returns whether no thread is left.
    pub(crate) fn not_started(&mut self) -> bool {
        self.woke();
        self.ended()
    }

    /// A thread ends. Returns whether no thread is left.
    pub(crate) fn ended(&mut self) -> bool {
        self.living = self.living.saturating_sub(1);
        self.living == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    const IDLE: Moment = Moment { now: NOW, idle: true };

    fn taken(age: Duration, handler_waits: bool, leaderless: bool) -> Taken {
        Taken { age, handler_waits, leaderless, moment: IDLE }
    }

    /// The first of at most `connections` and a leader has started and looks for a job.
    fn one(connections: usize) -> Counts {
        let mut counts = Counts::new(connections);
        counts.woke();
        counts
    }

    #[test]
    fn grows_to_the_limit_and_one_leads() {
        let mut counts = one(2);
        for living in 2..=3 {
            assert!(counts.can_replace());
            assert!(counts.took_job(taken(NOW, false, true)));
            counts.woke();
            assert_eq!((counts.living, counts.waiting), (living, 0));
        }
        assert!(!counts.can_replace());
        assert_eq!(counts.stuck(2, IDLE), 0);
        counts.came_back();
        assert!(!counts.took_job(taken(NOW, false, false)));
    }

    #[test]
    fn starts_nobody_while_somebody_waits() {
        let mut counts = one(10);
        assert!(counts.took_job(taken(NOW, false, true)));
        counts.woke();
        counts.came_back();
        counts.waits();
        assert!(counts.can_replace());
        assert!(!counts.took_job(taken(NOW, false, true)));
        assert_eq!((counts.living, counts.waiting), (2, 1));
    }

    #[test]
    fn beyond_a_few_only_waiting_jobs_start_threads() {
        let mut counts = one(100);
        for _ in 0..EAGER {
            assert!(counts.took_job(taken(NOW, false, true)));
            counts.woke();
        }
        assert_eq!(counts.living, EAGER + 1);
        assert!(!counts.can_replace());
        counts.came_back();
        assert!(!counts.took_job(taken(STALE, false, false)));
        counts.came_back();
        assert!(counts.took_job(taken(STALE + Duration::from_millis(1), false, false)));
    }

    #[test]
    fn handlers_that_wait_start_some_more() {
        let mut counts = one(100);
        let started = (0..100)
            .filter(|_| {
                let start = counts.took_job(taken(NOW, true, true));
                counts.woke();
                start
            })
            .count();
        assert_eq!(started, EAGER_IF_WAITING);
    }

    #[test]
    fn when_nobody_takes_jobs_the_number_doubles() {
        let mut counts = one(EAGER * 3);
        for _ in 0..EAGER {
            counts.took_job(taken(NOW, false, true));
            counts.woke();
        }
        let living = EAGER + 1;
        assert_eq!(counts.stuck(counts.taken() - 1, IDLE), 0, "one was taken");
        assert_eq!(counts.stuck(counts.taken(), IDLE), living);
        assert_eq!(counts.stuck(counts.taken(), IDLE), 0, "somebody waits");
        for _ in 0..living {
            counts.woke();
            counts.took_job(taken(NOW, false, false));
        }
        assert_eq!(counts.stuck(counts.taken(), IDLE), EAGER * 3 + 1 - 2 * living);
        assert_eq!(counts.living, EAGER * 3 + 1);
    }

    #[test]
    fn while_the_processors_are_busy_only_slow_jobs_start_threads() {
        let old = STALE + Duration::from_millis(1);
        // A crowd: each of six threads serves a job in two milliseconds.
        let mut counts = one(100);
        for _ in 0..EAGER {
            counts.took_job(taken(NOW, false, true));
            counts.woke();
        }
        let at = |milliseconds| Duration::from_millis(milliseconds);
        let busy = |now| Moment { now, idle: false };
        for step in 0..100 {
            for _ in 0..EAGER {
                counts.came_back();
            }
            for _ in 0..EAGER {
                let moment = busy(at(2 * step));
                assert!(!counts.took_job(Taken { moment, ..taken(old, false, false) }), "{step}");
            }
        }
        // Then nothing comes back: the next hop has become slow.
        assert_eq!(counts.stuck(counts.taken(), busy(at(205))), 0, "too early to tell");
        assert_eq!(counts.stuck(counts.taken(), busy(at(230))), EAGER + 1);
        assert!(counts.helps(false));
    }

    #[test]
    fn a_forgotten_job_gets_its_thread() {
        let mut counts = one(100);
        for _ in 0..EAGER {
            counts.took_job(taken(NOW, false, true));
            counts.woke();
            counts.came_back();
        }
        let moment = Moment { now: NOW, idle: false };
        for (age, expected) in [(FORGOTTEN, false), (FORGOTTEN + Duration::from_millis(1), true)] {
            let start = counts.took_job(Taken { age, moment, ..taken(NOW, false, false) });
            assert_eq!(start, expected, "{age:?}");
            counts.came_back();
        }
    }

    #[test]
    fn a_thread_that_cannot_be_had_is_tried_again() {
        let mut counts = one(10);
        assert!(counts.took_job(taken(NOW, false, true)));
        counts.not_started();
        assert_eq!((counts.living, counts.waiting), (1, 0));
        counts.came_back();
        assert!(counts.took_job(taken(NOW, false, true)));
    }

    #[test]
    fn the_last_one_says_so() {
        let mut counts = one(10);
        assert!(counts.took_job(taken(NOW, false, true)));
        assert!(!counts.ended());
        assert!(counts.ended());
    }
}
