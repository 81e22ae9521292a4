//! bitsandbytes' 4-bit weights: two indices into 16 values a byte, the first in the upper half, and a scale for each block.
//!
//! With double quantization the scales are 8-bit indices into 256 values themselves, with scales of their own and an offset.
//! All is computed in float32 in the order in which bitsandbytes computes it, so that the bits are the same.

use std::ops::Range;

use serde_json::Value;

use super::{Found, bytes, float_named};
use crate::checkpoint::{Checkpoint, Made, Make};
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// What the name of the tensor holds that says how a weight is quantized.
pub const STATE: &str = ".quant_state.bitsandbytes__";

/// How many scales share one of the second level.
const NESTED: usize = 256;

/// One weight.
#[derive(Debug)]
struct Four {
    weight: String,
    dtype: Dtype,
    block: usize,
    codes: Vec<f32>,
    absmax: String,
    nested: Option<Nested>,
}

/// Scales that are quantized too.
#[derive(Debug)]
struct Nested {
    absmax: String,
    codes: Vec<f32>,
    block: usize,
    offset: f32,
}

pub fn find(checkpoint: &Checkpoint) -> Found {
    let mut found = Found::default();
    for name in checkpoint.names() {
        if let Some((weight, kind)) = name.split_once(STATE) {
            match one(checkpoint, weight, name) {
                Ok((made, spent, double)) => {
                    let double = if double { ", double" } else { "" };
                    found.add(&format!("{kind}{double}"), made, spent);
                }
                Err(reason) => found.fault(weight, &reason.to_string()),
            }
        }
    }
    found
}

fn one(checkpoint: &Checkpoint, weight: &str, state: &str) -> Result<(Made, Vec<String>, bool)> {
    let refuse = |reason: &str| Error::Merge(reason.to_owned());
    let said: Value =
        serde_json::from_slice(&checkpoint.read(state)?).map_err(|_| refuse("has a state that is no JSON"))?;
    let number = |name: &str| said.get(name).and_then(Value::as_u64).and_then(|value| usize::try_from(value).ok());
    let shape: Option<Vec<usize>> = said
        .get("shape")
        .and_then(Value::as_array)
        .and_then(|sizes| sizes.iter().map(|size| size.as_u64().and_then(|size| usize::try_from(size).ok())).collect());
    let (Some(shape), Some(block)) = (shape, number("blocksize").filter(|block| *block > 0)) else {
        return Err(refuse("has a state without shape or blocksize"));
    };
    let named = said.get("dtype").and_then(Value::as_str).and_then(float_named);
    let dtype = named.ok_or_else(|| refuse("was of a type that is not read"))?;
    let count = shape.iter().try_fold(1_usize, |count, size| count.checked_mul(*size));
    let count = count.ok_or_else(|| refuse("has a shape that fits no memory"))?;
    let blocks = count.div_ceil(block);
    let part = |name: &str, dtype: Dtype, least: usize| {
        let part = format!("{weight}.{name}");
        let fits = checkpoint.entry(&part).is_some_and(|entry| entry.dtype == dtype && entry.elements() >= least);
        if fits { Ok(part) } else { Err(refuse(&format!("lacks `{name}` of {least} values of type {}", dtype.name()))) }
    };
    if checkpoint.entry(weight).is_none_or(|entry| entry.bytes() < count.div_ceil(2)) {
        return Err(refuse(&format!("has fewer than {} bytes for its {count} values", count.div_ceil(2))));
    }
    let map = part("quant_map", Dtype::F32, 16)?;
    let codes = bytes::floats(checkpoint, &map, 0, 16)?;
    let mut spent = vec![state.to_owned(), map];
    let nested = match number("nested_blocksize") {
        None => None,
        Some(size) => {
            let block = if size == 0 { NESTED } else { size };
            let absmax = part("nested_absmax", Dtype::F32, blocks.div_ceil(block))?;
            let map = part("nested_quant_map", Dtype::F32, 256)?;
            let codes = bytes::floats(checkpoint, &map, 0, 256)?;
            #[allow(clippy::cast_possible_truncation, reason = "it was a float32")]
            let offset = said.get("nested_offset").and_then(Value::as_f64).unwrap_or_default() as f32;
            spent.extend([absmax.clone(), map]);
            Some(Nested { absmax, codes, block, offset })
        }
    };
    let absmax = part("absmax", if nested.is_some() { Dtype::U8 } else { Dtype::F32 }, blocks)?;
    spent.push(absmax.clone());
    let double = nested.is_some();
    let four = Four { weight: weight.to_owned(), dtype, block, codes, absmax, nested };
    Ok((Made::instead(weight, dtype, shape, four), spent, double))
}

impl Four {
    /// The scales of blocks.
    fn scales(&self, stored: &Checkpoint, first: usize, count: usize) -> Result<Vec<f32>> {
        let Some(nested) = &self.nested else { return bytes::floats(stored, &self.absmax, first, count) };
        let indices = bytes::read(stored, &self.absmax, first, count)?;
        let (start, end) = (first / nested.block, (first + count).div_ceil(nested.block));
        let above = bytes::floats(stored, &nested.absmax, start, end - start)?;
        let at = |index: usize| above.get((first + index) / nested.block - start).copied().unwrap_or_default();
        let value = |index: &u8| nested.codes.get(usize::from(*index)).copied().unwrap_or_default();
        Ok(indices.iter().enumerate().map(|(index, code)| value(code) * at(index) + nested.offset).collect())
    }
}

impl Make for Four {
    fn make(&self, stored: &Checkpoint, elements: Range<usize>, bytes: &mut [u8]) -> Result<()> {
        let Range { start: first, end } = elements;
        let packed = bytes::read(stored, &self.weight, first / 2, end.div_ceil(2) - first / 2)?;
        let block = first / self.block;
        let scales = self.scales(stored, block, end.div_ceil(self.block) - block)?;
        let value = |index: usize| {
            let pair = packed.get(index / 2 - first / 2).copied().unwrap_or_default();
            let code = if index.is_multiple_of(2) { pair >> 4 } else { pair & 15 };
            let scale = scales.get(index / self.block - block).copied().unwrap_or_default();
            self.codes.get(usize::from(code)).copied().unwrap_or_default() * scale
        };
        bytes::put(self.dtype, bytes, (first..end).map(value));
        Ok(())
    }
}
