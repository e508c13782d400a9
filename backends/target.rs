//! Names of targets -> what code is generated for.
//!
//! ```text
//! native      the features of this machine, tuned for its CPU
//! x86-64-v3   AVX2, FMA, F16C: any x86-64 server or desktop since 2013-2015; AVX-VNNI is not assumed
//! x86-64-v4   AVX-512 with VNNI and BF16: Intel since Cooper Lake and Sapphire Rapids, AMD since Zen 4
//! ```
//!
//! Invariant: code for a target uses no instruction beyond its `features` over plain x86-64, so a runtime that checks these
//! names can run it; the CPU's name only tunes. The machine figures are priors for the cost model, not measurements.

use inkwell::targets::TargetMachine;
use mansard_ir::{Error, Kind, Machine, Result, Target, bail};

/// Features of `x86-64-v3` that matter to generated code, as LLVM names them.
const V3: [&str; 8] = ["avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "popcnt"];

/// What `x86-64-v4` adds here: the psABI's level and the integer and bf16 dot products.
const V4: [&str; 7] = ["avx512bf16", "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl", "avx512vnni"];

/// What `native` may use beside.
const EXTRA: [&str; 7] =
    ["avx512bitalg", "avx512fp16", "avx512vbmi", "avx512vbmi2", "avx512vpopcntdq", "avxvnni", "gfni"];

/// Worker threads that named targets are priced for. Fixed, so that the same inputs give the same plan on any machine.
const NAMED_THREADS: usize = 4;

/// CPUs, as LLVM names them, with two vector units of the full 512 bits: twice the rates of [`machine`].
const TWO_WIDE_UNITS: [&str; 8] = [
    "znver5",
    "skylake-avx512",
    "cascadelake",
    "cooperlake",
    "icelake-server",
    "sapphirerapids",
    "emeraldrapids",
    "graniterapids",
];

/// Every name that [`target`] knows.
pub const NAMES: [&str; 3] = ["native", "x86-64-v3", "x86-64-v4"];

/// The target of that name.
///
/// # Errors
/// Where the name is none of [`NAMES`], or `native` is asked for on a processor that no code is generated for.
pub fn target(name: &str) -> Result<Target> {
    match name {
        "x86-64-v3" => Ok(x86(name, "x86-64-v3", V3.into(), NAMED_THREADS)),
        "x86-64-v4" => Ok(x86(name, "x86-64-v4", V3.into_iter().chain(V4).collect(), NAMED_THREADS)),
        "native" => native(),
        _ => {
            let message = format!("unknown target `{name}`, expected one of {}", NAMES.join(", "));
            Err(Error::new(Kind::Unsupported, message).help("`mansard doctor` says what this machine has"))
        }
    }
}

fn native() -> Result<Target> {
    if std::env::consts::ARCH != "x86_64" {
        bail!(Unsupported, "no code is generated for {} yet; targets: {}", std::env::consts::ARCH, NAMES.join(", "));
    }
    let (cpu, host) = (TargetMachine::get_host_cpu_name(), TargetMachine::get_host_cpu_features());
    let host = host.to_string();
    let has = |f: &&str| host.split(',').any(|h| h.strip_prefix('+') == Some(*f));
    let features: Vec<&str> = V3.into_iter().chain(V4).chain(EXTRA).filter(has).collect();
    if !features.contains(&"avx2") || !features.contains(&"fma") || !features.contains(&"f16c") {
        bail!(Unsupported, "this machine ({cpu}) lacks AVX2, FMA or F16C; no code is generated for such processors");
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(x86("native", &cpu.to_string(), features, threads))
}

fn x86(name: &str, cpu: &str, mut features: Vec<&str>, threads: usize) -> Target {
    features.sort_unstable();
    let wide = V4.iter().all(|f| *f == "avx512bf16" || features.contains(f));
    Target {
        name: name.into(),
        arch: "x86_64".into(),
        cpu: cpu.into(),
        features: features.into_iter().map(String::from).collect(),
        registers: if wide { 32 } else { 16 },
        vector_bytes: if wide { 64 } else { 32 },
        machine: machine(wide, TWO_WIDE_UNITS.contains(&cpu), threads),
    }
}

/// Rates of one core of a current server, times the cores. Measured where that could be done (AVX-512 on Zen 4: 118 GFLOP/s
/// and 471 GOP/s of u8 x s8 a core, 33 GB/s of main memory for one core and 66 GB/s for two; on Zen 5, with two full units,
/// 255 GFLOP/s and 1020 GOP/s); without VNNI a dot product takes three instructions for a quarter of the lanes.
fn machine(wide: bool, two_units: bool, threads: usize) -> Machine {
    let cores = threads as f64;
    let units = if wide && two_units { 2.2 } else { 1.0 };
    // A handful of cores saturate the memory of a socket.
    let readers = cores.min(8.0);
    Machine {
        threads,
        bandwidth: 30e9 * readers,
        cache_bandwidth: 60e9 * cores,
        cache_bytes: 32e6,
        peak_f32: 115e9 * units * cores,
        peak_i8: if wide { 460e9 * units } else { 150e9 } * cores,
        barrier: 0.5e-6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_targets_are_the_same_everywhere() {
        let v3 = target("x86-64-v3").unwrap();
        assert_eq!((v3.vector_bytes, v3.registers, v3.machine.threads), (32, 16, 4));
        assert!(v3.has("f16c") && !v3.has("avxvnni"));
        let v4 = target("x86-64-v4").unwrap();
        assert_eq!((v4.vector_bytes, v4.registers), (64, 32));
        assert!(v4.has("avx512vnni") && v4.features.is_sorted());
    }

    #[test]
    fn an_unknown_name_lists_the_known() {
        let error = target("z80").unwrap_err();
        assert_eq!(error.to_string(), "unknown target `z80`, expected one of native, x86-64-v3, x86-64-v4");
    }
}
