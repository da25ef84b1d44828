//! Fuzzes socket addresses and networks: the displayed form parses to the same value again.
//!
//! # Failure
//! A violation panics; libFuzzer keeps the input under `artifacts/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qrelay_shared::endpoint::{Endpoint, Parsed, QMQP_PORT, parse};
use qrelay_shared::network::Network;

fuzz_target!(|input: &[u8]| {
    if let Ok(Parsed::Endpoint(endpoint @ Endpoint::Inet(_))) = parse(input, QMQP_PORT) {
        let shown = endpoint.to_string();
        assert_eq!(parse(shown.as_bytes(), 0), Ok(Parsed::Endpoint(endpoint)));
    }
    if let Ok(Ok(network)) = str::from_utf8(input).map(str::parse::<Network>) {
        assert_eq!(network.to_string().parse(), Ok(network));
    }
});
