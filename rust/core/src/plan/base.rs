//! The base as the adapters see it: its layers repeated where they were trained on a deeper model made of them, and which of
//! its modules a path of an adapter means: the same path, or that path with or without one prefix.
//!
//! A base saved from a bare encoder lacks the prefix that a model with a head gives it, and the other way round. Putting
//! one prefix in the place of another is refused: it would move a text encoder's adapter onto a vision encoder.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

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

/// The most leading components that a base checkpoint may lack: `base_model.model.model.language_model.` is the longest seen.
const DEEPEST: usize = 3;

/// How every path of an adapter becomes a path of the base; at most one of the two is not empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Homes {
    /// The prefix that only the adapter's paths have, with its last dot, or nothing.
    pub strip: String,
    /// The prefix that only the base's paths have, with its last dot, or nothing.
    pub add: String,
    /// What follows that prefix in the base, one component each. Before others, as a head at the base's top, it is not put.
    pub inside: BTreeSet<String>,
}

/// The prefixes of two ways of reading the adapter's paths that both find a home for all of them.
#[derive(Debug, PartialEq, Eq)]
pub struct Ambiguous(pub String, pub String);

impl Homes {
    fn new(strip: &str, add: &str, modules: &HashSet<&str>) -> Self {
        let inside = |module: &&str| Some(first(module.strip_prefix(add)?).to_owned());
        let inside = modules.iter().filter(|_| !add.is_empty()).filter_map(inside);
        let inside = inside.filter(|name| !modules.contains(name.as_str())).collect();
        Self { strip: strip.to_owned(), add: add.to_owned(), inside }
    }

    /// The path in the base. One that lacks the adapter's prefix, as a head does, stays as it is.
    pub fn path(&self, path: &str) -> String {
        let rest = path.strip_prefix(&self.strip);
        let rest = rest.filter(|rest| self.add.is_empty() || self.inside.contains(first(rest)));
        rest.map_or_else(|| path.to_owned(), |rest| format!("{}{rest}", self.add))
    }

    /// The reading under which the most `paths` are among `modules`, the paths as they stand first.
    ///
    /// Paths that stay homeless are for the caller to report.
    pub fn find(paths: &[&str], modules: &HashSet<&str>) -> Result<Self, Ambiguous> {
        let count = |homes: &Self| paths.iter().filter(|path| modules.contains(homes.path(path).as_str())).count();
        let mut best = (count(&Self::default()), Self::default());
        let Some(stray) = paths.iter().find(|path| !modules.contains(**path)) else { return Ok(best.1) };
        for depth in 0..=DEEPEST {
            let Some((strip, rest)) = split(stray, depth) else { break };
            let mut found: Vec<Self> = modules
                .iter()
                .filter_map(|module| module.strip_suffix(rest))
                .filter(|add| add.is_empty() || depth == 0 && add.ends_with('.'))
                .map(|add| Self::new(strip, add, modules))
                .collect();
            found.sort_by(|a, b| a.add.cmp(&b.add));
            let whole: Vec<&Self> = found.iter().filter(|homes| count(homes) == paths.len()).collect();
            match whole.as_slice() {
                [] => {}
                [one] => return Ok((*one).clone()),
                [one, other, ..] => return Err(Ambiguous(one.add.clone(), other.add.clone())),
            }
            for homes in found {
                let homed = count(&homes);
                if homed > best.0 {
                    best = (homed, homes);
                }
            }
        }
        Ok(best.1)
    }
}

/// The first component of a path.
fn first(path: &str) -> &str {
    path.split_once('.').map_or(path, |(first, _)| first)
}

/// `path` after its first `depth` components, and those components with the dot.
fn split(path: &str, depth: usize) -> Option<(&str, &str)> {
    let Some(last) = depth.checked_sub(1) else { return Some(("", path)) };
    let (dot, _) = path.match_indices('.').nth(last)?;
    path.split_at_checked(dot + 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

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

    fn find(paths: &[&str], modules: &[&str]) -> Result<(String, String), Ambiguous> {
        Homes::find(paths, &modules.iter().copied().collect()).map(|homes| (homes.strip, homes.add))
    }

    fn pair(strip: &str, add: &str) -> (String, String) {
        (strip.to_owned(), add.to_owned())
    }

    #[test]
    fn equal_paths_need_nothing() {
        assert_eq!(find(&["a.q", "a.v"], &["a.q", "a.v", "x.a.q", "x.a.v"]), Ok(pair("", "")));
    }

    #[test]
    fn a_prefix_is_stripped_or_added_but_not_exchanged() {
        let paths = ["bert.layer.0.q", "bert.layer.1.q"];
        assert_eq!(find(&paths, &["layer.0.q", "layer.1.q"]), Ok(pair("bert.", "")));
        assert_eq!(find(&paths, &["m.bert.layer.0.q", "m.bert.layer.1.q"]), Ok(pair("", "m.")));
        assert_eq!(find(&paths, &["roberta.layer.0.q", "roberta.layer.1.q"]), Ok(pair("", "")));
    }

    #[test]
    fn one_prefix_must_serve_all() {
        let homes = Homes::find(&["m.a.q", "m.b.q", "m.c.q"], &["a.q", "b.q", "x.c.q"].into_iter().collect()).unwrap();
        assert_eq!((homes.strip.as_str(), homes.add.as_str()), ("m.", ""));
        assert_eq!(homes.path("lm_head"), "lm_head");
    }

    #[test]
    fn a_prefix_is_put_before_what_the_base_has_under_it() {
        let modules = ["model.layers.0.q", "model.norm", "lm_head", "model.both", "both"].into_iter().collect();
        let homes = Homes::find(&["layers.0.q"], &modules).unwrap();
        for (path, home) in [
            ("layers.7.experts", "model.layers.7.experts"),
            ("norm", "model.norm"),
            ("lm_head", "lm_head"),
            ("both", "both"),
            ("score.dense", "score.dense"),
        ] {
            assert_eq!(homes.path(path), home);
        }
    }

    #[test]
    fn two_whole_readings_are_ambiguous() {
        let found = find(&["layers.0.q"], &["text.layers.0.q", "vision.layers.0.q"]);
        assert_eq!(found, Err(Ambiguous("text.".into(), "vision.".into())));
    }
}
