//! Attention over paged caches on a GPU, with a running softmax (Milakov and Gimelshein, 2018; Dao et al., 2022).
//!
//! ```text
//! item = a token x the query heads of one key-value head
//! prompts       on tensor cores, many tokens an item (`prompt.rs`), where caches hold halves
//! many items    an item a block
//! few           every block takes an equal run of all cache blocks in sight; an item that falls to several of them is put
//!               together by the one that is done last (`items.rs` of the CPU, where a worker is a block here)
//! ```
//!
//! `attend_mixed` reads a token's own cache block from the recent caches.

mod blocks;
mod partials;
mod prompt;

use super::rows::{put_real, real_at};
use super::{Device, SHARED_LIMIT};
use crate::cpu::attend::items::{self, Attend, Extents, Item, StepPointers};
use crate::cpu::cached::Stored;
use crate::cpu::rows::walk::load_index;
use crate::cpu::{StepField, step_field, tables};
use crate::emit::{BF16, Cmp, Emitter, F32, Val};
use mansard_ir::layout::{AttentionItem, CACHE_BLOCK, cache_block_bytes, cache_scales, cache_scales_bytes, row_bytes};
use mansard_ir::ops::Class;
use mansard_ir::{DType, Error, Kind, Result, Type, ValueId, bail};

/// What no score is below, and what a masked one is: its power of two is zero beside any other.
const FAR_BELOW: f32 = -1e30;

/// Items for every block from which on none is divided.
const MANY: i64 = 4;

/// Emits an `attend` kernel.
pub(super) fn emit(e: &mut Emitter, d: Device<'_>) -> Result<()> {
    let body = &d.kernel.body;
    let broken = || Error::new(Kind::Internal, format!("`{}` is no attention over caches in memory", body.name));
    let attends = |v: &ValueId| body.node(*v).filter(|n| n.op.class() == Class::Attend);
    let (value, node) = body.values().find_map(|v| Some((v, attends(&v)?))).ok_or_else(broken)?;
    let (q, keys) = (body.ty(node.operands[0]), body.ty(node.operands[1]));
    let (Type::Cache { heads: kv_heads, dim, .. }, Some(width)) = (keys, q.row_width()) else { return Err(broken()) };
    let (Some(query_bytes), Some(row_bytes)) = (row_bytes(q), row_bytes(&node.ty)) else { return Err(broken()) };
    let stride = step_field(e, d.k, StepField::TableStride);
    let source = |e: &mut Emitter, keys: usize| -> Result<Source> {
        let [keys, values] = [node.operands[keys], node.operands[keys + 1]];
        let (ty, tables) = (body.ty(keys), tables(e, d.k, body.ty(keys), stride)?);
        let Type::Cache { dim, dtype, .. } = *ty else { bail!(Internal, "attention over {ty}") };
        let pool = |v: ValueId| Pool::new(d.pointer(v)?, body.ty(v));
        Ok(Source { keys: pool(keys)?, values: pool(values)?, tables, stored: Stored::of(dtype)?, dim })
    };
    let (caches, recent) = (source(e, 1)?, if node.operands.len() > 4 { Some(source(e, 3)?) } else { None });
    let group = width / dim / kv_heads;
    let item = AttentionItem { tokens: 1, ..AttentionItem::new(group, *dim) };
    let heads = item.heads;
    let mark = e.shared_mark();
    let attention = Attention {
        q: d.pointer(node.operands[0])?,
        extents: Extents {
            item,
            slices: width / dim / heads,
            parts: group / heads,
            halves: false,
            mixed: recent.is_some(),
            causal: node.attrs.bool("causal"),
            window: node.attrs.size("window"),
        },
        step: StepPointers::new(e, d.k, stride),
        caches,
        recent,
        results: (value.0 as usize..body.len()).filter_map(|v| d.memory[v]).collect(),
        heads,
        dim: *dim,
        halves: q.dtype() == Some(DType::BF16),
        query_bytes,
        row_bytes,
        scale: node.attrs.float("scale") as f32,
        softcap: node.attrs.float("softcap") as f32,
        queries: e.shared(heads * dim * 4),
        scores: e.shared(heads * CACHE_BLOCK * 4),
        out: e.shared(heads * dim * 4),
        state: e.shared(heads * STATE),
        told: e.shared(8),
        staged: None,
    };
    let sources = std::iter::once(&attention.caches).chain(&attention.recent);
    let bytes = sources.map(Source::head_bytes).max().unwrap_or(0);
    let fits = e.shared_bytes() + SLOTS * 2 * bytes <= SHARED_LIMIT;
    let staged = fits.then(|| Staged { memory: e.shared(SLOTS * 2 * bytes), bytes });
    let attention = Attention { staged, ..attention };
    let tokens = step_field(e, d.k, StepField::T);
    let all = e.scaled(tokens, attention.extents.slices, 0);
    let most = e.scaled(d.k.threads, MANY as usize, 0);
    let many = e.cmp(Cmp::Ge, all, most);
    let by_token = |e: &mut Emitter| {
        e.either(many, |e| attention.one_by_one(e, &d, all), |e| items::emit(&attention, e, d.k));
    };
    if prompt::suits(&attention) {
        let pays = prompt::pays(&attention, e, &d);
        e.either(pays, |e| e.shared_over(mark, |e| prompt::emit(&attention, e, &d)), by_token);
    } else {
        by_token(e);
    }
    Ok(())
}

