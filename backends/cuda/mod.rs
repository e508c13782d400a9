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

use crate::emit::{Emitter, KernelArgs, Val};
use mansard_ir::kernel::KernelKind;
use mansard_ir::plan::Kernel;
use mansard_ir::{Place, Result, ValueId, bail};

/// Threads of a block.
pub const THREADS: usize = 256;

/// Most bytes of shared memory that a block may have on every GPU that code is generated for.
pub const SHARED_LIMIT: usize = 163 << 10;

/// What stands above the kernels of a module: shared memory, whose size is the launch's.
pub const PREAMBLE: &str =
    "llvm.mlir.global external @shared() {addr_space = 3 : i32, alignment = 128 : i64} : !llvm.array<0 x i8>\n";

/// One kernel as MLIR, and what a launch of it needs.
#[derive(Clone, Debug)]
pub struct Source {
    /// The function.
    pub text: String,
    /// Bytes of shared memory of a block.
    pub shared_bytes: usize,
}

/// Emits a kernel as one MLIR function named after it.
///
/// # Errors
/// Where the body is of no kind, holds a shape or op that has no code, or needs more shared memory than there is.
pub fn emit(kernel: &Kernel) -> Result<Source> {
    let place = || format!("kernel `{}`", kernel.name);
    let kind = kernel.kind().at(place)?;
    let arguments = crate::cpu::arguments(&kernel.body);
    let (mut e, k, pointers) = Emitter::device(kernel, arguments.len(), THREADS);
    let mut memory = vec![None; kernel.body.len()];
    for (value, pointer) in arguments.into_iter().zip(pointers) {
        memory[value.0 as usize] = Some(pointer);
    }
    let d = Device { kernel, k, memory };
    match kind {
        KernelKind::Contract => contract::emit(&mut e, d),
        KernelKind::Experts => contract::emit_experts(&mut e, d),
        KernelKind::Attend => attend::emit(&mut e, d),
        KernelKind::Pool => pool::emit(&mut e, d),
        KernelKind::Rows => rows::emit(&mut e, d),
        KernelKind::Estimate => head::estimate(&mut e, d),
        KernelKind::Rescore => head::rescore(&mut e, d),
    }
    .at(place)?;
    let shared_bytes = e.shared_bytes();
    if shared_bytes > SHARED_LIMIT {
        bail!(
            Unsupported,
            "kernel `{}` needs {shared_bytes} bytes of shared memory, {SHARED_LIMIT} are the limit",
            kernel.name
        );
    }
    Ok(Source { text: e.finish(), shared_bytes })
}

/// A kernel under construction.
struct Device<'a> {
    kernel: &'a Kernel,
    k: KernelArgs,
    /// Where each value's buffer begins.
    memory: Vec<Option<Val>>,
}

impl Device<'_> {
    fn pointer(&self, value: ValueId) -> Result<Val> {
        match self.memory.get(value.0 as usize) {
            Some(Some(pointer)) => Ok(*pointer),
            _ => bail!(Internal, "{value} is not in memory"),
        }
    }
}
