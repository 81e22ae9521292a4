//! What adapters and checkpoints hold, and how two of them differ: from headers alone unless values are asked for.

mod adapter;
mod checkpoint;
mod diff;
mod gram;
mod values;

pub use adapter::{Adapter, LowRank, Module, Norms};
pub use checkpoint::{Model, Scan, Share, scan};
pub use diff::{Difference, Row, adapters, checkpoints, fields};
pub use values::Statistics;

use std::path::{Path, PathBuf};

use crate::checkpoint::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, parent};

/// The adapter's folder that `path` means, if it means one: the folder itself, or one of the two files in it.
///
/// A model's folder may hold an adapter's config as well; without an adapter's weights it is a model's all the same.
#[must_use]
pub fn adapter_folder(path: &Path) -> Option<PathBuf> {
    let name = path.file_name().unwrap_or_default();
    if path.is_file() && (name == ADAPTER_CONFIG || name == ADAPTER_WEIGHTS) {
        return Some(parent(path).to_owned());
    }
    let pickled = ["adapter_model.bin", ADAPTER_WEIGHTS].iter().any(|name| path.join(name).exists());
    let models = path.join("model.safetensors").exists() || path.join("model.safetensors.index.json").exists();
    (pickled || path.join(ADAPTER_CONFIG).exists() && !models).then(|| path.to_owned())
}
