//! Writing a whole folder that appears at once.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::progress::{PROGRESS, Progress};
use super::storage::{
    Kind, Storage, StoredFile, clear, read_exact_at, remove_tree, sync_folder, sync_tree, write_all_at,
};
use super::temporary::{MadeFolders, named_sibling, parent, sibling};
use crate::checkpoint::check_name;
use crate::error::{Error, Result, show_name};

/// The file that tells a folder of ours, the only kind that is ever replaced.
pub const MARKER: &str = "peftrs-merge.json";

/// A folder under a temporary name beside its own, removed again unless finished or kept to be gone on with.
#[derive(Debug)]
pub struct FolderWriter<'a> {
    storage: &'a dyn Storage,
    out: PathBuf,
    path: PathBuf,
    overwrite: bool,
    /// The folders above it that were made for it.
    above: MadeFolders<'a>,
    progress: Option<Mutex<Progress>>,
    /// Whether the temporary folder stays.
    kept: bool,
}

impl<'a> FolderWriter<'a> {
    /// Makes the temporary folder. An `out` that exists has to be an empty folder or, with `overwrite`, one that holds
    /// [`MARKER`].
    pub fn create(storage: &'a dyn Storage, out: &Path, overwrite: bool) -> Result<Self> {
        Self::new(storage, out, overwrite, |out| {
            let path = sibling(out)?;
            storage.create_folder(&path).map(|()| path).map_err(|error| Error::storage(out, "make the folder", error))
        })
    }

    /// The same for a folder that is kept, if anything was told to [`FolderWriter::record`], when its writing stops, and
    /// gone on with by the next call for the same `out` and `subject`: one line that says what is written. Another subject
    /// starts anew.
    pub fn resume(storage: &'a dyn Storage, out: &Path, overwrite: bool, subject: &str) -> Result<Self> {
        let mut progress = None;
        let mut writer = Self::new(storage, out, overwrite, |out| {
            let path = named_sibling(out, "resume");
            match storage.create_folder(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                made => made.map_err(|error| Error::storage(out, "make the folder", error))?,
            }
            progress = Some(Progress::open(storage, &path, subject)?);
            Ok(path)
        })?;
        writer.progress = progress.map(Mutex::new);
        Ok(writer)
    }

    fn new(
        storage: &'a dyn Storage,
        out: &Path,
        overwrite: bool,
        make: impl FnOnce(&Path) -> Result<PathBuf>,
    ) -> Result<Self> {
        // An existing folder may be named through links or as `.`; its real path has a sibling and can be renamed.
        let out = storage.resolve(out).unwrap_or_else(|_| out.to_owned());
        if out.file_name().is_none() {
            return Err(refused(&out, "cannot be written: it has no name of its own"));
        }
        check_out(storage, &out, overwrite)?;
        let above = MadeFolders::create(storage, &parent(&out))?;
        let path = make(&out)?;
        Ok(Self { storage, out, path, overwrite, above, progress: None, kept: false })
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
        let done = self.progress().and_then(|progress| progress.before.get(name).copied());
        let file = match done {
            None => self.make(name)?,
            Some(_) => {
                self.storage.open_file(&self.path.join(name)).map_err(|error| self.refused(name, "write", error))?
            }
        };
        file.reserve(length).map_err(|error| self.refused(name, "write", error))?;
        Ok(PositionedFile { name: name.to_owned(), path: self.out.join(name), file, done: done.unwrap_or(0) })
    }

    /// Syncs a file whose first `bytes` bytes are written and notes it, where the folder is kept to be gone on with. What is
    /// in folders below is made anew.
    pub fn record(&self, file: &PositionedFile, bytes: u64) -> Result<()> {
        let Some(mut progress) = self.progress().filter(|_| !file.name.contains('/')) else { return Ok(()) };
        let noted = file.file.sync().and_then(|()| self.storage.sync_folder(&self.path));
        let noted = noted.and_then(|()| progress.record(&file.name, bytes));
        noted.map_err(|error| self.refused(&file.name, "sync", error))
    }

    fn progress(&self) -> Option<MutexGuard<'_, Progress>> {
        self.progress.as_ref().map(|progress| progress.lock().unwrap_or_else(PoisonError::into_inner))
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
        if self.progress.is_some() {
            let removed = self.storage.remove_file(&self.path.join(PROGRESS));
            removed.map_err(|error| self.refused(PROGRESS, "remove", error))?;
            sync_folder(self.storage, &self.path)?;
        }
        // Someone else may have put something there while the merge ran.
        let replaces = check_out(self.storage, &self.out, self.overwrite)?;
        if replaces {
            self.exchange()?;
        } else {
            self.rename(&self.path, &self.out)?;
        }
        if sync && let Err(error) = sync_folder(self.storage, &parent(&self.out)) {
            let back = if replaces { self.exchange() } else { self.rename(&self.out, &self.path) };
            // What cannot be taken back is left: the old folder may be the one with the temporary name.
            self.kept = back.is_err();
            return Err(error);
        }
        self.kept = true;
        self.above.keep();
        if replaces {
            // Only now: were the exchange lost with the power, what goes here would be gone from the old folder.
            remove_ours(self.storage, &self.path, MARKER)
                .map_err(|error| Error::storage(&self.path, "remove", error))?;
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
        let worth = self.progress().is_some_and(|progress| progress.is_any());
        if !self.kept && !worth {
            // Whatever led here is the error worth reporting.
            let _ = remove_ours(self.storage, &self.path, PROGRESS);
        }
    }
}

/// Removes a folder of ours; what tells that it is ours goes last, so that a folder that is only half gone still is.
fn remove_ours(storage: &dyn Storage, folder: &Path, last: &str) -> io::Result<()> {
    if storage.kind(&folder.join(last)).is_ok() {
        clear(storage, folder, &BTreeSet::from([last]))?;
        storage.sync_folder(folder)?;
    }
    remove_tree(storage, folder)
}

/// A file of a [`FolderWriter`] that is written in any order.
#[derive(Debug)]
pub struct PositionedFile {
    name: String,
    path: PathBuf,
    file: Box<dyn StoredFile>,
    done: u64,
}

impl PositionedFile {
    /// How many bytes from the start on an earlier run has written, which are as they should be.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Writes all of `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        write_all_at(&*self.file, bytes, offset).map_err(|error| Error::storage(&self.path, "write", error))
    }

    /// Fills `bytes` from `offset` on.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        read_exact_at(&*self.file, bytes, offset).map_err(|error| Error::storage(&self.path, "read", error))
    }
}

/// Whether `out` is a folder that is to be replaced; an error if it may not be written.
fn check_out(storage: &dyn Storage, out: &Path, overwrite: bool) -> Result<bool> {
    match storage.kind(out) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::storage(out, "write", error)),
        Ok(Kind::Folder) => {}
        Ok(_) => return Err(refused(out, "exists and is not a folder; hint: name another")),
    }
    let names = storage.list(out).map_err(|error| Error::storage(out, "list", error))?;
    if names.is_empty() {
        return Ok(true);
    }
    if !overwrite {
        return Err(refused(
            out,
            "exists and is not empty; hint: name another folder, or overwrite it (--overwrite) if a merge wrote it",
        ));
    }
    if !matches!(storage.kind(&out.join(MARKER)), Ok(Kind::File)) {
        let reason = format!(
            "is not overwritten: it holds no {MARKER}, so no merge of ours wrote it; hint: name another folder"
        );
        return Err(refused(out, &reason));
    }
    Ok(true)
}

fn refused(out: &Path, reason: &str) -> Error {
    Error::Merge(format!("{}: {reason}", show_name(&out.to_string_lossy())))
}
