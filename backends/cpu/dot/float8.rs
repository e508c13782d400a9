//! Products of 8-bit floats (e4m3) and f32: a line of four columns of 16 rows is widened, and each column multiplied with each
//! token's broadcast activation. A group's scale waits until its columns are summed.
//!
//! ```text
//! for group:  for quad of columns, for token:   sum[token] += w[k][16] * x[token][k]
//!             acc[token] += sum[token] * scale[16]
//! ```

use super::integer::Weights;
use super::{Rows, part_at};
use crate::emit::{Emitter, F32, I32, Val};
use crate::math::e4m3_quad;
use mansard_ir::layout::STRIP;

/// Every row against every strip, group by group.
pub fn tile(
    e: &mut Emitter,
    weights: Weights<'_>,
    k: usize,
    strips: &[Val],
    rows: Rows,
    accumulators: &[Val],
) -> Vec<Val> {
    let (layout, size) = (weights.layout, weights.int.group);
    let (low, high, step) = (e.i64(0), e.i64((k / size) as i64), e.i64(1));
    e.for_loop((low, high, step), accumulators, |e, group, acc| {
        let groups = (layout.codes, layout.chunk / size, size * STRIP);
        let codes: Vec<Val> = strips.iter().map(|strip| part_at(e, &layout, *strip, group, groups)).collect();
        let x = e.row(rows.first, group, 4 * size);
        let (quads, nothing) = (e.i64((size / 4) as i64), e.float(F32.x(STRIP), 0.0));
        let sums = e.for_loop((low, quads, step), &vec![nothing; acc.len()], |e, quad, sums| {
            let lines: Vec<Val> = codes.iter().map(|codes| e.row(*codes, quad, 4 * STRIP)).collect();
            let x = e.row(x, quad, 4 * 4);
            columns(e, &lines, rows, x, sums)
        });
        let mut acc = acc.to_vec();
        for (s, strip) in strips.iter().enumerate() {
            let figures = weights.figures(e, *strip, group);
            let own = s * rows.count..(s + 1) * rows.count;
            for (acc, sum) in acc[own.clone()].iter_mut().zip(&sums[own]) {
                *acc = figures.scaled(e, *sum, *acc);
            }
        }
        acc
    })
}

/// Adds a line of every strip times each row's four columns at `x`.
fn columns(e: &mut Emitter, lines: &[Val], rows: Rows, x: Val, sums: &[Val]) -> Vec<Val> {
    let mut sums = sums.to_vec();
    let mut weights = vec![];
    for line in lines {
        if rows.prefetch > 0 {
            let ahead = e.i64(rows.prefetch as i64);
            e.prefetch(*line, ahead, 1);
        }
        let words = e.load(*line, I32.x(STRIP), 64);
        weights.push(e4m3_quad(e, words));
    }
    for r in 0..rows.count {
        for column in 0..4 {
            let at = e.gep_const(x, r * rows.stride + 4 * column);
            let value = e.load(at, F32, 4);
            let value = e.broadcast(value, STRIP);
            for (s, w) in weights.iter().enumerate() {
                let sum = &mut sums[s * rows.count + r];
                *sum = e.fma(w[column], value, *sum);
            }
        }
    }
    sums
}
