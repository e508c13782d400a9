//! `mansard bench`: prefill and decode speed as users of llama-bench know them, beside the roofline.
//!
//! ```text
//! -p 512 -n 128 -b 1,8 -d 0,2048 -t 1,2  ->  for each number of threads, depth and batch: pp512, tg128
//! ```
//!
//! With `--kernels`, where the time goes, kernel by kernel. What does not fit is refused before anything is measured.

pub mod kernels;
pub mod roof;
mod rows;
pub mod steps;

use crate::device;
use crate::eval;
use crate::report::{self, OpenArguments};
use mansard_ir::{Result, bail};
use mansard_runtime::device::Choice;
use mansard_runtime::{Engine, EngineOptions, Model, physical_cores};
use roof::{Meter, Roof};
use rows::{Form, Group, Row};
use std::path::PathBuf;
use std::time::Instant;
use steps::{Kind, Runner, Test};

/// Tokens that an artifact is compared on with the model of `--against`.
const COMPARED_TOKENS: usize = 512;

/// Measure speed: prefill (pp), decode (tg), and opening
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    artifact: PathBuf,
    /// Tokens of a prompt; 0 for no such row
    #[arg(short = 'p', long, value_name = "N,...", value_delimiter = ',', default_value = "512")]
    prompt: Vec<usize>,
    /// Tokens generated; 0 for no such row [default: 128; of an encoder 0]
    #[arg(short = 'n', long, value_name = "N,...", value_delimiter = ',')]
    generate: Vec<usize>,
    /// Sequences at once, each with a cache of its own
    #[arg(short = 'b', long, value_name = "N,...", value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// Tokens that are in each cache before
    #[arg(short = 'd', long, value_name = "N,...", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Worker threads [default: physical cores]
    #[arg(short = 't', long, value_name = "N,...", value_delimiter = ',')]
    threads: Vec<usize>,
    /// Times each is measured, after once to warm up
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Show where the time goes, kernel by kernel
    #[arg(long)]
    kernels: bool,
    /// Name the KL divergence from this artifact, or model compiled with every weight and cache in f32
    #[arg(long, value_name = "MODEL", conflicts_with = "kernels")]
    against: Option<PathBuf>,
    /// A file with a JSON list of token ids to compare on [default: the text of `eval`]
    #[arg(long, value_name = "FILE", requires = "against")]
    tokens_file: Option<PathBuf>,
    #[command(flatten)]
    opening: OpenArguments,
    /// How rows are printed
    #[arg(short, long, value_name = "FORM", default_value = "md")]
    output: Form,
}

/// Runs the command.
///
/// # Errors
/// Where the artifact does not open or the tests do not fit its limits.
pub fn run(arguments: &Arguments) -> Result<()> {
    let repetitions = arguments.repetitions;
    if repetitions == 0 {
        bail!(Usage, "-r: expected at least 1 repetition, found 0");
    }
    if arguments.opening.device != Choice::Cpu && !arguments.threads.is_empty() {
        bail!(Usage, "--threads is for CPUs, a GPU runs as many as it has");
    }
    let model = arguments.opening.open(&arguments.artifact)?;
    let tests = tests(&model, arguments)?;
    let divergence = divergence(&model, arguments)?;
    let bar = report::bar("tests", tests.len() * arguments.threads().len());
    let meter = Meter::new(&arguments.opening)?;
    let (mut tables, mut groups) = (vec![], vec![]);
    for threads in arguments.threads() {
        let mut roof = Roof::of(&model, &meter, threads)?;
        let engine = arguments.engine(&model, &meter, &arguments.options(threads, &tests))?;
        let mut runner = Runner::new(engine, &model)?;
        let mut rows = vec![];
        for test in &tests {
            match arguments.kernels {
                true => tables.push(kernels::measure(&mut runner, &roof, test, repetitions)?),
                false => rows.push(measure(&mut runner, test, repetitions)?),
            }
            bar.inc(1);
        }
        drop(runner);
        roof.again(&meter)?;
        rows.iter_mut().for_each(|row| row.least = least(&model, &roof, &row.test));
        let opening = if arguments.kernels { vec![] } else { open(arguments, &meter, threads)? };
        groups.push(Group { threads, roof, rows, opening });
    }
    bar.finish_and_clear();
    report::print(match (arguments.kernels, arguments.output) {
        (false, form) => rows::text(&model, &groups, divergence, form)?,
        (true, Form::Json) => report::json(&tables.iter().map(kernels::KernelTable::json).collect::<Vec<_>>())?,
        (true, Form::Csv) => rows::csv(tables.iter().flat_map(kernels::KernelTable::csv)),
        (true, Form::Md) => {
            let rates = groups.iter().map(|group| group.roof.rates()).collect::<String>();
            tables.iter().map(|table| table.text() + "\n").collect::<String>() + &rates
        }
    })
}

