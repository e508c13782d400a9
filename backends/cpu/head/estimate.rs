//! Estimates: products with the first plane, and bounds on the exact ones.
//!
//! The first plane's codes are strips of `q4_0`, `scale * (upper - 8)`, whose products [`dot`] knows; the estimate is 16
//! times that, plus what the second plane is on average. Both the latter and the deviation need each group's scale once
//! more, and per group of a row of activations its sum and its sum of squares:
//!
//! ```text
//! e         = 16 q4_0 . x + 7.5 * sum over groups of scale * sum(x)
//! deviation = margin * spread * sqrt(sum over groups of scale^2 * |x|^2)
//! ```

use super::{PANEL, PLANES, Projection, at_least, broken, panels, reals, splat, stride};
use crate::cpu::contract::AHEAD;
use crate::cpu::dot::{self, Rows, part_at};
use crate::cpu::{StepField, count_of, memory, step_field};
use crate::emit::{Cmp, Emitter, F16, F32, I32, KernelArgs, Val};
use mansard_ir::layout::{A8, STRIP};
use mansard_ir::ops::Class;
use mansard_ir::plan::Kernel;
use mansard_ir::planes::CENTRE;
use mansard_ir::{DType, Result, Target, ValueId};

/// Emits an `estimate` kernel.
///
/// # Errors
/// Where the body is not about a matrix in two planes.
pub fn emit(kernel: &Kernel, target: &Target) -> Result<String> {
    let body = &kernel.body;
    let (mut e, k) = Emitter::kernel(kernel, target);
    let memory = memory(&mut e, k, body);
    let nodes = || body.nodes.iter().enumerate().filter(|(_, n)| n.op.class() == Class::Estimate);
    let Some((first, node)) = nodes().next() else { return Err(broken(kernel)) };
    let projection = Projection::new(kernel, &memory, node.operands[0], node.operands[1])?;
    // Both ops have the same operands; one of them states a margin.
    let with = |margin: bool| nodes().find(|(_, n)| n.attrs.get("margin").is_some() == margin);
    let result = |index: usize| {
        let v: ValueId = body.value_of(index);
        memory[v.0 as usize].map(|at| (at, stride(body.ty(v))))
    };
    let estimate = Estimate {
        target,
        projection,
        estimates: with(false).and_then(|(index, _)| result(index)),
        bounds: with(true).and_then(|(index, _)| result(index)),
        margin: with(true).map_or(0.0, |(_, n)| n.attrs.float("margin")) as f32,
    };
    let (candidates, none) = (step_field(&mut e, k, StepField::Candidates), e.i64(0));
    let rows = count_of(&mut e, k, body.ty(body.value_of(first)))?;
    let wanted = e.cmp(Cmp::Ne, candidates, none);
    let sums = e.stack(PANEL * projection.groups() * SUMS);
    e.when(wanted, |e| {
        panels(e, rows, kernel.range.max, |e, first, size| {
            let x = projection.row(e, first);
            estimate.sums(e, x, size, sums);
            estimate.strips(e, k, Panel { first, x, size, sums });
        });
    });
    Ok(e.finish())
}

/// Bytes of what is known of a group of activations: the sum, then the sum of squares.
const SUMS: usize = 8;

/// Rows of activations that pass together.
#[derive(Clone, Copy)]
struct Panel {
    /// The first, counted in the step.
    first: Val,
    /// Its address.
    x: Val,
    size: usize,
    /// `f32[size][groups][2]`.
    sums: Val,
}

struct Estimate<'a> {
    target: &'a Target,
    projection: Projection,
    /// Address and bytes from row to row, where the kernel returns them.
    estimates: Option<(Val, usize)>,
    bounds: Option<(Val, usize)>,
    margin: f32,
}

