//! Rope: rotates pairs inside each head by the token's angles; dims beyond the table's width pass.
//!
//! ```text
//! half      pairs (d, d + h)        y[d] = x[d] cos[d] - x[d+h] sin[d]     y[d+h] = x[d+h] cos[d] + x[d] sin[d]
//! adjacent  pairs (2d, 2d + 1)      y = x * (cos, cos) + swapped x * (-sin, sin)
//! ```

use super::Rows;
use super::schedule::{heads, width};
use super::walk;
use crate::emit::{Emitter, F32, Val};
use mansard_ir::{Node, Result, ValueId};

/// One head's addresses, and how they are aligned.
#[derive(Clone, Copy)]
struct Head {
    from: Val,
    to: Val,
    /// The table's row: cosines, then sines.
    table: Val,
    /// Pairs.
    half: usize,
    align: usize,
}

impl Rows<'_> {
    /// Emits `rope` for this row.
    pub(super) fn rope(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let (from, table) = (self.row_of(node.operands[0])?, self.row_of(node.operands[1])?);
        let (count, dim) = heads(self.graph, v)?;
        let half = width(self.graph, node.operands[1])? / 2;
        let adjacent = node.attrs.str("pairing") == "adjacent";
        let align = walk::head_align(count, dim);
        walk::heads(e, count, dim, &mut |e, _, offset| {
            let head = Head { from: e.gep(from, offset), to: e.gep(to, offset), table, half, align };
            if adjacent {
                rotate_neighbours(e, head)
            } else {
                rotate_halves(e, head)
            }
            let (from, to) = (e.gep_const(head.from, 8 * half), e.gep_const(head.to, 8 * half));
            let align = if half.is_multiple_of(walk::LANES / 2) { align } else { 4 };
            walk::visit(e, dim - 2 * half, &mut |e, chunk| {
                let x = chunk.load(e, from, align);
                chunk.store(e, x, to, align);
            });
        });
        Ok(())
    }
}

fn rotate_halves(e: &mut Emitter, head: Head) {
    let sines = e.gep_const(head.table, 4 * head.half);
    let (second, to_second) = (e.gep_const(head.from, 4 * head.half), e.gep_const(head.to, 4 * head.half));
    let second_align = if head.half.is_multiple_of(walk::LANES) { head.align } else { 4 };
    let sine_align = if head.half.is_multiple_of(walk::LANES) { 64 } else { 4 };
    walk::visit(e, head.half, &mut |e, chunk| {
        let (cos, sin) = (chunk.load(e, head.table, 64), chunk.load(e, sines, sine_align));
        let (x0, x1) = (chunk.load(e, head.from, head.align), chunk.load(e, second, second_align));
        let (a, b) = (e.mul(x1, sin), e.mul(x1, cos));
        let minus = e.neg(a);
        let (y0, y1) = (e.fma(x0, cos, minus), e.fma(x0, sin, b));
        chunk.store(e, y0, head.to, head.align);
        chunk.store(e, y1, to_second, second_align);
    });
}

fn rotate_neighbours(e: &mut Emitter, head: Head) {
    let sines = e.gep_const(head.table, 4 * head.half);
    walk::visit(e, 2 * head.half, &mut |e, chunk| {
        let lanes = chunk.lanes;
        let twice: Vec<usize> = (0..lanes).map(|i| i / 2).collect();
        let swap: Vec<usize> = (0..lanes).map(|i| i ^ 1).collect();
        let spread = |e: &mut Emitter, base: Val| {
            let at = chunk.halved(e, base);
            let values = e.load(at, F32.x(lanes / 2), 4);
            e.shuffle(values, values, &twice)
        };
        let (cos, sin) = (spread(e, head.table), spread(e, sines));
        let x = chunk.load(e, head.from, head.align);
        let swapped = e.shuffle(x, x, &swap);
        // Even lanes take off what odd lanes add.
        let product = e.mul(swapped, sin);
        let minus = e.neg(product);
        let alternate: Vec<usize> = (0..lanes).map(|i| if i % 2 == 0 { lanes + i } else { i }).collect();
        let turned = e.shuffle(product, minus, &alternate);
        let y = e.fma(x, cos, turned);
        chunk.store(e, y, head.to, head.align);
    });
}
