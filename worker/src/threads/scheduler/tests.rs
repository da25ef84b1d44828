//! One table or short story per decision.

use super::*;

const NOW: Duration = Duration::from_secs(1000);
const MOMENT: Moment = Moment { now: NOW, idle: true };
const RECENT: Place = Place { received: NOW, last: false };
const LAST: Place = Place { received: NOW, last: true };

/// A job: its number, its age, and whether its handler waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Job(u32, Duration, bool);

impl Task for Job {
    fn since(&self) -> Duration {
        NOW - self.1
    }

    fn handler_waits(&self) -> bool {
        self.2
    }

    fn is_brief(&self) -> bool {
        self.0 >= BRIEF
    }
}

/// Jobs from this number on wait for a next hop at most.
const BRIEF: u32 = 100;

fn job(number: u32) -> Job {
    Job(number, Duration::ZERO, false)
}

fn act(threads: Threads, reports: Reports, next: Next<Job>) -> Answer<Job> {
    Answer::Act(Orders { threads, reports, next })
}

/// Makes a scheduler.
type Make = fn() -> Scheduler<Job>;

const LEAD: Answer<Job> =
    Answer::Act(Orders { threads: Threads::Leave, reports: Reports::Send, next: Next::Lead });
const BUSY_LEAD: Answer<Job> = Answer::Act(Orders {
    threads: Threads::Leave,
    reports: Reports::LeaveToWatcher,
    next: Next::Lead,
});
const REPORT: Answer<Job> =
    Answer::Act(Orders { threads: Threads::Leave, reports: Reports::Leave, next: Next::Report });

impl Scheduler<Job> {
    fn tell(&mut self, event: Event) -> Answer<Job> {
        self.event(event, MOMENT)
    }

    /// Tells of events whose answers don't matter here.
    fn tell_all(&mut self, events: &[Event]) {
        for &event in events {
            self.tell(event);
        }
    }

    fn queue_all(&mut self, jobs: &[u32]) {
        for &number in jobs {
            self.queue(job(number), RECENT, NOW);
        }
    }
}

/// The first thread leads.
fn led(connections: usize) -> Scheduler<Job> {
    let mut scheduler = Scheduler::new(connections);
    assert_eq!(scheduler.tell(Event::Started), LEAD);
    scheduler
}

/// The first thread serves job 0, the second one leads.
fn busy(connections: usize) -> Scheduler<Job> {
    let mut scheduler = led(connections);
    scheduler.queue_all(&[0]);
    let serve = act(Threads::Start, Reports::Send, Next::Serve(job(0)));
    assert_eq!(scheduler.tell(Event::Received), serve);
    scheduler.tell_all(&[Event::Started]);
    assert!(scheduler.led);
    scheduler
}

/// The first thread waits, the second one leads.
fn with_one_waiting(connections: usize) -> Scheduler<Job> {
    let mut scheduler = busy(connections);
    assert_eq!(scheduler.tell(Event::Finished), REPORT);
    assert_eq!(scheduler.tell(Event::Reported), Answer::Wait);
    scheduler
}

#[test]
fn a_leader_that_takes_a_task_is_replaced() {
    let (leave, busy_reports) = (Reports::Send, Reports::LeaveToWatcher);
    // Nobody waits: another thread is started, and counts as waiting.
    let mut scheduler = led(8);
    scheduler.queue_all(&[1]);
    let start = act(Threads::Start, leave, Next::Serve(job(1)));
    assert_eq!(scheduler.tell(Event::Received), start);
    // A thread waits: it is woken.
    let mut scheduler = with_one_waiting(8);
    scheduler.queue(job(1), LAST, NOW);
    let wake = act(Threads::WakeOne, leave, Next::Serve(job(1)));
    assert_eq!(scheduler.tell(Event::Received), wake);
    // No thread waits, and none may be started: the leader goes on leading.
    let mut scheduler = busy(1);
    scheduler.queue_all(&[1]);
    let lead = act(Threads::Leave, busy_reports, Next::Lead);
    assert_eq!(scheduler.tell(Event::Received), lead);
    // The thread that comes back takes the task.
    let serve = act(Threads::Leave, busy_reports, Next::Serve(job(1)));
    assert_eq!(scheduler.tell(Event::Finished), serve);
}

