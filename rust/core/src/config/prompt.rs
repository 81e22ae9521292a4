//! The fields of prompts: virtual tokens, or keys and values, that change no layer.

use std::ops::RangeInclusive;

use super::MAX_SIZE;
use super::fields::Fields;

/// The most layers that a model may have.
const MAX_LAYERS: i64 = 16_384;

/// Fields of sizes, of which some kinds have only some; null until a model decides them.
const SIZES: [(&str, RangeInclusive<i64>); 11] = [
    ("num_virtual_tokens", 1..=MAX_SIZE),
    ("token_dim", 1..=MAX_SIZE),
    ("num_transformer_submodules", 1..=2),
    ("num_attention_heads", 1..=MAX_SIZE),
    ("num_layers", 1..=MAX_LAYERS),
    ("encoder_hidden_size", 1..=MAX_SIZE),
    ("encoder_num_layers", 1..=MAX_LAYERS),
    ("num_tasks", 1..=MAX_SIZE),
    ("num_ranks", 1..=MAX_SIZE),
    ("prompt_tuning_init_task", 0..=MAX_SIZE),
    ("adapter_len", 1..=MAX_SIZE),
];

/// Checks the fields of a kind of prompt. What they name is neither opened nor fetched.
pub(super) fn check(fields: &mut Fields, kind: &str) {
    for (name, range) in SIZES {
        if fields.set(name).is_some() {
            fields.integer(name, range, 1);
        }
    }
    for name in ["prompt_tuning_init_text", "tokenizer_name_or_path", "prompt_tuning_init_state_dict_path"] {
        fields.text(name);
    }
    fields.object("tokenizer_kwargs");
    match kind {
        "PROMPT_TUNING" => {
            fields.choice("prompt_tuning_init", &["RANDOM", "TEXT", "SAMPLE_VOCAB"]);
        }
        "MULTITASK_PROMPT_TUNING" => {
            let sources = ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"];
            fields.choice("prompt_tuning_init", &[&["RANDOM", "TEXT"], &sources[..]].concat());
        }
        "P_TUNING" => {
            fields.choice("encoder_reparameterization_type", &["MLP", "LSTM"]);
            fields.fraction("encoder_dropout");
        }
        "PREFIX_TUNING" => {
            fields.boolean("prefix_projection", false);
            if fields.set("init_weights").is_some() {
                fields.choice("init_weights", &["zero"]);
            }
        }
        "CARTRIDGE" => {
            fields.integer("num_frozen_tokens", 0..=MAX_SIZE, 1);
        }
        "CPT" => cpt(fields),
        _ => {}
    }
}

fn cpt(fields: &mut Fields) {
    for name in ["cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"] {
        fields.integers(name, &(0..=i64::from(i32::MAX)));
    }
    if fields.set("opt_weighted_loss_type").is_some() {
        fields.choice("opt_weighted_loss_type", &["none", "decay"]);
    }
    for name in ["opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"] {
        if fields.set(name).is_some() {
            fields.number(name, 0.0);
        }
    }
}
