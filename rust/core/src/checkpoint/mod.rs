//! Reading safetensors files and folders, one file or sharded with an index.
//!
//! All headers are read and checked when a checkpoint is opened; tensor bytes are read on request, with positioned
//! reads from files that stay open. Nothing is mapped: a mapped file that another process cuts off kills this one.
//! No pickle is ever read. [`header`] says why the `safetensors` crate is the reference of the tests and not the parser.

mod find;
pub mod header;
mod index;
mod made;
mod open;
mod shard;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
use crate::kernels::values::all_finite;
use crate::threads;

pub(crate) use find::{CONFIG_DIGEST, digest};
pub use made::{Made, Make};
pub use open::{Links, parent, read_json, read_small};
pub(crate) use open::{check_name, parse_json};
pub use shard::Shard;

/// The name of an adapter's config.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// The name of a model's config.
pub const MODEL_CONFIG: &str = "config.json";

/// The name of an adapter's weights.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// How much of a tensor is read before it is looked at: it is then still in the cache nearest to the core.
const PIECE_BYTES: usize = 1 << 18;

/// Bytes of two tensors that are compared at once.
const COMPARED: usize = 1 << 20;

/// One tensor of a checkpoint.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its sizes.
    pub shape: Vec<usize>,
    file: usize,
    start: u64,
    bytes: usize,
}

impl Entry {
    /// How many bytes the tensor has.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many elements it has.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.bytes / self.dtype.size().max(1)
    }

    /// Which of [`Checkpoint::files`] holds it.
    #[must_use]
    pub fn file(&self) -> usize {
        self.file
    }

    fn check_length(&self, shard: &Shard, name: &str, bytes: &[u8]) -> Result<()> {
        if bytes.len() == self.bytes {
            return Ok(());
        }
        let (name, there, asked) = (show_name(name), self.bytes, bytes.len());
        Err(shard.fault(format!("tensor `{name}` has {there} bytes, {asked} were asked for")))
    }

    /// Where in that file its bytes start.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }
}

/// An open checkpoint whose headers have all been checked.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Arc<Vec<Shard>>,
    /// In the order of the files' names and of the bytes within a file.
    tensors: Vec<(String, Entry)>,
    /// Positions in `tensors`, sorted by name.
    by_name: Vec<usize>,
    /// What tensors are made of that are stored in another form.
    makers: Option<made::Makers>,
}

impl Checkpoint {
    /// Opens one safetensors file.
    pub fn open_file(path: &Path) -> Result<Self> {
        find::file(path)
    }

    /// Opens the weights of the adapter in `folder`.
    pub fn open_adapter(folder: &Path, links: Links) -> Result<Self> {
        find::adapter(folder, links)
    }

    /// Opens a model: one safetensors file, an index, or a folder that holds `model.safetensors`,
    /// `model.safetensors.index.json`, or else just one index or safetensors file of whatever name.
    pub fn open_model(path: &Path, links: Links) -> Result<Self> {
        find::model(path, links)
    }

    /// Puts the tensors of `files` together; `path` is what messages call the whole.
    fn assemble(path: &Path, files: Vec<(Shard, Vec<header::Row>)>) -> Result<Self> {
        let mut shards = Vec::new();
        let mut tensors = Vec::new();
        for (file, (shard, rows)) in files.into_iter().enumerate() {
            for row in rows {
                let start = shard.header_length().saturating_add(row.start);
                let bytes = usize::try_from(row.end.saturating_sub(row.start))
                    .map_err(|_| shard.fault(format!("tensor `{}` does not fit this machine", show_name(&row.name))))?;
                tensors.push((row.name, Entry { dtype: row.dtype, shape: row.shape, file, start, bytes }));
            }
            shards.push(shard);
        }
        let name_at = |&position: &usize| tensors.get(position).map(|(name, _)| name.as_str());
        let mut by_name: Vec<usize> = (0..tensors.len()).collect();
        by_name.sort_unstable_by_key(|position| (name_at(position), *position));
        let twice = by_name.windows(2).find(|pair| pair.first().and_then(name_at) == pair.last().and_then(name_at));
        if let Some(pair) = twice {
            let (mut name, mut files) = ("", Vec::new());
            for (found, entry) in pair.iter().filter_map(|&position| tensors.get(position)) {
                name = found;
                files.extend(shards.get(entry.file).map(|shard| shard.name.as_str()));
            }
            files.dedup();
            let fault = format!("tensor `{}` occurs twice, in {}", show_name(name), files.join(" and "));
            return Err(Error::checkpoint(path, fault));
        }
        Ok(Self { path: path.to_owned(), shards: Arc::new(shards), tensors, by_name, makers: None })
    }

    /// What was opened: the file, or the folder of the shards.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that it is in.
    #[must_use]
    pub fn folder(&self) -> &Path {
        if self.path.is_dir() {
            return &self.path;
        }
        parent(&self.path)
    }

