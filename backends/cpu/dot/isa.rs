//! `u8 x s8` dot products of four bytes a lane, on every machine that code is generated for.
//!
//! | machine | instruction | codes |
//! |---|---|---|
//! | AVX-512 VNNI | `vpdpbusd zmm` | unsigned |
//! | AVX-VNNI | `vpdpbusd ymm`, two | unsigned |
//! | AVX2 | `vpmaddubsw` and `vpmaddwd`; for codes of 8 bits, `vpmaddwd` of even and odd bytes | unsigned |
//! | i8mm | `usdot`, four | unsigned |
//! | dotprod | `sdot`, four | signed: below 7 bits they are as they are, 8 bits less 128 |
//!
//! (`usmmla` would take eight k of a row at once; strips hold four.)

use crate::emit::{Cmp, Emitter, I1, I8, I16, I32, I64, Val};
use mansard_ir::target::Target;

/// What [`operand`] takes off every code of so many bits: nothing, or the zero point of 8-bit formats, whose products then
/// need no correction.
pub fn code_offset(target: &Target, bits: u8) -> i64 {
    let signed = target.has("dotprod") && !target.has("i8mm");
    if signed && bits == 8 { 128 } else { 0 }
}

/// Codes of so many bits, as [`dot4`] takes them.
pub fn operand(e: &mut Emitter, target: &Target, bits: u8, codes: Val) -> Val {
    if code_offset(target, bits) == 0 {
        return codes;
    }
    // Less 128, as a signed byte.
    let flip = e.int(codes.ty, -128);
    e.xor(codes, flip)
}

/// The entry of `table` that each of 64 bytes names, all below 16.
pub fn look_up(e: &mut Emitter, target: &Target, table: [u8; 16], index: Val) -> Val {
    let (name, bytes) = match target.vector_bytes {
        64 => ("llvm.x86.avx512.pshuf.b.512", 64),
        32 => ("llvm.x86.avx2.pshuf.b", 32),
        _ => ("llvm.aarch64.neon.tbl1.v16i8", 16),
    };
    let table = e.table(table, bytes);
    let parts: Vec<Val> = (0..64 / bytes)
        .map(|i| {
            let lanes: Vec<usize> = (i * bytes..(i + 1) * bytes).collect();
            let part = if bytes == 64 { index } else { e.shuffle(index, index, &lanes) };
            e.intrinsic(name, &[table, part], part.ty)
        })
        .collect();
    joined(e, parts)
}

/// A vector of 64 bytes: `value` where the 64-bit word at `at` has a bit, else 0.
pub fn where_bits(e: &mut Emitter, target: &Target, at: Val, value: i64) -> Val {
    let bytes = I8.x(64);
    let (value, zero) = (e.int(bytes, value), e.int(bytes, 0));
    let mask = if target.has("avx512bw") {
        let word = e.load(at, I64.x(1), 8);
        e.bitcast(word, I1.x(64))
    } else {
        // Without mask registers, each byte of the word goes to eight lanes, which look at a bit each.
        let word = e.load(at, I8.x(8), 8);
        let spread = e.shuffle(word, word, &(0..64).map(|i| i / 8).collect::<Vec<_>>());
        let bits = e.powers(64);
        let found = e.and(spread, bits);
        e.cmp(Cmp::Ne, found, zero)
    };
    e.select(mask, value, zero)
}

/// `sum + dot4(codes, x)` in each 32-bit lane: an [`operand`] times signed bytes.
pub fn dot4(e: &mut Emitter, target: &Target, bits: u8, sum: Val, codes: Val, x: Val) -> Val {
    let whole = |e: &mut Emitter, name: &str, sum: Val, codes: Val, x: Val| {
        e.intrinsic(name, &[sum, codes, x], I32.x(sum.ty.lanes))
    };
    if target.has("avx512vnni") && target.vector_bytes == 64 {
        return whole(e, "llvm.x86.avx512.vpdpbusd.512", sum, codes, x);
    }
    let step = |e: &mut Emitter, sum, codes, x| {
        if target.has("avxvnni") || (target.has("avx512vnni") && target.has("avx512vl")) {
            whole(e, "llvm.x86.avx512.vpdpbusd.256", sum, codes, x)
        } else if target.has("i8mm") {
            whole(e, "llvm.aarch64.neon.usdot.v4i32.v16i8", sum, codes, x)
        } else if target.has("dotprod") {
            whole(e, "llvm.aarch64.neon.sdot.v4i32.v16i8", sum, codes, x)
        } else if bits < 8 {
            dot4_avx2_small(e, sum, codes, x)
        } else {
            dot4_avx2(e, sum, codes, x)
        }
    };
    by_parts(e, target.vector_bytes, sum, codes, x, step)
}

/// Applies a step of `bytes` bytes to every part of 512-bit operands; the shuffles cost nothing.
fn by_parts(
    e: &mut Emitter,
    bytes: usize,
    sum: Val,
    codes: Val,
    x: Val,
    step: impl Fn(&mut Emitter, Val, Val, Val) -> Val,
) -> Val {
    let count = 64 / bytes;
    let part = |e: &mut Emitter, v: Val, index: usize| {
        let n = v.ty.lanes / count;
        let lanes: Vec<usize> = (index * n..(index + 1) * n).collect();
        e.shuffle(v, v, &lanes)
    };
    let parts: Vec<Val> = (0..count)
        .map(|i| {
            let (s, c, x) = (part(e, sum, i), part(e, codes, i), part(e, x, i));
            step(e, s, c, x)
        })
        .collect();
    joined(e, parts)
}

/// Two, four or more vectors as one.
fn joined(e: &mut Emitter, mut parts: Vec<Val>) -> Val {
    while parts.len() > 1 {
        let join = |pair: &[Val]| e.shuffle(pair[0], pair[1], &(0..2 * pair[0].ty.lanes).collect::<Vec<_>>());
        parts = parts.chunks_exact(2).map(join).collect();
    }
    parts[0]
}

/// Without VNNI, for codes of at most 6 bits: sums of two products stay below 63 * 127 * 2 and fit 16 bits.
fn dot4_avx2_small(e: &mut Emitter, sum: Val, codes: Val, x: Val) -> Val {
    let pairs = e.intrinsic("llvm.x86.avx2.pmadd.ub.sw", &[codes, x], I16.x(16));
    let ones = e.int(I16.x(16), 1);
    let quads = e.intrinsic("llvm.x86.avx2.pmadd.wd", &[pairs, ones], I32.x(8));
    e.add(sum, quads)
}

/// Without VNNI: even and odd bytes as 16-bit values, two `pmaddwd`. (`pmaddubsw` would saturate on 8-bit codes.)
fn dot4_avx2(e: &mut Emitter, sum: Val, codes: Val, x: Val) -> Val {
    let words = I16.x(16);
    let (c, x) = (e.bitcast(codes, words), e.bitcast(x, words));
    let low = e.int(words, 255);
    let (c_even, c_odd) = (e.and(c, low), e.shr(c, 8));
    let shifted = e.shl(x, 8);
    let (x_even, x_odd) = (e.sar(shifted, 8), e.sar(x, 8));
    let even = e.intrinsic("llvm.x86.avx2.pmadd.wd", &[c_even, x_even], I32.x(8));
    let odd = e.intrinsic("llvm.x86.avx2.pmadd.wd", &[c_odd, x_odd], I32.x(8));
    let both = e.add(even, odd);
    e.add(sum, both)
}
