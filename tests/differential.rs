//! Random legal models from the op table, through every pass and the CPU backend into an artifact, and stepped by the
//! runtime, against the interpreter.
//!
//! `MANSARD_SEEDS=1000..2000 cargo test -p mansard-tests --test differential` runs more of them.

use mansard::driver::{CompileOptions, pass_options};
use mansard_ir::eval::Interpreter;
use mansard_ir::ops::Class;
use mansard_ir::{Model, sample};
use mansard_passes::{Event, Hooks};
use mansard_runtime::{Artifact, Engine, EngineOptions, OpenOptions, Rows, Work};
use std::sync::Arc;

/// Nodes of a random graph, about.
const NODES: usize = 48;

fn seeds() -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("MANSARD_SEEDS") else { return 0..24 };
    let bounds = text.split_once("..").and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let (first, end) = bounds.expect("MANSARD_SEEDS is FIRST..END");
    first..end
}

/// How far a value may be off, as a share of the largest. An activation that lies between two int8 codes may be rounded
/// either way after sums in another order, and what follows differs by about a step of its grid.
fn tolerance(model: &Model) -> f32 {
    let rounds = |class: Class| model.graphs.iter().flat_map(|g| &g.nodes).any(|n| n.op.class() == class);
    if rounds(Class::Quantize) { 4e-2 } else { 2e-3 }
}

fn check(seed: u64) {
    let model = sample::graph(seed, NODES).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    let options = CompileOptions::default();
    let target = mansard_backends::target("native").unwrap();
    let mut sink = |_: Event<'_>| {};
    let (plan, optimized, _) =
        mansard_passes::compile(model, &pass_options(target.clone(), &options), &mut Hooks::new(&mut sink))
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    let image = mansard_backends::compile(&plan, &target, 2, &mut |_, _| {}).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("random.mansard");
    let contents = mansard_backends::artifact::Contents {
        plan: &plan,
        info: &optimized.info,
        weights: &optimized.weights,
        images: &[(target, image)],
        provenance: &Default::default(),
    };
    mansard_backends::artifact::write(&path, &contents, 2, &mut |_, _| {}).unwrap();
    let artifact = Arc::new(Artifact::open(&path, &OpenOptions::default()).unwrap_or_else(|e| panic!("seed {seed}: {e}")));
    let mut engine = Engine::new(artifact, &EngineOptions::default()).unwrap();
    let mut oracle = Interpreter::new(&optimized);
    let (a, b) = (engine.new_sequence(), engine.new_sequence());
    let vocab = optimized.info.vocab as u32;
    let tokens = |n: u32, from: u32| -> Vec<u32> { (0..n).map(|i| (from + 7 * i) % vocab).collect() };
    // A prompt; a decode beside a longer prompt; two decodes; a chunk that needs another variant.
    let steps = [(vec![tokens(3, 1)], 0), (vec![tokens(1, 5), tokens(11, 2)], 1), (vec![tokens(1, 9), tokens(1, 4)], 2)];
    for (work, index) in &steps {
        let keyed: Vec<(usize, &[u32])> = work.iter().enumerate().map(|(i, t)| (i, t.as_slice())).collect();
        let total: usize = work.iter().map(Vec::len).sum();
        let rows: Vec<usize> = (0..total).collect();
        let want = oracle.step(&keyed, &rows).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let work: Vec<Work<'_>> = [a, b]
            .into_iter()
            .zip(work)
            .map(|(sequence, tokens)| Work { sequence, tokens, rows: Rows::All })
            .collect();
        let got = engine.step(&work).unwrap_or_else(|e| panic!("seed {seed}, step {index}: {e}"));
        for (name, want) in &want {
            let width = want.data.len() / total;
            let largest = want.data.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
            for (row, found) in got.rows(name).unwrap().iter().enumerate() {
                for (column, (x, y)) in found.iter().zip(&want.data[row * width..][..width]).enumerate() {
                    let off = (x - y).abs() / largest;
                    assert!(
                        off <= tolerance(&optimized),
                        "seed {seed}, step {index}, `{name}`[{row}, {column}]: expected {y}, found {x} (largest {largest})"
                    );
                }
            }
        }
    }
}

#[test]
fn random_models_agree_with_the_interpreter() {
    for seed in seeds() {
        check(seed);
    }
}
