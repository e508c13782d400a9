//! Elementwise ops on f32 vectors: one arm for each `Elementwise` row of the op table, and the functions behind them.
//!
//! Nothing here calls a library: exponentials, sines and the error function are polynomials after range reduction, with
//! errors of a few units in the last place over the range that the callers use.

use crate::emit::{BF16, Emitter, F16, F32, I1, I16, I32, Ty, Val};
use mansard_ir::{Kind, Node, Result};

/// Emits an elementwise node over vectors (or scalars) of f32.
///
/// # Errors
/// Where the op has no arm here.
pub fn elementwise(e: &mut Emitter, node: &Node, x: &[Val]) -> Result<Val> {
    let constant = |e: &mut Emitter, name: &str| e.float(x[0].ty, node.attrs.float(name) as f32);
    Ok(match node.op.name() {
        "add" | "add_row" => e.add(x[0], x[1]),
        "mul" | "mul_row" => e.mul(x[0], x[1]),
        "scale" => {
            let by = constant(e, "by");
            e.mul(x[0], by)
        }
        "offset" => {
            let by = constant(e, "by");
            e.add(x[0], by)
        }
        "softcap" => {
            let cap = constant(e, "cap");
            softcap(e, x[0], cap)
        }
        "silu" => {
            let s = sigmoid(e, x[0]);
            e.mul(x[0], s)
        }
        "gelu" => gelu(e, x[0]),
        "gelu_tanh" => gelu_tanh(e, x[0]),
        "gelu_sigmoid" => {
            let by = e.float(x[0].ty, 1.702);
            let scaled = e.mul(x[0], by);
            let s = sigmoid(e, scaled);
            e.mul(x[0], s)
        }
        "relu" => {
            let zero = e.float(x[0].ty, 0.0);
            e.max(x[0], zero)
        }
        "sigmoid" => sigmoid(e, x[0]),
        "tanh" => tanh(e, x[0]),
        "round_bf16" => round_bf16(e, x[0]),
        other => {
            return Err(mansard_ir::Error::new(
                Kind::Internal,
                format!("no CPU code for the elementwise op `{other}`"),
            ));
        }
    })
}

/// `coefficients[0] * x^(n-1) + ... + coefficients[n-1]`, by Horner's rule.
fn polynomial(e: &mut Emitter, x: Val, coefficients: &[f32]) -> Val {
    let mut y = e.float(x.ty, coefficients[0]);
    for c in &coefficients[1..] {
        let c = e.float(x.ty, *c);
        y = e.fma(y, x, c);
    }
    y
}

/// f32 -> bf16, ties to even, NaNs quiet. The one instruction for it takes numbers below 2^-126 for zero.
pub fn round_bf16(e: &mut Emitter, x: Val) -> Val {
    if e.converts_bf16 && x.ty.lanes == 16 {
        return e.intrinsic("llvm.x86.avx512bf16.cvtneps2bf16.512", &[x], x.ty.of(BF16));
    }
    let bits = e.convert("bitcast", x, I32);
    let ty = bits.ty;
    let high = e.shr(bits, 16);
    let (one, half, quiet) = (e.int(ty, 1), e.int(ty, 0x7fff), e.int(ty, 0x40));
    let odd = e.and(high, one);
    let rounded = e.add(bits, half);
    let rounded = e.add(rounded, odd);
    let rounded = e.shr(rounded, 16);
    let is_nan = e.op(I1.x(ty.lanes), format_args!("arith.cmpf uno, {x}, {x} : {}", x.ty));
    let nan = e.or(high, quiet);
    let bits = e.select(is_nan, nan, rounded);
    let bits = e.convert("trunci", bits, I16);
    e.convert("bitcast", bits, BF16)
}

/// The two bf16 in each 32 bits, the lower half first, as f32.
pub fn bf16_pair(e: &mut Emitter, pairs: Val) -> [Val; 2] {
    let upper = e.int(pairs.ty, -0x1_0000);
    let halves = [e.shl(pairs, 16), e.and(pairs, upper)];
    halves.map(|bits| e.convert("bitcast", bits, F32))
}

