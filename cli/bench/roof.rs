//! The roofline of an artifact's kernels on this machine: what a launch does, and the least time that takes.
//!
//! ```text
//! least time = max(operations of each type / its peak, bytes of weights and caches / bandwidth)
//! ```
//!
//! Operations and bytes come from the kernels' bodies, bandwidth is measured before and after the tests on a buffer of the
//! weights' size with as many workers, peaks are those that `mansard probe` measured here, else those stated for the target.
//! A kernel's own roof adds the activations it moves through the cache.

use crate::device;
use crate::probe::measure;
use crate::report::OpenArguments;
use mansard::machine;
use mansard_backends as backends;
use mansard_backends::cpu::probe::Loops;
use mansard_backends::machine::MachineTable;
use mansard_ir::cost::{Work, Workload};
use mansard_ir::costs::Costs;
use mansard_ir::kernel::{self, KernelKind};
use mansard_ir::plan::{KernelSpec, Program};
use mansard_ir::{Graph, Machine, Result, bail};
use mansard_passes as passes;
use mansard_runtime::device::{Choice, Driver, choose, copy_bandwidth};
use mansard_runtime::{self as runtime, Model, Probe};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How long the bandwidth is measured, before the tests and after them.
const READING: Duration = Duration::from_millis(240);

/// What bounds a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Reading weights and caches, or moving activations.
    Memory,
    /// Integer products.
    I8,
    /// Products of bf16.
    Bf16,
    /// Everything else that is computed.
    F32,
}

impl Bound {
    /// The word in reports.
    pub fn name(self) -> &'static str {
        match self {
            Bound::Memory => "memory",
            Bound::I8 => "int8",
            Bound::Bf16 => "bf16",
            Bound::F32 => "f32",
        }
    }
}

/// Bytes that a GPU copies at least to show its bandwidth: far more than its caches hold.
const COPIED: usize = 512 << 20;

/// What measures bandwidth, before the tests and after them.
pub enum Meter {
    /// Loops of this CPU.
    Cpu(Box<Loops>),
    /// Copies of a GPU.
    Gpu(Arc<dyn Driver>),
}

impl Meter {
    /// Of the device that is asked for.
    ///
    /// # Errors
    /// Where that is not there, or is not named: rows of `auto` would be of one knows not what.
    pub fn new(opening: &OpenArguments) -> Result<Meter> {
        match opening.device {
            Choice::Cpu => Ok(Meter::Cpu(Box::new(Loops::new(&backends::target("native")?)?))),
            Choice::Cuda(_) => Ok(Meter::Gpu(device::gpu(opening)?)),
            Choice::Auto => bail!(Usage, "expected the device to be measured by its name: --device cpu or cuda:0"),
        }
    }

    fn bandwidth(&self, bytes: usize, threads: usize) -> Result<f64> {
        match self {
            Meter::Cpu(loops) => read_bandwidth(loops, bytes, threads),
            Meter::Gpu(driver) => copy_bandwidth(driver, bytes.min(driver.free_memory()? / 4).max(COPIED)),
        }
    }
}

/// Rates that bound a step, and the kernels they apply to.
pub struct Roof {
    /// Bandwidth measured in this run, the rest for the workers in use.
    pub machine: Machine,
    /// Where the peaks come from: `measured 2026-11-21`, or `stated`.
    pub peaks: String,
    /// What predictions are made of: as decisions are priced.
    priced: (Machine, Costs),
    /// Of a GPU: the bandwidth stated for it.
    pub stated: Option<f64>,
    /// `cpu`, or the GPU's name.
    pub device: String,
    bodies: Vec<Graph>,
    /// Of the weights.
    bytes: usize,
    threads: usize,
}

impl Roof {
    /// Measures, with `loops`, and reads what there is to know.
    ///
    /// # Errors
    /// Where the artifact has no code for this machine, a kernel's body is no graph, the stored machine file is damaged, or
    /// memory is refused.
    pub fn of(model: &Model, meter: &Meter, threads: usize) -> Result<Roof> {
        let manifest = model.artifact().manifest();
        if let Meter::Gpu(driver) = meter {
            let chip = &choose(&manifest.ptx, driver.facts())?.chip;
            let mut machine = backends::cuda::ptx::target(chip)?.machine;
            let stated = Some(machine.bandwidth);
            machine.bandwidth = meter.bandwidth(weight_bytes(&manifest.program), threads)?;
            let roof = Roof::on(&manifest.program, machine, format!("stated for {chip}"), threads)?;
            return Ok(Roof { device: driver.facts().name.clone(), stated, ..roof });
        }
        let Some(code) = manifest.code.iter().find(|code| runtime::missing(code).is_none()) else {
            bail!(Unsupported, "the artifact has no code for this machine");
        };
        let (priced, costs, peaks) = match machine::of_this_processor()? {
            Some(file) => {
                let priced = priced(&file.table, &manifest.program, threads);
                (priced, file.table.costs.clone(), machine::origin(&file.table))
            }
            None => (stated(&code.target, threads)?, Costs::default(), "stated".into()),
        };
        let bandwidth = meter.bandwidth(weight_bytes(&manifest.program), threads)?;
        let roof = Roof::on(&manifest.program, Machine { bandwidth, ..priced }, peaks, threads)?;
        Ok(Roof { priced: (priced, costs), ..roof })
    }

    /// The same, whose predictions are scaled by what was measured.
    pub fn with(self, costs: Costs) -> Roof {
        Roof { priced: (self.machine, costs), ..self }
    }

