//! Random legal graphs through the whole pipeline: what comes out computes the same, and the search stays within bounds.

mod common;

use common::{Random, difference, evaluate, model, target};
use ir::ops::Class;
use ir::{Attr, Attrs, DType, Dim, Graph, Op, Type, ValueId};
use mansard_ir as ir;
use mansard_passes::{Hooks, Options, State, manager};

fn attributes(op: Op, random: &mut Random) -> Attrs {
    use ir::ops::AttrKind::*;
    let mut value = |name: &str, kind| match (name, kind) {
        ("heads" | "top", Int) => Attr::Int(2),
        (_, Int) => Attr::Int(0),
        ("softcap", Float) => Attr::Float(0.0),
        (_, Float) => Attr::Float(0.75 + f64::from(random.next()) * 0.25),
        (_, Bool) => Attr::Bool(true),
        (_, Str) => Attr::Str("half".into()),
    };
    Attrs::new(op.row().attrs.iter().map(|a| (a.name, value(a.name, a.kind))).collect::<Vec<_>>())
}

fn graph(seed: u64, nodes: usize) -> Graph {
    let mut random = Random(seed);
    let mut pick = move |n: usize| ((random.next() + 1.0) * 0.5 * n as f32) as usize % n;
    let mut attrs_random = Random(seed + 1);
    let mut g = Graph::new("main");
    let (t, n) = (Dim::T, Dim::N);
    g.input("x", Type::f32([t, n(64)]));
    g.input("y", Type::f32([t, n(64)]));
    g.input("angles", Type::f32([t, n(16)]));
    g.input("rows", Type::tensor(DType::I32, [Dim::R]));
    g.input("step", Type::Step);
    for (role, name) in [(ir::CacheRole::Keys, "keys"), (ir::CacheRole::Values, "values")] {
        g.input(name, Type::Cache { role, heads: 2, dim: 32, dtype: DType::F32 });
    }
    g.weight("v", Type::f32([n(64)]));
    g.weight("v32", Type::f32([n(32)]));
    g.weight("w", Type::f32([n(64), n(64)]));
    g.weight("q", Type::tensor(DType::Q8_0, [n(64), n(64)]));
    g.weight("router", Type::f32([n(4), n(64)]));
    g.weight("e", Type::f32([n(4), n(64), n(64)]));
    let ops: Vec<Op> = Op::all().filter(|o| !matches!(o.class(), Class::Weight | Class::WeightFold)).collect();
    while g.nodes.len() < nodes {
        let op = ops[pick(ops.len())];
        let recent = |pick: &mut dyn FnMut(usize) -> usize| ValueId(pick(g.len()) as u32);
        let operands: Vec<ValueId> = op.row().operands.iter().map(|_| recent(&mut pick)).collect();
        // a cache that is appended to is read by nothing else
        let spent = |v: &ValueId| matches!(g.ty(*v), Type::Cache { .. }) && g.uses()[v.0 as usize] > 0;
        if operands.iter().any(spent) {
            continue;
        }
        let attrs = attributes(op, &mut attrs_random);
        let types: Vec<&Type> = operands.iter().map(|o| g.ty(*o)).collect();
        // what weights alone compute has no place in a step
        if op.infer(&types, &attrs).is_ok_and(|ty| !ty.is_static()) {
            _ = g.push_op(op, &operands, attrs);
        }
    }
    let uses = g.uses();
    for value in g.values().collect::<Vec<_>>() {
        let dtype = g.ty(value).as_tensor().map(|(d, _)| d);
        if uses[value.0 as usize] == 0 && g.node(value).is_some() && dtype == Some(DType::F32) && !g.ty(value).is_static() {
            g.result(format!("r{}", value.0), value);
        }
    }
    g
}

#[test]
fn random_graphs_keep_their_meaning() {
    let mut sink = |_: manager::Event<'_>| {};
    let mut kernels = 0;
    for seed in 0..60u64 {
        let g = graph(seed * 7919 + 1, 14 + (seed as usize % 40));
        if g.results.is_empty() {
            continue;
        }
        let mut m = model(vec![g], 1, &[]);
        // inputs that a step does not have
        let mut given = Graph::new("given");
        let p = given.input("positions", Type::tensor(DType::I32, [Dim::T]));
        for (name, width) in [("x", 64), ("y", 64), ("angles", 16)] {
            let w = given.weight(name, Type::f32([Dim::N(16), Dim::N(width)]));
            let x = given.push("embed", &[p, w], Attrs::none()).unwrap();
            given.result(name, x);
        }
        m.graphs.insert(0, given);
        m.calls.insert(0, ir::model::Call { graph: "given".into(), prefix: "given.".into() });
        let options = Options::new(target());
        let run = |names: &[&str], m: ir::Model, sink: &mut dyn FnMut(manager::Event<'_>)| {
            manager::run(names, State::new(m), &options, &mut Hooks::new(sink))
                .unwrap_or_else(|e| panic!("seed {seed}: {e}"))
        };
        let (before, _) = run(&["canonicalize", "precision"], m.clone(), &mut sink);
        let start = std::time::Instant::now();
        let (after, report) = run(mansard_passes::PIPELINE, m, &mut sink);
        println!("seed {seed}: {} nodes, {:.0} ms", report.passes.len(), start.elapsed().as_secs_f64() * 1e3);
        report.passes[2].notes.iter().for_each(|n| println!("   {n}"));
        assert!(start.elapsed().as_secs() < 60, "seed {seed}: {}", report.times());
        kernels += after.plan.map_or(0, |p| p.kernels.len());
        let canonical = before.model.graphs.iter().find(|g| g.name == "main").unwrap();
        for optimized in after.model.graphs.iter().filter(|g| g.name == "main") {
            let (a, b) = (evaluate(canonical, seed, (4, 2, 3)), evaluate(optimized, seed, (4, 2, 3)));
            for (name, value) in &a {
                let off = difference(value, &b[name]);
                assert!(off < 2e-3, "seed {seed} {name}: off by {off}\n{}", ir::text::print_graph(optimized));
            }
        }
    }
    assert!(kernels > 200, "{kernels}");
}
