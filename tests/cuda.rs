//! PTX of every kernel that the case files and the tiny checkpoints come to, through NVIDIA's assembler: no GPU is needed.
//!
//! `ptxas` must take every module without a warning and spill nothing. The snapshot `cuda_registers.snap` holds the registers
//! and bytes of shared memory of each kernel of two checkpoints; `INSTA_UPDATE=always` accepts what comes out.
//!
//! Whether kernels compute what they should is shown elsewhere: by `backends/cuda/emulator`.

use mansard::driver::{self, CompileOptions, pass_options};
use mansard_backends::cuda::ptx::{self, CHIPS, Ptx};
use mansard_ir::plan::{CacheGroup, Kernel};
use mansard_ir::{Model, Stage, TokenRange, sample, text};
use mansard_passes::manager::{self, State};
use mansard_passes::{Event, Hooks, PIPELINE};
use mansard_tests::{all_rows, compiled, here, published, tool};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Kernels of one module.
const TOGETHER: usize = 12;

/// The kernels of a model: its planned graphs, or what the passes that its stage is before make of it.
fn kernels(model: Model, options: &CompileOptions) -> mansard_ir::Result<Vec<Kernel>> {
    let stage = model.graphs.iter().map(|g| g.stage).max().unwrap_or(Stage::Imported);
    if stage == Stage::Planned {
        let kernel = |body: mansard_ir::Graph| Kernel {
            name: body.name.clone(),
            range: body.range.unwrap_or(TokenRange { min: 1, max: 512 }),
            groups: CacheGroup::of(body.inputs.iter().map(|input| &input.ty)),
            body,
        };
        return Ok(model.graphs.into_iter().map(kernel).collect());
    }
    let left = PIPELINE.iter().filter(|name| mansard_passes::pass(name).is_ok_and(|pass| pass.from >= stage));
    let left: Vec<&str> = left.copied().collect();
    let options = pass_options(mansard_backends::target("x86-64-v3")?, options);
    let mut sink = |_: Event<'_>| {};
    let (state, _) = manager::run(&left, State::new(model), &options, &mut Hooks::new(&mut sink))?;
    Ok(state.plan.map(|plan| plan.kernels).unwrap_or_default())
}

