#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::float_cmp,
    reason = "tests"
)]

use proptest::prelude::*;

use bytemuck::Zeroable as _;
use half::{bf16, f16};

use super::correction::{decode, encode};
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

    fn factors(&self) -> Factors<'_, E> {
        Factors::new(self.up.as_slice(), &self.down, self.shape, self.rank, self.scaling).unwrap()
    }

    fn updated(&self) -> Vec<E> {
        let mut weight = self.weight.clone();
        in_place::add(&mut weight, &self.factors(), 1).unwrap();
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
        Case::<f16>::new(rows, columns, rank, scaling, seed).wrong(10, -24, DOUBLE);
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

    #[test]
    fn float16_is_rounded_once(one: u16, tail: u64) {
        // Between an element and the next, and on the very middle: where a detour over float32 goes wrong.
        let low = f16::from_bits(one & 0x7fff).to_f64();
        let high = f16::from_bits((one & 0x7fff) + 1).to_f64();
        for value in [low + (high - low) * (tail as f64 / u64::MAX as f64), low.midpoint(high), low, f64::from_bits(tail)] {
            for value in [value, f64::from_bits(value.to_bits() + 1), f64::from_bits(value.to_bits().max(1) - 1), -value] {
                let mut rounded = [f16::ZERO];
                f16::round(&[value], &mut rounded);
                if value.is_nan() {
                    prop_assert!(rounded[0].is_nan());
                } else {
                    prop_assert_eq!(rounded[0].to_bits(), nearest(value).to_bits(), "{:e}", value);
                }
            }
        }
    }
}

/// The float16 nearest to `value`, found among all by comparing distances, which float64 holds exactly.
fn nearest(value: f64) -> f16 {
    let magnitude = value.abs();
    let above = (0..=0x7c00_u16).collect::<Vec<_>>().partition_point(|bits| f16::from_bits(*bits).to_f64() < magnitude);
    let above = u16::try_from(above).unwrap().min(0x7c00);
    let below = above.saturating_sub(1);
    // Infinity stands where the next larger number would.
    let place = |bits: u16| if bits == 0x7c00 { 65536.0 } else { f16::from_bits(bits).to_f64() };
    let (down, up) = (magnitude - place(below), place(above) - magnitude);
    let bits = match down.total_cmp(&up) {
        std::cmp::Ordering::Less => below,
        std::cmp::Ordering::Greater => above,
        std::cmp::Ordering::Equal => below + below % 2,
    };
    if value.is_sign_negative() { -f16::from_bits(bits) } else { f16::from_bits(bits) }
}

#[test]
fn every_16_bit_element_is_widened_exactly_and_comes_back() {
    for bits in 0..=u16::MAX {
        let (mut wide, mut back) = ([0.0], [f16::ZERO]);
        f16::widen(&[f16::from_bits(bits)], &mut wide);
        f16::round(&wide, &mut back);
        let expected = f16::from_bits(bits);
        assert!(wide[0] == expected.to_f64() || expected.is_nan() && wide[0].is_nan(), "{bits:#x}");
        assert!(back[0].to_bits() == bits || expected.is_nan() && back[0].is_nan(), "{bits:#x}");
        assert_eq!(bf16::from_order(bf16::from_bits(bits).order()).to_bits(), bits);
    }
}

#[test]
fn nearly_every_16_bit_element_is_rounded_correctly() {
    // The promise is 0.005 % where the update is smaller than the weights, as updates are; the last one is larger.
    for (scaling, allowed) in [(0.001, 12), (0.02, 12), (0.1, 12), (0.5, 25)] {
        let off = Case::<bf16>::new(512, 500, 16, scaling, 7).wrong(7, -133, SINGLE);
        assert!(off <= allowed, "{off} bfloat16 elements are off at scaling {scaling}");
        assert_eq!(Case::<f16>::new(512, 500, 16, scaling, 7).wrong(10, -24, DOUBLE), 0);
    }
}

