//! LLVM IR -> machine code for a [`Target`].
//!
//! ```text
//!  module --attributes, PIPELINE--> optimized module --> object | assembly | text
//! ```
//!
//! Invariants: code uses exactly the target's features over plain x86-64 or aarch64 (its CPU's name only tunes), and calls nothing
//! outside its module. What LLVM would abort the process for - an intrinsic that the features do not cover - is an error
//! here, before code is generated.

use inkwell::OptimizationLevel;
use inkwell::attributes::{Attribute, AttributeLoc};
use inkwell::context::ContextRef;
use inkwell::module::Module;
use inkwell::passes::PassBuilderOptions;
use inkwell::targets::{CodeModel, FileType, InitializationConfig, RelocMode, TargetMachine, TargetTriple};
use mansard_ir::{Error, Kind, Place, Result, Target, bail};

/// The passes over LLVM IR. Kernels arrive vectorized and mostly unrolled, so this cleans up addresses, hoists what does not
/// change in a loop, unrolls what is short and combines instructions. Measured on contraction kernels, the code is as fast
/// as that of `default<O3>`, for a quarter of its time.
pub const PIPELINE: &str = "function(sroa,early-cse<memssa>,simplifycfg,instcombine<no-verify-fixpoint>,\
                            loop-mssa(loop-rotate,licm),early-cse<memssa>,loop(indvars),loop-unroll<O2>,\
                            instcombine<no-verify-fixpoint>,simplifycfg)";

/// Intrinsics by prefix and the features of which they need one; the first that fits counts.
const INTRINSICS: [(&str, &[&str]); 19] = [
    ("llvm.x86.avx512.vpdpbusd.256", &["avx512vnni", "avxvnni"]),
    ("llvm.x86.avx512.vpdp", &["avx512vnni"]),
    ("llvm.x86.tdpbssd", &["amx-int8"]),
    ("llvm.x86.tdpbf16ps", &["amx-bf16"]),
    ("llvm.x86.ldtilecfg", &["amx-tile"]),
    ("llvm.x86.tile", &["amx-tile"]),
    ("llvm.x86.avx512bf16.", &["avx512bf16"]),
    ("llvm.x86.avx512.pshuf.b.512", &["avx512bw"]),
    ("llvm.aarch64.neon.tbl1.", &["neon"]),
    ("llvm.x86.avx512.pmadd", &["avx512bw"]),
    ("llvm.x86.avx512.", &["avx512f"]),
    ("llvm.x86.avx2.", &["avx2"]),
    ("llvm.x86.avx.", &["avx"]),
    ("llvm.x86.fma.", &["fma"]),
    ("llvm.x86.vcvt", &["f16c"]),
    ("llvm.x86.sse.", &["avx"]),
    ("llvm.x86.sse2.", &["avx"]),
    ("llvm.aarch64.neon.usdot.", &["i8mm"]),
    ("llvm.aarch64.neon.sdot.", &["dotprod"]),
];

/// What LLVM calls an architecture, and its least CPU.
const ARCHITECTURES: [(&str, &str, &str); 2] =
    [("x86_64", "x86_64-unknown-linux-gnu", "x86-64"), ("aarch64", "aarch64-unknown-linux-gnu", "generic")];

/// Generates code for one target.
pub struct CodeGenerator {
    machine: TargetMachine,
    /// The CPU that every one of the architecture can do.
    least_cpu: &'static str,
    target: Target,
}

/// Version of the LLVM in use: major, minor, patch.
pub fn version() -> (u32, u32, u32) {
    inkwell::support::get_llvm_version()
}

