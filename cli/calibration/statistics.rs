//! What a model's matrices are multiplied with on a text: second moments ([`Moments`]), taken while its own compiled code runs.
//!
//! ```text
//! the model in f32, compiled; its steps launch by launch
//!   launch `rms_normalize, matmul q, matmul k`    read its inputs; the interpreter does what comes before the products
//!     x [512, 576]  -->  sum of x^T x, for q and k together
//! ```
//!
//! Matrices that read the same value in one launch share their sums. Products of which only some rows are asked for (the
//! vocabulary) have none. As many sums as [`KEPT_BYTES`] has room for are taken at a time, and the text is read again for the
//! rest; they are written to one file, from which they are read one by one. It is kept if it has at most [`STORED_BYTES`].

use super::{key, stored};
use crate::driver::{self, CompileOptions, Progress, Quiet};
use mansard_ir::eval::Value;
use mansard_ir::file::MappedFile;
use mansard_ir::ops::Class;
use mansard_ir::plan::{Arg, KernelSpec};
use mansard_ir::quantize::moments::Moments;
use mansard_ir::{Dim, Error, Graph, Op, Place, Result, ValueId, bail};
use mansard_runtime::{self as runtime, Engine, EngineOptions, Moment, OpenOptions, Rows, Watch, Work};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Tokens of a text that are read.
const TOKENS: usize = 8192;

/// Of which so many from an empty context.
const WINDOW: usize = 512;

/// Memory for sums.
const KEPT_BYTES: usize = 1 << 30;

/// Largest file that is kept for another time.
const STORED_BYTES: usize = 2 << 30;

/// The second moments of a model's matrices, in a file.
pub struct Statistics {
    index: Index,
    file: MappedFile,
    data: usize,
    /// Where the file is to be gone with this.
    _folder: Option<tempfile::TempDir>,
}

/// What is where.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Index {
    entries: Vec<Entry>,
    /// By the name of a weight: its entry.
    weights: BTreeMap<String, usize>,
}

/// Sums that some matrices share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    columns: usize,
    /// Among all figures.
    first: usize,
}

impl Statistics {
    /// Those of the model at `input` on a text: kept from an earlier time, or taken now.
    ///
    /// # Errors
    /// Where the model has no tokenizer, the text is too short, or whatever compiling and running says.
    pub fn of(input: &Path, options: &CompileOptions, text: &str, progress: &mut dyn Progress) -> Result<Statistics> {
        let name = key(input, options, text, ["moments"])?;
        let path =
            stored("moments", &name).filter(|path| path.parent().is_some_and(|p| std::fs::create_dir_all(p).is_ok()));
        if let Some(path) = path.as_ref().filter(|path| path.exists())
            && let Ok(known) = Statistics::open(path, None)
        {
            return Ok(known);
        }
        let beside = path.as_ref().and_then(|p| p.parent()).map(Path::to_owned).unwrap_or_else(std::env::temp_dir);
        let folder = tempfile::Builder::new().prefix(".moments-").tempdir_in(&beside);
        let folder = folder.map_err(|e| Error::io(&beside, e))?;
        let taken = folder.path().join(&name);
        take(input, options, text, &taken, progress)?;
        let small = std::fs::metadata(&taken).is_ok_and(|m| m.len() <= STORED_BYTES as u64);
        match path.filter(|path| small && std::fs::rename(&taken, path).is_ok()) {
            Some(path) => Statistics::open(&path, None),
            None => Statistics::open(&taken, Some(folder)),
        }
    }

    fn open(path: &Path, folder: Option<tempfile::TempDir>) -> Result<Statistics> {
        let file = MappedFile::open(path)?;
        let length = file.bytes(0, 8)?.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let index: Index = serde_json::from_slice(file.bytes(8, length)?).or_else(|e| bail!(Input, "{e}"))?;
        let known = |entry: &usize| *entry < index.entries.len();
        if !index.weights.values().all(known) {
            bail!(Input, "{}: a weight has no entry", path.display());
        }
        Ok(Statistics { index, file, data: 8 + length, _folder: folder })
    }

    /// Names of matrices by what they share.
    pub fn groups(&self) -> Vec<Vec<&str>> {
        let mut groups = vec![vec![]; self.index.entries.len()];
        self.index.weights.iter().for_each(|(name, entry)| groups[*entry].push(name.as_str()));
        groups
    }

