//! Runs compiled kernels against the interpreter (tests only; the one place of this crate that jumps into generated code).
//!
//! ```text
//! harness::case("graph @k(%x: f32[t, 64], %w: q4_0[32, 64]) stage planned when t = 1..8 { ... }", &[(0, 3)], 1e-5)
//!   text -> kernel, random inputs -> for every level, for 1, 2 and 3 threads: compile, call, compare
//! ```
//!
//! Buffers are laid out as in a step: rows padded to 16, padding full of NaNs, canaries on either side, cache blocks out of
//! order, those out of a window's sight nowhere. Threads are real, except under [`qemu`], where the levels of other architectures run.
#![allow(unsafe_code)]

mod cases;
mod device;
mod dry_run;
pub mod emulated;
mod memory;
mod qemu;
mod samples;
mod saved;

pub use samples::{float_weight, inputs, quantized_weight};

use crate::{Image, compile_kernels, pack, target};
use mansard_ir::eval::{self, Step, Value};
use mansard_ir::model::Weight;
use mansard_ir::plan::{CacheGroup, Kernel, StepArgs, in_place};
use mansard_ir::tuning::Tuned;
use mansard_ir::{Choice, Dim, Graph, Target, TokenRange, Tuning, Type, text, verify};
use memory::{Memory, Pool, StepArrays};
use qemu::Qemu;
use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};

/// An input of a kernel.
#[derive(Clone, Debug)]
pub enum Given {
    /// An activation, a cache, the step.
    Value(Value),
    /// What is packed; the interpreter gets its dequantized values.
    Weight(Weight),
}

/// The one kernel in a text, verified.
pub fn kernel(text: &str) -> Kernel {
    let model = text::parse("test", text).unwrap_or_else(|e| panic!("{e}"));
    let [body] = model.graphs.as_slice() else { panic!("expected one graph") };
    verify::verify(body).unwrap_or_else(|e| panic!("{e}"));
    planned(body.clone())
}

/// A planned graph as a kernel. Beside the cache groups of its own caches there is one that keeps everything.
fn planned(body: Graph) -> Kernel {
    let range = body.range.unwrap_or(TokenRange { min: 1, max: 512 });
    let own = CacheGroup::of(body.inputs.iter().map(|input| &input.ty)).into_iter().filter(|group| group.window > 0);
    Kernel { name: body.name.clone(), range, groups: CacheGroup::all().into_iter().chain(own).collect(), body }
}

/// [`check`] of a kernel in text form on random inputs for a step of `(past, new)` tokens a sequence.
pub fn case(text: &str, step: &[(usize, usize)], tolerance: f64) {
    let (kernel, step) = (kernel(text), Step::new(step));
    check(&kernel, &inputs(&kernel, &step, 1), &step, tolerance);
}

/// Compares a kernel with the interpreter on [`machines`], with 1, 2 and 3 threads. `tolerance` is
/// the most that a value may be off, as a share of the largest in its result.
pub fn check(kernel: &Kernel, inputs: &[Given], step: &Step, tolerance: f64) {
    check_tuned(kernel, inputs, step, tolerance, |_| vec![None]);
}

/// [`check`] on the levels for which the kernel is made; the others refuse it.
pub fn check_on(kernel: &Kernel, inputs: &[Given], step: &Step, tolerance: f64, suits: fn(&Target) -> bool) {
    check_tuned(kernel, inputs, step, tolerance, |target| if suits(target) { vec![None] } else { vec![] });
    for (target, _) in machines().iter().filter(|(target, _)| !suits(target)) {
        let refused = compile_kernels(std::slice::from_ref(kernel), target, &Tuning::default(), 1, &mut |_, _| {});
        assert!(refused.is_err(), "{} takes `{}`", target.name, kernel.name);
    }
}

