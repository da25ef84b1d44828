//! Datagrams of beng-proxy's control protocol.
//!
//! Contract: a datagram is the magic number and commands, each with the length of its payload, its
//! number, the payload and zeros up to a multiple of 4 bytes; integers are big-endian. Nothing is
//! sent here.
//!
//! # Failure
//! [`ControlError`]; the datagram is as it was before.

use thiserror::Error;

/// The first four bytes.
const MAGIC: u32 = 0x6304_6101;

/// Longest datagram: the largest payload of UDP over IPv4 (65,535 bytes without the headers of IP
/// and UDP).
pub const MAX_DATAGRAM: usize = 65_507;

/// What the receiver is asked to do; the numbers are the protocol's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Let child processes with a tag finish and end.
    FadeChildren = 8,
    /// Forget cached results of a filter with a tag.
    FlushFilterCache = 12,
    /// Forget a session.
    DiscardSession = 14,
    /// Forget cached HTTP responses with a tag.
    FlushHttpCache = 15,
    /// End child processes with a tag.
    TerminateChildren = 16,
    /// Close connections to databases with a tag.
    DisconnectDatabase = 20,
    /// Reset an account's limiter.
    ResetLimiter = 22,
    /// Refuse a client.
    RejectClient = 23,
    /// Slow a client down.
    TarpitClient = 24,
    /// Cancel a job; its payload is made by [`Datagram::cancel_job`].
    CancelJob = 25,
}

/// Why a command can't be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ControlError {
    /// The datagram would be longer than UDP can carry.
    #[error("the datagram would be longer than {MAX_DATAGRAM} bytes")]
    TooLong,
    /// The partition's name ends at a NUL.
    #[error("a partition or job id can't contain a NUL byte")]
    Nul,
}

/// A datagram that is being put together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram(Vec<u8>);

impl Default for Datagram {
    fn default() -> Self {
        Self::new()
    }
}

impl Datagram {
    /// One without commands.
    pub fn new() -> Self {
        Self(MAGIC.to_be_bytes().to_vec())
    }

    /// Adds a command.
    ///
    /// # Errors
    /// [`ControlError::TooLong`].
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

    /// Adds [`Command::CancelJob`].
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn cancel_job(&mut self, partition: &[u8], id: &[u8]) -> Result<(), ControlError> {
        if partition.contains(&0) || id.contains(&0) {
            return Err(ControlError::Nul);
        }
        self.push(Command::CancelJob, &[partition, b"\0", id].concat())
    }

    /// Whether there is no command yet.
    pub fn is_empty(&self) -> bool {
        self.0.len() == size_of_val(&MAGIC)
    }

    /// As it is sent.
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
