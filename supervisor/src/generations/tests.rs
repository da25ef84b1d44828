//! The owner of generations without a process: the test plays the system and the zygotes.

use nix::sys::signal::Signal;
use qrelay_shared::ipc::message::ZygoteReport;
use qrelay_shared::settings::Settings;

use super::*;
use crate::event::{Asker, NewWorker};
use crate::ids::WorkerId;
use crate::system::ZygotePids;
use crate::system::fake::{Fake, ZygoteEnd};
use crate::watch::Poller;

const FIRST: GenerationId = GenerationId(1);
const SECOND: GenerationId = GenerationId(2);
const THIRD: GenerationId = GenerationId(3);

struct Site {
    fake: Rc<Fake>,
    rollout: Rollout,
    events: Events,
    now: Instant,
}

/// The other end of a zygote's channel.
struct Other {
    pid: Pid,
    channel: ZygoteEnd,
    /// The number under which the supervisor knows the zygote.
    id: ZygoteId,
}

impl Other {
    fn report(&self, report: &ZygoteReport) {
        self.channel.try_send(report, &[]).expect("the supervisor reads");
    }

    fn declare(&self) {
        let settings = Settings { drain_timeout: Duration::from_secs(7), ..Settings::default() };
        let declaration = Declaration { settings, ..Declaration::default() };
        self.report(&ZygoteReport::Declared(Box::new(declaration)));
    }

    /// Takes the next order; descriptors that come with it are closed.
    fn order(&self) -> Option<ZygoteOrder> {
        self.channel.try_recv(&mut RecvBuffer::new()).ok().map(|received| received.message)
    }

    /// Takes the order to fork a standby.
    fn standby(&self, id: ZygoteId, fake: &Fake) -> Self {
        let mut buffer = RecvBuffer::new();
        let mut received = self.channel.try_recv(&mut buffer).expect("an order");
        assert!(matches!(received.message, ZygoteOrder::Standby));
        let channel = ZygoteEnd::from_fd(received.fds.take().expect("a channel"));
        Self { pid: fake.start(), channel, id }
    }
}

impl Site {
    fn new() -> Self {
        let fake = Rc::new(Fake::default());
        let log = Logger::root(slog::Discard, slog::o!());
        let loading = Loading {
            config: "/config.lua".into(),
            boot_timeout: Duration::from_secs(30),
            instance: "run".into(),
            account: None,
            passed: vec!["web".into()],
        };
        let watcher = Poller::new().expect("epoll").watcher();
        let rollout = Rollout::new(log, loading, watcher, Rc::clone(&fake) as Rc<dyn System>);
        Self { fake, rollout, events: Events::new(), now: Instant::now() }
    }

    /// The zygote that was started last, which has got its order to load.
    fn zygote(&mut self) -> Other {
        let (pid, channel) = self.fake.spawned().pop().expect("a zygote");
        let id = *self.rollout.zygotes.keys().next_back().expect("known");
        Other { pid, channel, id }
    }

    /// A zygote that has declared its generation, and its standby.
    fn declared(&mut self) -> (Other, Other) {
        let zygote = self.zygote();
        assert!(matches!(zygote.order(), Some(ZygoteOrder::Load { .. })));
        zygote.declare();
        self.read(&zygote);
        let id = *self.rollout.zygotes.keys().next_back().expect("the standby");
        let standby = zygote.standby(id, &self.fake);
        zygote.report(&ZygoteReport::StandbyForked { pid: standby.pid.as_raw() });
        self.read(&zygote);
        self.rollout.standby_runs(id, standby.pid);
        (zygote, standby)
    }

    /// The first generation serves.
    fn serving() -> (Self, Other, Other) {
        let mut site = Self::new();
        site.rollout.boot(site.now, &mut site.events);
        let (zygote, standby) = site.declared();
        site.rollout.worker_ready(FIRST, site.now, &mut site.events);
        let last = site.events().pop();
        assert_eq!(last, Some("Switched { new: GenerationId(1), old: None }".into()));
        (site, zygote, standby)
    }

    fn read(&mut self, zygote: &Other) {
        self.rollout.on_zygote(zygote.id, self.now, &mut self.events);
    }

    fn end(&mut self, zygote: &Other, code: i32) {
        self.fake.exit(zygote.pid, code);
        self.rollout.reap(self.now, &mut self.events);
    }

    /// The events so far, but for those about dictionaries.
    fn events(&mut self) -> Vec<String> {
        let events = self.events.drain(..).map(|event| format!("{event:?}"));
        events.filter(|event| !event.starts_with("Asker")).collect()
    }
}

