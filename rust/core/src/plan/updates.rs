//! From the tensors of an adapter to changes of the base's, each shape checked against the other two.

use std::collections::HashSet;

use rayon::prelude::*;

use super::draft::Drafts;
use super::homes::{Ambiguous, Homes};
use super::problems::Problems;
use super::sort::{Module, Sorted};
use super::tie::{Tie, is_embedding};
use super::update::{Change, LowRank, Update};
use crate::checkpoint::{Checkpoint, Entry};
use crate::config::{LoraFields, Targeting};
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
use crate::kernels::values::all_finite;
use crate::keys::without_base_layer;

const NO_HOME: &str = "adapter modules have no home in the base";
const NO_PARTNER: &str = "adapter tensors lack their partner";
const BAD_SHAPE: &str = "adapter tensors have shapes that do not fit";
const UNKNOWN: &str = "adapter tensors have a name that LoRA does not use";
const UNDECLARED: &str = "adapter tensors name a weight of the base that the config does not declare";
const UNUSABLE: &str = "tensors have a type that cannot be merged (a quantized base?)";
const NONFINITE: &str = "adapter tensors are not finite (--allow-nonfinite merges them all the same)";

/// The one way of reading the adapter's module paths.
pub fn homes(base: &Checkpoint, sorted: &Sorted) -> Result<Homes> {
    let modules: HashSet<&str> = base.names().filter_map(|name| Some(name.rsplit_once('.')?.0)).collect();
    let paths: Vec<String> = sorted.modules.keys().map(|path| without_base_layer(path)).collect();
    // A head may be tied or new: it does not tell where the rest lives.
    let paths: Vec<&str> = paths.iter().map(String::as_str).filter(|path| path.contains('.')).collect();
    Homes::find(&paths, &modules).map_err(|Ambiguous(one, other)| {
        Error::Merge(format!(
            "the adapter's modules are found twice in the base, under {} and {}; hint: give the part of the base that the adapter was trained on",
            show_name(&one.add),
            show_name(&other.add)
        ))
    })
}

/// What decides about the changes.
pub struct Planner<'a> {
    pub base: &'a Checkpoint,
    pub adapter: &'a Checkpoint,
    /// Which adapter of the merge it is.
    pub index: usize,
    /// What its change is multiplied by.
    pub weight: f64,
    pub lora: &'a LoraFields,
    pub targeting: &'a Targeting,
    /// Whether square weights are stored as (in, out), as far as the two configs know.
    pub stored_transposed: bool,
    pub homes: &'a Homes,
    pub tie: Option<&'a Tie>,
}

/// One way in which two factors fit a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fit {
    count: usize,
    rank: usize,
    rows: usize,
    columns: usize,
    transposed: bool,
}

/// A pair of factors and the weight they are for.
struct Pair<'a> {
    path: &'a str,
    name: String,
    up: &'a str,
    down: &'a str,
    module: &'a Module<'a>,
    fits: Vec<Fit>,
    dimensions: usize,
}

