//! Stored bytes as numbers, and numbers as the bytes of a tensor.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};

use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result, show_name};

/// Writes each value of an iterator in its place, rounded to the nearest of type `dtype`.
pub fn put(dtype: Dtype, bytes: &mut [u8], values: impl Iterator<Item = f32>) {
    match dtype {
        Dtype::BF16 => fill(bytes, values, |value| bf16::from_f32(value).to_le_bytes()),
        Dtype::F16 => fill(bytes, values, |value| f16::from_f32(value).to_le_bytes()),
        _ => fill(bytes, values, f32::to_le_bytes),
    }
}

fn fill<const SIZE: usize>(bytes: &mut [u8], values: impl Iterator<Item = f32>, to: impl Fn(f32) -> [u8; SIZE]) {
    for (place, value) in bytes.chunks_exact_mut(SIZE).zip(values) {
        place.copy_from_slice(&to(value));
    }
}

/// Some bytes of a stored tensor.
pub fn read(stored: &Checkpoint, name: &str, start: usize, length: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let refused =
        |_| Error::checkpoint(stored.path(), format!("no memory for {length} bytes of `{}`", show_name(name)));
    bytes.try_reserve_exact(length).map_err(refused)?;
    bytes.resize(length, 0);
    stored.read_range(name, start as u64, &mut bytes)?;
    Ok(bytes)
}

/// Some floats of a stored tensor, from element number `start` on.
pub fn floats(stored: &Checkpoint, name: &str, start: usize, count: usize) -> Result<Vec<f32>> {
    let dtype = stored.entry(name).map_or(Dtype::F32, |entry| entry.dtype);
    Ok(widened(dtype, &read(stored, name, start * dtype.size(), count * dtype.size())?))
}

/// The values of a float tensor's bytes.
pub fn widened(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::BF16 => each(bytes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Dtype::F16 => each(bytes, |bytes| f16::from_le_bytes(bytes).to_f32()),
        _ => each(bytes, f32::from_le_bytes),
    }
}

/// One of the 32-bit words that the bytes are, or 0 past their end.
pub fn word(bytes: &[u8], place: usize) -> u32 {
    let bytes = bytes.get(4 * place..4 * place + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_le_bytes)
}

fn each<T, const SIZE: usize>(bytes: &[u8], from: impl Fn([u8; SIZE]) -> T) -> Vec<T> {
    bytes.chunks_exact(SIZE).map(|chunk| from(chunk.try_into().unwrap_or([0; SIZE]))).collect()
}

/// Tensors, or parts of them, that were read last, for formats whose weights lie across what a tile needs.
#[derive(Debug, Default)]
pub struct Recent(Mutex<VecDeque<Part>>);

/// A tensor's name, from which byte on it was read, and what was there.
type Part = (String, usize, Arc<Vec<u8>>);

impl Recent {
    /// How many bytes are kept at most, the part asked for apart.
    const MOST: usize = 128 << 20;

    /// Some bytes of a tensor.
    pub fn part(&self, stored: &Checkpoint, name: &str, start: usize, length: usize) -> Result<Arc<Vec<u8>>> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |part: &&Part| part.0 == name && part.1 == start && part.2.len() == length;
        if let Some((_, _, bytes)) = lock().iter().find(same) {
            return Ok(Arc::clone(bytes));
        }
        let bytes = Arc::new(read(stored, name, start, length)?);
        let mut kept = lock();
        kept.push_front((name.to_owned(), start, Arc::clone(&bytes)));
        let mut held = 0;
        kept.retain(|(_, _, bytes)| {
            held += bytes.len();
            held <= Self::MOST
        });
        Ok(bytes)
    }

    /// A whole tensor.
    pub fn whole(&self, stored: &Checkpoint, name: &str) -> Result<Arc<Vec<u8>>> {
        self.part(stored, name, 0, stored.bytes(name)?)
    }
}
