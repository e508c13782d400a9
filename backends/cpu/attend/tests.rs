//! Attention against the interpreter: masks, groups, widths, caches, ragged steps.

use crate::harness;
use mansard_ir::layout::AttentionItem;

/// A step of several sequences: prompts, continued prompts, lone tokens, over one and several cache blocks.
const RAGGED: [(usize, usize); 5] = [(0, 9), (200, 1), (61, 6), (63, 1), (127, 4)];

fn attend(heads: (usize, usize), dim: usize, cache: &str, rules: &str, step: &[(usize, usize)], tolerance: f64) {
    attend_by("f32", heads, dim, cache, rules, step, tolerance);
}

fn attend_by(
    query: &str,
    (q, kv): (usize, usize),
    dim: usize,
    cache: &str,
    rules: &str,
    step: &[(usize, usize)],
    tolerance: f64,
) {
    let text = format!(
        "graph @attend(%q: {query}[t, {q}, {dim}], %k: keys<{cache}>[c, {kv}, {dim}], %v: values<{cache}>[c, {kv}, {dim}], \
         %step: step[s]) stage planned when t = 1..512 {{ %y = attend %q, %k, %v, %step {{scale = 0.3, {rules}}} return y = %y }}"
    );
    harness::case(&text, step, tolerance);
    if let Some(window) = rules.split(", ").find(|rule| rule.starts_with("window") && !rule.ends_with(" 0")) {
        let cut = text.replace(&format!("<{cache}>"), &format!("<{cache}, {window}>"));
        harness::case(&cut, step, tolerance);
    }
}

const CAUSAL: &str = "causal = true, window = 0, softcap = 0.0";

#[test]
fn causal() {
    attend((3, 1), 64, "f32", CAUSAL, &RAGGED, 1e-5);
    attend((2, 2), 16, "f32", CAUSAL, &[(0, 150)], 1e-5);
}

#[test]
fn every_position() {
    attend((2, 2), 32, "f32", "causal = false, window = 0, softcap = 0.0", &[(0, 130), (0, 3), (0, 65)], 1e-5);
}

#[test]
fn windows() {
    for window in [1, 5, 64, 100] {
        let rules = format!("causal = true, window = {window}, softcap = 0.0");
        attend((2, 1), 16, "f32", &rules, &[(0, 140), (190, 3), (64, 1)], 1e-5);
    }
    attend((2, 1), 16, "f32", "causal = false, window = 9, softcap = 0.0", &[(0, 140)], 1e-5);
}

#[test]
fn capped_scores() {
    attend((4, 2), 64, "f32", "causal = true, window = 0, softcap = 2.0", &RAGGED, 1e-5);
}

#[test]
fn half_precision_caches() {
    attend((6, 2), 64, "f16", CAUSAL, &RAGGED, 1e-5);
    attend((2, 1), 80, "f16", CAUSAL, &RAGGED, 1e-5);
}

#[test]
fn other_stored_types() {
    for cache in ["bf16", "i8", "fp8"] {
        attend((6, 2), 64, cache, CAUSAL, &RAGGED, 1e-5);
        attend((2, 1), 80, cache, CAUSAL, &RAGGED, 1e-5);
        attend((4, 1), 20, cache, "causal = true, window = 70, softcap = 2.0", &[(190, 3), (0, 65)], 1e-5);
    }
}

/// On matrix units keys, weights and values are rounded to bf16, too.
#[test]
fn queries_of_bf16() {
    let halves = |heads, dim, cache, rules: &str, step: &[(usize, usize)]| {
        attend_by("bf16", heads, dim, cache, rules, step, 1e-2);
    };
    let prompts = [(0, 70), (61, 6), (63, 1), (127, 20)];
    for cache in ["f16", "f32", "bf16", "i8", "fp8"] {
        halves((3, 1), 64, cache, CAUSAL, &prompts);
    }
    halves((2, 2), 32, "f16", "causal = false, window = 0, softcap = 0.0", &[(0, 130), (0, 3), (0, 65)]);
    halves((4, 1), 96, "f16", "causal = true, window = 70, softcap = 0.0", &prompts);
    halves((4, 2), 256, "i8", "causal = true, window = 0, softcap = 2.0", &prompts);
    halves((72, 1), 32, "f16", CAUSAL, &[(60, 10)]);
}

