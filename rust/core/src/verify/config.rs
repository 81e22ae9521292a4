//! What a merged checkpoint's config must say for its weights to be read as they are meant.

use serde_json::Value;

use crate::inspect::Model;
use crate::plan::Plan;

/// Compares the config with the one that belongs to the merged weights, as far as the weights depend on it.
pub fn check(base: &Model, merged: &Model, plan: &Plan, faults: &mut Vec<String>, notes: &mut Vec<String>) {
    faults.extend(merged.warnings());
    let Some(expected) = plan.config.as_ref().or(base.config.as_ref()) else { return };
    let Some(found) = &merged.config else {
        notes.push("it has no config.json, where the base has one".to_owned());
        return;
    };
    if plan.untie && field(found, "tie_word_embeddings").and_then(Value::as_bool) != Some(false) {
        faults.push(
            "config.json ties the output head to the embedding, which the merge set apart: tie_word_embeddings must be \
             false"
                .to_owned(),
        );
    }
    for name in ["vocab_size", "num_hidden_layers"] {
        if let (Some(expected), Some(found)) = (field(expected, name), field(found, name))
            && expected != found
        {
            faults.push(format!("config.json says {name} {found}, and the merge has {expected}"));
        }
    }
}

/// A field of a config, or of its part for text.
fn field<'a>(config: &'a Value, name: &str) -> Option<&'a Value> {
    let of = |config: &'a Value| config.get(name).filter(|value| !value.is_null());
    of(config).or_else(|| of(config.get("text_config")?))
}
