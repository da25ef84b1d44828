//! `qrelay completions`: what a shell needs to complete a command line of qrelay.
//!
//! Contract: the script is printed on stdout. Hidden commands and options are left out.
//!
//! # Failure
//! None: the caller sees whether writing fails.

use clap::{Command, ValueEnum};
use clap_complete::Shell;

/// Print a script that makes a shell complete qrelay's command line.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Example:
  qrelay completions bash > /usr/share/bash-completion/completions/qrelay")]
pub struct Args {
    /// The shell.
    shell: Known,
}

/// The shells whose scripts are tested.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Known {
    Bash,
    Zsh,
    Fish,
}

/// Returns the script for the chosen shell.
pub fn script(args: &Args, command: &Command) -> String {
    let shell = match args.shell {
        Known::Bash => Shell::Bash,
        Known::Zsh => Shell::Zsh,
        Known::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut shown(command), "qrelay", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Returns the command without what is hidden.
fn shown(command: &Command) -> Command {
    let mut copy = Command::new(command.get_name().to_owned())
        .disable_help_flag(command.is_disable_help_flag_set())
        .args(command.get_arguments().filter(|arg| !arg.is_hide_set()).cloned())
        .subcommands(command.get_subcommands().filter(|sub| !sub.is_hide_set()).map(shown));
    if let Some(about) = command.get_about() {
        copy = copy.about(about.clone());
    }
    if let Some(version) = command.get_version() {
        copy = copy.version(version.to_owned());
    }
    copy
}
