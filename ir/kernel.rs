//! Which runs of nodes are kernels that a backend can emit, and of what kind: the table of [`crate::plan::Plan`] as code.
//!
//! ```text
//! matmul, matmul, silu, mul        contract   (gate and up projection meeting in their product)
//! rms_normalize, quantize          rows
//! rms_normalize, quantize, matmul  contract with an operand prologue, for at most 8 tokens
//! matmul, rms_normalize            none: the second needs whole rows of the first
//! ```
//!
//! Both stages with kernels ask here: at `optimized` a kernel is some values of a graph, at `planned` all nodes of its
//! body. What is defined elsewhere (inputs, weights, other kernels' values) is memory. The type rules already see to it that
//! contractions that meet have equal `n`.

use crate::graph::{Graph, Node, ValueId};
use crate::ops::Class;
use crate::types::{Dim, Type};
use crate::{Result, bail};
use std::fmt;

/// Most tokens of a step for which every worker may repeat a contraction's operand prologue.
pub const PROLOGUE_TOKENS: usize = 8;

/// What a kernel is built around.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KernelKind {
    /// Products with weight matrices.
    Contract,
    /// Products with the matrices of chosen experts.
    Experts,
    /// Attention over a cache.
    Attend,
    /// One row for each sequence.
    Pool,
    /// Row by row.
    Rows,
    /// Estimates of products, and bounds on them.
    Estimate,
    /// Exact products where estimates do not decide.
    Rescore,
}

impl KernelKind {
    /// The name in text and reports.
    pub fn name(self) -> &'static str {
        match self {
            KernelKind::Contract => "contract",
            KernelKind::Experts => "experts",
            KernelKind::Attend => "attend",
            KernelKind::Pool => "pool",
            KernelKind::Rows => "rows",
            KernelKind::Estimate => "estimate",
            KernelKind::Rescore => "rescore",
        }
    }

    /// Kernels of this kind have one anchor only.
    pub fn is_alone(self) -> bool {
        matches!(self, KernelKind::Attend | KernelKind::Pool | KernelKind::Rescore)
    }

    /// The kind whose anchors have this class; `None` for classes that are no anchor.
    pub fn of_anchor(class: Class) -> Option<KernelKind> {
        match class {
            Class::Contract => Some(KernelKind::Contract),
            Class::ContractExperts => Some(KernelKind::Experts),
            Class::Attend => Some(KernelKind::Attend),
            Class::Pool => Some(KernelKind::Pool),
            Class::Estimate => Some(KernelKind::Estimate),
            Class::Rescore => Some(KernelKind::Rescore),
            _ => None,
        }
    }
}

impl fmt::Display for KernelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a *rows* kernel, or an operand prologue, may hold.
pub fn is_row_class(class: Class) -> bool {
    use Class::*;
    match class {
        Gather | Angles | Elementwise | RowBroadcast | RowReduce | Rope | Turn | View | Columns | Quantize | Append
        | Route | Combine => true,
        Weight | WeightFold | Contract | ContractExperts | Attend | Pool | Estimate | Rescore => false,
    }
}

/// Nodes of `class` may stand after the anchor of a kernel of that kind.
pub fn after_anchor(kind: KernelKind, class: Class) -> bool {
    match kind {
        KernelKind::Contract | KernelKind::Experts => {
            matches!(class, Class::Elementwise | Class::RowBroadcast | Class::View)
        }
        KernelKind::Attend => class == Class::View,
        KernelKind::Pool => class == Class::RowReduce,
        KernelKind::Rows | KernelKind::Estimate | KernelKind::Rescore => false,
    }
}

/// Where a value of the graph stands in a kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Outside,
    Prologue,
    Anchor,
    Epilogue,
}

/// The kind of a kernel whose whole body is given ([`kind`]).
///
/// # Errors
/// Where the body is of no kind.
pub fn kind_of(body: &Graph) -> Result<KernelKind> {
    kind(body, &body.computed())
}

/// The kind of the kernel that the nodes `values` (ascending) of `graph` make.
///
/// # Errors
/// Where no backend can emit such a kernel; the message names the value and the reason.
pub fn kind(graph: &Graph, values: &[ValueId]) -> Result<KernelKind> {
    let nodes = nodes(graph, values)?;
    from_memory(graph, &nodes)?;
    let mut anchors = nodes.iter().filter_map(|(_, n)| KernelKind::of_anchor(n.op.class()));
    let Some(kind) = anchors.next() else {
        return match nodes.iter().find(|(_, n)| !is_row_class(n.op.class())) {
            Some((v, node)) => bail!(Input, "{v} = {} is in no kernel", node.op),
            None => one_lead(graph, &nodes).map(|()| KernelKind::Rows),
        };
    };
    if anchors.any(|other| other != kind || kind.is_alone()) {
        bail!(Input, "a kernel has one anchor, or several contractions of one kind");
    }
    if kind == KernelKind::Estimate && nodes.iter().any(|(_, node)| node.operands != nodes[0].1.operands) {
        bail!(Input, "an estimate kernel is about one matrix and the same rows");
    }
    one_lead(graph, &nodes)?;
    let roles = roles(graph, &nodes);
    for (v, node) in &nodes {
        let of = |v: &ValueId| roles[v.0 as usize];
        match of(v) {
            Role::Anchor => anchor(*v, node, kind, &of)?,
            Role::Prologue => prologue(graph, *v, node, kind, &of)?,
            _ => epilogue(*v, node, kind, &of)?,
        }
    }
    prologues_stay_inside(graph, &roles)?;
    Ok(kind)
}

