//! What a model's matrices are multiplied with on a text, matrix by matrix as its own compiled code comes to them. Who looks may
//! replace matrices: later ones are then seen with what these give.
//!
//! ```text
//! the model in f32, compiled once, in two engines; all windows of the text in one step, launch by launch
//!   launch `rms_normalize, matmul q, matmul k`    the interpreter does what comes before the products
//!     z [8192, 576] of the float model, x [8192, 576] of the one with replaced matrices  -->  moments of q and k together
//!     both engines run the launch, the second with new q and k
//! ```
//!
//! Matrices that read the same value in one launch share their moments. Products of which only some rows are asked for (the
//! vocabulary) are not seen. Nothing is kept but the moments of one launch.

use crate::driver::{self, CompileOptions, Progress, Quiet};
use mansard_backends as backends;
use mansard_ir::eval::Value;
use mansard_ir::model::{Weight, WeightTable};
use mansard_ir::ops::Class;
use mansard_ir::plan::{Arg, KernelSpec, Program, WeightSpec};
use mansard_ir::quantize::moments::Moments;
use mansard_ir::recipe::matrices;
use mansard_ir::{Dim, Error, Graph, Op, Place, Result, ValueId, bail};
use mansard_passes::LimitsRequest;
use mansard_runtime::{self as runtime, Engine, EngineOptions, OpenOptions, Rows, Watch, WeightPages, Work};
use std::collections::HashMap;
use std::path::Path;

/// Tokens of a text that are read.
const TOKENS: usize = 8192;

/// Of which so many from an empty context.
const WINDOW: usize = 512;

/// Texts that are read, of a model that reads them one by one.
const TEXTS: usize = 512;

/// Who looks.
pub trait Visitor {
    /// These matrices, which read the same, are worth their moments.
    fn wants(&self, names: &[String]) -> bool;

    /// Their moments; gives what is to be multiplied with from here on.
    ///
    /// # Errors
    /// Those of whoever looks.
    fn see(&mut self, names: &[String], moments: &Moments) -> Result<Vec<(String, Weight)>>;

    /// It replaces matrices.
    fn replaces(&self) -> bool;
}

