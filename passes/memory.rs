//! Lifetimes to offsets: values whose lifetimes meet never share memory.
//!
//! First fit over launches in order: a value takes the lowest gap among the values alive at the same time. What leaves
//! the step lies behind everything else, at one place for all variants.

use ir::layout::{STRIP, aligned};

/// A value in memory over one run of launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Bytes it takes.
    pub bytes: usize,
    /// The launch that writes it.
    pub first: usize,
    /// The last launch that reads it.
    pub last: usize,
}

/// Offsets, multiples of 64, in the order of `lifetimes`; and the bytes they take together.
pub fn assign(lifetimes: &[Lifetime]) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..lifetimes.len()).collect();
    order.sort_by_key(|i| (lifetimes[*i].first, std::cmp::Reverse(lifetimes[*i].bytes), *i));
    let mut offsets = vec![0; lifetimes.len()];
    let mut placed: Vec<usize> = vec![];
    let mut total = 0;
    for i in order {
        let own = lifetimes[i];
        placed.retain(|j| lifetimes[*j].last >= own.first);
        let mut taken: Vec<(usize, usize)> =
            placed.iter().map(|j| (offsets[*j], offsets[*j] + aligned(lifetimes[*j].bytes))).collect();
        taken.sort_unstable();
        let mut at = 0;
        for (start, end) in taken {
            if at + aligned(own.bytes) <= start {
                break;
            }
            at = at.max(end);
        }
        offsets[i] = at;
        total = total.max(at + aligned(own.bytes));
        placed.push(i);
    }
    (offsets, total)
}

/// Bytes of `rows` rows: kernels may store whole strips of rows.
pub fn buffer_bytes(rows: usize, row_bytes: usize) -> Option<usize> {
    rows.checked_next_multiple_of(STRIP)?.checked_mul(row_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_that_meet_do_not_share() {
        let mut state = 7u64;
        let mut random = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        for _ in 0..50 {
            let lifetimes: Vec<Lifetime> = (0..40)
                .map(|_| {
                    let first = random(30);
                    Lifetime { bytes: 1 + random(500), first, last: first + random(6) }
                })
                .collect();
            let (offsets, total) = assign(&lifetimes);
            for (i, a) in lifetimes.iter().enumerate() {
                assert!(offsets[i] + a.bytes <= total && offsets[i] % 64 == 0);
                for (j, b) in lifetimes.iter().enumerate().skip(i + 1) {
                    let meet = a.first <= b.last && b.first <= a.last;
                    let overlap = offsets[i] < offsets[j] + b.bytes && offsets[j] < offsets[i] + a.bytes;
                    assert!(!(meet && overlap), "{a:?} at {} and {b:?} at {}", offsets[i], offsets[j]);
                }
            }
        }
    }
}
