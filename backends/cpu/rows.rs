//! Row programs: everything that works row by row with one leading dim, as one loop over rows.
//!
//! ```text
//! for row in this worker's share
//!   sweep  x + y -> result              one loop over 16-lane vectors, see `sweep`
//!   stats  mean square of the sum
//!   sweep  normalized, times the gain -> stack
//!   node   quantized -> result          gathers, rope, quantization, appends, routing by themselves
//! ```
//!
//! Values between steps live on the stack, which stays in the first-level cache. [`emit_row`] is the program of one row; a
//! contraction for few tokens uses it to compute its activations itself.

mod append;
mod blocks;
mod gather;
mod hadamard;
mod planes;
mod quantize;
mod rope;
mod route;
pub(crate) mod schedule;
mod sweep;
#[cfg(test)]
mod tests;
pub(crate) mod values;
pub(crate) mod walk;

use super::count_of;
use crate::emit::{Emitter, KernelArgs, Val};
use mansard_ir::ops::Class;
use mansard_ir::plan::Kernel;
use mansard_ir::{Graph, Place, Result, Target, Type, ValueId, bail};
use schedule::Step;

/// Emits a `rows` kernel: workers share the rows.
///
/// # Errors
/// Where a node has no code or the rows need too much stack.
pub fn emit(kernel: &Kernel, target: &Target) -> Result<String> {
    let body = &kernel.body;
    let (mut e, k) = Emitter::kernel(kernel, target);
    let memory = super::memory(&mut e, k, body);
    let nodes = body.computed();
    let count = count_of(&mut e, k, lead(body, &nodes)?)?;
    let (low, high) = e.share(k, count);
    let mut result = Ok(());
    e.repeat(low, high, 1, |e, row| result = emit_row(e, k, body, &nodes, &memory, &[], row));
    result?;
    Ok(e.finish())
}

/// A type whose rows are those of the program; an append has the rows it writes.
pub(crate) fn lead<'a>(body: &'a Graph, nodes: &[ValueId]) -> Result<&'a Type> {
    let of = |v: &ValueId| Some(body.ty(*v)).filter(|ty| ty.rows().is_some());
    let appended = |v: &ValueId| body.node(*v).and_then(|n| n.operands.iter().find_map(of));
    match nodes.iter().find_map(|v| of(v).or_else(|| appended(v))) {
        Some(ty) => Ok(ty),
        None => bail!(Internal, "`{}` has no rows", body.name),
    }
}

/// Emits the program of row `row`: computes `nodes` (ascending, of row classes) of `graph`.
///
/// `memory[v]` is the start of value `v`'s buffer, row after row ([`row_bytes`] apart). All that the nodes read from outside
/// must have one, or be in `here`, which gives the address of the row itself; whatever of the nodes' own values has one is
/// stored there. Rows start on 64 bytes. Stack memory is allocated once, however often the code around runs.
///
/// # Errors
/// Where a node has no code, a value is nowhere, or the rows need too much stack.
pub fn emit_row(
    e: &mut Emitter,
    k: KernelArgs,
    graph: &Graph,
    nodes: &[ValueId],
    memory: &[Option<Val>],
    here: &[(ValueId, Val)],
    row: Val,
) -> Result<()> {
    let stack = |e: &mut Emitter, bytes| (bytes > 0).then(|| e.stack(bytes));
    let (mut rows, steps) = Rows::new(e, k, (graph, nodes), (memory, here), row, stack)?;
    for step in &steps {
        rows.step(e, step)?;
    }
    Ok(())
}

/// A worker, to which a row belongs alone.
pub(crate) struct Worker;

type Rows<'a> = values::Rows<'a, Worker>;

impl Rows<'_> {
    fn step(&mut self, e: &mut Emitter, step: &Step) -> Result<()> {
        match step {
            Step::Sweep { heads, nodes } => self.sweep(e, *heads, nodes),
            Step::Stats(v) => self.stats(e, *v).at(|| v.to_string()),
            Step::Copy { from, to } => self.copy(e, *from, *to),
            Step::Node(v) => self.alone(e, *v).at(|| v.to_string()),
        }
    }

    /// A node that is no part of a sweep.
    fn alone(&mut self, e: &mut Emitter, v: ValueId) -> Result<()> {
        let node = self.node(v)?;
        match node.op.class() {
            Class::Gather if self.graph.ty(node.operands[1]).is_static() => self.embed(e, v, node),
            Class::Gather => self.select(e, v, node),
            Class::Columns => self.columns(e, v, node),
            Class::Angles => self.angles(e, v, node),
            Class::Rope => self.rope(e, v, node),
            Class::Turn => self.hadamard(e, v, node),
            Class::Quantize => self.quantize(e, v, node),
            Class::Append if self.graph.ty(node.operands[0]).kept(1) == 0 => self.append_blocks(e, node),
            Class::Append => self.append(e, node),
            Class::Route => self.route(e, v, node),
            _ => bail!(Internal, "`{}` is no part of a row program", node.op),
        }
    }
}
