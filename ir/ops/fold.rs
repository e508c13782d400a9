//! Reference evaluation of weights computed from weights when packing. Products and sums are in f64.
//!
//! Packing never holds more of a large weight than it must, so it goes row by row ([`crate::recipe`]): what is said there
//! of an op must be true here.

use super::contract::dot;
use crate::Result;
use crate::graph::Attrs;
use crate::value::{Tensor, Value};

/// `w[.., k] g[k]`.
pub fn scale_columns(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (w, g) = (o[0].tensor()?, o[1].tensor()?);
    let scaled = w.data.iter().zip(g.data.iter().cycle()).map(|(w, g)| w * g);
    Ok(Value::Tensor(Tensor::new(w.shape.clone(), scaled.collect())))
}

/// `w[.., n, k] g[n]`.
pub fn scale_rows(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (w, g) = (o[0].tensor()?, o[1].tensor()?);
    let scaled = w.rows().zip(g.data.iter().cycle()).flat_map(|(row, g)| row.iter().map(move |w| w * g));
    Ok(Value::Tensor(Tensor::new(w.shape.clone(), scaled.collect())))
}

/// `a[n, m] b[m, k]`.
pub fn multiply_weights(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (a, b) = (o[0].tensor()?, o[1].tensor()?);
    let k = b.width();
    let mut y = Vec::with_capacity(a.shape[0] * k);
    for row in a.rows() {
        let mut sums = vec![0f64; k];
        for (a, b) in row.iter().zip(b.rows()) {
            sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += *a as f64 * *b as f64);
        }
        y.extend(sums.into_iter().map(|sum| sum as f32));
    }
    Ok(Value::Tensor(Tensor::new([a.shape[0], k], y)))
}

/// `w[n, k] v[k]`.
pub fn times_vector(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (w, v) = (o[0].tensor()?, o[1].tensor()?);
    let y: Vec<f32> = w.rows().map(|row| dot(row, &v.data) as f32).collect();
    Ok(Value::Tensor(Tensor::new([w.shape[0]], y)))
}

/// `(-1)^(bits common to i and j) / sqrt(size)`.
pub fn hadamard_matrix(_: &[&Value], attrs: &Attrs) -> Result<Value> {
    let size = attrs.size("size");
    let entry = 1.0 / (size as f64).sqrt();
    let even = |at: usize| ((at / size) & (at % size)).count_ones().is_multiple_of(2);
    let sign = |at: usize| if even(at) { entry } else { -entry };
    Ok(Value::Tensor(Tensor::new([size, size], (0..size * size).map(|at| sign(at) as f32).collect())))
}

pub fn slice_rows(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let (w, from, count) = (o[0].tensor()?, attrs.size("from"), attrs.size("count"));
    let mut shape = w.shape.clone();
    shape[0] = count;
    Ok(Value::Tensor(Tensor::new(shape, (from..from + count).flat_map(|i| w.outer(i).to_vec()).collect())))
}

pub fn concat_rows(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (a, b) = (o[0].tensor()?, o[1].tensor()?);
    let mut shape = a.shape.clone();
    shape[0] += b.shape[0];
    Ok(Value::Tensor(Tensor::new(shape, [&a.data[..], &b.data[..]].concat())))
}
