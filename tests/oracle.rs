//! Compiled code against the interpreter.
//!
//! ```text
//!  model -- passes --> optimized model -- interpreter ----------------------------> rows that are wanted
//!                                     \-- plan, code, artifact, engine -----------> rows that are found
//!                                     \-- interpreter, a little noise before each
//!                                         rounding and routing, many times -------> how far noise moves a row
//! ```
//!
//! Sums in another order differ in the last digits. Where such a value lies between two int8 codes or two f16 numbers, or two
//! experts are equally likely, either choice is right, and what follows differs by far more than a rounding. So a row must
//! be as near as reordered sums come, or not much further than noise at those places alone moves it: runs with noise are
//! added until that is shown, and when they do not show it, the code is wrong.

use half::f16;
use mansard::driver::{CompileOptions, pass_options};
use mansard_backends::Image;
use mansard_ir::eval::{Interpreter, Tensor};
use mansard_ir::formats::Split;
use mansard_ir::model::{Source, Weight};
use mansard_ir::ops::Class;
use mansard_ir::plan::Plan;
use mansard_ir::sample::Random;
use mansard_ir::{
    Attrs, DType, Dim, Error, Graph, Input, Kind, Model, Node, Op, Result, Target, Tuning, Type, ValueId,
};
use mansard_passes::{Event, Hooks};
use mansard_runtime::{Artifact, Engine, EngineOptions, OpenOptions, Rows, Work};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Share of the largest value by which sums in another order may be off.
const ROUNDING: f32 = 1e-3;

/// The same where kernels round keys, weights and values to bf16, which the interpreter does not.
const HALVES: f32 = 1e-2;

/// Relative noise before a rounding or routing: a hundred times what reordered sums come to.
const NOISE: f32 = 2e-5;

/// Most runs with noise.
const NOISY_RUNS: u64 = 256;

/// Multiple of what noise does that is allowed.
const SPREADS: f32 = 2.0;

/// How a comparison went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreement {
    /// Largest difference, as a share of the largest value.
    pub off: f32,
    /// Largest bound that a row needed, as such a share: near 1, and nothing was checked.
    pub bound: f32,
    /// Runs with noise that it took.
    pub runs: u64,
}

/// Outputs by name, for each step.
type Outputs = Vec<BTreeMap<String, Tensor>>;

/// Compiles `model` for `target`, runs the same steps through the engine and the interpreter, and compares every row.
///
/// # Errors
/// Whatever the pipeline says; or the value that is further off than anything explains.
pub fn check(model: Model, target: Target, options: &CompileOptions) -> Result<Agreement> {
    check_against(model, target, options, |_| ())
}

/// [`check`] with another model for the interpreter: what `change` makes of the optimized one.
///
/// # Errors
/// As [`check`]; and those are the point: it shows which differences are found.
pub fn check_against(
    model: Model,
    target: Target,
    options: &CompileOptions,
    change: impl Fn(&mut Model),
) -> Result<Agreement> {
    let folder = tempfile::tempdir().map_err(|e| Error::io("a temporary folder", e))?;
    let path = folder.path().join("model.mansard");
    let optimized = assemble(model, target, options, &path)?;
    let steps = steps(&optimized);
    let found = engine(&path, &steps)?;
    let mut optimized = as_packed(&optimized)?;
    change(&mut optimized);
    let want = interpreter(&optimized, &steps)?;
    let rounding = if attends_in_bf16(&optimized) { HALVES } else { ROUNDING };
    let mut rows = compare(&want, &found)?;
    rows.iter_mut().for_each(|row| row.rounding = rounding);
    let off = rows.iter().map(|r| r.off).fold(0.0, f32::max);
    let mut agreement = Agreement { off, bound: rounding, runs: 0 };
    while let Some(worst) = rows.iter().filter(|r| !r.is_explained()).max_by(|a, b| a.off.total_cmp(&b.off)) {
        if agreement.runs == NOISY_RUNS || !jumps(&optimized) {
            let Row { place, off, spread, .. } = worst;
            let message = format!("{place}: off by {off:.2e} of the largest; noise moves it by {spread:.2e}");
            return Err(Error::new(Kind::Internal, message));
        }
        agreement.runs += 1;
        let noisy = interpreter(&jittered(&optimized, agreement.runs)?, &steps)?;
        for (row, moved) in rows.iter_mut().zip(compare(&want, &noisy)?) {
            row.spread = row.spread.max(moved.off);
        }
    }
    let needed = rows.iter().filter(|r| r.off > rounding).map(|r| r.bound());
    agreement.bound = needed.fold(rounding, f32::max);
    Ok(agreement)
}

fn attends_in_bf16(model: &Model) -> bool {
    let halves = |graph: &Graph, q| matches!(graph.ty(q).as_tensor(), Some((DType::BF16, _)));
    let attends =
        |graph: &Graph| graph.nodes.iter().any(|n| n.op.class() == Class::Attend && halves(graph, n.operands[0]));
    model.graphs.iter().any(attends)
}