fn of_checkpoint(name: &str) -> Vec<Kernel> {
    let mut options = CompileOptions::default();
    options.limits.context = Some(512);
    let model = driver::import(&here().join("goldens").join(name), &options).unwrap();
    kernels(model, &options).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn of_cases() -> Vec<Kernel> {
    let mut all = vec![];
    for folder in ["codegen", "fusion", "passes"] {
        let mut paths: Vec<PathBuf> =
            std::fs::read_dir(here().join("cases").join(folder)).unwrap().map(|e| e.unwrap().path()).collect();
        paths.sort();
        for path in paths.iter().filter(|p| p.extension().is_some_and(|e| e == "mir")) {
            let case = std::fs::read_to_string(path).unwrap();
            if case.lines().any(|l| l.starts_with("# error:")) {
                continue;
            }
            let mut model = text::parse("case", &case).unwrap();
            sample::fill_weights(&mut model, 5).unwrap();
            let mut options = CompileOptions::default();
            options.limits.context = Some(512);
            all.extend(kernels(model, &options).unwrap_or_else(|e| panic!("{}: {e}", path.display())));
        }
    }
    all
}

/// Each kernel once, under a name of its own.
fn distinct(kernels: Vec<Kernel>) -> Vec<Kernel> {
    let (mut seen, mut out) = (BTreeSet::new(), vec![]);
    for mut kernel in kernels {
        kernel.body.name = String::new();
        if seen.insert(format!("{:?} {}", kernel.range, text::print_graph(&kernel.body))) {
            kernel.name = format!("{}_{}", kernel.name, out.len());
            kernel.body.name.clone_from(&kernel.name);
            out.push(kernel);
        }
    }
    out
}

/// A line for each kernel: registers and bytes of shared memory. What `ptxas` warns of, or spills, fails.
fn assemble(ptxas: &Path, kernels: &[Kernel], chip: &str) -> String {
    let mut table = String::new();
    let folder = tempfile::tempdir().unwrap();
    for kernels in kernels.chunks(TOGETHER) {
        let Ptx { text, shared_bytes, .. } = ptx::compile(kernels, chip).unwrap_or_else(|e| panic!("{chip}: {e}"));
        let source = folder.path().join("kernels.ptx");
        std::fs::write(&source, &text).unwrap();
        let cubin = folder.path().join("kernels.cubin");
        let out = Command::new(ptxas).args(["-v", "-arch", chip, "-o"]).args([&cubin, &source]).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{chip}: {said}");
        // C75..: products of warpgroups that would be done one by one.
        assert!(!said.contains("warning") && !said.contains("(C75"), "{chip}: {said}");
        for (kernel, shared) in kernels.iter().zip(shared_bytes) {
            let entry = format!("Compiling entry function '{}'", kernel.name);
            let of_kernel = said.split(&entry).nth(1).unwrap_or_else(|| panic!("{chip}: no `{entry}` in {said}"));
            let of_kernel = of_kernel.split("Compiling entry function").next().unwrap_or_default();
            let kept = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
            assert!(of_kernel.contains(kept), "{chip}: `{}` uses local memory: {of_kernel}", kernel.name);
            let registers = of_kernel.split("Used ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or("?");
            let _ = writeln!(table, "{chip:8} {:48} {registers:>4} registers {shared:>7} bytes shared", kernel.name);
        }
    }
    table
}

#[test]
fn every_kernel_of_the_cases_assembles() {
    let Some(ptxas) = tool("ptxas") else { return };
    let kernels = distinct(of_cases());
    assert!(kernels.len() > 40, "{} kernels", kernels.len());
    for chip in CHIPS {
        assemble(&ptxas, &kernels, chip);
    }
}

#[test]
fn checkpoints_assemble_with_so_many_registers() {
    let Some(ptxas) = tool("ptxas") else { return };
    let mut table = String::new();
    for checkpoint in ["llama", "mixtral"] {
        let kernels = distinct(of_checkpoint(checkpoint));
        let _ = writeln!(table, "{checkpoint}");
        CHIPS.iter().for_each(|chip| table += &assemble(&ptxas, &kernels, chip));
    }
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(here());
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!("cuda_registers", table));
}

#[test]
fn other_checkpoints_assemble() {
    let Some(ptxas) = tool("ptxas") else { return };
    let kernels = distinct(["bert", "gemma3", "gpt2", "qwen3"].iter().flat_map(|name| of_checkpoint(name)).collect());
    assemble(&ptxas, &kernels, "sm_90a");
}

/// Without an assembler, too: what stands in the text.
#[test]
fn ptx_is_for_the_chip_that_was_asked_for() {
    let kernels = distinct(of_checkpoint("llama"));
    let text = |chip| ptx::compile(&kernels[..2], chip).unwrap().text;
    for chip in CHIPS {
        let text = text(chip);
        assert!(text.contains(&format!(".target {chip}")) && text.contains(".version 9.0"), "{chip}");
        assert!(text.contains(".visible .entry ") && text.contains(".reqntid 256"), "{chip}");
        assert_eq!(text, ptx::compile(&kernels[..2], chip).unwrap().text, "the same twice");
    }
    let unknown = ptx::compile(&kernels[..1], "sm_70").unwrap_err().to_string();
    assert_eq!(unknown, "no PTX is made for `sm_70`, expected one of sm_80, sm_90a");
}

/// LLVM drops the order that an atomic operation asks for, so fences stand around it; and a layer of decoding has few launches.
#[test]
fn counters_are_fenced_and_launches_few() {
    let kernels = distinct(of_checkpoint("llama"));
    let attend: Vec<Kernel> = kernels.iter().filter(|k| k.name.contains("attend")).cloned().collect();
    for chip in CHIPS {
        let text = ptx::compile(&attend, chip).unwrap().text;
        let (before, after) = text.split_once("atom.").unwrap();
        let barrier = before.rfind("bar").unwrap();
        assert!(
            before[..barrier].contains("fence.acq_rel.gpu") && after.contains("fence.acq_rel.gpu"),
            "{chip}: {text}"
        );
    }
    let of_layer = kernels.iter().filter(|k| k.name.starts_with("layer_") && k.range.min == 1);
    let names: Vec<&str> = of_layer.map(|k| k.name.as_str()).collect();
    assert!(names.len() <= 7, "{names:?}");
}

/// Weights are read 16 bytes at a time, bytes multiplied by fours, and no address space is left to find out at run time.
#[test]
fn sass_holds_the_instructions_meant() {
    let (Some(ptxas), Some(nvdisasm)) = (tool("ptxas"), tool("nvdisasm")) else { return };
    let product = |x: &str, w: &str, range: &str| {
        let text = format!(
            "graph @{x}_{w}(%x: {x}[t, 512], %w: {w}[64, 512]) stage planned when t = {range} {{ %y = matmul %x, %w return y = %y }}"
        );
        let mut kernel = kernels(text::parse("product", &text).unwrap(), &CompileOptions::default()).unwrap().remove(0);
        kernel.name = format!("{}_{}", kernel.name, kernel.range.min);
        kernel
    };
    let mut kernels = distinct(of_checkpoint("llama"));
    let few = [("a8", "q4_0", "1..8"), ("a8", "q8_0", "1..8")].map(|(x, w, range)| product(x, w, range));
    let many = [("a8", "q4_0"), ("bf16", "bf16"), ("bf16", "q4_0"), ("bf16", "q5_1")];
    let many = many.map(|(x, w)| product(x, w, "9..512"));
    let meant: fn(&Kernel, &str) -> Vec<&'static str> = |kernel, chip| match (kernel.name.as_str(), chip) {
        ("a8_q4_0_9", _) => vec!["IMMA.16832.U8.S8"],
        ("bf16_bf16_9" | "bf16_q4_0_9" | "bf16_q5_1_9", "sm_90a") => {
            vec![
                "HGMMA.64x256x16.F32.BF16",
                "HGMMA.64x128x16.F32.BF16",
                "UTMALDG.2D",
                "SYNCS.PHASECHK",
                "WARPGROUP.ARRIVE",
            ]
        }
        ("bf16_bf16_9" | "bf16_q4_0_9" | "bf16_q5_1_9", _) => {
            vec!["HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDS.64"]
        }
        ("a8_q4_0_1" | "a8_q8_0_1", _) => vec!["IDP.4A.U8.S8", "LDGSTS.E.BYPASS.128", "LDGSTS.E.64", "LDS.128"],
        _ => vec![],
    };
    kernels.extend(few.into_iter().chain(many));
    let folder = tempfile::tempdir().unwrap();
    let (source, cubin) = (folder.path().join("kernels.ptx"), folder.path().join("kernels.cubin"));
    for chip in CHIPS {
        std::fs::write(&source, ptx::compile(&kernels, chip).unwrap().text).unwrap();
        assert!(Command::new(&ptxas).args(["-arch", chip, "-o"]).args([&cubin, &source]).status().unwrap().success());
        let out = Command::new(&nvdisasm).arg("-c").arg(&cubin).output().unwrap();
        let sass = String::from_utf8_lossy(&out.stdout).into_owned();
        for kernel in &kernels {
            let of_kernel = sass.split(&format!(".text.{}:", kernel.name)).nth(1).unwrap_or_else(|| panic!("{sass}"));
            let of_kernel = of_kernel.split(".text.").next().unwrap_or_default();
            let name = format!("{chip} `{}`", kernel.name);
            let opcodes = of_kernel.lines().filter_map(|l| l.split("*/").nth(1)).flat_map(str::split_whitespace);
            let generic: Vec<&str> = opcodes.filter(|w| w.starts_with("LD.") || w.starts_with("ST.")).collect();
            assert!(generic.is_empty(), "{name}: {generic:?}");
            for op in meant(kernel, chip) {
                assert!(of_kernel.contains(op), "{name}: no {op}");
            }
            let overlaps = of_kernel.contains("ACQBULK") && of_kernel.contains("PREEXIT");
            assert_eq!(overlaps, chip == "sm_90a", "{name}: launches overlap");
            if kernel.name.contains("matmul") {
                let whole = ["LDG.E.128", "LDGSTS.E.BYPASS.128"].iter().any(|op| of_kernel.contains(op));
                assert!(whole, "{name}: weights are not read by 16 bytes");
            }
        }
    }
}

