//! `mansard doctor`: what is here, what will be used, and why.

use crate::report;
use mansard::machine::{self, MachineFile, origin};
use mansard_backends as backends;
use mansard_ir::Result;
use mansard_runtime as runtime;
use mansard_runtime::device::Facts;
use serde_json::json;

/// Say what this machine has and what will be used
#[derive(clap::Args)]
pub struct Arguments {
    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Where output cannot be written.
pub fn run(arguments: &Arguments) -> Result<()> {
    let (major, minor, patch) = backends::llvm::version();
    let llvm = format!("{major}.{minor}.{patch}");
    let logical = std::thread::available_parallelism().map_or(1, |n| n.get());
    let physical = runtime::physical_cores();
    let native = backends::target("native");
    let lacks =
        |name| backends::target(name).map_or_else(|e| Some(e.to_string()), |t| runtime::lacking(&t.arch, &t.features));
    let targets: Vec<(&str, Option<String>)> =
        backends::target::names().into_iter().map(|name| (name, lacks(name))).collect();
    let huge = huge_pages();
    let probe = machine::stored();
    let gpus = runtime::device::cuda::devices();
    if arguments.json {
        return report::print(report::json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "llvm": llvm,
            "arch": std::env::consts::ARCH,
            "cpu": native.as_ref().ok().map(|t| &t.cpu),
            "features": native.as_ref().ok().map(|t| &t.features),
            "cores": {"logical": logical, "physical": physical},
            "available_memory_bytes": runtime::available_memory(),
            "huge_pages": huge,
            "probe": probe_json(&probe),
            "gpus": gpus_json(&gpus),
            "targets": targets.iter().map(|(name, lacks)| json!({"name": name, "runs": lacks.is_none(), "lacks": lacks}))
                .collect::<Vec<_>>(),
        }))?);
    }
    let mut out = format!("mansard {}\n", env!("CARGO_PKG_VERSION"));
    out += &format!("LLVM and MLIR {llvm}: linked, used to generate machine code\n");
    match &native {
        Ok(t) => {
            out += &format!("CPU {} ({}): {}\n", t.cpu, t.arch, runtime::cpu_features().join(" "));
            out += &format!("  used by `--target native`: {}\n", t.features.join(" "));
            out += &format!("  vectors of {} bytes, {} registers\n", t.vector_bytes, t.registers);
        }
        Err(error) => out += &format!("CPU: {error}\n"),
    }
    for (name, lacks) in &targets {
        let verdict = lacks.as_ref().map_or_else(|| "runs here".into(), |l| format!("does not run here: {l}"));
        out += &format!("target {name}: {verdict}\n");
    }
    out += &format!("threads: {physical} of {logical} hardware threads, one for each physical core\n");
    if let Some(memory) = runtime::available_memory() {
        out += &format!("memory: {} available\n", report::bytes(memory));
    }
    out += &match huge.as_deref() {
        Some("never") => {
            "huge pages: switched off; weights are read through small pages, which costs decoding speed\n".into()
        }
        Some(mode) => {
            format!("huge pages: {mode}; weights are copied to them where they fit into half of that memory\n")
        }
        None => "huge pages: unknown\n".to_string(),
    };
    out += &probe_text(&probe);
    out += &gpus_text(&gpus);
    report::print(out)
}

fn probe_json(probe: &Result<Option<MachineFile>>) -> serde_json::Value {
    match probe {
        Ok(file) => json!(file.as_ref().map(|f| json!({"file": f.path.display().to_string(), "machine": f.table}))),
        Err(error) => json!({"error": error.to_string()}),
    }
}

fn probe_text(probe: &Result<Option<MachineFile>>) -> String {
    let file = match probe {
        Ok(Some(file)) => file,
        Ok(None) => {
            return "probe: none; `mansard probe` measures this machine, and `bench` then knows its peaks\n".into();
        }
        Err(error) => return format!("probe: not usable: {error}\n"),
    };
    let m = file.table.whole();
    let mut out = format!("probe: {}, {} ({})\n", file.path.display(), origin(&file.table), file.table.name);
    out += &format!("  workers: {}; {:.1} GB/s from memory; ", m.threads, m.bandwidth / 1e9);
    out += &format!("{:.0} GOP/s int8, {:.0} GFLOP/s bf16, ", m.peak_i8 / 1e9, m.peak_bf16 / 1e9);
    out + &format!("{:.0} GFLOP/s f32; {:.2} us a barrier\n", m.peak_f32 / 1e9, m.barrier * 1e6)
}

fn gpus_json(gpus: &Result<Vec<Facts>>) -> serde_json::Value {
    let json = |gpu: &Facts| {
        json!({"device": format!("cuda:{}", gpu.index), "name": gpu.name, "memory_bytes": gpu.memory,
            "compute_capability": version(gpu.capability), "cuda": version(gpu.driver),
            "multiprocessors": gpu.processors})
    };
    match gpus {
        Ok(gpus) => json!(gpus.iter().map(json).collect::<Vec<_>>()),
        Err(error) => json!({"error": error.to_string()}),
    }
}

fn gpus_text(gpus: &Result<Vec<Facts>>) -> String {
    let line = |gpu: &Facts| {
        let (capability, cuda) = (version(gpu.capability), version(gpu.driver));
        let memory = report::bytes(gpu.memory);
        format!(
            "GPU cuda:{}: {}, {memory}, {} multiprocessors, compute capability {capability}, a driver of CUDA {cuda}\n",
            gpu.index, gpu.name, gpu.processors
        )
    };
    match gpus {
        Ok(gpus) => gpus.iter().map(line).collect(),
        Err(error) => format!("GPUs: {error}\n"),
    }
}

fn version((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

/// The chosen one of `always [madvise] never`.
fn huge_pages() -> Option<String> {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_string())
}
