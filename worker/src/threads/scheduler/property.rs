//! Random orders of everything that can happen to a worker's threads, the same in every run.
//!
//! The threads, the watcher, the job socket and the two condition variables are a model: one step
//! of the model is what happens under one lock, or between two locks. So a step of any thread may
//! come between two steps of another one, as in a process.
//!
//! # Failure
//! A failed assertion shows the seed and the model. [`run`] with that seed alone repeats the run.

use std::collections::VecDeque;
use std::time::Duration;

use super::{
    Answer, Event, Left, Moment, Next, NextJob, Orders, Place, Reports, Scheduler, Stuck, TURN,
    Task, Threads,
};

const SEEDS: u64 = 2000;

/// Steps while jobs come.
const STEPS: usize = 600;

/// Steps after which everything must be done once no more jobs come.
const PATIENCE: usize = 200_000;

/// Marsaglia's xorshift64.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Neighbouring seeds are to have nothing in common, and 0 yields nothing but 0.
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Less than `bound`, which is not 0.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Job {
    id: usize,
    since: Duration,
    handler_waits: bool,
}

impl Task for Job {
    fn since(&self) -> Duration {
        self.since
    }

    fn handler_waits(&self) -> bool {
        self.handler_waits
    }

    fn is_brief(&self) -> bool {
        !self.handler_waits && !self.id.is_multiple_of(3)
    }
}

/// A thread, by the step that it does next.
#[derive(Debug)]
enum Thread {
    Starts,
    Asks(Event),
    Obeys(Orders<Job>),
    Serves(Job),
    /// Waits at the job socket, and for something else.
    ServesLeading(Job),
    /// Carries out what follows from giving up the lead.
    GivesUp(Threads, Job),
    /// Waits at the job socket.
    Receives,
    /// Queues the jobs of a datagram that are left.
    Queues(Datagram),
    /// Carries out what follows from a queued job.
    Helps(Threads, Datagram),
    /// Carries out what follows from giving up the lead while it begins a job.
    Relieves(Threads, Datagram),
    /// Waits for the job that it begins.
    Lingers(Datagram),
    Sends,
    /// Waits at the condition variable.
    Waits,
    Gone,
}

#[derive(Debug)]
struct Datagram {
    jobs: VecDeque<Job>,
    received: Duration,
    next: NextJob,
    /// The thread leads still.
    led: bool,
}

impl Datagram {
    /// What the thread does after a job.
    fn after_job(self) -> Thread {
        match (self.jobs.is_empty(), self.led) {
            (false, _) => Thread::Queues(self),
            (true, true) => Thread::Asks(Event::Received),
            (true, false) => Thread::Asks(Event::Finished),
        }
    }
}

/// The watcher, by the step that it does next.
#[derive(Debug, PartialEq, Eq)]
enum Watcher {
    /// Waits at its condition variable.
    Waits,
    Looks,
    Pauses,
    Polls,
    Starts(usize),
}

/// How often what happens, in percent where nothing else is said.
#[derive(Debug)]
struct Habits {
    /// Jobs that are served at the same time, at most.
    connections: usize,
    /// Jobs under way at most.
    credit: usize,
    arrival: usize,
    finish: usize,
    idle: usize,
    spurious: usize,
    start_fails: usize,
    handler_waits: usize,
    /// Jobs that the leader serves to the end while it begins them.
    own: usize,
    slow: usize,
    idle_processors: usize,
}

#[derive(Debug)]
struct World {
    seed: u64,
    habits: Habits,
    now: Duration,
    scheduler: Scheduler<Job>,
    threads: Vec<Thread>,
    watcher: Watcher,
    socket: VecDeque<VecDeque<Job>>,
    closed: bool,
    gathered: bool,
    /// For each job that came: how often it was begun, and how often served to the end.
    begun: Vec<usize>,
    served: Vec<usize>,
    /// How often a thread, or one that couldn't be started, was the last.
    last: usize,
}

