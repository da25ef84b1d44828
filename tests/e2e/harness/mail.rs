//! Mails and their QMQP form, written from the protocol page, not from the code under test.

use std::fmt;

/// A mail with its envelope.
#[derive(Clone, PartialEq, Eq)]
pub struct Mail {
    /// Header, empty line, body.
    pub message: Vec<u8>,
    /// Envelope sender.
    pub sender: Vec<u8>,
    /// Envelope recipients.
    pub recipients: Vec<Vec<u8>>,
}

impl fmt::Debug for Mail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text =
            |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).into_owned();
        f.debug_struct("Mail")
            .field("length", &self.message.len())
            .field("message", &text(&self.message))
            .field("sender", &text(&self.sender))
            .field("recipients", &self.recipients.iter().map(|r| text(r)).collect::<Vec<_>>())
            .finish()
    }
}

impl Mail {
    /// A small mail whose body is `body`.
    pub fn new(body: &str) -> Self {
        Self {
            message: format!("Subject: test\n\n{body}\n").into_bytes(),
            sender: b"sender@example.com".to_vec(),
            recipients: vec![b"recipient@example.org".to_vec()],
        }
    }

    /// A mail whose message has exactly `size` bytes, of all values.
    pub fn of_size(size: usize) -> Self {
        let mut mail = Self::new("");
        mail.message.extend((0..size).map(|i| (i * 7 + i / 251) as u8));
        mail.message.truncate(size);
        mail
    }

    /// The same with another sender.
    pub fn from(mut self, sender: &str) -> Self {
        self.sender = sender.into();
        self
    }

    /// The same with other recipients.
    pub fn to(mut self, recipients: &[&str]) -> Self {
        self.recipients = recipients.iter().map(|&r| r.into()).collect();
        self
    }

    /// The request's payload: three or more netstrings.
    pub fn payload(&self) -> Vec<u8> {
        let parts = [&self.message, &self.sender].into_iter().chain(&self.recipients);
        parts.map(|part| netstring(part)).collect::<Vec<_>>().concat()
    }

    /// The whole request.
    pub fn request(&self) -> Vec<u8> {
        netstring(&self.payload())
    }

    /// Takes a request's payload apart.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let (message, rest) = split(payload)?;
        let (sender, mut rest) = split(rest)?;
        let mut recipients = Vec::new();
        while !rest.is_empty() {
            let (recipient, after) = split(rest)?;
            recipients.push(recipient.to_vec());
            rest = after;
        }
        Some(Self { message: message.to_vec(), sender: sender.to_vec(), recipients })
    }

    /// The mail as qrelay passes it on for a client of this process: inserted lines, the
    /// `Received` line, then the message.
    pub fn relayed_from(&self, pid: u32, uid: u32, inserted: &str) -> Self {
        let head = format!("{inserted}Received: from PID={pid} UID={uid} with QMQP\r\n");
        let mut mail = self.clone();
        mail.message.splice(0..0, head.into_bytes());
        mail
    }

    /// The mail as it arrives behind qrelay when this process, run by root, sent it locally.
    pub fn relayed(&self) -> Self {
        self.relayed_from(std::process::id(), 0, "")
    }
}

/// `len:payload,`
pub fn netstring(payload: &[u8]) -> Vec<u8> {
    [format!("{}:", payload.len()).as_bytes(), payload, b","].concat()
}

/// The first netstring's payload and what follows it; `None` if it isn't complete or none.
pub fn split(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = input.iter().position(|&byte| byte == b':')?;
    let length: usize = std::str::from_utf8(&input[..colon]).ok()?.parse().ok()?;
    let body = &input[colon + 1..];
    (body.get(length) == Some(&b',')).then(|| (&body[..length], &body[length + 1..]))
}
