//! Rules that pay: in the smallest graphs that show it, the search takes what they offer, and values stay.

extern crate mansard_ir as ir;

mod common;

use common::{difference, evaluate, target};
use ir::{Graph, text};
use mansard_passes::saturate::optimize;
use mansard_passes::{Options, Strategy, canonicalize::canonical};
use std::collections::BTreeSet;

fn graph(inputs: &str, body: &str) -> Graph {
    let source = format!("graph @g({inputs}) stage imported {{ {body} }}");
    let model = text::parse("case", &source).unwrap_or_else(|e| panic!("{e}"));
    canonical(&model.graphs[0]).unwrap_or_else(|e| panic!("{e}"))
}

/// The variants by range, all of which compute what the graph does.
fn variants(graph: &Graph, options: &Options) -> Vec<Graph> {
    let variants = optimize(std::slice::from_ref(graph), BTreeSet::new(), options);
    let variants = variants.unwrap_or_else(|e| panic!("{e}")).variants;
    for variant in &variants {
        let (a, b) = (evaluate(graph, 1, (4, 2, 3)), evaluate(variant, 1, (4, 2, 3)));
        for (name, value) in &a {
            let off = difference(value, &b[name]);
            assert!(off < 2e-5, "{name} is off by {off}:\n{}", text::print_graph(variant));
        }
    }
    variants
}

/// Nodes of that op on activations.
fn count(graph: &Graph, op: &str) -> usize {
    graph.nodes.iter().filter(|n| n.op.name() == op && !n.ty.is_static()).count()
}

fn everywhere(graph: &Graph, op: &str, expected: usize) {
    for variant in variants(graph, &Options::new(target())) {
        assert_eq!(count(&variant, op), expected, "{op}:\n{}", text::print_graph(&variant));
    }
}

/// Low-rank queries as in latent attention: one token reads one matrix, many multiply with two smaller ones.
#[test]
fn absorption_is_for_few_tokens() {
    let body = "%a = weight \"q_a\" : f32[28, 64] %b = weight \"q_b\" : f32[64, 28] \
                %l = matmul %x, %a %y = matmul %l, %b return y = %y";
    let low_rank = graph("%x: f32[t, 64]", body);
    let options = Options { copies: true, ..Options::new(target()) };
    let both = variants(&low_rank, &options);
    assert_eq!(count(&both[0], "matmul"), 1, "{}", text::print_graph(&both[0]));
    assert_eq!(count(both.last().unwrap(), "matmul"), 2, "{}", text::print_graph(both.last().unwrap()));
    // one packing: as the file has it
    everywhere(&low_rank, "matmul", 2);
    // and back: a product that a graph spells out is taken apart where that is less work
    let body = "%a = weight \"q_a\" : f32[8, 64] %b = weight \"q_b\" : f32[64, 8] \
                %w = multiply_weights %b, %a %y = matmul %x, %w return y = %y";
    let product = variants(&graph("%x: f32[t, 64]", body), &options);
    assert_eq!(count(product.last().unwrap(), "matmul"), 2, "{}", text::print_graph(product.last().unwrap()));
}

#[test]
fn an_adapter_becomes_part_of_its_matrix() {
    let body = "%w = weight \"w\" : f32[64, 64] %a = weight \"lora_a\" : f32[4, 64] %b = weight \"lora_b\" : f32[64, 4] \
                %y = matmul %x, %w %l = matmul %x, %a %d = matmul %l, %b %s = scale %d {by = 2.0} %z = add %y, %s \
                return z = %z";
    everywhere(&graph("%x: f32[t, 64]", body), "matmul", 1);
}

#[test]
fn merged_projections_are_cut_apart() {
    let body = "%w = weight \"qkv\" : f32[96, 64] %b = weight \"bias\" : f32[96] %m = matmul %x, %w %n = add_row %m, %b \
                %q = slice %n {from = 0, count = 64} %k = slice %n {from = 64, count = 16} \
                %v = slice %n {from = 80, count = 16} %p = silu %q return q = %p, k = %k, v = %v";
    let merged = graph("%x: f32[t, 64]", body);
    everywhere(&merged, "slice", 0);
    for variant in variants(&merged, &Options::new(target())) {
        assert_eq!(variant.kernels.len(), 1, "{}", text::print_graph(&variant));
    }
    let body = "%a = weight \"a\" : q8_0[32, 64] %b = weight \"b\" : q8_0[64, 64] %q = quantize %x \
                %y = matmul %q, %a %z = matmul %q, %b %c = concat %y, %z return c = %c";
    everywhere(&graph("%x: f32[t, 64]", body), "concat", 0);
}

