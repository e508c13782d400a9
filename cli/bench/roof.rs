//! The roofline of an artifact's kernels on this machine: what a launch does, and the least time that takes.
//!
//! ```text
//! least time = max(f32 operations / peak + int8 operations / peak, bytes of weights and caches / bandwidth)
//! ```
//!
//! Operations and bytes come from the kernels' bodies, bandwidth is measured before and after the tests on a buffer of the
//! weights' size with as many workers, peaks are those the target was priced with. A kernel's own roof adds the activations it moves through the cache.

use mansard_backends as backends;
use mansard_ir::cost::{Work, Workload};
use mansard_ir::plan::Program;
use mansard_ir::text::parse;
use mansard_ir::{Graph, Machine, Result, ValueId, bail};
use mansard_runtime::{self as runtime, Model};
use std::collections::BTreeMap;

/// What bounds a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Reading weights and caches, or moving activations.
    Memory,
    /// Integer products.
    I8,
    /// Everything else that is computed.
    F32,
}

impl Bound {
    /// The word in reports.
    pub fn name(self) -> &'static str {
        match self {
            Bound::Memory => "memory",
            Bound::I8 => "int8",
            Bound::F32 => "f32",
        }
    }
}

/// Rates that bound a step, and the kernels they apply to.
pub struct Roof {
    /// Bandwidth measured, peaks for the workers in use as the target was priced.
    pub machine: Machine,
    bodies: Vec<Graph>,
    /// Of the weights.
    bytes: usize,
    threads: usize,
}

impl Roof {
    /// Measures and reads what there is to know.
    ///
    /// # Errors
    /// Where the artifact has no code for this machine, a kernel's body is no graph, or memory is refused.
    pub fn of(model: &Model, threads: usize) -> Result<Roof> {
        let manifest = model.artifact().manifest();
        let Some(code) = manifest.code.iter().find(|code| runtime::missing(code).is_none()) else {
            bail!(Unsupported, "the artifact has no code for this machine");
        };
        let mut machine = backends::target(&code.target)?.machine;
        let share = threads as f64 / machine.threads as f64;
        for rate in [&mut machine.peak_f32, &mut machine.peak_i8, &mut machine.cache_bandwidth] {
            *rate *= share;
        }
        let bytes = manifest.program.weights.iter().map(|w| w.bytes).sum();
        machine.bandwidth = runtime::read_bandwidth(bytes, threads)?;
        let mut bodies = vec![];
        for kernel in &manifest.program.kernels {
            match parse(&kernel.name, &kernel.text)?.graphs.pop() {
                Some(body) => bodies.push(body),
                None => bail!(Input, "kernel `{}` has no body", kernel.name),
            }
        }
        Ok(Roof { machine, bodies, bytes, threads })
    }

    /// Measures the bandwidth once more and keeps the larger: a neighbour takes some of it, nobody adds any.
    ///
    /// # Errors
    /// Where memory is refused.
    pub fn again(&mut self) -> Result<()> {
        self.machine.bandwidth = self.machine.bandwidth.max(runtime::read_bandwidth(self.bytes, self.threads)?);
        Ok(())
    }

    /// Where the peaks come from.
    pub fn peaks(&self) -> &'static str {
        "target"
    }

    /// What one launch of kernel `index` does in a step.
    pub fn work(&self, index: usize, step: &Workload) -> Work {
        let Some(body) = self.bodies.get(index) else { return Work::default() };
        let nodes: Vec<ValueId> = body.values().filter(|v| body.node(*v).is_some()).collect();
        step.work(body, &nodes)
    }

    /// The least time of a whole step, every launch for itself; activations stay in caches that cost nothing.
    pub fn step_seconds(&self, program: &Program, step: &Workload) -> f64 {
        let holds = |min: usize, max: usize| (min as f64..=max as f64).contains(&step.tokens);
        let Some(variant) = program.variants.iter().find(|v| holds(v.tokens.min, v.tokens.max)) else { return 0.0 };
        let mut launches: BTreeMap<usize, f64> = BTreeMap::new();
        for launch in &variant.launches {
            *launches.entry(launch.kernel.0 as usize).or_default() += 1.0;
        }
        let least = |kernel: usize| {
            let work = self.work(kernel, step);
            self.computing(&work).max((work.weight_bytes + work.cache_bytes) / self.machine.bandwidth)
        };
        launches.into_iter().map(|(kernel, times)| times * least(kernel)).sum()
    }

    /// The least time of a launch, and why.
    pub fn least(&self, work: &Work) -> (f64, Bound) {
        let seconds = work.seconds(&self.machine);
        let (f32, i8) = (work.f32_ops / self.machine.peak_f32, work.i8_ops / self.machine.peak_i8);
        let bound = match () {
            () if f32 + i8 < seconds => Bound::Memory,
            () if i8 >= f32 => Bound::I8,
            () => Bound::F32,
        };
        (seconds, bound)
    }

    fn computing(&self, work: &Work) -> f64 {
        work.f32_ops / self.machine.peak_f32 + work.i8_ops / self.machine.peak_i8
    }

    /// The rates, for the foot of a report.
    pub fn rates(&self) -> String {
        let Machine { bandwidth, peak_i8, peak_f32, .. } = self.machine;
        let [bandwidth, peak_i8, peak_f32] = [bandwidth, peak_i8, peak_f32].map(|rate| rate / 1e9);
        format!(
            "roofline of {}: {bandwidth:.1} GB/s read (measured); {peak_i8:.0} GOP/s int8, {peak_f32:.0} GFLOP/s f32 (of the target)\n",
            match self.threads {
                1 => "1 thread".to_string(),
                n => format!("{n} threads"),
            }
        )
    }
}