impl CodeGenerator {
    /// A generator for `target`.
    ///
    /// # Errors
    /// Where this LLVM was built without the target.
    pub fn new(target: &Target) -> Result<CodeGenerator> {
        let Some((_, triple, least_cpu)) = ARCHITECTURES.iter().find(|(arch, ..)| *arch == target.arch) else {
            bail!(Unsupported, "no code is generated for {}", target.arch);
        };
        inkwell::targets::Target::initialize_x86(&InitializationConfig::default());
        inkwell::targets::Target::initialize_aarch64(&InitializationConfig::default());
        let triple = TargetTriple::create(triple);
        let llvm = inkwell::targets::Target::from_triple(&triple)
            .map_err(|e| Error::new(Kind::Internal, format!("LLVM knows no {}: {e}", target.arch)))?;
        let machine = llvm.create_target_machine(
            &triple,
            least_cpu,
            &features(target),
            OptimizationLevel::Aggressive,
            RelocMode::PIC,
            CodeModel::Small,
        );
        match machine {
            Some(machine) => Ok(CodeGenerator { machine, least_cpu, target: target.clone() }),
            None => bail!(Internal, "LLVM has no machine for {}", target.name),
        }
    }

    /// Prepares and optimizes a module.
    ///
    /// # Errors
    /// Where it uses an intrinsic that the target lacks, or LLVM refuses it.
    pub fn optimize(&self, module: &Module<'_>) -> Result<()> {
        let place = || format!("module `{}`", module.get_name().to_string_lossy());
        module.set_triple(&self.machine.get_triple());
        module.set_data_layout(&self.machine.get_target_data().get_data_layout());
        self.check_intrinsics(module).at(place)?;
        self.set_attributes(module);
        let options = PassBuilderOptions::create();
        let said = |e: inkwell::support::LLVMString| Error::new(Kind::Internal, format!("LLVM: {e}")).at(place());
        module.run_passes(PIPELINE, &self.machine, options).map_err(said)?;
        module.verify().map_err(said)
    }

    /// Machine code or assembly of an optimized module.
    ///
    /// # Errors
    /// Where LLVM refuses it.
    pub fn emit(&self, module: &Module<'_>, kind: FileType) -> Result<Vec<u8>> {
        let buffer = self.machine.write_to_memory_buffer(module, kind);
        let buffer = buffer.map_err(|e| Error::new(Kind::Internal, format!("LLVM: {e}")))?;
        Ok(buffer.as_slice().to_vec())
    }

    fn check_intrinsics(&self, module: &Module<'_>) -> Result<()> {
        for function in module.get_functions() {
            let name = function.get_name().to_string_lossy().into_owned();
            if !["llvm.x86.", "llvm.aarch64."].iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            match INTRINSICS.iter().find(|(prefix, _)| name.starts_with(prefix)) {
                Some((_, any)) if any.iter().any(|f| self.target.has(f)) => {}
                Some((_, any)) => {
                    bail!(Internal, "`{name}` needs {}, which {} lacks", any.join(" or "), self.target.name)
                }
                None => bail!(Internal, "no feature is known to cover `{name}`"),
            }
        }
        Ok(())
    }

    fn set_attributes(&self, module: &Module<'_>) {
        let context: ContextRef<'_> = module.get_context();
        let width = (self.target.vector_bytes * 8).to_string();
        let features = features(&self.target);
        let texts = [
            ("target-cpu", self.least_cpu),
            ("tune-cpu", &self.target.cpu),
            ("target-features", &features),
            ("prefer-vector-width", &width),
            // Else loops that clear memory become calls of memset.
            ("no-builtins", ""),
        ];
        let nounwind = context.create_enum_attribute(Attribute::get_named_enum_kind_id("nounwind"), 0);
        for function in module.get_functions().filter(|f| f.count_basic_blocks() > 0) {
            for (key, value) in texts {
                function.add_attribute(AttributeLoc::Function, context.create_string_attribute(key, value));
            }
            function.add_attribute(AttributeLoc::Function, nounwind);
        }
    }
}

/// As LLVM reads them: `+avx,+avx2`.
fn features(target: &Target) -> String {
    let features: Vec<String> = target.features.iter().map(|f| format!("+{f}")).collect();
    features.join(",")
}

