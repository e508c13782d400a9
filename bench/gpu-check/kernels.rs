//! Single kernels on saved inputs, beside what the interpreter made of them.
//!
//! ```text
//!  kernels.json   name, shared memory, arguments and step (ranges of kernels.bin), results: argument, type, values, tolerance
//!  kernels-sm_80.ptx, kernels-sm_90a.ptx      all of them as one module
//! ```
//!
//! Every kernel runs with grids of several sizes, on fresh memory each time. A cache is compared where the step's sequences
//! lie in it, whatever else its cache blocks hold.

use mansard_ir::eval::Value as Found;
use mansard_ir::layout::{CACHE_BLOCK, cache_block_bytes};
use mansard_ir::{Error, Kind, Place, Result, Type, bail, decode, text};
use mansard_runtime::device::{Address, DeviceMemory, Driver, Entry, Shape};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Threads of a block.
const THREADS: usize = 256;

/// Words of the step that are addresses, stored relative to its beginning.
const ADDRESSES: Range<usize> = 5..13;

/// All of them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Saved {
    /// What inputs depend on.
    pub seed: u64,
    /// Each kernel on each step.
    pub cases: Vec<Case>,
}

/// One kernel on one step.
#[derive(Debug, Serialize, Deserialize)]
pub struct Case {
    /// Its symbol.
    pub name: String,
    /// Bytes of shared memory of a block.
    pub shared_bytes: usize,
    /// Bytes of each argument but the step.
    pub arguments: Vec<Range<usize>>,
    /// Bytes of the step.
    pub step: Range<usize>,
    /// What it computes.
    pub results: Vec<Expected>,
    /// The most that a value may be off, as a share of the largest in its result.
    pub tolerance: f64,
}

/// One result.
#[derive(Debug, Serialize, Deserialize)]
pub struct Expected {
    /// The argument it lies in.
    pub argument: usize,
    /// Its type.
    pub ty: String,
    /// Rows, of what is no cache.
    pub rows: usize,
    /// Of a cache: for each sequence its positions and its cache blocks.
    pub sequences: Vec<(usize, Vec<usize>)>,
    /// Bytes of its values, f32.
    pub values: Range<usize>,
}

/// Values of a result in one order, whatever it is.
pub fn flat(value: &Found) -> Vec<f32> {
    match value {
        Found::Tensor(tensor) => tensor.data.to_vec(),
        Found::Ints(ints) => ints.data.iter().map(|x| *x as f32).collect(),
        Found::Cache(cache) => cache.sequences.iter().flat_map(|s| s.iter().copied()).collect(),
        Found::Routing(r) => r.chosen.iter().map(|e| *e as f32).chain(r.weights.iter().copied()).collect(),
        Found::Step(_) | Found::Planes(_) => vec![],
    }
}

/// Runs every case of a folder on a GPU.
///
/// # Errors
/// Where files are missing or damaged, or the code does not load.
pub fn check(folder: &Path, driver: &Arc<dyn Driver>) -> Result<(bool, Value)> {
    let read = |name: &str| std::fs::read(folder.join(name)).map_err(|e| Error::io(folder.join(name), e));
    let damaged = |e: serde_json::Error| Error::new(Kind::Input, format!("kernels.json: {e}"));
    let saved: Saved = serde_json::from_slice(&read("kernels.json")?).map_err(damaged)?;
    let blob = read("kernels.bin")?;
    let chip = if driver.facts().capability == (9, 0) { "sm_90a" } else { "sm_80" };
    let code = read(&format!("kernels-{chip}.ptx"))?;
    let entry = |case: &Case| Entry {
        name: case.name.clone(),
        threads: THREADS,
        shared_bytes: case.shared_bytes,
        arguments: case.arguments.len() + 1,
    };
    let functions = driver.load(&code, &saved.cases.iter().map(entry).collect::<Vec<_>>())?;
    let (mut wrong, mut worst) = (vec![], 0f64);
    for (case, function) in saved.cases.iter().zip(&functions) {
        let most = (driver.facts().processors * function.resident) as u32;
        for blocks in [1, 3, most] {
            match case.run(&blob, driver, function.id, blocks) {
                Ok(off) => worst = worst.max(off / case.tolerance),
                Err(error) => {
                    wrong.push(json!({"kernel": case.name, "blocks": blocks, "error": error.to_string()}));
                    break;
                }
            }
        }
    }
    let json = json!({"chip": chip, "seed": saved.seed, "cases": saved.cases.len(), "wrong": wrong,
        "worst_share_of_tolerance": worst});
    Ok((wrong.is_empty(), json))
}

