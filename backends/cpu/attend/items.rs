//! Which worker computes which positions of which item; on a GPU a block is a worker.
//!
//! ```text
//!  slice 0: item 0 item 1 item 2 | slice 1: item 0 item 1 item 2 | ...      all work, in units of cache blocks x weight
//!  --------- worker 0 ---------|------------ worker 1 ------------|--...    equal parts
//! ```
//!
//! Every worker takes an equal run of the work, wherever that begins and ends: what is not divided further belongs to the
//! worker in whose run its start lies. So one long sequence keeps workers busy, and so do many short ones. An item that
//! falls to several workers is merged, in the order of its positions, by the worker that finishes last: a counter tells.
//!
//! Where many workers wait for work - on a GPU - cache blocks are what is not divided. Elsewhere items of more than four
//! cache blocks have two halves, which are always summed up by themselves and then added: what an item comes to depends
//! neither on how many workers there are nor on what else is in the step.

use crate::cpu::rows::walk::load_index;
use crate::cpu::{StepField, step_field};
use crate::emit::{Cmp, Emitter, KernelArgs, Val};
use mansard_ir::layout::{ALIGN, AttentionItem, CACHE_BLOCK};

/// Rows whose products take as long as reading a cache block does.
const READING: i64 = 8;

/// How a launch falls into items.
#[derive(Clone, Copy)]
pub(crate) struct Extents {
    pub(crate) item: AttentionItem,
    /// Items of each token: key-value heads, times the parts of a group that is too large for one.
    pub(crate) slices: usize,
    /// Items of each token and key-value head.
    pub(crate) parts: usize,
    /// Items have two halves, which are not divided.
    pub(crate) halves: bool,
    /// An item's own cache block is read from other caches.
    pub(crate) mixed: bool,
    pub(crate) causal: bool,
    pub(crate) window: usize,
}

/// What workers know of the step.
#[derive(Clone, Copy)]
pub(crate) struct StepPointers {
    pub(crate) positions: Val,
    pub(crate) stride: Val,
    scratch: Val,
    scratch_bytes: Val,
}

impl StepPointers {
    /// Loads them; `stride` is that of block tables.
    pub(crate) fn new(e: &mut Emitter, k: KernelArgs, stride: Val) -> StepPointers {
        StepPointers {
            positions: step_field(e, k, StepField::Positions),
            stride,
            scratch: step_field(e, k, StepField::Scratch),
            scratch_bytes: step_field(e, k, StepField::ScratchBytes),
        }
    }
}

/// What is computed at once: neighbouring tokens of a sequence, and the query heads of a slice.
#[derive(Clone, Copy)]
pub(crate) struct Item {
    /// The first token.
    pub(crate) first: Val,
    /// Tokens.
    pub(crate) count: Val,
    /// Tokens times heads.
    pub(crate) rows: Val,
    /// Where the sequence's row of a block table begins.
    pub(crate) table: Val,
    /// The cache block of its first token.
    pub(crate) own: Val,
    /// Positions of the sequence.
    pub(crate) length: Val,
    /// Key-value head.
    pub(crate) kv_head: Val,
    /// First query head.
    pub(crate) head: Val,
    /// First cache block that any row sees.
    pub(crate) low: Val,
    /// Cache blocks from there to the last that any row sees.
    pub(crate) blocks: Val,
    /// First position that the last row sees.
    pub(crate) start: Val,
    /// First position beyond what the first row sees.
    pub(crate) end: Val,
    /// First position beyond what the last row sees.
    pub(crate) high: Val,
}

impl Item {
    /// The item with the heads of a slice.
    pub(crate) fn of_slice(&self, e: &mut Emitter, extents: &Extents, slice: Val) -> Item {
        let (heads, parts) = (e.i64(extents.item.heads as i64), e.i64(extents.parts as i64));
        Item { kv_head: e.div(slice, parts), head: e.mul(slice, heads), ..*self }
    }
}