/// Bytes of a head's state: largest score, sum of weights, and factors for what was summed before and for what comes.
const STATE: usize = 16;

/// Cache blocks of which copies are in shared memory: one that is read, and the next.
const SLOTS: usize = 2;

/// Keys and values of a head of some cache blocks, in shared memory.
#[derive(Clone, Copy)]
struct Staged {
    memory: Val,
    /// Bytes of the keys, or values, of a head of a cache block.
    bytes: usize,
}

/// Keys and values of every sequence, stored alike.
struct Source {
    keys: Pool,
    values: Pool,
    /// The block tables of their cache group.
    tables: Val,
    stored: Stored,
    dim: usize,
}

/// Memory of a cache.
#[derive(Clone, Copy)]
struct Pool {
    memory: Val,
    block_bytes: usize,
    /// Where the scales of a cache block begin, and bytes of a head's.
    scales: (usize, usize),
    /// These are scales of dims, and then their middles.
    by_dim: bool,
}

impl Pool {
    fn new(memory: Val, ty: &Type) -> Result<Pool> {
        let Some(block_bytes) = cache_block_bytes(ty) else { bail!(Internal, "attention over {ty}") };
        let scales = (cache_scales(ty, 0), cache_scales_bytes(ty));
        Ok(Pool { memory, block_bytes, scales, by_dim: ty.kept(1) == 0 })
    }
}

struct Attention {
    q: Val,
    extents: Extents,
    step: StepPointers,
    caches: Source,
    /// What a token reads its own cache block from, where not from `caches`.
    recent: Option<Source>,
    /// Every buffer that wants the result.
    results: Vec<Val>,
    /// Query heads of an item.
    heads: usize,
    dim: usize,
    /// Queries are bf16.
    halves: bool,
    /// Bytes from token to token of queries.
    query_bytes: usize,
    /// Bytes from token to token of results.
    row_bytes: usize,
    scale: f32,
    softcap: f32,
    /// Shared memory: `[heads][dim]`, `[heads][64]`, `[heads][dim]`, and the heads' states.
    queries: Val,
    scores: Val,
    out: Val,
    state: Val,
    /// Where the first thread tells what a counter was.
    told: Val,
    /// Copies of what is read next; `None` where they have no room.
    staged: Option<Staged>,
}

impl Attention {
    /// Items one by one: blocks share them.
    fn one_by_one(&self, e: &mut Emitter, d: &Device<'_>, all: Val) {
        e.for_loop((d.k.thread, all, d.k.threads), &[], |e, index, _| {
            let slices = e.i64(self.extents.slices as i64);
            let (token, slice) = (e.div(index, slices), e.rem(index, slices));
            let item = self.item(e, d, token).of_slice(e, &self.extents, slice);
            let none = e.i64(0);
            self.blocks(e, &item, (none, item.blocks));
            self.finish(e, &item);
            vec![]
        });
    }

