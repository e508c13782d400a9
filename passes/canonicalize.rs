//! Imported to canonical: one spelling for equal things, so that later patterns need one spelling only.
//!
//! ```text
//! %a = scale %x {by = 2.0}                 %a = scale %x {by = 1.0}
//! %b = scale %a {by = 0.5}        ->       (gone: %x)
//! ```
//!
//! The normal form: no two equal nodes and no unused ones; `scale` and `offset` chains folded and the neutral ones gone;
//! operands of commutative ops in order of value; views that undo each other gone; elementwise work done on rows of
//! `[t, n]` before they are split into heads; a query's factor inside `attend`. Each step makes the graph smaller or moves
//! a view later, so the rounds end. What weights alone compute becomes a weight.

use crate::rebuild::{Builder, live};
use crate::{Options, State, constants};
use ir::ops::{AttrSpec, Class};
use ir::{Attr, Attrs, Graph, Op, Place, Result, Stage, ValueId, attrs};

/// The pass.
///
/// # Errors
/// Where a node does not fit its type rule.
pub fn run(state: &mut State, _: &Options) -> Result<Vec<String>> {
    let (mut before, mut after) = (0, 0);
    let constants = constants::fold(&mut state.model)?;
    for graph in &mut state.model.graphs {
        before += graph.nodes.len();
        *graph = canonical(graph).at(|| format!("graph @{}", graph.name))?;
        after += graph.nodes.len();
    }
    Ok(vec![format!("{before} nodes became {after}, {constants} of weights alone")])
}

/// The canonical form of one graph.
///
/// # Errors
/// Where a node does not fit its type rule.
pub fn canonical(graph: &Graph) -> Result<Graph> {
    let mut graph = live(graph)?;
    loop {
        let mut builder = Builder::like(&graph);
        let mut to: Vec<ValueId> = graph.values().collect();
        for (index, node) in graph.nodes.iter().enumerate() {
            let operands: Vec<ValueId> = node.operands.iter().map(|o| to[o.0 as usize]).collect();
            to[graph.value_of(index).0 as usize] = match node.op {
                Op::WEIGHT => builder.copy(node, &operands)?,
                op => simplify(&mut builder, op, node.attrs.clone(), operands)?,
            };
        }
        builder.graph.results = graph.results.iter().map(|(n, v)| (n.clone(), to[v.0 as usize])).collect();
        let next = live(&builder.graph)?;
        if next == graph {
            return Ok(Graph { stage: Stage::Canonical, ..next });
        }
        graph = next;
    }
}

/// The value of `op(operands)` in its simplest spelling.
fn simplify(b: &mut Builder, op: Op, attrs: Attrs, mut operands: Vec<ValueId>) -> Result<ValueId> {
    let row = op.row();
    if row.commutative {
        operands.sort();
    }
    let neutral = |spec: &AttrSpec| spec.neutral.is_some_and(|n| attrs.get(spec.name) == Some(&Attr::Float(n)));
    if row.attrs.iter().any(neutral) {
        return Ok(operands[0]);
    }
    match (row.name, operands.as_slice()) {
        ("scale", [x]) => {
            if let Some((inner, by)) = factor(b, *x, "scale") {
                return simplify(b, op, attrs! { by = attrs.float("by") * by }, vec![inner]);
            }
        }
        ("offset", [x]) => {
            if let Some((inner, by)) = factor(b, *x, "offset") {
                return simplify(b, op, attrs! { by = attrs.float("by") + by }, vec![inner]);
            }
        }
        ("split_heads", [x]) => {
            if let Some([inner]) = defined_by(&b.graph, *x, "merge_heads")
                && op.infer(&[b.graph.ty(*x)], &attrs)? == *b.graph.ty(*inner)
            {
                return Ok(*inner);
            }
        }
        ("merge_heads", [x]) => {
            if let Some([inner]) = defined_by(&b.graph, *x, "split_heads") {
                return Ok(*inner);
            }
        }
        ("attend", [q, rest @ ..]) => {
            if let Some((inner, by)) = factor(b, *q, "scale") {
                let scaled = attrs.iter().map(|(n, a)| match a {
                    Attr::Float(x) if n == "scale" => (n.to_string(), Attr::Float(x * by)),
                    _ => (n.to_string(), a.clone()),
                });
                let scaled = Attrs::new(scaled.collect::<Vec<_>>());
                return simplify(b, op, scaled, [&[inner], rest].concat());
            }
        }
        _ if row.class == Class::Elementwise => {
            if let Some((heads, flat)) = split_operands(b, &operands) {
                let value = simplify(b, op, attrs, flat)?;
                return b.add(heads.0, heads.1, &[value]);
            }
        }
        _ => {}
    }
    b.add(op, attrs, &operands)
}

