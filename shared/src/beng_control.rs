//! Datagrams of beng-proxy's control protocol.
//!
//! Contract: a datagram is the magic number followed by commands. A command is the length of its
//! payload, its number, the payload, and zeros up to a multiple of 4 bytes. Integers are
//! big-endian. This module sends nothing.
//!
//! # Failure
//! Every error is a [`ControlError`], and leaves the datagram as it was before.

use thiserror::Error;

/// The magic number: the first four bytes of a datagram.
const MAGIC: u32 = 0x6304_6101;

/// Longest datagram in bytes: the largest payload of UDP over IPv4 (65,535 bytes without the
/// headers of IP and UDP).
pub(crate) const MAX_DATAGRAM: usize = 65_507;

/// The command to the receiver; the numbers are the protocol's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Lets child processes with a tag finish their work and end.
    FadeChildren = 8,
    /// Removes cached results of a filter with a tag.
    FlushFilterCache = 12,
    /// Removes a session.
    DiscardSession = 14,
    /// Removes cached HTTP responses with a tag.
    FlushHttpCache = 15,
    /// Ends child processes with a tag.
    TerminateChildren = 16,
    /// Closes connections to databases with a tag.
    DisconnectDatabase = 20,
    /// Resets the limiter of an account.
    ResetLimiter = 22,
    /// Refuses the connections of a client.
    RejectClient = 23,
    /// Delays the requests of a client.
    TarpitClient = 24,
    /// Cancels a job; the payload comes from [`Datagram::cancel_job`].
    CancelJob = 25,
}

/// The reason why a command can't be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ControlError {
    /// The datagram would be longer than UDP can carry.
    #[error("the datagram would be longer than {MAX_DATAGRAM} bytes")]
    TooLong,
    /// A partition or a job id contains a NUL, which would end it in the payload.
    #[error("a partition or job id can't contain a NUL byte")]
    Nul,
}

/// A datagram under construction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram(Vec<u8>);

impl Default for Datagram {
    fn default() -> Self {
        Self::new()
    }
}

impl Datagram {
    /// Returns a datagram without commands.
    pub fn new() -> Self {
        Self(MAGIC.to_be_bytes().to_vec())
    }

    /// Adds a command with its payload.
    ///
    /// # Errors
    /// Returns [`ControlError::TooLong`] if the datagram or the payload would be too long.
    pub fn push(&mut self, command: Command, payload: &[u8]) -> Result<(), ControlError> {
        let length = u16::try_from(payload.len()).map_err(|_| ControlError::TooLong)?;
        let padded = payload.len().next_multiple_of(4);
        if self.0.len() + 4 + padded > MAX_DATAGRAM {
            return Err(ControlError::TooLong);
        }
        self.0.extend_from_slice(&length.to_be_bytes());
        self.0.extend_from_slice(&(command as u16).to_be_bytes());
        self.0.extend_from_slice(payload);
        self.0.resize(self.0.len() + padded - payload.len(), 0);
        Ok(())
    }

    /// Adds [`Command::CancelJob`] for the job `id` of a partition.
    ///
    /// # Errors
    /// Returns every [`ControlError`].
    pub fn cancel_job(&mut self, partition: &[u8], id: &[u8]) -> Result<(), ControlError> {
        if partition.contains(&0) || id.contains(&0) {
            return Err(ControlError::Nul);
        }
        self.push(Command::CancelJob, &[partition, b"\0", id].concat())
    }

    /// Returns whether the datagram has no command.
    pub fn is_empty(&self) -> bool {
        self.0.len() == size_of_val(&MAGIC)
    }

    /// Returns the bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_its_number() {
        let table = [
            (Command::FadeChildren, 8),
            (Command::FlushFilterCache, 12),
            (Command::DiscardSession, 14),
            (Command::FlushHttpCache, 15),
            (Command::TerminateChildren, 16),
            (Command::DisconnectDatabase, 20),
            (Command::ResetLimiter, 22),
            (Command::RejectClient, 23),
            (Command::TarpitClient, 24),
            (Command::CancelJob, 25),
        ];
        for (command, number) in table {
            let mut datagram = Datagram::new();
            assert!(datagram.is_empty());
            datagram.push(command, b"").expect("room");
            assert!(!datagram.is_empty());
            assert_eq!(datagram.as_bytes(), [0x63, 0x04, 0x61, 0x01, 0, 0, 0, number]);
        }
    }

    #[test]
    fn payloads_are_padded() {
        let mut datagram = Datagram::new();
        for payload in ["", "a", "ab", "abc", "abcd", "abcde"] {
            datagram.push(Command::FadeChildren, payload.as_bytes()).expect("room");
        }
        datagram.cancel_job(b"part", b"j1").expect("room");
        let expected: &[u8] = b"\x63\x04\x61\x01\
            \0\0\0\x08\
            \0\x01\0\x08a\0\0\0\
            \0\x02\0\x08ab\0\0\
            \0\x03\0\x08abc\0\
            \0\x04\0\x08abcd\
            \0\x05\0\x08abcde\0\0\0\
            \0\x07\0\x19part\0j1\0";
        assert_eq!(datagram.as_bytes(), expected);
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let mut datagram = Datagram::new();
        assert_eq!(
            datagram.push(Command::FadeChildren, &[b'x'; 65_536]),
            Err(ControlError::TooLong)
        );
        assert_eq!(
            datagram.push(Command::FadeChildren, &[b'x'; 65_500]),
            Err(ControlError::TooLong)
        );
        assert_eq!(datagram.cancel_job(b"a\0b", b"c"), Err(ControlError::Nul));
        assert_eq!(datagram.cancel_job(b"a", b"\0"), Err(ControlError::Nul));
        assert!(datagram.is_empty());
        datagram.push(Command::FadeChildren, &[b'x'; 65_496]).expect("room");
        assert_eq!(datagram.as_bytes().len(), 65_504);
        assert_eq!(datagram.push(Command::FadeChildren, b""), Err(ControlError::TooLong));
    }
}
