//! An adapter that is to be merged.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::external::Apply;
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
    /// What computes it, where that is not done here.
    pub apply: Option<Arc<dyn Apply>>,
    held: Mutex<VecDeque<(String, Arc<Vec<u8>>)>>,
}

/// How many tensors are kept that are needed again and again, a part each time.
const HELD: usize = 4;

impl Adapter {
    /// Opens the adapter in the folder `path`.
    pub fn open(path: &Path, weight: f64, links: Links) -> Result<Self> {
        let text = read_small(path, ADAPTER_CONFIG, links, MAX_CONFIG)?;
        let text = text.ok_or_else(|| {
            Error::checkpoint(
                path,
                format!("holds no {ADAPTER_CONFIG}; hint: name the adapter's folder, and the base before it"),
            )
        })?;
        let origin = path.join(ADAPTER_CONFIG);
        let config_text = String::from_utf8(text).map_err(|_| Error::checkpoint(&origin, "is not UTF-8"))?;
        let config = AdapterConfig::parse(&config_text, &origin.to_string_lossy())?;
        let checkpoint = Checkpoint::open_adapter(path, links)?;
        Ok(Self { path: path.to_owned(), weight, config, config_text, checkpoint, apply: None, held: Mutex::default() })
    }

    /// The bytes of a tensor of which many outputs need a part, such as one expert's; the last few of them are kept.
    pub(crate) fn read_shared(&self, key: &str) -> Result<Arc<Vec<u8>>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = held.iter().find(|(known, _)| known == key) {
            return Ok(Arc::clone(bytes));
        }
        let bytes = Arc::new(self.checkpoint.read(key)?);
        held.truncate(HELD - 1);
        held.push_front((key.to_owned(), Arc::clone(&bytes)));
        Ok(bytes)
    }

    /// Its folder as messages name it.
    pub(super) fn shown(&self) -> String {
        show_name(&self.path.to_string_lossy())
    }
}
