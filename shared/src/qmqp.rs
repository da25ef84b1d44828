//! placeholder
use serde::{Deserialize, Serialize};
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status { Accepted, Temporary, Permanent }
#[derive(Debug, Clone)]
pub struct Request { pub message: std::ops::Range<usize>, pub sender: std::ops::Range<usize>, pub recipients: Vec<std::ops::Range<usize>>, pub payload: std::ops::Range<usize> }
