//! Reference evaluation of ops that move or rotate elements: gathers, views, rope.

use crate::graph::Attrs;
use crate::value::{Tensor, Value};
use crate::{Result, bail};

/// Leaves have no operands; the interpreter asks its caller for them.
pub fn weight(_: &[&Value], attrs: &Attrs) -> Result<Value> {
    bail!(Internal, "weight {:?} was not asked for", attrs.str("name"))
}

/// Slices of `table` along its first axis, by index.
fn gather(table: &Tensor, indices: &[i32]) -> Result<Value> {
    let rows = table.shape[0];
    let mut y = vec![];
    for (i, index) in indices.iter().enumerate() {
        match usize::try_from(*index) {
            Ok(index) if index < rows => y.extend_from_slice(table.outer(index)),
            _ => bail!(Input, "index {index} at {i} is out of range: there are {rows} rows"),
        }
    }
    let mut shape = table.shape.clone();
    shape[0] = indices.len();
    Ok(Value::Tensor(Tensor::new(shape, y)))
}

pub fn embed(o: &[&Value], _: &Attrs) -> Result<Value> {
    if let Value::Planes(planes) = o[1] {
        let whole = (0..planes.shape[0]).flat_map(|row| planes.row(row)).collect();
        return gather(&Tensor::new(planes.shape.clone(), whole), &o[0].ints()?.data);
    }
    gather(o[1].tensor()?, &o[0].ints()?.data)
}

pub fn select_rows(o: &[&Value], _: &Attrs) -> Result<Value> {
    gather(o[0].tensor()?, &o[1].ints()?.data)
}

pub fn rope_table(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let (positions, frequencies, scale) = (o[0].ints()?, o[1].tensor()?, attrs.float("scale"));
    let mut y = vec![];
    for position in &positions.data {
        let angle = |f: &f32| *position as f64 * *f as f64;
        y.extend(frequencies.data.iter().map(|f| (scale * angle(f).cos()) as f32));
        y.extend(frequencies.data.iter().map(|f| (scale * angle(f).sin()) as f32));
    }
    Ok(Value::Tensor(Tensor::new([positions.data.len(), 2 * frequencies.data.len()], y)))
}

/// `(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin)` for each pair of the first `2 h` dims of every head.
pub fn rope(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let (x, table) = (o[0].tensor()?, o[1].tensor()?); // [t, heads, dim], [t, 2 h]
    let (heads, half) = (x.shape[1], table.width() / 2);
    let adjacent = attrs.str("pairing") == "adjacent";
    let mut y = x.data.to_vec();
    for (row, head) in y.chunks_exact_mut(x.width()).enumerate() {
        let (cos, sin) = table.outer(row / heads).split_at(half);
        for d in 0..half {
            let (a, b) = if adjacent { (2 * d, 2 * d + 1) } else { (d, d + half) };
            let (x0, x1, cos, sin) = (head[a] as f64, head[b] as f64, cos[d] as f64, sin[d] as f64);
            head[a] = (x0 * cos - x1 * sin) as f32;
            head[b] = (x1 * cos + x0 * sin) as f32;
        }
    }
    Ok(Value::Tensor(Tensor::new(x.shape.clone(), y)))
}

/// Each head times `H / sqrt(n)` for each of its parts of `n` dims, `n` the largest power of two that divides its width; `H`
/// is the Hadamard matrix in Sylvester's order. Its own inverse. Large values in few dims are spread over all of them
/// (Ashkboos et al., QuaRot, 2024).
pub fn hadamard(o: &[&Value], _: &Attrs) -> Result<Value> {
    let x = o[0].tensor()?; // [t, heads, dim]
    let n = hadamard_width(x.width());
    let mut y = Vec::with_capacity(x.data.len());
    for part in x.data.chunks_exact(n) {
        let mut sums: Vec<f64> = part.iter().map(|x| f64::from(*x)).collect();
        for stride in (0..n.trailing_zeros()).map(|bit| 1 << bit) {
            for d in (0..n).filter(|d| d & stride == 0) {
                let (a, b) = (sums[d], sums[d + stride]);
                (sums[d], sums[d + stride]) = (a + b, a - b);
            }
        }
        y.extend(sums.iter().map(|sum| (sum / (n as f64).sqrt()) as f32));
    }
    Ok(Value::Tensor(Tensor::new(x.shape.clone(), y)))
}

/// The largest power of two that divides the width of a head.
pub fn hadamard_width(dim: usize) -> usize {
    1 << dim.trailing_zeros()
}

pub fn split_heads(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let (x, heads) = (o[0].tensor()?, attrs.size("heads"));
    Ok(Value::Tensor(Tensor { shape: vec![x.shape[0], heads, x.shape[1] / heads], data: x.data.clone() }))
}

pub fn merge_heads(o: &[&Value], _: &Attrs) -> Result<Value> {
    let x = o[0].tensor()?;
    Ok(Value::Tensor(Tensor { shape: vec![x.shape[0], x.shape[1] * x.shape[2]], data: x.data.clone() }))
}

pub fn slice(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let (x, from, count) = (o[0].tensor()?, attrs.size("from"), attrs.size("count"));
    let y: Vec<f32> = x.rows().flat_map(|row| row[from..from + count].to_vec()).collect();
    Ok(Value::Tensor(Tensor::new([x.shape[0], count], y)))
}

pub fn concat(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (x, y) = (o[0].tensor()?, o[1].tensor()?);
    let rows: Vec<f32> = x.rows().zip(y.rows()).flat_map(|(x, y)| [x, y].concat()).collect();
    Ok(Value::Tensor(Tensor::new([x.shape[0], x.width() + y.width()], rows)))
}
