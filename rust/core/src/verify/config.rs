//! What a merged checkpoint's config must say for its weights to be read as they are meant.

use serde_json::Value;

use crate::inspect::Model;
use crate::outline::block;
use crate::plan::{Plan, is_embedding};

/// Compares the configs, as far as the weights depend on them.
pub fn check(base: &Model, merged: &Model, plan: &Plan, faults: &mut Vec<String>, notes: &mut Vec<String>) {
    faults.extend(merged.warnings());
    let (Some(before), Some(after)) = (&base.config, &merged.config) else {
        if base.config.is_some() {
            notes.push("it has no config.json, where the base has one".to_owned());
        }
        return;
    };
    if plan.untie && field(after, "tie_word_embeddings").and_then(Value::as_bool) != Some(false) {
        faults.push(
            "config.json ties the output head to the embedding, which the merge set apart: tie_word_embeddings must be false"
                .to_owned(),
        );
    }
    let outputs = || plan.files.iter().flat_map(|file| &file.outputs);
    let rows = |shape: &[usize]| shape.first().copied();
    let tables = [
        (
            "vocab_size",
            base.weights.entries().filter(|(name, _)| is_embedding(name)).find_map(|(_, entry)| rows(&entry.shape)),
            outputs().filter(|output| is_embedding(&output.name)).find_map(|output| rows(&output.shape)),
        ),
        ("num_hidden_layers", blocks(base.weights.names()), blocks(outputs().map(|output| output.name.as_str()))),
    ];
    for (name, had, has) in tables {
        let number = |config: &Value| field(config, name).and_then(Value::as_u64);
        let (Some(stated), Some(has)) = (number(after), has) else { continue };
        // Where the base's own config says another number than its weights show, the two are not about the same thing.
        if number(before).is_some() && number(before) == had.map(|had| had as u64) && stated != has as u64 {
            faults.push(format!("config.json says {name} {stated}, and the merge has {has}"));
        }
    }
}

/// A field of a config, or of its part for text.
fn field<'a>(config: &'a Value, name: &str) -> Option<&'a Value> {
    let of = |config: &'a Value| config.get(name).filter(|value| !value.is_null());
    of(config).or_else(|| of(config.get("text_config")?))
}

/// How many blocks the longest stack has.
fn blocks<'a>(names: impl Iterator<Item = &'a str>) -> Option<usize> {
    names.filter_map(block).map(|(_, number)| number + 1).max()
}
