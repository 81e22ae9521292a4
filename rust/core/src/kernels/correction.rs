//! What tells the original bits of a block from those that arithmetic brings back, in few bits.
//!
//! Most elements come back as they were. Of each other one the code has the number of elements skipped before it (Rice's code),
//! the sign of its distance in steps between neighbouring values, and the distance (Elias' gamma code, one bit for a single
//! step). Any bits can be told so, NaN's payload included; where that would take more room than the elements, it has these.

use bytemuck::{Pod, cast_slice};

use super::element::Element;
use crate::error::{Error, Result};

/// The bytes before the bits of a code: the number of elements told, and the parameter of Rice's code.
const HEAD: usize = 5;

/// The code from which [`decode`] makes `original` out of `restored`, which is as long.
pub fn encode<E: Element>(original: &[E], restored: &[E]) -> Vec<u8> {
    // As integers: the two zeros differ, and NaN may be what it was.
    let masks = match size_of::<E>() {
        2 => differing::<u16>(cast_slice(original), cast_slice(restored)),
        _ => differing::<u32>(cast_slice(original), cast_slice(restored)),
    };
    let count: usize = masks.iter().map(|mask| mask.count_ones() as usize).sum();
    if count == 0 {
        return Vec::new();
    }
    let raw: &[u8] = cast_slice(original);
    let quotient = (original.len() / count).max(1).ilog2();
    let mut bits = BitWriter::default();
    bits.bytes.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
    bits.bytes.push(quotient.to_le_bytes()[0]);
    let mut next = 0;
    for (first, mask) in masks.iter().enumerate() {
        let mut mask = *mask;
        while mask != 0 {
            let at = first * 64 + mask.trailing_zeros() as usize;
            mask &= mask - 1;
            let (Some(original), Some(restored)) = (original.get(at), restored.get(at)) else { continue };
            let distance = original.order().wrapping_sub(restored.order());
            bits.gap(at - next, quotient);
            bits.put(u64::from(distance < 0), 1);
            bits.gamma(distance.unsigned_abs());
            next = at + 1;
        }
        if bits.bytes.len() >= raw.len() {
            return raw.to_vec();
        }
    }
    let code = bits.finish();
    if code.len() < raw.len() { code } else { raw.to_vec() }
}

/// Makes the original elements out of `restored`, in place. Refuses a code that was not made for as many elements.
pub fn decode<E: Element>(code: &[u8], restored: &mut [E]) -> Result<()> {
    let raw: &mut [u8] = bytemuck::cast_slice_mut(restored);
    if code.is_empty() {
        return Ok(());
    }
    if code.len() == raw.len() {
        raw.copy_from_slice(code);
        return Ok(());
    }
    apply(code, restored).ok_or_else(|| Error::Merge("what a merge kept to restore the weights is damaged".into()))
}

fn apply<E: Element>(code: &[u8], restored: &mut [E]) -> Option<()> {
    let (head, rest) = code.split_first_chunk::<HEAD>()?;
    let [count @ .., quotient] = *head;
    let mut bits = BitReader { bytes: rest, buffer: 0, filled: 0 };
    let mut values = restored.iter_mut();
    for _ in 0..u32::from_le_bytes(count) {
        let value = values.nth(bits.gap(u32::from(quotient))?)?;
        let negative = bits.take(1)? == 1;
        let distance = bits.gamma()?.cast_signed();
        let distance = if negative { distance.wrapping_neg() } else { distance };
        *value = E::from_order(value.order().wrapping_add(distance));
    }
    Some(())
}

/// For each 64 elements, a bit an element, set where the two differ.
fn differing<T: Pod + PartialEq>(one: &[T], other: &[T]) -> Vec<u64> {
    let mut masks = Vec::with_capacity(one.len().div_ceil(64));
    let ((ones, one), (others, other)) = (one.as_chunks::<64>(), other.as_chunks::<64>());
    let mut last = [[T::zeroed(); 64]; 2];
    for (to, from) in last.iter_mut().zip([one, other]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }
    let [one, other] = &last;
    for (one, other) in ones.iter().zip(others).chain([(one, other)]) {
        let mut flags = [0_u8; 64];
        for ((flag, one), other) in flags.iter_mut().zip(one).zip(other) {
            *flag = u8::from(one != other);
        }
        // Of each eight bytes, the lowest bits are gathered in the highest byte of the product.
        let (words, _) = flags.as_chunks::<8>();
        let gather = |word: &[u8; 8]| u64::from_le_bytes(*word).wrapping_mul(0x0102_0408_1020_4080) >> 56;
        masks.push(words.iter().rev().fold(0, |mask, word| mask << 8 | gather(word)));
    }
    masks
}

