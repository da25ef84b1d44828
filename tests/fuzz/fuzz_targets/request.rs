//! Fuzzes requests: `progress` and `parse` agree, and only the canonical form is accepted.
//!
//! # Failure
//! A violation panics; libFuzzer keeps the input under `artifacts/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qrelay_shared::qmqp::{Limits, Progress, encode_request, parse, progress};

fuzz_target!(|input: &[u8]| {
    let limits = Limits { max_size: 1000, default_domain: None };
    let judged = progress(input, &limits);
    let parsed = parse(input, &limits);
    match judged {
        Err(error) => assert_eq!(parsed, Err(error)),
        Ok(Progress::NeedMore { .. }) => assert!(parsed.is_err()),
        Ok(Progress::Complete { total }) => assert_eq!(parse(&input[..total], &limits), parsed),
    }
    if let Ok(request) = parsed {
        let recipients = request.recipients.iter().map(|range| &input[range.clone()]);
        let again = encode_request(&input[request.message], &input[request.sender], recipients);
        assert_eq!(again, input[..request.payload.end + 1]);
    }
});