impl Case {
    /// The most that a value is off.
    fn run(&self, blob: &[u8], driver: &Arc<dyn Driver>, function: usize, blocks: u32) -> Result<f64> {
        let of = |range: &Range<usize>| match blob.get(range.clone()) {
            Some(bytes) => Ok(bytes),
            None => bail!(Input, "expected bytes {range:?} of {}", blob.len()),
        };
        let mut memories = vec![];
        for range in &self.arguments {
            let memory = DeviceMemory::new(driver, "an argument", range.len())?;
            driver.copy_in(memory.address(0), of(range)?)?;
            memories.push(memory);
        }
        let step = DeviceMemory::new(driver, "a step", self.step.len())?;
        let mut bytes = of(&self.step)?.to_vec();
        for word in bytes.as_chunks_mut::<8>().0.iter_mut().take(ADDRESSES.end).skip(ADDRESSES.start) {
            *word = (u64::from_le_bytes(*word) + step.address(0)).to_le_bytes();
        }
        driver.copy_in(step.address(0), &bytes)?;
        let args: Vec<Address> = memories.iter().chain([&step]).map(|memory| memory.address(0)).collect();
        let (threads, shared_bytes) = (THREADS as u32, self.shared_bytes as u32);
        driver.launch(function, Shape { blocks, threads, shared_bytes, dependent: false }, &args)?;
        driver.finish(&mut [])?;
        let mut worst = 0f64;
        for (index, expected) in self.results.iter().enumerate() {
            let range = self.arguments.get(expected.argument).cloned().unwrap_or_default();
            let mut bytes = vec![0; range.len()];
            driver.finish(&mut [(args[expected.argument], &mut bytes)])?;
            let want: Vec<f32> = of(&expected.values)?.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let found = expected.read(&bytes).at(|| format!("result {index}"))?;
            worst = worst.max(distance(&found, &want, self.tolerance).at(|| format!("result {index}"))?);
        }
        Ok(worst)
    }
}

impl Expected {
    fn read(&self, bytes: &[u8]) -> Result<Vec<f32>> {
        let ty = text::parse_type(&self.ty)?;
        let Type::Cache { heads, dim, .. } = ty else { return Ok(flat(&decode::rows(&ty, bytes, self.rows)?)) };
        let size = cache_block_bytes(&ty).unwrap_or(0);
        let mut values = vec![];
        for (length, blocks) in &self.sequences {
            for position in 0..*length {
                let begin = blocks.get(position / CACHE_BLOCK).map_or(usize::MAX, |block| block * size);
                let Some(block) = bytes.get(begin..).and_then(|rest| rest.get(..size)) else {
                    bail!(Input, "position {position} is in no cache block");
                };
                for (head, d) in (0..heads).flat_map(|head| (0..dim).map(move |d| (head, d))) {
                    values.push(decode::cached(&ty, block, (head, position % CACHE_BLOCK, d))?);
                }
            }
        }
        Ok(values)
    }
}

/// How far values are off, as a share of the largest; refuses more than `tolerance`.
fn distance(found: &[f32], want: &[f32], tolerance: f64) -> Result<f64> {
    if found.len() != want.len() {
        bail!(Differs, "{} values, expected {}", found.len(), want.len());
    }
    let largest = want.iter().fold(0f64, |most, x| most.max(f64::from(x.abs())));
    let mut worst = 0f64;
    for (i, (f, w)) in found.iter().zip(want).enumerate() {
        let off = f64::from((f - w).abs());
        if off.is_nan() || off > tolerance * largest {
            bail!(Differs, "value {i} of {}: {f}, expected {w}", want.len());
        }
        worst = worst.max(if largest > 0.0 { off / largest } else { 0.0 });
    }
    Ok(worst)
}
