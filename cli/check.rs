//! An artifact against the interpreter: layer by layer on a model's exact float weights, kernel by kernel on the packed ones.
//!
//! ```text
//!              artifact's launches, one by one                 interpreter, the model's graphs in float weights
//!  embed       x0 ------------------------------------------>  x0'
//!  layer 0     x1   <- off: f(x0) of the interpreter ------->  x1'  <- accumulated: from its own x0'
//!  layer 1     x2   <- off: f(x1) ...                          x2'
//! ```
//!
//! A layer is given what the artifact gave it, so what is off there happened there. Each kernel is compared once in each
//! range of tokens, with what its body computes from the memory that it read. Two steps of one sequence are looked at, some
//! tokens and then one, and for the other ranges of tokens a step of which only kernels are compared.

pub mod bisect;
mod distance;
mod layers;
mod trace;

pub use distance::{expected, of_layers as tolerance};
pub use trace::{Compared, KernelCheck};

use layers::{Loaded, Values};
use mansard_ir::eval::{Tensor, Value};
use mansard_ir::{Model, Place, Result, bail};
use mansard_runtime::{Artifact, Engine, EngineOptions, Rows, Work};
use serde::Serialize;
use std::sync::Arc;
use trace::{Recorded, Tracer};

/// What to check.
pub struct Request<'a> {
    /// The artifact.
    pub artifact: &'a Arc<Artifact>,
    /// The model it was made of, weights in exact floats.
    pub model: &'a Model,
    /// Tokens of a text; the last makes a step of its own.
    pub tokens: &'a [u32],
    /// How far a layer may be off; `None`: what the artifact's approximations come to.
    pub tolerance: Option<f64>,
    /// Hears how many calls of how many are done.
    pub progress: &'a dyn Fn(usize, usize),
}

/// One call of the model.
#[derive(Clone, Debug, Serialize)]
pub struct LayerCheck {
    /// `model.layers.3`, or the graph of a call without a prefix.
    pub layer: String,
    /// What is called.
    pub graph: String,
    /// How far its results are from the interpreter's on the same inputs, as a share of what the layer adds: root of the
    /// mean square over the tokens, of the result that is furthest.
    pub off: f64,
    /// The same where the interpreter has computed everything before as well, as a share of the whole.
    pub accumulated: f64,
    /// It is as near as it must be.
    pub holds: bool,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Tokens of the steps that layers were compared on.
    pub tokens: usize,
    /// How far a layer may be off.
    pub tolerance: f64,
    /// In order.
    pub layers: Vec<LayerCheck>,
    /// In the order they ran.
    pub kernels: Vec<KernelCheck>,
}

impl Report {
    /// Everything is as near as it must be.
    pub fn holds(&self) -> bool {
        self.layers.iter().all(|l| l.holds) && self.kernels.iter().all(KernelCheck::holds)
    }

    /// The layer that is furthest off.
    pub fn worst_layer(&self) -> Option<&LayerCheck> {
        self.layers.iter().max_by(|a, b| a.off.total_cmp(&b.off))
    }

    /// The kernel that is furthest off for what it may be.
    pub fn worst_kernel(&self) -> Option<&KernelCheck> {
        self.kernels.iter().max_by(|a, b| (a.off / a.tolerance).total_cmp(&(b.off / b.tolerance)))
    }
}

/// Compares layers and kernels.
///
/// # Errors
/// Where there are too few tokens, the artifact does not run here, or it was made of a model of another shape.
pub fn check(request: &Request<'_>) -> Result<Report> {
    let program = &request.artifact.manifest().program;
    let tolerance = request.tolerance.unwrap_or_else(|| distance::of_layers(program, request.model));
    let mut tracer = Tracer::new(program, Compared::First)?;
    let steps = record(request, &mut tracer)?;
    other_ranges(request, &mut tracer)?;
    let layers = compare(request.model, &steps, tolerance, request.progress)?;
    Ok(Report { tokens: request.tokens.len(), tolerance, layers, kernels: tracer.checks })
}

/// Compares layers alone.
///
/// # Errors
/// As [`check`].
pub fn layers(request: &Request<'_>) -> Result<Vec<LayerCheck>> {
    let program = &request.artifact.manifest().program;
    let tolerance = request.tolerance.unwrap_or_else(|| distance::of_layers(program, request.model));
    let steps = record(request, &mut Tracer::new(program, Compared::Nothing)?)?;
    compare(request.model, &steps, tolerance, request.progress)
}

