//! Zygote and workers of qrelay.

pub mod action;
pub mod deadline;
pub mod mail;
