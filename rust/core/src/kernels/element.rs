//! The number types of weights, and those in which their updates are accumulated.

use half::{bf16, f16};

use crate::dtype::Dtype;

/// A float in which updates are accumulated: f32 or f64.
pub trait Wide:
    bytemuck::Pod + Send + Sync + Into<f64> + std::ops::Add<Output = Self> + std::ops::Mul<Output = Self>
{
    /// The nearest value to `value`.
    fn from_f64(value: f64) -> Self;
    /// `self * factor + term`, rounded once.
    #[must_use]
    fn mul_add(self, factor: Self, term: Self) -> Self;
}

impl Wide for f32 {
    #[allow(clippy::cast_possible_truncation, reason = "rounding to nearest is what is asked for")]
    fn from_f64(value: f64) -> Self {
        value as Self
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        self.mul_add(factor, term)
    }
}

impl Wide for f64 {
    fn from_f64(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        self.mul_add(factor, term)
    }
}

/// An element of a weight that can be updated: f32, f16 or bf16.
pub trait Element: bytemuck::Pod + PartialEq + Send + Sync {
    /// The type in which its updates are accumulated.
    type Wide: super::lanes::Vectors;
    /// Its type in a checkpoint.
    const DTYPE: Dtype;

    /// Widens `from` exactly into `to`, which is as long.
    fn widen(from: &[Self], to: &mut [Self::Wide]);
    /// Rounds `from` to nearest even into `to`, which is as long; a NaN stays one, quiet.
    fn round(from: &[Self::Wide], to: &mut [Self]);
    /// Its place among all values of its type from the least to the greatest, the two zeros apart.
    fn order(self) -> i32;
    /// The element at that place, counted modulo the size of the type.
    fn from_order(order: i32) -> Self;
}

impl Element for bf16 {
    type Wide = f32;
    const DTYPE: Dtype = Dtype::BF16;

    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }

    #[inline(always)]
    fn round(from: &[f32], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            let bits = from.to_bits();
            let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
            let quiet = bits | 0x40_0000;
            // A select rather than the early return of `bf16::from_f32`, which would keep the loop from being vectorised.
            let chosen = if from.is_nan() { quiet } else { nearest };
            *to = Self::from_bits((chosen >> 16) as u16);
        }
    }

    #[inline(always)]
    fn order(self) -> i32 {
        order_16(self.to_bits())
    }

    #[inline(always)]
    fn from_order(order: i32) -> Self {
        Self::from_bits(bits_16(order))
    }
}

impl Element for f16 {
    // With float32 sums, one of 8,192 lies exactly between two elements though the true sum does not, and is rounded the
    // wrong way half of the time: 0.006 % of weights even where the sums have no error of their own.
    type Wide = f64;
    const DTYPE: Dtype = Dtype::F16;

    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f64]) {
        for (to, from) in to.iter_mut().zip(from) {
            let bits = u32::from(from.to_bits());
            // The exponent's bias grows by 112, by a multiplication since subnormal numbers become normal ones.
            let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
            let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
            *to = f64::from(f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16));
        }
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the bits that are cut off have gone into the lowest one left")]
    fn round(from: &[f64], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            let bits = f32_to_odd(*from).to_bits();
            let magnitude = bits & 0x7fff_ffff;
            let normal = magnitude.wrapping_add(0xfff + (magnitude >> 13 & 1)).wrapping_sub(112 << 23) >> 13;
            // Adding 0.5 leaves the bits of a multiple of 2^-24 at the end of the sum, rounded to nearest even.
            let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
            let finite = if magnitude < 113 << 23 { subnormal } else { normal.min(0x7c00) };
            let nan = 0x7e00 | (bits >> 13 & 0x3ff);
            let chosen = if magnitude > 0x7f80_0000 { nan } else { finite };
            *to = Self::from_bits((chosen | bits >> 16 & 0x8000) as u16);
        }
    }

    #[inline(always)]
    fn order(self) -> i32 {
        order_16(self.to_bits())
    }

    #[inline(always)]
    fn from_order(order: i32) -> Self {
        Self::from_bits(bits_16(order))
    }
}

impl Element for f32 {
    type Wide = f64;
    const DTYPE: Dtype = Dtype::F32;

    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f64]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f64::from(*from);
        }
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "rounding to nearest even is what is asked for")]
    fn round(from: &[f64], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = *from as Self;
        }
    }

    #[inline(always)]
    fn order(self) -> i32 {
        let bits = self.to_bits().cast_signed();
        bits ^ (bits >> 31 & i32::MAX)
    }

    #[inline(always)]
    fn from_order(order: i32) -> Self {
        Self::from_bits((order ^ (order >> 31 & i32::MAX)).cast_unsigned())
    }
}

/// `value` in float32, cut off after its last bit there, which is set if anything was: a later rounding to fewer bits then
/// goes the way that it would have gone from `value`.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "what is left is a float32, but for those too large or too small")]
fn f32_to_odd(value: f64) -> f32 {
    const LOST: u64 = (1 << 29) - 1;
    let bits = value.to_bits();
    f64::from_bits((bits | ((bits & LOST) + LOST)) & !LOST) as f32
}

#[inline(always)]
fn order_16(bits: u16) -> i32 {
    let bits = bits.cast_signed();
    i32::from(bits ^ (bits >> 15 & i16::MAX))
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "counted modulo the size of the type")]
fn bits_16(order: i32) -> u16 {
    let order = order as i16;
    (order ^ (order >> 15 & i16::MAX)).cast_unsigned()
}
