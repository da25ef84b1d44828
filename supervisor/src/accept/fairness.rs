//! Whose connection goes next. Pure.
//!
//! A client is a uid or an IP address. Connections that are ready to be served
//! wait here, per client in the order of their arrival; when a credit is free,
//! the waiting client with the fewest jobs goes first, and among equals the one
//! that was served longest ago. A client never holds more jobs than its cap, so
//! one site's flood leaves credits for the others.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use crate::ids::JobId;
use qrelay_shared::ipc::message::Peer;

/// Whom credits are counted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Client {
    /// All processes of a user.
    Uid(u32),
    /// An address.
    Ip(IpAddr),
}

impl From<Peer> for Client {
    fn from(peer: Peer) -> Self {
        match peer {
            Peer::Local { uid, .. } => Self::Uid(uid),
            Peer::Remote(address) => Self::Ip(address),
        }
    }
}

#[derive(Debug, Default)]
struct Account {
    jobs: usize,
    waiting: VecDeque<JobId>,
    /// When it was last served, as a count of services.
    turn: u64,
}

/// A client's place in the order: its jobs, its turn, itself.
type Place = (usize, u64, Client);

impl Account {
    /// Only who waits has one.
    fn place(&self, client: Client) -> Option<Place> {
        (!self.waiting.is_empty()).then_some((self.jobs, self.turn, client))
    }
}

/// The waiting connections and everybody's share of the credits.
#[derive(Debug, Default)]
pub struct Fairness {
    accounts: BTreeMap<Client, Account>,
    /// The clients with waiting connections, next one first.
    order: BTreeSet<Place>,
    waiting: usize,
    turns: u64,
}

impl Fairness {
    /// A connection of `client` is ready and waits for a credit.
    pub fn wait(&mut self, client: Client, job: JobId) {
        self.change(client, |account| account.waiting.push_back(job));
        self.waiting += 1;
    }

    /// As [`Self::wait`], before all others of this client: it could not be dispatched.
    pub fn wait_first(&mut self, client: Client, job: JobId) {
        self.change(client, |account| account.waiting.push_front(job));
        self.waiting += 1;
    }

    /// Takes the connection that goes next, unless all who wait hold `cap` jobs.
    /// It counts as a job until [`Self::finished`].
    pub fn next(&mut self, cap: usize) -> Option<(Client, JobId)> {
        let &(jobs, _, client) = self.order.first()?;
        if jobs >= cap.max(1) {
            return None;
        }
        self.turns += 1;
        let turn = self.turns;
        let mut taken = None;
        self.change(client, |account| {
            taken = account.waiting.pop_front();
            account.jobs += 1;
            account.turn = turn;
        });
        self.waiting -= 1;
        taken.map(|job| (client, job))
    }

    /// Counts a job that was dispatched without having waited.
    pub fn started(&mut self, client: Client) {
        self.change(client, |account| account.jobs += 1);
    }

    /// A job of `client` is done.
    pub fn finished(&mut self, client: Client) {
        self.change(client, |account| account.jobs = account.jobs.saturating_sub(1));
    }

    /// Takes a waiting connection out, if it is there.
    pub fn forget(&mut self, client: Client, job: JobId) {
        let mut found = 0;
        self.change(client, |account| {
            let before = account.waiting.len();
            account.waiting.retain(|&other| other != job);
            found = before - account.waiting.len();
        });
        self.waiting -= found;
    }

    /// How many connections wait.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Changes an account and keeps its place in the order right.
    fn change(&mut self, client: Client, change: impl FnOnce(&mut Account)) {
        let account = self.accounts.entry(client).or_default();
        let before = account.place(client);
        change(account);
        let place = account.place(client);
        if place.is_none() && account.jobs == 0 {
            self.accounts.remove(&client);
        }
        if place != before {
            before.map(|before| self.order.remove(&before));
            self.order.extend(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Client = Client::Uid(1);
    const B: Client = Client::Uid(2);

    fn drain(fairness: &mut Fairness, cap: usize) -> Vec<u64> {
        std::iter::from_fn(|| fairness.next(cap)).map(|(_, job)| job.0).collect()
    }

    #[test]
    fn fewest_jobs_first_then_round_robin() {
        let mut fairness = Fairness::default();
        (1..=3).for_each(|job| fairness.wait(A, JobId(job)));
        (11..=13).for_each(|job| fairness.wait(B, JobId(job)));
        fairness.started(A);
        assert_eq!(drain(&mut fairness, 9), [11, 1, 12, 2, 13, 3]);
        assert_eq!(fairness.waiting(), 0);
    }

    #[test]
    fn the_cap_leaves_credits_for_others() {
        let mut fairness = Fairness::default();
        (1..=5).for_each(|job| fairness.wait(A, JobId(job)));
        assert_eq!(drain(&mut fairness, 2), [1, 2]);
        fairness.wait(B, JobId(11));
        assert_eq!(drain(&mut fairness, 2), [11]);
        fairness.finished(A);
        assert_eq!(drain(&mut fairness, 2), [3]);
    }

    #[test]
    fn forgetting_and_returning() {
        let mut fairness = Fairness::default();
        (1..=3).for_each(|job| fairness.wait(A, JobId(job)));
        fairness.forget(A, JobId(2));
        fairness.forget(A, JobId(99));
        assert_eq!(fairness.next(9), Some((A, JobId(1))));
        fairness.finished(A);
        fairness.wait_first(A, JobId(1));
        assert_eq!(drain(&mut fairness, 9), [1, 3]);
        fairness.finished(A);
        fairness.finished(A);
        assert!(fairness.accounts.is_empty() && fairness.order.is_empty());
    }
}
