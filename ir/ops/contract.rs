//! Reference evaluation of products with weights. Products and sums are in f64.

use crate::Result;
use crate::graph::Attrs;
use crate::value::{Tensor, Value};

/// Four partial sums let the processor overlap the additions.
pub fn dot(x: &[f32], y: &[f32]) -> f64 {
    let (xs, ys) = (x.as_chunks::<4>(), y.as_chunks::<4>());
    let mut sums = [0f64; 4];
    for (x, y) in xs.0.iter().zip(ys.0) {
        for i in 0..4 {
            sums[i] += x[i] as f64 * y[i] as f64;
        }
    }
    let rest: f64 = xs.1.iter().zip(ys.1).map(|(x, y)| *x as f64 * *y as f64).sum();
    sums.iter().sum::<f64>() + rest
}

/// `x[t, k] w[n, k]^T`.
pub fn matmul(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (x, w) = (o[0].tensor()?, o[1].tensor()?);
    let (t, n) = (x.shape[0], w.shape[0]);
    let mut y = vec![0.0; t * n];
    for (j, w) in w.rows().enumerate() {
        for (i, x) in x.rows().enumerate() {
            y[i * n + j] = dot(x, w) as f32;
        }
    }
    Ok(Value::Tensor(Tensor::new([t, n], y)))
}

/// `y[t, j] = x[t] or x[t, j] times w[expert j of t]^T`.
pub fn matmul_experts(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (x, w, routing) = (o[0].tensor()?, o[1].tensor()?, o[2].routing()?); // x: [t, k] or [t, top, k]; w: [e, n, k]
    let (n, k) = (w.shape[1], w.shape[2]);
    let mut y = Vec::with_capacity(routing.chosen.len() * n);
    for (slot, expert) in routing.chosen.iter().enumerate() {
        let row = if x.shape.len() == 3 { slot } else { slot / routing.top };
        let x = &x.data[row * k..][..k];
        y.extend(w.outer(*expert).chunks_exact(k).map(|w| dot(x, w) as f32));
    }
    Ok(Value::Tensor(Tensor::new([x.shape[0], routing.top, n], y)))
}

/// `y[t] = sum over j of weight[t, j] x[t, j]`.
pub fn combine(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (x, routing) = (o[0].tensor()?, o[1].routing()?); // x: [t, top, n]
    let (t, top, n) = (x.shape[0], x.shape[1], x.shape[2]);
    let mut y = Vec::with_capacity(t * n);
    for token in 0..t {
        for i in 0..n {
            let term = |j: usize| routing.weights[token * top + j] as f64 * x.data[(token * top + j) * n + i] as f64;
            y.push((0..top).map(term).sum::<f64>() as f32);
        }
    }
    Ok(Value::Tensor(Tensor::new([t, n], y)))
}
