//! CPU kernels: each kind of kernel in the plan's table has one emitter.

pub mod attend;
pub(crate) mod cached;
pub mod contract;
pub mod dot;
pub mod head;
pub mod pool;
pub mod probe;
pub mod rows;

pub use contract::Respect;

use crate::emit::{Emitter, I64, KernelArgs, PTR, Val};
use mansard_ir::kernel::KernelKind;
use mansard_ir::plan::{CacheGroup, Kernel, StepArgs, in_place};
use mansard_ir::{Choice, Dim, Error, Graph, Kind, Result, Target, Tuning, Type, ValueId, bail};
use std::mem::offset_of;

/// Emits a kernel as one MLIR function named after it.
///
/// # Errors
/// Where the body is of no kind, holds a shape or op that has no code, or has a choice that is not for it.
pub fn emit(kernel: &Kernel, target: &Target, tuning: &Tuning) -> Result<String> {
    let choice = tuning.choice(kernel, target);
    match kernel.kind()? {
        KernelKind::Contract | KernelKind::Experts => contract::emit(kernel, target, choice),
        _ if choice.is_some() => Err(Error::new(Kind::Input, "it has no tiles to choose")),
        KernelKind::Attend => attend::emit(kernel, target),
        KernelKind::Pool => pool::emit(kernel, target),
        KernelKind::Rows => rows::emit(kernel, target),
        KernelKind::Estimate => head::estimate::emit(kernel, target),
        KernelKind::Rescore => head::rescore::emit(kernel, target),
    }
    .map_err(|e| e.at(format!("kernel `{}`", kernel.name)))
}

/// The register tiles of a kernel, for people; empty where it has none.
///
/// # Errors
/// As [`emit`].
pub fn tiles(kernel: &Kernel, target: &Target, tuning: &Tuning) -> Result<String> {
    match kernel.kind()? {
        KernelKind::Contract | KernelKind::Experts => contract::tiles(kernel, target, tuning.choice(kernel, target)),
        _ => Ok(String::new()),
    }
}

/// What may be tried for a kernel instead of `from` (`None`: the formulas' choice), differing in one respect.
///
/// # Errors
/// As [`emit`].
pub fn alternatives(kernel: &Kernel, target: &Target, from: Option<Choice>, respect: Respect) -> Result<Vec<Choice>> {
    match kernel.kind()? {
        KernelKind::Contract | KernelKind::Experts => contract::alternatives(kernel, target, from, respect),
        _ => Ok(vec![]),
    }
}

/// The values a kernel's arguments stand for, in order: every input but the step, then every result in memory of its own.
pub fn arguments(body: &Graph) -> Vec<ValueId> {
    let inputs = (0..body.inputs.len() as u32).map(ValueId).filter(|v| *body.ty(*v) != Type::Step);
    let results = body.results.iter().map(|(_, v)| *v).filter(|v| !in_place(body, *v));
    inputs.chain(results).collect()
}

/// Loads the address of every value that has a buffer; `memory[v]` is value `v`'s.
pub fn memory(e: &mut Emitter, k: KernelArgs, body: &Graph) -> Vec<Option<Val>> {
    let mut memory = vec![None; body.len()];
    for (index, value) in arguments(body).into_iter().enumerate() {
        memory[value.0 as usize] = Some(e.arg(k, index));
    }
    memory
}

/// A field of [`StepArgs`].
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // named as there
pub enum StepField {
    T,
    S,
    R,
    Tiles,
    TableStride,
    Tokens,
    Positions,
    Rows,
    Slots,
    Tile,
    Tables,
    Sequences,
    Scratch,
    ScratchBytes,
    Candidates,
}

/// Loads a field of the step: counts are `i64`, arrays are pointers.
pub fn step_field(e: &mut Emitter, k: KernelArgs, field: StepField) -> Val {
    let (offset, ty) = match field {
        StepField::T => (offset_of!(StepArgs, t), I64),
        StepField::S => (offset_of!(StepArgs, s), I64),
        StepField::R => (offset_of!(StepArgs, r), I64),
        StepField::Tiles => (offset_of!(StepArgs, tiles), I64),
        StepField::TableStride => (offset_of!(StepArgs, table_stride), I64),
        StepField::Tokens => (offset_of!(StepArgs, tokens), PTR),
        StepField::Positions => (offset_of!(StepArgs, positions), PTR),
        StepField::Rows => (offset_of!(StepArgs, rows), PTR),
        StepField::Slots => (offset_of!(StepArgs, slots), PTR),
        StepField::Tile => (offset_of!(StepArgs, tile), PTR),
        StepField::Tables => (offset_of!(StepArgs, tables), PTR),
        StepField::Sequences => (offset_of!(StepArgs, sequences), PTR),
        StepField::Scratch => (offset_of!(StepArgs, scratch), PTR),
        StepField::ScratchBytes => (offset_of!(StepArgs, scratch_bytes), I64),
        StepField::Candidates => (offset_of!(StepArgs, candidates), I64),
    };
    e.step_field(k, offset, ty)
}

/// The slots of the step's tokens in a cache.
///
/// # Errors
/// Where the program has no such cache group.
pub fn slots(e: &mut Emitter, k: KernelArgs, cache: &Type) -> Result<Val> {
    let (group, slots) = (group(e, cache)?, step_field(e, k, StepField::Slots));
    if group == 0 {
        return Ok(slots);
    }
    let (group, t) = (e.i64(group as i64), step_field(e, k, StepField::T));
    let before = e.mul(group, t);
    Ok(e.row(slots, before, 4))
}

/// The block tables of a cache, `stride` entries for each sequence.
///
/// # Errors
/// Where the program has no such cache group.
pub fn tables(e: &mut Emitter, k: KernelArgs, cache: &Type, stride: Val) -> Result<Val> {
    let (group, tables) = (group(e, cache)?, step_field(e, k, StepField::Tables));
    if group == 0 {
        return Ok(tables);
    }
    let (group, s) = (e.i64(group as i64), step_field(e, k, StepField::S));
    let before = e.mul(group, s);
    let before = e.mul(before, stride);
    Ok(e.row(tables, before, 4))
}

fn group(e: &Emitter, cache: &Type) -> Result<usize> {
    match CacheGroup::index_of(&e.groups, cache) {
        Some(group) => Ok(group),
        None => bail!(Internal, "the program has no cache group for {cache}"),
    }
}

/// How many rows an activation of this type has in this step.
///
/// # Errors
/// Where the type has no symbolic leading dim.
pub fn count_of(e: &mut Emitter, k: KernelArgs, ty: &Type) -> Result<Val> {
    match ty.rows() {
        Some(Dim::T) => Ok(step_field(e, k, StepField::T)),
        Some(Dim::S) => Ok(step_field(e, k, StepField::S)),
        Some(Dim::R) => Ok(step_field(e, k, StepField::R)),
        _ => Err(Error::new(Kind::Internal, format!("{ty} has no rows"))),
    }
}
