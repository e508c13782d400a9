//! Walking along a run of f32 in chunks of 16 lanes, then what is left in chunks of 8, 4, 2 and 1: never an element beyond
//! the end.
//!
//! ```text
//! width 44   [0..16] [16..32] [32..40] [40..44]
//! ```
//!
//! Rows are padded to whole vectors, so a walk over a row may round its width up; a head inside a row may not.

use crate::emit::{Emitter, F32, I64, Val};

/// Lanes of a whole vector.
pub const LANES: usize = 16;

/// Chunks that are written out one after the other; longer walks are loops.
const STRAIGHT: usize = 8;

/// Chunks of one round of a loop.
const UNROLL: usize = 4;

/// Some neighbouring elements.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    /// Bytes from the start of the run, where they are known only at run time.
    offset: Option<Val>,
    /// Bytes beyond them.
    more: usize,
    /// How many elements.
    pub lanes: usize,
    /// Counts chunks of one round: lets a body alternate between accumulators.
    pub turn: usize,
}

impl Chunk {
    /// `base + offset`.
    pub fn at(&self, e: &mut Emitter, base: Val) -> Val {
        let base = match self.offset {
            Some(offset) => e.gep(base, offset),
            None => base,
        };
        e.gep_const(base, self.more)
    }

    /// The elements of a run that starts at `base`, aligned to `align` bytes.
    pub fn load(&self, e: &mut Emitter, base: Val, align: usize) -> Val {
        let at = self.at(e, base);
        e.load(at, F32.x(self.lanes), self.align(align))
    }

    /// Stores the elements.
    pub fn store(&self, e: &mut Emitter, value: Val, base: Val, align: usize) {
        let at = self.at(e, base);
        e.store(value, at, self.align(align));
    }

    /// The chunk as far into elements of half the size.
    pub fn halved(&self, e: &mut Emitter, base: Val) -> Val {
        let base = match self.offset {
            Some(offset) => {
                let half = e.shr(offset, 1);
                e.gep(base, half)
            }
            None => base,
        };
        e.gep_const(base, self.more / 2)
    }

    /// The chunk's first element, as an `i64`.
    pub fn index(&self, e: &mut Emitter) -> Val {
        let more = e.i64((self.more / 4) as i64);
        match self.offset {
            Some(offset) => {
                let index = e.shr(offset, 2);
                e.add(index, more)
            }
            None => more,
        }
    }

    fn align(&self, base: usize) -> usize {
        if self.lanes == LANES { base } else { base.min(4) }
    }
}

/// Gets a chunk and the carried values, gives their next values.
type Body<'a> = dyn FnMut(&mut Emitter, Chunk, &[Val]) -> Vec<Val> + 'a;

/// Visits `width` elements; carries values from chunk to chunk.
pub fn walk(e: &mut Emitter, width: usize, carried: &[Val], body: &mut Body<'_>) -> Vec<Val> {
    let whole = width / LANES;
    let mut carried = carried.to_vec();
    let looped = if whole <= STRAIGHT { 0 } else { whole - whole % UNROLL };
    if looped > 0 {
        let bounds = (e.i64(0), e.i64((looped * LANES * 4) as i64), e.i64((UNROLL * LANES * 4) as i64));
        carried = e.for_loop(bounds, &carried, |e, offset, carried| {
            let mut carried = carried.to_vec();
            for turn in 0..UNROLL {
                let chunk = Chunk { offset: Some(offset), more: turn * LANES * 4, lanes: LANES, turn };
                carried = body(e, chunk, &carried);
            }
            carried
        });
    }
    for i in looped..whole {
        carried = body(e, Chunk { offset: None, more: i * LANES * 4, lanes: LANES, turn: i % UNROLL }, &carried);
    }
    let mut first = whole * LANES;
    for lanes in [8, 4, 2, 1] {
        if (width % LANES) & lanes != 0 {
            carried = body(e, Chunk { offset: None, more: first * 4, lanes, turn: 0 }, &carried);
            first += lanes;
        }
    }
    carried
}

/// [`walk`] that carries nothing.
pub fn visit(e: &mut Emitter, width: usize, body: &mut dyn FnMut(&mut Emitter, Chunk)) {
    walk(e, width, &[], &mut |e, chunk, _| {
        body(e, chunk);
        vec![]
    });
}

/// Sum over a walk of what `term` makes of each chunk, as a scalar.
pub fn sum(e: &mut Emitter, width: usize, term: &mut dyn FnMut(&mut Emitter, Chunk) -> Val) -> Val {
    let zero = e.float(F32.x(LANES), 0.0);
    let parts = if width >= UNROLL * LANES { UNROLL } else { 1 };
    let parts = walk(e, width, &vec![zero; parts], &mut |e, chunk, carried| {
        let mut carried = carried.to_vec();
        let term = term(e, chunk);
        let term = widen(e, term);
        let part = chunk.turn % carried.len();
        carried[part] = e.add(carried[part], term);
        carried
    });
    let total = parts.into_iter().reduce(|a, b| e.add(a, b)).unwrap_or(zero);
    e.reduce_add(total)
}

/// Repeats `body` for every head with the head's byte offset; one head needs no loop.
pub fn heads(e: &mut Emitter, heads: usize, dim: usize, body: &mut dyn FnMut(&mut Emitter, Val, Val)) {
    let zero = e.i64(0);
    if heads == 1 {
        return body(e, zero, zero);
    }
    let high = e.i64(heads as i64);
    e.repeat(zero, high, 1, |e, head| {
        let offset = e.scaled(head, dim * 4, 0);
        body(e, head, offset);
    });
}

/// Zeros after the lanes of a short vector.
pub fn widen(e: &mut Emitter, value: Val) -> Val {
    let lanes = value.ty.lanes;
    if lanes == LANES {
        return value;
    }
    let zero = e.float(value.ty, 0.0);
    let lanes: Vec<usize> = (0..LANES).map(|i| i.min(lanes)).collect();
    e.shuffle(value, zero, &lanes)
}

/// Alignment of heads inside a row that starts on 64 bytes.
pub fn head_align(heads: usize, dim: usize) -> usize {
    if heads == 1 || dim.is_multiple_of(LANES) { 64 } else { 4 }
}

/// Loads an `i32` and widens it.
pub fn load_index(e: &mut Emitter, base: Val, index: Val) -> Val {
    let at = e.row(base, index, 4);
    let value = e.load(at, crate::emit::I32, 4);
    e.convert("extsi", value, I64)
}