#[test]
fn a_thread_that_comes_back_finds_its_place() {
    let table: [(&str, Make, Event, Answer<Job>); 7] = [
        ("a leader is there", || busy(8), Event::Finished, REPORT),
        ("it has reported", || with_one_waiting(8), Event::Reported, Answer::Wait),
        ("it was woken in vain", || with_one_waiting(8), Event::Woken, Answer::Wait),
        (
            "it waited for long beside a leader",
            || with_one_waiting(8),
            Event::Idle,
            act(Threads::Leave, Reports::Leave, Next::Retire),
        ),
        (
            "it led for long while another waits",
            || with_one_waiting(8),
            Event::Quiet,
            act(Threads::WakeOne, Reports::Leave, Next::Retire),
        ),
        ("it led for long, alone", || led(8), Event::Quiet, LEAD),
        ("it led", || with_one_waiting(8), Event::Received, LEAD),
    ];
    for (what, scheduler, event, expected) in table {
        assert_eq!(scheduler().tell(event), expected, "{what}");
    }
}

#[test]
fn a_thread_that_waited_takes_what_is_there() {
    for event in [Event::Woken, Event::Idle] {
        let mut scheduler = with_one_waiting(8);
        scheduler.queue_all(&[1, 2]);
        let serve = |number| act(Threads::Leave, Reports::LeaveToWatcher, Next::Serve(job(number)));
        assert_eq!(scheduler.tell(event), serve(1));
        assert_eq!(scheduler.tell(Event::Finished), serve(2));
    }
    // A leader that leaves wakes a thread, which leads.
    let mut scheduler = with_one_waiting(8);
    scheduler.tell_all(&[Event::Quiet]);
    assert_eq!(scheduler.tell(Event::Woken), LEAD);
}

#[test]
fn the_age_of_a_task_and_its_handler_start_threads() {
    let old = Duration::from_millis(21);
    let table = [
        (Job(1, Duration::ZERO, false), Threads::Leave),
        (Job(1, Duration::from_millis(20), false), Threads::Leave),
        (Job(1, old, false), Threads::Start),
        (Job(1, Duration::ZERO, true), Threads::Start),
    ];
    for (task, expected) in table {
        let mut scheduler = busy(8);
        scheduler.queue(task, RECENT, NOW);
        let Answer::Act(Orders { threads, next, .. }) = scheduler.tell(Event::Finished) else {
            panic!("it takes the task")
        };
        assert_eq!((threads, next), (expected, Next::Serve(task)));
    }
    // A thread waits already.
    let mut scheduler = with_one_waiting(8);
    scheduler.queue(Job(1, old, true), LAST, NOW);
    let wake = act(Threads::WakeOne, Reports::Send, Next::Serve(Job(1, old, true)));
    assert_eq!(scheduler.tell(Event::Received), wake);
}

/// The first two threads wait, the third one leads.
fn with_two_waiting(connections: usize) -> Scheduler<Job> {
    let mut scheduler = busy(connections);
    scheduler.queue_all(&[1]);
    scheduler.tell_all(&[Event::Received, Event::Started]);
    scheduler.tell_all(&[Event::Finished, Event::Reported, Event::Finished, Event::Reported]);
    scheduler
}

#[test]
fn a_queued_job_wakes_a_thread_unless_it_is_the_leaders_own() {
    let table: [(Make, &[u32], Place, Threads); 7] = [
        (|| busy(8), &[], RECENT, Threads::Leave),
        (|| busy(8), &[1], LAST, Threads::Leave),
        (|| with_one_waiting(8), &[], RECENT, Threads::WakeOne),
        (|| with_one_waiting(8), &[], LAST, Threads::Leave),
        // The thread that has been woken for the first job may find both done.
        (|| with_one_waiting(8), &[1], LAST, Threads::Leave),
        (|| with_two_waiting(8), &[1], LAST, Threads::WakeOne),
        (|| with_two_waiting(8), &[1, 2], LAST, Threads::Leave),
    ];
    for (row, (scheduler, before, place, expected)) in table.into_iter().enumerate() {
        let mut scheduler = scheduler();
        scheduler.queue_all(before);
        assert_eq!(scheduler.queue(job(2), place, NOW).threads, expected, "row {row}");
    }
}

