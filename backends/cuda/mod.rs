//! Kernels for GPUs: each kind of kernel in the plan's table has one emitter, as on a CPU, and reads the same packed weights.
//!
//! ```text
//! kernel --emit--> MLIR (llvm.func, nvvm) --mlir--> LLVM IR --ptx--> PTX of sm_80 or sm_90a
//! ```
//!
//! Every kernel is launched with a grid of any size: blocks share its work as workers of a CPU do, and a block's threads share
//! what falls to it. Threads of a block meet at barriers; blocks never wait for one another.

mod attend;
mod contract;
#[cfg(test)]
pub(crate) mod emulator;
mod group;
mod head;
mod pool;
pub mod ptx;
mod rows;
pub mod synthetic;
mod weights;

use crate::emit::{Emitter, KernelArgs, MAP_BYTES, MAPS, Val};
use mansard_ir::kernel::KernelKind;
use mansard_ir::plan::Kernel;
use mansard_ir::{Place, Result, ValueId, bail};

/// Threads of a block.
pub const THREADS: usize = 256;

/// Most bytes of shared memory that a block may have on every GPU that code is generated for.
pub const SHARED_LIMIT: usize = 163 << 10;

/// Bytes of a ring of weights, at most: it is the first to give way where shared memory is scarce.
const RINGS: [usize; 3] = [64 << 10, 32 << 10, 0];

/// What stands above the kernels of a module: shared memory, whose size is the launch's, and room for what blocks of sm_90a
/// describe to the copy engine.
pub const PREAMBLE: &str =
    "llvm.mlir.global external @shared() {addr_space = 3 : i32, alignment = 1024 : i64} : !llvm.array<0 x i8>
llvm.mlir.global internal @maps() {addr_space = 1 : i32, alignment = 128 : i64} : !llvm.array<65536 x i8>\n";

const _: () = assert!(MAPS * MAP_BYTES == 65536, "the preamble has room for all descriptions");

/// A chip that kernels are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    /// A100 and later.
    Sm80,
    /// H100 and H200.
    Sm90a,
}

impl Chip {
    /// Every chip.
    pub const ALL: [Chip; 2] = [Chip::Sm80, Chip::Sm90a];

    /// As compilers call it.
    pub const fn name(self) -> &'static str {
        match self {
            Chip::Sm80 => "sm_80",
            Chip::Sm90a => "sm_90a",
        }
    }

    /// It has a copy engine, and products of warpgroups.
    const fn has_warpgroups(self) -> bool {
        matches!(self, Chip::Sm90a)
    }

    /// A launch may begin before the one before it is done.
    fn overlaps_launches(self) -> bool {
        self == Chip::Sm90a
    }
}

/// One kernel as MLIR, and what a launch of it needs.
#[derive(Clone, Debug)]
pub struct Source {
    /// The function.
    pub text: String,
    /// Bytes of shared memory of a block.
    pub shared_bytes: usize,
}

/// Emits a kernel for a chip, as one MLIR function named after it.
///
/// # Errors
/// Where the body is of no kind, holds a shape or op that has no code, or needs more shared memory than there is.
pub fn emit(kernel: &Kernel, chip: Chip) -> Result<Source> {
    let mut least = 0;
    for ring_bytes in RINGS {
        let source = emit_with(kernel, chip, ring_bytes)?;
        if source.shared_bytes <= SHARED_LIMIT {
            return Ok(source);
        }
        least = source.shared_bytes;
    }
    bail!(Unsupported, "kernel `{}` needs {least} bytes of shared memory, {SHARED_LIMIT} are the limit", kernel.name);
}

fn emit_with(kernel: &Kernel, chip: Chip, ring_bytes: usize) -> Result<Source> {
    let place = || format!("kernel `{}`", kernel.name);
    let kind = kernel.kind().at(place)?;
    let arguments = crate::cpu::arguments(&kernel.body);
    let (mut e, k, pointers) = Emitter::device(kernel, arguments.len(), (THREADS, chip.overlaps_launches()));
    let mut memory = vec![None; kernel.body.len()];
    for (value, pointer) in arguments.into_iter().zip(pointers) {
        memory[value.0 as usize] = Some(pointer);
    }
    let d = Device { kernel, k, memory, ring_bytes, chip };
    if kind != KernelKind::Contract {
        e.await_launches();
    }
    match kind {
        KernelKind::Contract => contract::emit(&mut e, d),
        KernelKind::Experts => contract::experts::emit(&mut e, d),
        KernelKind::Attend => attend::emit(&mut e, d),
        KernelKind::Pool => pool::emit(&mut e, d),
        KernelKind::Rows => rows::emit(&mut e, d),
        KernelKind::Estimate => head::estimate(&mut e, d),
        KernelKind::Rescore => head::rescore(&mut e, d),
    }
    .at(place)?;
    let shared_bytes = e.shared_bytes();
    Ok(Source { text: e.finish(), shared_bytes })
}

/// A kernel under construction.
struct Device<'a> {
    kernel: &'a Kernel,
    k: KernelArgs,
    /// Where each value's buffer begins.
    memory: Vec<Option<Val>>,
    /// Room for a ring of weights.
    ring_bytes: usize,
    chip: Chip,
}

impl Device<'_> {
    fn pointer(&self, value: ValueId) -> Result<Val> {
        match self.memory.get(value.0 as usize) {
            Some(Some(pointer)) => Ok(*pointer),
            _ => bail!(Internal, "{value} is not in memory"),
        }
    }
}
