//! Appends: one token's heads into its slot of the cache pool.
//!
//! ```text
//! slot = slots[token]; cache block = slot / 64
//! keys   [heads][dim][64]   element (head, d) goes to column slot % 64 of line head * dim + d
//! values [heads][64][dim]   a head's elements stay together
//! ```

use super::Rows;
use super::walk;
use crate::cpu::{StepField, step_field};
use crate::emit::{Emitter, F16, Val};
use mansard_ir::layout::{CACHE_BLOCK, cache_block_bytes};
use mansard_ir::{CacheRole, DType, Node, Result, Type, bail};

impl Rows<'_> {
    /// Emits `append` for this token.
    pub(super) fn append(&self, e: &mut Emitter, node: &Node) -> Result<()> {
        let ty = self.graph.ty(node.operands[0]);
        let (Type::Cache { role, heads, dim, dtype }, Some(block_bytes)) = (ty, cache_block_bytes(ty)) else {
            bail!(Internal, "{ty} is no cache")
        };
        let (role, heads, dim) = (*role, *heads, *dim);
        let bytes = match dtype {
            DType::F32 => 4,
            DType::F16 => 2,
            other => bail!(Unsupported, "a cache of {other}: f32 or f16 is needed"),
        };
        let (pool, from) = (self.memory(node.operands[0])?, self.row_of(node.operands[1])?);
        let slots = step_field(e, self.k, StepField::Slots);
        let slot = walk::load_index(e, slots, self.row);
        let positions = e.i64(CACHE_BLOCK as i64);
        let (block, position) = (e.div(slot, positions), e.rem(slot, positions));
        let block = e.row(pool, block, block_bytes);
        match role {
            CacheRole::Keys => {
                let column = e.row(block, position, bytes);
                append_keys(e, heads * dim, from, column, bytes);
            }
            CacheRole::Values => {
                let line = e.row(block, position, dim * bytes);
                let align = walk::head_align(heads, dim);
                walk::heads(e, heads, dim, &mut |e, head, offset| {
                    let (from, to) = (e.gep(from, offset), e.row(line, head, CACHE_BLOCK * dim * bytes));
                    walk::visit(e, dim, &mut |e, chunk| {
                        let x = chunk.load(e, from, align);
                        let x = stored(e, x, bytes);
                        let to = if bytes == 4 { chunk.at(e, to) } else { chunk.halved(e, to) };
                        e.store(x, to, bytes);
                    });
                });
            }
        }
        Ok(())
    }
}

/// Every element goes to a line of its own.
fn append_keys(e: &mut Emitter, width: usize, from: Val, column: Val, bytes: usize) {
    walk::visit(e, width, &mut |e, chunk| {
        let x = chunk.load(e, from, 64);
        let x = stored(e, x, bytes);
        let first = chunk.index(e);
        let to = e.row(column, first, CACHE_BLOCK * bytes);
        for lane in 0..chunk.lanes {
            let value = e.extract(x, lane);
            let to = e.gep_const(to, lane * CACHE_BLOCK * bytes);
            e.store(value, to, bytes);
        }
    });
}

fn stored(e: &mut Emitter, x: Val, bytes: usize) -> Val {
    if bytes == 2 { e.convert("truncf", x, F16) } else { x }
}