/// Shows `visitor` what the matrices of the model at `input` are multiplied with on a text.
///
/// # Errors
/// Where the model has no tokenizer or no matrices, the text is too short; whatever compiling, running and `visitor` say.
pub fn visit(
    input: &Path,
    options: &CompileOptions,
    text: &str,
    visitor: &mut dyn Visitor,
    progress: &mut dyn Progress,
) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("mansard-reference-").tempdir();
    let folder = folder.map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let path = folder.path().join("reference.mansard");
    // Run here, whatever machine the artifact is for; its matrices are those of the file.
    let (targets, limits) = (vec!["native".into()], options.limits);
    let limits = LimitsRequest { tokens: TOKENS, rows: TEXTS, sequences: TEXTS, ..limits };
    let native =
        CompileOptions { targets, machine: None, as_written: true, limits, ..driver::reference_options(options) };
    progress.stage("reference", 0);
    let mut sink = |_: mansard_passes::Event<'_>| {};
    driver::compile(input, &path, &native, &mut Quiet, &mut mansard_passes::Hooks::new(&mut sink))?;
    let opened = runtime::Model::open_with(&path, &OpenOptions { verify_weights: false })?;
    let windows = windows(&opened, text)?;
    let program = &opened.artifact().manifest().program;
    let taps = Taps::new(program, windows.iter().map(Vec::len).sum())?;
    if taps.all.is_empty() {
        let architecture = &opened.info().architecture;
        bail!(Unsupported, "a {architecture} model has no matrices that tokens are multiplied with");
    }
    let engine = |weights| {
        let positions = windows.iter().map(|w| w.len().next_multiple_of(mansard_ir::layout::CACHE_BLOCK)).sum();
        let threads = Some(options.threads);
        opened.engine(&EngineOptions { threads, positions: Some(positions), weights, ..EngineOptions::default() })
    };
    let mut float = engine(WeightPages::Mapped)?;
    let mut coded = if visitor.replaces() { Some(engine(WeightPages::Huge)?) } else { None };
    let (work, other) = (work(&mut float, &windows), coded.as_mut().map(|engine| work(engine, &windows)));
    let mut replaced = Replaced::new(driver::import(input, &native)?.weights, program, options.threads)?;
    let mut float = float.step_slowly(&work)?;
    let mut coded = coded.as_mut().zip(other.as_deref()).map(|(engine, work)| engine.step_slowly(work)).transpose()?;
    progress.stage("calibrate", taps.all.len());
    let mut taps_left = taps.all.iter().enumerate().peekable();
    while let Some(watch) = float.watch() {
        let (mut wanted, mut given) = (HashMap::new(), HashMap::new());
        let mut new = vec![];
        while let Some((index, tap)) = taps_left.next_if(|(_, tap)| tap.launch == watch.launch) {
            progress.advance(index);
            if !visitor.wants(&tap.weights) {
                continue;
            }
            let body = &taps.bodies[tap.kernel];
            let place = || format!("kernel `{}`", body.name);
            let wanted = evaluate(body, tap.value, &watch, &mut wanted).at(place)?;
            let wanted = &wanted.tensor()?.data;
            let mut moments = Moments::new(tap.columns);
            match coded.as_ref().filter(|_| replaced.any).and_then(|coded| coded.watch()) {
                None => moments.add(wanted, options.threads)?,
                Some(watch) => {
                    let rows = evaluate(body, tap.value, &watch, &mut given).at(place)?;
                    moments.add_shifted(&rows.tensor()?.data, wanted, options.threads)?;
                }
            }
            new.extend(visitor.see(&tap.weights, &moments)?);
        }
        if let Some(coded) = &mut coded {
            for (index, bytes) in replaced.pack(new)? {
                coded.replace_weight(index, &bytes)?;
            }
            coded.advance()?;
        }
        float.advance()?;
    }
    Ok(())
}

/// Stretches of the text, each to be read from an empty context: texts with what the model wants around them where it embeds
/// texts, else windows of equal length that begin as a prompt does.
fn windows(opened: &runtime::Model, text: &str) -> Result<Vec<Vec<u32>>> {
    let (info, limits) = (opened.info(), &opened.artifact().manifest().program.limits);
    let most = WINDOW.min(limits.context);
    if info.encoder {
        let texts = text.split("\n\n").filter(|text| !text.trim().is_empty()).take(limits.sequences);
        let mut read = 0;
        let mut windows = vec![];
        for text in texts {
            let mut tokens = opened.tokens()?.encode(text, true)?;
            tokens.truncate(most);
            read += tokens.len();
            if read > limits.tokens {
                break;
            }
            windows.push(tokens);
        }
        return Ok(windows);
    }
    let tokens = opened.tokens()?.encode(text, false)?;
    if tokens.len() < 2 {
        bail!(Input, "expected a text of at least 2 tokens, found {}", tokens.len());
    }
    let begin = info.tokenizer.as_ref().and_then(|t| t.begin);
    let most = most.saturating_sub(usize::from(begin.is_some())).clamp(1, tokens.len());
    let count = (limits.tokens / (most + 1)).min(limits.sequences);
    let windows = tokens.chunks_exact(most).take(count);
    Ok(windows.map(|window| begin.iter().chain(window).copied().collect()).collect())
}

fn work<'a>(engine: &mut Engine, windows: &'a [Vec<u32>]) -> Vec<Work<'a>> {
    windows.iter().map(|tokens| Work { sequence: engine.new_sequence(), tokens, rows: Rows::Last }).collect()
}

/// A value that matrices are multiplied with.
struct Tap {
    launch: usize,
    kernel: usize,
    value: ValueId,
    columns: usize,
    weights: Vec<String>,
}

/// All of them in steps of one number of tokens, by launch.
struct Taps {
    all: Vec<Tap>,
    bodies: Vec<Graph>,
}

