//! Both planes of 16 rows -> the strip of `q8_0` that they are, on the stack.
//!
//! A line of the first plane holds two quads of codes of 16 rows, four rows' groups of the second are a vector:
//!
//! ```text
//! rows 0 4 8 12, rows 1 5 9 13, ...    [4 rows][4 quads] each
//!   transposed in fours  ->  quad of rows 0 1 2 3 | 4 5 6 7 | ...     as in the first plane
//! code = upper << 4 | lower
//! ```

use super::Projection;
use crate::cpu::dot::part_at;
use crate::emit::{Emitter, I8, I32, Val};
use mansard_ir::formats::{DType, IntFormat};
use mansard_ir::layout::{A8, ALIGN, STRIP, StripLayout, code_bytes};

/// Joins strip `strip` at `to`, laid out as `q8_0`.
pub fn strip(e: &mut Emitter, p: Projection, strip: Val, to: Val) {
    let (from, whole) = (p.layout.strip, StripLayout::new(DType::Q8_0, p.k));
    let upper = p.strip(e, strip);
    let first = e.scaled(strip, STRIP, 0);
    let lower = p.lower_row(e, first);
    let lower = e.gep_const(lower, p.layout.codes);
    let (zero, groups) = (e.i64(0), e.i64(p.groups() as i64));
    e.repeat(zero, groups, 1, |e, group| {
        let scales = |layout: &StripLayout| (layout.scales, layout.chunk / A8::GROUP, 2 * STRIP);
        let (a, b) = (part_at(e, &from, upper, group, scales(&from)), part_at(e, &whole, to, group, scales(&whole)));
        let line = e.load(a, I8.x(2 * STRIP), 32);
        e.store(line, b, 32);
        let codes = |layout: &StripLayout, bits| {
            let int = IntFormat { bits, group: A8::GROUP, zero: mansard_ir::formats::Zero::Fixed(0) };
            (layout.codes, layout.chunk / A8::GROUP, code_bytes(int))
        };
        let a = part_at(e, &from, upper, group, codes(&from, 4));
        // Both planes of the next strip are wanted once this one has been multiplied.
        let rows = e.row(lower, group, STRIP * A8::GROUP / 2);
        for line in (0..STRIP * A8::GROUP / 2).step_by(ALIGN) {
            for (at, next) in [(a, p.layout.strip_bytes), (rows, STRIP * p.layout.row_bytes)] {
                let ahead = e.i64((next + line) as i64);
                e.prefetch(at, ahead, 2);
            }
        }
        let b = part_at(e, &whole, to, group, codes(&whole, 8));
        let lower = e.row(lower, group, A8::GROUP / 2);
        for (quad, lower) in quads(e, p, lower).into_iter().enumerate() {
            let at = e.gep_const(a, 64 * quad);
            let upper = e.load(at, I8.x(64), 64);
            let (fifteen, high) = (e.int(upper.ty, 15), e.int(upper.ty, -16));
            let (first, second) = ((e.shl(upper, 4), e.and(lower, fifteen)), (e.and(upper, high), e.shr(lower, 4)));
            for (quad, (upper, lower)) in [(quad, first), (quad + 4, second)] {
                let code = e.or(upper, lower);
                let at = e.gep_const(b, 64 * quad);
                e.store(code, at, 64);
            }
        }
    });
}

/// A group of the second plane of 16 rows, the first at `row`, as lines of the first plane.
fn quads(e: &mut Emitter, p: Projection, row: Val) -> Vec<Val> {
    let load = |e: &mut Emitter, r: usize| {
        let at = e.gep_const(row, r * p.layout.row_bytes);
        e.load(at, I32.x(4), 8)
    };
    let fours: Vec<Val> = (0..4)
        .map(|first| {
            let rows: Vec<Val> = (0..4).map(|i| load(e, first + 4 * i)).collect();
            let join = |e: &mut Emitter, a: Val, b: Val| e.shuffle(a, b, &(0..2 * a.ty.lanes).collect::<Vec<_>>());
            let (a, b) = (join(e, rows[0], rows[1]), join(e, rows[2], rows[3]));
            join(e, a, b)
        })
        .collect();
    // Of each 128 bits of two vectors: two neighbouring values of one beside those of the other.
    let pairs = |at: usize| (0..STRIP).map(|l| l / 4 * 4 + at + l % 4 / 2 + l % 2 * STRIP).collect::<Vec<_>>();
    let doubles = |at: usize| (0..STRIP).map(|l| l / 4 * 4 + at + l % 2 + l % 4 / 2 * STRIP).collect::<Vec<_>>();
    let mut lines = vec![];
    for at in [0, 2] {
        let (a, b) = (e.shuffle(fours[0], fours[1], &pairs(at)), e.shuffle(fours[2], fours[3], &pairs(at)));
        lines.extend([0, 2].map(|at| e.shuffle(a, b, &doubles(at))));
    }
    lines.into_iter().map(|line| e.bitcast(line, I8.x(64))).collect()
}
