//! MXFP4 as gpt-oss has it: stacks of experts in floats of four bits, of which 32 that follow each other share a power of two.
//!
//! What is stored is `(experts, out, in)`, two values a byte with the first in the lower half, as `NAME_blocks` and
//! `NAME_scales`; the weight that they make is `(experts, in, out)`, as transformers has it unpacked.

use std::ops::Range;
use std::sync::Arc;

use super::{Found, bytes};
use crate::checkpoint::{Checkpoint, Made, Make};
use crate::dtype::Dtype;
use crate::error::Result;

/// What follows a weight's name in the names of its parts.
pub const PARTS: [&str; 2] = ["_blocks", "_scales"];

/// The magnitudes of the eight codes; the fourth bit is the sign.
const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Values that share a scale.
const SHARE: usize = 32;

#[derive(Debug)]
struct Mxfp4 {
    weight: String,
    inputs: usize,
    outputs: usize,
    dtype: Dtype,
    recent: Arc<bytes::Recent>,
}

pub fn find(checkpoint: &Checkpoint, dtype: Dtype) -> Found {
    let recent = Arc::new(bytes::Recent::default());
    let mut found = Found::default();
    for (name, entry) in checkpoint.entries() {
        let Some(weight) = name.strip_suffix(PARTS[0]).filter(|_| entry.dtype == Dtype::U8) else { continue };
        let [experts, outputs, blocks, 16] = entry.shape[..] else {
            found.fault(name, "is not of the shape (experts, out, blocks, 16)");
            continue;
        };
        let scales = format!("{weight}{}", PARTS[1]);
        let fits =
            |part: &crate::checkpoint::Entry| part.dtype == Dtype::U8 && part.shape == [experts, outputs, blocks];
        if !checkpoint.entry(&scales).is_some_and(fits) {
            found.fault(name, &format!("lacks `{scales}` of type U8 and shape {:?}", [experts, outputs, blocks]));
            continue;
        }
        let (inputs, recent) = (blocks * SHARE, Arc::clone(&recent));
        let maker = Mxfp4 { weight: weight.to_owned(), inputs, outputs, dtype, recent };
        let (name, place, shape) = (weight.to_owned(), name.to_owned(), vec![experts, inputs, outputs]);
        found.add("mxfp4", Made { name, dtype, shape, place, make: Box::new(maker) }, [scales]);
    }
    found
}

impl Make for Mxfp4 {
    fn make(&self, stored: &Checkpoint, elements: Range<usize>, bytes: &mut [u8]) -> Result<()> {
        let size = self.dtype.size();
        let (inputs, outputs) = (self.inputs, self.outputs);
        let each = (inputs * outputs).max(1);
        let mut at = elements.start;
        let mut rest = bytes;
        while !rest.is_empty() {
            // One expert at a time: its values lie across what a tile needs.
            let (expert, start) = (at / each, at % each);
            let taken = (rest.len() / size).min(each - start);
            let part = |name: &str, length: usize| {
                self.recent.part(stored, &format!("{}{name}", self.weight), expert * length, length)
            };
            let (codes, scales) = (part(PARTS[0], each / 2)?, part(PARTS[1], each / SHARE)?);
            let value = |element: usize| {
                let (input, output) = (element / outputs, element % outputs);
                let place = output * inputs + input;
                let pair = codes.get(place / 2).copied().unwrap_or_default();
                let code = if place.is_multiple_of(2) { pair & 15 } else { pair >> 4 };
                let size = VALUES.get(usize::from(code & 7)).copied().unwrap_or_default();
                let power = i32::from(scales.get(place / SHARE).copied().unwrap_or_default()) - 127;
                // In two steps, of which neither leaves what float32 holds before the whole does.
                let value = size * 2_f32.powi(power / 2) * 2_f32.powi(power - power / 2);
                if code & 8 == 0 { value } else { -value }
            };
            let (now, later) = rest.split_at_mut(taken * size);
            bytes::put(self.dtype, now, (start..start + taken).map(value));
            (at, rest) = (at + taken, later);
        }
        Ok(())
    }
}
