//! The vocabulary projection in two planes on a GPU: estimates from the first, then the second where it can matter.
//!
//! ```text
//! estimate   a strip of the first plane a block, as any contraction; then bounds over its 16 rows by shuffles
//! rescore    candidates = k: every block finds the threshold for itself, then a warp takes a strip after the other
//!            candidates = 0: both planes of a strip a block
//! ```
//!
//! Layouts are those of [`mansard_ir::planes`], arithmetic is that of [`crate::cpu::head`].

mod lower;
mod threshold;

use super::contract::product::{partial_bytes, partial_sums, sum_of_parts};
use super::contract::ring::{Feed, Ring};
use super::rows::real_at;
use super::weights::{Packed, ROWS};
use super::{Device, group};
use crate::cpu::contract::Dot;
use crate::cpu::head::{PLANES, Projection, broken, panels};
use crate::cpu::{StepField, count_of, dot::part_at, step_field};
use crate::emit::{Cmp, Emitter, F16, F32, I8, I32, KernelArgs, Val, WARP};
use lower::Lower;
use mansard_ir::layout::{A8, STRIP, row_bytes};
use mansard_ir::ops::Class;
use mansard_ir::planes::CENTRE;
use mansard_ir::{DType, Result, ValueId};

impl Projection {
    /// The products of a strip of the first plane with rows `first..`, one a thread: 16 times what `q4_0` gives.
    fn upper(
        &self,
        e: &mut Emitter,
        (strip, feed): (Val, Option<Feed<'_>>),
        (first, tokens): (Val, usize),
        value: ValueId,
    ) -> Result<Val> {
        let (dtype, activations) = (DType::Q4_0, DType::A16);
        let (x, weight, routing) = (value, value, None);
        let dot = Dot { value, x, weight, routing, dtype, k: self.k, activations, planes: PLANES };
        let x = self.row(e, first);
        let rows: Vec<Val> = (0..tokens).map(|t| e.gep_const(x, t * self.x_bytes)).collect();
        let partials = e.shared(partial_bytes(tokens));
        let strip = self.strip(e, strip);
        partial_sums(e, &dot, (strip, feed), &rows, partials)?;
        e.barrier();
        let (product, sixteen) = (sum_of_parts(e, tokens, partials), e.float(F32, 16.0));
        Ok(e.mul(product, sixteen))
    }

    /// A ring for the first plane.
    fn ring(&self, e: &mut Emitter, d: &Device<'_>) -> Option<Ring> {
        let packed = Packed { dtype: DType::Q4_0, k: self.k, layout: self.layout.strip, rows: ROWS };
        Ring::new(e, d, (packed, self.layout.strip_bytes), (self.strips(), vec![(0, vec![self.w])]))
    }
}

/// A thread's token of a panel and row of a strip, and whether it is the first that has them.
fn output(e: &mut Emitter, tokens: usize) -> (Val, Val, Val) {
    let (thread, lanes, outputs) = (e.thread(), e.i64(STRIP as i64), e.i64((STRIP * tokens) as i64));
    let own = e.rem(thread, outputs);
    (e.div(own, lanes), e.rem(own, lanes), e.cmp(Cmp::Lt, thread, outputs))
}

/// A token of a panel and one of the items that each token has, as a lane of their warp sees them.
struct Pair {
    token: Val,
    item: Val,
    lane: Val,
}

/// Visits every pair of one of `tokens` tokens from `first` on and one of `items` items, a pair a warp, and stores the figures
/// that all lanes get: `f32[tokens][items][N]`.
fn pairs<const N: usize>(
    e: &mut Emitter,
    (first, tokens): (Val, usize),
    items: usize,
    to: Val,
    figures: impl FnOnce(&mut Emitter, Pair) -> [Val; N],
) {
    let (lane, warp) = e.lane_and_warp();
    let (all, warps) = (e.i64((tokens * items) as i64), (e.block_threads() / WARP) as i64);
    e.repeat(warp, all, warps, |e, index| {
        let items = e.i64(items as i64);
        let (token, item) = (e.div(index, items), e.rem(index, items));
        let token = e.add(first, token);
        let figures = figures(e, Pair { token, item, lane });
        let zero = e.i64(0);
        let here = e.cmp(Cmp::Eq, lane, zero);
        let to = e.row(to, index, 4 * N);
        e.when(here, |e| {
            for (i, figure) in figures.into_iter().enumerate() {
                let to = e.gep_const(to, 4 * i);
                e.store(figure, to, 4);
            }
        });
    });
}

/// Emits an `estimate` kernel.
pub(super) fn estimate(e: &mut Emitter, d: Device<'_>) -> Result<()> {
    let body = &d.kernel.body;
    let nodes = || body.nodes.iter().enumerate().filter(|(_, n)| n.op.class() == Class::Estimate);
    let Some((first, node)) = nodes().next() else { return Err(broken(d.kernel)) };
    // Both ops have the same operands; one of them states a margin.
    let with = |margin: bool| nodes().find(|(_, n)| n.attrs.get("margin").is_some() == margin);
    let result = |index: usize| {
        let v = body.value_of(index);
        Some((d.memory[v.0 as usize]?, row_bytes(body.ty(v))?))
    };
    let p = Projection::new(d.kernel, &d.memory, node.operands[0], node.operands[1])?;
    let estimate = Estimate {
        p,
        ring: p.ring(e, &d),
        estimates: with(false).and_then(|(index, _)| result(index)),
        bounds: with(true).and_then(|(index, _)| result(index)),
        margin: with(true).map_or(0.0, |(_, n)| n.attrs.float("margin")) as f32,
        value: body.value_of(first),
    };
    let (candidates, none) = (step_field(e, d.k, StepField::Candidates), e.i64(0));
    let rows = count_of(e, d.k, body.ty(estimate.value))?;
    let (wanted, mut result) = (e.cmp(Cmp::Ne, candidates, none), Ok(()));
    e.when(wanted, |e| {
        panels(e, rows, d.kernel.range.max, |e, first, tokens| {
            let done = e.scoped(|e| estimate.panel(e, d.k, first, tokens));
            result = std::mem::replace(&mut result, Ok(())).and(done);
        });
    });
    result
}

/// Bytes of what is known of a group of activations: the sum, then the sum of squares.
const SUMS: usize = 8;

struct Estimate {
    p: Projection,
    ring: Option<Ring>,
    /// Address and bytes from row to row, where the kernel returns them.
    estimates: Option<(Val, usize)>,
    bounds: Option<(Val, usize)>,
    margin: f32,
    /// Names the product in errors.
    value: ValueId,
}

impl Estimate {
    fn panel(&self, e: &mut Emitter, k: KernelArgs, first: Val, tokens: usize) -> Result<()> {
        let (p, groups) = (self.p, self.p.groups());
        if let Some(ring) = &self.ring {
            ring.start(e);
        }
        let sums = e.shared(tokens * groups * SUMS);
        self.sums(e, first, tokens, sums);
        e.barrier();
        let (strips, zero, mut result) = (e.i64(p.strips() as i64), e.i64(0), Ok(()));
        e.for_loop((k.thread, strips, k.threads), &[zero], |e, strip, round| {
            result = e.scoped(|e| {
                let feed = self.ring.as_ref().map(|ring| ring.feed(e, round[0], 0));
                let product = p.upper(e, (strip, feed), (first, tokens), self.value)?;
                let (token, row, counts) = output(e, tokens);
                let (middle, square) = self.over_groups(e, strip, row, (sums, token));
                let centre = e.float(F32, CENTRE);
                let estimate = e.fma(middle, centre, product);
                let token = e.add(first, token);
                if let Some((to, bytes)) = self.estimates {
                    let to = e.row(to, token, bytes);
                    let to = e.row(to, strip, 4 * STRIP);
                    let to = e.row(to, row, 4);
                    e.when(counts, |e| e.store(estimate, to, 4));
                }
                if let Some((to, bytes)) = self.bounds {
                    let spread = p.strip(e, strip);
                    let spread = e.gep_const(spread, p.layout.spreads());
                    let (spread, margin) = (real_at(e, spread, row), e.float(F32, self.margin));
                    let (spread, deviation) = (e.mul(spread, margin), e.math("sqrt", square));
                    let deviation = e.mul(deviation, spread);
                    let to = e.row(to, token, bytes);
                    self.store_bounds(e, to, (strip, row, counts), (estimate, deviation));
                }
                e.barrier();
                Ok(())
            });
            let one = e.i64(1);
            vec![e.add(round[0], one)]
        });
        result
    }

