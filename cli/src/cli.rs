//! The command line: its grammar, and its translation into the options of each command.
//!
//! # Failure
//! A command line that can't be understood ends with clap's explanation and exit status 64
//! (EX_USAGE).

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use qrelay_shared::admin::DEFAULT_PATH;
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::exit::Exit;
use qrelay_shared::qmqp::Status;
use qrelay_shared::settings::Account;
use qrelay_shared::sys::limits::Limits;
use qrelay_shared::system_error::shown;
use qrelay_supervisor::daemon::{Control, Options};
use slog::Level;

use crate::admin;
use crate::client::sink::SinkOptions;
use crate::client::{send, sendmail};
use crate::completions;
use crate::script::Script;
use crate::values::{seconds, socket};
use crate::{check, trial, web};

/// Default path of the configuration, the same as the original program's.
const DEFAULT_CONFIG: &str = "/etc/cm4all/qrelay/config.lua";

const EXAMPLES: &str = "\
Examples:
  qrelay                                  run with /etc/cm4all/qrelay/config.lua
  qrelay --config ./config.lua            run with another configuration
  qrelay status                           show what the daemon does
  qrelay reload                           load the configuration anew
  qrelay check ./config.lua               show what it declares, or what is wrong with it
  qrelay try --sender a@example.com b@example.org < mail   show what it decides about a mail
  qrelay sink --listen /tmp/next.sock     run a next hop that shows the mails it gets
  qrelay send --to /run/qrelay.sock --sender a@example.com b@example.org < mail
  qrelay sendmail -i root < mail          the same as /usr/sbin/sendmail

Exit status: 0 success, 64 usage, 71 system error, 78 configuration error;
`status`, `mails`, `reload`, `stop`: 1 refused, 3 not running, 4 no permission;
`try`: 1 not the expected action;
`send`, `sendmail`: 0 accepted (K), 75 temporary failure (Z), 69 permanent failure (D).";

/// A QMQP relay with fault-isolated workers, configured in Lua.
#[derive(Debug, Parser)]
#[command(name = "qrelay", version, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    common: Common,
    /// Started as root: run the script, workers and programs as this user (name or number).
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// The primary group instead of that user's own (name or number).
    #[arg(long, value_name = "GROUP", requires = "user")]
    group: Option<String>,
    #[command(subcommand)]
    command: Option<Verb>,
}

// No doc comment: it would hide the one of the arguments in the help.
#[derive(Debug, Parser)]
#[command(name = "sendmail")]
struct Sendmail {
    #[command(flatten)]
    args: sendmail::Args,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// The Lua script that is the configuration.
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_CONFIG)]
    config: PathBuf,
    /// Log records of this level and above.
    #[arg(long, global = true, value_name = "LEVEL", default_value = "info", ignore_case = true)]
    log_level: LogLevel,
    /// How long the script may take to load, in seconds.
    #[arg(
        long, global = true, value_name = "SECONDS", default_value = "30", value_parser = seconds
    )]
    boot_timeout: Duration,
    /// The control socket, by which `qrelay status`, `qrelay reload` and their like reach the
    /// daemon; `none` for a daemon without one [default: /run/cm4all/qrelay/control].
    #[arg(long, global = true, value_name = "PATH")]
    control: Option<PathBuf>,
}

