//! Contractions of bf16 activations for many tokens on Hopper: a block multiplies 128 rows with 256 or 128 tokens.
//!
//! ```text
//! activations   the copy engine brings 64 columns of all tokens a step, four steps deep     one thread asks, barriers tell
//! weights       from their strips to the registers of the one warp that needs them, a step ahead; codes become bf16 there
//! a warpgroup   64 rows of a contraction: four products a step, 64 x tokens x 16            all threads' registers hold sums
//! results       through shared memory, over the activations
//! ```
//!
//! Each step, both warpgroups wait for its activations (`full`), begin its products, and read the weights of the next step while
//! these run; then they wait for the products and say that the step's place is free (`empty`). Its first thread asks for the
//! step three further on as soon as products are under way, so it never stands in their way.
//!
//! Where less than half of the blocks would have a tile, tiles are those of `mma.sync`, which are smaller ([`super::tile`]).

mod strips;

use super::sums::{COLUMNS, SUMS, Sums};
use super::{Component, Device, each, internal, tile};
use crate::emit::{Cmp, Emitter, F32, I32, MAP_BYTES, TILE_ALIGN, TILE_ROW, TileMap, Val, WARP, WARPGROUP};
use mansard_ir::Result;
use mansard_ir::layout::{STRIP, row_bytes};

/// Tokens of a block: the most that the copy engine brings at once and registers have room for, then fewer.
const TOKENS: [usize; 2] = [256, 128];

/// Warpgroups of a block, and warps of one.
const GROUPS: usize = super::THREADS / WARPGROUP;
const WARPS: usize = WARPGROUP / WARP;

/// Columns of a step, and of a product.
const STEP: usize = TILE_ROW / 2;
const DEPTH: usize = 16;

/// Products of a step, one after the other.
const PRODUCTS: usize = STEP / DEPTH;

/// Steps in shared memory: a power of two.
const SLOTS: usize = 4;

/// Bytes of a barrier.
const BARRIER: usize = 8;

/// The chip multiplies by warpgroups, all contractions read the same activations, and those that meet are packed alike.
pub(super) fn suit(d: &Device<'_>, components: &[Component]) -> bool {
    let first = &components[0].dots[0];
    d.chip.has_warpgroups()
        && components.iter().all(|component| {
            let alike = component.dots.iter().all(|dot| (dot.x, dot.dtype) == (first.x, component.dots[0].dtype));
            tile::suits(component) && alike && component.dots.len() <= GROUPS
        })
}

/// Emits the many-token part of a kernel whose components suit.
pub(super) fn emit(e: &mut Emitter, d: &Device<'_>, components: &[Component], rows: Val) -> Result<()> {
    let shapes = TOKENS.map(|tokens| {
        let (size, last) = (e.i64(tokens as i64), e.scaled(rows, 1, tokens - 1));
        let panels = e.div(last, size);
        let blocks: usize = blocks(components).iter().sum();
        let items = e.scaled(panels, blocks, 0);
        let twice = e.scaled(items, 2, 0);
        (tokens, panels, items, e.cmp(Cmp::Ge, twice, d.k.threads))
    });
    let run = |e: &mut Emitter, (tokens, panels, items, _): (usize, Val, Val, Val)| {
        e.scoped(|e| {
            let ring = Ring::new(e, d, components, (tokens, rows))?;
            ring.run(e, d, components, (panels, items, rows))
        })
    };
    let [large, small] = shapes;
    let mut results = [Ok(()), Ok(()), Ok(())];
    let [of_large, of_small, of_tiles] = &mut results;
    e.either(
        large.3,
        |e| *of_large = run(e, large),
        |e| {
            e.either(small.3, |e| *of_small = run(e, small), |e| *of_tiles = tile::emit(e, d, components, rows));
        },
    );
    results.into_iter().collect()
}

/// Strips of a tile.
fn strips(component: &Component) -> usize {
    GROUPS * WARPS / component.dots.len()
}

/// Tiles of each component for the same tokens.
fn blocks(components: &[Component]) -> Vec<usize> {
    components.iter().map(|component| component.n.div_ceil(STRIP).div_ceil(strips(component))).collect()
}

