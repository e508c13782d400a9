//! The values of one row's program and where their rows lie, alike on every target.
//!
//! ```text
//! home of a value     Memory(buffer)   the row of its buffer        Stack   the row's own memory        Elsewhere   registers
//! ```

use super::schedule::{self, Home, Schedule, Step};
use super::walk::load_index;
use crate::emit::{Emitter, KernelArgs, Val};
use mansard_ir::layout::row_bytes;
use mansard_ir::{DType, Graph, Node, Result, ValueId, bail};
use std::collections::BTreeMap;
use std::marker::PhantomData;

/// One row's program under construction, for what `Unit` says computes it: what the nodes come to is implemented for each.
pub(crate) struct Rows<'a, Unit> {
    pub(crate) graph: &'a Graph,
    nodes: &'a [ValueId],
    /// Start of each value's buffer.
    memory: &'a [Option<Val>],
    /// Rows that are no buffer's.
    here: BTreeMap<ValueId, Val>,
    pub(crate) k: KernelArgs,
    /// Which row.
    pub(crate) row: Val,
    /// Address of each value's row; values that stay in registers have none.
    pub(crate) at: BTreeMap<ValueId, Val>,
    /// Figures of normalizations, a record a head.
    pub(crate) stats: BTreeMap<ValueId, Val>,
    unit: PhantomData<Unit>,
}

impl<'a, Unit> Rows<'a, Unit> {
    /// Orders the computation of `nodes` for row `row` and gives every value its place; `stack` gives memory for those that
    /// have no buffer, so many bytes. Buffers and rows are as [`super::emit_row`] has them.
    pub(crate) fn new(
        e: &mut Emitter,
        k: KernelArgs,
        (graph, nodes): (&'a Graph, &'a [ValueId]),
        (memory, here): (&'a [Option<Val>], &[(ValueId, Val)]),
        row: Val,
        stack: impl FnOnce(&mut Emitter, usize) -> Option<Val>,
    ) -> Result<(Rows<'a, Unit>, Vec<Step>)> {
        let here: BTreeMap<ValueId, Val> = here.iter().copied().collect();
        let stored = |v: ValueId| here.contains_key(&v) || memory.get(v.0 as usize).is_some_and(Option::is_some);
        let Schedule { steps, homes, stack_bytes } = schedule::schedule(graph, nodes, &stored)?;
        let (at, stats, unit) = (here.clone(), BTreeMap::new(), PhantomData);
        let mut rows = Rows { graph, nodes, memory, here, k, row, at, stats, unit };
        let stack = stack(e, stack_bytes);
        for (value, home) in homes {
            let address = match (home, stack) {
                (Home::Memory(buffer), _) => rows.row_in_buffer(e, buffer)?,
                (Home::Stack(at), Some(stack)) => e.gep_const(stack, at),
                _ => continue,
            };
            rows.at.insert(value, address);
        }
        Ok((rows, steps))
    }

    pub(crate) fn node(&self, v: ValueId) -> Result<&'a Node> {
        match self.graph.node(v) {
            Some(node) => Ok(node),
            None => bail!(Internal, "{v} is no node"),
        }
    }

    /// What a view is a view of.
    pub(crate) fn root(&self, v: ValueId) -> ValueId {
        schedule::root(self.graph, self.nodes, v)
    }

    /// Where the row of a value starts.
    pub(crate) fn row_of(&self, v: ValueId) -> Result<Val> {
        match self.at.get(&self.root(v)) {
            Some(at) => Ok(*at),
            None => bail!(Internal, "{v}: {} has no row here", self.graph.ty(v)),
        }
    }

    /// Where a node's result goes; `None` where nobody reads it.
    pub(crate) fn destination(&self, v: ValueId) -> Option<Val> {
        self.at.get(&v).copied()
    }

    pub(crate) fn dtype(&self, v: ValueId) -> Result<DType> {
        match self.graph.ty(v).dtype() {
            Some(dtype) => Ok(dtype),
            None => bail!(Internal, "{v}: {} has no dtype", self.graph.ty(v)),
        }
    }

    /// The start of a buffer.
    pub(crate) fn memory(&self, value: ValueId) -> Result<Val> {
        match self.memory.get(value.0 as usize) {
            Some(Some(base)) => Ok(*base),
            _ => bail!(Internal, "{value} is not in memory"),
        }
    }

    /// Where this row of a value with a buffer is.
    pub(crate) fn row_in_buffer(&self, e: &mut Emitter, value: ValueId) -> Result<Val> {
        if let Some(at) = self.here.get(&value) {
            return Ok(*at);
        }
        let Some(bytes) = row_bytes(self.graph.ty(value)) else { bail!(Internal, "{value} has no rows") };
        let base = self.memory(value)?;
        Ok(e.row(base, self.row, bytes))
    }

    /// A loaded index of this row: of a token, a position, a row.
    pub(crate) fn index(&self, e: &mut Emitter, value: ValueId) -> Result<Val> {
        let base = self.memory(value)?;
        Ok(load_index(e, base, self.row))
    }

    /// `select_rows`: the row of another value is this value's row.
    pub(crate) fn select(&mut self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let ty = self.graph.ty(node.operands[0]);
        let Some(bytes) = row_bytes(ty) else { bail!(Internal, "{ty} has no rows") };
        let base = self.memory(node.operands[0])?;
        let index = self.index(e, node.operands[1])?;
        let at = e.row(base, index, bytes);
        self.at.insert(v, at);
        Ok(())
    }
}
