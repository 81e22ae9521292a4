//! What is on the disk after a failure, a kill or a loss of power at any call that writes.
//!
//! Each law is stated over seeds, each of which fixes the case, the call that strikes, and what the disk kept.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may panic"
)]

mod adapter;
mod fake;
mod merge;

/// "No space left on device" and "Input/output error".
const ERRORS: [i32; 2] = [28, 5];

/// How many seeds each law takes.
const SEEDS: u64 = 10_000;
