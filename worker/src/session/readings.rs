//! The requests that threads wait for, and which of them gives way to another.
//!
//! A request that is being read holds one of the worker's credits, for as long as its client likes
//! to take. So when one more begins while such requests hold half of the credits, the client with
//! the most of them loses its slowest one. A request gives way only after [`GRACE`], because the
//! requests of a burst would end each other otherwise. A client that begins requests again and
//! again within that time has nothing that could give way, and nobody with less gives way to it:
//! then such requests hold more than half of the credits, up to the client's `client_share`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use qrelay_shared::client::Client;
use qrelay_shared::sys::rights::PeerSocket;

/// How long a request may take in any case.
const GRACE: Duration = Duration::from_secs(1);

/// The requests that threads wait for.
#[derive(Debug)]
pub(crate) struct Readings {
    limit: usize,
    all: Mutex<Vec<Arc<State>>>,
}

/// A request that a thread waits for, until it is dropped.
#[derive(Debug)]
pub(crate) struct Reading<'r> {
    readings: &'r Readings,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    client: Client,
    socket: Arc<PeerSocket>,
    since: Instant,
    received: AtomicUsize,
    gives_way: AtomicBool,
}

impl Readings {
    /// Starts without requests. The worker serves at most `connections` clients at a time.
    pub(crate) fn new(connections: usize) -> Self {
        Self { limit: (connections / 2).max(1), all: Mutex::default() }
    }

    /// Adds a request, if need be in place of another one.
    pub(crate) fn begin(&self, client: Client, socket: &Arc<PeerSocket>) -> Reading<'_> {
        let state = Arc::new(State {
            client,
            socket: Arc::clone(socket),
            since: Instant::now(),
            received: AtomicUsize::new(0),
            gives_way: AtomicBool::new(false),
        });
        let mut all = self.all.lock();
        if all.len() >= self.limit {
            let paces: Vec<_> = all.iter().map(|state| state.pace()).collect();
            if let Some(at) = choose(&paces) {
                let slowest = all.swap_remove(at);
                slowest.gives_way.store(true, Ordering::Relaxed);
                slowest.socket.end_input();
            }
        }
        all.push(Arc::clone(&state));
        Reading { readings: self, state }
    }
}

impl Reading<'_> {
    /// Notes how many bytes the client has sent while it was waited for.
    pub(crate) fn received(&self, bytes: usize) {
        self.state.received.store(bytes, Ordering::Relaxed);
    }

    /// Returns whether the request has given way to another, so that its input has ended.
    pub(crate) fn gives_way(&self) -> bool {
        self.state.gives_way.load(Ordering::Relaxed)
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.readings.all.lock().retain(|state| !Arc::ptr_eq(state, &self.state));
    }
}

impl State {
    fn pace(&self) -> Pace {
        let age = self.since.elapsed();
        let received = self.received.load(Ordering::Relaxed) as f64;
        Pace { client: self.client, age, rate: received / age.as_secs_f64() }
    }
}

/// How fast a request comes.
#[derive(Debug, Clone, Copy)]
struct Pace {
    client: Client,
    age: Duration,
    /// Bytes per second.
    rate: f64,
}

/// Chooses a request that gives way: of those that are old enough, the slowest one of the client
/// that has most. If that client has less than its part of all requests, nobody gives way: others
/// have more, and begin again and again before theirs are old enough. Pure.
fn choose(paces: &[Pace]) -> Option<usize> {
    let mut counts = BTreeMap::<Client, usize>::new();
    for pace in paces {
        *counts.entry(pace.client).or_default() += 1;
    }
    let of = |pace: &Pace| counts.get(&pace.client).copied().unwrap_or_default();
    let old = || paces.iter().enumerate().filter(|(_, pace)| pace.age >= GRACE);
    let most = old().map(|(_, pace)| of(pace)).max()?;
    if most * counts.len() < paces.len() {
        return None;
    }
    let slower = |a: &(usize, &Pace), b: &(usize, &Pace)| a.1.rate.total_cmp(&b.1.rate);
    old().filter(|(_, pace)| of(pace) == most).min_by(slower).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrelay_shared::sys::rights::Rights;
    use std::os::unix::net::UnixStream;

    const A: Client = Client::Uid(1);
    const B: Client = Client::Uid(2);
    const C: Client = Client::Uid(3);

    #[test]
    fn the_slowest_of_the_client_with_most_gives_way() {
        let pace = |client, rate| Pace { client, rate, age: GRACE };
        let young = |client, rate| Pace { age: Duration::ZERO, ..pace(client, rate) };
        assert_eq!(choose(&[]), None);
        assert_eq!(choose(&[young(A, 5.0), young(B, 1.0)]), None);
        assert_eq!(choose(&[pace(A, 5.0), young(A, 1.0), pace(B, 1.0)]), Some(0));
        assert_eq!(choose(&[pace(A, 5.0), pace(B, 1.0), pace(A, 9.0)]), Some(0));
        assert_eq!(choose(&[pace(A, 5.0), pace(B, 1.0)]), Some(1));
    }

    #[test]
    fn nobody_gives_way_to_a_client_that_has_more() {
        let pace = |client, age| Pace { client, rate: 1.0, age };
        let (old, young) = (|client| pace(client, GRACE), |client| pace(client, Duration::ZERO));
        let crowd = |count| vec![young(A); count];
        assert_eq!(choose(&[crowd(2), vec![old(B)]].concat()), None, "A begins again and again");
        assert_eq!(choose(&[crowd(1), vec![old(B)]].concat()), Some(1), "both have as many");
        let third = [old(B), old(B), old(C)];
        assert_eq!(choose(&[crowd(3), third.to_vec()].concat()), Some(3), "B has its part");
        assert_eq!(choose(&[crowd(4), third.to_vec()].concat()), None, "B has less");
    }

    #[test]
    fn who_gives_way_can_send_no_more() {
        let readings = Readings::new(2);
        let socket = || {
            let (ours, theirs) = UnixStream::pair().expect("a pair");
            (Arc::new(PeerSocket::new(ours.into(), Rights::Refused)), theirs)
        };
        let (first, second, third) = (socket(), socket(), socket());
        let a = readings.begin(A, &first.0);
        let b = readings.begin(A, &second.0);
        assert!(!a.gives_way() && !b.gives_way(), "both have just begun");
        let long_ago = Instant::now().checked_sub(GRACE).expect("a time");
        let old = State {
            client: A,
            socket: Arc::clone(&first.0),
            since: long_ago,
            received: AtomicUsize::new(0),
            gives_way: AtomicBool::new(false),
        };
        let old = Arc::new(old);
        readings.all.lock().push(Arc::clone(&old));
        let c = readings.begin(B, &third.0);
        assert!(old.gives_way.load(Ordering::Relaxed) && !b.gives_way() && !c.gives_way());
        assert!(std::io::Write::write(&mut &first.1, b"x").is_err(), "its input has ended");
        assert!(std::io::Write::write(&mut &second.1, b"x").is_ok());
        drop((a, b, c));
        assert!(readings.all.lock().is_empty());
    }
}
