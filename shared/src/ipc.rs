//! The communication between supervisor, zygote and workers: typed messages over `SOCK_SEQPACKET`
//! pairs.

pub mod channel;
pub mod message;
