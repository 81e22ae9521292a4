//! Writing folders: what is there afterwards, whatever went wrong on the way.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may panic")]

mod adapter;
mod faults;
mod folder;
mod support;
