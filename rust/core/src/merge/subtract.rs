//! What a subtraction cannot tell.
//!
//! A merge rounds `weight + update` to the grid of the sum. Subtracting the update gives the weight back where its own grid
//! is as coarse; where it is finer, the sum has lost digits of it.

use half::{bf16, f16};
use rayon::prelude::*;

use super::work::Inputs;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::plan::{File, Output};
use crate::threads;
use crate::writer::PositionedFile;

/// Bytes that are looked at together.
const BLOCK: usize = 1 << 20;

/// What a subtraction leaves open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Subtracted {
    /// Values that were changed.
    pub values: u64,
    /// Those whose grid is finer than that of the value they were subtracted from.
    pub open: u64,
}

impl Subtracted {
    pub(super) fn add(self, other: Self) -> Self {
        Self { values: self.values + other.values, open: self.open + other.open }
    }

    /// What it means, for people.
    #[must_use]
    pub fn what(&self) -> String {
        #[allow(clippy::cast_precision_loss, reason = "a share is rounded anyway")]
        let share = 100.0 * self.open as f64 / self.values.max(1) as f64;
        format!(
            "taken out by subtraction: {} of {} changed values ({share:.2} %) may differ from the base's, by less than one \
             unit in the last place of the merged value; the others are the base's, but where rounding met a tie",
            self.open, self.values
        )
    }
}

/// Counts the values of a file, whose tensors lie at `offset` and after, that a subtraction leaves open.
pub fn subtracted(inputs: Inputs, file: &File, target: &PositionedFile, offset: u64) -> Result<Subtracted> {
    let mut start = offset;
    let mut sum = Subtracted::default();
    for output in &file.outputs {
        if !output.updates.is_empty() {
            sum = sum.add(tensor(inputs, output, target, start)?);
        }
        start += output.bytes() as u64;
    }
    Ok(sum)
}

fn tensor(inputs: Inputs, output: &Output, target: &PositionedFile, start: u64) -> Result<Subtracted> {
    let (source, name) = inputs.source(output)?;
    let size = output.dtype.size();
    let one = |at: usize| -> Result<Subtracted> {
        let length = BLOCK.min(output.bytes() - at);
        let (mut before, mut after) = (vec![0; length], vec![0; length]);
        source.read_range(name, at as u64, &mut before)?;
        target.read_at(&mut after, start + at as u64)?;
        let pairs = before.chunks_exact(size).zip(after.chunks_exact(size));
        let open = pairs.filter(|(before, after)| grid(output.dtype, before).0 > grid(output.dtype, after).1);
        Ok(Subtracted { values: (length / size) as u64, open: open.count() as u64 })
    };
    let blocks: Vec<usize> = (0..output.bytes()).step_by(BLOCK).collect();
    let sum = || blocks.into_par_iter().map(one).try_reduce(Subtracted::default, |one, other| Ok(one.add(other)));
    threads::install(sum)
}

/// The exponents of the grid that a value is on, and of that just nearer to zero, which is finer next to a power of two.
fn grid(dtype: Dtype, bytes: &[u8]) -> (u32, u32) {
    let bits = bytes.iter().rev().fold(0, |bits, byte| bits << 8 | u32::from(*byte));
    let digits = match dtype {
        Dtype::BF16 => bf16::MANTISSA_DIGITS,
        Dtype::F16 => f16::MANTISSA_DIGITS,
        _ => f32::MANTISSA_DIGITS,
    };
    let sign = 1_u32 << (8 * dtype.size() - 1);
    // The smallest normal numbers share their grid with the subnormal ones.
    let exponent = |bits: u32| (bits >> (digits - 1)).max(1);
    (exponent(bits & !sign), exponent((bits & !sign).saturating_sub(1)))
}