fn new_worker(generation: GenerationId, worker: WorkerId) -> NewWorker {
    let (jobs, control) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let another = || jobs.try_clone().expect("a descriptor").into();
    let (dictionaries, flights) = (another(), Some(another()));
    let (jobs, control) = (jobs.into(), control.into());
    NewWorker { generation, worker, jobs, control, dictionaries, flights }
}

fn said(events: &[Event]) -> Vec<String> {
    events.iter().map(|event| format!("{event:?}")).collect()
}

#[test]
fn a_boot_loads_declares_and_switches() {
    let mut site = Site::new();
    site.rollout.boot(site.now, &mut site.events);
    let zygote = site.zygote();
    match zygote.order() {
        Some(ZygoteOrder::Load { config, reload, systemd, instance, account, .. }) => {
            assert_eq!(account, None);
            assert_eq!((config, reload), (PathBuf::from("/config.lua"), false));
            assert_eq!((systemd, instance), (vec!["web".to_owned()], "run".to_owned()));
        }
        other => panic!("{other:?}"),
    }
    assert!(site.rollout.starting(FIRST).is_none());
    zygote.declare();
    site.read(&zygote);
    assert_eq!(site.events(), said(&[Event::Declared(FIRST)]));
    assert!(site.rollout.starting(FIRST).is_some());
    assert_eq!(site.rollout.drain_timeout(), Duration::from_secs(7));
    site.rollout.worker_ready(FIRST, site.now, &mut site.events);
    assert_eq!(site.events(), said(&[Event::Switched { new: FIRST, old: None }]));
    assert!(site.rollout.starting(FIRST).is_none(), "it serves");
}

#[test]
fn a_script_that_fails_at_the_start_ends_the_daemon() {
    let mut site = Site::new();
    site.rollout.boot(site.now, &mut site.events);
    let zygote = site.zygote();
    zygote.report(&ZygoteReport::Failed { message: "config.lua:1: no".into(), may_pass: false });
    site.read(&zygote);
    let expected =
        [Event::ZygotesEnded(FIRST), Event::Abandoned(FIRST), Event::StartFailed(Exit::Config)];
    assert_eq!(site.events(), said(&expected));
    assert_eq!(site.fake.signals(), [(zygote.pid, Signal::SIGKILL)]);
}

#[test]
fn what_may_pass_ends_the_start_with_another_status() {
    let mut site = Site::new();
    site.rollout.boot(site.now, &mut site.events);
    let zygote = site.zygote();
    zygote.report(&ZygoteReport::Failed { message: "no database".into(), may_pass: true });
    site.read(&zygote);
    assert_eq!(site.events().last(), said(&[Event::StartFailed(Exit::Temporary)]).last());

    let mut site = Site::new();
    site.rollout.boot(site.now, &mut site.events);
    site.now += Duration::from_secs(31);
    site.rollout.tick(site.now, &mut site.events);
    assert_eq!(site.events().last(), said(&[Event::StartFailed(Exit::Temporary)]).last());
}

#[test]
fn the_last_words_of_a_zygote_are_the_reason() {
    let mut site = Site::new();
    site.rollout.boot(site.now, &mut site.events);
    let zygote = site.zygote();
    zygote.report(&ZygoteReport::Failed { message: "config.lua:1: no".into(), may_pass: false });
    site.end(&zygote, 1);
    assert_eq!(site.events().last(), said(&[Event::StartFailed(Exit::Config)]).last());
}

#[test]
fn a_zygote_that_exits_fails_its_generation() {
    for (code, exit) in [(0, Exit::Config), (3, Exit::Config), (71, Exit::System)] {
        let mut site = Site::new();
        site.rollout.boot(site.now, &mut site.events);
        let zygote = site.zygote();
        site.end(&zygote, code);
        assert_eq!(site.events().last(), said(&[Event::StartFailed(exit)]).last(), "{code}");
    }
}

#[test]
fn a_zygote_that_cannot_be_started_fails_its_generation() {
    let mut site = Site::new();
    site.fake.fail_to_spawn();
    site.rollout.boot(site.now, &mut site.events);
    assert_eq!(site.events().last(), said(&[Event::StartFailed(Exit::System)]).last());
}

