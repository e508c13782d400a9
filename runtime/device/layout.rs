//! A step's arrays as bytes of a GPU's memory, in one piece.
//!
//! ```text
//!  StepArgs | tokens | positions | rows |          where launches expect them, in every step
//!           | slots | tiles | tables | sequences    one after another, as long as the step has them
//! ```

use super::Address;
use super::plan::ALIGN;
use crate::step::{Logits, StepArrays};
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::plan::{Program, StepArgs};

/// Where a step's arrays begin.
#[derive(Clone, Copy, Debug)]
pub struct StepLayout {
    /// Of `tokens`.
    pub tokens: usize,
    /// Of `positions`.
    pub positions: usize,
    /// Of `rows`.
    pub rows: usize,
    /// Of what follows.
    rest: usize,
    /// Of the largest step.
    pub bytes: usize,
}

impl StepLayout {
    /// For steps within a program's limits.
    pub fn new(program: &Program) -> StepLayout {
        let (limits, groups) = (&program.limits, program.groups.len());
        let after = |end: usize, items: usize, bytes: usize| {
            end.saturating_add(items.saturating_mul(bytes)).saturating_add(ALIGN - 1) / ALIGN * ALIGN
        };
        let tokens = after(0, 1, size_of::<StepArgs>());
        let positions = after(tokens, limits.tokens, 4);
        let rows = after(positions, limits.tokens, 4);
        let rest = after(rows, limits.rows, 4);
        let tables = groups.saturating_mul(limits.sequences).saturating_mul(limits.context.div_ceil(CACHE_BLOCK));
        let parts =
            [(limits.tokens.saturating_mul(groups), 4), (limits.tokens, 16), (tables, 4), (limits.sequences, 8)];
        let bytes = parts.into_iter().fold(rest, |end, (items, bytes)| after(end, items, bytes));
        StepLayout { tokens, positions, rows, rest, bytes }
    }

    /// Writes a step as it is to lie at address `at`, with so many bytes of scratch for each block. The step is within the
    /// limits.
    pub fn write(
        &self,
        at: Address,
        (scratch, scratch_bytes): (Address, usize),
        (arrays, logits): (&StepArrays, Logits),
        bytes: &mut Vec<u8>,
    ) {
        bytes.clear();
        bytes.resize(self.rest, 0);
        put(bytes, self.tokens, &arrays.tokens);
        put(bytes, self.positions, &arrays.positions);
        put(bytes, self.rows, &arrays.rows);
        let mut append = |words: &[i32]| {
            let begin = bytes.len();
            bytes.resize((begin + 4 * words.len()).next_multiple_of(ALIGN), 0);
            put(bytes, begin, words);
            at as i64 + begin as i64
        };
        let slots = append(&arrays.slots);
        let tiles = append(arrays.tiles.as_flattened());
        let tables = append(&arrays.tables);
        let sequences = append(arrays.sequences.as_flattened());
        let StepArgs { t, s, r, tiles: count, table_stride, candidates, .. } =
            arrays.args(std::ptr::null_mut(), 0, logits);
        let [tokens, positions, rows] = [self.tokens, self.positions, self.rows].map(|o| at as i64 + o as i64);
        // In the order of StepArgs.
        let words = [
            t,
            s,
            r,
            count,
            table_stride,
            tokens,
            positions,
            rows,
            slots,
            tiles,
            tables,
            sequences,
            scratch as i64,
            scratch_bytes as i64,
            candidates,
        ];
        const { assert!(size_of::<StepArgs>() == 15 * 8) };
        for (word, out) in words.iter().zip(bytes.chunks_exact_mut(8)) {
            out.copy_from_slice(&word.to_le_bytes());
        }
    }
}

fn put(bytes: &mut [u8], at: usize, words: &[i32]) {
    for (word, out) in words.iter().zip(bytes[at..].chunks_exact_mut(4)) {
        out.copy_from_slice(&word.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caches::Table;
    use crate::step::{Rows, Segment};
    use mansard_ir::plan::{CacheGroup, Limits};

    #[test]
    fn the_largest_step_fits_and_arrays_lie_where_the_step_says() {
        let limits = Limits { tokens: 16, rows: 8, sequences: 4, context: 256, tile: 1 };
        let groups = [0, 100].map(|window| CacheGroup { window }).to_vec();
        let layout = StepLayout::new(&Program { limits, groups, ..Program::default() });
        let table = |entries: [u32; 4]| Table { entries: entries.to_vec(), released: 0 };
        let tables = [table([1, 2, 3, 4]), table([5, 6, 7, 8])];
        let segment = Segment { tokens: &[9, 9, 9, 9], position: 250, dropped: 0, tables: &tables, rows: Rows::None };
        let two = Segment { tokens: &[7, 8], rows: Rows::All, ..segment };
        let one = Segment { tokens: &[6, 5, 4, 3, 2, 1], ..two };
        let mut arrays = StepArrays::new(16, 8);
        arrays.fill(&[segment, segment, two, one], 1);
        let (at, mut bytes) = (0x7000_0000, vec![]);
        layout.write(at, (77, 64), (&arrays, Logits::All), &mut bytes);
        assert!(bytes.len() <= layout.bytes, "{} of {}", bytes.len(), layout.bytes);
        let word = |i: usize| i64::from_le_bytes(*bytes[8 * i..].first_chunk().unwrap()) as usize;
        assert_eq!([0, 1, 2, 3, 4].map(word), [16, 4, 8, 16, 4]);
        let ints = |pointer: usize, count: usize| -> Vec<i32> {
            let from = &bytes[word(pointer) - at as usize..][..4 * count];
            from.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
        };
        assert_eq!(ints(5, 16), arrays.tokens);
        assert_eq!(ints(6, 16), arrays.positions);
        assert_eq!(ints(7, 8), arrays.rows);
        assert_eq!(ints(8, 32), arrays.slots);
        assert_eq!(ints(9, 64), arrays.tiles.as_flattened());
        assert_eq!(ints(10, 32), arrays.tables);
        assert_eq!(ints(11, 8), arrays.sequences.as_flattened());
        assert_eq!([12, 13, 14].map(word), [77, 64, 0]);
    }
}