/// Steps of activations on their way through shared memory; they are counted over all tiles of a block.
struct Ring {
    /// Tokens of a tile.
    tokens: usize,
    /// Steps of a tile.
    steps: usize,
    slots: Val,
    /// A barrier for each slot: what was asked for is there; all warps are done with it.
    full: Val,
    empty: Val,
    /// The activations, described to the copy engine.
    map: Val,
}

impl Ring {
    fn new(e: &mut Emitter, d: &Device<'_>, components: &[Component], (tokens, rows): (usize, Val)) -> Result<Ring> {
        let dot = &components[0].dots[0];
        let row_bytes = row_bytes(d.kernel.body.ty(dot.x)).ok_or_else(|| internal(&d.kernel.body))?;
        let [full, empty] = [(); 2].map(|()| e.shared(SLOTS * BARRIER));
        let (draft, map) = (e.shared(MAP_BYTES), e.map_of(d.k.thread));
        let matrix = TileMap { base: d.pointer(dot.x)?, columns: dot.k, row_bytes, rows, tile_rows: tokens };
        let ((_, warp), zero) = (e.lane_and_warp(), e.i64(0));
        let (first_warp, first) = (e.cmp(Cmp::Eq, warp, zero), is_first(e));
        e.when(first_warp, |e| e.describe(&matrix, draft, map));
        e.when(first, |e| {
            for (barriers, arrivals) in [(full, 1), (empty, GROUPS * WARPS)] {
                for slot in 0..SLOTS {
                    let at = e.gep_const(barriers, slot * BARRIER);
                    e.make_barrier(at, arrivals);
                }
            }
            e.fence_barriers();
            e.acquire_map(map);
        });
        e.barrier();
        // Sums lie there too, when all steps of a tile are done.
        let slots = e.scoped(|e| e.shared_aligned(SLOTS * tokens * TILE_ROW, TILE_ALIGN));
        Ok(Ring { tokens, steps: dot.k / STEP, slots, full, empty, map })
    }

    /// All tiles that are this block's.
    fn run(
        &self,
        e: &mut Emitter,
        d: &Device<'_>,
        components: &[Component],
        (panels, items, rows): (Val, Val, Val),
    ) -> Result<()> {
        let (blocks, none, mut result) = (blocks(components), e.i64(0), Ok(()));
        e.for_loop((d.k.thread, items, d.k.threads), &[none], |e, index, before| {
            let (panel, block) = (e.rem(index, panels), e.div(index, panels));
            let first = e.scaled(panel, self.tokens, 0);
            result = each(e, components, &blocks, block, |e, component, block| {
                let base = e.scaled(block, strips(component), 0);
                Tile::new(e, d, component, (base, first)).emit(e, self, (before[0], rows))
            });
            vec![e.scaled(before[0], 1, self.steps)]
        });
        result
    }

    /// The slot of a step and its number's parity among those that had it.
    fn slot(&self, e: &mut Emitter, step: Val) -> (Val, Val) {
        let (last, one) = (e.i64(SLOTS as i64 - 1), e.i64(1));
        let round = e.shr(step, SLOTS.trailing_zeros().into());
        (e.and(step, last), e.and(round, one))
    }

    /// Where a slot's activations are.
    fn place(&self, e: &mut Emitter, slot: Val) -> Val {
        e.row(self.slots, slot, self.tokens * TILE_ROW)
    }

    /// Has the first thread ask for a step of a tile whose tokens begin at `first`, where there is one; `before` steps were before
    /// the tile's.
    fn fetch(&self, e: &mut Emitter, step: Val, (before, first): (Val, Val)) {
        let (end, asks) = (e.i64(self.steps as i64), is_first(e));
        let there = e.cmp(Cmp::Lt, step, end);
        let asks = e.and(asks, there);
        e.when(asks, |e| {
            let number = e.add(before, step);
            let ((slot, parity), one) = (self.slot(e, number), e.i64(1));
            let [full, empty] = [self.full, self.empty].map(|barriers| e.row(barriers, slot, BARRIER));
            let (to, parity) = (self.place(e, slot), e.xor(parity, one));
            e.await_phase(empty, parity);
            e.expect(full, self.tokens * TILE_ROW);
            let column = e.scaled(step, STEP, 0);
            e.copy_tile(to, self.map, full, [column, first]);
        });
    }
}

