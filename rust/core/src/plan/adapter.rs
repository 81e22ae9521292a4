//! An adapter that is to be merged.

use std::path::{Path, PathBuf};

use crate::checkpoint::{ADAPTER_CONFIG, Checkpoint, Links, read_small};
use crate::config::AdapterConfig;
use crate::error::{Error, Result, show_name};

/// The longest `adapter_config.json` that is read, in bytes.
const MAX_CONFIG: u64 = 16 << 20;

/// An adapter, opened and not yet compared with a base.
#[derive(Debug)]
pub struct Adapter {
    /// Its folder.
    pub path: PathBuf,
    /// What its change is multiplied by.
    pub weight: f64,
    /// Its config.
    pub config: AdapterConfig,
    /// The text of its config.
    pub config_text: String,
    /// Its tensors.
    pub checkpoint: Checkpoint,
}

impl Adapter {
    /// Opens the adapter in the folder `path`.
    pub fn open(path: &Path, weight: f64, links: Links) -> Result<Self> {
        let text = read_small(path, ADAPTER_CONFIG, links, MAX_CONFIG)?;
        let text = text.ok_or_else(|| Error::checkpoint(path, format!("holds no {ADAPTER_CONFIG}")))?;
        let origin = path.join(ADAPTER_CONFIG);
        let config_text = String::from_utf8(text).map_err(|_| Error::checkpoint(&origin, "is not UTF-8"))?;
        let config = AdapterConfig::parse(&config_text, &origin.to_string_lossy())?;
        let checkpoint = Checkpoint::open_adapter(path, links)?;
        Ok(Self { path: path.to_owned(), weight, config, config_text, checkpoint })
    }

    /// Its folder as messages name it.
    pub(super) fn shown(&self) -> String {
        show_name(&self.path.to_string_lossy())
    }
}
