//! Integer products: unsigned weight codes times signed int8 activations.
//!
//! For each group of 32 activations the weight codes are unpacked once into eight vectors of bytes (one quad of k for 16
//! rows each) and multiplied with every token's signed codes by `u8 x s8` dot products:
//!
//! ```text
//! sum   = -zero * sum(x)                     starts the integer accumulator (0 for formats with a minimum)
//! sum  += codes[quad] . x[quad]              8 dot products, one 32-bit sum a lane
//! acc  += float(sum) * (scale_w * scale_x)   and, with a minimum, acc += min_w * (scale_x * sum(x))
//! ```

use super::Rows;
use super::isa::dot4;
use crate::emit::{Emitter, F16, F32, I8, I32, I64, Val};
use mansard_ir::formats::{IntFormat, Zero};
use mansard_ir::layout::{A8, STRIP, StripLayout, code_bytes, high_bytes};
use mansard_ir::target::Target;

/// Every row against every strip, line of activations by line.
pub fn tile(
    e: &mut Emitter,
    target: &Target,
    (int, layout): (IntFormat, StripLayout),
    k: usize,
    strips: &[Val],
    rows: Rows,
    accumulators: &[Val],
) -> Vec<Val> {
    let (low, high, step) = (e.i64(0), e.i64((k / A8::GROUP) as i64), e.i64(1));
    e.for_loop((low, high, step), accumulators, |e, line, acc| {
        let mut acc = acc.to_vec();
        let x = e.row(rows.first, line, A8::LINE * rows.planes);
        for (s, strip) in strips.iter().enumerate() {
            let acc = &mut acc[s * rows.count..][..rows.count];
            integer_line(e, target, int, &layout, *strip, line, Rows { first: x, ..rows }, acc);
        }
        acc
    })
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
