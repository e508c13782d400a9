//! Row programs against the interpreter: every op by itself, and the compositions that models have.

use crate::harness;
use mansard_ir::Tuning;
use mansard_ir::formats::FORMATS;

const STEP: [(usize, usize); 3] = [(0, 5), (70, 1), (126, 4)];

fn case(inputs: &str, body: &str, tolerance: f64) {
    harness::case(&format!("graph @rows({inputs}) stage planned when t = 1..512 {{ {body} }}"), &STEP, tolerance);
}

#[test]
fn elementwise() {
    for width in [16, 20, 80, 576, 640] {
        let x = format!("%x: f32[t, {width}], %y: f32[t, {width}], %g: f32[{width}]");
        case(&x, "%a = add %x, %y %b = mul %a, %y %c = add_row %b, %g %d = mul_row %c, %g return d = %d, a = %a", 1e-6);
    }
}

#[test]
fn activations() {
    for op in ["silu", "gelu", "gelu_tanh", "gelu_sigmoid", "relu", "tanh", "softcap"] {
        let attrs = if op == "softcap" { "{cap = 0.7}" } else { "" };
        let body =
            format!("%a = scale %x {{by = 6.0}} %b = offset %a {{by = 0.25}} %y = {op} %b {attrs} return y = %y");
        case("%x: f32[t, 80]", &body, 1e-6);
    }
}

#[test]
fn normalizations() {
    for op in ["rms_normalize", "layer_normalize", "l2_normalize"] {
        for width in [16, 20, 64, 80, 576, 1040] {
            let body = format!("%y = {op} %x {{eps = 1e-5}} return y = %y");
            case(&format!("%x: f32[t, {width}]"), &body, 2e-6);
        }
        for dim in [8, 20, 64, 80] {
            let body = format!(
                "%h = split_heads %x {{heads = 3}} %n = {op} %h {{eps = 1e-5}} %y = mul_row %n, %g return y = %y"
            );
            case(&format!("%x: f32[t, {}], %g: f32[{dim}]", 3 * dim), &body, 2e-6);
        }
    }
}

#[test]
fn quantization() {
    for width in [32, 64, 160, 224, 576, 640] {
        case(&format!("%x: f32[t, {width}]"), "%q = quantize %x return q = %q", 0.0);
    }
}

#[test]
fn rounding() {
    for width in [16, 20, 66, 576] {
        case(&format!("%x: f32[t, {width}]"), "%q = round_bf16 %x return q = %q", 0.0);
        let inputs = format!("%x: f32[t, {width}], %g: f32[{width}]");
        let body = "%n = rms_normalize %x {eps = 1e-5} %m = mul_row %n, %g %q = round_bf16 %m return m = %m, q = %q";
        // A value at the border of two may go either way.
        case(&inputs, body, 1.01 / 256.0);
    }
    case("%x: f32[t, 3, 20]", "%a = scale %x {by = 3.0} %q = round_bf16 %a return q = %q", 0.0);
    let inputs = "%x: f32[t, 60], %g: f32[20]";
    let body = "%h = split_heads %x {heads = 3} %n = mul_row %h, %g %q = round_bf16 %n return q = %q";
    case(inputs, body, 0.0);
}

#[test]
fn norm_gain_quantize() {
    for width in [64, 576, 640] {
        let inputs = format!("%x: f32[t, {width}], %y: f32[t, {width}], %g: f32[{width}]");
        let body = "%a = add %x, %y %n = rms_normalize %a {eps = 1e-5} %m = mul_row %n, %g %q = quantize %m \
                    return a = %a, q = %q";
        // A value at the border of two codes may go either way.
        case(&inputs, body, 1.01 / 127.0);
    }
}

#[test]
fn rope() {
    for pairing in ["half", "adjacent"] {
        for (heads, dim, width) in [(3, 64, 64), (2, 20, 20), (1, 80, 32), (2, 128, 128), (4, 96, 24), (3, 10, 6)] {
            let inputs = format!("%x: f32[t, {heads}, {dim}], %f: f32[t, {width}]");
            let body = format!("%y = rope %x, %f {{pairing = \"{pairing}\"}} return y = %y");
            case(&inputs, &body, 1e-6);
        }
    }
}

#[test]
fn hadamard() {
    for (heads, dim) in [(3, 64), (1, 256), (2, 20), (1, 80), (3, 10), (2, 16)] {
        case(&format!("%x: f32[t, {heads}, {dim}]"), "%y = hadamard %x return y = %y", 1e-6);
    }
}

#[test]
fn angles() {
    for half in [4, 10, 16, 32, 40] {
        let inputs = format!("%p: i32[t], %f: f32[{half}]");
        case(&inputs, "%y = rope_table %p, %f {scale = 1.25} return y = %y", 1e-6);
    }
}

#[test]
fn embedding() {
    for format in FORMATS.iter().filter(|f| f.int.is_some() || f.dtype.is_float()) {
        let (k, format) = (format.block.max(32) * 3, format.name);
        // Packed scales and minima are f16: those of K-quants are rounded once more.
        let tolerance = if format.ends_with("_k") { 1e-3 } else { 1e-6 };
        let inputs = format!("%i: i32[t], %w: {format}[37, {k}]");
        case(&inputs, "%e = embed %i, %w %y = scale %e {by = 2.0} return y = %y", tolerance);
    }
}

