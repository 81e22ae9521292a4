//! Methods that have no kernel here: whoever runs the merge may bring a way to compute them.

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;

use super::changes::{Change, Drafts};
use super::planner::Planner;
use super::refusals::{BAD_SHAPE, NO_HOME, Problems};
use super::slots::Sorted;
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
use crate::keys::without_base_layer;

/// A tensor of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// What it is for its module, as the file spells it.
    pub name: String,
    /// Its type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its key in the adapter.
    pub key: String,
}

/// A layer as such a method sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// The text of the adapter's config.
    pub config: Arc<str>,
    /// What the adapter's change is multiplied by.
    pub weight: f64,
    /// The module's path, as the adapter has it.
    pub path: String,
    /// What its weight is called there.
    pub parameter: String,
    /// The weight's type in the base.
    pub dtype: Dtype,
    /// The weight's shape as the base stores it.
    pub shape: Vec<usize>,
    /// Whether the layer has a bias.
    pub bias: bool,
    /// Whether a square weight is stored as (in, out), as far as the two configs know.
    pub transposed: bool,
    /// The adapter's tensors for it.
    pub slots: Vec<Slot>,
}

/// What a method does to a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effect {
    /// Whether it only adds, so that a weight can multiply it.
    pub additive: bool,
    /// Whether it changes the bias as well.
    pub bias: bool,
}

/// A way to compute methods that have no kernel here.
pub trait Apply: Debug + Send + Sync {
    /// How the names of a method's tensors begin, such as `lora_`, by the adapter's config. Fails for a method unknown there as
    /// well.
    fn prefix(&self, config: &str) -> Result<String>;

    /// What would be done to a layer. Fails if the tensors do not fit it, or the method cannot be merged into it.
    fn check(&self, layer: &Layer) -> Result<Effect>;

    /// The layer's weight and bias with the change, from those without it: little-endian, of the type `wide`, row-major as
    /// stored. `slots` are the bytes of the adapter's tensors.
    fn apply(
        &self,
        layer: &Layer,
        slots: &[Vec<u8>],
        wide: Dtype,
        weight: Vec<u8>,
        bias: Option<Vec<u8>>,
    ) -> Result<(Vec<u8>, Option<Vec<u8>>)>;
}

/// A change that is computed elsewhere.
#[derive(Debug, Clone, PartialEq)]
pub struct Elsewhere {
    /// The layer.
    pub layer: Layer,
    /// What the base calls its weight, and its bias if it has one.
    pub weight: String,
    /// See `weight`.
    pub bias: Option<String>,
    /// Whether this is the change of the bias.
    pub of_bias: bool,
    /// What the method does.
    pub effect: Effect,
}

impl Planner<'_> {
    /// The changes of modules whose method is computed elsewhere.
    pub fn elsewhere(&self, sorted: &Sorted, changes: &mut Drafts, problems: &mut Problems) -> Result<()> {
        let Some(apply) = self.apply else { return Ok(()) };
        let mut taken: HashSet<String> = HashSet::new();
        for (path, module) in sorted.modules.iter().filter(|(_, module)| !module.slots.is_empty()) {
            let homes: Vec<_> = self.weights(path, changes).into_iter().filter(|home| home.pieces.is_empty()).collect();
            if homes.is_empty() {
                problems.add(NO_HOME, show_name(path));
                continue;
            }
            let bias = format!("{}.bias", self.homes.path(&without_base_layer(path)));
            let bias = self.base.source(&bias).map(|source| (bias.clone(), source.to_owned()));
            let mut faults = Vec::new();
            for home in homes.iter().filter(|home| !taken.contains(&home.name)) {
                let layer = Layer {
                    config: Arc::clone(self.config),
                    weight: self.weight,
                    path: (*path).to_owned(),
                    parameter: home.name.rsplit('.').next().unwrap_or_default().to_owned(),
                    dtype: home.dtype,
                    shape: home.shape.clone(),
                    bias: bias.is_some(),
                    transposed: self.stored_transposed,
                    slots: module.slots.iter().filter_map(|(name, key)| self.slot(name, key)).collect(),
                };
                match apply.check(&layer) {
                    Ok(effect) => {
                        taken.insert(home.name.clone());
                        let weight = self.base.source(&home.name).unwrap_or(&home.name).to_owned();
                        let source = bias.as_ref().map(|(_, source)| source.clone());
                        let update = Elsewhere { layer, weight, bias: source, of_bias: false, effect };
                        if let Some((name, _)) = bias.as_ref().filter(|_| effect.bias) {
                            let of_bias = Elsewhere { of_bias: true, ..update.clone() };
                            self.push(changes, name.clone(), Change::Elsewhere(Box::new(of_bias)));
                        }
                        self.push(changes, home.name.clone(), Change::Elsewhere(Box::new(update)));
                        faults.clear();
                        break;
                    }
                    Err(error @ Error::Merge(_)) => faults.push(error.to_string()),
                    Err(error) => return Err(error),
                }
            }
            if !faults.is_empty() {
                problems.add(BAD_SHAPE, faults.join(", "));
            }
        }
        Ok(())
    }

    fn slot(&self, name: &str, key: &str) -> Option<Slot> {
        let entry = self.adapter.entry(key)?;
        Some(Slot { name: name.to_owned(), dtype: entry.dtype, shape: entry.shape.clone(), key: key.to_owned() })
    }
}
