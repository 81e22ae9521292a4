//! The base as the adapters see it: its layers repeated where they were trained on a deeper model made of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::adapter::Adapter;
use crate::checkpoint::{Checkpoint, Entry};
use crate::error::{Error, Result, show_name};

/// Where the models that can be grown keep their layers: Llama and its kin, BERT, Falcon.
const LISTS: [&str; 3] = ["layers", "encoder.layer", "h"];

/// A base and the names under which its tensors are seen.
pub struct Base<'a> {
    /// What is read.
    pub checkpoint: &'a Checkpoint,
    /// The layer of the base that each layer seen is, if not each is itself.
    pub layers: Option<Vec<usize>>,
    /// How many layers the base has, where it is asked.
    pub depth: usize,
    seen: BTreeMap<String, &'a str>,
    places: HashMap<&'a str, Vec<String>>,
}

impl<'a> Base<'a> {
    /// The base as all of `adapters` see it, which has to be the same for each.
    pub fn new(checkpoint: &'a Checkpoint, adapters: &[Adapter]) -> Result<Self> {
        let ranges = |adapter: &Adapter| adapter.config.lora().and_then(|lora| lora.layer_replication.clone());
        let wanted = adapters.first().and_then(ranges);
        if let Some(other) = adapters.iter().find(|adapter| ranges(adapter) != wanted) {
            return Err(Error::Merge(format!(
                "{} was trained on another `layer_replication` than {}; hint: merge adapters of the same replication",
                other.shown(),
                adapters.first().map(Adapter::shown).unwrap_or_default()
            )));
        }
        let identity = Self { checkpoint, layers: None, depth: 0, seen: BTreeMap::new(), places: HashMap::new() };
        wanted.map_or(Ok(identity), |ranges| Self::replicated(checkpoint, &ranges))
    }

    fn replicated(checkpoint: &'a Checkpoint, ranges: &[(usize, usize)]) -> Result<Self> {
        let refuse = |reason: &str| Err(Error::checkpoint(checkpoint.path(), format!("`layer_replication`: {reason}")));
        let prefixes: BTreeSet<&str> = checkpoint.names().filter_map(|name| Some(layer(name)?.0)).collect();
        let (Some(prefix), 1) = (prefixes.first().copied(), prefixes.len()) else {
            return refuse(
                "layers are repeated in models like Llama, BERT and Falcon, and this has no one list of them",
            );
        };
        let in_list = |name: &&str| layer(name).is_some_and(|(found, ..)| found == prefix);
        let indices: BTreeSet<usize> =
            checkpoint.names().filter(in_list).filter_map(|name| Some(layer(name)?.1)).collect();
        let depth = indices.len();
        if !indices.iter().copied().eq(0..depth) || ranges.is_empty() || ranges.iter().any(|(_, end)| *end > depth) {
            return refuse(&format!("{ranges:?} are not ranges of the {depth} layers in {}", show_name(prefix)));
        }
        let layers: Vec<usize> = ranges.iter().flat_map(|(start, end)| *start..*end).collect();
        let mut places: HashMap<&str, Vec<String>> = HashMap::new();
        for name in checkpoint.names() {
            let seen = layer(name).map_or_else(
                || vec![name.to_owned()],
                |(_, index, rest)| {
                    let copies = layers.iter().enumerate().filter(|(_, from)| **from == index);
                    copies.map(|(place, _)| format!("{prefix}{place}{rest}")).collect()
                },
            );
            places.insert(name, seen);
        }
        let seen = places.iter().flat_map(|(name, seen)| seen.iter().map(|seen| (seen.clone(), *name))).collect();
        Ok(Self { checkpoint, layers: Some(layers), depth, seen, places })
    }

    /// The names under which tensors are seen.
    pub fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        if self.layers.is_some() {
            Box::new(self.seen.keys().map(String::as_str))
        } else {
            Box::new(self.checkpoint.names())
        }
    }

    /// The tensor seen as `name`.
    pub fn entry(&self, name: &str) -> Option<&'a Entry> {
        self.checkpoint.entry(self.source(name)?)
    }

    /// What the file calls the tensor seen as `name`.
    pub fn source<'n>(&'n self, name: &'n str) -> Option<&'n str> {
        match self.layers {
            Some(_) => self.seen.get(name).copied(),
            None => self.checkpoint.entry(name).map(|_| name),
        }
    }

    /// The names under which the tensor called `name` in the file is seen.
    pub fn places<'n>(&'n self, name: &'n str) -> impl Iterator<Item = &'n str> {
        let copies = self.places.get(name).map(Vec::as_slice).unwrap_or_default();
        self.layers.is_none().then_some(name).into_iter().chain(copies.iter().map(String::as_str))
    }
}

/// A tensor's list of layers with its last dot, the layer's number and what follows that, if the list is one that can grow.
fn layer(name: &str) -> Option<(&str, usize, &str)> {
    let mut inner = name;
    while let Some(rest) = inner.strip_prefix("model.") {
        inner = rest;
    }
    inner = inner.strip_prefix("bert.").or_else(|| inner.strip_prefix("transformer.")).unwrap_or(inner);
    let rest = LISTS.iter().find_map(|list| inner.strip_prefix(list)?.strip_prefix('.'))?;
    let end = rest.find('.')?;
    let (number, after) = rest.split_at_checked(end)?;
    let prefix = name.get(..name.len() - rest.len())?;
    Some((prefix, number.parse().ok()?, after))
}

#[cfg(test)]
mod tests {
    use super::layer;

    #[test]
    fn layers_are_found_where_models_keep_them() {
        for (name, found) in [
            ("model.layers.3.mlp.up_proj.weight", Some(("model.layers.", 3, ".mlp.up_proj.weight"))),
            ("bert.encoder.layer.0.output.bias", Some(("bert.encoder.layer.", 0, ".output.bias"))),
            ("transformer.h.11.ln.weight", Some(("transformer.h.", 11, ".ln.weight"))),
            ("layers.1.q.weight", Some(("layers.", 1, ".q.weight"))),
            ("vision.layers.1.q.weight", None),
            ("model.layers.x.q.weight", None),
            ("model.norm.weight", None),
        ] {
            assert_eq!(layer(name), found, "{name}");
        }
    }
}
