//! Which files make up a checkpoint, and what is there instead if they are missing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::header::Row;
use super::open::{Folder, Links, mishap, open_regular, parent};
use super::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, Shard, index};
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};

const SUFFIX: &str = ".safetensors";
const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// The key under which an adapter's weights keep the digest of the config they were saved with.
pub(crate) const CONFIG_DIGEST: &str = "config_sha256";

/// The longest adapter config that is read, in bytes.
pub(crate) const MAX_CONFIG: u64 = 16 << 20;

/// How [`CONFIG_DIGEST`] is spelled.
pub(crate) fn digest(config: &[u8]) -> String {
    use std::fmt::Write;
    Sha256::digest(config).iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(super) fn file(path: &Path) -> Result<Checkpoint> {
    let (file, metadata) = open_regular(path)?;
    if let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| is_pickle(name)) {
        return Err(Error::checkpoint(path, conversion(name)));
    }
    Checkpoint::assemble(path, vec![Shard::open(path, file, &metadata)?])
}

pub(super) fn adapter(path: &Path, links: Links) -> Result<Checkpoint> {
    let folder = Folder::open(path, links)?;
    let Some((file, metadata)) = folder.file(ADAPTER_WEIGHTS)? else {
        return Err(missing(path, &folder, &format!("holds no {ADAPTER_WEIGHTS}"), "save the adapter again"));
    };
    let weights = folder.path(ADAPTER_WEIGHTS);
    let (shard, rows) = Shard::open(&weights, file, &metadata)?;
    check_adapter_tensors(&shard, &rows)?;
    check_whole(path, &folder, &shard)?;
    Checkpoint::assemble(&weights, vec![(shard, rows)])
}

/// Types that adapters hold: floats, and the indices of methods that pick elements.
fn check_adapter_tensors(shard: &Shard, rows: &[Row]) -> Result<()> {
    let index = |dtype| matches!(dtype, Dtype::U8 | Dtype::I16 | Dtype::I32 | Dtype::I64);
    let wrong: Vec<_> = rows.iter().filter(|row| !row.dtype.is_adapter_float() && !index(row.dtype)).collect();
    let shown = wrong.iter().take(3).map(|row| format!("`{}` {}", show_name(&row.name), row.dtype.name()));
    let shown = shown.collect::<Vec<_>>().join(", ");
    let fault = "of a type that adapter weights do not have (F64, F32, F16, BF16, I64, I32, I16, U8 are read)";
    match wrong.len() {
        0 => Ok(()),
        1 => Err(shard.fault(format!("holds a tensor {fault}: {shown}"))),
        count => Err(shard.fault(format!("holds {count} tensors {fault}: {shown}{}", dots(count)))),
    }
}

fn dots(count: usize) -> &'static str {
    if count > 3 { ", …" } else { "" }
}

/// Notices a save that was cut short between its two renames: the weights know the digest of their config, and that
/// config is still beside them under its temporary name. A config that was merely edited by hand is as good as any.
fn check_whole(path: &Path, folder: &Folder, shard: &Shard) -> Result<()> {
    let Some(expected) = shard.metadata.get(CONFIG_DIGEST) else { return Ok(()) };
    let holds = |name: &str| -> Result<bool> {
        Ok(folder.read(name, MAX_CONFIG)?.is_some_and(|text| digest(&text) == *expected))
    };
    if holds(ADAPTER_CONFIG)? {
        return Ok(());
    }
    let prefix = format!("{ADAPTER_CONFIG}{}", crate::writer::TEMPORARY);
    for name in folder.names()?.iter().filter(|name| name.starts_with(&prefix)) {
        if holds(name)? {
            let way =
                format!("rename {name} to {ADAPTER_CONFIG} to finish it, or delete it to keep the config as it is");
            return Err(Error::checkpoint(path, format!("holds the weights of a save that was cut short; {way}")));
        }
    }
    Ok(())
}