impl Taps {
    fn new(program: &Program, tokens: usize) -> Result<Taps> {
        let bodies: Vec<Graph> = program.kernels.iter().map(KernelSpec::body).collect::<Result<_>>()?;
        let variant = program.variant(tokens);
        let Some(variant) = variant else { bail!(Internal, "no variant for {tokens} tokens") };
        let mut all: Vec<Tap> = vec![];
        for (launch, launched) in variant.launches.iter().enumerate() {
            let (kernel, first) = (launched.kernel.0 as usize, all.len());
            let body = &bodies[kernel];
            for node in body.nodes.iter().filter(|n| matches!(n.op.class(), Class::Contract | Class::ContractExperts)) {
                let (value, weight) = (node.operands[0], node.operands[1]);
                let Some((_, [.., Dim::N(columns)])) = body.ty(value).as_tensor() else { continue };
                let Some(Arg::Weight(id)) = body.argument(weight).and_then(|at| launched.args.get(at)) else {
                    continue;
                };
                if body.ty(value).rows() == Some(Dim::R) {
                    continue;
                }
                let name = program.weights[id.0 as usize].name.clone();
                match all[first..].iter_mut().find(|tap| tap.value == value) {
                    Some(tap) => tap.weights.push(name),
                    None => all.push(Tap { launch, kernel, value, columns: *columns, weights: vec![name] }),
                }
            }
        }
        Ok(Taps { all, bodies })
    }
}

/// The weights of the second engine.
struct Replaced<'a> {
    weights: WeightTable,
    packed: Vec<(&'a WeightSpec, Graph)>,
    threads: usize,
    any: bool,
}

impl<'a> Replaced<'a> {
    fn new(weights: WeightTable, program: &'a Program, threads: usize) -> Result<Replaced<'a>> {
        let packed = program.weights.iter().map(|spec| Ok((spec, spec.pack()?.recipe)));
        Ok(Replaced { weights, packed: packed.collect::<Result<_>>()?, threads, any: false })
    }

    /// Numbers and bytes of the packed weights that are others now.
    fn pack(&mut self, new: Vec<(String, Weight)>) -> Result<Vec<(usize, Vec<u8>)>> {
        let names: Vec<String> = new.iter().map(|(name, _)| name.clone()).collect();
        new.into_iter().for_each(|(name, weight)| self.weights.insert(name, weight));
        let mut packed = vec![];
        for (index, (spec, recipe)) in self.packed.iter().enumerate() {
            if matrices(recipe).iter().any(|read| names.iter().any(|name| name == read)) {
                let mut bytes = Vec::with_capacity(spec.bytes);
                let mut sink = |part: &[u8]| {
                    bytes.extend_from_slice(part);
                    Ok(())
                };
                backends::pack::pack(&self.weights.make(recipe)?, self.threads, &mut sink)?;
                packed.push((index, bytes));
            }
        }
        self.any |= !packed.is_empty();
        Ok(packed)
    }
}

/// A value of a kernel's body, from what its launch reads.
fn evaluate(body: &Graph, value: ValueId, watch: &Watch<'_>, known: &mut HashMap<ValueId, Value>) -> Result<Value> {
    if let Some(value) = known.get(&value) {
        return Ok(value.clone());
    }
    let found = match body.node(value) {
        Some(node) if node.op == Op::WEIGHT => bail!(Internal, "a weight in a kernel"),
        Some(node) => {
            let operands: Vec<Value> =
                node.operands.iter().map(|o| evaluate(body, *o, watch, known)).collect::<Result<_>>()?;
            (node.op.row().eval)(&operands.iter().collect::<Vec<_>>(), &node.attrs)?
        }
        None => match body.argument(value) {
            Some(at) => {
                let Some(arg) = watch.launch().args.get(at) else { bail!(Internal, "a launch has too few arguments") };
                watch.read(*arg, body.ty(value), false)?
            }
            None => Value::Step(watch.step()),
        },
    };
    known.insert(value, found.clone());
    Ok(found)
}
