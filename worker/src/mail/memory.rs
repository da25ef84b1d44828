//! The bound on memory for messages (`mail_memory`).
//!
//! Contract: a request that outgrows its thread's own buffer takes memory piece by piece, as its
//! bytes arrive, and gives all of it back when the mail is finished. No client takes more than its
//! share (`client_share`) of what is free. What a client has announced counts only against the
//! client itself: as many of its requests begin as fit into its share, one after the other, so that
//! its share isn't spread over requests of which none can be completed.
//!
//! A request waits for memory while it holds some, so two rules keep requests from waiting for each
//! other for ever. Of each client's requests, the oldest that isn't complete takes what is free,
//! whatever the share. And the oldest of all goes on even beyond the bound if no complete mail has
//! memory to give back. So the bound is exceeded by one message at most.
//!
//! Large buffers of finished mails are kept for the next requests ([`Kept`]), in memory that no
//! request needs: kept buffers are freed as soon as they and what requests hold exceed the bound,
//! so no request waits because of one. Kept buffers add little to what requests hold, or are few
//! ([`KEPT_PART`], [`KEPT_MORE`]). A request that gets such a buffer takes all of the buffer's
//! memory at once, within its client's share. Bytes that had arrived were in it before, so what is
//! only announced still takes nothing from anybody.
//!
//! # Failure
//! A thread that waits until its deadline gets nothing.

use std::collections::BTreeMap;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use qrelay_shared::client::{Client, Share};
use qrelay_shared::deadline::Deadline;

use crate::mail::kept::Kept;

/// The part of the bound up to which memory is kept: with the defaults three of the largest mails.
const KEPT_PART: usize = 10;

/// The part of what requests have that may be kept in any case.
const KEPT_MORE: usize = 8;

/// The memory of a worker for messages.
#[derive(Debug)]
pub(crate) struct Budget {
    memory: Mutex<Memory>,
    changed: Condvar,
}

/// What requests hold, and what nobody holds.
#[derive(Debug)]
struct Memory {
    ledger: Ledger,
    kept: Kept,
}

/// The memory of one request; dropping it gives all of it back.
#[derive(Debug)]
pub(crate) struct Holding<'a> {
    budget: &'a Budget,
    number: u64,
}

impl Budget {
    /// A budget of `limit` bytes, of which one client takes `share` at most.
    pub(crate) fn new(limit: usize, share: Share) -> Self {
        let ledger = Ledger { limit, share, used: 0, accounts: BTreeMap::new(), last: 0 };
        let memory = Memory { ledger, kept: Kept::default() };
        Self { memory: Mutex::new(memory), changed: Condvar::new() }
    }

    /// Begins to count for a request of `client`, which has announced `total` bytes and holds
    /// nothing yet.
    pub(crate) fn open(&self, client: Client, total: usize) -> Holding<'_> {
        Holding { budget: self, number: self.memory.lock().ledger.open(client, total) }
    }

    /// Keeps the buffer of a finished mail for another one. How much is kept is decided when the
    /// mail's holding is dropped, because the memory counts as held until then.
    pub(crate) fn keep(&self, buffer: Vec<u8>) {
        self.memory.lock().kept.push(buffer, Instant::now());
    }

    /// Frees the kept buffers that nobody has used for a while. Waits for no lock: if another
    /// thread has it, the next call does.
    pub(crate) fn tidy(&self) {
        let given = self.memory.try_lock().map(|mut memory| memory.trim(Instant::now()));
        drop(given);
    }
}

impl Memory {
    /// Returns how much memory kept buffers may have: so much that requests and kept buffers
    /// together have a small part of the bound, or a little more than what requests need.
    fn room(&self) -> usize {
        let Ledger { limit, used, .. } = self.ledger;
        let room = (limit / KEPT_PART).saturating_sub(used).max(used / KEPT_MORE);
        room.min(limit.saturating_sub(used))
    }

    /// Takes out the kept buffers that are to be freed.
    fn trim(&mut self, now: Instant) -> Vec<Vec<u8>> {
        self.kept.trim(self.room(), now)
    }
}

impl Holding<'_> {
    /// Takes `bytes` more, waiting for them until the deadline. Returns whether they were had.
    pub(crate) fn grow(&self, bytes: usize, deadline: Deadline) -> bool {
        let mut memory = self.budget.memory.lock();
        while !memory.ledger.grow(self.number, bytes) {
            if self.budget.changed.wait_until(&mut memory, deadline.instant()).timed_out() {
                return false;
            }
        }
        let given = memory.trim(Instant::now());
        drop(memory);
        drop(given);
        true
    }

    /// Takes a kept buffer with room for a request of `total` bytes, and its memory, if there is
    /// such a buffer and the request may take so much now.
    pub(crate) fn kept(&self, total: usize) -> Option<Vec<u8>> {
        let mut memory = self.budget.memory.lock();
        let capacity = memory.kept.fitting(total)?;
        if !memory.ledger.grow(self.number, capacity) {
            return None;
        }
        memory.kept.take(capacity)
    }

    /// Notes that the request is complete: it takes no more, and gives back what it has as soon as
    /// its mail is finished.
    pub(crate) fn complete(&self) {
        self.budget.memory.lock().ledger.complete(self.number);
        self.budget.changed.notify_all();
    }
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        let mut memory = self.budget.memory.lock();
        memory.ledger.close(self.number);
        let given = memory.trim(Instant::now());
        drop(memory);
        self.budget.changed.notify_all();
        drop(given);
    }
}

