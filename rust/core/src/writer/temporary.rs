//! Files and folders under a temporary name, gone again unless they are given their own.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::storage::{Kind, Storage, StoredFile, sync_folder, write_all_at};
use crate::error::{Error, Result};

/// What follows the name in a temporary name; random digits or a word come after it.
pub(crate) const TEMPORARY: &str = ".tmp-";

/// A name beside `path` that nothing has yet, most likely.
pub(super) fn sibling(path: &Path) -> Result<PathBuf> {
    let refused = |error: getrandom::Error| Error::storage(path, "name a temporary sibling of", error.into());
    Ok(named_sibling(path, &format!("{:016x}", getrandom::u64().map_err(refused)?)))
}

/// The temporary name beside `path` that ends in `end`.
pub(super) fn named_sibling(path: &Path, end: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!("{TEMPORARY}{end}"));
    path.with_file_name(name)
}

/// A file that has its final name only after [`TemporaryFile::publish`].
pub(super) struct TemporaryFile<'a> {
    storage: &'a dyn Storage,
    target: PathBuf,
    path: PathBuf,
    file: Box<dyn StoredFile>,
    written: u64,
    keep: bool,
}

impl<'a> TemporaryFile<'a> {
    /// Makes a sibling of `target` with room for `length` bytes and the mode of the file it will replace, if any.
    pub(super) fn create(storage: &'a dyn Storage, target: &Path, length: u64) -> Result<Self> {
        let refused = |error| Error::storage(target, "write", error);
        let replaces = match storage.kind(target) {
            Ok(Kind::Folder) => return Err(Error::checkpoint(target, "is a folder where a file is to be written")),
            Ok(kind) => kind == Kind::File,
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(error) => return Err(refused(error)),
        };
        let path = sibling(target)?;
        let file = storage.create_file(&path).map_err(refused)?;
        let made = Self { storage, target: target.to_owned(), path, file, written: 0, keep: false };
        // A link is replaced, not followed, so that its mode is nothing to keep.
        if replaces {
            made.file.take_mode(target).map_err(|error| made.refused("set the mode of", error))?;
        }
        made.file.reserve(length).map_err(|error| made.refused("write", error))?;
        Ok(made)
    }

    fn refused(&self, action: &'static str, error: io::Error) -> Error {
        Error::storage(&self.target, action, error)
    }

    /// Writes on.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        write_all_at(&*self.file, bytes, self.written).map_err(|error| self.refused("write", error))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync().map_err(|error| self.refused("sync", error))
    }

    /// Leaves the file under its temporary name if it never gets its own.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }

    pub(super) fn publish(mut self) -> Result<()> {
        self.storage.rename(&self.path, &self.target).map_err(|error| self.refused("rename", error))?;
        self.keep = true;
        Ok(())
    }
}

impl Drop for TemporaryFile<'_> {
    fn drop(&mut self) {
        if !self.keep {
            // Whatever led here is the error worth reporting.
            let _ = self.storage.remove_file(&self.path);
        }
    }
}

/// Folders made on the way to a path, removed again, where they are still empty, unless kept.
#[derive(Debug)]
pub(super) struct MadeFolders<'a> {
    storage: &'a dyn Storage,
    /// The deepest last.
    made: Vec<PathBuf>,
}

impl<'a> MadeFolders<'a> {
    pub(super) fn create(storage: &'a dyn Storage, path: &Path) -> Result<Self> {
        let refused = |error| Error::storage(path, "make the folder", error);
        let mut missing = Vec::new();
        for folder in path.ancestors().filter(|folder| !folder.as_os_str().is_empty()) {
            match storage.kind(folder) {
                Ok(_) => break,
                Err(error) if error.kind() == ErrorKind::NotFound => missing.push(folder),
                Err(error) => return Err(refused(error)),
            }
        }
        let mut folders = Self { storage, made: Vec::new() };
        for folder in missing.into_iter().rev() {
            match storage.create_folder(folder) {
                Ok(()) => folders.made.push(folder.to_owned()),
                // Someone else was faster.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(refused(error)),
            }
        }
        Ok(folders)
    }

    /// Syncs what names the folders.
    pub(super) fn sync(&self) -> Result<()> {
        self.made.iter().try_for_each(|folder| sync_folder(self.storage, &parent(folder)))
    }

    /// Keeps the folders.
    pub(super) fn keep(&mut self) {
        self.made.clear();
    }
}

impl Drop for MadeFolders<'_> {
    fn drop(&mut self) {
        for folder in self.made.iter().rev() {
            let _ = self.storage.remove_folder(folder);
        }
    }
}

/// The folder that holds `path`.
pub(super) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
