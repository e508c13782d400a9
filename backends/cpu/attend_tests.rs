//! Attention against the interpreter: masks, windows, soft caps, shared heads, half-precision caches, ragged steps.

use crate::harness;

/// Steps of `(past, new)` a sequence: a prompt, a decode, several of both, long pasts.
const STEPS: [&[(usize, usize)]; 6] =
    [&[(0, 1)], &[(0, 9)], &[(130, 1)], &[(0, 5), (70, 1), (63, 4)], &[(200, 13)], &[(64, 1), (63, 1), (0, 1)]];

fn case(heads: usize, kv_heads: usize, dim: usize, dtype: &str, attrs: &str, tolerance: f64) {
    for step in STEPS {
        let tokens: usize = step.iter().map(|s| s.1).sum();
        let (min, max) = if tokens == 1 { (1, 1) } else { (2, 64) };
        let text = format!(
            "graph @k(%q: f32[t, {heads}, {dim}], %keys: keys<{dtype}>[c, {kv_heads}, {dim}], %values: values<{dtype}>[c, {kv_heads}, {dim}], %step: step[s]) stage planned when t = {min}..{max} {{
               %a = attend %q, %keys, %values, %step {{{attrs}}}
               %y = merge_heads %a
               return y = %y
             }}"
        );
        harness::case(&text, step, tolerance);
    }
}

#[test]
fn causal() {
    case(4, 2, 16, "f32", "scale = 0.25, causal = true, window = 0, softcap = 0.0", 1e-5);
    case(9, 3, 64, "f16", "scale = 0.125, causal = true, window = 0, softcap = 0.0", 1e-5);
}

#[test]
fn one_wide_head() {
    case(4, 1, 256, "f16", "scale = 0.0625, causal = true, window = 0, softcap = 0.0", 1e-5);
}

#[test]
fn windows_and_soft_caps() {
    case(4, 4, 32, "f32", "scale = 0.2, causal = true, window = 7, softcap = 0.0", 1e-5);
    case(4, 2, 80, "f32", "scale = 0.2, causal = true, window = 70, softcap = 20.0", 1e-5);
}

#[test]
fn bidirectional() {
    case(12, 12, 32, "f32", "scale = 0.2, causal = false, window = 0, softcap = 0.0", 1e-5);
    case(2, 1, 20, "f32", "scale = 0.2, causal = false, window = 0, softcap = 0.0", 1e-5);
}
