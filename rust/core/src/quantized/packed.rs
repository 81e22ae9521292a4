//! GPTQ and AWQ: weights of a few bits in 32-bit words, stored `(in, out)`, with a scale and a zero for each group of inputs.
//!
//! GPTQ packs inputs that follow each other into a word, and the zeros of its first format are one less than they are; AWQ
//! packs eight outputs into a word, in the order 0, 2, 4, 6, 1, 3, 5, 7.

use std::sync::Arc;

use serde_json::Value;

use super::{Found, bytes};
use crate::checkpoint::{Checkpoint, Made, Make};
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};

/// Where in a word of AWQ each of eight outputs is.
const ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// How all weights of a checkpoint are packed.
#[derive(Debug, Clone)]
pub struct Layout {
    bits: usize,
    /// Inputs of a group; none if all are one.
    group: Option<usize>,
    awq: bool,
    /// What is added to stored zeros.
    shift: u32,
}

impl Layout {
    /// What the config says, or what of it is not read.
    pub fn read(method: &str, said: &Value) -> Result<Self, String> {
        let awq = method == "awq";
        let number = |names: [&str; 2]| names.iter().find_map(|name| said.get(name).and_then(Value::as_i64));
        let bits = number(["bits", "w_bit"]).unwrap_or(if awq { 4 } else { 0 });
        let known: &[i64] = if awq { &[4] } else { &[2, 4, 8] };
        if !known.contains(&bits) {
            return Err(format!("is quantized by {method} to {bits} bits, which is not read; {known:?} are"));
        }
        let text = |name: &str| said.get(name).and_then(Value::as_str).map(str::to_lowercase);
        let shift = match text("checkpoint_format").as_deref() {
            None | Some("gptq") => 1,
            Some("gptq_v2") => 0,
            Some(_) if awq => 0,
            Some(other) => return Err(format!("is in the format `{}` of gptq, which is not read", show_name(other))),
        };
        if let Some(version) = text("version").filter(|version| awq && version != "gemm") {
            return Err(format!("is in the version `{}` of awq, which is not read; `gemm` is", show_name(&version)));
        }
        let group = number(["group_size", "q_group_size"]).and_then(|size| usize::try_from(size).ok());
        let bits = usize::try_from(bits).unwrap_or_default();
        Ok(Self { bits, group: group.filter(|size| *size > 0), awq, shift: if awq { 0 } else { shift } })
    }
}

#[derive(Debug)]
struct Packed {
    layer: String,
    layout: Layout,
    inputs: usize,
    outputs: usize,
    indexed: bool,
    dtype: Dtype,
    scales: Dtype,
    recent: Arc<bytes::Recent>,
}

pub fn find(checkpoint: &Checkpoint, layout: &Layout, dtype: Dtype) -> Found {
    let recent = Arc::new(bytes::Recent::default());
    let mut found = Found::default();
    for name in checkpoint.names() {
        let Some(layer) = name.strip_suffix(".qweight") else { continue };
        match one(checkpoint, layer, layout, dtype, &recent) {
            Ok(packed) => {
                let made = Made {
                    name: format!("{layer}.weight"),
                    dtype,
                    shape: vec![packed.outputs, packed.inputs],
                    place: name.to_owned(),
                    make: Box::new(packed),
                };
                let spent = ["qzeros", "scales", "g_idx"].map(|part| format!("{layer}.{part}"));
                found.add(&format!("{} of {} bits", if layout.awq { "awq" } else { "gptq" }, layout.bits), made, spent);
            }
            Err(reason) => found.fault(name, &reason),
        }
    }
    found
}