/// What each request holds. Pure.
#[derive(Debug)]
struct Ledger {
    limit: usize,
    share: Share,
    used: usize,
    /// By their numbers, oldest first.
    accounts: BTreeMap<u64, Account>,
    last: u64,
}

/// What one request holds.
#[derive(Debug)]
struct Account {
    client: Client,
    /// The announced size.
    total: usize,
    bytes: usize,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its client has no room for it.
    Waits,
    /// Takes bytes as they arrive.
    Grows,
    /// Has all of its bytes.
    Complete,
}

impl Ledger {
    fn open(&mut self, client: Client, total: usize) -> u64 {
        self.last += 1;
        self.accounts.insert(self.last, Account { client, total, bytes: 0, state: State::Waits });
        self.last
    }

    /// Takes bytes for a request, if that is possible now.
    fn grow(&mut self, number: u64, bytes: usize) -> bool {
        let allowed = self.may_begin(number) && self.may_take(number, bytes);
        if let Some(account) = self.accounts.get_mut(&number).filter(|_| allowed) {
            account.state = State::Grows;
            account.bytes += bytes;
            self.used += bytes;
        }
        allowed
    }

    fn of(&self, client: Client) -> impl Iterator<Item = (&u64, &Account)> {
        self.accounts.iter().filter(move |(_, account)| account.client == client)
    }

    /// Returns whether a request has begun, or may begin: after its client's earlier ones, and if
    /// those that have begun leave room in the client's share.
    fn may_begin(&self, number: u64) -> bool {
        let Some(account) = self.accounts.get(&number) else { return false };
        if account.state != State::Waits {
            return true;
        }
        let mut own = self.of(account.client);
        let next = own.find(|(_, other)| other.state == State::Waits);
        let (mut begun, mut held) = (0, 0);
        for (_, other) in self.of(account.client).filter(|(_, o)| o.state != State::Waits) {
            begun += other.total;
            held += other.bytes;
        }
        let others = self.used - held;
        let room = self.share.of(self.limit.saturating_sub(others));
        next.is_some_and(|(&next, _)| next == number)
            && (begun == 0 || begun.saturating_add(account.total) <= room)
    }

    /// Returns whether a request that has begun may take so many bytes more now.
    fn may_take(&self, number: u64, bytes: usize) -> bool {
        let Some(account) = self.accounts.get(&number) else { return false };
        let incomplete = |(_, a): &(&u64, &Account)| a.state != State::Complete;
        match self.limit.saturating_sub(self.used).checked_sub(bytes) {
            Some(rest) => {
                let held: usize = self.of(account.client).map(|(_, own)| own.bytes).sum();
                let oldest = self.of(account.client).find(incomplete);
                held + bytes <= self.share.cap(rest) || oldest.is_some_and(|(&o, _)| o == number)
            }
            None => {
                let oldest = self.accounts.iter().find(incomplete);
                let mut complete = self.accounts.values().filter(|a| a.state == State::Complete);
                oldest.is_some_and(|(&o, _)| o == number) && complete.all(|a| a.bytes == 0)
            }
        }
    }

    fn complete(&mut self, number: u64) {
        if let Some(account) = self.accounts.get_mut(&number) {
            account.state = State::Complete;
        }
    }

