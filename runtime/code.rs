//! Machine code of an artifact -> functions that workers call.
//!
//! The best image whose CPU features this machine has is copied to memory that is then made executable and read-only. An
//! [`Executable`] holds the launches of every variant with all addresses resolved, so a worker's step is a loop over calls.
//! Nothing here runs before the artifact's hashes have been checked.
#![allow(unsafe_code)]

use crate::profile::Recorder;
use crate::spmd::{Program, Share};
use mansard_ir::artifact::Code;
use mansard_ir::plan::StepArgs;
use mansard_ir::{Error, Kind, Result, bail};
use std::ops::Range;
use std::sync::Arc;

/// A compiled kernel.
type Function = unsafe extern "C" fn(args: *const *mut u8, step: *const StepArgs, thread: i64, threads: i64);

/// Executable memory and the kernels in it.
#[derive(Debug)]
pub struct Image {
    mapping: *mut libc::c_void,
    bytes: usize,
    functions: Vec<Function>,
}

// SAFETY: an image is immutable after `map`, and not tied to the thread that mapped it.
unsafe impl Send for Image {}
// SAFETY: as above; executing code through several threads changes nothing in it.
unsafe impl Sync for Image {}

impl Image {
    /// Maps `code`, whose kernels start at `entries`.
    ///
    /// # Errors
    /// Where the system refuses executable memory or an entry lies outside.
    pub fn map(code: &[u8], entries: &[usize]) -> Result<Image> {
        if let Some(entry) = entries.iter().find(|e| **e >= code.len()) {
            bail!(Input, "expected kernels inside {} bytes of code, found one at byte {entry}", code.len());
        }
        let bytes = code.len().max(1);
        let refused = |call: &str| {
            let error = std::io::Error::last_os_error();
            Error::new(Kind::Io, format!("expected {bytes} bytes of executable memory: {call}: {error}"))
        };
        // SAFETY: a new private anonymous mapping at an address of the system's choice touches no memory in use.
        let mapping = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if mapping == libc::MAP_FAILED {
            return Err(refused("mmap"));
        }
        let mut image = Image { mapping, bytes, functions: vec![] };
        // SAFETY: the mapping is writable, at least as long as `code`, and apart from it.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), mapping.cast::<u8>(), code.len()) };
        flush_instructions(mapping.cast::<u8>(), code.len());
        // SAFETY: exactly the mapping made above; from here on nothing writes to it.
        if unsafe { libc::mprotect(mapping, bytes, libc::PROT_READ | libc::PROT_EXEC) } != 0 {
            return Err(refused("mprotect"));
        }
        image.functions = entries
            .iter()
            .map(|entry| {
                // SAFETY: the address is inside executable memory that lives as long as the image, and the artifact's
                // manifest, whose hash holds, says that a kernel of this signature starts there.
                unsafe { std::mem::transmute::<*mut u8, Function>(mapping.cast::<u8>().add(*entry)) }
            })
            .collect();
        Ok(image)
    }
}

/// Makes what was written as data visible as instructions: on aarch64 the caches of both are apart.
#[cfg(target_arch = "aarch64")]
fn flush_instructions(code: *const u8, bytes: usize) {
    let kinds: u64;
    // SAFETY: reads a register that user programs may read, and touches no memory.
    unsafe { std::arch::asm!("mrs {}, ctr_el0", out(reg) kinds, options(nomem, nostack)) };
    // Lines of the smallest instruction and data cache.
    let (instructions, data) = (4usize << (kinds & 15), 4usize << (kinds >> 16 & 15));
    for line in (code as usize & !(data - 1)..code as usize + bytes).step_by(data) {
        // SAFETY: writes a cache line back to memory, which changes no value.
        unsafe { std::arch::asm!("dc cvau, {}", in(reg) line, options(nostack)) };
    }
    // SAFETY: a barrier.
    unsafe { std::arch::asm!("dsb ish", options(nostack)) };
    for line in (code as usize & !(instructions - 1)..code as usize + bytes).step_by(instructions) {
        // SAFETY: drops a line of the instruction cache, which is read again from memory.
        unsafe { std::arch::asm!("ic ivau, {}", in(reg) line, options(nostack)) };
    }
    // SAFETY: barriers.
    unsafe { std::arch::asm!("dsb ish", "isb", options(nostack)) };
}