impl World {
    fn new(seed: u64, random: &mut Random) -> Self {
        let habits = Habits {
            connections: [1, 2, 3, 8, 20][random.below(5)],
            credit: [2, 10, 40][random.below(3)],
            arrival: [5, 20, 60][random.below(3)],
            finish: [0, 2, 10, 50, 100][random.below(5)],
            idle: [0, 1, 10][random.below(3)],
            spurious: [0, 1][random.below(2)],
            start_fails: [0, 0, 20, 80][random.below(4)],
            handler_waits: [0, 50, 100][random.below(3)],
            own: [0, 50, 100][random.below(3)],
            slow: [0, 5, 30][random.below(3)],
            idle_processors: [0, 50, 100][random.below(3)],
        };
        Self {
            seed,
            now: Duration::from_secs(1000),
            scheduler: Scheduler::new(habits.connections),
            habits,
            threads: vec![Thread::Starts],
            watcher: Watcher::Looks,
            socket: VecDeque::new(),
            closed: false,
            gathered: false,
            begun: Vec::new(),
            served: Vec::new(),
            last: 0,
        }
    }

    /// A datagram of some jobs comes.
    fn arrive(&mut self, random: &mut Random) {
        let jobs = (0..1 + random.below(6)).map(|_| {
            self.begun.push(0);
            self.served.push(0);
            let handler_waits = random.percent(self.habits.handler_waits);
            Job { id: self.begun.len() - 1, since: self.now, handler_waits }
        });
        let jobs = jobs.collect();
        self.socket.push_back(jobs);
    }

    /// One step of somebody.
    fn step(&mut self, random: &mut Random) {
        self.now += Duration::from_micros(random.below(100) as u64);
        if random.percent(self.habits.slow) {
            self.now += Duration::from_millis(random.below(30) as u64);
        }
        match random.below(self.threads.len() + 1) {
            0 => self.step_watcher(random),
            index => self.step_thread(index - 1, random),
        }
        self.check();
    }

    fn moment(&self, random: &mut Random) -> Moment {
        Moment { now: self.now, idle: random.percent(self.habits.idle_processors) }
    }

    fn step_thread(&mut self, index: usize, random: &mut Random) {
        let moment = self.moment(random);
        let thread = std::mem::replace(&mut self.threads[index], Thread::Gone);
        let thread = match thread {
            Thread::Starts => Thread::Asks(Event::Started),
            Thread::Asks(event) => match self.scheduler.event(event, moment) {
                Answer::Wait => Thread::Waits,
                Answer::Act(orders) => Thread::Obeys(orders),
            },
            Thread::Obeys(orders) => self.obey(orders, random),
            Thread::Serves(job) if random.percent(self.habits.finish) => {
                self.served[job.id] += 1;
                self.gathered = true;
                Thread::Asks(Event::Finished)
            }
            Thread::ServesLeading(job) if !self.socket.is_empty() || self.closed => {
                Thread::GivesUp(self.scheduler.give_up(), job)
            }
            // It has to wait for something else as well.
            Thread::ServesLeading(job) if random.percent(self.habits.slow) => {
                Thread::GivesUp(self.scheduler.give_up(), job)
            }
            Thread::ServesLeading(job) if random.percent(self.habits.finish) => {
                self.served[job.id] += 1;
                self.gathered = true;
                Thread::Asks(Event::FinishedLeading)
            }
            Thread::GivesUp(threads, job) => {
                self.help(threads, random);
                Thread::Serves(job)
            }
            Thread::Receives => self.receive(random),
            Thread::Queues(datagram) => self.queue(datagram, random),
            Thread::Helps(threads, datagram) => {
                self.help(threads, random);
                datagram.after_job()
            }
            Thread::Relieves(threads, datagram) => {
                self.help(threads, random);
                Thread::Lingers(datagram)
            }
            Thread::Lingers(datagram) if random.percent(self.habits.finish) => {
                Thread::Queues(datagram)
            }
            Thread::Sends => {
                self.gathered = false;
                Thread::Asks(Event::Reported)
            }
            Thread::Waits if self.may_be_idle() && random.percent(self.habits.idle) => {
                Thread::Asks(Event::Idle)
            }
            Thread::Waits if random.percent(self.habits.spurious) => Thread::Asks(Event::Woken),
            still @ (Thread::Serves(_)
            | Thread::ServesLeading(_)
            | Thread::Lingers(_)
            | Thread::Waits
            | Thread::Gone) => still,
        };
        self.threads[index] = thread;
    }

    /// The idle time is longer than starting a thread takes.
    fn may_be_idle(&self) -> bool {
        let starts = |thread: &Thread| {
            matches!(
                thread,
                Thread::Obeys(Orders { threads: Threads::Start, .. })
                    | Thread::GivesUp(Threads::Start, _)
                    | Thread::Helps(Threads::Start, _)
                    | Thread::Relieves(Threads::Start, _)
                    | Thread::Starts
            )
        };
        !self.threads.iter().any(starts) && !matches!(self.watcher, Watcher::Starts(_))
    }

