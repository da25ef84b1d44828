//! The figures about finished mails: how many, how fast, where they went. Pure.
//!
//! Contract: counting a mail takes no system call and, but for a next hop that is new, no memory.
//! The tables are bounded: what doesn't fit any more is counted under [`OTHER`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use qrelay_shared::admin;
use qrelay_shared::ipc::message::MailRecord;
use qrelay_shared::qmqp::Status;

/// Upper bounds of the buckets in microseconds. A mail on one host takes some hundred microseconds,
/// a slow next hop seconds, and `relay_timeout` is 60 s by default.
const BOUNDS: [u64; 18] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000, 30_000_000, 60_000_000,
];
const BUCKETS: usize = BOUNDS.len() + 1;

/// Number of seconds whose mails are counted one by one: 15 minutes.
const SECONDS: usize = 900;
/// Seconds in one part of the last minute, by which old times are forgotten.
const PART: u64 = 10;
/// Parts of the last minute: the one that is under way, and six whole ones.
const PARTS: usize = 7;

/// Most next hops that are counted one by one, and most listeners.
const MOST: usize = 64;
/// The name under which everything else is counted.
const OTHER: &str = "other";

/// The actions of mails. A worker that tells another one isn't believed.
const ACTIONS: [&str; 7] = ["-", "connect", "exec", "exec_raw", "discard", "reject", "defer"];
/// The answers to mails.
const REPLIES: [&str; 4] = ["K", "Z", "D", "-"];

/// Times since the start, and those of the last minute.
#[derive(Debug, Default)]
struct Times {
    buckets: [u64; BUCKETS],
    /// Sum in microseconds.
    sum: u64,
    parts: [[u32; BUCKETS]; PARTS],
    /// The part that is under way, counted from the start of the daemon.
    part: u64,
}

impl Times {
    fn add(&mut self, time: u64, second: u64) {
        let bucket = BOUNDS.partition_point(|&bound| bound < time);
        self.buckets[bucket] += 1;
        self.sum = self.sum.saturating_add(time);
        let part = second / PART;
        for gone in (self.part + 1..=part).take(PARTS) {
            self.parts[gone as usize % PARTS] = [0; BUCKETS];
        }
        self.part = part.max(self.part);
        self.parts[self.part as usize % PARTS][bucket] += 1;
    }

    fn shown(&self, second: u64) -> admin::Histogram {
        let part = second / PART;
        let mut recent = [0_u64; BUCKETS];
        for age in 0..PARTS as u64 {
            // Parts in which there was no mail have not been cleared yet.
            let Some(at) = part.checked_sub(age).filter(|&at| at <= self.part) else { continue };
            if self.part - at < PARTS as u64 {
                let counts = self.parts[at as usize % PARTS];
                recent.iter_mut().zip(counts).for_each(|(sum, n)| *sum += u64::from(n));
            }
        }
        admin::Histogram {
            buckets: self.buckets.to_vec(),
            sum: self.sum as f64 / 1e6,
            p50: quantile(&recent, 0.5),
            p99: quantile(&recent, 0.99),
        }
    }
}

/// Returns the time in seconds that this part of all times don't exceed, as if the times in a
/// bucket were spread evenly.
fn quantile(buckets: &[u64; BUCKETS], part: f64) -> Option<f64> {
    let all: u64 = buckets.iter().sum();
    let wanted = all as f64 * part;
    let mut below = 0.0;
    for (bucket, &count) in buckets.iter().enumerate().filter(|&(_, &count)| count > 0) {
        let count = count as f64;
        if below + count >= wanted {
            let lower = bucket.checked_sub(1).map_or(0, |before| BOUNDS[before]) as f64;
            let upper = BOUNDS.get(bucket).map_or(lower, |&bound| bound as f64);
            return Some((lower + (upper - lower) * (wanted - below) / count) / 1e6);
        }
        below += count;
    }
    None
}

/// Numbers of mails in each of the last [`SECONDS`].
#[derive(Debug)]
struct Recent {
    counts: Box<[u32; SECONDS]>,
    /// The second that is under way, counted from the start of the daemon.
    second: u64,
}

impl Recent {
    fn advance(&mut self, second: u64) {
        for gone in (self.second + 1..=second).take(SECONDS) {
            self.counts[gone as usize % SECONDS] = 0;
        }
        self.second = second.max(self.second);
    }

    fn add(&mut self, second: u64) {
        self.advance(second);
        self.counts[self.second as usize % SECONDS] += 1;
    }

    /// Returns the mails per second in the last whole seconds.
    fn rate(&self, second: u64, seconds: u64) -> f64 {
        // The second that is under way isn't over, and its place may be needed.
        let whole = second.min(seconds).min(SECONDS as u64 - 1);
        let ages = (1..=whole).filter_map(|age| second.checked_sub(age));
        let counted = ages.filter(|&at| at <= self.second && self.second - at < SECONDS as u64);
        let sum: u64 = counted.map(|at| u64::from(self.counts[at as usize % SECONDS])).sum();
        sum as f64 / whole.max(1) as f64
    }
}

/// What is known of a next hop.
#[derive(Debug, Default)]
struct Hop {
    answers: admin::Answers,
    connect_failures: u64,
    times: Times,
}

/// Mails of one listener by action and reply.
type Counts = [[u64; REPLIES.len()]; ACTIONS.len()];

/// All figures about mails.
#[derive(Debug)]
pub(crate) struct Figures {
    begun: Instant,
    answers: admin::Answers,
    recent: Recent,
    listeners: Vec<(Arc<str>, Counts)>,
    /// Waiting for a worker, reading, the handler, the next hop, and all of it.
    times: [Times; 5],
    /// In the order of their names.
    next_hops: Vec<(Box<str>, Hop)>,
}

