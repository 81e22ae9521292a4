//! What a merge will do, decided and checked in full before the first byte is written.
//!
//! Every tensor of every adapter is accounted for: it changes a tensor of the base, replaces one, or becomes a new one.
//! What has no home, the wrong shape or values that are not finite is reported together, and refused.

mod adapter;
mod base;
mod changes;
mod experts;
mod external;
mod layout;
mod matching;
mod model_config;
mod planner;
mod refusals;
mod slots;

use serde_json::Value;

use crate::checkpoint::{Checkpoint, Entry};
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
pub use adapter::Adapter;
use base::Base;
pub(crate) use base::Homes;
pub use changes::{Change, LowRank, Part, Scale, Turn, Update};
pub use external::{Apply, Effect, Elsewhere, Layer, Slot};
pub(crate) use model_config::is_embedding;
use model_config::{Tie, Vocabulary};

/// Where the values of an output tensor come from, before its updates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The tensor of that name in the base.
    Base(String),
    /// The tensor of that key in one of the adapters, converted to the output's type.
    Adapter(usize, String),
    /// The tensor of that name as it was before a merge.
    Original(String),
}

/// One tensor of the merged checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Its name.
    pub name: String,
    /// Its type, that of the base's tensor unless it is converted.
    pub dtype: Dtype,
    /// Whether its type is another than the base's.
    pub converted: bool,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its values come from.
    pub source: Source,
    /// What changes them, the first to act first: each on the unrounded outcome of the one before.
    pub updates: Vec<Update>,
}

impl Output {
    /// A tensor with the type, shape and bytes of its source, which is `entry`.
    pub(crate) fn copy(name: &str, entry: &Entry, source: Source) -> Self {
        let (dtype, shape) = (entry.dtype, entry.shape.clone());
        Self { name: name.to_owned(), dtype, converted: false, shape, source, updates: Vec::new() }
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }

    /// Whether it is the base's tensor, byte for byte.
    #[must_use]
    pub fn is_copy(&self) -> bool {
        self.updates.is_empty() && !self.converted && matches!(&self.source, Source::Base(name) if *name == self.name)
    }

    /// What happens to it, in a few words.
    #[must_use]
    pub fn what(&self) -> String {
        let source = match &self.source {
            Source::Adapter(..) => Some("taken from the adapter".to_owned()),
            Source::Original(_) => Some("restored".to_owned()),
            Source::Base(name) if *name != self.name => Some(format!("copy of {}", show_name(name))),
            Source::Base(_) if self.is_copy() => Some("unchanged".to_owned()),
            Source::Base(_) => None,
        };
        let converted = self.converted.then(|| format!("converted to {}", self.dtype.name()));
        let updates = self.updates.iter().map(|update| update.change.what());
        source.into_iter().chain(updates).chain(converted).collect::<Vec<_>>().join(", then ")
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
    /// Whether those files are others than the base's.
    pub resharded: bool,
    /// Whether the output head is no longer tied to the embedding.
    pub untie: bool,
    /// The model's config, where it has to say something else than the base's.
    pub config: Option<Value>,
    /// What the user should know of: warnings and decisions.
    pub notes: Vec<String>,
}

/// What is asked of a merge beside its inputs.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Accept weights that are infinite or NaN.
    pub allow_nonfinite: bool,
    /// Patterns of tensors or modules, of which all others stay as they are in the base; none if empty.
    pub only: Vec<String>,
    /// Patterns of tensors or modules that stay as they are in the base.
    pub skip: Vec<String>,
    /// The type that all floats get.
    pub dtype: Option<Dtype>,
    /// How many bytes of tensors a file may have, if the base's files are to be made anew.
    pub max_shard_bytes: Option<u64>,
}

impl Plan {
    /// Plans the merge of `adapters` into the base in `checkpoint`, or says everything that stands against it; `model` is the
    /// base's `config.json`, if it has one.
    ///
    /// Each adapter is for the base as it stands. Those that act on a layer's output apply in the order given; of those that
    /// act on its input, the first is the outermost, as when all of them are active in a model.
    pub fn new(
        checkpoint: &Checkpoint,
        adapters: &[Adapter],
        model: Option<&Value>,
        options: &Options,
    ) -> Result<Self> {
        adapters.iter().try_for_each(|adapter| refusals::check(adapter, model))?;
        let base = Base::new(checkpoint, adapters)?;
        let mut notes: Vec<String> = Vec::new();
        let (mut drafts, prefixed) = planner::gather(&base, adapters, model, options, &mut notes)?;
        refusals::select(&mut drafts, &base, &options.only, &options.skip)?;
        let mut config = model.cloned().unwrap_or(Value::Null);
        model_config::replicate(&mut config, &base)?;
        let tie = Tie::find(&base, model, prefixed);
        tie.iter().try_for_each(|tie| tie.grow(&mut drafts, &base, adapters))?;
        let vocabulary = Vocabulary::find(&base, adapters, &drafts)?;
        if let Some(vocabulary) = &vocabulary {
            vocabulary.tell(&mut config, &mut notes)?;
        }
        let cut =
            tie.map(|tie| tie.cut(&mut drafts, adapters, vocabulary.is_some(), &mut notes)).transpose()?.flatten();
        if cut.is_some() {
            model_config::untie(&mut config);
        }
        let untie = cut.is_some();
        notes.extend(layout::new(&base, &drafts, cut.as_ref()));
        let mut files = layout::files(&base, adapters, drafts, cut.as_ref());
        if files.iter().flat_map(|file| &file.outputs).all(Output::is_copy) {
            let reason = "the adapter changes no tensor of the base; hint: it holds no weights, train or save it again";
            return Err(Error::Merge(reason.to_owned()));
        }
        if let Some(dtype) = options.dtype {
            layout::convert(&mut files, dtype);
            model_config::set_dtype(&mut config, dtype);
        }
        if let Some(most) = options.max_shard_bytes {
            files = layout::reshard(files, most);
        }
        let config = Some(config).filter(|config| model.is_some_and(|model| config != model));
        Ok(Self { files, resharded: options.max_shard_bytes.is_some(), untie, config, notes })
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