/// Makes what was written as data visible as instructions: on x86-64 it is.
#[cfg(not(target_arch = "aarch64"))]
fn flush_instructions(_: *const u8, _: usize) {}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `map` made; functions in it are called only through the image.
        unsafe { libc::munmap(self.mapping, self.bytes) };
    }
}

/// A launch with its addresses.
#[derive(Clone, Debug)]
pub struct BoundLaunch {
    /// Index of the kernel in the image.
    pub kernel: usize,
    /// Addresses of its arguments.
    pub args: Vec<*mut u8>,
    /// Every earlier launch is done before it.
    pub barrier: bool,
}

/// All launches for steps of some numbers of tokens.
#[derive(Clone, Debug)]
pub struct BoundVariant {
    /// In order.
    pub launches: Vec<BoundLaunch>,
}

/// What to run: a variant, on a step.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// Index of the variant.
    pub variant: usize,
    /// The step; its arrays outlive the run.
    pub step: StepArgs,
    /// A single launch of it, after those before it on the same step; all where `None`.
    pub launch: Option<usize>,
}

// SAFETY: the arrays behind the pointers are the engine's, which neither moves nor writes them until every worker has
// done every share of the job.
unsafe impl Send for Job {}

/// An image and launches bound to memory.
///
/// Whoever binds the launches keeps that memory for as long as the executable, and does not touch it during a run.
#[derive(Debug)]
pub struct Executable {
    image: Image,
    variants: Vec<BoundVariant>,
    /// Of each variant, the runs of launches that no barrier parts.
    phases: Vec<Vec<Range<usize>>>,
}

// SAFETY: the addresses are only passed on to kernels, which divide the memory behind them by worker.
unsafe impl Send for Executable {}
// SAFETY: as above.
unsafe impl Sync for Executable {}

impl Executable {
    /// Checks that the launches' kernels exist.
    ///
    /// # Errors
    /// Where one does not.
    pub fn new(image: Image, variants: Vec<BoundVariant>) -> Result<Executable> {
        let kernels = image.functions.len();
        if let Some(launch) = variants.iter().flat_map(|v| &v.launches).find(|l| l.kernel >= kernels) {
            bail!(Input, "expected one of {kernels} kernels, found k{}", launch.kernel);
        }
        let phases = variants.iter().map(|v| phases(&v.launches)).collect();
        Ok(Executable { image, variants, phases })
    }

    /// Launches of a variant.
    pub fn launches(&self, variant: usize) -> usize {
        self.variants.get(variant).map_or(0, |v| v.launches.len())
    }

    /// Launches of the variant that has most.
    pub fn most_launches(&self) -> usize {
        self.variants.iter().map(|v| v.launches.len()).max().unwrap_or(0)
    }
}

/// What a team runs: an executable, and who notes how long its launches take.
pub struct Running {
    /// Whose launches.
    pub executable: Arc<Executable>,
    /// Without one, no clock is read.
    pub recorder: Option<Arc<Recorder>>,
}

impl Program<Job> for Running {
    fn phases(&self, job: &Job) -> usize {
        if job.launch.is_some() { 1 } else { self.executable.phases[job.variant].len() }
    }

    fn run(&self, job: &Job, phase: usize, share: Share) {
        let executable = &self.executable;
        // Launches of one phase go together: a share may read what the same share of an earlier one wrote.
        let launches = job.launch.map_or_else(|| executable.phases[job.variant][phase].clone(), |l| l..l + 1);
        for index in launches {
            let launch = &executable.variants[job.variant].launches[index];
            if let Some(recorder) = &self.recorder {
                recorder.started(share.worker);
            }
            let function = executable.image.functions[launch.kernel];
            // SAFETY: a loop of `probe` keeps to its buffer. A kernel's arguments are as many, and as long, as the manifest says,
            // which `validate` has checked against arena, pools and sections; the step's arrays are within its limits and
            // outlive the job. Kernels write only their own share; dependent launches are in different phases, or in jobs
            // of their own, one after another.
            unsafe { function(launch.args.as_ptr(), &job.step, share.index as i64, share.count as i64) };
            if let Some(recorder) = &self.recorder {
                recorder.ended(share.worker, index);
            }
        }
    }
}

