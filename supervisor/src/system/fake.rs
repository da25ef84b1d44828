//! A system that tests play: processes that live, end and are signalled as the test says.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use qrelay_shared::ipc::channel::Channel;
use qrelay_shared::ipc::message::{FromZygote, ToZygote};
use qrelay_shared::sys::proc_stat::Process;

use crate::ids::JobId;
use crate::system::{Role, System, ZygoteChannel};

/// A zygote's end of its channel.
pub(crate) type ZygoteEnd = Channel<FromZygote, ToZygote>;

#[derive(Debug, Default)]
struct State {
    last: i32,
    alive: BTreeSet<Pid>,
    ended: BTreeMap<Pid, WaitStatus>,
    spawned: Vec<(Pid, ZygoteEnd)>,
    signals: Vec<(Pid, Signal)>,
    spawning_fails: bool,
}

impl State {
    fn start(&mut self) -> Pid {
        self.last += 1;
        // Above every real process id.
        let pid = Pid::from_raw((1 << 28) + self.last);
        self.alive.insert(pid);
        pid
    }

    fn end(&mut self, pid: Pid, status: WaitStatus) {
        if self.alive.remove(&pid) {
            self.ended.insert(pid, status);
        }
    }
}

/// The fake system.
#[derive(Debug, Default)]
pub(crate) struct Fake {
    state: RefCell<State>,
}

impl Fake {
    /// Starts a process, which leads its group.
    pub(crate) fn start(&self) -> Pid {
        self.state.borrow_mut().start()
    }

    /// Ends a process by itself.
    pub(crate) fn exit(&self, pid: Pid, code: i32) {
        self.state.borrow_mut().end(pid, WaitStatus::Exited(pid, code));
    }

    /// Lets no further zygote start.
    pub(crate) fn fail_to_spawn(&self) {
        self.state.borrow_mut().spawning_fails = true;
    }

    /// Takes the zygotes that were started since the last time.
    pub(crate) fn spawned(&self) -> Vec<(Pid, ZygoteEnd)> {
        std::mem::take(&mut self.state.borrow_mut().spawned)
    }

    /// Takes the signals that were sent since the last time.
    pub(crate) fn signals(&self) -> Vec<(Pid, Signal)> {
        std::mem::take(&mut self.state.borrow_mut().signals)
    }

    /// Returns whether a process has not ended.
    pub(crate) fn is_alive(&self, pid: Pid) -> bool {
        self.state.borrow().alive.contains(&pid)
    }

    /// Returns whether a process has ended and isn't reaped.
    pub(crate) fn any_ended(&self) -> bool {
        !self.state.borrow().ended.is_empty()
    }
}

impl System for Fake {
    fn spawn_zygote(&self) -> io::Result<(Pid, ZygoteChannel)> {
        let mut state = self.state.borrow_mut();
        if state.spawning_fails {
            return Err(io::Error::other("no process"));
        }
        let (ours, theirs) = ZygoteChannel::pair()?;
        let pid = state.start();
        state.spawned.push((pid, theirs));
        Ok((pid, ours))
    }

    /// Every signal ends the process.
    fn signal(&self, pid: Pid, signal: Signal) {
        let mut state = self.state.borrow_mut();
        state.signals.push((pid, signal));
        assert!(
            state.alive.contains(&pid) || state.ended.contains_key(&pid),
            "{pid} was reaped and might be another process"
        );
        state.end(pid, WaitStatus::Signaled(pid, signal, false));
    }

    fn signal_group(&self, group: Pid, signal: Signal) -> bool {
        let exists = self.group_exists(group);
        let mut state = self.state.borrow_mut();
        state.signals.push((group, signal));
        state.end(group, WaitStatus::Signaled(group, signal, false));
        exists
    }

    fn group_exists(&self, group: Pid) -> bool {
        let state = self.state.borrow();
        state.alive.contains(&group) || state.ended.contains_key(&group)
    }

    fn ended(&self, of: Option<Pid>) -> Option<Pid> {
        let state = self.state.borrow();
        match of {
            Some(pid) => state.ended.contains_key(&pid).then_some(pid),
            None => state.ended.keys().next().copied(),
        }
    }

    fn reap(&self, pid: Pid) -> Option<WaitStatus> {
        self.state.borrow_mut().ended.remove(&pid)
    }

    fn processes(&self) -> io::Result<Vec<Process>> {
        let state = self.state.borrow();
        let parent = self.own_pid();
        let alive = state.alive.iter().map(|&pid| Process { pid, parent, group: pid, alive: true });
        let ended = state.ended.keys();
        let ended = ended.map(|&pid| Process { pid, parent, group: pid, alive: false });
        Ok(alive.chain(ended).collect())
    }

    fn role(&self, _: Process, _: &HashSet<JobId>) -> Role {
        Role::Other
    }

    fn own_pid(&self) -> Pid {
        Pid::from_raw(1 << 28)
    }
}
