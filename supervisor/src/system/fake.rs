//! A system that tests play: processes that live, end and are signalled as the test says.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::io;

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use qrelay_shared::ipc::channel::Channel;
use qrelay_shared::ipc::message::{FromZygote, ToZygote};
use qrelay_shared::sys::proc_stat::{Identity, Process, Usage};

use crate::ids::JobId;
use crate::system::{Role, System, ZygoteChannel};

/// A zygote's end of its channel.
pub(crate) type ZygoteEnd = Channel<FromZygote, ToZygote>;

/// This process, which leads its group and its session.
const OWN: Pid = Pid::from_raw(1 << 28);

/// A process that isn't reaped.
#[derive(Debug)]
struct Entry {
    parent: Pid,
    group: Pid,
    ending: bool,
    started: u64,
    status: Option<WaitStatus>,
}

#[derive(Debug, Default)]
struct State {
    last: i32,
    clock: u64,
    processes: BTreeMap<Pid, Entry>,
    spawned: Vec<(Pid, ZygoteEnd)>,
    signals: Vec<(Pid, Signal)>,
    spawning_fails: bool,
}

impl State {
    /// Returns a number that was never used.
    fn number(&mut self) -> Pid {
        self.last += 1;
        // Above every real process id.
        Pid::from_raw(OWN.as_raw() + self.last)
    }

    fn insert(&mut self, pid: Pid, parent: Pid, group: Pid) {
        self.clock += 1;
        let entry = Entry { parent, group, ending: false, started: self.clock, status: None };
        assert!(self.processes.insert(pid, entry).is_none(), "{pid} isn't reaped");
    }

    fn start(&mut self) -> Pid {
        let pid = self.number();
        self.insert(pid, OWN, OWN);
        pid
    }

    /// Marks a process as ending, and makes its children this process'.
    fn leave(&mut self, pid: Pid) {
        self.processes.entry(pid).and_modify(|entry| entry.ending = true);
        for child in self.processes.values_mut().filter(|entry| entry.parent == pid) {
            child.parent = OWN;
        }
    }

    fn end(&mut self, pid: Pid, status: WaitStatus) {
        self.leave(pid);
        self.processes.entry(pid).and_modify(|entry| {
            entry.status.get_or_insert(status);
        });
    }

    fn is_child(&self, pid: Pid) -> bool {
        self.processes.get(&pid).is_some_and(|entry| entry.parent == OWN)
    }

    fn has_ended(&self, pid: Pid) -> bool {
        self.is_child(pid) && self.processes[&pid].status.is_some()
    }
}

/// The parent of this process and of its neighbours.
pub(crate) const OUTSIDE: Pid = Pid::from_raw(1);

/// The fake system.
#[derive(Debug)]
pub(crate) struct Fake {
    state: RefCell<State>,
}

impl Default for Fake {
    fn default() -> Self {
        let mut state = State::default();
        state.insert(OWN, OUTSIDE, OWN);
        Self { state: RefCell::new(state) }
    }
}

impl Fake {
    /// Starts a child of this process, in its group: a zygote or a worker.
    pub(crate) fn start(&self) -> Pid {
        self.state.borrow_mut().start()
    }

    /// Starts a child of another process, as leader of a group: a program, or a neighbour.
    pub(crate) fn start_under(&self, parent: Pid) -> Pid {
        let mut state = self.state.borrow_mut();
        let pid = state.number();
        state.insert(pid, parent, pid);
        pid
    }

    /// Makes a process of this number a child of this one.
    pub(crate) fn start_as(&self, pid: Pid) {
        self.state.borrow_mut().insert(pid, OWN, OWN);
    }

    /// Makes a process of this number, outside of this process' descendants.
    pub(crate) fn start_outside(&self, pid: Pid) {
        self.state.borrow_mut().insert(pid, OUTSIDE, pid);
    }

    /// Reaps a process as its parent does, and gives its number to another parent's new process.
    pub(crate) fn reuse(&self, pid: Pid, parent: Pid, group: Pid) {
        let mut state = self.state.borrow_mut();
        state.processes.remove(&pid);
        state.insert(pid, parent, group);
    }

    /// Lets all threads of a process begin to end: its children become this process'.
    pub(crate) fn leave(&self, pid: Pid) {
        self.state.borrow_mut().leave(pid);
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
        self.state.borrow().processes.get(&pid).is_some_and(|entry| entry.status.is_none())
    }

    /// Returns whether a process has ended and isn't reaped.
    pub(crate) fn any_ended(&self) -> bool {
        self.ended(None).is_some()
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
        assert!(state.is_child(pid), "{pid} is no child, or was reaped");
        state.end(pid, WaitStatus::Signaled(pid, signal, false));
    }

    fn signal_group(&self, group: Pid, signal: Signal) -> bool {
        let exists = self.group_exists(group);
        let mut state = self.state.borrow_mut();
        state.signals.push((group, signal));
        assert!(state.is_child(group), "{group} is no child, or was reaped");
        state.end(group, WaitStatus::Signaled(group, signal, false));
        exists
    }

    fn group_exists(&self, group: Pid) -> bool {
        self.state.borrow().processes.values().any(|entry| entry.group == group)
    }

    fn ended(&self, of: Option<Pid>) -> Option<Pid> {
        let state = self.state.borrow();
        match of {
            Some(pid) => state.has_ended(pid).then_some(pid),
            None => state.processes.keys().copied().find(|&pid| state.has_ended(pid)),
        }
    }

    fn reap(&self, pid: Pid) -> Option<WaitStatus> {
        let mut state = self.state.borrow_mut();
        let status = state.processes.get(&pid)?.status?;
        state.processes.remove(&pid);
        Some(status)
    }

    fn is_child(&self, pid: Pid) -> bool {
        self.state.borrow().is_child(pid)
    }

    fn identify(&self, pid: Pid) -> io::Result<Option<Identity>> {
        let state = self.state.borrow();
        Ok(state.processes.get(&pid).map(|entry| {
            let Entry { parent, group, ending, started, status } = *entry;
            let process = Process { pid, parent, group, alive: status.is_none() };
            Identity { process, session: OWN, ending, started }
        }))
    }

    fn usage(&self, _: Pid) -> Option<Usage> {
        None
    }

    fn processes(&self) -> io::Result<Vec<Process>> {
        let pids: Vec<Pid> = self.state.borrow().processes.keys().copied().collect();
        let found = pids.into_iter().filter_map(|pid| self.identify(pid).transpose());
        found.map(|found| found.map(|identity| identity.process)).collect()
    }

    fn role(&self, _: Process, _: &HashSet<JobId>) -> Role {
        Role::Other
    }

    fn own_pid(&self) -> Pid {
        OWN
    }

    fn own_group(&self) -> Pid {
        OWN
    }

    fn descriptor_limit(&self) -> u64 {
        65_536
    }
}
