//! `mansard bench`: prefill and decode speed as users of llama-bench know them, beside the roofline.
//!
//! With `--kernels`, where the time goes, kernel by kernel.

mod kernels;
mod roof;

use crate::report::{self, EngineArguments};
use mansard_ir::cost::Workload;
use mansard_ir::{Result, bail};
use mansard_runtime::{Engine, EngineOptions, Model, Rows, SequenceId, Work};
use roof::Roof;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

/// Measure speed: prefill (pp), decode (tg), and opening
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    artifact: PathBuf,
    /// Tokens of the prompt; 0 for no such row
    #[arg(short = 'p', long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens generated; 0 for no such row [default: 128; of an encoder 0]
    #[arg(short = 'n', long, value_name = "N")]
    generate: Option<usize>,
    /// Tokens that are in the cache before
    #[arg(short = 'd', long, value_name = "N", default_value_t = 0)]
    depth: usize,
    /// Times each is measured, after once to warm up
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Show where the time goes, kernel by kernel
    #[arg(long)]
    kernels: bool,
    #[command(flatten)]
    engine: EngineArguments,
    /// How rows are printed
    #[arg(short, long, value_name = "FORM", default_value = "md")]
    output: Form,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Form {
    Md,
    Json,
}

/// One measured row.
struct Row {
    test: String,
    /// Tokens per second of every repetition; of `open`: milliseconds.
    values: Vec<f64>,
    /// Share of the roofline, where there is one.
    roofline: Option<f64>,
}

impl Row {
    fn mean(&self) -> f64 {
        self.values.iter().sum::<f64>() / self.values.len() as f64
    }

    /// Of a sample: over one value less than there are.
    fn stddev(&self) -> f64 {
        let (mean, n) = (self.mean(), self.values.len());
        let squares: f64 = self.values.iter().map(|v| (v - mean).powi(2)).sum();
        if n < 2 { 0.0 } else { (squares / (n - 1) as f64).sqrt() }
    }
}

/// Runs the command.
///
/// # Errors
/// Where the artifact does not open or the tests do not fit its context.
pub fn run(arguments: &Arguments) -> Result<()> {
    if arguments.repetitions == 0 {
        bail!(Usage, "-r: expected at least 1 repetition, found 0");
    }
    let model = arguments.engine.open(&arguments.artifact)?;
    let encoder = model.info().encoder;
    let generate = arguments.generate.unwrap_or(if encoder { 0 } else { 128 });
    if encoder && (generate > 0 || arguments.depth > 0) {
        bail!(Usage, "a {} model is an encoder: it has no decoding to measure", model.info().architecture);
    }
    let mut engine = model.engine(&EngineOptions { profile: arguments.kernels, ..arguments.engine.options() })?;
    let roof = Roof::of(&model, engine.threads())?;
    if arguments.kernels {
        return where_time_goes(&mut engine, &roof, arguments, generate);
    }
    let mut rows = vec![];
    if arguments.prompt > 0 {
        rows.push(prefill(&mut engine, &roof, arguments)?);
    }
    if generate > 0 {
        rows.push(decode(&mut engine, &roof, arguments, generate)?);
    }
    let threads = engine.threads();
    drop(engine);
    rows.push(open(arguments)?);
    report::print(match arguments.output {
        Form::Md => markdown(&model, &rows, threads, &roof),
        Form::Json => report::json(&json_of(&rows, threads))?,
    })
}

/// `--kernels`.
fn where_time_goes(engine: &mut Engine, roof: &Roof, arguments: &Arguments, generate: usize) -> Result<()> {
    let Arguments { prompt, depth, repetitions, .. } = *arguments;
    let mut tables = vec![];
    if prompt > 0 {
        tables.push(kernels::prefill(engine, roof, prompt, depth, repetitions)?);
    }
    if generate > 0 {
        tables.push(kernels::decode(engine, roof, generate, depth, repetitions)?);
    }
    report::print(match arguments.output {
        Form::Md => tables.iter().map(|table| table.text() + "\n").collect::<String>() + &roof.rates(),
        Form::Json => report::json(&tables.iter().map(kernels::KernelTable::json).collect::<Vec<_>>())?,
    })
}

/// Tokens of no particular meaning, the same in every run.
fn some_tokens(count: usize, vocab: usize) -> Vec<u32> {
    (0..count as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % vocab as u32).collect()
}

/// A sequence with `depth` tokens in it.
fn deep(engine: &mut Engine, depth: usize) -> Result<SequenceId> {
    let sequence = engine.new_sequence();
    let vocab = engine.artifact().manifest().model.vocab;
    if depth > 0 {
        engine.prefill(sequence, &some_tokens(depth, vocab))?;
    }
    Ok(sequence)
}

fn name(test: &str, count: usize, depth: usize) -> String {
    if depth == 0 { format!("{test}{count}") } else { format!("{test}{count} @ d{depth}") }
}

