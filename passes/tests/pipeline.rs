//! Whole pipelines on graphs of real shapes: the optimized graphs compute what the canonical ones do, kernels are legal,
//! and buffers that are alive together do not overlap.

extern crate mansard_ir as ir;

mod common;

use common::*;
use ir::kernel;
use ir::plan::{Arg, Plan};
use ir::{DType, Graph, Model};

use mansard_passes::{Hooks, Options, State, compile, manager};
use std::collections::BTreeMap;

fn options() -> Options {
    Options::new(target())
}

/// Compiles, prints what came out, checks it, and gives the launches of each variant.
fn check(title: &str, model: Model, tolerance: f32) -> Vec<usize> {
    let start = std::time::Instant::now();
    let mut sink = |_: manager::Event<'_>| {};
    let (before, _) =
        manager::run(&["canonicalize", "precision"], State::new(model.clone()), &options(), &mut Hooks::new(&mut sink))
            .unwrap_or_else(|e| panic!("{e}"));
    let (plan, after, report) =
        compile(model, &options(), &mut Hooks::new(&mut sink)).unwrap_or_else(|e| panic!("{e}"));
    println!("== {title}: {:.0} ms\n{}", start.elapsed().as_secs_f64() * 1e3, report.times());
    for graph in &after.graphs {
        println!("  @{} {:?}", graph.name, graph.range);
        for group in &graph.kernels {
            let kind = kernel::kind(graph, &group.values).unwrap_or_else(|e| panic!("{e}"));
            let ops: Vec<&str> = group.values.iter().filter_map(|v| graph.node(*v)).map(|n| n.op.name()).collect();
            println!("    {:<9}{}", kind.name(), ops.join(" "));
        }
        equal(before.model.graphs.iter().find(|g| g.name == graph.name).unwrap(), graph, tolerance);
    }
    memory(&plan);
    plan.program.variants.iter().map(|v| v.launches.len()).collect()
}

fn equal(canonical: &Graph, optimized: &Graph, tolerance: f32) {
    for (seed, dims) in [(1, (4, 2, 2)), (2, (6, 1, 3))] {
        let expected = evaluate(canonical, seed, dims);
        let found = evaluate(optimized, seed, dims);
        for (name, value) in &expected {
            let difference = difference(value, &found[name]);
            assert!(difference <= tolerance, "@{} {name}: off by {difference}", canonical.name);
        }
    }
}

/// Replays every variant: what a launch reads must still be what was last written there for it, and a launch without a
/// barrier must not touch what launches since the last barrier write, nor write what they read.
fn memory(plan: &Plan) {
    let program = &plan.program;
    for variant in &program.variants {
        let mut owner: BTreeMap<usize, usize> = BTreeMap::new(); // byte/64 -> launch that wrote it
        let mut written_by: BTreeMap<u32, usize> = BTreeMap::new(); // buffer -> launch
        let (mut reads, mut writes): (Vec<usize>, Vec<usize>) = (vec![], vec![]);
        for (number, launch) in variant.launches.iter().enumerate() {
            let kernel = &plan.kernels[launch.kernel.0 as usize];
            let inputs = kernel.body.inputs.iter().filter(|i| i.ty != ir::Type::Step).count();
            let lines = |b: u32| {
                let buffer = &program.buffers[b as usize];
                let most = buffer.rows.most(&program.limits);
                let rows = if buffer.rows == ir::plan::RowCount::Tokens { most.min(variant.tokens.max) } else { most };
                buffer.offset / 64..(buffer.offset + rows.next_multiple_of(16) * buffer.row_bytes).div_ceil(64)
            };
            if launch.barrier {
                (reads, writes) = (vec![], vec![]);
            }
            for (position, arg) in launch.args.iter().enumerate() {
                let Arg::Buffer(b) = arg else { continue };
                assert!(lines(b.0).end * 64 <= program.arena_bytes);
                for line in lines(b.0) {
                    if position < inputs {
                        assert_eq!(owner.get(&line), written_by.get(&b.0), "launch {number} reads overwritten {b}");
                        assert!(!writes.contains(&line), "launch {number} needs a barrier");
                    } else {
                        assert!(!writes.contains(&line) && !reads.contains(&line), "launch {number} needs a barrier");
                        owner.insert(line, number);
                    }
                }
                if position >= inputs {
                    written_by.insert(b.0, number);
                }
            }
            for (position, arg) in launch.args.iter().enumerate() {
                if let Arg::Buffer(b) = arg {
                    if position < inputs { &mut reads } else { &mut writes }.extend(lines(b.0));
                }
            }
        }
    }
}