impl Planner<'_> {
    /// The changes to the base by parameter name; what is wrong goes to `problems`.
    pub fn changes(&self, sorted: &Sorted, problems: &mut Problems) -> Result<Drafts> {
        let mut changes = Drafts::new();
        sorted.unknown.iter().for_each(|key| problems.add(UNKNOWN, show_name(key)));
        for (key, name) in &sorted.whole {
            self.whole(key, name, sorted, &mut changes, problems);
        }
        let pairs = self.pairs(sorted, problems);
        let votes = Votes::count(&pairs);
        for pair in &pairs {
            self.pair(pair, &votes, &mut changes, problems)?;
        }
        for (path, module) in &sorted.modules {
            self.bias(path, module, &mut changes, problems)?;
            self.tokens(path, module, &mut changes, problems);
        }
        Ok(changes)
    }

    /// A parameter that the adapter holds in full.
    fn whole(&self, key: &str, name: &str, sorted: &Sorted, changes: &mut Drafts, problems: &mut Problems) {
        let Some(entry) = self.adapter.entry(key) else { return };
        let (path, leaf) = name.rsplit_once('.').unwrap_or(("", name));
        let adapted = sorted.modules.keys().any(|module| without_base_layer(module) == path);
        let bias = leaf == "bias" && (self.lora.bias == "all" || self.lora.bias == "lora_only" && adapted);
        if !bias && !adapted && !is_embedding(name) && !name.ends_with("lm_head.weight") && !self.targeting.saves(path)
        {
            problems.add(UNDECLARED, show_name(key));
            return;
        }
        let home = format!("{}.{leaf}", self.homes.path(path));
        if let Some(found) = self.base.entry(&home) {
            if found.shape != entry.shape {
                let text = format!("{} {:?}, in the base {:?}", show_name(key), entry.shape, found.shape);
                problems.add(BAD_SHAPE, text);
            }
            let floats = usable(found) && entry.dtype.is_adapter_float();
            if found.dtype != entry.dtype && !floats {
                let text = format!("{} {}, in the base {}", show_name(key), entry.dtype.name(), found.dtype.name());
                problems.add(UNUSABLE, text);
            }
        }
        changes.entry(home).or_default().whole = Some((self.index, key.to_owned()));
    }

    /// The pairs of factors with the weights that they are for.
    fn pairs<'a>(&self, sorted: &'a Sorted<'a>, problems: &mut Problems) -> Vec<Pair<'a>> {
        let mut pairs = Vec::new();
        let mut taken: HashSet<String> = HashSet::new();
        for (path, module) in &sorted.modules {
            let (up, down) = match (module.up, module.down) {
                (Some(up), Some(down)) => (up, down),
                (None, None) if module.tokens.is_some() => continue,
                (up, down) => {
                    let lone = up.or(down).or(module.bias).or(module.magnitude).unwrap_or(path);
                    problems.add(NO_PARTNER, show_name(lone));
                    continue;
                }
            };
            let (Some(a), Some(b)) = (self.adapter.entry(down), self.adapter.entry(up)) else { continue };
            let candidates = self.weights(path);
            if candidates.is_empty() {
                problems.add(NO_HOME, show_name(path));
                continue;
            }
            let fitting: Vec<(String, Vec<Fit>, usize)> = candidates
                .iter()
                .filter(|(name, _)| !taken.contains(name))
                .map(|(name, entry)| {
                    (name.clone(), fits(&entry.shape, &a.shape, &b.shape, module.embedding), entry.shape.len())
                })
                .filter(|(_, fits, _)| !fits.is_empty())
                .collect();
            match <[_; 1]>::try_from(fitting) {
                Ok([(name, fits, dimensions)]) => {
                    taken.insert(name.clone());
                    pairs.push(Pair { path, name, up, down, module, fits, dimensions });
                }
                Err(fitting) => {
                    let weights: Vec<String> = candidates
                        .iter()
                        .map(|(name, entry)| format!("{} {:?}", show_name(name), entry.shape))
                        .collect();
                    let several = if fitting.is_empty() { "" } else { ", of which several fit" };
                    let text = format!(
                        "{} {:?} and {:?} for {}{several}",
                        show_name(path),
                        a.shape,
                        b.shape,
                        weights.join(", ")
                    );
                    problems.add(BAD_SHAPE, text);
                }
            }
        }
        pairs
    }

    /// The parameters of the base that the factors under `path` may be for.
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
        let mut leaves: Vec<&str> =
            self.lora.target_parameters.iter().flatten().filter_map(|target| target.rsplit('.').next()).collect();
        leaves.sort_unstable();
        leaves.dedup();
        leaves.into_iter().filter_map(find).collect()
    }

    /// The change that a pair of factors makes.
    fn pair(&self, pair: &Pair, votes: &Votes, changes: &mut Drafts, problems: &mut Problems) -> Result<()> {
        let weight = self.base.entry(&pair.name).or_else(|| self.base.entry(&self.tie?.embedding));
        if let Some(weight) = weight.filter(|weight| !usable(weight)) {
            problems.add(UNUSABLE, format!("{} {}", show_name(&pair.name), weight.dtype.name()));
        }
        let transposed = votes.transposed(pair, self.stored_transposed);
        let Some(fit) = pair.fits.iter().find(|fit| pair.fits.len() == 1 || fit.transposed == transposed) else {
            return Ok(());
        };
        // PEFT matches its patterns against the parameter's own name where the target is a bare parameter.
        let plain = without_base_layer(pair.path);
        let leaf = pair.name.rsplit('.').next().unwrap_or_default();
        let target = if ["weight", "in_proj_weight"].contains(&leaf) { plain } else { format!("{plain}.{leaf}") };
        let (rank, scaling) = self.lora.rank_and_scaling(&target)?;
        if rank != fit.rank {
            problems.add(BAD_SHAPE, format!("{} of rank {}, {rank} by the config", show_name(pair.path), fit.rank));
        }
        if let Some(key) = pair.module.magnitude {
            let outputs = if fit.transposed { fit.columns } else { fit.rows };
            let found = self.adapter.entry(key).map(|entry| entry.shape.iter().product::<usize>());
            if found != Some(outputs) || fit.count > 1 {
                problems.add(BAD_SHAPE, format!("{} for {outputs} outputs", show_name(key)));
            }
        } else if self.lora.use_dora {
            problems.add(NO_PARTNER, format!("{} (no DoRA magnitudes)", show_name(pair.path)));
        }
        let change = Change::LowRank(LowRank {
            up: pair.up.to_owned(),
            down: pair.down.to_owned(),
            rank: fit.rank,
            scaling: scaling * self.weight,
            count: fit.count,
            rows: fit.rows,
            columns: fit.columns,
            transposed: fit.transposed,
            magnitude: pair.module.magnitude.map(str::to_owned),
        });
        self.push(changes, pair.name.clone(), change);
        Ok(())
    }

    /// The change that the bias of `up` makes to the layer's own.
    fn bias(&self, path: &str, module: &Module, changes: &mut Drafts, problems: &mut Problems) -> Result<()> {
        let Some((key, entry)) = module.bias.and_then(|key| Some((key, self.adapter.entry(key)?))) else {
            return Ok(());
        };
        let plain = without_base_layer(path);
        let name = format!("{}.bias", self.homes.path(&plain));
        let Some(found) = self.base.entry(&name) else {
            problems.add(NO_HOME, format!("{} (the layer has no bias)", show_name(key)));
            return Ok(());
        };
        if found.shape != entry.shape {
            problems.add(BAD_SHAPE, format!("{} {:?}, in the base {:?}", show_name(key), entry.shape, found.shape));
        }
        let (_, scaling) = self.lora.rank_and_scaling(&plain)?;
        self.push(changes, name, Change::Bias { key: key.to_owned(), scaling: scaling * self.weight });
        Ok(())
    }

    /// The change that trained rows make to an embedding.
    fn tokens(&self, path: &str, module: &Module, changes: &mut Drafts, problems: &mut Problems) {
        let Some((key, entry)) = module.tokens.and_then(|key| Some((key, self.adapter.entry(key)?))) else { return };
        let name = format!("{}.weight", self.homes.path(&without_base_layer(path)));
        let embedding = self.tie.filter(|tie| tie.head == name).map_or(&name, |tie| &tie.embedding);
        let Some(found) = self.base.entry(embedding) else {
            problems.add(NO_HOME, show_name(key));
            return;
        };
        let indices = self.lora.token_indices(path);
        let [rows, columns] = *found.shape.as_slice() else {
            problems.add(BAD_SHAPE, format!("{} for {:?}", show_name(key), found.shape));
            return;
        };
        if entry.shape != [indices.len(), columns] || indices.iter().any(|index| *index >= rows) {
            let text = format!(
                "{} {:?} for {} token indices in {:?}",
                show_name(key),
                entry.shape,
                indices.len(),
                found.shape
            );
            problems.add(BAD_SHAPE, text);
            return;
        }
        if changes.get(&name).is_some_and(|draft| !draft.updates.is_empty()) {
            problems.add(UNKNOWN, format!("{} (both rows and factors for one embedding)", show_name(key)));
        }
        self.push(changes, name, Change::Tokens { key: key.to_owned(), indices });
    }

    fn push(&self, changes: &mut Drafts, name: String, change: Change) {
        changes.entry(name).or_default().updates.push(Update { adapter: self.index, change });
    }
}

