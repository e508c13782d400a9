//! How far apart values are, and how far what an artifact promises lets them be.
//!
//! ```text
//! off of a row = |found - expected| / |expected|          Euclidean; of a layer with a residual stream / |what it adds to it|
//! ```
//!
//! A share of the row's own length, because rows of one step differ by orders of magnitude (a first token's residual stream
//! is often a thousand times longer). Rows that are nearly nothing count by a thousandth of the longest.

use mansard_ir::eval::{Tensor, Value};
use mansard_ir::ops::Class;
use mansard_ir::plan::Program;
use mansard_ir::{DType, Graph, Model, Node, Type, text};

/// Sums in another order, and functions by polynomials.
pub const ROUNDING: f64 = 1e-3;

/// Values beside a rounding that is part of the kernel: now and then another code or bf16 number is as near.
const ROUNDED: f64 = 1e-2;

/// Multiple of the expected error that is still believed.
const SAFETY: f64 = 4.0;

/// `off` of every row; `base` is what expected rows are measured from. A NaN, or another shape, is infinitely far.
pub fn rows(found: &Value, expected: &Value, base: Option<&Tensor>) -> Vec<f64> {
    let (Some((found, width)), Some((expected, _))) = (reals(found), reals(expected)) else {
        return if found == expected { vec![] } else { vec![f64::INFINITY] };
    };
    if found.len() != expected.len() {
        return vec![f64::INFINITY];
    }
    let base = base.map(|b| b.data.as_slice()).filter(|b| b.len() == expected.len());
    let length = |row: &mut dyn Iterator<Item = f64>| row.map(|x| x * x).sum::<f64>().sqrt();
    let (mut off, mut long) = (vec![], vec![]);
    for (row, (x, y)) in found.chunks(width).zip(expected.chunks(width)).enumerate() {
        let from = |i: usize| base.map_or(0.0, |b| f64::from(b[row * width + i]));
        off.push(length(&mut x.iter().zip(y).map(|(x, y)| f64::from(*x) - f64::from(*y))));
        long.push(length(&mut y.iter().enumerate().map(|(i, y)| f64::from(*y) - from(i))));
    }
    let least = long.iter().copied().fold(1e-20, f64::max) * 1e-3;
    let share = |(off, long): (f64, f64)| if off.is_nan() { f64::INFINITY } else { off / long.max(least) };
    off.into_iter().zip(long).map(share).collect()
}

/// The furthest row.
pub fn worst(found: &Value, expected: &Value) -> f64 {
    rows(found, expected, None).into_iter().fold(0.0, f64::max)
}

/// Root of the mean square.
pub fn typical(rows: &[f64]) -> f64 {
    (rows.iter().map(|x| x * x).sum::<f64>() / rows.len().max(1) as f64).sqrt()
}

/// The reals of a value, and how many of them make a row.
fn reals(value: &Value) -> Option<(Vec<f32>, usize)> {
    match value {
        Value::Tensor(t) => Some((t.data.to_vec(), t.shape.iter().skip(1).product::<usize>().max(1))),
        Value::Cache(c) => Some((c.sequences.iter().flat_map(|s| s.to_vec()).collect(), (c.heads * c.dim).max(1))),
        Value::Routing(r) => {
            // Each expert's weight: the order of experts that weigh the same is no difference.
            let mut weights = vec![0.0; r.chosen.len() / r.top.max(1) * r.experts];
            for (i, (expert, weight)) in r.chosen.iter().zip(&r.weights).enumerate() {
                *weights.get_mut(i / r.top.max(1) * r.experts + expert)? = *weight;
            }
            Some((weights, r.experts.max(1)))
        }
        _ => None,
    }
}

/// How far a compiled kernel may be from its body.
pub fn of_kernel(body: &Graph) -> f64 {
    let narrow = |ty: &Type| match ty {
        Type::Tensor { dtype, .. } => matches!(dtype, DType::BF16 | DType::A8 | DType::A16),
        Type::Cache { dtype, .. } => *dtype != DType::F32,
        Type::Routing { .. } => true,
        Type::Step => false,
    };
    // What meets bf16 is rounded to it inside the kernel: codes of weights, keys and values.
    let meets = |n: &Node| match n.operands.iter().map(|o| body.ty(*o)).collect::<Vec<_>>()[..] {
        [x, with, ..] if x.dtype() == Some(DType::BF16) => match with {
            Type::Cache { .. } => true,
            _ => with.dtype().is_some_and(|dtype| dtype.int().is_some()),
        },
        _ => false,
    };
    if body.nodes.iter().any(|n| !n.ty.is_static() && narrow(&n.ty) || meets(n)) { ROUNDED } else { ROUNDING }
}

