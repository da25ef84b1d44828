//! Tables for the pool: no processes, no sleeps.

use std::net::{IpAddr, Ipv4Addr};

use super::upkeep::ABORT_GRACE;
use super::*;

impl Pool {
    /// Panics if what is counted twice doesn't agree, or a worker of the current generation has
    /// more jobs than its credit.
    pub(in crate::workers) fn assert_consistent(&self) {
        self.fairness.assert_consistent(self.jobs.len());
        for (&id, worker) in &self.workers {
            let jobs = self.jobs.values().filter(|(_, owner)| *owner == id).count();
            assert_eq!(worker.jobs, jobs, "jobs of worker {id}");
            let group = self.groups.get(&worker.generation);
            let credit = group.filter(|_| Some(worker.generation) == self.current);
            assert!(credit.is_none_or(|group| jobs <= group.credit), "credit of worker {id}");
        }
        let known = |owner: &WorkerId| self.workers.contains_key(owner);
        assert!(self.jobs.values().all(|(_, owner)| known(owner)), "every job has a worker");
    }

    /// Returns the connections that wait for any worker.
    pub(in crate::workers) fn waiting_jobs(&self) -> impl Iterator<Item = JobId> {
        self.fairness.waiting_jobs()
    }

    /// Returns whether a worker has the job.
    pub(in crate::workers) fn is_assigned(&self, job: JobId) -> bool {
        self.jobs.contains_key(&job)
    }

    /// Counts the current generation's workers that take jobs.
    pub(in crate::workers) fn serving(&self) -> usize {
        let current = |worker: &&Worker| Some(worker.generation) == self.current;
        let ready = |worker: &&Worker| worker.state == State::Ready;
        self.workers.values().filter(current).filter(ready).count()
    }
}

const A: Client = Client::Uid(1);
const GENERATION: GenerationId = GenerationId(1);

fn settings(workers: u32, credit: u32) -> Settings {
    Settings { workers, worker_connections: credit, ..Settings::default() }
}

/// Returns a pool whose workers are ready and serve.
fn serving(settings: &Settings, now: Instant) -> (Pool, Vec<WorkerId>) {
    let mut pool = Pool::default();
    let workers =
        spawned(&pool.start(GENERATION, settings, settings.worker_connections as usize, now));
    for &worker in &workers {
        assert!(pool.ready(worker, now).is_empty());
    }
    pool.switch(GENERATION);
    (pool, workers)
}

fn spawned(commands: &[Command]) -> Vec<WorkerId> {
    commands
        .iter()
        .filter_map(|command| match command {
            Command::Spawn(_, worker) => Some(*worker),
            _ => None,
        })
        .collect()
}

fn held(held: Duration) -> Health {
    Health { held, ..Health::default() }
}

fn dispatch_all(pool: &mut Pool) -> Vec<(JobId, WorkerId)> {
    std::iter::from_fn(|| pool.next_dispatch()).collect()
}

#[test]
fn the_worker_with_the_fewest_jobs_gets_the_next() {
    let (mut pool, workers) = serving(&settings(2, 8), Instant::now());
    (1..=4).for_each(|job| pool.wait(A, JobId(job)));
    let dispatched = dispatch_all(&mut pool);
    assert_eq!(
        dispatched,
        [
            (JobId(1), workers[0]),
            (JobId(2), workers[1]),
            (JobId(3), workers[0]),
            (JobId(4), workers[1])
        ]
    );
    assert!(pool.done(JobId(3), workers[0]) && pool.done(JobId(1), workers[0]));
    pool.wait(A, JobId(5));
    assert_eq!(dispatch_all(&mut pool), [(JobId(5), workers[0])]);
}

#[test]
fn credit_and_share_are_limits() {
    let (mut pool, workers) = serving(&settings(2, 4), Instant::now());
    (1..=20).for_each(|job| pool.wait(A, JobId(job)));
    assert_eq!(dispatch_all(&mut pool).len(), 6, "three quarters of eight");
    let other = Client::Ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
    (31..=39).for_each(|job| pool.wait(other, JobId(job)));
    assert_eq!(dispatch_all(&mut pool).len(), 2, "what is left");
    assert_eq!(pool.in_flight(), 8);
    assert!(pool.done(JobId(31), workers[0]) || pool.done(JobId(31), workers[1]));
    assert_eq!(
        dispatch_all(&mut pool).first().map(|d| d.0),
        Some(JobId(33)),
        "the one with fewer jobs"
    );
}