    fn obey(&mut self, orders: Orders<Job>, random: &mut Random) -> Thread {
        self.help(orders.threads, random);
        match orders.reports {
            Reports::Leave => {}
            Reports::Send => self.gathered = false,
            Reports::LeaveToWatcher => self.call_watcher(),
        }
        match orders.next {
            Next::Serve(job) => Thread::Serves(job),
            Next::ServeLeading(job) => Thread::ServesLeading(job),
            Next::Lead => Thread::Receives,
            Next::Report => Thread::Sends,
            Next::Retire => Thread::Gone,
            Next::End(left) => {
                self.end(left);
                Thread::Gone
            }
        }
    }

    fn end(&mut self, left: Left) {
        if left == Left::Nobody {
            self.last += 1;
        }
    }

    fn help(&mut self, threads: Threads, random: &mut Random) {
        let mut waiting: Vec<_> =
            self.threads.iter_mut().filter(|thread| matches!(thread, Thread::Waits)).collect();
        match threads {
            Threads::Leave => {}
            Threads::WakeOne if waiting.is_empty() => {}
            Threads::WakeOne => {
                let woken = random.below(waiting.len());
                *waiting[woken] = Thread::Asks(Event::Woken);
            }
            Threads::WakeAll => {
                waiting.into_iter().for_each(|thread| *thread = Thread::Asks(Event::Woken));
            }
            Threads::Start => self.start(random),
            Threads::CallWatcher => self.call_watcher(),
        }
    }

    fn start(&mut self, random: &mut Random) {
        if random.percent(self.habits.start_fails) {
            let (left, threads) = self.scheduler.not_started();
            self.end(left);
            self.help(threads, random);
            self.call_watcher();
        } else {
            self.threads.push(Thread::Starts);
        }
    }

    fn call_watcher(&mut self) {
        if self.watcher == Watcher::Waits {
            self.watcher = Watcher::Looks;
        }
    }

    fn receive(&mut self, random: &mut Random) -> Thread {
        match self.socket.pop_front() {
            Some(jobs) => {
                let next = NextJob::Begin;
                Thread::Queues(Datagram { jobs, received: self.now, next, led: true })
            }
            None if self.closed => Thread::Asks(Event::Closed),
            None if self.may_be_idle() && random.percent(self.habits.idle) => {
                Thread::Asks(Event::Quiet)
            }
            None => Thread::Receives,
        }
    }

    fn queue(&mut self, mut datagram: Datagram, random: &mut Random) -> Thread {
        if datagram.led && random.percent(self.habits.slow) {
            datagram.led = false;
            return Thread::Relieves(self.scheduler.relieve(), datagram);
        }
        let job = datagram.jobs.pop_front().expect("jobs are left");
        if datagram.next == NextJob::Begin && datagram.led {
            self.begun[job.id] += 1;
            if random.percent(self.habits.own) {
                self.served[job.id] += 1;
                self.gathered = true;
                return datagram.after_job();
            }
        }
        let place = Place { received: datagram.received, last: datagram.jobs.is_empty() };
        let queued = self.scheduler.queue(job, place, self.now);
        let in_turn = self.now - datagram.received < TURN;
        assert_eq!(queued.next == NextJob::Begin, in_turn, "{self:#?}");
        datagram.next = queued.next;
        Thread::Helps(queued.threads, datagram)
    }

    fn step_watcher(&mut self, random: &mut Random) {
        let moment = self.moment(random);
        self.watcher = match self.watcher {
            Watcher::Waits => Watcher::Waits,
            Watcher::Looks if self.scheduler.needs_watching(self.gathered) => Watcher::Pauses,
            Watcher::Looks => Watcher::Waits,
            Watcher::Pauses => {
                self.gathered = false;
                match self.scheduler.stuck(moment) {
                    Stuck::Start(needed) => Watcher::Starts(needed),
                    Stuck::Ask => Watcher::Polls,
                }
            }
            Watcher::Polls if self.socket.is_empty() => Watcher::Looks,
            Watcher::Polls => Watcher::Starts(self.scheduler.job_waits(moment)),
            Watcher::Starts(0) => Watcher::Looks,
            Watcher::Starts(needed) => {
                self.start(random);
                Watcher::Starts(needed - 1)
            }
        };
    }

    fn count(&self, filter: impl Fn(&Thread) -> bool) -> usize {
        self.threads.iter().filter(|thread| filter(thread)).count()
    }

