//! One open safetensors file.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::find::digest;
use super::header::{self, Row};
use super::open::mishap;
use crate::error::{Error, Result};

/// Bytes of the number that a file starts with, the length of its header.
const PREFIX: u64 = 8;

/// Blocks of a file that stand for all of it, and the bytes of each.
const SAMPLED: (u64, u64) = (16, 4096);

/// One file of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    /// The name of the file in its folder.
    pub name: String,
    /// The header's free-form strings.
    pub metadata: BTreeMap<String, String>,
    path: PathBuf,
    file: File,
    header_length: u64,
    stamp: Stamp,
}

/// What changes when someone writes to a file. The file stays open, so it cannot become another one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    length: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn new(metadata: &Metadata) -> Self {
        Self { length: metadata.len(), modified: metadata.modified().ok() }
    }
}

impl Shard {
    /// Reads and checks the header of an open regular file.
    pub(super) fn open(path: &Path, file: File, metadata: &Metadata) -> Result<(Self, Vec<Row>)> {
        let mut shard = Self {
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            metadata: BTreeMap::new(),
            path: path.to_owned(),
            file,
            header_length: 0,
            stamp: Stamp::new(metadata),
        };
        shard.header_length = shard.measure_header()?;
        let whole = shard.read_header()?;
        let json = whole.get(8..).unwrap_or_default();
        let data_length = shard.length().saturating_sub(shard.header_length);
        let header = header::parse(json, data_length).map_err(|reason| shard.fault(reason))?;
        shard.metadata = header.metadata;
        Ok((shard, header.tensors))
    }

    /// The length that the file gives for its header and the number before it, if it can be true.
    fn measure_header(&self) -> Result<u64> {
        let length = self.length();
        let mut head = self.buffer(usize::try_from(length.min(64)).unwrap_or(0), || "the start of the file".into())?;
        self.read_at(&mut head, 0)?;
        if let Some(what) = mishap(&head) {
            return Err(self.fault(what));
        }
        let Some(prefix) = head.first_chunk() else {
            return Err(
                self.fault(format!("is {length} bytes, too short for a safetensors file; hint: download it again"))
            );
        };
        let json = u64::from_le_bytes(*prefix);
        if json > header::MAX_LENGTH {
            let most = header::MAX_LENGTH;
            return Err(self
                .fault(format!("is no safetensors file: its header would be {json} bytes, at most {most} are read")));
        }
        let whole = json.saturating_add(PREFIX);
        if whole > length {
            return Err(self.fault(format!(
                "is cut off: its header takes {whole} bytes and the file has {length}; hint: download it again"
            )));
        }
        Ok(whole)
    }

    /// Bytes of the header and of the number before it.
    #[must_use]
    pub fn header_length(&self) -> u64 {
        self.header_length
    }

    /// Bytes of the file.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.stamp.length
    }

    /// What it was when it was opened.
    pub(super) fn stamp(&self) -> &Stamp {
        &self.stamp
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The digest of blocks spread evenly over the file, the first and the last among them: it tells files of the same tensors
    /// apart at a cost that does not grow with them.
    pub fn sampled_digest(&self) -> Result<String> {
        let (count, size) = SAMPLED;
        let size = size.min(self.length());
        let mut bytes = self.buffer(usize::try_from(count * size).unwrap_or(0), || "a sample of the file".into())?;
        for (index, block) in (0..count).zip(bytes.chunks_exact_mut(usize::try_from(size.max(1)).unwrap_or(1))) {
            self.read_at(block, (self.length() - size) / (count - 1) * index)?;
        }
        Ok(digest(&bytes))
    }

    /// A `Checkpoint` error about this file.
    pub(super) fn fault(&self, reason: impl Into<String>) -> Error {
        Error::checkpoint(&self.path, reason)
    }

    /// A buffer of `length` bytes; a size that came from a file must not abort the process when memory is short.
    pub(super) fn buffer(&self, length: usize, what: impl Fn() -> String) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let refused = |_| self.fault(format!("{} takes {length} bytes, more than there is memory for", what()));
        bytes.try_reserve_exact(length).map_err(refused)?;
        bytes.resize(length, 0);
        Ok(bytes)
    }

    pub(super) fn read_header(&self) -> Result<Vec<u8>> {
        let mut bytes =
            self.buffer(usize::try_from(self.header_length).unwrap_or(usize::MAX), || "the header".into())?;
        self.read_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    pub(super) fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        read_exact_at(&self.file, bytes, offset).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                self.fault("was cut off while it was read; hint: let nothing change it, and try again")
            }
            _ => Error::storage(&self.path, "read", error),
        })
    }

    pub(super) fn check_unchanged(&self) -> Result<()> {
        let metadata = self.file.metadata().map_err(|error| Error::storage(&self.path, "read", error))?;
        if Stamp::new(&metadata) == self.stamp {
            Ok(())
        } else {
            Err(self.fault("was changed while it was read; hint: let nothing change it, and try again"))
        }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_read(bytes, offset) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                bytes = bytes.get_mut(count..).unwrap_or_default();
                offset = offset.saturating_add(count as u64);
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
