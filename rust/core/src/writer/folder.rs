//! Writing a whole folder that appears at once.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::temporary::{MadeFolders, create_new, parent, reserve, sibling, sync_folder};
use crate::checkpoint::check_name;
use crate::error::{Error, Result, show_name};

/// The file that tells a folder of ours, the only kind that is ever replaced.
pub const MARKER: &str = "peftrs-merge.json";

/// A folder under a temporary name beside its own, removed again unless finished.
#[derive(Debug)]
pub struct FolderWriter {
    out: PathBuf,
    path: PathBuf,
    replaces: bool,
    made: Option<MadeFolders>,
    finished: bool,
}

impl FolderWriter {
    /// Makes the temporary folder. An `out` that exists has to be an empty folder or, with `overwrite`, one that holds
    /// [`MARKER`].
    pub fn create(out: &Path, overwrite: bool) -> Result<Self> {
        // An existing folder may be named through links or as `.`; its real path has a sibling and can be renamed.
        let out = out.canonicalize().unwrap_or_else(|_| out.to_owned());
        if out.file_name().is_none() {
            return Err(refused(&out, "cannot be written: it has no name of its own"));
        }
        let replaces = check_out(&out, overwrite)?;
        let made = MadeFolders::create(&parent(&out))?;
        let path = sibling(&out)?;
        std::fs::create_dir(&path).map_err(|error| Error::storage(&out, "make the folder", error))?;
        Ok(Self { out, path, replaces, made: Some(made), finished: false })
    }

    /// The temporary folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one small file. `name` may lie in folders below this one, separated by `/`; so it is in all methods.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        use std::io::Write;
        let mut file = self.make(name)?;
        file.write_all(bytes).map_err(|error| self.storage(name, "write", error))
    }

    /// Copies a file of elsewhere.
    pub fn copy(&self, from: &Path, name: &str) -> Result<()> {
        let (mut source, metadata) = crate::checkpoint::open_regular(from)?;
        let mut file = self.make(name)?;
        reserve(&file, metadata.len()).map_err(|error| self.storage(name, "write", error))?;
        let copied = std::io::copy(&mut source, &mut file).map_err(|error| self.storage(name, "write", error))?;
        if copied != metadata.len() {
            return Err(Error::checkpoint(from, "changed while it was copied"));
        }
        Ok(())
    }

    /// Makes a file of `length` bytes to be written in any order; a full disk is noticed here.
    pub fn create_file(&self, name: &str, length: u64) -> Result<PositionedFile> {
        let file = self.make(name)?;
        let sized = reserve(&file, length).and_then(|()| file.set_len(length));
        sized.map_err(|error| self.storage(name, "write", error))?;
        Ok(PositionedFile { path: self.out.join(name), file })
    }

    /// Gives the folder its own name, with everything in it on the disk before if `sync`.
    pub fn finish(mut self, sync: bool) -> Result<()> {
        if !self.path.join(MARKER).exists() {
            self.write(MARKER, b"{}\n")?;
        }
        if sync {
            sync_tree(&self.path)?;
        }
        // Someone else may have put something there while the merge ran.
        self.replaces = check_out(&self.out, self.replaces)?;
        if self.replaces {
            self.exchange()?;
        } else {
            self.rename(&self.path, &self.out)?;
        }
        self.finished = true;
        if sync {
            sync_folder(&parent(&self.out))?;
        }
        self.made.take().map_or(Ok(()), |made| made.keep(sync))
    }

    /// Swaps the new folder for the old one and removes that.
    fn exchange(&self) -> Result<()> {
        let old = if swap(&self.path, &self.out).is_ok() {
            self.path.clone()
        } else {
            let aside = sibling(&self.out)?;
            self.rename(&self.out, &aside)?;
            if let Err(error) = self.rename(&self.path, &self.out) {
                self.rename(&aside, &self.out)?;
                return Err(error);
            }
            aside
        };
        std::fs::remove_dir_all(&old).map_err(|error| Error::storage(&old, "remove", error))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        std::fs::rename(from, to).map_err(|error| Error::storage(&self.out, "rename", error))
    }

    fn make(&self, name: &str) -> Result<File> {
        for part in name.split('/') {
            check_name(part).map_err(|reason| refused(&self.out, &format!("cannot be written: {reason}")))?;
        }
        let path = self.path.join(name);
        let made = std::fs::create_dir_all(parent(&path)).and_then(|()| create_new(&path));
        made.map_err(|error| self.storage(name, "write", error))
    }

    fn storage(&self, name: &str, action: &'static str, error: std::io::Error) -> Error {
        Error::storage(&self.out.join(name), action, error)
    }
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Whatever led here is the error worth reporting.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// A file of a [`FolderWriter`] that is written in any order.
#[derive(Debug)]
pub struct PositionedFile {
    path: PathBuf,
    file: File,
}

impl PositionedFile {
    /// Writes all of `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        write_all_at(&self.file, bytes, offset).map_err(|error| Error::storage(&self.path, "write", error))
    }

    /// Waits until the file is on the disk.
    pub fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(|error| Error::storage(&self.path, "sync", error))
    }
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_write(bytes, offset) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = bytes.get(count..).unwrap_or_default();
                offset = offset.saturating_add(count as u64);
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether `out` is a folder of ours that is to be replaced; an error if it may not be written.
fn check_out(out: &Path, overwrite: bool) -> Result<bool> {
    match std::fs::symlink_metadata(out) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::storage(out, "write", error)),
        Ok(metadata) if !metadata.is_dir() => return Err(refused(out, "exists and is not a folder; name another")),
        Ok(_) => {}
    }
    let mut entries = std::fs::read_dir(out).map_err(|error| Error::storage(out, "list", error))?;
    if entries.next().is_none() {
        return Ok(false);
    }
    if !overwrite {
        return Err(refused(out, "exists and is not empty; name another folder, or overwrite it if a merge wrote it"));
    }
    if !out.join(MARKER).is_file() {
        let reason = format!("is not overwritten: it holds no {MARKER}, so no merge of ours wrote it");
        return Err(refused(out, &reason));
    }
    Ok(true)
}

fn refused(out: &Path, reason: &str) -> Error {
    Error::Merge(format!("{}: {reason}", show_name(&out.to_string_lossy())))
}

/// Exchanges two folders in one step, where the system can.
#[cfg(target_os = "linux")]
fn swap(a: &Path, b: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

#[cfg(not(target_os = "linux"))]
fn swap(_a: &Path, _b: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Syncs every file below `folder`, and the folders themselves.
fn sync_tree(folder: &Path) -> Result<()> {
    let refused = |error| Error::storage(folder, "sync", error);
    for entry in std::fs::read_dir(folder).map_err(refused)? {
        let entry = entry.map_err(refused)?;
        let path = entry.path();
        if entry.file_type().map_err(refused)?.is_dir() {
            sync_tree(&path)?;
        } else {
            // Opened for writing, which Windows wants; all files here are ours.
            let synced = File::options().write(true).open(&path).and_then(|file| file.sync_all());
            synced.map_err(|error| Error::storage(&path, "sync", error))?;
        }
    }
    sync_folder(folder)
}
