//! Nodes of a row program that look at several elements at once: rotations, appends to a cache, and routing.

use super::{Rows, put_real, real_at};
use crate::cpu::cached::Stored;
use crate::cpu::rows::schedule::{heads, width};
use crate::cpu::rows::walk::load_index;
use crate::cpu::slots;
use crate::cuda::group;
use crate::emit::{Cmp, Emitter, F32, I8, I32, I64, Val, WARP};
use crate::math;
use mansard_ir::layout::{CACHE_BLOCK, cache_block_bytes, cache_scales};
use mansard_ir::ops::hadamard_width;
use mansard_ir::{CacheRole, Node, Result, Type, ValueId, bail};

impl Rows<'_> {
    /// Emits `rope` for this row, a pair a thread.
    pub(super) fn rope(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let (from, table) = (self.row_of(node.operands[0])?, self.row_of(node.operands[1])?);
        let (count, dim) = heads(self.graph, v)?;
        let half = width(self.graph, node.operands[1])? / 2;
        let sines = e.gep_const(table, 4 * half);
        let (first_of, apart) = if node.attrs.str("pairing") == "adjacent" { (2, 1) } else { (1, half) };
        e.strided(count * half, |e, index| {
            let size = e.i64(half as i64);
            let (head, pair) = (e.div(index, size), e.rem(index, size));
            let (head, first) = (e.scaled(head, dim, 0), e.scaled(pair, first_of, 0));
            let first = e.add(head, first);
            let second = e.scaled(first, 1, apart);
            let (cos, sin) = (real_at(e, table, pair), real_at(e, sines, pair));
            let (x0, x1) = (real_at(e, from, first), real_at(e, from, second));
            let (a, b) = (e.mul(x1, sin), e.mul(x1, cos));
            let minus = e.neg(a);
            let (y0, y1) = (e.fma(x0, cos, minus), e.fma(x0, sin, b));
            put_real(e, y0, to, first);
            put_real(e, y1, to, second);
        });
        let rest = dim - 2 * half;
        if rest > 0 {
            e.strided(count * rest, |e, index| {
                let size = e.i64(rest as i64);
                let (head, within) = (e.div(index, size), e.rem(index, size));
                let head = e.scaled(head, dim, 2 * half);
                let at = e.add(head, within);
                let x = real_at(e, from, at);
                put_real(e, x, to, at);
            });
        }
        Ok(())
    }

    /// Emits `hadamard` for this row: an element of the result is a sum of all elements of its part, with the sign that the
    /// bits in common of both numbers give.
    pub(super) fn hadamard(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let from = self.row_of(node.operands[0])?;
        let (count, dim) = heads(self.graph, v)?;
        let size = hadamard_width(dim);
        e.strided(count * dim, |e, index| {
            let (last, zero, end, one) = (e.i64(size as i64 - 1), e.i64(0), e.i64(size as i64), e.i64(1));
            let own = e.and(index, last);
            let part = e.sub(index, own);
            let nothing = e.float(F32, 0.0);
            let sum = e.for_loop((zero, end, one), &[nothing], |e, j, sum| {
                let at = e.add(part, j);
                let x = real_at(e, from, at);
                let common = e.and(own, j);
                let common = e.convert("trunci", common, I32);
                let bits = e.intrinsic("llvm.ctpop.i32", &[common], I32);
                let sign = e.shl(bits, 31);
                let x = e.convert("bitcast", x, I32);
                let x = e.xor(x, sign);
                let x = e.convert("bitcast", x, F32);
                vec![e.add(sum[0], x)]
            })[0];
            let factor = e.float(F32, (size as f32).sqrt().recip());
            let y = e.mul(sum, factor);
            put_real(e, y, to, index);
        });
        Ok(())
    }

    /// Emits `append` for this token, a head a warp.
    pub(super) fn append(&self, e: &mut Emitter, node: &Node) -> Result<()> {
        let ty = self.graph.ty(node.operands[0]);
        let (Type::Cache { role, heads, dim, dtype, .. }, Some(block_bytes)) = (ty, cache_block_bytes(ty)) else {
            bail!(Internal, "{ty} is no cache")
        };
        let (role, dim, stored) = (*role, *dim, Stored::of(*dtype)?);
        let (pool, from) = (self.memory(node.operands[0])?, self.row_of(node.operands[1])?);
        let slots = slots(e, self.k, ty)?;
        let slot = load_index(e, slots, self.row);
        let positions = e.i64(CACHE_BLOCK as i64);
        let (block, position) = (e.div(slot, positions), e.rem(slot, positions));
        let block = e.row(pool, block, block_bytes);
        let scales = e.gep_const(block, cache_scales(ty, 0));
        let scales = e.row(scales, position, stored.scale_bytes());
        let width = dim / stored.sharing();
        let (lane, warp) = e.lane_and_warp();
        let (all, warps) = (e.i64(*heads as i64), (e.block_threads() / WARP) as i64);
        e.repeat(warp, all, warps, |e, head| {
            let from = e.row(from, head, 4 * dim);
            let scale = stored.has_scales().then(|| {
                let scale = scale_of(e, stored, from, dim, lane);
                let to = e.row(scales, head, CACHE_BLOCK * stored.scale_bytes());
                let first = e.i64(0);
                let first = e.cmp(Cmp::Eq, lane, first);
                e.when(first, |e| stored.store_scale(e, scale, to));
                scale
            });
            let to = e.row(block, head, width * CACHE_BLOCK * stored.bytes());
            let end = e.i64(width as i64);
            e.repeat(lane, end, WARP as i64, |e, d| {
                let value = element(e, stored, from, d, scale);
                let bytes = stored.bytes();
                let at = match role {
                    CacheRole::Keys => (d, CACHE_BLOCK * bytes, position, bytes),
                    CacheRole::Values => (position, width * bytes, d, bytes),
                };
                let to = e.row(to, at.0, at.1);
                let to = e.row(to, at.2, at.3);
                e.store(value, to, bytes);
            });
        });
        Ok(())
    }

    /// Emits `route` for this row. Every warp finds the same experts; the first thread of the block stores them.
    pub(super) fn route(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let from = self.row_of(node.operands[0])?;
        let experts = width(self.graph, node.operands[0])?;
        let Type::Routing { top, .. } = *self.graph.ty(v) else { bail!(Internal, "{v} is no routing") };
        let scores = e.shared(4 * experts);
        e.strided(experts, |e, i| {
            let x = real_at(e, from, i);
            put_real(e, x, scores, i);
        });
        e.barrier();
        let zero = e.i64(0);
        let thread = e.thread();
        let first = e.cmp(Cmp::Eq, thread, zero);
        let mut chosen = vec![];
        for j in 0..top {
            let (score, expert) = largest(e, scores, experts);
            e.barrier();
            e.when(first, |e| {
                let at = e.gep_const(to, 4 * j);
                e.store(expert, at, 4);
                let expert = e.convert("extui", expert, I64);
                let gone = e.float(F32, f32::NEG_INFINITY);
                put_real(e, gone, scores, expert);
            });
            e.barrier();
            chosen.push(score);
        }
        let most = chosen[0];
        let power = |e: &mut Emitter, x: Val| {
            let below = e.sub(x, most);
            math::exp(e, below)
        };
        let exps: Vec<Val> = chosen.iter().map(|score| power(e, *score)).collect();
        let total = if node.attrs.bool("normalize") {
            exps.iter().copied().reduce(|a, b| e.add(a, b)).unwrap_or(most)
        } else {
            let (lane, _) = e.lane_and_warp();
            let (end, step, nothing) = (e.i64(experts as i64), e.i64(WARP as i64), e.float(F32, 0.0));
            let own = e.for_loop((lane, end, step), &[nothing], |e, i, sum| {
                let x = real_at(e, from, i);
                let x = power(e, x);
                vec![e.add(sum[0], x)]
            })[0];
            group::warp(e, own, &group::sum)
        };
        e.when(first, |e| {
            for (j, exp) in exps.into_iter().enumerate() {
                let weight = e.div(exp, total);
                let at = e.gep_const(to, 4 * (top + j));
                e.store(weight, at, 4);
            }
        });
        Ok(())
    }
}