    /// Every tensor's name, in the order of the files and of the bytes within them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|(name, _)| name.as_str())
    }

    /// Every tensor with its name, in the order of [`Checkpoint::names`].
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// How many tensors it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// One tensor with its name, by its place among [`Checkpoint::entries`].
    #[must_use]
    pub fn at(&self, place: usize) -> Option<(&str, &Entry)> {
        self.tensors.get(place).map(|(name, entry)| (name.as_str(), entry))
    }

    /// The tensor called `name`.
    #[must_use]
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        let found = |position: &usize| self.tensors.get(*position).map(|(name, _)| name.as_str());
        let at = self.by_name.binary_search_by_key(&Some(name), found).ok()?;
        self.by_name.get(at).and_then(|&position| self.tensors.get(position)).map(|(_, entry)| entry)
    }

    /// The free-form strings of the first file.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.shards.first().map_or(&NONE, |shard| &shard.metadata)
    }

    /// The files, in the order of their names.
    #[must_use]
    pub fn files(&self) -> &[Shard] {
        &self.shards
    }

    /// How many bytes the tensor called `name` has.
    pub fn bytes(&self, name: &str) -> Result<usize> {
        self.locate(name).map(|(_, entry)| entry.bytes)
    }

    /// The bytes of one tensor, little-endian and row-major.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let (shard, entry) = self.locate(name)?;
        let mut bytes = shard.buffer(entry.bytes, || format!("tensor `{}`", show_name(name)))?;
        self.read_into(name, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `bytes`, which has the length of the tensor, and notices if the file changed meanwhile.
    pub fn read_into(&self, name: &str, bytes: &mut [u8]) -> Result<()> {
        let (shard, entry) = self.locate(name)?;
        entry.check_length(shard, name, bytes)?;
        if self.maker(name).is_some() {
            self.read_range(name, 0, bytes)?;
            return self.check_unchanged();
        }
        shard.read_at(bytes, entry.start)?;
        shard.check_unchanged()
    }

    /// Fills many tensors at once on all threads, and says of each whether its values are finite. Each is checked piece by
    /// piece as it is read, while the piece is at hand.
    pub fn read_all(&self, wanted: &mut [(&str, &mut [u8])]) -> Result<Vec<bool>> {
        let fill = |(name, bytes): &mut (&str, &mut [u8])| -> Result<bool> {
            let (shard, entry) = self.locate(name)?;
            entry.check_length(shard, name, bytes)?;
            let (mut finite, mut at) = (true, entry.start);
            for piece in bytes.chunks_mut(PIECE_BYTES) {
                shard.read_at(piece, at)?;
                finite = finite && (!entry.dtype.is_adapter_float() || all_finite(entry.dtype, piece));
                at = at.saturating_add(piece.len() as u64);
            }
            Ok(finite)
        };
        let finite = threads::install(|| wanted.par_iter_mut().map(fill).collect())?;
        self.check_unchanged()?;
        Ok(finite)
    }

    /// Fills `bytes` from byte `offset` of the tensor. Many of these make one tensor: call
    /// [`Checkpoint::check_unchanged`] after the last.
    pub fn read_range(&self, name: &str, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let (shard, entry) = self.locate(name)?;
        let end = offset.checked_add(bytes.len() as u64).filter(|&end| end <= entry.bytes as u64);
        if end.is_none() {
            let (name, there, asked) = (show_name(name), entry.bytes, bytes.len());
            return Err(shard.fault(format!("tensor `{name}` has {there} bytes, not {asked} from byte {offset} on")));
        }
        match self.maker(name) {
            Some((stored, make)) => {
                // Both are multiples of an element's size, and lie within the tensor.
                let size = entry.dtype.size();
                let first = usize::try_from(offset).unwrap_or(entry.bytes) / size;
                make.make(stored, first..first + bytes.len() / size, bytes)
            }
            None => shard.read_at(bytes, entry.start.saturating_add(offset)),
        }
    }

    /// Whether a tensor has the same bytes as one of `other`, which has as many.
    pub(crate) fn has_bytes_of(&self, name: &str, other: &Self, other_name: &str) -> Result<bool> {
        let length = self.bytes(name)?;
        let starts: Vec<usize> = (0..length).step_by(COMPARED).collect();
        let equal = |start: &usize| -> Result<bool> {
            let mut blocks = [(); 2].map(|()| vec![0; COMPARED.min(length - start)]);
            let [first, second] = &mut blocks;
            self.read_range(name, *start as u64, first)?;
            other.read_range(other_name, *start as u64, second)?;
            Ok(first == second)
        };
        let equal: Vec<bool> = threads::install(|| starts.par_iter().map(equal).collect())?;
        Ok(equal.into_iter().all(|equal| equal))
    }

    /// The header of one of [`Checkpoint::files`] as it stands there, its length first.
    pub fn read_header(&self, file: usize) -> Result<Vec<u8>> {
        let missing = || Error::checkpoint(&self.path, format!("has no file number {file}"));
        self.shards.get(file).ok_or_else(missing)?.read_header()
    }

    /// The files' names, sizes, times of change and headers' digests: a checkpoint with other bytes has another state.
    pub(crate) fn state(&self) -> Result<String> {
        let one = |shard: &Shard| Ok(format!("{} {:?} {}\n", shard.name, shard.stamp(), digest(&shard.read_header()?)));
        self.shards.iter().map(one).collect()
    }

    /// Fails if a file was changed since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.shards.iter().try_for_each(Shard::check_unchanged)
    }

    fn locate(&self, name: &str) -> Result<(&Shard, &Entry)> {
        let found = self.entry(name).and_then(|entry| Some((self.shards.get(entry.file)?, entry)));
        found.ok_or_else(|| Error::checkpoint(&self.path, format!("has no tensor `{}`", show_name(name))))
    }
}