impl Estimate<'_> {
    /// Sums and sums of squares of every group of a panel.
    fn sums(&self, e: &mut Emitter, x: Val, size: usize, to: Val) {
        let groups = self.projection.groups();
        let (zero, count, end) = (e.i64(0), e.i64(groups as i64), e.i64(size as i64));
        e.repeat(zero, end, 1, |e, row| {
            let (x, to) = (e.row(x, row, self.projection.x_bytes), e.row(to, row, groups * SUMS));
            e.repeat(zero, count, 1, |e, group| {
                let (line, to) = (e.row(x, group, PLANES * A8::LINE), e.row(to, group, SUMS));
                let mut square = e.float(F32.x(STRIP), 0.0);
                for half in 0..A8::GROUP / STRIP {
                    let mut real = e.float(F32.x(STRIP), 0.0);
                    for plane in 0..PLANES {
                        let line = e.gep_const(line, plane * A8::LINE);
                        let scale = splat(e, line, A8::SCALE, STRIP);
                        let codes = e.gep_const(line, half * STRIP);
                        let codes = reals(e, codes);
                        real = e.fma(codes, scale, real);
                    }
                    square = e.fma(real, real, square);
                }
                let square = e.reduce_add(square);
                let [coarse, fine] = [0, A8::LINE].map(|plane| {
                    let at = e.gep_const(line, plane + A8::REAL_SUM);
                    e.load(at, F32, 4)
                });
                let sum = e.add(coarse, fine);
                e.store(sum, to, 4);
                let to = e.gep_const(to, 4);
                e.store(square, to, 4);
            });
        });
    }

    fn strips(&self, e: &mut Emitter, k: KernelArgs, panel: Panel) {
        let p = self.projection;
        let all = e.i64(p.strips() as i64);
        let (low, high) = e.share(k, all);
        e.repeat(low, high, 1, |e, strip| {
            let at = p.strip(e, strip);
            let products = self.products(e, at, panel);
            let (middles, squares) = self.over_groups(e, at, panel);
            let spread = e.gep_const(at, p.layout.spreads());
            let spread = e.load(spread, F32.x(STRIP), 64);
            let (sixteen, margin) = (e.float(F32.x(STRIP), 16.0), e.float(F32.x(STRIP), self.margin));
            let (centre, spread) = (e.float(F32.x(STRIP), CENTRE), e.mul(spread, margin));
            for row in 0..panel.size {
                let middle = e.mul(middles[row], centre);
                let estimate = e.fma(products[row], sixteen, middle);
                let r = e.i64(row as i64);
                let r = e.add(panel.first, r);
                if let Some((to, bytes)) = self.estimates {
                    let to = e.row(to, r, bytes);
                    let to = e.row(to, strip, 4 * STRIP);
                    e.store(estimate, to, 64);
                }
                if let Some((to, bytes)) = self.bounds {
                    let deviation = e.math("sqrt", squares[row]);
                    let deviation = e.mul(deviation, spread);
                    let to = e.row(to, r, bytes);
                    self.store_bounds(e, to, strip, (estimate, deviation));
                }
            }
        });
    }

    /// Products of every row of the panel, in tiles that suit the registers.
    fn products(&self, e: &mut Emitter, strip: Val, panel: Panel) -> Vec<Val> {
        let most = if self.target.wide_registers() >= 32 { PANEL } else { 2 };
        let tile = |first: usize| {
            let x = e.gep_const(panel.x, first * self.projection.x_bytes);
            let count = most.min(panel.size - first);
            let (stride, dtype) = (self.projection.x_bytes, DType::A16);
            let rows = Rows { first: x, stride, count, dtype, planes: PLANES, ahead: None, prefetch: AHEAD };
            dot::tile(e, self.target, DType::Q4_0, self.projection.k, &[strip], rows)
        };
        (0..panel.size).step_by(most).flat_map(tile).collect()
    }

    /// For every row of the panel: the sum over groups of scale times sum, and of scale^2 times sum of squares.
    fn over_groups(&self, e: &mut Emitter, strip: Val, panel: Panel) -> (Vec<Val>, Vec<Val>) {
        let (layout, groups) = (self.projection.layout.strip, self.projection.groups());
        let (zero, count, one, nothing) = (e.i64(0), e.i64(groups as i64), e.i64(1), e.float(F32.x(STRIP), 0.0));
        let sums = e.for_loop((zero, count, one), &vec![nothing; 2 * panel.size], |e, group, sums| {
            let at = part_at(e, &layout, strip, group, (layout.scales, layout.chunk / A8::GROUP, 2 * STRIP));
            let scale = e.load(at, F16.x(STRIP), 32);
            let scale = e.convert("extf", scale, F32);
            let square = e.mul(scale, scale);
            let of_group = e.row(panel.sums, group, SUMS);
            let add = |(i, sum): (usize, &Val)| {
                let known = splat(e, of_group, (i / 2 * groups) * SUMS + i % 2 * 4, STRIP);
                e.fma(if i % 2 == 0 { scale } else { square }, known, *sum)
            };
            sums.iter().enumerate().map(add).collect()
        });
        (sums.iter().step_by(2).copied().collect(), sums.iter().skip(1).step_by(2).copied().collect())
    }

    /// The bounds of a strip, of those of its rows that are rows of the matrix.
    fn store_bounds(&self, e: &mut Emitter, to: Val, strip: Val, (estimate, deviation): (Val, Val)) {
        let strips = self.projection.strips();
        let lanes = e.sequence(I32.x(STRIP));
        let (first, mut real) = (e.scaled(strip, STRIP, 0), estimate);
        if !self.projection.n.is_multiple_of(STRIP) {
            let left = e.i64(self.projection.n as i64);
            let left = e.sub(left, first);
            let left = e.convert("trunci", left, I32);
            let left = e.broadcast(left, STRIP);
            let there = e.cmp(Cmp::Lt, lanes, left);
            let least = e.float(F32.x(STRIP), f32::NEG_INFINITY);
            real = e.select(there, estimate, least);
        }
        let (most, deviation) = (e.reduce_max(real), e.reduce_max(deviation));
        let upper = e.add(most, deviation);
        // The first lane that has the largest.
        let all = e.broadcast(most, STRIP);
        let here = at_least(e, real, all);
        let (after, none) = (e.int(I32.x(STRIP), STRIP as i64), e.int(I32.x(STRIP), 0));
        let order = e.sub(after, lanes);
        let order = e.select(here, order, none);
        let order = e.reduce_max(order);
        let size = e.int(I32, STRIP as i64);
        let lane = e.sub(size, order);
        let first = e.convert("trunci", first, I32);
        let row = e.add(first, lane);
        let row = e.convert("sitofp", row, F32);
        let to = e.row(to, strip, 4);
        for (part, value) in [most, upper, row].into_iter().enumerate() {
            let to = e.gep_const(to, 4 * part * strips);
            e.store(value, to, 4);
        }
    }
}
