//! Sweeps and the figures of normalizations: thread by thread what the CPU does vector by vector.

use super::{Rows, put_real, real_at};
use crate::cpu::rows::schedule::{heads, width};
use crate::cuda::group;
use crate::emit::{Cmp, Emitter, F32, Val, WARP};
use crate::math;
use mansard_ir::layout::row_bytes;
use mansard_ir::ops::Class;
use mansard_ir::{DType, Node, Result, Type, ValueId, bail};
use std::collections::BTreeMap;

/// Where a thread is in a row.
#[derive(Clone, Copy)]
struct Element {
    /// In the row.
    index: Val,
    head: Val,
    /// In the head.
    within: Val,
}

impl Rows<'_> {
    /// Emits a sweep over rows of `heads` times `dim` elements.
    pub(super) fn sweep(&mut self, e: &mut Emitter, (heads, dim): (usize, usize), nodes: &[ValueId]) -> Result<()> {
        let mut result = Ok(());
        e.strided(heads * dim, |e, index| {
            let (zero, size) = (e.i64(0), e.i64(dim as i64));
            let (head, within) = if heads == 1 { (zero, index) } else { (e.div(index, size), e.rem(index, size)) };
            result = self.element(e, Element { index, head, within }, nodes);
        });
        result
    }

    fn element(&self, e: &mut Emitter, at: Element, nodes: &[ValueId]) -> Result<()> {
        let mut values: BTreeMap<ValueId, Val> = BTreeMap::new();
        for &v in nodes {
            let node = self.node(v)?;
            let value = if node.op.class() == Class::Combine {
                self.combine(e, node, at)?
            } else {
                let mut operands = vec![];
                for operand in &node.operands {
                    operands.push(self.operand(e, *operand, at, &mut values)?);
                }
                match node.op.class() {
                    Class::RowReduce => self.normalized(e, v, node, operands[0], at)?,
                    _ => math::elementwise(e, node, &operands)?,
                }
            };
            values.insert(v, value);
        }
        for v in nodes {
            if let (Some(base), Some(value)) = (self.at.get(v), values.get(v)) {
                let bytes = if self.dtype(*v)? == DType::BF16 { 2 } else { 4 };
                let to = e.row(*base, at.index, bytes);
                e.store(*value, to, bytes);
            }
        }
        Ok(())
    }

    /// An operand's element: from a register, from its row, or from a vector that is repeated for every head.
    fn operand(
        &self,
        e: &mut Emitter,
        operand: ValueId,
        at: Element,
        values: &mut BTreeMap<ValueId, Val>,
    ) -> Result<Val> {
        let operand = self.root(operand);
        if let Some(value) = values.get(&operand) {
            return Ok(*value);
        }
        let value = if self.graph.ty(operand).is_static() {
            let base = self.memory(operand)?;
            real_at(e, base, at.within)
        } else {
            let base = self.row_of(operand)?;
            real_at(e, base, at.index)
        };
        values.insert(operand, value);
        Ok(value)
    }

    /// Figures of a normalization: `f32[heads][2]`, a factor and what is taken off first.
    pub(super) fn stats(&mut self, e: &mut Emitter, v: ValueId) -> Result<()> {
        let node = self.node(v)?;
        let (count, dim) = heads(self.graph, v)?;
        let (stats, row) = (e.shared(8 * count), self.row_of(node.operands[0])?);
        let (eps, name) = (node.attrs.float("eps") as f32, node.op.name());
        if !["rms_normalize", "layer_normalize", "l2_normalize"].contains(&name) {
            bail!(Internal, "no GPU code for the normalization `{name}`");
        }
        let (thread, zero) = (e.thread(), e.i64(0));
        if count == 1 {
            let sum = |e: &mut Emitter, term: &dyn Fn(&mut Emitter, Val) -> Val| {
                let own = own_sum(e, (thread, e.block_threads()), dim, row, term);
                group::block(e, own, &group::sum)
            };
            let figures = figures(e, name, (dim, eps), &sum);
            let first = e.cmp(Cmp::Eq, thread, zero);
            store_figures(e, first, stats, figures);
        } else {
            let (lane, warp) = e.lane_and_warp();
            let (all, step) = (e.i64(count as i64), (e.block_threads() / WARP) as i64);
            let first = e.cmp(Cmp::Eq, lane, zero);
            e.repeat(warp, all, step, |e, head| {
                let row = e.row(row, head, 4 * dim);
                let sum = |e: &mut Emitter, term: &dyn Fn(&mut Emitter, Val) -> Val| {
                    let own = own_sum(e, (lane, WARP), dim, row, term);
                    group::warp(e, own, &group::sum)
                };
                let figures = figures(e, name, (dim, eps), &sum);
                let to = e.row(stats, head, 8);
                store_figures(e, first, to, figures);
            });
        }
        self.stats.insert(v, stats);
        Ok(())
    }

    /// Applies a normalization's figures.
    fn normalized(&self, e: &mut Emitter, v: ValueId, node: &Node, x: Val, at: Element) -> Result<Val> {
        let Some(stats) = self.stats.get(&v) else { bail!(Internal, "{v} is applied before its figures") };
        let figures = e.row(*stats, at.head, 8);
        let factor = e.load(figures, F32, 4);
        let mut x = x;
        if node.op.name() == "layer_normalize" {
            let centre = e.gep_const(figures, 4);
            let centre = e.load(centre, F32, 4);
            x = e.sub(x, centre);
        }
        Ok(e.mul(x, factor))
    }

    /// `sum over j of weight[j] * x[j]`, `x` being `top` runs one after the other.
    fn combine(&self, e: &mut Emitter, node: &Node, at: Element) -> Result<Val> {
        let (x, routing) = (self.row_of(node.operands[0])?, self.row_of(node.operands[1])?);
        let (count, dim) = heads(self.graph, node.operands[0])?;
        let Type::Routing { top, .. } = *self.graph.ty(node.operands[1]) else {
            bail!(Internal, "{} is no routing", node.operands[1])
        };
        if top != count {
            bail!(Internal, "{} does not have {top} runs", node.operands[0]);
        }
        let mut sum = e.float(F32, 0.0);
        for j in 0..top {
            let weight = e.gep_const(routing, 4 * (top + j));
            let weight = e.load(weight, F32, 4);
            let x = e.gep_const(x, 4 * j * dim);
            let x = real_at(e, x, at.index);
            sum = e.fma(weight, x, sum);
        }
        Ok(sum)
    }

    /// Copies one row.
    pub(super) fn copy(&self, e: &mut Emitter, from: ValueId, to: ValueId) -> Result<()> {
        let Some(bytes) = row_bytes(self.graph.ty(to)) else { bail!(Internal, "{to} has no rows") };
        let (from, to) = (self.row_of(from)?, self.row_in_buffer(e, to)?);
        e.strided(bytes / 4, |e, i| {
            let value = real_at(e, from, i);
            put_real(e, value, to, i);
        });
        Ok(())
    }

    /// `slice` and `concat`: the columns that the result takes of each operand, one after the other.
    pub(super) fn columns(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let (from, all) = (node.attrs.get("from").map_or(0, |_| node.attrs.size("from")), width(self.graph, v)?);
        let mut filled = 0;
        for operand in &node.operands {
            let (row, count) = (self.row_of(*operand)?, width(self.graph, *operand)?.min(all));
            let (source, target) = (e.gep_const(row, 4 * from), e.gep_const(to, 4 * filled));
            e.strided(count, |e, i| {
                let value = real_at(e, source, i);
                put_real(e, value, target, i);
            });
            filled += count;
        }
        Ok(())
    }
}

