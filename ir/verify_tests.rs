//! Tests of [`super`].

use super::*;
use crate::model::{Source, Weight};
use crate::text::parse;

/// The verifier's message for a text, or `ok`.
fn says(text: &str) -> String {
    match verify_model(&parse("m", text).unwrap()) {
        Ok(_) => "ok".into(),
        Err(e) => e.to_string(),
    }
}

fn graph(inputs: &str, stage: &str, body: &str) -> String {
    says(&format!("graph @g({inputs}) stage {stage} {{ {body} }} model @m {{ }}"))
}

#[test]
fn canonical_has_one_spelling() {
    let x = "%x: f32[t, 4], %y: f32[t, 4]";
    let cases = [
        ("%a = add %x, %y return a = %a", "ok"),
        ("%a = add %y, %x return a = %a", "%2 = add: its operands can be swapped, so they must ascend"),
        ("%a = add %x, %y %b = add %x, %y return a = %a, b = %b", "%3 = add is %2 again"),
        ("%a = add %x, %y return x = %x", "%2 is not used"),
        ("%a = scale %x {by = 1} return a = %a", "%2 = scale changes nothing"),
        ("%a = offset %x {by = 0} return a = %a", "%2 = offset changes nothing"),
        ("kernel { %a = tanh %x } return a = %a", "kernels belong to the optimized stage"),
        ("return a = %x, a = %y", "two results are named `a`"),
        (
            "%w = weight \"w\" : f16[4] return w = %w",
            "%2 = weight: expected f32[n], dtype[n, k] or dtype[experts, n, k], found f16[4]",
        ),
    ];
    for (body, message) in cases {
        let expected = if message == "ok" { "ok".into() } else { format!("graph @g (canonical): {message}") };
        assert_eq!(graph(x, "canonical", body), expected);
    }
    assert_eq!(graph(x, "imported", "%a = add %y, %x %b = tanh %x return a = %a"), "ok");
}

#[test]
fn caches_are_threaded() {
    let inputs = "%x: f32[t, 1, 4], %keys: keys<f16>[c, 1, 4], %values: values<f16>[c, 1, 4], %step: step[s]";
    let says = |body: &str| graph(inputs, "imported", body);
    let attend = |keys: &str| {
        format!(
            "%k = append %keys, %x, %step %v = append %values, %x, %step \
                 %a = attend %x, {keys}, %v, %step {{scale = 1, causal = true, window = 0, softcap = 0}} "
        )
    };
    assert_eq!(says(&format!("{} return a = %a, keys = %k, values = %v", attend("%k"))), "ok");
    let stale = "graph @g (imported): %4 = append: the cache %1 it appends to is read elsewhere too";
    assert_eq!(says(&format!("{} return a = %a, keys = %k, values = %v", attend("%keys"))), stale);
    let renamed = "graph @g (imported): result k is the cache of input %keys";
    assert_eq!(says(&format!("{} return a = %a, k = %k", attend("%k"))), renamed);
}

#[test]
fn kernels_partition_the_nodes() {
    let says = |body: &str| graph("%x: f32[t, 4]", "optimized", body);
    let w = "%w = weight \"w\" : f32[4, 4]";
    assert_eq!(says(&format!("{w} kernel {{ %a = tanh %x }} kernel {{ %b = matmul %a, %w }} return b = %b")), "ok");
    let loose = format!("{w} kernel {{ %a = tanh %x }} %b = matmul %a, %w return b = %b");
    assert_eq!(says(&loose), "graph @g (optimized): %3 is in no kernel");
    let chained = format!("{w} kernel {{ %a = matmul %x, %w %b = matmul %a, %w }} return b = %b");
    let message = "graph @g (optimized): kernel 0: %3 = matmul: %2 must come from outside the kernel";
    assert_eq!(says(&chained), message);
}

#[test]
fn planned_bodies_are_kernels() {
    let says =
        |rest: &str| says(&format!("graph @g(%x: f32[t, 32], %w: q8_0[32, 32]) stage planned {rest} model @m {{}}"));
    assert_eq!(says("when t = 1..4 { %y = matmul %x, %w return y = %y }"), "ok");
    let message = "graph @g (planned): a kernel's body states its range of tokens";
    assert_eq!(says("{ %y = matmul %x, %w return y = %y }"), message);
    let message = "graph @g (planned): %2 = weight is in no kernel";
    assert_eq!(says("when t = 1..4 { %v = weight \"v\" : f32[32] %y = mul_row %x, %v return y = %y }"), message);
}

/// A graph that a text cannot express: types and order that only a pass could get wrong.
#[test]
fn types_are_inferred_again() {
    let mut model =
        parse("m", "graph @g(%x: f32[t, 4]) stage imported { %y = tanh %x %z = tanh %y return z = %z }").unwrap();
    model.graphs[0].nodes[1].ty = Type::f32([Dim::T, Dim::N(5)]);
    let message = "graph @g (imported): %2 = tanh: its type is f32[t, 5], the type rule says f32[t, 4]";
    assert_eq!(verify(&model.graphs[0]).unwrap_err().to_string(), message);
    model.graphs[0].nodes[0].operands = vec![ValueId(2)];
    let message = "graph @g (imported): %1 = tanh: %2 is not defined before this";
    assert_eq!(verify(&model.graphs[0]).unwrap_err().to_string(), message);
}

const EMBED: &str = "graph @embed(%tokens: i32[t]) stage imported { %w = weight \"table\" : f32[9, 4] %x = embed %tokens, %w return x = %x }\n";

