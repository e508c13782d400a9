//! Packed codes of a strip -> what matrix units read, once for all tokens of a step.
//!
//! ```text
//! signed   code - zero                    signed bytes, a line of 64 for each quad of columns
//! widen    scale * (code - zero) + min    or scale times an 8-bit float, rounded to bf16, a line of 16 pairs for each pair of columns
//! ```
//!
//! A code of 4 bits names one of 16 numbers: the f32 of 16 rows are one look-up.

use super::integer::{UnitAt, Weights};
use crate::emit::{BF16, Emitter, F32, I32, Val};
use crate::math::e4m3_quad;
use mansard_ir::formats::{E2M1, IntFormat, Zero};
use mansard_ir::layout::{A8, STRIP};

/// Unpacks a strip to `panel` as signed bytes.
pub fn signed(e: &mut Emitter, weights: Weights<'_>, k: usize, strip: Val, panel: Val) {
    let (low, high) = (e.i64(0), e.i64((k / A8::GROUP) as i64));
    e.repeat(low, high, 1, |e, line| {
        let to = e.row(panel, line, A8::GROUP * STRIP);
        for part in 0..weights.units() {
            for (quad, codes) in signed_quads(e, &weights.unit(strip, line, part)) {
                let at = e.gep_const(to, (part * weights.int.unit() / 4 + quad) * 4 * STRIP);
                e.store(codes, at, 64);
            }
        }
    });
}

/// Unpacks a strip to `panel` as reals.
pub fn widen(e: &mut Emitter, weights: Weights<'_>, k: usize, strip: Val, panel: Val) {
    let (low, high) = (e.i64(0), e.i64((k / A8::GROUP) as i64));
    e.repeat(low, high, 1, |e, line| {
        let to = e.row(panel, line, 2 * A8::GROUP * STRIP);
        for part in 0..weights.units() {
            let unit = weights.unit(strip, line, part);
            let figures = weights.unit_figures(e, strip, (line, part));
            let columns = match weights.int {
                IntFormat { bits: 4, .. } => looked_up(e, &unit),
                IntFormat { zero: Zero::E4M3, .. } => floats(e, &unit),
                _ => converted(e, &unit),
            };
            for (column, codes) in columns {
                let reals = codes.map(|codes| figures.reals(e, codes));
                let pair = pairs(e, reals);
                let at = e.gep_const(to, (part * weights.int.unit() + column) * 2 * STRIP);
                e.store(pair, at, 64);
            }
        }
    });
}

/// Rounds two vectors of 16 to bf16: `even[0], odd[0], even[1], ...`. For processors that convert to bf16.
pub fn pairs(e: &mut Emitter, [even, odd]: [Val; 2]) -> Val {
    let halves = e.intrinsic("llvm.x86.avx512bf16.cvtne2ps2bf16.512", &[odd, even], BF16.x(2 * STRIP));
    let lanes: Vec<usize> = (0..2 * STRIP).map(|i| i / 2 + i % 2 * STRIP).collect();
    e.shuffle(halves, halves, &lanes)
}

/// The quads of a unit, each with its codes, less a zero point that all share.
fn signed_quads(e: &mut Emitter, unit: &UnitAt<'_>) -> Vec<(usize, Val)> {
    let mut quads: Vec<(usize, Val)> = (0..unit.lines()).flat_map(|line| unit.codes(e, line)).collect();
    if let Some(zero) = unit.weights.int.zero.fixed() {
        for (_, codes) in &mut quads {
            let zero = e.int(codes.ty, i64::from(zero.cast_signed()));
            *codes = e.sub(*codes, zero);
        }
    }
    quads
}

/// Every second column of a unit, with its codes and the next one's: f32 of 16 rows.
fn converted(e: &mut Emitter, unit: &UnitAt<'_>) -> Vec<(usize, [Val; 2])> {
    let mut columns = vec![];
    for (quad, codes) in signed_quads(e, unit) {
        let words = e.bitcast(codes, I32.x(STRIP));
        for first in [0, 2] {
            let codes = [first, first + 1].map(|column| {
                let byte = e.shl(words, 24 - 8 * column);
                let byte = e.sar(byte, 24);
                e.convert("sitofp", byte, F32)
            });
            columns.push((4 * quad + first as usize, codes));
        }
    }
    columns
}

/// As [`converted`], of 8-bit floats.
fn floats(e: &mut Emitter, unit: &UnitAt<'_>) -> Vec<(usize, [Val; 2])> {
    let quads = (0..unit.lines()).flat_map(|quad| {
        let line = unit.packed(e, quad);
        let words = e.bitcast(line, I32.x(STRIP));
        let [a, b, c, d] = e4m3_quad(e, words);
        [(4 * quad, [a, b]), (4 * quad + 2, [c, d])]
    });
    quads.collect()
}

/// As [`converted`], of codes of 4 bits.
fn looked_up(e: &mut Emitter, unit: &UnitAt<'_>) -> Vec<(usize, [Val; 2])> {
    let int = unit.weights.int;
    let zero = f32::from(int.zero.fixed().unwrap_or(0));
    let table: [f32; 16] =
        if int.zero == Zero::E2M1 { E2M1.map(f32::from) } else { std::array::from_fn(|code| code as f32 - zero) };
    let table = e.floats(&table);
    let mut columns = vec![];
    for line in 0..unit.lines() {
        let packed = unit.packed(e, line);
        let words = e.bitcast(packed, I32.x(STRIP));
        for (quad, bit) in [(line, 0), (line + unit.lines(), 4)] {
            for first in [0, 2] {
                let codes = [first, first + 1].map(|column| {
                    let index = e.shr(words, bit + 8 * column);
                    e.intrinsic("llvm.x86.avx512.permvar.sf.512", &[table, index], F32.x(STRIP))
                });
                columns.push((4 * quad + first as usize, codes));
            }
        }
    }
    columns
}
