//! Contractions against the interpreter: every weight format, every tile shape, epilogues, joins, parts and experts.

use crate::harness;
use mansard_ir::formats::FORMATS;

/// Steps of 1, 3, 7, 13, 16 and 37 tokens, some of several sequences.
const STEPS: [&[(usize, usize)]; 6] =
    [&[(0, 1)], &[(5, 3)], &[(0, 4), (2, 3)], &[(0, 13)], &[(0, 1), (9, 15)], &[(0, 37)]];

fn case(body: &str, steps: &[&[(usize, usize)]], tolerance: f64) {
    for step in steps {
        let tokens: usize = step.iter().map(|s| s.1).sum();
        let (min, max) = match tokens {
            1 => (1, 1),
            2..=8 => (2, 8),
            _ => (9, 64),
        };
        let text = body.replace("{range}", &format!("when t = {min}..{max}"));
        harness::case(&text, step, tolerance);
    }
}

/// Products of two stored scales are rounded to f16 when packed.
fn tolerance(format: &str) -> f64 {
    if format.ends_with("_k") { 5e-4 } else { 1e-5 }
}

#[test]
fn every_format() {
    for format in FORMATS.iter().filter(|f| f.int.is_some() || f.dtype.is_float()) {
        let (x, format) = (if format.int.is_some() { "a8" } else { "f32" }, format.name);
        let body = format!(
            "graph @k(%x: {x}[t, 512], %w: {format}[40, 512]) stage planned {{range}} {{
               %y = matmul %x, %w
               return y = %y
             }}"
        );
        let tolerance = tolerance(format);
        case(&body, &STEPS[..3], tolerance);
        case(&body, &STEPS[5..], tolerance);
    }
}

#[test]
fn pairs_of_bf16() {
    for (n, k) in [(40, 512), (7, 66), (48, 2)] {
        let body = format!(
            "graph @k(%x: bf16[t, {k}], %w: bf16[{n}, {k}]) stage planned {{range}} {{
               %y = matmul %x, %w
               return y = %y
             }}"
        );
        case(&body, &STEPS, 1e-5);
    }
    // Beside f32 activations, where the last pair may be half empty.
    for k in [1, 65, 96] {
        let body = format!(
            "graph @k(%x: f32[t, {k}], %w: bf16[40, {k}]) stage planned {{range}} {{
               %y = matmul %x, %w
               return y = %y
             }}"
        );
        case(&body, &STEPS[..4], 1e-5);
    }
}

#[test]
fn results_rounded_to_bf16() {
    for n in [80, 36] {
        let body = format!(
            "graph @k(%x: bf16[t, 96], %g: bf16[{n}, 96], %u: bf16[{n}, 96]) stage planned {{range}} {{
               %a = matmul %x, %g
               %b = matmul %x, %u
               %s = silu %a
               %m = mul %s, %b
               %y = round_bf16 %m
               return y = %y
             }}"
        );
        // Sums in another order may round to the neighbour.
        case(&body, &STEPS, 1.01 / 256.0);
    }
}

#[test]
fn vectors_of_a_heads_width_stand_beside_every_head() {
    for (heads, width) in [(5, 16), (2, 32), (12, 8), (4, 24), (7, 5)] {
        let n = heads * width;
        let body = format!(
            "graph @k(%x: f32[t, 32], %w: f32[{n}, 32], %g: f32[{width}], %b: f32[{n}]) stage planned {{range}} {{
               %p = matmul %x, %w
               %q = add_row %p, %b
               %h = split_heads %q {{heads = {heads}}}
               %m = mul_row %h, %g
               %y = merge_heads %m
               return y = %y
             }}"
        );
        case(&body, &STEPS[..4], 1e-5);
    }
}

#[test]
fn gate_and_up_meet_in_the_epilogue() {
    for (x, w) in [("a8", "q4_1"), ("f32", "f32")] {
        let body = format!(
            "graph @k(%x: {x}[t, 96], %g: {w}[80, 96], %u: {w}[80, 96]) stage planned {{range}} {{
               %a = matmul %x, %g
               %b = matmul %x, %u
               %s = silu %a
               %y = mul %s, %b
               return y = %y
             }}"
        );
        case(&body, &STEPS, 2e-5);
    }
}

