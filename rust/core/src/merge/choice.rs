//! Which base a change that was trained over quantized weights goes into: these, dequantized, or those that they were made from.
//!
//! What was trained is `D + Δ`, with `D` the dequantized weights. A checkpoint of 16 bits holds it but for its own rounding; with
//! the original `W` in the place of `D`, it is off by `W − D` besides, which is what quantizing lost and may be an improvement.

use rayon::prelude::*;

use super::Merge;
use super::work::prepare;
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
use crate::kernels::values::widen;
use crate::plan::{Output, Source};
use crate::threads;

/// How far the merged weights are from those that were trained, as a share of the change: root mean squares over all of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// With the quantized weights as the base: what rounding to the output's type loses.
    pub dequantized: f64,
    /// With the original ones.
    pub original: f64,
}

impl Choice {
    /// For people.
    #[must_use]
    pub fn what(&self) -> String {
        format!(
            "the merged weights differ from those that were trained by {:.3} % of the change with --base dequantized, by {:.3} % \
             with --base original",
            100.0 * self.dequantized,
            100.0 * self.original
        )
    }

    /// Measures both: `quantized` and `original` are the same merge into float32, unrounded, and `merged` is either into the
    /// types that are written.
    pub fn measure(quantized: &Merge, original: &Merge, merged: &Merge) -> Result<Self> {
        let outputs =
            |merge: &Merge| -> Vec<Output> { merge.plan.files.iter().flat_map(|file| file.outputs.clone()).collect() };
        let (ours, theirs, written) = (outputs(quantized), outputs(original), outputs(merged));
        let changed: Vec<&Output> = ours.iter().filter(|output| !output.updates.is_empty()).collect();
        let one = |output: &&Output| -> Result<[f64; 3]> {
            let other = |outputs: &'_ [Output]| outputs.iter().find(|other| other.name == output.name).cloned();
            let (Some(there), Some(target)) = (other(&theirs), other(&written)) else {
                return Err(Error::Merge(format!("the original has no `{}` that is changed", show_name(&output.name))));
            };
            if there.shape != output.shape {
                return Err(Error::Merge(format!("the original's `{}` has another shape", show_name(&output.name))));
            }
            sums(quantized, original, output, &there, target.dtype)
        };
        let all: Vec<[f64; 3]> = threads::install(|| changed.par_iter().map(one).collect())?;
        let [change, rounded, replaced] = all.iter().fold([0.0; 3], |[a, b, c], [x, y, z]| [a + x, b + y, c + z]);
        Ok(Self { dequantized: (rounded / change).sqrt(), original: (replaced / change).sqrt() })
    }
}

/// The sums of squares of the change, of what rounding loses, and of what the original differs by, over one tensor.
fn sums(quantized: &Merge, original: &Merge, ours: &Output, theirs: &Output, dtype: Dtype) -> Result<[f64; 3]> {
    let bare = Output { updates: Vec::new(), source: Source::Base(ours.name.clone()), ..ours.clone() };
    let (exact, other, before) =
        (prepare(quantized.inputs(), ours)?, prepare(original.inputs(), theirs)?, prepare(quantized.inputs(), &bare)?);
    let mut sums = [0.0; 3];
    for tile in exact.tiles() {
        let mut made: [Vec<f64>; 3] = Default::default();
        for (values, work) in made.iter_mut().zip([&exact, &other, &before]) {
            work.make(&tile, &mut |bytes| {
                *values = widen::<f64>(Dtype::F32, bytes)?;
                Ok(())
            })?;
        }
        let [exact, other, before] = &made;
        for ((exact, other), before) in exact.iter().zip(other).zip(before) {
            let terms = [exact - before, round(dtype, *exact) - exact, round(dtype, *other) - exact];
            sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term * term);
        }
    }
    Ok(sums)
}

/// A value as the nearest of that type.
fn round(dtype: Dtype, value: f64) -> f64 {
    match dtype {
        Dtype::BF16 => half::bf16::from_f64(value).to_f64(),
        Dtype::F16 => half::f16::from_f64(value).to_f64(),
        #[allow(clippy::cast_possible_truncation, reason = "rounding is what is asked for")]
        _ => f64::from(value as f32),
    }
}
