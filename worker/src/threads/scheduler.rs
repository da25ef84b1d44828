//! Decides what each of a worker's threads does next.
//!
//! Contract: threads tell a [`Scheduler`] what has happened, and carry out the [`Orders`] that come
//! back. The scheduler holds the queue of tasks and knows no clock, no lock and no I/O: the caller
//! passes the time in and holds a lock meanwhile.
//!
//! One thread at a time, the leader, waits at the job socket. The leader takes the jobs of a
//! datagram as far as they go without waiting, which is to the end for mails that are handed to
//! nobody, and queues the others. A thread that takes a task wakes or starts another thread if
//! there is more to do, another task or leading, than threads are on their way. A thread that has
//! finished a task takes the next one from the queue, so that under load no thread is woken.
//!
//! A leader that has received one job, while no thread serves another one, serves it and leads on:
//! it waits for the next hop and for jobs at the same time, and wakes another thread only when a
//! job comes ([`Scheduler::give_up`]).
//!
//! Otherwise a leader takes a task only if another thread can lead. A client's socket on its way
//! from process to process makes every close of a local socket on this machine start the kernel's
//! search for sockets that no process can receive any more (Linux 6.18, net/unix/garbage.c), and
//! the search costs more than waking a thread. So datagrams mustn't lie in the job socket.
//!
//! While all threads are busy, their reports may wait for each other; the watcher, a thread of its
//! own, sends them soon after ([`Reports::LeaveToWatcher`]) and adds threads if tasks are stuck.
//!
//! # Failure
//! A thread that can't be started is counted out. The next event tries again.

#[cfg(test)]
mod property;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use crate::threads::counts::{Counts, Moment, Taken};

/// How long the leader begins the jobs of one datagram itself. After a handler has run for longer,
/// the leader queues the other jobs as they are, and other threads do meanwhile what doesn't need
/// Lua.
const TURN: Duration = Duration::from_millis(10);

/// After a leader has had to give up, so many jobs are served in the usual way: there is more to do
/// than one thread can, and every attempt costs a system call and a wake-up that come too late.
const CROWDED: u64 = 64;

/// A job on its way through the threads.
pub(crate) trait Task {
    /// Returns when the job began to wait, on the clock whose time the scheduler is given.
    fn since(&self) -> Duration;

    /// Returns whether the job's handler has begun and waits.
    fn handler_waits(&self) -> bool;

    /// Returns whether serving the job waits for a next hop at most.
    fn is_brief(&self) -> bool;
}

/// Something has happened to a thread, which asks what to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The thread has started.
    Started,
    /// The thread has served its task to the end, and doesn't lead, or leads no more.
    Finished,
    /// The thread has served its task to the end, and leads still.
    FinishedLeading,
    /// The thread has sent the reports.
    Reported,
    /// The thread was woken while it waited.
    Woken,
    /// The thread has waited for the whole idle time.
    Idle,
    /// As leader, the thread has served or queued the jobs of a datagram, or is to try again.
    Received,
    /// As leader, the thread has received nothing for the whole idle time.
    Quiet,
    /// As leader, the thread has seen the end of the job socket: no further jobs will come.
    Closed,
}

/// The answer to an [`Event`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer<T> {
    /// The thread is to wait, without letting any other event in between, until it is woken or
    /// idle.
    Wait,
    /// The thread is to carry out these orders.
    Act(Orders<T>),
}

/// Orders for a thread, to be carried out one after the other.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Orders<T> {
    /// For other threads.
    pub(crate) threads: Threads,
    /// For reports that have gathered.
    pub(crate) reports: Reports,
    /// For the thread itself.
    pub(crate) next: Next<T>,
}

/// Orders about other threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// Nothing.
    Leave,
    /// Wake one thread that waits, if there is one.
    WakeOne,
    /// Wake all threads that wait.
    WakeAll,
    /// Start a thread, which is counted already.
    Start,
    /// Call the watcher, because all threads are busy.
    CallWatcher,
}

/// Orders about reports that have gathered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reports {
    /// Nothing: another order says when to send them.
    Leave,
    /// Send them.
    Send,
    /// Call the watcher, which sends them a little later, together with others.
    LeaveToWatcher,
}

/// The next step of a thread.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next<T> {
    /// Serve this task to its end, then [`Event::Finished`].
    Serve(T),
    /// Serve this task to its end, then [`Event::FinishedLeading`], and lead meanwhile. Before a
    /// wait in which a job may come unnoticed, and when a job has come, [`Scheduler::give_up`];
    /// then [`Event::Finished`].
    ServeLeading(T),
    /// Receive a datagram, and begin its jobs or [`Scheduler::queue`] them; then
    /// [`Event::Received`], [`Event::Quiet`] or [`Event::Closed`]. Before a wait in between
    /// [`Scheduler::relieve`].
    Lead,
    /// Send the reports, then [`Event::Reported`].
    Report,
    /// End, and do nothing else. The thread isn't counted any more.
    Retire,
    /// End, because no further jobs will come.
    End(Left),
}