fn with_ends(layer: Graph, s: Shape) -> Model {
    model(vec![embed(s, 100, true), layer, head(s, 100)], 3, &["logits"])
}

#[test]
fn llama_float() {
    let launches = check("llama f32", with_ends(layer(SMALL, Style::default()), SMALL), 1e-4);
    assert!(launches.iter().all(|n| *n <= 3 * 8 + 3), "{launches:?}");
}

#[test]
fn llama_quantized() {
    let s = Shape { weights: DType::Q4_1, ..SMALL };
    let launches = check("llama q4_1", with_ends(layer(s, Style::default()), s), 1e-4);
    assert!(launches[0] <= 3 * 7 + 3, "{launches:?}");
    assert!(launches.iter().all(|n| *n <= 3 * 10 + 3), "{launches:?}");
}

#[test]
fn gemma() {
    let s = Shape { weights: DType::Q5_0, ..SMALL };
    let style = Style { qk_norm: true, sandwich: true, ..Style::default() };
    check("gemma q5_0", with_ends(layer(s, style), s), 1e-4);
    check("gemma f32", with_ends(layer(SMALL, style), SMALL), 1e-4);
}

#[test]
fn experts() {
    let style = Style { experts: true, ..Style::default() };
    check("experts f32", with_ends(layer(SMALL, style), SMALL), 1e-4);
    let s = Shape { weights: DType::Q8_0, ..SMALL };
    check("experts q8_0", with_ends(layer(s, style), s), 1e-4);
}

#[test]
fn encoder() {
    for weights in [DType::F32, DType::Q4_1] {
        let s = Shape { weights, ..SMALL };
        check(&format!("bert {weights}"), model(vec![embed(s, 100, false), bert(s)], 3, &["x"]), 1e-4);
    }
}

#[test]
fn the_same_model_gives_the_same_plan() {
    let run = || {
        let s = Shape { weights: DType::Q4_1, ..SMALL };
        let mut sink = |_: manager::Event<'_>| {};
        let (plan, ..) =
            compile(with_ends(layer(s, Style::default()), s), &options(), &mut Hooks::new(&mut sink)).unwrap();
        ir::text::print_plan(&plan)
    };
    assert_eq!(run(), run());
}

/// At the size of a real model: an expert's kernels, found in little time.
#[test]
fn real_sizes() {
    let s = Shape { hidden: 576, inner: 1536, heads: 9, kv_heads: 3, dim: 64, weights: DType::Q4_1 };
    let gemma = Style { qk_norm: true, sandwich: true, ..Style::default() };
    let g = Shape { hidden: 640, inner: 2048, heads: 4, kv_heads: 1, dim: 256, weights: DType::Q5_0 };
    for (title, s, style) in [("smollm2", s, Style::default()), ("gemma", g, gemma)] {
        let mut sink = |_: manager::Event<'_>| {};
        let m = model(vec![embed(s, 49152, true), layer(s, style), head(s, 49152)], 30, &["logits"]);
        let (plan, after, report) = compile(m, &options(), &mut Hooks::new(&mut sink)).unwrap();
        println!("== {title}\n{}", report.times());
        for graph in after.graphs.iter() {
            println!("  @{} {:?}", graph.name, graph.range);
            for group in &graph.kernels {
                let ops: Vec<&str> = group.values.iter().filter_map(|v| graph.node(*v)).map(|n| n.op.name()).collect();
                println!("    {}", ops.join(" "));
            }
        }
        memory(&plan);
        let launches: Vec<usize> = plan.program.variants.iter().map(|v| v.launches.len()).collect();
        assert!(launches[0] <= 30 * 8 + 3, "{launches:?}");
        assert!(launches.iter().all(|n| *n <= 30 * 11 + 4), "{launches:?}");
    }
}
