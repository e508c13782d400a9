//! Plan -> machine code and packed weights -> artifact.
//!
//! ```text
//!  kernel --cpu--> MLIR text --mlir--> LLVM IR --llvm--> object --link--> one image    \
//!  weight table entry --pack--> strips in the order that kernels read                   > artifact::write
//! ```
//!
//! Invariant: the same plan, target and weights give the same bytes, whatever the number of threads; kernels are compiled
//! in modules whose make-up is fixed, and modules are linked in order.

pub mod artifact;
pub mod cpu;
pub mod cuda;
pub mod emit;
#[cfg(test)]
mod harness;
pub mod link;
pub mod llvm;
pub mod machine;
pub mod math;
pub mod mlir;
pub mod pack;
pub mod target;

pub use link::Image;
pub use target::{target, targets};

use inkwell::targets::FileType;
use llvm::CodeGenerator;
use mansard_ir::plan::{Kernel, Plan};
use mansard_ir::{Result, Target, Tuning, bail};
use mlir::Mlir;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

/// Kernels that are compiled together: fewer modules save time, more of them share it out better.
const KERNELS_PER_MODULE: usize = 4;

/// How far [`emit`] goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Layer {
    Mlir,
    Llvm,
    Asm,
    Object,
}

/// Compiles every kernel of a plan, with the tiles that `tuning` chooses; the image's entries are in the plan's order. `progress` hears how many kernels of how
/// many are done.
///
/// # Errors
/// Where a kernel has no code for this target; the place is the kernel.
pub fn compile(
    plan: &Plan,
    target: &Target,
    tuning: &Tuning,
    threads: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Image> {
    compile_kernels(&plan.kernels, target, tuning, threads, progress)
}

/// [`compile`] of kernels that are in no plan.
///
/// # Errors
/// As [`compile`].
pub fn compile_kernels(
    kernels: &[Kernel],
    target: &Target,
    tuning: &Tuning,
    threads: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Image> {
    let modules: Vec<&[Kernel]> = kernels.chunks(KERNELS_PER_MODULE).collect();
    let mut objects: Vec<Result<Vec<u8>>> = vec![];
    objects.resize_with(modules.len(), || Ok(vec![]));
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, modules.len().max(1)) {
            let (sender, modules, next, failed) = (sender.clone(), &modules, &next, &failed);
            scope.spawn(move || {
                let mut compiler = None;
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(kernels) = modules.get(index).filter(|_| !failed.load(Ordering::Relaxed)) else { break };
                    let object = object(&mut compiler, kernels, target, tuning);
                    failed.fetch_or(object.is_err(), Ordering::Relaxed);
                    if sender.send((index, object)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        let mut done = 0;
        progress(done, kernels.len());
        for (index, object) in receiver {
            objects[index] = object;
            done += modules[index].len();
            progress(done, kernels.len());
        }
    });
    let mut image = link::link(&objects.into_iter().collect::<Result<Vec<_>>>()?)?;
    image.entries.sort_by_key(|(name, _)| kernels.iter().position(|k| k.name == *name));
    if !image.entries.iter().map(|(name, _)| name).eq(kernels.iter().map(|k| &k.name)) {
        bail!(Internal, "the image does not hold each kernel of the plan once");
    }
    image.tiles = kernels.iter().map(|kernel| cpu::tiles(kernel, target, tuning)).collect::<Result<_>>()?;
    Ok(image)
}

/// Object code of some kernels; a worker makes its compiler with its first module.
fn object(
    compiler: &mut Option<(Mlir, CodeGenerator)>,
    kernels: &[Kernel],
    target: &Target,
    tuning: &Tuning,
) -> Result<Vec<u8>> {
    let compiler = match compiler {
        Some(compiler) => compiler,
        None => compiler.insert((Mlir::new()?, CodeGenerator::new(target)?)),
    };
    object_of_text(compiler, &kernels[0].name, &text(kernels, target, tuning)?)
}

fn object_of_text((mlir, generator): &(Mlir, CodeGenerator), name: &str, text: &str) -> Result<Vec<u8>> {
    let context = inkwell::context::Context::create();
    let module = mlir.lower_text(name, text, &context)?;
    generator.optimize(&module)?;
    generator.emit(&module, FileType::Object)
}

/// The image of functions in text form; `name` is only for errors.
fn assemble(name: &str, text: &str, target: &Target) -> Result<Image> {
    let object = object_of_text(&(Mlir::new()?, CodeGenerator::new(target)?), name, text)?;
    link::link(&[object])
}

fn text(kernels: &[Kernel], target: &Target, tuning: &Tuning) -> Result<String> {
    kernels.iter().map(|kernel| cpu::emit(kernel, target, tuning)).collect()
}

/// All kernels of a plan in one module, as text or as an object file, for people to read.
///
/// # Errors
/// As [`compile`].
pub fn emit(plan: &Plan, target: &Target, tuning: &Tuning, layer: Layer) -> Result<Vec<u8>> {
    let text = text(&plan.kernels, target, tuning)?;
    if layer == Layer::Mlir {
        return Ok(text.into_bytes());
    }
    let context = inkwell::context::Context::create();
    let module = Mlir::new()?.lower_text("model", &text, &context)?;
    let generator = CodeGenerator::new(target)?;
    generator.optimize(&module)?;
    match layer {
        Layer::Llvm => Ok(module.print_to_string().to_string().into_bytes()),
        Layer::Asm => generator.emit(&module, FileType::Assembly),
        _ => generator.emit(&module, FileType::Object),
    }
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
