//! The action `exec_raw`: a program that reads the bare message, such as sendmail.
//!
//! Contract: the program gets the message with its inserted lines and the `Received` line, and no
//! envelope. Its exit status is the answer (see [`status`]), and what it writes to standard output
//! and standard error, made one line, the text.
//!
//! # Failure
//! Always a reply: `timeout` if the action has one, `internal server error` for a bad end without a
//! text or by a signal.

use qrelay_shared::qmqp::{MAX_REPLY_TEXT, Reply, Status};
use qrelay_shared::texts;

use crate::delivery::Delivery;
use crate::delivery::action::Exec;
use crate::delivery::children::ProgramExit;
use crate::delivery::exec::status;
use crate::delivery::program::{ProgramAction, ProgramContext, deliver, one_line};
use crate::mail::Mail;
use crate::mail::received::Front;

/// Runs the program.
pub(crate) fn run(host: &ProgramContext<'_>, mail: &Mail, action: &Exec) -> Delivery {
    let front = Front::of(mail);
    let mut beginning = Vec::new();
    front.write(&mut beginning);
    let mut input = vec![&beginning[..]];
    input.extend(front.rest());
    let kind = ProgramAction { input: &input, joined: true, enough: |_| false, verdict };
    deliver(host, mail, action, &kind)
}

fn verdict(exit: ProgramExit, output: &[u8]) -> Reply {
    let status = status(exit);
    let mut text = match exit {
        ProgramExit::Status(_) => one_line(output),
        // The output of a killed program may end in the middle of a sentence.
        ProgramExit::Signal(_) | ProgramExit::Unknown => String::new(),
    };
    if text.is_empty() && status != Status::Accepted {
        text = texts::INTERNAL_ERROR.into();
    }
    text.truncate(boundary(&text, MAX_REPLY_TEXT));
    Reply { status, text: text.into() }
}

/// Returns the end of the last character that fits into `limit` bytes.
fn boundary(text: &str, limit: usize) -> usize {
    (0..=limit.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal::SIGTERM;

    #[test]
    fn replies() {
        let table: [(ProgramExit, &[u8], &[u8]); 6] = [
            (ProgramExit::Status(0), b"", b"1:K,"),
            (ProgramExit::Status(0), b"queued\nas 1\n", b"12:Kqueued as 1,"),
            (ProgramExit::Status(75), b"", b"22:Zinternal server error,"),
            (ProgramExit::Status(67), b"no such user\n", b"13:Dno such user,"),
            (ProgramExit::Status(1), b"oops", b"5:Zoops,"),
            (ProgramExit::Signal(SIGTERM), b"oops", b"22:Zinternal server error,"),
        ];
        for (exit, output, reply) in table {
            assert_eq!(verdict(exit, output).encode(), reply, "{exit} {output:?}");
        }
    }

    #[test]
    fn a_long_text_ends_with_a_whole_character() {
        let reply = verdict(ProgramExit::Status(0), "\u{20ac}".repeat(200).as_bytes());
        assert_eq!(reply.text, "\u{20ac}".repeat(85).as_bytes());
        let reply = verdict(ProgramExit::Status(0), "a\u{20ac}".repeat(100).as_bytes());
        assert_eq!(reply.text.len(), 253);
    }
}
