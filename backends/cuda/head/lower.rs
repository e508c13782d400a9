//! A row of the second plane times a row of activations, by a warp: `sum of scale * (lower - centre) * x`.

use super::{PLANES, Projection};
use crate::cuda::group;
use crate::emit::{Emitter, F16, F32, I32, Val, WARP};
use mansard_ir::layout::A8;

/// What a warp multiplies rows with.
#[derive(Clone, Copy)]
pub(super) struct Lower {
    pub(super) p: Projection,
    /// The row of activations.
    pub(super) x: Val,
    pub(super) lane: Val,
    /// What is taken off every code.
    pub(super) centre: f32,
}

impl Lower {
    /// The product with row `row`, in every lane.
    pub(super) fn product(&self, e: &mut Emitter, row: Val) -> Val {
        const WORDS: usize = A8::GROUP / 8;
        let p = self.p;
        let row = p.lower_row(e, row);
        let codes = e.gep_const(row, p.layout.codes);
        let (end, step, nothing) = (e.i64((p.k / 8) as i64), e.i64(WARP as i64), e.float(F32, 0.0));
        let own = e.for_loop((self.lane, end, step), &[nothing], |e, word, sum| {
            let words = e.i64(WORDS as i64);
            let (group, within) = (e.div(word, words), e.rem(word, words));
            let at = e.row(codes, word, 4);
            let (packed, mask) = (e.load(at, I32, 4), e.int(I32, 0x0f0f_0f0f));
            let (low, high) = (e.and(packed, mask), e.shr(packed, 4));
            let high = e.and(high, mask);
            let scale = e.row(row, group, 2);
            let scale = e.load(scale, F16, 2);
            let scale = e.convert("extf", scale, F32);
            let mut sum = sum[0];
            for plane in 0..PLANES {
                let line = e.row(self.x, group, PLANES * A8::LINE);
                let line = e.gep_const(line, plane * A8::LINE);
                let x_scale = e.gep_const(line, A8::SCALE);
                let x_scale = e.load(x_scale, F32, 4);
                let first = e.row(line, within, 4);
                let second = e.gep_const(first, A8::GROUP / 2);
                let (first, second) = (e.load(first, I32, 4), e.load(second, I32, 4));
                let none = e.int(I32, 0);
                let product = e.dot4(false, low, first, none);
                let product = e.dot4(false, high, second, product);
                let mut product = e.convert("sitofp", product, F32);
                if self.centre != 0.0 {
                    let (ones, centre) = (e.int(I32, 0x0101_0101), e.float(F32, -self.centre));
                    let sum = e.dot4(false, ones, first, none);
                    let sum = e.dot4(false, ones, second, sum);
                    let sum = e.convert("sitofp", sum, F32);
                    product = e.fma(sum, centre, product);
                }
                let both = e.mul(scale, x_scale);
                sum = e.fma(product, both, sum);
            }
            vec![sum]
        })[0];
        group::warp(e, own, &group::sum)
    }
}
