//! Which worker computes which positions of which item.
//!
//! ```text
//!  slice 0: item 0 item 1 item 2 | slice 1: item 0 item 1 item 2 | ...      all work, in units of cache blocks x weight
//!  --------- worker 0 ---------|------------ worker 1 ------------|--...    equal parts
//! ```
//!
//! Every worker takes an equal run of the work, wherever that begins and ends. Items of more than four cache blocks have two
//! parts, which are always summed up by themselves and then added: a part belongs to the worker in whose run its start lies. So
//! one long sequence keeps workers busy, and so do many short ones, and what an item comes to depends neither on how many
//! workers there are nor on what else is in the step. An item that falls to two workers is merged by the one that finishes
//! last: a counter tells.

use super::softmax::State;
use super::{Attention, Item};
use crate::cpu::rows::walk::load_index;
use crate::cpu::{StepField, step_field};
use crate::emit::{Cmp, Emitter, KernelArgs, Val};
use mansard_ir::layout::{ALIGN, AttentionItem, CACHE_BLOCK};

/// Rows whose products take as long as reading a cache block does.
const READING: i64 = 8;

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
pub(super) fn emit(attention: &Attention, e: &mut Emitter, k: KernelArgs) {
    let zero = e.i64(0);
    let slice = each(attention, e, k, zero, &mut |_, _| {});
    let slices = e.i64(attention.shape.slices as i64);
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
                let (from, to) = placed.part(e, low, high);
                let some = e.cmp(Cmp::Lt, from, to);
                e.when(some, |e| {
                    let item = placed.item.of_slice(e, &attention.shape, index);
                    let placed = Placed { item: &item, ..*placed };
                    share(attention, e, &work, &placed, (from, to));
                });
            });
        });
    });
}

