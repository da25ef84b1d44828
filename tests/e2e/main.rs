//! End-to-end tests: the real binary, driven from outside. Each module holds the scenarios of one
//! subject; `harness` holds what they are written with.
//!
//! Contract: every test starts its own daemons in its own temporary directory. A test waits for
//! conditions, never for a fixed time, and looks at what is left afterwards. The tests know QMQP
//! and the documentation, but none of the code under test. They need root, because some clients run
//! as other users, and the packages that `tests/run` installs. A test whose needs are not met
//! fails.
//!
//! # Failure
//! A failing test prints what its daemons logged.

#![forbid(unsafe_code)]

mod harness;

mod bad_config;
mod bad_input;
mod bare_root;
mod cgroup;
mod chaos;
mod cli;
mod completions;
mod control;
mod crash;
mod definitions;
mod docs;
mod exec;
mod exec_end;
mod files;
mod flood;
mod full_log;
mod hostile;
mod inherited;
mod isolation;
mod journal;
mod large;
mod libraries;
mod limits;
mod lua;
mod mail_lines;
mod message;
mod passed_descriptors;
mod pg;
mod pg_connection;
mod pg_pooler;
mod pg_trouble;
mod pond;
mod postfix;
mod rebind;
mod relay;
mod reload;
mod repeats;
mod send_files;
mod sendmail;
mod separation;
mod shared;
mod signals;
mod start;
mod stop;
mod systemd;
mod r#try;
mod unit;
mod unread;
mod web;