#[test]
fn a_reload_that_fails_leaves_the_old_generation() {
    let (mut site, ..) = Site::serving();
    site.rollout.reload(site.now, &mut site.events);
    assert_eq!(site.events(), said(&[Event::ReloadBegan]));
    let zygote = site.zygote();
    assert!(matches!(zygote.order(), Some(ZygoteOrder::Load { reload: true, .. })));
    let failure = (Exit::System, "address in use".to_owned());
    site.rollout.fail(SECOND, failure, site.now, &mut site.events);
    let Some(Event::ReloadFailed(Cause::Reload, load)) = site.events.pop_back() else {
        panic!("{:?}", site.events);
    };
    assert_eq!((load.generation, load.may_pass), (SECOND.0, true));
    assert_eq!(load.failure.as_deref(), Some("address in use"));
    let expected = [Event::ZygotesEnded(SECOND), Event::Abandoned(SECOND)];
    assert_eq!(site.events(), said(&expected));
    site.rollout.drained(SECOND, site.now, &mut site.events);
    assert_eq!(site.events(), said(&[Event::GenerationEnded(SECOND)]));
    assert!(site.rollout.declaration(FIRST).is_some());
}

#[test]
fn a_switch_ends_the_old_zygotes() {
    let (mut site, zygote, standby) = Site::serving();
    site.rollout.reload(site.now, &mut site.events);
    site.declared();
    site.events();
    site.rollout.worker_ready(SECOND, site.now, &mut site.events);
    let switched = Event::Switched { new: SECOND, old: Some(FIRST) };
    assert_eq!(site.events(), said(&[switched, Event::ZygotesEnded(FIRST)]));
    let killed = [(zygote.pid, Signal::SIGKILL), (standby.pid, Signal::SIGKILL)];
    assert_eq!(site.fake.signals(), killed);
    site.rollout.drained(FIRST, site.now, &mut site.events);
    assert_eq!(site.events(), said(&[Event::GenerationEnded(FIRST)]));
    site.rollout.drained(FIRST, site.now, &mut site.events);
    assert!(site.events().is_empty(), "once");
}

#[test]
fn a_stop_gives_up_the_attempt_and_says_nothing_about_it() {
    let (mut site, ..) = Site::serving();
    site.rollout.reload(site.now, &mut site.events);
    site.declared();
    site.events();
    site.rollout.stop(site.now, &mut site.events);
    let expected = [Event::ZygotesEnded(SECOND), Event::Abandoned(SECOND)];
    assert_eq!(site.events(), said(&expected));
    assert!(site.rollout.starting(SECOND).is_none());
    site.rollout.reload(site.now, &mut site.events);
    assert!(site.events().is_empty() && site.fake.spawned().is_empty());
}

#[test]
fn a_standby_takes_over_and_gets_a_standby_of_its_own() {
    let (mut site, zygote, standby) = Site::serving();
    site.end(&zygote, 1);
    assert_eq!(site.events(), said(&[Event::ZygoteLost(FIRST)]));
    assert!(matches!(standby.order(), Some(ZygoteOrder::Standby)));
    assert_eq!(site.rollout.zygote_pids(), ZygotePids { known: vec![standby.pid], unknown: 1 });
}

#[test]
fn without_a_standby_the_configuration_is_loaded_anew_with_backoff() {
    let (mut site, zygote, standby) = Site::serving();
    site.end(&standby, 1);
    assert!(site.events().is_empty());
    site.end(&zygote, 1);
    assert_eq!(site.events(), said(&[Event::NoZygoteLeft, Event::ZygoteLost(FIRST)]));
    site.rollout.tick(site.now, &mut site.events);
    assert!(site.fake.spawned().is_empty());
    let due = site.rollout.next_deadline().expect("it is tried again");
    site.rollout.tick(due, &mut site.events);
    let anew = site.zygote();
    assert!(matches!(anew.order(), Some(ZygoteOrder::Load { reload: false, .. })));
    assert_eq!(site.events(), said(&[Event::ReloadBegan]));
}

#[test]
fn a_lost_standby_is_forked_again_later() {
    let (mut site, zygote, standby) = Site::serving();
    site.end(&standby, 1);
    assert_eq!(site.rollout.next_deadline(), Some(site.now + STANDBY_LATER));
    site.rollout.tick(site.now + STANDBY_LATER, &mut site.events);
    assert!(matches!(zygote.order(), Some(ZygoteOrder::Standby)));
}

const STANDBY_LATER: Duration = Duration::from_secs(1);

#[test]
fn a_standby_without_a_known_process_id_is_not_signalled() {
    let mut site = Site::new();
    site.rollout.boot(site.now, &mut site.events);
    let zygote = site.zygote();
    zygote.order();
    zygote.declare();
    site.read(&zygote);
    let id = *site.rollout.zygotes.keys().next_back().expect("the standby");
    assert_eq!(site.rollout.zygote_pids(), ZygotePids { known: vec![zygote.pid], unknown: 1 });
    site.rollout.standby_ended(id, site.now, &mut site.events);
    assert_eq!(site.rollout.zygote_pids().unknown, 0);
    assert!(site.fake.signals().is_empty());
}

