//! Budgets: decisions and prices of a small model, bounds, and graphs that part where formats do.

use super::*;
use ir::{Target, sample, text};

/// Eight layers of one product each, and a head.
fn model() -> Model {
    let text = "
        graph @embed(%tokens: i32[t]) stage imported { %w = weight \"embed\" : f32[64, 32] %x = embed %tokens, %w return x = %x }
        graph @layer(%x: f32[t, 32]) stage imported { %w = weight \"up\" : f32[32, 32] %y = matmul %x, %w %z = add %x, %y
          return x = %z }
        graph @head(%x: f32[t, 32], %rows: i32[r]) stage imported { %l = select_rows %x, %rows %w = weight \"head\" : f32[64, 32]
          %logits = matmul %l, %w return logits = %logits }
        model @m { info {architecture = \"m\", context = 256, vocab = 64, hidden = 32, encoder = false}
          call @embed CALLS call @head output logits }";
    let calls: String = (0..8).map(|i| format!("call @layer with \"l.{i}.\" ")).collect();
    let mut model = text::parse("m", &text.replace("CALLS", &calls)).unwrap_or_else(|e| panic!("{e}"));
    sample::fill_weights(&mut model, 3).unwrap();
    model
}

fn options() -> Options {
    let machine = ir::Machine {
        threads: 2,
        bandwidth: 1e9,
        near_bandwidth: 0.0,
        near_bytes: 0.0,
        cache_bandwidth: 1e11,
        cache_bytes: 1e6,
        peak_f32: 1e12,
        peak_bf16: 2e12,
        peak_i8: 4e12,
        barrier: 0.0,
    };
    let target = Target {
        name: "test".into(),
        arch: "x86_64".into(),
        cpu: "test".into(),
        features: vec![],
        registers: 32,
        vector_bytes: 64,
        machine,
    };
    Options { traffic: Some("prompt=16,generate=8".parse().unwrap()), ..Options::new(target) }
}

#[test]
fn kinds_are_decided_in_bands() {
    let found = decisions(model(), &options()).unwrap();
    let names: Vec<&str> = found.all.iter().map(|d| d.name.as_str()).collect();
    assert_eq!(names, ["embed", "l.*.up 0..1", "l.*.up 2..3", "l.*.up 4..5", "l.*.up 6..7", "head"]);
    assert_eq!(found.fixed_bytes, 0);
    for decision in &found.all {
        let own = &decision.alternatives[0];
        let int4 = decision.alternatives.iter().find(|a| a.format == Some(DType::Q4_0)).unwrap();
        // Rows of 32 fill no group of 64.
        assert!(decision.alternatives.iter().all(|a| a.format != Some(DType::INT4_G64)));
        assert!(own.format.is_none() && int4.bytes * 4 < own.bytes, "{decision:?}");
        // Memory is slow on this machine: what is multiplied costs what it has bytes.
        if decision.name != "embed" {
            assert!(int4.seconds * 3.0 < own.seconds, "{decision:?}");
        }
    }
}

#[test]
fn bounds_are_kept() {
    let mut all = decisions(model(), &options()).unwrap();
    for alternative in all.all.iter_mut().flat_map(|d| &mut d.alternatives) {
        alternative.error = alternative.format.and_then(|f| f.int()).map_or(0.0, |int| (-f64::from(int.bits)).exp2());
    }
    let free = choose(&all, f64::INFINITY, f64::INFINITY).unwrap();
    let strict = choose(&all, 0.1, f64::INFINITY).unwrap();
    assert!(free.sum.cost < strict.sum.cost && strict.sum.error <= 0.1 && free.sum.error > 0.1);
    let least = smallest(&all, f64::INFINITY).unwrap().sum.cost;
    assert!(choose(&all, f64::INFINITY, least).is_some() && choose(&all, f64::INFINITY, least - 1.0).is_none());
    assert_eq!(most_accurate(&all, f64::INFINITY).unwrap().sum.cost, 0.0);
}

#[test]
fn layers_of_different_formats_get_graphs_of_their_own() {
    let formats = BTreeMap::from([("l.2.up".to_string(), DType::Q8_0), ("l.5.up".to_string(), DType::Q8_0)]);
    let options = Options { formats, ..options() };
    let state = run(&["canonicalize", "precision"], State::new(model()), &options).unwrap();
    let graphs: Vec<&str> = state.model.calls.iter().map(|c| c.graph.as_str()).collect();
    assert_eq!(graphs[1..9], ["layer", "layer", "layer_2", "layer", "layer", "layer_2", "layer", "layer"]);
    assert!(
        state.approximations.iter().any(|line| line.contains("`l.*.up` (2) quantized to q8_0")),
        "{:?}",
        state.approximations
    );
    let unknown = BTreeMap::from([("l.9.up".to_string(), DType::Q8_0)]);
    assert!(
        run(&["canonicalize", "precision"], State::new(model()), &Options { formats: unknown, ..options.clone() })
            .is_err()
    );
}
