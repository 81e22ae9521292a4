//! The values of one output tensor, a tile at a time: read, changed in place, checked.

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};

use super::matrices::Matrices;
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};
use crate::kernels::values::widen;
use crate::kernels::{Element, Wide};
use crate::plan::{Adapter, Output, Source};

/// Bytes of a tile that is only copied.
const COPIED: usize = 1 << 19;

/// What the work on a merge reads from.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// The base.
    pub base: &'a Checkpoint,
    /// The adapters, which updates name by their position.
    pub adapters: &'a [Adapter],
    /// The tensors as they were before a merge, where one is undone.
    pub originals: Option<&'a Checkpoint>,
    /// Accept values that are infinite or NaN.
    pub allow_nonfinite: bool,
}

impl<'a> Inputs<'a> {
    /// One of the adapters.
    pub(super) fn adapter(self, index: usize) -> Result<&'a Adapter> {
        self.adapters.get(index).ok_or_else(|| Error::Merge(format!("there is no adapter number {index}")))
    }

    /// Where the values of an output are before its updates: the tensor of that name there.
    pub(super) fn source(self, output: &'a Output) -> Result<(&'a Checkpoint, &'a str)> {
        Ok(match &output.source {
            Source::Base(name) => (self.base, name),
            Source::Adapter(index, key) => (&self.adapter(*index)?.checkpoint, key),
            Source::Original(name) => {
                let missing = || Error::Merge(format!("there is no original of {}", show_name(name)));
                (self.originals.ok_or_else(missing)?, name)
            }
        })
    }
}

/// The making of one output tensor.
pub trait Work: Send + Sync {
    /// Byte ranges of the tensor that can be made in any order.
    fn tiles(&self) -> Vec<Range<usize>>;
    /// Makes the bytes of one of them and hands them on.
    fn make(&self, tile: &Range<usize>, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>;
}

/// What it takes to make `output`; the adapters' tensors for it are in memory afterwards.
pub fn prepare<'a>(inputs: Inputs<'a>, output: &'a Output) -> Result<Box<dyn Work + 'a>> {
    let values = Values::new(inputs, output)?;
    if output.updates.is_empty() && values.dtype == output.dtype {
        return Ok(Box::new(Copied { values, bytes: output.bytes() }));
    }
    match output.dtype {
        Dtype::BF16 => Ok(Box::new(Matrices::<bf16>::new(inputs, output, values)?)),
        Dtype::F16 => Ok(Box::new(Matrices::<f16>::new(inputs, output, values)?)),
        Dtype::F32 => Ok(Box::new(Matrices::<f32>::new(inputs, output, values)?)),
        other => Err(Error::Merge(format!("{} of type {} cannot be changed", show_name(&output.name), other.name()))),
    }
}

/// Buffers that each thread keeps from tile to tile; of u64, so that every element type is aligned.
#[derive(Default)]
pub(super) struct Scratch {
    pub values: Vec<u64>,
    pub sums: Vec<u64>,
    pub more: Vec<u64>,
}

thread_local! {
    pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The first `count` elements of `buffer`, which grows to hold them.
pub(super) fn room<T: bytemuck::Pod>(buffer: &mut Vec<u64>, count: usize) -> Result<&mut [T]> {
    let words = (count * size_of::<T>()).div_ceil(size_of::<u64>());
    if words > buffer.len() {
        let more = buffer.try_reserve_exact(words - buffer.len());
        more.map_err(|_| Error::Merge(format!("no memory for a block of {} bytes", words * size_of::<u64>())))?;
        buffer.resize(words, 0);
    }
    Ok(bytemuck::cast_slice_mut::<u64, T>(buffer).get_mut(..count).unwrap_or_default())
}

/// Where an output's values are before its updates.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    checkpoint: &'a Checkpoint,
    name: &'a str,
    dtype: Dtype,
}

impl<'a> Values<'a> {
    pub fn new(inputs: Inputs<'a>, output: &'a Output) -> Result<Self> {
        let (checkpoint, name) = inputs.source(output)?;
        let dtype = checkpoint.entry(name).map_or(output.dtype, |entry| entry.dtype);
        Ok(Self { checkpoint, name, dtype })
    }

    /// Whether they are stored in the type in which they are written.
    pub fn are<E: Element>(&self) -> bool {
        self.dtype == E::DTYPE
    }

    /// Fills `values` from the tensor's element number `first` on; they have the same type.
    pub fn read<E: Element>(&self, first: usize, values: &mut [E]) -> Result<()> {
        let offset = (first * self.dtype.size()) as u64;
        self.checkpoint.read_range(self.name, offset, bytemuck::cast_slice_mut(values))
    }

    /// Fills `sums` from element number `first` on, whatever the type.
    pub fn read_wide<W: Wide>(&self, first: usize, sums: &mut [W]) -> Result<()> {
        let mut bytes = vec![0; sums.len() * self.dtype.size()];
        self.checkpoint.read_range(self.name, (first * self.dtype.size()) as u64, &mut bytes)?;
        sums.copy_from_slice(&widen::<W>(self.dtype, &bytes)?);
        Ok(())
    }
}

/// A tensor that is written as it was read.
struct Copied<'a> {
    values: Values<'a>,
    bytes: usize,
}

impl Work for Copied<'_> {
    fn tiles(&self) -> Vec<Range<usize>> {
        (0..self.bytes).step_by(COPIED).map(|start| start..self.bytes.min(start + COPIED)).collect()
    }

    fn make(&self, tile: &Range<usize>, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        SCRATCH.with_borrow_mut(|scratch| {
            let bytes = room::<u8>(&mut scratch.values, tile.len())?;
            self.values.checkpoint.read_range(self.values.name, tile.start as u64, bytes)?;
            take(bytes)
        })
    }
}
