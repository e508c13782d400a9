//! `compile --calibrate-cost`: the kernels that would be chosen are timed here, and their measured times overwrite what the
//! roofline says in a second search.
//!
//! ```text
//! compile -> time every kernel in each range of tokens -> factor by kind, format and range -> compile with these
//! ```
//!
//! What was measured is in the artifact's provenance; `--costs` takes it from there, or from what `inspect --costs` says of
//! it, so that the same inputs give the same bytes.

use crate::bench::kernels::Prediction;
use crate::bench::roof::{self, Roof};
use crate::bench::steps::{Kind, Test};
use crate::explain::pricing;
use crate::report;
use mansard::driver::{self, CompileOptions, Progress};
use mansard_backends as backends;
use mansard_ir::artifact::{Provenance, rounded};
use mansard_ir::costs::{Costs, Factor, Filed};
use mansard_ir::plan::Program;
use mansard_ir::{Error, Kind as ErrorKind, Result, Target, TokenRange};
use mansard_passes as passes;
use mansard_runtime::{self as runtime, Model, physical_cores};
use std::collections::BTreeMap;
use std::path::Path;

/// Times each step is run.
const REPETITIONS: usize = 8;

/// A range whose last number of tokens is so many times its first one is measured at two places.
const WIDE: usize = 8;

/// Steps that are decoded in a run.
const DECODED: usize = 8;

/// Positions before those of long sequences.
const DEPTH: usize = 512;

/// Times the kernels of the model at `input`, compiled with `options`.
///
/// # Errors
/// Where this machine cannot run the targets' code, and what compiling and running can meet.
pub fn measure(input: &Path, output: &Path, options: &CompileOptions, progress: &mut dyn Progress) -> Result<Costs> {
    let targets = backends::targets(&options.targets)?;
    for target in &targets {
        if let Some(lacks) = runtime::lacking(&target.arch, &target.features) {
            let message = format!("--calibrate-cost: code for `{}` cannot be timed here: {lacks}", target.name);
            return Err(Error::new(ErrorKind::Unsupported, message)
                .help("measure on such a machine, and give what was found there with --costs"));
        }
    }
    let folder = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let trial = tempfile::Builder::new().prefix(".mansard-costs-").tempfile_in(folder);
    let trial = trial.map_err(|e| Error::io(folder, e))?;
    let mut sink = |_: passes::Event<'_>| {};
    let unmeasured = CompileOptions { costs: Costs::default(), ..options.clone() };
    driver::compile(input, trial.path(), &unmeasured, progress, &mut passes::Hooks::new(&mut sink))?;
    progress.stage("time kernels", 0);
    let model = Model::open(trial.path())?;
    let (program, threads) = (&model.artifact().manifest().program, physical_cores());
    // The machine that decisions are priced on, whatever it has to do with this one.
    let machine = match &options.machine {
        Some(file) => roof::priced(&file.table, program, threads),
        None => driver::pass_options(Target::common(&targets)?, options).target.machine,
    };
    let roof = Roof::on(program, machine, String::new(), threads)?;
    let most = program.limits.tokens.min(program.limits.context);
    let ranges = program.variants.iter().flat_map(|variant| halves(variant.tokens, most));
    let tests: Vec<(TokenRange, Test)> =
        ranges.flat_map(|range| tests(program, range, model.info().encoder).map(move |test| (range, test))).collect();
    let only: Vec<Test> = tests.iter().map(|(_, test)| *test).collect();
    let tables = pricing::measure(&model, &roof, &only, threads, REPETITIONS)?;
    let mut samples: BTreeMap<(TokenRange, Filed), Vec<(f64, f64)>> = BTreeMap::new();
    for ((range, _), table) in tests.iter().zip(&tables) {
        for Prediction { kernel, launches, predicted, measured } in table.predictions() {
            let body = program.kernels.iter().position(|k| k.name == kernel).and_then(|index| roof.body(index));
            let Some(filed) = body.and_then(passes::cost::filed) else { continue };
            let each = |seconds: f64| seconds / launches as f64;
            samples.entry((*range, filed)).or_default().push((each(predicted), each(measured)));
        }
    }
    let fitted = samples.into_iter().filter_map(|((range, filed), of)| Factor::fit(filed, range, &of));
    let short = |f: Factor| Factor { launch_us: rounded(f.launch_us), factor: rounded(f.factor), ..f };
    Ok(Costs { factors: fitted.map(short).collect() })
}

/// A range, or two where its ends lie far apart: what a step does once for all its tokens weighs less in long ones.
fn halves(TokenRange { min, max }: TokenRange, most: usize) -> Vec<TokenRange> {
    let middle = middle(min, max.min(most));
    if max.min(most) < WIDE * min {
        return vec![TokenRange { min, max }];
    }
    vec![TokenRange { min, max: middle }, TokenRange { min: middle + 1, max }]
}

/// By their logarithms.
fn middle(min: usize, max: usize) -> usize {
    ((min * max) as f64).sqrt() as usize
}

/// Steps in the middle of a range: few tokens decode that many sequences, short ones and long ones, more read a prompt.
fn tests(program: &Program, TokenRange { min, max }: TokenRange, encoder: bool) -> impl Iterator<Item = Test> {
    let limits = program.limits;
    let max = max.min(limits.tokens).min(limits.context);
    let count = middle(min, max);
    let decoded = |depth| Test { kind: Kind::Decode, count: DECODED, batch: count, depth };
    let read = Test { kind: Kind::Prefill, count, batch: 1, depth: 0 };
    let fits = move |test: &Test| count > 0 && test.check(&limits, encoder).is_ok();
    let decodes = !encoder && max <= limits.sequences.min(limits.rows);
    let asked = if decodes { vec![decoded(0), decoded(DEPTH)] } else { vec![read] };
    let fitting: Vec<Test> = asked.into_iter().filter(fits).collect();
    let other = fitting.is_empty().then_some(read).filter(fits);
    fitting.into_iter().chain(other)
}

/// The costs in an artifact, or in JSON.
///
/// # Errors
/// Where it is neither.
pub fn read(path: &Path) -> Result<Costs> {
    let checked = |from: &Provenance| from.costs.check().map(|()| from.costs.clone());
    report::json_or_artifact(path, b'[', Costs::from_json, checked)
}

/// A table of factors.
pub fn table(costs: &Costs) -> String {
    let head = ["kernels", "format", "ops", "tokens", "launch", "measured / predicted"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(costs.factors.iter().map(|f| {
        let tokens = format!("{} to {}", f.tokens.min, f.tokens.max);
        let Filed { kind, format, ops } = f.of.clone();
        vec![kind, format, ops, tokens, format!("{:.2} us", f.launch_us), format!("{:.2}", f.factor)]
    }));
    report::table(&rows)
}