#[test]
fn rotations_vanish() {
    let body = "%h = hadamard_matrix {size = 64} %w = weight \"w\" : f32[32, 64] %a = matmul %x, %h %b = matmul %z, %h \
                %c = add %a, %b %n = rms_normalize %c {eps = 1e-5} %d = matmul %n, %h %y = matmul %d, %w return y = %y";
    everywhere(&graph("%x: f32[t, 64], %z: f32[t, 64]", body), "matmul", 1);
}

#[test]
fn gains_and_factors_end_in_weights_and_scores() {
    let body = "%u = weight \"up\" : f32[64, 64] %d = weight \"down\" : f32[64, 64] %s = weight \"smooth\" : f32[64] \
                %a = matmul %x, %u %b = silu %z %c = mul %a, %b %m = mul_row %c, %s %y = matmul %m, %d return y = %y";
    everywhere(&graph("%x: f32[t, 64], %z: f32[t, 64]", body), "mul_row", 0);
    let body = "%h = split_heads %x {heads = 2} %r = rope %h, %angles {pairing = \"half\"} %q = scale %r {by = 0.3} \
                %c = append %keys, %k, %step %d = append %values, %v, %step \
                %y = attend %q, %c, %d, %step {scale = 0.5, causal = true, window = 0, softcap = 0.0} \
                return y = %y, keys = %c, values = %d";
    let inputs = "%x: f32[t, 64], %k: f32[t, 1, 32], %v: f32[t, 1, 32], %angles: f32[t, 32], %keys: keys<f32>[c, 1, 32], %values: values<f32>[c, 1, 32], %step: step[s]";
    everywhere(&graph(inputs, body), "scale", 0);
}

#[test]
fn a_sequence_is_normalized_once() {
    let body = "%g = weight \"gain\" : f32[64] %b = weight \"bias\" : f32[64] %w = weight \"dense\" : f32[32, 64] \
                %n = layer_normalize %x {eps = 1e-5} %m = mul_row %n, %g %a = add_row %m, %b %d = matmul %a, %w \
                %y = mean_pool %d, %step return y = %y";
    let pooled = graph("%x: f32[t, 64], %step: step[s]", body);
    for variant in variants(&pooled, &Options::new(target())).iter().filter(|v| v.range.is_some_and(|r| r.min > 8)) {
        let products: Vec<_> = variant.nodes.iter().filter(|n| n.op.name() == "matmul").collect();
        assert!(products.iter().all(|n| n.ty.rows() == Some(ir::Dim::S)), "{}", text::print_graph(variant));
    }
}

#[test]
fn activations_in_parts_are_known() {
    for (body, op) in [
        ("%s = sigmoid %x %y = mul %s, %x return y = %y", "silu"),
        ("%s = scale %x {by = 1.702} %g = sigmoid %s %y = mul %x, %g return y = %y", "gelu_sigmoid"),
    ] {
        let parts = graph("%x: f32[t, 64]", body);
        for variant in variants(&parts, &Options::new(target())) {
            assert_eq!((count(&variant, op), variant.nodes.len()), (1, 1), "{}", text::print_graph(&variant));
        }
    }
}

/// One after the other is a program too, and never a cheaper one.
#[test]
fn choosing_together_costs_no_more() {
    let body = "%g = weight \"gain\" : f32[64] %w = weight \"gate\" : f32[96, 64] %u = weight \"up\" : f32[96, 64] \
                %d = weight \"down\" : f32[64, 96] %n = rms_normalize %x {eps = 1e-5} %m = mul_row %n, %g \
                %a = matmul %m, %w %b = matmul %m, %u %s = silu %a %p = mul %s, %b %o = matmul %p, %d \
                %y = add %x, %o return y = %y";
    let layer = graph("%x: f32[t, 64]", body);
    let price = |strategy| {
        let options = Options { strategy, ..Options::new(target()) };
        variants(&layer, &options);
        let notes = optimize(std::slice::from_ref(&layer), BTreeSet::new(), &options).unwrap().notes;
        let prices = notes.iter().filter_map(|n| n.split_once(" kernels, ")?.1.split_once(" us"));
        prices.map(|(us, _)| us.parse::<f64>().unwrap()).collect::<Vec<_>>()
    };
    let (joint, fixed) = (price(Strategy::Joint), price(Strategy::Fixed));
    assert_eq!(joint.len(), fixed.len());
    assert!(joint.iter().zip(&fixed).all(|(a, b)| a <= b), "{joint:?} {fixed:?}");
}
