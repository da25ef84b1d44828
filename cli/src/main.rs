//! The `qrelay` command: one binary for the supervisor, its zygotes and the tools around them.
//!
//! Contract: `main` reads the command line and calls the function of the command, nothing else.
//! Meanwhile signals wait, so that none ends a daemon that doesn't catch signals yet. The
//! supervisor and the worker (with the zygote and the check) are crates of their own; the client
//! commands are the module `client`.
//!
//! # Failure
//! Every command returns an [`Exit`], which becomes the exit status of the process.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use qrelay_shared::exit::Exit;
use qrelay_shared::log::Patience;
use qrelay_shared::sys::signals::Held;
use qrelay_shared::system_error::shown;
use qrelay_supervisor::daemon;
use qrelay_supervisor::services::dictionary_server;

mod admin;
mod cli;
mod client;
mod completions;
mod output;
mod values;

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
        Ok(Command::Check(config, level, limit)) => check(&config, level, limit),
        Ok(Command::Send(args)) => send::run(&args),
        Ok(Command::Sendmail(args)) => sendmail::run(&args),
        Ok(Command::Print(text)) => print(&text),
        Ok(Command::Sink(options)) => sink::run(&options),
    };
    exit.into()
}

/// Checks the script, for at most `limit`, as long as the daemon would let it load.
fn check(config: &Path, level: slog::Level, limit: Duration) -> Exit {
    let path = config.display().to_string();
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        eprintln!(
            "qrelay: {path}: the script has run for {} s and would not be loaded \
             (--boot-timeout)",
            limit.as_secs_f64()
        );
        std::process::exit(Exit::Config as i32);
    });
    let logger = qrelay_shared::log::init(level, "qrelay", Patience::Unlimited);
    match qrelay_worker::process::check::check(config, logger, dictionary_server::alone()) {
        Ok(checked) => {
            for hint in checked.hints {
                eprintln!("qrelay: hint: {hint}");
            }
            if let Some(note) = checked.note {
                eprintln!("qrelay: note: {note}");
            }
            print(&checked.text)
        }
        Err(error) => {
            eprintln!("qrelay: {}", shown(&error));
            if error.may_pass() { Exit::Temporary } else { Exit::Config }
        }
    }
}
