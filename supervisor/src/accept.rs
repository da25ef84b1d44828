//! Accepting: the listening sockets and the connections that no worker has yet.

pub mod bind;
pub mod connections;
pub mod fairness;
pub mod listeners;
pub mod throttle;
