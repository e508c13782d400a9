//! Canonical to canonical: in what types matrices and caches are stored, and what integer and bf16 weights are multiplied
//! with.
//!
//! ```text
//! %y = matmul %x, %w          # w: q4_1        %q = quantize %x            # a8[t, 576]
//!                                       ->     %y = matmul %q, %w
//! ```
//!
//! Where caches are codes, keys, queries and values are turned by a Hadamard matrix first (`hadamard`), and what is attended is
//! turned back. Caches of int4 have others in f16 beside them, in which a token sees the positions of its own cache block
//! (`attend_mixed`), and from which keys get every cache block that is whole, with a scale a dim (`append_blocks`). So their keys
//! are not turned: dims that stand out have scales of their own.
//!
//! ```text
//! keys<i4>[c, 3, 64]   keys_recent<f16, window = 64>[c, 3, 64]           positions 0..64 in int4, 64..=70 in f16, for token 70
//! ```
//!
//! The activations of bf16 weights become bf16 (`round_bf16`), on every target: one artifact means the same everywhere.
//! Where all targets have matrix units for bf16, so do those of integer weights in steps of many tokens: graphs become two.
//!
//! ```text
//! graph @layer  ->  graph @layer when t = 1..32     %q = quantize %x        # a8
//!                   graph @layer when t = 33..512   %q = round_bf16 %x      # bf16: nearer to %x, and faster
//! ```
//!
//! There, queries are bf16 too where caches are narrow: attention multiplies in bf16 then.
//!
//! These choices change values beyond rounding. Each is one line of `State::approximations`, which ends up in the
//! artifact's provenance.

use crate::assign::assign;
use crate::rebuild::Builder;
use crate::{Options, State};
use crate::{scales, weights};
use ir::formats::CACHED;
use ir::ops::Class;
use ir::plan::MANY;
use ir::{
    Attrs, CacheRole, DType, Dim, Error, Graph, Input, Kind, Model, Node, Place, Result, TokenRange, Type, ValueId,
};
use std::collections::BTreeMap;

