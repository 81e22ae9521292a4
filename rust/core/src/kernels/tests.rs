#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::float_cmp,
    reason = "tests"
)]

use proptest::prelude::*;

use super::*;

/// Deterministic values in (-1, 1) with all mantissa bits in use.
fn values(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
        })
        .collect()
}

fn wide<E: Element>(values: &[f64]) -> Vec<E::Wide> {
    values.iter().map(|value| Wide::from_f64(*value)).collect()
}

fn narrow<E: Element>(values: &[f64]) -> Vec<E> {
    let mut narrow = vec![E::zeroed(); values.len()];
    E::round(&wide::<E>(values), &mut narrow);
    narrow
}

fn to_f64<E: Element>(value: E) -> f64 {
    let mut wide = [E::Wide::zeroed()];
    E::widen(&[value], &mut wide);
    wide[0].into()
}

/// The distance from `value` to the next larger magnitude.
fn ulp<E: Element>(value: E, mantissa: i32, smallest: i32) -> f64 {
    let exponent = to_f64(value).abs().max(f64::MIN_POSITIVE).log2().floor() as i32;
    2.0_f64.powi((exponent - mantissa).max(smallest))
}

struct Case<E: Element> {
    weight: Vec<E>,
    shape: (usize, usize),
    up: Vec<E::Wide>,
    down: Vec<E::Wide>,
    rank: usize,
    scaling: f64,
}

impl<E: Element> Case<E> {
    fn new(rows: usize, columns: usize, rank: usize, scaling: f64, seed: u64) -> Self {
        Self {
            weight: narrow(&values(rows * columns, seed)),
            shape: (rows, columns),
            up: wide::<E>(&values(rows * rank, seed + 1)),
            down: wide::<E>(&values(rank * columns, seed + 2)),
            rank,
            scaling,
        }
    }

    fn updated(&self) -> Vec<E> {
        let mut weight = self.weight.clone();
        add_low_rank(&mut weight, self.shape, &self.up, &self.down, self.rank, self.scaling).unwrap();
        weight
    }

    /// The exact sum in float64 and the sum of the magnitudes that went into it, which bounds the rounding on the way.
    fn exact(&self, index: usize) -> (f64, f64) {
        let (row, column) = (index / self.shape.1, index % self.shape.1);
        let terms = (0..self.rank).map(|k| {
            let up: f64 = self.up[row * self.rank + k].into();
            let down: f64 = self.down[k * self.shape.1 + column].into();
            self.scaling * up * down
        });
        let weight = to_f64(self.weight[index]);
        terms.fold((weight, weight.abs()), |(sum, size), term| (sum + term, size + term.abs()))
    }

    /// How many elements differ from the exact sum rounded once; asserts that each lies within the bound.
    fn wrong(&self, mantissa: i32, smallest: i32, unit: f64) -> usize {
        let updated = self.updated();
        (0..updated.len())
            .filter(|index| {
                let (exact, size) = self.exact(*index);
                let found = to_f64(updated[*index]);
                let allowed = ulp(updated[*index], mantissa, smallest) / 2.0 * (1.0 + 1e-9)
                    + size * unit * (self.rank as f64 + 3.0);
                assert!((found - exact).abs() <= allowed, "{found} for {exact}, {allowed} allowed");
                found != to_f64(narrow::<E>(&[exact])[0])
            })
            .count()
    }
}

const SINGLE: f64 = 1.0 / (1_u64 << 24) as f64;
const DOUBLE: f64 = SINGLE * SINGLE * 32.0;

