//! Sums of a block's tile of outputs: from the registers of its warps through shared memory to the epilogue.
//!
//! ```text
//! a warp's product     16 rows of a strip by 8 tokens: lane 4 g + t has rows 2 g, 2 g + 1 of tokens 2 t, 2 t + 1
//! shared memory        f32[parts][tokens][rows] of each contraction, a few words more from token to token
//! the epilogue         neighbouring threads store neighbouring rows
//! ```

use super::{Component, Contraction, Device, Place};
use crate::emit::{Cmp, Emitter, F32, Val};
use mansard_ir::layout::STRIP;
use mansard_ir::{Result, ValueId};
use std::collections::BTreeMap;

/// Rows of a strip that a lane has.
pub(super) const ROWS: usize = 2;

/// Tokens of a product.
pub(super) const COLUMNS: usize = 8;

/// Sums of a product that a lane has.
pub(super) const SUMS: usize = 4;

/// Where a block's sums meet.
pub(super) struct Sums<'a> {
    d: &'a Device<'a>,
    component: &'a Component,
    /// Tokens and rows of the tile.
    tokens: usize,
    rows: usize,
    /// Parts that an output's sum has.
    parts: usize,
    /// The tile's first strip.
    base: Val,
    /// Its first token, and the last of the step: what lies beyond is not stored.
    pub(super) first: Val,
    pub(super) last: Val,
    /// By contraction.
    pub(super) memory: Vec<Val>,
}

impl<'a> Sums<'a> {
    /// Room for a tile of `tokens` by `strips`, which begins at strip `base` and token `first` of `rows`.
    pub(super) fn new(
        e: &mut Emitter,
        d: &'a Device<'a>,
        component: &'a Component,
        (tokens, strips, parts): (usize, usize, usize),
        (base, first, rows): (Val, Val, Val),
    ) -> Sums<'a> {
        let one = e.i64(1);
        let last = e.sub(rows, one);
        let mut sums = Sums { d, component, tokens, rows: STRIP * strips, parts, base, first, last, memory: vec![] };
        let bytes = parts * tokens * sums.token_bytes();
        sums.memory = component.dots.iter().map(|_| e.shared(bytes)).collect();
        sums
    }

    fn token_bytes(&self) -> usize {
        4 * (self.rows + 4)
    }

    /// Stores what a warp has of a contraction, whose sums meet at `memory`: part `part` of strip `strip` of the tile, all tokens.
    pub(super) fn leave(
        &self,
        e: &mut Emitter,
        (memory, part, strip): (Val, Val, Val),
        (group, pair): (Val, Val),
        sums: &[Val],
    ) {
        let bytes = self.token_bytes();
        let to = e.row(memory, part, self.tokens * bytes);
        let to = e.row(to, strip, 4 * STRIP);
        let to = e.row(to, group, 4 * ROWS);
        let to = e.row(to, pair, 2 * bytes);
        for (i, sum) in sums.iter().enumerate() {
            let (tile, row, token) = (i / SUMS, i % SUMS / 2, i % 2);
            let to = e.gep_const(to, (tile * COLUMNS + token) * bytes + 4 * row);
            e.store(*sum, to, 4);
        }
    }

    /// The epilogue, a row of the tile a thread, token by token.
    pub(super) fn results(&self, e: &mut Emitter) -> Result<()> {
        let (contraction, mut result) = (Contraction { d: self.d, component: self.component }, Ok(()));
        let bytes = self.token_bytes();
        let strips = e.i64((self.component.n.div_ceil(STRIP) * STRIP) as i64);
        e.strided(self.tokens * self.rows, |e, i| {
            let size = e.i64(self.rows as i64);
            let (token, row) = (e.div(i, size), e.rem(i, size));
            let mut values: BTreeMap<ValueId, Val> = BTreeMap::new();
            for (dot, sums) in self.component.dots.iter().zip(&self.memory) {
                let from = e.row(*sums, token, bytes);
                let from = e.row(from, row, 4);
                let parts = (0..self.parts).map(|part| {
                    let at = e.gep_const(from, part * self.tokens * bytes);
                    e.load(at, F32, 4)
                });
                let parts: Vec<Val> = parts.collect();
                values.insert(dot.value, parts.into_iter().reduce(|a, b| e.add(a, b)).unwrap_or(from));
            }
            let (token, before, one) = (e.add(self.first, token), e.scaled(self.base, STRIP, 0), e.i64(1));
            let (column, end) = (e.add(before, row), e.sub(strips, one));
            let (there, wanted) = (e.cmp(Cmp::Lt, column, strips), e.cmp(Cmp::Le, token, self.last));
            let (column, counts) = (e.min(column, end), e.and(there, wanted));
            let place = Place { token: e.min(token, self.last), element: column, column, counts };
            result = contraction.epilogue(e, values, place);
        });
        result
    }
}
