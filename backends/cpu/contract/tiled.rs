//! Contractions of many tokens on matrix units.
//!
//! ```text
//! for cache tile of strips: unpack its codes
//!   for token tile (16; 32 of bf16)
//!     for strip (two of bf16): products -> memory
//!       for token: epilogue -> store
//! ```
//!
//! A token tile may reach past the step's last row, as in [`super`]. Codes are unpacked once for all tokens of a step.

use super::{Contraction, Dot, Place, by_strips, internal};
use crate::cpu::dot::amx::{self, Later, Operands, Sums, TOKENS};
use crate::cpu::dot::{self, Rows, Weights};
use crate::emit::{Cmp, Emitter, F32, I8, Val};
use mansard_ir::kernel::PROLOGUE_TOKENS;
use mansard_ir::layout::{A8, STRIP, StripLayout, row_bytes};
use mansard_ir::{Result, bail};
use std::collections::BTreeMap;

/// Bytes of weights, as the units read them, that a cache tile of strips may hold: a quarter of the second-level cache of
/// all processors with such units. Unpacked codes lie on a worker's stack.
const CACHE_TILE_BYTES: usize = 512 << 10;

/// Token rows at a time of what vector units multiply in a tile.
const VECTOR_ROWS: usize = 4;

/// Memory of a worker's tiles.
#[derive(Clone, Copy)]
struct Memory {
    operands: Operands,
    /// Unpacked strips of every dot, one dot after the other.
    panels: Option<Val>,
    /// Stored integer tiles on their way to sums.
    sums: Option<Val>,
    /// `f32[dots][strips][tokens][16]`.
    products: Val,
}

/// A run of strips, and how many tokens from which on.
#[derive(Clone, Copy)]
struct Tile {
    first: Val,
    tokens: usize,
    strip: Val,
    strips: usize,
    /// The first strip of the cache tile.
    from: Val,
}

