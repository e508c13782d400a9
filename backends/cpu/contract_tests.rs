//! Contractions against the interpreter: every weight format, every tile shape, epilogues, joins, parts and experts.

use super::choice::chosen;
use super::*;
use crate::harness;
use mansard_ir::Tuning;
use mansard_ir::eval::Step;
use mansard_ir::formats::FORMATS;
use mansard_ir::tuning::Tuned;

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
        let (x, format) = (if format.dtype.is_integer() { "a8" } else { "f32" }, format.name);
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
    for (n, k) in [(40, 992), (7, 66), (48, 2)] {
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

/// Where there are matrix units: they take such products in steps of any length.
#[test]
fn codes_widened_to_bf16() {
    for format in FORMATS.iter().filter(|f| f.int.is_some() && f.dtype != DType::Q8_PLANES) {
        let body = format!(
            "graph @k(%x: bf16[t, 512], %g: {name}[40, 512], %u: {name}[40, 512]) stage planned when t = 65..512 {{
               %a = matmul %x, %g
               %b = matmul %x, %u
               %s = silu %a
               %y = mul %s, %b
               return y = %y
             }}",
            name = format.name
        );
        // A weight between two bf16 may go to either; scales of k-quants are not quite those of the file.
        widened(&body, if format.name.ends_with("_k") { 5e-3 } else { 3e-4 });
    }
    // Beside what the vector units multiply.
    for (x, w) in [("f32", "f16"), ("a8", "q8_0"), ("bf16", "bf16")] {
        let body = format!(
            "graph @k(%x: {x}[t, 96], %z: bf16[t, 96], %g: {w}[40, 96], %u: q4_1[40, 96]) stage planned when t = 65..512 {{
               %a = matmul %x, %g
               %b = matmul %z, %u
               %y = mul %a, %b
               return y = %y
             }}"
        );
        widened(&body, 3e-4);
    }
}

fn widened(body: &str, tolerance: f64) {
    let kernel = harness::kernel(body);
    for step in [&[(0, 70)][..], &[(3, 97), (0, 33)]] {
        let step = Step::new(step);
        let inputs = harness::inputs(&kernel, &step, 1);
        harness::check_on(&kernel, &inputs, &step, tolerance, Target::widens_codes);
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
    for (x, w) in [("a8", "q4_1"), ("f32", "f32"), ("f32", "e4m3_g32")] {
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
    for (x, w) in [("f32", "f32"), ("a8", "q8_0"), ("a8", "q4_1"), ("bf16", "bf16"), ("f32", "e4m3_g32")] {
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

/// Every tile that may be chosen, for integers and floats, contractions that meet and that do not, and all that tokens leave.
#[test]
fn every_choice_of_tiles() {
    let cases = [
        (2, 8, 7, "(%x: a16[t, 64], %a: q4_1[48, 64]) {range} { %y = matmul %x, %a return y = %y }"),
        (9, 64, 45, "(%x: a8[t, 64], %a: q8_0[48, 64]) {range} { %y = matmul %x, %a return y = %y }"),
        (1, 1, 1, "(%x: f32[t, 66], %a: f32[80, 66]) {range} { %y = matmul %x, %a return y = %y }"),
        (
            9,
            64,
            45,
            "(%x: bf16[t, 66], %a: bf16[48, 66], %b: bf16[48, 66]) {range} {
               %p = matmul %x, %a %q = matmul %x, %b %s = silu %p %y = mul %s, %q return y = %y }",
        ),
        (
            9,
            64,
            23,
            "(%x: a8[t, 32], %a: q5_0[2, 48, 32], %r: routing[t, 1, 2]) {range} {
               %y = matmul_experts %x, %a, %r return y = %y }",
        ),
    ];
    for (min, max, tokens, body) in cases {
        let range = format!("stage planned when t = {min}..{max}");
        let kernel = harness::kernel(&format!("graph @k{}", body.replace("{range}", &range)));
        let step = Step::new(&[(0, tokens)]);
        let tried = std::cell::Cell::new(0);
        let choices = |target: &Target| {
            let of = |respect| alternatives(&kernel, target, None, respect).unwrap();
            let choices: Vec<_> = Respect::ALL.into_iter().flat_map(of).map(Some).collect();
            tried.set(tried.get() + choices.len());
            choices
        };
        harness::check_tuned(&kernel, &harness::inputs(&kernel, &step, 1), &step, 2e-5, choices);
        assert!(tried.get() > 0, "nothing to choose for {}", kernel.name);
    }
}

#[test]
fn tiles_that_do_not_fit_are_refused() {
    let text =
        "graph @k(%x: a8[t, 64], %w: q4_0[40, 64]) stage planned when t = 2..8 { %y = matmul %x, %w return y = %y }";
    let (kernel, target) = (harness::kernel(text), crate::target("x86-64-v4").unwrap());
    let good = Choice { tokens: 4, strips: 2, cache_bytes: 1 << 18, ahead: 0 };
    let emit = |kernel: &Kernel, choice| {
        crate::cpu::emit(kernel, &target, &Tuning { kernels: vec![Tuned::new(kernel, &target, choice)] })
    };
    emit(&kernel, good).unwrap();
    for bad in [
        Choice { tokens: 0, ..good },
        Choice { tokens: 9, ..good },
        Choice { tokens: 16, ..good },
        Choice { strips: 4, ..good },
        Choice { strips: usize::MAX, ..good },
        Choice { cache_bytes: 0, ..good },
        Choice { cache_bytes: usize::MAX, ..good },
        Choice { ahead: usize::MAX, ..good },
    ] {
        let error = emit(&kernel, bad).map(|_| ()).unwrap_err();
        assert!(error.exit_code() == 3 && error.to_string().contains("kernel `k`"), "{error}");
    }
    let rows = harness::kernel("graph @r(%x: f32[t, 64]) stage planned when t = 1..8 { %y = silu %x return y = %y }");
    assert!(emit(&rows, good).map(|_| ()).unwrap_err().to_string().contains("no tiles"));
}

/// Whatever is left after full tiles is covered by smaller ones, each once at most.
#[test]
fn smaller_tiles_cover_what_is_left() {
    for target in crate::target::names().into_iter().map(|name| crate::target(name).unwrap()) {
        for (x, w) in [("a8", "q4_0"), ("f32", "f32")] {
            let text = format!(
                "graph @k(%x: {x}[t, 64], %w: {w}[40, 64]) stage planned when t = 9..512 {{ %y = matmul %x, %w return y = %y }}"
            );
            let kernel = harness::kernel(&text);
            let components = components(&kernel.body).unwrap();
            let mut choices = alternatives(&kernel, &target, None, Respect::RegisterTile).unwrap();
            choices.push(chosen(&kernel, &target, &components[0], None).unwrap());
            for choice in choices {
                let shapes = shape::shapes(&components[0].dots, 512, choice);
                for left in 0..shapes[0].tokens {
                    let covered =
                        shapes[1..].iter().fold(0, |sum, s| if sum + s.tokens <= left { sum + s.tokens } else { sum });
                    assert_eq!(covered, left, "{choice:?}");
                }
            }
        }
    }
}
