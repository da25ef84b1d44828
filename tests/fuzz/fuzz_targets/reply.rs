//! Fuzzes replies: a verdict about the first bytes stands whatever follows, and an encoded reply
//! parses to the same reply again.
//!
//! # Failure
//! A violation panics; libFuzzer keeps the input under `artifacts/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qrelay_shared::qmqp::{MAX_REPLY_TEXT, Reply, ReplyProgress, parse_reply};

fuzz_target!(|input: &[u8]| {
    let whole = parse_reply(input);
    for end in 0..input.len() {
        let judged = parse_reply(&input[..end]);
        assert!(judged == ReplyProgress::NeedMore || judged == whole);
    }
    if let ReplyProgress::Complete(mut reply) = whole {
        let encoded = reply.encode();
        reply.text.truncate(MAX_REPLY_TEXT);
        let again = Reply { status: reply.status, text: reply.text };
        assert_eq!(parse_reply(&encoded), ReplyProgress::Complete(again));
    }
});
