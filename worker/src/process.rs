//! The processes of this crate: the zygote, which runs config.lua and forks, and the workers.

pub mod check;
pub mod control;
mod logging;
pub mod worker;
pub mod zygote;