proptest! {
    #[test]
    fn each_element_is_the_exact_sum_rounded_once(
        rows in 1..70_usize, columns in 1..70_usize, rank in 0..20_usize, scaling in -4.0..4.0, seed in 0..1_000_000_u64
    ) {
        // The magnitudes and the shapes vary; what is left of error is float32's, seen through a 16-bit rounding.
        Case::<bf16>::new(rows, columns, rank, scaling, seed).wrong(7, -133, SINGLE);
        Case::<f16>::new(rows, columns, rank, scaling, seed).wrong(10, -24, SINGLE);
        let off = Case::<f32>::new(rows, columns, rank, scaling, seed).wrong(23, -149, DOUBLE);
        prop_assert!(off * 1000 <= rows * columns, "{off} of {} float32 elements are off", rows * columns);
    }

    #[test]
    fn rounding_agrees_with_the_crate_for_every_pattern(bits: u32) {
        let value = f32::from_bits(bits);
        let mut rounded = [bf16::ZERO];
        bf16::round(&[value], &mut rounded);
        prop_assert_eq!(rounded[0].to_bits(), bf16::from_f32(value).to_bits());
    }
}

#[test]
fn nearly_every_16_bit_element_is_rounded_correctly() {
    let bf16 = Case::<bf16>::new(512, 500, 16, 0.5, 7).wrong(7, -133, SINGLE);
    let f16 = Case::<f16>::new(512, 500, 16, 0.5, 7).wrong(10, -24, SINGLE);
    // 0.005 % is the promise for weights much larger than their update; here both have the same size.
    assert!(bf16 <= 512 * 500 / 10_000, "{bf16}");
    assert!(f16 <= 512 * 500 / 1_000, "{f16}");
}

#[test]
fn threads_and_instruction_sets_give_the_same_bits() {
    fn check<E: Element>() {
        let case = Case::<E>::new(1031, 519, 11, 1.7, 3);
        let bits = |weight: &[E]| bytemuck::cast_slice::<E, u8>(weight).to_vec();
        let expected = bits(&case.updated());
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(bits(&pool.install(|| case.updated())), expected);
        }
        let factors = Factors::<E>::new(&case.up, &case.down, case.shape, case.rank, case.scaling).unwrap();
        let mut portable = case.weight.clone();
        run_sized(&factors, 0, &mut portable, None);
        assert_eq!(bits(&portable), expected);
    }
    check::<bf16>();
    check::<f16>();
    check::<f32>();
}

#[test]
fn unrounded_sums_round_to_the_update() {
    let case = Case::<bf16>::new(37, 45, 5, -0.3, 9);
    let factors = Factors::<bf16>::new(&case.up, &case.down, case.shape, case.rank, case.scaling).unwrap();
    let mut weight = case.weight.clone();
    let mut sums = vec![0.0; weight.len()];
    factors.sum(0, &mut weight, &mut sums);
    assert_eq!(weight, case.weight);
    bf16::round(&sums, &mut weight);
    assert_eq!(weight, case.updated());
}

#[test]
fn dora_scales_rows_and_columns() {
    let mut weight = vec![bf16::ZERO; 6];
    scale_rows(&mut [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3, &[2.0, -1.0], &mut weight);
    assert_eq!(weight.iter().map(|value| value.to_f32()).collect::<Vec<_>>(), [2.0, 4.0, 6.0, -4.0, -5.0, -6.0]);
    scale_columns(&mut [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2.0, -1.0, 0.5], &mut weight);
    assert_eq!(weight.iter().map(|value| value.to_f32()).collect::<Vec<_>>(), [2.0, -2.0, 1.5, 8.0, -5.0, 3.0]);
    assert_eq!(sum_of_squares(&[3.0_f32; 19]), 171.0);
}

#[test]
fn wrong_sizes_are_refused() {
    let error = add_low_rank::<f32>(&mut [0.0; 6], (2, 4), &[0.0; 2], &[0.0; 4], 1, 1.0).unwrap_err();
    assert_eq!(error.to_string(), "a weight of 6 values does not have the shape (2, 4)");
    let error = add_low_rank::<f32>(&mut [0.0; 8], (2, 4), &[0.0; 2], &[0.0; 3], 1, 1.0).unwrap_err();
    assert_eq!(error.to_string(), "factors of 2 and 3 values do not make an update of shape (2, 4) and rank 1");
}
