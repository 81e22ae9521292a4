//! How many weights a change moves: one that is smaller than half a step of their type leaves them as they were.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::work::Inputs;
use crate::error::Result;
use crate::plan::{Change, File, LowRank, Output};
use crate::threads;
use crate::writer::PositionedFile;

/// Bytes of a block that is looked at, and from the start of one such to the next.
const BLOCK: usize = 1 << 15;
const STRIDE: usize = 1 << 23;

/// Values of a changed tensor that were looked at, and those among them that are others than before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Those looked at.
    pub seen: u64,
    /// Those that changed.
    pub moved: u64,
}

impl Moved {
    /// Those that changed, as a part of one.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a share is rounded anyway")]
    pub fn share(self) -> f64 {
        self.moved as f64 / self.seen.max(1) as f64
    }
}

/// Looks at a sample of each tensor of a file, the first of which lies at `offset`, that something was added to.
pub fn moved(inputs: Inputs, file: &File, target: &PositionedFile, offset: u64) -> Result<BTreeMap<String, Moved>> {
    let mut start = offset;
    let placed = file.outputs.iter().map(|output| {
        start += output.bytes() as u64;
        (output, start - output.bytes() as u64)
    });
    let placed: Vec<_> = placed.filter(|(output, _)| is_meant_for_all(output)).collect();
    let one = |(output, start): (&Output, u64)| {
        let moved = tensor(inputs, output, target, start).transpose()?;
        Some(moved.map(|moved| (output.name.clone(), moved)))
    };
    threads::install(|| placed.into_par_iter().filter_map(one).collect())
}

/// Whether a change is meant for all values of a tensor, so that many that stay tell of its smallness.
fn is_meant_for_all(output: &Output) -> bool {
    output.updates.iter().any(|update| matches!(&update.change, Change::LowRank(LowRank { part: None, .. })))
}

/// The sample of one tensor, if its values were made one by one from others of the same type.
fn tensor(inputs: Inputs, output: &Output, target: &PositionedFile, start: u64) -> Result<Option<Moved>> {
    let (source, name) = inputs.source(output)?;
    let same = source.entry(name).is_some_and(|from| from.dtype == output.dtype && from.bytes() == output.bytes());
    if !same {
        return Ok(None);
    }
    let mut sum = Moved::default();
    for at in (0..output.bytes()).step_by(STRIDE) {
        let length = BLOCK.min(output.bytes() - at);
        let (mut before, mut after) = (vec![0; length], vec![0; length]);
        source.read_range(name, at as u64, &mut before)?;
        target.read_at(&mut after, start + at as u64)?;
        sum.seen += (length / output.dtype.size()) as u64;
        sum.moved += match output.dtype.size() {
            2 => differing::<2>(&before, &after),
            _ => differing::<4>(&before, &after),
        };
    }
    Ok(Some(sum))
}

/// How many elements of that size differ.
fn differing<const SIZE: usize>(before: &[u8], after: &[u8]) -> u64 {
    let ((before, _), (after, _)) = (before.as_chunks::<SIZE>(), after.as_chunks::<SIZE>());
    before.iter().zip(after).map(|(before, after)| u64::from(before != after)).sum()
}

/// What users should know about tensors of which most values stayed.
pub fn note(moved: &BTreeMap<String, Moved>) -> Option<String> {
    let still = moved.values().filter(|moved| 2 * moved.moved < moved.seen).count();
    (still > 0).then(|| {
        format!(
            "in {still} of {} tensors most weights stayed as they were: what the adapter adds is nothing, or less than half \
             a step of their type, which --dtype f32 holds",
            moved.len()
        )
    })
}