/// Visits some partials.
pub(crate) type Others<'a> = dyn Fn(&mut Emitter, &dyn Fn(&mut Emitter, Val)) + 'a;

/// How a worker computes items. A partial is given by its address.
pub(crate) trait Attend {
    fn extents(&self) -> Extents;

    fn step(&self) -> StepPointers;

    /// Sums up cache blocks `from..to` of an item: where these are all of them, in memory of the worker's own, else as a
    /// partial. (The memory of a partial is free for other use where they are all.)
    fn sum_up(&self, e: &mut Emitter, item: &Item, run: (Val, Val), whole: Val, partial: Val);

    /// Stores the result of an item that is nobody else's.
    fn finish(&self, e: &mut Emitter, item: &Item);

    /// Adds `done` to a counter once the worker's partial is where others find it, and gives what it was; what others had
    /// stored before they added is then seen.
    fn count(&self, e: &mut Emitter, counter: Val, done: Val) -> Val;

    /// Adds up partials, the first of them and then those that `others` visits, and stores the result.
    fn merge(&self, e: &mut Emitter, item: &Item, first: Val, others: &Others<'_>);
}

/// The whole launch, as every worker computes it for itself.
struct Work {
    /// Work of all items.
    total: Val,
    thread: Val,
    threads: Val,
}

/// An item in the order of all work.
struct Placed<'a> {
    item: &'a Item,
    /// Work before it.
    before: Val,
    /// Work of one of its cache blocks.
    weight: Val,
}

/// Emits this worker's share of the launch.
pub(crate) fn emit(attention: &impl Attend, e: &mut Emitter, k: KernelArgs) {
    let zero = e.i64(0);
    let slice = each(attention, e, k, zero, &mut |_, _| {});
    let extents = attention.extents();
    let slices = e.i64(extents.slices as i64);
    let work = Work { total: e.mul(slice, slices), thread: k.thread, threads: k.threads };
    let (low, high) = work.run(e, work.thread);
    let one = e.i64(1);
    let (last, first) = (e.sub(high, one), e.div(low, slice));
    let last = e.div(last, slice);
    let last = e.add(last, one);
    let some = e.cmp(Cmp::Lt, low, high);
    e.when(some, |e| {
        e.repeat(first, last, 1, |e, index| {
            let before = e.mul(index, slice);
            each(attention, e, k, before, &mut |e, placed| {
                let (from, to) = placed.part(e, attention.extents().halves, (low, high));
                let some = e.cmp(Cmp::Lt, from, to);
                e.when(some, |e| {
                    let item = placed.item.of_slice(e, &extents, index);
                    let placed = Placed { item: &item, ..*placed };
                    share(attention, e, &work, &placed, (from, to));
                });
            });
        });
    });
}

