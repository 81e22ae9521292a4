//! Vector registers: the same operations for each instruction set, so that the loops over them are written once.

use super::Wide;

/// Bytes of the tiles that loops work on, a row of them: two registers of AVX-512, four of AVX2.
pub const TILE_BYTES: usize = 128;

/// A vector of values, on which operations act element by element.
pub trait Lanes: Copy {
    /// What the elements are.
    type Value: Wide;

    /// A vector of one value.
    ///
    /// # Safety
    /// The processor has the instruction set that the type stands for.
    unsafe fn splat(value: Self::Value) -> Self;

    /// Reads a whole vector.
    ///
    /// # Safety
    /// As for `splat`, and `from` is readable for the size of the vector.
    unsafe fn load(from: *const Self::Value) -> Self;

    /// Writes a whole vector.
    ///
    /// # Safety
    /// As for `splat`, and `to` is writable for the size of the vector.
    unsafe fn store(self, to: *mut Self::Value);

    /// `self * factor + term`, rounded once.
    ///
    /// # Safety
    /// As for `splat`.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
}

/// A float with its vectors for each instruction set.
pub trait Vectors: Wide {
    /// What every processor has.
    type Portable: Lanes<Value = Self>;
    /// AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    type Avx2: Lanes<Value = Self>;
    /// AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    type Avx512: Lanes<Value = Self>;
}

impl<W: Wide, const COUNT: usize> Lanes for [W; COUNT] {
    type Value = W;

    #[inline(always)]
    unsafe fn splat(value: W) -> Self {
        [value; COUNT]
    }

    #[inline(always)]
    unsafe fn load(from: *const W) -> Self {
        // SAFETY: the caller promises that the vector is readable; it need not be aligned.
        unsafe { from.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut W) {
        // SAFETY: the caller promises that the vector is writable; it need not be aligned.
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        let mut sum = term;
        for ((sum, value), factor) in sum.iter_mut().zip(self).zip(factor) {
            *sum = value.mul_add(factor, *sum);
        }
        sum
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod other {
    impl super::Vectors for f32 {
        type Portable = [Self; 8];
    }

    impl super::Vectors for f64 {
        type Portable = [Self; 4];
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m256d, __m512, __m512d, _mm256_fmadd_pd, _mm256_fmadd_ps, _mm256_loadu_pd, _mm256_loadu_ps,
        _mm256_set1_pd, _mm256_set1_ps, _mm256_storeu_pd, _mm256_storeu_ps, _mm512_fmadd_pd, _mm512_fmadd_ps,
        _mm512_loadu_pd, _mm512_loadu_ps, _mm512_set1_pd, _mm512_set1_ps, _mm512_storeu_pd, _mm512_storeu_ps,
    };

    use super::{Lanes, Vectors};

    impl Vectors for f32 {
        type Portable = [Self; 8];
        type Avx2 = __m256;
        type Avx512 = __m512;
    }

    impl Vectors for f64 {
        type Portable = [Self; 4];
        type Avx2 = __m256d;
        type Avx512 = __m512d;
    }

    macro_rules! lanes {
        ($vector:ty, $value:ty, $splat:ident, $load:ident, $store:ident, $mul_add:ident) => {
            impl Lanes for $vector {
                type Value = $value;

                #[inline(always)]
                unsafe fn splat(value: $value) -> Self {
                    // SAFETY: the caller promises that the processor has the instruction.
                    unsafe { $splat(value) }
                }

                #[inline(always)]
                unsafe fn load(from: *const $value) -> Self {
                    // SAFETY: the caller promises the instruction, and that the vector is readable.
                    unsafe { $load(from) }
                }

                #[inline(always)]
                unsafe fn store(self, to: *mut $value) {
                    // SAFETY: the caller promises the instruction, and that the vector is writable.
                    unsafe { $store(to, self) }
                }

                #[inline(always)]
                unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
                    // SAFETY: the caller promises that the processor has the instruction.
                    unsafe { $mul_add(self, factor, term) }
                }
            }
        };
    }

    lanes!(__m256, f32, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps);
    lanes!(__m256d, f64, _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_fmadd_pd);
    lanes!(__m512, f32, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps);
    lanes!(__m512d, f64, _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_fmadd_pd);
}
