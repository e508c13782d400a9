//! Inner products of a register tile: `tokens` activation rows times the 16 rows of each of a few strips.
//!
//! Integer formats: for each group of 32 activations the unsigned weight codes are unpacked once into eight vectors of
//! bytes (one quad of k for 16 rows each) and multiplied with every token's signed codes by `u8 x s8` dot products:
//!
//! ```text
//! sum   = -zero * sum(x)                     starts the integer accumulator (0 for formats with a minimum)
//! sum  += codes[quad] . x[quad]              8 dot products, one 32-bit sum a lane
//! acc  += float(sum) * (scale_w * scale_x)   and, with a minimum, acc += min_w * (scale_x * sum(x))
//! ```
//!
//! Float formats: one line of 16 weights a step of k, widened to f32, times each token's broadcast activation.

use crate::emit::{BF16, Emitter, F16, F32, I8, I16, I32, I64, PTR, Val};
use mansard_ir::formats::{DType, IntFormat, Zero};
use mansard_ir::layout::{A8, STRIP, StripLayout, code_bytes, high_bytes};
use mansard_ir::target::Target;

/// Activation rows of a tile.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// First row.
    pub first: Val,
    /// Bytes from row to row.
    pub stride: usize,
    /// How many.
    pub count: usize,
    /// Planes of int8 codes, for integer formats.
    pub planes: usize,
}

/// Products of `rows` and of each strip: `result[strip * rows.count + row]` is an f32 vector of 16 outputs.
pub fn tile(e: &mut Emitter, target: &Target, dtype: DType, k: usize, strips: &[Val], rows: Rows) -> Vec<Val> {
    let zero = e.float(F32.x(STRIP), 0.0);
    let accumulators = vec![zero; strips.len() * rows.count];
    let layout = StripLayout::new(dtype, k);
    match dtype.int() {
        Some(int) => {
            let (low, high, step) = (e.i64(0), e.i64((k / A8::GROUP) as i64), e.i64(1));
            e.for_loop((low, high, step), &accumulators, |e, line, acc| {
                let mut acc = acc.to_vec();
                let x = e.row(rows.first, line, A8::LINE * rows.planes);
                for (s, strip) in strips.iter().enumerate() {
                    let acc = &mut acc[s * rows.count..][..rows.count];
                    integer_line(e, target, int, &layout, *strip, line, Rows { first: x, ..rows }, acc);
                }
                acc
            })
        }
        None => {
            let (low, high, step) = (e.i64(0), e.i64(k as i64), e.i64(1));
            let width = dtype.format().block_bytes;
            e.for_loop((low, high, step), &accumulators, |e, k, acc| {
                let mut acc = acc.to_vec();
                let x = e.row(rows.first, k, 4);
                let weights: Vec<Val> = strips
                    .iter()
                    .map(|strip| {
                        let at = e.row(*strip, k, STRIP * width);
                        float_line(e, dtype, at)
                    })
                    .collect();
                for r in 0..rows.count {
                    let at = e.gep_const(x, r * rows.stride);
                    let value = e.load(at, F32, 4);
                    let value = e.broadcast(value, STRIP);
                    for (s, w) in weights.iter().enumerate() {
                        let a = &mut acc[s * rows.count + r];
                        *a = e.fma(*w, value, *a);
                    }
                }
                acc
            })
        }
    }
}

/// 16 weights of one k, as f32.
fn float_line(e: &mut Emitter, dtype: DType, at: Val) -> Val {
    let narrow = match dtype {
        DType::F16 => F16,
        DType::BF16 => BF16,
        _ => return e.load(at, F32.x(STRIP), 64),
    };
    let value = e.load(at, narrow.x(STRIP), 32);
    e.convert("extf", value, F32)
}

/// One group of 32 activations of every row against one strip.
#[allow(clippy::too_many_arguments)] // the operands of one machine-level step
fn integer_line(
    e: &mut Emitter,
    target: &Target,
    int: IntFormat,
    layout: &StripLayout,
    strip: Val,
    line: Val,
    rows: Rows,
    acc: &mut [Val],
) {
    let halves = A8::GROUP / int.group;
    for half in 0..halves {
        let group = GroupAt { int, layout, strip, line, halves, half };
        let scale = group.real(e, layout.scales);
        let min = (int.zero == Zero::Min).then(|| group.real(e, layout.mins));
        let codes = group.codes(e);
        for (r, acc) in acc.iter_mut().enumerate() {
            for plane in 0..rows.planes {
                let x = e.gep_const(rows.first, r * rows.stride + plane * A8::LINE);
                *acc = group_product(e, target, &group, &codes, (scale, min), x, *acc);
            }
        }
    }
}

