//! From a model file to an artifact, stage by stage.

use mansard_backends as backends;
use mansard_frontend as frontend;
use mansard_ir::artifact::Provenance;
use mansard_ir::plan::Plan;
use mansard_ir::{DType, Model, Result, Target};
use mansard_passes as passes;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// What to compile and how.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// Names of the targets, best first: `native`, `x86-64-v3`, `x86-64-v4`.
    pub targets: Vec<String>,
    /// Weights as f32, whatever the file holds (`--quant none`).
    pub float_weights: bool,
    /// Stored type of caches; `None` lets the precision pass choose.
    pub kv: Option<DType>,
    /// Bounds of a step.
    pub limits: passes::LimitsRequest,
    /// Makes the weights up, from this seed, for a `config.json` alone.
    pub synthetic_seed: Option<u64>,
    /// Threads of the compilation.
    pub threads: usize,
}

impl Default for CompileOptions {
    fn default() -> CompileOptions {
        CompileOptions {
            targets: vec!["native".into()],
            float_weights: false,
            kv: None,
            limits: passes::LimitsRequest::default(),
            synthetic_seed: None,
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        }
    }
}

/// Hears how far a compilation is.
pub trait Progress {
    /// A stage begins; `total` counts its units (0: unknown).
    fn stage(&mut self, name: &'static str, total: usize);
    /// Units done.
    fn advance(&mut self, done: usize);
}

/// Hears nothing.
pub struct Quiet;

impl Progress for Quiet {
    fn stage(&mut self, _: &'static str, _: usize) {}
    fn advance(&mut self, _: usize) {}
}

/// What a compilation came to.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Name and time of each stage, in order.
    pub stages: Vec<(&'static str, Duration)>,
    /// Size of the artifact.
    pub artifact_bytes: usize,
    /// Size of the packed weights.
    pub weight_bytes: usize,
    /// Size of the machine code of all targets.
    pub code_bytes: usize,
    /// Distinct kernels.
    pub kernels: usize,
    /// How the passes went.
    pub passes: passes::Report,
}

/// Opens the model file at `path`.
///
/// # Errors
/// As [`frontend::open`].
pub fn import(path: &Path, options: &CompileOptions) -> Result<Model> {
    let options =
        frontend::Options { float_weights: options.float_weights, synthetic_seed: options.synthetic_seed };
    frontend::open(path, &options)
}

/// The options of the passes for one target.
pub fn pass_options(target: Target, options: &CompileOptions) -> passes::Options {
    passes::Options { kv: options.kv, limits: options.limits, ..passes::Options::new(target) }
}
