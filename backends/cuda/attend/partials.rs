//! Items that several blocks have a part of: partials in the blocks' scratch, and who is last puts them together.
//!
//! ```text
//! a partial         [heads][dim and 16] sums of weighted values, then of weights;  [heads] largest scores
//! block done        stores its partial, fence, counts; the last one adds all up in shared memory
//! ```

use super::{Attention, STATE};
use crate::cpu::attend::items::{Attend, Extents, Item, Others, StepPointers};
use crate::cuda::rows::{put_real, real_at};
use crate::emit::{Cmp, Emitter, F32, I64, Val};
use crate::math;

impl Attend for Attention {
    fn extents(&self) -> Extents {
        self.extents
    }

    fn step(&self) -> StepPointers {
        self.step
    }

    fn sum_up(&self, e: &mut Emitter, item: &Item, run: (Val, Val), whole: Val, partial: Val) {
        self.blocks(e, item, run);
        e.either(
            whole,
            |_| {},
            |e| {
                self.elements(e, |e, i, at| {
                    let x = real_at(e, self.out, i);
                    let to = e.gep(partial, at);
                    e.store(x, to, 4);
                });
                self.figures(e, partial, |e, state, [most, sum]| {
                    for (from, to) in [(0, most), (4, sum)] {
                        let from = e.gep_const(state, from);
                        let x = e.load(from, F32, 4);
                        e.store(x, to, 4);
                    }
                });
            },
        );
    }

    fn finish(&self, e: &mut Emitter, item: &Item) {
        let rows: Vec<Val> = self.results.iter().map(|result| self.row(e, *result, item)).collect();
        e.strided(self.heads * self.dim, |e, i| {
            let size = e.i64(self.dim as i64);
            let head = e.div(i, size);
            let sum = e.row(self.state, head, STATE);
            let sum = e.gep_const(sum, 4);
            let (x, sum) = (real_at(e, self.out, i), e.load(sum, F32, 4));
            let y = e.div(x, sum);
            rows.iter().for_each(|row| put_real(e, y, *row, i));
        });
        e.barrier();
    }

    fn count(&self, e: &mut Emitter, counter: Val, done: Val) -> Val {
        e.fence();
        e.barrier();
        let (thread, zero) = (e.thread(), e.i64(0));
        let first = e.cmp(Cmp::Eq, thread, zero);
        e.when(first, |e| {
            let before = e.atomic_add(counter, done);
            e.store(before, self.told, 8);
        });
        e.barrier();
        let before = e.load(self.told, I64, 8);
        e.fence();
        before
    }

    fn merge(&self, e: &mut Emitter, item: &Item, first: Val, others: &Others<'_>) {
        self.elements(e, |e, i, at| {
            let from = e.gep(first, at);
            let x = e.load(from, F32, 4);
            put_real(e, x, self.out, i);
        });
        self.figures(e, first, |e, state, [most, sum]| {
            for (from, to) in [(most, 0), (sum, 4)] {
                let (x, to) = (e.load(from, F32, 4), e.gep_const(state, to));
                e.store(x, to, 4);
            }
        });
        e.barrier();
        others(e, &|e, part| self.combine(e, part));
        self.finish(e, item);
    }
}

impl Attention {
    /// Adds a partial to what is in shared memory.
    fn combine(&self, e: &mut Emitter, part: Val) {
        self.figures(e, part, |e, state, [most, sum]| {
            let own = [0, 4, 8, 12].map(|at| e.gep_const(state, at));
            let (a, b) = (e.load(own[0], F32, 4), e.load(most, F32, 4));
            let most = e.max(a, b);
            let factors = [a, b].map(|x| {
                let below = e.sub(x, most);
                math::exp2(e, below)
            });
            let (sum, more) = (e.load(own[1], F32, 4), e.load(sum, F32, 4));
            let sum = e.mul(sum, factors[0]);
            let sum = e.fma(more, factors[1], sum);
            for (value, to) in [most, sum, factors[0], factors[1]].into_iter().zip(own) {
                e.store(value, to, 4);
            }
        });
        e.barrier();
        self.elements(e, |e, i, at| {
            let size = e.i64(self.dim as i64);
            let head = e.div(i, size);
            let state = e.row(self.state, head, STATE);
            let factors = [8, 12].map(|at| {
                let at = e.gep_const(state, at);
                e.load(at, F32, 4)
            });
            let from = e.gep(part, at);
            let (x, more) = (real_at(e, self.out, i), e.load(from, F32, 4));
            let x = e.mul(x, factors[0]);
            let x = e.fma(more, factors[1], x);
            put_real(e, x, self.out, i);
        });
        e.barrier();
    }

    /// Visits this thread's elements: their numbers in shared memory, and where they lie in a partial.
    fn elements(&self, e: &mut Emitter, body: impl FnOnce(&mut Emitter, Val, Val)) {
        e.strided(self.heads * self.dim, |e, i| {
            let size = e.i64(self.dim as i64);
            let (head, d) = (e.div(i, size), e.rem(i, size));
            let (head, d) = (e.scaled(head, self.extents.item.row_bytes, 0), e.shl(d, 2));
            let at = e.add(head, d);
            body(e, i, at);
        });
    }

    /// Visits this thread's heads: their states, and where a partial has the largest score and the sum of weights.
    fn figures(&self, e: &mut Emitter, partial: Val, body: impl FnOnce(&mut Emitter, Val, [Val; 2])) {
        let item = self.extents.item;
        e.strided(self.heads, |e, head| {
            let (state, row) = (e.row(self.state, head, STATE), e.row(partial, head, item.row_bytes));
            let most = e.gep_const(partial, item.rows() * item.row_bytes);
            // The first of 16 sums.
            let sum = e.gep_const(row, item.row_bytes - 4 * mansard_ir::layout::STRIP);
            let most = e.row(most, head, 4);
            body(e, state, [most, sum]);
        });
    }
}