/// Adds the product of a weight group and one line of activations.
fn group_product(
    e: &mut Emitter,
    target: &Target,
    group: &GroupAt<'_>,
    codes: &[Val],
    (scale, min): (Val, Option<Val>),
    x: Val,
    acc: Val,
) -> Val {
    let GroupAt { int, halves, half, .. } = *group;
    let (neg_sum, real_sum) = match halves {
        1 => (A8::NEG_SUM, A8::REAL_SUM),
        _ => (A8::NEG_SUM_16 + 4 * half, A8::REAL_SUM_16 + 4 * half),
    };
    let mut sum = match int.zero {
        Zero::Min => e.int(I32.x(STRIP), 0),
        Zero::Fixed(zero) => {
            let neg = splat(e, x, neg_sum, I32);
            e.shl(neg, zero.trailing_zeros() as i64)
        }
    };
    for (quad, codes) in codes.iter().enumerate() {
        let dword = splat(e, x, half * int.group + 4 * quad, I32);
        let bytes = e.bitcast(dword, I8.x(4 * STRIP));
        sum = dot4(e, target, int.bits, sum, *codes, bytes);
    }
    let sum = e.convert("sitofp", sum, F32);
    let x_scale = splat(e, x, A8::SCALE, F32);
    let both = e.mul(scale, x_scale);
    let acc = e.fma(sum, both, acc);
    match min {
        Some(min) => {
            let real_sum = splat(e, x, real_sum, F32);
            e.fma(min, real_sum, acc)
        }
        None => acc,
    }
}

/// The 32-bit value at `x + offset` in every lane.
fn splat(e: &mut Emitter, x: Val, offset: usize, ty: crate::emit::Ty) -> Val {
    let at = e.gep_const(x, offset);
    let value = e.load(at, ty, 4);
    e.broadcast(value, STRIP)
}

/// One weight group of a strip: group `line * halves + half`.
struct GroupAt<'a> {
    int: IntFormat,
    layout: &'a StripLayout,
    strip: Val,
    line: Val,
    halves: usize,
    half: usize,
}

impl GroupAt<'_> {
    /// Address of this group inside a region with `bytes` a group.
    fn at(&self, e: &mut Emitter, region: usize, bytes: usize) -> Val {
        let p = e.row(self.strip, self.line, self.halves * bytes);
        e.gep_const(p, region + self.half * bytes)
    }

    /// The group's f16 scales or minima of 16 rows, as f32.
    fn real(&self, e: &mut Emitter, region: usize) -> Val {
        let at = self.at(e, region, 2 * STRIP);
        let value = e.load(at, F16.x(STRIP), 32);
        e.convert("extf", value, F32)
    }

    /// The group's codes: one vector of 64 unsigned bytes for each quad of k.
    fn codes(&self, e: &mut Emitter) -> Vec<Val> {
        let bytes = I8.x(4 * STRIP);
        let quads = self.int.group / 4;
        let at = self.at(e, self.layout.codes, code_bytes(self.int));
        if self.int.bits == 8 {
            return (0..quads)
                .map(|q| {
                    let p = e.gep_const(at, 64 * q);
                    e.load(p, bytes, 64)
                })
                .collect();
        }
        let lines: Vec<Val> = (0..quads / 2)
            .map(|j| {
                let p = e.gep_const(at, 64 * j);
                e.load(p, bytes, 64)
            })
            .collect();
        let fifteen = e.int(bytes, 15);
        let mut codes: Vec<Val> = lines.iter().map(|l| e.and(*l, fifteen)).collect();
        codes.extend(lines.iter().map(|l| e.shr(*l, 4)).collect::<Vec<_>>());
        self.add_high_bits(e, &mut codes);
        codes
    }

    /// Adds bits 4 and 5, where the format has them.
    fn add_high_bits(&self, e: &mut Emitter, codes: &mut [Val]) {
        let bytes = I8.x(4 * STRIP);
        if high_bytes(self.int) == 0 {
            return;
        }
        let at = self.at(e, self.layout.high, high_bytes(self.int));
        for (quad, code) in codes.iter_mut().enumerate() {
            if self.int.bits == 5 {
                let p = e.gep_const(at, 8 * quad);
                let word = e.load(p, I64.x(1), 8);
                let mask = e.bitcast(word, crate::emit::I1.x(64));
                let sixteen = e.int(bytes, 16);
                let with = e.or(*code, sixteen);
                *code = e.select(mask, with, *code);
            } else {
                let p = e.gep_const(at, 64 * (quad / 4));
                let crumbs = e.load(p, bytes, 64);
                let moved = match quad % 4 {
                    0 => e.shl(crumbs, 4),
                    1 => e.shl(crumbs, 2),
                    2 => crumbs,
                    _ => e.shr(crumbs, 2),
                };
                let mask = e.int(bytes, 0x30);
                let bits = e.and(moved, mask);
                *code = e.or(*code, bits);
            }
        }
    }
}

/// `sum + dot4(codes, x)` in each 32-bit lane: unsigned times signed bytes.
fn dot4(e: &mut Emitter, target: &Target, bits: u8, sum: Val, codes: Val, x: Val) -> Val {
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

/// Address of strip `index` of a packed matrix.
pub fn strip_at(e: &mut Emitter, weight: Val, index: Val, dtype: DType, k: usize) -> Val {
    debug_assert_eq!(weight.ty, PTR);
    e.row(weight, index, StripLayout::new(dtype, k).bytes)
}
