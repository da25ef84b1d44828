//! Whose connection goes next. Pure.
//!
//! Connections that are ready to be served wait here, per client in the order of their arrival.
//! When a credit is free, the waiting client with the fewest jobs goes first, and among equals the
//! client that was served longest ago. A client never holds more jobs than its cap, which shrinks
//! as credits become scarce: however many clients take all they can, some credits stay free.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use qrelay_shared::client::Client;

use crate::ids::JobId;

#[derive(Debug, Default)]
struct Account {
    jobs: usize,
    waiting: VecDeque<JobId>,
    /// When it was last served, as a count of services.
    turn: u64,
}

/// The sort key of a client: number of jobs, turn, client.
type Place = (usize, u64, Client);

impl Account {
    /// Returns the client's place in the order; `None` if the client has no waiting connection.
    fn place(&self, client: Client) -> Option<Place> {
        (!self.waiting.is_empty()).then_some((self.jobs, self.turn, client))
    }
}

/// The waiting connections, and how many jobs each client holds.
#[derive(Debug, Default)]
pub(crate) struct Fairness {
    accounts: BTreeMap<Client, Account>,
    /// The clients with waiting connections, next one first.
    order: BTreeSet<Place>,
    waiting: usize,
    turns: u64,
}

impl Fairness {
    /// Appends a connection to those of its client.
    pub(crate) fn wait(&mut self, client: Client, job: JobId) {
        self.change(client, |account| account.waiting.push_back(job));
        self.waiting += 1;
    }

    /// Puts a connection that could not be dispatched before its client's others.
    pub(crate) fn wait_first(&mut self, client: Client, job: JobId) {
        self.change(client, |account| account.waiting.push_front(job));
        self.waiting += 1;
    }

    /// Takes the connection that goes next; `None` if every waiting client holds `cap` jobs. The
    /// connection counts as a job until [`Self::finished`].
    pub(crate) fn next(&mut self, cap: usize) -> Option<(Client, JobId)> {
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
    pub(crate) fn started(&mut self, client: Client) {
        self.change(client, |account| account.jobs += 1);
    }

    /// Counts a job of `client` as over.
    pub(crate) fn finished(&mut self, client: Client) {
        self.change(client, |account| account.jobs = account.jobs.saturating_sub(1));
    }

    /// Removes a waiting connection, if there is such a one.
    pub(crate) fn forget(&mut self, client: Client, job: JobId) {
        let mut found = None;
        self.change(client, |account| {
            // A connection that gives way to others is among the last ones.
            let at = account.waiting.iter().rposition(|&other| other == job);
            found = at.and_then(|at| account.waiting.remove(at));
        });
        self.waiting -= usize::from(found.is_some());
    }

    /// Returns how many connections wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Changes an account and moves it to its new place in the order.
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
impl Fairness {
    /// Returns the connections that wait.
    pub(super) fn waiting_jobs(&self) -> impl Iterator<Item = JobId> {
        self.accounts.values().flat_map(|account| account.waiting.iter().copied())
    }

    /// Panics if what is counted twice doesn't agree.
    pub(super) fn assert_consistent(&self, jobs: usize) {
        assert_eq!(self.waiting, self.waiting_jobs().count());
        assert_eq!(jobs, self.accounts.values().map(|account| account.jobs).sum::<usize>());
        let places = self.accounts.iter().filter_map(|(&client, account)| account.place(client));
        assert_eq!(self.order, places.collect());
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
