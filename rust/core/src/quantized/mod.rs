//! Checkpoints whose weights have fewer bits, read as 16-bit or 32-bit floats: a tile at a time, beneath whatever reads them.
//!
//! What a checkpoint is quantized by, its `config.json` says (`quantization_config`), and its tensors' names must agree. The
//! formats: bitsandbytes' 4-bit (nf4, fp4, double quantization) and 8-bit; GPTQ; AWQ (`gemm`, `gemv`, `gemv_fast`); 8-bit floats
//! with scales (`fp8`, `fbgemm_fp8`, compressed-tensors); MXFP4. Any other is refused by its name; so are HQQ's, in which nearly each
//! number of bits has a packing of its own.

mod bytes;
mod eight;
mod float8;
mod four;
mod gemv_fast;
mod mxfp4;
mod packed;

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

use crate::checkpoint::{Checkpoint, Made};
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};

/// The field of a model's config that says how its weights are quantized.
pub const CONFIG: &str = "quantization_config";

/// The files beside the weights that say the same, and that a checkpoint of floats must not have.
pub const FILES: [&str; 3] = ["quantize_config.json", "quant_config.json", "quantization_config.json"];

const READ: &str =
    "bitsandbytes (4-bit and 8-bit), gptq, awq, fp8, fbgemm_fp8, mxfp4 and the floats of compressed-tensors are read";

/// What a format makes of a checkpoint's tensors.
#[derive(Debug, Default)]
struct Found {
    made: Vec<Made>,
    spent: HashSet<String>,
    /// What stands against it, each with the tensor's name.
    faults: Vec<String>,
    /// How many tensors of which kind.
    kinds: BTreeMap<String, usize>,
}

impl Found {
    fn add(&mut self, kind: &str, made: Made, spent: impl IntoIterator<Item = String>) {
        *self.kinds.entry(kind.to_owned()).or_default() += 1;
        self.spent.extend(spent);
        self.made.push(made);
    }

    fn fault(&mut self, name: &str, reason: &str) {
        self.faults.push(format!("`{}` {reason}", show_name(name)));
    }
}

/// The checkpoint with floats for its quantized weights, and what the user should know of that; one that is not quantized
/// comes back as it is. `model` is its `config.json`, from which what it says of the quantization is taken out.
pub fn open(checkpoint: Checkpoint, model: Option<&mut Value>) -> Result<(Checkpoint, Option<String>)> {
    let dtype = model.as_deref().and_then(stated_type);
    let said = model.and_then(|model| model.as_object_mut()?.shift_remove(CONFIG)).filter(|said| !said.is_null());
    let Some(method) = method(&checkpoint, said.as_ref()) else {
        return Ok((checkpoint, None));
    };
    let said = said.unwrap_or(Value::Null);
    let refuse = |reason: String| Error::checkpoint(checkpoint.path(), reason);
    let found = match method.as_str() {
        "bitsandbytes" => {
            let mut found = four::find(&checkpoint);
            eight::find(&checkpoint, dtype.unwrap_or(Dtype::F16), &mut found);
            found
        }
        "awq" if gemv_fast::is_said(&said) => gemv_fast::find(&checkpoint, &said, dtype.unwrap_or(Dtype::F16)),
        "gptq" | "awq" => {
            let layout = packed::Layout::read(&method, &said).map_err(refuse)?;
            packed::find(&checkpoint, &layout, dtype.unwrap_or(Dtype::F16))
        }
        "mxfp4" => mxfp4::find(&checkpoint, dtype.unwrap_or(Dtype::BF16)),
        "fp8" | "fbgemm_fp8" | "compressed-tensors" => {
            float8::supported(&method, &said).map_err(refuse)?;
            float8::find(&checkpoint, dtype.unwrap_or(Dtype::BF16), &said)
        }
        other => return Err(refuse(format!("is quantized by `{}`, which is not read; {READ}", show_name(other)))),
    };
    let Found { made, spent, mut faults, kinds } = found;
    let replaced: HashSet<&str> = made.iter().map(|made| made.place.as_str()).collect();
    for (name, entry) in checkpoint.entries() {
        if looks_quantized(name, entry.dtype) && !replaced.contains(name) && !spent.contains(name) && faults.len() < 64
        {
            let fault =
                format!("`{}` of type {} belongs to no layer that is read", show_name(name), entry.dtype.name());
            if !faults.iter().any(|other| other.starts_with(&format!("`{}`", show_name(name)))) {
                faults.push(fault);
            }
        }
    }
    if !faults.is_empty() {
        let count = faults.len();
        let more = if count > 4 { format!("; and {} more", count - 4) } else { String::new() };
        faults.truncate(4);
        return Err(refuse(format!(
            "is quantized by {method}, and {count} tensors cannot be read: {}{more}",
            faults.join("; ")
        )));
    }
    if made.is_empty() {
        return Ok((checkpoint, Some(format!("`{CONFIG}` is left out: no tensor is quantized"))));
    }
    let types: BTreeMap<&str, usize> = made.iter().fold(BTreeMap::new(), |mut types, made| {
        *types.entry(made.dtype.name()).or_default() += 1;
        types
    });
    let kinds: Vec<String> = kinds.iter().map(|(kind, count)| format!("{count} in {kind}")).collect();
    let types: Vec<&str> = types.into_keys().collect();
    let note = format!(
        "{} of the base's weights are quantized ({}): the output has them dequantized, in {}",
        made.len(),
        kinds.join(", "),
        types.join(" and ")
    );
    Ok((checkpoint.with_made(made, &spent)?, Some(note)))
}

/// The name of the method, as the config says it or the tensors show it.
fn method(checkpoint: &Checkpoint, said: Option<&Value>) -> Option<String> {
    let stated = said.map(|said| said.get("quant_method").and_then(Value::as_str).unwrap_or("bitsandbytes").to_owned());
    let shown = || checkpoint.names().any(|name| name.contains(four::STATE)).then(|| "bitsandbytes".to_owned());
    stated.or_else(shown)
}

/// Whether a tensor can only be a part of a quantized weight.
fn looks_quantized(name: &str, dtype: Dtype) -> bool {
    let weight = name.ends_with(".weight") && !dtype.is_adapter_float();
    let packed =
        [".qweight", ".qzeros", ".weight_packed", ".W_q", ".g_idx", ".SCB"].iter().any(|end| name.ends_with(end));
    let packed = packed || dtype == Dtype::U8 && mxfp4::PARTS.iter().any(|end| name.ends_with(end));
    weight || packed || name.contains(four::STATE) || matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E8M0)
}

/// The type that the config gives the model's floats.
fn stated_type(model: &Value) -> Option<Dtype> {
    let parts = [model, model.get("text_config").unwrap_or(&Value::Null)];
    let names = parts.into_iter().flat_map(|part| [part.get("dtype"), part.get("torch_dtype")]);
    names.flatten().filter_map(Value::as_str).find_map(float_named)
}

/// The float type that torch calls so.
fn float_named(name: &str) -> Option<Dtype> {
    match name.strip_prefix("torch.").unwrap_or(name) {
        "bfloat16" => Some(Dtype::BF16),
        "float16" => Some(Dtype::F16),
        "float32" => Some(Dtype::F32),
        _ => None,
    }
}
