//! Whether a checkpoint is a base with adapters merged in, by whatever tool, and if not, what went wrong.
//!
//! The merge is planned and computed anew, a block of rows at a time, and compared with what there is.

mod config;
mod explain;
mod faults;
mod spare;
mod tally;
mod verdict;

pub use tally::Tally;
pub use verdict::Verdict;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, Links};
use crate::error::{Error, Result, show_name};
use crate::inspect::Model;
use crate::kernels::values::widen;
use crate::merge::work::{Inputs, prepare};
use crate::plan::{Adapter, Change, Homes, Options, Output, Plan, Source};
use crate::threads;
use tally::Grid;

/// What was found out about one tensor, or about one expert of a stack.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The tensor's name in the base.
    pub name: String,
    /// The number of the expert, where the tensor is a stack of them.
    pub part: Option<usize>,
    /// What should have happened to it, in a few words.
    pub change: String,
    /// Whether the adapters leave it alone.
    pub copied: bool,
    /// The sums over its elements.
    pub tally: Tally,
    /// What they say.
    pub verdict: Verdict,
}

/// What a verification found.
#[derive(Debug, Clone, PartialEq)]
pub struct Verification {
    /// A row for every tensor that should be there.
    pub rows: Vec<Row>,
    /// What is wrong, one sentence each; nothing if the checkpoint is what it should be.
    pub faults: Vec<String>,
    /// What is worth knowing although nothing is wrong with it.
    pub notes: Vec<String>,
}

/// A merge as it should be, beside the one there is.
pub(crate) struct Comparison {
    base: Model,
    adapters: Vec<Adapter>,
    merged: Model,
    plan: Plan,
    /// How names of the base are spelled in the merged checkpoint.
    homes: Homes,
}

/// The values of one block of a tensor: in the base, as they should be, and as they are.
pub(crate) struct Block {
    /// The number of its first element.
    pub start: usize,
    pub base: Vec<f64>,
    pub expected: Vec<f64>,
    pub merged: Vec<f64>,
}

/// Verifies that `merged` is `base` with `adapters`, each with what its change was multiplied by.
pub fn verify(base: &Path, adapters: &[(PathBuf, f64)], merged: &Path, links: Links) -> Result<Verification> {
    let comparison = Comparison::open(base, adapters, merged, links)?;
    let mut notes = comparison.plan.notes.clone();
    let outputs: Vec<&Output> = comparison.plan.files.iter().flat_map(|file| &file.outputs).collect();
    let rows: Vec<Vec<Row>> = threads::install(|| outputs.par_iter().map(|output| comparison.rows(output)).collect())?;
    let mut rows: Vec<Row> = rows.concat();
    explain::explain(&comparison, &outputs, &mut rows)?;
    let extra = spare::settle(&comparison, &mut rows, &mut notes)?;
    let mut faults = faults::faults(&rows, &extra);
    config::check(&comparison.base, &comparison.merged, &comparison.plan, &mut faults, &mut notes);
    comparison.base.weights.check_unchanged()?;
    comparison.merged.weights.check_unchanged()?;
    Ok(Verification { rows, faults, notes })
}

impl Comparison {
    fn open(base: &Path, adapters: &[(PathBuf, f64)], merged: &Path, links: Links) -> Result<Self> {
        let base = Model::open(base, links)?;
        let merged = Model::open(merged, links)?;
        let adapters: Vec<Adapter> =
            adapters.iter().map(|(path, weight)| Adapter::open(path, *weight, links)).collect::<Result<_>>()?;
        let options = Options { allow_nonfinite: true, ..Options::default() };
        let plan = Plan::new(&base.weights, &adapters, base.config.as_ref(), &options)?;
        // A checkpoint that another tool saved may have or lack one prefix. A head beside the rest does not tell.
        let module = |name: &'_ str| name.rsplit_once('.').map(|(module, _)| module.to_owned());
        let modules: Vec<String> = merged.weights.names().filter_map(module).collect();
        let paths: Vec<String> = base.weights.names().filter_map(module).filter(|path| path.contains('.')).collect();
        let (paths, modules): (Vec<&str>, HashSet<&str>) =
            (paths.iter().map(String::as_str).collect(), modules.iter().map(String::as_str).collect());
        let homes = Homes::find(&paths, &modules).unwrap_or_default();
        Ok(Self { base, adapters, merged, plan, homes })
    }

    fn merged_name(&self, name: &str) -> String {
        self.homes.path(name)
    }

