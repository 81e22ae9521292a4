//! What a merge will do, decided and checked in full before the first byte is written.
//!
//! Every tensor of the adapter is accounted for: it changes a tensor of the base, replaces one, or becomes a new one.
//! What has no home, the wrong shape or values that are not finite is reported together, and refused.

mod homes;
mod sort;
mod support;
mod tie;
mod updates;

use std::collections::{BTreeMap, HashMap};

use crate::checkpoint::{Checkpoint, Entry};
use crate::config::AdapterConfig;
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};

/// A change to the values of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// `weight += scaling * up @ down`, and DoRA's magnitudes where there are any.
    LowRank(LowRank),
    /// `bias += scaling * value`.
    Bias {
        /// The value's key in the adapter.
        key: String,
        /// The factor of the module's update.
        scaling: f64,
    },
    /// Some rows of an embedding are replaced.
    Tokens {
        /// The key of the rows in the adapter.
        key: String,
        /// Which row of the embedding each of them is.
        indices: Vec<usize>,
    },
}

/// An update of low rank to a weight seen as `count` matrices of shape (rows, columns).
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// The key of the factor of shape (out, rank).
    pub up: String,
    /// The key of the factor of shape (rank, in).
    pub down: String,
    /// The rank of each matrix.
    pub rank: usize,
    /// alpha / rank or alpha / sqrt(rank).
    pub scaling: f64,
    /// How many matrices the weight holds: one, or one an expert.
    pub count: usize,
    /// Rows of each matrix as stored.
    pub rows: usize,
    /// Columns of each matrix as stored.
    pub columns: usize,
    /// Whether the matrices are stored as (in, out), as embeddings and the `Conv1D` of transformers are.
    pub transposed: bool,
    /// The key of DoRA's magnitudes, one for each output.
    pub magnitude: Option<String>,
}

/// Where the values of an output tensor come from, before its update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The tensor of that name in the base.
    Base(String),
    /// The tensor of that key in the adapter, converted to the output's type.
    Adapter(String),
}

/// One tensor of the merged checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Its name.
    pub name: String,
    /// Its type, that of the base's tensor.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its values come from.
    pub source: Source,
    /// What changes them.
    pub update: Option<Update>,
}

impl Output {
    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }

    /// Whether it is the base's tensor, byte for byte.
    #[must_use]
    pub fn is_copy(&self) -> bool {
        self.update.is_none() && matches!(&self.source, Source::Base(name) if *name == self.name)
    }

    /// What happens to it, in a few words.
    #[must_use]
    pub fn what(&self) -> String {
        let update = match &self.update {
            None => String::new(),
            Some(Update::LowRank(update)) => {
                let kind = if update.magnitude.is_some() { "DoRA" } else { "LoRA" };
                let layout = if update.transposed { ", stored (in, out)" } else { "" };
                let experts = if update.count > 1 { format!(", {} experts", update.count) } else { String::new() };
                format!("{kind} rank {}, scaling {}{layout}{experts}", update.rank, update.scaling)
            }
            Some(Update::Bias { scaling, .. }) => format!("bias, scaling {scaling}"),
            Some(Update::Tokens { indices, .. }) => format!("{} rows replaced", indices.len()),
        };
        let source = match &self.source {
            Source::Adapter(_) => "taken from the adapter".to_owned(),
            Source::Base(name) if *name != self.name => format!("copy of {}", show_name(name)),
            Source::Base(_) if update.is_empty() => "unchanged".to_owned(),
            Source::Base(_) => String::new(),
        };
        if source.is_empty() || update.is_empty() { source + &update } else { format!("{source}, then {update}") }
    }
}

/// One file of the merged checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct File {
    /// Its name, that of the base's file.
    pub name: String,
    /// Its tensors, in the order of their bytes.
    pub outputs: Vec<Output>,
    /// Whether names, types and shapes are the base's, so that its header is too.
    pub same_header: bool,
}

/// What a merge will do.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The files of the merged checkpoint that hold tensors.
    pub files: Vec<File>,
    /// Whether `config.json` must say that the output head is no longer tied to the embedding.
    pub untie: bool,
    /// What the user should know of: warnings and decisions.
    pub notes: Vec<String>,
}

/// What the planner is told beside the adapter's config.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// The base's `config.json`, if it has one.
    pub model: Option<&'a serde_json::Value>,
    /// Accept weights that are infinite or NaN.
    pub allow_nonfinite: bool,
}

/// A change to one parameter of the base, by the parameter's name there.
#[derive(Debug, Default)]
struct Change {
    whole: Option<String>,
    update: Option<Update>,
}

