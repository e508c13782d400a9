//! Random legal models from the op table, through every pass and the CPU backend into an artifact, and stepped by the
//! runtime, against the interpreter.
//!
//! `MANSARD_SEEDS=1000..2000 cargo test -p mansard-tests --test differential` runs more of them.

use mansard::driver::CompileOptions;
use mansard_ir::model::Source;
use mansard_ir::{DType, Kind, Model, Op, sample};
use mansard_tests::oracle::{self, Agreement};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Nodes of a random graph, about.
const NODES: usize = 40;

fn seeds() -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("MANSARD_SEEDS") else { return 0..64 };
    let bounds = text.split_once("..").and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let (first, end) = bounds.expect("MANSARD_SEEDS is FIRST..END");
    first..end
}

/// What this machine runs: its own level, and the one that any machine runs.
const TARGETS: [&str; 2] = ["native", "x86-64-v3"];

/// What matrices are stored as: mostly the formats that the model has.
const WEIGHTS: [Option<DType>; 6] =
    [None, Some(DType::E4M3_G128), Some(DType::BF16), None, Some(DType::Q8_0), Some(DType::NVFP4)];

fn check(seed: u64) -> Result<Agreement, String> {
    let target = TARGETS[seed as usize % TARGETS.len()];
    let place = |e: mansard_ir::Error| format!("seed {seed}, {target}: {e}");
    let model = sample::graph(seed, NODES).map_err(place)?;
    let target = mansard_backends::target(target).map_err(place)?;
    let options = CompileOptions { weights: WEIGHTS[seed as usize / 2 % WEIGHTS.len()], ..CompileOptions::default() };
    match oracle::check(model.clone(), target.clone(), &options) {
        // Rows that do not fill whole groups.
        Err(e) if e.kind() == Kind::Usage => oracle::check(model, target, &CompileOptions::default()).map_err(place),
        agreement => agreement.map_err(place),
    }
}

#[test]
fn random_models_agree_with_the_interpreter() {
    let seeds = seeds();
    let next = AtomicU64::new(seeds.start);
    let (failed, went) = (Mutex::new(vec![]), Mutex::new(vec![]));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get().min(4)) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    match std::panic::catch_unwind(|| check(seed)) {
                        Ok(Ok(agreement)) => went.lock().unwrap().push(agreement),
                        Ok(Err(message)) => failed.lock().unwrap().push(message),
                        Err(_) => failed.lock().unwrap().push(format!("seed {seed}: panic")),
                    }
                }
            });
        }
    });
    let (failed, went) = (failed.into_inner().unwrap(), went.into_inner().unwrap());
    assert!(failed.is_empty(), "{} of {} seeds:\n{}", failed.len(), seeds.end - seeds.start, failed.join("\n"));
    // A model that noise throws about says little; most must not be like that.
    let loose = went.iter().filter(|a| a.bound > 0.1).count();
    let (worst, runs) = went.iter().fold((0.0, 0), |(off, runs), a| (a.off.max(off), a.runs.max(runs)));
    println!("{} models, {loose} with a bound over 0.1; largest difference {worst:.2e}, most runs {runs}", went.len());
    assert!(loose * 10 <= went.len(), "{loose} of {} models check next to nothing", went.len());
}

/// One weight of the interpreter's is 1 % larger: no bound is so wide that this passes.
#[test]
fn a_wrong_weight_is_found() {
    for seed in 0..4 {
        let model = sample::graph(seed, NODES).unwrap();
        let last = model.graphs.iter().flat_map(|g| &g.nodes).rfind(|n| n.op == Op::WEIGHT);
        let prefix = model.calls.last().map_or("", |c| c.prefix.as_str());
        let name = format!("{prefix}{}", last.unwrap().attrs.str("name"));
        let grow = |model: &mut Model| {
            let weight = model.weights.get_mut(&name).unwrap();
            let values: Vec<f32> = weight.read_all().unwrap().iter().map(|x| x * 1.01).collect();
            weight.source = Source::Values(values.into());
        };
        let target = mansard_backends::target("x86-64-v3").unwrap();
        let outcome = oracle::check_against(model, target, &CompileOptions::default(), grow);
        assert!(outcome.is_err(), "seed {seed}: {outcome:?} with another `{name}`");
    }
}
