//! `qrelay check`: loads the script, and shows what it declares.
//!
//! # Failure
//! The script's error, and exit status 78, or 75 if trying again later may help.

use std::path::{Path, PathBuf};

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
    /// Print all settings, not only those that differ from their defaults.
    #[arg(long)]
    pub all: bool,
}

/// Runs the command. `named` is the script as the caller has named it, `all` asks for all settings.
pub fn run(script: &Script, named: &Path, all: bool) -> Exit {
    let limit = script.limit();
    let logger = qrelay_shared::log::init(script.level, "qrelay", Patience::Unlimited);
    let checked = check::check(&script.config, logger, dictionary_server::alone());
    drop(limit);
    match checked {
        Ok(checked) => {
            let count = match checked.listeners() {
                1 => "1 listener".to_owned(),
                count => format!("{count} listeners"),
            };
            let summary = checked.summary(all);
            let exit = print(&format!("{} is sound: {count}\n\n{summary}", named.display()));
            for warning in checked.warnings {
                eprintln!("qrelay: warning: {warning}");
            }
            for hint in checked.hints {
                eprintln!("qrelay: hint: {hint}");
            }
            if let Some(note) = checked.note {
                eprintln!("qrelay: note: {note}");
            }
            exit
        }
        Err(error) => {
            eprintln!("qrelay: {}", shown(&error));
            if error.may_pass() { Exit::Temporary } else { Exit::Config }
        }
    }
}