    /// Somebody is going to ask the scheduler, whatever else happens or doesn't.
    fn somebody_is_awake(&self) -> bool {
        let to_receive = !self.socket.is_empty() || self.closed;
        self.count(|thread| match thread {
            Thread::Serves(_) | Thread::Lingers(_) | Thread::Waits | Thread::Gone => false,
            Thread::Receives | Thread::ServesLeading(_) => to_receive,
            _ => true,
        }) > 0
    }

    /// A thread that has been told to end does nothing else.
    fn living(&self) -> usize {
        self.count(|thread| match thread {
            Thread::Gone => false,
            Thread::Obeys(orders) => !matches!(orders.next, Next::Retire | Next::End(_)),
            _ => true,
        })
    }

    /// Checks what holds after every step.
    fn check(&self) {
        let seed = self.seed;
        let limit = self.habits.connections + 1;
        assert!(self.living() <= limit, "seed {seed}: too many threads: {self:#?}");
        let serving = self.count(|thread| {
            matches!(
                thread,
                Thread::Serves(_)
                    | Thread::ServesLeading(_)
                    | Thread::GivesUp(..)
                    | Thread::Relieves(..)
                    | Thread::Lingers(_)
            )
        });
        assert!(serving <= limit, "seed {seed}: {self:#?}");
        let leading = self.count(|thread| match thread {
            Thread::Receives | Thread::ServesLeading(_) => true,
            Thread::Queues(datagram) | Thread::Helps(_, datagram) => datagram.led,
            Thread::Obeys(orders) => matches!(orders.next, Next::Lead | Next::ServeLeading(_)),
            _ => false,
        });
        assert!(leading <= 1, "seed {seed}: two leaders: {self:#?}");
        assert!(self.begun.iter().all(|&times| times <= 1), "seed {seed}: {self:#?}");
        assert!(self.served.iter().all(|&times| times <= 1), "seed {seed}: {self:#?}");
        if self.somebody_is_awake() {
            return;
        }
        let watched = self.watcher != Watcher::Waits;
        let full = self.living() == limit;
        // Where all threads serve jobs, the first one that is free leads.
        assert!(
            leading == 1 || serving == limit || watched && !full || self.scheduler.ended,
            "seed {seed}: nobody leads or will: {self:#?}"
        );
        assert!(watched || !self.gathered, "seed {seed}: reports lie here: {self:#?}");
        if !self.scheduler.tasks.is_empty() {
            let waiting = self.count(|thread| matches!(thread, Thread::Waits));
            assert_eq!(waiting, 0, "seed {seed}: a task lies here: {self:#?}");
            assert!(full || watched, "seed {seed}: no thread is added: {self:#?}");
        }
    }

    /// Goes on until `done`.
    fn finish(&mut self, random: &mut Random, what: &str, done: impl Fn(&Self) -> bool) {
        self.habits.finish = 50;
        for _ in 0..PATIENCE {
            if done(self) {
                return;
            }
            self.step(random);
        }
        panic!("seed {}: {what}: {self:#?}", self.seed);
    }

    fn all_served(&self) -> bool {
        self.served.iter().all(|&times| times == 1)
    }
}

/// Runs one world from its start to its end. Returns how many jobs it had.
fn run(seed: u64) -> usize {
    let mut random = Random::new(seed);
    let mut world = World::new(seed, &mut random);
    for _ in 0..STEPS {
        let under_way = world.served.iter().filter(|&&times| times == 0).count();
        if under_way < world.habits.credit && random.percent(world.habits.arrival) {
            world.arrive(&mut random);
        }
        world.step(&mut random);
    }
    // Half of the worlds end while they are busy.
    if random.percent(50) {
        world.finish(&mut random, "a job isn't served", World::all_served);
    }
    world.closed = true;
    world.finish(&mut random, "a thread doesn't end", |world| {
        world.threads.iter().all(|thread| matches!(thread, Thread::Gone))
            && !matches!(world.watcher, Watcher::Starts(1..))
    });
    assert!(world.all_served(), "seed {seed}: a job is lost: {world:#?}");
    assert_eq!(world.last, 1, "seed {seed}: the last thread: {world:#?}");
    world.begun.len()
}

#[test]
fn no_job_is_lost_and_every_thread_ends() {
    let jobs: usize = (0..SEEDS).map(run).sum();
    assert!(jobs > 50_000, "only {jobs} jobs came");
}
