//! What the pool does as time passes: missing workers are tried again, worn ones replaced, silent
//! and late ones ended. Pure.
//!
//! A worker is asked by a ping how long its Lua has been held. What counts as silence is the number
//! of unanswered pings, not time, so that a machine that was suspended kills nobody.

use std::time::{Duration, Instant};

use crate::ids::WorkerId;
use crate::workers::pool::{Command, Hang, Health, Pool, State};

/// Time between two pings of a worker (docs/architecture.md, "Too long").
pub(super) const PING_INTERVAL: Duration = Duration::from_millis(250);
/// From SIGABRT to SIGKILL, time for a core dump.
pub(super) const ABORT_GRACE: Duration = Duration::from_secs(2);

impl Pool {
    /// Notes a worker's answer to a ping; returns why the worker must be ended, if so.
    pub(in crate::workers) fn pong(
        &mut self,
        worker: WorkerId,
        Health { held, stuck, exhausted }: Health,
        now: Instant,
    ) -> Option<Hang> {
        let entry = self.workers.get_mut(&worker)?;
        entry.unanswered = 0;
        entry.held = held;
        entry.exhausted |= exhausted;
        let limit = self.groups.get(&entry.generation)?.hang_timeout;
        let hang = match (held > limit, stuck > limit) {
            (true, _) => Hang::Held(held),
            (false, true) => Hang::Stuck(stuck),
            (false, false) => return None,
        };
        if matches!(entry.state, State::Dying { .. }) {
            return None;
        }
        entry.state = State::Dying { kill_at: now + ABORT_GRACE };
        Some(hang)
    }

    /// Does what is due: respawns, pings, replacements, time limits. Returns what is to be done,
    /// and which workers hang.
    pub(in crate::workers) fn tick(
        &mut self,
        now: Instant,
    ) -> (Vec<Command>, Vec<(WorkerId, Hang)>) {
        let mut commands = self.respawn(now);
        commands.extend(self.recycle(now));
        let mut hangs = Vec::new();
        if self.next_ping.is_some_and(|at| at <= now) {
            self.next_ping = Some(now + PING_INTERVAL);
            self.ping(now, &mut commands, &mut hangs);
        }
        self.overdue(now, &mut commands, &mut hangs);
        (commands, hangs)
    }

    fn respawn(&mut self, now: Instant) -> Vec<Command> {
        let mut due = Vec::new();
        for (&generation, group) in &mut self.groups {
            let before = group.respawn.len();
            group.respawn.retain(|&at| at > now);
            due.extend(std::iter::repeat_n(generation, before - group.respawn.len()));
        }
        due.into_iter().map(|generation| self.spawn(generation, now)).collect()
    }

    fn recycle(&mut self, now: Instant) -> Vec<Command> {
        let mut replaced = Vec::new();
        for (&generation, group) in &mut self.groups {
            if group.retiring || group.recycling.is_some() {
                continue;
            }
            let worn = self.workers.iter().find(|(_, worker)| {
                worker.generation == generation
                    && worker.state == State::Ready
                    && (worker.exhausted
                        || (group.max_mails > 0 && worker.mails >= group.max_mails))
            });
            if let Some((&id, _)) = worn {
                group.recycling = Some(id);
                replaced.push(generation);
            }
        }
        replaced.into_iter().map(|generation| self.spawn(generation, now)).collect()
    }

    fn ping(
        &mut self,
        now: Instant,
        commands: &mut Vec<Command>,
        hangs: &mut Vec<(WorkerId, Hang)>,
    ) {
        self.sequence += 1;
        for (&id, worker) in &mut self.workers {
            if !matches!(worker.state, State::Ready | State::Retiring { .. }) {
                continue;
            }
            let limit =
                self.groups.get(&worker.generation).map_or(Duration::MAX, |g| g.hang_timeout);
            if PING_INTERVAL.saturating_mul(worker.unanswered) > limit {
                worker.state = State::Dying { kill_at: now + ABORT_GRACE };
                hangs.push((id, Hang::Silent(worker.unanswered)));
                commands.push(Command::Abort(id));
            } else {
                worker.unanswered += 1;
                commands.push(Command::Ping(id, self.sequence));
            }
        }
    }

    fn overdue(
        &mut self,
        now: Instant,
        commands: &mut Vec<Command>,
        hangs: &mut Vec<(WorkerId, Hang)>,
    ) {
        for (&id, worker) in &mut self.workers {
            let hang = match worker.state {
                State::Starting { until } if until <= now => Some(Hang::NotReady),
                State::Retiring { deadline, .. } if deadline <= now => Some(Hang::DrainOver),
                State::Dying { kill_at } if kill_at <= now => None,
                _ => continue,
            };
            hangs.extend(hang.map(|hang| (id, hang)));
            // Again in a while, should the kernel still be busy with the process.
            worker.state = State::Dying { kill_at: now + ABORT_GRACE };
            commands.push(Command::Kill(id));
        }
    }

    /// When [`Self::tick`] has something to do, if ever.
    pub(in crate::workers) fn next_tick(&self) -> Option<Instant> {
        let deaths = self.workers.values().filter_map(|worker| match worker.state {
            State::Starting { until } => Some(until),
            State::Retiring { deadline, .. } => Some(deadline),
            State::Dying { kill_at } => Some(kill_at),
            State::Ready => None,
        });
        let respawns = self.groups.values().flat_map(|group| group.respawn.iter().copied());
        let ping = self.next_ping.filter(|_| !self.workers.is_empty());
        deaths.chain(respawns).chain(ping).min()
    }
}
