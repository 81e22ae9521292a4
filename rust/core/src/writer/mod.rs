//! Writing safetensors files and folders, so that a crash, a full disk or a second writer never leaves a mixture.
//!
//! Files appear by renaming a finished, synced temporary sibling; every call goes through a [`Storage`]. The header is
//! laid out here and not by the `safetensors` crate, since a merge writes tensors in an order and at positions it has
//! planned beforehand, and the same adapter has to give the same bytes (the crate's metadata is a hash map).

mod adapter;
mod disk;
mod folder;
mod progress;
mod storage;
mod temporary;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub use adapter::{write_adapter, write_config};
pub use disk::Disk;
pub use folder::{FolderWriter, MARKER, PositionedFile};
pub use storage::{Kind, Storage, StoredFile};
pub(crate) use temporary::TEMPORARY;

use crate::checkpoint::header::{MAX_LENGTH, METADATA, size};
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};

/// One tensor to write.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its sizes.
    pub shape: &'a [usize],
    /// Its bytes, little-endian and row-major.
    pub data: &'a [u8],
}

/// The start of a safetensors file: the length of the header, then the header, padded so that the data starts at a
/// multiple of eight bytes. The tensors lie one after the other in the order given.
pub fn header(tensors: &[(&str, Dtype, &[usize])], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    lay_out(tensors, metadata).map_err(|reason| Error::checkpoint(Path::new("a safetensors header"), reason))
}

fn lay_out(tensors: &[(&str, Dtype, &[usize])], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, String> {
    let quoted = |text: &str| serde_json::to_string(text).map_err(|error| error.to_string());
    let mut members = Vec::new();
    if !metadata.is_empty() {
        let strings = serde_json::to_string(metadata).map_err(|error| error.to_string())?;
        members.push(format!("{}:{strings}", quoted(METADATA)?));
    }
    let mut names = BTreeSet::from([METADATA]);
    let mut start = 0_u64;
    for &(name, dtype, shape) in tensors {
        let within = |reason: String| format!("tensor `{}`: {reason}", show_name(name));
        if !names.insert(name) {
            return Err(within("the name is taken".into()));
        }
        let sizes: Vec<u64> = shape.iter().map(|&size| size as u64).collect();
        let too_large = || within("the file would be larger than can be".into());
        let end = start.checked_add(size(dtype, &sizes).map_err(within)?).ok_or_else(too_large)?;
        let (key, dtype) = (quoted(name)?, dtype.name());
        members.push(format!(r#"{key}:{{"dtype":"{dtype}","shape":{sizes:?},"data_offsets":[{start},{end}]}}"#));
        start = end;
    }
    let mut json = format!("{{{}}}", members.join(",")).into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let length = json.len() as u64;
    if length > MAX_LENGTH {
        return Err(format!("{} tensors take {length} bytes, at most {MAX_LENGTH} can be read", tensors.len()));
    }
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}
