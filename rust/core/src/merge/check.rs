//! Reading back what was written: some rows of each changed tensor against float64, all of the others against their source.

use half::{bf16, f16};
use rayon::prelude::*;

use super::Watch;
use super::reference::Reference;
use super::work::Inputs;
use super::write::stop_if_interrupted;
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
use crate::plan::{File, Output};
use crate::threads;
use crate::writer::PositionedFile;

/// Groups of rows of a changed tensor that are made again.
const SAMPLED: usize = 8;

/// Bytes that are compared at once.
const BLOCK: usize = 1 << 20;

/// What a check found to be right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Checked {
    /// Rows of changed tensors that were made again in float64.
    pub rows: u64,
    /// Values in these rows.
    pub values: u64,
    /// Those that are not the nearest value of their type but the one next to it.
    pub off: u64,
    /// Tensors that are their source's, bit for bit.
    pub copied: u64,
}

impl Checked {
    pub(super) fn add(self, other: Self) -> Self {
        Self {
            rows: self.rows + other.rows,
            values: self.values + other.values,
            off: self.off + other.off,
            copied: self.copied + other.copied,
        }
    }

    /// What was found, for people.
    #[must_use]
    pub fn what(&self) -> String {
        format!(
            "{} rows made again in float64: {} of {} values off by one unit in the last place, none by more; \
             tensors bit-identical to their source: {}",
            self.rows, self.off, self.values, self.copied
        )
    }
}

/// Checks a file that starts with `header`.
pub fn check(
    inputs: Inputs,
    file: &File,
    target: &PositionedFile,
    header: &[u8],
    watch: &dyn Watch,
) -> Result<Checked> {
    let mut written = vec![0; header.len()];
    target.read_at(&mut written, 0)?;
    if written != header {
        return Err(wrong(&file.name, "differ from the header that was made"));
    }
    let mut start = header.len() as u64;
    let mut checked = Checked::default();
    for output in &file.outputs {
        stop_if_interrupted(watch)?;
        let (source, name) = inputs.source(output)?;
        let same = output.updates.is_empty() && source.entry(name).is_some_and(|entry| entry.dtype == output.dtype);
        let found =
            if same { copied(inputs, output, target, start, watch) } else { changed(inputs, output, target, start) };
        checked = checked.add(found?);
        start += output.bytes() as u64;
    }
    Ok(checked)
}

/// Compares a tensor with its source, byte for byte.
fn copied(inputs: Inputs, output: &Output, target: &PositionedFile, start: u64, watch: &dyn Watch) -> Result<Checked> {
    let (source, name) = inputs.source(output)?;
    let block = |at: usize| {
        stop_if_interrupted(watch)?;
        let length = BLOCK.min(output.bytes() - at);
        let (mut read, mut written) = (vec![0; length], vec![0; length]);
        source.read_range(name, at as u64, &mut read)?;
        target.read_at(&mut written, start + at as u64)?;
        if read == written {
            Ok(())
        } else {
            Err(wrong(&output.name, &format!("differ from their source near byte {at}")))
        }
    };
    let blocks: Vec<usize> = (0..output.bytes()).step_by(BLOCK).collect();
    threads::install(|| blocks.into_par_iter().try_for_each(block))?;
    Ok(Checked { copied: 1, ..Checked::default() })
}

/// Makes some rows of a tensor again, spread over it, the first and the last among them.
fn changed(inputs: Inputs, output: &Output, target: &PositionedFile, start: u64) -> Result<Checked> {
    let reference = Reference::new(inputs, output)?;
    let (rows, columns) = reference.shape();
    let align = reference.align();
    let groups = rows.div_ceil(align);
    let mut sampled: Vec<usize> = (0..SAMPLED).map(|at| at * groups.saturating_sub(1) / (SAMPLED - 1)).collect();
    sampled.dedup();
    let one = |group: usize| -> Result<Checked> {
        let first = group * align;
        let count = align.min(rows.saturating_sub(first));
        let expected = reference.rows(first, count)?;
        let mut bytes = vec![0; count * columns * output.dtype.size()];
        let offset = first * columns * output.dtype.size();
        target.read_at(&mut bytes, start + offset as u64)?;
        let mut off = 0;
        let found = bytes.chunks_exact(output.dtype.size()).zip(expected.values.iter().zip(&expected.reach));
        for (index, (found, (value, reach))) in found.enumerate() {
            let near = nearness(output.dtype, found, *value, *reach);
            off += u64::from(near == Nearness::Next);
            if near == Nearness::Far {
                let (row, column) = (first + index / columns.max(1), index % columns.max(1));
                return Err(wrong(&output.name, &format!("are not near {value:e} in row {row} and column {column}")));
            }
        }
        Ok(Checked { rows: count as u64, values: expected.values.len() as u64, off, copied: 0 })
    };
    threads::install(|| sampled.into_par_iter().map(one).try_reduce(Checked::default, |one, other| Ok(one.add(other))))
}

fn wrong(name: &str, how: &str) -> Error {
    Error::Merge(format!(
        "{}: the bytes written {how}; hint: try again, and if it happens again, test this machine's memory and report it",
        show_name(name)
    ))
}

