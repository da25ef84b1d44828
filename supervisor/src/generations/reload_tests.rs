//! Tables for the reload's state machine.

use super::*;

const LIMIT: Duration = Duration::from_secs(30);

/// Generation 1 serves.
fn serving(now: Instant) -> Generations {
    let mut generations = Generations::new(LIMIT);
    assert_eq!(generations.boot(now), [Command::Load(GenerationId(1), Cause::Boot)]);
    assert_eq!(generations.declared(GenerationId(1)), [Command::Start(GenerationId(1))]);
    assert_eq!(
        generations.worker_ready(GenerationId(1), now),
        [Command::Switch(GenerationId(1), None)]
    );
    generations
}

/// Plays a reload that works.
fn reload(generations: &mut Generations, generation: GenerationId, now: Instant) -> Vec<Command> {
    assert_eq!(generations.reload(now), [Command::Load(generation, Cause::Reload)]);
    generations.declared(generation);
    generations.worker_ready(generation, now)
}

#[test]
fn a_reload_switches_and_drains() {
    let now = Instant::now();
    let mut generations = serving(now);
    assert_eq!(
        reload(&mut generations, GenerationId(2), now),
        [Command::Switch(GenerationId(2), Some(GenerationId(1)))]
    );
    assert_eq!(generations.current, Some(GenerationId(2)));
    assert!(
        generations.worker_ready(GenerationId(2), now).is_empty(),
        "later workers change nothing"
    );
    assert!(generations.drained(GenerationId(1), now).is_empty());
    assert!(generations.draining.is_empty());
}

#[test]
fn a_failure_leaves_the_old_generation() {
    let now = Instant::now();
    let mut generations = serving(now);
    generations.reload(now);
    assert_eq!(
        generations.failed(GenerationId(2), now),
        [Command::Abandon(GenerationId(2), Cause::Reload)]
    );
    assert!(generations.failed(GenerationId(2), now).is_empty(), "once");
    assert_eq!(generations.current, Some(GenerationId(1)));
    assert_eq!(
        reload(&mut generations, GenerationId(3), now),
        [Command::Switch(GenerationId(3), Some(GenerationId(1)))]
    );
}

#[test]
fn a_script_that_does_not_declare_in_time_fails() {
    let now = Instant::now();
    let mut generations = serving(now);
    generations.reload(now);
    assert_eq!(generations.next_tick(), Some(now + LIMIT));
    assert_eq!(
        generations.tick(now + LIMIT),
        (vec![Command::Abandon(GenerationId(2), Cause::Reload)], Some(GenerationId(2)))
    );
}

#[test]
fn orders_during_an_attempt_cause_exactly_one_more() {
    let now = Instant::now();
    let mut generations = serving(now);
    generations.reload(now);
    assert!(generations.reload(now).is_empty() && generations.reload(now).is_empty());
    generations.declared(GenerationId(2));
    assert_eq!(
        generations.worker_ready(GenerationId(2), now),
        [
            Command::Switch(GenerationId(2), Some(GenerationId(1))),
            Command::Load(GenerationId(3), Cause::Reload)
        ]
    );
    generations.declared(GenerationId(3));
    assert_eq!(
        generations.worker_ready(GenerationId(3), now),
        [Command::Switch(GenerationId(3), Some(GenerationId(2)))]
    );
}

#[test]
fn an_order_before_ready_waits_for_it() {
    let now = Instant::now();
    let mut generations = Generations::new(LIMIT);
    generations.boot(now);
    assert!(generations.reload(now).is_empty());
    generations.declared(GenerationId(1));
    assert_eq!(
        generations.worker_ready(GenerationId(1), now),
        [Command::Switch(GenerationId(1), None), Command::Load(GenerationId(2), Cause::Reload)]
    );
}

#[test]
fn too_many_that_drain_make_a_reload_wait() {
    let now = Instant::now();
    let mut generations = serving(now);
    for generation in 2..=5 {
        reload(&mut generations, GenerationId(generation), now);
    }
    assert_eq!(generations.draining.len(), MAX_DRAINING);
    assert!(generations.reload(now).is_empty());
    assert_eq!(
        generations.drained(GenerationId(3), now),
        [Command::Load(GenerationId(6), Cause::Reload)]
    );
}

#[test]
fn early_deaths_end_the_attempt() {
    let now = Instant::now();
    let mut generations = Generations::new(LIMIT);
    generations.boot(now);
    generations.declared(GenerationId(1));
    for _ in 1..MAX_EARLY_DEATHS {
        assert!(generations.worker_died(GenerationId(1), now).is_empty());
    }
    assert_eq!(
        generations.worker_died(GenerationId(1), now),
        [Command::Abandon(GenerationId(1), Cause::Boot)]
    );
}

#[test]
fn a_lost_zygote_is_recovered_with_backoff_and_without_calling_reload() {
    let now = Instant::now();
    let mut generations = serving(now);
    generations.zygotes_lost(GenerationId(1), now);
    let first = generations.next_tick().expect("a time is set");
    assert!(generations.tick(now).0.is_empty());
    assert_eq!(generations.tick(first).0, [Command::Load(GenerationId(2), Cause::Recovery)]);
    assert_eq!(
        generations.failed(GenerationId(2), first),
        [Command::Abandon(GenerationId(2), Cause::Recovery)]
    );
    let second = generations.next_tick().expect("it is tried again");
    assert!(second - first > first - now);
    assert_eq!(generations.current, Some(GenerationId(1)));
}

#[test]
fn stopping_gives_up_the_attempt_and_ignores_orders() {
    let now = Instant::now();
    let mut generations = serving(now);
    generations.reload(now);
    assert_eq!(generations.stop(), [Command::Abandon(GenerationId(2), Cause::Reload)]);
    assert!(generations.reload(now).is_empty());
    assert_eq!(generations.next_tick(), None);
}

#[test]
fn a_failed_reload_does_not_forget_the_recovery() {
    let now = Instant::now();
    let mut generations = serving(now);
    generations.zygotes_lost(GenerationId(1), now);
    assert_eq!(generations.reload(now), [Command::Load(GenerationId(2), Cause::Reload)]);
    assert_eq!(
        generations.failed(GenerationId(2), now),
        [Command::Abandon(GenerationId(2), Cause::Reload)]
    );
    let due = generations.next_tick().expect("it is still to be tried");
    assert_eq!(generations.tick(due).0, [Command::Load(GenerationId(3), Cause::Recovery)]);
}

#[test]
fn a_recovery_that_must_wait_for_a_drain_keeps_nobody_awake() {
    let now = Instant::now();
    let mut generations = serving(now);
    for generation in 2..=5 {
        reload(&mut generations, GenerationId(generation), now);
    }
    generations.zygotes_lost(GenerationId(5), now);
    assert_eq!(generations.next_tick(), None);
    let later = now + LIMIT;
    assert_eq!(
        generations.drained(GenerationId(1), later),
        [Command::Load(GenerationId(6), Cause::Recovery)]
    );
}
