//! The page that shows the charts.
//!
//! Contract: the page is one file, with its script and its style inside, and asks for nothing but
//! `/status.json` and `/history.json`. A browser runs only what has the nonce, which is another one
//! for every load.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};

const PAGE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");

/// Returns a number that nobody can guess.
pub fn nonce() -> io::Result<String> {
    let mut random = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(random.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

/// Returns the page whose script and style have this nonce.
pub fn page(nonce: &str) -> String {
    PAGE.replace("{nonce}", nonce).replace("{style}", STYLE).replace("{script}", SCRIPT)
}
