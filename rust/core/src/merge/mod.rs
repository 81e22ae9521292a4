//! Merging an adapter into a checkpoint on disk, a block of rows at a time.
//!
//! The output has the base's files, with the same names, order and types. Blocks are read, changed and written at their
//! final place by all threads at once, so the memory needed does not grow with the model.

mod check;
mod choice;
mod elsewhere;
mod files;
mod matrices;
mod moved;
mod place;
mod reference;
mod restore;
mod steps;
mod subtract;
mod terms;
mod turn;
mod unmerge;
pub mod work;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use check::Checked;
pub use choice::Choice;
pub use moved::Moved;
pub use subtract::Subtracted;
pub use unmerge::Way;
pub use write::{Writing, Written};

use crate::checkpoint::{Checkpoint, Links, MODEL_CONFIG, read_json};
use crate::error::Result;
use crate::plan::{Adapter, Apply, Options, Plan};
use crate::quantized;

/// The longest `config.json` that is read, in bytes.
const MAX_CONFIG: u64 = 16 << 20;

/// Someone who follows a merge and may stop it; called from several threads.
pub trait Watch: Sync {
    /// So many more bytes of tensors are written.
    fn advance(&self, bytes: u64);
    /// The number of the signal that asks for an end, if one came.
    fn interrupted(&self) -> Option<i32>;
}

/// What is accepted of the inputs and asked of the output.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Which links in their folders are followed.
    pub links: Links,
    /// What is asked for beside the inputs.
    pub options: Options,
    /// What computes methods that have no kernel here.
    pub apply: Option<Arc<dyn Apply>>,
}

/// A merge that has been planned and checked in full.
#[derive(Debug)]
pub struct Merge {
    base_path: PathBuf,
    base: Checkpoint,
    adapters: Vec<Adapter>,
    originals: Option<Checkpoint>,
    plan: Plan,
    links: Links,
    allow_nonfinite: bool,
    way: Way,
}

impl Merge {
    /// Opens the model at `base` (a folder, an index or one safetensors file) and the adapters' folders, each with what its
    /// change is multiplied by, and plans.
    pub fn open(base: &Path, adapters: &[(PathBuf, f64)], settings: Settings) -> Result<Self> {
        let Settings { links, options, apply } = settings;
        let base_path = base.to_owned();
        let open = |(path, weight): &(PathBuf, f64)| {
            let mut adapter = Adapter::open(path, *weight, links)?;
            adapter.apply.clone_from(&apply);
            Ok(adapter)
        };
        let adapters: Vec<Adapter> = adapters.iter().map(open).collect::<Result<_>>()?;
        let base = Checkpoint::open_model(base, links)?;
        let folder = files::folder_of(&base_path);
        let mut model = read_json(&folder, MODEL_CONFIG, links)?;
        let (base, dequantized) = quantized::open(base, model.as_mut())?;
        let mut plan = Plan::new(&base, &adapters, model.as_ref(), &options)?;
        if let Some(note) = dequantized {
            plan.config = plan.config.or(model);
            plan.notes.insert(0, note);
        }
        Ok(Self {
            base_path,
            base,
            adapters,
            originals: None,
            plan,
            links,
            allow_nonfinite: options.allow_nonfinite,
            way: Way::Merged,
        })
    }

    /// Whether the base's weights are quantized, and the output has them dequantized.
    #[must_use]
    pub fn dequantizes(&self) -> bool {
        self.base.is_made()
    }

    /// How it does that.
    #[must_use]
    pub fn way(&self) -> Way {
        self.way
    }

    /// What it will do.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }
}
