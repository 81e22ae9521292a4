//! The drafts of all adapters of a merge.

use std::sync::Arc;

use serde_json::Value;

use super::adapter::Adapter;
use super::base::Base;
use super::draft::{Drafts, combine};
use super::problems::Problems;
use super::sort::Sorted;
use super::tie::Tie;
use super::updates::{Planner, homes};
use super::{Options, finite, support};
use crate::error::{Result, show_name};

/// What the adapters do to the base, and whether modules have a prefix there that an adapter lacks.
pub fn gather(
    base: &Base,
    adapters: &[Adapter],
    model: Option<&Value>,
    options: &Options,
    notes: &mut Vec<String>,
) -> Result<(Drafts, bool)> {
    let mut all = Vec::new();
    let mut problems = Problems::default();
    let mut prefixed = false;
    for (index, adapter) in adapters.iter().enumerate() {
        let method = &adapter.config.method;
        let apply = adapter.apply.as_deref().filter(|_| support::elsewhere(&adapter.config).is_some());
        let prefix = apply.map(|apply| apply.prefix(&adapter.config_text)).transpose()?;
        let sorted = Sorted::new(&adapter.checkpoint, method, prefix.as_deref());
        let config: Arc<str> = adapter.config_text.as_str().into();
        let homes = homes(base, &sorted)?;
        notes.extend(adapter.config.warnings.iter().cloned());
        if !homes.strip.is_empty() {
            notes.push(format!("the base lacks the adapter's prefix {}", show_name(&homes.strip)));
        }
        if !homes.add.is_empty() {
            notes.push(format!("the adapter lacks the base's prefix {}", show_name(&homes.add)));
            prefixed = true;
        }
        notes.extend(sorted.untrained.iter().map(|key| {
            format!("{} is left out: the adapter holds the module as it was trained as well", show_name(key))
        }));
        let tie = Tie::find(base, model, prefixed);
        let planner = Planner {
            base,
            adapter: &adapter.checkpoint,
            index,
            weight: adapter.weight,
            config: &config,
            apply,
            method,
            targeting: &adapter.config.targeting,
            stored_transposed: method.fan_in_fan_out() || support::stores_transposed(model),
            homes: &homes,
            tie: tie.as_ref(),
        };
        let drafts = planner.changes(&sorted, &mut problems)?;
        support::check_weight(adapter, &drafts)?;
        if !options.allow_nonfinite {
            finite::find_nonfinite(&adapter.checkpoint, &mut problems)?;
        }
        problems.end_of(&adapter.checkpoint, base.checkpoint);
        all.push(drafts);
    }
    problems.refuse()?;
    Ok((combine(all, adapters)?, prefixed))
}
