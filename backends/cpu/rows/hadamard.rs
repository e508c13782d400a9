//! The Hadamard transform of each head: sums and differences at ever larger strides.
//!
//! ```text
//! stride 1        a+b  a-b  c+d  c-d      by shuffles inside a vector
//! stride 16       v+w  v-w                of whole vectors
//! ```

use super::Rows;
use super::schedule::heads;
use super::walk::{self, LANES};
use crate::emit::{Emitter, F32, Val};
use mansard_ir::ops::hadamard_width;
use mansard_ir::{Node, Result, ValueId};

impl Rows<'_> {
    /// Emits `hadamard` for this row.
    pub(super) fn hadamard(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let from = self.row_of(node.operands[0])?;
        let (count, dim) = heads(self.graph, v)?;
        let width = hadamard_width(dim);
        let align = if width >= LANES { walk::head_align(count, dim) } else { 4 };
        walk::heads(e, count, dim, &mut |e, _, offset| {
            let (from, to) = (e.gep(from, offset), e.gep(to, offset));
            for first in (0..dim).step_by(width) {
                let (from, to) = (e.gep_const(from, 4 * first), e.gep_const(to, 4 * first));
                transform(e, width, (from, to), align);
            }
        });
        Ok(())
    }
}

/// One part of `width` elements.
fn transform(e: &mut Emitter, width: usize, (from, to): (Val, Val), align: usize) {
    let lanes = width.min(LANES);
    let place = |e: &mut Emitter, base, i: usize| e.gep_const(base, 4 * lanes * i);
    let mut x: Vec<Val> = vec![];
    for i in 0..width / lanes {
        let at = place(e, from, i);
        let loaded = e.load(at, F32.x(lanes), align);
        x.push((0..lanes.trailing_zeros()).fold(loaded, |x, bit| inside(e, x, 1 << bit)));
    }
    let vectors = x.len();
    for stride in (0..vectors.trailing_zeros()).map(|bit| 1 << bit) {
        for i in (0..vectors).filter(|i| i & stride == 0) {
            (x[i], x[i + stride]) = (e.add(x[i], x[i + stride]), e.sub(x[i], x[i + stride]));
        }
    }
    let factor = e.float(F32.x(lanes), (width as f32).sqrt().recip());
    for (i, x) in x.into_iter().enumerate() {
        let (x, at) = (e.mul(x, factor), place(e, to, i));
        e.store(x, at, align);
    }
}

/// Sums and differences of lanes `stride` apart.
fn inside(e: &mut Emitter, x: Val, stride: usize) -> Val {
    let lanes = x.ty.lanes;
    let swap: Vec<usize> = (0..lanes).map(|i| i ^ stride).collect();
    let swapped = e.shuffle(x, x, &swap);
    let (sum, difference) = (e.add(x, swapped), e.sub(swapped, x));
    let either: Vec<usize> = (0..lanes).map(|i| if i & stride == 0 { i } else { lanes + i }).collect();
    e.shuffle(sum, difference, &either)
}
