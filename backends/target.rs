//! Names of targets -> what code is generated for.
//!
//! ```text
//! native                  the features of this machine, tuned for its CPU
//! x86-64-v3               AVX2, FMA, F16C: any x86-64 server or desktop since 2013-2015
//! x86-64-v3+avxvnni       and integer dot products: Intel's desktops since Alder Lake, AMD's since Zen 5
//! x86-64-v4               AVX-512 with VNNI and BF16: Intel since Cooper Lake and Sapphire Rapids, AMD since Zen 4
//! x86-64-v4+amx           and matrix units for bf16 and int8: Intel's servers since Sapphire Rapids
//! aarch64+dotprod         NEON with dot products of equal signs: Arm since Neoverse N1, Apple since M1
//! aarch64+i8mm            and of mixed signs: Arm since Neoverse V1 and N2, Apple since M2
//! ```
//!
//! Invariant: code for a target uses no instruction beyond its `features` over plain x86-64 or aarch64, so a runtime that
//! checks these names can run it; the CPU's name only tunes. The machine figures are those stated in `machines/`, not
//! measurements: the same inputs give the same plan on any machine.

use crate::machine::MachineTable;
use inkwell::targets::TargetMachine;
use mansard_ir::{Error, Kind, Place, Result, Target, bail};
use std::cmp::Reverse;

