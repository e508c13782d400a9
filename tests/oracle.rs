//! Compiled code against the interpreter.
//!
//! ```text
//!  model -- passes --> optimized model -- interpreter ----------------------------> rows that are wanted
//!                                     \-- plan, code, artifact, engine -----------> rows that are found
//!                                     \-- interpreter, a little noise before each
//!                                         rounding and routing (a few times) -----> how far noise moves a row
//! ```
//!
//! Sums in another order differ in the last digits. Where such a value lies between two int8 codes, or two experts are
//! equally likely, either choice is right, and what follows differs by far more than a rounding. So a row may be off by a
//! fixed share of the largest value plus a multiple of what noise at those places does to it: the bound follows from the
//! program, step by step, and is the fixed share where nothing is rounded or routed.

use mansard::driver::{CompileOptions, pass_options};
use mansard_ir::eval::{Interpreter, Tensor};
use mansard_ir::model::{Source, Weight};
use mansard_ir::ops::Class;
use mansard_ir::sample::Random;
use mansard_ir::{Attrs, Error, Kind, Model, Place, Result, Target, Type, ValueId};
use mansard_passes::{Event, Hooks};
use mansard_runtime::{Artifact, Engine, EngineOptions, OpenOptions, Rows, Work};
use std::sync::Arc;

/// Share of the largest value by which sums in another order, and f16 caches, may be off.
const ROUNDING: f32 = 2e-3;

/// Relative noise before a rounding or routing: a hundred times what reordered sums come to.
const NOISE: f32 = 2e-5;

/// Runs that show what noise does.
const NOISY_RUNS: u64 = 4;

/// Multiple of what they show that is allowed.
const SPREADS: f32 = 4.0;

/// How a comparison went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreement {
    /// Largest difference, as a share of the largest value.
    pub off: f32,
    /// Largest bound that applied, as such a share: of 1 or more, and nothing was checked.
    pub bound: f32,
}

/// Compiles `model` for `target`, runs the same steps through the engine and the interpreter, and compares every row.
///
/// # Errors
/// Whatever the pipeline says; or the first value that is further off than its bound.
pub fn check(model: Model, target: Target) -> Result<Agreement> {
    let folder = tempfile::tempdir().map_err(|e| Error::io("a temporary folder", e))?;
    let path = folder.path().join("model.mansard");
    let optimized = assemble(model, target, &path)?;
    let artifact = Arc::new(Artifact::open(&path, &OpenOptions::default())?);
    let mut engine = Engine::new(artifact, &EngineOptions { threads: Some(2), ..EngineOptions::default() })?;
    let noisy = (1..=NOISY_RUNS).filter(|_| is_discontinuous(&optimized)).map(|seed| jittered(&optimized, seed));
    let noisy = noisy.collect::<Result<Vec<Model>>>()?;
    let mut oracle = Interpreter::new(&optimized);
    let mut spreading: Vec<Interpreter<'_>> = noisy.iter().map(Interpreter::new).collect();
    let sequences = [engine.new_sequence(), engine.new_sequence()];
    let mut agreement = Agreement::default();
    for (index, tokens) in steps(optimized.info.vocab).iter().enumerate() {
        let keyed: Vec<(usize, &[u32])> =
            tokens.iter().enumerate().filter(|(_, t)| !t.is_empty()).map(|(i, t)| (i, t.as_slice())).collect();
        let rows: Vec<usize> = (0..keyed.iter().map(|(_, t)| t.len()).sum()).collect();
        let want = oracle.step(&keyed, &rows)?;
        let spread = spreading.iter_mut().map(|o| o.step(&keyed, &rows)).collect::<Result<Vec<_>>>()?;
        let work: Vec<Work<'_>> =
            keyed.iter().map(|(i, tokens)| Work { sequence: sequences[*i], tokens, rows: Rows::All }).collect();
        let found = engine.step(&work)?;
        for (name, want) in &want {
            let spread: Vec<&Tensor> = spread.iter().map(|s| &s[name]).collect();
            let found: Vec<&[f32]> = found.rows(name)?.iter().collect();
            rows_agree(want, &spread, &found, &mut agreement)
                .at(|| format!("step {index} of {} tokens: `{name}`", rows.len()))?;
        }
    }
    Ok(agreement)
}

/// Steps of two sequences: every range of tokens that kernels are chosen for, caches longer than a cache block, decodes
/// beside prompts.
fn steps(vocab: usize) -> Vec<[Vec<u32>; 2]> {
    let tokens = |n: usize, from: usize| -> Vec<u32> { (0..n).map(|i| ((from + 7 * i) % vocab) as u32).collect() };
    vec![
        [tokens(3, 1), vec![]],
        [tokens(1, 5), tokens(11, 2)],
        [tokens(1, 9), tokens(1, 4)],
        [vec![], tokens(1, 3)],
        [tokens(70, 11), vec![]],
        [tokens(1, 6), tokens(2, 8)],
    ]
}