#[test]
fn a_script_that_takes_too_long_fails() {
    let (mut site, ..) = Site::serving();
    site.rollout.reload(site.now, &mut site.events);
    site.events();
    site.rollout.tick(site.now + Duration::from_secs(30), &mut site.events);
    let last = site.events().pop().expect("an event");
    assert!(last.contains("the script was not done after 30 s"), "{last}");
    assert!(site.rollout.declaration(THIRD).is_none());
}

#[test]
fn workers_are_asked_for_and_refused_without_a_zygote() {
    let (mut site, zygote, standby) = Site::serving();
    let new = new_worker(FIRST, WorkerId(5));
    site.rollout.fork_worker(&new, site.now, &mut site.events);
    assert!(site.events().is_empty());
    assert!(matches!(zygote.order(), Some(ZygoteOrder::Fork { worker: WorkerId(5) })));
    site.end(&standby, 1);
    site.end(&zygote, 1);
    site.events();
    site.rollout.fork_worker(&new, site.now, &mut site.events);
    assert_eq!(site.events(), said(&[Event::WorkerNotForked(WorkerId(5))]));
}

#[test]
fn a_zygote_that_tells_what_cannot_be_is_killed_and_not_listened_to() {
    type Lie = fn(&Site, &Other, &Other) -> ZygoteReport;
    let lies: [Lie; 4] = [
        |_, zygote, _| ZygoteReport::Forked { worker: WorkerId(5), pid: zygote.pid.as_raw() },
        |_, _, standby| ZygoteReport::Forked { worker: WorkerId(5), pid: standby.pid.as_raw() },
        |_, zygote, _| ZygoteReport::StandbyForked { pid: zygote.pid.as_raw() },
        |site, _, _| ZygoteReport::StandbyForked { pid: site.fake.start().as_raw() },
    ];
    for lie in lies {
        let (mut site, zygote, standby) = Site::serving();
        site.rollout.fork_worker(&new_worker(FIRST, WorkerId(5)), site.now, &mut site.events);
        zygote.report(&lie(&site, &zygote, &standby));
        zygote.report(&ZygoteReport::ForkFailed { worker: WorkerId(6), message: "no".into() });
        site.read(&zygote);
        assert_eq!(site.fake.signals(), [(zygote.pid, Signal::SIGKILL)]);
        assert_eq!(site.events(), Vec::<String>::new());
        site.rollout.reap(site.now, &mut site.events);
        assert_eq!(site.events(), said(&[Event::ZygoteLost(FIRST)]), "its standby takes over");
        assert!(site.fake.signals().is_empty() && site.fake.is_alive(standby.pid));
    }
}

#[test]
fn a_standby_that_reports_forks_is_killed() {
    for told in [false, true] {
        let (mut site, zygote, standby) = Site::serving();
        let pid = site.fake.start();
        standby.report(&match told {
            true => ZygoteReport::Forked { worker: WorkerId(5), pid: pid.as_raw() },
            false => ZygoteReport::StandbyFailed { message: "no".into() },
        });
        site.read(&standby);
        assert_eq!(site.fake.signals(), [(standby.pid, Signal::SIGKILL)]);
        assert!(site.events().is_empty() && site.fake.is_alive(zygote.pid));
    }
}

#[test]
fn a_zygote_that_was_found_lying_is_killed_once() {
    let (mut site, zygote, _) = Site::serving();
    for _ in 0..2 {
        site.rollout.zygote_lied(zygote.id, "it lied", site.now, &mut site.events);
    }
    assert_eq!(site.fake.signals(), [(zygote.pid, Signal::SIGKILL)]);
}

#[test]
fn a_zygote_that_tells_its_own_number_as_its_standbys_is_killed() {
    let mut site = Site::new();
    site.rollout.boot(site.now, &mut site.events);
    let zygote = site.zygote();
    zygote.declare();
    site.read(&zygote);
    site.events();
    zygote.report(&ZygoteReport::StandbyForked { pid: zygote.pid.as_raw() });
    site.read(&zygote);
    assert_eq!(site.fake.signals(), [(zygote.pid, Signal::SIGKILL)]);
    assert!(site.events().is_empty());
}

