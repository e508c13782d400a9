//! How fast this machine reads memory: the roof over decoding, measured as weights are held and read.

use crate::memory::{Arena, LANES};
use crate::spmd::{Program, Share, Team};
use mansard_ir::Result;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// Times the buffer is read; the fastest counts.
const READS: usize = 20;

/// Bytes per second at which `threads` workers together read `bytes` bytes on huge pages, again and again, each its own
/// part: from main memory where they exceed the caches, else from those.
///
/// # Errors
/// Where the system refuses memory or threads.
pub fn read_bandwidth(bytes: usize, threads: usize) -> Result<f64> {
    let words = (bytes / 4).next_multiple_of(LANES * threads.max(1));
    let mut arena = Arena::huge("a measurement", words * 4)?;
    // Untouched pages would all be one page of zeros.
    arena.bytes_mut().fill(1);
    let sum = Arc::new(AtomicU32::new(0));
    let mut team = Team::new(threads, false, Reading { arena, words, sum: sum.clone() })?;
    let mut best = f64::INFINITY;
    for _ in 0..READS {
        let start = Instant::now();
        team.run(());
        best = best.min(start.elapsed().as_secs_f64());
    }
    std::hint::black_box(sum.load(Ordering::Relaxed));
    Ok((words * 4) as f64 / best)
}

/// Adds up a buffer's words.
struct Reading {
    arena: Arena,
    words: usize,
    sum: Arc<AtomicU32>,
}

impl Program<()> for Reading {
    fn phases(&self, (): &()) -> usize {
        1
    }

    fn run(&self, (): &(), _: usize, share: Share) {
        let words = self.words / share.count;
        self.sum.fetch_add(self.arena.sum(share.index * words * 4, words), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_is_read_at_some_speed() {
        for threads in [1, 3] {
            let bandwidth = super::read_bandwidth(10 << 20, threads).unwrap();
            assert!(bandwidth > 1e8 && bandwidth < 1e13, "{bandwidth}");
        }
    }
}
