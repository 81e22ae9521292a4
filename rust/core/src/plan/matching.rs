//! The adapter's modules with the weights of the base that they change.

use std::collections::HashSet;

use super::changes::Drafts;
use super::experts::{Home, spellings, stacked, unstacked};
use super::planner::Planner;
use super::refusals::{BAD_SHAPE, NO_HOME, NO_PARTNER, Problems};
use super::slots::{Fit, Module, Part, Sorted, fits};
use crate::checkpoint::Entry;
use crate::error::{Result, show_name};
use crate::keys::without_base_layer;
use crate::target::{Request, select};

/// A module and the weight that it changes.
pub struct Placed<'a> {
    pub path: &'a str,
    /// The weight that changes.
    pub home: Home,
    pub module: &'a Module<'a>,
    /// Whether it acts on the layer's input; for what tells by its config alone, none if the config does not say.
    pub on_input: Option<bool>,
    pub fits: Vec<Fit>,
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
                if !module.slots.is_empty() {
                    continue;
                }
                if module.tokens.is_none() || module.lone.is_some() {
                    let lone = module.lone.or(module.bias).or(module.magnitude).unwrap_or(path);
                    problems.add(NO_PARTNER, show_name(lone));
                }
                continue;
            }
            let entries: Vec<&Entry> = module.shaping().into_iter().filter_map(|key| self.adapter.entry(key)).collect();
            let shapes: Vec<&[usize]> = entries.iter().map(|entry| entry.shape.as_slice()).collect();
            let candidates = self.weights(path, changes);
            if candidates.is_empty() {
                problems.add(NO_HOME, show_name(path));
                continue;
            }
            let told: Vec<String> =
                candidates.iter().map(|home| format!("{} {:?}", show_name(&home.name), home.shape)).collect();
            let fitting: Vec<(Home, Vec<Fit>)> = candidates
                .into_iter()
                .filter(|home| !taken.contains(&home.name))
                .map(|home| (fits(&home.shape, module, &shapes, on_input), home))
                // Pieces are put together as they are stored, outputs first.
                .map(|(fits, home)| {
                    (fits.into_iter().filter(|fit| home.pieces.is_empty() || !fit.transposed).collect(), home)
                })
                .map(|(fits, home): (Vec<Fit>, Home)| (home, fits))
                .filter(|(_, fits)| !fits.is_empty())
                .collect();
            match <[_; 1]>::try_from(fitting) {
                Ok([(home, fits)]) => {
                    taken.insert(home.name.clone());
                    found.push(Placed { path, home, module, on_input, fits });
                }
                Err(fitting) => {
                    let several = if fitting.is_empty() { "" } else { ", of which several fit" };
                    let shapes: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
                    let text = format!("{} {} for {}{several}", show_name(path), shapes.join(" and "), told.join(", "));
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

    /// The weights of the base that the tensors under `path` may be for.
    pub fn weights(&self, path: &str, changes: &Drafts) -> Vec<Home> {
        let path = self.homes.path(&without_base_layer(path));
        let plain = |name: String, entry: &Entry| {
            let shape = self.shape(changes, &name, entry).to_vec();
            Home { name, dtype: entry.dtype, shape, pieces: Vec::new() }
        };
        let mut leaves: Vec<&str> = Vec::new();
        if let Some(lora) = self.method.lora() {
            leaves.extend(lora.target_parameters.iter().flatten().filter_map(|target| target.rsplit('.').next()));
        }
        leaves.sort_unstable();
        leaves.dedup();
        for home in spellings(&path) {
            let find = |leaf: &str| {
                let name = format!("{home}.{leaf}");
                self.base.entry(&name).map(|entry| plain(name, entry))
            };
            if let Some(weight) = find("weight").or_else(|| find("in_proj_weight")) {
                return vec![weight];
            }
            let mut found: Vec<Home> = leaves.iter().copied().filter_map(find).collect();
            if found.is_empty() && self.method.lora().is_some() {
                found.extend(leaves.iter().filter_map(|leaf| stacked(self.base, &home, leaf)));
                found.extend(unstacked(self.base, &home));
            }
            if !found.is_empty() {
                return found;
            }
        }
        if let Some(tie) = self.tie.filter(|tie| tie.head.strip_suffix(".weight") == Some(&path)) {
            return self.base.entry(&tie.embedding).map(|entry| plain(tie.head.clone(), entry)).into_iter().collect();
        }
        Vec::new()
    }
}
