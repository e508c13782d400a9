//! A pair of caches that attention reads, and where their cache blocks are.

use super::Item;
use crate::cpu::cached::Stored;
use crate::cpu::rows::walk::load_index;
use crate::emit::{Emitter, Val};
use mansard_ir::layout::{CACHE_BLOCK, cache_block_bytes, cache_scales};
use mansard_ir::{DType, Result, Type, bail};

/// Keys and values of every sequence, stored alike.
pub(super) struct Source {
    pub(super) keys: Val,
    pub(super) values: Val,
    /// The block tables of their cache group.
    tables: Val,
    pub(super) stored: Stored,
    dtype: DType,
    heads: usize,
    dim: usize,
    block_bytes: usize,
}

impl Source {
    /// The pools of two caches, one of which is of type `cache`, and their tables.
    ///
    /// # Errors
    /// Where that is no cache, or of a type that no kernel reads.
    pub(super) fn new((keys, values): (Val, Val), tables: Val, cache: &Type) -> Result<Source> {
        let (Type::Cache { heads, dim, dtype, .. }, Some(block_bytes)) = (cache, cache_block_bytes(cache)) else {
            bail!(Internal, "attention over {cache}")
        };
        let (dtype, stored) = (*dtype, Stored::of(*dtype)?);
        Ok(Source { keys, values, tables, stored, dtype, heads: *heads, dim: *dim, block_bytes })
    }

    fn block(&self, e: &mut Emitter, item: &Item, pool: Val, block: Val) -> Val {
        let table = e.row(self.tables, item.table, 4);
        let id = load_index(e, table, block);
        e.row(pool, id, self.block_bytes)
    }

    /// The item's head of a cache block in `pool`.
    pub(super) fn head(&self, e: &mut Emitter, item: &Item, pool: Val, block: Val) -> Val {
        let block = self.block(e, item, pool, block);
        e.row(block, item.kv_head, self.value_bytes() * CACHE_BLOCK)
    }

    /// Bytes of a head of a position.
    pub(super) fn value_bytes(&self) -> usize {
        self.dim / self.stored.sharing() * self.stored.bytes()
    }

    /// The scales of the item's head of a cache block, where there are any.
    pub(super) fn scales(&self, e: &mut Emitter, item: &Item, pool: Val, block: Val) -> Option<Val> {
        self.stored.has_scales().then(|| {
            let block = self.block(e, item, pool, block);
            let scales = e.gep_const(block, cache_scales(self.dtype, self.heads, self.dim, 0));
            e.row(scales, item.kv_head, CACHE_BLOCK * self.stored.scale_bytes())
        })
    }
}
