//! Weights on their way: asynchronous copies into a ring in shared memory, ahead of the products that read them.
//!
//! ```text
//! steps of a block    strip b: 0 1 2 3 | strip b + blocks: 4 5 6 7 | ..      lines of a strip for every thread, one or a few
//! slots of the ring   0 1 2 3 0 1 2 3 ..
//! at step i           ask for step i + slots - 1, wait for step i, multiply it
//! ```
//!
//! The ring is started before a block waits for earlier launches and computes its activations, and it runs on from strip to
//! strip, while sums meet: memory is kept busy throughout. A thread copies what it reads itself, so there is no barrier.
//!
//! Whole rounds of lines go through the ring; bits 4 and 5 of wide codes, and what is left of a strip, are read directly.

use super::product::PARTS;
use super::{Component, Device, THREADS};
use crate::cuda::weights::{PIECES, Packed, Places, ROWS};
use crate::emit::{Cmp, Emitter, KernelArgs, Val};
use mansard_ir::Result;
use mansard_ir::layout::STRIP;

/// Slots of a ring, at least.
const SLOTS: usize = 4;

/// Weights of contractions that are packed alike.
pub(in crate::cuda) struct Ring {
    k: KernelArgs,
    packed: Packed,
    /// Bytes from strip to strip.
    strip_bytes: usize,
    /// For each component the first of its strips, and the weights of its contractions.
    components: Vec<(usize, Vec<Val>)>,
    /// Strips of all components.
    strips: usize,
    /// Steps of a contraction's strip.
    steps: usize,
    /// Lines that a thread has in a step.
    lines: usize,
    /// A power of two.
    slots: usize,
    /// For each piece of a line that there is, this thread's first place in the ring.
    memory: [Option<Val>; PIECES],
}

/// A contraction's strip in a ring.
#[derive(Clone, Copy)]
pub(in crate::cuda) struct Feed<'a> {
    ring: &'a Ring,
    /// Its first step.
    first: Val,
}

impl Ring {
    /// A ring for all contractions of a kernel; `None` where they are packed differently, or too narrow.
    pub(super) fn of(e: &mut Emitter, d: &Device<'_>, components: &[Component]) -> Result<Option<Ring>> {
        let dots = || components.iter().flat_map(|c| &c.dots);
        let Some(first) = dots().next() else { return Ok(None) };
        let alike = components.iter().all(|c| c.dots.len() == components[0].dots.len())
            && dots().all(|dot| (dot.dtype, dot.k) == (first.dtype, first.k));
        if !alike {
            return Ok(None);
        }
        let packed = Packed::new(first.dtype, first.k);
        let (mut strips, mut parts) = (0, vec![]);
        for component in components {
            let weights = component.dots.iter().map(|dot| d.pointer(dot.weight)).collect::<Result<_>>()?;
            parts.push((strips, weights));
            strips += component.n.div_ceil(STRIP);
        }
        Ok(Ring::new(e, d, (packed, packed.layout.bytes), (strips, parts)))
    }

    /// A ring for so many strips of weights; `None` where these are too narrow.
    pub(in crate::cuda) fn new(
        e: &mut Emitter,
        d: &Device<'_>,
        (packed, strip_bytes): (Packed, usize),
        (strips, components): (usize, Vec<(usize, Vec<Val>)>),
    ) -> Option<Ring> {
        let (rounds, line) = (packed.lines() / PARTS, THREADS * packed.pieces().iter().sum::<usize>());
        let fits = |lines: &usize| rounds > 0 && rounds.is_multiple_of(*lines) && SLOTS * lines * line <= d.ring_bytes;
        let lines = [4, 2, 1].into_iter().find(fits)?;
        let slots = 1 << (d.ring_bytes / (lines * line)).ilog2();
        let thread = e.thread();
        let memory = packed.pieces().map(|bytes| {
            (bytes > 0).then(|| {
                let all = e.shared(slots * lines * THREADS * bytes);
                e.row(all, thread, bytes)
            })
        });
        Some(Ring { k: d.k, packed, strip_bytes, components, strips, steps: rounds / lines, lines, slots, memory })
    }

    /// Asks for the first steps.
    pub(in crate::cuda) fn start(&self, e: &mut Emitter) {
        for step in 0..self.slots - 1 {
            let step = e.i64(step as i64);
            self.fetch(e, step);
        }
    }