impl Plan {
    /// Plans the merge of `adapter` into `base`, or says everything that stands against it.
    pub fn new(base: &Checkpoint, adapter: &Checkpoint, config: &AdapterConfig, options: Options) -> Result<Self> {
        let lora = support::check(config, options.model)?;
        let sorted = sort::Sorted::new(adapter);
        let mut problems = Problems::default();
        let homes = updates::homes(base, &sorted)?;
        let mut notes = config.warnings.clone();
        if !homes.strip.is_empty() {
            notes.push(format!("the base lacks the adapter's prefix {}", show_name(&homes.strip)));
        }
        if !homes.add.is_empty() {
            notes.push(format!("the adapter lacks the base's prefix {}", show_name(&homes.add)));
        }
        let tie = tie::Tie::find(base, options.model, &homes);
        let planner = updates::Planner {
            base,
            adapter,
            lora,
            targeting: &config.targeting,
            stored_transposed: lora.fan_in_fan_out || support::stores_transposed(options.model),
            homes: &homes,
            tie: tie.as_ref(),
        };
        let mut changes = planner.changes(&sorted, &mut problems)?;
        if let Some(tie) = tie.as_ref().filter(|tie| !tie.known && tie.is_cut(&changes)) {
            return Err(tie.refused());
        }
        if !options.allow_nonfinite {
            updates::find_nonfinite(adapter, &mut problems)?;
        }
        problems.refuse(adapter, base)?;
        let untie = tie.as_ref().is_some_and(|tie| tie.cut(&mut changes, &mut notes));
        let head = tie.filter(|_| untie).map(|tie| (tie.head, tie.embedding));
        let files = files(base, adapter, changes, head);
        let plan = Self { files, untie, notes };
        if plan.changed().next().is_none() {
            let reason = "the adapter changes no tensor of the base; hint: it holds no weights, train or save it again";
            return Err(Error::Merge(reason.to_owned()));
        }
        Ok(plan)
    }

    /// The tensors that are not the base's, byte for byte.
    pub fn changed(&self) -> impl Iterator<Item = &Output> {
        self.files.iter().flat_map(|file| &file.outputs).filter(|output| !output.is_copy())
    }

    /// Bytes of tensors in the output.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().flat_map(|file| &file.outputs).map(|output| output.bytes() as u64).sum()
    }
}

/// The base's files with `changes` in their places; what the base lacks goes at the end of the last one.
fn files(
    base: &Checkpoint,
    adapter: &Checkpoint,
    mut changes: BTreeMap<String, Change>,
    head: Option<(String, String)>,
) -> Vec<File> {
    let mut files: Vec<File> = base
        .files()
        .iter()
        .map(|shard| File { name: shard.name.clone(), outputs: Vec::new(), same_header: true })
        .collect();
    let mut starts: HashMap<String, u64> = HashMap::new();
    for (name, entry) in base.names().filter_map(|name| Some((name, base.entry(name)?))) {
        let Some(file) = files.get_mut(entry.file()) else { continue };
        starts.insert(name.to_owned(), entry.start());
        file.outputs.push(output(name, entry, Source::Base(name.to_owned()), changes.remove(name)));
    }
    for file in &mut files {
        file.outputs.sort_by_key(|output| starts.get(&output.name).copied());
    }
    if let Some(last) = files.last_mut() {
        if let Some((name, embedding)) = head {
            if let Some(entry) = base.entry(&embedding) {
                last.same_header = false;
                last.outputs.push(output(&name, entry, Source::Base(embedding), changes.remove(&name)));
            }
        }
        for (name, change) in changes {
            let Some(entry) = change.whole.as_deref().and_then(|key| adapter.entry(key)) else { continue };
            last.same_header = false;
            last.outputs.push(output(&name, entry, Source::Base(name.clone()), Some(change)));
        }
    }
    files
}

/// The output called `name` with the type and shape of `entry`.
fn output(name: &str, entry: &Entry, source: Source, change: Option<Change>) -> Output {
    let change = change.unwrap_or_default();
    Output {
        name: name.to_owned(),
        dtype: entry.dtype,
        shape: entry.shape.clone(),
        source: change.whole.map_or(source, Source::Adapter),
        update: change.update,
    }
}

/// How many names an error lists of each kind.
const LISTED: usize = 6;

/// What stands against a merge, by kind.
#[derive(Debug, Default)]
struct Problems {
    kinds: Vec<(&'static str, Vec<String>)>,
}

impl Problems {
    /// Notes that `item` has the fault `kind`, which reads on after "tensors" and before a colon.
    fn add(&mut self, kind: &'static str, item: impl Into<String>) {
        match self.kinds.iter_mut().find(|known| known.0 == kind) {
            Some((_, items)) => items.push(item.into()),
            None => self.kinds.push((kind, vec![item.into()])),
        }
    }

    /// One error that lists them all, if there are any.
    fn refuse(self, adapter: &Checkpoint, base: &Checkpoint) -> Result<()> {
        if self.kinds.is_empty() {
            return Ok(());
        }
        let list = |(kind, items): &(&str, Vec<String>)| {
            let shown: Vec<&str> = items.iter().take(LISTED).map(String::as_str).collect();
            let more = items.len().saturating_sub(LISTED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!("{} {kind}: {}{more}", items.len(), shown.join(", "))
        };
        let lists: Vec<String> = self.kinds.iter().map(list).collect();
        let experts = self.kinds.iter().any(|(_, items)| items.iter().any(|item| item.contains(".experts")));
        let hint = if experts {
            "experts are merged where the base stores them as the adapter names them; save the base with the version of \
             transformers that the adapter was trained with"
        } else {
            "check that this is the base that the adapter was trained on"
        };
        let (adapter, base) = (file_of(adapter), file_of(base));
        Err(Error::Merge(format!("{adapter} does not fit {base}: {}; hint: {hint}", lists.join("; "))))
    }
}

/// The path that a checkpoint was opened from.
fn file_of(checkpoint: &Checkpoint) -> String {
    show_name(&checkpoint.path().to_string_lossy())
}
