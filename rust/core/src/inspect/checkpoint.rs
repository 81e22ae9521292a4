//! A model's checkpoint by its headers, its config and the record of a merge.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;
use serde_json::Value;

use super::values::{Statistics, statistics};
use crate::checkpoint::{ADAPTER_CONFIG, Checkpoint, Links, MODEL_CONFIG, read_json};
use crate::error::{Result, show_name};
use crate::threads;
use crate::writer::MARKER;

/// The last parts of names under which packed weights keep what unpacks them.
const PACKED: [&str; 10] = [
    "qweight",
    "qzeros",
    "scales",
    "weight_scale",
    "weight_scale_inv",
    "weight_packed",
    "quant_state",
    "SCB",
    "absmax",
    "g_idx",
];

/// An open checkpoint with what lies beside it.
#[derive(Debug)]
pub struct Model {
    /// Its tensors.
    pub weights: Checkpoint,
    /// `config.json`, if there is one.
    pub config: Option<Value>,
    /// What `peftrs-merge` wrote of the merge that made it, if one did.
    pub record: Option<Value>,
    /// Whether an adapter's config lies beside it.
    pub adapter_beside: bool,
}

/// The tensors of one type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// How many.
    pub tensors: usize,
    /// Their numbers.
    pub parameters: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// The statistics of every float tensor of a checkpoint.
pub type Scan = Vec<(String, Statistics)>;

impl Model {
    /// Opens a model: a folder, an index or one safetensors file. Only headers and small files are read.
    pub fn open(path: &Path, links: Links) -> Result<Self> {
        let weights = Checkpoint::open_model(path, links)?;
        let folder = weights.folder().to_owned();
        let config = read_json(&folder, MODEL_CONFIG, links)?;
        let record = read_json(&folder, MARKER, links)?;
        Ok(Self { weights, config, record, adapter_beside: folder.join(ADAPTER_CONFIG).exists() })
    }

    /// The tensors by type.
    #[must_use]
    pub fn dtypes(&self) -> BTreeMap<&'static str, Share> {
        let mut shares: BTreeMap<&'static str, Share> = BTreeMap::new();
        for (_, entry) in self.weights.entries() {
            let share = shares.entry(entry.dtype.name()).or_default();
            share.tensors += 1;
            share.parameters += entry.elements() as u64;
            share.bytes += entry.bytes() as u64;
        }
        shares
    }

    /// The names of the `count` largest tensors.
    #[must_use]
    pub fn largest(&self, count: usize) -> Vec<&str> {
        let mut found: Vec<(usize, &str)> = self.weights.entries().map(|(name, entry)| (entry.bytes(), name)).collect();
        found.sort_by(|one, other| other.0.cmp(&one.0).then(one.1.cmp(other.1)));
        found.into_iter().take(count).map(|(_, name)| name).collect()
    }

    /// A field of the config.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&Value> {
        self.config.as_ref()?.get(name).filter(|value| !value.is_null())
    }

    /// By what the weights are quantized, as the config says or names of tensors show.
    #[must_use]
    pub fn quantized(&self) -> Option<String> {
        if let Some(method) = self.field("quantization_config") {
            let name = method.get("quant_method").and_then(Value::as_str).unwrap_or("a method without a name");
            return Some(show_name(name));
        }
        self.packed().next().map(|name| format!("a method that the config does not name (it has {})", show_name(name)))
    }

    /// The tensors that only quantized weights have.
    pub fn packed(&self) -> impl Iterator<Item = &str> {
        self.weights.names().filter(|name| PACKED.iter().any(|end| name.rsplit('.').next() == Some(*end)))
    }

    /// What looks wrong, as far as configs and headers tell.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.adapter_beside {
            found.push(format!(
                "{ADAPTER_CONFIG} lies beside the weights: transformers applies that adapter on loading"
            ));
        }
        if self.field("quantization_config").is_some() && self.packed().next().is_none() {
            let floats = self.weights.entries().all(|(_, entry)| entry.dtype.is_adapter_float());
            if floats {
                found.push("config.json has a quantization_config, but no tensor is quantized".to_owned());
            }
        }
        found
    }
}

/// The statistics of every float tensor; this reads all of the checkpoint.
pub fn scan(checkpoint: &Checkpoint) -> Result<Scan> {
    let names: Vec<&str> = checkpoint.names().collect();
    let one = |name: &&str| Ok(statistics(checkpoint, name)?.map(|found| ((*name).to_owned(), found)));
    let found: Vec<Option<(String, Statistics)>> = threads::install(|| names.par_iter().map(one).collect())?;
    Ok(found.into_iter().flatten().collect())
}