    /// Sums and sums of squares of every group of a panel, a group a warp.
    fn sums(&self, e: &mut Emitter, first: Val, tokens: usize, to: Val) {
        let groups = self.p.groups();
        pairs(e, (first, tokens), groups, to, |e, Pair { token, item: group, lane }| {
            let line = self.p.row(e, token);
            let line = e.row(line, group, PLANES * A8::LINE);
            let (mut real, mut sum) = (e.float(F32, 0.0), e.float(F32, 0.0));
            for plane in 0..PLANES {
                let line = e.gep_const(line, plane * A8::LINE);
                let code = e.gep(line, lane);
                let code = e.load(code, I8, 1);
                let code = e.convert("extsi", code, I32);
                let code = e.convert("sitofp", code, F32);
                let (scale, own) = (e.gep_const(line, A8::SCALE), e.gep_const(line, A8::REAL_SUM));
                let (scale, own) = (e.load(scale, F32, 4), e.load(own, F32, 4));
                real = e.fma(code, scale, real);
                sum = e.add(sum, own);
            }
            let square = e.mul(real, real);
            [sum, group::warp(e, square, &group::sum)]
        });
    }

    /// The sums over groups of scale times sum, and of scale^2 times sum of squares.
    fn over_groups(&self, e: &mut Emitter, strip: Val, row: Val, (sums, token): (Val, Val)) -> (Val, Val) {
        let (layout, groups) = (self.p.layout.strip, self.p.groups());
        let strip = self.p.strip(e, strip);
        let sums = e.row(sums, token, groups * SUMS);
        let (zero, end, one, nothing) = (e.i64(0), e.i64(groups as i64), e.i64(1), e.float(F32, 0.0));
        let both = e.for_loop((zero, end, one), &[nothing, nothing], |e, group, both| {
            let at = part_at(e, &layout, strip, group, (layout.scales, layout.chunk / A8::GROUP, 2 * STRIP));
            let at = e.row(at, row, 2);
            let scale = e.load(at, F16, 2);
            let scale = e.convert("extf", scale, F32);
            let at = e.row(sums, group, SUMS);
            let (sum, squares) = (e.load(at, F32, 4), e.gep_const(at, 4));
            let squares = e.load(squares, F32, 4);
            let square = e.mul(scale, scale);
            vec![e.fma(scale, sum, both[0]), e.fma(square, squares, both[1])]
        });
        (both[0], both[1])
    }

