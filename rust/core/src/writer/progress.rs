//! How far the files of a folder are that is kept when its writing stops.
//!
//! A text file in that folder: the first line says what is written, each further one that so many bytes of a file are on
//! the disk, which is true before the line is written. What is left of a line that was cut off claims less, or nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use super::folder::MARKER;
use super::storage::{Storage, StoredFile, clear, read_all, sync_folder, write_all_at};
use crate::error::{Error, Result, show_name};

/// The name of the file.
pub(super) const PROGRESS: &str = "peftrs-resume.txt";

/// The open file, locked.
#[derive(Debug)]
pub(super) struct Progress {
    file: Box<dyn StoredFile>,
    length: u64,
    /// Bytes of each file, from its start on, that an earlier run left on the disk.
    pub(super) before: BTreeMap<String, u64>,
    any: bool,
}

impl Progress {
    /// Goes on with what an earlier run wrote to `folder` of the same `subject`, which is one line, or starts anew.
    ///
    /// Whatever else is in the folder is removed, if a merge wrote it.
    pub(super) fn open(storage: &dyn Storage, folder: &Path, subject: &str) -> Result<Self> {
        let first = format!("{subject}\n");
        let path = folder.join(PROGRESS);
        let there = |name: &str| storage.kind(&folder.join(name)).is_ok();
        let refused = |error| Error::storage(&path, "write", error);
        if there(PROGRESS) {
            let progress = Self::lock(storage.open_file(&path).map_err(refused)?, folder)?;
            let text = read_all(&*progress.file).map_err(refused)?;
            if let Some(lines) = text.strip_prefix(first.as_bytes()) {
                let lines = String::from_utf8_lossy(lines);
                return progress.go_on(storage, folder, text.len() as u64, &lines).map_err(refused);
            }
            // The last to go: without it, what is there would look like someone else's.
            clear(storage, folder, &BTreeSet::from([PROGRESS])).map_err(refused)?;
            sync_folder(storage, folder)?;
            storage.remove_file(&path).map_err(refused)?;
        } else if there(MARKER) {
            clear(storage, folder, &BTreeSet::from([MARKER])).map_err(refused)?;
            sync_folder(storage, folder)?;
            storage.remove_file(&folder.join(MARKER)).map_err(refused)?;
        } else if !storage.list(folder).map_err(refused)?.is_empty() {
            let folder = show_name(&folder.to_string_lossy());
            return Err(Error::Merge(format!("{folder} holds what no merge wrote; hint: move it away")));
        }
        let mut progress = Self::lock(storage.create_file(&path).map_err(refused)?, folder)?;
        progress.append(&first).map_err(refused)?;
        sync_folder(storage, folder)?;
        Ok(progress)
    }

    fn lock(file: Box<dyn StoredFile>, folder: &Path) -> Result<Self> {
        // Not every file system has locks; there two merges at once stay the user's to avoid.
        if file.lock().unwrap_or(true) {
            return Ok(Self { file, length: 0, before: BTreeMap::new(), any: false });
        }
        let folder = show_name(&folder.to_string_lossy());
        Err(Error::Merge(format!("{folder} is in use; hint: another merge is writing this output, wait for it")))
    }

    fn go_on(mut self, storage: &dyn Storage, folder: &Path, length: u64, lines: &str) -> io::Result<Self> {
        self.length = length;
        let pair =
            |line: &str| line.rsplit_once(' ').and_then(|(name, bytes)| Some((name.to_owned(), bytes.parse().ok()?)));
        self.before = lines.lines().filter_map(pair).collect();
        self.before.retain(|name, _| storage.kind(&folder.join(name)).is_ok());
        clear(storage, folder, &self.before.keys().map(String::as_str).chain([PROGRESS]).collect())?;
        if !lines.is_empty() && !lines.ends_with('\n') {
            self.append("\n")?;
        }
        Ok(self)
    }

    /// Whether anything was noted, by this run or an earlier one.
    pub(super) fn is_any(&self) -> bool {
        self.any || !self.before.is_empty()
    }

    /// Notes that `bytes` of the file called `name` are on the disk.
    pub(super) fn record(&mut self, name: &str, bytes: u64) -> io::Result<()> {
        self.any = true;
        self.append(&format!("{name} {bytes}\n"))
    }

    fn append(&mut self, text: &str) -> io::Result<()> {
        write_all_at(&*self.file, text.as_bytes(), self.length)?;
        self.length += text.len() as u64;
        self.file.sync()
    }
}