/// What is stored at place `d` of a head: an element, or two int4 codes.
fn element(e: &mut Emitter, stored: Stored, from: Val, d: Val, scale: Option<Val>) -> Val {
    if stored != Stored::Nibble {
        let x = real_at(e, from, d);
        return stored.narrow(e, x, scale);
    }
    // Of 32 dims the last 16 share bytes with the first.
    let fifteen = e.i64(15);
    let within = e.and(d, fifteen);
    let before = e.sub(d, within);
    let before = e.shl(before, 1);
    let low = e.add(before, within);
    let high = e.scaled(low, 1, 16);
    let [low, high] = [low, high].map(|d| {
        let x = real_at(e, from, d);
        stored.narrow(e, x, scale)
    });
    let lower = e.int(I8, 15);
    let (low, high) = (e.and(low, lower), e.shl(high, 4));
    e.or(low, high)
}

/// The scale of the codes of a head, found by a warp.
fn scale_of(e: &mut Emitter, stored: Stored, from: Val, dim: usize, lane: Val) -> Val {
    let (end, step, nothing) = (e.i64(dim as i64), e.i64(WARP as i64), e.float(F32, 0.0));
    let ends = e.for_loop((lane, end, step), &[nothing, nothing], |e, d, ends| {
        let x = real_at(e, from, d);
        vec![e.min(x, ends[0]), e.max(x, ends[1])]
    });
    let (least, most) = (group::warp(e, ends[0], &group::smallest), group::warp(e, ends[1], &group::largest));
    stored.scale(e, least, most)
}

/// The largest score and its index, the lower of equal ones, an `i32` below `experts` whatever the scores are. Every lane
/// gets them.
fn largest(e: &mut Emitter, scores: Val, experts: usize) -> (Val, Val) {
    let (lane, _) = e.lane_and_warp();
    let (end, step, last) = (e.i64(experts as i64), e.i64(WARP as i64), e.int(I32, experts as i64 - 1));
    let gone = e.float(F32, f32::NEG_INFINITY);
    let own = e.for_loop((lane, end, step), &[gone, last], |e, i, best| {
        let (x, index) = (real_at(e, scores, i), e.convert("trunci", i, I32));
        let better = e.cmp_float("ogt", x, best[0]);
        vec![e.select(better, x, best[0]), e.select(better, index, best[1])]
    });
    let (mut score, mut index) = (own[0], own[1]);
    for bit in (0..WARP.trailing_zeros()).rev() {
        let (other, other_index) = (e.across(score, 1 << bit), e.across(index, 1 << bit));
        let (larger, equal) = (e.cmp_float("ogt", other, score), e.cmp_float("oeq", other, score));
        let lower = e.cmp(Cmp::Lt, other_index, index);
        let lower = e.and(equal, lower);
        let better = e.or(larger, lower);
        (score, index) = (e.select(better, other, score), e.select(better, other_index, index));
    }
    (score, index)
}