/// The four 8-bit floats (e4m3) in each 32 bits, as f32 of a 256th: each is an f16 of the same mantissa whose exponent counts
/// from 2^-8 below, and what is denormal in one is denormal in the other.
pub fn e4m3_quad(e: &mut Emitter, words: Val) -> [Val; 4] {
    let lower = e.shl(words, 8);
    let [even, odd] = [lower, words].map(|upper| {
        let (sign, rest) = (e.int(words.ty, 0x8000_8000_u32.cast_signed().into()), e.int(words.ty, 0x3f80_3f80));
        let sign = e.and(upper, sign);
        let magnitude = e.shr(upper, 1);
        let magnitude = e.and(magnitude, rest);
        e.or(sign, magnitude)
    });
    [(even, 0), (odd, 0), (even, 16), (odd, 16)].map(|(pair, by)| {
        let half = if by > 0 { e.shr(pair, by) } else { pair };
        let half = e.convert("trunci", half, I16);
        let half = e.convert("bitcast", half, F16);
        e.convert("extf", half, F32)
    })
}

/// `e^x`: zero below -87.3, about 1.7e38 above 88.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, ln 2 in two parts (Cody and Waite, 1980); `e^r` by a minimax polynomial of
/// degree 6 (Cephes `expf`); `2^n` by adding to the exponent field.
pub fn exp(e: &mut Emitter, x: Val) -> Val {
    let (low, high) = (e.float(x.ty, -87.33), e.float(x.ty, 88.0));
    let clamped = e.max(x, low);
    let clamped = e.min(clamped, high);
    let log2e = e.float(x.ty, std::f32::consts::LOG2_E);
    let n = e.mul(clamped, log2e);
    let n = e.math("roundeven", n);
    let (c1, c2) = (e.float(x.ty, -0.693_359_4), e.float(x.ty, 2.121_944_4e-4));
    let r = e.fma(n, c1, clamped);
    let r = e.fma(n, c2, r);
    let p = polynomial(e, r, &[1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5]);
    let r2 = e.mul(r, r);
    let one = e.float(x.ty, 1.0);
    let y = e.fma(p, r2, r);
    let y = e.add(y, one);
    let n = e.convert("fptosi", n, I32);
    let exponent = e.shl(n, 23);
    let bits = e.convert("bitcast", y, I32);
    let bits = e.add(bits, exponent);
    e.convert("bitcast", bits, F32)
}

/// `2^x` for `x <= 126`, at least 2^-126: relative error 2.3e-7.
///
/// `x = n + r` with `|r| <= 1/2`; `2^r` by a minimax polynomial of degree 5; `2^n` by adding to the exponent field.
pub fn exp2(e: &mut Emitter, x: Val) -> Val {
    let low = e.float(x.ty, -126.0);
    let clamped = e.max(x, low);
    let n = e.math("roundeven", clamped);
    let r = e.sub(clamped, n);
    let y = polynomial(e, r, &[1.327_647_1e-3, 9.675_541e-3, 5.550_713e-2, 0.240_221_2, 0.693_146_94, 1.000_000_1]);
    let n = e.convert("fptosi", n, I32);
    let exponent = e.shl(n, 23);
    let bits = e.convert("bitcast", y, I32);
    let bits = e.add(bits, exponent);
    e.convert("bitcast", bits, F32)
}

/// `2^(factor x)` within 2^-126 and 2^126; its relative error grows by half a unit in the last place of the exponent.
fn exp2_of_product(e: &mut Emitter, x: Val, factor: f32) -> Val {
    let (factor, high) = (e.float(x.ty, factor), e.float(x.ty, 126.0));
    let exponent = e.mul(x, factor);
    let exponent = e.min(exponent, high);
    exp2(e, exponent)
}

/// `1 / (1 + e^-x)`.
pub fn sigmoid(e: &mut Emitter, x: Val) -> Val {
    let t = exp2_of_product(e, x, -std::f32::consts::LOG2_E);
    let one = e.float(x.ty, 1.0);
    let t = e.add(t, one);
    e.div(one, t)
}

/// `1 - 2 / (e^2x + 1)`: absolute error about 1e-7.
pub fn tanh(e: &mut Emitter, x: Val) -> Val {
    let t = exp2_of_product(e, x, 2.0 * std::f32::consts::LOG2_E);
    let (one, two) = (e.float(x.ty, 1.0), e.float(x.ty, 2.0));
    let t = e.add(t, one);
    let t = e.div(two, t);
    e.sub(one, t)
}

/// `cap * tanh(x / cap)`.
pub fn softcap(e: &mut Emitter, x: Val, cap: Val) -> Val {
    let t = e.div(x, cap);
    let t = tanh(e, t);
    e.mul(t, cap)
}

