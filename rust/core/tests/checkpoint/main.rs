//! Reading checkpoints that a stranger wrote: each fault is one error that names the file and the reason.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may panic")]

mod adapters;
mod container;
mod links;
mod models;
mod reference;
mod support;
