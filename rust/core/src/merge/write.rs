//! Writing what a merge makes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rayon::ScopeFifo;

use super::check::{Checked, check};
use super::moved::{Moved, moved, note};
use super::subtract::{Subtracted, subtracted};
use super::unmerge::Way;
use super::work::Work;
use super::{Merge, Watch, place, work};
use crate::checkpoint::{Checkpoint, digest};
use crate::error::{Error, Result};
use crate::plan::{File, Output};
use crate::threads;
use crate::writer::{FolderWriter, PositionedFile, Storage, header};

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
#[derive(Debug, Clone, Default)]
pub struct Written {
    /// Bytes that an earlier call had written.
    pub resumed: u64,
    /// What was found to be right, if that was asked for.
    pub checked: Option<Checked>,
    /// What a subtraction leaves open, if it is one.
    pub subtracted: Option<Subtracted>,
    /// How many weights changed, of a sample of each tensor that something was added to in place.
    pub moved: BTreeMap<String, Moved>,
}

impl Written {
    /// What users should know about it, if anything.
    #[must_use]
    pub fn note(&self) -> Option<String> {
        note(&self.moved)
    }
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
            written.moved.extend(moved(self.inputs(), file, &target, header.len() as u64)?);
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

    pub(super) fn inputs(&self) -> work::Inputs<'_> {
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
        for wave in waves(&file.outputs, resume.unwrap_or(u64::MAX)) {
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
        let wave = Wave { inputs: self.inputs(), target, watch, outputs: wave, failed: OnceLock::new() };
        threads::install(|| {
            rayon::in_place_scope_fifo(|scope| wave.go_on(scope, 0, offset));
            Ok(())
        })?;
        wave.failed.into_inner().map_or(Ok(()), Err)
    }
}

/// Tensors that are being made and written.
///
/// Whoever has made one ready puts its tiles into the queue, and in their middle the next tensor: no thread waits for another
/// between tensors, few of them are in memory at once, and a file is written nearly from its start to its end.
struct Wave<'a> {
    inputs: work::Inputs<'a>,
    target: &'a PositionedFile,
    watch: &'a dyn Watch,
    outputs: &'a [Output],
    failed: OnceLock<Error>,
}

impl Wave<'_> {
    /// Makes the tensor of that number, which goes to that place, ready to be written.
    fn go_on<'s>(&'s self, scope: &ScopeFifo<'s>, index: usize, offset: u64) {
        let Some(output) = self.outputs.get(index).filter(|_| self.failed.get().is_none()) else { return };
        let work: Arc<dyn Work + 's> =
            match stop_if_interrupted(self.watch).and_then(|()| work::prepare(self.inputs, output)) {
                Ok(work) => Arc::from(work),
                Err(error) => return drop(self.failed.set(error)),
            };
        let next = offset + output.bytes() as u64;
        let mut tiles = work.tiles();
        let later = tiles.split_off(tiles.len() / 2);
        let spawn = |tile: Range<usize>| {
            let work = Arc::clone(&work);
            scope.spawn_fifo(move |_| self.write(&*work, &tile, offset));
        };
        tiles.into_iter().for_each(spawn);
        scope.spawn_fifo(move |scope| self.go_on(scope, index + 1, next));
        later.into_iter().for_each(spawn);
    }

    /// Makes a tile of a tensor and writes it.
    fn write(&self, work: &dyn Work, tile: &Range<usize>, offset: u64) {
        if self.failed.get().is_some() {
            return;
        }
        let written = stop_if_interrupted(self.watch)
            .and_then(|()| work.make(tile, &mut |bytes| self.target.write_at(bytes, offset + tile.start as u64)));
        match written {
            Ok(()) => self.watch.advance(tile.len() as u64),
            // The first to fail is told.
            Err(error) => drop(self.failed.set(error)),
        }
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
