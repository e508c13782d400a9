//! What code is generated for, and how fast that machine is said to be.

use crate::{Result, bail};
use serde::{Deserialize, Serialize};

/// A processor as the passes and the CPU backend see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// `native`, `x86-64-v3`, `aarch64+dotprod`...
    pub name: String,
    /// `x86_64` or `aarch64`.
    pub arch: String,
    /// LLVM's name of the CPU.
    pub cpu: String,
    /// LLVM's names of the features in use, sorted: `avx2`, `avx512vnni`...
    pub features: Vec<String>,
    /// Vector registers: 32 or 16.
    pub registers: usize,
    /// Bytes of a vector register: 64, 32 or 16.
    pub vector_bytes: usize,
    /// The roofline.
    pub machine: Machine,
}

/// Bytes that the loops of a probe divide among workers: they read multiples of it.
pub const PROBE_UNIT: usize = 1024;

/// A roofline: what decisions are priced on. Rates are for all `threads` together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Worker threads the figures hold for.
    pub threads: usize,
    /// Bytes per second from main memory.
    pub bandwidth: f64,
    /// Bytes per second from the workers' own caches, the largest level of them.
    pub near_bandwidth: f64,
    /// Bytes of these, of all workers; 0 where nothing is known of them.
    pub near_bytes: f64,
    /// Bytes per second from the last-level cache.
    pub cache_bandwidth: f64,
    /// Bytes of the last-level cache.
    pub cache_bytes: f64,
    /// f32 FLOP/s.
    pub peak_f32: f64,
    /// FLOP/s of products of bf16 pairs that are added up in f32.
    pub peak_bf16: f64,
    /// int8 operations per second.
    pub peak_i8: f64,
    /// Seconds from one launch to the next dependent one.
    pub barrier: f64,
}

impl Target {
    /// The feature is in use.
    pub fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|f| f == feature)
    }

    /// Instructions round 16 f32 to bf16 and multiply 16 pairs of them.
    pub fn computes_bf16(&self) -> bool {
        self.has("avx512bf16") && self.vector_bytes == 64
    }

    /// Matrix units multiply bf16, as those of all GPUs do: for many tokens, unpacking integer weights to that pays.
    pub fn widens_codes(&self) -> bool {
        self.has("amx-bf16") || self.arch.starts_with("sm_")
    }

    /// 64-byte vectors that the registers hold together: what register tiles are cut to.
    pub fn wide_registers(&self) -> usize {
        self.registers * self.vector_bytes / 64
    }

    /// What every one of `targets` has: features in common, the smallest figures. One program for several targets is planned
    /// for this, so it suits each of them, whatever their order.
    ///
    /// # Errors
    /// Where there is none.
    pub fn common(targets: &[Target]) -> Result<Target> {
        let Some((first, rest)) = targets.split_first() else { bail!(Usage, "expected at least one target") };
        let mut common = first.clone();
        for target in rest {
            common.name = format!("{},{}", common.name, target.name);
            for (ours, theirs) in [(&mut common.arch, &target.arch), (&mut common.cpu, &target.cpu)] {
                if ours != theirs {
                    *ours = "generic".into();
                }
            }
            common.features.retain(|f| target.has(f));
            common.registers = common.registers.min(target.registers);
            common.vector_bytes = common.vector_bytes.min(target.vector_bytes);
            common.machine = common.machine.least(&target.machine);
        }
        Ok(common)
    }
}

/// What passes through a cache between a kernel that writes activations and one that reads them, in multiples of what one
/// kernel moves: the activations of those between, and weights.
const PASSING: f64 = 4.0;

impl Machine {
    /// Bytes per second at which a kernel that reads and writes so many bytes of activations does that: where they lie.
    pub fn near(&self, bytes: f64) -> f64 {
        match bytes {
            bytes if bytes * PASSING < self.near_bytes => self.near_bandwidth,
            bytes if bytes <= self.cache_bytes => self.cache_bandwidth,
            _ => self.bandwidth,
        }
    }

    /// The worse of both, figure by figure.
    fn least(&self, other: &Machine) -> Machine {
        Machine {
            threads: self.threads.min(other.threads),
            bandwidth: self.bandwidth.min(other.bandwidth),
            near_bandwidth: self.near_bandwidth.min(other.near_bandwidth),
            near_bytes: self.near_bytes.min(other.near_bytes),
            cache_bandwidth: self.cache_bandwidth.min(other.cache_bandwidth),
            cache_bytes: self.cache_bytes.min(other.cache_bytes),
            peak_f32: self.peak_f32.min(other.peak_f32),
            peak_bf16: self.peak_bf16.min(other.peak_bf16),
            peak_i8: self.peak_i8.min(other.peak_i8),
            barrier: self.barrier.max(other.barrier),
        }
    }
}
