//! Row programs on a GPU: a block of threads computes a row, in the order and with the homes that the CPU's rows have.
//!
//! ```text
//! for row of this block
//!   sweep  x + y -> result                a thread has every 256th element; barrier
//!   stats  mean square of the sum         threads' sums meet in shared memory; barrier
//!   sweep  normalized, times the gain -> shared memory; barrier
//! ```
//!
//! [`emit_row`] is the program of one row; contractions for few tokens use it for their activations.

mod gather;
mod nodes;
mod quantize;
mod sweep;

use super::{Device, weights};
use crate::cpu::count_of;
use crate::cpu::rows::lead;
use crate::cpu::rows::schedule::{self, Home, Schedule, Step};
use crate::emit::{Emitter, F32, I32, I64, KernelArgs, Val};
use mansard_ir::layout::row_bytes;
use mansard_ir::ops::Class;
use mansard_ir::{DType, Graph, Node, Place, Result, Type, ValueId, bail};
use std::collections::BTreeMap;

/// Emits a `rows` kernel: blocks share the rows.
pub(super) fn emit(e: &mut Emitter, d: Device<'_>) -> Result<()> {
    let body = &d.kernel.body;
    let nodes: Vec<ValueId> = body.values().filter(|v| body.node(*v).is_some()).collect();
    let count = count_of(e, d.k, lead(body, &nodes)?)?;
    let mut result = Ok(());
    e.for_loop((d.k.thread, count, d.k.threads), &[], |e, row, _| {
        result = emit_row(e, d.k, body, &nodes, &d.memory, &[], row);
        vec![]
    });
    result
}

/// Emits the program of row `row`: all threads of the block compute `nodes` (ascending, of row classes) of `graph` together,
/// and have passed a barrier when it ends.
///
/// `memory[v]` is the start of value `v`'s buffer; `here` gives the row itself of values whose rows are no buffer's. All that
/// the nodes read from outside must have one or the other; whatever of the nodes' own values has one is stored there.
pub(super) fn emit_row(
    e: &mut Emitter,
    k: KernelArgs,
    graph: &Graph,
    nodes: &[ValueId],
    memory: &[Option<Val>],
    here: &[(ValueId, Val)],
    row: Val,
) -> Result<()> {
    e.scoped(|e| {
        let here: BTreeMap<ValueId, Val> = here.iter().copied().collect();
        let stored = |v: ValueId| here.contains_key(&v) || memory.get(v.0 as usize).is_some_and(Option::is_some);
        let Schedule { steps, homes, stack_bytes } = schedule::schedule(graph, nodes, &stored)?;
        let mut rows = Rows { graph, nodes, memory, here: &here, k, row, at: here.clone(), stats: BTreeMap::new() };
        let shared = e.shared(stack_bytes);
        for (value, home) in homes {
            let address = match home {
                Home::Memory(buffer) => rows.row_in_buffer(e, buffer)?,
                Home::Stack(at) => e.gep_const(shared, at),
                Home::Elsewhere => continue,
            };
            rows.at.insert(value, address);
        }
        for step in &steps {
            match step {
                Step::Sweep { heads, nodes } => rows.sweep(e, *heads, nodes)?,
                Step::Stats(v) => rows.stats(e, *v).at(|| v.to_string())?,
                Step::Copy { from, to } => rows.copy(e, *from, *to)?,
                Step::Node(v) => rows.alone(e, *v).at(|| v.to_string())?,
            }
            e.barrier();
        }
        Ok(())
    })
}

/// One row's program under construction.
struct Rows<'a> {
    graph: &'a Graph,
    nodes: &'a [ValueId],
    /// Start of each value's buffer.
    memory: &'a [Option<Val>],
    /// Rows that are no buffer's.
    here: &'a BTreeMap<ValueId, Val>,
    k: KernelArgs,
    /// Which row.
    row: Val,
    /// Address of each value's row; values that stay in registers have none.
    at: BTreeMap<ValueId, Val>,
    /// Figures of normalizations, in shared memory.
    stats: BTreeMap<ValueId, Val>,
}

impl<'a> Rows<'a> {
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
            Class::Append => self.append(e, node),
            Class::Route => self.route(e, v, node),
            _ => bail!(Internal, "`{}` is no part of a row program", node.op),
        }
    }

    fn node(&self, v: ValueId) -> Result<&'a Node> {
        match self.graph.node(v) {
            Some(node) => Ok(node),
            None => bail!(Internal, "{v} is no node"),
        }
    }

    fn root(&self, v: ValueId) -> ValueId {
        schedule::root(self.graph, self.nodes, v)
    }

    /// Where the row of a value starts.
    fn row_of(&self, v: ValueId) -> Result<Val> {
        match self.at.get(&self.root(v)) {
            Some(at) => Ok(*at),
            None => bail!(Internal, "{v}: {} has no row here", self.graph.ty(v)),
        }
    }

    /// Where a node's result goes; `None` where nobody reads it.
    fn destination(&self, v: ValueId) -> Option<Val> {
        self.at.get(&v).copied()
    }

    fn dtype(&self, v: ValueId) -> Result<DType> {
        match self.graph.ty(v) {
            Type::Tensor { dtype, .. } | Type::Cache { dtype, .. } => Ok(*dtype),
            ty => bail!(Internal, "{v}: {ty} has no dtype"),
        }
    }

    /// The start of a buffer.
    fn memory(&self, value: ValueId) -> Result<Val> {
        match self.memory.get(value.0 as usize) {
            Some(Some(base)) => Ok(*base),
            _ => bail!(Internal, "{value} is not in memory"),
        }
    }

    /// Where this row of a value with a buffer is.
    fn row_in_buffer(&self, e: &mut Emitter, value: ValueId) -> Result<Val> {
        if let Some(at) = self.here.get(&value) {
            return Ok(*at);
        }
        let Some(bytes) = row_bytes(self.graph.ty(value)) else { bail!(Internal, "{value} has no rows") };
        let base = self.memory(value)?;
        Ok(e.row(base, self.row, bytes))
    }

    /// A loaded index of this row: of a token, a position, a row.
    fn index(&self, e: &mut Emitter, value: ValueId) -> Result<Val> {
        let base = self.memory(value)?;
        Ok(load_index(e, base, self.row))
    }
}

/// Loads an `i32` and widens it.
pub(super) fn load_index(e: &mut Emitter, base: Val, index: Val) -> Val {
    let at = e.row(base, index, 4);
    let value = e.load(at, I32, 4);
    e.convert("extsi", value, I64)
}

/// The f32 at `base[index]`.
pub(super) fn real_at(e: &mut Emitter, base: Val, index: Val) -> Val {
    let at = e.row(base, index, 4);
    e.load(at, F32, 4)
}

/// Stores an f32 to `base[index]`.
pub(super) fn put_real(e: &mut Emitter, value: Val, base: Val, index: Val) {
    let at = e.row(base, index, 4);
    e.store(value, at, 4);
}
