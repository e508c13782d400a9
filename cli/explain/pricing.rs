//! Each kernel's operations, bytes and time while a prompt is read and while a token is written: the table of a roofline.
//!
//! ```text
//! least = max(operations / peak, bytes / bandwidth)      predicted: as decisions are priced      measured: --measure
//! share of roof = least / measured, or / predicted where nothing was measured
//! ```

use crate::bench::kernels::{self, KernelTable, Misses};
use crate::bench::roof::Roof;
use crate::bench::steps::{Kind, Part, Runner, Test, workload};
use mansard_ir::cost::Work;
use mansard_ir::plan::{Limits, Program};
use mansard_ir::{Machine, Result, Traffic};
use mansard_runtime::{EngineOptions, Model};
use serde::Serialize;
use std::collections::BTreeMap;

/// Tokens that are written where that is measured.
const WRITTEN: usize = 32;

/// All of a prompt, or one token of each sequence.
#[derive(Debug, Serialize)]
pub struct Phase {
    /// `reading 512 tokens`.
    pub name: String,
    /// The same in a word: `prefill`, `decode`.
    pub kind: &'static str,
    /// Tokens of all sequences.
    pub tokens: usize,
    /// Positions before the first of them.
    pub depth: usize,
    /// The longest first.
    pub kernels: Vec<Row>,
    /// Together.
    pub total: Row,
    /// Share of the predicted time that contractions, attention and the rest take.
    pub parts: BTreeMap<&'static str, f64>,
    /// How far predictions are off, where kernels were measured.
    pub misses: Option<Misses>,
}

/// One kernel, all its launches together.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// Number in the phase, from 1; 0 for the sum.
    pub number: usize,
    /// Name of the kernel.
    pub kernel: String,
    /// What its anchor is.
    pub kind: String,
    /// Times it is launched.
    pub launches: usize,
    /// A multiply-add is two.
    pub operations: f64,
    /// The type of most of them: `f32`, `bf16`, `int8`.
    pub computes: String,
    /// Bytes of weights read.
    pub weight_bytes: f64,
    /// Bytes of activations read and written.
    pub activation_bytes: f64,
    /// Bytes of caches read and written.
    pub cache_bytes: f64,
    /// Operations a byte of weights, activations and caches.
    pub intensity: f64,
    /// Where the machine's roof bends for such operations.
    pub ridge: f64,
    /// What the roof is for it: `memory`, `f32`, `bf16`, `int8`.
    pub bound: String,
    /// The least seconds.
    pub least: f64,
    /// Seconds.
    pub predicted: f64,
    /// Seconds: what a launch takes in a quarter of the steps, of all its launches.
    pub measured: Option<f64>,
    /// Least time as a share of that measured, or predicted.
    pub roof_share: f64,
}

/// The tests that stand for a workload, as far as the artifact's limits allow.
pub fn tests(traffic: &Traffic, limits: &Limits, encoder: bool) -> Vec<Test> {
    let longest = if encoder { limits.context.min(limits.tokens) } else { limits.context };
    let count = traffic.prompt.min(longest);
    let depth = if encoder { 0 } else { traffic.context.min(longest - count) };
    let reading = Test { kind: Kind::Prefill, count, batch: 1, depth };
    let count = traffic.generate.min(WRITTEN).min(longest.saturating_sub(1));
    let middle = (traffic.context + traffic.prompt + traffic.generate / 2).saturating_sub(count / 2);
    let batch = traffic.batch.min(limits.sequences.min(limits.rows).min(limits.tokens));
    let writing = Test { kind: Kind::Decode, count, batch, depth: middle.min(longest - count) };
    [reading, writing].into_iter().filter(|t| t.count > 0 && !(encoder && t.kind == Kind::Decode)).collect()
}

/// Times every kernel of the tests.
///
/// # Errors
/// Where the artifact does not run here, or memory is refused.
pub fn measure(model: &Model, roof: &Roof, tests: &[Test], threads: usize, times: usize) -> Result<Vec<KernelTable>> {
    let most = tests.iter().map(|t| t.length().next_multiple_of(mansard_ir::layout::CACHE_BLOCK) * t.batch).max();
    let positions = most.map(|most| most + mansard_ir::layout::CACHE_BLOCK);
    let options = EngineOptions { threads: Some(threads), positions, profile: true, ..EngineOptions::default() };
    let mut runner = Runner::new(model.engine(&options)?, model)?;
    tests.iter().map(|test| kernels::measure(&mut runner, roof, test, times)).collect()
}

/// What each test comes to.
pub fn phases(
    program: &Program,
    encoder: bool,
    roof: &Roof,
    tests: &[Test],
    measured: Option<&[KernelTable]>,
) -> Vec<Phase> {
    let table = |index: usize| measured.and_then(|tables| tables.get(index));
    tests.iter().enumerate().map(|(index, test)| phase(program, encoder, roof, test, table(index))).collect()
}

