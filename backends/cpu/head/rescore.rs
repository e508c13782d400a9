//! Exact products for the rows that estimates leave in question, or for all.
//!
//! ```text
//! for row of activations
//!   threshold = the least exact product of the k largest      every worker finds it for itself: strips are few
//!     estimates (of k different strips)
//!   for my blocks of strips                                   dealt out one by one: likely tokens are neighbours
//!     list the rows whose upper bound reaches it; ask for their second plane; add their products
//! ```

use super::row::Ordered;
use super::{PANEL, PLANES, Projection, above, at_least, broken, join, panels, stride};
use crate::cpu::dot::amx::{self, Operands};
use crate::cpu::dot::{self, Rows, Weights, unpack};
use crate::cpu::{StepField, count_of, memory, step_field};
use crate::emit::{Cmp, Emitter, F32, I32, I64, KernelArgs, Val};
use mansard_ir::layout::{ALIGN, STRIP, StripLayout};
use mansard_ir::ops::Class;
use mansard_ir::plan::Kernel;
use mansard_ir::{DType, Result, Target};

/// Strips whose rows in question are listed at once.
const BLOCK: usize = 32;

/// The most candidates; who wants more wants all.
const MOST: usize = mansard_ir::plan::CANDIDATES;

/// Emits a `rescore` kernel.
///
/// # Errors
/// Where the body is not about a matrix in two planes.
pub fn emit(kernel: &Kernel, target: &Target) -> Result<String> {
    let body = &kernel.body;
    let (mut e, k) = Emitter::kernel(kernel, target);
    let memory = memory(&mut e, k, body);
    let Some(node) = body.nodes.iter().find(|n| n.op.class() == Class::Rescore) else { return Err(broken(kernel)) };
    let &[estimates, bounds, x, w, _] = node.operands.as_slice() else { return Err(broken(kernel)) };
    let at = |v: mansard_ir::ValueId| memory[v.0 as usize].ok_or_else(|| broken(kernel));
    let rescore = Rescore {
        target,
        p: Projection::new(kernel, &memory, x, w)?,
        logits: (at(estimates)?, stride(body.ty(estimates))),
        bounds: (at(bounds)?, stride(body.ty(bounds))),
    };
    let rows = count_of(&mut e, k, body.ty(estimates))?;
    let candidates = step_field(&mut e, k, StepField::Candidates);
    let zero = e.i64(0);
    let all = e.cmp(Cmp::Eq, candidates, zero);
    e.either(
        all,
        |e| rescore.all(e, k, rows, kernel.range.max),
        |e| {
            let (ordered, best, list) = (Ordered::new(e, rescore.p), e.stack(8 * MOST), e.stack(4 * BLOCK * STRIP));
            e.repeat(zero, rows, 1, |e, row| {
                let x = rescore.p.row(e, row);
                ordered.fill(e, rescore.p, x);
                let bounds = e.row(rescore.bounds.0, row, rescore.bounds.1);
                let logits = e.row(rescore.logits.0, row, rescore.logits.1);
                let threshold = rescore.threshold(e, bounds, candidates, ordered, best);
                rescore.candidates(e, k, Question { bounds, logits, threshold, ordered, list });
            });
        },
    );
    Ok(e.finish())
}

struct Rescore<'a> {
    target: &'a Target,
    p: Projection,
    /// Address and bytes from row to row.
    logits: (Val, usize),
    bounds: (Val, usize),
}

/// One row of activations: what its logits are compared with, and multiplied with.
#[derive(Clone, Copy)]
struct Question {
    bounds: Val,
    logits: Val,
    threshold: Val,
    ordered: Ordered,
    /// `i32[BLOCK * 16]`.
    list: Val,
}

