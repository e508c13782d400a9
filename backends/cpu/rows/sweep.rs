//! Sweeps: element by element over a row, everything between loads and stores in registers; and the figures of
//! normalizations, which a sweep applies.
//!
//! ```text
//! for 16 lanes: x = load; y = load; a = x + y; store a; n = a * stats[head]; m = n * gain[within]; store m
//! ```

use super::Rows;
use super::schedule::{heads, width};
use super::walk::{self, Chunk};
use crate::emit::{Emitter, F32, Val};
use crate::math;
use mansard_ir::ops::Class;
use mansard_ir::{DType, Node, Result, Type, ValueId, bail};
use std::collections::BTreeMap;

/// Bytes of figures of one head: a factor, and what is taken off first.
const STATS_BYTES: usize = 8;

/// Where a sweep is: the head, and a chunk within it.
#[derive(Clone, Copy)]
struct Place {
    head: Val,
    /// Bytes from the row's start to the head's.
    head_offset: Val,
    chunk: Chunk,
    /// Alignment of the head's start.
    align: usize,
}

impl Rows<'_> {
    /// Emits a sweep over rows of `heads` times `dim` elements.
    pub(super) fn sweep(&mut self, e: &mut Emitter, (heads, dim): (usize, usize), nodes: &[ValueId]) -> Result<()> {
        // A row is padded to whole vectors, a head is not.
        let run = if heads == 1 { dim.next_multiple_of(walk::LANES) } else { dim };
        let combines = |v: &ValueId| self.node(*v).is_ok_and(|n| n.op.class() == Class::Combine);
        let run = if nodes.iter().any(combines) { dim } else { run };
        let align = walk::head_align(heads, dim);
        let mut result = Ok(());
        walk::heads(e, heads, dim, &mut |e, head, head_offset| {
            walk::visit(e, run, &mut |e, chunk| {
                if result.is_ok() {
                    result = self.sweep_chunk(e, Place { head, head_offset, chunk, align }, nodes);
                }
            });
        });
        result
    }

    fn sweep_chunk(&self, e: &mut Emitter, place: Place, nodes: &[ValueId]) -> Result<()> {
        let mut values: BTreeMap<ValueId, Val> = BTreeMap::new();
        for &v in nodes {
            let node = self.node(v)?;
            let value = if node.op.class() == Class::Combine {
                self.combine(e, node, place)?
            } else {
                let mut operands = vec![];
                for operand in &node.operands {
                    operands.push(self.operand(e, *operand, place, &mut values)?);
                }
                match node.op.class() {
                    Class::RowReduce => self.normalized(e, v, node, operands[0], place)?,
                    _ => math::elementwise(e, node, &operands)?,
                }
            };
            values.insert(v, value);
        }
        for v in nodes {
            if let (Some(base), Some(value)) = (self.at.get(v), values.get(v)) {
                self.store(e, *v, *value, *base, place)?;
            }
        }
        Ok(())
    }

    /// Stores a chunk of a row; one of bf16 lies half as far.
    fn store(&self, e: &mut Emitter, v: ValueId, value: Val, base: Val, place: Place) -> Result<()> {
        if self.dtype(v)? == DType::BF16 {
            let offset = e.shr(place.head_offset, 1);
            let base = e.gep(base, offset);
            let at = place.chunk.halved(e, base);
            e.store(value, at, 2);
        } else {
            let base = e.gep(base, place.head_offset);
            place.chunk.store(e, value, base, place.align);
        }
        Ok(())
    }

    /// An operand's lanes: from registers, from its row, or from a vector that is repeated for every head.
    fn operand(
        &self,
        e: &mut Emitter,
        operand: ValueId,
        place: Place,
        values: &mut BTreeMap<ValueId, Val>,
    ) -> Result<Val> {
        let operand = self.root(operand);
        if let Some(value) = values.get(&operand) {
            return Ok(*value);
        }
        let value = if self.graph.ty(operand).is_static() {
            let base = self.memory(operand)?;
            place.chunk.load(e, base, 64)
        } else {
            let base = self.row_of(operand)?;
            let base = e.gep(base, place.head_offset);
            place.chunk.load(e, base, place.align)
        };
        values.insert(operand, value);
        Ok(value)
    }

    /// Computes the figures of a normalization from its operand's row.
    pub(super) fn stats(&mut self, e: &mut Emitter, v: ValueId) -> Result<()> {
        let node = self.node(v)?;
        let (count, dim) = heads(self.graph, v)?;
        let stats = e.stack((count * STATS_BYTES).next_multiple_of(64));
        let row = self.row_of(node.operands[0])?;
        let (align, eps) = (walk::head_align(count, dim), node.attrs.float("eps") as f32);
        let name = node.op.name();
        let mut result = Ok(());
        walk::heads(e, count, dim, &mut |e, head, offset| {
            let x = e.gep(row, offset);
            let (eps, n) = (e.float(F32, eps), e.float(F32, dim as f32));
            let (factor, center) = match name {
                "rms_normalize" => (rsqrt_mean(e, dim, n, eps, &mut |e, chunk| chunk.load(e, x, align)), None),
                "layer_normalize" => {
                    let total = walk::sum(e, dim, &mut |e, chunk| chunk.load(e, x, align));
                    let center = e.div(total, n);
                    let factor = rsqrt_mean(e, dim, n, eps, &mut |e, chunk| {
                        let x = chunk.load(e, x, align);
                        let center = e.broadcast(center, chunk.lanes);
                        e.sub(x, center)
                    });
                    (factor, Some(center))
                }
                "l2_normalize" => {
                    let total = sum_of_squares(e, dim, &mut |e, chunk| chunk.load(e, x, align));
                    let norm = e.math("sqrt", total);
                    let norm = e.max(norm, eps);
                    let one = e.float(F32, 1.0);
                    (e.div(one, norm), None)
                }
                other => {
                    result = Err(mansard_ir::Error::new(
                        mansard_ir::Kind::Internal,
                        format!("no CPU code for the normalization `{other}`"),
                    ));
                    return;
                }
            };
            let at = e.row(stats, head, STATS_BYTES);
            e.store(factor, at, 4);
            if let Some(center) = center {
                let at = e.gep_const(at, 4);
                e.store(center, at, 4);
            }
        });
        self.stats.insert(v, stats);
        result
    }

    /// Applies a normalization's figures.
    fn normalized(&self, e: &mut Emitter, v: ValueId, node: &Node, x: Val, place: Place) -> Result<Val> {
        let Some(stats) = self.stats.get(&v) else { bail!(Internal, "{v} is applied before its figures") };
        let at = e.row(*stats, place.head, STATS_BYTES);
        let figure = |e: &mut Emitter, more: usize| {
            let at = e.gep_const(at, more);
            let value = e.load(at, F32, 4);
            e.broadcast(value, place.chunk.lanes)
        };
        let factor = figure(e, 0);
        let x = if node.op.name() == "layer_normalize" {
            let center = figure(e, 4);
            e.sub(x, center)
        } else {
            x
        };
        Ok(e.mul(x, factor))
    }

    /// `sum over j of weight[j] * x[j]`, `x` being `top` runs one after the other.
    fn combine(&self, e: &mut Emitter, node: &Node, place: Place) -> Result<Val> {
        let (x, routing) = (self.row_of(node.operands[0])?, self.row_of(node.operands[1])?);
        let (count, dim) = heads(self.graph, node.operands[0])?;
        let Type::Routing { top, .. } = *self.graph.ty(node.operands[1]) else {
            bail!(Internal, "{} is no routing", node.operands[1])
        };
        if top != count || width(self.graph, node.operands[0])? != top * dim {
            bail!(Internal, "{} does not have {top} runs", node.operands[0]);
        }
        let align = walk::head_align(top, dim);
        let mut sum = None;
        for j in 0..top {
            let at = e.gep_const(routing, 4 * (top + j));
            let weight = e.load(at, F32, 4);
            let weight = e.broadcast(weight, place.chunk.lanes);
            let base = e.gep_const(x, 4 * j * dim);
            let x = place.chunk.load(e, base, align);
            sum = Some(match sum {
                Some(sum) => e.fma(weight, x, sum),
                None => e.mul(weight, x),
            });
        }
        Ok(sum.unwrap_or(e.float(F32.x(place.chunk.lanes), 0.0)))
    }

    /// Copies one row.
    pub(super) fn copy(&self, e: &mut Emitter, from: ValueId, to: ValueId) -> Result<()> {
        let Some(bytes) = mansard_ir::layout::row_bytes(self.graph.ty(to)) else { bail!(Internal, "{to} has no rows") };
        let (from, to) = (self.row_of(from)?, self.row_in_buffer(e, to)?);
        walk::visit(e, bytes / 4, &mut |e, chunk| {
            let value = chunk.load(e, from, 64);
            chunk.store(e, value, to, 64);
        });
        Ok(())
    }

    /// `slice` and `concat`: the columns that the result takes of each operand, one after the other.
    pub(super) fn columns(&self, e: &mut Emitter, v: ValueId, node: &mansard_ir::Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let (from, all) = (node.attrs.get("from").map_or(0, |_| node.attrs.size("from")), width(self.graph, v)?);
        let mut filled = 0;
        for operand in &node.operands {
            let (row, count) = (self.row_of(*operand)?, width(self.graph, *operand)?.min(all));
            let align = |first: usize| if first.is_multiple_of(walk::LANES) { 64 } else { 4 };
            let (source, target) = (e.gep_const(row, 4 * from), e.gep_const(to, 4 * filled));
            walk::visit(e, count, &mut |e, chunk| {
                let value = chunk.load(e, source, align(from));
                chunk.store(e, value, target, align(filled));
            });
            filled += count;
        }
        Ok(())
    }
}

/// Sum of the squares of what `load` gives.
fn sum_of_squares(e: &mut Emitter, dim: usize, load: &mut dyn FnMut(&mut Emitter, Chunk) -> Val) -> Val {
    walk::sum(e, dim, &mut |e, chunk| {
        let x = load(e, chunk);
        e.mul(x, x)
    })
}

/// `1 / sqrt(mean of squares + eps)`.
fn rsqrt_mean(e: &mut Emitter, dim: usize, n: Val, eps: Val, load: &mut dyn FnMut(&mut Emitter, Chunk) -> Val) -> Val {
    let total = sum_of_squares(e, dim, load);
    let mean = e.div(total, n);
    let mean = e.add(mean, eps);
    let root = e.math("sqrt", mean);
    let one = e.float(F32, 1.0);
    e.div(one, root)
}