fn nodes<'a>(graph: &'a Graph, values: &[ValueId]) -> Result<Vec<(ValueId, &'a Node)>> {
    let mut nodes = vec![];
    for v in values {
        match graph.node(*v) {
            Some(node) if nodes.last().is_none_or(|(last, _)| last < v) => nodes.push((*v, node)),
            _ => bail!(Input, "{v} is no node, or not in ascending order"),
        }
    }
    if nodes.is_empty() {
        bail!(Input, "a kernel holds at least one node");
    }
    Ok(nodes)
}

/// Anchors, what they are computed from, and the rest.
fn roles(graph: &Graph, nodes: &[(ValueId, &Node)]) -> Vec<Role> {
    let mut roles = vec![Role::Outside; graph.len()];
    for (v, node) in nodes {
        roles[v.0 as usize] =
            if KernelKind::of_anchor(node.op.class()).is_some() { Role::Anchor } else { Role::Epilogue };
    }
    for (v, node) in nodes.iter().rev() {
        if matches!(roles[v.0 as usize], Role::Anchor | Role::Prologue) {
            for operand in &node.operands {
                let role = &mut roles[operand.0 as usize];
                if *role == Role::Epilogue {
                    *role = Role::Prologue;
                }
            }
        }
    }
    roles
}

fn anchor(v: ValueId, node: &Node, kind: KernelKind, of: &dyn Fn(&ValueId) -> Role) -> Result<()> {
    for (i, operand) in node.operands.iter().enumerate() {
        match of(operand) {
            Role::Outside => {}
            Role::Prologue if kind == KernelKind::Contract && i == 0 => {}
            _ => bail!(Input, "{v} = {}: {operand} must come from outside the kernel", node.op),
        }
    }
    Ok(())
}

fn prologue(graph: &Graph, v: ValueId, node: &Node, kind: KernelKind, of: &dyn Fn(&ValueId) -> Role) -> Result<()> {
    let few = graph.range.is_some_and(|r| r.max <= PROLOGUE_TOKENS);
    // Every worker repeats a prologue: it must not write to a cache.
    if !few || !is_row_class(node.op.class()) || node.op.class() == Class::Append {
        bail!(
            Input,
            "{v} = {} cannot be computed inside a {kind} kernel for more than 8 tokens, or not at all",
            node.op
        );
    }
    match node.operands.iter().find(|o| of(o) == Role::Anchor) {
        Some(operand) => bail!(Input, "{v} = {} stands between {operand} and another anchor", node.op),
        None => Ok(()),
    }
}

fn epilogue(v: ValueId, node: &Node, kind: KernelKind, of: &dyn Fn(&ValueId) -> Role) -> Result<()> {
    if !after_anchor(kind, node.op.class()) {
        bail!(Input, "{v} = {} cannot follow the anchor of a {kind} kernel", node.op);
    }
    if node.operands.iter().all(|o| of(o) == Role::Outside) {
        bail!(Input, "{v} = {} has nothing to do with the anchor of its {kind} kernel", node.op);
    }
    match node.operands.iter().find(|o| of(o) == Role::Prologue) {
        Some(operand) => bail!(Input, "{v} = {}: {operand} is repeated by every worker, whole rows of it", node.op),
        None => Ok(()),
    }
}

/// Every worker has a prologue's values for itself, so nobody else can read them.
fn prologues_stay_inside(graph: &Graph, roles: &[Role]) -> Result<()> {
    let role = |v: &ValueId| roles[v.0 as usize];
    let readers = graph.values().filter(|v| role(v) == Role::Outside).filter_map(|v| graph.node(v));
    let read = readers.flat_map(|n| &n.operands).chain(graph.results.iter().map(|(_, v)| v));
    match read.filter(|v| role(v) == Role::Prologue).min() {
        Some(v) => bail!(Input, "{v} is computed by every worker for itself but read outside the kernel"),
        None => Ok(()),
    }
}

/// Any row may be gathered, also one that another worker computes; and a cache is memory, before and after an append.
fn from_memory(graph: &Graph, nodes: &[(ValueId, &Node)]) -> Result<()> {
    for (v, node) in nodes {
        let memory = |o: &ValueId| node.op.class() == Class::Gather || matches!(graph.ty(*o), Type::Cache { .. });
        let inside = |o: &&ValueId| nodes.binary_search_by_key(*o, |(v, _)| *v).is_ok();
        if let Some(operand) = node.operands.iter().filter(|o| memory(o)).find(inside) {
            bail!(Input, "{v} = {}: the same kernel computes {operand}, which it must find in memory", node.op);
        }
    }
    Ok(())
}