#[test]
fn threads_and_instruction_sets_give_the_same_bits() {
    fn check<E: Element>(rows: usize, columns: usize, rank: usize) {
        let case = Case::<E>::new(rows, columns, rank, 1.7, 3);
        let bits = |weight: &[E]| bytemuck::cast_slice::<E, u8>(weight).to_vec();
        let expected = bits(&case.updated());
        let (finite, correction) = {
            let mut weight = case.weight.clone();
            let found = in_place::add_keeping(&mut weight, &case.factors(), 1).unwrap();
            assert_eq!(bits(&weight), expected);
            found
        };
        assert!(finite);
        for threads in [2, 3] {
            let mut weight = case.weight.clone();
            let kept = in_place::add_keeping(&mut weight, &case.factors(), threads).unwrap();
            assert_eq!(bits(&weight), expected);
            assert_eq!(kept.1, correction);
            assert!(in_place::restore(&mut weight, &case.factors(), &correction, threads).unwrap());
            assert_eq!(bits(&weight), bits(&case.weight));
        }
        for run in low_rank::instruction_sets::<E>() {
            let mut weight = case.weight.clone();
            assert!(run(&case.factors(), &mut weight));
            assert_eq!(bits(&weight), expected);
        }
    }
    fn each<E: Element>() {
        check::<E>(1031, 519, 11);
        check::<E>(3, 2, 1);
        check::<E>(13, 33, 70);
    }
    each::<bf16>();
    each::<f16>();
    each::<f32>();
}

#[test]
fn instruction_sets_agree_on_ties_and_on_what_is_not_finite() {
    // Every bf16 in rows of a tile, plus what makes sums lie between two of them, too large, subnormal, infinite or NaN.
    let weight: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let shape = (weight.len() / 32, 32);
    let special =
        [0.0, -0.0, f32::MAX, f32::INFINITY, f32::NAN, f32::from_bits(0x7fff_ffff), f32::from_bits(1), -1e-40];
    let mut sets = low_rank::instruction_sets::<bf16>();
    let portable = sets.remove(0);
    for scale in -16..16 {
        let finite =
            values(64, 5).iter().map(|value| (*value as f32).signum() * 2.0_f32.powi(8 * scale)).collect::<Vec<_>>();
        for down in [&finite[..32], &[&special[..], &finite[..24]].concat()] {
            let factors = Factors::<bf16>::new(vec![1.0; shape.0], down, shape, 1, 1.0).unwrap();
            let update = |run: &dyn Fn(&Factors<'_, bf16>, &mut [bf16]) -> bool, weight: &[bf16]| {
                let mut weight = weight.to_vec();
                let finite = run(&factors, &mut weight);
                (finite, weight.iter().map(|value| value.to_bits()).collect::<Vec<_>>())
            };
            let tame: Vec<bf16> =
                weight.iter().map(|value| if value.is_finite() { *value } else { bf16::ONE }).collect();
            for weight in [&weight, &tame] {
                let expected = update(&portable, weight);
                assert!(sets.iter().all(|run| update(run, weight) == expected), "addends {down:?}");
            }
        }
    }
}

/// Any bits, and often those that are special: zeros, subnormal numbers, the ends of the range, infinities, NaN.
fn patterns<B: Clone + std::fmt::Debug + 'static>(
    any: impl Strategy<Value = B> + 'static,
    special: Vec<B>,
) -> impl Strategy<Value = Vec<B>> {
    let one = prop_oneof![any, proptest::sample::select(special)];
    proptest::collection::vec(one, 1..400)
}

fn check_code<E: Element + std::fmt::Debug>(original: &[E], other: &[E], equal: usize) {
    let mut restored = original.to_vec();
    for (to, from) in restored.iter_mut().zip(other).skip(equal) {
        *to = *from;
    }
    let mut room = Vec::new();
    let code = encode(original, &restored, &mut room).to_vec();
    assert!(code.len() <= size_of_val(original));
    decode(&code, &mut restored).unwrap();
    assert_eq!(bytemuck::cast_slice::<E, u8>(&restored), bytemuck::cast_slice::<E, u8>(original));
}