/// [`check`] with each of the choices that `choices` names for a target; `None` is the formulas'.
pub fn check_tuned(
    kernel: &Kernel,
    inputs: &[Given],
    step: &Step,
    tolerance: f64,
    choices: impl Fn(&Target) -> Vec<Option<Choice>>,
) {
    let reals: Vec<Value> = inputs.iter().map(Given::reals).collect();
    let expected = eval::graph(&kernel.body, &reals, &mut |name, _| panic!("weight {name} in a kernel"));
    let expected = expected.unwrap_or_else(|e| panic!("{e}"));
    let compare = |found: &[Value]| differences(kernel, found, &expected, tolerance);
    let mut is_tried = false;
    let tried = machines().iter().flat_map(|(t, machine)| choices(t).into_iter().map(move |c| (t, machine, c)));
    for (target, machine, choice) in tried {
        let image = compile(kernel, target, choice);
        let threads = [1, 2, 3];
        for (threads, found) in threads.iter().zip(run(*machine, &image, kernel, inputs, step, &threads)) {
            let chosen = choice.map_or_else(String::new, |choice| format!(" with {choice:?}"));
            let place = || format!("`{}`, {}{chosen}, {threads} threads", kernel.name, target.name);
            compare(&found).unwrap_or_else(|difference| panic!("{}: {difference}", place()));
        }
        is_tried |= choice.is_none();
    }
    if is_tried {
        let source = crate::cuda::emit(kernel, crate::cuda::Chip::Sm90a).unwrap_or_else(|e| panic!("{e}"));
        let emulated = emulated::run(kernel, &source, inputs, step, &compare);
        emulated.unwrap_or_else(|fault| panic!("`{}`, emulated: {fault}", kernel.name));
    }
}

/// Where the results of a kernel are further off than they may be.
pub fn differences(kernel: &Kernel, found: &[Value], expected: &[Value], tolerance: f64) -> Result<(), String> {
    let all = kernel.body.results.iter().zip(found).zip(expected);
    all.into_iter().try_for_each(|(((name, _), found), expected)| {
        memory::compare(found, expected, tolerance).map_err(|difference| format!("result `{name}`: {difference}"))
    })
}

/// What runs a target's code.
#[derive(Clone, Copy, Debug)]
pub enum Machine {
    /// This process.
    Here,
    /// An emulator.
    Qemu(Qemu),
}

/// Every level that can be run here or emulated: this machine with all that it has, and the named ones.
pub fn machines() -> &'static [(Target, Machine)] {
    static MACHINES: OnceLock<Vec<(Target, Machine)>> = OnceLock::new();
    MACHINES.get_or_init(|| {
        let host = target::host_features();
        let all = target::names().into_iter().map(|name| target::target(name).unwrap_or_else(|e| panic!("{e}")));
        let machine = |target: Target| {
            let machine = if target.arch == std::env::consts::ARCH {
                // The runtime's question: it also asks the system for registers that threads have on request only.
                let here = target.features.iter().all(|f| host.contains(f))
                    && mansard_runtime::lacking(&target.arch, &target.features).is_none();
                here.then_some(Machine::Here)
            } else if target.arch == "aarch64" {
                Qemu::for_target(&target.name).map(Machine::Qemu)
            } else {
                None
            };
            Some((target, machine?))
        };
        all.filter_map(machine).collect()
    })
}

/// Machine code of one kernel; made once for all steps that a test tries it on.
pub fn compile(kernel: &Kernel, target: &Target, choice: Option<Choice>) -> Image {
    static KNOWN: Mutex<BTreeMap<String, Image>> = Mutex::new(BTreeMap::new());
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let key = format!("{} {:?} {choice:?}\n{}", target.name, kernel.range, text::print_graph(&kernel.body));
    if let Some(image) = known().get(&key) {
        return image.clone();
    }
    let tuning = Tuning { kernels: choice.into_iter().map(|choice| Tuned::new(kernel, target, choice)).collect() };
    let image = compile_kernels(std::slice::from_ref(kernel), target, &tuning, 1, &mut |_, _| {});
    let image = image.unwrap_or_else(|e| panic!("{}: {e}", target.name));
    known().insert(key, image.clone());
    image
}

/// Calls an image's only kernel with each of those numbers of workers and gives its results.
pub fn run(
    machine: Machine,
    image: &Image,
    kernel: &Kernel,
    inputs: &[Given],
    step: &Step,
    threads: &[usize],
) -> Vec<Vec<Value>> {
    run_with(kernel, inputs, step, threads, |runs, arrays| {
        let args = arrays.args();
        match machine {
            Machine::Here => runs.iter_mut().for_each(|(memories, n)| call(image, memories, &args, *n)),
            Machine::Qemu(qemu) => qemu.call(image, runs, arrays),
        }
    })
}