pub(super) fn model(path: &Path, links: Links) -> Result<Checkpoint> {
    if path.is_dir() {
        return model_folder(path, links);
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if name.ends_with(INDEX_SUFFIX) {
        return sharded(&Folder::open(parent(path), links)?, name, parent(path));
    }
    file(path)
}

fn model_folder(path: &Path, links: Links) -> Result<Checkpoint> {
    let folder = Folder::open(path, links)?;
    let names = folder.names()?;
    let ending = |suffix: &str| names.iter().filter(|name| name.ends_with(suffix)).collect::<Vec<_>>();
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    let (indices, files) = (ending(INDEX_SUFFIX), ending(SUFFIX));
    if has("model.safetensors") {
        single(&folder, "model.safetensors")
    } else if has("model.safetensors.index.json") {
        sharded(&folder, "model.safetensors.index.json", path)
    } else if let [index] = indices.as_slice() {
        sharded(&folder, index, path)
    } else if let ([], [file]) = (indices.as_slice(), files.as_slice()) {
        single(&folder, file)
    } else if files.is_empty() && indices.is_empty() {
        Err(missing(path, &folder, "holds no safetensors file", "name the model's folder, or one of its files"))
    } else {
        let several = if indices.is_empty() { files } else { indices };
        let shown = several.iter().take(3).map(|name| show_name(name)).collect::<Vec<_>>().join(", ");
        let dots = dots(several.len());
        Err(Error::checkpoint(path, format!("holds several checkpoints: {shown}{dots}; hint: give the path of one")))
    }
}

fn single(folder: &Folder, name: &str) -> Result<Checkpoint> {
    let path = folder.path(name);
    Checkpoint::assemble(&path, vec![shard(folder, name, &path)?])
}

/// Opens the files of an index. A tensor that the index does not list is the file's all the same.
fn sharded(folder: &Folder, name: &str, path: &Path) -> Result<Checkpoint> {
    let index_path = folder.path(name);
    let fault = |reason: String| Error::checkpoint(&index_path, reason);
    let json = folder.read(name, index::MAX_LENGTH)?.ok_or_else(|| fault("is not there".into()))?;
    if let Some(what) = mishap(&json) {
        return Err(fault(what.into()));
    }
    let weight_map = index::parse(&json).map_err(fault)?;
    let names: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
    let files = names.iter().map(|name| shard(folder, name, &index_path)).collect::<Result<Vec<_>>>()?;
    let checkpoint = Checkpoint::assemble(path, files)?;
    check_index(&checkpoint, &weight_map).map_err(fault)?;
    Ok(checkpoint)
}

/// Opens one file that `asked_by` wants.
fn shard(folder: &Folder, name: &str, asked_by: &Path) -> Result<(Shard, Vec<Row>)> {
    let missing = || Error::checkpoint(asked_by, format!("asks for {}, which is not there", show_name(name)));
    let (file, metadata) = folder.file(name)?.ok_or_else(missing)?;
    Shard::open(&folder.path(name), file, &metadata)
}

fn check_index(checkpoint: &Checkpoint, weight_map: &BTreeMap<String, String>) -> Result<(), String> {
    let holds = |tensor: &str, file: &str| {
        let entry = checkpoint.entry(tensor).and_then(|entry| checkpoint.shards.get(entry.file));
        entry.is_some_and(|shard| shard.name == file)
    };
    let absent: Vec<_> = weight_map.iter().filter(|(tensor, file)| !holds(tensor, file)).collect();
    if absent.is_empty() {
        return Ok(());
    }
    let shown = absent.iter().take(3).map(|(tensor, file)| format!("`{}` in {}", show_name(tensor), show_name(file)));
    let shown = shown.collect::<Vec<_>>().join(", ");
    Err(format!("lists tensors that are not where it says ({}): {shown}{}", absent.len(), dots(absent.len())))
}

fn is_pickle(name: &str) -> bool {
    [".bin", ".pt", ".pth", ".ckpt", ".pkl"].iter().any(|suffix| name.ends_with(suffix))
}

fn conversion(name: &str) -> String {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let (name, stem) = (show_name(name), show_name(stem));
    format!(
        "{name} is a pickle, which is never loaded; hint: convert it once, by \
         safetensors.torch.save_file(torch.load(\"{name}\", weights_only=True), \"{stem}{SUFFIX}\")"
    )
}

/// The error for a folder without weights: what else is there says what to do.
fn missing(path: &Path, folder: &Folder, what: &str, way: &str) -> Error {
    let names = match folder.names() {
        Ok(names) => names,
        Err(error) => return error,
    };
    // Among pickles, the weights are the ones named like a model; a trainer leaves others beside them.
    let pickles = || names.iter().filter(|name| is_pickle(name));
    match pickles().find(|name| name.contains("model")).or_else(|| pickles().next()) {
        Some(pickle) => Error::checkpoint(path, format!("{what}; {}", conversion(pickle))),
        None => Error::checkpoint(path, format!("{what}; hint: {way}")),
    }
}
