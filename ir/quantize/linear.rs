//! What quantizers need of linear algebra: sums of rows, and symmetric positive matrices -> triangular factors, `H = U D U^T`
//! with `U` upper triangular, ones on its diagonal.
//!
//! Factors from the last column to the first, in blocks of columns, so that most of the work is products of matrices. In f64. Source: Golub and Van Loan, "Matrix Computations", section 4.1 (LDL^T, from the other end).

use ndarray::{ArrayView2, ArrayViewMut2, Axis, linalg::general_mat_mul, s};

/// Columns that are factored together.
const BLOCK: usize = 48;

/// `to += sum of factors[i] * row(i)`, four rows at a time; every row is as long as `to`, or longer.
pub fn add<'a>(to: &mut [f32], factors: &[f32], row: impl Fn(usize) -> &'a [f32]) {
    const LANES: usize = 8;
    let (fours, rest) = factors.as_chunks::<4>();
    for (i, [a, b, c, d]) in fours.iter().enumerate() {
        let rows = [row(4 * i), row(4 * i + 1), row(4 * i + 2), row(4 * i + 3)].map(|row| &row[..to.len()]);
        let [p, q, r, s] = rows.map(|row| row.as_chunks::<LANES>());
        let (lines, last) = to.as_chunks_mut::<LANES>();
        for ((((to, p), q), r), s) in lines.iter_mut().zip(p.0).zip(q.0).zip(r.0).zip(s.0) {
            for l in 0..LANES {
                to[l] += (a * p[l] + b * q[l]) + (c * r[l] + d * s[l]);
            }
        }
        for (l, to) in last.iter_mut().enumerate() {
            *to += (a * p.1[l] + b * q.1[l]) + (c * r.1[l] + d * s.1[l]);
        }
    }
    for (i, factor) in rest.iter().enumerate() {
        to.iter_mut().zip(row(4 * fours.len() + i)).for_each(|(to, x)| *to += factor * x);
    }
}

/// What is right of the diagonal of `U`, row-major in place of `a` (of which only that and the diagonal is read), and `D` in
/// place of the diagonal. `None` where the matrix is not positive.
pub fn factor(a: &mut [f64], n: usize) -> Option<()> {
    let mut d = vec![0.0; n];
    let mut last = n;
    while last > 0 {
        let first = last.saturating_sub(BLOCK);
        // What later columns explain.
        let mut view = ArrayViewMut2::from_shape((n, n), &mut *a).ok()?;
        let (block, later) = view.multi_slice_mut((s![..last, first..last], s![..last, last..]));
        let scaled = &later.slice(s![first.., ..]) * &ArrayView2::from_shape((1, n - last), &d[last..]).ok()?;
        general_mat_mul(-1.0, &later, &scaled.t(), 1.0, &mut { block });
        // What the block's own explain.
        for j in (first..last).rev() {
            let pivot: Vec<f64> = (j + 1..last).map(|k| a[j * n + k] * d[k]).collect();
            let own = a[j * n + j] - dot(&a[j * n + j + 1..j * n + last], &pivot);
            if !(own.is_finite() && own > 0.0) {
                return None;
            }
            d[j] = own;
            for row in a[..j * n].chunks_exact_mut(n) {
                row[j] = (row[j] - dot(&row[j + 1..last], &pivot)) / own;
            }
        }
        last = first;
    }
    d.iter().enumerate().for_each(|(j, d)| a[j * n + j] = *d);
    Some(())
}

