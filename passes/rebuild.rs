//! A graph from another graph: what every pass over nodes needs.
//!
//! [`Builder`] appends nodes to a new graph and gives equal nodes one value; [`live`] drops what no result needs. Inputs
//! are kept even where unused: calls bind them by name.

use ir::{Attr, Attrs, Graph, Op, Result, Type, ValueId, bail};
use std::collections::HashMap;

/// A graph under construction in which no two nodes are equal.
pub struct Builder {
    /// What has been built so far.
    pub graph: Graph,
    seen: HashMap<String, ValueId>,
}

impl Builder {
    /// An empty graph with the name, stage, range and inputs of `like`.
    pub fn like(like: &Graph) -> Builder {
        let graph = Graph { nodes: vec![], results: vec![], kernels: vec![], ..like.clone() };
        Builder { graph, seen: HashMap::new() }
    }

    /// The value of this node, a new one only where there is none yet.
    pub fn add(&mut self, op: Op, attrs: Attrs, operands: &[ValueId]) -> Result<ValueId> {
        // Zeros of both signs are equal, so nodes with them are.
        let key = format!("{op}{attrs:?}{operands:?}").replace("Float(-0.0)", "Float(0.0)");
        if let Some(value) = self.seen.get(&key) {
            return Ok(*value);
        }
        let value = self.graph.push_op(op, operands, attrs)?;
        self.seen.insert(key, value);
        Ok(value)
    }

    /// [`Builder::add`] of the op of that name.
    pub fn push(&mut self, op: &str, attrs: Attrs, operands: &[ValueId]) -> Result<ValueId> {
        match Op::named(op) {
            Some(op) => self.add(op, attrs, operands),
            None => bail!(Internal, "the op table has no `{op}`"),
        }
    }

    /// The value of the weight of that name.
    pub fn weight(&mut self, name: &str, ty: &Type) -> ValueId {
        let key = format!("weight {name}");
        if let Some(value) = self.seen.get(&key) {
            return *value;
        }
        let value = self.graph.weight(name, ty.clone());
        self.seen.insert(key, value);
        value
    }

    /// A node copied from another graph, its operands already translated.
    pub fn copy(&mut self, node: &ir::Node, operands: &[ValueId]) -> Result<ValueId> {
        match node.attrs.get("name") {
            Some(Attr::Str(name)) if node.op == Op::WEIGHT => Ok(self.weight(name, &node.ty)),
            _ => self.add(node.op, node.attrs.clone(), operands),
        }
    }
}

/// `graph` without the nodes that no result needs.
///
/// # Errors
/// Where a node no longer fits its type rule: a broken invariant of the caller.
pub fn live(graph: &Graph) -> Result<Graph> {
    let mut needed = vec![false; graph.len()];
    for (_, value) in &graph.results {
        needed[value.0 as usize] = true;
    }
    for value in graph.values().rev() {
        if let (true, Some(node)) = (needed[value.0 as usize], graph.node(value)) {
            node.operands.iter().for_each(|o| needed[o.0 as usize] = true);
        }
    }
    let mut builder = Builder::like(graph);
    let mut to: Vec<ValueId> = graph.values().collect();
    for (index, node) in graph.nodes.iter().enumerate() {
        let value = graph.value_of(index);
        if needed[value.0 as usize] {
            let operands: Vec<ValueId> = node.operands.iter().map(|o| to[o.0 as usize]).collect();
            to[value.0 as usize] = builder.copy(node, &operands)?;
        }
    }
    builder.graph.results = graph.results.iter().map(|(n, v)| (n.clone(), to[v.0 as usize])).collect();
    Ok(builder.graph)
}
