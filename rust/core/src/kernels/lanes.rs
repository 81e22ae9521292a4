//! Vector registers: the same operations for each instruction set, so that the loops over them are written once.

use half::bf16;

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

    /// Whether there is an `add_bf16`.
    const ADDS_BF16: bool = false;

    /// Adds `scaling * products`, a row of a tile, to as many weights without a detour over memory. Returns whether all sums are
    /// finite.
    ///
    /// # Safety
    /// As for `splat`, and the weights from `weight` on may be read and written. `ADDS_BF16` holds.
    unsafe fn add_bf16(_products: [Self; 2], _scaling: Self, _weight: *mut bf16) -> bool {
        false
    }
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
        __m256, __m256d, __m512, __m512d, _CMP_UNORD_Q, _mm256_fmadd_pd, _mm256_fmadd_ps, _mm256_loadu_pd,
        _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_pd, _mm256_set1_ps, _mm256_storeu_pd, _mm256_storeu_ps,
        _mm512_add_epi32, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtepu16_epi32,
        _mm512_fmadd_pd, _mm512_fmadd_ps, _mm512_loadu_pd, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
        _mm512_permutex2var_epi16, _mm512_set1_epi32, _mm512_set1_pd, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_slli_epi32, _mm512_storeu_pd, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_testn_epi32_mask,
    };

    use half::bf16;

    use super::{Lanes, Vectors};
    use crate::kernels::Element as _;

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
        ($vector:ty, $value:ty, $splat:ident, $load:ident, $store:ident, $mul_add:ident $(, $more:item)*) => {
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

                $($more)*
            }
        };
    }

    lanes!(__m256, f32, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps);
    lanes!(__m256d, f64, _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_fmadd_pd);
    lanes!(
        __m512,
        f32,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        const ADDS_BF16: bool = true;,
        #[inline(always)]
        unsafe fn add_bf16(products: [Self; 2], scaling: Self, weight: *mut bf16) -> bool {
            // SAFETY: what the caller promises is what the function asks for.
            unsafe { add_bf16(products, scaling, weight) }
        }
    );
    lanes!(__m512d, f64, _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_fmadd_pd);

    /// The upper half of each of 32 values.
    const UPPER: [u16; 32] = [
        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57,
        59, 61, 63,
    ];

    /// Rounds up from a half on and cuts off, which is rounding to nearest but where a sum lies exactly between two elements
    /// or is NaN: rows with such a one are rounded with care.
    ///
    /// # Safety
    /// The processor has AVX-512 F and BW, and 32 weights from `weight` on may be read and written.
    #[inline(always)]
    unsafe fn add_bf16([first, second]: [__m512; 2], scaling: __m512, weight: *mut bf16) -> bool {
        // SAFETY: the caller promises the instructions and the weights, of which each load takes 16 and the store has 32.
        unsafe {
            let widened = |from: *mut bf16| {
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()))))
            };
            let first = _mm512_fmadd_ps(scaling, first, widened(weight));
            let second = _mm512_fmadd_ps(scaling, second, widened(weight.add(16)));
            let zero = _mm512_setzero_ps();
            let poison = _mm512_fmadd_ps(first, zero, _mm512_mul_ps(second, zero));
            let (half, lower) = (_mm512_set1_epi32(0x8000), _mm512_set1_epi32(0xffff));
            let upper = [first, second].map(|sums| _mm512_add_epi32(_mm512_castps_si512(sums), half));
            let [ties, more] = upper.map(|sums| _mm512_testn_epi32_mask(sums, lower));
            if (_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(poison, poison) | ties | more) != 0 {
                return with_care([first, second], weight);
            }
            let [first, second] = upper;
            let rounded = _mm512_permutex2var_epi16(first, _mm512_loadu_si512(UPPER.as_ptr().cast()), second);
            _mm512_storeu_si512(weight.cast(), rounded);
        }
        true
    }

    /// # Safety
    /// The processor has AVX-512 F, and 32 weights from `weight` on may be written.
    #[cold]
    #[inline(never)]
    #[target_feature(enable = "avx512f")]
    unsafe fn with_care(sums: [__m512; 2], weight: *mut bf16) -> bool {
        // SAFETY: the two have the same size, and any bits are floats.
        let sums: [f32; 32] = unsafe { std::mem::transmute(sums) };
        // SAFETY: the caller's promise.
        bf16::round(&sums, unsafe { std::slice::from_raw_parts_mut(weight, sums.len()) });
        sums.iter().all(|sum| sum.is_finite())
    }
}
