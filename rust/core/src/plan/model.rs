//! What the model's config has to say about the merged weights.

use serde_json::{Map, Value};

use super::base::Base;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Lists that have an entry for each layer.
const PER_LAYER: [&str; 4] = ["layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type"];

/// Lists of the numbers of some layers, which nobody can tell for layers that are repeated.
const SOME_LAYERS: [&str; 2] = ["mlp_only_layers", "moe_layers"];

/// Says that the head stands for itself.
pub fn untie(config: &mut Value) {
    if let Some(fields) = config.as_object_mut() {
        fields.insert("tie_word_embeddings".to_owned(), Value::Bool(false));
    }
}

/// Says which type the weights have, wherever the config says so already.
pub fn set_dtype(config: &mut Value, dtype: Dtype) {
    let name = match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    };
    if let Some(fields) = config.as_object_mut()
        && !fields.contains_key("dtype")
    {
        fields.entry("torch_dtype").or_insert(Value::Null);
    }
    each(config, &mut |fields| {
        for key in ["dtype", "torch_dtype"] {
            if let Some(value) = fields.get_mut(key).filter(|value| value.is_string() || value.is_null()) {
                *value = Value::from(name);
            }
        }
    });
}

/// Says how many rows the embeddings have, wherever it said `before`; whether it did anywhere.
pub fn set_vocabulary(config: &mut Value, before: usize, rows: usize) -> bool {
    let mut found = false;
    each(config, &mut |fields| {
        if let Some(value) = fields.get_mut("vocab_size").filter(|value| is(value, before)) {
            *value = Value::from(rows);
            found = true;
        }
    });
    found
}

/// Says how many layers there are, and what each of them is.
pub fn replicate(config: &mut Value, base: &Base) -> Result<()> {
    let Some(layers) = &base.layers else { return Ok(()) };
    let (mut found, mut unclear) = (false, None);
    each(config, &mut |fields| {
        if !fields.get("num_hidden_layers").is_some_and(|value| is(value, base.depth)) {
            return;
        }
        found = true;
        fields.insert("num_hidden_layers".to_owned(), Value::from(layers.len()));
        let is_filled =
            |name: &&&str| fields.get(**name).and_then(Value::as_array).is_some_and(|list| !list.is_empty());
        unclear = unclear.or(SOME_LAYERS.iter().find(is_filled));
        for name in PER_LAYER {
            if let Some(list) =
                fields.get_mut(name).and_then(Value::as_array_mut).filter(|list| list.len() == base.depth)
            {
                *list = layers.iter().filter_map(|layer| list.get(*layer).cloned()).collect();
            }
        }
    });
    match unclear {
        Some(name) => {
            Err(refused(&format!("says of some layers in `{name}` what would have to be said of their copies")))
        }
        None if !found => {
            Err(refused(&format!("does not say that there are {} layers (`num_hidden_layers`)", base.depth)))
        }
        None => Ok(()),
    }
}

/// Whether a value is that number.
fn is(value: &Value, number: usize) -> bool {
    value.as_u64().and_then(|value| usize::try_from(value).ok()) == Some(number)
}

fn refused(what: &str) -> Error {
    Error::Merge(format!(
        "layer_replication: the base's config.json {what}; hint: give a folder with a config.json of the model"
    ))
}

/// Calls `change` on every object of a config that stands for a model: the whole, and the parts called `*_config`.
fn each(config: &mut Value, change: &mut dyn FnMut(&mut Map<String, Value>)) {
    let Some(fields) = config.as_object_mut() else { return };
    change(fields);
    fields.iter_mut().filter(|(name, _)| name.ends_with("_config")).for_each(|(_, part)| each(part, change));
}
