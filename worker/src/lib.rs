//! Zygote and workers of qrelay.

#![deny(unsafe_code)]

pub mod action;
pub mod deadline;
pub mod lua;
pub mod mail;