/// Whether values of the entry's type can be computed.
fn usable(entry: &Entry) -> bool {
    matches!(entry.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32)
}

/// Which way round weights are stored that tell by their shape: for matrices and for stacks of matrices.
struct Votes([(usize, usize); 2]);

impl Votes {
    fn count(pairs: &[Pair]) -> Self {
        let mut votes = [(0, 0); 2];
        for pair in pairs.iter().filter(|pair| !pair.module.embedding) {
            let [fit] = pair.fits.as_slice() else { continue };
            let Some((straight, transposed)) = votes.get_mut(usize::from(pair.dimensions == 3)) else { continue };
            *if fit.transposed { transposed } else { straight } += 1;
        }
        Self(votes)
    }

    /// Whether the square weight of `pair` is stored as (in, out): as its like are, or else as the config says.
    fn transposed(&self, pair: &Pair, stated: bool) -> bool {
        match self.0.get(usize::from(pair.dimensions == 3)) {
            Some((0, 1..)) => true,
            Some((1.., 0)) => false,
            _ => stated && pair.dimensions == 2,
        }
    }
}

/// The ways in which `down` and `up` make an update of `weight`.
fn fits(weight: &[usize], down: &[usize], up: &[usize], embedding: bool) -> Vec<Fit> {
    let (Some(first), Some(out)) = (down.first(), up.first()) else { return Vec::new() };
    let one = |rank: usize, rows, columns, transposed| Fit { count: 1, rank, rows, columns, transposed };
    match (weight, down, up) {
        (&[rows, columns], &[rank, inner], &[outer, other]) if rank == other => {
            [(outer, inner, false), (inner, outer, true)]
                .into_iter()
                .filter(|(a, b, transposed)| (rows, columns) == (*a, *b) && (*transposed || !embedding))
                .map(|(_, _, transposed)| one(rank, rows, columns, transposed))
                .collect()
        }
        (&[count, rows, columns], &[stacked, inner], &[outer, other])
            if stacked == other && count > 0 && stacked % count == 0 =>
        {
            [(outer, inner, false), (inner, outer, true)]
                .into_iter()
                .filter(|(a, b, _)| (rows, columns) == (*a, *b))
                .map(|(_, _, transposed)| Fit { count, rank: stacked / count, rows, columns, transposed })
                .collect()
        }
        ([rows, kernel @ ..], [rank, inner @ ..], [_, rest @ ..]) if kernel.len() >= 2 => {
            let pointwise = rest.first() == Some(rank) && rest.iter().skip(1).all(|size| *size == 1);
            let fits = rows == out && kernel == inner && pointwise && rest.len() == kernel.len();
            fits.then(|| one(*first, *rows, kernel.iter().product(), false)).into_iter().collect()
        }
        _ => Vec::new(),
    }
}

