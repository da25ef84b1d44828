//! The processes of this crate: the zygote, which runs config.lua and forks, and the workers.
//!
//! [`zygote::main`] is where both begin. [`check`] and [`trial`] run config.lua in any other
//! process.

mod account;
pub mod check;
mod control;
mod logging;
mod sandbox;
pub mod trial;
mod worker;
pub mod zygote;
