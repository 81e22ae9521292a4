//! How long rows and columns are, before DoRA gives them lengths of its own.

use super::Wide;

/// The sum of squares of `values`, in float64 over eight interleaved lanes, which fixes the order of the additions.
#[must_use]
pub fn sum_of_squares<W: Wide>(values: &[W]) -> f64 {
    let mut lanes = [0.0_f64; 8];
    for chunk in values.chunks(8) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            let value: f64 = (*value).into();
            *lane += value * value;
        }
    }
    lanes.iter().sum()
}
