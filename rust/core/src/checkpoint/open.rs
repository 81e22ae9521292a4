//! Opening files of a folder that a stranger may have filled: regular files only, links that stay within it only.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result, show_name};

/// Which symbolic links in a checkpoint's folder are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// Those that end in the folder itself or, in the Hugging Face cache, in the same repository (`snapshots` → `blobs`).
    Confined,
    /// All of them.
    Follow,
}

/// A folder whose files can be opened by name.
pub(crate) struct Folder {
    path: PathBuf,
    links: Links,
    /// The folder that links may not leave, without links itself.
    root: PathBuf,
    /// This folder, seen from `root`.
    below: PathBuf,
    #[cfg(target_os = "linux")]
    root_file: File,
}

impl Folder {
    /// Opens `path`; links on the way to it are the caller's own and are followed.
    pub(crate) fn open(path: &Path, links: Links) -> Result<Self> {
        let real = path.canonicalize().map_err(|error| Error::storage(path, "open", error))?;
        if !real.is_dir() {
            return Err(Error::checkpoint(path, "is not a folder"));
        }
        let root = hub_repository(&real).unwrap_or(&real).to_owned();
        let below = real.strip_prefix(&root).map(Path::to_owned).unwrap_or_default();
        Ok(Self {
            #[cfg(target_os = "linux")]
            root_file: File::open(&root).map_err(|error| Error::storage(path, "open", error))?,
            path: path.to_owned(),
            links,
            root,
            below,
        })
    }

    /// Where the file called `name` is, for messages.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The names in the folder that are Unicode, sorted. Any other cannot be the name of a file we look for.
    pub(crate) fn names(&self) -> Result<Vec<String>> {
        let refused = |error| Error::storage(&self.path, "list", error);
        let entries = std::fs::read_dir(&self.path).map_err(refused)?;
        let names: Vec<OsString> =
            entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<_, _>>().map_err(refused)?;
        let mut names: Vec<String> = names.into_iter().filter_map(|name| name.into_string().ok()).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Opens the regular file called `name`, or none if nothing has that name.
    pub(crate) fn file(&self, name: &str) -> Result<Option<(File, Metadata)>> {
        let path = self.path(name);
        check_name(name).map_err(|reason| Error::checkpoint(&self.path, reason))?;
        let opened = match self.links {
            Links::Follow => open_read(&path),
            Links::Confined => self.confined(name),
        };
        match opened {
            Ok(file) => regular(file, &path).map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound && std::fs::symlink_metadata(&path).is_err() => Ok(None),
            Err(error) if error.kind() == ErrorKind::CrossesDevices => Err(Error::checkpoint(
                &path,
                "is a link that leaves the folder; hint: put the file itself there, or allow links to be followed",
            )),
            Err(error) => Err(refused(&path, error)),
        }
    }

    /// All of a file of at most `limit` bytes, or none if nothing has that name.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let path = self.path(name);
        let Some((file, metadata)) = self.file(name)? else { return Ok(None) };
        if metadata.len() > limit {
            return Err(Error::checkpoint(&path, format!("is {} bytes; at most {limit} are read", metadata.len())));
        }
        let mut bytes = Vec::new();
        // One byte more than may be, so that a file that grows meanwhile is noticed.
        let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(|error| Error::storage(&path, "read", error))?;
        if bytes.len() as u64 != metadata.len() {
            return Err(Error::checkpoint(&path, "changed while it was read"));
        }
        Ok(Some(bytes))
    }

    #[cfg(target_os = "linux")]
    fn confined(&self, name: &str) -> std::io::Result<File> {
        use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
        use rustix::io::Errno;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let path = self.below.join(name);
        // The kernel answers EAGAIN when something is renamed while it walks.
        for _ in 0..100 {
            return match openat2(&self.root_file, &path, flags, Mode::empty(), within) {
                Ok(file) => Ok(File::from(file)),
                Err(Errno::AGAIN | Errno::INTR) => continue,
                // Kernels before 5.6, and sandboxes that do not know the call.
                Err(Errno::NOSYS | Errno::PERM) => self.confined_by_name(name),
                Err(error) => Err(error.into()),
            };
        }
        Err(Errno::AGAIN.into())
    }

    #[cfg(not(target_os = "linux"))]
    fn confined(&self, name: &str) -> std::io::Result<File> {
        self.confined_by_name(name)
    }

    /// The same where the kernel does not help: what a name leads to is looked up first, so someone who can write to
    /// the folder could swap it between the look and the opening.
    fn confined_by_name(&self, name: &str) -> std::io::Result<File> {
        let real = self.root.join(&self.below).join(name).canonicalize()?;
        if !real.starts_with(&self.root) {
            return Err(ErrorKind::CrossesDevices.into());
        }
        open_read(&real)
    }
}