#[test]
fn recent_positions_in_other_caches() {
    let by = |query,
              (q, kv): (usize, usize),
              dim: usize,
              (cache, recent): (&str, &str),
              rules: &str,
              step: &[_],
              off| {
        let text = format!(
            "graph @attend(%q: {query}[t, {q}, {dim}], %k: keys<{cache}>[c, {kv}, {dim}], %v: values<{cache}>[c, {kv}, {dim}], \
             %kr: keys<{recent}, window = 64>[c, {kv}, {dim}], %vr: values<{recent}, window = 64>[c, {kv}, {dim}], \
             %step: step[s]) stage planned when t = 1..512 {{ \
             %y = attend_mixed %q, %k, %v, %kr, %vr, %step {{scale = 0.3, {rules}}} return y = %y }}"
        );
        harness::case(&text, step, off);
    };
    let mixed = |heads, dim, caches, rules: &str, step: &[_]| by("f32", heads, dim, caches, rules, step, 1e-5);
    let prompts = [(0, 130), (200, 1), (61, 70), (63, 1), (64, 1), (127, 4)];
    mixed((9, 3), 64, ("i4", "f16"), CAUSAL, &prompts);
    mixed((4, 1), 256, ("i4", "f16"), "causal = true, window = 70, softcap = 0.0", &prompts);
    mixed((2, 1), 96, ("i4", "f16"), "causal = true, window = 0, softcap = 2.0", &prompts);
    mixed((3, 1), 32, ("i4", "f16"), CAUSAL, &RAGGED);
    mixed((2, 1), 32, ("i8", "f32"), CAUSAL, &RAGGED);
    by("bf16", (3, 1), 64, ("i4", "f16"), CAUSAL, &[(0, 70), (63, 1), (120, 20)], 1e-2);
    by("bf16", (4, 2), 256, ("i4", "f16"), CAUSAL, &[(127, 40), (200, 1)], 1e-2);
}

#[test]
fn many_sequences_and_a_prompt() {
    let step: Vec<(usize, usize)> = (0..20).map(|i| (37 * i, 1)).chain([(100, 70)]).collect();
    attend((6, 3), 32, "f16", CAUSAL, &step, 1e-5);
    attend((6, 3), 32, "f16", "causal = true, window = 40, softcap = 0.0", &step, 1e-5);
}

#[test]
fn widths_of_heads() {
    for dim in [8, 20, 80, 96, 128, 256] {
        attend((4, 2), dim, "f32", CAUSAL, &[(60, 7), (3, 1)], 1e-5);
    }
}

#[test]
fn groups() {
    for group in [4, 7, 8, 72] {
        attend((group, 1), 64, "f32", CAUSAL, &[(70, 6), (10, 1)], 1e-5);
    }
}

#[test]
fn lone_tokens() {
    let text = "graph @attend(%q: f32[t, 9, 64], %k: keys<f16>[c, 3, 64], %v: values<f16>[c, 3, 64], %step: step[s]) \
                stage planned when t = 1..1 { %y = attend %q, %k, %v, %step {scale = 0.125, causal = true, window = 0, \
                softcap = 0.0} %m = merge_heads %y return m = %m, y = %y }";
    harness::case(text, &[(300, 1)], 1e-5);
}

#[test]
fn items_fit_their_memory() {
    for group in [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 64, 71, 72] {
        for dim in [8, 32, 64, 80, 128, 256, 512] {
            let item = AttentionItem::new(group, dim);
            assert!(group.is_multiple_of(item.heads) && item.tokens > 0);
            assert!(item.tokens * item.heads <= item.rows() && item.rows() <= 64);
            let bytes = item.rows() * (2 * item.row_bytes + AttentionItem::score_bytes());
            assert!(bytes <= 320 << 10, "{group} x {dim}: {bytes} bytes");
        }
    }
    assert_eq!((AttentionItem::new(3, 64).tokens, AttentionItem::new(3, 64).heads), (20, 3));
}
