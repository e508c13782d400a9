//! Reference evaluation of the vocabulary projection in two planes.
//!
//! ```text
//! estimate         %x, %w     x times the first plane
//! estimate_bounds  %x, %w     for every 16 rows of w: the largest estimate, what no product is likely above, and which row
//! rescore                     the largest estimates' exact products are a threshold; who may reach it gets its second plane
//! ```
//!
//! The threshold for `k` logits is the least of `k` exact products, so no more than the `k`-th largest of all: a row that
//! is not likely to reach it is not among them.

use super::contract::dot;
use crate::Result;
use crate::graph::Attrs;
use crate::layout::STRIP;
use crate::planes::{GROUP, Planes};
use crate::value::{Tensor, Value};

/// `x[r, k] upper[n, k]^T`.
pub fn estimate(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (x, w, step) = (o[0].tensor()?, o[1].planes()?, o[2].step()?);
    let n = w.shape[0];
    let y = if step.candidates == 0 { vec![0.0; x.rows().len() * n] } else { estimates(x, w) };
    Ok(Value::Tensor(Tensor::new([x.shape[0], n], y)))
}

fn estimates(x: &Tensor, w: &Planes) -> Vec<f32> {
    let products = |x| w.upper.chunks_exact(w.shape[1]).map(move |w| dot(x, w) as f32);
    x.rows().flat_map(products).collect()
}

/// `[r, 3 n / 16]`: of all strips the largest estimates, then the upper bounds, then the numbers of the rows that have them.
pub fn bounds(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let (x, w, step) = (o[0].tensor()?, o[1].planes()?, o[2].step()?);
    let (n, margin) = (w.shape[0], attrs.float("margin"));
    let strips = n.div_ceil(STRIP);
    let mut y = vec![];
    for x in x.rows().filter(|_| step.candidates > 0) {
        let estimates = estimates(&Tensor::new([1, x.len()], x.to_vec()), w);
        let squares: Vec<f64> = x.chunks_exact(GROUP).map(|x| dot(x, x)).collect();
        let deviation = |deviations: &[f32]| {
            let of_group = |(d, x2): (&f32, &f64)| (*d as f64).powi(2) * x2;
            deviations.iter().zip(&squares).map(of_group).sum::<f64>().sqrt() * margin
        };
        let deviations: Vec<f64> = w.deviations.chunks_exact(squares.len()).map(deviation).collect();
        let (mut largest, mut upper, mut whose) = (vec![], vec![], vec![]);
        for (strip, (estimates, deviations)) in estimates.chunks(STRIP).zip(deviations.chunks(STRIP)).enumerate() {
            let most = estimates.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let deviation = deviations.iter().copied().fold(0.0, f64::max);
            largest.push(most);
            upper.push((most as f64 + deviation) as f32);
            let lane = estimates.iter().position(|e| *e == most).unwrap_or(0);
            whose.push((strip * STRIP + lane) as f32);
        }
        y.extend(largest.into_iter().chain(upper).chain(whose));
    }
    y.resize(x.rows().len() * 3 * strips, 0.0);
    Ok(Value::Tensor(Tensor::new([x.shape[0], 3 * strips], y)))
}

/// The estimates, plus `x[r, k] lower[n, k]^T` where that can matter. With no number of candidates, all exactly.
pub fn rescore(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (estimates, bounds, x) = (o[0].tensor()?, o[1].tensor()?, o[2].tensor()?);
    let (w, candidates) = (o[3].planes()?, o[4].step()?.candidates);
    let (n, k) = (w.shape[0], w.shape[1]);
    let mut y = estimates.data.to_vec();
    for ((x, y), bounds) in x.rows().zip(y.chunks_exact_mut(n)).zip(bounds.rows()) {
        let strips = bounds.len() / 3;
        let (largest, upper, whose) = (&bounds[..strips], &bounds[strips..2 * strips], &bounds[2 * strips..]);
        let second = |j: usize| dot(x, &w.lower[j * k..][..k]);
        let mut order: Vec<usize> = (0..strips).collect();
        order.sort_by(|a, b| largest[*b].total_cmp(&largest[*a])); // stable: the lower index first
        let exact = |strip: &usize| (largest[*strip] as f64 + second((whose[*strip] as usize).min(n - 1))) as f32;
        let enough = candidates > 0 && candidates <= strips;
        let threshold = order.iter().take(candidates).map(exact).fold(f32::INFINITY, f32::min);
        let threshold = if enough { threshold } else { f32::NEG_INFINITY };
        for (j, y) in y.iter_mut().enumerate() {
            let (most, deviation) = (upper[j / STRIP], upper[j / STRIP] - largest[j / STRIP]);
            if candidates == 0 {
                *y = (dot(x, &w.upper[j * k..][..k]) + second(j)) as f32;
            } else if most >= threshold && *y + deviation >= threshold {
                *y = (*y as f64 + second(j)) as f32;
            }
        }
    }
    Ok(Value::Tensor(Tensor::new(estimates.shape.clone(), y)))
}
