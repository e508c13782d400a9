//! Cache blocks: who holds which 64 positions of the cache pools.
//!
//! One index names a cache block in every pool (each layer's keys and values), so a sequence has one table of them. Blocks
//! are counted, so that sequences with a common beginning can share it; a shared one is copied before it is written.

use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::{Error, Kind, Result};

/// Index of a cache block in every pool.
pub type BlockIndex = u32;

/// The free list and the holders of every cache block.
#[derive(Debug)]
pub struct Blocks {
    /// Holders of each cache block; 0 is free.
    holders: Vec<u32>,
    /// Free ones; the last is taken first, which at the start is the lowest, so that memory is touched from its beginning.
    free: Vec<BlockIndex>,
}

impl Blocks {
    /// `count` free cache blocks.
    pub fn new(count: u32) -> Blocks {
        Blocks { holders: vec![0; count as usize], free: (0..count).rev().collect() }
    }

    /// How many are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// How many there are.
    pub fn total(&self) -> usize {
        self.holders.len()
    }

    /// Takes a free one, with one holder.
    ///
    /// # Errors
    /// Where none is free.
    pub fn take(&mut self) -> Result<BlockIndex> {
        let Some(index) = self.free.pop() else {
            let message = format!("all {} cache blocks of {CACHE_BLOCK} positions are in use", self.holders.len());
            return Err(
                Error::new(Kind::Usage, message).help("release a sequence, or make the engine with more positions")
            );
        };
        self.holders[index as usize] = 1;
        Ok(index)
    }

    /// Adds a holder to a cache block in use.
    pub fn share(&mut self, index: BlockIndex) {
        debug_assert!(self.holders[index as usize] > 0, "cache block {index} is free");
        self.holders[index as usize] += 1;
    }

    /// Takes one holder away; the last one frees the cache block.
    pub fn put_back(&mut self, index: BlockIndex) {
        let holders = &mut self.holders[index as usize];
        debug_assert!(*holders > 0, "cache block {index} is free already");
        *holders -= 1;
        if *holders == 0 {
            self.free.push(index);
        }
    }

    /// How many hold it.
    pub fn holders(&self, index: BlockIndex) -> usize {
        self.holders[index as usize] as usize
    }

    /// More than one holds it.
    pub fn is_shared(&self, index: BlockIndex) -> bool {
        self.holders(index) > 1
    }
}

/// Cache blocks that `positions` positions fill, the last perhaps in part.
pub fn blocks_for(positions: usize) -> usize {
    positions.div_ceil(CACHE_BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_block_is_free_again_after_its_last_holder() {
        let mut blocks = Blocks::new(2);
        let a = blocks.take().unwrap();
        let b = blocks.take().unwrap();
        assert_eq!((a, b, blocks.free(), blocks.total()), (0, 1, 0, 2));
        assert_eq!(blocks.take().unwrap_err().exit_code(), 2);
        blocks.share(a);
        blocks.put_back(a);
        assert!(!blocks.is_shared(a) && blocks.free() == 0);
        blocks.put_back(a);
        assert_eq!(blocks.take().unwrap(), a);
    }

    #[test]
    fn positions_round_up_to_cache_blocks() {
        assert_eq!([0, 1, 64, 65].map(blocks_for), [0, 1, 1, 2]);
    }
}
