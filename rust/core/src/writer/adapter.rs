//! Writing an adapter's folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::storage::{Storage, sync_folder};
use super::temporary::{MadeFolders, TemporaryFile};
use super::{Tensor, lay_out};
use crate::checkpoint::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG_DIGEST, check_name, digest};
use crate::error::{Error, Result, show_name};

/// Writes an adapter's config, weights and further `files` into `folder`, which is made if missing.
///
/// Everything is checked and on the disk under temporary names before the first file appears. Files that were there
/// keep their mode, links are replaced, other files are left alone. The same input gives the same bytes. The weights
/// carry the config's digest and appear before it, so that a save which is cut short between the two is noticed by
/// [`crate::checkpoint::Checkpoint::open_adapter`], and what `notes` say in their metadata. `sync` flushes to the disk
/// before the names appear.
pub fn write_adapter(
    storage: &dyn Storage,
    folder: &Path,
    config: &str,
    tensors: &[Tensor<'_>],
    files: &[(&str, &[u8])],
    notes: &[(&str, &str)],
    sync: bool,
) -> Result<()> {
    check_files(folder, files)?;
    let mut tensors = tensors.to_vec();
    // The widest elements first, as every tensor then starts at a multiple of its elements' size.
    tensors.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(b.name)));
    let weights = folder.join(ADAPTER_WEIGHTS);
    let header = weights_header(&tensors, config, notes).map_err(|reason| Error::checkpoint(&weights, reason))?;
    let mut made = MadeFolders::create(storage, folder)?;
    let parts: Vec<&[u8]> =
        std::iter::once(header.as_slice()).chain(tensors.iter().map(|tensor| tensor.data)).collect();
    let weights = write_one(storage, folder, ADAPTER_WEIGHTS, &parts, sync)?;
    let mut config = write_one(storage, folder, ADAPTER_CONFIG, &[config.as_bytes()], sync)?;
    let files: Vec<_> =
        files.iter().map(|(name, bytes)| write_one(storage, folder, name, &[bytes], sync)).collect::<Result<_>>()?;
    if sync {
        // The temporary names too: without the new config beside them, new weights and an old config pass for a pair.
        sync_folder(storage, folder)?;
        made.sync()?;
    }
    weights.publish()?;
    made.keep();
    config.keep();
    if sync {
        sync_folder(storage, folder)?;
    }
    config.publish()?;
    files.into_iter().try_for_each(TemporaryFile::publish)?;
    if sync { sync_folder(storage, folder) } else { Ok(()) }
}

/// Writes an adapter's config alone into `folder`, which is made if missing, atomically and synced.
pub fn write_config(storage: &dyn Storage, folder: &Path, config: &str) -> Result<()> {
    let mut made = MadeFolders::create(storage, folder)?;
    let config = write_one(storage, folder, ADAPTER_CONFIG, &[config.as_bytes()], true)?;
    made.sync()?;
    config.publish()?;
    made.keep();
    sync_folder(storage, folder)
}

/// Writes the parts of one file under a temporary name.
fn write_one<'a>(
    storage: &'a dyn Storage,
    folder: &Path,
    name: &str,
    parts: &[&[u8]],
    sync: bool,
) -> Result<TemporaryFile<'a>> {
    let length = parts.iter().map(|part| part.len() as u64).sum();
    let mut file = TemporaryFile::create(storage, &folder.join(name), length)?;
    parts.iter().try_for_each(|part| file.write(part))?;
    if sync {
        file.sync()?;
    }
    Ok(file)
}

fn weights_header(tensors: &[Tensor<'_>], config: &str, notes: &[(&str, &str)]) -> Result<Vec<u8>, String> {
    let mut metadata = BTreeMap::from([
        // transformers refuses weights that do not say whose tensors they are.
        ("format".to_owned(), "pt".to_owned()),
        (CONFIG_DIGEST.to_owned(), digest(config.as_bytes())),
    ]);
    for (key, note) in notes {
        if metadata.insert((*key).to_owned(), (*note).to_owned()).is_some() {
            return Err(format!("the metadata's `{}` is not for notes", show_name(key)));
        }
    }
    let described: Vec<_> = tensors.iter().map(|tensor| (tensor.name, tensor.dtype, tensor.shape)).collect();
    let header = lay_out(&described, &metadata)?;
    for tensor in tensors {
        let bytes = tensor.shape.iter().product::<usize>() * tensor.dtype.size();
        if bytes != tensor.data.len() {
            let (name, shape, dtype, found) =
                (show_name(tensor.name), tensor.shape, tensor.dtype.name(), tensor.data.len());
            return Err(format!(
                "tensor `{name}` of shape {shape:?} and {dtype} takes {bytes} bytes, {found} were given"
            ));
        }
    }
    Ok(header)
}

fn check_files(folder: &Path, files: &[(&str, &[u8])]) -> Result<()> {
    let mut names = BTreeSet::from([ADAPTER_CONFIG, ADAPTER_WEIGHTS]);
    for (name, _) in files {
        check_name(name).map_err(|reason| Error::checkpoint(folder, format!("what to write {reason}")))?;
        if !names.insert(name) {
            return Err(Error::checkpoint(folder, format!("the file `{}` would be written twice", show_name(name))));
        }
    }
    Ok(())
}