#[test]
fn the_kernels_of_real_models_assemble() {
    let Some(ptxas) = tool("ptxas") else { return };
    for name in ["smollm2.gguf", "gemma3-270m.gguf"] {
        let Some(path) = published(name) else { continue };
        let options = CompileOptions::default();
        let kernels = kernels(driver::import(&path, &options).unwrap(), &options).unwrap();
        assemble(&ptxas, &distinct(kernels), "sm_90a");
    }
}

/// With an assembler at hand, machine code lies beside PTX, and the same again gives the same.
#[test]
fn artifacts_hold_machine_code_where_asked_for() {
    let Some(ptxas) = tool("ptxas") else { return };
    let options =
        CompileOptions { chips: CHIPS.map(String::from).into(), assembler: Some(ptxas), ..CompileOptions::default() };
    let (_folder, artifact) = compiled(&here().join("goldens/llama"), &options).unwrap();
    let (_again_folder, again) = compiled(&here().join("goldens/llama"), &options).unwrap();
    for ptx in &artifact.manifest().ptx {
        let cubin = ptx.cubin.as_ref().unwrap();
        assert!(cubin.version.starts_with("13."), "{cubin:?}");
        let code = artifact.section(&cubin.section).unwrap();
        assert!(code.starts_with(b"\x7fELF") && code == again.section(&cubin.section).unwrap());
        for kernel in &artifact.manifest().program.kernels {
            let name = format!(".text.{}\0", kernel.name);
            assert!(code.windows(name.len()).any(|at| at == name.as_bytes()), "{}: no `{}`", ptx.chip, kernel.name);
        }
    }
    let wrong = CompileOptions { assembler: Some("/bin/false".into()), ..options };
    let error = compiled(&here().join("goldens/llama"), &wrong).unwrap_err();
    assert!(error.to_string().contains("/bin/false"), "{error}");
}

