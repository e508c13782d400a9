//! Random legal models through the whole pipeline: what comes out computes the same over several steps.

extern crate mansard_ir as ir;

mod common;

use common::{difference, target};
use ir::eval::{Cache, Interpreter, Step, Tensor, Value};
use ir::plan::{Arg, Plan};
use ir::{Model, Type, sample, text};
use mansard_passes::{Hooks, Options, PIPELINE, State, manager};
use std::collections::{BTreeMap, HashMap};

/// The model's outputs over a prefill of two sequences and a decode of both, one result after the other.
fn run(model: &Model) -> Vec<Value> {
    let mut interpreter = Interpreter::new(model);
    type Asked<'a> = (&'a [(usize, &'a [u32])], &'a [usize]);
    let steps: [Asked<'_>; 3] = [
        (&[(0, &[1, 2, 3]), (1, &[0, 1, 2, 3, 1, 2, 3, 0, 2])], &[2, 11, 0]),
        (&[(0, &[3]), (1, &[2])], &[0, 1]),
        (&[(1, &[1])], &[0]),
    ];
    let outputs = steps.iter().flat_map(|(sequences, rows)| {
        let outputs = interpreter.step(sequences, rows).unwrap_or_else(|e| panic!("{e}"));
        outputs.into_values().map(Value::Tensor)
    });
    outputs.collect()
}

/// What the program of a plan computes in one step without a past: its kernels interpreted, in order, on its memory.
fn replay(plan: &Plan, model: &Model, lengths: &[usize], rows: &[i32]) -> BTreeMap<String, Value> {
    let program = &plan.program;
    let step = Step::new(&lengths.iter().map(|n| (0, *n)).collect::<Vec<_>>());
    let tokens: usize = lengths.iter().sum();
    let variant = program.variant(tokens).unwrap();
    let weights: Vec<Value> = plan.packs.iter().map(|p| packed(model, p)).collect();
    let empty = |c: &ir::plan::CacheSpec| Cache::empty(&text::parse_type(&c.ty).unwrap(), lengths.len()).unwrap();
    let mut caches: Vec<Value> = program.caches.iter().map(|c| Value::Cache(empty(c))).collect();
    let mut buffers: HashMap<u32, Value> = HashMap::new();
    for launch in &variant.launches {
        let body = &plan.kernels[launch.kernel.0 as usize].body;
        let mut args = launch.args.iter();
        let inputs: Vec<Value> = body
            .inputs
            .iter()
            .map(|input| match input.ty {
                Type::Step => Value::Step(step.clone()),
                _ => match args.next().unwrap() {
                    Arg::Buffer(b) => buffers[&b.0].clone(),
                    Arg::Weight(w) => weights[w.0 as usize].clone(),
                    Arg::Cache(c) => caches[c.0 as usize].clone(),
                    Arg::Tokens => Value::from_ints((0..tokens).map(|i| (i * 3 % 4) as i32).collect::<Vec<_>>()),
                    Arg::Positions => Value::from_ints(step.positions()),
                    Arg::Rows => Value::from_ints(rows),
                },
            })
            .collect();
        let results = ir::eval::graph(body, &inputs, &mut |name, _| panic!("weight {name} in a kernel")).unwrap();
        let cache_args = body.inputs.iter().filter(|i| i.ty != Type::Step).zip(&launch.args);
        let cache_args: Vec<_> = cache_args.filter(|(i, _)| matches!(i.ty, Type::Cache { .. })).collect();
        for ((name, _), value) in body.results.iter().zip(results) {
            match (&value, cache_args.iter().find(|(i, _)| i.name == *name)) {
                (Value::Cache(_), Some((_, Arg::Cache(c)))) => caches[c.0 as usize] = value,
                _ => match args.next() {
                    Some(Arg::Buffer(b)) => _ = buffers.insert(b.0, value),
                    other => panic!("{name} goes to {other:?}"),
                },
            }
        }
    }
    program.outputs.iter().map(|o| (o.name.clone(), buffers[&o.buffer.0].clone())).collect()
}

fn packed(model: &Model, pack: &ir::plan::Pack) -> Value {
    let weight = model.weights.make(&pack.recipe).unwrap();
    Value::Tensor(Tensor::new(weight.dtype_shape().1, weight.read_all().unwrap()))
}

#[test]
fn plans_compute_what_models_do() {
    let mut sink = |_: manager::Event<'_>| {};
    let options = Options::new(target());
    for seed in 100..120u64 {
        let model = sample::graph(seed, 30).unwrap_or_else(|e| panic!("{e}"));
        let (after, _) = manager::run(PIPELINE, State::new(model), &options, &mut Hooks::new(&mut sink))
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let (plan, model) = (after.plan.unwrap(), after.model);
        for (lengths, rows) in [(&[3usize, 9][..], &[2, 11, 0][..]), (&[1, 1], &[0, 1])] {
            let total: usize = lengths.iter().sum();
            let tokens: Vec<u32> = (0..total).map(|i| (i * 3 % 4) as u32).collect();
            let sequences = [(0, &tokens[..lengths[0]]), (1, &tokens[lengths[0]..])];
            let rows_of: Vec<usize> = rows.iter().map(|r| *r as usize).collect();
            let expected = Interpreter::new(&model).step(&sequences, &rows_of).unwrap();
            let found = replay(&plan, &model, lengths, rows);
            for (name, value) in expected {
                let off = difference(&Value::Tensor(value), &found[&name]);
                assert!(off < 1e-6, "seed {seed} {name}: off by {off}");
            }
        }
    }
}

#[test]
fn random_models_keep_their_meaning() {
    let mut sink = |_: manager::Event<'_>| {};
    let options = Options::new(target());
    let (mut kernels, mut slowest) = (0, 0.0f64);
    for seed in 0..30u64 {
        let model = sample::graph(seed, 10 + seed as usize * 2).unwrap_or_else(|e| panic!("{e}"));
        let mut passes = |names: &[&str]| {
            manager::run(names, State::new(model.clone()), &options, &mut Hooks::new(&mut sink))
                .unwrap_or_else(|e| panic!("seed {seed}: {e}\n{}", ir::text::print_model(&model)))
        };
        let (canonical, _) = passes(&["canonicalize"]);
        let (rounded, _) = passes(&["canonicalize", "precision"]);
        let (after, report) = passes(PIPELINE);
        slowest = report.passes.iter().map(|p| p.elapsed.as_secs_f64()).fold(slowest, f64::max);
        kernels += after.plan.map_or(0, |p| p.kernels.len());
        for (before, after) in [(&model, &canonical.model), (&rounded.model, &after.model)] {
            for (a, b) in run(before).iter().zip(&run(after)) {
                let off = difference(a, b);
                assert!(off < 5e-3, "seed {seed}: off by {off}\n{}", ir::text::print_model(after));
            }
        }
    }
    println!("{kernels} kernels, slowest pass {slowest:.2} s");
    assert!(kernels > 200, "{kernels}");
}
