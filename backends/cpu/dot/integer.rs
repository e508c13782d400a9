//! Integer products: unsigned weight codes times signed int8 activations.
//!
//! For each line of 32 activations the weight codes are unpacked once into eight vectors of bytes (one quad of k for 16
//! rows each) and multiplied with every token's signed codes by `u8 x s8` dot products:
//!
//! ```text
//! sum   = -zero * sum(x)                     starts the integer accumulator (0 for formats with a minimum, and where
//!                                            codes are multiplied as signed bytes)
//! sum  += codes[quad] . x[quad]              8 dot products, one 32-bit sum a lane
//! acc  += float(sum) * (scale_w * scale_x)   and, with a minimum, acc += min_w * (scale_x * sum(x))
//! ```

use super::Rows;
use super::isa::{self, dot4};
use crate::emit::{Emitter, F16, F32, I8, I32, Val};
use mansard_ir::formats::{IntFormat, Zero};
use mansard_ir::layout::{A8, STRIP, StripLayout, code_bytes, high_bytes};
use mansard_ir::target::Target;

/// Every row against every strip, weight group by weight group where those are wide, else line of activations by line.
pub fn tile(
    e: &mut Emitter,
    target: &Target,
    (int, layout): (IntFormat, StripLayout),
    k: usize,
    strips: &[Val],
    rows: Rows,
    accumulators: &[Val],
) -> Vec<Val> {
    let dot = Tile { target, int, layout, strips, rows };
    let lines = (int.group / A8::GROUP).max(1);
    let (low, high, step) = (e.i64(0), e.i64((k / A8::GROUP) as i64), e.i64(lines as i64));
    e.for_loop((low, high, step), accumulators, |e, line, acc| {
        if lines == 1 {
            return dot.line(e, line, None, acc);
        }
        let group = e.div(line, step);
        let figures: Vec<Figures> = strips.iter().map(|s| dot.figures(e, *s, group)).collect();
        let (end, one) = (e.add(line, step), e.i64(1));
        e.for_loop((line, end, one), acc, |e, line, acc| dot.line(e, line, Some(&figures), acc))
    })
}

/// Scales and minima of one weight group of 16 rows, as f32.
#[derive(Clone, Copy)]
struct Figures {
    scale: Val,
    min: Option<Val>,
}

/// A register tile.
struct Tile<'a> {
    target: &'a Target,
    int: IntFormat,
    layout: StripLayout,
    strips: &'a [Val],
    rows: Rows,
}

impl Tile<'_> {
    /// One line of activations of every row against every strip; `figures` of each strip where several lines share them.
    fn line(&self, e: &mut Emitter, line: Val, figures: Option<&[Figures]>, acc: &[Val]) -> Vec<Val> {
        let (mut acc, rows) = (acc.to_vec(), self.rows);
        let x = e.row(rows.first, line, A8::LINE * rows.planes);
        let units = A8::GROUP / self.int.unit();
        for (s, strip) in self.strips.iter().enumerate() {
            let acc = &mut acc[s * rows.count..][..rows.count];
            for part in 0..units {
                let unit = UnitAt { int: self.int, layout: &self.layout, strip: *strip, line, units, part };
                let figures = match figures {
                    Some(figures) => figures[s],
                    None => unit.figures(e),
                };
                let codes = unit.codes(e, self.target);
                for (r, acc) in acc.iter_mut().enumerate() {
                    for plane in 0..rows.planes {
                        let x = e.gep_const(x, r * rows.stride + plane * A8::LINE);
                        *acc = unit_product(e, self.target, &unit, &codes, figures, x, *acc);
                    }
                }
            }
        }
        acc
    }

    /// Figures of group `group` of a strip.
    fn figures(&self, e: &mut Emitter, strip: Val, group: Val) -> Figures {
        let real = |e: &mut Emitter, region| {
            let at = e.scaled(group, 2 * STRIP, region);
            let at = e.gep(strip, at);
            half_reals(e, at)
        };
        let scale = real(e, self.layout.scales);
        Figures { scale, min: (self.int.zero == Zero::Min).then(|| real(e, self.layout.mins)) }
    }
}

/// The f16 values of 16 rows, as f32.
fn half_reals(e: &mut Emitter, at: Val) -> Val {
    let value = e.load(at, F16.x(STRIP), 32);
    e.convert("extf", value, F32)
}

/// Adds the product of a unit of weights and its part of one line of activations.
fn unit_product(
    e: &mut Emitter,
    target: &Target,
    unit: &UnitAt<'_>,
    codes: &[Val],
    Figures { scale, min }: Figures,
    x: Val,
    acc: Val,
) -> Val {
    let UnitAt { int, units, part, .. } = *unit;
    let (neg_sum, real_sum) = match units {
        1 => (A8::NEG_SUM, A8::REAL_SUM),
        _ => (A8::NEG_SUM_16 + 4 * part, A8::REAL_SUM_16 + 4 * part),
    };
    let mut sum = match int.zero {
        Zero::Fixed(zero) if zero as i64 != isa::code_offset(target, int.bits) => {
            let neg = splat(e, x, neg_sum, I32);
            e.shl(neg, zero.trailing_zeros() as i64)
        }
        _ => e.int(I32.x(STRIP), 0),
    };
    for (quad, codes) in codes.iter().enumerate() {
        let dword = splat(e, x, part * int.unit() + 4 * quad, I32);
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

/// Weights of a strip whose codes are packed together: unit `line * units + part`.
struct UnitAt<'a> {
    int: IntFormat,
    layout: &'a StripLayout,
    strip: Val,
    line: Val,
    units: usize,
    part: usize,
}

impl UnitAt<'_> {
    /// Address of this unit inside a region with `bytes` a unit.
    fn at(&self, e: &mut Emitter, region: usize, bytes: usize) -> Val {
        let p = e.row(self.strip, self.line, self.units * bytes);
        e.gep_const(p, region + self.part * bytes)
    }

    /// Scales and minima, where the unit is a group.
    fn figures(&self, e: &mut Emitter) -> Figures {
        let real = |e: &mut Emitter, region| {
            let at = self.at(e, region, 2 * STRIP);
            half_reals(e, at)
        };
        let scale = real(e, self.layout.scales);
        Figures { scale, min: (self.int.zero == Zero::Min).then(|| real(e, self.layout.mins)) }
    }

    /// The unit's codes: one vector of 64 unsigned bytes for each quad of k.
    fn codes(&self, e: &mut Emitter, target: &Target) -> Vec<Val> {
        let bytes = I8.x(4 * STRIP);
        let quads = self.int.unit() / 4;
        let at = self.at(e, self.layout.codes, code_bytes(self.int));
        if self.int.bits == 8 {
            return (0..quads)
                .map(|q| {
                    let p = e.gep_const(at, 64 * q);
                    let codes = e.load(p, bytes, 64);
                    isa::operand(e, target, self.int.bits, codes)
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
        self.add_high_bits(e, target, &mut codes);
        codes
    }

    /// Adds bits 4 and 5, where the format has them.
    fn add_high_bits(&self, e: &mut Emitter, target: &Target, codes: &mut [Val]) {
        let bytes = I8.x(4 * STRIP);
        if high_bytes(self.int) == 0 {
            return;
        }
        let at = self.at(e, self.layout.high, high_bytes(self.int));
        for (quad, code) in codes.iter_mut().enumerate() {
            if self.int.bits == 5 {
                let p = e.gep_const(at, 8 * quad);
                let bits = isa::where_bits(e, target, p, 16);
                *code = e.or(*code, bits);
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
