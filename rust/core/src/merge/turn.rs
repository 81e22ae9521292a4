//! OFT's block-diagonal matrices, from the numbers above the diagonals of skew ones.

use rayon::prelude::*;

use crate::error::Result;
use crate::kernels::Wide;
use crate::plan::Turn;
use crate::threads;

/// A block-diagonal matrix `M` by which columns of a weight, or the rows within each of its blocks, are multiplied: `M x`.
pub struct Blocks<W> {
    size: usize,
    /// Of each block, the transpose, row by row.
    transposes: Vec<Vec<W>>,
    rows: bool,
}

impl<W: Wide> Blocks<W> {
    /// The blocks of `turn` from `above`, the numbers of all of them; one that is alone stands for all.
    pub fn new(turn: &Turn, above: &[f64]) -> Result<Self> {
        let size = turn.size;
        let numbers = size * (size - 1) / 2;
        let count = above.len() / numbers.max(1);
        #[allow(clippy::cast_precision_loss, reason = "a weight has less than 2^53 rows")]
        let bound = turn.bound.map(|bound| bound / (count as f64).sqrt());
        let one = |above: &[f64]| {
            let block = orthogonal(&skew(above, size, bound), size, turn.terms);
            // Files hold blocks for row vectors, `x B`: inputs are multiplied by `B`, outputs by its transpose.
            let block = if turn.on_input { transpose(&block, size) } else { block };
            block.into_iter().map(Wide::from_f64).collect()
        };
        let transposes = threads::install(|| Ok(above.par_chunks_exact(numbers.max(1)).map(one).collect()))?;
        Ok(Self { size, transposes, rows: turn.rows })
    }

    /// How many rows have to be changed together.
    pub fn align(&self) -> usize {
        if self.rows { self.size } else { 1 }
    }

    /// Multiplies rows of that many columns in place; the first is number `first`, and blocks of them are whole.
    pub fn apply(&self, first: usize, columns: usize, sums: &mut [W]) {
        let block = |index: usize| self.transposes.get(if self.transposes.len() == 1 { 0 } else { index });
        let mut turned = Vec::new();
        if self.rows {
            for (index, rows) in sums.chunks_exact_mut((self.size * columns).max(1)).enumerate() {
                let Some(block) = block(first / self.size + index) else { continue };
                turned.clear();
                turned.resize(rows.len(), W::zeroed());
                for (row, weights) in rows.chunks_exact(columns).zip(block.chunks_exact(self.size)) {
                    for (to, weight) in turned.chunks_exact_mut(columns).zip(weights) {
                        add(to, *weight, row);
                    }
                }
                rows.copy_from_slice(&turned);
            }
            return;
        }
        for part in sums.chunks_exact_mut(columns.max(1)).flat_map(|row| row.chunks_exact_mut(self.size).enumerate()) {
            let (index, part) = part;
            let Some(block) = block(index) else { continue };
            turned.clear();
            turned.resize(self.size, W::zeroed());
            for (value, weights) in part.iter().zip(block.chunks_exact(self.size)) {
                add(&mut turned, *value, weights);
            }
            part.copy_from_slice(&turned);
        }
    }
}

/// `to += factor * values`.
fn add<W: Wide>(to: &mut [W], factor: W, values: &[W]) {
    for (to, value) in to.iter_mut().zip(values) {
        *to = *to + factor * *value;
    }
}

/// The skew matrix with these numbers above its diagonal, brought within `bound` of zero if there is one.
fn skew(above: &[f64], size: usize, bound: Option<f64>) -> Vec<f64> {
    let length = std::f64::consts::SQRT_2 * above.iter().map(|value| value * value).sum::<f64>().sqrt();
    let factor = bound.map_or(1.0, |bound| (bound / length).min(1.0));
    let mut matrix = vec![0.0; size * size];
    let mut above = above.iter().map(|value| value * factor);
    for row in 0..size {
        for column in row + 1..size {
            let value = above.next().unwrap_or_default();
            set(&mut matrix, row * size + column, value);
            set(&mut matrix, column * size + row, -value);
        }
    }
    matrix
}

fn set(matrix: &mut [f64], index: usize, value: f64) {
    if let Some(place) = matrix.get_mut(index) {
        *place = value;
    }
}

/// Cayley's map of a skew matrix, `(I - Q) (I + Q)^-1`, or the first terms of the series that stands for it.
fn orthogonal(skew: &[f64], size: usize, terms: Option<usize>) -> Vec<f64> {
    let mut identity = vec![0.0; size * size];
    identity.iter_mut().step_by(size + 1).for_each(|value| *value = 1.0);
    if let Some(terms) = terms {
        return series(identity, skew, size, terms);
    }
    let sum = identity.iter().zip(skew).map(|(one, skew)| one + skew).collect();
    let difference = identity.iter().zip(skew).map(|(one, skew)| one - skew).collect();
    // The two commute, so that the inverse may stand on either side.
    solve(sum, difference, size)
}

