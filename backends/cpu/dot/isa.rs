//! `u8 x s8` dot products of four bytes a lane, on every machine that code is generated for.

use crate::emit::{Emitter, I16, I32, Val};
use mansard_ir::layout::STRIP;
use mansard_ir::target::Target;

/// `sum + dot4(codes, x)` in each 32-bit lane: unsigned times signed bytes.
pub fn dot4(e: &mut Emitter, target: &Target, bits: u8, sum: Val, codes: Val, x: Val) -> Val {
    if target.has("avx512vnni") && target.vector_bytes == 64 {
        return e.intrinsic("llvm.x86.avx512.vpdpbusd.512", &[sum, codes, x], I32.x(16));
    }
    if target.has("avxvnni") || (target.has("avx512vnni") && target.has("avx512vl")) {
        return by_halves(e, sum, codes, x, |e, sum, codes, x| {
            e.intrinsic("llvm.x86.avx512.vpdpbusd.256", &[sum, codes, x], I32.x(8))
        });
    }
    if target.has("avx2") {
        return by_halves(e, sum, codes, x, if bits < 8 { dot4_avx2_small } else { dot4_avx2 });
    }
    dot4_plain(e, sum, codes, x)
}

/// Applies a 256-bit step to both halves of 512-bit operands; the shuffles cost nothing.
fn by_halves(e: &mut Emitter, sum: Val, codes: Val, x: Val, step: impl Fn(&mut Emitter, Val, Val, Val) -> Val) -> Val {
    let half = |e: &mut Emitter, v: Val, side: usize| {
        let n = v.ty.lanes / 2;
        let lanes: Vec<usize> = (side * n..(side + 1) * n).collect();
        e.shuffle(v, v, &lanes)
    };
    let mut sides = vec![];
    for side in 0..2 {
        let (s, c, x) = (half(e, sum, side), half(e, codes, side), half(e, x, side));
        sides.push(step(e, s, c, x));
    }
    e.shuffle(sides[0], sides[1], &(0..16).collect::<Vec<_>>())
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

/// On any machine: one byte of each lane at a time.
fn dot4_plain(e: &mut Emitter, mut sum: Val, codes: Val, x: Val) -> Val {
    let lanes = I32.x(STRIP);
    let (c, x) = (e.bitcast(codes, lanes), e.bitcast(x, lanes));
    let byte = e.int(lanes, 255);
    for i in 0..4 {
        let c = e.shr(c, 8 * i);
        let c = e.and(c, byte);
        let x = e.shl(x, 24 - 8 * i);
        let x = e.sar(x, 24);
        let product = e.mul(c, x);
        sum = e.add(sum, product);
    }
    sum
}
