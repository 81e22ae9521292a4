//! Which layers a model has, and which of them an adapter would be for: by the headers of its checkpoint, or by a list that
//! the model's class gives.

mod aim;

pub use aim::{Aim, Coverage, aim, wants_all_linear};

use std::collections::{BTreeSet, HashSet};

use serde_json::Value;

use crate::checkpoint::{Checkpoint, Entry};
use crate::dtype::Dtype;

/// What names of embeddings have in their last part.
const EMBEDDINGS: [&str; 8] =
    ["embed", "wte", "wpe", "tok_embeddings", "shared", "relative_attention_bias", "codebook", "lookup"];

/// A layer that holds parameters of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its name in the model, or that of a bare parameter.
    pub name: String,
    /// What it is: `linear`, `embedding`, `conv1d`, `conv2d`, `conv3d`, `attention`, `parameter`, `quantized` where the
    /// stored shape is a packed one, or else `other`.
    pub kind: String,
    /// The shape of its weight as stored.
    pub shape: Vec<usize>,
    /// How many numbers all its parameters hold.
    pub parameters: u64,
}

/// The layers of a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outline {
    /// The names of all modules, parents first.
    pub modules: Vec<String>,
    /// The layers in the order of the model, or of its files.
    pub layers: Vec<Layer>,
    /// The full names of all parameters.
    pub parameters: Vec<String>,
    /// What `all-linear` stands for; only the model's class says so.
    pub linear: Option<Vec<String>>,
}

/// The layers that have one name but for the numbers in it, and are alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The name with `*` for each number.
    pub name: String,
    /// Their kind.
    pub kind: String,
    /// The shape of each one's weight.
    pub shape: Vec<usize>,
    /// The layers' names.
    pub members: Vec<String>,
    /// The numbers of the blocks that they are in, sorted.
    pub blocks: Vec<usize>,
    /// How many numbers all their parameters hold.
    pub parameters: u64,
}

impl Group {
    /// The last part of the name, which is what lists of targets say.
    #[must_use]
    pub fn leaf(&self) -> &str {
        self.name.rsplit('.').find(|part| *part != "*").unwrap_or(&self.name)
    }
}

impl Outline {
    /// The layers by the headers: their names are those of the files, and their kinds a guess from shapes and names.
    #[must_use]
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let mut names: Vec<(&str, &Entry)> = checkpoint.entries().collect();
        names.sort_by_cached_key(|(name, _)| natural(name));
        let mut outline = Self::default();
        let mut seen: HashSet<&str> = HashSet::new();
        let packed = |name: &str| {
            let entry = checkpoint.entry(name);
            entry.is_some_and(|entry| {
                matches!(entry.dtype, Dtype::U8 | Dtype::I8 | Dtype::I32 | Dtype::F8_E4M3 | Dtype::F8_E5M2)
            })
        };
        let parameters: HashSet<&str> = names.iter().map(|(name, _)| *name).collect();
        for (name, entry) in &names {
            let shape = entry.shape.as_slice();
            let (module, leaf) = name.rsplit_once('.').unwrap_or(("", name));
            // What unpacks a weight is kept below the weight's own name.
            if parameters.contains(module) {
                continue;
            }
            outline.parameters.push((*name).to_owned());
            for (dot, _) in name.match_indices('.') {
                let Some(module) = name.get(..dot) else { continue };
                if seen.insert(module) {
                    outline.modules.push(module.to_owned());
                }
            }
            let count = entry.elements() as u64;
            let weighted = |leaf: &str| !module.is_empty() && parameters.contains(format!("{module}.{leaf}").as_str());
            if leaf == "bias" && (weighted("weight") || weighted("qweight")) || weighted("weight") && leaf != "weight" {
                continue;
            }
            let (name, kind) = match leaf {
                "weight" if packed(name) => (module, "quantized"),
                "weight" => (module, kind(module, shape)),
                "in_proj_weight" => (module, "attention"),
                "qweight" => (module, "quantized"),
                _ if shape.len() >= 2 && !weighted("qweight") => (*name, "parameter"),
                _ => continue,
            };
            let bias = checkpoint.entry(&format!("{module}.bias")).filter(|_| leaf == "weight");
            let bias = bias.map_or(0, |entry| entry.elements() as u64);
            let (name, kind) = (name.to_owned(), kind.to_owned());
            outline.layers.push(Layer { name, kind, shape: shape.to_vec(), parameters: count + bias });
        }
        outline
    }

    /// The layers in groups, in the order of their first members.
    #[must_use]
    pub fn groups(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        let mut index = std::collections::HashMap::new();
        for layer in &self.layers {
            let key = (starred(&layer.name), layer.kind.clone(), layer.shape.clone());
            let at = *index.entry(key.clone()).or_insert_with(|| {
                let (name, kind, shape) = key;
                groups.push(Group { name, kind, shape, members: Vec::new(), blocks: Vec::new(), parameters: 0 });
                groups.len() - 1
            });
            if let Some(group) = groups.get_mut(at) {
                group.members.push(layer.name.clone());
                group.blocks.extend(block(&layer.name).map(|(_, number)| number));
                group.parameters += layer.parameters;
            }
        }
        for group in &mut groups {
            group.blocks.sort_unstable();
            group.blocks.dedup();
        }
        groups
    }

    /// The lists of blocks: the name before the number, and the numbers that there are.
    #[must_use]
    pub fn stacks(&self) -> Vec<(String, BTreeSet<usize>)> {
        let mut stacks: Vec<(String, BTreeSet<usize>)> = Vec::new();
        for (prefix, number) in self.modules.iter().filter_map(|name| block(name)) {
            match stacks.iter_mut().find(|(known, _)| known == prefix) {
                Some((_, numbers)) => {
                    numbers.insert(number);
                }
                None => stacks.push((prefix.to_owned(), [number].into())),
            }
        }
        stacks
    }
}