    /// The rows of one tensor: one, or one an expert.
    fn rows(&self, output: &Output) -> Result<Vec<Row>> {
        let copied = output.is_copy();
        let row = |part, tally, verdict| Row {
            name: output.name.clone(),
            part,
            change: output.what(),
            copied,
            tally,
            verdict,
        };
        let name = self.merged_name(&output.name);
        let Some(entry) = self.merged.weights.entry(&name) else {
            return Ok(vec![row(None, Tally::default(), Verdict::Missing)]);
        };
        let grids = Grid::of(output.dtype).zip(Grid::of(entry.dtype));
        if entry.shape != output.shape || grids.is_none() && entry.dtype != output.dtype {
            let shown = [(output.dtype, &output.shape), (entry.dtype, &entry.shape)];
            let shown = shown.map(|(dtype, shape)| format!("{} {shape:?}", dtype.name()));
            return Ok(vec![row(None, Tally::default(), Verdict::Unlike(shown))]);
        }
        let Some((expected, found)) = grids else {
            let tally = self.bytes(output, &name)?;
            return Ok(vec![row(None, tally, Verdict::new(tally, true))]);
        };
        let grid = expected.min(found);
        if copied && expected == found {
            let tally = self.bytes(output, &name)?;
            if tally.equal == tally.elements {
                return Ok(vec![row(None, tally, Verdict::Right)]);
            }
        }
        let parts = parts(output);
        let size = output.shape.iter().product::<usize>() / parts.max(1);
        let tallies = self.blocks(output, &|block| {
            if expected != found {
                for values in [&mut block.expected, &mut block.merged, &mut block.base] {
                    grid.round(values);
                }
            }
            let mut tally = Tally::default();
            tally.count(&block.base, &block.expected, &block.merged, grid);
            (block.start / size.max(1), tally)
        })?;
        let mut sums = vec![Tally::default(); parts];
        for (part, tally) in tallies {
            if let Some(sum) = sums.get_mut(part) {
                *sum = sum.and(tally);
            }
        }
        let rows = sums.into_iter().enumerate();
        Ok(rows.map(|(part, tally)| row((parts > 1).then_some(part), tally, Verdict::new(tally, copied))).collect())
    }

    /// Visits the blocks of a tensor, none of which reaches from one expert into the next.
    pub fn blocks<T: Send>(&self, output: &Output, visit: &(dyn Fn(&mut Block) -> T + Sync)) -> Result<Vec<T>> {
        let inputs =
            Inputs { base: &self.base.weights, adapters: &self.adapters, originals: None, allow_nonfinite: true };
        let work = prepare(inputs, output)?;
        let name = self.merged_name(&output.name);
        let size = output.dtype.size().max(1);
        let base = match &output.source {
            Source::Base(name) => name,
            Source::Adapter(..) | Source::Original(_) => &output.name,
        };
        let base = self.base.weights.entry(base).filter(|entry| entry.shape == output.shape).map(|_| base);
        let one = |tile: &std::ops::Range<usize>| {
            let mut found = Vec::new();
            work.make(tile, &mut |bytes| {
                let mut start = tile.start / size;
                for piece in bytes.chunks(PIECE * size) {
                    let count = piece.len() / size;
                    let expected = widen(output.dtype, piece)?;
                    let before = base.map(|name| values(&self.base.weights, name, start, count)).transpose()?;
                    let merged = values(&self.merged.weights, &name, start, count)?;
                    let base = before.unwrap_or_else(|| vec![0.0; count]);
                    found.push(visit(&mut Block { start, base, expected, merged }));
                    start += count;
                }
                Ok(())
            })?;
            Ok(found)
        };
        let found: Vec<Vec<T>> = threads::install(|| work.tiles().par_iter().map(one).collect())?;
        Ok(found.into_iter().flatten().collect())
    }

    /// The same for types without values: whether the bytes are equal.
    fn bytes(&self, output: &Output, name: &str) -> Result<Tally> {
        let inputs =
            Inputs { base: &self.base.weights, adapters: &self.adapters, originals: None, allow_nonfinite: true };
        let work = prepare(inputs, output)?;
        let mut tally = Tally::default();
        for tile in work.tiles() {
            work.make(&tile, &mut |bytes| {
                let mut found = vec![0; bytes.len()];
                self.merged.weights.read_range(name, tile.start as u64, &mut found)?;
                let elements = || bytes.chunks(output.dtype.size().max(1));
                let others = found.chunks(output.dtype.size().max(1));
                let equal = if bytes == found {
                    elements().count()
                } else {
                    elements().zip(others).filter(|(one, other)| one == other).count()
                };
                let (equal, elements) = (equal as u64, elements().count() as u64);
                let counted = Tally { elements, equal, near: equal, ..Tally::default() };
                tally = tally.and(counted);
                Ok(())
            })?;
        }
        Ok(tally)
    }
}

/// Elements compared at once, so few that their values as float64 stay in a core's cache.
const PIECE: usize = 1 << 13;

/// How many matrices of its own an output's update has.
fn parts(output: &Output) -> usize {
    let count = |update: &crate::plan::Update| match &update.change {
        Change::LowRank(update) => Some(update.count),
        _ => None,
    };
    output.updates.iter().find_map(count).unwrap_or(1)
}

/// Some values of a float tensor.
fn values(checkpoint: &Checkpoint, name: &str, start: usize, count: usize) -> Result<Vec<f64>> {
    let missing = || Error::checkpoint(checkpoint.path(), format!("has no tensor `{}`", show_name(name)));
    let dtype = checkpoint.entry(name).ok_or_else(missing)?.dtype;
    let mut bytes = vec![0; count * dtype.size()];
    checkpoint.read_range(name, (start * dtype.size()) as u64, &mut bytes)?;
    widen(dtype, &bytes)
}
