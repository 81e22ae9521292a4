//! The calls through which everything is written, so that tests can put a file system that fails in the place of the disk.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A link, or something stranger.
    Other,
}

/// A file system. [`super::Disk`] is the real one.
pub trait Storage: Debug + Sync {
    /// The path without links; an error if nothing is there.
    fn resolve(&self, path: &Path) -> io::Result<PathBuf>;
    /// What has this name, links not followed; an error of kind `NotFound` if nothing has.
    fn kind(&self, path: &Path) -> io::Result<Kind>;
    /// The names in a folder, in any order.
    fn list(&self, folder: &Path) -> io::Result<Vec<OsString>>;
    /// Makes a folder.
    fn create_folder(&self, path: &Path) -> io::Result<()>;
    /// Makes a file that is not there yet, readable by whom the umask lets.
    fn create_file(&self, path: &Path) -> io::Result<Box<dyn StoredFile>>;
    /// Opens a file for reading and writing.
    fn open_file(&self, path: &Path) -> io::Result<Box<dyn StoredFile>>;
    /// Gives a file or folder another name, in the place of what has that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Exchanges two names in one step.
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()>;
    /// Removes anything but a folder.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty folder.
    fn remove_folder(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a folder last through a loss of power, not what they name.
    fn sync_folder(&self, path: &Path) -> io::Result<()>;
}

/// A file of a [`Storage`] that is open for writing.
pub trait StoredFile: Debug + Send + Sync {
    /// Gives the file the mode of the one at `path`.
    fn take_mode(&self, path: &Path) -> io::Result<()>;
    /// Makes the file this long and takes the room for it now, where the file system can, so that a full disk is noticed.
    fn reserve(&self, length: u64) -> io::Result<()>;
    /// Writes as many of `bytes` at `offset` as the system takes at once.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// Reads as many bytes from `offset` on as the system gives at once; none at the end of the file.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Locks the file against other processes until it is closed; not if one of them has locked it.
    fn lock(&self) -> io::Result<bool>;
    /// Waits until the file's bytes are on the disk.
    fn sync(&self) -> io::Result<()>;
}

/// Writes all of `bytes` at `offset`.
pub(super) fn write_all_at(file: &dyn StoredFile, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write_at(bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = bytes.get(count..).unwrap_or_default();
                offset = offset.saturating_add(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Fills `bytes` from `offset` on.
pub(super) fn read_exact_at(file: &dyn StoredFile, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.read_at(bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                bytes = bytes.get_mut(count..).unwrap_or_default();
                offset = offset.saturating_add(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The bytes of a small file.
pub(super) fn read_all(file: &dyn StoredFile) -> io::Result<Vec<u8>> {
    let (mut bytes, mut block) = (Vec::new(), [0; 4096]);
    loop {
        match file.read_at(&mut block, bytes.len() as u64) {
            Ok(0) => return Ok(bytes),
            Ok(count) => bytes.extend_from_slice(block.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Removes a folder and all in it.
pub(super) fn remove_tree(storage: &dyn Storage, folder: &Path) -> io::Result<()> {
    clear(storage, folder, &BTreeSet::new())?;
    storage.remove_folder(folder)
}

/// Removes all in a folder but what is called `kept`. What cannot be removed does not keep the rest; the first error is told.
pub(super) fn clear(storage: &dyn Storage, folder: &Path, kept: &BTreeSet<&str>) -> io::Result<()> {
    let mut first = Ok(());
    let names = storage.list(folder)?;
    for name in names.iter().filter(|name| !name.to_str().is_some_and(|name| kept.contains(name))) {
        let path = folder.join(name);
        let removed = match storage.kind(&path) {
            Ok(Kind::Folder) => remove_tree(storage, &path),
            Ok(_) => storage.remove_file(&path),
            Err(error) => Err(error),
        };
        first = first.and(removed);
    }
    first
}

/// Syncs every file below `folder`, and the folders themselves.
pub(super) fn sync_tree(storage: &dyn Storage, folder: &Path) -> Result<()> {
    let refused = |path: &Path, error| Error::storage(path, "sync", error);
    for name in storage.list(folder).map_err(|error| refused(folder, error))? {
        let path = folder.join(name);
        match storage.kind(&path).map_err(|error| refused(&path, error))? {
            Kind::Folder => sync_tree(storage, &path)?,
            _ => storage.open_file(&path).and_then(|file| file.sync()).map_err(|error| refused(&path, error))?,
        }
    }
    sync_folder(storage, folder)
}

/// Makes renames in `folder` last through a loss of power.
pub(super) fn sync_folder(storage: &dyn Storage, folder: &Path) -> Result<()> {
    storage.sync_folder(folder).map_err(|error| Error::storage(folder, "sync", error))
}