/// A number that a change of any one element changes.
pub fn checksum<E: Pod>(values: &[E]) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |sum: u64, word: u64| (sum ^ word).wrapping_mul(FACTOR).rotate_left(29);
    let (chunks, rest) = cast_slice::<E, u8>(values).as_chunks::<64>();
    let mut lanes = [0_u64; 8];
    for chunk in chunks {
        let (words, _) = chunk.as_chunks::<8>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = mix(*lane, u64::from_le_bytes(*word));
        }
    }
    rest.iter().map(|byte| u64::from(*byte)).chain(lanes).fold(0, mix)
}

#[derive(Default)]
struct BitWriter {
    bytes: Vec<u8>,
    buffer: u64,
    filled: u32,
}

impl BitWriter {
    /// Appends the lowest `count` bits of `value`, at most 32, above which it has none.
    fn put(&mut self, value: u64, count: u32) {
        self.buffer |= value << self.filled;
        self.filled += count;
        if self.filled >= 32 {
            let [a, b, c, d, ..] = self.buffer.to_le_bytes();
            self.bytes.extend_from_slice(&[a, b, c, d]);
            self.buffer >>= 32;
            self.filled -= 32;
        }
    }

    /// So many ones, and a zero.
    fn unary(&mut self, mut count: usize) {
        while count >= 31 {
            self.put((1 << 31) - 1, 31);
            count -= 31;
        }
        self.put((1 << count) - 1, u32::try_from(count).unwrap_or(0) + 1);
    }

    fn gap(&mut self, gap: usize, quotient: u32) {
        self.unary(gap >> quotient);
        self.put((gap & ((1 << quotient) - 1)) as u64, quotient);
    }

    fn gamma(&mut self, value: u32) {
        let length = value.max(1).ilog2();
        self.unary(length as usize);
        self.put(u64::from(value) & ((1 << length) - 1), length);
    }

    fn finish(mut self) -> Vec<u8> {
        let left = self.buffer.to_le_bytes();
        self.bytes.extend(left.iter().take(self.filled.div_ceil(8) as usize));
        self.bytes
    }
}

struct BitReader<'a> {
    bytes: &'a [u8],
    buffer: u64,
    filled: u32,
}

impl BitReader<'_> {
    fn fill(&mut self) {
        if let Some(word) = self.bytes.first_chunk::<8>() {
            self.buffer |= u64::from_le_bytes(*word) << self.filled;
            let whole = (63 - self.filled) / 8;
            self.bytes = self.bytes.get(whole as usize..).unwrap_or_default();
            self.filled += whole * 8;
            // Bits beyond those counted are read again.
            self.buffer &= (1 << self.filled) - 1;
            return;
        }
        while self.filled <= 56 {
            let Some((byte, rest)) = self.bytes.split_first() else { return };
            self.buffer |= u64::from(*byte) << self.filled;
            self.filled += 8;
            self.bytes = rest;
        }
    }

    /// The next `count` bits, at most 32.
    fn take(&mut self, count: u32) -> Option<u64> {
        if self.filled < count {
            self.fill();
        }
        self.filled = self.filled.checked_sub(count)?;
        let value = self.buffer & ((1 << count) - 1);
        self.buffer >>= count;
        Some(value)
    }

    fn unary(&mut self) -> Option<usize> {
        let mut count = 0;
        loop {
            let ones = self.buffer.trailing_ones();
            if ones < self.filled {
                self.take(ones)?;
                self.take(1)?;
                return Some(count + ones as usize);
            }
            count += self.filled as usize;
            (self.buffer, self.filled) = (0, 0);
            self.fill();
            if self.filled == 0 {
                return None;
            }
        }
    }

    fn gap(&mut self, quotient: u32) -> Option<usize> {
        let high = self.unary()?.checked_shl(quotient)?;
        let low = if quotient <= 32 { self.take(quotient)? } else { return None };
        high.checked_add(usize::try_from(low).ok()?)
    }

    fn gamma(&mut self) -> Option<u32> {
        let length = u32::try_from(self.unary()?).ok().filter(|length| *length < 32)?;
        Some(1 << length | u32::try_from(self.take(length)?).ok()?)
    }
}
