//! Canonical to canonical: in what type caches are stored and what integer weights are multiplied with.
//!
//! ```text
//! %y = matmul %x, %w          # w: q4_1        %q = quantize %x            # a8[t, 576]
//!                                       ->     %y = matmul %q, %w
//! ```
//!
//! These choices change values beyond rounding. Each is one line of `State::approximations`, which ends up in the
//! artifact's provenance.

use crate::rebuild::Builder;
use crate::{Options, State};
use ir::ops::Class;
use ir::{Attrs, DType, Dim, Error, Graph, Kind, Model, Op, Place, Result, Type, ValueId};

/// The pass.
///
/// # Errors
/// Where caches are asked for in a type they cannot have.
pub fn run(state: &mut State, options: &Options) -> Result<Vec<String>> {
    let kv = options.kv.unwrap_or(if quantized(&state.model) { DType::F16 } else { DType::F32 });
    if !kv.is_cached() {
        let error = Error::new(Kind::Usage, format!("caches cannot be stored as {kv}"));
        return Err(error.help("choose f16, i8, f32 or bf16"));
    }
    let (mut rounded, mut caches) = (0, 0);
    for graph in &mut state.model.graphs {
        let name = graph.name.clone();
        let (next, quantizes) = choose(graph, kv).at(|| format!("graph @{name}"))?;
        rounded += quantizes;
        caches += next.inputs.iter().filter(|i| matches!(i.ty, Type::Cache { .. })).count();
        *graph = next;
    }
    if rounded > 0 {
        state.approximations.push("activations of integer contractions: int8 with one scale per 32".into());
    }
    if has_weight(&state.model, |d| d.int().is_some_and(|int| d.format().block > 32 && int.group < d.format().block)) {
        state.approximations.push("scales of k-quants: products of two stored scales, rounded to f16".into());
    }
    if caches > 0 {
        match kv {
            DType::F32 => {}
            DType::I8 => {
                state.approximations.push("keys and values: int8 with one scale for each head and position".into());
            }
            _ => state.approximations.push(format!("keys and values: {kv}")),
        }
    }
    Ok(vec![format!("caches {kv}, {rounded} activations quantized")])
}

fn quantized(model: &Model) -> bool {
    has_weight(model, |d| d.int().is_some())
}

fn has_weight(model: &Model, is: impl Fn(DType) -> bool) -> bool {
    let of = |g: &Graph| g.nodes.iter().any(|n| matches!(n.ty.as_tensor(), Some((d, _)) if is(d)));
    model.graphs.iter().any(of)
}

/// The graph with caches of type `kv` and quantized activations, and how many of those there are.
fn choose(graph: &Graph, kv: DType) -> Result<(Graph, usize)> {
    let mut builder = Builder::like(graph);
    for input in &mut builder.graph.inputs {
        if let Type::Cache { dtype, .. } = &mut input.ty {
            *dtype = kv;
        }
    }
    let op =
        |name: &str| Op::named(name).ok_or_else(|| Error::new(Kind::Internal, format!("the op table has no `{name}`")));
    let (coarse, fine) = (op("quantize")?, op("quantize_fine")?);
    let mut to: Vec<ValueId> = graph.values().collect();
    for (index, node) in graph.nodes.iter().enumerate() {
        let mut operands: Vec<ValueId> = node.operands.iter().map(|o| to[o.0 as usize]).collect();
        if matches!(node.op.class(), Class::Contract | Class::ContractExperts) {
            let integer = matches!(graph.ty(node.operands[1]).as_tensor(), Some((d, _)) if d.int().is_some());
            let float = matches!(builder.graph.ty(operands[0]).as_tensor(), Some((DType::F32, _)));
            if integer && float {
                // What leaves the step is read by people and samplers: few rows, so two planes cost nothing.
                let leaves = builder.graph.ty(operands[0]).rows() == Some(Dim::R);
                operands[0] = builder.add(if leaves { fine } else { coarse }, Attrs::none(), &operands[..1])?;
            }
        }
        to[graph.value_of(index).0 as usize] = builder.copy(node, &operands)?;
    }
    builder.graph.results = graph.results.iter().map(|(n, v)| (n.clone(), to[v.0 as usize])).collect();
    let quantizes = builder.graph.nodes.iter().filter(|n| n.op.class() == Class::Quantize).count();
    Ok((builder.graph, quantizes))
}
