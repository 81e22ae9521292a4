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

/// Bits that are written or read at once at most: beside up to seven that wait for the end of their byte, they fit 64.
const AT_ONCE: u32 = 56;

/// The code from which [`decode`] makes `original` out of `restored`, which is as long; made in `room`, whatever it held.
pub fn encode<'a, E: Element>(original: &'a [E], restored: &[E], room: &'a mut Vec<u8>) -> &'a [u8] {
    // As integers: the two zeros differ, and NaN may be what it was.
    let masks = match size_of::<E>() {
        2 => differing::<u16>(cast_slice(original), cast_slice(restored)),
        _ => differing::<u32>(cast_slice(original), cast_slice(restored)),
    };
    let raw: &[u8] = cast_slice(original);
    let count: usize = masks.iter().map(|mask| mask.count_ones() as usize).sum();
    if count == 0 {
        return &[];
    }
    let quotient = (original.len() / count).max(1).ilog2();
    room.resize(raw.len().max(HEAD) + size_of::<u64>(), 0);
    let mut bits = BitWriter { room, at: 0, buffer: 0, filled: 0 };
    bits.put(count as u64, 32);
    bits.put(u64::from(quotient), 8);
    let mut next = 0;
    for (first, mask) in masks.iter().enumerate() {
        let mut mask = *mask;
        while mask != 0 {
            let at = first * 64 + mask.trailing_zeros() as usize;
            mask &= mask - 1;
            let (Some(original), Some(restored)) = (original.get(at), restored.get(at)) else { continue };
            let distance = original.order().wrapping_sub(restored.order());
            bits.entry(Entry { gap: at - next, negative: distance < 0, distance: distance.unsigned_abs() }, quotient);
            next = at + 1;
        }
        if bits.at >= raw.len() {
            return raw;
        }
    }
    let length = bits.at + bits.filled.div_ceil(8) as usize;
    room.get(..length).filter(|code| code.len() < raw.len()).unwrap_or(raw)
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
        let Entry { gap, negative, distance } = bits.entry(u32::from(quotient))?;
        let value = values.nth(gap)?;
        let distance = distance.cast_signed();
        *value = E::from_order(value.order().wrapping_add(if negative { distance.wrapping_neg() } else { distance }));
    }
    Some(())
}

/// One element that is told.
struct Entry {
    /// Elements before it that are not.
    gap: usize,
    negative: bool,
    distance: u32,
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

struct BitWriter<'a> {
    room: &'a mut [u8],
    at: usize,
    buffer: u64,
    filled: u32,
}

impl BitWriter<'_> {
    #[inline]
    fn entry(&mut self, Entry { gap, negative, distance }: Entry, quotient: u32) {
        let (high, low) = (gap >> quotient, (gap & ((1 << quotient) - 1)) as u64);
        let length = distance.max(1).ilog2();
        let tail = u64::from(distance) & ((1 << length) - 1);
        if high + ((quotient + 2 * length) as usize) < AT_ONCE as usize - 3 {
            #[allow(clippy::cast_possible_truncation, reason = "less than 56")]
            let high = high as u32;
            let gamma = ((1 << length) - 1) | tail << (length + 1);
            let rest = low | u64::from(negative) << quotient | gamma << (quotient + 1);
            self.put(((1 << high) - 1) | rest << (high + 1), high + quotient + 2 * length + 3);
            return;
        }
        self.unary(high);
        self.put(low, quotient);
        self.put(u64::from(negative), 1);
        self.unary(length as usize);
        self.put(tail, length);
    }

    /// Appends the lowest `count` bits of `value`, at most 56, above which it has none.
    #[inline]
    fn put(&mut self, value: u64, count: u32) {
        self.buffer |= value << self.filled;
        self.filled += count;
        if let Some(to) = self.room.get_mut(self.at..self.at + size_of::<u64>()) {
            to.copy_from_slice(&self.buffer.to_le_bytes());
        }
        self.at += self.filled as usize / 8;
        self.buffer >>= self.filled / 8 * 8;
        self.filled %= 8;
    }

    /// So many ones, and a zero.
    fn unary(&mut self, mut count: usize) {
        while count >= 32 {
            self.put((1 << 32) - 1, 32);
            count -= 32;
        }
        self.put((1 << count) - 1, u32::try_from(count).unwrap_or(0) + 1);
    }
}

struct BitReader<'a> {
    bytes: &'a [u8],
    buffer: u64,
    filled: u32,
}

impl BitReader<'_> {
    #[inline]
    fn entry(&mut self, quotient: u32) -> Option<Entry> {
        self.fill();
        let high = self.buffer.trailing_ones();
        if high + quotient < AT_ONCE - 3 {
            let rest = self.buffer >> (high + 1);
            let gamma = rest >> (quotient + 1);
            let length = gamma.trailing_ones();
            let count = high + quotient + 2 * length + 3;
            if count <= self.filled.min(AT_ONCE) && length < 32 {
                self.buffer >>= count;
                self.filled -= count;
                let gap = u64::from(high) << quotient | rest & ((1 << quotient) - 1);
                let distance = 1 << length | gamma >> (length + 1) & ((1 << length) - 1);
                #[allow(clippy::cast_possible_truncation, reason = "at most 32 bits were kept")]
                let distance = distance as u32;
                return Some(Entry { gap: usize::try_from(gap).ok()?, negative: rest >> quotient & 1 == 1, distance });
            }
        }
        let high = self.unary()?;
        let low = if quotient < usize::BITS { usize::try_from(self.take(quotient)?).ok()? } else { return None };
        let negative = self.take(1)? == 1;
        let length = u32::try_from(self.unary()?).ok().filter(|length| *length < 32)?;
        let distance = 1 << length | u32::try_from(self.take(length)?).ok()?;
        Some(Entry { gap: high.checked_mul(1 << quotient)?.checked_add(low)?, negative, distance })
    }

    /// Reads bits until there are at least 56, or none left to read.
    #[inline]
    fn fill(&mut self) {
        if let Some(word) = self.bytes.first_chunk::<8>() {
            let whole = (63 - self.filled) / 8;
            self.buffer |= u64::from_le_bytes(*word) << self.filled;
            self.bytes = self.bytes.get(whole as usize..).unwrap_or_default();
            self.filled += whole * 8;
            // Bits beyond those counted are read again.
            self.buffer &= (1 << self.filled) - 1;
            return;
        }
        while self.filled < AT_ONCE {
            let Some((byte, rest)) = self.bytes.split_first() else { return };
            self.buffer |= u64::from(*byte) << self.filled;
            self.filled += 8;
            self.bytes = rest;
        }
    }

    /// The next `count` bits, at most 56.
    fn take(&mut self, count: u32) -> Option<u64> {
        if self.filled < count {
            self.fill();
        }
        self.filled = self.filled.checked_sub(count)?;
        let value = self.buffer & ((1_u64.checked_shl(count)?) - 1);
        self.buffer >>= count;
        Some(value)
    }

    /// How many ones come before the next zero.
    fn unary(&mut self) -> Option<usize> {
        let mut count = 0;
        loop {
            let ones = self.buffer.trailing_ones();
            if ones < self.filled {
                self.take(ones + 1)?;
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
}