/// Runs of launches of which only the first has a barrier.
fn phases(launches: &[BoundLaunch]) -> Vec<Range<usize>> {
    let mut phases: Vec<Range<usize>> = vec![];
    for (index, launch) in launches.iter().enumerate() {
        match phases.last_mut() {
            Some(phase) if !launch.barrier => phase.end = index + 1,
            _ => phases.push(index..index + 1),
        }
    }
    phases
}

/// The first image, that is the best, that this machine can run.
///
/// # Errors
/// Where it can run none: a list of the images and what the machine lacks for each.
pub fn choose(images: &[Code]) -> Result<&Code> {
    let mut lacking = vec![];
    for image in images {
        match missing(image) {
            None => return Ok(image),
            Some(reason) => lacking.push(format!("`{}` for {}: {reason}", image.target, image.arch)),
        }
    }
    let found = if lacking.is_empty() { "none".into() } else { lacking.join("; ") };
    let message = format!("expected machine code for this {} CPU, found {found}", std::env::consts::ARCH);
    Err(Error::new(Kind::Unsupported, message).help("compile the model again with `--target native` on this machine"))
}

/// What the machine lacks to run an image; `None` where it lacks nothing.
pub fn missing(image: &Code) -> Option<String> {
    lacking(&image.arch, &image.features)
}

/// What the machine lacks to run code for an architecture and features; `None` where it lacks nothing.
pub fn lacking(arch: &str, features: &[String]) -> Option<String> {
    if arch != std::env::consts::ARCH {
        return Some(format!("this machine is {}", std::env::consts::ARCH));
    }
    let missing: Vec<&str> = features.iter().map(String::as_str).filter(|f| !has_feature(f)).collect();
    (!missing.is_empty()).then(|| format!("this machine lacks {}", missing.join(", ")))
}

macro_rules! features {
    ($detect:ident: $($llvm:literal $rust:tt),* $(,)?) => {
        /// This CPU has the feature of that LLVM name. Unknown names are features it has not.
        pub fn has_feature(name: &str) -> bool {
            match name {
                $($llvm => std::arch::$detect!($rust),)*
                _ => ALWAYS.contains(&name) || has_matrix_unit(name),
            }
        }
        /// LLVM names of the features that can be asked for and this CPU has.
        pub fn cpu_features() -> Vec<&'static str> {
            [$($llvm),*].into_iter().chain(MATRIX_UNITS.iter().map(|(name, _)| *name)).filter(|f| has_feature(f)).collect()
        }
    };
}

/// Features of every x86-64, and instructions for caches, virtual machines and operating systems that generated code
/// never holds, though LLVM lists them with a CPU.
#[cfg(target_arch = "x86_64")]
const ALWAYS: &[&str] = &[
    "64bit",
    "64bit-mode",
    "cldemote",
    "clflushopt",
    "clwb",
    "clzero",
    "cmov",
    "crc32",
    "cx8",
    "evex512",
    "fsgsbase",
    "invpcid",
    "mmx",
    "movdir64b",
    "movdiri",
    "mwaitx",
    "pku",
    "prefetchi",
    "prfchw",
    "ptwrite",
    "rdpid",
    "rdpru",
    "sahf",
    "serialize",
    "sgx",
    "shstk",
    "sse",
    "sse2",
    "tsxldtrk",
    "uintr",
    "waitpkg",
    "wbnoinvd",
    "x87",
];

