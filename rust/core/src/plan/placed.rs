//! The adapter's modules with the weights of the base that they change.

use std::collections::HashSet;

use super::draft::Drafts;
use super::fit::{Fit, fits};
use super::problems::{BAD_SHAPE, NO_HOME, NO_PARTNER, Problems};
use super::sort::{Module, Part, Sorted};
use super::updates::Planner;
use crate::checkpoint::Entry;
use crate::error::{Result, show_name};
use crate::keys::without_base_layer;
use crate::target::{Request, select};

/// A module and the weight that it changes.
pub struct Placed<'a> {
    pub path: &'a str,
    /// The weight's name in the base.
    pub name: String,
    pub module: &'a Module<'a>,
    /// Whether it acts on the layer's input; for what tells by its config alone, none if the config does not say.
    pub on_input: Option<bool>,
    pub fits: Vec<Fit>,
    pub dimensions: usize,
}

impl Planner<'_> {
    /// The modules whose weight changes, each with that weight.
    pub fn placed<'a>(
        &self,
        sorted: &'a Sorted<'a>,
        changes: &Drafts,
        problems: &mut Problems,
    ) -> Result<Vec<Placed<'a>>> {
        let mut found = Vec::new();
        let mut taken: HashSet<String> = HashSet::new();
        let inputs = self.on_input(sorted)?;
        for ((path, module), on_input) in sorted.modules.iter().zip(inputs) {
            if matches!(module.part, Part::None) {
                if module.tokens.is_none() || module.lone.is_some() {
                    let lone = module.lone.or(module.bias).or(module.magnitude).unwrap_or(path);
                    problems.add(NO_PARTNER, show_name(lone));
                }
                continue;
            }
            let entries: Vec<&Entry> = module.shaping().into_iter().filter_map(|key| self.adapter.entry(key)).collect();
            let shapes: Vec<&[usize]> = entries.iter().map(|entry| entry.shape.as_slice()).collect();
            let candidates = self.weights(path);
            if candidates.is_empty() {
                problems.add(NO_HOME, show_name(path));
                continue;
            }
            let fitting: Vec<(&String, Vec<Fit>, usize)> = candidates
                .iter()
                .filter(|(name, _)| !taken.contains(name))
                .map(|(name, entry)| {
                    let shape = self.shape(changes, name, entry);
                    (name, fits(shape, module, &shapes, on_input), shape.len())
                })
                .filter(|(_, fits, _)| !fits.is_empty())
                .collect();
            match <[_; 1]>::try_from(fitting) {
                Ok([(name, fits, dimensions)]) => {
                    taken.insert(name.clone());
                    found.push(Placed { path, name: name.clone(), module, on_input, fits, dimensions });
                }
                Err(fitting) => {
                    let several = if fitting.is_empty() { "" } else { ", of which several fit" };
                    let shapes: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
                    let weights =
                        candidates.iter().map(|(name, entry)| format!("{} {:?}", show_name(name), entry.shape));
                    let weights = weights.collect::<Vec<_>>().join(", ");
                    let text = format!("{} {} for {weights}{several}", show_name(path), shapes.join(" and "));
                    problems.add(BAD_SHAPE, text);
                }
            }
        }
        Ok(found)
    }

    /// Which modules scale their inputs, as far as the config says.
    fn on_input(&self, sorted: &Sorted) -> Result<Vec<Option<bool>>> {
        let paths: Vec<String> = sorted.modules.keys().map(|path| without_base_layer(path)).collect();
        let Some(feedforward) = self.method.feedforward() else { return Ok(vec![None; paths.len()]) };
        let all = crate::config::Names::List(paths.clone());
        let request = Request {
            modules: &paths,
            target_modules: Some(&all),
            feedforward_modules: Some(feedforward),
            ..Request::default()
        };
        Ok(select(&request)?.feedforward.into_iter().map(Some).collect())
    }

    /// The parameters of the base that the tensors under `path` may be for.
    fn weights(&self, path: &str) -> Vec<(String, &Entry)> {
        let home = self.homes.path(&without_base_layer(path));
        let find = |leaf: &str| {
            let name = format!("{home}.{leaf}");
            Some((name.clone(), self.base.entry(&name)?))
        };
        if let Some(weight) = find("weight").or_else(|| find("in_proj_weight")) {
            return vec![weight];
        }
        if let Some(tie) = self.tie.filter(|tie| tie.head.strip_suffix(".weight") == Some(&home)) {
            return self.base.entry(&tie.embedding).map(|entry| (tie.head.clone(), entry)).into_iter().collect();
        }
        let Some(lora) = self.method.lora() else { return Vec::new() };
        let mut leaves: Vec<&str> =
            lora.target_parameters.iter().flatten().filter_map(|target| target.rsplit('.').next()).collect();
        leaves.sort_unstable();
        leaves.dedup();
        leaves.into_iter().filter_map(find).collect()
    }
}