    /// Of a machine whose figures are known, `peaks` says from where. Nothing is measured.
    ///
    /// # Errors
    /// Where a kernel's body is no graph.
    pub fn on(program: &Program, machine: Machine, peaks: String, threads: usize) -> Result<Roof> {
        let bodies = program.kernels.iter().map(KernelSpec::body).collect::<Result<_>>()?;
        let (stated, device, priced) = (None, "cpu".into(), (machine, Costs::default()));
        Ok(Roof { machine, peaks, priced, stated, device, bodies, bytes: weight_bytes(program), threads })
    }

    /// Measures the bandwidth once more and keeps the larger: a neighbour takes some of it, nobody adds any.
    ///
    /// # Errors
    /// Where memory is refused.
    pub fn again(&mut self, meter: &Meter) -> Result<()> {
        self.machine.bandwidth = self.machine.bandwidth.max(meter.bandwidth(self.bytes, self.threads)?);
        Ok(())
    }

    /// What one launch of kernel `index` does in a step.
    pub fn work(&self, index: usize, step: &Workload) -> Work {
        let Some(body) = self.bodies.get(index) else { return Work::default() };
        step.work(body, &body.computed())
    }

    /// Seconds of one launch of kernel `index`, as decisions are priced.
    pub fn predicted(&self, index: usize, step: &Workload) -> f64 {
        let Some(body) = self.bodies.get(index) else { return 0.0 };
        let (machine, costs) = &self.priced;
        let seconds = passes::cost::kernel_seconds(body, &body.computed(), machine, step);
        passes::cost::filed(body).map_or(seconds, |filed| costs.price(&filed, step.tokens, seconds))
    }

    /// A kernel's body.
    pub fn body(&self, index: usize) -> Option<&Graph> {
        self.bodies.get(index)
    }

    /// The name of its kind.
    pub fn kind(&self, index: usize) -> &'static str {
        self.body(index).and_then(|body| kernel::kind_of(body).ok()).map_or("rows", KernelKind::name)
    }

    /// The least time of a whole step, every launch for itself; activations stay in caches that cost nothing.
    pub fn step_seconds(&self, program: &Program, step: &Workload) -> f64 {
        let Some(variant) = program.variant(step.tokens.ceil() as usize) else { return 0.0 };
        let mut launches: BTreeMap<usize, f64> = BTreeMap::new();
        for launch in &variant.launches {
            *launches.entry(launch.kernel.0 as usize).or_default() += 1.0;
        }
        let least = |kernel: usize| {
            let work = self.work(kernel, step);
            work.computing(&self.machine).max((work.weight_bytes + work.cache_bytes) / self.machine.bandwidth)
        };
        launches.into_iter().map(|(kernel, times)| times * least(kernel)).sum()
    }

    /// The least time of a launch, and why.
    pub fn least(&self, work: &Work) -> (f64, Bound) {
        let seconds = work.seconds(&self.machine);
        let times = [
            (work.f32_ops / self.machine.peak_f32, Bound::F32),
            (work.bf16_ops / self.machine.peak_bf16, Bound::Bf16),
            (work.i8_ops / self.machine.peak_i8, Bound::I8),
        ];
        let longest = times.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).map_or(Bound::F32, |(_, bound)| bound);
        let bound = if work.computing(&self.machine) < seconds { Bound::Memory } else { longest };
        (seconds, bound)
    }

    /// The rates, for the foot of a report.
    pub fn rates(&self) -> String {
        let Machine { bandwidth, peak_i8, peak_bf16, peak_f32, .. } = self.machine;
        let [bandwidth, peak_i8, peak_bf16, peak_f32] =
            [bandwidth, peak_i8, peak_bf16, peak_f32].map(|rate| rate / 1e9);
        let threads = match (self.stated, self.threads) {
            (Some(_), _) => self.device.clone(),
            (None, 1) => "1 thread".into(),
            (None, threads) => format!("{threads} threads"),
        };
        let how = match self.stated {
            Some(stated) => format!("read and written by a copy (measured in this run; stated {:.1})", stated / 1e9),
            None => "read (measured in this run)".into(),
        };
        let peaks = if self.peaks == "stated" { "stated, run `mansard probe`" } else { &self.peaks };
        format!(
            "roofline of {threads}: {bandwidth:.1} GB/s {how}; {peak_i8:.0} GOP/s int8, \
             {peak_bf16:.0} GFLOP/s bf16, {peak_f32:.0} GFLOP/s f32 (peaks: {peaks})\n"
        )
    }
}

/// What steps of a program are priced on: its weights are read again and again, from wherever they stay.
pub fn priced(table: &MachineTable, program: &Program, threads: usize) -> Machine {
    table.reading(threads, weight_bytes(program) as f64)
}

fn weight_bytes(program: &Program) -> usize {
    program.weights.iter().map(|w| w.bytes).sum()
}

/// The figures stated for a target, for so many workers.
pub fn stated(target: &str, threads: usize) -> Result<Machine> {
    let mut machine = backends::target(target)?.machine;
    let share = threads as f64 / machine.threads as f64;
    let Machine { peak_f32, peak_bf16, peak_i8, cache_bandwidth, near_bandwidth, near_bytes, .. } = &mut machine;
    for rate in [peak_f32, peak_bf16, peak_i8, cache_bandwidth, near_bandwidth, near_bytes] {
        *rate *= share;
    }
    Ok(machine)
}

/// Bytes per second that so many workers read of a buffer as large as the weights, on huge pages.
fn read_bandwidth(loops: &Loops, bytes: usize, threads: usize) -> Result<f64> {
    let bytes = bytes.max(measure::least(threads));
    let mut probe = Probe::new(&loops.image.bytes, &loops.image.offsets(), bytes, threads)?;
    measure::bandwidth(&mut probe, loops, bytes, READING)
}
