//! Which configuration serves, which one is being tried, which ones drain.
//! Pure: the reload's state machine.
//!
//! Invariants: at most one attempt at a time; a failed attempt leaves the
//! current generation as it was; orders to reload that come meanwhile cause
//! exactly one more attempt; at most [`MAX_DRAINING`] generations drain.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::ids::GenerationId;
use crate::workers::backoff::Backoff;

/// Generations that may drain at once; a reload waits for one of them to end.
pub const MAX_DRAINING: usize = 4;
/// Workers that may die before one is ready, until the attempt has failed.
pub const MAX_EARLY_DEATHS: u32 = 5;

/// Why a generation is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The daemon starts: a failure ends it.
    Boot,
    /// SIGHUP: the script's `reload` is called.
    Reload,
    /// The current generation has lost its zygote and standby.
    Recovery,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Start a zygote for this generation.
    Load(GenerationId, Cause),
    /// Bind its listeners and start its workers.
    Start(GenerationId),
    /// New connections go to the first, the second (if any) drains.
    Switch(GenerationId, Option<GenerationId>),
    /// End the zygote and workers of a failed attempt.
    Abandon(GenerationId, Cause),
}

#[derive(Debug)]
enum Step {
    Loading { deadline: Instant },
    Starting { deaths: u32 },
}

#[derive(Debug)]
struct Attempt {
    generation: GenerationId,
    cause: Cause,
    step: Step,
}

/// The generations and the attempt under way.
#[derive(Debug)]
pub struct Generations {
    boot_timeout: Duration,
    last: GenerationId,
    current: Option<GenerationId>,
    attempt: Option<Attempt>,
    draining: BTreeSet<GenerationId>,
    again: bool,
    stopping: bool,
    recovery: Option<Instant>,
    backoff: Backoff,
}

impl Generations {
    /// None yet; `boot_timeout` is how long a script may take to declare.
    pub fn new(boot_timeout: Duration) -> Self {
        Self {
            boot_timeout,
            last: GenerationId::default(),
            current: None,
            attempt: None,
            draining: BTreeSet::new(),
            again: false,
            stopping: false,
            recovery: None,
            backoff: Backoff::default(),
        }
    }

    /// The first attempt.
    pub fn boot(&mut self, now: Instant) -> Vec<Command> {
        self.load(Cause::Boot, now)
    }

    /// SIGHUP. An attempt under way, or too many that drain, make it wait.
    pub fn reload(&mut self, now: Instant) -> Vec<Command> {
        if self.stopping {
            return Vec::new();
        }
        self.again = true;
        self.advance(now)
    }

    /// SIGTERM: no attempts any more; the one under way is given up.
    pub fn stop(&mut self) -> Vec<Command> {
        self.stopping = true;
        self.again = false;
        self.recovery = None;
        let abandoned = self.attempt.take();
        abandoned.into_iter().map(|a| Command::Abandon(a.generation, a.cause)).collect()
    }

    fn load(&mut self, cause: Cause, now: Instant) -> Vec<Command> {
        let generation = self.last.advance();
        self.attempt = Some(Attempt {
            generation,
            cause,
            step: Step::Loading { deadline: now + self.boot_timeout },
        });
        vec![Command::Load(generation, cause)]
    }

    /// Starts what waits, if it can start now.
    fn advance(&mut self, now: Instant) -> Vec<Command> {
        if self.attempt.is_some() || self.stopping || self.draining.len() >= MAX_DRAINING {
            return Vec::new();
        }
        if self.again {
            self.again = false;
            return self.load(Cause::Reload, now);
        }
        if self.recovery.is_some_and(|at| at <= now) {
            self.recovery = None;
            return self.load(Cause::Recovery, now);
        }
        Vec::new()
    }

    /// The script of this generation has declared itself.
    pub fn declared(&mut self, generation: GenerationId) -> Vec<Command> {
        match &mut self.attempt {
            Some(attempt)
                if attempt.generation == generation
                    && matches!(attempt.step, Step::Loading { .. }) =>
            {
                attempt.step = Step::Starting { deaths: 0 };
                vec![Command::Start(generation)]
            }
            _ => Vec::new(),
        }
    }

    /// The attempt can't succeed: its script, its listeners or its zygote failed.
    pub fn failed(&mut self, generation: GenerationId, now: Instant) -> Vec<Command> {
        let Some(attempt) = self.attempt.take_if(|attempt| attempt.generation == generation) else {
            return Vec::new();
        };
        if attempt.cause == Cause::Recovery {
            self.recovery = Some(now + self.backoff.failed());
        }
        let mut commands = vec![Command::Abandon(generation, attempt.cause)];
        if attempt.cause != Cause::Boot {
            commands.extend(self.advance(now));
        }
        commands
    }

    /// A worker of this generation can take jobs.
    pub fn worker_ready(&mut self, generation: GenerationId, now: Instant) -> Vec<Command> {
        if self.attempt.take_if(|attempt| attempt.generation == generation).is_none() {
            return Vec::new();
        }
        self.backoff.succeeded();
        self.recovery = None;
        let old = self.current.replace(generation);
        self.draining.extend(old);
        let mut commands = vec![Command::Switch(generation, old)];
        commands.extend(self.advance(now));
        commands
    }

    /// A worker of this generation died before any was ready.
    pub fn worker_died(&mut self, generation: GenerationId, now: Instant) -> Vec<Command> {
        let Some(Attempt { step: Step::Starting { deaths }, .. }) =
            self.attempt.as_mut().filter(|attempt| attempt.generation == generation)
        else {
            return Vec::new();
        };
        *deaths += 1;
        if *deaths < MAX_EARLY_DEATHS { Vec::new() } else { self.failed(generation, now) }
    }

    /// A draining generation has ended.
    pub fn drained(&mut self, generation: GenerationId, now: Instant) -> Vec<Command> {
        self.draining.remove(&generation);
        self.advance(now)
    }

    /// The current generation can't fork workers any more.
    pub fn zygotes_lost(&mut self, generation: GenerationId, now: Instant) {
        if self.current == Some(generation) && !self.stopping {
            self.recovery = Some(now + self.backoff.failed());
        }
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) -> (Vec<Command>, Option<GenerationId>) {
        let late = self.attempt.as_ref().and_then(|attempt| match attempt.step {
            Step::Loading { deadline } if deadline <= now => Some(attempt.generation),
            _ => None,
        });
        match late {
            Some(generation) => (self.failed(generation, now), Some(generation)),
            None => (self.advance(now), None),
        }
    }

    /// When [`Self::tick`] has something to do.
    pub fn next_tick(&self) -> Option<Instant> {
        let loading = self.attempt.as_ref().and_then(|attempt| match attempt.step {
            Step::Loading { deadline } => Some(deadline),
            Step::Starting { .. } => None,
        });
        // As long as it can't be tried, the end of what it waits for is what wakes us.
        let possible = self.attempt.is_none() && self.draining.len() < MAX_DRAINING;
        let recovery = self.recovery.filter(|_| possible);
        loading.into_iter().chain(recovery).min()
    }

    /// The generation that gets new connections.
    pub fn current(&self) -> Option<GenerationId> {
        self.current
    }

    /// The generations that finish their mails.
    pub fn draining(&self) -> &BTreeSet<GenerationId> {
        &self.draining
    }

    /// The generation that is being tried, and why.
    pub fn attempt(&self) -> Option<(GenerationId, Cause)> {
        self.attempt.as_ref().map(|attempt| (attempt.generation, attempt.cause))
    }
}

#[cfg(test)]
#[path = "reload_tests.rs"]
mod tests;