impl Common {
    /// Returns where the daemon is to listen for commands.
    fn control(&self) -> Control {
        match &self.control {
            None => Control::Preferably(DEFAULT_PATH.into()),
            Some(path) if path.as_os_str() == "none" => Control::Off,
            Some(path) => Control::At(path.clone()),
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogLevel {
    Critical,
    Error,
    #[value(alias = "warn")]
    Warning,
    Info,
    Debug,
    Trace,
}

impl From<LogLevel> for Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Critical => Self::Critical,
            LogLevel::Error => Self::Error,
            LogLevel::Warning => Self::Warning,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    Check(check::Args),
    Try(Box<trial::Args>),
    Send(send::Args),
    Sendmail(sendmail::Args),
    /// Run a QMQP server that shows or stores the mails it gets.
    #[command(after_help = "Example:
  qrelay sink --listen 127.0.0.1:6280 --output /tmp/mails/")]
    Sink {
        /// Where to listen: path, @abstract, or IP address with or without port.
        #[arg(long, value_name = "SOCKET", value_parser = socket)]
        listen: Endpoint,
        /// Answer to every mail: K accepted, Z not now, D never.
        #[arg(long, default_value = "K", ignore_case = true)]
        answer: Answer,
        /// File to append mails to, or directory for one file per mail [default: standard output].
        #[arg(long, value_name = "FILE|DIR")]
        output: Option<PathBuf>,
    },
    #[command(flatten)]
    Admin(admin::Verb),
    Completions(completions::Args),
    Web(web::Args),
    /// Internal: the process that the supervisor forks workers from.
    #[command(hide = true)]
    Zygote {
        /// Soft limits of descriptors and of core dumps that programs get.
        #[arg(long)]
        limits: Limits,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Answer {
    K,
    Z,
    D,
}

/// A command with its options.
#[derive(Debug)]
pub enum Command {
    /// Run the daemon.
    Run(Options),
    /// Load the script, and print what it declares.
    Check {
        /// The script.
        script: Script,
        /// The script's path as the caller has given it.
        named: PathBuf,
        /// Print all settings.
        all: bool,
    },
    /// Load the script, and print what it decides about a mail.
    Try(Script, Box<trial::Args>),
    /// Submit a mail, or files.
    Send(send::Args),
    /// Submit a mail as sendmail does.
    Sendmail(sendmail::Args),
    /// Run a server that shows or stores mails.
    Sink(SinkOptions),
    /// Talk to the daemon that listens for commands at this path.
    Admin(admin::Verb, PathBuf),
    /// Print this text.
    Print(String),
    /// Serve metrics and a page about the daemon that listens for commands at this path.
    Web(web::Args, PathBuf),
    /// Run a zygote.
    Zygote(Level, Limits),
}

/// Reads the process's command line.
///
/// # Errors
/// Returns the exit status of the process when there is no command to run. clap has already printed
/// its explanation, the help or the version.
pub fn parse() -> Result<Command, Exit> {
    if called_as_sendmail() {
        return Sendmail::try_parse()
            .map(|Sendmail { args }| Command::Sendmail(args))
            .map_err(explained);
    }
    let cli = Cli::try_parse().map_err(explained)?;
    let level = Level::from(cli.common.log_level);
    let boot_timeout = cli.common.boot_timeout;
    let control = cli.common.control();
    let named = cli.common.config;
    let config = absolute(&named)?;
    Ok(match cli.command {
        None => {
            let account = cli.user.map(|user| Account { user, group: cli.group });
            let control = match control {
                Control::At(path) => Control::At(absolute(&path)?),
                other => other,
            };
            Command::Run(Options { config, level, boot_timeout, control, account })
        }
        Some(Verb::Check(check::Args { file, all })) => {
            let named = file.unwrap_or(named);
            let script = Script { config: absolute(&named)?, level, boot_timeout };
            Command::Check { script, named, all }
        }
        Some(Verb::Try(args)) => Command::Try(Script { config, level, boot_timeout }, args),
        Some(Verb::Admin(verb)) => {
            let path = cli.common.control.unwrap_or_else(|| DEFAULT_PATH.into());
            Command::Admin(verb, path)
        }
        Some(Verb::Zygote { limits }) => Command::Zygote(level, limits),
        Some(Verb::Send(args)) => Command::Send(args),
        Some(Verb::Sendmail(args)) => Command::Sendmail(args),
        Some(Verb::Completions(args)) => {
            Command::Print(completions::script(&args, &Cli::command()))
        }
        Some(Verb::Web(args)) => {
            let path = cli.common.control.unwrap_or_else(|| DEFAULT_PATH.into());
            Command::Web(args, path)
        }
        Some(Verb::Sink { listen, answer, output }) => {
            let answer = match answer {
                Answer::K => Status::Accepted,
                Answer::Z => Status::Temporary,
                Answer::D => Status::Permanent,
            };
            Command::Sink(SinkOptions { listen, answer, output })
        }
    })
}

/// Returns whether the binary was called by the name that other programs know.
fn called_as_sendmail() -> bool {
    std::env::args_os().next().is_some_and(|name| Path::new(&name).ends_with("sendmail"))
}

/// Prints why there is no command to run, and returns the exit status.
fn explained(error: clap::Error) -> Exit {
    // A failure to print can't be reported anywhere.
    let _ = error.print();
    if error.use_stderr() { Exit::Usage } else { Exit::Success }
}

/// Makes a path absolute, because the zygote changes its working directory.
fn absolute(path: &Path) -> Result<PathBuf, Exit> {
    std::path::absolute(path).map_err(|error| {
        eprintln!("qrelay: {}: {}", path.display(), shown(&error));
        Exit::Usage
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        Sendmail::command().debug_assert();
    }

    /// The synopsis of qrelay(8) names each command once, with its options.
    #[test]
    fn the_manual_has_every_command_and_option() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/man/qrelay.8");
        let page = std::fs::read_to_string(page).expect("the manual");
        let synopsis = page.split(".Sh ").find(|part| part.starts_with("SYNOPSIS\n"));
        let mut documented = BTreeSet::new();
        for part in synopsis.expect("a synopsis").split(".Nm\n").skip(1) {
            let command = part.strip_prefix(".Cm ").and_then(|part| part.lines().next());
            let command = command.unwrap_or_default().to_owned();
            documented.extend(options(part).map(|option| (command.clone(), option)));
            documented.insert((command, String::new()));
        }
        let command = Cli::command();
        let mut known = long_options(&command);
        known.insert((String::new(), String::new()));
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            known.extend(long_options(command));
            known.insert((command.get_name().to_owned(), String::new()));
        }
        // Options that every command takes are only shown where they have an effect.
        let global = |(command, option): &(String, String)| {
            !command.is_empty()
                && !option.is_empty()
                && documented.contains(&(String::new(), option.clone()))
        };
        let local: BTreeSet<_> = documented.iter().filter(|pair| !global(pair)).collect();
        assert_eq!(local, known.iter().collect());
    }

    /// Returns the long options that a piece of the manual names.
    fn options(text: &str) -> impl Iterator<Item = String> {
        text.split("Fl -").skip(1).filter_map(|rest| Some(rest.split_whitespace().next()?.into()))
    }

    /// Returns a command's own long options, each with the command's name if it is a subcommand.
    /// Every command has --help.
    fn long_options(command: &clap::Command) -> BTreeSet<(String, String)> {
        let name = if command.get_name() == "qrelay" { "" } else { command.get_name() };
        let options = command.get_arguments().filter_map(clap::Arg::get_long);
        let options = options.filter(|option| *option != "help");
        options.map(|option| (name.to_owned(), option.to_owned())).collect()
    }
}
