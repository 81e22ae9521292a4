//! What DoRA does after the update: rows or columns of the sum are scaled to lengths of their own.

use super::{Element, Wide};

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

/// DoRA's last step: `weight = factor * sums`, rounded once, with a factor for each row.
pub fn scale_rows<E: Element>(sums: &mut [E::Wide], columns: usize, factors: &[E::Wide], weight: &mut [E]) {
    for (row, factor) in sums.chunks_exact_mut(columns.max(1)).zip(factors) {
        for value in row {
            *value = *value * *factor;
        }
    }
    E::round(sums, weight);
}

/// DoRA's last step for a weight stored the other way round: one factor for each column.
pub fn scale_columns<E: Element>(sums: &mut [E::Wide], factors: &[E::Wide], weight: &mut [E]) {
    for row in sums.chunks_exact_mut(factors.len().max(1)) {
        for (value, factor) in row.iter_mut().zip(factors) {
            *value = *value * *factor;
        }
    }
    E::round(sums, weight);
}
