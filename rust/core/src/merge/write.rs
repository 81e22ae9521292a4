//! Writing what a merge makes.

use std::path::Path;

use rayon::prelude::*;

use super::{Merge, Watch, place, work};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::plan::{File, Output};
use crate::writer::{FolderWriter, PositionedFile, Storage, header};

/// Bytes of output whose adapter tensors are in memory at once.
const WAVE: usize = 64 << 20;

/// How a merge is written.
#[derive(Debug, Clone, Copy)]
pub struct Writing {
    /// Replace a folder that an earlier merge wrote, and no other.
    pub overwrite: bool,
    /// Wait until it is on the disk.
    pub sync: bool,
}

impl Merge {
    /// Writes the merged checkpoint to the folder `out`, which appears when it is whole.
    pub fn write(&self, storage: &dyn Storage, out: &Path, writing: Writing, watch: &dyn Watch) -> Result<()> {
        let Writing { overwrite, sync } = writing;
        let adapters = self.adapters.iter().map(|adapter| ("adapter", adapter.path.as_path()));
        place::check(out, &[("base", self.base_path.as_path())].into_iter().chain(adapters).collect::<Vec<_>>())?;
        let writer = FolderWriter::create(storage, out, overwrite)?;
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

    fn write_file(&self, writer: &FolderWriter<'_>, index: usize, file: &File, watch: &dyn Watch) -> Result<()> {
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