#[test]
fn a_leader_begins_jobs_until_its_turn_is_over() {
    let table = [
        (Duration::ZERO, NextJob::Begin),
        (TURN - Duration::from_nanos(1), NextJob::Begin),
        (TURN, NextJob::PassOn),
    ];
    for (time, expected) in table {
        let next = led(8).queue(job(1), RECENT, NOW + time).next;
        assert_eq!(next, expected, "{time:?}");
    }
}

#[test]
fn after_the_end_tasks_are_served_and_all_threads_end() {
    let end = |left| act(Threads::Leave, Reports::Leave, Next::End(left));
    let mut scheduler = with_one_waiting(8);
    scheduler.queue_all(&[1, 2]);
    let serve = act(Threads::WakeAll, Reports::Send, Next::Serve(job(1)));
    assert_eq!(scheduler.tell(Event::Closed), serve);
    let serve = act(Threads::Leave, Reports::LeaveToWatcher, Next::Serve(job(2)));
    assert_eq!(scheduler.tell(Event::Woken), serve);
    // Reports are sent before a thread is counted out: the last thread ends the process.
    assert_eq!(scheduler.tell(Event::Finished), REPORT);
    assert_eq!(scheduler.tell(Event::Reported), end(Left::Others));
    assert_eq!(scheduler.tell(Event::Finished), REPORT);
    assert_eq!(scheduler.tell(Event::Reported), end(Left::Nobody));
    // A thread that waits has nothing to report.
    let mut scheduler = with_one_waiting(8);
    let all = act(Threads::WakeAll, Reports::Leave, Next::Report);
    assert_eq!(scheduler.tell(Event::Closed), all);
    assert_eq!(scheduler.tell(Event::Woken), end(Left::Others));
    assert_eq!(scheduler.tell(Event::Reported), end(Left::Nobody));
}

#[test]
fn a_thread_that_cannot_be_started_is_counted_out() {
    let mut scheduler = led(8);
    scheduler.queue_all(&[1]);
    scheduler.tell_all(&[Event::Received]);
    assert_eq!(scheduler.not_started(), (Left::Others, Threads::Leave));
    assert!(scheduler.needs_watching(false), "nobody leads");
    assert_eq!(scheduler.tell(Event::Finished), LEAD);
    // The other thread has ended meanwhile.
    let mut scheduler = led(8);
    scheduler.queue_all(&[1]);
    scheduler.tell_all(&[Event::Received, Event::Finished, Event::Closed]);
    let end = act(Threads::Leave, Reports::Leave, Next::End(Left::Others));
    assert_eq!(scheduler.tell(Event::Reported), end);
    assert_eq!(scheduler.not_started(), (Left::Nobody, Threads::Leave));
}

#[test]
fn the_watcher_acts_when_something_may_lie() {
    let nothing: Make = || busy(8);
    let task: Make = || {
        let mut scheduler = busy(8);
        scheduler.queue_all(&[1]);
        scheduler
    };
    let leaderless: Make = || {
        let mut scheduler = led(8);
        scheduler.queue_all(&[1]);
        scheduler.tell_all(&[Event::Received]);
        scheduler.not_started();
        scheduler
    };
    let task_and_a_thread: Make = || {
        let mut scheduler = with_one_waiting(8);
        scheduler.queue_all(&[1]);
        scheduler
    };
    let table = [
        ("all is well", nothing, false, false, Stuck::Start(0)),
        ("reports", nothing, true, true, Stuck::Start(0)),
        ("a task", task, false, true, Stuck::Start(2)),
        ("nobody leads", leaderless, false, true, Stuck::Ask),
        ("a thread takes the task", task_and_a_thread, false, false, Stuck::Start(0)),
    ];
    for (what, scheduler, gathered, watched, stuck) in table {
        let mut scheduler = scheduler();
        assert_eq!(scheduler.needs_watching(gathered), watched, "{what}");
        assert_eq!(scheduler.stuck(MOMENT), stuck, "{what}");
    }
    let mut scheduler = leaderless();
    assert!(scheduler.needs_watching(false));
    assert_eq!(scheduler.job_waits(MOMENT), 1);
    assert_eq!(scheduler.job_waits(MOMENT), 0, "a thread is being started");
}