/// The rest of the threads when a thread has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// There are other threads.
    Others,
    /// There is no other thread: the process is to end.
    Nobody,
}

impl Left {
    fn nobody(nobody: bool) -> Self {
        if nobody { Self::Nobody } else { Self::Others }
    }
}

/// Where a job stands in its datagram.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// When the datagram was received.
    pub(crate) received: Duration,
    /// The job is the last one of the datagram.
    pub(crate) last: bool,
}

/// Orders for the leader after it has queued a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Queued {
    /// For other threads.
    pub(crate) threads: Threads,
    /// For the next job of the datagram.
    pub(crate) next: NextJob,
}

/// How the leader queues the next job of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NextJob {
    /// Begun.
    Begin,
    /// Untouched.
    PassOn,
}

impl NextJob {
    /// Returns what is to be done so long after the datagram was received.
    pub(crate) fn after(turn: Duration) -> Self {
        if turn < TURN { Self::Begin } else { Self::PassOn }
    }
}

/// Orders for the watcher after its pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stuck {
    /// Start this many threads, which are counted already.
    Start(usize),
    /// Look at the job socket, because no thread leads. If a job waits there,
    /// [`Scheduler::job_waits`] says how many threads to start.
    Ask,
}

/// The tasks that no thread has taken yet, and what the threads do.
pub(crate) struct Scheduler<T> {
    counts: Counts,
    tasks: VecDeque<T>,
    /// A thread leads.
    led: bool,
    /// No further jobs will come.
    ended: bool,
    /// How many tasks had been taken when the watcher began its pause.
    watched: u64,
    /// How many tasks have to be taken before a leader serves one itself.
    crowded: u64,
}

impl<T> fmt::Debug for Scheduler<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduler")
            .field("counts", &self.counts)
            .field("tasks", &self.tasks.len())
            .finish_non_exhaustive()
    }
}

impl<T: Task> Scheduler<T> {
    /// Returns an empty queue. The first thread is counted, and about to start. At most
    /// `connections` tasks are served at a time.
    pub(crate) fn new(connections: usize) -> Self {
        let counts = Counts::new(connections);
        Self { counts, tasks: VecDeque::new(), led: false, ended: false, watched: 0, crowded: 0 }
    }

    /// Decides what a thread does next.
    pub(crate) fn event(&mut self, event: Event, moment: Moment) -> Answer<T> {
        match event {
            Event::Started | Event::Woken | Event::Idle => self.counts.woke(),
            Event::Finished => self.counts.came_back(),
            Event::FinishedLeading => {
                self.counts.came_back();
                self.led = false;
            }
            Event::Reported => {}
            Event::Received | Event::Quiet => self.led = false,
            Event::Closed => (self.led, self.ended) = (false, true),
        }
        if self.may_serve()
            && let Some(task) = self.tasks.pop_front()
        {
            return Answer::Act(self.serve(task, event, moment));
        }
        if self.leaderless() {
            return Answer::Act(self.lead(event));
        }
        match event {
            // A thread sends the reports that have gathered before it waits.
            Event::Started
            | Event::Finished
            | Event::FinishedLeading
            | Event::Received
            | Event::Quiet => report(Threads::Leave),
            Event::Closed => report(self.wake_all()),
            Event::Reported | Event::Woken | Event::Idle if self.ended => {
                Answer::Act(alone(Next::End(Left::nobody(self.counts.ended()))))
            }
            Event::Reported | Event::Woken => {
                self.counts.waits();
                Answer::Wait
            }
            Event::Idle => {
                self.counts.ended();
                Answer::Act(alone(Next::Retire))
            }
        }
    }

    /// Returns whether no thread leads, although jobs may come.
    fn leaderless(&self) -> bool {
        !self.led && !self.ended
    }

    /// Returns whether a thread that asks may take a task: another thread leads or can lead, or
    /// leading isn't needed any more.
    fn may_serve(&self) -> bool {
        !self.leaderless() || self.counts.can_replace()
    }

    fn serve(&mut self, task: T, event: Event, moment: Moment) -> Orders<T> {
        if event == Event::Received && self.tasks.is_empty() && task.is_brief() && self.is_alone() {
            return self.serve_leading(task);
        }
        let leaderless = self.leaderless();
        let start = self.counts.took_job(Taken {
            age: moment.now.saturating_sub(task.since()),
            handler_waits: task.handler_waits(),
            leaderless,
            moment,
        });
        let threads = if start {
            Threads::Start
        } else if event == Event::Closed {
            self.wake_all()
        } else {
            self.wake()
        };
        Orders { threads, reports: self.reports(), next: Next::Serve(task) }
    }