fn one(
    checkpoint: &Checkpoint,
    layer: &str,
    layout: &Layout,
    dtype: Dtype,
    recent: &Arc<bytes::Recent>,
) -> Result<Packed, String> {
    let sizes = |part: &str, types: &[Dtype]| {
        let entry = checkpoint.entry(&format!("{layer}.{part}")).filter(|entry| types.contains(&entry.dtype));
        let matrix = entry.and_then(|entry| <[usize; 2]>::try_from(entry.shape.as_slice()).ok());
        matrix.ok_or_else(|| {
            format!("lacks `{part}`, a matrix of type {}", types.first().map_or("", |dtype| dtype.name()))
        })
    };
    let a_word = 32 / layout.bits;
    let [rows, columns] = sizes("qweight", &[Dtype::I32])?;
    let (inputs, outputs) = if layout.awq { (rows, columns * a_word) } else { (rows * a_word, columns) };
    let [groups, width] = sizes("scales", &[Dtype::F16, Dtype::BF16, Dtype::F32])?;
    let zeros = sizes("qzeros", &[Dtype::I32])?;
    if width != outputs || zeros != [groups, outputs / a_word] || groups == 0 {
        return Err(format!("has {inputs} inputs and {outputs} outputs, which its scales and zeros do not fit"));
    }
    let index = checkpoint.entry(&format!("{layer}.g_idx")).filter(|_| !layout.awq);
    if let Some(entry) = index
        && (entry.dtype != Dtype::I32 || entry.elements() != inputs)
    {
        return Err(format!("has a `g_idx` of {} groups for {inputs} inputs", entry.elements()));
    }
    let size = layout.group.unwrap_or(inputs).max(1);
    if index.is_none() && inputs.div_ceil(size) > groups {
        return Err(format!("has {groups} groups for {inputs} inputs in groups of {size}"));
    }
    let scales = checkpoint.entry(&format!("{layer}.scales")).map_or(Dtype::F16, |entry| entry.dtype);
    let recent = Arc::clone(recent);
    let (layer, layout, indexed) = (layer.to_owned(), layout.clone(), index.is_some());
    Ok(Packed { layer, layout, inputs, outputs, indexed, dtype, scales, recent })
}

impl Make for Packed {
    fn make(&self, stored: &Checkpoint, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let part = |name: &str| format!("{}.{name}", self.layer);
        let words = |name: &str| self.recent.words(stored, &part(name));
        let (weights, zeros, packed_scales) = (words("qweight")?, words("qzeros")?, words("scales")?);
        let raw: &[u8] = bytemuck::cast_slice(&packed_scales);
        let index = if self.indexed { Some(words("g_idx")?) } else { None };
        let wrong = |_| Error::Merge(format!("{} does not fit this machine", show_name(&self.layer)));
        let first = usize::try_from(offset).map_err(wrong)? / self.dtype.size();
        let count = bytes.len() / self.dtype.size();
        let Layout { bits, group, awq, shift } = self.layout;
        let (a_word, mask) = (32 / bits, u32::MAX >> (32 - bits));
        let size = group.unwrap_or(self.inputs).max(1);
        let taken = |word: Option<&u32>, place: usize| word.copied().unwrap_or_default() >> (place * bits) & mask;
        let across =
            |output: usize| if awq { ORDER.get(output % 8).copied().unwrap_or_default() } else { output % a_word };
        let value = |element: usize| {
            let (output, input) = (element / self.inputs, element % self.inputs);
            let code = if awq {
                taken(weights.get(input * (self.outputs / a_word) + output / a_word), across(output))
            } else {
                taken(weights.get(input / a_word * self.outputs + output), input % a_word)
            };
            let group =
                index.as_ref().map_or(input / size, |index| index.get(input).map_or(0, |group| *group as usize));
            let zero = taken(zeros.get(group * (self.outputs / a_word) + output / a_word), across(output));
            let zero = zero.wrapping_add(shift) & mask;
            #[allow(clippy::cast_precision_loss, reason = "numbers of at most 8 bits")]
            let steps = (i64::from(code) - i64::from(zero)) as f32;
            steps * scale(self.scales, raw, group * self.outputs + output)
        };
        bytes::put(self.dtype, bytes, (first..first + count).map(value));
        Ok(())
    }
}

fn scale(dtype: Dtype, raw: &[u8], place: usize) -> f32 {
    let bytes = raw.get(place * dtype.size()..(place + 1) * dtype.size()).unwrap_or_default();
    bytes::widened(dtype, bytes).first().copied().unwrap_or_default()
}
