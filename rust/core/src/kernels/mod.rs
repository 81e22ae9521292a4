//! LoRA's update of a weight, `weight += scaling * up @ down`, a block of rows at a time.
//!
//! bfloat16 weights are widened to float32, float16 and float32 ones to float64; the products are accumulated in that type in
//! the order of the rank, the weight is added to the scaled sum, and the result is rounded once to nearest even. Every
//! multiplication is fused with its addition, and every element is computed alone, by the same operations whatever block it
//! falls in, so the bits depend neither on the number of threads nor on the instruction set.

#![allow(
    clippy::inline_always,
    reason = "the loops must be compiled inside the function that enables their instructions"
)]

pub mod correction;
mod element;
mod factors;
pub mod in_place;
mod lanes;
mod low_rank;
mod norms;
mod parallel;
pub mod values;

pub use element::{Element, Wide};
pub use factors::{Factors, ROWS, block_rows};
pub use norms::sum_of_squares;

#[cfg(test)]
mod tests;
