//! Taking adapters out of a merged checkpoint again.
//!
//! Exactly, where the base's tensors are given or were kept beside the merged ones; else by subtraction, which leaves open
//! what the rounding of the merge took.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::files::{folder_of, weights_digest};
use super::restore::{ADDED, ORIGINALS, RESTORE};
use super::{Merge, Settings};
use crate::checkpoint::{Checkpoint, Links, MODEL_CONFIG, read_json};
use crate::error::{Error, Result, show_name, show_path};
use crate::plan::{Adapter, Change, File, Output, Plan, Source};
use crate::writer::MARKER;

impl Merge {
    /// Opens the merged checkpoint at `merged` and plans to take `adapters` out of it: by the tensors of `base`, by those
    /// that [`super::Writing::keep_restore`] kept, or by subtraction.
    pub fn unmerge(
        merged: &Path,
        adapters: &[(PathBuf, f64)],
        base: Option<&Path>,
        settings: Settings,
    ) -> Result<Self> {
        let links = settings.links;
        let folder = folder_of(merged);
        let record = read_json(&folder, MARKER, links)?;
        let opened: Vec<Adapter> =
            adapters.iter().map(|(path, weight)| Adapter::open(path, *weight, links)).collect::<Result<_>>()?;
        let (weights, others) = recorded(merged, record.as_ref(), &opened)?;
        let side = folder.join(RESTORE).join(ORIGINALS);
        let originals = match base {
            Some(_) if !others.is_empty() => {
                let others = others.join(", ");
                let hint = "hint: merge these into the base again instead";
                return Err(Error::Merge(format!("{} also holds {others}; {hint}", show_path(merged))));
            }
            Some(base) => Some(Checkpoint::open_model(base, links)?),
            None if others.is_empty() && side.is_file() && record.is_some() => Some(Checkpoint::open_file(&side)?),
            None => None,
        };
        let Some(originals) = originals else {
            let adapters: Vec<_> =
                adapters.iter().zip(weights).map(|((path, _), weight)| (path.clone(), weight)).collect();
            return Self::subtract(merged, &adapters, settings);
        };
        let from = base.map_or_else(|| folder.join(RESTORE), folder_of);
        let checkpoint = Checkpoint::open_model(merged, links)?;
        let added = match base {
            Some(base) => {
                compare(&checkpoint, &originals, record.as_ref(), base)?;
                let lacks = |name: &&str| originals.entry(name).is_none();
                checkpoint.names().filter(lacks).map(str::to_owned).collect()
            }
            None => added(&originals)?,
        };
        let config =
            config(&from, links)?.filter(|config| self::config(&folder, links).ok().flatten().as_ref() != Some(config));
        let plan = Plan {
            files: files(&checkpoint, &originals, &added, record.as_ref()),
            resharded: false,
            untie: false,
            config,
            notes: Vec::new(),
        };
        Ok(Self {
            base_path: merged.to_owned(),
            base: checkpoint,
            adapters: opened,
            originals: Some(originals),
            plan,
            links,
            allow_nonfinite: settings.options.allow_nonfinite,
            way: Way::Restored,
        })
    }

    fn subtract(merged: &Path, adapters: &[(PathBuf, f64)], settings: Settings) -> Result<Self> {
        let mut merge = Self::open(merged, adapters, settings)?;
        let adds = |output: &&Output| {
            let additive = output.updates.iter().all(|update| update.change.is_additive());
            additive && matches!(&output.source, Source::Base(name) if *name == output.name)
        };
        if let Some(output) = merge.plan.changed().find(|output| !adds(output)) {
            return Err(Error::Merge(format!(
                "{} cannot be undone by subtraction: {}; hint: give the base with --base, and merge with --keep-restore the \
                 next time",
                show_name(&output.name),
                output.what()
            )));
        }
        for update in
            merge.plan.files.iter_mut().flat_map(|file| &mut file.outputs).flat_map(|output| &mut output.updates)
        {
            if let Change::LowRank(crate::plan::LowRank { scaling, .. }) | Change::Bias { scaling, .. } =
                &mut update.change
            {
                *scaling = -*scaling;
            }
        }
        merge.adapters.iter_mut().for_each(|adapter| adapter.weight = -adapter.weight);
        merge.way = Way::Subtracted;
        Ok(merge)
    }
}

/// How the values of a checkpoint come about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Adapters are merged in.
    Merged,
    /// Adapters are taken out: the base's tensors are put back.
    Restored,
    /// Adapters are taken out: their updates are subtracted.
    Subtracted,
}

