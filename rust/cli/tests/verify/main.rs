//! `peftrs verify`: every seeded fault is named, and nothing that is merely rounded otherwise.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;
mod configs;
mod faults;
mod right;
mod support;
