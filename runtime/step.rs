//! Work -> the arrays of one ragged step.
//!
//! ```text
//!  work        seq 7: 3 tokens from place 64         seq 2: 1 token at place 9
//!  tokens      a  b  c                               d
//!  places      64 65 66                              9            in the caches
//!  positions   192 193 194                           9            in the text, of which 128 were dropped
//!  sequences   [0, 3]                                [3, 1]       first token, number of tokens
//!  tiles       [0, 2, 0, 67] [2, 1, 0, 67]           [3, 1, 1, 10]     with tiles of at most 2 tokens
//!  rows        2                                     3            with `Rows::Last`
//!  tables      by cache group, then by sequence; slots by cache group, then by token
//! ```

use crate::blocks::BlockIndex;
use crate::caches::Table;
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::plan::{CANDIDATE_ROWS, CANDIDATES, StepArgs};

/// Which of a sequence's rows leave the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// None: the step only fills the cache.
    None,
    /// That of the last token, from which the next one is sampled.
    Last,
    /// All, as scoring and verification need them.
    All,
}

impl Rows {
    /// Rows out of `tokens` tokens.
    pub fn of(self, tokens: usize) -> usize {
        match self {
            Rows::None => 0,
            Rows::Last => tokens.min(1),
            Rows::All => tokens,
        }
    }
}

/// Which of a row's logits must be exact. Where an artifact keeps its vocabulary projection in two planes, the others are
/// estimates that lie below those wanted, and a step that wants few reads half of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Logits {
    /// All.
    #[default]
    All,
    /// So many of the largest, of every row.
    Largest(usize),
}

impl Logits {
    /// Rows of a step for which asking for few of their logits saves time. For more the kernels still can (up to
    /// [`CANDIDATE_ROWS`]), but rows that are asked together read the second half for one another.
    pub const WORTHWHILE_ROWS: usize = 2;

    /// The `count` largest of each of `rows` rows where that saves time, else all.
    pub fn largest(count: usize, rows: usize) -> Logits {
        if rows <= Logits::WORTHWHILE_ROWS { Logits::Largest(count) } else { Logits::All }
    }

    /// What satisfies both.
    pub fn and(self, other: Logits) -> Logits {
        match (self, other) {
            (Logits::Largest(a), Logits::Largest(b)) => Logits::Largest(a.max(b)),
            _ => Logits::All,
        }
    }

    /// As kernels see it in a step of so many rows: 0 for all, also where there are many rows or very many wanted.
    pub fn candidates(self, rows: usize) -> usize {
        match self {
            Logits::Largest(count) if count <= CANDIDATES && rows <= CANDIDATE_ROWS => count,
            _ => 0,
        }
    }
}

/// One sequence's part of a step, with its place in the cache resolved.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// New tokens.
    pub tokens: &'a [u32],
    /// Position of the first in the caches.
    pub position: usize,
    /// Positions of the text that are in no cache any more.
    pub dropped: usize,
    /// Its cache blocks in each cache group, those for this step's positions included.
    pub tables: &'a [Table],
    /// Rows that leave the step.
    pub rows: Rows,
}

/// The arrays behind [`StepArgs`], reused from step to step.
///
/// `tokens`, `positions` and `rows` never move: launches hold their addresses.
#[derive(Debug)]
pub struct StepArrays {
    /// `i32[t]`
    pub tokens: Vec<i32>,
    /// `i32[t]`: positions in the text.
    pub positions: Vec<i32>,
    /// `i32[t]`: positions in the caches.
    pub places: Vec<i32>,
    /// `i32[r]`
    pub rows: Vec<i32>,
    /// `i32[groups][t]`
    pub slots: Vec<i32>,
    /// `i32[tiles][4]`
    pub tiles: Vec<[i32; 4]>,
    /// `i32[groups][s][stride]`
    pub tables: Vec<i32>,
    /// Entries of a row of `tables`.
    pub table_stride: usize,
    /// `i32[s][2]`
    pub sequences: Vec<[i32; 2]>,
}

impl StepArrays {
    /// Arrays for steps of at most `tokens` tokens, of which `rows` leave the step.
    pub fn new(tokens: usize, rows: usize) -> StepArrays {
        StepArrays {
            tokens: Vec::with_capacity(tokens.max(1)),
            positions: Vec::with_capacity(tokens.max(1)),
            places: vec![],
            rows: Vec::with_capacity(rows.max(1)),
            slots: vec![],
            tiles: vec![],
            tables: vec![],
            table_stride: 0,
            sequences: vec![],
        }
    }

