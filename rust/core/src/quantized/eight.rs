//! bitsandbytes' 8-bit weights: signed bytes and the largest value of each row, which 127 stands for.

use std::ops::Range;

use super::{Found, bytes};
use crate::checkpoint::{Checkpoint, Made, Make};
use crate::dtype::Dtype;
use crate::error::Result;

/// One over 127 as bitsandbytes writes it.
const STEP: f32 = 7.874_016e-3;

#[derive(Debug)]
struct Eight {
    weight: String,
    scales: String,
    columns: usize,
    dtype: Dtype,
}

pub fn find(checkpoint: &Checkpoint, dtype: Dtype, found: &mut Found) {
    for (name, entry) in checkpoint.entries() {
        let Some(layer) = name.strip_suffix(".weight").filter(|_| entry.dtype == Dtype::I8) else { continue };
        let (scales, format) = (format!("{layer}.SCB"), format!("{layer}.weight_format"));
        let [rows, columns] = entry.shape[..] else {
            found.fault(name, "is no matrix");
            continue;
        };
        let fits = |scales: &crate::checkpoint::Entry| scales.dtype == Dtype::F32 && scales.elements() == rows;
        if !checkpoint.entry(&scales).is_some_and(fits) {
            found.fault(name, &format!("lacks `SCB`, a scale of type F32 for each of its {rows} rows"));
            continue;
        }
        if checkpoint.read(&format).is_ok_and(|bytes| bytes.iter().any(|byte| *byte != 0)) {
            found.fault(name, "is stored in the order of a device's tiles (`weight_format`)");
            continue;
        }
        let weight = Eight { weight: name.to_owned(), scales: scales.clone(), columns, dtype };
        found.add("int8", Made::instead(name, dtype, entry.shape.clone(), weight), [scales, format]);
    }
}

impl Make for Eight {
    fn make(&self, stored: &Checkpoint, elements: Range<usize>, bytes: &mut [u8]) -> Result<()> {
        let (first, count) = (elements.start, elements.len());
        let row = first / self.columns.max(1);
        let rows = (first + count).div_ceil(self.columns.max(1)) - row;
        let scales = bytes::floats(stored, &self.scales, row, rows)?;
        let values = bytes::read(stored, &self.weight, first, count)?;
        let value = |(index, byte): (usize, &u8)| {
            let scale = scales.get((first + index) / self.columns.max(1) - row).copied().unwrap_or_default();
            f32::from(byte.cast_signed()) * scale * STEP
        };
        bytes::put(self.dtype, bytes, values.iter().enumerate().map(value));
        Ok(())
    }
}
