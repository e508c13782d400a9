//! `quantize` and `quantize_fine`: a warp for each group of 32 activations, a lane for each element.

use super::{Rows, real_at};
use crate::cpu::rows::schedule::width;
use crate::cuda::group;
use crate::emit::{Cmp, Emitter, F32, I8, I32, Val, WARP};
use mansard_ir::layout::A8;
use mansard_ir::{Node, Result, ValueId, bail};

const _: () = assert!(A8::GROUP == WARP);

impl Rows<'_> {
    /// Emits the op for this row.
    pub(super) fn quantize(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let (Some(to), from) = (self.destination(v), self.row_of(node.operands[0])?) else {
            bail!(Internal, "{v} is quantized for nobody")
        };
        let Some(planes) = self.dtype(v)?.planes() else { bail!(Internal, "{v} has no planes") };
        let lines = e.i64((width(self.graph, v)? / A8::GROUP) as i64);
        let (lane, warp) = e.lane_and_warp();
        let warps = (e.block_threads() / WARP) as i64;
        e.repeat(warp, lines, warps, |e, line| {
            let (from, to) = (e.row(from, line, A8::GROUP * 4), e.row(to, line, A8::LINE * planes));
            let mut x = real_at(e, from, lane);
            for plane in 0..planes {
                let to = e.gep_const(to, plane * A8::LINE);
                x = plane_of(e, x, lane, to);
            }
        });
        Ok(())
    }
}

/// One plane of a lane's element; gives what the codes leave of it.
fn plane_of(e: &mut Emitter, x: Val, lane: Val, to: Val) -> Val {
    let magnitude = e.math("absf", x);
    let most = group::warp(e, magnitude, &group::largest);
    let by = e.float(F32, 127.0);
    let scale = e.div(most, by);
    let q = e.div(x, scale);
    let q = e.math("roundeven", q);
    // Scales too small for f32's full precision can put a quotient beyond 127.
    let (low, high, zero) = (e.float(F32, -127.0), e.float(F32, 127.0), e.float(F32, 0.0));
    let q = e.max(q, low);
    let q = e.min(q, high);
    let some = e.cmp_float("ogt", scale, zero);
    let q = e.select(some, q, zero);
    let code = e.convert("fptosi", q, I32);
    let byte = e.convert("trunci", code, I8);
    let at = e.gep(to, lane);
    e.store(byte, at, 1);
    let half = group::lanes(e, WARP / 2, code, &group::sum);
    let other = e.across(half, WARP / 2);
    figures(e, lane, to, (scale, half, other));
    let real = e.mul(scale, q);
    e.sub(x, real)
}

/// Scale and sums after the codes: lane 0 has the sum of the first 16 codes in `half`, and of the others in `other`.
fn figures(e: &mut Emitter, lane: Val, to: Val, (scale, half, other): (Val, Val, Val)) {
    let first = e.i64(0);
    let first = e.cmp(Cmp::Eq, lane, first);
    e.when(first, |e| {
        let (sum, none) = (e.add(half, other), e.int(I32, 0));
        put(e, scale, to, A8::SCALE);
        let sums = [
            (sum, A8::NEG_SUM, A8::REAL_SUM),
            (half, A8::NEG_SUM_16, A8::REAL_SUM_16),
            (other, A8::NEG_SUM_16 + 4, A8::REAL_SUM_16 + 4),
        ];
        for (sum, negative_at, real_at) in sums {
            let negative = e.sub(none, sum);
            put(e, negative, to, negative_at);
            let real = e.convert("sitofp", sum, F32);
            let real = e.mul(real, scale);
            put(e, real, to, real_at);
        }
    });
}

fn put(e: &mut Emitter, value: Val, base: Val, offset: usize) {
    let at = e.gep_const(base, offset);
    e.store(value, at, 4);
}
