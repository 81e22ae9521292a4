//! AWQ's version `gemv_fast`: codes of 4 bits in 16-bit words, four rows of outputs woven into one, with floats for scales and zeros.
//!
//! Of `(out, in)` codes, `qweight` has `(out / 4, in)` words: a run of 64 words holds 64 inputs of four outputs that follow each
//! other, 16 words an output. `scales` and `qzeros` are `(groups, out)`, with rows of nothing at their end, and a weight is
//! `code * scale + zero`: the zero is stored times its scale, negative.

use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;

use super::{Found, bytes};
use crate::checkpoint::{Checkpoint, Made, Make};
use crate::dtype::Dtype;
use crate::error::{Result, show_name};

/// Outputs that share their words' rows.
const WOVEN: usize = 4;
/// Inputs of a run, which lies in as many words.
const RUN: usize = 64;

#[derive(Debug)]
struct GemvFast {
    layer: String,
    inputs: usize,
    outputs: usize,
    group: usize,
    dtype: Dtype,
    recent: Arc<bytes::Recent>,
}

/// Whether the config says that AWQ's weights are packed so.
pub fn is_said(said: &Value) -> bool {
    said.get("version").and_then(Value::as_str).is_some_and(|text| text.eq_ignore_ascii_case("gemv_fast"))
}

pub fn find(checkpoint: &Checkpoint, said: &Value, dtype: Dtype) -> Found {
    let recent = Arc::new(bytes::Recent::default());
    let group = ["group_size", "q_group_size"].iter().find_map(|name| said.get(name)?.as_u64());
    let group = group.and_then(|group| usize::try_from(group).ok()).filter(|group| *group > 0);
    let mut found = Found::default();
    for (name, entry) in checkpoint.entries() {
        let Some(layer) = name.strip_suffix(".qweight") else { continue };
        let (rows, inputs) = match entry.shape[..] {
            [rows, inputs] if entry.dtype == Dtype::I16 && inputs.is_multiple_of(RUN) => (rows, inputs),
            _ => {
                found.fault(name, &format!("is not of type I16 and shape (out / {WOVEN}, in), in a multiple of {RUN}"));
                continue;
            }
        };
        let (outputs, group) = (rows * WOVEN, group.unwrap_or(inputs).max(1));
        let least = inputs.div_ceil(group);
        let parts = ["scales", "qzeros"].map(|part| format!("{layer}.{part}"));
        let lacking = parts.iter().find(|part| {
            let fits = |part: &crate::checkpoint::Entry| {
                part.dtype == Dtype::F16
                    && matches!(part.shape[..], [groups, across] if groups >= least && across == outputs)
            };
            !checkpoint.entry(part).is_some_and(fits)
        });
        if let Some(part) = lacking {
            let part = show_name(part);
            found.fault(name, &format!("lacks `{part}` of type F16 with {least} rows or more of {outputs} outputs"));
            continue;
        }
        let maker = GemvFast { layer: layer.to_owned(), inputs, outputs, group, dtype, recent: Arc::clone(&recent) };
        let made = Made {
            name: format!("{layer}.weight"),
            dtype,
            shape: vec![outputs, inputs],
            place: name.to_owned(),
            make: Box::new(maker),
        };
        found.add("awq of 4 bits", made, parts);
    }
    found
}

/// In which word of a `qweight` of so many inputs, and from which bit on, a code is.
fn place(output: usize, input: usize, inputs: usize) -> (usize, usize) {
    // Of 32 inputs that follow each other, pairs of each eight come together; then the first of each pair come before the second.
    let (eight, pair, second) = (input % 32 / 8, input % 8 / 2, input % 2);
    let moved = input / 32 * 32 + pair * 8 + second * 4 + eight;
    let run = output / WOVEN * inputs + moved / RUN * RUN;
    (run + output % WOVEN * (RUN / WOVEN) + moved % RUN / 4, moved % 4 * 4)
}

impl Make for GemvFast {
    fn make(&self, stored: &Checkpoint, elements: Range<usize>, bytes: &mut [u8]) -> Result<()> {
        let whole = |name: &str| self.recent.whole(stored, &format!("{}.{name}", self.layer));
        let (codes, scales, zeros) = (whole("qweight")?, whole("scales")?, whole("qzeros")?);
        let float = |raw: &[u8], at: usize| {
            bytes::widened(Dtype::F16, raw.get(2 * at..2 * at + 2).unwrap_or_default())
                .first()
                .copied()
                .unwrap_or_default()
        };
        let value = |element: usize| {
            let (output, input) = (element / self.inputs, element % self.inputs);
            let (word, bit) = place(output, input, self.inputs);
            let code = (bytes::word(&codes, word / 2) >> (word % 2 * 16 + bit)) & 15;
            let at = input / self.group * self.outputs + output;
            #[allow(clippy::cast_precision_loss, reason = "a number of 4 bits")]
            let code = code as f32;
            code * float(&scales, at) + float(&zeros, at)
        };
        bytes::put(self.dtype, bytes, elements.map(value));
        Ok(())
    }
}
