//! Contractions of many tokens on matrix units.
//!
//! ```text
//! for cache tile of strips: unpack its codes
//!   for token tile
//!     codes (16 tokens)    for strip: products -> memory -> epilogue -> store
//!     bf16 (32 tokens)     for depth of some columns: for two strips: sums in memory += products
//!                          for strip: epilogue -> store
//! ```
//!
//! A token tile may reach past the step's last row, as in [`super`]. Codes are unpacked once for all tokens of a step. Units
//! multiply faster than the second-level cache can give them both operands, so activations of a token tile are read
//! [`DEPTH`] columns at a time: they stay in the first-level cache while all strips pass.

use super::{Contraction, Dot, Place, by_strips, internal};
use crate::cpu::dot::amx::{self, Later, Operands, Sums, TOKENS};
use crate::cpu::dot::{self, Rows, Weights, unpack};
use crate::emit::{Cmp, Emitter, F32, Val};
use mansard_ir::kernel::PROLOGUE_TOKENS;
use mansard_ir::layout::{A8, STRIP, StripLayout, row_bytes};
use mansard_ir::{Result, bail};
use std::collections::BTreeMap;

/// Bytes of weights, as the units read them, that a cache tile of strips may hold: a quarter of the second-level cache of
/// all processors with such units. Unpacked codes lie on a worker's stack.
const CACHE_TILE_BYTES: usize = 512 << 10;