/// Values read at once when the adapter is searched for infinities and NaN.
const SCAN_BYTES: usize = 1 << 20;

/// Reports the tensors of the adapter that hold an infinity or NaN.
pub fn find_nonfinite(adapter: &Checkpoint, problems: &mut Problems) -> Result<()> {
    let names: Vec<&str> = adapter.names().collect();
    let scan = |name: &&str| -> Result<bool> {
        let Some(entry) = adapter.entry(name).filter(|entry| entry.dtype.is_adapter_float()) else { return Ok(true) };
        let mut buffer = vec![0; SCAN_BYTES.min(entry.bytes())];
        let mut offset = 0;
        while offset < entry.bytes() {
            let length = SCAN_BYTES.min(entry.bytes() - offset);
            let Some(part) = buffer.get_mut(..length) else { break };
            adapter.read_range(name, offset as u64, part)?;
            if !all_finite(entry.dtype, part) {
                return Ok(false);
            }
            offset += length;
        }
        Ok(true)
    };
    let finite: Vec<bool> = names.par_iter().map(scan).collect::<Result<_>>()?;
    names
        .iter()
        .zip(finite)
        .filter(|(_, finite)| !finite)
        .for_each(|(name, _)| problems.add(NONFINITE, show_name(name)));
    Ok(())
}