/// All the nodes work on rows of one symbolic dim.
fn one_lead(graph: &Graph, nodes: &[(ValueId, &Node)]) -> Result<()> {
    let mut first: Option<Dim> = None;
    for (v, node) in nodes {
        let lead = lead(graph, node);
        if *first.get_or_insert(lead) != lead {
            bail!(Input, "{v} = {} works on rows of another dim than the nodes before it", node.op);
        }
    }
    Ok(())
}

/// What a node's rows are counted by; an append has the step's tokens.
fn lead(graph: &Graph, node: &Node) -> Dim {
    let of_operands =
        || node.operands.iter().filter(|v| !matches!(graph.ty(**v), Type::Step)).find_map(|v| graph.ty(*v).rows());
    match node.op.class() {
        Class::Append => Dim::T,
        _ => node.ty.rows().or_else(of_operands).unwrap_or(Dim::N(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kind of all nodes but weights of a graph with this body.
    fn of(range: &str, body: &str) -> std::result::Result<KernelKind, String> {
        let text = format!(
            "graph @g(%x: f32[t, 32], %g: f32[32], %keys: keys<f16>[c, 1, 32], %values: values<f16>[c, 1, 32], \
             %step: step[s], %rows: i32[r]) stage optimized {range} {{ %w = weight \"w\" : q8_0[32, 32] {body} }}"
        );
        let model = crate::text::parse("g", &text).map_err(|e| e.to_string())?;
        let graph = &model.graphs[0];
        let inside = |v: &ValueId| graph.node(*v).is_some_and(|n| n.op.class() != Class::Weight);
        kind(graph, &graph.values().filter(inside).collect::<Vec<_>>()).map_err(|e| e.to_string())
    }

    #[test]
    fn kinds_follow_from_classes() {
        let both = "%a = matmul %x, %w %b = matmul %x, %w %c = silu %a %y = mul %b, %c return y = %y";
        assert_eq!(of("", both), Ok(KernelKind::Contract));
        let views = "%a = matmul %x, %w %y = split_heads %a {heads = 2} return y = %y";
        assert_eq!(of("", views), Ok(KernelKind::Contract));
        let attend = "%q = split_heads %x {heads = 1} return q = %q";
        assert_eq!(of("", attend), Ok(KernelKind::Rows));
        let pool = "%p = mean_pool %x, %step %y = l2_normalize %p {eps = 1e-6} return y = %y";
        assert_eq!(of("", pool), Ok(KernelKind::Pool));
        let append = "%n = rms_normalize %x {eps = 0} %k = split_heads %n {heads = 1} %c = append %keys, %k, %step return keys = %c";
        assert_eq!(of("", append), Ok(KernelKind::Rows));
    }

    #[test]
    fn prologues_are_for_few_tokens() {
        let body = "%n = rms_normalize %x {eps = 0} %q = quantize %n %y = matmul %q, %w return y = %y";
        assert_eq!(of("when t = 1..8", body), Ok(KernelKind::Contract));
        let message =
            "%7 = rms_normalize cannot be computed inside a contract kernel for more than 8 tokens, or not at all";
        assert_eq!(of("", body), Err(message.into()));
        let leaves = "%n = rms_normalize %x {eps = 0} %y = matmul %n, %w return y = %y, n = %n";
        let message = "%7 is computed by every worker for itself but read outside the kernel";
        assert_eq!(of("when t = 1..8", leaves), Err(message.into()));
    }

    #[test]
    fn what_no_backend_emits_is_refused() {
        let chained = "%a = matmul %x, %w %y = matmul %a, %w return y = %y";
        assert_eq!(of("", chained), Err("%8 = matmul: %7 must come from outside the kernel".into()));
        let reduced = "%a = matmul %x, %w %y = rms_normalize %a {eps = 0} return y = %y";
        assert_eq!(of("", reduced), Err("%8 = rms_normalize cannot follow the anchor of a contract kernel".into()));
        let unrelated = "%a = matmul %x, %w %y = silu %x return y = %y, a = %a";
        let message = "%8 = silu has nothing to do with the anchor of its contract kernel";
        assert_eq!(of("", unrelated), Err(message.into()));
        let own =
            "%k = split_heads %x {heads = 1} %c = append %keys, %k, %step %d = append %c, %k, %step return keys = %d";
        let message = "%9 = append: the same kernel computes %8, which it must find in memory";
        assert_eq!(of("", own), Err(message.into()));
        let gathered = "%a = silu %x %y = select_rows %a, %rows return y = %y";
        assert_eq!(
            of("", gathered),
            Err("%8 = select_rows: the same kernel computes %7, which it must find in memory".into())
        );
        let mixed = "%a = silu %x %y = select_rows %x, %rows return y = %y, a = %a";
        assert_eq!(of("", mixed), Err("%8 = select_rows works on rows of another dim than the nodes before it".into()));
        let two = "%a = matmul %x, %w %y = mean_pool %x, %step return y = %y, a = %a";
        assert_eq!(of("", two), Err("a kernel has one anchor, or several contractions of one kind".into()));
    }
}
