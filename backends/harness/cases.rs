//! Every kernel that the case files and the tiny checkpoints come to, on every level.

use super::{Kernel, TokenRange, check, inputs, planned};
use mansard_frontend as frontend;
use mansard_ir::eval::Step;
use mansard_ir::kernel::KernelKind;
use mansard_ir::ops::Class;
use mansard_ir::{DType, Model, Node, Stage, Target, Type, sample, text};
use mansard_passes::{self as passes, Event, Hooks, Options, State, manager};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests")
}

/// The kernels of a model: its planned graphs, or what the passes that its stage is before make of it. One plan serves all
/// levels, as in an artifact with all of them.
fn kernels(model: Model) -> mansard_ir::Result<Vec<Kernel>> {
    let stage = model.graphs.iter().map(|g| g.stage).max().unwrap_or(Stage::Imported);
    if stage == Stage::Planned {
        return Ok(model.graphs.into_iter().map(planned).collect());
    }
    let levels: Vec<&str> = crate::target::names().into_iter().filter(|name| *name != "native").collect();
    let mut options = Options::new(Target::common(&crate::targets(&levels)?)?);
    options.limits.context = Some(512);
    let left = passes::PIPELINE.iter().filter(|name| passes::pass(name).is_ok_and(|pass| pass.from >= stage));
    let left: Vec<&str> = left.copied().collect();
    let mut sink = |_: Event<'_>| {};
    let (state, _) = manager::run(&left, State::new(model), &options, &mut Hooks::new(&mut sink))?;
    Ok(state.plan.map(|plan| plan.kernels).unwrap_or_default())
}

/// A step of the fewest tokens that a kernel is for, and one of a few more in two sequences.
pub fn steps(range: TokenRange, kind: KernelKind) -> Vec<Step> {
    let more = range.max.min(range.min + 5);
    let mut steps = vec![Step::new(&[(3, range.min)])];
    if more > range.min {
        steps.push(Step::new(&[(0, more - 1), (66, 1)]));
    }
    match kind {
        // What a step that wants all logits finds in place of estimates is nobody's business.
        KernelKind::Estimate => steps.into_iter().map(|step| step.wanting(2)).collect(),
        KernelKind::Rescore => steps.iter().flat_map(|step| [step.clone(), step.clone().wanting(2)]).collect(),
        _ => steps,
    }
}

/// Sums in another order differ in the last digits; where such a value lies between two codes or two f16 numbers, either
/// is right.
pub fn tolerance(kernel: &Kernel) -> f64 {
    let body = &kernel.body;
    let rounds = |n: &Node| n.op.class() == Class::Quantize || matches!(n.ty, Type::Cache { dtype: DType::F16, .. });
    if body.nodes.iter().any(rounds) { 1e-2 } else { 1e-4 }
}

/// Checks those that no earlier call has; gives how many.
fn check_all(seen: &mut BTreeSet<String>, kernels: &[Kernel]) -> usize {
    let mut checked = 0;
    for kernel in kernels {
        let mut body = kernel.body.clone();
        body.name = String::new();
        if seen.insert(format!("{:?} {}", kernel.range, text::print_graph(&body))) {
            checked += 1;
            for step in steps(kernel.range, kernel.kind().unwrap_or_else(|e| panic!("{e}"))) {
                check(kernel, &inputs(kernel, &step, 1), &step, tolerance(kernel));
            }
        }
    }
    checked
}

/// What the case files come to, by file.
pub fn kernels_of_cases() -> impl Iterator<Item = (String, Vec<Kernel>)> {
    let folders = ["codegen", "fusion", "passes"].into_iter().flat_map(|folder| {
        let entries = std::fs::read_dir(tests().join("cases").join(folder)).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
        paths.sort();
        paths
    });
    folders.filter(|p| p.extension().is_some_and(|e| e == "mir")).filter_map(|path| {
        let case = std::fs::read_to_string(&path).unwrap();
        if case.lines().any(|l| l.starts_with("# error:")) {
            return None;
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let mut model = text::parse(&name, &case).unwrap();
        sample::fill_weights(&mut model, 5).unwrap();
        let kernels = kernels(model).unwrap_or_else(|e| panic!("{name}: {e}"));
        Some((name, kernels))
    })
}

/// Dense and grouped attention, windows, several norms; and experts.
pub fn kernels_of_checkpoints() -> impl Iterator<Item = (String, Vec<Kernel>)> {
    ["gemma3", "mixtral"].into_iter().map(|family| {
        let model = frontend::open(&tests().join("goldens").join(family), &frontend::Options::default()).unwrap();
        (family.to_owned(), kernels(model).unwrap_or_else(|e| panic!("{family}: {e}")))
    })
}

#[test]
fn every_kernel_of_the_cases() {
    let mut seen = BTreeSet::new();
    let checked: usize = kernels_of_cases().map(|(_, kernels)| check_all(&mut seen, &kernels)).sum();
    assert!(checked > 60, "{checked} kernels");
}

#[test]
fn every_kernel_of_two_checkpoints() {
    let mut seen = BTreeSet::new();
    for (family, kernels) in kernels_of_checkpoints() {
        assert!(check_all(&mut seen, &kernels) > 10, "{family}: {} kernels", kernels.len());
    }
}
