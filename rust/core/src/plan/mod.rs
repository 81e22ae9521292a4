//! What a merge will do, decided and checked in full before the first byte is written.
//!
//! Every tensor of every adapter is accounted for: it changes a tensor of the base, replaces one, or becomes a new one.
//! What has no home, the wrong shape or values that are not finite is reported together, and refused.

mod adapter;
mod draft;
mod finite;
mod fit;
mod homes;
mod placed;
mod problems;
mod sort;
mod support;
mod tie;
mod update;
mod updates;

use std::collections::HashMap;

use crate::checkpoint::{Checkpoint, Entry};
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
pub use adapter::Adapter;
use draft::{Draft, Drafts};
pub(crate) use homes::Homes;
use problems::Problems;
pub(crate) use tie::is_embedding;
pub use update::{Change, LowRank, Scale, Turn, Update};

/// Where the values of an output tensor come from, before its updates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The tensor of that name in the base.
    Base(String),
    /// The tensor of that key in one of the adapters, converted to the output's type.
    Adapter(usize, String),
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
    /// What changes them, the first to act first: each on the unrounded outcome of the one before.
    pub updates: Vec<Update>,
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
        self.updates.is_empty() && matches!(&self.source, Source::Base(name) if *name == self.name)
    }

    /// What happens to it, in a few words.
    #[must_use]
    pub fn what(&self) -> String {
        let source = match &self.source {
            Source::Adapter(..) => Some("taken from the adapter".to_owned()),
            Source::Base(name) if *name != self.name => Some(format!("copy of {}", show_name(name))),
            Source::Base(_) if self.updates.is_empty() => Some("unchanged".to_owned()),
            Source::Base(_) => None,
        };
        source
            .into_iter()
            .chain(self.updates.iter().map(|update| update.change.what()))
            .collect::<Vec<_>>()
            .join(", then ")
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

/// What the planner is told beside the adapters' configs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// The base's `config.json`, if it has one.
    pub model: Option<&'a serde_json::Value>,
    /// Accept weights that are infinite or NaN.
    pub allow_nonfinite: bool,
}

impl Plan {
    /// Plans the merge of `adapters` into `base`, or says everything that stands against it.
    ///
    /// Each adapter is for the base as it stands. Those that act on a layer's output apply in the order given; of those that
    /// act on its input, the first is the outermost, as when all of them are active in a model.
    pub fn new(base: &Checkpoint, adapters: &[Adapter], options: Options) -> Result<Self> {
        let mut all = Vec::new();
        let mut notes: Vec<String> = Vec::new();
        let mut problems = Problems::default();
        let mut prefixed = false;
        for (index, adapter) in adapters.iter().enumerate() {
            support::check(adapter, options.model)?;
            let method = &adapter.config.method;
            let sorted = sort::Sorted::new(&adapter.checkpoint, method);
            let homes = updates::homes(base, &sorted)?;
            notes.extend(adapter.config.warnings.iter().cloned());
            if !homes.strip.is_empty() {
                notes.push(format!("the base lacks the adapter's prefix {}", show_name(&homes.strip)));
            }
            if !homes.add.is_empty() {
                notes.push(format!("the adapter lacks the base's prefix {}", show_name(&homes.add)));
            }
            prefixed |= !homes.add.is_empty();
            let tie = tie::Tie::find(base, options.model, prefixed);
            let planner = updates::Planner {
                base,
                adapter: &adapter.checkpoint,
                index,
                weight: adapter.weight,
                method,
                targeting: &adapter.config.targeting,
                stored_transposed: method.fan_in_fan_out() || support::stores_transposed(options.model),
                homes: &homes,
                tie: tie.as_ref(),
            };
            let drafts = planner.changes(&sorted, &mut problems)?;
            support::check_weight(adapter, &drafts)?;
            if !options.allow_nonfinite {
                finite::find_nonfinite(&adapter.checkpoint, &mut problems)?;
            }
            problems.end_of(&adapter.checkpoint, base);
            all.push(drafts);
        }
        problems.refuse()?;
        let mut drafts = draft::combine(all, adapters)?;
        let tie = tie::Tie::find(base, options.model, prefixed);
        if let Some(tie) = tie.as_ref().filter(|tie| !tie.known && tie.is_cut(&drafts)) {
            return Err(tie.refused());
        }
        let untie = tie.as_ref().is_some_and(|tie| tie.cut(&mut drafts, &mut notes));
        let head = tie.filter(|_| untie).map(|tie| (tie.head, tie.embedding));
        let files = files(base, adapters, drafts, head);
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

/// The base's files with `drafts` in their places; what the base lacks goes at the end of the last one.
fn files(base: &Checkpoint, adapters: &[Adapter], mut drafts: Drafts, head: Option<(String, String)>) -> Vec<File> {
    let mut files: Vec<File> = base
        .files()
        .iter()
        .map(|shard| File { name: shard.name.clone(), outputs: Vec::new(), same_header: true })
        .collect();
    let mut starts: HashMap<String, u64> = HashMap::new();
    for (name, entry) in base.entries() {
        let Some(file) = files.get_mut(entry.file()) else { continue };
        starts.insert(name.to_owned(), entry.start());
        file.outputs.push(output(name, entry, Source::Base(name.to_owned()), drafts.remove(name)));
    }
    for file in &mut files {
        file.outputs.sort_by_key(|output| starts.get(&output.name).copied());
    }
    if let Some(last) = files.last_mut() {
        if let Some((name, embedding)) = head {
            if let Some(entry) = base.entry(&embedding) {
                last.same_header = false;
                last.outputs.push(output(&name, entry, Source::Base(embedding), drafts.remove(&name)));
            }
        }
        for (name, draft) in drafts {
            let whole = draft.whole.as_ref();
            let Some(entry) = whole.and_then(|(index, key)| adapters.get(*index)?.checkpoint.entry(key)) else {
                continue;
            };
            last.same_header = false;
            last.outputs.push(output(&name, entry, Source::Base(name.clone()), Some(draft)));
        }
    }
    files
}

/// The output called `name` with the type and shape of `entry`.
fn output(name: &str, entry: &Entry, source: Source, draft: Option<Draft>) -> Output {
    let draft = draft.unwrap_or_default();
    Output {
        name: name.to_owned(),
        dtype: entry.dtype,
        shape: entry.shape.clone(),
        source: draft.whole.map_or(source, |(index, key)| Source::Adapter(index, key)),
        updates: draft.updates,
    }
}
