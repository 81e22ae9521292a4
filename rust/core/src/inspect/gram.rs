//! Products of thin factors with themselves and each other, and the spectrum of a product of two: `B @ A` is never formed.

/// A small dense matrix, row by row.
pub struct Matrix {
    columns: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn zeros(rows: usize, columns: usize) -> Self {
        Self { columns, values: vec![0.0; rows * columns] }
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        self.values.get(row * self.columns + column).copied().unwrap_or(0.0)
    }

    fn set(&mut self, row: usize, column: usize, value: f64) {
        if let Some(place) = self.values.get_mut(row * self.columns + column) {
            *place = value;
        }
    }

    /// The elements of the diagonal.
    pub fn diagonal(&self) -> impl Iterator<Item = f64> {
        self.values.iter().step_by(self.columns + 1).copied()
    }

    /// The sum of the products of equal places.
    pub fn inner(&self, other: &Self) -> f64 {
        self.values.iter().zip(&other.values).map(|(one, other)| one * other).sum()
    }
}

/// `a @ b.T` of matrices with `inner` columns.
pub fn by_rows(a: &[f64], b: &[f64], inner: usize) -> Matrix {
    let inner = inner.max(1);
    let columns = b.len() / inner;
    let values = a.chunks_exact(inner).flat_map(|one| b.chunks_exact(inner).map(|other| dot(one, other))).collect();
    Matrix { columns, values }
}

/// `a.T @ b` of matrices with `a_columns` and `b_columns` columns.
pub fn by_columns(a: &[f64], a_columns: usize, b: &[f64], b_columns: usize) -> Matrix {
    let mut product = Matrix::zeros(a_columns, b_columns);
    for (one, other) in a.chunks_exact(a_columns.max(1)).zip(b.chunks_exact(b_columns.max(1))) {
        for (sums, left) in product.values.chunks_exact_mut(b_columns.max(1)).zip(one) {
            sums.iter_mut().zip(other).for_each(|(sum, right)| *sum += left * right);
        }
    }
    product
}

/// The root of a sum of squares that rounding may have left below zero; NaN stays NaN.
pub fn root(square: f64) -> f64 {
    if square < 0.0 { 0.0 } else { square.sqrt() }
}

/// Lanes of [`dot`]: sums kept apart, which the compiler turns into vectors.
const LANES: usize = 8;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    rest + sums.iter().sum::<f64>()
}

/// The singular values of `up @ down`, largest first, from `up.T @ up` and `down @ down.T`.
///
/// With a Cholesky factor L of the second they are the roots of the eigenvalues of `L.T @ (up.T @ up) @ L`. Values below
/// about 1e-8 of the largest are noise.
pub fn singular_values(up: &Matrix, down: &Matrix) -> Vec<f64> {
    let size = down.columns;
    let lower = cholesky(down);
    let left = product(up, &lower, size, |row, inner| (row, inner));
    let symmetric = product(&lower, &left, size, |row, inner| (inner, row));
    let mut values: Vec<f64> = eigenvalues(symmetric).iter().map(|value| root(*value)).collect();
    values.sort_by(|one, other| other.total_cmp(one));
    values
}

/// The product of two square matrices, the first read at the place that `turn` gives.
fn product(a: &Matrix, b: &Matrix, size: usize, turn: impl Fn(usize, usize) -> (usize, usize)) -> Matrix {
    let mut found = Matrix::zeros(size, size);
    for row in 0..size {
        for inner in 0..size {
            let (i, j) = turn(row, inner);
            let factor = a.at(i, j);
            for column in 0..size {
                found.set(row, column, found.at(row, column) + factor * b.at(inner, column));
            }
        }
    }
    found
}

/// The lower factor of a matrix that may be singular: a pivot that rounding leaves at or below zero makes a column of zeros.
fn cholesky(matrix: &Matrix) -> Matrix {
    let size = matrix.columns;
    let mut lower = Matrix::zeros(size, size);
    for column in 0..size {
        let sum = |row: usize, lower: &Matrix| -> f64 {
            matrix.at(row, column)
                - (0..column).map(|inner| lower.at(row, inner) * lower.at(column, inner)).sum::<f64>()
        };
        let pivot = sum(column, &lower);
        if pivot <= matrix.at(column, column) * f64::EPSILON {
            continue;
        }
        let root = pivot.sqrt();
        for row in column..size {
            let value = sum(row, &lower) / root;
            lower.set(row, column, value);
        }
    }
    lower
}

