//! LLVM IR of GPU kernels -> PTX.
//!
//! ```text
//! kernels --emit, mlir--> one module --default<O3>, NVPTX--> text of `.visible .entry` functions for one chip
//! ```
//!
//! Invariant: what LLVM would abort the process for - an intrinsic it has no instruction for, or a call - is an error here.

use super::{Chip, PREAMBLE, Source, emit};
use crate::Layer;
use crate::machine::MachineTable;
use crate::mlir::Mlir;
use inkwell::OptimizationLevel;
use inkwell::module::Module;
use inkwell::passes::PassBuilderOptions;
use inkwell::targets::{CodeModel, FileType, InitializationConfig, RelocMode, Target, TargetMachine, TargetTriple};
use mansard_ir::plan::Kernel;
use mansard_ir::{Error, Kind, Place, Result, bail};

/// Chips that PTX is made for: A100 and later; H100 and H200.
pub const CHIPS: [&str; Chip::ALL.len()] = [Chip::ALL[0].name(), Chip::ALL[1].name()];

/// Their stated figures.
const MACHINES: [&str; CHIPS.len()] =
    [include_str!("../../machines/sm_80.toml"), include_str!("../../machines/sm_90a.toml")];

/// The PTX version: that of CUDA 13.0, whose drivers begin with 580.
pub const VERSION: &str = "9.0";

/// As LLVM names it.
const FEATURE: &str = "+ptx90";

/// Intrinsics that the NVPTX backend has instructions for, by prefix.
const INTRINSICS: [&str; 29] = [
    "llvm.nvvm.barrier.cta.sync.aligned.all",
    "llvm.nvvm.bar.warp.sync",
    "llvm.nvvm.read.ptx.sreg.",
    "llvm.nvvm.shfl.sync.bfly.",
    "llvm.nvvm.idp4a.",
    "llvm.nvvm.mma.m16n8k",
    "llvm.nvvm.cp.async.",
    "llvm.nvvm.griddepcontrol.",
    "llvm.nvvm.mbarrier.",
    "llvm.nvvm.fence.mbarrier_init.",
    "llvm.nvvm.fence.proxy.",
    "llvm.nvvm.tensormap.replace.",
    "llvm.nvvm.wgmma.",
    "llvm.nvvm.ff2bf16x2.rn",
    "llvm.nvvm.ff2f16x2.rn",
    "llvm.nvvm.ldmatrix.",
    "llvm.ctpop.",
    "llvm.fabs.",
    "llvm.fma.",
    "llvm.fmuladd.",
    "llvm.roundeven.",
    "llvm.sqrt.",
    "llvm.smax.",
    "llvm.smin.",
    "llvm.umax.",
    "llvm.umin.",
    "llvm.fshl.",
    "llvm.assume",
    "llvm.lifetime.",
];

/// A chip as the passes see it, where kernels are for GPUs alone.
///
/// # Errors
/// Where it is none of [`CHIPS`].
pub fn target(chip: &str) -> Result<mansard_ir::Target> {
    let machine = MachineTable::parse(MACHINES[known(chip)? as usize]).at(|| format!("machines/{chip}.toml"))?.whole();
    let [name, arch, cpu] = [chip; 3].map(String::from);
    Ok(mansard_ir::Target { name, arch, cpu, features: vec![], registers: 255, vector_bytes: 4, machine })
}

fn known(chip: &str) -> Result<Chip> {
    match Chip::ALL.into_iter().find(|known| known.name() == chip) {
        Some(known) => Ok(known),
        None => bail!(Unsupported, "no PTX is made for `{chip}`, expected one of {}", CHIPS.join(", ")),
    }
}

/// Kernels of one chip.
#[derive(Clone, Debug, PartialEq)]
pub struct Ptx {
    /// What a driver or `ptxas` takes.
    pub text: String,
    /// Bytes of shared memory of each kernel's blocks, in order.
    pub shared_bytes: Vec<usize>,
    /// The same as machine code, and the version of the assembler, where one was at hand.
    pub cubin: Option<(Vec<u8>, String)>,
}

