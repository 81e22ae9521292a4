//! What it takes to get the base back from what was merged into it, kept beside the merged weights.
//!
//! In a folder of its own, since programs read every safetensors file of a model's folder as weights.

use std::collections::{BTreeMap, HashSet};

use super::Merge;
use super::files::folder_of;
use crate::checkpoint::{MODEL_CONFIG, read_small};
use crate::error::{Error, Result};
use crate::plan::{File, Output, Source};
use crate::writer::FolderWriter;

/// The folder.
pub const RESTORE: &str = "peftrs-restore";

/// The file in it with the base's tensors that the merged checkpoint has otherwise or not at all.
pub const ORIGINALS: &str = "base.safetensors";

/// Under which that file's metadata have a JSON list of the tensors that the base lacks.
pub const ADDED: &str = "added";

impl Merge {
    /// The file of originals, and its metadata.
    pub(super) fn originals(&self) -> Result<(File, BTreeMap<String, String>)> {
        let outputs = || self.plan.files.iter().flat_map(|file| &file.outputs);
        let kept: HashSet<&str> =
            outputs().filter(|output| output.is_copy()).map(|output| output.name.as_str()).collect();
        let added: Vec<&str> =
            outputs().map(|output| output.name.as_str()).filter(|name| self.base.entry(name).is_none()).collect();
        let added = serde_json::to_string(&added).map_err(|error| Error::Merge(error.to_string()))?;
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned()), (ADDED.to_owned(), added)]);
        let lost = self.base.entries().filter(|(name, _)| !kept.contains(name));
        let outputs = lost.map(|(name, entry)| Output::copy(name, entry, Source::Base(name.to_owned()))).collect();
        Ok((File { name: format!("{RESTORE}/{ORIGINALS}"), outputs, same_header: false }, metadata))
    }

    /// Keeps the base's config where the merged one says something else.
    pub(super) fn keep_config(&self, writer: &FolderWriter<'_>) -> Result<()> {
        let config = read_small(&folder_of(&self.base_path), MODEL_CONFIG, self.links, super::MAX_CONFIG)?;
        match config.filter(|_| self.plan.config.is_some()) {
            Some(config) => writer.write(&format!("{RESTORE}/{MODEL_CONFIG}"), &config),
            None => Ok(()),
        }
    }
}
