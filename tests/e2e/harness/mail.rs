//! Mails and their QMQP form, written from the description of the protocol and not from the code
//! under test, so that a mistake there can't hide.

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
    /// Creates a small mail whose body is `body`.
    pub fn new(body: &str) -> Self {
        Self {
            message: format!("Subject: test\n\n{body}\n").into_bytes(),
            sender: b"sender@example.com".to_vec(),
            recipients: vec![b"recipient@example.org".to_vec()],
        }
    }

    /// Creates a mail whose message has exactly `size` bytes, of all values.
    pub fn of_size(size: usize) -> Self {
        let mut mail = Self::new("");
        mail.message.extend((0..size).map(|i| (i * 7 + i / 251) as u8));
        mail.message.truncate(size);
        mail
    }

    /// Replaces the sender.
    pub fn from(mut self, sender: &str) -> Self {
        self.sender = sender.into();
        self
    }

    /// Replaces the recipients.
    pub fn to(mut self, recipients: &[&str]) -> Self {
        self.recipients = recipients.iter().map(|&r| r.into()).collect();
        self
    }

    /// Returns the payload of the request: three or more netstrings.
    pub fn payload(&self) -> Vec<u8> {
        let parts = [&self.message, &self.sender].into_iter().chain(&self.recipients);
        parts.map(|part| netstring(part)).collect::<Vec<_>>().concat()
    }

    /// Returns the whole request, a netstring.
    pub fn request(&self) -> Vec<u8> {
        netstring(&self.payload())
    }

    /// Parses the payload of a request; `None` if it is malformed.
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

    /// Returns the mail as qrelay relays it for a local client with this pid and uid: the inserted
    /// lines, which end in LF, the `Received` line, then the message, whose first line ends in LF,
    /// too, if it has an end.
    pub fn relayed_from(&self, pid: u32, uid: u32, inserted: &str) -> Self {
        let head = format!("{inserted}Received: from PID={pid} UID={uid} with QMQP\n");
        let mut mail = self.clone();
        mail.message.splice(0..0, head.into_bytes());
        mail
    }

    /// Returns the mail as qrelay relays it when this process, run by root, has sent it locally.
    pub fn relayed(&self) -> Self {
        self.relayed_from(std::process::id(), 0, "")
    }
}

/// Returns `payload` as a netstring: `length:payload,`.
pub fn netstring(payload: &[u8]) -> Vec<u8> {
    [format!("{}:", payload.len()).as_bytes(), payload, b","].concat()
}

/// Returns the payload of the first netstring and the bytes after it; `None` if there is no
/// complete netstring.
pub fn split(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = input.iter().position(|&byte| byte == b':')?;
    let length: usize = std::str::from_utf8(&input[..colon]).ok()?.parse().ok()?;
    let body = &input[colon + 1..];
    (body.get(length) == Some(&b',')).then(|| (&body[..length], &body[length + 1..]))
}