/// Opens one regular file by a path that the caller chose, following links.
pub(crate) fn open_regular(path: &Path) -> Result<(File, Metadata)> {
    let file = open_read(path).map_err(|error| refused(path, error))?;
    regular(file, path)
}

/// Reads a small text file of a checkpoint's folder, such as a config: a regular file of at most `limit` bytes, or none
/// if nothing has that name.
pub fn read_small(folder: &Path, name: &str, links: Links, limit: u64) -> Result<Option<Vec<u8>>> {
    Folder::open(folder, links)?.read(name, limit)
}

/// The longest config or record of a merge that is read, in bytes.
const MAX_JSON: u64 = 64 << 20;

/// A small JSON file of a checkpoint's folder, or none if nothing has that name.
pub fn read_json(folder: &Path, name: &str, links: Links) -> Result<Option<Value>> {
    let bytes = read_small(folder, name, links, MAX_JSON)?;
    bytes.map(|bytes| parse_json(&folder.join(name), &bytes)).transpose()
}

/// The value that a JSON file's bytes are.
pub(crate) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|error| Error::checkpoint(path, format!("is not JSON: {error}")))
}

/// The folder that a file is in.
#[must_use]
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Why `name` cannot be a file of a checkpoint's folder: it has to be one component of a path on every system.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let plain = matches!(Path::new(name).components().collect::<Vec<_>>().as_slice(), [Component::Normal(_)]);
    if !plain || name.contains(['/', '\\', ':', '\0']) {
        return Err(format!("names the file `{}`, which is not a plain file name", show_name(name)));
    }
    Ok(())
}

/// What bytes that should have been a checkpoint or JSON are instead, if they are a known mishap.
pub(crate) fn mishap(head: &[u8]) -> Option<&'static str> {
    let text = head.trim_ascii_start();
    let starts =
        |prefix: &str| text.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes()));
    if head.is_empty() {
        Some("is empty; hint: download it again")
    } else if starts("version https://git-lfs") {
        Some("is a Git LFS pointer, not the file itself; hint: fetch it with `git lfs pull`")
    } else if starts("<!doctype") || starts("<html") || starts("<?xml") {
        Some("is a web page, not the file itself; hint: download it again, logged in if the repository asks for it")
    } else if starts("PK\u{3}\u{4}") || is_pickle(head) {
        Some(
            "is a pickle by its content, which is never loaded; hint: save the tensors with safetensors.torch.save_file",
        )
    } else {
        None
    }
}

/// Whether these are the first bytes of a pickle. A safetensors file may start with the same two, as the length of its header.
fn is_pickle(head: &[u8]) -> bool {
    matches!(head, [0x80, 2..=5, ..]) && head.get(8) != Some(&b'{')
}

/// The folder of a Hugging Face cache's repository that `real` is a snapshot of.
fn hub_repository(real: &Path) -> Option<&Path> {
    let snapshots = real.ancestors().find(|folder| folder.file_name().is_some_and(|name| name == "snapshots"))?;
    snapshots.parent().filter(|repository| repository.join("blobs").is_dir())
}

#[cfg(unix)]
fn open_read(path: &Path) -> std::io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    // A pipe that no one writes to would block the opening for ever.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

#[cfg(not(unix))]
fn open_read(path: &Path) -> std::io::Result<File> {
    File::open(path)
}

fn regular(file: File, path: &Path) -> Result<(File, Metadata)> {
    let metadata = file.metadata().map_err(|error| Error::storage(path, "read", error))?;
    if !metadata.is_file() {
        return Err(not_regular(path, metadata.is_dir()));
    }
    Ok((file, metadata))
}

fn not_regular(path: &Path, is_folder: bool) -> Error {
    let kind = if is_folder { "is a folder, not a file" } else { "is not a regular file" };
    Error::checkpoint(path, kind)
}

fn refused(path: &Path, error: std::io::Error) -> Error {
    // Sockets, and folders on some systems, already fail to open; say what they are, not what the kernel calls it.
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => not_regular(path, metadata.is_dir()),
        _ => Error::storage(path, "open", error),
    }
}

#[cfg(all(test, unix))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    /// Where the kernel confines links, the way around it is not taken by the other tests.
    #[test]
    fn links_are_confined_without_the_kernels_help() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(folder.path().join("secret"), "").unwrap();
        std::fs::write(inside.join("file"), "").unwrap();
        std::os::unix::fs::symlink("../secret", inside.join("out")).unwrap();
        std::os::unix::fs::symlink("file", inside.join("within")).unwrap();
        let opened = Folder::open(&inside, Links::Confined).unwrap();
        assert!(opened.confined_by_name("file").is_ok() && opened.confined_by_name("within").is_ok());
        assert_eq!(opened.confined_by_name("out").unwrap_err().kind(), ErrorKind::CrossesDevices);
        assert_eq!(opened.confined_by_name("none").unwrap_err().kind(), ErrorKind::NotFound);
    }
}