    /// Returns whether no thread serves a job, and none has had to give up lately.
    fn is_alone(&self) -> bool {
        !self.counts.any_serving() && self.counts.taken() >= self.crowded
    }

    /// While nothing else is there to do, waking another thread would take longer than the task.
    fn serve_leading(&mut self, task: T) -> Orders<T> {
        self.led = true;
        self.counts.took_only_job();
        Orders { threads: Threads::Leave, reports: Reports::Send, next: Next::ServeLeading(task) }
    }

    /// As leader that serves a task: another thread has to lead from now on. If none can, the
    /// watcher is to be called.
    pub(crate) fn give_up(&mut self) -> Threads {
        self.crowded = self.counts.taken() + CROWDED;
        self.led = false;
        match self.wake() {
            Threads::Leave if self.counts.coming() > 0 => Threads::Leave,
            Threads::Leave if self.counts.start_leader() => Threads::Start,
            Threads::Leave => Threads::CallWatcher,
            wake => wake,
        }
    }

    /// As leader that begins the jobs of a datagram: as [`Self::give_up`], because one of the jobs
    /// has to be waited for. When all are begun or queued, [`Event::Finished`].
    pub(crate) fn relieve(&mut self) -> Threads {
        self.counts.took_only_job();
        self.give_up()
    }

    /// Has one more thread come, if too few come for what is there to do.
    fn wake(&mut self) -> Threads {
        let to_do = self.tasks.len() + usize::from(self.leaderless());
        if self.counts.wake(to_do) { Threads::WakeOne } else { Threads::Leave }
    }

    fn wake_all(&mut self) -> Threads {
        self.counts.wake_all();
        Threads::WakeAll
    }

    fn lead(&mut self, event: Event) -> Orders<T> {
        if event == Event::Quiet && self.counts.has_waiting() {
            // The other thread leads.
            self.counts.ended();
            return Orders { threads: self.wake(), ..alone(Next::Retire) };
        }
        self.led = true;
        Orders { threads: Threads::Leave, reports: self.reports(), next: Next::Lead }
    }

    fn reports(&self) -> Reports {
        if self.counts.all_busy() { Reports::LeaveToWatcher } else { Reports::Send }
    }

    /// As leader: a job has come as far as it goes without waiting, or is untouched.
    pub(crate) fn queue(&mut self, task: T, place: Place, now: Duration) -> Queued {
        self.tasks.push_back(task);
        // One task is for the leader itself, if another thread can lead.
        let own = place.last && self.tasks.len() == 1;
        let turn = now.saturating_sub(place.received);
        Queued {
            threads: if own { Threads::Leave } else { self.wake() },
            next: NextJob::after(turn),
        }
    }

    /// The thread that was to be started couldn't be. The watcher is to be called, and perhaps a
    /// thread that waits.
    pub(crate) fn not_started(&mut self) -> (Left, Threads) {
        let left = Left::nobody(self.counts.not_started());
        (left, self.wake())
    }

    /// The watcher looks around, where `gathered` says whether reports wait to be sent. Returns
    /// whether the watcher is to act after a pause ([`Self::stuck`]): otherwise something might
    /// wait for longer than it should. Reports count even if a thread waits: the thread may have
    /// sent the reports just before others were left to the watcher.
    pub(crate) fn needs_watching(&mut self, gathered: bool) -> bool {
        self.watched = self.counts.taken();
        let stuck = self.leaderless() || !self.tasks.is_empty();
        gathered || stuck && self.counts.all_busy()
    }

    /// The watcher has paused, and sent the reports.
    pub(crate) fn stuck(&mut self, moment: Moment) -> Stuck {
        if !self.tasks.is_empty() {
            Stuck::Start(self.counts.stuck(self.watched, moment))
        } else if self.leaderless() {
            Stuck::Ask
        } else {
            Stuck::Start(0)
        }
    }

    /// The watcher has found that a job waits in the job socket. Returns how many threads are to
    /// be started, which are counted already.
    pub(crate) fn job_waits(&mut self, moment: Moment) -> usize {
        let more = self.leaderless() || !self.tasks.is_empty();
        if more { self.counts.stuck(self.watched, moment) } else { 0 }
    }
}

/// Orders that concern nobody else.
fn alone<T>(next: Next<T>) -> Orders<T> {
    Orders { threads: Threads::Leave, reports: Reports::Leave, next }
}

fn report<T>(threads: Threads) -> Answer<T> {
    Answer::Act(Orders { threads, ..alone(Next::Report) })
}