/// The most passes of Jacobi's method; it converges quadratically, in eight or so.
const MAX_SWEEPS: usize = 30;

/// The eigenvalues of a symmetric matrix by Jacobi's rotations.
fn eigenvalues(mut matrix: Matrix) -> Vec<f64> {
    let size = matrix.columns;
    let scale: f64 = matrix.inner(&matrix);
    for _ in 0..MAX_SWEEPS {
        let pairs = || (0..size).flat_map(|p| (p + 1..size).map(move |q| (p, q)));
        let off: f64 = pairs().map(|(p, q)| matrix.at(p, q).powi(2)).sum();
        if off <= scale * 1e-28 || !off.is_finite() {
            break;
        }
        for (p, q) in pairs() {
            rotate(&mut matrix, p, q);
        }
    }
    matrix.diagonal().collect()
}

/// Turns the plane of `p` and `q` so that their common element becomes zero.
fn rotate(matrix: &mut Matrix, p: usize, q: usize) {
    let common = matrix.at(p, q);
    if common == 0.0 {
        return;
    }
    let theta = (matrix.at(q, q) - matrix.at(p, p)) / (2.0 * common);
    let tangent = theta.signum() / (theta.abs() + theta.hypot(1.0));
    let cosine = tangent.hypot(1.0).recip();
    let sine = tangent * cosine;
    for other in 0..matrix.columns {
        let (a, b) = (matrix.at(other, p), matrix.at(other, q));
        matrix.set(other, p, cosine * a - sine * b);
        matrix.set(other, q, sine * a + cosine * b);
    }
    for other in 0..matrix.columns {
        let (a, b) = (matrix.at(p, other), matrix.at(q, other));
        matrix.set(p, other, cosine * a - sine * b);
        matrix.set(q, other, sine * a + cosine * b);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn multiply(up: &[f64], down: &[f64], rank: usize, inner: usize) -> Vec<f64> {
        let row = |row: &[f64]| -> Vec<f64> {
            (0..inner)
                .map(|column| row.iter().zip(down.iter().skip(column).step_by(inner)).map(|(a, b)| a * b).sum())
                .collect()
        };
        up.chunks_exact(rank).flat_map(row).collect()
    }

    fn numbers(count: usize) -> impl Strategy<Value = Vec<f64>> {
        prop::collection::vec(-4.0..4.0_f64, count)
    }

    proptest! {
        #[test]
        fn inner_products_of_products_need_only_the_factors(
            (rank, other, outer, inner) in (1..5_usize, 1..5_usize, 1..12_usize, 1..20_usize),
            pool in numbers(4 * 20 * 4),
        ) {
            let take = |from: usize, count: usize| pool.iter().copied().cycle().skip(from).take(count).collect::<Vec<_>>();
            let (up, down) = (take(0, outer * rank), take(7, rank * inner));
            let (up2, down2) = (take(31, outer * other), take(53, other * inner));
            let dense = dot(&multiply(&up, &down, rank, inner), &multiply(&up2, &down2, other, inner));
            let thin = by_columns(&up, rank, &up2, other).inner(&by_rows(&down, &down2, inner));
            prop_assert!((dense - thin).abs() <= 1e-9 * (1.0 + dense.abs() + thin.abs()) * 100.0, "{dense} {thin}");
        }

        #[test]
        fn the_spectrum_has_the_norm_and_the_rank_of_the_product(
            (rank, outer, inner) in (1..6_usize, 6..12_usize, 6..20_usize), zeroed in 0..3_usize, pool in numbers(400),
        ) {
            let up: Vec<f64> = pool.iter().take(outer * rank).copied().collect();
            let mut down: Vec<f64> = pool.iter().rev().take(rank * inner).copied().collect();
            down.iter_mut().take(zeroed.min(rank) * inner).for_each(|value| *value = 0.0);
            let found = singular_values(&by_columns(&up, rank, &up, rank), &by_rows(&down, &down, inner));
            let dense = multiply(&up, &down, rank, inner);
            let (square, expected) = (found.iter().map(|value| value * value).sum::<f64>(), dot(&dense, &dense));
            prop_assert!((square - expected).abs() <= 1e-9 * (1.0 + expected));
            let limit = found.first().copied().unwrap_or(0.0) * 1e-6 + 1e-12;
            prop_assert!(found.iter().filter(|value| **value > limit).count() <= rank - zeroed.min(rank));
        }
    }
}