#[test]
fn parts_with_formats_of_their_own() {
    let body = "graph @k(%x: a8[t, 256], %q: q5_0[64, 256], %kw: q4_k[16, 256], %v: q6_k[32, 256], %b: f32[16]) stage planned {range} {
       %a = matmul %x, %q
       %h = split_heads %a {heads = 4}
       %c = matmul %x, %kw
       %d = add_row %c, %b
       %e = matmul %x, %v
       return q = %h, k = %d, v = %e
     }";
    case(body, &STEPS, tolerance("q4_k"));
}

#[test]
fn bias_activation_and_residual() {
    let body = "graph @k(%x: f32[t, 64], %w: f32[20, 64], %b: f32[20], %r: f32[t, 20]) stage planned {range} {
       %a = matmul %x, %w
       %c = add_row %a, %b
       %g = gelu %c
       %y = add %r, %g
       %z = softcap %y {cap = 30.0}
       %h = gelu_tanh %z
       %i = scale %h {by = 0.25}
       return y = %y, z = %i
     }";
    case(body, &STEPS, 2e-5);
}

#[test]
fn experts() {
    for (x, w) in [("f32", "f32"), ("a8", "q8_0"), ("a8", "q4_1"), ("bf16", "bf16")] {
        let body = format!(
            "graph @k(%x: {x}[t, 64], %g: {w}[4, 48, 64], %u: {w}[4, 48, 64], %r: routing[t, 2, 4]) stage planned {{range}} {{
               %a = matmul_experts %x, %g, %r
               %b = matmul_experts %x, %u, %r
               %s = silu %a
               %y = mul %s, %b
               return y = %y
             }}"
        );
        case(&body, &STEPS, 2e-5);
        let down = format!(
            "graph @k(%x: {x}[t, 2, 64], %w: {w}[4, 32, 64], %r: routing[t, 2, 4]) stage planned {{range}} {{
               %y = matmul_experts %x, %w, %r
               return y = %y
             }}"
        );
        case(&down, &STEPS, 2e-5);
    }
}

#[test]
fn many_experts_and_few_tokens() {
    // More experts than entries: most have none. Rows that fill no cache line, and strips that fill several cache tiles.
    let body = "graph @k(%x: f32[t, 20], %w: f32[60, 16, 20], %r: routing[t, 3, 60]) stage planned {range} {
       %y = matmul_experts %x, %w, %r
       return y = %y
     }";
    case(body, &STEPS, 2e-5);
    let body = "graph @k(%x: f32[t, 3, 20], %w: f32[8, 16, 20], %r: routing[t, 3, 8]) stage planned {range} {
       %y = matmul_experts %x, %w, %r
       return y = %y
     }";
    case(body, &STEPS, 2e-5);
    let body = "graph @k(%x: a8[t, 2048], %w: q8_0[3, 192, 2048], %r: routing[t, 3, 3]) stage planned {range} {
       %y = matmul_experts %x, %w, %r
       return y = %y
     }";
    case(body, &STEPS[2..], 2e-5);
}

#[test]
fn vectors_beside_experts() {
    let body =
        "graph @k(%x: f32[t, 32], %w: f32[4, 48, 32], %b: f32[48], %g: f32[96], %h: f32[24], %r: routing[t, 2, 4])
       stage planned {range} {
       %a = matmul_experts %x, %w, %r
       %c = add_row %a, %b
       %d = merge_heads %c
       %e = mul_row %d, %g
       %f = split_heads %e {heads = 4}
       %y = add_row %f, %h
       return y = %y
     }";
    case(body, &STEPS, 2e-5);
}

#[test]
fn activations_computed_inside() {
    let body = "graph @k(%x: f32[t, 96], %g: f32[96], %a: q4_1[40, 96], %b: q8_0[16, 96], %r: f32[t, 40]) stage planned {range} {
       %n = rms_normalize %x {eps = 1e-5}
       %m = mul_row %n, %g
       %q = quantize %m
       %c = matmul %q, %a
       %y = add %r, %c
       %z = matmul %q, %b
       return y = %y, z = %z
     }";
    // Rounding to int8 may tip either way where a value lies half between two codes.
    case(body, &STEPS[..3], 4e-3);
    case(&body.replace("= quantize", "= quantize_fine"), &STEPS[..3], 1e-4);
    let body = body.replace("quantize", "round_bf16").replace("q4_1", "bf16").replace("q8_0", "bf16");
    case(&body, &STEPS[..3], 1e-3);
}
