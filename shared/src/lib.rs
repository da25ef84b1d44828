//! What the processes of qrelay have in common.
//!
//! Protocols ([`netstring`], [`qmqp`], [`address`], [`mail`], [`endpoint`],
//! [`network`], [`pond`]) take bytes and return values; they do no I/O.
//! [`ipc`] is how the processes talk. [`sys`] is the operating system, and the
//! only place with unsafe code in the whole project.

pub mod address;
pub mod control;
pub mod dictionary;
pub mod endpoint;
pub mod exit;
pub mod ipc;
pub mod log;
pub mod mail;
pub mod netstring;
pub mod network;
pub mod pond;
pub mod qmqp;
pub mod settings;
pub mod sys;
