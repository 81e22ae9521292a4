//! The values of float tensors, a block at a time.

use crate::checkpoint::{Checkpoint, Entry};
use crate::error::{Error, Result, show_name};
use crate::kernels::values::widen;

/// Elements read at once.
const BLOCK: usize = 1 << 16;

/// What the values of one tensor are like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Statistics {
    /// The root of the sum of squares.
    pub norm: f64,
    /// The largest magnitude.
    pub largest: f64,
    /// Infinities and NaN.
    pub nonfinite: u64,
    /// Zeros.
    pub zeros: u64,
}

/// The statistics of a float tensor, or none of another type.
pub fn statistics(checkpoint: &Checkpoint, name: &str) -> Result<Option<Statistics>> {
    let Some(entry) = checkpoint.entry(name).filter(|entry| entry.dtype.is_adapter_float()) else { return Ok(None) };
    let mut found = Statistics { norm: 0.0, largest: 0.0, nonfinite: 0, zeros: 0 };
    for start in (0..entry.elements()).step_by(BLOCK) {
        let (values, _) = block(checkpoint, name, entry, start)?;
        for value in values {
            found.norm += value * value;
            found.largest = found.largest.max(value.abs());
            found.nonfinite += u64::from(!value.is_finite());
            found.zeros += u64::from(value == 0.0);
        }
    }
    found.norm = found.norm.sqrt();
    Ok(Some(found))
}

/// Visits two float tensors of as many elements side by side: their values, and whether their bytes are equal.
pub fn side_by_side(
    (left, left_name): (&Checkpoint, &str),
    (right, right_name): (&Checkpoint, &str),
    mut visit: impl FnMut(&[f64], &[f64], bool),
) -> Result<()> {
    let missing = |checkpoint: &Checkpoint, name: &str| {
        Error::checkpoint(checkpoint.path(), format!("has no tensor `{}`", show_name(name)))
    };
    let one = left.entry(left_name).ok_or_else(|| missing(left, left_name))?;
    let other = right.entry(right_name).ok_or_else(|| missing(right, right_name))?;
    for start in (0..one.elements()).step_by(BLOCK) {
        let (one, one_bytes) = block(left, left_name, one, start)?;
        let (other, other_bytes) = block(right, right_name, other, start)?;
        visit(&one, &other, one_bytes == other_bytes);
    }
    Ok(())
}

fn block(checkpoint: &Checkpoint, name: &str, entry: &Entry, start: usize) -> Result<(Vec<f64>, Vec<u8>)> {
    let size = entry.dtype.size();
    let mut bytes = vec![0; BLOCK.min(entry.elements().saturating_sub(start)) * size];
    checkpoint.read_range(name, (start * size) as u64, &mut bytes)?;
    let values = if entry.dtype.is_adapter_float() { widen(entry.dtype, &bytes)? } else { Vec::new() };
    Ok((values, bytes))
}
