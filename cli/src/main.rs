//! The `qrelay` command: one binary for the supervisor, its zygotes and the tools around them.
//!
//! Contract: `main` reads the command line and calls the function of the command, nothing else.
//! Meanwhile signals wait, so that none ends a daemon that doesn't catch signals yet. The
//! supervisor and the worker (with the zygote, the check and the trial) are crates of their own.
//! The client commands are the module `client`.
//!
//! # Failure
//! Every command returns an `Exit`, which becomes the exit status of the process.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use qrelay_shared::sys::signals::Held;
use qrelay_supervisor::daemon;

mod admin;
mod check;
mod cli;
mod client;
mod completions;
mod output;
mod script;
mod trial;
mod values;
mod web;

use crate::cli::Command;
use crate::client::{send, sendmail, sink};
use crate::output::print;

fn main() -> ExitCode {
    // The daemon and its zygotes take signals as soon as they can obey them. Until then a SIGHUP
    // would end them.
    let held = Held::new();
    let command = cli::parse();
    if !matches!(command, Ok(Command::Run(_) | Command::Zygote(..))) {
        held.release();
    }
    let exit = match command {
        Err(exit) => exit,
        Ok(Command::Run(options)) => daemon::run(options),
        Ok(Command::Zygote(level, limits)) => qrelay_worker::process::zygote::main(level, limits),
        Ok(Command::Admin(verb, path)) => admin::run(&verb, &path),
        Ok(Command::Check { script, named, all }) => check::run(&script, &named, all),
        Ok(Command::Try(script, args)) => trial::run(&script, *args),
        Ok(Command::Send(args)) => send::run(&args),
        Ok(Command::Sendmail(args)) => sendmail::run(&args),
        Ok(Command::Print(text)) => print(&text),
        Ok(Command::Sink(options)) => sink::run(&options),
        Ok(Command::Web(args, control)) => web::run(&args, control),
    };
    exit.into()
}