/// `I + 2Q + 2Q² + … + Qⁿ⁻¹`, whose last term is whole for two terms and the third power for three: what files were trained for.
fn series(mut sum: Vec<f64>, skew: &[f64], size: usize, terms: usize) -> Vec<f64> {
    let grow = |sum: &mut [f64], weight: f64, power: &[f64]| {
        sum.iter_mut().zip(power).for_each(|(sum, power)| *sum += weight * power);
    };
    if terms > 1 {
        grow(&mut sum, 2.0, skew);
    }
    if terms > 2 {
        let mut power = product(skew, skew, size);
        grow(&mut sum, 2.0, &power);
        for _ in 3..terms - 1 {
            power = product(&power, skew, size);
            grow(&mut sum, 2.0, &power);
        }
        grow(&mut sum, 1.0, &product(&power, skew, size));
    }
    sum
}

fn product(left: &[f64], right: &[f64], size: usize) -> Vec<f64> {
    let mut product = vec![0.0; size * size];
    for (to, row) in product.chunks_exact_mut(size).zip(left.chunks_exact(size)) {
        for (value, right) in row.iter().zip(right.chunks_exact(size)) {
            add(to, *value, right);
        }
    }
    product
}

/// `left^-1 right`, by elimination with the largest pivots. `left` is the identity plus a skew matrix, which is never singular.
fn solve(mut left: Vec<f64>, mut right: Vec<f64>, size: usize) -> Vec<f64> {
    let at = |matrix: &[f64], row: usize, column: usize| matrix.get(row * size + column).copied().unwrap_or_default();
    for pivot in 0..size {
        let best = (pivot..size).max_by(|a, b| at(&left, *a, pivot).abs().total_cmp(&at(&left, *b, pivot).abs()));
        let best = best.unwrap_or(pivot);
        for matrix in [&mut left, &mut right] {
            let (before, after) = matrix.split_at_mut(best * size);
            let (Some(one), Some(other)) = (before.get_mut(pivot * size..(pivot + 1) * size), after.get_mut(..size))
            else {
                continue;
            };
            one.swap_with_slice(other);
        }
        let scale = 1.0 / at(&left, pivot, pivot);
        let head: [Vec<f64>; 2] = [&mut left, &mut right].map(|matrix| {
            let row = matrix.get_mut(pivot * size..(pivot + 1) * size).unwrap_or_default();
            for value in row.iter_mut() {
                *value *= scale;
            }
            row.to_vec()
        });
        for row in (0..size).filter(|row| *row != pivot) {
            let factor = -at(&left, row, pivot);
            for (matrix, head) in [&mut left, &mut right].into_iter().zip(&head) {
                add(matrix.get_mut(row * size..(row + 1) * size).unwrap_or_default(), factor, head);
            }
        }
    }
    right
}

fn transpose(matrix: &[f64], size: usize) -> Vec<f64> {
    (0..size).flat_map(|column| matrix.iter().skip(column).step_by(size).copied()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use super::*;

    const ABOVE: [f64; 6] = [0.3, -0.7, 0.2, 1.1, -0.4, 0.6];

    fn assert_near(found: &[f64], expected: &[f64]) {
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} for {expected}");
        }
    }

    #[test]
    fn cayleys_map_is_orthogonal_and_solves_its_equation() {
        let skew = skew(&ABOVE, 4, None);
        let turned = orthogonal(&skew, 4, None);
        let mut identity = vec![0.0; 16];
        identity.iter_mut().step_by(5).for_each(|value| *value = 1.0);
        assert_near(&product(&turned, &transpose(&turned, 4), 4), &identity);
        let sum: Vec<f64> = identity.iter().zip(&skew).map(|(one, skew)| one + skew).collect();
        let difference: Vec<f64> = identity.iter().zip(&skew).map(|(one, skew)| one - skew).collect();
        assert_near(&product(&turned, &sum, 4), &difference);
    }

    #[test]
    fn a_zero_pivot_is_stepped_around() {
        let solved = solve(vec![0.0, 2.0, 4.0, 0.0], vec![2.0, 0.0, 0.0, 4.0], 2);
        assert_near(&solved, &[0.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn a_long_series_is_the_inverse_of_cayleys_map() {
        let small: Vec<f64> = ABOVE.iter().map(|value| value / 10.0).collect();
        let skew = skew(&small, 4, None);
        assert_near(&orthogonal(&skew, 4, Some(40)), &transpose(&orthogonal(&skew, 4, None), 4));
    }

    #[test]
    fn a_bound_shortens_what_is_longer() {
        let length = |matrix: &[f64]| matrix.iter().map(|value| value * value).sum::<f64>().sqrt();
        assert!((length(&skew(&ABOVE, 4, Some(0.5))) - 0.5).abs() < 1e-12);
        assert_eq!(skew(&ABOVE, 4, Some(100.0)), skew(&ABOVE, 4, None));
        assert_eq!(skew(&[0.0; 6], 4, Some(0.5)), [0.0; 16]);
    }
}