/// `x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2`, which is `x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))`.
fn gelu_tanh(e: &mut Emitter, x: Val) -> Val {
    let x2 = e.mul(x, x);
    let (a, b) = (e.float(x.ty, 2.0 * 0.797_884_6 * 0.044_715), e.float(x.ty, 2.0 * 0.797_884_6));
    let t = e.fma(x2, a, b);
    let t = e.mul(t, x);
    let s = sigmoid(e, t);
    e.mul(x, s)
}

/// `x (1 + erf(x / sqrt 2)) / 2`, with an absolute error of at most 1e-6.
///
/// `erf(x / sqrt 2) / 2 = x P(s)` with `s = x^2 / 15.125 - 1` in [-1, 1]: coefficients by least squares for `|x| <= 5.5`,
/// weighted so that the largest error of the left side is least (4e-8). Beyond, the product exceeds 1/2 and is cut there.
fn gelu(e: &mut Emitter, x: Val) -> Val {
    const LAST: f32 = 30.25;
    let coefficients = [
        5.380_619_4e-4,
        -1.368_823_2e-3,
        1.023_897_9e-3,
        -1.229_419_5e-3,
        4.236_308_5e-3,
        -7.674_649_4e-3,
        1.046_866_8e-2,
        -1.467_137_7e-2,
        2.028_796_6e-2,
        -2.611_246_6e-2,
        3.208_179_7e-2,
        -3.878_726_7e-2,
        4.773_699e-2,
        -6.417_248e-2,
        1.285_519_4e-1,
    ];
    let (last, scale, one) = (e.float(x.ty, LAST), e.float(x.ty, 2.0 / LAST), e.float(x.ty, -1.0));
    let square = e.mul(x, x);
    let square = e.min(square, last);
    let s = e.fma(square, scale, one);
    let p = polynomial(e, s, &coefficients);
    let (low, high) = (e.float(x.ty, -0.5), e.float(x.ty, 0.5));
    let p = e.mul(p, x);
    let p = e.max(p, low);
    let p = e.min(p, high);
    let p = e.add(p, high);
    e.mul(x, p)
}

/// `(cos, sin)` of `a * b` for products up to about 1e5.
///
/// The product is kept in two parts (its rounding error recovered by a fused multiply-add), so angles of late positions
/// lose nothing; pi/2 in three parts (Cody and Waite); polynomials from Cephes `sinf` and `cosf`.
pub fn cos_sin_of_product(e: &mut Emitter, a: Val, b: Val) -> (Val, Val) {
    let ty = a.ty;
    let high = e.mul(a, b);
    let minus = e.neg(high);
    let low = e.fma(a, b, minus);
    let two_over_pi = e.float(ty, std::f32::consts::FRAC_2_PI);
    let n = e.mul(high, two_over_pi);
    let n = e.math("roundeven", n);
    let mut r = high;
    for part in [-1.570_312_5, -4.837_513e-4, -7.549_79e-8] {
        let part = e.float(ty, part);
        r = e.fma(n, part, r);
    }
    let r = e.add(r, low);
    let r2 = e.mul(r, r);
    let one = e.float(ty, 1.0);
    let s = polynomial(e, r2, &[-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1]);
    let s = e.mul(s, r2);
    let s = e.fma(s, r, r);
    let c = polynomial(e, r2, &[2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2, -0.5]);
    let c = e.fma(c, r2, one);
    let quadrant = e.convert("fptosi", n, I32);
    (turned(e, quadrant, 1, c, s), turned(e, quadrant, 0, s, c))
}

/// Picks `even` or `odd` by the parity of the quadrant and flips the sign in two of the four quadrants.
fn turned(e: &mut Emitter, quadrant: Val, shift: i64, even: Val, odd: Val) -> Val {
    let ty: Ty = quadrant.ty;
    let (one, two, zero, by) = (e.int(ty, 1), e.int(ty, 2), e.int(ty, 0), e.int(ty, shift));
    let parity = e.and(quadrant, one);
    let is_odd = e.cmp(crate::emit::Cmp::Ne, parity, zero);
    let value = e.select(is_odd, odd, even);
    let moved = e.add(quadrant, by);
    let sign = e.and(moved, two);
    let sign = e.shl(sign, 30);
    let bits = e.convert("bitcast", value, I32);
    let bits = e.xor(bits, sign);
    e.convert("bitcast", bits, F32)
}