/// Columns of bf16 that are multiplied before the next strips follow, or some more or fewer.
const DEPTH: usize = 320;

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
    /// `f32[dots][strips][tokens][16]`: of codes for one strip, of bf16 for a cache tile.
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
        let sums = dots.iter().filter_map(|d| Some(amx::sum_bytes(self.weights(d)?, d.planes))).max().unwrap_or(0);
        let memory = Memory {
            operands,
            panels: (panels > 0).then(|| e.stack(panels)),
            sums: codes.then(|| e.stack(sums)),
            products: e.stack(dots.len() * if codes { 1 } else { tile } * tokens * STRIP * 4),
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
                    let of = |strip, strips| Tile { first, tokens, strip, strips, from };
                    if codes {
                        return by_strips(e, 1, (from, to), |e, strip, _| {
                            self.codes(e, memory, tile, of(strip, 1))?;
                            self.leave(e, (memory.products, 1), rows, of(strip, 1))
                        });
                    }
                    self.pairs(e, memory, tile, (from, to), &of)?;
                    by_strips(e, strips, (from, to), |e, strip, strips| {
                        let products = self.products_at(e, memory, 0, tile, of(strip, strips));
                        self.leave(e, (products, tile), rows, of(strip, strips))
                    })
                })
            });
        });
        amx::release(e);
        result
    }

    /// Gives rows past the step's last one scales of 0.
    fn clear_padding(&self, e: &mut Emitter, rows: Val) -> Result<()> {
        let mut seen = vec![];
        for dot in &self.component.dots {
            if seen.contains(&dot.x) {
                continue;
            }
            seen.push(dot.x);
            let stride = row_bytes(self.body.ty(dot.x)).ok_or_else(|| internal(self.body))?;
            let x = self.pointer(dot.x)?;
            amx::clear_padding(e, x, stride, rows);
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
                let unpack = if memory.sums.is_some() { unpack::signed } else { unpack::widen };
                unpack(e, weights, dot.k, strip, to);
            });
        }
        Ok(())
    }

    fn weights(&self, dot: &Dot) -> Option<Weights<'_>> {
        Weights::of(self.target, dot.dtype, dot.k)
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

    /// Activations of a token tile.
    fn rows_of(&self, e: &mut Emitter, dot: &Dot, tile: Tile) -> Result<Rows> {
        let stride = row_bytes(self.body.ty(dot.x)).ok_or_else(|| internal(self.body))?;
        let x = self.pointer(dot.x)?;
        Ok(dot.rows(e.row(x, tile.first, stride), stride, tile.tokens))
    }

    /// The unpacked strips of dot `index` from that of the tile on; `None` where they are read as they are packed.
    fn panel_at(&self, e: &mut Emitter, memory: Memory, index: usize, cache_tile: usize, tile: Tile) -> Option<Val> {
        let of = |dot: &Dot| self.panel_bytes(memory.operands, dot);
        let dots = &self.component.dots;
        let (own, before) = (of(&dots[index]), dots[..index].iter().map(of).sum::<usize>());
        let panels = memory.panels.filter(|_| own > 0)?;
        let (panel, at) = (e.gep_const(panels, cache_tile * before), e.sub(tile.strip, tile.from));
        Some(e.row(panel, at, own))
    }

    /// Where sums of dot `index` with a tile's strips are kept, of all those of a cache tile.
    fn products_at(&self, e: &mut Emitter, memory: Memory, index: usize, cache_tile: usize, tile: Tile) -> Val {
        let strip_bytes = tile.tokens * STRIP * 4;
        let (all, at) = (e.gep_const(memory.products, index * cache_tile * strip_bytes), e.sub(tile.strip, tile.from));
        e.row(all, at, strip_bytes)
    }

    /// Integer products of one strip.
    fn codes(&self, e: &mut Emitter, memory: Memory, cache_tile: usize, tile: Tile) -> Result<()> {
        for (index, dot) in self.component.dots.iter().enumerate() {
            let rows = self.rows_of(e, dot, tile)?;
            let out = e.gep_const(memory.products, index * tile.tokens * STRIP * 4);
            let strip = dot::strip_at(e, self.pointer(dot.weight)?, tile.strip, dot.dtype, dot.k);
            let panel = self.panel_at(e, memory, index, cache_tile, tile);
            let (Some(panel), Some(sums), Some(weights)) = (panel, memory.sums, self.weights(dot)) else {
                bail!(Internal, "`{}` has codes that are not unpacked", self.body.name);
            };
            amx::codes(e, weights, dot.k, (strip, panel), rows, (sums, out, STRIP * 4));
        }
        Ok(())
    }

    /// Products in bf16 of all strips of a cache tile with a token tile, some columns at a time.
    fn pairs(
        &self,
        e: &mut Emitter,
        memory: Memory,
        cache_tile: usize,
        strips: (Val, Val),
        tile: &dyn Fn(Val, usize) -> Tile,
    ) -> Result<()> {
        let mut asked = vec![];
        for (index, dot) in self.component.dots.iter().enumerate() {
            if !self.is_tiled(memory.operands, dot) {
                by_strips(e, 2, strips, |e, strip, strips| {
                    let tile = tile(strip, strips);
                    let rows = self.rows_of(e, dot, tile)?;
                    let strip = dot::strip_at(e, self.pointer(dot.weight)?, strip, dot.dtype, dot.k);
                    let bytes = StripLayout::new(dot.dtype, dot.k).bytes;
                    let strips: Vec<Val> = (0..strips).map(|s| e.gep_const(strip, s * bytes)).collect();
                    let out = self.products_at(e, memory, index, cache_tile, tile);
                    self.vectors(e, dot, &strips, rows, out);
                    Ok(())
                })?;
                continue;
            }
            let first_use = !asked.contains(&dot.x);
            asked.push(dot.x);
            let mut result = Ok(());
            by_depth(e, dot.k, |e, (column, depth), add| {
                let of_strips = by_strips(e, 2, strips, |e, strip, strips| {
                    let tile = tile(strip, strips);
                    let (bytes, first) = match self.panel_at(e, memory, index, cache_tile, tile) {
                        Some(panel) => (self.panel_bytes(memory.operands, dot), panel),
                        None => {
                            let packed = StripLayout::new(dot.dtype, dot.k).bytes;
                            (packed, dot::strip_at(e, self.pointer(dot.weight)?, strip, dot.dtype, dot.k))
                        }
                    };
                    let first = e.row(first, column, 2 * STRIP);
                    let strips: Vec<Val> = (0..strips).map(|s| e.gep_const(first, s * bytes)).collect();
                    let rows = self.rows_of(e, dot, tile)?;
                    let rows = Rows { first: e.row(rows.first, column, 2), ..rows };
                    let strip_bytes = tile.tokens * STRIP * 4;
                    let first = self.products_at(e, memory, index, cache_tile, tile);
                    let later = first_use.then(|| self.later(e, &rows, cache_tile, tile));
                    amx::pairs(e, depth, &strips, rows, later, Sums { first, row: STRIP * 4, strip: strip_bytes, add });
                    Ok(())
                });
                result = std::mem::replace(&mut result, Ok(())).and(of_strips);
            });
            result?;
        }
        Ok(())
    }

    /// Epilogue and stores of a tile, whose products begin at `products`; those of each dot are of `kept` strips.
    fn leave(&self, e: &mut Emitter, (products, kept): (Val, usize), all: Val, tile: Tile) -> Result<()> {
        let strip_bytes = tile.tokens * STRIP * 4;
        // What lies past the step's last row goes no further.
        let (zero, tokens, left) = (e.i64(0), e.i64(tile.tokens as i64), e.sub(all, tile.first));
        let tokens = e.min(tokens, left);
        let mut result = Ok(());
        e.repeat(zero, tokens, 1, |e, row| {
            let first = e.add(tile.first, row);
            for s in 0..tile.strips {
                let mut start = BTreeMap::new();
                for (index, dot) in self.component.dots.iter().enumerate() {
                    let at = e.gep_const(products, (index * kept + s) * strip_bytes);
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

/// Emits `body((first column, columns), add)` for runs of some [`DEPTH`] columns; all but the first add to what is there.
fn by_depth(e: &mut Emitter, k: usize, mut body: impl FnMut(&mut Emitter, (Val, usize), bool)) {
    let depth = k.div_ceil(k.div_ceil(DEPTH)).next_multiple_of(A8::GROUP);
    let (whole, left) = (k / depth * depth, k % depth);
    let zero = e.i64(0);
    body(e, (zero, depth), false);
    let (low, high) = (e.i64(depth as i64), e.i64(whole as i64));
    if whole > depth {
        e.repeat(low, high, depth as i64, |e, column| body(e, (column, depth), true));
    }
    if left > 0 {
        body(e, (high, left), true);
    }
}
