//! An adapter of one tensor in two versions, and what is in a folder.

use std::path::Path;

use peftrs_core::checkpoint::{ADAPTER_CONFIG, Checkpoint, Links};
use peftrs_core::dtype::Dtype;
use peftrs_core::error::Result;
use peftrs_core::writer::{Disk, Tensor, write_adapter};

/// Elements of the tensor: enough that a write takes several system calls' worth of time.
const ELEMENTS: usize = 100_000;

pub fn config(version: u8) -> String {
    format!("{{\"version\": {version}}}")
}

pub fn save(folder: &Path, version: u8, sync: bool) -> Result<()> {
    let data = vec![version; ELEMENTS * 2];
    let tensor = Tensor { name: "t", dtype: Dtype::BF16, shape: &[ELEMENTS], data: &data };
    write_adapter(&Disk, folder, &config(version), &[tensor], &[("README.md", b"text")], &[], sync)
}

/// The version of the weights in `folder`, which have to be whole.
pub fn weights(folder: &Path) -> Result<u8> {
    let data = Checkpoint::open_adapter(folder, Links::Confined)?.read("t")?;
    assert!(data.iter().all(|byte| *byte == data[0]), "a mixture");
    Ok(data[0])
}

#[track_caller]
pub fn assert_version(folder: &Path, version: u8) {
    assert_eq!(weights(folder).unwrap(), version);
    assert_eq!(std::fs::read_to_string(folder.join(ADAPTER_CONFIG)).unwrap(), config(version));
}

/// The names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
