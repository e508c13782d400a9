//! One row of the second plane times one row of activations.
//!
//! A vector holds the lower codes of four groups, 128 columns: the lower halves of its bytes are the first 16 columns of
//! each group, the upper halves the others. Activations are put in that order once, on the stack; groups beyond the last are
//! zeros there, so that what a vector holds beyond a row's end does not count.
//!
//! ```text
//! codes    i8[128-column vector][plane][half][64]     scales  f32[..][plane][16]     middles  f32[..][16]
//! y += scale_w * (scale_x * (codes_w . codes_x) of both planes - 7.5 * sum(x))       four lanes a group
//! ```

use super::{PLANES, Projection};
use crate::cpu::dot::dot4;
use crate::emit::{Emitter, F16, F32, I8, I32, Val};
use mansard_ir::Target;
use mansard_ir::layout::{A8, STRIP};
use mansard_ir::planes::CENTRE;

/// Groups of a vector, and lanes of each.
const GROUPS: usize = 4;
const LANES: usize = STRIP / GROUPS;

/// Bytes of a vector of codes.
const VECTOR: usize = 64;

/// Where the parts of 128 columns of activations lie, and where the next begin.
const SCALES: usize = PLANES * 2 * VECTOR;
const MIDDLES: usize = SCALES + PLANES * VECTOR;
const BYTES: usize = MIDDLES + VECTOR;

/// A row of activations in the order of the second plane.
#[derive(Clone, Copy)]
pub struct Ordered {
    memory: Val,
    vectors: usize,
    codes: usize,
}

impl Ordered {
    /// Memory for one row.
    pub fn new(e: &mut Emitter, p: Projection) -> Ordered {
        let vectors = p.groups().div_ceil(GROUPS);
        Ordered { memory: e.stack(vectors * BYTES), vectors, codes: p.layout.codes }
    }

    /// Puts the row at `x` in order.
    pub fn fill(&self, e: &mut Emitter, p: Projection, x: Val) {
        let (zero, groups, end) = (e.i64(0), e.i64(p.groups() as i64), e.i64((self.vectors * BYTES) as i64));
        let last = e.i64(((self.vectors - 1) * BYTES) as i64);
        e.repeat(last, end, VECTOR as i64, |e, at| {
            let (nothing, at) = (e.int(I8.x(VECTOR), 0), e.gep(self.memory, at));
            e.store(nothing, at, VECTOR);
        });
        let four = e.i64(GROUPS as i64);
        e.repeat(zero, groups, 1, |e, group| {
            let (vector, part) = (e.div(group, four), e.rem(group, four));
            let to = e.row(self.memory, vector, BYTES);
            let to = e.row(to, part, VECTOR / GROUPS);
            let line = e.row(x, group, PLANES * A8::LINE);
            let mut middle = e.float(F32.x(LANES), 0.0);
            for plane in 0..PLANES {
                let line = e.gep_const(line, plane * A8::LINE);
                for half in 0..2 {
                    let from = e.gep_const(line, half * A8::GROUP / 2);
                    let codes = e.load(from, I8.x(A8::GROUP / 2), 16);
                    let to = e.gep_const(to, (plane * 2 + half) * VECTOR);
                    e.store(codes, to, 16);
                }
                let scale = super::splat(e, line, A8::SCALE, LANES);
                let at = e.gep_const(to, SCALES + plane * VECTOR);
                e.store(scale, at, 16);
                // Every lane of a group takes its part of the centre.
                let (sum, share) = (super::splat(e, line, A8::REAL_SUM, LANES), -CENTRE / LANES as f32);
                let share = e.float(F32.x(LANES), share);
                middle = e.fma(sum, share, middle);
            }
            let at = e.gep_const(to, MIDDLES);
            e.store(middle, at, 16);
        });
    }

    /// The product with the row of the second plane at `row`.
    pub fn product(&self, e: &mut Emitter, target: &Target, row: Val) -> Val {
        let (zero, end, one, nothing) = (e.i64(0), e.i64(self.vectors as i64), e.i64(1), e.float(F32.x(STRIP), 0.0));
        let sum = e.for_loop((zero, end, one), &[nothing], |e, vector, sum| {
            let x = e.row(self.memory, vector, BYTES);
            let codes = e.gep_const(row, self.codes);
            let codes = e.row(codes, vector, VECTOR);
            let codes = e.load(codes, I8.x(VECTOR), 8);
            let fifteen = e.int(codes.ty, 15);
            let halves = [e.and(codes, fifteen), e.shr(codes, 4)];
            let middle = e.gep_const(x, MIDDLES);
            let mut product = e.load(middle, F32.x(STRIP), 64);
            for plane in 0..PLANES {
                let mut dots = e.int(I32.x(STRIP), 0);
                for (half, codes) in halves.into_iter().enumerate() {
                    let at = e.gep_const(x, (plane * 2 + half) * VECTOR);
                    let x = e.load(at, I8.x(VECTOR), 64);
                    dots = dot4(e, target, 4, dots, codes, x);
                }
                let dots = e.convert("sitofp", dots, F32);
                let scale = e.gep_const(x, SCALES + plane * VECTOR);
                let scale = e.load(scale, F32.x(STRIP), 64);
                product = e.fma(dots, scale, product);
            }
            let scales = e.row(row, vector, 2 * GROUPS);
            let scales = e.load(scales, F16.x(GROUPS), 8);
            let scales = e.convert("extf", scales, F32);
            let scales = e.shuffle(scales, scales, &(0..STRIP).map(|lane| lane / LANES).collect::<Vec<_>>());
            vec![e.fma(product, scales, sum[0])]
        });
        e.reduce_add(sum[0])
    }
}