    /// Strip number `round` of this block, for contraction `index` of its component.
    pub(in crate::cuda) fn feed(&self, e: &mut Emitter, round: Val, index: usize) -> Feed<'_> {
        Feed { ring: self, first: e.scaled(round, self.components[0].1.len() * self.steps, index * self.steps) }
    }

    /// Lines that every thread's part of a strip has in the ring.
    fn rounds(&self) -> usize {
        self.steps * self.lines
    }

    /// Asks for a step; there is a group of copies for each, also where nothing is left to ask for.
    fn fetch(&self, e: &mut Emitter, step: Val) {
        let (steps, all) = (e.i64(self.steps as i64), e.i64((self.components[0].1.len() * self.steps) as i64));
        let (round, within) = (e.div(step, all), e.rem(step, all));
        let ahead = e.mul(round, self.k.threads);
        let (strip, end) = (e.add(self.k.thread, ahead), e.i64(self.strips as i64));
        let there = e.cmp(Cmp::Lt, strip, end);
        e.when(there, |e| {
            let (dot, within) = (e.div(within, steps), e.rem(within, steps));
            let strip = self.strip(e, strip, dot);
            let slot = self.slot(e, step);
            let (part, quarter) = part_and_quarter(e);
            let first = e.scaled(within, self.lines * PARTS, 0);
            let first = e.add(first, part);
            for i in 0..self.lines {
                let line = e.scaled(first, 1, i * PARTS);
                let from = self.packed.places(e, strip, line, quarter);
                let to = self.places(e, slot, i);
                for ((from, to), bytes) in from.into_iter().zip(to).zip(self.packed.pieces()) {
                    if let (Some(from), Some(to)) = (from, to) {
                        e.copy_async(to, from, bytes);
                    }
                }
            }
        });
        e.commit_copies();
    }

    /// The address of strip `strip` of all, in the weights of contraction `dot` of its component.
    fn strip(&self, e: &mut Emitter, strip: Val, dot: Val) -> Val {
        let mut found: Option<(Val, Val)> = None;
        for (first, weights) in &self.components {
            let low = e.i64(*first as i64);
            let own = e.sub(strip, low);
            let mut base = weights[0];
            for (i, weight) in weights.iter().enumerate().skip(1) {
                let number = e.i64(i as i64);
                let here = e.cmp(Cmp::Eq, dot, number);
                base = e.select(here, *weight, base);
            }
            found = Some(match found {
                None => (base, own),
                Some(before) => {
                    let here = e.cmp(Cmp::Ge, strip, low);
                    (e.select(here, base, before.0), e.select(here, own, before.1))
                }
            });
        }
        let (base, own) = found.unwrap_or((strip, strip));
        e.row(base, own, self.strip_bytes)
    }

    fn slot(&self, e: &mut Emitter, step: Val) -> Val {
        let last = e.i64(self.slots as i64 - 1);
        e.and(step, last)
    }

    /// Where line `index` of a slot is.
    fn places(&self, e: &mut Emitter, slot: Val, index: usize) -> Places {
        let mut places = [None; PIECES];
        for ((place, memory), bytes) in places.iter_mut().zip(self.memory).zip(self.packed.pieces()) {
            *place = memory.map(|memory| {
                let slot = e.row(memory, slot, self.lines * THREADS * bytes);
                e.gep_const(slot, index * THREADS * bytes)
            });
        }
        places
    }
}

impl Feed<'_> {
    /// Lines of a thread that come through the ring.
    pub(super) fn rounds(&self) -> usize {
        self.ring.rounds()
    }

    /// Visits these lines in order, with copies of them.
    pub(super) fn each(
        &self,
        e: &mut Emitter,
        carried: &[Val],
        mut body: impl FnMut(&mut Emitter, Val, Places, &mut [Val]),
    ) -> Vec<Val> {
        let ring = self.ring;
        let (zero, end, one) = (e.i64(0), e.i64(ring.steps as i64), e.i64(1));
        e.for_loop((zero, end, one), carried, |e, index, carried| {
            let mut carried = carried.to_vec();
            let step = e.add(self.first, index);
            let ahead = e.scaled(step, 1, ring.slots - 1);
            ring.fetch(e, ahead);
            e.await_copies(ring.slots - 1);
            let slot = ring.slot(e, step);
            let first = e.scaled(index, ring.lines * PARTS, 0);
            let (part, _) = part_and_quarter(e);
            let first = e.add(first, part);
            for i in 0..ring.lines {
                let (line, places) = (e.scaled(first, 1, i * PARTS), ring.places(e, slot, i));
                body(e, line, places, &mut carried);
            }
            carried
        })
    }
}

/// Which of all parts of a sum is this thread's, and which quarter of a strip's rows.
pub(super) fn part_and_quarter(e: &mut Emitter) -> (Val, Val) {
    let (thread, quarters) = (e.thread(), e.i64((STRIP / ROWS) as i64));
    (e.div(thread, quarters), e.rem(thread, quarters))
}
