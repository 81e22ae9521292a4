//! What an adapter holds, for people and for programs.

use std::collections::BTreeMap;

use peftrs_core::checkpoint::Shard;
use peftrs_core::config::Names;
use peftrs_core::error::{Result, show_name, show_path};
use peftrs_core::inspect::{Adapter, LowRank, Module, Norms, Statistics, scan};
use peftrs_core::keys::without_base_layer;
use peftrs_core::threads;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::super::table::{count, maybe, number, table, warnings};
use super::{below, scan_json, scan_table, scan_warnings};
use crate::printer::size;

/// The modules of an adapter that have one last name and are alike.
struct Leaf {
    name: String,
    modules: usize,
    low_rank: Option<LowRank>,
    outputs: Option<usize>,
    whole: bool,
    parameters: u64,
}

fn leaves(adapter: &Adapter) -> Vec<Leaf> {
    let mut found: BTreeMap<_, Leaf> = BTreeMap::new();
    for (path, module) in &adapter.modules {
        let plain = without_base_layer(path);
        let name = plain.rsplit('.').find(|part| part.parse::<usize>().is_err()).unwrap_or(&plain).to_owned();
        let entries = || module.tensors.iter().filter_map(|(_, key)| adapter.weights.entry(key));
        let shapes: Vec<&[usize]> = entries().map(|entry| entry.shape.as_slice()).collect();
        let scaling = module.low_rank.as_ref().map(|update| update.scaling.to_bits());
        let outputs =
            module.low_rank.as_ref().and_then(|update| adapter.weights.entry(&update.up)?.shape.first().copied());
        let leaf = found.entry((name.clone(), shapes, scaling)).or_insert_with(|| Leaf {
            name,
            modules: 0,
            low_rank: module.low_rank.clone(),
            outputs,
            whole: module.whole,
            parameters: 0,
        });
        leaf.modules += 1;
        leaf.parameters += entries().map(|entry| entry.elements() as u64).sum::<u64>();
    }
    found.into_values().collect()
}

/// What `--norms` reads of an adapter.
pub struct Values {
    updates: Vec<(String, Norms)>,
    tensors: Vec<(String, Statistics)>,
    warnings: Vec<String>,
}

impl Values {
    pub fn read(adapter: &Adapter) -> Result<Self> {
        let updates: Vec<(&str, &LowRank)> = adapter.updates().collect();
        let one = |(path, update): &(&str, &LowRank)| Ok(((*path).to_owned(), adapter.norms(update)?));
        let updates: Vec<(String, Norms)> = threads::install(|| updates.par_iter().map(one).collect())?;
        let tensors = scan(&adapter.weights)?;
        let mut warnings = scan_warnings(Some(&tensors));
        let untrained = updates.iter().filter(|(_, norms)| norms.up == 0.0 || norms.down == 0.0).count();
        if untrained > 0 {
            warnings.push(format!("{untrained} of {} updates are zero: never trained", updates.len()));
        }
        Ok(Self { updates, tensors, warnings })
    }

    fn json(&self) -> Value {
        let updates = self.updates.iter().map(|(path, norms)| {
            json!({
                "module": path,
                "down": norms.down,
                "up": norms.up,
                "update": norms.update,
                "largest_singular_value": norms.largest,
                "effective_rank": norms.effective_rank,
            })
        });
        json!({ "updates": updates.collect::<Vec<_>>(), "tensors": scan_json(&self.tensors) })
    }
}

/// The default scaling of a LoRA, before any pattern.
fn scaling(adapter: &Adapter) -> Option<f64> {
    adapter.config.lora().map(|lora| lora.scaling(lora.r, lora.lora_alpha))
}

pub fn json(adapter: &Adapter, values: Option<&Values>) -> Value {
    let lora = adapter.config.lora();
    let leaves = leaves(adapter).into_iter().map(|leaf| {
        let update = leaf.low_rank.as_ref();
        json!({
            "name": leaf.name,
            "modules": leaf.modules,
            "rank": update.map(|update| update.rank),
            "scaling": update.map(|update| update.scaling),
            "in": update.and_then(|update| update.sizes.first().copied()),
            "out": leaf.outputs,
            "experts": update.map(|update| update.count).filter(|count| *count > 1),
            "whole": leaf.whole,
            "parameters": leaf.parameters,
        })
    });
    let mut all = adapter.warnings();
    all.extend(values.iter().flat_map(|values| values.warnings.clone()));
    json!({
        "kind": "adapter",
        "path": adapter.path.to_string_lossy(),
        "method": adapter.config.peft_type,
        "base_model": adapter.config.base_model,
        "revision": adapter.fields.get("revision"),
        "task_type": adapter.fields.get("task_type"),
        "peft_version": adapter.fields.get("peft_version"),
        "rank": lora.map(|lora| lora.r),
        "alpha": lora.map(|lora| lora.lora_alpha),
        "scaling": scaling(adapter),
        "targets": adapter.fields.get("target_modules"),
        "features": adapter.features(),
        "modules": adapter.modules.len(),
        "tensors": adapter.weights.names().count(),
        "parameters": adapter.parameters(),
        "bytes": adapter.weights.files().iter().map(Shard::length).sum::<u64>(),
        "dtypes": dtypes(adapter),
        "leaves": leaves.collect::<Vec<_>>(),
        "metadata": adapter.weights.metadata(),
        "warnings": all,
        "norms": values.map(Values::json),
    })
}