#[cfg(test)]
mod tests {
    use crate::mlir::Mlir;
    use crate::{link, target};
    use inkwell::targets::FileType;
    use mansard_ir::Result;

    fn object(text: &str, target: &str) -> Result<Vec<u8>> {
        let llvm = inkwell::context::Context::create();
        let module = Mlir::new()?.lower_text("test", text, &llvm)?;
        let generator = super::CodeGenerator::new(&target::target(target)?)?;
        generator.optimize(&module)?;
        generator.emit(&module, FileType::Object)
    }

    const CLEAR: &str = "func.func @clear(%0: !llvm.ptr, %1: i64) {
  %2 = arith.constant 0 : i64
  %3 = arith.constant 4 : i64
  %4 = arith.constant 0.0 : f32
  scf.for %5 = %2 to %1 step %3 : i64 {
    %6 = llvm.getelementptr inbounds %0[%5] : (!llvm.ptr, i64) -> !llvm.ptr, i8
    llvm.store %4, %6 {alignment = 4 : i64} : f32, !llvm.ptr
  }
  return
}
";

    #[test]
    fn objects_link_to_an_image() {
        let table = "func.func @table(%0: !llvm.ptr) {
  %1 = arith.constant dense<[1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5]> : vector<8xf32>
  llvm.store %1, %0 {alignment = 4 : i64} : vector<8xf32>, !llvm.ptr
  return
}";
        let objects = [object(CLEAR, "x86-64-v3").unwrap(), object(table, "x86-64-v3").unwrap()];
        let image = link::link(&objects).unwrap();
        let names: Vec<&str> = image.entries.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["clear", "table"]);
        assert_eq!(image.entries[0].1, 0);
        assert!(image.bytes.len().is_multiple_of(64) && image.entries.iter().all(|(_, at)| at % 16 == 0));
        let constants: Vec<u8> = [1.5f32, 2.5, 3.5].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert!(image.bytes.windows(12).any(|w| w == constants), "the table's constants are in the image");
        let twice = link::link(&[objects[0].clone(), objects[0].clone()]).unwrap_err().to_string();
        assert!(twice.contains("`clear` is defined twice"), "{twice}");
    }

    #[test]
    fn what_leaves_the_image_is_named() {
        let calls = "func.func private @expf(f32) -> f32
func.func @f(%0: f32) -> f32 {\n %1 = func.call @expf(%0) : (f32) -> f32\n return %1 : f32\n}";
        let error = link::link(&[object(calls, "x86-64-v4").unwrap()]).unwrap_err().to_string();
        assert!(error.contains("`expf`, which is not in the image"), "{error}");
        assert!(link::link(&[b"not an object".to_vec()]).is_err());
    }

    #[test]
    fn damaged_objects_do_not_panic() {
        let object = object(CLEAR, "x86-64-v4").unwrap();
        for at in 0..object.len() {
            let mut damaged = object.clone();
            damaged[at] ^= 0xff;
            let _ = link::link(&[damaged, object[..at].to_vec()]);
            let _ = link::link(&[object[..at].to_vec()]);
        }
    }

    #[test]
    fn intrinsics_beyond_the_target_are_refused() {
        let dot = "func.func @f(%0: vector<16xi32>, %1: vector<64xi8>) -> vector<16xi32> {
  %2 = llvm.call_intrinsic \"llvm.x86.avx512.vpdpbusd.512\"(%0, %1, %1) : (vector<16xi32>, vector<64xi8>, vector<64xi8>) -> vector<16xi32>
  return %2 : vector<16xi32>
}";
        assert!(object(dot, "x86-64-v4").is_ok());
        let error = object(dot, "x86-64-v3").unwrap_err().to_string();
        assert!(error.contains("needs avx512vnni, which x86-64-v3 lacks"), "{error}");
    }
}
