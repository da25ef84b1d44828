//! `qrelay check`: loads the script, and shows what it declares.
//!
//! # Failure
//! The script's error, and exit status 78, or 75 if trying again later may help.

use std::path::PathBuf;

use qrelay_shared::exit::Exit;
use qrelay_shared::log::Patience;
use qrelay_shared::system_error::shown;
use qrelay_supervisor::services::dictionary_server;
use qrelay_worker::process::check;

use crate::output::print;
use crate::script::Script;

/// Run the script, and print what it declares, or its error; bind no socket.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The script, as with --config.
    #[arg(value_name = "FILE", conflicts_with = "config")]
    pub file: Option<PathBuf>,
}

/// Runs the command.
pub fn run(script: &Script) -> Exit {
    let limit = script.limit();
    let logger = qrelay_shared::log::init(script.level, "qrelay", Patience::Unlimited);
    let checked = check::check(&script.config, logger, dictionary_server::alone());
    drop(limit);
    match checked {
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
