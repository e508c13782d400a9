//! `compile --tune`: what may be chosen for a kernel is timed in the model itself, and what is fastest is chosen.
//!
//! ```text
//! for each respect (register tiles, cache tiles, prefetching)
//!   an artifact with an image for each alternative, every kernel of it having its own i-th
//!     steps of 1, 3, 8, 9, 67, 512 tokens of each image in turn  ->  nanoseconds of each kernel's launches
//!   for each kernel the choice of the fastest image, where it is clearly faster than the one before
//! ```
//!
//! Kernels do not meet in a measurement but by the caches they leave behind, so one round decides for all of them. They run
//! as they will: on the model's weights, between their neighbours, on all workers. The least time over the repetitions
//! counts, for a neighbour on the machine can only add.

use crate::driver::Progress;
use mansard_backends as backends;
use mansard_backends::cpu::{Respect, alternatives};
use mansard_ir::artifact::Provenance;
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::plan::{Limits, Plan};
use mansard_ir::tuning::{Measured, Tuned};
use mansard_ir::{Choice, Error, Kind, Model, Result, Target, TokenRange, Tuning, bail};
use mansard_runtime::{self as runtime, Engine, EngineOptions, Rows, Work};
use std::path::Path;

/// Times each step is run, after once to warm up.
const REPETITIONS: usize = 8;

/// What another choice must save on the whole to be taken, and lose in no step: less is noise.
const CLEARLY: f64 = 0.03;

/// What is tuned.
pub struct Subject<'a> {
    /// Its kernels.
    pub plan: &'a Plan,
    /// The model behind it.
    pub model: &'a Model,
    /// Threads of the compilation.
    pub threads: usize,
    /// Where the artifact will be: trial artifacts lie beside it for a while.
    pub output: &'a Path,
}

/// The choices that are faster here than the formulas', for targets that this machine can run.
///
/// # Errors
/// Where it cannot run one; and what compiling, writing and running trial artifacts can meet.
pub fn tune(subject: &Subject<'_>, targets: &[Target], progress: &mut dyn Progress) -> Result<Tuning> {
    for target in targets {
        if let Some(lacks) = runtime::lacking(&target.arch, &target.features) {
            let message = format!("--tune: code for `{}` cannot be timed here: {lacks}", target.name);
            return Err(Error::new(Kind::Unsupported, message)
                .help("tune on such a machine, and give what was found there with --tuning"));
        }
    }
    let mut tuning = Tuning::default();
    for target in targets {
        let mut chosen: Vec<Option<Tuned>> = vec![None; subject.plan.kernels.len()];
        for respect in Respect::ALL {
            round(subject, target, respect, &mut chosen, progress)?;
        }
        tuning.kernels.extend(chosen.into_iter().flatten());
    }
    Ok(tuning)
}

/// Decides one respect for every kernel.
fn round(
    subject: &Subject<'_>,
    target: &Target,
    respect: Respect,
    chosen: &mut [Option<Tuned>],
    progress: &mut dyn Progress,
) -> Result<()> {
    let kernels = &subject.plan.kernels;
    let of =
        |(kernel, tuned): (_, &Option<Tuned>)| alternatives(kernel, target, tuned.as_ref().map(|t| t.choice), respect);
    let tried: Vec<Vec<Choice>> = kernels.iter().zip(chosen.iter()).map(of).collect::<Result<_>>()?;
    let most = tried.iter().map(Vec::len).max().unwrap_or(0);
    if most == 0 {
        return Ok(());
    }
    // The first is what there is, and what the formulas say where that differs is the last.
    let trial = |i: usize| -> Tuning {
        let own = kernels.iter().zip(chosen.iter()).zip(&tried).filter_map(|((kernel, tuned), tried)| {
            let alternative = i.checked_sub(1).and_then(|i| tried.get(i)).map(|c| Tuned::new(kernel, target, *c));
            if i > most { None } else { alternative.or_else(|| tuned.clone()) }
        });
        Tuning { kernels: own.collect() }
    };
    let tuned_before = chosen.iter().any(Option::is_some);
    let trials: Vec<Tuning> = (0..=most + usize::from(tuned_before)).map(trial).collect();
    let times = measure(subject, target, respect, &trials, progress)?;
    for (index, kernel) in kernels.iter().enumerate() {
        let points = |trial: usize| times[trial].iter().map(move |(tokens, of)| (*tokens, of[index]));
        let saved = |trial: usize| {
            let ratios: Vec<f64> =
                points(trial).zip(points(0)).filter(|(_, b)| b.1 > 0).map(|(a, b)| ratio(a.1, b.1)).collect();
            let worst = ratios.iter().copied().fold(0.0, f64::max);
            if worst > CLEARLY { 0.0 } else { 1.0 - (ratios.iter().sum::<f64>() / ratios.len().max(1) as f64).exp() }
        };
        let best = (1..=tried[index].len()).max_by(|a, b| saved(*a).total_cmp(&saved(*b)));
        let Some(best) = best.filter(|best| saved(*best) > CLEARLY) else { continue };
        let formula = if tuned_before { most + 1 } else { 0 };
        let measured = points(best).zip(points(formula)).filter(|(_, f)| f.1 > 0);
        let measured = measured.map(|((tokens, nanoseconds), (_, formula_nanoseconds))| Measured {
            tokens,
            nanoseconds,
            formula_nanoseconds,
        });
        let tuned = Tuned::new(kernel, target, tried[index][best - 1]);
        chosen[index] = Some(Tuned { measured: measured.collect(), ..tuned });
    }
    Ok(())
}

