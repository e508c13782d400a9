//! Canonical to canonical: a vocabulary projection of 8 bits is stored in two planes ([`ir::planes`]), of which a step that
//! wants the likeliest tokens reads the first for every row, and the second for few.
//!
//! ```text
//! %logits = matmul %q, %w     # q8_0        %e = estimate %q, %w, %step                    # w: q8_planes
//!                                     ->    %b = estimate_bounds %q, %w, %step {margin = 8}
//!                                           %logits = rescore %e, %b, %q, %w, %step
//! ```
//!
//! A step says how many of a row's largest logits it wants; with none said, all are exact. Else a logit whose estimate lies
//! more than 8 standard deviations of its second plane's part below those wanted keeps its estimate. The largest deviation
//! found in 76 million rows of published models was 5.1. Tokens that look up their rows in the same matrix do so in both
//! planes.

use crate::rebuild::Builder;
use crate::{Options, State};
use ir::ops::Class;
use ir::{Attrs, DType, Dim, Graph, Input, Model, Op, Place, Result, Type, ValueId, attrs};
use std::collections::{BTreeMap, BTreeSet};

/// Standard deviations of the second plane's part that an estimate is trusted to.
const MARGIN: f64 = 8.0;

/// Rows of a matrix for which two launches are worth it, and that f32 can number.
const ROWS: std::ops::RangeInclusive<usize> = 4096..=1 << 24;

/// The pass.
///
/// # Errors
/// Where a rewritten graph does not fit together: a broken invariant.
pub fn run(state: &mut State, options: &Options) -> Result<Vec<String>> {
    let names = if options.exact_head { BTreeSet::new() } else { projections(&state.model) };
    if names.is_empty() {
        return Ok(vec!["no projection in two planes".into()]);
    }
    for name in &names {
        if let Some(weight) = state.model.weights.get_mut(name) {
            set(&mut weight.ty);
        }
    }
    let model = &mut state.model;
    for index in 0..model.graphs.len() {
        let graph = &model.graphs[index];
        let planes = |name: &str| names_of(model, &graph.name, name).iter().any(|name| names.contains(name));
        let place = || format!("graph @{}", graph.name);
        model.graphs[index] = rewrite(graph, &planes).at(place)?;
    }
    state.approximations.push(format!(
        "vocabulary projection: 4 of 8 bits for every row, all for those that {MARGIN} standard deviations could bring among \
         the likeliest that a step asks for; the others keep estimates"
    ));
    Ok(vec![format!("{} projections in two planes", names.len())])
}

/// A weight's entries of the weight table, over the calls of its graph.
fn names_of(model: &Model, graph: &str, name: &str) -> Vec<String> {
    model.calls.iter().filter(|call| call.graph == graph).map(|call| format!("{}{name}", call.prefix)).collect()
}

/// Weights that rows which leave the step are multiplied with, and that nothing else reads but a lookup of rows.
fn projections(model: &Model) -> BTreeSet<String> {
    let mut readers: BTreeMap<String, Vec<bool>> = BTreeMap::new(); // by name: whether each reader can do with planes
    let mut multiplied = BTreeSet::new();
    for graph in &model.graphs {
        for node in &graph.nodes {
            for operand in &node.operands {
                let Some(weight) = graph.node(*operand).filter(|n| n.op == Op::WEIGHT) else { continue };
                let (product, lookup) = (is_projection(graph, node), node.op.class() == Class::Gather);
                for name in names_of(model, &graph.name, weight.attrs.str("name")) {
                    if product {
                        multiplied.insert(name.clone());
                    }
                    readers.entry(name).or_default().push(product || lookup);
                }
            }
        }
        let returned = graph.results.iter().filter_map(|(_, v)| graph.node(*v)).filter(|n| n.op == Op::WEIGHT);
        for name in returned.flat_map(|n| names_of(model, &graph.name, n.attrs.str("name"))) {
            readers.entry(name).or_default().push(false);
        }
    }
    multiplied.retain(|name| readers.get(name).is_some_and(|readers| readers.iter().all(|fits| *fits)));
    multiplied
}

/// Rows that leave the step, in two planes, times a large matrix of 8 bits.
fn is_projection(graph: &Graph, node: &ir::Node) -> bool {
    let [x, w] = node.operands[..] else { return false };
    let large = matches!(graph.ty(w).as_tensor(), Some((DType::Q8_0, [Dim::N(n), Dim::N(_)])) if ROWS.contains(n));
    let leaves = matches!(graph.ty(x).as_tensor(), Some((DType::A16, [Dim::R, _])));
    node.op.class() == Class::Contract && large && leaves
}

/// The graph with those of its weights in planes that are to be, and what multiplies with them rewritten.
fn rewrite(graph: &Graph, planes: &dyn Fn(&str) -> bool) -> Result<Graph> {
    let projected = |node: &ir::Node| {
        let weight = node.operands.get(1).and_then(|w| graph.node(*w)).filter(|w| w.op == Op::WEIGHT);
        is_projection(graph, node) && weight.is_some_and(|w| planes(w.attrs.str("name")))
    };
    let mut builder = Builder::like(graph);
    let known = builder.graph.inputs.iter().position(|input| input.ty == Type::Step);
    let added = usize::from(known.is_none() && graph.nodes.iter().any(projected));
    if added > 0 {
        builder.graph.inputs.push(Input { name: "step".into(), ty: Type::Step });
    }
    let step = ValueId(known.unwrap_or(graph.inputs.len()) as u32);
    let mut to: Vec<ValueId> = graph.values().collect();
    for (index, node) in graph.nodes.iter().enumerate() {
        let operands: Vec<ValueId> = node.operands.iter().map(|o| to[o.0 as usize]).collect();
        to[graph.value_of(index).0 as usize] = if projected(node) {
            project(&mut builder, operands[0], operands[1], step)?
        } else if node.op == Op::WEIGHT && planes(node.attrs.str("name")) {
            let mut ty = node.ty.clone();
            set(&mut ty);
            builder.weight(node.attrs.str("name"), &ty)
        } else {
            builder.copy(node, &operands)?
        };
    }
    builder.graph.results = graph.results.iter().map(|(n, v)| (n.clone(), to[v.0 as usize])).collect();
    Ok(builder.graph)
}

fn project(builder: &mut Builder, x: ValueId, w: ValueId, step: ValueId) -> Result<ValueId> {
    let estimates = builder.push("estimate", Attrs::none(), &[x, w, step])?;
    let bounds = builder.push("estimate_bounds", attrs! { margin = MARGIN }, &[x, w, step])?;
    builder.push("rescore", Attrs::none(), &[estimates, bounds, x, w, step])
}

fn set(ty: &mut Type) {
    if let Type::Tensor { dtype, .. } = ty {
        *dtype = DType::Q8_PLANES;
    }
}