    fn close(&mut self, number: u64) {
        if let Some(account) = self.accounts.remove(&number) {
            self.used -= account.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const A: Client = Client::Uid(1);
    const B: Client = Client::Uid(2);
    const C: Client = Client::Uid(3);

    fn ledger(limit: usize) -> Ledger {
        Ledger { limit, share: Share::new(0.75), used: 0, accounts: BTreeMap::new(), last: 0 }
    }

    /// Lets a client's new requests take `bytes` each until one isn't allowed to. Returns those
    /// that took some.
    fn fill(ledger: &mut Ledger, client: Client, bytes: usize) -> Vec<u64> {
        let mut holders = Vec::new();
        loop {
            let number = ledger.open(client, bytes);
            if !ledger.grow(number, bytes) {
                ledger.close(number);
                return holders;
            }
            holders.push(number);
        }
    }

    #[test]
    fn a_client_leaves_some_for_others() {
        let mut ledger = ledger(100);
        assert_eq!(fill(&mut ledger, A, 1).len(), 75);
        assert_eq!(fill(&mut ledger, B, 1).len(), 18);
        assert_eq!(fill(&mut ledger, C, 1).len(), 5);
    }

    #[test]
    fn what_is_announced_counts_against_its_own_client() {
        let mut ledger = ledger(100);
        let requests: Vec<_> = (0..4).map(|_| ledger.open(A, 30)).collect();
        assert!(ledger.grow(requests[0], 1) && ledger.grow(requests[1], 1));
        assert!(!ledger.grow(requests[2], 1), "only two fit into three quarters");
        let other = ledger.open(B, 20);
        assert!(ledger.grow(other, 20));
        ledger.close(requests[0]);
        assert!(!ledger.grow(requests[3], 1), "it isn't its turn");
        assert!(ledger.grow(requests[2], 1));
    }

    #[test]
    fn the_oldest_request_of_a_client_gets_what_is_free() {
        let mut ledger = ledger(100);
        let holders = fill(&mut ledger, A, 1);
        assert!(!ledger.grow(holders[1], 10));
        assert!(ledger.grow(holders[0], 25), "all that is free");
        let other = ledger.open(B, 1);
        assert!(!ledger.grow(other, 1), "not the oldest of all");
        assert!(ledger.grow(holders[0], 50), "beyond the bound, because nothing will come back");
        ledger.complete(holders[0]);
        assert!(!ledger.grow(holders[1], 1), "the complete mail will give its memory back");
        ledger.close(holders[0]);
        assert!(ledger.grow(holders[1], 1));
        for holder in holders {
            ledger.close(holder);
        }
        assert_eq!(ledger.used, 0);
    }

    /// Requests of several clients that all begin at once, need more together than there is, and
    /// come to their ends in any order.
    #[test]
    fn requests_never_wait_for_each_other() {
        for (size, clients, limit) in [(16, 1, 100), (16, 5, 100), (99, 3, 100), (200, 4, 100)] {
            let mut ledger = ledger(limit);
            let mut open: Vec<(u64, usize)> =
                (0..40).map(|i| (ledger.open(Client::Uid(i % clients), size), 0)).collect();
            let mut highest = 0;
            while !open.is_empty() {
                let before = open.clone();
                for (number, bytes) in &mut open {
                    if ledger.grow(*number, 1) {
                        *bytes += 1;
                    }
                    if *bytes == size {
                        ledger.complete(*number);
                    }
                }
                highest = highest.max(ledger.used);
                let (done, rest) = open.iter().partition(|(_, bytes)| *bytes == size);
                assert!(before != rest, "nobody gets on: {size} {clients} {before:?}");
                let done: Vec<_> = done;
                done.iter().for_each(|&(number, _)| ledger.close(number));
                open = rest;
            }
            assert!(highest <= limit + size, "{highest} of {limit}");
            assert_eq!(ledger.used, 0);
        }
    }

    #[test]
    fn a_thread_waits_until_memory_is_given_back() {
        let budget = Budget::new(100, Share::new(0.75));
        let late = Deadline::after(Duration::from_secs(10));
        let soon = || Deadline::after(Duration::from_millis(5));
        let first = budget.open(A, 100);
        assert!(first.grow(100, soon()));
        first.complete();
        let second = budget.open(B, 10);
        assert!(!second.grow(10, soon()));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| second.grow(10, late));
            drop(first);
            assert!(waits.join().expect("joins"));
        });
        drop(second);
        assert_eq!(budget.memory.lock().ledger.used, 0);
    }

    #[test]
    fn a_kept_buffer_takes_memory_from_nobody() {
        let budget = Budget::new(1200, Share::new(1.0));
        let soon = || Deadline::after(Duration::from_millis(5));
        let kept = || budget.memory.lock().kept.fitting(100);
        let first = budget.open(A, 100);
        assert!(first.kept(100).is_none() && first.grow(100, soon()));
        first.complete();
        budget.keep(vec![b'x'; 100]);
        drop(first);
        assert_eq!(kept(), Some(100));
        let second = budget.open(B, 60);
        let buffer = second.kept(60).expect("a buffer");
        assert!(buffer.is_empty() && buffer.capacity() == 100 && kept().is_none());
        assert_eq!(budget.memory.lock().ledger.used, 100, "all of its memory");
        budget.keep(buffer);
        assert!(second.grow(1000, soon()) && kept().is_some(), "there is room for both");
        assert!(second.grow(1, soon()) && kept().is_none(), "the request goes first");
        drop(second);
        assert_eq!(budget.memory.lock().ledger.used, 0);
    }

    #[test]
    fn a_request_gets_a_kept_buffer_only_within_its_share() {
        let budget = Budget::new(1200, Share::new(0.75));
        let soon = || Deadline::after(Duration::from_millis(5));
        let first = budget.open(A, 850);
        assert!(first.grow(850, soon()));
        budget.keep(vec![b'x'; 100]);
        assert!(budget.open(A, 100).kept(100).is_none());
        assert!(budget.open(B, 100).kept(100).is_some());
    }

    #[test]
    fn kept_buffers_add_little_to_what_requests_have() {
        let budget = Budget::new(1200, Share::new(1.0));
        let soon = || Deadline::after(Duration::from_millis(5));
        for (used, expected) in [(0, 120), (60, 60), (90, 30), (400, 50), (1180, 20), (1200, 0)] {
            let request = budget.open(A, used);
            assert!(request.grow(used, soon()));
            assert_eq!(budget.memory.lock().room(), expected, "{used}");
        }
    }
}
