//! BLAKE3 of many sections by all cores.
//!
//! BLAKE3 is a tree: a large section is cut at subtrees of [`SUBTREE`] bytes, so that one section of half a file keeps every
//! core busy. Results equal `blake3::hash` of each section.

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use blake3::{Hash, Hasher};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes hashed by one worker at a time: a power of two, as subtrees are.
const SUBTREE: usize = 1 << 20;

/// A piece of a section and the place of its result.
struct Piece<'a> {
    bytes: &'a [u8],
    offset: u64,
    value: OnceLock<ChainingValue>,
}

/// The hash of every section.
pub fn hash_all(sections: &[&[u8]]) -> Vec<Hash> {
    // Sections of one subtree or less are hashed whole, by whoever comes to them.
    let small: Vec<OnceLock<Hash>> = sections.iter().map(|_| OnceLock::new()).collect();
    let pieces: Vec<Vec<Piece<'_>>> = sections.iter().map(|s| cut(s)).collect();
    let jobs: Vec<Job<'_, '_>> = (sections.iter().zip(&small).zip(&pieces))
        .flat_map(|((section, whole), pieces)| {
            let whole = pieces.is_empty().then_some(Job::Whole(section, whole));
            whole.into_iter().chain(pieces.iter().map(Job::Part))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            job.run();
        }
    };
    let total: usize = sections.iter().map(|s| s.len()).sum();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(total / SUBTREE + 1);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // Where the system refuses a thread, this one does the work.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    let whole = sections.iter().zip(&small).zip(&pieces);
    whole.map(|((section, hash), pieces)| hash.get().copied().unwrap_or_else(|| root(section.len(), pieces))).collect()
}

enum Job<'a, 'b> {
    Whole(&'b [u8], &'b OnceLock<Hash>),
    Part(&'b Piece<'a>),
}

impl Job<'_, '_> {
    fn run(&self) {
        match self {
            Job::Whole(bytes, hash) => _ = hash.set(blake3::hash(bytes)),
            Job::Part(piece) => _ = piece.value.set(piece.hash()),
        }
    }
}

impl Piece<'_> {
    fn hash(&self) -> ChainingValue {
        Hasher::new().set_input_offset(self.offset).update(self.bytes).finalize_non_root()
    }
}

/// Subtrees of a section; none where it is no larger than one.
fn cut(section: &[u8]) -> Vec<Piece<'_>> {
    if section.len() <= SUBTREE {
        return vec![];
    }
    let pieces = section.chunks(SUBTREE).enumerate();
    pieces.map(|(i, bytes)| Piece { bytes, offset: (i * SUBTREE) as u64, value: OnceLock::new() }).collect()
}

/// The root over a section's pieces, of which there are at least two.
fn root(bytes: usize, pieces: &[Piece<'_>]) -> Hash {
    let (left, right) = halves(bytes, pieces);
    merge_subtrees_root(&left, &right, Mode::Hash)
}

fn subtree(bytes: usize, pieces: &[Piece<'_>]) -> ChainingValue {
    match pieces {
        [piece] => *piece.value.get_or_init(|| piece.hash()),
        _ => {
            let (left, right) = halves(bytes, pieces);
            merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
}

fn halves(bytes: usize, pieces: &[Piece<'_>]) -> (ChainingValue, ChainingValue) {
    let left = blake3::hazmat::left_subtree_len(bytes as u64) as usize;
    let (first, second) = pieces.split_at(left / SUBTREE);
    (subtree(left, first), subtree(bytes - left, second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_by_many_equal_hashes_by_one() {
        let sizes =
            [0, 1, 64, SUBTREE, SUBTREE + 1, 2 * SUBTREE, 2 * SUBTREE + 64, 3 * SUBTREE, 5 * SUBTREE - 64, 7 << 20];
        let bytes: Vec<u8> = (0..7 << 20).map(|i: u32| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
        let sections: Vec<&[u8]> = sizes.iter().map(|n| &bytes[..*n]).collect();
        let expected: Vec<Hash> = sections.iter().map(|s| blake3::hash(s)).collect();
        assert_eq!(hash_all(&sections), expected);
    }
}