/// Compiles a model in memory into an artifact; returns the model as the search left it.
///
/// # Errors
/// Whatever a pass or the backend says.
pub fn assemble(model: Model, target: Target, path: &std::path::Path) -> Result<Model> {
    let mut sink = |_: Event<'_>| {};
    let options = pass_options(target.clone(), &CompileOptions::default());
    let (plan, optimized, _) = mansard_passes::compile(model, &options, &mut Hooks::new(&mut sink))?;
    let image = mansard_backends::compile(&plan, &target, 2, &mut |_, _| {})?;
    let contents = mansard_backends::artifact::Contents {
        plan: &plan,
        info: &optimized.info,
        weights: &optimized.weights,
        images: &[(target, image)],
        provenance: &Default::default(),
    };
    mansard_backends::artifact::write(path, &contents, 2, &mut |_, _| {})?;
    Ok(optimized)
}

fn rows_agree(want: &Tensor, noisy: &[&Tensor], found: &[&[f32]], agreement: &mut Agreement) -> Result<()> {
    let largest = want.data.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
    let width = want.width();
    if found.len() * width != want.data.len() {
        return Err(Error::new(Kind::Internal, format!("{} rows of {width}, found {}", want.shape[0], found.len())));
    }
    for (r, row) in found.iter().enumerate() {
        let span = r * width..(r + 1) * width;
        let expected = &want.data[span.clone()];
        let distance = |other: &[f32]| expected.iter().zip(other).fold(0.0, |most, (x, y)| (x - y).abs().max(most));
        let spread = noisy.iter().map(|n| distance(&n.data[span.clone()])).fold(0.0, f32::max);
        let bound = ROUNDING + SPREADS * spread / largest;
        agreement.bound = agreement.bound.max(bound);
        for (c, (x, y)) in row.iter().zip(expected).enumerate() {
            let off = (x - y).abs() / largest;
            agreement.off = agreement.off.max(off);
            // written so that a NaN fails
            if !(off <= bound) {
                let message = format!("[{r}, {c}]: expected {y}, found {x}: off by {off} of {largest}, bound {bound}");
                return Err(Error::new(Kind::Internal, message));
            }
        }
    }
    Ok(())
}

fn jumps(class: Class) -> bool {
    matches!(class, Class::Quantize | Class::Route)
}

fn is_discontinuous(model: &Model) -> bool {
    model.graphs.iter().flat_map(|g| &g.nodes).any(|n| jumps(n.op.class()))
}

/// The model with a little noise, the same for every token, before each rounding and routing.
fn jittered(model: &Model, seed: u64) -> Result<Model> {
    let mut out = model.clone();
    for (index, graph) in model.graphs.iter().enumerate() {
        let mut next = mansard_ir::Graph::new(&graph.name);
        (next.range, next.inputs) = (graph.range, graph.inputs.clone());
        let mut to: Vec<ValueId> = graph.values().collect();
        for (i, node) in graph.nodes.iter().enumerate() {
            let mut operands: Vec<ValueId> = node.operands.iter().map(|o| to[o.0 as usize]).collect();
            if jumps(node.op.class()) {
                for (op, around) in [("mul_row", 1.0), ("add_row", 0.0)] {
                    let name = format!("{op} noise {index} {i}");
                    let width = next.ty(operands[0]).as_tensor().and_then(|(_, shape)| shape.last().copied());
                    let ty = Type::f32(width.into_iter().collect::<Vec<_>>());
                    let weight = next.weight(&name, ty.clone());
                    operands[0] = next.push(op, &[operands[0], weight], Attrs::none())?;
                    for call in model.calls.iter().filter(|c| c.graph == graph.name) {
                        let full = format!("{}{name}", call.prefix);
                        let mut random = Random::named(seed, &full);
                        let mut weight = Weight { ty: ty.clone(), source: Source::Synthetic { seed } };
                        let values = (0..weight.rows_columns().1).map(|_| around + NOISE * random.real());
                        weight.source = Source::Values(values.collect());
                        out.weights.insert(full, weight);
                    }
                }
            }
            to[graph.value_of(i).0 as usize] = match node.op {
                mansard_ir::Op::WEIGHT => next.weight(node.attrs.str("name"), node.ty.clone()),
                op => next.push_op(op, &operands, node.attrs.clone())?,
            };
        }
        next.results = graph.results.iter().map(|(n, v)| (n.clone(), to[v.0 as usize])).collect();
        out.graphs[index] = next;
    }
    Ok(out)
}