/// The pass.
///
/// # Errors
/// Where caches are asked for in a type they cannot have.
pub fn run(state: &mut State, options: &Options) -> Result<Vec<String>> {
    if let Some(dtype) = options.weights {
        state.approximations.extend(weights::store(&mut state.model, dtype, options)?);
    }
    state.approximations.extend(assign(&mut state.model, options)?);
    state.approximations.extend(scales::insert(&mut state.model, options.quantizer)?);
    let kv = options.kv.unwrap_or(if narrow(&state.model) { DType::F16 } else { DType::F32 });
    if let Some(dim) = heads_of_caches(&state.model).find(|dim| !kv.caches(*dim)) {
        let fit: Vec<String> = CACHED.iter().filter(|d| d.caches(dim)).map(DType::to_string).collect();
        let error = Error::new(Kind::Usage, format!("caches of heads of {dim} cannot be stored as {kv}"));
        return Err(error.help(format!("choose {}", fit.join(", "))));
    }
    let sees_all = |n: &Node| n.op.class() == Class::Attend && !n.attrs.bool("causal");
    if kv == DType::I4 && state.model.graphs.iter().flat_map(|g| &g.nodes).any(sees_all) {
        let error =
            Error::new(Kind::Usage, "caches of int4 are for causal attention, and this model's tokens see later ones");
        return Err(error.help("choose f32, f16, bf16 or int8"));
    }
    let (mut rounded, mut caches) = (Rounded::default(), 0);
    let graphs = std::mem::take(&mut state.model.graphs);
    for graph in &graphs {
        for next in by_tokens(graph, kv, options) {
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
    if rounded.attention > 0 {
        state.approximations.push(format!("attention of {MANY} tokens or more: products in bf16"));
    }
    if caches > 0 {
        match kv {
            DType::F32 => {}
            DType::I8 => {
                state
                    .approximations
                    .push("keys and values: int8 with one scale for each head and position, turned".into());
            }
            DType::I4 => {
                let how = "keys: int4 with a scale and middle for each dim of a cache block; values: int4 with one scale for \
                           each head and position, turned; both: f16 in a token's own cache block";
                state.approximations.push(how.into());
            }
            _ => state.approximations.push(format!("keys and values: {kv}")),
        }
    }
    let Rounded { int8, bf16, widened, .. } = rounded;
    Ok(vec![format!("caches {kv}, {int8} contractions of int8 activations, {} of bf16", bf16 + widened)])
}

/// Contractions by what they multiply with.
#[derive(Clone, Copy, Debug, Default)]
struct Rounded {
    int8: usize,
    bf16: usize,
    /// bf16 activations with integer weights.
    widened: usize,
    /// bf16 queries.
    attention: usize,
}

impl Rounded {
    /// Adds those of a graph.
    fn count(&mut self, graph: &Graph) {
        let queries = graph.nodes.iter().filter(|n| n.op.class() == Class::Attend).map(|n| graph.ty(n.operands[0]));
        self.attention += queries.filter(|q| q.dtype() == Some(DType::BF16)).count();
        let contractions =
            graph.nodes.iter().filter(|n| matches!(n.op.class(), Class::Contract | Class::ContractExperts));
        for node in contractions {
            let dtype = |operand: usize| graph.ty(node.operands[operand]).dtype();
            match (dtype(0), dtype(1)) {
                (Some(DType::BF16), Some(DType::BF16)) => self.bf16 += 1,
                (Some(DType::BF16), _) => self.widened += 1,
                (Some(x), _) if x.planes().is_some() => self.int8 += 1,
                _ => {}
            }
        }
    }
}

/// The graph, or twice: for steps of few tokens and of many, where those multiply integer weights in another way.
fn by_tokens(graph: &Graph, kv: DType, options: &Options) -> Vec<Graph> {
    let most = options.limits.tokens;
    let widened = |node: &ir::Node| match node.operands[..] {
        [x, w] if node.op.class() == Class::Contract => widens(graph.ty(x), graph.ty(w)),
        _ => attends_in_bf16(graph, node, kv),
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

/// Attention over narrow caches, in heads that matrix units can multiply 32 dims at a time. Scores of bf16 products are scaled
/// afterwards, by what leaves the largest the largest.
fn attends_in_bf16(graph: &Graph, node: &Node, kv: DType) -> bool {
    let Some((DType::F32, [.., Dim::N(dim)])) = node.operands.first().and_then(|q| graph.ty(*q).as_tensor()) else {
        return false;
    };
    node.op.class() == Class::Attend
        && kv != DType::F32
        && dim.is_multiple_of(32)
        && node.attrs.float("scale") >= f64::from(f32::MIN_POSITIVE)
}

/// Widths of the heads that the model caches.
pub fn heads_of_caches(model: &Model) -> impl Iterator<Item = usize> {
    let types = model.graphs.iter().flat_map(|g| &g.inputs).map(|input| &input.ty);
    types.filter_map(|ty| if let Type::Cache { dim, .. } = ty { Some(*dim) } else { None })
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
    let mut recent = Recent::of(&mut builder.graph);
    let mut to: Vec<ValueId> = graph.values().collect();
    for (index, node) in graph.nodes.iter().enumerate() {
        let mut operands: Vec<ValueId> = node.operands.iter().map(|o| to[o.0 as usize]).collect();
        if matches!(node.op.class(), Class::Contract | Class::ContractExperts)
            && let (x, weight) = (builder.graph.ty(operands[0]), graph.ty(node.operands[1]))
            && let Some(op) = rounding(x, weight, widening && node.op.class() == Class::Contract)
        {
            operands[0] = builder.push(op, Attrs::none(), &operands[..1])?;
        }
        let turned = Turned::of(graph, node, kv);
        if let Some(operand) = turned.operand {
            operands[operand] = builder.push("hadamard", Attrs::none(), &[operands[operand]])?;
        }
        if widening && attends_in_bf16(graph, node, kv) {
            operands[0] = builder.push("round_bf16", Attrs::none(), &operands[..1])?;
        }
        let mut value = recent.copy(&mut builder, node, &operands)?;
        if turned.result {
            value = builder.push("hadamard", Attrs::none(), &[value])?;
        }
        to[graph.value_of(index).0 as usize] = value;
    }
    builder.graph.results = graph.results.iter().map(|(n, v)| (n.clone(), to[v.0 as usize])).collect();
    recent.leave(&mut builder.graph);
    Ok(builder.graph)
}

/// Caches of few bits have another beside them for their last positions, which gets the same rows.
struct Recent {
    /// The input's name, and its value now, by that of the cache it is beside.
    beside: BTreeMap<ValueId, (String, ValueId)>,
}

impl Recent {
    fn of(graph: &mut Graph) -> Recent {
        let mut beside = BTreeMap::new();
        for cache in 0..graph.inputs.len() {
            if let Some(ty) = graph.inputs[cache].ty.recent() {
                let (name, value) =
                    (format!("{}_recent", graph.inputs[cache].name), ValueId(graph.inputs.len() as u32));
                graph.inputs.push(Input { name: name.clone(), ty });
                beside.insert(ValueId(cache as u32), (name, value));
            }
        }
        Recent { beside }
    }

    fn copy(&mut self, builder: &mut Builder, node: &Node, operands: &[ValueId]) -> Result<ValueId> {
        match (node.op.class(), operands) {
            (Class::Append, [cache, rows, step]) => {
                let Some((name, before)) = self.beside.remove(cache) else { return builder.copy(node, operands) };
                let after = builder.copy(node, &[before, *rows, *step])?;
                let value = match builder.graph.ty(*cache).kept(1) {
                    0 => builder.push("append_blocks", Attrs::none(), &[*cache, after, *step])?,
                    _ => builder.copy(node, operands)?,
                };
                self.beside.insert(value, (name, after));
                Ok(value)
            }
            (Class::Attend, [q, keys, values, step]) => match (self.beside.get(keys), self.beside.get(values)) {
                (Some((_, recent_keys)), Some((_, recent_values))) => {
                    let operands = [*q, *keys, *values, *recent_keys, *recent_values, *step];
                    builder.push("attend_mixed", node.attrs.clone(), &operands)
                }
                _ => builder.copy(node, operands),
            },
            _ => builder.copy(node, operands),
        }
    }

    /// They leave under their inputs' names where anything was appended.
    fn leave(self, graph: &mut Graph) {
        let inputs = graph.inputs.len() as u32;
        graph.results.extend(self.beside.into_values().filter(|(_, value)| value.0 >= inputs));
    }
}

/// What is turned where caches are codes of one scale for each head and position: keys and values before they are appended, and
/// queries where keys are; what is attended is turned back where values are. Nothing changes by that, but no dim stands out any
/// more.
#[derive(Clone, Copy, Default)]
struct Turned {
    operand: Option<usize>,
    result: bool,
}

impl Turned {
    fn of(graph: &Graph, node: &Node, kv: DType) -> Turned {
        let (operand, cache) = match node.op.class() {
            Class::Append => (1, 0),
            Class::Attend => (0, 1),
            _ => return Turned::default(),
        };
        let Type::Cache { role, dim, .. } = *graph.ty(node.operands[cache]) else { return Turned::default() };
        let by_position = match role {
            CacheRole::Keys => kv == DType::I8,
            CacheRole::Values => matches!(kv, DType::I8 | DType::I4),
        };
        let even = dim.is_multiple_of(2);
        let attended = node.op.class() == Class::Attend && matches!(kv, DType::I8 | DType::I4);
        Turned { operand: (even && by_position).then_some(operand), result: even && attended }
    }
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
        _ if !weight.is_integer() => None,
        _ if leaves => Some("quantize_fine"),
        _ => Some("quantize"),
    }
}
