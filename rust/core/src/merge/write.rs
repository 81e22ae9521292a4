//! Writing what a merge makes.

use std::path::Path;

use rayon::prelude::*;

use super::{Merge, Watch, place, work};
use crate::checkpoint::digest;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::plan::{File, Output};
use crate::writer::{FolderWriter, PositionedFile, Storage, header};

/// Bytes of output whose adapter tensors are in memory at once.
const WAVE: u64 = 64 << 20;

/// How a merge is written.
#[derive(Debug, Clone, Copy)]
pub struct Writing {
    /// Replace a folder that an earlier merge wrote, and no other.
    pub overwrite: bool,
    /// Wait until it is on the disk.
    pub sync: bool,
    /// Sync and note what is written each time that it is so many bytes more, keep that when the writing stops, and go on
    /// with what an earlier call kept of the same merge.
    pub resume: Option<u64>,
}

/// What was written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Written {
    /// Bytes that an earlier call had written.
    pub resumed: u64,
}

impl Merge {
    /// Writes the merged checkpoint to the folder `out`, which appears when it is whole.
    pub fn write(&self, storage: &dyn Storage, out: &Path, writing: Writing, watch: &dyn Watch) -> Result<Written> {
        let adapters = self.adapters.iter().map(|adapter| ("adapter", adapter.path.as_path()));
        place::check(out, &[("base", self.base_path.as_path())].into_iter().chain(adapters).collect::<Vec<_>>())?;
        let writer = match writing.resume {
            None => FolderWriter::create(storage, out, writing.overwrite)?,
            Some(_) => FolderWriter::resume(storage, out, writing.overwrite, &self.subject()?)?,
        };
        self.copy_files(&writer)?;
        let mut written = Written::default();
        for (index, file) in self.plan.files.iter().enumerate() {
            written.resumed += self.write_file(&writer, index, file, writing.resume, watch)?;
        }
        self.base.check_unchanged()?;
        self.adapters.iter().try_for_each(|adapter| adapter.checkpoint.check_unchanged())?;
        self.write_record(&writer)?;
        stop_if_interrupted(watch)?;
        writer.finish(writing.sync || writing.resume.is_some())?;
        Ok(written)
    }

    /// What tells this merge from any that would write other bytes.
    fn subject(&self) -> Result<String> {
        let plan = format!("{} {} {:?}", env!("CARGO_PKG_VERSION"), self.allow_nonfinite, self.plan);
        let adapters = self.adapters.iter().map(|adapter| Ok(adapter.checkpoint.state()? + &adapter.config_text));
        let state = self.base.state()? + &adapters.collect::<Result<String>>()?;
        Ok(format!("peftrs-merge {}", digest((plan + &state).as_bytes())))
    }

    /// Writes one file, and returns how many bytes of it an earlier call had written.
    fn write_file(
        &self,
        writer: &FolderWriter<'_>,
        index: usize,
        file: &File,
        resume: Option<u64>,
        watch: &dyn Watch,
    ) -> Result<u64> {
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
        let mut offset = start.len() as u64;
        let mut noted = target.done();
        for wave in waves(&file.outputs, resume.map_or(WAVE, |every| every.min(WAVE))) {
            let size: usize = wave.iter().map(Output::bytes).sum();
            let end = offset + size as u64;
            if end <= target.done() {
                watch.advance(size as u64);
            } else {
                self.write_wave(&target, wave, offset, watch)?;
            }
            offset = end;
            if resume.is_some_and(|every| end >= noted + every) {
                writer.record(&target, end)?;
                noted = end;
            }
        }
        if resume.is_some() && noted < offset {
            writer.record(&target, offset)?;
        }
        Ok(target.done())
    }

    /// Makes and writes some tensors that follow each other in the file from `offset` on.
    fn write_wave(&self, target: &PositionedFile, wave: &[Output], offset: u64, watch: &dyn Watch) -> Result<()> {
        let inputs = work::Inputs { base: &self.base, adapters: &self.adapters, allow_nonfinite: self.allow_nonfinite };
        stop_if_interrupted(watch)?;
        let works: Vec<_> = wave.par_iter().map(|output| work::prepare(inputs, output)).collect::<Result<_>>()?;
        let mut tiles = Vec::new();
        let mut start = offset;
        for (work, output) in works.iter().zip(wave) {
            tiles.extend(work.tiles().into_iter().map(|tile| (work, start, tile)));
            start += output.bytes() as u64;
        }
        tiles.into_par_iter().try_for_each(|(work, start, tile)| {
            stop_if_interrupted(watch)?;
            work.make(&tile, &mut |bytes| target.write_at(bytes, start + tile.start as u64))?;
            watch.advance(tile.len() as u64);
            Ok(())
        })
    }
}

/// `outputs` in groups that reach `size` bytes with their last member.
fn waves(outputs: &[Output], size: u64) -> impl Iterator<Item = &[Output]> {
    let mut bytes = 0;
    outputs.split_inclusive(move |output| {
        bytes += output.bytes() as u64;
        let full = bytes >= size;
        if full {
            bytes = 0;
        }
        full
    })
}

fn stop_if_interrupted(watch: &dyn Watch) -> Result<()> {
    watch.interrupted().map_or(Ok(()), |signal| Err(Error::Interrupted(signal)))
}
