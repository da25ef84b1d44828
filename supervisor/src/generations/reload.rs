//! Which configuration serves, which one is being tried, and which ones drain. Pure: the state
//! machine of the reload.
//!
//! Invariants: there is at most one attempt at a time. A failed attempt leaves the current
//! generation as it was. Requests to reload that come during an attempt cause exactly one more. At
//! most [`MAX_DRAINING`] generations drain.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::backoff::Backoff;
use crate::event::Cause;
use crate::ids::GenerationId;

/// Generations that may drain at once; a reload waits for one of them to end.
pub(super) const MAX_DRAINING: usize = 4;
/// An attempt fails when this many workers died before one was ready.
pub(super) const MAX_EARLY_DEATHS: u32 = 5;

/// A step to carry out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// Start a zygote for this generation.
    Load(GenerationId, Cause),
    /// Bind the listeners of this generation and start its workers.
    Start(GenerationId),
    /// Give new connections to the first generation; the second one, if any, drains.
    Switch(GenerationId, Option<GenerationId>),
    /// End the zygote and the workers of a failed attempt.
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
pub(super) struct Generations {
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
    /// Starts without a generation. A script that takes longer than `boot_timeout` has failed.
    pub(super) fn new(boot_timeout: Duration) -> Self {
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

    /// Begins the first attempt.
    pub(super) fn boot(&mut self, now: Instant) -> Vec<Command> {
        self.load(Cause::Boot, now)
    }

    /// Requests a reload, which waits while an attempt is under way or too many generations drain.
    pub(super) fn reload(&mut self, now: Instant) -> Vec<Command> {
        if self.stopping {
            return Vec::new();
        }
        self.again = true;
        self.advance(now)
    }

    /// Gives up the attempt under way, and begins no other.
    pub(super) fn stop(&mut self) -> Vec<Command> {
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

    /// Begins the attempt that waits, if it can begin now.
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

    /// Notes that the script of this generation has declared itself.
    pub(super) fn declared(&mut self, generation: GenerationId) -> Vec<Command> {
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

    /// Ends the attempt, because its script, its listeners or its zygote failed.
    pub(super) fn failed(&mut self, generation: GenerationId, now: Instant) -> Vec<Command> {
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

    /// Notes that a worker of this generation can take jobs.
    pub(super) fn worker_ready(&mut self, generation: GenerationId, now: Instant) -> Vec<Command> {
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

    /// Counts a worker of this generation that died before it was ready.
    pub(super) fn worker_died(&mut self, generation: GenerationId, now: Instant) -> Vec<Command> {
        let Some(Attempt { step: Step::Starting { deaths }, .. }) =
            self.attempt.as_mut().filter(|attempt| attempt.generation == generation)
        else {
            return Vec::new();
        };
        *deaths += 1;
        if *deaths < MAX_EARLY_DEATHS { Vec::new() } else { self.failed(generation, now) }
    }

    /// Notes that a draining generation has ended.
    pub(super) fn drained(&mut self, generation: GenerationId, now: Instant) -> Vec<Command> {
        self.draining.remove(&generation);
        self.advance(now)
    }

    /// Plans to load the configuration anew, because the current generation can fork no workers.
    pub(super) fn zygotes_lost(&mut self, generation: GenerationId, now: Instant) {
        if self.current == Some(generation) && !self.stopping {
            self.recovery = Some(now + self.backoff.failed());
        }
    }

    /// Does what is due. Also returns the generation whose script took too long, if one did.
    pub(super) fn tick(&mut self, now: Instant) -> (Vec<Command>, Option<GenerationId>) {
        let late = self.attempt.as_ref().and_then(|attempt| match attempt.step {
            Step::Loading { deadline } if deadline <= now => Some(attempt.generation),
            _ => None,
        });
        match late {
            Some(generation) => (self.failed(generation, now), Some(generation)),
            None => (self.advance(now), None),
        }
    }

    /// Returns when [`Self::tick`] has something to do, if ever.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        let loading = self.attempt.as_ref().and_then(|attempt| match attempt.step {
            Step::Loading { deadline } => Some(deadline),
            Step::Starting { .. } => None,
        });
        // While a recovery can't begin, the end of what it waits for wakes the loop.
        let possible = self.attempt.is_none() && self.draining.len() < MAX_DRAINING;
        let recovery = self.recovery.filter(|_| possible);
        loading.into_iter().chain(recovery).min()
    }

    /// Returns whether this generation's script has declared itself and no worker is ready yet.
    pub(super) fn is_starting(&self, generation: GenerationId) -> bool {
        self.attempt.as_ref().is_some_and(|attempt| {
            attempt.generation == generation && matches!(attempt.step, Step::Starting { .. })
        })
    }

    /// Returns the generation that was tried last, or is being tried.
    pub(super) fn last(&self) -> GenerationId {
        self.last
    }

    /// Returns whether no attempt begins any more.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Returns the generation that is being tried, and why.
    pub(super) fn attempt(&self) -> Option<(GenerationId, Cause)> {
        self.attempt.as_ref().map(|attempt| (attempt.generation, attempt.cause))
    }
}

#[cfg(test)]
#[path = "reload_tests.rs"]
mod tests;