impl Rescore<'_> {
    /// The least of the exact products of the rows with the `candidates` largest estimates, of one row a strip. `best` holds
    /// the largest found so far, in order, and after them their strips. Logits are not read: others change them.
    fn threshold(&self, e: &mut Emitter, bounds: Val, candidates: Val, ordered: Ordered, best: Val) -> Val {
        let (zero, strips, one) = (e.i64(0), e.i64(self.p.strips() as i64), e.i64(1));
        let (least, most) = (e.float(F32, f32::NEG_INFINITY), e.float(F32, f32::INFINITY));
        let (strip_of, first) = (e.gep_const(best, 4 * MOST), e.int(I32, 0));
        e.repeat(zero, candidates, 1, |e, i| {
            let (at, strip) = (e.row(best, i, 4), e.row(strip_of, i, 4));
            e.store(least, at, 4);
            e.store(first, strip, 4);
        });
        let last = e.sub(candidates, one);
        let last = e.row(best, last, 4);
        e.for_loop((zero, strips, one), &[least], |e, strip, least| {
            let at = e.row(bounds, strip, 4);
            let estimate = e.load(at, F32, 4);
            let larger = above(e, estimate, least[0]);
            e.when(larger, |e| {
                let strip = e.convert("trunci", strip, I32);
                e.for_loop((zero, candidates, one), &[estimate, strip], |e, i, new| {
                    let (at, strip_at) = (e.row(best, i, 4), e.row(strip_of, i, 4));
                    let (there, strip) = (e.load(at, F32, 4), e.load(strip_at, I32, 4));
                    let before = above(e, new[0], there);
                    let (kept, kept_strip) = (e.select(before, new[0], there), e.select(before, new[1], strip));
                    e.store(kept, at, 4);
                    e.store(kept_strip, strip_at, 4);
                    vec![e.select(before, there, new[0]), e.select(before, strip, new[1])]
                });
            });
            vec![e.load(last, F32, 4)]
        });
        let exact = e.for_loop((zero, candidates, one), &[most], |e, i, threshold| {
            let strip = e.row(strip_of, i, 4);
            let strip = e.load(strip, I32, 4);
            let strip = e.convert("extui", strip, I64);
            let at = e.row(bounds, strip, 4);
            let estimate = e.load(at, F32, 4);
            let at = e.gep_const(at, 8 * self.p.strips());
            let row = e.load(at, F32, 4);
            let row = e.convert("fptosi", row, I64);
            let end = e.i64(self.p.n as i64 - 1);
            let row = e.min(row, end);
            let row = e.max(row, zero);
            let row = self.p.lower_row(e, row);
            let product = ordered.product(e, self.target, row);
            let exact = e.add(estimate, product);
            vec![e.min(threshold[0], exact)]
        });
        let few = e.cmp(Cmp::Gt, candidates, strips);
        e.select(few, least, exact[0])
    }

    /// This worker's blocks of strips.
    fn candidates(&self, e: &mut Emitter, k: KernelArgs, q: Question) {
        let blocks = e.i64(self.p.strips().div_ceil(BLOCK) as i64);
        let count = e.stack(ALIGN);
        e.for_loop((k.thread, blocks, k.threads), &[], |e, block, _| {
            let (zero, first) = (e.i64(0), e.scaled(block, BLOCK, 0));
            let (size, end) = (e.i64(BLOCK as i64), e.i64(self.p.strips() as i64));
            let next = e.add(first, size);
            let next = e.min(next, end);
            e.store(zero, count, 8);
            e.repeat(first, next, 1, |e, strip| {
                let at = e.row(q.bounds, strip, 4);
                let most = e.load(at, F32, 4);
                let at = e.gep_const(at, 4 * self.p.strips());
                let upper = e.load(at, F32, 4);
                let near = at_least(e, upper, q.threshold);
                e.when(near, |e| self.list(e, q, strip, (most, upper), count));
            });
            let found = e.load(count, I64, 8);
            e.repeat(zero, found, 1, |e, i| {
                let row = self.listed(e, q, i);
                let at = self.p.lower_row(e, row);
                for line in (0..self.p.layout.row_bytes + ALIGN - 1).step_by(ALIGN) {
                    let ahead = e.i64(line as i64);
                    e.prefetch(at, ahead, 1);
                }
            });
            e.repeat(zero, found, 1, |e, i| {
                let row = self.listed(e, q, i);
                let at = self.p.lower_row(e, row);
                let product = q.ordered.product(e, self.target, at);
                let at = e.row(q.logits, row, 4);
                let estimate = e.load(at, F32, 4);
                let exact = e.add(estimate, product);
                e.store(exact, at, 4);
            });
            vec![]
        });
    }

    /// Lists the rows of a strip that may reach the threshold.
    fn list(&self, e: &mut Emitter, q: Question, strip: Val, (most, upper): (Val, Val), count: Val) {
        let deviation = e.sub(upper, most);
        let first = e.scaled(strip, STRIP, 0);
        let (size, end, one) = (e.i64(STRIP as i64), e.i64(self.p.n as i64), e.i64(1));
        let next = e.add(first, size);
        let next = e.min(next, end);
        let before = e.load(count, I64, 8);
        let found = e.for_loop((first, next, one), &[before], |e, row, found| {
            // Written in any case, and kept where it counts.
            let to = e.row(q.list, found[0], 4);
            let number = e.convert("trunci", row, I32);
            e.store(number, to, 4);
            let at = e.row(q.logits, row, 4);
            let estimate = e.load(at, F32, 4);
            let most = e.add(estimate, deviation);
            let near = at_least(e, most, q.threshold);
            let more = e.convert("extui", near, I64);
            vec![e.add(found[0], more)]
        });
        e.store(found[0], count, 8);
    }

    fn listed(&self, e: &mut Emitter, q: Question, index: Val) -> Val {
        let at = e.row(q.list, index, 4);
        let row = e.load(at, I32, 4);
        e.convert("extui", row, I64)
    }

    /// Every logit of every row: strips joined one by one, each multiplied with all rows.
    fn all(&self, e: &mut Emitter, k: KernelArgs, rows: Val, most: usize) {
        let units = Operands::of(self.target, DType::A16, DType::Q8_0, self.p.k).filter(|_| most > amx::TOKENS);
        let (Some(units), Some(weights)) = (units, Weights::of(self.target, DType::Q8_0, self.p.k)) else {
            return self.by_vectors(e, k, rows, most);
        };
        let few = e.i64(amx::TOKENS as i64);
        let few = e.cmp(Cmp::Le, rows, few);
        e.either(few, |e| self.by_vectors(e, k, rows, amx::TOKENS), |e| self.by_tiles(e, k, rows, (units, weights)));
    }

    fn by_vectors(&self, e: &mut Emitter, k: KernelArgs, rows: Val, most: usize) {
        let tile = if self.target.wide_registers() >= 32 { PANEL } else { 2 };
        self.joined(e, k, |e, strip, strip_at| {
            panels(e, rows, most, |e, first, size| {
                let to = self.logits_at(e, first, strip);
                for from in (0..size).step_by(tile) {
                    let rows = self.rows(e, first, from, tile.min(size - from));
                    let products = dot::tile(e, self.target, DType::Q8_0, self.p.k, &[strip_at], rows);
                    for (r, product) in products.into_iter().enumerate() {
                        let to = e.gep_const(to, (from + r) * self.logits.1);
                        e.store(product, to, 64);
                    }
                }
            });
        });
    }

    /// On matrix units.
    fn by_tiles(&self, e: &mut Emitter, k: KernelArgs, rows: Val, (units, weights): (Operands, Weights<'_>)) {
        let (panel, sums) = (e.stack(amx::panel_bytes(units, self.p.k)), e.stack(amx::sum_bytes(weights, PLANES)));
        amx::clear_padding(e, self.p.x, self.p.x_bytes, rows);
        units.configure(e);
        self.joined(e, k, |e, strip, strip_at| {
            unpack::signed(e, weights, self.p.k, strip_at, panel);
            let zero = e.i64(0);
            e.repeat(zero, rows, amx::TOKENS as i64, |e, first| {
                let to = self.logits_at(e, first, strip);
                let rows = self.rows(e, first, 0, amx::TOKENS);
                amx::codes(e, weights, self.p.k, (strip_at, panel), rows, (sums, to, self.logits.1));
            });
        });
        amx::release(e);
    }

    /// Emits `body(strip, address of its codes)` for this worker's strips.
    fn joined(&self, e: &mut Emitter, k: KernelArgs, mut body: impl FnMut(&mut Emitter, Val, Val)) {
        let strip_at = e.stack(StripLayout::new(DType::Q8_0, self.p.k).bytes);
        let strips = e.i64(self.p.strips() as i64);
        let (low, high) = e.share(k, strips);
        e.repeat(low, high, 1, |e, strip| {
            join::strip(e, self.p, strip, strip_at);
            body(e, strip, strip_at);
        });
    }

    /// `count` rows of activations from `first + from` on.
    fn rows(&self, e: &mut Emitter, first: Val, from: usize, count: usize) -> Rows {
        let x = self.p.row(e, first);
        let first = e.gep_const(x, from * self.p.x_bytes);
        Rows { first, stride: self.p.x_bytes, count, dtype: DType::A16, planes: PLANES, ahead: None, prefetch: 0 }
    }

    /// Where the first of a strip's logits of row `first` is.
    fn logits_at(&self, e: &mut Emitter, first: Val, strip: Val) -> Val {
        let to = e.row(self.logits.0, first, self.logits.1);
        e.row(to, strip, 4 * STRIP)
    }
}