    /// Finds the sequence of a token, and what it sees.
    fn item(&self, e: &mut Emitter, d: &Device<'_>, token: Val) -> Item {
        let (tiles, tile) = (step_field(e, d.k, StepField::Tiles), step_field(e, d.k, StepField::Tile));
        let (zero, one) = (e.i64(0), e.i64(1));
        // Tiles are in order of token: the last that does not begin behind it is its own.
        let found = e.for_loop((zero, tiles, one), &[zero, zero], |e, index, found| {
            let record = e.row(tile, index, 16);
            let [first, sequence, length] = [0, 2, 3].map(|field| {
                let at = e.gep_const(record, 4 * field);
                load_index(e, at, zero)
            });
            let begun = e.cmp(Cmp::Le, first, token);
            vec![e.select(begun, sequence, found[0]), e.select(begun, length, found[1])]
        });
        items::item(self, e, (token, one), (found[0], found[1]))
    }

    /// Sums up cache blocks `from..to` of an item in shared memory.
    fn blocks(&self, e: &mut Emitter, item: &Item, (from, to): (Val, Val)) {
        let (low, high) = (e.add(item.low, from), e.add(item.low, to));
        self.fetch(e, item, (low, high));
        self.begin(e, item);
        if self.staged.is_none() {
            e.barrier();
        }
        e.repeat(low, high, 1, |e, block| {
            if self.staged.is_some() {
                let one = e.i64(1);
                let next = e.add(block, one);
                self.fetch(e, item, (next, high));
                e.await_copies(SLOTS - 1);
                e.barrier();
            }
            self.with_source(e, item, block, &|e, source| self.block(e, source, item, block));
        });
    }

    /// Emits `body` for the caches that the item reads this cache block from.
    fn with_source(&self, e: &mut Emitter, item: &Item, block: Val, body: &dyn Fn(&mut Emitter, &Source)) {
        match &self.recent {
            None => body(e, &self.caches),
            Some(recent) => {
                let recently = e.cmp(Cmp::Eq, block, item.own);
                e.either(recently, |e| body(e, recent), |e| body(e, &self.caches));
            }
        }
    }

    /// The address of the item's first head in row `token` of results.
    fn row(&self, e: &mut Emitter, base: Val, item: &Item) -> Val {
        let row = e.row(base, item.first, self.row_bytes);
        e.row(row, item.head, self.dim * 4)
    }

    /// Scales the queries, in units of ln 2 unless a cap comes between, and resets the sums.
    fn begin(&self, e: &mut Emitter, item: &Item) {
        let units = if self.softcap > 0.0 { 1.0 } else { std::f32::consts::LOG2_E };
        let from = e.row(self.q, item.first, self.query_bytes);
        let from = e.row(from, item.head, self.dim * if self.halves { 2 } else { 4 });
        e.strided(self.heads * self.dim, |e, i| {
            let x = if self.halves { half_at(e, from, i) } else { real_at(e, from, i) };
            let (scale, zero) = (e.float(F32, self.scale * units), e.float(F32, 0.0));
            let x = e.mul(x, scale);
            put_real(e, x, self.queries, i);
            put_real(e, zero, self.out, i);
        });
        e.strided(self.heads, |e, head| {
            let state = e.row(self.state, head, STATE);
            for (at, value) in [(0, FAR_BELOW), (4, 0.0)] {
                let (at, value) = (e.gep_const(state, at), e.float(F32, value));
                e.store(value, at, 4);
            }
        });
    }
}

/// The bf16 at `base[index]` as f32.
fn half_at(e: &mut Emitter, base: Val, index: Val) -> Val {
    let at = e.row(base, index, 2);
    let x = e.load(at, BF16, 2);
    e.convert("extf", x, F32)
}