/// Operands of the node that defines `value`, where it is an `op`.
fn defined_by<'a>(graph: &'a Graph, value: ValueId, op: &str) -> Option<&'a [ValueId]> {
    graph.node(value).filter(|n| n.op.name() == op).map(|n| n.operands.as_slice())
}

/// What `value` scales or offsets, and by how much.
fn factor(b: &Builder, value: ValueId, op: &str) -> Option<(ValueId, f64)> {
    let node = b.graph.node(value).filter(|n| n.op.name() == op)?;
    Some((node.operands[0], node.attrs.float("by")))
}

/// Where all operands are split into heads alike: that split, and the operands before it.
fn split_operands(b: &Builder, operands: &[ValueId]) -> Option<((Op, Attrs), Vec<ValueId>)> {
    let nodes: Option<Vec<_>> =
        operands.iter().map(|o| b.graph.node(*o).filter(|n| n.op.name() == "split_heads")).collect();
    let nodes = nodes?;
    let first = nodes.first()?;
    let alike = nodes.iter().all(|n| n.attrs == first.attrs);
    alike.then(|| ((first.op, first.attrs.clone()), nodes.iter().map(|n| n.operands[0]).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The canonical form of a graph over `%x, %y: f32[t, 8]`, without its first and last line.
    fn canonical_text(body: &str) -> String {
        let text = format!("graph @g(%x: f32[t, 8], %y: f32[t, 8]) stage imported {{ {body} }}");
        let model = ir::text::parse("case", &text).unwrap_or_else(|e| panic!("{e}"));
        let graph = canonical(&model.graphs[0]).unwrap_or_else(|e| panic!("{e}"));
        ir::verify::verify(&graph).unwrap_or_else(|e| panic!("{e}"));
        let text = ir::text::print_graph(&graph);
        let lines = text.lines().skip(1).map(|l| l.split('#').next().unwrap_or("").trim());
        lines.take_while(|l| *l != "}").collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn one_spelling() {
        let cases = [
            ("%a = scale %x {by = 2} %b = scale %a {by = 0.5} return y = %b", "return y = %x"),
            (
                "%a = scale %x {by = 2} %b = scale %a {by = 2} return a = %a, b = %b",
                "%2 = scale %x {by = 2.0}; %3 = scale %x {by = 4.0}; return a = %2, b = %3",
            ),
            (
                "%a = offset %x {by = 1} %b = offset %a {by = 2} return y = %b",
                "%2 = offset %x {by = 3.0}; return y = %2",
            ),
            ("%a = add %y, %x %b = add %x, %y return a = %a, b = %b", "%2 = add %x, %y; return a = %2, b = %2"),
            ("%a = tanh %x %b = relu %x return y = %b", "%2 = relu %x; return y = %2"),
            (
                "%a = split_heads %x {heads = 2} %b = merge_heads %a %c = silu %b return y = %c",
                "%2 = silu %x; return y = %2",
            ),
            (
                "%a = split_heads %x {heads = 2} %b = split_heads %y {heads = 2} %c = mul %a, %b return y = %c",
                "%2 = mul %x, %y; %3 = split_heads %2 {heads = 2}; return y = %3",
            ),
        ];
        for (before, after) in cases {
            assert_eq!(canonical_text(before), after, "{before}");
        }
    }
}