impl Arguments {
    /// One group of rows each; a GPU has one.
    fn threads(&self) -> Vec<usize> {
        if self.opening.device != Choice::Cpu {
            return vec![0];
        }
        if self.threads.is_empty() { vec![physical_cores()] } else { self.threads.clone() }
    }

    /// With caches for the largest test, and a cache block that sequences share until one writes to it.
    fn options(&self, threads: usize, tests: &[Test]) -> EngineOptions {
        let most = |figure: fn(&Test) -> usize| tests.iter().map(figure).max().unwrap_or(1);
        // Sequences take whole cache blocks.
        let each = most(Test::length).next_multiple_of(mansard_ir::layout::CACHE_BLOCK);
        let positions = Some(each * most(|test| test.batch) + mansard_ir::layout::CACHE_BLOCK);
        let threads = Some(threads).filter(|threads| *threads > 0);
        EngineOptions { positions, profile: self.kernels, ..self.opening.with_threads(threads).options() }
    }

    fn engine(&self, model: &Model, meter: &Meter, options: &EngineOptions) -> Result<Engine> {
        match meter {
            Meter::Cpu(_) => model.engine(options),
            Meter::Gpu(driver) => device::on_gpu(model, options, driver.clone()),
        }
    }
}

/// The matrix, checked against the model and its limits.
fn tests(model: &Model, arguments: &Arguments) -> Result<Vec<Test>> {
    let (encoder, limits) = (model.info().encoder, &model.artifact().manifest().program.limits);
    let generate = match arguments.generate.as_slice() {
        [] if encoder => &[0],
        [] => &[128],
        some => some,
    };
    if encoder && generate.iter().chain(&arguments.depth).any(|figure| *figure > 0) {
        bail!(Usage, "a {} model is an encoder: it has no decoding to measure", model.info().architecture);
    }
    if arguments.batch.contains(&0) {
        bail!(Usage, "-b: expected at least 1 sequence, found 0");
    }
    let mut tests = vec![];
    for depth in &arguments.depth {
        for batch in &arguments.batch {
            let test = |kind| move |count: &usize| Test { kind, count: *count, batch: *batch, depth: *depth };
            let prompts = arguments.prompt.iter().map(test(Kind::Prefill));
            tests.extend(prompts.chain(generate.iter().map(test(Kind::Decode))).filter(|test| test.count > 0));
        }
    }
    tests.iter().try_for_each(|test| test.check(limits, encoder))?;
    Ok(tests)
}

/// `--against`.
fn divergence(model: &Model, arguments: &Arguments) -> Result<Option<f64>> {
    let Some(against) = &arguments.against else { return Ok(None) };
    let request = eval::Request {
        text: None,
        tokens: arguments.tokens_file.as_deref(),
        against: Some(against),
        window: COMPARED_TOKENS,
        most: Some(COMPARED_TOKENS),
    };
    let threads = arguments.threads().into_iter().max().filter(|threads| *threads > 0);
    let engine = arguments.opening.with_threads(threads);
    let found = eval::measure(model, &engine, &request)?;
    Ok(found.divergence.map(|divergence| divergence.kl_divergence_mean))
}

fn measure(runner: &mut Runner, test: &Test, repetitions: usize) -> Result<Row> {
    let encoder = runner.engine.artifact().manifest().model.encoder;
    let steps = test.steps(runner.engine.limits(), encoder);
    let mut speeds = vec![];
    for _ in 0..=repetitions {
        speeds.push(test.tokens() as f64 / runner.run(test, &steps, |_, _| Ok(()))?);
    }
    speeds.remove(0); // the warm-up
    Ok(Row { test: *test, speeds, least: 0.0 })
}

/// The least time of a test.
fn least(model: &Model, roof: &Roof, test: &Test) -> f64 {
    let (encoder, program) = (model.info().encoder, &model.artifact().manifest().program);
    let steps = test.steps(&program.limits, encoder);
    steps.iter().map(|step| roof.step_seconds(program, &steps::workload(step, encoder))).sum()
}

/// Milliseconds from the file's name to an engine that could run: mapping, checking every hash, memory, workers.
fn open(arguments: &Arguments, meter: &Meter, threads: usize) -> Result<Vec<f64>> {
    let mut values = vec![];
    for _ in 0..=arguments.repetitions {
        let start = Instant::now();
        let model = arguments.opening.open(&arguments.artifact)?;
        let engine = arguments.engine(&model, meter, &arguments.options(threads, &[]))?;
        values.push(start.elapsed().as_secs_f64() * 1e3);
        drop(engine);
    }
    values.remove(0); // the warm-up
    Ok(values)
}
