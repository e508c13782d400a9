//! Reference evaluation of ops that need a whole row: normalizations, quantization, routing, pooling.
//!
//! Sums run in f64. Quantization is defined in f32, so that code generated for it can agree to the bit.

use crate::graph::Attrs;
use crate::layout::A8;
use crate::value::{Routing, Tensor, Value, rounded_to_codes};
use crate::{Result, bail};

/// Each row (last axis) from the whole row.
fn by_row(o: &[&Value], f: impl Fn(&[f32], &mut Vec<f32>)) -> Result<Value> {
    let x = o[0].tensor()?;
    let mut y = Vec::with_capacity(x.data.len());
    for row in x.rows() {
        f(row, &mut y);
    }
    Ok(Value::Tensor(Tensor::new(x.shape.clone(), y)))
}

fn mean(row: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    row.iter().map(|x| f(*x as f64)).sum::<f64>() / row.len() as f64
}

pub fn rms_normalize(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let eps = attrs.float("eps");
    by_row(o, |row, y| {
        let scale = 1.0 / (mean(row, |x| x * x) + eps).sqrt();
        y.extend(row.iter().map(|x| (*x as f64 * scale) as f32));
    })
}

pub fn layer_normalize(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let eps = attrs.float("eps");
    by_row(o, |row, y| {
        let center = mean(row, |x| x);
        let scale = 1.0 / (mean(row, |x| (x - center) * (x - center)) + eps).sqrt();
        y.extend(row.iter().map(|x| ((*x as f64 - center) * scale) as f32));
    })
}

pub fn l2_normalize(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let eps = attrs.float("eps");
    by_row(o, |row, y| {
        let norm = row.iter().map(|x| *x as f64 * *x as f64).sum::<f64>().sqrt().max(eps);
        y.extend(row.iter().map(|x| (*x as f64 / norm) as f32));
    })
}

/// The reals that the codes stand for: `scale * code`. A group of zeros has scale 0.
pub fn quantize(o: &[&Value], _: &Attrs) -> Result<Value> {
    by_row(o, |row, y| row.chunks(A8::GROUP).for_each(|group| y.extend(rounded_to_codes(group))))
}

/// The sum of what both planes stand for.
pub fn quantize_fine(o: &[&Value], _: &Attrs) -> Result<Value> {
    by_row(o, |row, y| {
        for group in row.chunks(A8::GROUP) {
            let coarse = rounded_to_codes(group);
            let left: Vec<f32> = group.iter().zip(&coarse).map(|(x, c)| x - c).collect();
            y.extend(coarse.iter().zip(rounded_to_codes(&left)).map(|(c, f)| c + f));
        }
    })
}

pub fn route(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let (scores, top) = (o[0].tensor()?, attrs.size("top")); // [t, experts]
    let experts = scores.width();
    let (mut chosen, mut weights) = (vec![], vec![]);
    for row in scores.rows() {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let exps: Vec<f64> = row.iter().map(|x| (*x as f64 - most).exp()).collect();
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a])); // stable: the lower index first
        order.truncate(top);
        let total: f64 = if attrs.bool("normalize") { order.iter().map(|e| exps[*e]).sum() } else { exps.iter().sum() };
        weights.extend(order.iter().map(|e| (exps[*e] / total) as f32));
        chosen.extend(order);
    }
    Ok(Value::Routing(Routing { top, experts, chosen, weights }))
}

pub fn mean_pool(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (x, step) = (o[0].tensor()?, o[1].step()?); // [t, n]
    let mut y = vec![];
    for (s, sequence) in step.sequences.iter().enumerate() {
        if sequence.len == 0 {
            bail!(Input, "sequence {s} has no tokens to take the mean of");
        }
        let tokens = sequence.start..sequence.start + sequence.len;
        for i in 0..x.width() {
            let sum: f64 = tokens.clone().map(|t| x.outer(t)[i] as f64).sum();
            y.push((sum / sequence.len as f64) as f32);
        }
    }
    Ok(Value::Tensor(Tensor::new([step.sequences.len(), x.width()], y)))
}