#[cfg(target_arch = "x86_64")]
features! { is_x86_feature_detected:
    "adx" "adx", "aes" "aes", "avx" "avx", "avx2" "avx2", "avx512bf16" "avx512bf16", "avx512bitalg" "avx512bitalg",
    "avx512bw" "avx512bw", "avx512cd" "avx512cd", "avx512dq" "avx512dq", "avx512f" "avx512f", "avx512fp16" "avx512fp16",
    "avx512ifma" "avx512ifma", "avx512vbmi" "avx512vbmi", "avx512vbmi2" "avx512vbmi2", "avx512vl" "avx512vl",
    "avx512vnni" "avx512vnni", "avx512vp2intersect" "avx512vp2intersect", "avx512vpopcntdq" "avx512vpopcntdq",
    "avxifma" "avxifma", "avxneconvert" "avxneconvert", "avxvnni" "avxvnni", "avxvnniint16" "avxvnniint16",
    "avxvnniint8" "avxvnniint8", "bmi" "bmi1", "bmi2" "bmi2", "cx16" "cmpxchg16b", "f16c" "f16c", "fma" "fma",
    "fxsr" "fxsr", "gfni" "gfni", "lzcnt" "lzcnt", "movbe" "movbe", "pclmul" "pclmulqdq", "popcnt" "popcnt",
    "rdrnd" "rdrand", "rdseed" "rdseed", "sha" "sha", "sse3" "sse3", "sse4.1" "sse4.1", "sse4.2" "sse4.2",
    "sse4a" "sse4a", "ssse3" "ssse3", "vaes" "vaes", "vpclmulqdq" "vpclmulqdq", "xsave" "xsave", "xsavec" "xsavec",
    "xsaveopt" "xsaveopt", "xsaves" "xsaves",
}

/// Features of matrix units, and their bits in `edx` of leaf 7 of `cpuid`.
#[cfg(target_arch = "x86_64")]
const MATRIX_UNITS: &[(&str, u32)] = &[("amx-bf16", 22), ("amx-tile", 24), ("amx-int8", 25)];

/// This CPU has that feature of matrix units and the system lets this process use their registers, which it does on request
/// only (Linux, `Documentation/arch/x86/xstate.rst`): threads started later may as well.
#[cfg(target_arch = "x86_64")]
fn has_matrix_unit(name: &str) -> bool {
    use std::sync::OnceLock;
    const REQUEST_PERMISSION: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    static GRANTED: OnceLock<bool> = OnceLock::new();
    let Some((_, bit)) = MATRIX_UNITS.iter().find(|(known, _)| *known == name) else { return false };
    std::arch::x86_64::__cpuid_count(7, 0).edx >> bit & 1 == 1
        && *GRANTED.get_or_init(|| {
            // SAFETY: asks for larger register states of this process's threads; touches no memory of its own.
            unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 }
        })
}

#[cfg(target_arch = "aarch64")]
const MATRIX_UNITS: &[(&str, u32)] = &[];

#[cfg(target_arch = "aarch64")]
fn has_matrix_unit(_: &str) -> bool {
    false
}

#[cfg(target_arch = "aarch64")]
const ALWAYS: &[&str] = &[];

#[cfg(target_arch = "aarch64")]
features! { is_aarch64_feature_detected:
    "bf16" "bf16", "dotprod" "dotprod", "fullfp16" "fp16", "i8mm" "i8mm", "neon" "neon", "sve" "sve", "sve2" "sve2",
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(arch: &str, target: &str, features: &[&str]) -> Code {
        let features = features.iter().map(|f| f.to_string()).collect();
        Code {
            section: "code".into(),
            arch: arch.into(),
            target: target.into(),
            features,
            entries: vec![],
            tiles: vec![],
        }
    }

    #[test]
    fn the_first_image_that_runs_is_chosen() {
        let here = std::env::consts::ARCH;
        let images = [image("vax", "vax-780", &[]), image(here, "future", &["avx9000"]), image(here, "plain", &[])];
        assert_eq!(choose(&images).unwrap().target, "plain");
        let error = choose(&images[..2]).unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert!(error.message().contains("`vax-780` for vax") && error.message().contains("lacks avx9000"), "{error}");
        assert!(choose(&[]).is_err());
    }

    #[test]
    fn entries_outside_the_image_are_refused() {
        assert!(Image::map(&[0xc3; 64], &[0, 63]).is_ok());
        assert!(Image::map(&[0xc3; 64], &[64]).is_err());
        assert!(Image::map(&[], &[0]).is_err());
    }
}
