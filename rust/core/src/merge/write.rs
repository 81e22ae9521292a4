//! Writing what a merge makes.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;

use super::check::{Checked, check};
use super::subtract::{Subtracted, subtracted};
use super::unmerge::Way;
use super::{Merge, Watch, place, work};
use crate::checkpoint::{Checkpoint, digest};
use crate::error::{Error, Result};
use crate::plan::{File, Output};
use crate::writer::{FolderWriter, PositionedFile, Storage, header};

/// Bytes of output whose adapter tensors are in memory at once.
const WAVE: u64 = 64 << 20;

/// How a merge is written.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
pub struct Writing {
    /// Replace a folder that an earlier merge wrote, and no other.
    pub overwrite: bool,
    /// Wait until it is on the disk.
    pub sync: bool,
    /// Sync and note what is written each time that it is so many bytes more, keep that when the writing stops, and go on
    /// with what an earlier call kept of the same merge.
    pub resume: Option<u64>,
    /// Read back what was written, and hold it against float64 and against the base.
    pub check: bool,
    /// Keep, in a folder of the output, what it takes to undo the merge exactly.
    pub keep_restore: bool,
}

/// What was written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Written {
    /// Bytes that an earlier call had written.
    pub resumed: u64,
    /// What was found to be right, if that was asked for.
    pub checked: Option<Checked>,
    /// What a subtraction leaves open, if it is one.
    pub subtracted: Option<Subtracted>,
}

impl Merge {
    /// Writes the merged checkpoint to the folder `out`, which appears when it is whole.
    pub fn write(&self, storage: &dyn Storage, out: &Path, writing: Writing, watch: &dyn Watch) -> Result<Written> {
        let adapters = self.adapters.iter().map(|adapter| ("adapter", adapter.path.as_path()));
        let originals = self.originals.iter().map(|originals| ("base", originals.path()));
        let inputs = [("base", self.base_path.as_path())].into_iter().chain(adapters).chain(originals);
        place::check(out, &inputs.collect::<Vec<_>>())?;
        let writer = match writing.resume {
            None => FolderWriter::create(storage, out, writing.overwrite)?,
            Some(_) => FolderWriter::resume(storage, out, writing.overwrite, &self.subject()?)?,
        };
        self.copy_files(&writer)?;
        let mut written = Written::default();
        let mut write = |file: &File, header: Vec<u8>| -> Result<()> {
            let target = self.write_file(&writer, file, &header, writing.resume, watch)?;
            written.resumed += target.done();
            if writing.check {
                let checked = check(self.inputs(), file, &target, &header, watch)?;
                written.checked = Some(written.checked.unwrap_or_default().add(checked));
            }
            if self.way == Way::Subtracted {
                let subtracted = subtracted(self.inputs(), file, &target, header.len() as u64)?;
                written.subtracted = Some(written.subtracted.unwrap_or_default().add(subtracted));
            }
            Ok(())
        };
        for (index, file) in self.plan.files.iter().enumerate() {
            let metadata = self.base.files().get(index).map_or(self.base.metadata(), |shard| &shard.metadata);
            write(file, if file.same_header { self.base.read_header(index)? } else { lay_out(file, metadata)? })?;
        }
        if writing.keep_restore {
            let (file, metadata) = self.originals()?;
            write(&file, lay_out(&file, &metadata)?)?;
            self.keep_config(&writer)?;
        }
        self.base.check_unchanged()?;
        self.adapters.iter().try_for_each(|adapter| adapter.checkpoint.check_unchanged())?;
        self.originals.iter().try_for_each(Checkpoint::check_unchanged)?;
        self.write_record(&writer, &written)?;
        stop_if_interrupted(watch)?;
        writer.finish(writing.sync || writing.resume.is_some())?;
        Ok(written)
    }

    fn inputs(&self) -> work::Inputs<'_> {
        work::Inputs {
            base: &self.base,
            adapters: &self.adapters,
            originals: self.originals.as_ref(),
            allow_nonfinite: self.allow_nonfinite,
        }
    }

    /// What tells this merge from any that would write other bytes.
    fn subject(&self) -> Result<String> {
        let plan = format!("{} {} {:?} {:?}", env!("CARGO_PKG_VERSION"), self.allow_nonfinite, self.way, self.plan);
        let adapters = self.adapters.iter().map(|adapter| Ok(adapter.checkpoint.state()? + &adapter.config_text));
        let originals = self.originals.iter().map(Checkpoint::state);
        let state = self.base.state()? + &adapters.chain(originals).collect::<Result<String>>()?;
        Ok(format!("peftrs-merge {}", digest((plan + &state).as_bytes())))
    }

    /// Writes one file, and returns it.
    fn write_file(
        &self,
        writer: &FolderWriter<'_>,
        file: &File,
        start: &[u8],
        resume: Option<u64>,
        watch: &dyn Watch,
    ) -> Result<PositionedFile> {
        let bytes: usize = file.outputs.iter().map(Output::bytes).sum();
        let target = writer.create_file(&file.name, (start.len() + bytes) as u64)?;
        target.write_at(start, 0)?;
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
        Ok(target)
    }

    /// Makes and writes some tensors that follow each other in the file from `offset` on.
    fn write_wave(&self, target: &PositionedFile, wave: &[Output], offset: u64, watch: &dyn Watch) -> Result<()> {
        let inputs = self.inputs();
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

/// The header of a file that is not one of the base's.
fn lay_out(file: &File, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let rows = file.outputs.iter().map(|output| (output.name.as_str(), output.dtype, output.shape.as_slice()));
    header(&rows.collect::<Vec<_>>(), metadata)
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

pub(super) fn stop_if_interrupted(watch: &dyn Watch) -> Result<()> {
    watch.interrupted().map_or(Ok(()), |signal| Err(Error::Interrupted(signal)))
}
