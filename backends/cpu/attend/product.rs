//! The loop that both products of attention are: rows times lanes, with every accumulator in a register.
//!
//! ```text
//! for k: line = b[k][chunks]                    a few vectors, widened to f32
//!        for row: sums[row][chunks] += a[row][k] * line
//! ```

use crate::cpu::cached::Stored;
use crate::cpu::rows::walk::LANES;
use crate::emit::{Emitter, F32, Val};
use mansard_ir::layout::ALIGN;

/// `sums[row][chunk] += sum over k of a[row][k] * b[k][chunk]`, `a` in f32, `b` as cached.
pub(super) struct Product<'a> {
    pub(super) rows: usize,
    pub(super) depth: Val,
    pub(super) a: Val,
    pub(super) a_stride: usize,
    pub(super) b: Val,
    pub(super) b_stride: usize,
    pub(super) stored: Stored,
    /// Alignment of whole vectors of `b`.
    pub(super) align: usize,
    /// `(first element, lanes)`.
    pub(super) chunks: &'a [(usize, usize)],
    /// What will be read next; as much of it is asked for as is read of `b`.
    pub(super) next: Val,
}

impl Product<'_> {
    pub(super) fn emit(&self, e: &mut Emitter, sums: &[Val]) -> Vec<Val> {
        let (zero, one) = (e.i64(0), e.i64(1));
        e.for_loop((zero, self.depth, one), sums, |e, k, sums| {
            let mut sums = sums.to_vec();
            let line = e.row(self.b, k, self.b_stride);
            let b: Vec<Val> = self.chunks.iter().map(|c| self.load(e, line, *c)).collect();
            let next = e.row(self.next, k, self.b_stride);
            for offset in (0..self.b_stride).step_by(ALIGN) {
                let offset = e.i64(offset as i64);
                e.prefetch(next, offset, 1);
            }
            let column = e.row(self.a, k, 4);
            for row in 0..self.rows {
                let at = e.gep_const(column, row * self.a_stride);
                let a = e.load(at, F32, 4);
                for (i, b) in b.iter().enumerate() {
                    let a = e.broadcast(a, b.ty.lanes);
                    let sum = &mut sums[row * self.chunks.len() + i];
                    *sum = e.fma(a, *b, *sum);
                }
            }
            sums
        })
    }

    fn load(&self, e: &mut Emitter, line: Val, (first, lanes): (usize, usize)) -> Val {
        let at = e.gep_const(line, first * self.stored.bytes());
        let align = if lanes == LANES { self.align } else { self.stored.bytes() };
        self.stored.load(e, at, lanes, align)
    }
}