/// Logarithm of a ratio of times.
fn ratio(a: u64, b: u64) -> f64 {
    (a.max(1) as f64 / b.max(1) as f64).ln()
}

/// Of a step of so many tokens, the nanoseconds of each kernel's launches; 0 for kernels that it does not launch.
type Times = Vec<(usize, Vec<u64>)>;

/// Times of each trial.
fn measure(
    subject: &Subject<'_>,
    target: &Target,
    respect: Respect,
    trials: &[Tuning],
    progress: &mut dyn Progress,
) -> Result<Vec<Times>> {
    let Subject { plan, model, threads, output } = *subject;
    progress.stage(respect.name(), trials.len() * (plan.kernels.len() + REPETITIONS));
    let mut images = vec![];
    for (index, tuning) in trials.iter().enumerate() {
        let mut advance = |done, _| progress.advance(index * plan.kernels.len() + done);
        let image = backends::compile(plan, target, tuning, threads, &mut advance)?;
        let name = format!("{}.{index}", target.name);
        images.push((Target { name, ..target.clone() }, image));
    }
    let folder = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file =
        tempfile::Builder::new().prefix(".mansard-tune-").tempfile_in(folder).map_err(|e| Error::io(folder, e))?;
    let provenance = Provenance::default();
    let contents = backends::artifact::Contents {
        plan,
        info: &model.info,
        weights: &model.weights,
        images: &images,
        ptx: &[],
        synthetic: None,
        provenance: &provenance,
    };
    backends::artifact::write(file.path(), &contents, threads, &mut |_, _| {})?;
    let opened = runtime::Model::open(file.path())?;
    let points = points(plan);
    let mut engines = vec![];
    for image in 0..images.len() {
        let positions = Some(
            points
                .iter()
                .map(|p| p.sequences * CACHE_BLOCK.max(p.each))
                .max()
                .unwrap_or(1)
                .next_multiple_of(CACHE_BLOCK),
        );
        engines.push(opened.engine(&EngineOptions {
            positions,
            profile: true,
            image: Some(image),
            ..EngineOptions::default()
        })?);
    }
    let unknown = vec![u64::MAX; plan.kernels.len()];
    let mut times: Vec<Times> =
        vec![points.iter().map(|p| (p.sequences * p.each, unknown.clone())).collect(); images.len()];
    for repetition in 0..=REPETITIONS {
        for (engine, times) in engines.iter_mut().zip(&mut times) {
            for (point, (_, least)) in points.iter().zip(times) {
                let found = point.run(engine)?;
                if repetition > 0 {
                    least.iter_mut().zip(found).for_each(|(least, found)| *least = found.min(*least));
                }
            }
        }
        progress.advance(trials.len() * (plan.kernels.len() + repetition));
    }
    Ok(times)
}

/// A step that kernels are timed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Point {
    sequences: usize,
    /// Tokens of each sequence.
    each: usize,
}

/// For each range of tokens its ends, and what lies between them by their ratio. Steps of few tokens decode that many
/// sequences, longer ones read one.
fn points(plan: &Plan) -> Vec<Point> {
    let Limits { tokens, rows, sequences, context, .. } = plan.program.limits;
    let encoder = plan.program.caches.is_empty();
    let most = sequences.min(rows);
    let mut points = vec![];
    for TokenRange { min, max } in plan.program.variants.iter().map(|v| v.tokens) {
        let max = max.min(tokens).min(if max > most || encoder { context } else { max });
        for count in [min, ((min * max) as f64).sqrt() as usize, max] {
            let decoded = count <= most && max <= most && !encoder;
            let point = if decoded { Point { sequences: count, each: 1 } } else { Point { sequences: 1, each: count } };
            if !points.contains(&point) && (min..=max).contains(&count) {
                points.push(point);
            }
        }
    }
    points
}

impl Point {
    /// Runs the step once; nanoseconds of each kernel's launches, of the worker that took longest in each.
    fn run(&self, engine: &mut Engine) -> Result<Vec<u64>> {
        let artifact = engine.artifact().clone();
        let (program, vocab) = (&artifact.manifest().program, artifact.manifest().model.vocab.max(1));
        let tokens: Vec<u32> = (0..self.each).map(|i| (i * 7919 % vocab) as u32).collect();
        let sequences: Vec<_> = (0..self.sequences).map(|_| engine.new_sequence()).collect();
        let work: Vec<Work<'_>> =
            sequences.iter().map(|s| Work { sequence: *s, tokens: &tokens, rows: Rows::Last }).collect();
        engine.step(&work)?;
        let Some(profile) = engine.profile() else { bail!(Internal, "an engine without times") };
        sequences.into_iter().try_for_each(|sequence| engine.release(sequence))?;
        let mut nanoseconds = vec![0; program.kernels.len()];
        for (launch, times) in program.variants[profile.variant].launches.iter().zip(&profile.launches) {
            nanoseconds[launch.kernel.0 as usize] += (times.slowest * 1e9) as u64;
        }
        Ok(nanoseconds)
    }
}