    /// The sums of a group.
    ///
    /// # Errors
    /// Where the file is damaged.
    pub fn moments(&self, group: usize) -> Result<Moments> {
        let Some(Entry { columns, first }) = self.index.entries.get(group) else {
            bail!(Internal, "no moments of group {group}");
        };
        if *columns > 1 << 20 {
            bail!(Input, "{}: {columns} columns", self.file.path().display());
        }
        let bytes = first.checked_mul(4).and_then(|at| at.checked_add(self.data));
        let bytes = self.file.bytes(bytes.unwrap_or(usize::MAX), 4 * Moments::len(*columns))?;
        Moments::from_sums(*columns, bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }
}

/// Takes them, into a file.
fn take(input: &Path, options: &CompileOptions, text: &str, path: &Path, progress: &mut dyn Progress) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let reference = folder.join("reference.mansard");
    // Run here, whatever machine the artifact is for; its matrices are those of the file.
    let targets = vec!["native".into()];
    let native = CompileOptions { targets, machine: None, as_written: true, ..driver::reference_options(options) };
    progress.stage("reference", 0);
    let mut sink = |_: mansard_passes::Event<'_>| {};
    driver::compile(input, &reference, &native, &mut Quiet, &mut mansard_passes::Hooks::new(&mut sink))?;
    let opened = runtime::Model::open_with(&reference, &OpenOptions { verify_weights: false })?;
    let windows = windows(&opened, text)?;
    let Some(tokens) = windows.first().map(Vec::len) else { bail!(Internal, "a text of no windows") };
    let taps = Taps::new(&opened, tokens)?;
    let index = taps.index(&opened)?;
    let passes = passes(&index);
    let mut out = BufWriter::new(File::create(path).map_err(|e| Error::io(path, e))?);
    let json = serde_json::to_vec(&index).or_else(|e| bail!(Internal, "{e}"))?;
    let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(|e| Error::io(path, e));
    write(&(json.len() as u64).to_le_bytes())?;
    write(&json)?;
    progress.stage("statistics", windows.len() * passes.len());
    for (pass, entries) in passes.iter().enumerate() {
        let mut sums: Vec<Moments> = entries.clone().map(|entry| Moments::new(index.entries[entry].columns)).collect();
        for (at, window) in windows.iter().enumerate() {
            progress.advance(pass * windows.len() + at);
            taps.add(&opened, window, entries.start, &mut sums, options.threads)?;
        }
        for sums in &sums {
            sums.sums().iter().try_for_each(|x| write(&x.to_le_bytes()))?;
        }
    }
    out.into_inner().map_err(|e| Error::io(path, e.into_error()))?;
    let _ = std::fs::remove_file(&reference);
    Ok(())
}

/// Windows of equal length, each from an empty context; they begin as a prompt does.
fn windows(opened: &runtime::Model, text: &str) -> Result<Vec<Vec<u32>>> {
    let (info, limits) = (opened.info(), opened.artifact().manifest().program.limits);
    let tokens = opened.tokens()?.encode(text, false)?;
    if tokens.len() < 2 {
        bail!(Input, "expected a text of at least 2 tokens, found {}", tokens.len());
    }
    let begin = info.tokenizer.as_ref().and_then(|t| t.begin);
    let most = WINDOW.min(limits.tokens).min(limits.context).saturating_sub(usize::from(begin.is_some())).max(1);
    let windows = tokens[..tokens.len().min(TOKENS)].chunks_exact(most.min(tokens.len()));
    Ok(windows.map(|window| begin.iter().chain(window).copied().collect()).collect())
}

/// Runs of entries whose sums fit in memory together.
fn passes(index: &Index) -> Vec<std::ops::Range<usize>> {
    let (mut passes, mut first, mut bytes) = (vec![], 0, 0);
    for (at, entry) in index.entries.iter().enumerate() {
        let own = 4 * Moments::len(entry.columns);
        if bytes + own > KEPT_BYTES && at > first {
            passes.push(first..at);
            (first, bytes) = (at, 0);
        }
        bytes += own;
    }
    passes.push(first..index.entries.len());
    passes
}

/// Workers that run the model: attention's sums are cut by their number, and the same codes are wanted on any machine.
const WORKERS: usize = 2;

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
    fn new(opened: &runtime::Model, tokens: usize) -> Result<Taps> {
        let program = &opened.artifact().manifest().program;
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

    fn index(&self, opened: &runtime::Model) -> Result<Index> {
        let mut index = Index::default();
        let mut first = 0;
        for (entry, tap) in self.all.iter().enumerate() {
            index.entries.push(Entry { columns: tap.columns, first });
            first += Moments::len(tap.columns);
            for name in &tap.weights {
                index.weights.entry(name.clone()).or_insert(entry);
            }
        }
        if index.weights.is_empty() {
            bail!(
                Unsupported,
                "a {} model has no matrices that tokens are multiplied with",
                opened.info().architecture
            );
        }
        Ok(index)
    }

    /// Runs one window, and adds what the entries from `first` see to their sums.
    fn add(
        &self,
        opened: &runtime::Model,
        window: &[u32],
        first: usize,
        sums: &mut [Moments],
        threads: usize,
    ) -> Result<()> {
        let mut engine: Engine =
            opened.engine(&EngineOptions { threads: Some(WORKERS), positions: None, ..EngineOptions::default() })?;
        let sequence = engine.new_sequence();
        let wanted = &self.all[first..first + sums.len()];
        let mut next = 0;
        let work = [Work { sequence, tokens: window, rows: Rows::Last }];
        engine.step_watched(&work, &mut |moment, watch| {
            let mut known = HashMap::new();
            while moment == Moment::Before && wanted.get(next).is_some_and(|tap| tap.launch == watch.launch) {
                let tap = &wanted[next];
                let body = &self.bodies[tap.kernel];
                let value = evaluate(body, tap.value, watch, &mut known).at(|| format!("kernel `{}`", body.name))?;
                sums[next].add(&value.tensor()?.data, threads);
                next += 1;
            }
            Ok(())
        })?;
        Ok(())
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