/// Gives the sum over a row of a term of each element.
type Sum<'a> = dyn Fn(&mut Emitter, &dyn Fn(&mut Emitter, Val) -> Val) -> Val + 'a;

/// The factor of a normalization, and what is taken off first.
fn figures(e: &mut Emitter, name: &str, (dim, eps): (usize, f32), sum: &Sum<'_>) -> (Val, Val) {
    let (n, eps, one) = (e.float(F32, dim as f32), e.float(F32, eps), e.float(F32, 1.0));
    let mut centre = e.float(F32, 0.0);
    if name == "layer_normalize" {
        let total = sum(e, &|_, x| x);
        centre = e.div(total, n);
    }
    let total = sum(e, &|e, x| {
        let x = if name == "layer_normalize" { e.sub(x, centre) } else { x };
        e.mul(x, x)
    });
    let root = if name == "l2_normalize" {
        let norm = e.math("sqrt", total);
        e.max(norm, eps)
    } else {
        let mean = e.div(total, n);
        let mean = e.add(mean, eps);
        e.math("sqrt", mean)
    };
    (e.div(one, root), centre)
}

/// A thread's part of a sum: every `step`-th element from its own on.
fn own_sum(
    e: &mut Emitter,
    (first, step): (Val, usize),
    count: usize,
    row: Val,
    term: &dyn Fn(&mut Emitter, Val) -> Val,
) -> Val {
    let (end, step, nothing) = (e.i64(count as i64), e.i64(step as i64), e.float(F32, 0.0));
    e.for_loop((first, end, step), &[nothing], |e, i, sum| {
        let x = real_at(e, row, i);
        let term = term(e, x);
        vec![e.add(sum[0], term)]
    })[0]
}

fn store_figures(e: &mut Emitter, here: Val, to: Val, (factor, centre): (Val, Val)) {
    e.when(here, |e| {
        e.store(factor, to, 4);
        let to = e.gep_const(to, 4);
        e.store(centre, to, 4);
    });
}
