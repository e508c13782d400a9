//! Reference evaluation of elementwise ops: `[..] -> [..]`, and of a vector repeated for every row.
//!
//! Each element is computed in f64 and rounded once.

use crate::Result;
use crate::graph::Attrs;
use crate::value::{Tensor, Value};

fn map(o: &[&Value], f: impl Fn(f64) -> f64) -> Result<Value> {
    let x = o[0].tensor()?;
    Ok(Value::Tensor(Tensor::new(x.shape.clone(), x.data.iter().map(|x| f(*x as f64) as f32).collect())))
}

/// `y` is repeated as often as `x` needs it: once for operands of one shape, once a row for vectors.
fn zip(o: &[&Value], f: impl Fn(f64, f64) -> f64) -> Result<Value> {
    let (x, y) = (o[0].tensor()?, o[1].tensor()?);
    let pairs = x.data.iter().zip(y.data.iter().cycle());
    Ok(Value::Tensor(Tensor::new(x.shape.clone(), pairs.map(|(x, y)| f(*x as f64, *y as f64) as f32).collect())))
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub fn add(o: &[&Value], _: &Attrs) -> Result<Value> {
    zip(o, |x, y| x + y)
}

pub fn mul(o: &[&Value], _: &Attrs) -> Result<Value> {
    zip(o, |x, y| x * y)
}

pub fn scale(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let by = attrs.float("by");
    map(o, |x| x * by)
}

pub fn offset(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let by = attrs.float("by");
    map(o, |x| x + by)
}

pub fn softcap(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let cap = attrs.float("cap");
    map(o, |x| cap * (x / cap).tanh())
}

pub fn silu(o: &[&Value], _: &Attrs) -> Result<Value> {
    map(o, |x| x * logistic(x))
}

pub fn gelu(o: &[&Value], _: &Attrs) -> Result<Value> {
    map(o, |x| x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2)) / 2.0)
}

pub fn gelu_tanh(o: &[&Value], _: &Attrs) -> Result<Value> {
    let k = (2.0 / std::f64::consts::PI).sqrt();
    map(o, |x| x * (1.0 + (k * (x + 0.044715 * x * x * x)).tanh()) / 2.0)
}

pub fn gelu_sigmoid(o: &[&Value], _: &Attrs) -> Result<Value> {
    map(o, |x| x * logistic(1.702 * x))
}

pub fn relu(o: &[&Value], _: &Attrs) -> Result<Value> {
    map(o, |x| x.max(0.0))
}

/// Rounds once, from f32.
pub fn round_bf16(o: &[&Value], _: &Attrs) -> Result<Value> {
    let x = o[0].tensor()?;
    let rounded = x.data.iter().map(|x| half::bf16::from_f32(*x).to_f32());
    Ok(Value::Tensor(Tensor::new(x.shape.clone(), rounded.collect())))
}

pub fn tanh(o: &[&Value], _: &Attrs) -> Result<Value> {
    map(o, f64::tanh)
}

pub fn sigmoid(o: &[&Value], _: &Attrs) -> Result<Value> {
    map(o, logistic)
}