fn phase(program: &Program, encoder: bool, roof: &Roof, test: &Test, measured: Option<&KernelTable>) -> Phase {
    let steps = test.steps(&program.limits, encoder);
    // Of steps that write a token each, the one in the middle stands for all.
    let middle = steps.len() / 2;
    let counted = if test.kind == Kind::Decode { &steps[middle..=middle] } else { &steps[..] };
    let known: BTreeMap<&str, f64> =
        measured.iter().flat_map(|t| t.predictions()).map(|p| (p.kernel, p.measured)).collect();
    let mut kernels = rows(program, encoder, roof, counted);
    for row in &mut kernels {
        row.measured = known.get(row.kernel.as_str()).copied();
        row.roof_share = row.least / row.measured.unwrap_or(row.predicted);
    }
    let time = |row: &Row| row.measured.unwrap_or(row.predicted);
    kernels.sort_by(|a, b| time(b).total_cmp(&time(a)));
    kernels.iter_mut().enumerate().for_each(|(i, row)| row.number = i + 1);
    let total = total(&kernels, &roof.machine);
    let mut parts = BTreeMap::new();
    for row in &kernels {
        let part = match row.kind.as_str() {
            "attend" => "attention",
            "rows" | "pool" => "other",
            _ => "contractions",
        };
        *parts.entry(part).or_default() += row.predicted / total.predicted;
    }
    let pairs = kernels.iter().filter_map(|row| Some((row.predicted, row.measured?)));
    let misses = measured.map(|_| Misses::of(pairs));
    let (kind, name) = match (test.kind, test.batch) {
        (Kind::Prefill, _) => ("prefill", format!("reading {} tokens", test.count)),
        (Kind::Decode, 1) => ("decode", "writing a token".to_string()),
        (Kind::Decode, batch) => ("decode", format!("writing a token of each of {batch} sequences")),
    };
    let tokens = counted.iter().flatten().map(|part| part.count).sum();
    let depth = counted.iter().flatten().map(|part| part.before).min().unwrap_or(0);
    Phase { name, kind, tokens, depth, kernels, total, parts, misses }
}

/// Rows in order of the program, without what is measured.
fn rows(program: &Program, encoder: bool, roof: &Roof, steps: &[Vec<Part>]) -> Vec<Row> {
    let mut sums: BTreeMap<usize, (usize, Work, f64, f64)> = BTreeMap::new();
    for step in steps {
        let step = workload(step, encoder);
        let variant = program.variant(step.tokens.ceil() as usize);
        for launch in variant.iter().flat_map(|v| &v.launches) {
            let index = launch.kernel.0 as usize;
            let sum = sums.entry(index).or_default();
            sum.0 += 1;
            // Each launch for itself: whether a cache holds what it moves is a matter of its own bytes.
            let work = roof.work(index, &step);
            sum.1 += work;
            sum.2 += roof.predicted(index, &step);
            sum.3 += roof.least(&work).0;
        }
    }
    let row = |(index, (launches, work, predicted, least)): (usize, (usize, Work, f64, f64))| {
        let (_, bound) = roof.least(&(work * (1.0 / launches as f64)));
        let kind = roof.kind(index);
        let row = Row { kernel: program.kernels[index].name.clone(), kind: kind.into(), launches, ..Row::default() };
        Row { least, bound: bound.name().into(), predicted, ..filled(row, &work, &roof.machine) }
    };
    sums.into_iter().map(row).collect()
}

fn filled(row: Row, work: &Work, machine: &Machine) -> Row {
    let types = [(work.i8_ops, "int8", machine.peak_i8), (work.bf16_ops, "bf16", machine.peak_bf16)];
    let f32 = (work.f32_ops, "f32", machine.peak_f32);
    let (_, computes, peak) = types.into_iter().fold(f32, |most, of| if of.0 > most.0 { of } else { most });
    Row {
        operations: work.operations(),
        computes: computes.into(),
        weight_bytes: work.weight_bytes,
        activation_bytes: work.activation_bytes,
        cache_bytes: work.cache_bytes,
        intensity: if work.bytes() > 0.0 { work.operations() / work.bytes() } else { 0.0 },
        ridge: peak / machine.bandwidth,
        ..row
    }
}

fn total(rows: &[Row], machine: &Machine) -> Row {
    let sum = |of: fn(&Row) -> f64| rows.iter().map(of).sum::<f64>();
    let of_type = |name: &str| rows.iter().filter(|r| r.computes == name).map(|r| r.operations).sum::<f64>();
    let work = Work {
        f32_ops: of_type("f32"),
        bf16_ops: of_type("bf16"),
        i8_ops: of_type("int8"),
        weight_bytes: sum(|r| r.weight_bytes),
        cache_bytes: sum(|r| r.cache_bytes),
        activation_bytes: sum(|r| r.activation_bytes),
        ..Work::default()
    };
    let measured: Option<f64> = rows.iter().map(|r| r.measured).sum();
    let (least, predicted) = (sum(|r| r.least), sum(|r| r.predicted));
    let bound = if work.computing(machine) > work.moving(machine) { "computing" } else { "memory" };
    let row = Row { kernel: "all".into(), launches: rows.iter().map(|r| r.launches).sum(), ..Row::default() };
    let roof_share = least / measured.unwrap_or(predicted);
    Row { bound: bound.into(), least, predicted, measured, roof_share, ..filled(row, &work, machine) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { tokens: 512, rows: 128, sequences: 64, context: 256, tile: 4 };

    #[test]
    fn tests_keep_within_the_limits() {
        for traffic in ["prompt=512,generate=128", "generate=1000,batch=100", "prompt=3,context=9999", "prompt=1"] {
            let traffic: Traffic = traffic.parse().unwrap();
            for (encoder, limits) in [(false, LIMITS), (true, LIMITS), (false, Limits { context: 1, ..LIMITS })] {
                for test in tests(&traffic, &limits, encoder) {
                    test.check(&limits, encoder).unwrap();
                }
            }
        }
        let chat = tests(&Traffic::default(), &Limits { context: 2048, ..LIMITS }, false);
        assert_eq!(chat.iter().map(Test::name).collect::<Vec<_>>(), ["pp512", "tg32 @ d560"]);
    }
}