/// Steps of two sequences: every range of tokens that kernels are chosen for, caches longer than a cache block, decodes
/// beside prompts; where caches keep a window, several cache blocks beyond it.
fn steps(model: &Model) -> Vec<[Vec<u32>; 2]> {
    let vocab = model.info.vocab;
    let tokens = |n: usize, from: usize| -> Vec<u32> { (0..n).map(|i| ((from + 7 * i) % vocab) as u32).collect() };
    let keeps = |input: &Input| matches!(input.ty, Type::Cache { window, .. } if window > 0);
    let mut steps = vec![
        [tokens(3, 1), vec![]],
        [tokens(1, 5), tokens(11, 2)],
        [tokens(1, 9), tokens(1, 4)],
        [vec![], tokens(1, 3)],
        [tokens(70, 11), vec![]],
        [tokens(1, 6), tokens(2, 8)],
    ];
    if model.graphs.iter().any(|graph| graph.inputs.iter().any(keeps)) {
        steps.extend([[tokens(100, 3), tokens(1, 5)], [tokens(60, 2), tokens(1, 7)], [tokens(9, 4), vec![]]]);
    }
    steps
}

/// Writes an artifact of a plan and the model it is of.
///
/// # Errors
/// Where the file cannot be written.
pub fn write(plan: &Plan, optimized: &Model, image: (Target, Image), path: &Path) -> Result<()> {
    let contents = mansard_backends::artifact::Contents {
        plan,
        info: &optimized.info,
        weights: &optimized.weights,
        images: &[image],
        ptx: &[],
        synthetic: None,
        provenance: &Default::default(),
    };
    mansard_backends::artifact::write(path, &contents, 2, &mut |_, _| {})?;
    Ok(())
}

/// Compiles a model in memory into an artifact; returns the model as the search left it.
///
/// # Errors
/// Whatever a pass or the backend says.
pub fn assemble(model: Model, target: Target, options: &CompileOptions, path: &Path) -> Result<Model> {
    let mut sink = |_: Event<'_>| {};
    let options = pass_options(target.clone(), options);
    let (plan, optimized, _) = mansard_passes::compile(model, &options, &mut Hooks::new(&mut sink))?;
    let image = mansard_backends::compile(&plan, &target, &Tuning::default(), 2, &mut |_, _| {})?;
    write(&plan, &optimized, (target, image), path)?;
    Ok(optimized)
}

fn engine(path: &Path, steps: &[[Vec<u32>; 2]]) -> Result<Outputs> {
    let artifact = Arc::new(Artifact::open(path, &OpenOptions::default())?);
    let names: Vec<String> = artifact.manifest().program.outputs.iter().map(|o| o.name.clone()).collect();
    let mut engine = Engine::new(artifact, &EngineOptions { threads: Some(2), ..EngineOptions::default() })?;
    let sequences = [engine.new_sequence(), engine.new_sequence()];
    let mut outputs = vec![];
    for step in steps {
        let work: Vec<Work<'_>> = sequences
            .into_iter()
            .zip(step)
            .filter(|(_, tokens)| !tokens.is_empty())
            .map(|(sequence, tokens)| Work { sequence, tokens, rows: Rows::All })
            .collect();
        let found = engine.step(&work)?;
        let tensor = |name: &String| {
            let rows: Vec<&[f32]> = found.rows(name)?.iter().collect();
            let width = rows.first().map_or(0, |r| r.len());
            Ok((name.clone(), Tensor::new([rows.len(), width], rows.concat())))
        };
        outputs.push(names.iter().map(tensor).collect::<Result<_>>()?);
    }
    Ok(outputs)
}

fn interpreter(model: &Model, steps: &[[Vec<u32>; 2]]) -> Result<Outputs> {
    let mut interpreter = Interpreter::new(model);
    let step = |tokens: &[Vec<u32>; 2]| {
        let sequences: Vec<(usize, &[u32])> =
            tokens.iter().enumerate().filter(|(_, t)| !t.is_empty()).map(|(i, t)| (i, t.as_slice())).collect();
        let rows: Vec<usize> = (0..sequences.iter().map(|(_, t)| t.len()).sum()).collect();
        interpreter.step(&sequences, &rows)
    };
    steps.iter().map(step).collect()
}

/// One row of one output of one step.
struct Row {
    place: String,
    /// Largest difference, as a share of the largest value of the output.
    off: f32,
    /// Largest difference that noise has made so far.
    spread: f32,
    /// What rounding alone may come to.
    rounding: f32,
}

impl Row {
    fn bound(&self) -> f32 {
        self.rounding + SPREADS * self.spread
    }

    /// A NaN is never explained.
    fn is_explained(&self) -> bool {
        self.off <= self.bound()
    }
}