/// Lays out a kernel's arguments for each of those numbers of workers, lets `call` run it on them and gives its results.
fn run_with(
    kernel: &Kernel,
    inputs: &[Given],
    step: &Step,
    threads: &[usize],
    call: impl FnOnce(&mut [(Vec<Memory>, usize)], &mut StepArrays),
) -> Vec<Vec<Value>> {
    let body = &kernel.body;
    let mut rows = vec![];
    for (input, given) in body.inputs.iter().zip(inputs) {
        if let (Some(Dim::R), Given::Value(Value::Ints(ints))) = (input.ty.rows(), given) {
            rows = ints.data.clone();
        }
    }
    let lengths: Vec<usize> = step.sequences.iter().map(|s| s.past + s.len).collect();
    let pool = Pool::new(step, &kernel.groups);
    let most = threads.iter().max().copied().unwrap_or(1);
    let mut arrays = StepArrays::new(step, rows, &pool, (kernel.scratch_bytes(), most));
    let mut memories: Vec<Memory> = vec![];
    for (input, given) in body.inputs.iter().zip(inputs) {
        match (given, &input.ty) {
            (_, Type::Step) => {}
            (Given::Value(value), ty) => memories.push(Memory::of_value(ty, value, &pool)),
            (Given::Weight(weight), _) => memories.push(Memory::new(&packed(weight))),
        }
    }
    let outputs = memories.len();
    for (_, v) in body.results.iter().filter(|(_, v)| !in_place(body, *v)) {
        memories.push(Memory::for_result(body.ty(*v), arrays.rows_of(body.ty(*v))));
    }
    let mut runs: Vec<(Vec<Memory>, usize)> = threads.iter().map(|n| (memories.clone(), *n)).collect();
    call(&mut runs, &mut arrays);
    arrays.scratch.check_canaries(&format!("scratch of `{}`", kernel.name));
    let results = |(memories, _): &(Vec<Memory>, usize)| {
        memories.iter().enumerate().for_each(|(i, m)| m.check_canaries(&format!("argument {i} of `{}`", kernel.name)));
        let mut results = outputs..;
        // caches, and estimates, are changed where they are
        let changed = |v| body.argument(body.root(v)).expect("an input in memory");
        let read = |v| match body.ty(v) {
            ty @ Type::Cache { .. } => memories[changed(v)].read_cache(ty, &lengths, &pool),
            ty if in_place(body, v) => memories[changed(v)].read_rows(ty, arrays.rows_of(ty)),
            ty => memories[results.next().unwrap_or(0)].read_rows(ty, arrays.rows_of(ty)),
        };
        body.results.iter().map(|(_, v)| *v).map(read).collect()
    };
    runs.iter().map(results).collect()
}

impl Given {
    /// What the interpreter computes with.
    pub fn reals(&self) -> Value {
        match self {
            Given::Value(value) => value.clone(),
            Given::Weight(weight) => Value::of_weight(weight).unwrap_or_else(|e| panic!("{e}")),
        }
    }
}

fn packed(weight: &Weight) -> Vec<u8> {
    let mut bytes = vec![];
    let packed = pack::pack(weight, 1, &mut |b| {
        bytes.extend_from_slice(b);
        Ok(())
    });
    packed.unwrap_or_else(|e| panic!("{e}"));
    bytes
}

type Entry = unsafe extern "C" fn(*const usize, *const StepArgs, i64, i64);

fn call(image: &Image, memories: &mut [Memory], step: &StepArgs, threads: usize) {
    let mut code = memmap2::MmapMut::map_anon(image.bytes.len()).expect("memory for code");
    code.copy_from_slice(&image.bytes);
    let code = code.make_exec().expect("executable memory");
    let [(_, offset)] = image.entries.as_slice() else { panic!("expected one kernel") };
    // SAFETY: the image is code for this machine and the offset is that of a function of this type.
    let entry: Entry = unsafe { std::mem::transmute(code[*offset..].as_ptr()) };
    let args: Vec<usize> = memories.iter_mut().map(|m| m.address()).collect();
    let (args, step) = (&args, step as *const StepArgs as usize);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            // SAFETY: arguments are in the order and layout of the calling convention and outlive the scope; the kernel's
            // workers write disjoint parts of them (what this harness is there to find out).
            scope
                .spawn(move || unsafe { entry(args.as_ptr(), step as *const StepArgs, thread as i64, threads as i64) });
        }
    });
}

#[cfg(test)]
mod tests {
    #[test]
    fn contractions_agree_with_the_interpreter() {
        let text = "graph @k(%x: a8[t, 64], %w: q4_1[40, 64]) stage planned when t = 1..8 {
            %y = matmul %x, %w
            return y = %y
        }";
        super::case(text, &[(0, 1)], 1e-5);
        super::case(text, &[(0, 3), (70, 4)], 1e-5);
    }
}
