//! Generations: loading a configuration, switching to it, ending it.

pub mod reload;
pub mod rollout;
pub mod zygote;