/// One artifact holds code for a CPU and PTX beside it; what runs on the CPU is none the wiser.
#[test]
fn artifacts_hold_ptx_beside_cpu_code() {
    let options = CompileOptions { chips: CHIPS.map(String::from).into(), ..CompileOptions::default() };
    let (_folder, artifact) = compiled(&here().join("goldens/llama"), &options).unwrap();
    let (_plain_folder, plain) = compiled(&here().join("goldens/llama"), &CompileOptions::default()).unwrap();
    let manifest = artifact.manifest();
    assert_eq!(manifest.ptx.iter().map(|ptx| ptx.chip.as_str()).collect::<Vec<_>>(), CHIPS);
    assert_eq!(manifest.provenance.options["ptx"], "sm_80,sm_90a");
    assert_eq!(manifest.program, plain.manifest().program, "the CPU's program");
    for ptx in &manifest.ptx {
        let text = std::str::from_utf8(artifact.section(&ptx.section).unwrap()).unwrap();
        assert_eq!(ptx.shared_bytes.len(), manifest.program.kernels.len());
        for kernel in &manifest.program.kernels {
            assert!(text.contains(&format!(".entry {}(", kernel.name)), "{}: no `{}`", ptx.chip, kernel.name);
        }
    }
    let logits = |artifact| all_rows(artifact, &[1, 2, 3], "logits").unwrap();
    assert_eq!(logits(&artifact), logits(&plain));
    assert!(plain.manifest().ptx.is_empty());
}
