//! GPTQ and AWQ: weights of a few bits in 32-bit words, stored `(in, out)`, with a scale and a zero for each group of inputs.
//!
//! GPTQ packs inputs that follow each other into words, of 3 bits across their edges, and the zeros of its first format are one
//! less than they are; AWQ packs eight outputs into a word, in the order 0, 2, 4, 6, 1, 3, 5, 7, but stores `(out, in)` and packs
//! inputs in their own order for its "gemv" kernel.

use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;

use super::{Found, bytes};
use crate::checkpoint::{Checkpoint, Made, Make};
use crate::dtype::Dtype;
use crate::error::{Result, show_name};

/// Where in a word of AWQ each of eight outputs is.
const ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Along which of its sides a weight is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Gptq,
    Gemm,
    Gemv,
}

/// How all weights of a checkpoint are packed.
#[derive(Debug, Clone)]
pub struct Layout {
    bits: usize,
    /// Inputs of a group; none if all are one.
    group: Option<usize>,
    form: Form,
    /// What is added to stored zeros.
    shift: u32,
}

impl Layout {
    /// What the config says, or what of it is not read.
    pub fn read(method: &str, said: &Value) -> Result<Self, String> {
        let awq = method == "awq";
        let number = |names: [&str; 2]| names.iter().find_map(|name| said.get(name).and_then(Value::as_i64));
        let bits = number(["bits", "w_bit"]).unwrap_or(if awq { 4 } else { 0 });
        let known: &[i64] = if awq { &[4] } else { &[2, 3, 4, 8] };
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
        let form = match text("version").as_deref() {
            _ if !awq => Form::Gptq,
            None | Some("gemm") => Form::Gemm,
            Some("gemv") => Form::Gemv,
            Some(other) => {
                let known = "`gemm`, `gemv` and `gemv_fast` are";
                return Err(format!("is in the version `{}` of awq, which is not read; {known}", show_name(other)));
            }
        };
        let group = number(["group_size", "q_group_size"]).and_then(|size| usize::try_from(size).ok());
        let bits = usize::try_from(bits).unwrap_or_default();
        Ok(Self { bits, group: group.filter(|size| *size > 0), form, shift: if awq { 0 } else { shift } })
    }

    /// How many words so many numbers take.
    fn words(&self, numbers: usize) -> usize {
        (numbers * self.bits).div_ceil(32)
    }

    /// The number that begins at a bit of the words from `start` on, of which each is `step` further.
    fn number(&self, words: &[u8], start: usize, step: usize, bit: usize) -> u32 {
        let word = |at: usize| u64::from(bytes::word(words, start + at * step));
        let (at, low) = (bit / 32, bit % 32);
        let pair = if low + self.bits > 32 { word(at) | word(at + 1) << 32 } else { word(at) };
        #[allow(clippy::cast_possible_truncation, reason = "the mask leaves a few bits")]
        let number = (pair >> low) as u32;
        number & (u32::MAX >> (32 - self.bits))
    }

    /// At which bit of a row of words AWQ's "gemm" has an output.
    fn gemm(output: usize) -> usize {
        4 * (output / 8 * 8 + ORDER.get(output % 8).copied().unwrap_or_default())
    }
}

#[derive(Debug)]
struct Packed {
    layer: String,
    layout: Layout,
    inputs: usize,
    outputs: usize,
    groups: usize,
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
                let method = if layout.form == Form::Gptq { "gptq" } else { "awq" };
                found.add(&format!("{method} of {} bits", layout.bits), made, spent);
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
    let [rows, columns] = sizes("qweight", &[Dtype::I32])?;
    let scales = sizes("scales", &[Dtype::F16, Dtype::BF16, Dtype::F32])?;
    let zeros @ [_, width] = sizes("qzeros", &[Dtype::I32])?;
    let whole = |words: usize| words * 32 / layout.bits;
    let (inputs, outputs, groups, expected) = match (layout.form, scales) {
        (Form::Gptq, [groups, _]) => (whole(rows), columns, groups, [groups, columns]),
        (Form::Gemm, [groups, _]) => (rows, whole(columns), groups, [groups, whole(columns)]),
        // Scales of groups that are not there fill up the last word of zeros.
        (Form::Gemv, [_, groups]) => (whole(columns), rows, groups, [rows, whole(width)]),
    };
    let across =
        if layout.form == Form::Gemv { [outputs, layout.words(groups)] } else { [groups, layout.words(outputs)] };
    if scales != expected || zeros != across || groups == 0 {
        return Err(format!("has {inputs} inputs and {outputs} outputs, which its scales and zeros do not fit"));
    }
    let index = checkpoint.entry(&format!("{layer}.g_idx")).filter(|_| layout.form == Form::Gptq);
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
    Ok(Packed { layer, layout, inputs, outputs, groups, indexed, dtype, scales, recent })
}

impl Make for Packed {
    fn make(&self, stored: &Checkpoint, elements: Range<usize>, bytes: &mut [u8]) -> Result<()> {
        let part = |name: &str| format!("{}.{name}", self.layer);
        let whole = |name: &str| self.recent.whole(stored, &part(name));
        let (weights, zeros, scales) = (whole("qweight")?, whole("qzeros")?, whole("scales")?);
        let index = if self.indexed { Some(whole("g_idx")?) } else { None };
        let (layout, inputs, outputs) = (&self.layout, self.inputs, self.outputs);
        let mask = u32::MAX >> (32 - layout.bits);
        let size = layout.group.unwrap_or(inputs).max(1);
        let value = |element: usize| {
            let (output, input) = (element / inputs, element % inputs);
            let group = index.as_ref().map_or(input / size, |index| bytes::word(index, input) as usize);
            let (along, across) = (input * layout.bits, output * layout.bits);
            let (code, zero, scale) = match layout.form {
                Form::Gptq => (
                    layout.number(&weights, output, outputs, along),
                    layout.number(&zeros, group * layout.words(outputs), 1, across),
                    group * outputs + output,
                ),
                Form::Gemm => (
                    layout.number(&weights, input * layout.words(outputs), 1, Layout::gemm(output)),
                    layout.number(&zeros, group * layout.words(outputs), 1, Layout::gemm(output)),
                    group * outputs + output,
                ),
                Form::Gemv => (
                    layout.number(&weights, output * layout.words(inputs), 1, along),
                    layout.number(&zeros, output * layout.words(self.groups), 1, group * layout.bits),
                    output * self.groups + group,
                ),
            };
            let zero = zero.wrapping_add(layout.shift) & mask;
            #[allow(clippy::cast_precision_loss, reason = "numbers of at most 8 bits")]
            let steps = (i64::from(code) - i64::from(zero)) as f32;
            steps * self::scale(self.scales, &scales, scale)
        };
        bytes::put(self.dtype, bytes, elements.map(value));
        Ok(())
    }
}

fn scale(dtype: Dtype, raw: &[u8], place: usize) -> f32 {
    let bytes = raw.get(place * dtype.size()..(place + 1) * dtype.size()).unwrap_or_default();
    bytes::widened(dtype, bytes).first().copied().unwrap_or_default()
}