#[test]
fn the_watcher_adds_no_thread_while_tasks_are_taken() {
    let mut scheduler = busy(8);
    scheduler.queue_all(&[1, 2]);
    assert!(scheduler.needs_watching(false));
    scheduler.tell_all(&[Event::Finished]);
    assert_eq!(scheduler.stuck(MOMENT), Stuck::Start(0));
    assert!(scheduler.needs_watching(false));
    assert_eq!(scheduler.stuck(MOMENT), Stuck::Start(2));
}

#[test]
fn a_leader_serves_the_only_job_itself_and_leads_on() {
    let mut scheduler = led(10);
    let alone = |number| act(Threads::Leave, Reports::Send, Next::ServeLeading(job(number)));
    for number in [BRIEF, BRIEF + 1] {
        scheduler.queue(job(number), LAST, NOW);
        assert_eq!(scheduler.tell(Event::Received), alone(number));
        assert!(scheduler.led);
        assert_eq!(scheduler.tell(Event::FinishedLeading), LEAD);
    }
    // A job comes meanwhile: a thread is started that leads.
    scheduler.queue(job(BRIEF), LAST, NOW);
    assert_eq!(scheduler.tell(Event::Received), alone(BRIEF));
    assert_eq!(scheduler.give_up(), Threads::Start);
    assert_eq!(scheduler.tell(Event::Started), BUSY_LEAD);
    // Somebody serves a job, so the next one is served by the usual way.
    scheduler.queue(job(BRIEF + 1), LAST, NOW);
    let usual = act(Threads::Start, Reports::Send, Next::Serve(job(BRIEF + 1)));
    assert_eq!(scheduler.tell(Event::Received), usual);
    assert_eq!(scheduler.tell(Event::Finished), LEAD);
}

#[test]
fn who_gives_up_the_lead_wakes_a_thread_or_calls_the_watcher() {
    let mut scheduler = with_one_waiting(10);
    scheduler.queue(job(BRIEF), LAST, NOW);
    let alone = act(Threads::Leave, Reports::Send, Next::ServeLeading(job(BRIEF)));
    assert_eq!(scheduler.tell(Event::Received), alone);
    assert_eq!(scheduler.give_up(), Threads::WakeOne);
    assert_eq!(scheduler.tell(Event::Woken), BUSY_LEAD);
    // Several jobs, or one that waits for something else, are served as usual.
    let mut scheduler = led(10);
    scheduler.queue_all(&[BRIEF, BRIEF + 1]);
    let usual = act(Threads::Start, Reports::Send, Next::Serve(job(BRIEF)));
    assert_eq!(scheduler.tell(Event::Received), usual);
    let mut scheduler = led(10);
    scheduler.queue(job(1), LAST, NOW);
    let usual = act(Threads::Start, Reports::Send, Next::Serve(job(1)));
    assert_eq!(scheduler.tell(Event::Received), usual);
    // The same while the leader begins the jobs of a datagram.
    let mut scheduler = with_one_waiting(10);
    assert_eq!(scheduler.relieve(), Threads::WakeOne);
    assert_eq!(scheduler.tell(Event::Woken), BUSY_LEAD);
    assert_eq!(scheduler.tell(Event::Finished), REPORT);
    // No further thread may be started.
    let mut scheduler = led(10);
    scheduler.counts = Counts::new(0);
    scheduler.tell(Event::Started);
    scheduler.queue(job(BRIEF), LAST, NOW);
    assert_eq!(
        scheduler.tell(Event::Received),
        Answer::Act(Orders {
            threads: Threads::Leave,
            reports: Reports::Send,
            next: Next::ServeLeading(job(BRIEF)),
        })
    );
}