/// Visits the items of one slice, `before` being the work before the first; gives the work before the next slice.
fn each(
    attention: &impl Attend,
    e: &mut Emitter,
    k: KernelArgs,
    before: Val,
    visit: &mut dyn FnMut(&mut Emitter, &Placed<'_>),
) -> Val {
    let extents = attention.extents();
    let tiles = step_field(e, k, StepField::Tiles);
    let records = step_field(e, k, StepField::Tile);
    let (zero, one) = (e.i64(0), e.i64(1));
    let work = e.for_loop((zero, tiles, one), &[before], |e, tile, before| {
        let record = e.row(records, tile, 16);
        let [first, count, sequence, length] = [0, 1, 2, 3].map(|i| {
            let i = e.i64(i);
            load_index(e, record, i)
        });
        let tokens = e.i64(extents.item.tokens as i64);
        let mut run = |e: &mut Emitter, (low, high): (Val, Val), before: &[Val]| {
            e.for_loop((low, high, tokens), before, |e, from, before| {
                let left = e.sub(high, from);
                let (first, count) = (e.add(first, from), e.min(left, tokens));
                let item = item(attention, e, (first, count), (sequence, length));
                let reading = e.i64(READING);
                let weight = e.add(item.rows, reading);
                visit(e, &Placed { item: &item, before: before[0], weight });
                let work = e.mul(item.blocks, weight);
                vec![e.add(before[0], work)]
            })
        };
        if !extents.mixed {
            return run(e, (zero, count), before);
        }
        // Items end where cache blocks do.
        let position = load_index(e, attention.step().positions, first);
        let positions = e.i64(CACHE_BLOCK as i64);
        let beyond = e.add(position, count);
        let start = e.rem(position, positions);
        let start = e.sub(position, start);
        e.for_loop((start, beyond, positions), before, |e, block, before| {
            let (low, high) = (e.sub(block, position), e.add(block, positions));
            let (low, high) = (e.max(low, zero), e.sub(high, position));
            let high = e.min(high, count);
            run(e, (low, high), before)
        })
    });
    work[0]
}

impl Work {
    /// The run of work of a worker.
    fn run(&self, e: &mut Emitter, worker: Val) -> (Val, Val) {
        let one = e.i64(1);
        let next = e.add(worker, one);
        let (low, high) = (e.mul(self.total, worker), e.mul(self.total, next));
        (e.div(low, self.threads), e.div(high, self.threads))
    }

    /// The worker in whose run `place` lies.
    fn worker_at(&self, e: &mut Emitter, place: Val) -> Val {
        let one = e.i64(1);
        let next = e.add(place, one);
        let next = e.mul(next, self.threads);
        let next = e.sub(next, one);
        e.div(next, self.total)
    }
}

/// Where the second half of `blocks` cache blocks begins; their end where they are too few to be divided.
pub(crate) fn middle(e: &mut Emitter, blocks: Val) -> Val {
    let (one, two, few) = (e.i64(1), e.i64(2), e.i64(AttentionItem::SPAN as i64));
    let up = e.add(blocks, one);
    let half = e.div(up, two);
    let is_whole = e.cmp(Cmp::Le, blocks, few);
    e.select(is_whole, blocks, half)
}

impl Placed<'_> {
    /// Its cache blocks that belong to a run of work.
    fn part(&self, e: &mut Emitter, halves: bool, (low, high): (Val, Val)) -> (Val, Val) {
        if !halves {
            return (self.block_from(e, low), self.block_from(e, high));
        }
        let middle = middle(e, self.item.blocks);
        let second = e.mul(middle, self.weight);
        let second = e.add(self.before, second);
        let mut half_from = |place: Val| {
            let (zero, blocks) = (e.i64(0), self.item.blocks);
            let is_second = e.cmp(Cmp::Le, place, second);
            let later = e.select(is_second, middle, blocks);
            let is_first = e.cmp(Cmp::Le, place, self.before);
            e.select(is_first, zero, later)
        };
        (half_from(low), half_from(high))
    }

    /// The first of its cache blocks that starts at `place` or later.
    fn block_from(&self, e: &mut Emitter, place: Val) -> Val {
        let (zero, one) = (e.i64(0), e.i64(1));
        let ahead = e.sub(place, self.before);
        let ahead = e.max(ahead, zero);
        let up = e.sub(self.weight, one);
        let ahead = e.add(ahead, up);
        let blocks = e.div(ahead, self.weight);
        e.min(blocks, self.item.blocks)
    }
}

/// Computes cache blocks `from..to` of an item; the last worker to have a part of it stores the result.
fn share(attention: &impl Attend, e: &mut Emitter, work: &Work, placed: &Placed<'_>, (from, to): (Val, Val)) {
    let item = placed.item;
    let zero = e.i64(0);
    let (begins, ends) = (e.cmp(Cmp::Eq, from, zero), e.cmp(Cmp::Eq, to, item.blocks));
    let whole = e.and(begins, ends);
    let continued = partial(attention, e, work.thread, 0);
    let begun = partial(attention, e, work.thread, 1);
    let own = e.select(begins, begun, continued);
    attention.sum_up(e, item, (from, to), whole, own);
    e.either(
        whole,
        |e| attention.finish(e, item),
        |e| {
            let first = work.worker_at(e, placed.before);
            let counter = scratch_of(attention, e, first);
            let done = e.sub(to, from);
            let before = attention.count(e, counter, done);
            let all = e.add(before, done);
            let last = e.cmp(Cmp::Eq, all, item.blocks);
            e.when(last, |e| {
                e.store(zero, counter, 8);
                merge(attention, e, work, placed, first);
            });
        },
    );
}

