//! Whom resources are counted for, and how much of them one client may hold. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use crate::ipc::message::Peer;

/// Bits of an IPv6 address that say in which network the host is (RFC 4291, section 2.5.1).
const SUBNET: u128 = !(u64::MAX as u128);

/// The client that connections, credits and memory are counted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Client {
    /// All processes of a user.
    Uid(u32),
    /// All connections from an IPv4 address, or from an IPv6 network of /64: a host can give itself
    /// any address in that network.
    Ip(IpAddr),
}

impl From<Peer> for Client {
    fn from(peer: Peer) -> Self {
        match peer {
            Peer::Local { uid, .. } => Self::Uid(uid),
            Peer::Remote(IpAddr::V6(address)) => {
                Self::Ip(Ipv6Addr::from_bits(address.to_bits() & SUBNET).into())
            }
            Peer::Remote(address) => Self::Ip(address),
        }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uid(uid) => write!(f, "uid {uid}"),
            Self::Ip(IpAddr::V4(address)) => write!(f, "{address}"),
            Self::Ip(IpAddr::V6(network)) => write!(f, "{network}/64"),
        }
    }
}

/// The part of a resource that one client may hold (`client_share`).
///
/// A cap in proportion to what is free is known from switches that share one memory between their
/// ports (A. Choudhury and E. Hahne, Dynamic Queue Length Thresholds for Shared-Memory Packet
/// Switches, 1998). One client alone can hold the part s of the whole. k clients can hold the part
/// k·s / (1 + (k-1)·s) together, so that something is always left for the next client.
#[derive(Debug, Clone, Copy)]
pub struct Share(f64);

impl Share {
    /// Takes the part that a single client may hold: more than 0, at most 1.
    pub fn new(share: f64) -> Self {
        Self(share)
    }

    /// Returns what a client may hold of `whole`, of which nobody else holds anything.
    pub fn of(self, whole: usize) -> usize {
        (whole as f64 * self.0) as usize
    }

    /// Returns how much a client may hold while `free` is free.
    pub fn cap(self, free: usize) -> usize {
        // With a part of 1 there is no cap: infinity becomes the largest number, and no number
        // (nothing is free) becomes 0.
        (free as f64 * self.0 / (1.0 - self.0)) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets clients take one piece each in turn, as long as they may. Returns what they hold.
    fn taken(share: f64, whole: usize, clients: usize) -> usize {
        let share = Share::new(share);
        let mut held = vec![0; clients];
        loop {
            let free = whole - held.iter().sum::<usize>();
            match held.iter_mut().min() {
                Some(least) if free > 0 && *least < share.cap(free) => *least += 1,
                _ => return held.iter().sum(),
            }
        }
    }

    #[test]
    fn something_is_left_however_many_clients_take_all_they_can() {
        assert_eq!(taken(0.75, 512, 1), 384);
        assert_eq!(taken(0.75, 512, 2), 439);
        assert_eq!(taken(0.75, 512, 20), 504);
        assert_eq!(taken(0.5, 100, 1), 50);
        assert_eq!(taken(0.1, 100, 1), 10);
        assert_eq!(taken(1.0, 100, 1), 100);
    }

    fn remote(address: &str) -> Client {
        Peer::Remote(address.parse().expect("an address")).into()
    }

    #[test]
    fn hosts_of_an_ipv6_network_are_one_client() {
        assert_eq!(remote("2001:db8::1"), remote("2001:db8::ffff:2:3:4"));
        assert_ne!(remote("2001:db8::1"), remote("2001:db8:0:1::1"));
        assert_ne!(remote("192.0.2.1"), remote("192.0.2.2"));
    }

    #[test]
    fn names_for_the_log() {
        assert_eq!(remote("192.0.2.1").to_string(), "192.0.2.1");
        assert_eq!(remote("2001:db8::5").to_string(), "2001:db8::/64");
        assert_eq!(Client::Uid(33).to_string(), "uid 33");
    }
}