    /// The bounds of a strip, of those of its rows that are rows of the matrix.
    fn store_bounds(
        &self,
        e: &mut Emitter,
        to: Val,
        (strip, row, counts): (Val, Val, Val),
        (estimate, deviation): (Val, Val),
    ) {
        let index = e.scaled(strip, STRIP, 0);
        let index = e.add(index, row);
        let (n, least) = (e.i64(self.p.n as i64), e.float(F32, f32::NEG_INFINITY));
        let there = e.cmp(Cmp::Lt, index, n);
        let real = e.select(there, estimate, least);
        let most = group::lanes(e, STRIP, real, &group::largest);
        let deviation = group::lanes(e, STRIP, deviation, &group::largest);
        let upper = e.add(most, deviation);
        // The first row that has the largest.
        let (here, nowhere) = (e.cmp_float("oge", real, most), e.int(I32, i32::MAX.into()));
        let index = e.convert("trunci", index, I32);
        let index = e.select(here, index, nowhere);
        let index = group::lanes(e, STRIP, index, &group::smallest);
        let index = e.convert("sitofp", index, F32);
        let zero = e.i64(0);
        let first = e.cmp(Cmp::Eq, row, zero);
        let first = e.and(first, counts);
        let to = e.row(to, strip, 4);
        e.when(first, |e| {
            for (part, value) in [most, upper, index].into_iter().enumerate() {
                let to = e.gep_const(to, 4 * part * self.p.strips());
                e.store(value, to, 4);
            }
        });
    }
}

/// Emits a `rescore` kernel.
pub(super) fn rescore(e: &mut Emitter, d: Device<'_>) -> Result<()> {
    let body = &d.kernel.body;
    let found = body.values().find_map(|v| Some((v, body.node(v).filter(|n| n.op.class() == Class::Rescore)?)));
    let Some((value, node)) = found else { return Err(broken(d.kernel)) };
    let &[estimates, bounds, x, w, _] = node.operands.as_slice() else { return Err(broken(d.kernel)) };
    let place = |v: ValueId| Ok((d.pointer(v)?, row_bytes(body.ty(v)).ok_or_else(|| broken(d.kernel))?));
    let rescore = Rescore {
        p: Projection::new(d.kernel, &d.memory, x, w)?,
        logits: place(estimates)?,
        bounds: place(bounds)?,
        value,
    };
    let rows = count_of(e, d.k, body.ty(estimates))?;
    let candidates = step_field(e, d.k, StepField::Candidates);
    let (zero, one) = (e.i64(0), e.i64(1));
    let all = e.cmp(Cmp::Eq, candidates, zero);
    let mut result = Ok(());
    e.either(
        all,
        |e| {
            panels(e, rows, d.kernel.range.max, |e, first, tokens| {
                let done = rescore.all(e, d.k, first, tokens);
                result = std::mem::replace(&mut result, Ok(())).and(done);
            });
        },
        |e| {
            e.for_loop((zero, rows, one), &[], |e, row, _| {
                e.scoped(|e| rescore.some(e, d.k, row, candidates));
                vec![]
            });
        },
    );
    result
}

struct Rescore {
    p: Projection,
    /// Address and bytes from row to row.
    logits: (Val, usize),
    bounds: (Val, usize),
    value: ValueId,
}

impl Rescore {
    /// Every logit of a panel: both planes of a strip a block.
    fn all(&self, e: &mut Emitter, k: KernelArgs, first: Val, tokens: usize) -> Result<()> {
        let (p, mut result) = (self.p, Ok(()));
        let strips = e.i64(p.strips() as i64);
        e.for_loop((k.thread, strips, k.threads), &[], |e, strip, _| {
            result = e.scoped(|e| {
                let seconds = e.shared(4 * STRIP * tokens);
                self.seconds(e, strip, (first, tokens), seconds);
                let upper = p.upper(e, (strip, None), (first, tokens), self.value)?;
                let (token, row, counts) = output(e, tokens);
                let second = e.row(seconds, token, 4 * STRIP);
                let second = real_at(e, second, row);
                let logit = e.add(upper, second);
                let token = e.add(first, token);
                let to = e.row(self.logits.0, token, self.logits.1);
                let to = e.row(to, strip, 4 * STRIP);
                let to = e.row(to, row, 4);
                e.when(counts, |e| e.store(logit, to, 4));
                e.barrier();
                Ok(())
            });
            vec![]
        });
        result
    }

    /// Products of a strip's rows of the second plane, a row and token a warp: `f32[tokens][16]`.
    fn seconds(&self, e: &mut Emitter, strip: Val, (first, tokens): (Val, usize), to: Val) {
        pairs(e, (first, tokens), STRIP, to, |e, Pair { token, item, lane }| {
            let x = self.p.row(e, token);
            let before = e.scaled(strip, STRIP, 0);
            let row = e.add(before, item);
            [Lower { p: self.p, x, lane, centre: 0.0 }.product(e, row)]
        });
    }
}
