//! Rows that estimates leave in question: a threshold that every block finds for itself, and what reaches it.
//!
//! ```text
//! the k largest estimates, of one row a strip:   k times the largest after the last one, over all strips
//! threshold = least of their exact products      a warp a row
//! strip of this warp: rows whose upper bound reaches the threshold get their second plane
//! ```

use super::{Lower, Rescore, real_at};
use crate::cuda::group;
use crate::emit::{Cmp, Emitter, F32, I32, I64, KernelArgs, Val, WARP};
use mansard_ir::layout::STRIP;
use mansard_ir::plan::CANDIDATES;
use mansard_ir::planes::CENTRE;

/// Bytes of a candidate: its estimate, its strip, its exact product.
const CANDIDATE: usize = 12;

impl Rescore {
    /// The logits of one row that may be among the largest.
    pub(super) fn some(&self, e: &mut Emitter, k: KernelArgs, row: Val, candidates: Val) {
        let x = self.p.row(e, row);
        let bounds = e.row(self.bounds.0, row, self.bounds.1);
        let logits = e.row(self.logits.0, row, self.logits.1);
        let (lane, warp) = e.lane_and_warp();
        let lower = Lower { p: self.p, x, lane, centre: CENTRE };
        let threshold = self.threshold(e, bounds, candidates, lower);
        let warps = e.i64((e.block_threads() / WARP) as i64);
        let before = e.mul(k.thread, warps);
        let (first, step, end) = (e.add(before, warp), e.mul(k.threads, warps), e.i64(self.p.strips() as i64));
        e.for_loop((first, end, step), &[], |e, strip, _| {
            let most = real_at(e, bounds, strip);
            let uppers = e.gep_const(bounds, 4 * self.p.strips());
            let upper = real_at(e, uppers, strip);
            let near = e.cmp_float("oge", upper, threshold);
            e.when(near, |e| self.strip(e, (strip, logits, threshold), (most, upper), lower));
            vec![]
        });
        e.barrier();
    }

    /// The rows of a strip that may reach the threshold, by a warp.
    fn strip(
        &self,
        e: &mut Emitter,
        (strip, logits, threshold): (Val, Val, Val),
        (most, upper): (Val, Val),
        lower: Lower,
    ) {
        let deviation = e.sub(upper, most);
        let first = e.scaled(strip, STRIP, 0);
        let (next, end) = (e.scaled(first, 1, STRIP), e.i64(self.p.n as i64));
        let next = e.min(next, end);
        e.repeat(first, next, 1, |e, row| {
            let estimate = real_at(e, logits, row);
            let most = e.add(estimate, deviation);
            let near = e.cmp_float("oge", most, threshold);
            e.when(near, |e| {
                let product = lower.product(e, row);
                let (exact, zero) = (e.add(estimate, product), e.i64(0));
                let here = e.cmp(Cmp::Eq, lower.lane, zero);
                let to = e.row(logits, row, 4);
                e.when(here, |e| e.store(exact, to, 4));
            });
        });
    }

    /// The least of the exact products of the rows with the largest estimates; minus infinity where all are wanted.
    fn threshold(&self, e: &mut Emitter, bounds: Val, candidates: Val, lower: Lower) -> Val {
        let best = e.shared(CANDIDATE * CANDIDATES);
        let (strips, zero, one) = (e.i64(self.p.strips() as i64), e.i64(0), e.i64(1));
        let enough = e.cmp(Cmp::Le, candidates, strips);
        let count = e.select(enough, candidates, zero);
        let (most, before) = (e.float(F32, f32::INFINITY), e.int(I32, -1));
        e.for_loop((zero, count, one), &[most, before], |e, i, last| {
            let (value, strip) = self.next_largest(e, bounds, (last[0], last[1]));
            let thread = e.thread();
            let first = e.cmp(Cmp::Eq, thread, zero);
            let to = e.row(best, i, CANDIDATE);
            e.when(first, |e| {
                e.store(value, to, 4);
                let to = e.gep_const(to, 4);
                e.store(strip, to, 4);
            });
            e.barrier();
            vec![value, strip]
        });
        let (_, warp) = e.lane_and_warp();
        let warps = (e.block_threads() / WARP) as i64;
        e.repeat(warp, count, warps, |e, i| {
            let at = e.row(best, i, CANDIDATE);
            let strip = e.gep_const(at, 4);
            let (estimate, strip) = (e.load(at, F32, 4), e.load(strip, I32, 4));
            let strip = e.convert("extui", strip, I64);
            let whose = e.gep_const(bounds, 8 * self.p.strips());
            let row = real_at(e, whose, strip);
            let (row, last) = (e.convert("fptosi", row, I64), e.i64(self.p.n as i64 - 1));
            let row = e.min(row, last);
            let row = e.max(row, zero);
            let product = lower.product(e, row);
            let exact = e.add(estimate, product);
            let here = e.cmp(Cmp::Eq, lower.lane, zero);
            let to = e.gep_const(at, 8);
            e.when(here, |e| e.store(exact, to, 4));
        });
        e.barrier();
        let least = e.for_loop((zero, count, one), &[most], |e, i, least| {
            let at = e.row(best, i, CANDIDATE);
            let at = e.gep_const(at, 8);
            let exact = e.load(at, F32, 4);
            vec![e.min(least[0], exact)]
        })[0];
        let all = e.float(F32, f32::NEG_INFINITY);
        e.select(enough, least, all)
    }

    /// The largest estimate of all strips after `(value, strip)`, in order of value and then of strip.
    fn next_largest(&self, e: &mut Emitter, bounds: Val, (value, strip): (Val, Val)) -> (Val, Val) {
        let (thread, end, step) = (e.thread(), e.i64(self.p.strips() as i64), e.i64(e.block_threads() as i64));
        let (gone, nowhere) = (e.float(F32, f32::NEG_INFINITY), e.int(I32, 0));
        let own = e.for_loop((thread, end, step), &[gone, nowhere], |e, i, best| {
            let (x, index) = (real_at(e, bounds, i), e.convert("trunci", i, I32));
            let (less, equal) = (e.cmp_float("olt", x, value), e.cmp_float("oeq", x, value));
            let later = e.cmp(Cmp::Gt, index, strip);
            let later = e.and(equal, later);
            let (left, larger) = (e.or(less, later), e.cmp_float("ogt", x, best[0]));
            let better = e.and(left, larger);
            vec![e.select(better, x, best[0]), e.select(better, index, best[1])]
        });
        let most = group::block(e, own[0], &group::largest);
        let (here, after) = (e.cmp_float("oeq", own[0], most), e.int(I32, i32::MAX.into()));
        let index = e.select(here, own[1], after);
        let index = group::block(e, index, &group::smallest);
        // Where no value is a number there is none: any strip is right then.
        let last = e.int(I32, self.p.strips() as i64 - 1);
        (most, e.min(index, last))
    }
}
