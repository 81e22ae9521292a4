//! 8-bit floats with a scale for the whole weight, for each row, or for each block of rows and columns.

use std::ops::Range;

use serde_json::Value;

use super::{Found, bytes};
use crate::checkpoint::{Checkpoint, Made, Make};
use crate::dtype::Dtype;
use crate::error::{Result, show_name};

/// What follows a layer's name in the names of scales, in the formats in which they multiply the weight.
const SCALES: [&str; 2] = ["weight_scale_inv", "weight_scale"];

/// What may stand beside them and is of no use to floats.
const ACTIVATIONS: [&str; 4] = ["input_scale", "activation_scale", "input_scale_ub", "weight_shape"];

/// Says what of a config is not read.
pub fn supported(method: &str, said: &Value) -> Result<(), String> {
    if method != "compressed-tensors" {
        return Ok(());
    }
    let format = said.get("format").and_then(Value::as_str).unwrap_or_default();
    if format == "float-quantized" || format == "naive-quantized" {
        return Ok(());
    }
    Err(format!(
        "is in the format `{}` of compressed-tensors, which is not read; `float-quantized` is",
        show_name(format)
    ))
}

#[derive(Debug)]
struct Float8 {
    weight: String,
    source: Dtype,
    scales: String,
    columns: usize,
    /// Rows and columns that share a scale.
    block: [usize; 2],
    /// Scales a row of blocks has.
    across: usize,
    dtype: Dtype,
}

pub fn find(checkpoint: &Checkpoint, dtype: Dtype, said: &Value) -> Found {
    let stated = said.get("weight_block_size").and_then(Value::as_array).map(Vec::as_slice);
    let stated =
        |side: usize| stated?.get(side)?.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0);
    let mut found = Found::default();
    for (name, entry) in checkpoint.entries() {
        if !matches!(entry.dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2) {
            continue;
        }
        let ([rows, columns], Some(layer)) = (entry.shape.as_slice(), name.strip_suffix(".weight")) else {
            found.fault(name, "is no matrix called `weight`");
            continue;
        };
        let scales =
            SCALES.iter().map(|scales| format!("{layer}.{scales}")).find(|name| checkpoint.entry(name).is_some());
        let Some(scales) = scales else {
            found.fault(name, "has no scales beside it (`weight_scale`, `weight_scale_inv`)");
            continue;
        };
        let shape =
            checkpoint.entry(&scales).filter(|entry| entry.dtype.is_adapter_float()).map(|entry| &entry.shape[..]);
        let (down, across) = match shape {
            Some([] | [1]) => (1, 1),
            Some([down]) => (*down, 1),
            Some([down, across]) => (*down, *across),
            _ => (0, 0),
        };
        let blocks = (edge(*rows, down, stated(0)), edge(*columns, across, stated(1)));
        let (Some(high), Some(wide)) = blocks else {
            found.fault(name, &format!("is {:?}, which scales of shape {shape:?} do not fit", entry.shape));
            continue;
        };
        let (block, source) = ([high, wide], entry.dtype);
        let weight =
            Float8 { weight: name.to_owned(), source, scales: scales.clone(), columns: *columns, block, across, dtype };
        let made = Made::instead(name, dtype, entry.shape.clone(), weight);
        let spent = ACTIVATIONS.map(|part| format!("{layer}.{part}"));
        found.add(source.name(), made, spent.into_iter().chain([scales]));
    }
    found
}

/// The edge of blocks of which `count` cover `size`: the stated one, all of it, or the power of two that does.
fn edge(size: usize, count: usize, stated: Option<usize>) -> Option<usize> {
    if let Some(edge) = stated.filter(|edge| size.div_ceil(*edge) == count) {
        return Some(edge);
    }
    match count {
        0 => None,
        1 => Some(size.max(1)),
        _ if count == size => Some(1),
        _ => (4..16).map(|power| 1 << power).find(|edge| size.div_ceil(*edge) == count),
    }
}

impl Make for Float8 {
    fn make(&self, stored: &Checkpoint, elements: Range<usize>, bytes: &mut [u8]) -> Result<()> {
        let (first, count) = (elements.start, elements.len());
        let [high, wide] = self.block;
        let row = |element: usize| element / self.columns.max(1);
        let (start, end) = (row(first) / high, (row((first + count).saturating_sub(1)) / high) + 1);
        let scales = bytes::floats(stored, &self.scales, start * self.across, (end - start) * self.across)?;
        let values = bytes::read(stored, &self.weight, first, count)?;
        let table: Vec<f32> = (0..=u8::MAX).map(|byte| float(self.source, byte)).collect();
        let value = |(index, byte): (usize, &u8)| {
            let element = first + index;
            let at = (row(element) / high - start) * self.across + element % self.columns.max(1) / wide;
            table.get(usize::from(*byte)).copied().unwrap_or_default() * scales.get(at).copied().unwrap_or_default()
        };
        bytes::put(self.dtype, bytes, values.iter().enumerate().map(value));
        Ok(())
    }
}

/// An 8-bit float's value.
fn float(dtype: Dtype, byte: u8) -> f32 {
    let (mantissa, bias) = if dtype == Dtype::F8_E5M2 { (2, 15) } else { (3, 7) };
    let exponent = i32::from(byte >> mantissa & (0x7f >> mantissa));
    let fraction = f32::from(byte & ((1 << mantissa) - 1)) / f32::from(1_u8 << mantissa);
    let highest = i32::from(0x7f_u8 >> mantissa);
    let size = match (exponent, dtype) {
        (0, _) => fraction * 2_f32.powi(1 - bias),
        (_, Dtype::F8_E5M2) if exponent == highest && fraction > 0.0 => f32::NAN,
        (_, Dtype::F8_E5M2) if exponent == highest => f32::INFINITY,
        _ if byte & 0x7f == 0x7f && dtype == Dtype::F8_E4M3 => f32::NAN,
        _ => (1.0 + fraction) * 2_f32.powi(exponent - bias),
    };
    if byte & 0x80 == 0 { size } else { -size }
}
