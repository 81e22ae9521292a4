//! Whole matrices in memory: updated in place by several threads, and restored to the bit.

use super::correction::{checksum, decode, encode};
use super::element::Element;
use super::factors::Factors;
use super::parallel::parallel;
use crate::error::{Error, Result};

/// What a correction begins with: it changes with the arithmetic and with the format.
const MAGIC: [u8; 8] = *b"peftrs 1";

/// Bytes of each block's entry in the table after that: its code's length, and the checksum of its merged values.
const ENTRY: usize = 16;

/// `weight += scaling * up @ down` in place, on so many threads at most. Returns whether all weights are finite then.
pub fn add<E: Element>(weight: &mut [E], factors: &Factors<'_, E>, threads: usize) -> Result<bool> {
    let blocks = blocks_mut(weight, factors)?;
    let finite = parallel(threads, blocks.enumerate(), |(index, block), _: &mut Scratch<E>| {
        factors.add(index * factors.block_rows(), block)
    });
    Ok(finite.into_iter().all(|finite| finite))
}

/// As [`add`]; returns also the correction from which [`restore`] makes the weight what it was.
pub fn add_keeping<E: Element>(weight: &mut [E], factors: &Factors<'_, E>, threads: usize) -> Result<(bool, Vec<u8>)> {
    let blocks = blocks_mut(weight, factors)?;
    let done = parallel(threads, blocks.enumerate(), |(index, block), scratch: &mut Scratch<E>| {
        scratch.original.clear();
        scratch.original.extend_from_slice(block);
        let finite = factors.add(index * factors.block_rows(), block);
        (finite, kept(index, &scratch.original, block, factors, &mut scratch.merged))
    });
    Ok((done.iter().all(|(finite, _)| *finite), pack(done.into_iter().map(|(_, kept)| kept))))
}

/// The correction for a weight that was merged elsewhere, with other arithmetic.
pub fn correction<E: Element>(
    original: &[E],
    merged: &[E],
    factors: &Factors<'_, E>,
    threads: usize,
) -> Result<Vec<u8>> {
    check(original.len(), factors)?;
    check(merged.len(), factors)?;
    let size = block_size(factors);
    let blocks = original.chunks(size).zip(merged.chunks(size)).enumerate();
    let done = parallel(threads, blocks, |(index, (original, merged)), scratch: &mut Scratch<E>| {
        kept(index, original, merged, factors, &mut scratch.merged)
    });
    Ok(pack(done.into_iter()))
}

/// Makes a merged weight what it was. Returns whether it is that to the bit: where the weight was changed since it was merged,
/// the update is subtracted from it and nothing is corrected.
pub fn restore<E: Element>(
    weight: &mut [E],
    factors: &Factors<'_, E>,
    correction: &[u8],
    threads: usize,
) -> Result<bool> {
    let blocks = blocks_mut(weight, factors)?;
    let damaged =
        || Error::Merge("what a merge kept to restore the weights is damaged, or of another version of peftrs".into());
    let kept = unpack(correction, blocks.len()).ok_or_else(damaged)?;
    let exact = parallel(threads, blocks.zip(kept).enumerate(), |(index, (block, kept)), _: &mut Scratch<E>| {
        let unchanged = checksum(block) == kept.checksum;
        factors.negated().add(index * factors.block_rows(), block);
        if unchanged { decode(kept.code, block).map(|()| true) } else { Ok(false) }
    });
    exact.into_iter().try_fold(true, |all, exact| Ok(exact? && all))
}

struct Scratch<E> {
    original: Vec<E>,
    merged: Merged<E>,
}

/// Room for what a merged block is restored to, and for its code.
struct Merged<E> {
    restored: Vec<E>,
    code: Vec<u8>,
}

impl<E> Default for Scratch<E> {
    fn default() -> Self {
        Self { original: Vec::new(), merged: Merged { restored: Vec::new(), code: Vec::new() } }
    }
}

/// What is kept of one block.
struct Kept<C> {
    checksum: u64,
    code: C,
}

fn kept<E: Element>(
    index: usize,
    original: &[E],
    merged: &[E],
    factors: &Factors<'_, E>,
    room: &mut Merged<E>,
) -> Kept<Vec<u8>> {
    room.restored.clear();
    room.restored.extend_from_slice(merged);
    factors.negated().add(index * factors.block_rows(), &mut room.restored);
    Kept { checksum: checksum(merged), code: encode(original, &room.restored, &mut room.code).to_vec() }
}

fn pack(blocks: impl ExactSizeIterator<Item = Kept<Vec<u8>>>) -> Vec<u8> {
    let blocks: Vec<_> = blocks.collect();
    let mut packed =
        Vec::with_capacity(MAGIC.len() + blocks.iter().map(|block| ENTRY + block.code.len()).sum::<usize>());
    packed.extend_from_slice(&MAGIC);
    for block in &blocks {
        packed.extend_from_slice(&(block.code.len() as u64).to_le_bytes());
        packed.extend_from_slice(&block.checksum.to_le_bytes());
    }
    for block in &blocks {
        packed.extend_from_slice(&block.code);
    }
    packed
}

/// What [`pack`] made of so many blocks.
fn unpack(packed: &[u8], count: usize) -> Option<Vec<Kept<&[u8]>>> {
    let (table, mut codes) = packed.strip_prefix(&MAGIC)?.split_at_checked(count.checked_mul(ENTRY)?)?;
    let (entries, _) = table.as_chunks::<8>();
    let mut blocks = Vec::with_capacity(count);
    for entry in entries.chunks_exact(2) {
        let [length, checksum] = entry else { return None };
        let (code, rest) = codes.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        blocks.push(Kept { checksum: u64::from_le_bytes(*checksum), code });
        codes = rest;
    }
    codes.is_empty().then_some(blocks)
}

fn block_size<E: Element>(factors: &Factors<'_, E>) -> usize {
    (factors.block_rows() * factors.shape().1).max(1)
}

fn check<E: Element>(found: usize, factors: &Factors<'_, E>) -> Result<()> {
    let (rows, columns) = factors.shape();
    if rows.checked_mul(columns) == Some(found) {
        return Ok(());
    }
    Err(Error::Merge(format!("a weight of {found} values does not have the shape ({rows}, {columns})")))
}

fn blocks_mut<'a, E: Element>(weight: &'a mut [E], factors: &Factors<'_, E>) -> Result<std::slice::ChunksMut<'a, E>> {
    check(weight.len(), factors)?;
    Ok(weight.chunks_mut(block_size(factors)))
}
