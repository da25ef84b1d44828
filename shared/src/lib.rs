//! The parts of qrelay that several of its processes use.
//!
//! The protocols ([`netstring`], [`qmqp`], [`address`], [`header`], [`endpoint`], [`network`],
//! [`pond`], [`beng_control`]) take bytes and return values, and do no I/O. [`ipc`] is the
//! communication between the processes, with [`mod@ids`], [`settings`], [`client`] and
//! [`dictionary`] as its vocabulary; [`admin`] is what administrators' commands say to the
//! supervisor. [`texts`] has every reply text, [`system_error`] shows the system's errors, [`log`]
//! is the log of every process, [`exit`] has the exit statuses. [`sys`] is the operating system,
//! and the only place with unsafe code in the whole project.

#![warn(unreachable_pub)]

// The macro in `ids` names this crate as the others do.
extern crate self as qrelay_shared;

pub mod address;
pub mod admin;
pub mod beng_control;
pub mod client;
pub mod deadline;
pub mod dictionary;
pub mod endpoint;
pub mod exit;
pub mod flight;
pub mod header;
pub mod ids;
pub mod ipc;
pub mod log;
pub mod netstring;
pub mod network;
pub mod pond;
pub mod qmqp;
pub mod settings;
pub mod sys;
pub mod system_error;
pub mod texts;