#[test]
fn calls_fit_together() {
    let layer = "graph @layer(%x: f32[t, 5]) stage imported { return x = %x }\n";
    let model = |text: &str, calls: &str| says(&format!("{EMBED}{text}model @m {{ {calls} }}"));
    assert_eq!(model("", "call @embed output x"), "ok");
    assert_eq!(model("", "call @embed output y"), "output y is returned by no call");
    assert_eq!(model("", "call @head"), "no graph @head to call");
    let message = "call @layer with \"\": input %x is f32[t, 5], bound to f32[t, 4]";
    assert_eq!(model(layer, "call @embed call @layer"), message);
    let message = "call @layer with \"\": input %x is bound to nothing: no earlier call returns it";
    assert_eq!(model(layer, "call @layer"), message);
    assert_eq!(model(EMBED, "call @embed"), "two graphs @embed for the same number of tokens");
    let cached = "graph @c(%keys: keys<f16>[c, 1, 4]) stage imported { return keys = %keys }";
    assert_eq!(model(cached, "call @c x 2 with \"{i}.\""), "ok");
    assert_eq!(model(cached, "call @c call @c"), "call @c with \"\": another call has the cache `keys` already");
}

#[test]
fn weights_have_entries() {
    let mut model = parse("m", &format!("{EMBED} model @m {{ call @embed with \"a.\" output x }}")).unwrap();
    let weight = |shape: [usize; 2]| Weight { ty: Type::f32(shape.map(Dim::N)), source: Source::Synthetic { seed: 1 } };
    model.weights.insert("table", weight([9, 4]));
    let message = "call @embed with \"a.\": the model has no weight `a.table`";
    assert_eq!(verify_model(&model).unwrap_err().to_string(), message);
    model.weights.insert("a.table", weight([8, 4]));
    let message = "call @embed with \"a.\": weight `a.table` is f32[8, 4], the graph says f32[9, 4]";
    assert_eq!(verify_model(&model).unwrap_err().to_string(), message);
    model.weights.insert("a.table", weight([9, 4]));
    assert!(verify_model(&model).is_ok());
}

/// One kernel over one weight, launched for 1 to 4 tokens.
fn plan() -> Plan {
    use crate::plan::*;
    let text = "graph @k(%x: f32[t, 32], %w: q8_0[32, 32]) stage planned when t = 1..4 \
                { %y = matmul %x, %w return y = %y }";
    let (body, range) = (parse("k", text).unwrap().graphs.remove(0), TokenRange { min: 1, max: 4 });
    let (x, w) = (BufferId(0), WeightId(0));
    let row = 32 * 4;
    let buffer =
        |offset| Buffer { name: "x".into(), ty: "f32[t, 32]".into(), offset, row_bytes: row, rows: RowCount::Tokens };
    let spec = KernelSpec { name: "k".into(), text: text.into(), flops_per_token: 0.0, weight_bytes: 0 };
    let args = vec![Arg::Buffer(x), Arg::Weight(w), Arg::Buffer(BufferId(1))];
    Plan {
        kernels: vec![Kernel { name: "k".into(), body, range, groups: vec![] }],
        packs: vec![Pack::entry("w", crate::text::parse_type("q8_0[32, 32]").unwrap())],
        program: Program {
            limits: Limits { tokens: 4, rows: 1, sequences: 1, context: 64, tile: 4 },
            arena_bytes: 32 * row,
            buffers: vec![buffer(0), buffer(16 * row)],
            weights: vec![WeightSpec { name: "w".into(), ty: "q8_0[32, 32]".into(), bytes: 0, recipe: None }],
            kernels: vec![spec],
            variants: vec![Variant {
                tokens: range,
                launches: vec![Launch { kernel: KernelId(0), args, barrier: true }],
            }],
            outputs: vec![Output { name: "y".into(), buffer: BufferId(1), width: 32 }],
            ..Program::default()
        },
    }
}

#[test]
fn plans_hang_together() {
    let says = |change: fn(&mut Plan)| {
        let mut plan = plan();
        change(&mut plan);
        verify_plan(&plan).map_or_else(|e| e.to_string(), |_| "ok".into())
    };
    assert_eq!(says(|_| ()), "ok");
    assert_eq!(says(|p| p.program.limits.tokens = 5), "launches end at 4 tokens, the limit is 5");
    let message = "kernel k: stage, range, name or cache groups disagree with the program";
    assert_eq!(says(|p| p.kernels[0].groups = crate::plan::CacheGroup::all()), message);
    assert_eq!(says(|p| p.program.arena_bytes -= 1), "buf1 (x) is not aligned or leaves the arena");
    assert_eq!(says(|p| p.program.variants[0].tokens.min = 2), "expected launches for 1 tokens next, found 2..4");
    let message = "launch 0 for t = 1..4 of k0: expected 3 arguments, found 2";
    assert_eq!(says(|p| _ = p.program.variants[0].launches[0].args.pop()), message);
    let message = "launch 0 for t = 1..4 of k0: argument 1 must be q8_0[32, 32], found Buffer(BufferId(0))";
    assert_eq!(says(|p| p.program.variants[0].launches[0].args[1] = Arg::Buffer(crate::plan::BufferId(0))), message);
    let message = "kernel k: graph @k (planned): result x is the input %0: a kernel returns what it computes";
    assert_eq!(says(|p| p.kernels[0].body.result("x", ValueId(0))), message);
}