/// Where a value lies among those of its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nearness {
    /// None is nearer to the one expected.
    Nearest,
    /// Its neighbour is, or sums of terms that cancel each other leave more than that open.
    Next,
    Far,
}

/// How near a value's bytes are to `expected`, a sum of terms as large as `reach`.
fn nearness(dtype: Dtype, bytes: &[u8], expected: f64, reach: f64) -> Nearness {
    let bits = bytes.iter().rev().fold(0, |bits, byte| bits << 8 | u32::from(*byte));
    let found = value(dtype, bits);
    if !expected.is_finite() {
        return if found.abs() < end(dtype) { Nearness::Far } else { Nearness::Nearest };
    }
    let sign = 1 << (8 * dtype.size() - 1);
    let next = step(bits, sign, expected > found);
    let after = step(next, sign, expected > found);
    let gap = |from: u32, to: u32| {
        let gap = (value(dtype, to) - value(dtype, from)).abs();
        if gap.is_nan() { f64::INFINITY } else { gap }
    };
    // Terms are added in float32 for types of 16 bits and in float64 for those of 32.
    let open = if dtype.size() == 2 { 2.0_f64.powi(-16) } else { 2.0_f64.powi(-40) } * reach;
    let error = (found - expected).abs();
    if error <= gap(bits, next) / 2.0 {
        Nearness::Nearest
    } else if error <= gap(bits, next) + gap(next, after) / 2.0 || error <= open {
        Nearness::Next
    } else {
        Nearness::Far
    }
}

/// The value of a type's bits; for infinity the number that would be next, were there no end.
fn value(dtype: Dtype, bits: u32) -> f64 {
    #[allow(clippy::cast_possible_truncation, reason = "the upper half is empty")]
    let half = bits as u16;
    let value = match dtype {
        Dtype::BF16 => bf16::from_bits(half).to_f64(),
        Dtype::F16 => f16::from_bits(half).to_f64(),
        _ => f64::from(f32::from_bits(bits)),
    };
    if value.is_infinite() { end(dtype).copysign(value) } else { value }
}

/// The power of two at which a type's numbers end.
fn end(dtype: Dtype) -> f64 {
    2.0_f64.powi(if dtype == Dtype::F16 { 16 } else { 128 })
}

/// The bits of the value next to that of `bits`, above it or below.
fn step(bits: u32, sign: u32, up: bool) -> u32 {
    match (bits & sign != 0, up) {
        (false, true) | (true, false) => bits + 1,
        (false, false) if bits == 0 => sign | 1,
        (true, true) if bits == sign => 1,
        _ => bits - 1,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn near(found: f32, expected: f64) -> Nearness {
        nearness(Dtype::BF16, &bf16::from_f32(found).to_le_bytes(), expected, 0.0)
    }

    #[test]
    fn a_value_is_the_nearest_its_neighbour_or_neither() {
        // Above one, bfloat16 goes in steps of 1/128.
        for (found, expected, is) in [
            (1.0, 1.0, Nearness::Nearest),
            (1.0, 1.0 + 0.49 / 128.0, Nearness::Nearest),
            (1.0, 1.0 + 0.51 / 128.0, Nearness::Next),
            (1.0, 1.0 - 0.51 / 256.0, Nearness::Next),
            (1.0, 1.0 + 1.51 / 128.0, Nearness::Far),
            (-1.0, -1.0 - 1.51 / 128.0, Nearness::Far),
            (0.0, -1e-40, Nearness::Next),
            (-0.0, 0.0, Nearness::Nearest),
            (f32::INFINITY, 2.0_f64.powi(128), Nearness::Nearest),
            (f32::INFINITY, 3.3e38, Nearness::Far),
            (f32::INFINITY, f64::INFINITY, Nearness::Nearest),
            (f32::NAN, f64::NAN, Nearness::Nearest),
            (f32::NAN, 1.0, Nearness::Far),
            (1.0, f64::NAN, Nearness::Far),
            (1e-20, 1e20, Nearness::Far),
        ] {
            assert_eq!(near(found, expected), is, "{found} for {expected}");
        }
    }

    #[test]
    fn every_value_is_the_nearest_to_itself() {
        for bits in 0..=u16::MAX {
            for (dtype, value) in
                [(Dtype::F16, f16::from_bits(bits).to_f64()), (Dtype::BF16, bf16::from_bits(bits).to_f64())]
            {
                assert_eq!(nearness(dtype, &bits.to_le_bytes(), value, 0.0), Nearness::Nearest, "{bits:#x}");
            }
        }
        for value in [1.0_f32, f32::MIN_POSITIVE, f32::MAX, -3.7e-39] {
            assert_eq!(nearness(Dtype::F32, &value.to_le_bytes(), f64::from(value), 0.0), Nearness::Nearest);
        }
    }

    #[test]
    fn what_cancels_leaves_room() {
        assert_eq!(nearness(Dtype::BF16, &bf16::from_f32(1e-9).to_le_bytes(), 1.1e-9, 1.0), Nearness::Next);
    }
}
