//! A row of a table in two planes as f32: upper codes from its strip, lower codes and scales from the second plane.

use crate::cpu::dot::part_at;
use crate::emit::{Emitter, F16, F32, I8, I32, Val};
use mansard_ir::layout::{A8, STRIP};
use mansard_ir::planes::PlanesLayout;

/// Row `row` of strip `strip` of a table of `n` rows of `k`, group by group, four codes at a time.
pub fn row(e: &mut Emitter, table: Val, (n, k): (usize, usize), (strip, row): (Val, Val), to: Val) {
    let layout = PlanesLayout::new(k);
    let upper = e.row(table, strip, layout.strip_bytes);
    let lower = e.gep_const(table, layout.upper_bytes(n));
    let first = e.scaled(strip, STRIP, 0);
    let index = e.add(first, row);
    let lower = e.row(lower, index, layout.row_bytes);
    let (zero, groups) = (e.i64(0), e.i64((k / A8::GROUP) as i64));
    e.repeat(zero, groups, 1, |e, group| {
        let scale = e.row(lower, group, 2);
        let scale = e.load(scale, F16, 2);
        let scale = e.convert("extf", scale, F32);
        let scale = e.broadcast(scale, 4);
        let codes = (layout.strip.codes, layout.strip.chunk / A8::GROUP, STRIP * A8::GROUP / 2);
        let high = part_at(e, &layout.strip, upper, group, codes);
        let high = e.row(high, row, 4);
        let low = e.gep_const(lower, layout.codes);
        let low = e.row(low, group, A8::GROUP / 2);
        let to = e.row(to, group, 4 * A8::GROUP);
        for quad in 0..4 {
            let load = |e: &mut Emitter, base: Val, offset: usize| {
                let at = e.gep_const(base, offset);
                let codes = e.load(at, I8.x(4), 4);
                e.convert("extui", codes, I32)
            };
            let (high, low) = (load(e, high, 64 * quad), load(e, low, 4 * quad));
            let fifteen = e.int(I32.x(4), 15);
            let first = (e.and(high, fifteen), e.and(low, fifteen));
            let second = (e.shr(high, 4), e.shr(low, 4));
            for (quad, (high, low)) in [(quad, first), (quad + 4, second)] {
                let high = e.shl(high, 4);
                let (code, zero) = (e.or(high, low), e.int(I32.x(4), 128));
                let code = e.sub(code, zero);
                let real = e.convert("sitofp", code, F32);
                let real = e.mul(real, scale);
                let to = e.gep_const(to, 16 * quad);
                e.store(real, to, 16);
            }
        }
    });
}
