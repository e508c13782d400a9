//! `mansard bench --kernels`: where the time of a prefill and of a decoded token goes, kernel by kernel.
//!
//! ```text
//! tg128: 3.010 ms, in steps for 1 to 8 tokens; threads: 2; waking them up: 0.012 ms
//! kernel                 tile  launches      time  share   slowest  wait  GB/s  GOP/s   bound  of roof  quartile  predicted
//! layer_quantize_matmul   8x1        30  0.420 ms  14.0%  0.380 ms  9.0%  16.1   33.2  memory    61.0%  0.400 ms   0.380 ms
//! ```
//!
//! A kernel's time is that of its launches and of the waiting for the slowest worker after them, on average over workers, so
//! that the times of all kernels, and the workers' waking up, make the step. Figures are means over the faster half of the
//! steps: what a neighbour has held up is no property of a kernel. Beside them stand the time that decisions are priced on, and
//! what that is compared with: every launch as fast as it was in a quarter of the steps.

use super::roof::{Bound, Roof};
use super::steps::{Kind, Runner, Test, workload};
use crate::report;
use mansard_ir::artifact::Manifest;
use mansard_ir::cost::{Work, Workload};
use mansard_ir::plan::Program;
use mansard_ir::{Result, bail};
use mansard_runtime::{StepProfile, missing};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// One kernel's part of a test.
pub struct KernelRow {
    name: String,
    /// Tokens by strips of its register tile; empty where it has none.
    tile: String,
    launches: usize,
    /// Busy and waiting, on average over workers.
    seconds: f64,
    /// Of the worker that took longest in each launch.
    slowest: f64,
    /// Waiting alone.
    wait: f64,
    work: Work,
    /// The least time, and why.
    least: (f64, Bound),
    /// What decisions are priced on.
    predicted: f64,
    /// Each launch as fast as it was in a quarter of the samples.
    quartile: f64,
}

/// A test's kernels, the longest first.
pub struct KernelTable {
    test: Test,
    /// Ranges of `t` of the variants that ran.
    variants: Vec<(usize, usize)>,
    seconds: f64,
    /// Before the first launch of a step: workers wake up.
    start: f64,
    threads: usize,
    rows: Vec<KernelRow>,
}

/// What all launches of a kernel were predicted and measured to take.
#[derive(Clone, Copy, Debug)]
pub struct Prediction<'a> {
    /// Its name.
    pub kernel: &'a str,
    /// Times it is launched.
    pub launches: usize,
    /// Seconds that decisions are priced on.
    pub predicted: f64,
    /// Seconds: of each launch what it takes in a quarter of the steps.
    pub measured: f64,
}

/// What one kernel's launches took, and did.
#[derive(Clone, Copy, Default)]
struct Part {
    launches: usize,
    seconds: f64,
    slowest: f64,
    wait: f64,
    work: Work,
    least: f64,
    predicted: f64,
}

/// A whole prefill, or one decoded token.
#[derive(Default)]
struct Sample {
    seconds: f64,
    start: f64,
    /// By index of the kernel.
    parts: BTreeMap<usize, Part>,
    /// Indices of the variants that ran.
    variants: BTreeSet<usize>,
    /// Kernel and time of each launch, in order.
    launches: Vec<(usize, f64)>,
}

impl Sample {
    fn add(&mut self, program: &Program, roof: &Roof, step: &Workload, profile: &StepProfile) {
        self.seconds += profile.seconds;
        self.start += profile.start;
        self.variants.insert(profile.variant);
        for (launch, times) in program.variants[profile.variant].launches.iter().zip(&profile.launches) {
            let kernel = launch.kernel.0 as usize;
            let part = self.parts.entry(kernel).or_default();
            part.launches += 1;
            part.seconds += times.busy + times.wait;
            part.slowest += times.slowest;
            part.wait += times.wait;
            let work = roof.work(kernel, step);
            part.work += work;
            part.least += roof.least(&work).0;
            part.predicted += roof.predicted(kernel, step);
            self.launches.push((kernel, times.busy + times.wait));
        }
    }
}

/// By kernel: each launch as fast as it was in a quarter of the samples; a neighbour can only add, but luck is no measure.
fn quartile(samples: &[Sample]) -> BTreeMap<usize, f64> {
    let mut out = BTreeMap::new();
    let first = samples.first().map_or(&[][..], |s| s.launches.as_slice());
    for (at, (kernel, _)) in first.iter().enumerate() {
        let same = samples.iter().filter_map(|s| s.launches.get(at)).filter(|(k, _)| k == kernel);
        let mut times: Vec<f64> = same.map(|(_, seconds)| *seconds).collect();
        times.sort_by(f64::total_cmp);
        *out.entry(*kernel).or_default() += times[times.len() / 4];
    }
    out
}