/// How many numbers LoRA of rank `rank` adds to a layer, if it can adapt one of that kind and shape.
#[must_use]
pub fn added(kind: &str, shape: &[usize], rank: usize) -> Option<u64> {
    let sizes = match (kind, shape) {
        ("linear" | "embedding" | "attention" | "parameter", [rows, columns]) => rows + columns,
        ("parameter", [count, rows, columns]) => count * (rows + columns),
        ("conv1d" | "conv2d" | "conv3d", [out, rest @ ..]) => out + rest.iter().product::<usize>(),
        _ => return None,
    };
    Some((rank as u64).saturating_mul(sizes as u64))
}

/// The outermost number in a name and what stands before it: the block of a stack.
pub(crate) fn block(name: &str) -> Option<(&str, usize)> {
    let mut start = 0;
    for part in name.split('.') {
        if let Ok(number) = part.parse() {
            return Some((name.get(..start)?.trim_end_matches('.'), number));
        }
        start += part.len() + 1;
    }
    None
}

/// The name with `*` for each part that is a number.
pub(crate) fn starred(name: &str) -> String {
    let star = |part| if is_number(part) { "*" } else { part };
    name.split('.').map(star).collect::<Vec<_>>().join(".")
}

fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit())
}

/// What sorts names as people do: numbers by value.
fn natural(name: &str) -> Vec<(usize, &str)> {
    let part = |part: &'_ str| part.parse().ok();
    name.split('.').map(|text| part(text).map_or((usize::MAX, text), |number| (number, ""))).collect()
}

fn kind(module: &str, shape: &[usize]) -> &'static str {
    let last = module.rsplit('.').find(|part| !is_number(part)).unwrap_or(module).to_lowercase();
    match shape.len() {
        2 if EMBEDDINGS.iter().any(|part| last.contains(part)) => "embedding",
        2 => "linear",
        3 => "conv1d",
        4 => "conv2d",
        5 => "conv3d",
        _ => "other",
    }
}

/// The class, kind and size of a model in its own words, from `config.json`.
#[must_use]
pub fn described(config: Option<&Value>) -> Option<String> {
    let config = config?;
    let architecture = config.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str);
    let kind = config.get("model_type").and_then(Value::as_str);
    match (architecture, kind) {
        (Some(architecture), Some(kind)) => Some(format!("{architecture} ({kind})")),
        (one, other) => one.or(other).map(str::to_owned),
    }
}