/// Rows `x` of which `x U D U^T` are the rows given, in their place; `u` as [`factor`] leaves it.
pub fn solve(u: &[f64], n: usize, rows: &mut [f64]) {
    let size = (rows.len() / n.max(1), n);
    let (Ok(factors), Ok(mut all)) = (ArrayView2::from_shape((n, n), u), ArrayViewMut2::from_shape(size, rows)) else {
        return;
    };
    // Times (U^T)^-1, from the last column to the first.
    let mut last = n;
    while last > 0 {
        let first = last.saturating_sub(BLOCK);
        let (mut block, after) = all.multi_slice_mut((s![.., first..last], s![.., last..]));
        general_mat_mul(-1.0, &after, &factors.slice(s![first..last, last..]).t(), 1.0, &mut block);
        for row in block.rows_mut() {
            let Some(row) = row.into_slice() else { return };
            for j in (0..row.len()).rev() {
                row[j] -= dot(&row[j + 1..], &u[(first + j) * n + first + j + 1..(first + j) * n + last]);
            }
        }
        last = first;
    }
    // Times (U D)^-1, from the first column to the last.
    for first in (0..n).step_by(BLOCK) {
        let last = n.min(first + BLOCK);
        let (before, mut block) = all.multi_slice_mut((s![.., ..first], s![.., first..last]));
        block.axis_iter_mut(Axis(1)).zip(first..).for_each(|(mut column, j)| column /= u[j * n + j]);
        general_mat_mul(-1.0, &before, &factors.slice(s![..first, first..last]), 1.0, &mut block);
        for row in block.rows_mut() {
            let Some(row) = row.into_slice() else { return };
            for j in 0..row.len() {
                let (x, later) = (row[j], &u[(first + j) * n + first + j + 1..(first + j) * n + last]);
                row[j + 1..].iter_mut().zip(later).for_each(|(to, u)| *to -= x * u);
            }
        }
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    let (xs, ys) = (x.as_chunks::<8>(), y.as_chunks::<8>());
    let mut sums = [0f64; 8];
    for (x, y) in xs.0.iter().zip(ys.0) {
        for i in 0..8 {
            sums[i] += x[i] * y[i];
        }
    }
    let rest: f64 = xs.1.iter().zip(ys.1).map(|(x, y)| x * y).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Random;

    #[test]
    fn rows_add_up() {
        let mut random = Random::new(5);
        let (rows, factors): (Vec<Vec<f32>>, _) = ((0..6).map(|_| random.reals(21)).collect(), random.reals(6));
        let mut to = vec![1.0; 19];
        add(&mut to, &factors, |i| &rows[i]);
        for (j, x) in to.iter().enumerate() {
            let sum: f32 = rows.iter().zip(&factors).map(|(row, f)| row[j] * f).sum();
            assert!((x - 1.0 - sum).abs() < 1e-5, "{j}: {x} {sum}");
        }
    }

    #[test]
    fn factors_give_the_matrix_back() {
        for n in [1, 5, 48, 49, 131] {
            let mut random = Random::new(n as u64);
            let x: Vec<f64> = (0..2 * n * n).map(|_| f64::from(random.real())).collect();
            let row = |i: usize| x.iter().skip(i).step_by(n);
            let moment = |i: usize, j: usize| row(i).zip(row(j)).map(|(a, b)| a * b).sum::<f64>() + f64::from(i == j);
            let mut a: Vec<f64> = (0..n * n).map(|at| moment(at / n, at % n)).collect();
            factor(&mut a, n).unwrap();
            let u = |i: usize, k: usize| if i == k { 1.0 } else { a[i * n + k] };
            for (i, j) in (0..n).flat_map(|i| (i..n).map(move |j| (i, j))) {
                let back: f64 = (j..n).map(|k| u(i, k) * a[k * n + k] * u(j, k)).sum();
                assert!((back - moment(i, j)).abs() < 1e-9 * n as f64, "{n}: {i} {j}");
            }
            let wanted: Vec<f64> = random.reals(3 * n).into_iter().map(f64::from).collect();
            let product = |x: &[f64], j: usize| (0..n).map(|i| x[i] * moment(i, j)).sum::<f64>();
            let mut rows: Vec<f64> = wanted.chunks(n).flat_map(|x| (0..n).map(move |j| product(x, j))).collect();
            solve(&a, n, &mut rows);
            let most = rows.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(most < 1e-7 * n as f64, "{n}: {most}");
        }
        assert!(factor(&mut [1.0, 2.0, 2.0, 1.0], 2).is_none());
        assert!(factor(&mut [f64::NAN], 1).is_none());
    }
}
