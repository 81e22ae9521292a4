//! The calls of the file system in memory.

use std::ffi::OsString;
use std::io::{ErrorKind, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use peftrs_core::writer::{Kind, Storage, StoredFile};

use super::{Call, Fake, Fault, Names, Node, Open, State, Write};

impl Storage for Fake {
    fn resolve(&self, path: &Path) -> Result<PathBuf> {
        self.call(Call::Look)?.find(path).map(|_| path.to_owned())
    }

    fn kind(&self, path: &Path) -> Result<Kind> {
        let state = self.call(Call::Look)?;
        let node = state.find(path)?;
        Ok(if state.is_file(node) { Kind::File } else { Kind::Folder })
    }

    fn list(&self, folder: &Path) -> Result<Vec<OsString>> {
        let mut state = self.call(Call::Look)?;
        let node = state.find(folder)?;
        Ok(state.folder(node).0.keys().map(OsString::from).collect())
    }

    fn create_folder(&self, path: &Path) -> Result<()> {
        self.call(Call::Change)?.make(path, Node::folder()).map(drop)
    }

    fn create_file(&self, path: &Path) -> Result<Box<dyn StoredFile>> {
        let file = Node::File { live: Vec::new(), durable: Vec::new(), unsynced: Vec::new() };
        let node = self.call(Call::Change)?.make(path, file)?;
        Ok(Box::new(Open { state: Arc::clone(&self.0), node }))
    }

    fn open_file(&self, path: &Path) -> Result<Box<dyn StoredFile>> {
        let node = self.call(Call::Look)?.find(path)?;
        Ok(Box::new(Open { state: Arc::clone(&self.0), node }))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let mut state = self.call(Call::Change)?;
        let node = state.find(from)?;
        if let Ok(old) = state.find(to) {
            match &state.nodes[old] {
                Node::File { .. } if state.is_file(node) => {}
                Node::Folder { live, .. } if !state.is_file(node) && live.is_empty() => {}
                _ => return Err(ErrorKind::DirectoryNotEmpty.into()),
            }
        }
        let ((from, from_name), (to, to_name)) = (state.place(from)?, state.place(to)?);
        state.name(vec![(from, from_name, None), (to, to_name, Some(node))]);
        Ok(())
    }

    fn exchange(&self, a: &Path, b: &Path) -> Result<()> {
        let mut state = self.call(Call::Change)?;
        let nodes = (state.find(a)?, state.find(b)?);
        let ((a, a_name), (b, b_name)) = (state.place(a)?, state.place(b)?);
        state.name(vec![(a, a_name, Some(nodes.1)), (b, b_name, Some(nodes.0))]);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        self.call(Call::Remove)?.remove(path, true)
    }

    fn remove_folder(&self, path: &Path) -> Result<()> {
        self.call(Call::Remove)?.remove(path, false)
    }

    fn sync_folder(&self, path: &Path) -> Result<()> {
        let mut state = self.call(Call::Change)?;
        let synced = state.find(path)?;
        let touches = |names: &Names| names.iter().any(|(folder, ..)| *folder == synced);
        let (now, later): (Vec<Names>, Vec<Names>) = std::mem::take(&mut state.unsynced).into_iter().partition(touches);
        state.unsynced = later;
        for names in &now {
            state.keep(names);
        }
        Ok(())
    }
}

impl StoredFile for Open {
    fn take_mode(&self, path: &Path) -> Result<()> {
        State::call(&self.state, Call::Change)?.find(path).map(drop)
    }

    fn reserve(&self, length: u64) -> Result<()> {
        let mut state = State::call(&self.state, Call::Change)?;
        state.write(self.node, Write::Length(usize::try_from(length).unwrap()));
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<usize> {
        let mut state = State::call(&self.state, Call::Change)?;
        let count = match state.random.below(16) {
            0 => return Err(ErrorKind::Interrupted.into()),
            1 | 2 => 1 + state.random.below(bytes.len()),
            _ => bytes.len(),
        };
        let offset = usize::try_from(offset).unwrap();
        let mut bytes = bytes[..count].to_vec();
        if state.fault == Fault::Flip(state.calls) {
            bytes[count - 1] ^= 0x40;
        }
        state.write(self.node, Write::Bytes(offset, bytes));
        Ok(count)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<usize> {
        let mut state = State::call(&self.state, Call::Look)?;
        let (live, ..) = state.open(self.node);
        let there = live.get(usize::try_from(offset).unwrap()..).unwrap_or_default();
        let count = there.len().min(bytes.len());
        bytes[..count].copy_from_slice(&there[..count]);
        Ok(count)
    }

    fn lock(&self) -> Result<bool> {
        State::call(&self.state, Call::Look).map(|_| true)
    }

    fn sync(&self) -> Result<()> {
        let mut state = State::call(&self.state, Call::Change)?;
        let (live, durable, unsynced) = state.open(self.node);
        durable.clone_from(live);
        unsynced.clear();
        Ok(())
    }
}
