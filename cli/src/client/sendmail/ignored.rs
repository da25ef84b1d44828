//! Options of sendmail, Postfix and Exim that callers pass by habit, and that mean nothing to
//! qrelay. `-oi` is the exception among the many options that begin with `-o`.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};

/// Options with a value, which may be a part of the same argument.
const WITH_VALUE: &[char] = &['A', 'B', 'C', 'L', 'N', 'O', 'R', 'V', 'X', 'e', 'h', 'o', 'p'];
/// Options without a value.
const ALONE: &[char] = &['G', 'U', 'm', 'n', 'v'];

/// The ignored options of a command line.
#[derive(Debug, Clone)]
pub struct Ignored {
    /// `-oi` is among them.
    dots: bool,
}

impl Ignored {
    /// Returns whether a line with a single dot doesn't end the message.
    pub fn dots(&self) -> bool {
        self.dots
    }
}

impl FromArgMatches for Ignored {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut values = matches.get_many::<String>("o").into_iter().flatten();
        Ok(Self { dots: values.any(|value| value == "i") })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Ignored {
    fn augment_args(command: Command) -> Command {
        let option = |&name: &char| Arg::new(name.to_string()).short(name).hide(true);
        command
            .args(
                WITH_VALUE
                    .iter()
                    .map(option)
                    .map(|option| option.action(ArgAction::Append).allow_hyphen_values(true)),
            )
            .args(ALONE.iter().map(option).map(|option| option.action(ArgAction::Count)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}
