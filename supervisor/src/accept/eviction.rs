//! Which connections give way when too many are held. Pure.
//!
//! A connection is held until a worker has it. Always the client that holds most loses one, so that
//! no client shuts out the others. Of that client's connections, one that is answered already gives
//! way first; then the one that has been silent for longest; then, of those that wait for a worker,
//! the one that came last, because the others are nearer to their turn.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use qrelay_shared::client::Client;

use crate::ids::JobId;

/// What a client would lose with a held connection, least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Worth {
    /// The client has its answer.
    Answered,
    /// The client has sent nothing.
    Silent,
    /// The client waits for a worker.
    Waits,
}

/// A held connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    /// The connection. Later connections have higher numbers.
    pub(super) job: JobId,
    /// Whose connection it is.
    pub(super) client: Client,
    /// What the client would lose.
    pub(super) worth: Worth,
}

impl Held {
    /// Sorts the connections of one client: what gives way first comes last.
    fn place(&self) -> (Reverse<Worth>, Reverse<u64>) {
        let JobId(number) = self.job;
        match self.worth {
            Worth::Answered | Worth::Silent => (Reverse(self.worth), Reverse(number)),
            Worth::Waits => (Reverse(self.worth), Reverse(u64::MAX - number)),
        }
    }
}

/// Chooses `count` connections that give way, or all if there are fewer.
pub(super) fn choose(held: impl Iterator<Item = Held>, count: usize) -> Vec<Held> {
    let mut clients: BTreeMap<Client, Vec<Held>> = BTreeMap::new();
    for connection in held {
        clients.entry(connection.client).or_default().push(connection);
    }
    let mut largest = BinaryHeap::new();
    for (client, connections) in &mut clients {
        connections.sort_unstable_by_key(Held::place);
        largest.push((connections.len(), *client));
    }
    let mut chosen = Vec::with_capacity(count);
    while chosen.len() < count
        && let Some((_, client)) = largest.pop()
        && let Some(connections) = clients.get_mut(&client)
    {
        chosen.extend(connections.pop());
        if !connections.is_empty() {
            largest.push((connections.len(), client));
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Client = Client::Uid(1);
    const B: Client = Client::Uid(2);
    const C: Client = Client::Uid(3);

    fn jobs(held: &[(u64, Client, Worth)], count: usize) -> Vec<u64> {
        let held = held.iter().map(|&(job, client, worth)| Held { job: JobId(job), client, worth });
        choose(held, count).iter().map(|chosen| chosen.job.0).collect()
    }

    #[test]
    fn the_largest_holder_gives_way() {
        use Worth::Silent;
        let held = [
            (1, A, Silent),
            (2, B, Silent),
            (3, B, Silent),
            (4, B, Silent),
            (5, C, Silent),
            (6, C, Silent),
        ];
        assert_eq!(jobs(&held, 1), [2]);
        let mut three = jobs(&held, 3);
        three.sort_unstable();
        assert_eq!(three, [2, 3, 5], "down to one for each");
        assert_eq!(jobs(&held, 9).len(), 6, "all");
        assert!(jobs(&[], 3).is_empty());
    }

    #[test]
    fn what_is_worth_least_gives_way_first() {
        use Worth::{Answered, Silent, Waits};
        let held = [
            (1, A, Waits),
            (2, A, Silent),
            (3, A, Answered),
            (4, A, Waits),
            (5, A, Silent),
            (6, A, Answered),
        ];
        assert_eq!(jobs(&held, 6), [3, 6, 2, 5, 4, 1]);
    }
}
