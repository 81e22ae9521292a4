//! The tensors of an adapter, by the module that they belong to and the part that they play there.

use std::collections::{BTreeMap, HashSet};

use crate::checkpoint::Checkpoint;
use crate::config::Method;
use crate::keys;

/// What tensors of LoRA are for their module, as files spell it.
const LORA: [&str; 7] = [
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    TOKENS,
];

/// Rows of an embedding that were trained whole, beside any method.
const TOKENS: &str = "token_adapter.trainable_tokens_delta";

/// The same of (IA)³.
const IA3: [&str; 1] = ["ia3_l"];

/// The same of OFT.
const OFT: [&str; 2] = ["oft_R.weight", "oft_embedding_R.weight"];

/// What changes a module's weight: keys in the adapter file.
#[derive(Debug, Default, Clone, Copy)]
pub enum Part<'a> {
    /// Nothing, or not all that it takes.
    #[default]
    None,
    /// `down`, of shape (rank, in), and `up`, (out, rank); an embedding's weight is (in, out).
    Factors { down: &'a str, up: &'a str, embedding: bool },
    /// A factor for each input or output.
    Scale(&'a str),
    /// The skew matrices of turns; of outputs for an embedding, else of inputs.
    Turn { key: &'a str, embedding: bool },
}

/// The tensors of one module: the keys in the adapter file.
#[derive(Debug, Default)]
pub struct Module<'a> {
    /// What changes the weight.
    pub part: Part<'a>,
    /// The bias of `up`, of shape (out).
    pub bias: Option<&'a str>,
    /// DoRA's magnitudes, (out) in all.
    pub magnitude: Option<&'a str>,
    /// The rows of an embedding that were trained whole.
    pub tokens: Option<&'a str>,
    /// One factor of two, as long as the other is not found.
    pub lone: Option<&'a str>,
    /// The tensors of a method that is computed elsewhere: what each is for the module, and its key.
    pub slots: Vec<(&'a str, &'a str)>,
}

impl Module<'_> {
    /// Whether its slots are those of an embedding.
    pub fn is_embedding(&self) -> bool {
        matches!(self.part, Part::Factors { embedding: true, .. } | Part::Turn { embedding: true, .. })
    }

    /// The keys whose shapes tell how the weight is changed.
    pub fn shaping(&self) -> Vec<&str> {
        match self.part {
            Part::None => Vec::new(),
            Part::Factors { down, up, .. } => vec![down, up],
            Part::Scale(key) | Part::Turn { key, .. } => vec![key],
        }
    }
}

/// All tensors of an adapter.
#[derive(Debug, Default)]
pub struct Sorted<'a> {
    /// By module path, without the prefix that every key has.
    pub modules: BTreeMap<&'a str, Module<'a>>,
    /// Weights and biases saved whole: (key, parameter name without that prefix and the names of wrapped layers).
    pub whole: Vec<(&'a str, String)>,
    /// Keys of modules as they were before training, of which the adapter holds the trained ones as well.
    pub untrained: Vec<&'a str>,
    /// Keys that follow neither form.
    pub unknown: Vec<&'a str>,
}

impl<'a> Sorted<'a> {
    /// Sorts the keys of `adapter`; `elsewhere` is how the names of tensors begin if the method is computed elsewhere.
    pub fn new(adapter: &'a Checkpoint, method: &Method, elsewhere: Option<&str>) -> Self {
        let (slots, prefix): (&[&str], _) = match method {
            Method::Ia3(_) => (&IA3, "ia3_"),
            Method::Oft(_) => (&OFT, "oft_"),
            _ => (&LORA, "lora_"),
        };
        let (slots, prefix) = elsewhere.map_or((slots, prefix), |prefix| (&[TOKENS][..], prefix));
        let mut sorted = Self::default();
        let mut originals = Vec::new();
        for key in adapter.names() {
            if let Some(parsed) = keys::parse(key, slots) {
                let module = sorted.modules.entry(parsed.module).or_default();
                if !module.take(key, parsed.slot) {
                    sorted.unknown.push(key);
                }
                continue;
            }
            let name = key.strip_prefix(keys::PREFIX).unwrap_or(key);
            if let Some((module, slot)) = elsewhere.and_then(|prefix| split(name, prefix)) {
                sorted.modules.entry(module).or_default().slots.push((slot, key));
                continue;
            }
            if name.contains(prefix) || !name.contains('.') {
                sorted.unknown.push(key);
            } else if name.split('.').any(|part| part == keys::ORIGINAL_MODULE) {
                originals.push((key, name));
            } else {
                sorted.whole.push((key, keys::without_base_layer(name)));
            }
        }
        let trained: HashSet<String> = sorted.whole.iter().map(|(_, name)| name.clone()).collect();
        let rows = sorted.modules.values().any(|module| module.tokens.is_some());
        for (key, name) in originals {
            let plain = keys::without_base_layer(&name.replace(&format!(".{}.", keys::ORIGINAL_MODULE), "."));
            if trained.contains(&plain) {
                sorted.untrained.push(key);
            } else {
                // Embeddings of which rows are trained are kept so as well.
                sorted.whole.push((key, if rows { plain } else { name.to_owned() }));
            }
        }
        sorted
    }
}

/// A name before and from the first component that begins with `prefix`.
fn split<'a>(name: &'a str, prefix: &str) -> Option<(&'a str, &'a str)> {
    let dots = name.match_indices('.').map(|(dot, _)| dot);
    let dot = dots.into_iter().find(|dot| name.get(dot + 1..).is_some_and(|rest| rest.starts_with(prefix)))?;
    Some((name.get(..dot)?, name.get(dot + 1..)?))
}

impl<'a> Module<'a> {
    /// Puts `key` where its slot belongs, unless that is taken.
    fn take(&mut self, key: &'a str, slot: &str) -> bool {
        let place = match slot {
            "lora_B.bias" => &mut self.bias,
            "lora_magnitude_vector" => &mut self.magnitude,
            TOKENS => &mut self.tokens,
            _ => return self.take_part(key, slot),
        };
        place.replace(key).is_none()
    }

    fn take_part(&mut self, key: &'a str, slot: &str) -> bool {
        if !matches!(self.part, Part::None) {
            return false;
        }
        let embedding = slot.contains("embedding");
        match (slot, self.lone.take()) {
            ("ia3_l", None) => self.part = Part::Scale(key),
            ("oft_R.weight" | "oft_embedding_R.weight", None) => self.part = Part::Turn { key, embedding },
            (_, None) => self.lone = Some(key),
            (_, Some(other)) => {
                let is_down = |slot: &str| slot.ends_with("_A") || slot.ends_with("_A.weight");
                if is_down(key) == is_down(other) || other.contains("lora_embedding") != embedding {
                    self.lone = Some(other);
                    return false;
                }
                let (down, up) = if is_down(key) { (key, other) } else { (other, key) };
                self.part = Part::Factors { down, up, embedding };
            }
        }
        true
    }
}