/// Adds every later partial of an item to that of `first`, and stores the result.
fn merge(attention: &impl Attend, e: &mut Emitter, work: &Work, placed: &Placed<'_>, first: Val) {
    let one = e.i64(1);
    let begun = partial(attention, e, first, 1);
    let start = e.sub(placed.item.blocks, one);
    let start = e.mul(start, placed.weight);
    let start = e.add(placed.before, start);
    let last = work.worker_at(e, start);
    let (next, end) = (e.add(first, one), e.add(last, one));
    attention.merge(e, placed.item, begun, &|e, add| {
        e.repeat(next, end, 1, |e, worker| {
            let (low, high) = work.run(e, worker);
            let (from, to) = placed.part(e, attention.extents().halves, (low, high));
            let some = e.cmp(Cmp::Lt, from, to);
            e.when(some, |e| {
                let part = partial(attention, e, worker, 0);
                add(e, part);
            });
        });
    });
}

/// A worker's scratch, which begins with its counter.
fn scratch_of(attention: &impl Attend, e: &mut Emitter, worker: Val) -> Val {
    let step = attention.step();
    let offset = e.mul(worker, step.scratch_bytes);
    e.gep(step.scratch, offset)
}

/// A worker's partial of an item begun by an earlier worker (0) or ended by a later one (1).
fn partial(attention: &impl Attend, e: &mut Emitter, worker: Val, which: usize) -> Val {
    let scratch = scratch_of(attention, e, worker);
    e.gep_const(scratch, ALIGN + which * attention.extents().item.partial_bytes())
}

/// Some tokens of a tile, and what they see.
pub(crate) fn item(
    attention: &impl Attend,
    e: &mut Emitter,
    (first, count): (Val, Val),
    (sequence, length): (Val, Val),
) -> Item {
    let (extents, step, one, zero) = (attention.extents(), attention.step(), e.i64(1), e.i64(0));
    let last = e.add(first, count);
    let last = e.sub(last, one);
    let mut sight = |token: Val| {
        let position = load_index(e, step.positions, token);
        sight(e, (extents.causal, extents.window), position, length)
    };
    let ((low, end), (start, high)) = (sight(first), sight(last));
    let positions = e.i64(CACHE_BLOCK as i64);
    let most = e.i64(CACHE_BLOCK as i64 - 1);
    let (low, beyond) = (e.div(low, positions), e.add(high, most));
    let beyond = e.div(beyond, positions);
    let own = load_index(e, step.positions, first);
    let own = e.div(own, positions);
    let row = e.mul(sequence, step.stride);
    let heads = e.i64(extents.item.heads as i64);
    Item {
        first,
        count,
        rows: e.mul(count, heads),
        table: row,
        own,
        length,
        kv_head: zero,
        head: zero,
        low,
        blocks: e.sub(beyond, low),
        start,
        end,
        high,
    }
}

/// The first position that the token at `position` of a sequence of `length` sees, and the first beyond.
pub(crate) fn sight(e: &mut Emitter, (causal, window): (bool, usize), position: Val, length: Val) -> (Val, Val) {
    let (one, zero) = (e.i64(1), e.i64(0));
    let own = e.add(position, one);
    let end = if causal { e.min(own, length) } else { length };
    if window == 0 {
        return (zero, end);
    }
    let window = e.i64(window as i64);
    let start = e.sub(own, window);
    (e.max(start, zero), end)
}