impl Contraction<'_> {
    /// What the matrix units multiply: where they can multiply all of the component, or where only they can multiply some.
    ///
    /// # Errors
    /// Where codes meet bf16 and there are no matrix units.
    pub(super) fn operands(&self) -> Result<Option<Operands>> {
        let dots = &self.component.dots;
        let of = |d: &Dot| Operands::of(self.target, d.activations, d.dtype, d.k);
        if let Some(dot) = dots.iter().find(|d| d.widens()) {
            if of(dot).is_none() {
                bail!(Unsupported, "no product of bf16 activations and {} weights on {}", dot.dtype, self.target.name);
            }
            return Ok(of(dot));
        }
        let Some(first) = dots.first().and_then(of) else { return Ok(None) };
        let many = self.kernel.range.max > self.fewest(first);
        Ok((many && dots.iter().all(|d| of(d) == Some(first))).then_some(first))
    }

    /// As many tokens, or fewer, are multiplied one by one: a tile takes its time however many of its rows count, and codes
    /// must be unpacked first.
    pub(super) fn fewest(&self, operands: Operands) -> usize {
        match operands {
            _ if self.component.dots.iter().any(Dot::widens) => 0,
            Operands::Pairs => PROLOGUE_TOKENS,
            Operands::Codes(_) => 2 * TOKENS,
        }
    }

    /// Bytes of a strip's panel; 0 for what is read as it is packed.
    fn panel_bytes(&self, operands: Operands, dot: &Dot) -> usize {
        if self.is_tiled(operands, dot) && dot.dtype.int().is_some() { amx::panel_bytes(operands, dot.k) } else { 0 }
    }

    fn is_tiled(&self, operands: Operands, dot: &Dot) -> bool {
        Operands::of(self.target, dot.activations, dot.dtype, dot.k) == Some(operands)
    }

    /// The worker's strips for all rows: where those are few, as `otherwise` computes them.
    pub(super) fn emit_tiled(
        &self,
        e: &mut Emitter,
        operands: Operands,
        (low, high, rows): (Val, Val, Val),
        otherwise: impl FnOnce(&mut Emitter) -> Result<()>,
    ) -> Result<()> {
        let fewest = e.i64(self.fewest(operands) as i64);
        let many = e.cmp(Cmp::Gt, rows, fewest);
        let (mut tiled, mut few) = (Ok(()), Ok(()));
        e.either(many, |e| tiled = self.tiles(e, operands, (low, high, rows)), |e| few = otherwise(e));
        tiled.and(few)
    }

    fn tiles(&self, e: &mut Emitter, operands: Operands, (low, high, rows): (Val, Val, Val)) -> Result<()> {
        let dots = &self.component.dots;
        let codes = matches!(operands, Operands::Codes(_));
        let (tokens, strips) = if codes { (TOKENS, 1) } else { (2 * TOKENS, 2) };
        let tile = self.tiled_cache_tile(operands).next_multiple_of(strips);
        let panels: usize = dots.iter().map(|d| tile * self.panel_bytes(operands, d)).sum();
        let memory = Memory {
            operands,
            panels: (panels > 0).then(|| e.stack(panels)),
            sums: codes.then(|| e.stack(2 * TOKENS * STRIP * 4)),
            products: e.stack(dots.len() * strips * tokens * STRIP * 4),
        };
        if codes {
            self.clear_padding(e, rows)?;
        }
        operands.configure(e);
        let mut result = Ok(());
        e.repeat(low, high, tile as i64, |e, from| {
            let to = e.i64(tile as i64);
            let to = e.add(from, to);
            let to = e.min(to, high);
            result = self.unpack(e, memory, tile, (from, to)).and_then(|()| {
                self.token_tiles_of(e, rows, tokens, |e, first, tokens| {
                    by_strips(e, strips, (from, to), |e, strip, strips| {
                        self.tile(e, memory, (tile, rows), Tile { first, tokens, strip, strips, from })
                    })
                })
            });
        });
        amx::release(e);
        result
    }

    /// Gives rows past the step's last one scales of 0: any bits may be there, also such that take long to compute with.
    fn clear_padding(&self, e: &mut Emitter, rows: Val) -> Result<()> {
        let mut seen = vec![];
        for dot in &self.component.dots {
            if seen.contains(&dot.x) {
                continue;
            }
            seen.push(dot.x);
            let stride = row_bytes(self.body.ty(dot.x)).ok_or_else(|| internal(self.body))?;
            let x = self.pointer(dot.x)?;
            let (tile, last) = (e.i64(TOKENS as i64), e.i64(TOKENS as i64 - 1));
            let end = e.add(rows, last);
            let end = e.div(end, tile);
            let end = e.mul(end, tile);
            e.repeat(rows, end, 1, |e, row| {
                let row = e.row(x, row, stride);
                let (zero, lines) = (e.i64(0), e.i64((stride / A8::LINE) as i64));
                e.repeat(zero, lines, 1, |e, line| {
                    let at = e.row(row, line, A8::LINE);
                    let (at, none) = (e.gep_const(at, A8::SCALE), e.int(I8.x(A8::LINE - A8::SCALE), 0));
                    e.store(none, at, 32);
                });
            });
        }
        Ok(())
    }

    /// Strips of a cache tile.
    fn tiled_cache_tile(&self, operands: Operands) -> usize {
        let bytes = |d: &Dot| self.panel_bytes(operands, d).max(StripLayout::new(d.dtype, d.k).bytes);
        let all = self.component.n.div_ceil(STRIP).max(1);
        (CACHE_TILE_BYTES / self.component.dots.iter().map(bytes).sum::<usize>().max(1)).clamp(1, all)
    }

    /// Unpacks the codes of a cache tile of up to `tile` strips.
    fn unpack(&self, e: &mut Emitter, memory: Memory, tile: usize, (from, to): (Val, Val)) -> Result<()> {
        let Some(panels) = memory.panels else { return Ok(()) };
        let mut offset = 0;
        for dot in &self.component.dots {
            let weight = self.pointer(dot.weight)?;
            let bytes = self.panel_bytes(memory.operands, dot);
            let Some(weights) = self.weights(dot).filter(|_| bytes > 0) else { continue };
            let panel = e.gep_const(panels, offset);
            offset += tile * bytes;
            e.repeat(from, to, 1, |e, strip| {
                let index = e.sub(strip, from);
                let to = e.row(panel, index, bytes);
                let strip = dot::strip_at(e, weight, strip, dot.dtype, dot.k);
                let unpack = if memory.sums.is_some() { amx::unpack } else { amx::widen };
                unpack(e, weights, dot.k, strip, to);
            });
        }
        Ok(())
    }

    fn weights(&self, dot: &Dot) -> Option<Weights<'_>> {
        let layout = StripLayout::new(dot.dtype, dot.k);
        Some(Weights { target: self.target, int: dot.dtype.int()?, layout })
    }

    /// Token tiles of `tokens`, the last of 16 where that is enough.
    fn token_tiles_of(
        &self,
        e: &mut Emitter,
        rows: Val,
        tokens: usize,
        mut body: impl FnMut(&mut Emitter, Val, usize) -> Result<()>,
    ) -> Result<()> {
        let zero = e.i64(0);
        let mut result = Ok(());
        if tokens == TOKENS {
            e.repeat(zero, rows, tokens as i64, |e, first| result = body(e, first, tokens));
            return result;
        }
        // With `half` rows or fewer left, the last tile is one of 16.
        let (half, whole) = (e.i64(TOKENS as i64), e.i64(tokens as i64));
        let rest = e.rem(rows, whole);
        let wide = e.cmp(Cmp::Gt, rest, half);
        let full = e.sub(rows, rest);
        let end = e.select(wide, rows, full);
        e.repeat(zero, end, tokens as i64, |e, first| result = body(e, first, tokens));
        let mut last = Ok(());
        let narrow = e.cmp(Cmp::Lt, end, rows);
        e.when(narrow, |e| last = body(e, full, TOKENS));
        result.and(last)
    }

    /// Products of one tile, epilogue, stores.
    fn tile(&self, e: &mut Emitter, memory: Memory, (cache_tile, all): (usize, Val), tile: Tile) -> Result<()> {
        let dots = &self.component.dots;
        let bytes = tile.strips * tile.tokens * STRIP * 4;
        let (mut offset, mut asked) = (0, vec![]);
        for (index, dot) in dots.iter().enumerate() {
            let weight = self.pointer(dot.weight)?;
            let stride = row_bytes(self.body.ty(dot.x)).ok_or_else(|| internal(self.body))?;
            let x = self.pointer(dot.x)?;
            let rows = dot.rows(e.row(x, tile.first, stride), stride, tile.tokens);
            let out = e.gep_const(memory.products, index * bytes);
            let strip = dot::strip_at(e, weight, tile.strip, dot.dtype, dot.k);
            let bytes = self.panel_bytes(memory.operands, dot);
            let panel = memory.panels.filter(|_| bytes > 0).map(|panels| {
                let (panel, at) = (e.gep_const(panels, offset), e.sub(tile.strip, tile.from));
                offset += cache_tile * bytes;
                e.row(panel, at, bytes)
            });
            match (panel, memory.sums, self.weights(dot)) {
                (Some(panel), Some(sums), Some(weights)) => {
                    amx::codes(e, weights, dot.k, (strip, panel), rows, (sums, out));
                }
                _ => {
                    let packed = StripLayout::new(dot.dtype, dot.k).bytes;
                    let (first, bytes) = panel.map_or((strip, packed), |panel| (panel, bytes));
                    let strips: Vec<Val> = (0..tile.strips).map(|s| e.gep_const(first, s * bytes)).collect();
                    if self.is_tiled(memory.operands, dot) {
                        let sums = Sums { first: out, row: STRIP * 4, strip: rows.count * STRIP * 4, add: false };
                        let later = (!asked.contains(&dot.x)).then(|| self.later(e, &rows, cache_tile, tile));
                        asked.push(dot.x);
                        amx::pairs(e, dot.k, &strips, rows, later, sums);
                    } else {
                        self.vectors(e, dot, &strips, rows, out);
                    }
                }
            }
        }
        // What lies past the step's last row goes no further.
        let (zero, tokens, left) = (e.i64(0), e.i64(tile.tokens as i64), e.sub(all, tile.first));
        let tokens = e.min(tokens, left);
        let mut result = Ok(());
        e.repeat(zero, tokens, 1, |e, row| {
            let first = e.add(tile.first, row);
            for s in 0..tile.strips {
                let mut start = BTreeMap::new();
                for (index, dot) in dots.iter().enumerate() {
                    let at = e.gep_const(memory.products, index * bytes + s * tile.tokens * STRIP * 4);
                    let at = e.row(at, row, STRIP * 4);
                    start.insert(dot.value, e.load(at, F32.x(STRIP), 64));
                }
                let offset = e.scaled(tile.strip, STRIP * 4, s * STRIP * 4);
                if result.is_ok() {
                    result = self.epilogue(e, start, Place { first, row: 0, offset, column: offset });
                }
            }
        });
        result
    }

    /// This tile's part of the next token tile's rows, which all tiles of the cache tile together ask for: they may come from
    /// another worker's cache, and stand too far apart for hardware to see a pattern.
    fn later(&self, e: &mut Emitter, rows: &Rows, cache_tile: usize, tile: Tile) -> Later {
        let count = tile.tokens.div_ceil(cache_tile.div_ceil(tile.strips));
        let done = e.sub(tile.strip, tile.from);
        let first = e.scaled(done, count, 0);
        let strips = e.i64(tile.strips as i64);
        let first = e.div(first, strips);
        let first = e.row(rows.first, first, rows.stride);
        Later { first: e.gep_const(first, tile.tokens * rows.stride), count }
    }

    /// Products of what matrix units do not multiply beside what only they do: `f32[strip][rows.count][16]`.
    fn vectors(&self, e: &mut Emitter, dot: &Dot, strips: &[Val], rows: Rows, out: Val) {
        let (zero, all) = (e.i64(0), e.i64(rows.count as i64));
        e.repeat(zero, all, VECTOR_ROWS as i64, |e, row| {
            let few = Rows { first: e.row(rows.first, row, rows.stride), count: VECTOR_ROWS, ..rows };
            let products = dot::tile(e, self.target, dot.dtype, dot.k, strips, few);
            let out = e.row(out, row, 4 * STRIP);
            for (i, product) in products.into_iter().enumerate() {
                let (strip, row) = (i / VECTOR_ROWS, i % VECTOR_ROWS);
                let at = e.gep_const(out, (strip * rows.count + row) * 4 * STRIP);
                e.store(product, at, 64);
            }
        });
    }
}