fn prefill(engine: &mut Engine, roof: &Roof, arguments: &Arguments) -> Result<Row> {
    let Arguments { prompt, depth, repetitions, .. } = *arguments;
    let artifact = engine.artifact().clone();
    let tokens = some_tokens(prompt, artifact.manifest().model.vocab);
    let sequence = deep(engine, depth)?;
    let mut values = vec![];
    for _ in 0..=repetitions {
        engine.truncate(sequence, depth)?;
        let start = Instant::now();
        engine.prefill(sequence, &tokens)?;
        values.push(prompt as f64 / start.elapsed().as_secs_f64());
    }
    values.remove(0); // the warm-up
    engine.release(sequence)?;
    let program = &artifact.manifest().program;
    let most = program.limits.tokens;
    let step = |first: usize| {
        let count = most.min(prompt - first);
        let seen = depth + first + count.div_ceil(2); // by a token, on average
        Workload { rows: f64::from(u8::from(first + count == prompt)), ..Workload::one(count, seen) }
    };
    let seconds: f64 = (0..prompt).step_by(most).map(|first| roof.step_seconds(program, &step(first))).sum();
    let mut row = Row { test: name("pp", prompt, depth), values, roofline: None };
    row.roofline = Some(row.mean() * seconds / prompt as f64);
    Ok(row)
}

fn decode(engine: &mut Engine, roof: &Roof, arguments: &Arguments, count: usize) -> Result<Row> {
    let Arguments { depth, repetitions, .. } = *arguments;
    let artifact = engine.artifact().clone();
    let tokens = some_tokens(count, artifact.manifest().model.vocab);
    let context = engine.limits().context;
    if depth.saturating_add(count) > context {
        bail!(Usage, "{count} tokens after {depth} exceed the context of {context}");
    }
    let sequence = deep(engine, depth)?;
    let mut values = vec![];
    for _ in 0..=repetitions {
        engine.truncate(sequence, depth)?;
        let start = Instant::now();
        for token in &tokens {
            engine.step(&[Work { sequence, tokens: &[*token], rows: Rows::Last }])?;
        }
        values.push(count as f64 / start.elapsed().as_secs_f64());
    }
    values.remove(0); // the warm-up
    engine.release(sequence)?;
    let mut row = Row { test: name("tg", count, depth), values, roofline: None };
    let step = Workload::one(1, depth + count.div_ceil(2));
    row.roofline = Some(row.mean() * roof.step_seconds(&artifact.manifest().program, &step));
    Ok(row)
}

/// From the file's name to an engine that could run: mapping, checking every hash, memory, workers.
fn open(arguments: &Arguments) -> Result<Row> {
    let mut values = vec![];
    for _ in 0..=arguments.repetitions {
        let start = Instant::now();
        let model = arguments.engine.open(&arguments.artifact)?;
        let engine = model.engine(&arguments.engine.options())?;
        values.push(start.elapsed().as_secs_f64() * 1e3);
        drop(engine);
    }
    values.remove(0); // the warm-up
    Ok(Row { test: "open".into(), values, roofline: None })
}

fn markdown(model: &Model, rows: &[Row], threads: usize, roof: &Roof) -> String {
    let path = model.artifact().path();
    let stem = path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned());
    let size = report::bytes(model.artifact().file_bytes());
    let mut out =
        String::from("| model | size | threads | test | tokens/s | of roofline |\n|---|---:|---:|---:|---:|---:|\n");
    for row in rows {
        let figure = format!("{:.2} ± {:.2}", row.mean(), row.stddev());
        let (figure, share) = match row.roofline {
            Some(share) => (figure, format!("{:.0}%", share * 100.0)),
            None => (format!("{figure} ms"), String::new()),
        };
        out += &format!("| {stem} | {size} | {threads} | {} | {figure} | {share} |\n", row.test);
    }
    out + "\n" + &roof.rates()
}

/// Every row has the same fields, so that a reader needs no case for the time to open, which stands in each.
fn json_of(rows: &[Row], threads: usize) -> Vec<serde_json::Value> {
    let open = rows.iter().find(|row| row.roofline.is_none()).map(Row::mean);
    let timed = rows.iter().filter_map(|row| Some((row, row.roofline?)));
    let object = |(row, share): (&Row, f64)| {
        json!({"test": row.test, "tokens_per_second": row.mean(), "stddev": row.stddev(), "threads": threads,
            "roofline_share": share, "open_milliseconds": open})
    };
    timed.map(object).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_that_of_a_sample() {
        let row = Row { test: "pp1".into(), values: vec![2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0], roofline: None };
        assert_eq!(row.mean(), 5.0);
        assert!((row.stddev() - (32.0f64 / 7.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn tokens_are_in_the_vocabulary() {
        assert!(some_tokens(1000, 7).iter().all(|t| *t < 7));
    }
}