fn compare(want: &Outputs, found: &Outputs) -> Result<Vec<Row>> {
    let mut rows = vec![];
    for (step, (want, found)) in want.iter().zip(found).enumerate() {
        for (name, want) in want {
            let found = &found[name];
            if found.shape != want.shape {
                let message = format!("step {step}: `{name}`: expected {:?}, found {:?}", want.shape, found.shape);
                return Err(Error::new(Kind::Internal, message));
            }
            let largest = want.data.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
            for (r, (x, y)) in want.rows().zip(found.rows()).enumerate() {
                let place = format!("step {step} of {} tokens: `{name}` row {r}", want.shape[0]);
                let differences = x.iter().zip(y).map(|(x, y)| (x - y).abs() / largest);
                // `f32::max` passes over a NaN, which is the furthest off of all.
                let off =
                    differences.fold(0.0, |most: f32, d| if (most + d).is_nan() { f32::NAN } else { most.max(d) });
                rows.push(Row { place, off, spread: 0.0, rounding: ROUNDING });
            }
        }
    }
    Ok(rows)
}

/// The model with the weights that kernels read: packing rounds each group's scale and minimum to f16.
fn as_packed(model: &Model) -> Result<Model> {
    let mut out = model.clone();
    for (name, weight) in model.weights.iter() {
        let format = weight.dtype_shape().0.format();
        let Some(int) = format.int else { continue };
        let (mut codes, groups) = (vec![0; format.block], format.block / int.group);
        let (mut scales, mut mins) = (vec![0.0; groups], vec![0.0; groups]);
        let (rows, columns) = weight.rows_columns();
        let mut values = Vec::with_capacity(rows * columns);
        for row in 0..rows {
            for bytes in weight.quantized_row(row)?.chunks_exact(format.block_bytes) {
                (format.split)(bytes, Split { codes: &mut codes, scales: &mut scales, mins: &mut mins });
                for (i, code) in codes.iter().enumerate() {
                    let half = |x: &[f32]| f16::from_f32(x[i / int.group]).to_f32();
                    values.push(int.zero.real(*code, half(&scales), half(&mins)));
                }
            }
        }
        // Floats by type too: as a quantized weight they would be quantized once more.
        let shape = weight.dtype_shape().1.iter().map(|n| Dim::N(*n)).collect::<Vec<_>>();
        let ty = Type::tensor(DType::F32, shape);
        out.weights.insert(name, Weight { ty, source: Source::Values(values.into()) });
    }
    Ok(out)
}

/// Which operand a node rounds or routes by.
fn jump(graph: &Graph, node: &Node) -> Option<usize> {
    match node.op.class() {
        Class::Quantize | Class::Route => Some(0),
        Class::Append if graph.ty(node.operands[1]).rows().is_none() => None,
        Class::Append if !matches!(graph.ty(node.operands[0]), Type::Cache { dtype: DType::F32, .. }) => Some(1),
        Class::Elementwise if matches!(node.ty.as_tensor(), Some((DType::BF16, _))) => Some(0),
        _ => None,
    }
}

fn jumps(model: &Model) -> bool {
    model.graphs.iter().any(|g| g.nodes.iter().any(|n| jump(g, n).is_some()))
}

/// The model with a little noise, the same for every token, before each rounding and routing.
fn jittered(model: &Model, seed: u64) -> Result<Model> {
    let mut out = model.clone();
    for (index, graph) in model.graphs.iter().enumerate() {
        let mut next = Graph::new(&graph.name);
        (next.range, next.inputs) = (graph.range, graph.inputs.clone());
        let mut to: Vec<ValueId> = graph.values().collect();
        for (i, node) in graph.nodes.iter().enumerate() {
            let mut operands: Vec<ValueId> = node.operands.iter().map(|o| to[o.0 as usize]).collect();
            if let Some(x) = jump(graph, node).map(|at| &mut operands[at]) {
                for (op, around) in [("mul_row", 1.0), ("add_row", 0.0)] {
                    let name = format!("{op} noise {index} {i}");
                    let width = next.ty(*x).as_tensor().and_then(|(_, shape)| shape.last().copied());
                    let ty = Type::f32(width.into_iter().collect::<Vec<_>>());
                    let weight = next.weight(&name, ty.clone());
                    *x = next.push(op, &[*x, weight], Attrs::none())?;
                    for call in model.calls.iter().filter(|c| c.graph == graph.name) {
                        let name = format!("{}{name}", call.prefix);
                        out.weights.insert(&name, noise(&ty, around, &mut Random::named(seed, &name)));
                    }
                }
            }
            to[graph.value_of(i).0 as usize] = match node.op {
                Op::WEIGHT => next.weight(node.attrs.str("name"), node.ty.clone()),
                op => next.push_op(op, &operands, node.attrs.clone())?,
            };
        }
        next.results = graph.results.iter().map(|(n, v)| (n.clone(), to[v.0 as usize])).collect();
        out.graphs[index] = next;
    }
    Ok(out)
}

fn noise(ty: &Type, around: f32, random: &mut Random) -> Weight {
    let mut weight = Weight { ty: ty.clone(), source: Source::Synthetic { seed: 0 } };
    let (_, width) = weight.rows_columns();
    weight.source = Source::Values((0..width).map(|_| around + NOISE * random.real()).collect());
    weight
}
