//! Files and folders under a temporary name, gone again unless they are given their own.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What follows the name in a temporary name; random digits come after it.
pub(crate) const TEMPORARY: &str = ".tmp-";

/// A name beside `path` that nothing has yet, most likely.
pub(super) fn sibling(path: &Path) -> Result<PathBuf> {
    let refused = |error: getrandom::Error| Error::storage(path, "name a temporary sibling of", error.into());
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!("{TEMPORARY}{:016x}", getrandom::u64().map_err(refused)?));
    Ok(path.with_file_name(name))
}

/// A file that has its final name only after [`TemporaryFile::publish`].
pub(super) struct TemporaryFile {
    target: PathBuf,
    path: PathBuf,
    file: File,
    keep: bool,
}

impl TemporaryFile {
    /// Makes a sibling of `target` with room for `length` bytes and the mode of the file it will replace, if any.
    pub(super) fn create(target: &Path, length: u64) -> Result<Self> {
        let path = sibling(target)?;
        let file = create_new(&path).map_err(|error| Error::storage(target, "write", error))?;
        let made = Self { target: target.to_owned(), path, file, keep: false };
        made.take_mode()?;
        reserve(&made.file, length).map_err(|error| made.refused("write", error))?;
        Ok(made)
    }

    fn refused(&self, action: &'static str, error: std::io::Error) -> Error {
        Error::storage(&self.target, action, error)
    }

    fn take_mode(&self) -> Result<()> {
        match std::fs::symlink_metadata(&self.target) {
            Ok(old) if old.is_file() => {
                self.file.set_permissions(old.permissions()).map_err(|error| self.refused("set the mode of", error))
            }
            Ok(old) if old.is_dir() => {
                Err(Error::checkpoint(&self.target, "is a folder where a file is to be written"))
            }
            // A link is replaced, not followed.
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.refused("write", error)),
        }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| self.refused("write", error))
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| self.refused("sync", error))
    }

    /// Leaves the file under its temporary name if it never gets its own.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }

    pub(super) fn publish(mut self) -> Result<()> {
        std::fs::rename(&self.path, &self.target).map_err(|error| self.refused("rename", error))?;
        self.keep = true;
        Ok(())
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.keep {
            // Whatever led here is the error worth reporting.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Folders made on the way to a path, removed again, where they are still empty, unless kept.
#[derive(Debug)]
pub(super) struct MadeFolders(Vec<PathBuf>);

impl MadeFolders {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let mut missing = Vec::new();
        for folder in path.ancestors().filter(|folder| !folder.as_os_str().is_empty()) {
            if folder.exists() {
                break;
            }
            missing.push(folder.to_owned());
        }
        let made = Self(missing);
        match std::fs::create_dir_all(path) {
            Ok(()) => Ok(made),
            Err(error) => Err(Error::storage(path, "make the folder", error)),
        }
    }

    /// Keeps the folders, and syncs what names them.
    pub(super) fn keep(mut self, sync: bool) -> Result<()> {
        let made = std::mem::take(&mut self.0);
        if sync {
            made.iter().try_for_each(|folder| sync_folder(&parent(folder)))?;
        }
        Ok(())
    }
}

impl Drop for MadeFolders {
    fn drop(&mut self) {
        for folder in &self.0 {
            let _ = std::fs::remove_dir(folder);
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

/// Makes a file that is not there yet, readable by whom the umask lets.
pub(super) fn create_new(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

/// Takes the room for `length` bytes now, so that a full disk is noticed before any work is done.
#[cfg(target_os = "linux")]
pub(super) fn reserve(file: &File, length: u64) -> std::io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::{Errno, retry_on_intr};
    if length == 0 {
        return Ok(());
    }
    match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, length)) {
        // Not every file system can; there the writes themselves will tell.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        done => Ok(done?),
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn reserve(file: &File, length: u64) -> std::io::Result<()> {
    file.set_len(length)
}

/// Makes renames in `folder` last through a loss of power.
#[cfg(unix)]
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|error| Error::storage(folder, "sync", error))
}

/// Windows has no such call; its file system journals names.
#[cfg(not(unix))]
#[allow(clippy::unnecessary_wraps, reason = "the same signature as where it can fail")]
pub(super) fn sync_folder(_folder: &Path) -> Result<()> {
    Ok(())
}
