//! Canonical to canonical: in what types matrices and caches are stored, and what integer and bf16 weights are multiplied
//! with.
//!
//! ```text
//! %y = matmul %x, %w          # w: q4_1        %q = quantize %x            # a8[t, 576]
//!                                       ->     %y = matmul %q, %w
//! ```
//!
//! The activations of bf16 weights become bf16 (`round_bf16`), on every target: one artifact means the same everywhere.
//! Where all targets have matrix units for bf16, so do those of integer weights in steps of many tokens: graphs become two.
//!
//! ```text
//! graph @layer  ->  graph @layer when t = 1..64     %q = quantize %x        # a8
//!                   graph @layer when t = 65..512   %q = round_bf16 %x      # bf16: nearer to %x, and faster
//! ```
//!
//! These choices change values beyond rounding. Each is one line of `State::approximations`, which ends up in the
//! artifact's provenance.

use crate::assign::assign;
use crate::rebuild::Builder;
use crate::weights;
use crate::{Options, State};
use ir::ops::Class;
use ir::{Attrs, DType, Dim, Error, Graph, Kind, Model, Op, Place, Result, TokenRange, Type, ValueId};

/// The pass.
///
/// # Errors
/// Where caches are asked for in a type they cannot have.
pub fn run(state: &mut State, options: &Options) -> Result<Vec<String>> {
    if let Some(dtype) = options.weights {
        state.approximations.extend(weights::store(&mut state.model, dtype)?);
    }
    state.approximations.extend(assign(&mut state.model, &options.formats)?);
    let kv = options.kv.unwrap_or(if narrow(&state.model) { DType::F16 } else { DType::F32 });
    if !kv.is_cached() {
        let error = Error::new(Kind::Usage, format!("caches cannot be stored as {kv}"));
        return Err(error.help("choose f16, i8, f32 or bf16"));
    }
    let (mut rounded, mut caches) = (Rounded::default(), 0);
    let graphs = std::mem::take(&mut state.model.graphs);
    for graph in &graphs {
        for next in by_tokens(graph, options) {
            let widening = next.range.is_some_and(|range| range.min >= MANY);
            let next = choose(&next, kv, widening).at(|| format!("graph @{}", graph.name))?;
            rounded.count(&next);
            caches += next.inputs.iter().filter(|i| matches!(i.ty, Type::Cache { .. })).count();
            state.model.graphs.push(next);
        }
    }
    if rounded.int8 > 0 {
        state.approximations.push("activations of integer contractions: int8 with one scale per 32".into());
    }
    if rounded.bf16 > 0 {
        state.approximations.push("activations of bf16 contractions: bf16".into());
    }
    if has_weight(&state.model, |d| d.int().is_some_and(|int| d.format().block > 32 && int.group < d.format().block)) {
        state.approximations.push("scales of k-quants: products of two stored scales, rounded to f16".into());
    }
    if rounded.widened > 0 {
        state
            .approximations
            .push(format!("integer contractions of {MANY} tokens or more: activations and weights in bf16"));
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
    let Rounded { int8, bf16, widened } = rounded;
    Ok(vec![format!("caches {kv}, {int8} contractions of int8 activations, {} of bf16", bf16 + widened)])
}

/// Contractions by what they multiply with.
#[derive(Clone, Copy, Debug, Default)]
struct Rounded {
    int8: usize,
    bf16: usize,
    /// bf16 activations with integer weights.
    widened: usize,
}

impl Rounded {
    /// Adds those of a graph.
    fn count(&mut self, graph: &Graph) {
        let contractions =
            graph.nodes.iter().filter(|n| matches!(n.op.class(), Class::Contract | Class::ContractExperts));
        for node in contractions {
            let dtype = |operand: usize| graph.ty(node.operands[operand]).as_tensor().map(|(dtype, _)| dtype);
            match (dtype(0), dtype(1)) {
                (Some(DType::BF16), Some(DType::BF16)) => self.bf16 += 1,
                (Some(DType::BF16), _) => self.widened += 1,
                (Some(x), _) if x.planes().is_some() => self.int8 += 1,
                _ => {}
            }
        }
    }
}

/// So many tokens are many: what is done once for all of a step's tokens, such as unpacking weights, costs little.
pub(crate) const MANY: usize = 65;

/// The graph, or twice: for steps of few tokens and of many, where those multiply integer weights in another way.
fn by_tokens(graph: &Graph, options: &Options) -> Vec<Graph> {
    let most = options.limits.tokens;
    let widened = |node: &ir::Node| match node.operands[..] {
        [x, w] if node.op.class() == Class::Contract => widens(graph.ty(x), graph.ty(w)),
        _ => false,
    };
    if !options.target.widens_codes() || most < MANY || !graph.nodes.iter().any(widened) {
        return vec![graph.clone()];
    }
    let part = |min, max| Graph { range: Some(TokenRange { min, max }), ..graph.clone() };
    vec![part(1, MANY - 1), part(MANY, most)]
}

/// Integer weights that matrix units can multiply with bf16 activations, 32 columns at a time.
fn widens(x: &Type, weight: &Type) -> bool {
    let (Some((DType::F32, [Dim::T, Dim::N(k)])), Some((weight, _))) = (x.as_tensor(), weight.as_tensor()) else {
        return false;
    };
    weight.int().is_some() && k.is_multiple_of(32)
}

/// Some contraction's activations are rounded, so caches may be.
fn narrow(model: &Model) -> bool {
    has_weight(model, |d| d.int().is_some() || d == DType::BF16)
}

fn has_weight(model: &Model, is: impl Fn(DType) -> bool) -> bool {
    let of = |g: &Graph| g.nodes.iter().any(|n| matches!(n.ty.as_tensor(), Some((d, _)) if is(d)));
    model.graphs.iter().any(of)
}

/// The graph with caches of type `kv` and rounded activations: bf16 for integer weights too where that is `widening`.
fn choose(graph: &Graph, kv: DType, widening: bool) -> Result<Graph> {
    let mut builder = Builder::like(graph);
    for input in &mut builder.graph.inputs {
        if let Type::Cache { dtype, .. } = &mut input.ty {
            *dtype = kv;
        }
    }
    let mut to: Vec<ValueId> = graph.values().collect();
    for (index, node) in graph.nodes.iter().enumerate() {
        let mut operands: Vec<ValueId> = node.operands.iter().map(|o| to[o.0 as usize]).collect();
        if matches!(node.op.class(), Class::Contract | Class::ContractExperts)
            && let (x, weight) = (builder.graph.ty(operands[0]), graph.ty(node.operands[1]))
            && let Some(op) = rounding(x, weight, widening && node.op.class() == Class::Contract)
        {
            let op = Op::named(op).ok_or_else(|| Error::new(Kind::Internal, format!("the op table has no `{op}`")))?;
            operands[0] = builder.add(op, Attrs::none(), &operands[..1])?;
        }
        to[graph.value_of(index).0 as usize] = builder.copy(node, &operands)?;
    }
    builder.graph.results = graph.results.iter().map(|(n, v)| (n.clone(), to[v.0 as usize])).collect();
    Ok(builder.graph)
}

/// The op that rounds activations of type `x` before they are multiplied with `weight`.
///
/// What leaves the step is read by people and samplers, and is few rows: two planes of int8 cost nothing there, nor do f32
/// activations beside bf16 weights.
fn rounding(x: &Type, weight: &Type, widening: bool) -> Option<&'static str> {
    if widening && widens(x, weight) {
        return Some("round_bf16");
    }
    let (Some((DType::F32, shape)), Some((weight, _))) = (x.as_tensor(), weight.as_tensor()) else { return None };
    let (leaves, pairs) = (x.rows() == Some(Dim::R), matches!(shape.last(), Some(Dim::N(k)) if k % 2 == 0));
    match weight {
        DType::BF16 if pairs && !leaves => Some("round_bf16"),
        _ if weight.int().is_none() => None,
        _ if leaves => Some("quantize_fine"),
        _ => Some("quantize"),
    }
}