/// Means over the faster half of the samples.
fn table(test: Test, mut samples: Vec<Sample>, manifest: &Manifest, roof: &Roof, threads: usize) -> KernelTable {
    let program = &manifest.program;
    let quartile = quartile(&samples);
    let tiles = manifest.code.iter().find(|code| missing(code).is_none()).map(|code| &code.tiles);
    samples.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    samples.truncate(samples.len().div_ceil(2));
    let mean = |figure: &dyn Fn(&Sample) -> f64| samples.iter().map(figure).sum::<f64>() / samples.len() as f64;
    let kernels: BTreeMap<usize, Part> = samples.iter().flat_map(|s| s.parts.clone()).collect();
    let row = |(kernel, any): (&usize, &Part)| {
        let of = |figure: fn(&Part) -> f64| mean(&|s: &Sample| s.parts.get(kernel).map_or(0.0, figure));
        let mut work = Work::default();
        samples.iter().filter_map(|s| s.parts.get(kernel)).for_each(|part| work += part.work);
        let work = work * (1.0 / samples.len() as f64);
        KernelRow {
            name: program.kernels[*kernel].name.clone(),
            tile: tiles.and_then(|tiles| tiles.get(*kernel)).cloned().unwrap_or_default(),
            launches: any.launches,
            seconds: of(|p| p.seconds),
            slowest: of(|p| p.slowest),
            wait: of(|p| p.wait),
            work,
            least: (of(|p| p.least), roof.least(&(work * (1.0 / any.launches as f64))).1),
            predicted: of(|p| p.predicted),
            quartile: quartile.get(kernel).copied().unwrap_or(0.0),
        }
    };
    let mut rows: Vec<KernelRow> = kernels.iter().map(row).collect();
    rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let variants: BTreeSet<usize> = samples.iter().flat_map(|s| s.variants.clone()).collect();
    let range = |v: usize| (program.variants[v].tokens.min, program.variants[v].tokens.max);
    KernelTable {
        test,
        variants: variants.into_iter().map(range).collect(),
        seconds: mean(&|s| s.seconds),
        start: mean(&|s| s.start),
        threads,
        rows,
    }
}

/// Where the time of a test goes, `repetitions` times after one to warm up: of a whole prefill, or of each decoded step.
///
/// # Errors
/// Where the cache has no room.
pub fn measure(runner: &mut Runner, roof: &Roof, test: &Test, repetitions: usize) -> Result<KernelTable> {
    let artifact = runner.engine.artifact().clone();
    let manifest = artifact.manifest();
    let (program, encoder) = (&manifest.program, manifest.model.encoder);
    let steps = test.steps(&program.limits, encoder);
    let mut samples = vec![];
    for repetition in 0..=repetitions {
        let mut passed = vec![];
        runner.run(test, &steps, |engine, step| {
            let Some(profile) = engine.profile() else { bail!(Internal, "an engine without times") };
            if test.kind == Kind::Decode || passed.is_empty() {
                passed.push(Sample::default());
            }
            let work = workload(step, encoder);
            passed.last_mut().into_iter().for_each(|sample| sample.add(program, roof, &work, &profile));
            Ok(())
        })?;
        if repetition > 0 {
            samples.append(&mut passed);
        }
    }
    Ok(table(*test, samples, manifest, roof, runner.engine.threads()))
}

impl KernelRow {
    /// Bytes of weights and caches per second.
    fn bandwidth(&self) -> f64 {
        (self.work.weight_bytes + self.work.cache_bytes) / self.seconds
    }

    fn operations(&self) -> f64 {
        self.work.operations() / self.seconds
    }

    fn roof_share(&self) -> f64 {
        self.least.0 / self.seconds
    }
}

/// How far predictions are from what was measured, as shares of the latter.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Misses {
    /// Mean over kernels.
    pub mean: f64,
    /// The same weighted by measured time.
    pub weighted: f64,
}

impl Misses {
    /// Of pairs of predicted and measured seconds.
    pub fn of(pairs: impl Iterator<Item = (f64, f64)> + Clone) -> Misses {
        let count = pairs.clone().count().max(1) as f64;
        let measured: f64 = pairs.clone().map(|(_, m)| m).sum();
        let mean = pairs.clone().map(|(p, m)| (p - m).abs() / m).sum::<f64>() / count;
        Misses { mean, weighted: pairs.map(|(p, m)| (p - m).abs()).sum::<f64>() / measured }
    }
}

