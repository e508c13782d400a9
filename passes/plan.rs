//! Optimized to planned: kernels get bodies, calls become launches, values get memory.
//!
//! ```text
//! call @layer "model.layers.3."   ->   k4 buf0 w31 w32 buf2 barrier
//!                                      k5 buf2 c6 c7 buf3 barrier ...
//! ```
//!
//! Equal bodies are one kernel, whatever graph and call they come from, so the code does not grow with depth; only the
//! list of launches does. A weight is packed once for every way it is read. A launch waits for the earlier ones only
//! where it reads or writes memory that they touch.

mod bodies;
mod flatten;

use crate::cost::workload_seconds;
use crate::{LimitsRequest, Options, State};
use bodies::Bodies;
use flatten::{Flattened, Tables, flatten};
use ir::artifact::Derivation;
use ir::layout::{cache_block_bytes, packed_bytes, row_bytes};
use ir::plan::{
    Buffer, CacheGroup, CacheSpec, Kernel, KernelSpec, Limits, Output, Pack, Plan, Program, RowCount, Variant,
    WeightSpec,
};
use ir::{Error, Kind, Model, Result, TokenRange, bail};
use std::collections::BTreeSet;

/// The pass.
///
/// # Errors
/// Where a call's input is bound by nothing, or a value has no layout.
pub fn run(state: &mut State, options: &Options) -> Result<Vec<String>> {
    let limits = granted(&state.model, &options.limits)?;
    let bodies = Bodies::new(&state.model, limits.tokens)?;
    name(&mut state.derivations, &state.model, &bodies);
    let plan = with_bodies(&state.model, limits, bodies)?;
    if let Some(traffic) = &options.traffic {
        traffic.fits(plan.program.limits.sequences, plan.program.limits.context)?;
    }
    let program = &plan.program;
    let launches: Vec<String> = program
        .variants
        .iter()
        .map(|v| format!("{} for t {}..={}", v.launches.len(), v.tokens.min, v.tokens.max))
        .collect();
    let weights: usize = program.weights.iter().map(|w| w.bytes).sum();
    let traffic = options.traffic.unwrap_or_default();
    let seconds = workload_seconds(&state.model, &options.target.machine, &traffic, program.limits.tokens);
    let note = format!(
        "{} kernels; launches {}; weights {:.1} MB, arena {:.1} MB; {:.2} ms predicted for {traffic}",
        plan.kernels.len(),
        launches.join(", "),
        weights as f64 / 1e6,
        program.arena_bytes as f64 / 1e6,
        seconds * 1e3
    );
    state.plan = Some(plan);
    Ok(vec![note])
}

/// The plan of an optimized model.
///
/// # Errors
/// As [`run`].
pub fn plan(model: &Model, request: &LimitsRequest) -> Result<Plan> {
    let limits = granted(model, request)?;
    with_bodies(model, limits, Bodies::new(model, limits.tokens)?)
}

/// Says which kernels derivations are about: those of a graph and range stand in order of launch.
fn name(derivations: &mut [Derivation], model: &Model, bodies: &Bodies) {
    let mut before = None;
    let mut index = 0;
    for derivation in derivations {
        let of = Some((derivation.graph.clone(), derivation.tokens));
        index = if of == before { index + 1 } else { 0 };
        before = of;
        let graph = model.graphs.iter().position(|g| g.name == derivation.graph && g.suits(derivation.tokens.min));
        let site = graph.and_then(|graph| bodies.sites.get(graph)?.get(index));
        derivation.kernel = site.map_or(String::new(), |site| bodies.kernels[site.kernel.0 as usize].name.clone());
    }
}

fn with_bodies(model: &Model, limits: Limits, bodies: Bodies) -> Result<Plan> {
    let mut tables = Tables::default();
    let mut flattened = vec![];
    for range in ranges(model, limits.tokens) {
        flattened.push((range, flatten(model, &bodies, range, &limits, &mut tables)?));
    }
    let (buffers, outputs, arena_bytes, variants) = place(flattened, &limits)?;
    let program = Program {
        limits,
        arena_bytes,
        scratch_bytes: bodies.kernels.iter().map(Kernel::scratch_bytes).max().unwrap_or(0),
        buffers,
        weights: tables.weights.iter().map(|w| weight_spec(&w.pack, &w.ty)).collect::<Result<_>>()?,
        caches: tables.caches.iter().map(|(name, ty)| cache_spec(name, ty, &bodies.groups)).collect::<Result<_>>()?,
        groups: bodies.groups,
        kernels: bodies.kernels.iter().map(kernel_spec).collect(),
        variants,
        outputs,
    };
    let packs = tables.weights.into_iter().map(|w| w.pack).collect();
    Ok(Plan { kernels: bodies.kernels, packs, program })
}