proptest! {
    #[test]
    fn a_correction_restores_any_bits(
        original in patterns(any::<u16>(), vec![0, 0x8000, 1, 0x8001, 0x7f80, 0xff80, 0x7c00, 0x7fff, 0xffff, 0x7f81]),
        other in patterns(any::<u16>(), vec![0, 0x8000, 0x7f80, 0xff80, 0xffff]),
        equal in 0..400_usize,
    ) {
        check_code::<bf16>(bytemuck::cast_slice(&original), bytemuck::cast_slice(&other), equal);
        check_code::<f16>(bytemuck::cast_slice(&original), bytemuck::cast_slice(&other), equal);
    }

    #[test]
    fn a_correction_restores_any_bits_of_float32(
        original in patterns(any::<u32>(), vec![0, 1 << 31, 1, u32::MAX, 0x7f80_0000, 0xff80_0000, 0x7f80_0001]),
        other in patterns(any::<u32>(), vec![0, 1 << 31, 0x7fff_ffff, u32::MAX]),
        equal in 0..400_usize,
    ) {
        check_code::<f32>(bytemuck::cast_slice(&original), bytemuck::cast_slice(&other), equal);
    }

    #[test]
    fn damaged_corrections_are_refused_or_decoded_but_never_panic(
        code in proptest::collection::vec(any::<u8>(), 0..60), count in 1..100_usize
    ) {
        let mut values = vec![bf16::ZERO; count];
        let _ = decode(&code, &mut values);
        let case = Case::<bf16>::new(5, 7, 2, 1.0, 1);
        let mut weight = case.weight.clone();
        prop_assert!(in_place::restore(&mut weight, &case.factors(), &code, 1).is_err());
        prop_assert_eq!(weight, case.weight);
    }

    #[test]
    fn merging_and_restoring_is_the_identity_on_any_bits(
        bits in proptest::collection::vec(any::<u16>(), 35), scaling in -1e6..1e6_f64, seed in 0..1_000_000_u64
    ) {
        let case = Case::<bf16>::new(5, 7, 2, scaling, seed);
        let mut weight: Vec<bf16> = bytemuck::cast_slice(&bits).to_vec();
        let (finite, correction) = in_place::add_keeping(&mut weight, &case.factors(), 1).unwrap();
        prop_assert_eq!(finite, weight.iter().all(|value| value.is_finite()));
        prop_assert!(in_place::restore(&mut weight, &case.factors(), &correction, 1).unwrap());
        prop_assert_eq!(bytemuck::cast_slice::<bf16, u16>(&weight), &bits[..]);
    }
}

#[test]
fn a_steps_difference_costs_few_bits() {
    let original: Vec<bf16> = values(100_000, 1).into_iter().map(bf16::from_f64).collect();
    let mut restored = original.clone();
    for (index, value) in restored.iter_mut().enumerate() {
        if index % 9 == 4 {
            *value = bf16::from_order(value.order() + if index % 2 == 0 { 1 } else { -1 });
        }
    }
    let bits = encode(&original, &restored, &mut Vec::new()).len() as f64 * 8.0 / 100_000.0;
    assert!(bits < 0.8, "{bits} bits a weight where one of nine differs");
}

#[test]
fn changed_weights_are_subtracted_from() {
    let case = Case::<bf16>::new(5, 7, 2, 1.0, 1);
    let mut weight = case.weight.clone();
    let (_, correction) = in_place::add_keeping(&mut weight, &case.factors(), 1).unwrap();
    weight[3] = bf16::from_f32(100.0);
    assert!(!in_place::restore(&mut weight, &case.factors(), &correction, 1).unwrap());
    assert!((to_f64(weight[3]) - 100.0).abs() < 4.0);
    assert!((0..35).filter(|index| *index != 3).all(|at| (to_f64(weight[at]) - to_f64(case.weight[at])).abs() < 0.02));
}

#[test]
fn unrounded_sums_round_to_the_update() {
    let case = Case::<bf16>::new(37, 45, 5, -0.3, 9);
    let factors = Factors::<bf16>::new(case.up.as_slice(), &case.down, case.shape, case.rank, case.scaling).unwrap();
    let mut weight = case.weight.clone();
    let mut sums = vec![0.0; weight.len()];
    factors.sum(0, &mut weight, &mut sums);
    assert_eq!(weight, case.weight);
    bf16::round(&sums, &mut weight);
    assert_eq!(weight, case.updated());
}

#[test]
fn squares_are_added_whatever_their_number() {
    assert_eq!(sum_of_squares(&[3.0_f32; 19]), 171.0);
}

#[test]
fn wrong_sizes_are_refused() {
    let factors = Factors::<f32>::new(vec![0.0; 2], &[0.0; 4], (2, 4), 1, 1.0).unwrap();
    let error = in_place::add(&mut [0.0; 6], &factors, 1).unwrap_err();
    assert_eq!(error.to_string(), "a weight of 6 values does not have the shape (2, 4)");
    let error = Factors::<f32>::new(vec![0.0; 2], &[0.0; 3], (2, 4), 1, 1.0).err().unwrap();
    assert_eq!(error.to_string(), "factors of 2 and 3 values do not make an update of shape (2, 4) and rank 1");
}
