//! Sums and largest values over the lanes of a warp, or over all threads of a block.
//!
//! ```text
//! warp    5 shuffles, after which every lane has the result
//! block   each warp's result to shared memory, a barrier, and every thread reads all eight
//! ```

use crate::emit::{Emitter, F32, I32, Val, WARP};

/// How two values become one; commutative and associative but for rounding.
pub type Combine<'a> = &'a dyn Fn(&mut Emitter, Val, Val) -> Val;

/// Sum of two.
pub fn sum(e: &mut Emitter, a: Val, b: Val) -> Val {
    e.add(a, b)
}

/// The larger of two.
pub fn largest(e: &mut Emitter, a: Val, b: Val) -> Val {
    e.max(a, b)
}

/// The smaller of two.
pub fn smallest(e: &mut Emitter, a: Val, b: Val) -> Val {
    e.min(a, b)
}

/// Combines the values of groups of `lanes` neighbouring lanes, a power of two; every lane gets its group's.
pub fn lanes(e: &mut Emitter, lanes: usize, value: Val, combine: Combine<'_>) -> Val {
    (0..lanes.trailing_zeros()).rev().fold(value, |value, bit| {
        let other = e.across(value, 1 << bit);
        combine(e, value, other)
    })
}

/// Combines the values of a warp's lanes.
pub fn warp(e: &mut Emitter, value: Val, combine: Combine<'_>) -> Val {
    lanes(e, WARP, value, combine)
}

/// Combines the f32 or i32 values of a block's threads; every thread gets the result. Another barrier must come before the
/// same place in the code is reached again.
pub fn block(e: &mut Emitter, value: Val, combine: Combine<'_>) -> Val {
    let own = warp(e, value, combine);
    let warps = e.block_threads() / WARP;
    let parts = e.shared(4 * warps);
    let (lane, number) = e.lane_and_warp();
    let zero = e.i64(0);
    let first = e.cmp(crate::emit::Cmp::Eq, lane, zero);
    let to = e.row(parts, number, 4);
    e.when(first, |e| e.store(own, to, 4));
    e.barrier();
    let ty = if value.ty == F32 { F32 } else { I32 };
    let all: Vec<Val> = (0..warps)
        .map(|i| {
            let at = e.gep_const(parts, 4 * i);
            e.load(at, ty, 4)
        })
        .collect();
    all.into_iter().reduce(|a, b| combine(e, a, b)).unwrap_or(own)
}