fn granted(model: &Model, request: &LimitsRequest) -> Result<Limits> {
    let LimitsRequest { tokens, rows, sequences, context, tile } = *request;
    let most = if model.info.context > 0 { model.info.context } else { usize::MAX };
    let context = context.unwrap_or(most).min(most);
    if tokens == 0 || rows == 0 || sequences == 0 || context == 0 || tile == 0 {
        return Err(Error::new(Kind::Usage, "a step must be allowed at least one token, row, sequence and position"));
    }
    if context == usize::MAX {
        return Err(Error::new(Kind::Usage, "the model states no context length").help("state one"));
    }
    Ok(Limits { tokens, rows, sequences, context, tile })
}

/// `1..=tokens`, cut wherever some graph changes its variant.
fn ranges(model: &Model, tokens: usize) -> Vec<TokenRange> {
    let mut ends: BTreeSet<usize> = model.graphs.iter().filter_map(|g| g.range).map(|r| r.max).collect();
    ends.retain(|e| *e < tokens);
    ends.insert(tokens);
    let mut min = 1;
    let range = |max: usize| {
        let range = TokenRange { min, max };
        min = max + 1;
        range
    };
    ends.into_iter().map(range).collect()
}

type Placed = (Vec<Buffer>, Vec<Output>, usize, Vec<Variant>);

/// Gives every value of every variant its memory, and every launch its barrier.
fn place(flattened: Vec<(TokenRange, Flattened)>, limits: &Limits) -> Result<Placed> {
    let temporary: usize = flattened.iter().map(|(_, f)| f.temporary_bytes).max().unwrap_or(0);
    let (mut buffers, mut outputs, mut variants) = (vec![], vec![], vec![]);
    let mut end = temporary;
    if let Some((_, first)) = flattened.first() {
        for output in &first.outputs {
            let value = &first.values[output.value];
            outputs.push((output.name.clone(), value.ty.clone(), end));
            let bytes = crate::memory::buffer_bytes(value.rows.most(limits), value.row_bytes);
            end = bytes.and_then(|b| end.checked_add(b)).ok_or_else(too_large)?;
        }
    }
    for (tokens, mut f) in flattened {
        for output in &f.outputs {
            match outputs.iter().find(|(name, ty, _)| *name == output.name && *ty == f.values[output.value].ty) {
                Some((.., offset)) => f.values[output.value].offset = *offset,
                None => bail!(Internal, "output `{}` differs between variants", output.name),
            }
        }
        variants.push(Variant { tokens, launches: f.launches(&mut buffers) });
    }
    let output = |(name, ty, offset): (String, ir::Type, usize)| {
        let buffer = buffers.iter().position(|b: &Buffer| b.offset == offset && b.ty == ty.to_string());
        match (buffer, ty.row_width()) {
            (Some(i), Some(width)) => Ok(Output { name, buffer: ir::plan::BufferId(i as u32), width }),
            _ => Err(Error::new(Kind::Internal, format!("output `{name}` has no buffer"))),
        }
    };
    let outputs = outputs.into_iter().map(output).collect::<Result<_>>()?;
    // variants for few tokens lie close together; every buffer still has room for the most rows of a step
    for buffer in &buffers {
        let bytes = crate::memory::buffer_bytes(buffer.rows.most(limits), buffer.row_bytes);
        end = end.max(bytes.and_then(|b| b.checked_add(buffer.offset)).ok_or_else(too_large)?);
    }
    Ok((buffers, outputs, end, variants))
}

fn too_large() -> Error {
    Error::new(Kind::Usage, "the activations of a step this large do not fit the address space")
        .help("allow fewer tokens or rows per step")
}

/// Bytes from row to row, and what rows are counted by.
fn rows_of(ty: &ir::Type) -> Result<(usize, RowCount)> {
    match (row_bytes(ty), ty.rows().and_then(RowCount::from_dim)) {
        (Some(bytes), Some(rows)) => Ok((bytes, rows)),
        _ => bail!(Unsupported, "a value of type {ty} has no layout in memory"),
    }
}

fn weight_spec(pack: &Pack, ty: &ir::Type) -> Result<WeightSpec> {
    let Some((dtype, shape)) = ty.as_tensor() else { bail!(Internal, "weight `{}` is no tensor", pack.name()) };
    let shape: Vec<usize> = shape.iter().filter_map(|d| if let ir::Dim::N(n) = d { Some(*n) } else { None }).collect();
    let recipe = (!pack.is_entry()).then(|| ir::text::print_graph(&pack.recipe));
    Ok(WeightSpec { name: pack.name(), ty: ty.to_string(), bytes: packed_bytes(dtype, &shape), recipe })
}

fn cache_spec(name: &str, ty: &ir::Type, groups: &[CacheGroup]) -> Result<CacheSpec> {
    match (cache_block_bytes(ty), CacheGroup::index_of(groups, ty)) {
        (Some(block_bytes), Some(group)) => Ok(CacheSpec { name: name.into(), ty: ty.to_string(), block_bytes, group }),
        _ => bail!(Internal, "cache `{name}` has type {ty}"),
    }
}

fn kernel_spec(kernel: &Kernel) -> KernelSpec {
    let (flops_per_token, weight_bytes) = bodies::work(&kernel.body);
    KernelSpec { name: kernel.name.clone(), text: ir::text::print_graph(&kernel.body), flops_per_token, weight_bytes }
}
