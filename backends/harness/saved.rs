//! Kernels with inputs and what the interpreter makes of them -> files for the check of a real GPU (`bench/gpu-check`).
//!
//! `MANSARD_GPU_CHECK=folder` writes there all that the case files and two checkpoints come to, on inputs that are new every
//! time. Else a few are written and run on the emulated GPU.

use super::cases::{kernels_of_cases, kernels_of_checkpoints, steps, tolerance};
use super::memory::{GUARD, Memory, Pool, StepArrays};
use super::{Given, Kernel, emulated, inputs, run_with};
use crate::cuda::emulator::SCHEDULES;
use crate::cuda::{self, ptx};
use mansard_gpu_check::kernels::{Case, Expected, Saved, check, flat};
use mansard_ir::eval::{self, Step, Value};
use mansard_ir::plan::in_place;
use mansard_ir::{Type, text};
use mansard_runtime::device::Driver;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Every so manieth kernel is tried where no folder is named.
const SOME: usize = 12;

fn put(blob: &mut Vec<u8>, bytes: &[u8]) -> Range<usize> {
    let begin = blob.len();
    blob.extend_from_slice(bytes);
    begin..blob.len()
}

/// A kernel on a step, with what the interpreter makes of it.
fn case(kernel: &Kernel, given: &[Given], step: &Step, blob: &mut Vec<u8>) -> Case {
    let body = &kernel.body;
    let reals: Vec<Value> = given.iter().map(Given::reals).collect();
    let values = eval::graph(body, &reals, &mut |name, _| panic!("weight {name} in a kernel"));
    let values = values.unwrap_or_else(|e| panic!("{e}"));
    let source = cuda::emit(kernel, cuda::Chip::Sm90a).unwrap_or_else(|e| panic!("{e}"));
    let (mut arguments, mut whole, mut rows) = (vec![], vec![], vec![]);
    let lay_out = |runs: &mut [(Vec<Memory>, usize)], arrays: &mut StepArrays| {
        let (memories, _) = &mut runs[0];
        let inside = |memory: &Memory| memory.whole()[64 * GUARD..][..memory.whole().len() - 128 * GUARD].to_vec();
        arguments = memories.iter().map(inside).collect();
        whole = arrays.whole(0);
        let rows_of = |v| match body.ty(v) {
            Type::Cache { .. } => 0,
            ty => arrays.rows_of(ty),
        };
        rows = body.results.iter().map(|(_, v)| rows_of(*v)).collect();
        // What is read below must be there.
        let args = arrays.args();
        let mut slots: Vec<u64> = memories.iter_mut().map(|m| m.address() as u64).collect();
        slots.push(std::ptr::from_ref(&args) as u64);
        emulated::launch_source(&source, &slots, 1, SCHEDULES[0]).unwrap_or_else(|e| panic!("{e}"));
    };
    run_with(kernel, given, step, &[1], lay_out);
    let pool = Pool::new(step, &kernel.groups);
    let mut next = body.inputs.iter().filter(|input| !matches!(input.ty, Type::Step)).count();
    let results = body.results.iter().zip(&values).zip(rows).map(|(((_, v), value), rows)| {
        let argument = if in_place(body, *v) {
            body.argument(body.root(*v)).expect("an input in memory")
        } else {
            next += 1;
            next - 1
        };
        let ty = body.ty(*v);
        let lengths = step.sequences.iter().map(|s| s.past + s.len);
        let sequences = match ty {
            Type::Cache { .. } => lengths.zip(pool.blocks_of(ty)).collect(),
            _ => vec![],
        };
        let bytes: Vec<u8> = flat(value).iter().flat_map(|x| x.to_le_bytes()).collect();
        Expected { argument, ty: ty.to_string(), rows, sequences, values: put(blob, &bytes) }
    });
    let results = results.collect();
    Case {
        name: kernel.name.clone(),
        shared_bytes: source.shared_bytes,
        arguments: arguments.iter().map(|bytes| put(blob, bytes)).collect(),
        step: put(blob, &whole),
        results,
        tolerance: tolerance(kernel),
    }
}

/// Writes kernels on inputs of a seed.
fn save(kernels: &[Kernel], seed: u64, folder: &Path) {
    let (mut blob, mut saved) = (vec![], Saved { seed, cases: vec![] });
    for kernel in kernels {
        for step in steps(kernel.range, kernel.kind().unwrap_or_else(|e| panic!("{e}"))) {
            saved.cases.push(case(kernel, &inputs(kernel, &step, seed), &step, &mut blob));
        }
    }
    for chip in ptx::CHIPS {
        let text = ptx::compile(kernels, chip).unwrap_or_else(|e| panic!("{e}")).text;
        std::fs::write(folder.join(format!("kernels-{chip}.ptx")), text).unwrap();
    }
    std::fs::write(folder.join("kernels.bin"), blob).unwrap();
    std::fs::write(folder.join("kernels.json"), serde_json::to_vec(&saved).unwrap()).unwrap();
}

/// Each kernel once, under a name of its own.
fn distinct(kernels: Vec<Kernel>) -> Vec<Kernel> {
    let (mut seen, mut out) = (BTreeSet::new(), vec![]);
    for mut kernel in kernels {
        kernel.body.name = String::new();
        if seen.insert(format!("{:?} {}", kernel.range, text::print_graph(&kernel.body))) {
            kernel.name = format!("{}_{}", kernel.name, out.len());
            kernel.body.name.clone_from(&kernel.name);
            out.push(kernel);
        }
    }
    out
}

fn gpu(kernels: &[Kernel]) -> Arc<dyn Driver> {
    super::device::gpu_of(kernels)
}

#[test]
fn saved_kernels_run_on_a_gpu() {
    let all: Vec<Kernel> =
        kernels_of_cases().chain(kernels_of_checkpoints()).flat_map(|(_, kernels)| kernels).collect();
    let all = distinct(all);
    if let Some(folder) = std::env::var_os("MANSARD_GPU_CHECK") {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        return save(&all, now.as_secs(), Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let some: Vec<Kernel> = all.into_iter().step_by(SOME).collect();
    save(&some, 2, folder.path());
    let (holds, json) = check(folder.path(), &gpu(&some)).unwrap();
    assert!(holds && json["cases"].as_u64().unwrap() > 10, "{json:#}");
    assert!(json["worst_share_of_tolerance"].as_f64().unwrap() > 0.0, "{json:#}");
    // What is expected of the last is changed.
    let path = folder.path().join("kernels.json");
    let mut saved: Saved = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let values = &mut saved.cases.last_mut().unwrap().results[0].values;
    *values = values.start.saturating_sub(4)..values.end - 4;
    std::fs::write(&path, serde_json::to_vec(&saved).unwrap()).unwrap();
    let (holds, json) = check(folder.path(), &gpu(&some)).unwrap();
    assert!(!holds && json["wrong"][0]["error"].is_string(), "{json:#}");
}
