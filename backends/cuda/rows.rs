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

mod blocks;
mod gather;
mod nodes;
mod quantize;
mod sweep;

use super::{Device, weights};
use crate::cpu::count_of;
use crate::cpu::rows::lead;
use crate::cpu::rows::schedule::Step;
use crate::cpu::rows::values;
use crate::emit::{Emitter, F32, KernelArgs, Val};
use mansard_ir::ops::Class;
use mansard_ir::{Graph, Place, Result, ValueId, bail};

/// Emits a `rows` kernel: blocks share the rows.
pub(super) fn emit(e: &mut Emitter, d: Device<'_>) -> Result<()> {
    let body = &d.kernel.body;
    let nodes = body.computed();
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
        let shared = |e: &mut Emitter, bytes| Some(e.shared(bytes));
        let (mut rows, steps) = Rows::new(e, k, (graph, nodes), (memory, here), row, shared)?;
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

/// A block of threads, which compute a row together.
pub(super) struct Block;

type Rows<'a> = values::Rows<'a, Block>;

impl Rows<'_> {
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