impl std::fmt::Display for Misses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [weighted, mean] = [self.weighted, self.mean].map(|share| share * 100.0);
        write!(f, "predictions are off by {weighted:.1}% of the time, by {mean:.1}% of a kernel's on average")
    }
}

impl KernelTable {
    /// What each kernel was predicted and measured to take.
    pub fn predictions(&self) -> impl Iterator<Item = Prediction<'_>> + Clone {
        self.rows.iter().map(|row| Prediction {
            kernel: &row.name,
            launches: row.launches,
            predicted: row.predicted,
            measured: row.quartile,
        })
    }

    /// How far predictions are off.
    pub fn misses(&self) -> Misses {
        Misses::of(self.predictions().map(|p| (p.predicted, p.measured)))
    }

    /// For people.
    pub fn text(&self) -> String {
        let head = [
            "kernel",
            "tile",
            "launches",
            "time",
            "share",
            "slowest",
            "wait",
            "GB/s",
            "GOP/s",
            "bound",
            "of roof",
            "quartile",
            "predicted",
        ];
        let mut rows = vec![head.map(String::from).to_vec()];
        let ms = |seconds: f64| format!("{:.3} ms", seconds * 1e3);
        let percent = |share: f64| format!("{:.1}%", share * 100.0);
        rows.extend(self.rows.iter().map(|row| {
            vec![
                row.name.clone(),
                row.tile.clone(),
                row.launches.to_string(),
                ms(row.seconds),
                percent(row.seconds / self.seconds),
                ms(row.slowest),
                percent(row.wait / row.seconds),
                format!("{:.1}", row.bandwidth() / 1e9),
                format!("{:.1}", row.operations() / 1e9),
                row.least.1.name().into(),
                percent(row.roof_share()),
                ms(row.quartile),
                ms(row.predicted),
            ]
        }));
        let variants: Vec<String> = self.variants.iter().map(|(min, max)| format!("{min} to {max}")).collect();
        format!(
            "{}: {}, in steps for {} tokens; threads: {}; waking them up: {}\n{}{}\n",
            self.test.name(),
            ms(self.seconds),
            variants.join(", "),
            self.threads,
            ms(self.start),
            report::table(&rows),
            self.misses()
        )
    }

    /// For programs.
    pub fn json(&self) -> serde_json::Value {
        let object = |row: &KernelRow| self.fields(row).into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        let kernels: Vec<serde_json::Map<String, Value>> = self.rows.iter().map(object).collect();
        json!({"test": self.test.name(), "tokens": self.test.count, "batch": self.test.batch, "depth": self.test.depth,
            "threads": self.threads, "misses": self.misses(), "seconds": self.seconds, "start_seconds": self.start, "step_tokens": self.variants,
            "kernels": kernels})
    }

    fn fields(&self, row: &KernelRow) -> [(&'static str, Value); 19] {
        [
            ("kernel", row.name.as_str().into()),
            ("tile", row.tile.as_str().into()),
            ("launches", row.launches.into()),
            ("seconds", row.seconds.into()),
            ("slowest_seconds", row.slowest.into()),
            ("wait_seconds", row.wait.into()),
            ("share", (row.seconds / self.seconds).into()),
            ("weight_bytes", row.work.weight_bytes.into()),
            ("cache_bytes", row.work.cache_bytes.into()),
            ("activation_bytes", row.work.activation_bytes.into()),
            ("f32_ops", row.work.f32_ops.into()),
            ("bf16_ops", row.work.bf16_ops.into()),
            ("i8_ops", row.work.i8_ops.into()),
            ("bytes_per_second", row.bandwidth().into()),
            ("ops_per_second", row.operations().into()),
            ("bound", row.least.1.name().into()),
            ("roof_share", row.roof_share().into()),
            ("quartile_seconds", row.quartile.into()),
            ("predicted_seconds", row.predicted.into()),
        ]
    }

    /// For spreadsheets: the test and its threads, then a kernel's fields.
    pub fn csv(&self) -> Vec<Vec<(&'static str, Value)>> {
        let test = [("test", self.test.name().into()), ("threads", self.threads.into())];
        self.rows.iter().map(|row| test.iter().cloned().chain(self.fields(row)).collect()).collect()
    }
}
