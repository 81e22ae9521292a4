//! How far a merged tensor is from what it should be, in sums that are kept while it is read.

use half::{bf16, f16};

use crate::dtype::Dtype;

/// The grid of numbers that a float type has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Grid {
    /// Bits of the fraction.
    bits: i32,
    /// The exponent below which numbers are evenly spaced.
    least: i32,
}

impl Grid {
    /// The grid of a type, or none of one that holds no plain floats.
    pub fn of(dtype: Dtype) -> Option<Self> {
        let (bits, least) = match dtype {
            Dtype::BF16 => (7, -126),
            Dtype::F16 => (10, -14),
            Dtype::F32 => (23, -126),
            Dtype::F64 => (52, -1022),
            _ => return None,
        };
        Some(Self { bits, least })
    }

    /// Rounds values to the grid.
    pub fn round(self, values: &mut [f64]) {
        for value in values {
            *value = self.nearest(*value);
        }
    }

    /// The nearest number of the grid.
    pub fn nearest(self, value: f64) -> f64 {
        match self.bits {
            7 => bf16::from_f64(value).to_f64(),
            10 => f16::from_f64(value).to_f64(),
            #[allow(clippy::cast_possible_truncation, reason = "rounding to nearest is what is asked for")]
            23 => f64::from(value as f32),
            _ => value,
        }
    }

    /// The distance of the numbers around `value`, one unit in the last place.
    fn unit(self, value: f64) -> f64 {
        let exponent = i32::try_from(value.to_bits() >> 52 & 0x7ff).unwrap_or(0) - 1023;
        2.0_f64.powi(exponent.clamp(self.least, 1023) - self.bits)
    }
}

/// Sums over the elements of a tensor: W in the base, E as it should be, M as it is, all on the coarser grid of E and M.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Tally {
    /// Elements.
    pub elements: u64,
    /// Those that are as they should be.
    pub equal: u64,
    /// Those that are at most one unit in the last place off.
    pub near: u64,
    /// Those that are not finite though they should be.
    pub nonfinite: u64,
    /// Sum of (E - W)².
    pub expected: f64,
    /// Sum of (M - W)².
    pub found: f64,
    /// Sum of (M - W)(E - W).
    pub common: f64,
    /// Elements that should differ from the base.
    pub moved: u64,
    /// Sum of (M - E)² over elements that are farther off than one unit.
    pub far: f64,
}

impl Tally {
    /// Counts elements in; the slices are equally long, and on the grid or rounded to it.
    #[allow(clippy::float_cmp, reason = "numbers of one grid are equal or not")]
    pub fn count(&mut self, base: &[f64], expected: &[f64], merged: &[f64], grid: Grid) {
        for ((&base, &expected), &merged) in base.iter().zip(expected).zip(merged) {
            self.elements += 1;
            let broken = !merged.is_finite() && expected.is_finite();
            if broken || expected.is_nan() {
                self.nonfinite += u64::from(broken);
                self.equal += u64::from(!broken && merged.is_nan());
                self.near += u64::from(!broken && merged.is_nan());
                continue;
            }
            let off = (merged - expected).abs();
            let equal = merged == expected;
            let near = equal || off <= grid.unit(expected);
            self.equal += u64::from(equal);
            self.near += u64::from(near);
            let (found, wanted) = (merged - base, expected - base);
            if found.is_finite() && wanted.is_finite() {
                self.expected += wanted * wanted;
                self.found += found * found;
                self.common += found * wanted;
                self.moved += u64::from(wanted != 0.0);
                self.far += if near { 0.0 } else { off * off };
            }
        }
    }

    /// Both counts together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            elements: self.elements + other.elements,
            equal: self.equal + other.equal,
            near: self.near + other.near,
            nonfinite: self.nonfinite + other.nonfinite,
            expected: self.expected + other.expected,
            found: self.found + other.found,
            common: self.common + other.common,
            moved: self.moved + other.moved,
            far: self.far + other.far,
        }
    }

    /// The share of elements that are as they should be.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a share for people")]
    pub fn share(self) -> f64 {
        if self.elements == 0 { 1.0 } else { self.equal as f64 / self.elements as f64 }
    }

    /// How many times the change is in the tensor: the least squares c of M - W = c (E - W); none where nothing should change.
    #[must_use]
    pub fn coefficient(self) -> Option<f64> {
        (self.expected > 0.0).then(|| self.common / self.expected)
    }

    /// Which part of M - W is not c (E - W), from 0 to 1.
    #[must_use]
    pub fn residual(self) -> Option<f64> {
        let along = self.common * self.common / self.expected;
        (self.expected > 0.0 && self.found > 0.0).then(|| (1.0 - along / self.found).clamp(0.0, 1.0).sqrt())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn units_are_those_of_the_type() {
        let bf16_grid = Grid::of(Dtype::BF16).unwrap();
        for value in [1.0, 1.99, -3.0, 0.007, 1e-39] {
            let near = bf16::from_f64(value);
            let next = bf16::from_bits(near.to_bits() + 1).to_f64();
            assert!((bf16_grid.unit(near.to_f64()) - (next - near.to_f64()).abs()).abs() < 1e-300, "{value}");
        }
        assert_eq!(Grid::of(Dtype::F16).unwrap().unit(0.0).to_bits(), 2.0_f64.powi(-24).to_bits());
        assert!(Grid::of(Dtype::BF16) < Grid::of(Dtype::F16) && Grid::of(Dtype::F16) < Grid::of(Dtype::F32));
    }

    #[test]
    fn the_coefficient_is_how_often_the_change_is_in() {
        let (base, change) = ([1.0, 2.0, -3.0, 0.5], [0.5, -0.25, 0.125, 1.0]);
        for times in [-1.0, 0.0, 1.0, 2.0] {
            let at = |times: f64| -> Vec<f64> {
                base.iter().zip(change).map(|(base, change)| base + times * change).collect()
            };
            let mut tally = Tally::default();
            tally.count(&base, &at(1.0), &at(times), Grid::of(Dtype::F32).unwrap());
            assert!((tally.coefficient().unwrap() - times).abs() < 1e-12);
            assert!(times == 0.0 || tally.residual().unwrap() < 1e-7);
        }
    }
}
