//! Writing a whole folder that appears at once.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::storage::{Kind, Storage, StoredFile, remove_tree, sync_folder, sync_tree, write_all_at};
use super::temporary::{MadeFolders, parent, sibling};
use crate::checkpoint::check_name;
use crate::error::{Error, Result, show_name};

/// The file that tells a folder of ours, the only kind that is ever replaced.
pub const MARKER: &str = "peftrs-merge.json";

/// A folder under a temporary name beside its own, removed again unless finished.
#[derive(Debug)]
pub struct FolderWriter<'a> {
    storage: &'a dyn Storage,
    out: PathBuf,
    path: PathBuf,
    overwrite: bool,
    /// The folders above it that were made for it.
    above: MadeFolders<'a>,
    finished: bool,
}

impl<'a> FolderWriter<'a> {
    /// Makes the temporary folder. An `out` that exists has to be an empty folder or, with `overwrite`, one that holds
    /// [`MARKER`].
    pub fn create(storage: &'a dyn Storage, out: &Path, overwrite: bool) -> Result<Self> {
        // An existing folder may be named through links or as `.`; its real path has a sibling and can be renamed.
        let out = storage.resolve(out).unwrap_or_else(|_| out.to_owned());
        if out.file_name().is_none() {
            return Err(refused(&out, "cannot be written: it has no name of its own"));
        }
        check_out(storage, &out, overwrite)?;
        let above = MadeFolders::create(storage, &parent(&out))?;
        let path = sibling(&out)?;
        storage.create_folder(&path).map_err(|error| Error::storage(&out, "make the folder", error))?;
        Ok(Self { storage, out, path, overwrite, above, finished: false })
    }

    /// The temporary folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one small file. `name` may lie in folders below this one, separated by `/`; so it is in all methods.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.create_file(name, bytes.len() as u64)?.write_at(bytes, 0)
    }

    /// Makes a file of `length` bytes to be written in any order; a full disk is noticed here.
    pub fn create_file(&self, name: &str, length: u64) -> Result<PositionedFile> {
        let file = self.make(name)?;
        file.reserve(length).map_err(|error| self.refused(name, "write", error))?;
        Ok(PositionedFile { path: self.out.join(name), file })
    }

    /// Gives the folder its own name, with everything in it on the disk before if `sync`.
    pub fn finish(mut self, sync: bool) -> Result<()> {
        if self.storage.kind(&self.path.join(MARKER)).is_err() {
            self.write(MARKER, b"{}\n")?;
        }
        if sync {
            sync_tree(self.storage, &self.path)?;
            self.above.sync()?;
        }
        // Someone else may have put something there while the merge ran.
        let replaces = check_out(self.storage, &self.out, self.overwrite)?;
        if replaces {
            self.exchange()?;
        } else {
            self.rename(&self.path, &self.out)?;
        }
        if sync {
            if let Err(error) = sync_folder(self.storage, &parent(&self.out)) {
                let back = if replaces { self.exchange() } else { self.rename(&self.out, &self.path) };
                // What cannot be taken back is left: the old folder may be the one with the temporary name.
                self.finished = back.is_err();
                return Err(error);
            }
        }
        self.finished = true;
        self.above.keep();
        if replaces {
            // Only now: were the exchange lost with the power, what goes here would be gone from the old folder.
            remove_tree(self.storage, &self.path).map_err(|error| Error::storage(&self.path, "remove", error))?;
        }
        Ok(())
    }

    /// Swaps the two folders.
    fn exchange(&mut self) -> Result<()> {
        if self.storage.exchange(&self.path, &self.out).is_ok() {
            return Ok(());
        }
        let aside = sibling(&self.out)?;
        self.rename(&self.out, &aside)?;
        if let Err(error) = self.rename(&self.path, &self.out) {
            self.rename(&aside, &self.out)?;
            return Err(error);
        }
        self.path = aside;
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.storage.rename(from, to).map_err(|error| Error::storage(&self.out, "rename", error))
    }

    fn make(&self, name: &str) -> Result<Box<dyn StoredFile>> {
        for part in name.split('/') {
            check_name(part).map_err(|reason| refused(&self.out, &format!("cannot be written: {reason}")))?;
        }
        let path = self.path.join(name);
        let mut folders = MadeFolders::create(self.storage, &parent(&path))?;
        let file = self.storage.create_file(&path).map_err(|error| self.refused(name, "write", error))?;
        folders.keep();
        Ok(file)
    }

    fn refused(&self, name: &str, action: &'static str, error: io::Error) -> Error {
        Error::storage(&self.out.join(name), action, error)
    }
}

impl Drop for FolderWriter<'_> {
    fn drop(&mut self) {
        if !self.finished {
            // Whatever led here is the error worth reporting.
            let _ = remove_tree(self.storage, &self.path);
        }
    }
}

/// A file of a [`FolderWriter`] that is written in any order.
#[derive(Debug)]
pub struct PositionedFile {
    path: PathBuf,
    file: Box<dyn StoredFile>,
}

impl PositionedFile {
    /// Writes all of `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        write_all_at(&*self.file, bytes, offset).map_err(|error| Error::storage(&self.path, "write", error))
    }
}

/// Whether `out` is a folder that is to be replaced; an error if it may not be written.
fn check_out(storage: &dyn Storage, out: &Path, overwrite: bool) -> Result<bool> {
    match storage.kind(out) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::storage(out, "write", error)),
        Ok(Kind::Folder) => {}
        Ok(_) => return Err(refused(out, "exists and is not a folder; name another")),
    }
    let names = storage.list(out).map_err(|error| Error::storage(out, "list", error))?;
    if names.is_empty() {
        return Ok(true);
    }
    if !overwrite {
        return Err(refused(out, "exists and is not empty; name another folder, or overwrite it if a merge wrote it"));
    }
    if !matches!(storage.kind(&out.join(MARKER)), Ok(Kind::File)) {
        let reason = format!("is not overwritten: it holds no {MARKER}, so no merge of ours wrote it");
        return Err(refused(out, &reason));
    }
    Ok(true)
}

fn refused(out: &Path, reason: &str) -> Error {
    Error::Merge(format!("{}: {reason}", show_name(&out.to_string_lossy())))
}