/// This is the thread that asks for copies.
fn is_first(e: &mut Emitter) -> Val {
    let (thread, zero) = (e.thread(), e.i64(0));
    e.cmp(Cmp::Eq, thread, zero)
}

/// One block's rows and tokens, as a thread sees them.
struct Tile<'a> {
    d: &'a Device<'a>,
    component: &'a Component,
    /// The tile's first strip and token.
    base: Val,
    first: Val,
    /// This warp's strip of the tile, and the contraction that it is of.
    strip: Val,
    dot: Val,
    lane: Val,
}

impl<'a> Tile<'a> {
    fn new(e: &mut Emitter, d: &'a Device<'a>, component: &'a Component, (base, first): (Val, Val)) -> Tile<'a> {
        let (lane, warp) = e.lane_and_warp();
        let strips = e.i64(strips(component) as i64);
        Tile { d, component, base, first, strip: e.rem(warp, strips), dot: e.div(warp, strips), lane }
    }

    /// Of what the contractions of the component have each, that of this warp's.
    fn own(&self, e: &mut Emitter, of_dots: &[Val]) -> Val {
        let mut own = of_dots[0];
        for (i, other) in of_dots.iter().enumerate().skip(1) {
            let number = e.i64(i as i64);
            let here = e.cmp(Cmp::Eq, self.dot, number);
            own = e.select(here, *other, own);
        }
        own
    }

    fn emit(&self, e: &mut Emitter, ring: &Ring, (before, rows): (Val, Val)) -> Result<()> {
        let (four, zero, one, nothing) = (e.i64(4), e.i64(0), e.i64(1), e.float(F32, 0.0));
        let lane = (e.div(self.lane, four), e.rem(self.lane, four));
        for step in 0..SLOTS - 1 {
            let step = e.i64(step as i64);
            ring.fetch(e, step, (before, self.first));
        }
        let mut weights = vec![];
        for dot in &self.component.dots {
            weights.push(self.d.pointer(dot.weight)?);
        }
        // The sign of a number of tokens.
        let none = e.shr(rows, 63);
        let none = e.convert("trunci", none, I32);
        let (weight, strip) = (self.own(e, &weights), e.add(self.base, self.strip));
        let source = strips::Strip::new(e, self.component, (weight, strip), lane);
        let mut carried = source.step(e, zero);
        let words = carried.len();
        carried.extend(vec![nothing; ring.tokens / COLUMNS * SUMS]);
        let (end, last) = (e.i64(ring.steps as i64), e.i64(ring.steps as i64 - 1));
        let carried = e.for_loop((zero, end, one), &carried, |e, step, carried| {
            let number = e.add(before, step);
            let (slot, parity) = ring.slot(e, number);
            let [full, empty] = [ring.full, ring.empty].map(|barriers| e.row(barriers, slot, BARRIER));
            e.await_phase(full, parity);
            e.begin_products();
            let place = ring.place(e, slot);
            let tile = e.tile_descriptor(place);
            let mut sums = carried[words..].to_vec();
            for (product, a) in carried[..words].chunks_exact(words / PRODUCTS).enumerate() {
                // Places in descriptors are counted by 16 bytes.
                let columns = e.scaled(tile, 1, product * DEPTH * 2 / 16);
                sums = e.multiply_tile(&sums, a, columns);
            }
            e.commit_products();
            let ahead = e.scaled(step, 1, SLOTS - 1);
            ring.fetch(e, ahead, (before, self.first));
            let next = e.add(step, one);
            let next = e.min(next, last);
            let mut after = source.step(e, next);
            let sums = e.await_products(&sums, &mut after, none);
            after.extend(sums);
            let is_lead = e.cmp(Cmp::Eq, self.lane, zero);
            e.when(is_lead, |e| e.arrive(empty));
            after
        });
        e.barrier();
        e.scoped(|e| {
            let shape = (ring.tokens, strips(self.component), 1);
            let sums = Sums::new(e, self.d, self.component, shape, (self.base, self.first, rows));
            let to = self.own(e, &sums.memory);
            sums.leave(e, (to, zero, self.strip), lane, &carried[words..]);
            e.barrier();
            let result = sums.results(e);
            // The copy engine writes there next.
            e.fence_proxy();
            e.barrier();
            result
        })
    }
}
