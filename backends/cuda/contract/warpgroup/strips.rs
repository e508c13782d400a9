//! A strip's weights as products of warpgroups want them: four words a lane for 16 rows by 16 columns.
//!
//! ```text
//! lane 4 g + t    columns 2 t, 2 t + 1 of rows 2 g and 2 g + 1, then columns 2 t + 8, 2 t + 9 of both
//! bf16            lines t and t + 4 of a product's eight
//! codes           half of the words t / 2 and t / 2 + 2 of a product's four, widened
//! ```

use super::super::sums::ROWS;
use super::super::widen::bf16_pair;
use super::{Component, DEPTH, PRODUCTS, STEP};
use crate::cuda::weights::Packed;
use crate::emit::{Emitter, I32, Val};
use mansard_ir::formats::IntFormat;
use mansard_ir::layout::{STRIP, StripLayout};

/// One strip, as a lane sees it.
pub(super) struct Strip {
    packed: Packed,
    at: Val,
    /// `lane / 4` and `lane % 4`.
    group: Val,
    pair: Val,
}

impl Strip {
    /// Strip number `strip` of a weight of the component's; a number beyond the last stands for that.
    pub(super) fn new(
        e: &mut Emitter,
        component: &Component,
        (weight, strip): (Val, Val),
        (group, pair): (Val, Val),
    ) -> Strip {
        let (dot, last) = (&component.dots[0], e.i64(component.n.div_ceil(STRIP) as i64 - 1));
        let strip = e.min(strip, last);
        let at = e.row(weight, strip, StripLayout::new(dot.dtype, dot.k).bytes);
        let packed = Packed { rows: ROWS, ..Packed::new(dot.dtype, dot.k) };
        Strip { packed, at, group, pair }
    }

    /// The words of a step's products, one product after the other.
    pub(super) fn step(&self, e: &mut Emitter, step: Val) -> Vec<Val> {
        match self.packed.dtype.int() {
            Some(int) => {
                let units = STEP / int.unit();
                let of_unit = |unit| {
                    let unit = e.scaled(step, units, unit);
                    self.unit(e, int, unit)
                };
                (0..units).flat_map(of_unit).collect()
            }
            None => {
                let of_product = |product| {
                    let product = e.scaled(step, PRODUCTS, product);
                    self.pairs(e, product)
                };
                (0..PRODUCTS).flat_map(of_product).collect()
            }
        }
    }

    /// 16 columns of bf16.
    fn pairs(&self, e: &mut Emitter, product: Val) -> Vec<Val> {
        let lines = e.row(self.at, product, DEPTH / 2 * 4 * STRIP);
        let line = e.row(lines, self.pair, 4 * STRIP);
        let line = e.row(line, self.group, 4 * ROWS);
        let both = [0, 4 * 4 * STRIP].map(|more| {
            let at = e.gep_const(line, more);
            e.load(at, I32.x(ROWS), 4 * ROWS)
        });
        both.iter().flat_map(|rows| (0..ROWS).map(|row| e.extract(*rows, row)).collect::<Vec<Val>>()).collect()
    }

    /// 32 columns of codes: two products.
    fn unit(&self, e: &mut Emitter, int: IntFormat, unit: Val) -> Vec<Val> {
        let (two, lines) = (e.i64(2), if int.bits == 8 { 8 } else { 4 });
        let (word, odd) = (e.div(self.pair, two), e.rem(self.pair, two));
        let shift = e.scaled(odd, 16, 0);
        let shift = e.convert("trunci", shift, I32);
        let first = e.scaled(unit, lines, 0);
        let first = e.add(first, word);
        let figures = self.packed.figures_at(e, int, self.at, unit, self.group);
        let figures = self.packed.figures(e, int, figures);
        let mut words = [vec![], vec![]];
        // A line of narrow codes has a word of either product, one of bytes has a word of one.
        let lines: &[(usize, usize)] =
            if int.bits == 8 { &[(0, 0), (2, 0), (4, 1), (6, 1)] } else { &[(0, 0), (2, 0)] };
        for (more, product) in lines {
            let line = e.scaled(first, 1, *more);
            let [codes, ..] = self.packed.places(e, self.at, line, self.group);
            let quads = self.packed.quads(e, int, (self.at, line, self.group), codes.unwrap_or(self.at));
            for (quad, words) in quads.iter().zip(&mut words[*product..]) {
                for row in 0..ROWS {
                    let half = e.shift("arith.shrui", quad.codes[row], shift);
                    words.push(bf16_pair(e, int, (half, 0), &figures, row));
                }
            }
        }
        words.concat()
    }
}