    /// Describes a step of `segments`, in tiles of at most `tile` tokens. The caller has checked the step against the
    /// limits the arrays were made for, and every table against its segment's length; all segments have as many tables.
    pub fn fill(&mut self, segments: &[Segment<'_>], tile: usize) {
        let StepArrays { tokens, positions, places, rows, slots, tables, .. } = self;
        [tokens, positions, places, rows, slots, tables].into_iter().for_each(Vec::clear);
        self.tiles.clear();
        self.sequences.clear();
        let tables = segments.iter().flat_map(|s| s.tables);
        self.table_stride = tables.map(|table| table.entries.len()).max().unwrap_or(0);
        for (sequence, segment) in segments.iter().enumerate() {
            let (first, count) = (self.tokens.len(), segment.tokens.len());
            let length = segment.position + count;
            self.tokens.extend(segment.tokens.iter().map(|t| *t as i32));
            self.places.extend((segment.position..length).map(|p| p as i32));
            self.positions.extend((segment.position..length).map(|p| (p + segment.dropped) as i32));
            self.rows.extend((first + count - segment.rows.of(count)..first + count).map(|r| r as i32));
            self.sequences.push([first as i32, count as i32]);
            for start in (0..count).step_by(tile) {
                let part = tile.min(count - start);
                self.tiles.push([(first + start) as i32, part as i32, sequence as i32, length as i32]);
            }
        }
        for group in 0..segments.first().map_or(0, |s| s.tables.len()) {
            for segment in segments {
                let (entries, first) = (&segment.tables[group].entries, segment.position);
                self.slots.extend((first..first + segment.tokens.len()).map(|p| slot(entries, p)));
                let end = self.tables.len() + self.table_stride;
                self.tables.extend(entries.iter().map(|block| *block as i32));
                self.tables.resize(end, 0);
            }
        }
    }

    /// Where tokens, positions and rows lie.
    pub fn addresses(&self) -> [*mut u8; 3] {
        [&self.tokens, &self.positions, &self.rows].map(|array| array.as_ptr().cast_mut().cast())
    }

    /// The arrays as kernels see them, beside the workers' scratch of so many bytes each.
    pub fn args(&self, scratch: *mut u8, scratch_bytes: usize, logits: Logits) -> StepArgs {
        StepArgs {
            t: self.tokens.len() as i64,
            s: self.sequences.len() as i64,
            r: self.rows.len() as i64,
            tiles: self.tiles.len() as i64,
            table_stride: self.table_stride as i64,
            tokens: self.tokens.as_ptr(),
            positions: self.places.as_ptr(),
            rows: self.rows.as_ptr(),
            slots: self.slots.as_ptr(),
            tile: self.tiles.as_ptr().cast(),
            tables: self.tables.as_ptr(),
            sequences: self.sequences.as_ptr().cast(),
            scratch,
            scratch_bytes: scratch_bytes as i64,
            candidates: logits.candidates(self.rows.len()) as i64,
        }
    }
}

/// Where position `p` of a sequence lies in every pool of a group.
fn slot(table: &[BlockIndex], p: usize) -> i32 {
    table[p / CACHE_BLOCK] as i32 * CACHE_BLOCK as i32 + (p % CACHE_BLOCK) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: &[BlockIndex]) -> Table {
        Table { entries: entries.to_vec(), released: 0 }
    }

    #[test]
    fn the_picture_of_the_front_door() {
        let mut arrays = StepArrays::new(16, 16);
        let (a, b) = ([table(&[4, 9]), table(&[0, 3])], [table(&[2]), table(&[1])]);
        let segments = [
            Segment { tokens: &[10, 11, 12], position: 64, dropped: 128, tables: &a, rows: Rows::Last },
            Segment { tokens: &[13], position: 9, dropped: 0, tables: &b, rows: Rows::Last },
        ];
        arrays.fill(&segments, 2);
        assert_eq!(arrays.tokens, [10, 11, 12, 13]);
        assert_eq!((&arrays.places[..], &arrays.positions[..]), (&[64, 65, 66, 9][..], &[192, 193, 194, 9][..]));
        let slots = |blocks: [i32; 2]| [0, 1, 2].map(|i| blocks[0] * 64 + i).into_iter().chain([blocks[1] * 64 + 9]);
        assert_eq!(arrays.slots, slots([9, 2]).chain(slots([3, 1])).collect::<Vec<_>>());
        assert_eq!(arrays.sequences, [[0, 3], [3, 1]]);
        assert_eq!(arrays.tiles, [[0, 2, 0, 67], [2, 1, 0, 67], [3, 1, 1, 10]]);
        assert_eq!(arrays.rows, [2, 3]);
        assert_eq!((arrays.table_stride, &arrays.tables[..]), (2, &[4, 9, 2, 0, 0, 3, 1, 0][..]));
    }

    #[test]
    fn rows_of_some_sequences_only() {
        let mut arrays = StepArrays::new(16, 16);
        let tables = [table(&[0])];
        let segment = |tokens, rows| Segment { tokens, position: 0, dropped: 0, tables: &tables, rows };
        arrays.fill(&[segment(&[1, 2], Rows::None), segment(&[3, 4], Rows::All), segment(&[5], Rows::Last)], 8);
        assert_eq!(arrays.rows, [2, 3, 4]);
        let args = arrays.args(std::ptr::null_mut(), 0, Logits::Largest(2));
        assert_eq!((args.t, args.s, args.r, args.tiles, args.candidates), (5, 3, 3, 3, 2));
    }

    #[test]
    fn many_rows_or_candidates_are_all() {
        assert_eq!(Logits::Largest(40).candidates(CANDIDATE_ROWS), 40);
        assert_eq!(Logits::Largest(1).candidates(CANDIDATE_ROWS + 1), 0);
        assert_eq!(Logits::Largest(CANDIDATES + 1).candidates(1), 0);
        assert_eq!(Logits::All.candidates(1), 0);
    }

    #[test]
    fn tiles_cover_every_token_once() {
        let tokens: Vec<u32> = (0..100).collect();
        for tile in [1, 7, 16, 64, 100, 1000] {
            let mut arrays = StepArrays::new(200, 1);
            let tables = [table(&[0, 1])];
            let segment = Segment { tokens: &tokens, position: 5, dropped: 0, tables: &tables, rows: Rows::None };
            arrays.fill(&[segment, segment], tile);
            let covered: Vec<i32> = arrays.tiles.iter().flat_map(|t| t[0]..t[0] + t[1]).collect();
            assert_eq!(covered, (0..200).collect::<Vec<i32>>());
            assert!(arrays.tiles.iter().all(|t| t[1] as usize <= tile && t[3] == 105));
        }
    }
}