/// How far the artifact's layers may be from those of a model in exact floats: [`SAFETY`] times what is [`expected`].
pub fn of_layers(program: &Program, model: &Model) -> f64 {
    ROUNDING + SAFETY * expected(program, model)
}

/// What int8 activations, caches and the formats that weights were rounded to come to in a layer, as independent errors of
/// normal values.
pub fn expected(program: &Program, model: &Model) -> f64 {
    let bodies = program.kernels.iter().filter_map(|k| text::parse("kernel", &k.text).ok());
    let quantizes = bodies.flat_map(|m| m.graphs).flat_map(|g| g.nodes).any(|n| n.op.class() == Class::Quantize);
    let activations = if quantizes { codes(8.0, 32) } else { 0.0 };
    let cache = program.caches.iter().map(|c| c.ty.split(['<', '>', ',']).nth(1).and_then(DType::parse));
    let cache = cache.map(|dtype| dtype.map_or(0.0, |dtype| rounding(dtype, 64))).fold(0.0, f64::max);
    let weights = program.weights.iter().map(|weight| of_weight(&weight.name, &weight.ty, model)).fold(0.0, f64::max);
    // Four contractions one after the other, each of rounded activations and weights.
    let once = activations * activations + weights * weights;
    (4.0 * once + 2.0 * cache * cache).sqrt()
}

/// How far a packed weight may be from the model's: nothing where the model stores it so, else its format's rounding.
pub fn of_weight(name: &str, ty: &str, model: &Model) -> f64 {
    let dtype = ty.split('[').next().and_then(DType::parse);
    match (dtype, model.weights.get(name)) {
        (Some(dtype), Ok(weight)) if weight.stored_as(dtype) => 0.0,
        (Some(dtype), _) => rounding(dtype, dtype.int().map_or(32, |int| int.group)),
        (None, _) => 0.0,
    }
}

/// Relative error of normal values rounded to a format, in groups of so many.
fn rounding(dtype: DType, group: usize) -> f64 {
    match dtype {
        DType::F32 => 0.0,
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        DType::FP8 | DType::E4M3_G32 | DType::E4M3_G128 => 2f64.powi(-4),
        DType::I8 => codes(8.0, group),
        _ => {
            let format = dtype.format();
            let bits = dtype.int().map_or(8.0 * format.block_bytes as f64 / format.block as f64, |int| int.bits.into());
            codes(bits, group)
        }
    }
}

/// The same for codes that span a group's largest value, `sqrt(2 ln 2n)` deviations: a uniform step over `sqrt(12)`.
fn codes(bits: f64, group: usize) -> f64 {
    (2.0 * (2.0 * group as f64).ln()).sqrt() / 2f64.powf(bits - 1.0) / 12f64.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(rows: usize, data: &[f32]) -> Value {
        Value::Tensor(Tensor::new([rows, data.len() / rows], data.to_vec()))
    }

    #[test]
    fn rows_are_measured_by_themselves() {
        let (x, y) = (tensor(2, &[1000.0, 0.0, 1.0, 0.0]), tensor(2, &[1000.0, 0.0, 1.5, 0.0]));
        assert!((worst(&y, &x) - 0.5).abs() < 1e-9 && worst(&x, &x) == 0.0);
        let base = Tensor::new([2, 2], vec![999.0, 0.0, 0.0, 0.0]);
        assert_eq!(rows(&y, &x, Some(&base)), [0.0, 0.5]);
        assert_eq!(worst(&tensor(1, &[f32::NAN, 1.0]), &tensor(1, &[0.0, 1.0])), f64::INFINITY);
        assert_eq!(worst(&tensor(1, &[1.0]), &x), f64::INFINITY);
    }

    #[test]
    fn wider_formats_promise_more() {
        let of = [DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q5_0, DType::Q4_0].map(|d| rounding(d, 32));
        assert!(of.is_sorted() && of[0] == 0.0 && (0.05..0.2).contains(&of[5]), "{of:?}");
    }
}
