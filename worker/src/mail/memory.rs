//! The bound on memory for messages (`mail_memory`).
//!
//! Contract: a request that outgrows its thread's own buffer takes memory piece by piece, as its
//! bytes arrive, and gives all of it back when the mail is finished. What a client has announced
//! costs nobody anything. No client takes more than its share (`client_share`) of what is free.
//!
//! A request waits for memory while it holds some, so two rules keep requests from waiting for each
//! other for ever. Of each client's requests, the oldest that isn't complete takes what is free,
//! whatever the share. And the oldest of all goes on even beyond the bound if no complete mail has
//! memory to give back. So the bound is exceeded by one message at most.
//!
//! # Failure
//! A thread that waits until its deadline gets nothing.

use std::collections::BTreeMap;

use parking_lot::{Condvar, Mutex};
use qrelay_shared::client::{Client, Share};
use qrelay_shared::deadline::Deadline;

/// The memory of a worker for messages.
#[derive(Debug)]
pub(crate) struct Budget {
    ledger: Mutex<Ledger>,
    changed: Condvar,
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
        Self { ledger: Mutex::new(ledger), changed: Condvar::new() }
    }

    /// Begins to count for a request of `client`, which holds nothing yet.
    pub(crate) fn open(&self, client: Client) -> Holding<'_> {
        Holding { budget: self, number: self.ledger.lock().open(client) }
    }
}

impl Holding<'_> {
    /// Takes `bytes` more, waiting for them until the deadline. Returns whether they were had.
    pub(crate) fn grow(&self, bytes: usize, deadline: Deadline) -> bool {
        let mut ledger = self.budget.ledger.lock();
        while !ledger.grow(self.number, bytes) {
            if self.budget.changed.wait_until(&mut ledger, deadline.instant()).timed_out() {
                return false;
            }
        }
        true
    }

    /// Notes that the request is complete: it takes no more, and gives back what it has as soon as
    /// its mail is finished.
    pub(crate) fn complete(&self) {
        self.budget.ledger.lock().complete(self.number);
        self.budget.changed.notify_all();
    }
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        self.budget.ledger.lock().close(self.number);
        self.budget.changed.notify_all();
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
    bytes: usize,
    complete: bool,
}

impl Ledger {
    fn open(&mut self, client: Client) -> u64 {
        self.last += 1;
        self.accounts.insert(self.last, Account { client, bytes: 0, complete: false });
        self.last
    }

    fn grow(&mut self, number: u64, bytes: usize) -> bool {
        let allowed = self.allows(number, bytes);
        if let Some(account) = self.accounts.get_mut(&number).filter(|_| allowed) {
            account.bytes += bytes;
            self.used += bytes;
        }
        allowed
    }

    /// Returns whether a request may take so many bytes more now.
    fn allows(&self, number: u64, bytes: usize) -> bool {
        let Some(client) = self.accounts.get(&number).map(|account| account.client) else {
            return false;
        };
        let is_oldest = |of: &dyn Fn(&Account) -> bool| {
            let mut reading = self.accounts.iter().filter(|(_, a)| !a.complete && of(a));
            reading.next().is_some_and(|(&oldest, _)| oldest == number)
        };
        match self.limit.saturating_sub(self.used).checked_sub(bytes) {
            Some(rest) => {
                let own = self.accounts.values().filter(|account| account.client == client);
                let held: usize = own.map(|account| account.bytes).sum();
                held + bytes <= self.share.cap(rest) || is_oldest(&|a| a.client == client)
            }
            None => {
                let returns = self.accounts.values().any(|a| a.complete && a.bytes > 0);
                !returns && is_oldest(&|_| true)
            }
        }
    }

    fn complete(&mut self, number: u64) {
        if let Some(account) = self.accounts.get_mut(&number) {
            account.complete = true;
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
            let number = ledger.open(client);
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
    fn the_oldest_request_of_a_client_gets_what_is_free() {
        let mut ledger = ledger(100);
        let holders = fill(&mut ledger, A, 1);
        assert!(!ledger.grow(holders[1], 10));
        assert!(ledger.grow(holders[0], 25), "all that is free");
        let other = ledger.open(B);
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
                (0..40).map(|i| (ledger.open(Client::Uid(i % clients)), 0)).collect();
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
        let first = budget.open(A);
        assert!(first.grow(100, soon()));
        first.complete();
        let second = budget.open(B);
        assert!(!second.grow(10, soon()));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| second.grow(10, late));
            drop(first);
            assert!(waits.join().expect("joins"));
        });
        drop(second);
        assert_eq!(budget.ledger.lock().used, 0);
    }
}