#[test]
fn rows_that_leave() {
    case("%x: f32[t, 80], %rows: i32[r]", "%y = select_rows %x, %rows return y = %y", 0.0);
    let body = "%y = select_rows %x, %rows %n = rms_normalize %y {eps = 1e-5} %m = mul_row %n, %g return m = %m";
    case("%x: f32[t, 80], %rows: i32[r], %g: f32[80]", body, 1e-6);
}

#[test]
fn appends() {
    // What was there before is stored again by the harness, whose scales of codes can differ in the last place.
    let stored = [("f32", 0.0), ("f16", 0.0), ("bf16", 0.0), ("fp8", 0.0), ("i8", 1e-6)];
    for (cache, tolerance) in stored {
        for (heads, dim) in [(3, 64), (1, 80), (2, 20)] {
            let inputs = format!(
                "%x: f32[t, {heads}, {dim}], %k: keys<{cache}>[c, {heads}, {dim}], \
                 %v: values<{cache}, window = 9>[c, {heads}, {dim}], %step: step[s]"
            );
            let body = "%a = append %k, %x, %step %b = append %v, %x, %step return k = %a, v = %b";
            case(&inputs, body, tolerance);
        }
    }
}

#[test]
fn appends_of_int4() {
    for (heads, dim) in [(3, 64), (1, 96), (2, 32)] {
        let inputs = format!(
            "%x: f32[t, {heads}, {dim}], %k: keys<i4>[c, {heads}, {dim}], %r: keys<f16, window = 64>[c, {heads}, {dim}], \
             %v: values<i4, window = 9>[c, {heads}, {dim}], %step: step[s]"
        );
        let body = "%a = append_blocks %k, %r, %step %b = append %v, %x, %step return k = %a, v = %b";
        let text = format!("graph @rows({inputs}) stage planned when t = 1..512 {{ {body} }}");
        for step in [&STEP[..], &[(0, 200), (63, 1), (127, 1), (62, 1), (100, 90)]] {
            harness::case(&text, step, 1e-6);
        }
    }
}

#[test]
fn queries_keys_and_values() {
    let inputs = "%q: f32[t, 256], %k: f32[t, 128], %v: f32[t, 128], %gq: f32[64], %gk: f32[64], %p: i32[t], \
                  %f: f32[32], %keys: keys<f16>[c, 2, 64], %values: values<f16>[c, 2, 64], %step: step[s]";
    let body = "%table = rope_table %p, %f {scale = 1.0} \
                %qh = split_heads %q {heads = 4} %qn = rms_normalize %qh {eps = 1e-6} %qg = mul_row %qn, %gq \
                %kh = split_heads %k {heads = 2} %kn = rms_normalize %kh {eps = 1e-6} %kg = mul_row %kn, %gk \
                %vh = split_heads %v {heads = 2} \
                %qr = rope %qg, %table {pairing = \"half\"} %kr = rope %kg, %table {pairing = \"half\"} \
                %a = append %keys, %kr, %step %b = append %values, %vh, %step return q = %qr, keys = %a, values = %b";
    case(inputs, body, 1e-3);
}

#[test]
fn routing() {
    for (experts, top, normalize) in [(8, 2, true), (8, 2, false), (20, 5, true), (160, 6, false), (3, 3, true)] {
        let body = format!("%r = route %x {{top = {top}, normalize = {normalize}}} return r = %r");
        case(&format!("%x: f32[t, {experts}]"), &body, 1e-6);
    }
}

#[test]
fn combinations() {
    for (top, width) in [(2, 64), (3, 20), (8, 576)] {
        let inputs = format!("%x: f32[t, {top}, {width}], %r: routing[t, {top}, 9], %y: f32[t, {width}]");
        case(&inputs, "%c = combine %x, %r %z = add %c, %y return z = %z", 1e-6);
    }
}

#[test]
fn long_rows() {
    let inputs = "%x: f32[t, 28672], %g: f32[28672]";
    let body = "%n = rms_normalize %x {eps = 1e-5} %m = mul_row %n, %g %s = silu %m %q = quantize %s return q = %q";
    case(inputs, body, 1.01 / 127.0);
}

#[test]
fn views_that_leave() {
    let body = "%a = add %x, %x %h = split_heads %a {heads = 4} %m = merge_heads %h return h = %h, m = %m, a = %a";
    case("%x: f32[t, 80]", body, 0.0);
    case("%x: f32[t, 80]", "%h = split_heads %x {heads = 4} return h = %h", 0.0);
}

#[test]
fn rows_beyond_the_stack_are_refused() {
    let width = 200_000;
    let text = format!(
        "graph @rows(%x: f32[t, {width}]) stage planned when t = 1..512 {{ %a = l2_normalize %x {{eps = 1e-5}} \
         %b = l2_normalize %a {{eps = 1e-5}} %c = l2_normalize %b {{eps = 1e-5}} return c = %c }}"
    );
    let target = crate::target("x86-64-v3").unwrap();
    let error = crate::cpu::emit(&harness::kernel(&text), &target, &Tuning::default()).unwrap_err();
    assert_eq!(error.kind(), mansard_ir::Kind::Unsupported);
}
