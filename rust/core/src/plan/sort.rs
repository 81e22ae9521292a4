//! The tensors of an adapter, by the module that they belong to and the part that they play there.

use std::collections::BTreeMap;

use crate::checkpoint::Checkpoint;
use crate::keys;

/// What a tensor is for its module, as the file spells it.
const SLOTS: [&str; 7] = [
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "token_adapter.trainable_tokens_delta",
];

/// LoRA's tensors of one module: the keys in the adapter file.
#[derive(Debug, Default)]
pub struct Module<'a> {
    /// `down`, of shape (rank, in).
    pub down: Option<&'a str>,
    /// `up`, of shape (out, rank).
    pub up: Option<&'a str>,
    /// Whether the two are an embedding's, whose weight is (in, out).
    pub embedding: bool,
    /// The bias of `up`, of shape (out).
    pub bias: Option<&'a str>,
    /// DoRA's magnitudes, (out) in all.
    pub magnitude: Option<&'a str>,
    /// The rows of an embedding that were trained whole.
    pub tokens: Option<&'a str>,
}

/// All tensors of an adapter.
#[derive(Debug, Default)]
pub struct Sorted<'a> {
    /// By module path, without the prefix that every key has.
    pub modules: BTreeMap<&'a str, Module<'a>>,
    /// Weights and biases saved whole: (key, parameter name without that prefix and without `base_layer`).
    pub whole: Vec<(&'a str, String)>,
    /// Keys that follow neither form.
    pub unknown: Vec<&'a str>,
}

impl<'a> Sorted<'a> {
    /// Sorts the keys of `adapter`.
    pub fn new(adapter: &'a Checkpoint) -> Self {
        let mut sorted = Self::default();
        for key in adapter.names() {
            if let Some(parsed) = keys::parse(key, &SLOTS) {
                let module = sorted.modules.entry(parsed.module).or_default();
                let place = match parsed.slot {
                    "lora_A.weight" => &mut module.down,
                    "lora_B.weight" => &mut module.up,
                    "lora_B.bias" => &mut module.bias,
                    "lora_magnitude_vector" => &mut module.magnitude,
                    "token_adapter.trainable_tokens_delta" => &mut module.tokens,
                    slot => {
                        module.embedding = true;
                        if slot == "lora_embedding_A" { &mut module.down } else { &mut module.up }
                    }
                };
                if place.replace(key).is_some() {
                    sorted.unknown.push(key);
                }
                continue;
            }
            let name = key.strip_prefix(keys::PREFIX).unwrap_or(key);
            if name.contains("lora_") || !name.contains('.') {
                sorted.unknown.push(key);
            } else {
                sorted.whole.push((key, keys::without_base_layer(name)));
            }
        }
        sorted
    }
}
