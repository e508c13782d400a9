//! Float products: a line of 16 weights a step of k, widened to f32, times each token's broadcast activation; of bf16
//! weights a line of 16 pairs.
//!
//! ```text
//! f32, f16   acc += w[k][16] * x[k]                                    one fused multiply-add
//! bf16       acc += w[k][16][2] . x[k..k + 2]                          one dot product of pairs (AVX512-BF16)
//!            acc += w[k][16] * x[k];  acc += w[k + 1][16] * x[k + 1]   elsewhere, and with f32 activations
//! ```
//!
//! Products of two bf16 are exact in f32, so machines differ in the order of sums only.

use super::Rows;
use crate::emit::{BF16, Emitter, F16, F32, I32, Val};
use crate::math::bf16_pair;
use mansard_ir::formats::DType;
use mansard_ir::layout::STRIP;
use mansard_ir::target::Target;

/// Every row against every strip, column by column or pair by pair.
pub fn tile(
    e: &mut Emitter,
    target: &Target,
    dtype: DType,
    k: usize,
    strips: &[Val],
    rows: Rows,
    accumulators: &[Val],
) -> Vec<Val> {
    if dtype != DType::BF16 {
        return columns(e, dtype, k, strips, rows, accumulators);
    }
    let direct = rows.dtype == DType::BF16 && target.computes_bf16();
    let element = rows.dtype.format().block_bytes;
    let (low, high, step) = (e.i64(0), e.i64((k / 2) as i64), e.i64(1));
    let acc = e.for_loop((low, high, step), accumulators, |e, pair, acc| {
        let x = e.row(rows.first, pair, 2 * element);
        let at: Vec<Val> = strips.iter().map(|strip| e.row(*strip, pair, 4 * STRIP)).collect();
        at.iter().for_each(|at| ask_ahead(e, *at, rows));
        if direct { dot_pairs(e, &at, x, rows, acc) } else { widened_pairs(e, &at, x, rows, 2, acc) }
    });
    if k.is_multiple_of(2) {
        return acc;
    }
    let x = e.gep_const(rows.first, (k - 1) * element);
    let at: Vec<Val> = strips.iter().map(|strip| e.gep_const(*strip, k / 2 * 4 * STRIP)).collect();
    widened_pairs(e, &at, x, rows, 1, &acc)
}

/// f32 and f16 weights.
fn columns(e: &mut Emitter, dtype: DType, k: usize, strips: &[Val], rows: Rows, accumulators: &[Val]) -> Vec<Val> {
    let (low, high, step) = (e.i64(0), e.i64(k as i64), e.i64(1));
    let width = dtype.format().block_bytes;
    e.for_loop((low, high, step), accumulators, |e, k, acc| {
        let mut acc = acc.to_vec();
        let x = e.row(rows.first, k, 4);
        let weights: Vec<Val> = strips
            .iter()
            .map(|strip| {
                let at = e.row(*strip, k, STRIP * width);
                ask_ahead(e, at, rows);
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

/// Asks for the line that a later tile finds in place of the one at `at`.
fn ask_ahead(e: &mut Emitter, at: Val, rows: Rows) {
    if let Some(ahead) = rows.ahead {
        e.prefetch(at, ahead, 2);
    }
}

/// 16 weights of one k, as f32.
fn float_line(e: &mut Emitter, dtype: DType, at: Val) -> Val {
    if dtype == DType::F32 {
        return e.load(at, F32.x(STRIP), 64);
    }
    let value = e.load(at, F16.x(STRIP), 32);
    e.convert("extf", value, F32)
}

/// Adds one line of pairs of every strip times each row's pair at `x`.
fn dot_pairs(e: &mut Emitter, strips: &[Val], x: Val, rows: Rows, acc: &[Val]) -> Vec<Val> {
    let (mut acc, pairs) = (acc.to_vec(), BF16.x(2 * STRIP));
    let weights: Vec<Val> = strips.iter().map(|at| e.load(*at, pairs, 64)).collect();
    for r in 0..rows.count {
        let at = e.gep_const(x, r * rows.stride);
        let pair = e.load(at, I32, 4);
        let pair = e.broadcast(pair, STRIP);
        let pair = e.bitcast(pair, pairs);
        for (s, w) in weights.iter().enumerate() {
            let a = &mut acc[s * rows.count + r];
            *a = e.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", &[*a, *w, pair], a.ty);
        }
    }
    acc
}

/// The same, widened, for `count` (one or two) of the pair's columns.
fn widened_pairs(e: &mut Emitter, strips: &[Val], x: Val, rows: Rows, count: usize, acc: &[Val]) -> Vec<Val> {
    let mut acc = acc.to_vec();
    let weights: Vec<[Val; 2]> = strips
        .iter()
        .map(|at| {
            let line = e.load(*at, I32.x(STRIP), 64);
            bf16_pair(e, line)
        })
        .collect();
    for r in 0..rows.count {
        let at = e.gep_const(x, r * rows.stride);
        let values: Vec<Val> = if rows.dtype == DType::BF16 {
            let pair = e.load(at, I32, 4);
            let pair = e.broadcast(pair, STRIP);
            bf16_pair(e, pair).to_vec()
        } else {
            let load = |i: usize| {
                let at = e.gep_const(at, 4 * i);
                let value = e.load(at, F32, 4);
                e.broadcast(value, STRIP)
            };
            (0..count).map(load).collect()
        };
        for (i, value) in values.iter().enumerate() {
            for (s, w) in weights.iter().enumerate() {
                let a = &mut acc[s * rows.count + r];
                *a = e.fma(w[i], *value, *a);
            }
        }
    }
    acc
}