impl Figures {
    /// Starts from nothing.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            begun: now,
            answers: admin::Answers::default(),
            recent: Recent { counts: Box::new([0; SECONDS]), second: 0 },
            listeners: Vec::new(),
            times: Default::default(),
            next_hops: Vec::new(),
        }
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.begun).as_secs()
    }

    /// Counts a mail.
    pub(super) fn count(
        &mut self,
        mail: &MailRecord<'_>,
        listener: Option<&Arc<str>>,
        now: Instant,
    ) {
        let second = self.second(now);
        self.answers.count(mail.status);
        self.recent.add(second);
        let action = ACTIONS.iter().position(|&action| action == mail.action).unwrap_or(0);
        self.counts(listener)[action][reply(mail.status)] += 1;
        let [queue, read, lua, hop, all] = &mut self.times;
        queue.add(mail.times.queue, second);
        all.add(mail.duration, second);
        if mail.received > 0 {
            read.add(mail.times.read, second);
        }
        if !mail.refused {
            lua.add(mail.times.lua, second);
        }
        if let Some(name) = mail.next_hop {
            if mail.forwarded {
                hop.add(mail.times.hop, second);
            }
            let entry = self.hop(name);
            entry.answers.count(mail.status);
            match mail.forwarded {
                true => entry.times.add(mail.times.hop, second),
                false => entry.connect_failures += 1,
            }
        }
    }

    fn counts(&mut self, listener: Option<&Arc<str>>) -> &mut Counts {
        let name = listener.map_or(OTHER, |name| name);
        let known = self.listeners.iter().position(|(known, _)| **known == *name);
        let at = known.unwrap_or_else(|| {
            let full = self.listeners.len() >= MOST;
            let name = listener.filter(|_| !full).map_or_else(|| OTHER.into(), Arc::clone);
            let other = self.listeners.iter().position(|(known, _)| *known == name);
            other.unwrap_or_else(|| {
                self.listeners.push((name, Counts::default()));
                self.listeners.len() - 1
            })
        });
        &mut self.listeners[at].1
    }

    fn hop(&mut self, name: &str) -> &mut Hop {
        let mut found = self.find_hop(name);
        if found.is_err() && self.next_hops.len() >= MOST {
            found = self.find_hop(OTHER);
        }
        let at = found.unwrap_or_else(|at| {
            let name = if self.next_hops.len() < MOST { name } else { OTHER };
            self.next_hops.insert(at, (name.into(), Hop::default()));
            at
        });
        &mut self.next_hops[at].1
    }

    /// Returns the place of a next hop, or the place where it belongs.
    fn find_hop(&self, name: &str) -> Result<usize, usize> {
        self.next_hops.binary_search_by(|(known, _)| (**known).cmp(name))
    }

    /// Returns how mails were answered.
    pub(crate) fn answers(&self) -> admin::Answers {
        self.answers
    }

    /// Returns the mails per second.
    pub(crate) fn rates(&self, now: Instant) -> admin::Rates {
        let second = self.second(now);
        let rate = |seconds| self.recent.rate(second, seconds);
        admin::Rates { second: rate(1), minute: rate(60), quarter: rate(SECONDS as u64) }
    }

    /// Returns where mails' time goes.
    pub(crate) fn times(&self, now: Instant) -> admin::Times {
        let second = self.second(now);
        let [queue, read, lua, hop, all] = self.times.each_ref().map(|times| times.shown(second));
        let bounds = BOUNDS.map(|bound| Duration::from_micros(bound).as_secs_f64()).to_vec();
        admin::Times { bounds, queue, read, lua, hop, all }
    }

    /// Returns the mails by listener, action and reply.
    pub(crate) fn mails(&self) -> Vec<admin::Mails> {
        let mut mails = Vec::new();
        for (listener, counts) in &self.listeners {
            for (action, counts) in ACTIONS.iter().zip(counts) {
                for (reply, &count) in REPLIES.iter().zip(counts).filter(|&(_, &n)| n > 0) {
                    mails.push(admin::Mails {
                        listener: listener.to_string(),
                        action: (*action).to_owned(),
                        reply: (*reply).to_owned(),
                        count,
                    });
                }
            }
        }
        mails
    }

    /// Returns the next hops in the order of their names, with those that only have mails
    /// `in_flight`.
    pub(crate) fn next_hops(
        &self,
        now: Instant,
        in_flight: &BTreeMap<String, u64>,
    ) -> Vec<admin::NextHop> {
        let second = self.second(now);
        let shown = |name: &str, hop: &Hop| admin::NextHop {
            next_hop: name.to_owned(),
            in_flight: 0,
            answers: hop.answers,
            connect_failures: hop.connect_failures,
            times: hop.times.shown(second),
        };
        let mut hops: Vec<_> = self.next_hops.iter().map(|(name, hop)| shown(name, hop)).collect();
        let find = |hops: &[admin::NextHop], name: &str| {
            hops.binary_search_by(|hop| hop.next_hop.as_str().cmp(name))
        };
        for (name, count) in in_flight {
            let mut name = name.as_str();
            let mut found = find(&hops, name);
            if found.is_err() && hops.len() >= MOST {
                name = OTHER;
                found = find(&hops, name);
            }
            let at = found.unwrap_or_else(|at| {
                hops.insert(at, shown(name, &Hop::default()));
                at
            });
            hops[at].in_flight += count;
        }
        hops
    }
}

fn reply(status: Option<Status>) -> usize {
    match status {
        Some(Status::Accepted) => 0,
        Some(Status::Temporary) => 1,
        Some(Status::Permanent) => 2,
        None => 3,
    }
}

#[cfg(test)]
#[path = "figures_tests.rs"]
mod tests;