/// How many tensors there are of each type.
fn dtypes(adapter: &Adapter) -> BTreeMap<&'static str, usize> {
    let mut found = BTreeMap::new();
    adapter.weights.entries().for_each(|(_, entry)| *found.entry(entry.dtype.name()).or_default() += 1);
    found
}

pub fn text(adapter: &Adapter, values: Option<&Values>) -> String {
    let mut lines = vec![format!("{}: adapter, {}", show_path(&adapter.path), show_name(&adapter.config.peft_type))];
    lines.extend(adapter.config.base_model.iter().map(|name| format!("base model: {}", show_name(name))));
    if let (Some(lora), Some(scaling)) = (adapter.config.lora(), scaling(adapter)) {
        lines.push(format!("rank {}, alpha {}, scaling {}", lora.r, lora.lora_alpha, number(scaling)));
    }
    match &adapter.config.targeting.target_modules {
        Some(Names::Pattern(pattern)) => lines.push(format!("targets: the pattern {}", show_name(pattern))),
        Some(Names::List(names)) => {
            lines.push(format!("targets: {}", show_name(&names.join(", "))));
        }
        None => {}
    }
    let features = adapter.features();
    if !features.is_empty() {
        lines.push(format!("with {}", features.join(", ")));
    }
    lines.push(format!(
        "{} tensors in {} modules, {} parameters, {}, {}",
        count(adapter.weights.names().count() as u64),
        count(adapter.modules.len() as u64),
        count(adapter.parameters()),
        size(adapter.weights.files().iter().map(Shard::length).sum()),
        dtypes(adapter).into_keys().collect::<Vec<_>>().join(", ")
    ));
    let rows: Vec<Vec<String>> = leaves(adapter).iter().map(leaf_row).collect();
    let mut text = lines.join("\n") + "\n\n" + &table(&LEAF_HEAD, &rows);
    let mut all = adapter.warnings();
    if let Some(values) = values {
        let row = |(path, norms): &(String, Norms)| {
            let numbers = [norms.down, norms.up, norms.update].map(number);
            let mut row = vec![show_name(path)];
            row.extend(numbers);
            row.extend([maybe(norms.largest), maybe(norms.effective_rank)]);
            row
        };
        let rows: Vec<Vec<String>> = values.updates.iter().map(row).collect();
        text += &below(&table(&["module", "|A|", "|B|", "|update|", "largest", "effective rank"], &rows));
        let in_update = |key: &str| {
            let factors =
                |module: &Module| module.low_rank.as_ref().is_some_and(|update| update.up == key || update.down == key);
            adapter.modules.values().any(factors)
        };
        let rest: Vec<(String, Statistics)> =
            values.tensors.iter().filter(|(key, _)| !in_update(key)).cloned().collect();
        text += &below(&scan_table(&rest));
        all.extend(values.warnings.clone());
    }
    text + &below(&warnings(&all))
}

const LEAF_HEAD: [&str; 6] = ["leaf", "modules", "rank", "scaling", "in -> out", "parameters"];

fn leaf_row(leaf: &Leaf) -> Vec<String> {
    let update = leaf.low_rank.as_ref();
    let ends = update.zip(leaf.outputs).map(|(update, outputs)| {
        let experts = if update.count > 1 { format!("{} x ", update.count) } else { String::new() };
        let inputs = update.sizes.first().copied().unwrap_or(0);
        format!("{experts}{inputs} -> {outputs}")
    });
    let what = if leaf.whole { "trained whole" } else { "-" };
    vec![
        show_name(&leaf.name),
        leaf.modules.to_string(),
        update.map_or_else(|| "-".to_owned(), |update| update.rank.to_string()),
        update.map_or_else(|| "-".to_owned(), |update| number(update.scaling)),
        ends.unwrap_or_else(|| what.to_owned()),
        count(leaf.parameters),
    ]
}