/// Features of `x86-64-v3` that matter to generated code, as LLVM names them.
const V3: &[&str] = &["avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "popcnt"];

/// What `x86-64-v4` adds here: the psABI's level and the integer and bf16 dot products.
const V4: &[&str] = &["avx512bf16", "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl", "avx512vnni"];

/// Matrix units.
const AMX: &[&str] = &["amx-bf16", "amx-int8", "amx-tile"];

/// What `native` may use beside on x86-64.
const X86_EXTRA: &[&str] =
    &["avx512bitalg", "avx512fp16", "avx512vbmi", "avx512vbmi2", "avx512vpopcntdq", "avxvnni", "gfni"];

/// Features of `aarch64+dotprod`.
const DOTPROD: &[&str] = &["dotprod", "neon"];

/// What `native` may use beside on aarch64.
const ARM_EXTRA: &[&str] = &["bf16", "fullfp16", "i8mm"];

/// Worker threads that named targets are priced for.
const NAMED_THREADS: usize = 4;

/// x86-64 CPUs, as LLVM names them, with two vector units of the full 512 bits: twice the rates of their level.
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

/// A level of an architecture.
struct Level {
    name: &'static str,
    arch: &'static str,
    /// What LLVM tunes for.
    cpu: &'static str,
    features: &'static [&'static [&'static str]],
    registers: usize,
    vector_bytes: usize,
    /// Text of the machine file.
    machine: &'static str,
}

/// Every level, the lowest of an architecture first.
const LEVELS: [Level; 6] = [
    Level {
        name: "x86-64-v3",
        arch: "x86_64",
        cpu: "x86-64-v3",
        features: &[V3],
        registers: 16,
        vector_bytes: 32,
        machine: include_str!("../machines/x86-64-v3.toml"),
    },
    Level {
        name: "x86-64-v3+avxvnni",
        arch: "x86_64",
        cpu: "alderlake",
        features: &[V3, &["avxvnni"]],
        registers: 16,
        vector_bytes: 32,
        machine: include_str!("../machines/x86-64-v3+avxvnni.toml"),
    },
    Level {
        name: "x86-64-v4",
        arch: "x86_64",
        cpu: "x86-64-v4",
        features: &[V3, V4],
        registers: 32,
        vector_bytes: 64,
        machine: include_str!("../machines/x86-64-v4.toml"),
    },
    Level {
        name: "x86-64-v4+amx",
        arch: "x86_64",
        cpu: "sapphirerapids",
        features: &[V3, V4, AMX],
        registers: 32,
        vector_bytes: 64,
        machine: include_str!("../machines/x86-64-v4+amx.toml"),
    },
    Level {
        name: "aarch64+dotprod",
        arch: "aarch64",
        cpu: "neoverse-n1",
        features: &[DOTPROD],
        registers: 32,
        vector_bytes: 16,
        machine: include_str!("../machines/aarch64+dotprod.toml"),
    },
    Level {
        name: "aarch64+i8mm",
        arch: "aarch64",
        cpu: "neoverse-v1",
        features: &[DOTPROD, &["i8mm"]],
        registers: 32,
        vector_bytes: 16,
        machine: include_str!("../machines/aarch64+i8mm.toml"),
    },
];

/// Every name that [`target`] knows.
pub fn names() -> Vec<&'static str> {
    std::iter::once("native").chain(LEVELS.iter().map(|l| l.name)).collect()
}

/// The target of that name.
///
/// # Errors
/// Where the name is none of [`names`], or `native` is asked for on a processor that no code is generated for.
pub fn target(name: &str) -> Result<Target> {
    if name == "native" {
        return native();
    }
    let Some(level) = LEVELS.iter().find(|l| l.name == name) else {
        let message = format!("unknown target `{name}`, expected one of {}", names().join(", "));
        return Err(Error::new(Kind::Unsupported, message).help("`mansard doctor` says what this machine has"));
    };
    level.target()
}

/// The targets of those names, the best of an architecture first, whatever order they are named in: the wider, and of
/// equally wide ones the one with more features.
///
/// # Errors
/// As [`target`]; where one is named twice.
pub fn targets<S: AsRef<str>>(names: &[S]) -> Result<Vec<Target>> {
    let mut targets = names.iter().map(|name| target(name.as_ref())).collect::<Result<Vec<Target>>>()?;
    let place = |t: &Target| LEVELS.iter().position(|l| l.arch == t.arch);
    targets.sort_by_key(|t| (place(t), Reverse(t.vector_bytes), Reverse(t.features.len()), t.name != "native"));
    if let Some([twice, _]) = targets.windows(2).find(|pair| pair[0].name == pair[1].name) {
        bail!(Usage, "expected each target once, found `{}` twice", twice.name);
    }
    Ok(targets)
}

impl Level {
    fn target(&self) -> Result<Target> {
        let mut features: Vec<String> = self.features.iter().copied().flatten().map(|f| f.to_string()).collect();
        features.sort_unstable();
        Ok(Target {
            name: self.name.into(),
            arch: self.arch.into(),
            cpu: self.cpu.into(),
            features,
            registers: self.registers,
            vector_bytes: self.vector_bytes,
            machine: self.stated()?.roofline(NAMED_THREADS),
        })
    }

    /// The figures in `machines/`.
    fn stated(&self) -> Result<MachineTable> {
        MachineTable::parse(self.machine).at(|| format!("machines/{}.toml", self.name))
    }
}

/// The highest level that this machine has, and what else it can do.
fn native() -> Result<Target> {
    let host = host_features();
    let has = |f: &&str| host.iter().any(|h| h == f);
    let arch = std::env::consts::ARCH;
    let levels: Vec<&Level> = LEVELS.iter().filter(|l| l.arch == arch).collect();
    let cpu = TargetMachine::get_host_cpu_name().to_string();
    // BF16 came a little later than the rest of AVX-512: `native` does without where it is missing.
    let covered = |l: &&&Level| l.features.iter().copied().flatten().all(|f| *f == "avx512bf16" || has(f));
    let Some(level) = levels.iter().rev().find(covered) else {
        let Some(lowest) = levels.first() else {
            bail!(Unsupported, "no code is generated for {arch}; targets: {}", names().join(", "));
        };
        let lacks: Vec<&str> = lowest.features.iter().copied().flatten().copied().filter(|f| !has(f)).collect();
        bail!(Unsupported, "this machine ({cpu}) lacks {}; no code is generated for such processors", lacks.join(", "));
    };
    let mut target = level.target()?;
    let extra = [V3, V4, AMX, X86_EXTRA, DOTPROD, ARM_EXTRA];
    target.features = extra.into_iter().flatten().filter(|f| has(f)).map(|f| f.to_string()).collect();
    target.features.sort_unstable();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // Measured on Zen 5: 255 GFLOP/s and 1020 GOP/s.
    let units = if target.vector_bytes == 64 && TWO_WIDE_UNITS.contains(&cpu.as_str()) { 2.2 } else { 1.0 };
    target.machine = level.stated()?.roofline(threads);
    for peak in [&mut target.machine.peak_f32, &mut target.machine.peak_bf16, &mut target.machine.peak_i8] {
        *peak *= units;
    }
    (target.name, target.cpu) = ("native".into(), cpu);
    Ok(target)
}

/// LLVM's names of the features that this machine has.
pub fn host_features() -> Vec<String> {
    let known = TargetMachine::get_host_cpu_features().to_string();
    let mut features: Vec<String> = known.split(',').filter_map(|f| Some(f.strip_prefix('+')?.to_owned())).collect();
    features.extend(detected().into_iter().map(String::from));
    features
}

/// What LLVM does not look for: of aarch64 it reads only some features.
#[cfg(target_arch = "aarch64")]
fn detected() -> Vec<&'static str> {
    use std::arch::is_aarch64_feature_detected as has;
    let found = [
        ("bf16", has!("bf16")),
        ("dotprod", has!("dotprod")),
        ("fullfp16", has!("fp16")),
        ("i8mm", has!("i8mm")),
        ("neon", has!("neon")),
    ];
    found.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

/// What LLVM does not look for: nothing that code is generated for.
#[cfg(not(target_arch = "aarch64"))]
fn detected() -> Vec<&'static str> {
    vec![]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_targets_are_the_same_everywhere() {
        let v3 = target("x86-64-v3").unwrap();
        assert_eq!((v3.vector_bytes, v3.registers, v3.machine.threads), (32, 16, 4));
        assert!(v3.has("f16c") && !v3.has("avxvnni"));
        assert!(target("x86-64-v3+avxvnni").unwrap().has("avxvnni"));
        let v4 = target("x86-64-v4").unwrap();
        assert_eq!((v4.vector_bytes, v4.registers, v4.wide_registers()), (64, 32, 32));
        assert!(v4.has("avx512vnni") && v4.features.is_sorted());
        let arm = target("aarch64+i8mm").unwrap();
        assert_eq!((arm.arch.as_str(), arm.wide_registers()), ("aarch64", 8));
        assert_eq!(arm.features, ["dotprod", "i8mm", "neon"]);
    }

    #[test]
    fn an_unknown_name_lists_the_known() {
        let error = target("z80").unwrap_err();
        let known = "native, x86-64-v3, x86-64-v3+avxvnni, x86-64-v4, x86-64-v4+amx, aarch64+dotprod, aarch64+i8mm";
        assert_eq!(error.to_string(), format!("unknown target `z80`, expected one of {known}"));
    }

    #[test]
    fn several_targets_are_the_best_first_in_any_order() {
        let names = |asked: &[&str]| targets(asked).unwrap().into_iter().map(|t| t.name).collect::<Vec<_>>();
        let best = ["x86-64-v4+amx", "x86-64-v4", "x86-64-v3+avxvnni", "x86-64-v3", "aarch64+i8mm", "aarch64+dotprod"];
        assert_eq!(names(&best), best);
        let mut worst = best;
        worst.reverse();
        assert_eq!(names(&worst), best);
        assert!(targets(&["x86-64-v3", "x86-64-v4", "x86-64-v3"]).unwrap_err().to_string().contains("twice"));
    }

    #[test]
    fn a_plan_for_several_asks_for_what_all_have() {
        let both = Target::common(&targets(&["aarch64+dotprod", "x86-64-v4"]).unwrap()).unwrap();
        assert_eq!((both.features.len(), both.registers, both.vector_bytes), (0, 32, 16));
        assert_eq!(both.machine.peak_f32, target("aarch64+dotprod").unwrap().machine.peak_f32);
        let one = targets(&["x86-64-v3"]).unwrap();
        assert_eq!(Target::common(&one).unwrap(), one[0]);
        assert_eq!(Target::common(&[]).unwrap_err().exit_code(), 2);
    }
}
