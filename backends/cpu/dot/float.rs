//! Float products: one line of 16 weights a step of k, widened to f32, times each token's broadcast activation.

use super::Rows;
use crate::emit::{BF16, Emitter, F16, F32, Val};
use mansard_ir::formats::DType;
use mansard_ir::layout::STRIP;

/// Every row against every strip, column by column.
pub fn tile(e: &mut Emitter, dtype: DType, k: usize, strips: &[Val], rows: Rows, accumulators: &[Val]) -> Vec<Val> {
    let (low, high, step) = (e.i64(0), e.i64(k as i64), e.i64(1));
    let width = dtype.format().block_bytes;
    e.for_loop((low, high, step), accumulators, |e, k, acc| {
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
