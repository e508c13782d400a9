//! Operations of each op, for the roofline: from types of operands and attributes, for `rows` rows of the first
//! activation and attention over `context` positions.
//!
//! A product and a sum count one each; so do division, exponential and square root, whose rates differ less than the
//! roofline's own error. Moving bytes is free here.

use crate::graph::Attrs;
use crate::layout::STRIP;
use crate::planes::GROUP;
use crate::types::{Dim, Type};

/// Elements of one row.
fn width(ty: &Type) -> f64 {
    ty.row_width().unwrap_or(0) as f64
}

/// Extent of the last axis.
fn last(ty: &Type) -> f64 {
    match ty.as_tensor() {
        Some((_, [.., Dim::N(k)])) => *k as f64,
        _ => 0.0,
    }
}

pub fn none(_: &[&Type], _: &Attrs, _: &Type, _: f64, _: f64) -> f64 {
    0.0
}

/// `N` operations for each element of the first operand.
pub fn each<const N: u32>(o: &[&Type], _: &Attrs, _: &Type, rows: f64, _: f64) -> f64 {
    N as f64 * rows * width(o[0])
}

/// `N` operations for each element of the result.
pub fn made<const N: u32>(_: &[&Type], _: &Attrs, ty: &Type, rows: f64, _: f64) -> f64 {
    N as f64 * rows * width(ty)
}

/// A dot product over the last axis of the first operand for each element of the result.
pub fn products(o: &[&Type], _: &Attrs, ty: &Type, rows: f64, _: f64) -> f64 {
    2.0 * rows * width(ty) * last(o[0])
}

/// Two multiply-adds for each row of the matrix and group of 32, beside the products, which the estimates count.
pub fn bounds(o: &[&Type], _: &Attrs, ty: &Type, rows: f64, _: f64) -> f64 {
    4.0 * rows * width(ty) * STRIP as f64 / 3.0 * last(o[0]) / GROUP as f64
}

/// [`products`] with the activations, which come third.
pub fn rescore(o: &[&Type], attrs: &Attrs, ty: &Type, rows: f64, context: f64) -> f64 {
    products(&o[2..], attrs, ty, rows, context)
}

/// Scores, weighted sum, and five operations of softmax for each head and position seen.
pub fn attention(o: &[&Type], attrs: &Attrs, _: &Type, rows: f64, context: f64) -> f64 {
    let window = attrs.int("window") as f64;
    let seen = if window > 0.0 { context.min(window) } else { context };
    let (dim, all_heads) = (last(o[0]), width(o[0]));
    rows * seen * (4.0 * all_heads + 5.0 * all_heads / dim.max(1.0))
}
