//! What code is generated for, and how fast that machine is said to be.

use serde::{Deserialize, Serialize};

/// A processor as the passes and the CPU backend see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// `native`, `x86-64-v3`, `x86-64-v4`.
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

/// A roofline: what decisions are priced on. Rates are for all `threads` together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Worker threads the figures hold for.
    pub threads: usize,
    /// Bytes per second from main memory.
    pub bandwidth: f64,
    /// Bytes per second from the last-level cache.
    pub cache_bandwidth: f64,
    /// Bytes of the last-level cache.
    pub cache_bytes: f64,
    /// f32 FLOP/s.
    pub peak_f32: f64,
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
}
