//! What the supervisor does beside relaying: logs, shared dictionaries, systemd.

pub mod dictionaries;
pub mod dictionary_server;
pub mod mail_log;
pub mod pond;
pub mod systemd;
