//! The command line: what can be said, and its translation into the options of
//! each command.
//!
//! # Failure
//! A command line that can't be understood ends with clap's explanation and
//! exit status 64 (EX_USAGE).

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use qrelay_shared::endpoint::{self, Endpoint, Parsed, QMQP_PORT};
use qrelay_shared::exit::Exit;
use qrelay_shared::qmqp::Status;
use qrelay_supervisor::daemon::Options;
use slog::Level;

use crate::client::send::SendOptions;
use crate::client::sink::SinkOptions;

/// Where the original looks for its configuration too.
const DEFAULT_CONFIG: &str = "/etc/cm4all/qrelay/config.lua";

const EXAMPLES: &str = "\
Examples:
  qrelay                                  run with /etc/cm4all/qrelay/config.lua
  qrelay --config ./config.lua            run with another configuration
  qrelay check --config ./config.lua      say what it declares, or what is wrong with it
  qrelay sink --listen /tmp/next.sock     be a next hop that shows what it gets
  qrelay send --to /run/qrelay.sock --sender a@example.com b@example.org < mail

Exit status: 0 success, 64 usage, 71 system error, 78 configuration error;
`send`: 0 accepted (K), 75 temporary failure (Z), 69 permanent failure (D).";

/// A QMQP relay with fault-isolated workers, configured in Lua.
#[derive(Debug, Parser)]
#[command(name = "qrelay", version, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    common: Common,
    /// How long the script may run before it has declared its listeners, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    boot_timeout: Duration,
    #[command(subcommand)]
    command: Option<Verb>,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// The Lua script that configures everything.
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_CONFIG)]
    config: PathBuf,
    /// What is logged: records of this level and above.
    #[arg(long, global = true, value_name = "LEVEL", default_value = "info", ignore_case = true)]
    log_level: LogLevel,
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
    /// Load the script and print its listeners and settings, or its error.
    Check,
    /// Submit one mail, read from standard input.
    #[command(after_help = "Example:
  qrelay send --to /run/qrelay.sock --sender a@example.com b@example.org < mail")]
    Send {
        /// Where the server listens: path, @abstract, or IP address with or without port.
        #[arg(long, value_name = "SOCKET", value_parser = socket)]
        to: Endpoint,
        /// Envelope sender; '' for a bounce.
        #[arg(long)]
        sender: String,
        /// Longest wait for the answer, in seconds.
        #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
        timeout: Duration,
        /// Envelope recipients.
        #[arg(required = true, value_name = "RECIPIENT")]
        recipients: Vec<String>,
    },
    /// Be a QMQP server that shows or stores what it gets.
    #[command(after_help = "Example:
  qrelay sink --listen 127.0.0.1:6280 --output /tmp/mails/")]
    Sink {
        /// Where to listen: path, @abstract, or IP address with or without port.
        #[arg(long, value_name = "SOCKET", value_parser = socket)]
        listen: Endpoint,
        /// What every mail is answered.
        #[arg(long, default_value = "K", ignore_case = true)]
        answer: Answer,
        /// A file to append to, or a directory that gets a file per mail; else standard output.
        #[arg(long, value_name = "FILE|DIR")]
        output: Option<PathBuf>,
    },
    /// Internal: the process that the supervisor forks workers from.
    #[command(hide = true)]
    Zygote,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Answer {
    K,
    Z,
    D,
}

/// One command with its options.
#[derive(Debug)]
pub enum Command {
    /// The daemon.
    Run(Options),
    /// Load the script at this absolute path and tell what it declares.
    Check(PathBuf, Level),
    /// A client.
    Send(SendOptions),
    /// A server.
    Sink(SinkOptions),
    /// A zygote.
    Zygote(Level),
}

/// Reads the process's command line.
///
/// # Errors
/// The exit status, once clap has printed its explanation, help or version.
pub fn parse() -> Result<Command, Exit> {
    let cli = Cli::try_parse().map_err(|error| {
        // Nobody to tell if even this can't be printed.
        let _ = error.print();
        if error.use_stderr() { Exit::Usage } else { Exit::Success }
    })?;
    let level = Level::from(cli.common.log_level);
    let config = absolute(cli.common.config)?;
    Ok(match cli.command {
        None => Command::Run(Options { config, level, boot_timeout: cli.boot_timeout }),
        Some(Verb::Check) => Command::Check(config, level),
        Some(Verb::Zygote) => Command::Zygote(level),
        Some(Verb::Send { to, sender, timeout, recipients }) => {
            Command::Send(SendOptions { to, sender, recipients, timeout })
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

/// The daemon changes its working directory, so a relative path must not stay one.
fn absolute(path: PathBuf) -> Result<PathBuf, Exit> {
    std::path::absolute(&path).map_err(|error| {
        eprintln!("qrelay: {}: {error}", path.display());
        Exit::Usage
    })
}

fn socket(text: &str) -> Result<Endpoint, String> {
    match endpoint::parse(text.as_bytes(), QMQP_PORT) {
        Ok(Parsed::Endpoint(endpoint)) => Ok(endpoint),
        Ok(Parsed::Host { .. }) => {
            Err("expected a path (/… ), @abstract or a numeric IP address".to_owned())
        }
        Err(error) => Err(error.to_string()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected a number of seconds".to_owned())?;
    if seconds > 0.0 && seconds <= 86_400.0 {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("expected more than 0 and at most 86400 seconds".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