/// The weight with which each of the adapters was merged, and the names of the others that were.
fn recorded(merged: &Path, record: Option<&Value>, adapters: &[Adapter]) -> Result<(Vec<f64>, Vec<String>)> {
    let Some(rows) = record.and_then(|record| record.get("adapters")).and_then(Value::as_array) else {
        return Ok((adapters.iter().map(|adapter| adapter.weight).collect(), Vec::new()));
    };
    let mut rows: Vec<&Value> = rows.iter().collect();
    let name = |row: &Value| show_name(row.get("name").and_then(Value::as_str).unwrap_or_default());
    let names: Vec<String> = rows.iter().map(|row| name(row)).collect();
    let mut weights = Vec::new();
    for adapter in adapters {
        let digest = weights_digest(&adapter.checkpoint)?;
        let is_this = |row: &&Value| row.get("weights_sha256").and_then(Value::as_str) == Some(digest.as_str());
        let Some(at) = rows.iter().position(is_this) else {
            let (merged, adapter, names) = (show_path(merged), show_path(&adapter.path), names.join(", "));
            return Err(Error::Merge(format!(
                "{adapter} is not among what was merged into {merged}; hint: that was {names}"
            )));
        };
        let weight = rows.remove(at).get("weight").and_then(Value::as_f64).unwrap_or(1.0);
        weights.push(weight);
    }
    Ok((weights, rows.into_iter().map(name).collect()))
}

/// The tensors that the record says were changed.
fn changed(record: Option<&Value>) -> Option<HashSet<&str>> {
    let rows = record?.get("changed")?.as_array()?;
    Some(rows.iter().filter_map(|row| row.get("tensor")?.as_str()).collect())
}

/// Refuses a base of which the merged checkpoint is no merge: what no adapter changed has to be the same in both.
fn compare(merged: &Checkpoint, base: &Checkpoint, record: Option<&Value>, path: &Path) -> Result<()> {
    let Some(changed) = changed(record) else {
        let merged = show_path(merged.path());
        return Err(Error::Merge(format!(
            "{merged} was not merged by peftrs, or holds no {MARKER}; hint: leave out --base"
        )));
    };
    let same = |name: &str| -> Result<bool> {
        let (Some(a), Some(b)) = (merged.entry(name), base.entry(name)) else { return Ok(false) };
        Ok(a.dtype == b.dtype && a.shape == b.shape && merged.has_bytes_of(name, base, name)?)
    };
    for name in base.names().filter(|name| !changed.contains(name) && merged.entry(name).is_some()) {
        if !same(name)? {
            let (merged, name, base) = (show_path(merged.path()), show_name(name), show_path(path));
            return Err(Error::Merge(format!(
                "{merged} is no merge into {base}: {name} differs, which no adapter changed; hint: name the base it was made from"
            )));
        }
    }
    Ok(())
}

/// The tensors that the file of originals says the base lacks.
fn added(originals: &Checkpoint) -> Result<HashSet<String>> {
    let list = originals.metadata().get(ADDED).map_or("[]", String::as_str);
    let parsed: Result<Vec<String>, _> = serde_json::from_str(list);
    parsed.map(|names| names.into_iter().collect()).map_err(|_| Error::checkpoint(originals.path(), "was damaged"))
}

/// The merged files with the originals in their places, and without what was added.
fn files(merged: &Checkpoint, originals: &Checkpoint, added: &HashSet<String>, record: Option<&Value>) -> Vec<File> {
    // Of a whole base, the tensors that were changed; in a file of originals there are no others.
    let changed = changed(record).unwrap_or_default();
    let original =
        |name: &str| originals.entry(name).filter(|_| changed.contains(name) || merged.entry(name).is_none());
    let empty =
        |shard: &crate::checkpoint::Shard| File { name: shard.name.clone(), outputs: Vec::new(), same_header: true };
    let mut files: Vec<File> = merged.files().iter().map(empty).collect();
    for (name, entry) in merged.entries() {
        let Some(file) = files.get_mut(entry.file()) else { continue };
        if added.contains(name) {
            file.same_header = false;
        } else if let Some(original) = original(name) {
            file.same_header &= original.dtype == entry.dtype && original.shape == entry.shape;
            file.outputs.push(Output::copy(name, original, Source::Original(name.to_owned())));
        } else {
            file.outputs.push(Output::copy(name, entry, Source::Base(name.to_owned())));
        }
    }
    if let Some(last) = files.last_mut() {
        for (name, entry) in originals.entries().filter(|(name, _)| merged.entry(name).is_none()) {
            last.same_header = false;
            last.outputs.push(Output::copy(name, entry, Source::Original(name.to_owned())));
        }
    }
    files
}

fn config(folder: &Path, links: Links) -> Result<Option<Value>> {
    if folder.is_dir() { read_json(folder, MODEL_CONFIG, links) } else { Ok(None) }
}