/// Visits the items of one slice, `before` being the work before the first; gives the work before the next slice.
fn each(
    attention: &Attention,
    e: &mut Emitter,
    k: KernelArgs,
    before: Val,
    visit: &mut dyn FnMut(&mut Emitter, &Placed<'_>),
) -> Val {
    let tiles = step_field(e, k, StepField::Tiles);
    let records = step_field(e, k, StepField::Tile);
    let (zero, one) = (e.i64(0), e.i64(1));
    let work = e.for_loop((zero, tiles, one), &[before], |e, tile, before| {
        let record = e.row(records, tile, 16);
        let [first, count, sequence, length] = [0, 1, 2, 3].map(|i| {
            let i = e.i64(i);
            load_index(e, record, i)
        });
        let tokens = e.i64(attention.shape.item.tokens as i64);
        let mut run = |e: &mut Emitter, (low, high): (Val, Val), before: &[Val]| {
            e.for_loop((low, high, tokens), before, |e, from, before| {
                let left = e.sub(high, from);
                let (first, count) = (e.add(first, from), e.min(left, tokens));
                let item = attention.item(e, first, count, sequence, length);
                let reading = e.i64(READING);
                let weight = e.add(item.rows, reading);
                visit(e, &Placed { item: &item, before: before[0], weight });
                let work = e.mul(item.blocks, weight);
                vec![e.add(before[0], work)]
            })
        };
        if !attention.shape.mixed {
            return run(e, (zero, count), before);
        }
        // Items end where cache blocks do.
        let position = load_index(e, attention.step.positions, first);
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

impl Placed<'_> {
    /// Its cache blocks of the parts that start in a run of work.
    fn part(&self, e: &mut Emitter, low: Val, high: Val) -> (Val, Val) {
        let middle = self.middle(e);
        let second = e.mul(middle, self.weight);
        let second = e.add(self.before, second);
        let mut first_from = |place: Val| {
            let (zero, blocks) = (e.i64(0), self.item.blocks);
            let is_second = e.cmp(Cmp::Le, place, second);
            let later = e.select(is_second, middle, blocks);
            let is_first = e.cmp(Cmp::Le, place, self.before);
            e.select(is_first, zero, later)
        };
        (first_from(low), first_from(high))
    }

    /// Where its second part begins; its end where it has none.
    fn middle(&self, e: &mut Emitter) -> Val {
        let (one, two, few) = (e.i64(1), e.i64(2), e.i64(AttentionItem::SPAN as i64));
        let up = e.add(self.item.blocks, one);
        let half = e.div(up, two);
        let is_whole = e.cmp(Cmp::Le, self.item.blocks, few);
        e.select(is_whole, self.item.blocks, half)
    }
}

/// Computes cache blocks `from..to` of an item; the last worker to have a part of it stores the result.
fn share(attention: &Attention, e: &mut Emitter, work: &Work, placed: &Placed<'_>, (from, to): (Val, Val)) {
    let item = placed.item;
    let zero = e.i64(0);
    let (begins, ends) = (e.cmp(Cmp::Eq, from, zero), e.cmp(Cmp::Eq, to, item.blocks));
    let whole = e.and(begins, ends);
    let continued = attention.partial(e, work.thread, 0);
    let begun = attention.partial(e, work.thread, 1);
    let partial = e.select(begins, begun, continued);
    let state = attention.state(e, attention.buffers.state);
    let state = State { out: e.select(whole, state.out, partial), ..state };
    let state = attention.state(e, state.out);
    let middle = placed.middle(e);
    let first_end = e.select(whole, middle, to);
    attention.positions(e, item, &state, (from, first_end));
    e.either(
        whole,
        |e| {
            let two = e.cmp(Cmp::Lt, middle, to);
            e.when(two, |e| {
                // What this worker begins for others comes last.
                let second = attention.state(e, begun);
                attention.positions(e, item, &second, (middle, to));
                attention.combine(e, item, &state, &second);
            });
            attention.finish(e, item, &state);
        },
        |e| {
            let first = work.worker_at(e, placed.before);
            let counter = attention.scratch_of(e, first);
            let done = e.sub(to, from);
            let before = e.atomic_add(counter, done);
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
fn merge(attention: &Attention, e: &mut Emitter, work: &Work, placed: &Placed<'_>, first: Val) {
    let one = e.i64(1);
    let begun = attention.partial(e, first, 1);
    let sum = attention.state(e, begun);
    let start = e.sub(placed.item.blocks, one);
    let start = e.mul(start, placed.weight);
    let start = e.add(placed.before, start);
    let last = work.worker_at(e, start);
    let (next, end) = (e.add(first, one), e.add(last, one));
    e.repeat(next, end, 1, |e, worker| {
        let (low, high) = work.run(e, worker);
        let (from, to) = placed.part(e, low, high);
        let some = e.cmp(Cmp::Lt, from, to);
        e.when(some, |e| {
            let part = attention.partial(e, worker, 0);
            let part = attention.state(e, part);
            attention.combine(e, placed.item, &sum, &part);
        });
    });
    attention.finish(e, placed.item, &sum);
}

impl Attention {
    /// A worker's scratch, which begins with its counter.
    fn scratch_of(&self, e: &mut Emitter, worker: Val) -> Val {
        let offset = e.mul(worker, self.step.scratch_bytes);
        e.gep(self.step.scratch, offset)
    }

    /// A worker's partial of an item begun by an earlier worker (0) or ended by a later one (1).
    fn partial(&self, e: &mut Emitter, worker: Val, which: usize) -> Val {
        let scratch = self.scratch_of(e, worker);
        e.gep_const(scratch, ALIGN + which * self.shape.item.partial_bytes())
    }

    /// Some tokens of a tile, and what they see.
    fn item(&self, e: &mut Emitter, first: Val, count: Val, sequence: Val, length: Val) -> Item {
        let (shape, one, zero) = (&self.shape, e.i64(1), e.i64(0));
        let last = e.add(first, count);
        let last = e.sub(last, one);
        let mut sight = |token: Val| {
            let position = load_index(e, self.step.positions, token);
            super::sight(e, (shape.causal, shape.window), position, length)
        };
        let ((low, end), (start, high)) = (sight(first), sight(last));
        let positions = e.i64(CACHE_BLOCK as i64);
        let most = e.i64(CACHE_BLOCK as i64 - 1);
        let (low, beyond) = (e.div(low, positions), e.add(high, most));
        let beyond = e.div(beyond, positions);
        let own = load_index(e, self.step.positions, first);
        let own = e.div(own, positions);
        let row = e.mul(sequence, self.step.stride);
        let heads = e.i64(shape.item.heads as i64);
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
}
