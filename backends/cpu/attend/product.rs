//! The loop that both products of attention are: rows times lanes, with every accumulator in a register.
//!
//! ```text
//! for k: line = b[k][chunks]                    a few vectors, widened to f32
//!        for row: sums[row][chunks] += a[row][k] * line
//! ```

use crate::cpu::cached::{At, Stored};
use crate::cpu::rows::walk::LANES;
use crate::emit::{Emitter, F32, Val};
use mansard_ir::layout::ALIGN;

/// Which elements share bytes, where some do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shared {
    /// Those of two `k`.
    Lines,
    /// Those of two chunks.
    Lanes,
}

/// `sums[row][chunk] += sum over k of a[row][k] * b[k][chunk]`, `a` in f32, `b` as cached.
pub(super) struct Product<'a> {
    pub(super) rows: usize,
    pub(super) depth: Val,
    pub(super) a: Val,
    pub(super) a_stride: usize,
    pub(super) b: Val,
    pub(super) b_stride: usize,
    pub(super) stored: Stored,
    /// Where there are two elements in a byte.
    pub(super) shared: Shared,
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
        let sharing = if self.shared == Shared::Lines { self.stored.sharing() } else { 1 };
        let lines = if sharing == 1 { self.depth } else { e.shr(self.depth, 1) };
        e.for_loop((zero, lines, one), sums, |e, line, sums| {
            let mut sums = sums.to_vec();
            let (at, next) = (e.row(self.b, line, self.b_stride), e.row(self.next, line, self.b_stride));
            for offset in (0..self.b_stride).step_by(ALIGN) {
                let offset = e.i64(offset as i64);
                e.prefetch(next, offset, 1);
            }
            let k = if sharing == 1 { line } else { first_of_line(e, line) };
            let column = e.row(self.a, k, 4);
            for part in 0..sharing {
                let b: Vec<Val> = self.chunks.iter().map(|c| self.load(e, at, *c, part)).collect();
                self.multiply(e, column, part, &b, &mut sums);
            }
            sums
        })
    }

    /// Adds the products of a line with a column of `a`, `part` lines after `column`.
    fn multiply(&self, e: &mut Emitter, column: Val, part: usize, b: &[Val], sums: &mut [Val]) {
        for row in 0..self.rows {
            let at = e.gep_const(column, row * self.a_stride + part * LANES * 4);
            let a = e.load(at, F32, 4);
            for (i, b) in b.iter().enumerate() {
                let a = e.broadcast(a, b.ty.lanes);
                let sum = &mut sums[row * self.chunks.len() + i];
                *sum = e.fma(a, *b, *sum);
            }
        }
    }

    fn load(&self, e: &mut Emitter, line: Val, (first, lanes): (usize, usize), part: usize) -> Val {
        let (first, part) = match self.shared {
            Shared::Lanes if self.stored.sharing() > 1 => (first / (2 * LANES) * LANES, first / LANES % 2),
            _ => (first, part),
        };
        let at = At { byte: e.gep_const(line, first * self.stored.bytes()), bit: 4 * part as i64 };
        let align = if lanes == LANES { self.align } else { self.stored.bytes() };
        self.stored.load(e, at, lanes, align)
    }
}

/// The first of the two `k` in a line: those of a line are 16 apart.
fn first_of_line(e: &mut Emitter, line: Val) -> Val {
    let group = e.i64(-(LANES as i64));
    let before = e.and(line, group);
    e.add(line, before)
}