#[test]
fn a_worker_cannot_finish_what_it_does_not_have() {
    let (mut pool, workers) = serving(&settings(2, 4), Instant::now());
    pool.wait(A, JobId(1));
    let (_, owner) = pool.next_dispatch().expect("a credit is free");
    let other = workers.iter().find(|&&worker| worker != owner).expect("two workers");
    assert!(!pool.done(JobId(1), *other) && !pool.done(JobId(99), owner));
    assert!(pool.done(JobId(1), owner) && !pool.done(JobId(1), owner));
}

#[test]
fn a_bounced_job_goes_first_again() {
    let (mut pool, _) = serving(&settings(1, 4), Instant::now());
    pool.wait(A, JobId(1));
    pool.wait(A, JobId(2));
    assert_eq!(pool.next_dispatch().map(|d| d.0), Some(JobId(1)));
    pool.bounced(JobId(1));
    assert_eq!(pool.in_flight(), 0);
    assert_eq!(dispatch_all(&mut pool).iter().map(|d| d.0.0).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn a_worker_whose_lua_is_held_gets_nothing_new() {
    let now = Instant::now();
    let (mut pool, workers) = serving(&settings(2, 8), now);
    assert_eq!(pool.pong(workers[0], held(Duration::from_millis(251)), now), None);
    (1..=3).for_each(|job| pool.wait(A, JobId(job)));
    assert!(dispatch_all(&mut pool).iter().all(|&(_, worker)| worker == workers[1]));
    pool.pong(workers[0], held(Duration::ZERO), now);
    pool.wait(A, JobId(4));
    assert_eq!(dispatch_all(&mut pool), [(JobId(4), workers[0])]);
}

#[test]
fn replaced_at_once_if_it_had_served_else_with_backoff() {
    let now = Instant::now();
    let (mut pool, workers) = serving(&settings(2, 8), now);
    pool.wait(A, JobId(1));
    let (_, served) = pool.next_dispatch().expect("a credit is free");
    let death = pool.died(served, End::Died, now).expect("known");
    assert_eq!((death.jobs.as_slice(), death.unexpected), ([JobId(1)].as_slice(), true));
    assert_eq!(spawned(&pool.tick(now).0).len(), 1);

    let idle = *workers.iter().find(|&&worker| worker != served).expect("two workers");
    pool.died(idle, End::Died, now);
    assert!(spawned(&pool.tick(now).0).is_empty());
    assert_eq!(spawned(&pool.tick(now + crate::backoff::FIRST).0).len(), 1);
}

#[test]
fn a_retired_generation_shuts_drains_and_is_killed_in_the_end() {
    let now = Instant::now();
    let (mut pool, workers) = serving(&settings(1, 8), now);
    pool.wait(A, JobId(1));
    dispatch_all(&mut pool);
    assert_eq!(pool.retire(GENERATION, now), [Command::Shut(workers[0])]);
    assert!(pool.retire(GENERATION, now).is_empty(), "once");
    pool.wait(A, JobId(2));
    assert_eq!(pool.next_dispatch(), None);
    let drain = Settings::default().drain_timeout;
    assert!(pool.tick(now + drain / 2).1.is_empty());
    let (commands, hangs) = pool.tick(now + drain);
    assert!(commands.contains(&Command::Kill(workers[0])));
    assert_eq!(hangs, [(workers[0], Hang::DrainOver)]);
    let death = pool.died(workers[0], End::Died, now).expect("known");
    assert!(!pool.is_empty(GenerationId(7)) || pool.is_empty(GENERATION));
    assert_eq!(death.jobs, [JobId(1)]);
    assert!(spawned(&pool.tick(now + drain * 2).0).is_empty(), "nobody replaces it");
}

#[test]
fn an_explicit_timeout_lengthens_the_drain() {
    let now = Instant::now();
    let (mut pool, workers) = serving(&settings(1, 8), now);
    let until = now + Duration::from_secs(600);
    pool.explicit_timeout(workers[0], until);
    pool.retire(GENERATION, now);
    assert!(!pool.tick(until - Duration::from_secs(1)).0.contains(&Command::Kill(workers[0])));
    assert!(pool.tick(until).0.contains(&Command::Kill(workers[0])));
}

#[test]
fn no_row_of_explicit_timeouts_lengthens_the_drain_for_ever() {
    let mut now = Instant::now();
    let (mut pool, workers) = serving(&settings(1, 8), now);
    pool.retire(GENERATION, now);
    let hour = Duration::from_secs(3600);
    for _ in 0..8 {
        pool.explicit_timeout(workers[0], now + hour);
        now += hour - Duration::from_secs(1);
        if pool.tick(now).0.contains(&Command::Kill(workers[0])) {
            return;
        }
    }
    panic!("an hour later by each of its jobs");
}

#[test]
fn hangs_are_counted_in_pings_and_in_held_time() {
    let mut now = Instant::now();
    let wanted = Settings { hang_timeout: Duration::from_secs(1), ..settings(1, 8) };
    let (mut pool, workers) = serving(&wanted, now);
    let mut pings = 0;
    loop {
        now += PING_INTERVAL;
        let (commands, hangs) = pool.tick(now);
        if !hangs.is_empty() {
            assert_eq!(hangs, [(workers[0], Hang::Silent(5))]);
            assert_eq!(commands, [Command::Abort(workers[0])]);
            break;
        }
        pings += 1;
        assert!(matches!(commands[..], [Command::Ping(_, _)]) && pings < 9);
    }
    assert!(pool.tick(now + ABORT_GRACE).0.contains(&Command::Kill(workers[0])));

    let (mut pool, workers) = serving(&wanted, now);
    let time = Duration::from_millis(1001);
    assert_eq!(pool.pong(workers[0], held(time), now), Some(Hang::Held(time)));

    let (mut pool, workers) = serving(&wanted, now);
    let stuck = |stuck| Health { stuck, ..Health::default() };
    let limit = Duration::from_secs(1);
    assert_eq!(pool.pong(workers[0], stuck(limit), now), None);
    assert_eq!(pool.pong(workers[0], stuck(time), now), Some(Hang::Stuck(time)));
    assert_eq!(pool.pong(workers[0], stuck(time), now), None, "it has been told once");
}

#[test]
fn a_long_sleep_of_the_machine_kills_nobody() {
    let now = Instant::now();
    let (mut pool, workers) = serving(&settings(1, 8), now);
    let (commands, hangs) = pool.tick(now + Duration::from_secs(3600));
    assert!(hangs.is_empty());
    assert_eq!(commands, [Command::Ping(workers[0], 1)]);
}

#[test]
fn a_worn_worker_is_replaced_before_it_is_retired() {
    let now = Instant::now();
    let wanted = Settings { worker_max_mails: 2, ..settings(1, 8) };
    let (mut pool, workers) = serving(&wanted, now);
    for job in 1..=2 {
        pool.wait(A, JobId(job));
        dispatch_all(&mut pool);
        pool.done(JobId(job), workers[0]);
    }
    let replacement = spawned(&pool.tick(now).0);
    assert_eq!(replacement.len(), 1);
    assert!(spawned(&pool.tick(now).0).is_empty(), "one at a time");
    assert_eq!(pool.ready(replacement[0], now), [Command::Shut(workers[0])]);
    pool.died(workers[0], End::Died, now);
    assert!(spawned(&pool.tick(now).0).is_empty());
    assert_eq!(pool.serving(), 1);
}

#[test]
fn a_worker_that_never_gets_ready_is_killed() {
    let now = Instant::now();
    let mut pool = Pool::default();
    let workers = spawned(&pool.start(GENERATION, &settings(1, 8), 8, now));
    let (commands, hangs) = pool.tick(now + START_TIMEOUT);
    assert_eq!(
        (commands, hangs),
        (vec![Command::Kill(workers[0])], vec![(workers[0], Hang::NotReady)])
    );
}

#[test]
fn a_death_before_ready_is_one_whatever_was_seen_first() {
    let now = Instant::now();
    let mut pool = Pool::default();
    let workers = spawned(&pool.start(GENERATION, &settings(2, 8), 8, now));
    pool.condemn(workers[0], now);
    assert_eq!(pool.starting(GENERATION), workers, "its zygote may be asked again");
    assert!(!pool.died(workers[0], End::Died, now).expect("known").was_ready);
    pool.ready(workers[1], now);
    pool.condemn(workers[1], now);
    assert!(pool.died(workers[1], End::Died, now).expect("known").was_ready);
}
