//! What weights alone compute becomes a weight.
//!
//! ```text
//! %w = weight "norm.weight" : f32[640]
//! %g = offset %w {by = 1.0}                ->      %g = weight "norm.weight|offset 1" : f32[640]
//! ```
//!
//! The values are computed once, for every call's own weights, and put into the weight table. Folds that packing does
//! (`scale_columns`) stay. Only f32 is folded: nothing is rounded to another format here.

use ir::model::{Source, Weight};
use ir::ops::Class;
use ir::value::{Tensor, Value};
use ir::{Attr, DType, Graph, Model, Node, Op, Place, Result, ValueId};
use std::sync::Arc;

/// A node over weights, and the weight that takes its place.
struct Constant {
    op: Node,
    operands: Vec<String>,
    name: String,
}

/// Replaces every node of every graph that weights alone decide; returns how many there were.
///
/// # Errors
/// Where a weight cannot be read.
pub fn fold(model: &mut Model) -> Result<usize> {
    let (mut count, there_are_values) = (0, !model.weights.is_empty());
    for index in 0..model.graphs.len() {
        // operands come before their users, so one round suffices
        let constants = replace(&mut model.graphs[index]);
        count += constants.len();
        let graph = model.graphs[index].name.clone();
        let prefixes: Vec<String> = model.calls.iter().filter(|c| c.graph == graph).map(|c| c.prefix.clone()).collect();
        for prefix in prefixes.iter().filter(|_| there_are_values) {
            for constant in &constants {
                let weight = value(model, prefix, constant).at(|| format!("{prefix}{}", constant.name))?;
                model.weights.insert(format!("{prefix}{}", constant.name), weight);
            }
        }
    }
    Ok(count)
}

fn replace(graph: &mut Graph) -> Vec<Constant> {
    let mut constants = vec![];
    for index in 0..graph.nodes.len() {
        let node = &graph.nodes[index];
        let float = node.ty.dtype() == Some(DType::F32);
        let folded = matches!(node.op.class(), Class::Weight | Class::WeightFold);
        let operands: Option<Vec<String>> = node.operands.iter().map(|o| weight_name(graph, *o)).collect();
        let Some(operands) = operands.filter(|_| node.ty.is_static() && float && !folded) else { continue };
        let mut name = format!("{}|{}", operands.join("|"), node.op);
        for (_, attr) in node.attrs.iter() {
            name += &format!(" {attr}");
        }
        let attrs = ir::Attrs::new([("name", Attr::Str(name.clone()))]);
        let weight = Node { op: Op::WEIGHT, attrs, operands: vec![], ty: node.ty.clone() };
        let op = std::mem::replace(&mut graph.nodes[index], weight);
        constants.push(Constant { op, operands, name });
    }
    constants
}

fn weight_name(graph: &Graph, value: ValueId) -> Option<String> {
    let node = graph.node(value).filter(|n| n.op == Op::WEIGHT)?;
    (node.ty.dtype() == Some(DType::F32)).then(|| node.attrs.str("name").to_string())
}

fn value(model: &Model, prefix: &str, constant: &Constant) -> Result<Weight> {
    let read = |name: &String| -> Result<Value> {
        let weight = model.weights.get(&format!("{prefix}{name}"))?;
        Ok(Value::Tensor(Tensor::new(weight.dtype_shape().1, weight.read_all()?)))
    };
    let operands = constant.operands.iter().map(read).collect::<Result<Vec<_>>>()?;
    let result = (constant.op.op.row().eval)(&operands.iter().collect::<Vec<_>>(), &constant.op.attrs)?;
    let data: &[f32] = &result.tensor()?.data;
    Ok(Weight { ty: constant.op.ty.clone(), source: Source::Values(Arc::from(data)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_over_weights_is_one_weight() {
        let text = "graph @g(%x: f32[t, 4]) stage imported { %w = weight \"w\" : f32[4] %g = offset %w {by = 1} \
                    %h = scale %g {by = 2} %y = mul_row %x, %h return y = %y } model @m { call @g with \"a.\" }";
        let mut model = ir::text::parse("case", text).unwrap();
        let weight =
            Weight { ty: ir::Type::f32([ir::Dim::N(4)]), source: Source::Values(Arc::from([1.0, 2.0, 3.0, 4.0])) };
        model.weights.insert("a.w", weight);
        assert_eq!(fold(&mut model).unwrap(), 2);
        let folded = model.weights.get("a.w|offset 1|scale 2").unwrap();
        assert_eq!(folded.read_all().unwrap(), [4.0, 6.0, 8.0, 10.0]);
        let graph = crate::canonicalize::canonical(&model.graphs[0]).unwrap();
        assert_eq!(graph.nodes.len(), 2, "{}", ir::text::print_graph(&graph));
    }
}
