//! A network that has loopback only, of IPv4 and IPv6, whatever the machine's network looks like.

use std::panic::resume_unwind;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

/// Runs a test in a network of its own, for what the machine's may lack or route elsewhere. All
/// threads and processes that the test starts are in that network, too.
pub fn in_own_network(test: impl FnOnce() + Send) {
    let alone = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network of its own (as root)");
        ip(&["link", "set", "lo", "up"]);
        test();
    };
    let outcome = std::thread::scope(|scope| scope.spawn(alone).join());
    outcome.unwrap_or_else(|panic| resume_unwind(panic));
}

/// Configures the network that this thread is in.
pub fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().expect("iproute2 is installed");
    assert!(status.success(), "ip {arguments:?}");
}
