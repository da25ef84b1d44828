//! The action `exec`: a program that speaks QMQP on its standard input and output.
//!
//! Contract: the program gets the whole request, as a next hop would. Its first netstring is the
//! reply if it also exits with 0; any other end overrides it ([`status`]). Its standard error goes
//! to the log.
//!
//! # Failure
//! Always a reply: `relay failed` without an answer, `malformed relay response`, `timeout` if the
//! action has one, or `internal server error` for a bad end.

use qrelay_shared::qmqp::{Reply, ReplyProgress, Status, parse_reply};
use qrelay_shared::texts;

use crate::delivery::Delivery;
use crate::delivery::action::Exec;
use crate::delivery::children::ProgramExit;
use crate::delivery::envelope::Envelope;
use crate::delivery::program::{ProgramAction, ProgramContext, deliver};
use crate::mail::Mail;

/// Runs the program.
pub(crate) fn run(host: &ProgramContext<'_>, mail: &Mail, action: &Exec) -> Delivery {
    let envelope = Envelope::new(mail);
    let pieces = envelope.pieces();
    let kind = ProgramAction {
        input: &pieces.iter().map(|piece| &**piece).collect::<Vec<_>>(),
        joined: false,
        enough: |output| !matches!(parse_reply(output), ReplyProgress::NeedMore),
        verdict,
    };
    deliver(host, mail, action, &kind)
}

fn verdict(exit: ProgramExit, output: &[u8]) -> Reply {
    match exit {
        ProgramExit::Status(0) => match parse_reply(output) {
            ReplyProgress::Complete(reply) => reply,
            ReplyProgress::NeedMore => Reply::temporary(texts::RELAY_FAILED),
            ReplyProgress::Malformed => Reply::temporary(texts::MALFORMED_RESPONSE),
        },
        exit => Reply { status: status(exit), text: texts::INTERNAL_ERROR.into() },
    }
}

/// Returns the status of the reply for a program's exit. 64 (usage), 65 (bad data), 67 (unknown
/// user), 68 (unknown host), 72 (system file missing), 77 (no permission) and 78 (configuration) of
/// sysexits.h, and 100 of qmail, are permanent failures; 0 is success; everything else is a
/// temporary failure.
pub(crate) fn status(exit: ProgramExit) -> Status {
    match exit {
        ProgramExit::Status(0) => Status::Accepted,
        ProgramExit::Status(64 | 65 | 67 | 68 | 72 | 77 | 78 | 100) => Status::Permanent,
        ProgramExit::Status(_) | ProgramExit::Signal(_) | ProgramExit::Unknown => Status::Temporary,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal::SIGKILL;

    #[test]
    fn ends() {
        for code in 0..=255 {
            let expected = match code {
                0 => Status::Accepted,
                64 | 65 | 67 | 68 | 72 | 77 | 78 | 100 => Status::Permanent,
                _ => Status::Temporary,
            };
            assert_eq!(status(ProgramExit::Status(code)), expected, "{code}");
        }
        assert_eq!(status(ProgramExit::Signal(SIGKILL)), Status::Temporary);
    }

    #[test]
    fn replies() {
        let table: [(ProgramExit, &[u8], &[u8]); 9] = [
            (ProgramExit::Status(0), b"3:Kok,", b"3:Kok,"),
            (ProgramExit::Status(0), b"003:Dno,3:Kok,", b"3:Dno,"),
            (ProgramExit::Status(0), b"", b"13:Zrelay failed,"),
            (ProgramExit::Status(0), b"3:Ko", b"13:Zrelay failed,"),
            (ProgramExit::Status(0), b"ok\n", b"25:Zmalformed relay response,"),
            (ProgramExit::Status(75), b"3:Kok,", b"22:Zinternal server error,"),
            (ProgramExit::Status(100), b"3:Kok,", b"22:Dinternal server error,"),
            (ProgramExit::Status(1), b"3:Dno,", b"22:Zinternal server error,"),
            (ProgramExit::Signal(SIGKILL), b"3:Kok,", b"22:Zinternal server error,"),
        ];
        for (exit, output, reply) in table {
            assert_eq!(verdict(exit, output).encode(), reply, "{exit} {output:?}");
        }
    }
}
