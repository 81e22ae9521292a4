//! Merging an adapter into a checkpoint on disk, a block of rows at a time.
//!
//! The output has the base's files, with the same names, order and types. Blocks are read, changed and written at their
//! final place by all threads at once, so the memory needed does not grow with the model.

mod files;
mod matrices;
mod place;
mod steps;
mod turn;
pub mod work;

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, Links, read_small};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::plan::{Adapter, File, Options, Output, Plan};
use crate::writer::{FolderWriter, PositionedFile, header};

/// Bytes of output whose adapter tensors are in memory at once.
const WAVE: usize = 64 << 20;

/// The longest `config.json` that is read, in bytes.
const MAX_CONFIG: u64 = 16 << 20;

/// Someone who follows a merge and may stop it; called from several threads.
pub trait Watch: Sync {
    /// So many more bytes of tensors are written.
    fn advance(&self, bytes: u64);
    /// The number of the signal that asks for an end, if one came.
    fn interrupted(&self) -> Option<i32>;
}

/// What is accepted of the inputs.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Which links in their folders are followed.
    pub links: Links,
    /// Whether weights may be infinite or NaN.
    pub allow_nonfinite: bool,
}

/// A merge that has been planned and checked in full.
#[derive(Debug)]
pub struct Merge {
    base_path: PathBuf,
    base: Checkpoint,
    adapters: Vec<Adapter>,
    model: Option<Value>,
    plan: Plan,
    links: Links,
    allow_nonfinite: bool,
}

impl Merge {
    /// Opens the model at `base` (a folder, an index or one safetensors file) and the adapters' folders, each with what its
    /// change is multiplied by, and plans.
    pub fn open(base: &Path, adapters: &[(PathBuf, f64)], settings: Settings) -> Result<Self> {
        let Settings { links, allow_nonfinite } = settings;
        let base_path = base.to_owned();
        let adapters: Vec<Adapter> =
            adapters.iter().map(|(path, weight)| Adapter::open(path, *weight, links)).collect::<Result<_>>()?;
        let base = Checkpoint::open_model(base, links)?;
        let folder = files::folder_of(&base_path);
        let model = read_small(&folder, files::MODEL_CONFIG, links, MAX_CONFIG)?;
        let model = model.map(|bytes| files::parse(&folder.join(files::MODEL_CONFIG), &bytes)).transpose()?;
        let plan = Plan::new(&base, &adapters, Options { model: model.as_ref(), allow_nonfinite })?;
        Ok(Self { base_path, base, adapters, model, plan, links, allow_nonfinite })
    }

    /// What it will do.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Writes the merged checkpoint to the folder `out`, which appears when it is whole.
    ///
    /// `overwrite` replaces a folder that an earlier merge wrote, and no other. `sync` waits for the disk.
    pub fn write(&self, out: &Path, overwrite: bool, sync: bool, watch: &dyn Watch) -> Result<()> {
        let adapters = self.adapters.iter().map(|adapter| ("adapter", adapter.path.as_path()));
        place::check(out, &[("base", self.base_path.as_path())].into_iter().chain(adapters).collect::<Vec<_>>())?;
        let writer = FolderWriter::create(out, overwrite)?;
        self.copy_files(&writer)?;
        for (index, file) in self.plan.files.iter().enumerate() {
            self.write_file(&writer, index, file, watch)?;
        }
        self.base.check_unchanged()?;
        self.adapters.iter().try_for_each(|adapter| adapter.checkpoint.check_unchanged())?;
        self.write_record(&writer)?;
        stop_if_interrupted(watch)?;
        writer.finish(sync)
    }

    fn write_file(&self, writer: &FolderWriter, index: usize, file: &File, watch: &dyn Watch) -> Result<()> {
        let start = if file.same_header {
            self.base.read_header(index)?
        } else {
            let tensors: Vec<(&str, Dtype, &[usize])> = file
                .outputs
                .iter()
                .map(|output| (output.name.as_str(), output.dtype, output.shape.as_slice()))
                .collect();
            let shard = self.base.files().get(index);
            header(&tensors, shard.map_or(self.base.metadata(), |shard| &shard.metadata))?
        };
        let bytes: usize = file.outputs.iter().map(Output::bytes).sum();
        let target = writer.create_file(&file.name, (start.len() + bytes) as u64)?;
        target.write_at(&start, 0)?;
        let mut offset = start.len();
        let (mut wave, mut size) = (Vec::new(), 0);
        for output in &file.outputs {
            wave.push((output, offset as u64));
            offset += output.bytes();
            size += output.bytes();
            if size >= WAVE {
                self.write_wave(&target, &wave, watch)?;
                wave.clear();
                size = 0;
            }
        }
        self.write_wave(&target, &wave, watch)
    }

    /// Makes and writes some tensors, each at its place in the file.
    fn write_wave(&self, target: &PositionedFile, wave: &[(&Output, u64)], watch: &dyn Watch) -> Result<()> {
        let inputs = work::Inputs { base: &self.base, adapters: &self.adapters, allow_nonfinite: self.allow_nonfinite };
        stop_if_interrupted(watch)?;
        let works: Vec<_> = wave.par_iter().map(|(output, _)| work::prepare(inputs, output)).collect::<Result<_>>()?;
        let tiles: Vec<_> = works
            .iter()
            .zip(wave)
            .flat_map(|(work, (_, offset))| work.tiles().into_iter().map(move |tile| (work, *offset, tile)))
            .collect();
        tiles.into_par_iter().try_for_each(|(work, offset, tile)| {
            stop_if_interrupted(watch)?;
            work.make(&tile, &mut |bytes| target.write_at(bytes, offset + tile.start as u64))?;
            watch.advance(tile.len() as u64);
            Ok(())
        })
    }
}

fn stop_if_interrupted(watch: &dyn Watch) -> Result<()> {
    watch.interrupted().map_or(Ok(()), |signal| Err(Error::Interrupted(signal)))
}
