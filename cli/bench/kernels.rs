//! `mansard bench --kernels`: where the time of a prefill and of a decoded token goes, kernel by kernel.
//!
//! ```text
//! tg128: 3.010 ms, in steps for 1 to 8 tokens; threads: 2; waking them up: 0.012 ms
//! kernel                  launches      time  share   slowest  wait  GB/s  GOP/s   bound  of roof
//! layer_quantize_matmul         30  0.420 ms  14.0%  0.380 ms  9.0%  16.1   33.2  memory    61.0%
//! ```
//!
//! A kernel's time is that of its launches and of the waiting for the slowest worker after them, on average over workers, so
//! that the times of all kernels, and the workers' waking up, make the step. Figures are means over the faster half of the
//! steps: what a neighbour has held up is no property of a kernel.

use super::roof::{Bound, Roof};
use super::{deep, some_tokens};
use crate::report;
use mansard_ir::cost::{Work, Workload};
use mansard_ir::plan::Program;
use mansard_ir::{Result, bail};
use mansard_runtime::{Engine, Rows, StepProfile, Work as SequenceWork};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

/// One kernel's part of a test.
pub struct KernelRow {
    name: String,
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
}

/// A test's kernels, the longest first.
pub struct KernelTable {
    test: String,
    /// Ranges of `t` of the variants that ran.
    variants: Vec<(usize, usize)>,
    seconds: f64,
    /// Before the first launch of a step: workers wake up.
    start: f64,
    threads: usize,
    rows: Vec<KernelRow>,
}

/// What one kernel's launches took, and did.
#[derive(Clone, Copy, Default)]
struct Part {
    launches: usize,
    seconds: f64,
    slowest: f64,
    wait: f64,
    work: Work,
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
            part.work += roof.work(kernel, step);
        }
    }
}

