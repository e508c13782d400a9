//! A pair of caches that attention reads, and where their cache blocks are.

use super::Item;
use crate::cpu::cached::Stored;
use crate::cpu::rows::walk::load_index;
use crate::emit::{Emitter, Val};
use mansard_ir::layout::{CACHE_BLOCK, cache_block_bytes, cache_scales, cache_scales_bytes};
use mansard_ir::{Result, Type, bail};

/// Keys and values of every sequence, stored alike.
pub(super) struct Source {
    pub(super) keys: Pool,
    pub(super) values: Pool,
    /// The block tables of their cache group.
    tables: Val,
    pub(super) stored: Stored,
    dim: usize,
}

/// Memory of a cache.
#[derive(Clone, Copy)]
pub(super) struct Pool {
    memory: Val,
    block_bytes: usize,
    /// Where the scales of a cache block begin, and bytes of a head's.
    scales: (usize, usize),
    /// These are scales of dims, and then their middles.
    by_dim: bool,
}

impl Pool {
    /// # Errors
    /// Where `ty` is no cache.
    fn new(memory: Val, ty: &Type) -> Result<Pool> {
        let Some(block_bytes) = cache_block_bytes(ty) else { bail!(Internal, "attention over {ty}") };
        let scales = (cache_scales(ty, 0), cache_scales_bytes(ty));
        Ok(Pool { memory, block_bytes, scales, by_dim: ty.kept(1) == 0 })
    }
}

impl Source {
    /// Pools, each with its type, and their tables.
    ///
    /// # Errors
    /// Where these are no caches, or of a type that no kernel reads.
    pub(super) fn new(pools: [(Val, &Type); 2], tables: Val) -> Result<Source> {
        let [keys, values] = pools.map(|(memory, ty)| Pool::new(memory, ty));
        let Type::Cache { dim, dtype, .. } = *pools[0].1 else { bail!(Internal, "attention over {}", pools[0].1) };
        Ok(Source { keys: keys?, values: values?, tables, stored: Stored::of(dtype)?, dim })
    }

    fn block(&self, e: &mut Emitter, item: &Item, pool: Pool, block: Val) -> Val {
        let table = e.row(self.tables, item.table, 4);
        let id = load_index(e, table, block);
        e.row(pool.memory, id, pool.block_bytes)
    }

    /// The item's head of a cache block in `pool`.
    pub(super) fn head(&self, e: &mut Emitter, item: &Item, pool: Pool, block: Val) -> Val {
        let block = self.block(e, item, pool, block);
        e.row(block, item.kv_head, self.value_bytes() * CACHE_BLOCK)
    }

    /// Bytes of a head of a position.
    pub(super) fn value_bytes(&self) -> usize {
        self.dim / self.stored.sharing() * self.stored.bytes()
    }

    /// The scales of positions of the item's head of a cache block, where there are any.
    pub(super) fn scales(&self, e: &mut Emitter, item: &Item, pool: Pool, block: Val) -> Option<Val> {
        (self.stored.has_scales() && !pool.by_dim).then(|| self.figures(e, item, pool, block))
    }

    /// The scales and middles of dims of the item's head of a cache block of keys, where there are any.
    pub(super) fn channels(&self, e: &mut Emitter, item: &Item, block: Val) -> Option<Val> {
        self.keys.by_dim.then(|| self.figures(e, item, self.keys, block))
    }

    fn figures(&self, e: &mut Emitter, item: &Item, pool: Pool, block: Val) -> Val {
        let block = self.block(e, item, pool, block);
        let scales = e.gep_const(block, pool.scales.0);
        e.row(scales, item.kv_head, pool.scales.1)
    }
}