/// The text of some kernels as one module.
fn module_text(kernels: &[Kernel], chip: &str) -> Result<(String, Vec<usize>)> {
    let chip = known(chip)?;
    let sources = kernels.iter().map(|kernel| emit(kernel, chip)).collect::<Result<Vec<Source>>>()?;
    let text = std::iter::once(PREAMBLE).chain(sources.iter().map(|s| s.text.as_str())).collect();
    Ok((text, sources.iter().map(|s| s.shared_bytes).collect()))
}

/// PTX of some kernels for a chip.
///
/// # Errors
/// Where the chip is none of [`CHIPS`], or a kernel has no code.
pub fn compile(kernels: &[Kernel], chip: &str) -> Result<Ptx> {
    let (text, shared_bytes) = module_text(kernels, chip)?;
    let text = String::from_utf8_lossy(&lower(&text, chip, Layer::Asm)?).trim_end_matches('\0').to_owned();
    Ok(Ptx { text, shared_bytes, cubin: None })
}

/// Some kernels for people to read; [`Layer::Asm`] is PTX.
///
/// # Errors
/// As [`compile`]; there is no object code.
pub fn show(kernels: &[Kernel], chip: &str, layer: Layer) -> Result<Vec<u8>> {
    match layer {
        Layer::Mlir => Ok(module_text(kernels, chip)?.0.into_bytes()),
        Layer::Llvm => lower(&module_text(kernels, chip)?.0, chip, layer),
        Layer::Asm => Ok(compile(kernels, chip)?.text.into_bytes()),
        Layer::Object => bail!(Unsupported, "object code for {chip} is NVIDIA's assembler's to make: emit ptx or sass"),
    }
}

pub(super) fn lower(text: &str, chip: &str, layer: Layer) -> Result<Vec<u8>> {
    let context = inkwell::context::Context::create();
    let module = Mlir::new()?.lower_text("kernels", text, &context)?;
    let machine = optimize(&module, chip)?;
    if layer == Layer::Llvm {
        return Ok(module.print_to_string().to_string().into_bytes());
    }
    let said = |e: inkwell::support::LLVMString| Error::new(Kind::Internal, format!("LLVM: {e}"));
    let buffer = machine.write_to_memory_buffer(&module, FileType::Assembly).map_err(said)?;
    Ok(buffer.as_slice().to_vec())
}

/// Optimizes a module for a chip.
///
/// # Errors
/// As [`compile`].
pub fn optimize(module: &Module<'_>, chip: &str) -> Result<TargetMachine> {
    known(chip)?;
    Target::initialize_nvptx(&InitializationConfig::default());
    let triple = TargetTriple::create("nvptx64-nvidia-cuda");
    let said = |e: inkwell::support::LLVMString| Error::new(Kind::Internal, format!("LLVM: {e}"));
    let nvptx = Target::from_triple(&triple).map_err(said)?;
    let (level, reloc, code) = (OptimizationLevel::Aggressive, RelocMode::Default, CodeModel::Default);
    let Some(machine) = nvptx.create_target_machine(&triple, chip, FEATURE, level, reloc, code) else {
        bail!(Internal, "LLVM has no machine for {chip}");
    };
    module.set_triple(&triple);
    module.set_data_layout(&machine.get_target_data().get_data_layout());
    module.run_passes("default<O3>", &machine, PassBuilderOptions::create()).map_err(said)?;
    module.verify().map_err(said)?;
    check_calls(module).at(|| format!("module for {chip}"))?;
    Ok(machine)
}

fn check_calls(module: &Module<'_>) -> Result<()> {
    for function in module.get_functions().filter(|f| f.count_basic_blocks() == 0) {
        let name = function.get_name().to_string_lossy().into_owned();
        if !INTRINSICS.iter().any(|prefix| name.starts_with(prefix)) {
            bail!(Internal, "there is no PTX instruction for `{name}`");
        }
    }
    Ok(())
}