/// Means over the faster half of the samples.
fn table(test: String, mut samples: Vec<Sample>, program: &Program, roof: &Roof, threads: usize) -> KernelTable {
    samples.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    samples.truncate(samples.len().div_ceil(2));
    let mean = |figure: &dyn Fn(&Sample) -> f64| samples.iter().map(figure).sum::<f64>() / samples.len() as f64;
    let kernels: BTreeMap<usize, Part> = samples.iter().flat_map(|s| s.parts.clone()).collect();
    let row = |(kernel, any): (&usize, &Part)| {
        let of = |figure: fn(&Part) -> f64| mean(&|s: &Sample| s.parts.get(kernel).map_or(0.0, figure));
        let work = Work {
            f32_ops: of(|p| p.work.f32_ops),
            i8_ops: of(|p| p.work.i8_ops),
            weight_bytes: of(|p| p.work.weight_bytes),
            cache_bytes: of(|p| p.work.cache_bytes),
            activation_bytes: of(|p| p.work.activation_bytes),
        };
        KernelRow {
            name: program.kernels[*kernel].name.clone(),
            launches: any.launches,
            seconds: of(|p| p.seconds),
            slowest: of(|p| p.slowest),
            wait: of(|p| p.wait),
            work,
            least: roof.least(&work),
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

/// Runs a step and adds where its time went.
fn profiled(engine: &mut Engine, roof: &Roof, sample: &mut Sample, work: SequenceWork<'_>) -> Result<()> {
    let (before, count) = (engine.length(work.sequence)? as f64, work.tokens.len() as f64);
    engine.step(&[work])?;
    let Some(profile) = engine.profile() else { bail!(Internal, "an engine without times") };
    let rows = work.rows.of(work.tokens.len()) as f64;
    // A token sees those before it and itself: over a step, on average, half of the step's own.
    let step = Workload { tokens: count, sequences: 1.0, rows, context: before + (count + 1.0) / 2.0 };
    sample.add(&engine.artifact().manifest().program, roof, &step, &profile);
    Ok(())
}

/// Kernels of a prefill of `count` tokens after `depth`, over `repetitions` after one to warm up.
///
/// # Errors
/// Where the context has no room.
pub fn prefill(
    engine: &mut Engine,
    roof: &Roof,
    count: usize,
    depth: usize,
    repetitions: usize,
) -> Result<KernelTable> {
    let artifact = engine.artifact().clone();
    let (program, tokens) = (&artifact.manifest().program, some_tokens(count, artifact.manifest().model.vocab));
    let sequence = deep(engine, depth)?;
    engine.prefill(sequence, &tokens)?;
    let mut samples = vec![];
    for _ in 0..repetitions {
        engine.truncate(sequence, depth)?;
        let mut sample = Sample::default();
        for chunk in tokens.chunks(program.limits.tokens) {
            let last = engine.length(sequence)? + chunk.len() == depth + count;
            let rows = if last { Rows::Last } else { Rows::None };
            profiled(engine, roof, &mut sample, SequenceWork { sequence, tokens: chunk, rows })?;
        }
        samples.push(sample);
    }
    engine.release(sequence)?;
    Ok(table(super::name("pp", count, depth), samples, program, roof, engine.threads()))
}

/// Kernels of one decoded token, over `count` tokens after `depth`, `repetitions` times after one to warm up.
///
/// # Errors
/// Where the context has no room.
pub fn decode(engine: &mut Engine, roof: &Roof, count: usize, depth: usize, repetitions: usize) -> Result<KernelTable> {
    let artifact = engine.artifact().clone();
    let (program, tokens) = (&artifact.manifest().program, some_tokens(count, artifact.manifest().model.vocab));
    let sequence = deep(engine, depth)?;
    let mut samples = vec![];
    for repetition in 0..=repetitions {
        engine.truncate(sequence, depth)?;
        for token in &tokens {
            let mut sample = Sample::default();
            profiled(engine, roof, &mut sample, SequenceWork { sequence, tokens: &[*token], rows: Rows::Last })?;
            if repetition > 0 {
                samples.push(sample);
            }
        }
    }
    engine.release(sequence)?;
    Ok(table(super::name("tg", count, depth), samples, program, roof, engine.threads()))
}

impl KernelRow {
    /// Bytes of weights and caches per second.
    fn bandwidth(&self) -> f64 {
        (self.work.weight_bytes + self.work.cache_bytes) / self.seconds
    }

    fn operations(&self) -> f64 {
        (self.work.f32_ops + self.work.i8_ops) / self.seconds
    }

    fn roof_share(&self) -> f64 {
        self.least.0 / self.seconds
    }
}

impl KernelTable {
    /// For people.
    pub fn text(&self) -> String {
        let head = ["kernel", "launches", "time", "share", "slowest", "wait", "GB/s", "GOP/s", "bound", "of roof"];
        let mut rows = vec![head.map(String::from).to_vec()];
        let ms = |seconds: f64| format!("{:.3} ms", seconds * 1e3);
        let percent = |share: f64| format!("{:.1}%", share * 100.0);
        rows.extend(self.rows.iter().map(|row| {
            vec![
                row.name.clone(),
                row.launches.to_string(),
                ms(row.seconds),
                percent(row.seconds / self.seconds),
                ms(row.slowest),
                percent(row.wait / row.seconds),
                format!("{:.1}", row.bandwidth() / 1e9),
                format!("{:.1}", row.operations() / 1e9),
                row.least.1.name().into(),
                percent(row.roof_share()),
            ]
        }));
        let variants: Vec<String> = self.variants.iter().map(|(min, max)| format!("{min} to {max}")).collect();
        format!(
            "{}: {}, in steps for {} tokens; threads: {}; waking them up: {}\n{}",
            self.test,
            ms(self.seconds),
            variants.join(", "),
            self.threads,
            ms(self.start),
            report::table(&rows)
        )
    }

    /// For programs.
    pub fn json(&self) -> serde_json::Value {
        let kernel = |row: &KernelRow| {
            json!({"kernel": row.name, "launches": row.launches, "seconds": row.seconds, "slowest_seconds": row.slowest,
                "wait_seconds": row.wait, "share": row.seconds / self.seconds, "weight_bytes": row.work.weight_bytes,
                "cache_bytes": row.work.cache_bytes, "activation_bytes": row.work.activation_bytes,
                "f32_ops": row.work.f32_ops, "i8_ops": row.work.i8_ops, "bytes_per_second": row.bandwidth(),
                "ops_per_second": row.operations(), "bound": row.least.1.name(), "roof_share": row.roof_share()})
        };
        json!({"test": self.test, "seconds": self.seconds, "start_seconds": self.start, "threads": self.threads, "step_tokens": self.variants,
            "kernels": self.rows.iter().map(kernel).collect::<Vec<_>>()})
    }
}
