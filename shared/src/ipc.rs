//! How supervisor, zygote and workers talk: typed messages over `SOCK_SEQPACKET` pairs.

pub mod channel;
pub mod message;
