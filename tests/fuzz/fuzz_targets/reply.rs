//! Replies: a judgement on a beginning stands, and what is written reads back.
//!
//! # Failure
//! A panic; libFuzzer keeps the input under `artifacts/`.
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