fn engine(artifact: &Arc<Artifact>, tokens: usize) -> Result<Engine> {
    let positions = Some(tokens.next_multiple_of(mansard_ir::layout::CACHE_BLOCK));
    Engine::new(artifact.clone(), &EngineOptions { positions, ..EngineOptions::default() })
}

/// The steps that layers are compared on: all tokens but the last, then the last. An encoder reads all at once.
fn record(request: &Request<'_>, tracer: &mut Tracer<'_>) -> Result<Vec<Recorded>> {
    let program = &request.artifact.manifest().program;
    let (tokens, most) = (request.tokens, program.limits.tokens.min(program.limits.rows));
    if tokens.len() < 2 || tokens.len() > most {
        bail!(Usage, "expected 2 to {most} tokens, found {}", tokens.len());
    }
    let mut engine = engine(request.artifact, tokens.len())?;
    let sequence = engine.new_sequence();
    let last = if request.artifact.manifest().model.encoder { tokens.len() } else { tokens.len() - 1 };
    let (first, second) = tokens.split_at(last);
    let mut steps = vec![];
    for tokens in [first, second].into_iter().filter(|tokens| !tokens.is_empty()) {
        let work = [Work { sequence, tokens, rows: Rows::Last }];
        steps.push(tracer.step(&mut engine, &work, Some(request.model))?);
    }
    Ok(steps)
}

/// A step for each range of tokens, of which only kernels are compared that have not been.
fn other_ranges(request: &Request<'_>, tracer: &mut Tracer<'_>) -> Result<()> {
    let program = &request.artifact.manifest().program;
    for variant in &program.variants {
        let count = variant.tokens.min.min(program.limits.context);
        let tokens: Vec<u32> = request.tokens.iter().copied().cycle().take(count).collect();
        let mut engine = engine(request.artifact, count)?;
        let sequence = engine.new_sequence();
        tracer.step(&mut engine, &[Work { sequence, tokens: &tokens, rows: Rows::Last }], None)?;
    }
    Ok(())
}

/// Every call in the interpreter: on the artifact's values, and on its own.
fn compare(
    model: &Model,
    steps: &[Recorded],
    tolerance: f64,
    progress: &dyn Fn(usize, usize),
) -> Result<Vec<LayerCheck>> {
    let mut given: Vec<Values> = steps.iter().map(|step| step.given.clone()).collect();
    let mut own = given.clone();
    let mut out = vec![];
    for (index, call) in model.calls.iter().enumerate() {
        progress(index, model.calls.len());
        let place = || format!("layer {}", layers::name(call));
        let tokens = steps.first().map_or(1, |s| s.given["step"].step().map_or(1, |s| s.tokens()));
        let loaded = Loaded::new(model, call, tokens).at(place)?;
        // Both at once: they share nothing but the weights.
        let (forced, free) = std::thread::scope(|scope| {
            let forced = scope.spawn(|| results(&loaded, &given));
            let free = results(&loaded, &own);
            (forced.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), free)
        });
        let (forced, free) = (forced.at(place)?, free.at(place)?);
        let (mut off, mut accumulated) = (0f64, 0f64);
        for name in forced.first().into_iter().flat_map(Values::keys) {
            let (mut near, mut far) = (vec![], vec![]);
            for (step, recorded) in steps.iter().enumerate() {
                let Some(found) = recorded.results[index].get(name) else { continue };
                near.extend(distance::rows(found, &forced[step][name], stream(&given[step], name)));
                far.extend(distance::rows(found, &free[step][name], None));
            }
            (off, accumulated) = (off.max(distance::typical(&near)), accumulated.max(distance::typical(&far)));
        }
        for (step, recorded) in steps.iter().enumerate() {
            given[step].extend(recorded.results[index].clone());
            own[step].extend(free[step].clone());
        }
        let (layer, graph) = (layers::name(call).to_string(), call.graph.clone());
        out.push(LayerCheck { layer, graph, off, accumulated, holds: off <= tolerance });
    }
    Ok(out)
}

/// What a residual stream was before the layer: the layer's result is measured by what it adds.
fn stream<'a>(before: &'a Values, name: &str) -> Option<&'a Tensor> {
    match before.get(name) {
        Some(Value::Tensor(tensor)) => Some(tensor),
        _ => None,
    }
}

/// A call's results in each step, one after the other.
fn results(loaded: &Loaded<'_>, values: &[Values]) -> Result<Vec<Values>> {
    let (mut caches, mut out) = (Values::new(), vec![]);
    for values in values {
        let called = loaded.run(values, &caches)?;
        caches = called.caches;
        out.push(called.values);
    }
    Ok(out)
}