#[test]
fn a_zygote_whose_report_answers_no_order_is_killed() {
    let lies = [
        ZygoteReport::Declared(Box::default()),
        ZygoteReport::Failed { message: "no".into(), may_pass: false },
        ZygoteReport::ForkFailed { worker: WorkerId(5), message: "no".into() },
        ZygoteReport::StandbyFailed { message: "no".into() },
    ];
    for lie in lies {
        let (mut site, zygote, standby) = Site::serving();
        zygote.report(&lie);
        site.read(&zygote);
        assert_eq!(site.fake.signals(), [(zygote.pid, Signal::SIGKILL)], "{lie:?}");
        assert_eq!(site.rollout.zygotes.len(), 2, "{lie:?}");
        assert!(site.events().is_empty() && site.fake.is_alive(standby.pid), "{lie:?}");
    }
}

#[test]
fn a_zygote_that_answers_orders_in_another_order_is_killed() {
    let (mut site, zygote, _) = Site::serving();
    for worker in [5, 6].map(WorkerId) {
        site.rollout.fork_worker(&new_worker(FIRST, worker), site.now, &mut site.events);
    }
    zygote.report(&ZygoteReport::ForkFailed { worker: WorkerId(6), message: "no".into() });
    site.read(&zygote);
    assert_eq!(site.fake.signals(), [(zygote.pid, Signal::SIGKILL)]);
    assert!(site.events().is_empty());
}

#[test]
fn a_zygote_that_does_not_fork_is_given_up() {
    let (mut site, zygote, standby) = Site::serving();
    site.rollout.fork_worker(&new_worker(FIRST, WorkerId(5)), site.now, &mut site.events);
    let due = site.rollout.next_deadline().expect("a limit");
    site.rollout.tick(due - Duration::from_millis(1), &mut site.events);
    assert!(site.events().is_empty() && site.fake.is_alive(zygote.pid));
    // A look that comes too late says nothing: this process was stopped, too.
    site.rollout.tick(due + Duration::from_secs(60), &mut site.events);
    assert!(site.events().is_empty() && site.fake.is_alive(zygote.pid));
    let due = site.rollout.next_deadline().expect("a limit");
    site.rollout.tick(due, &mut site.events);
    assert_eq!(site.fake.signals(), [(zygote.pid, Signal::SIGKILL)]);
    assert_eq!(site.events(), [format!("{:?}", Event::ZygoteLost(FIRST))]);
    site.rollout.fork_worker(&new_worker(FIRST, WorkerId(5)), site.now, &mut site.events);
    assert!(matches!(standby.order(), Some(ZygoteOrder::Standby)));
    assert!(matches!(standby.order(), Some(ZygoteOrder::Fork { .. })));
}

#[test]
fn a_zygote_may_ask_the_dictionaries_until_its_script_has_run() {
    for lives in [false, true] {
        let mut site = Site::new();
        site.rollout.boot(site.now, &mut site.events);
        let zygote = site.zygote();
        let asker = Asker::Zygote(zygote.id);
        let gone = |site: &Site| {
            let is_gone = |event: &Event| matches!(event, Event::AskerGone(gone) if *gone == asker);
            site.events.iter().any(is_gone)
        };
        let came = matches!(&site.events[0], Event::AskerCame(new) if new.asker == asker);
        assert!(came && !gone(&site));
        if lives {
            zygote.declare();
            site.read(&zygote);
        } else {
            site.end(&zygote, 1);
        }
        assert!(gone(&site));
    }
}

#[test]
fn a_zygote_that_declares_what_no_script_can_is_killed() {
    let settings = Settings::default;
    let cases = [
        Settings { workers: 0, ..settings() },
        Settings { workers: u32::MAX, ..settings() },
        Settings { worker_connections: u32::MAX, ..settings() },
        Settings { client_timeout: Duration::MAX, ..settings() },
        Settings { request_timeout: Duration::MAX, ..settings() },
        Settings { relay_timeout: Duration::MAX, ..settings() },
        Settings { handler_timeout: Duration::MAX, ..settings() },
        Settings { hang_timeout: Duration::MAX, ..settings() },
        Settings { drain_timeout: Duration::MAX, ..settings() },
        Settings { shared_memory: usize::MAX, ..settings() },
        Settings { shared_memory_total: usize::MAX, ..settings() },
        Settings { client_share: f64::NAN, ..settings() },
    ];
    for settings in cases {
        let mut site = Site::new();
        site.rollout.boot(site.now, &mut site.events);
        let zygote = site.zygote();
        site.events();
        let declaration = Declaration { settings, ..Declaration::default() };
        zygote.report(&ZygoteReport::Declared(Box::new(declaration)));
        site.read(&zygote);
        assert_eq!(site.fake.signals(), [(zygote.pid, Signal::SIGKILL)]);
        assert!(site.events().is_empty());
    }
}
