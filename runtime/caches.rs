//! Cache groups: where the positions of every sequence lie, and for how long.
//!
//! ```text
//!  group 0, all positions      table  [ 4  1  0  7  3 ]     entry p / 64 is the cache block of position p
//!  group 1, a window of 128    table  [ .  .  2  9  5 ]     a step from position 320 on: the first two are out of sight
//! ```
//!
//! Before each step cache blocks that no token from there on sees are put back; another sequence, or the same one a little
//! later, takes them next. So a group with a window holds a sequence's last positions and no more memory than those took.
//! The last step can always be taken back, and with it the 64 positions before.
//!
//! An engine that is to attend to the first positions and the last ones only (attention sinks; Xiao et al., 2023) drops what
//! lies between, cache block by cache block: entries leave the middle of every table, and positions in the cache move up.
//! What keys were turned by does not: that is a token's position in the text.

use crate::blocks::{BlockIndex, Blocks, blocks_for};
use crate::memory::{Arena, Memory};
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::plan::{CacheGroup, CacheSpec, Program};
use mansard_ir::{Error, Kind, Result, bail};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// The most cache blocks: a slot, `cache block * 64 + position % 64`, is an i32.
const MAX_BLOCKS: usize = i32::MAX as usize / CACHE_BLOCK;

/// So many bytes at the start of each cache pool are on small pages, what lies beyond on huge ones: a pool is one of many,
/// and huge pages from its start would commit far more memory than a short prompt fills.
const SMALL_POOL_BYTES: usize = 16 << 20;

/// Pools of all caches, and who holds which cache block of them.
pub struct Caches {
    groups: Vec<Group>,
    specs: Vec<CacheSpec>,
    pools: Box<dyn Memory>,
    /// Of each cache's pool.
    offsets: Vec<usize>,
    /// Last positions that a token sees beside the first cache block; `None` for all.
    recent: Option<usize>,
}

struct Group {
    plan: CacheGroup,
    blocks: Blocks,
}

/// How full the caches of one group are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheUse {
    /// Positions a token sees back from, and with, its own; 0 for all.
    pub window: usize,
    /// Cache blocks of 64 positions that sequences hold.
    pub taken: usize,
    /// Cache blocks that there are.
    pub total: usize,
    /// Bytes of a cache block, in all caches of the group.
    pub block_bytes: usize,
}

/// A sequence's cache blocks in one group.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// By position / 64; those of no meaning any more are 0.
    pub entries: Vec<BlockIndex>,
    /// Entries at the beginning that have been put back.
    pub released: usize,
}

/// What a sequence has: its length, and a table for each cache group.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    /// Positions in the caches.
    pub length: usize,
    /// Positions between the first cache block and the others that are in no cache any more.
    pub dropped: usize,
    /// By group.
    pub tables: Vec<Table>,
}

/// Shared cache blocks, by group, and how many of their holders go on in copies of their own.
pub type Copied = BTreeMap<(usize, BlockIndex), usize>;

/// The cache blocks of 64 positions, one of each group, that somebody holds.
#[derive(Debug)]
pub struct Held(Box<[BlockIndex]>);

impl Table {
    fn held(&self) -> &[BlockIndex] {
        &self.entries[self.released..]
    }
}

impl Caches {
    /// Empty caches for `positions` positions over all sequences, whatever of them a group keeps. `pools` makes the memory
    /// of all caches for so many cache blocks, and says where in it each begins.
    ///
    /// # Errors
    /// Where that is no number of positions, layers see more than the `recent` ones, or the system refuses memory.
    pub fn new(
        program: &Program,
        (positions, recent): (usize, Option<usize>),
        pools: impl FnOnce(usize) -> Result<(Box<dyn Memory>, Vec<usize>)>,
    ) -> Result<Caches> {
        // Without caches there is nothing to hold, and no limit to it.
        let groups = if program.caches.is_empty() { &[][..] } else { &program.groups };
        let blocks = blocks_for(positions);
        if !groups.is_empty() && (blocks == 0 || blocks > MAX_BLOCKS) {
            let found = blocks * CACHE_BLOCK;
            bail!(Usage, "expected 1 to {} positions of cache, found {found}", MAX_BLOCKS * CACHE_BLOCK);
        }
        check_recent(groups, recent)?;
        let (pools, offsets) = pools(blocks)?;
        let group = |plan: &CacheGroup| Group { plan: *plan, blocks: Blocks::new(blocks as u32) };
        let groups = groups.iter().map(group).collect();
        Ok(Caches { groups, specs: program.caches.clone(), pools, offsets, recent })
    }

    /// The cache block of a cache that holds a sequence's position.
    ///
    /// # Errors
    /// Where the sequence holds no such position any more, or a GPU does not give it.
    pub fn block(&self, cache: usize, sequence: &Sequence, position: usize) -> Result<Cow<'_, [f32]>> {
        let spec = &self.specs[cache];
        if !self.holds(cache, sequence, position) {
            bail!(Usage, "cache `{}` holds position {position} no more", spec.name);
        }
        let block = sequence.tables[spec.group].entries[position / CACHE_BLOCK] as usize;
        self.pools.read(self.offsets[cache] + block * spec.block_bytes, spec.block_bytes / 4)
    }

    /// Whether the sequence still has a position in a cache, or has let it go.
    pub fn holds(&self, cache: usize, sequence: &Sequence, position: usize) -> bool {
        let table = sequence.tables.get(self.specs[cache].group);
        table.is_some_and(|table| (table.released..table.entries.len()).contains(&(position / CACHE_BLOCK)))
    }

    /// How full they are, group by group.
    pub fn usage(&self) -> Vec<CacheUse> {
        let of = |(index, group): (usize, &Group)| {
            let total = group.blocks.total();
            let block_bytes = self.specs.iter().filter(|spec| spec.group == index).map(|spec| spec.block_bytes).sum();
            CacheUse { window: group.plan.window, taken: total - group.blocks.free(), total, block_bytes }
        };
        self.groups.iter().enumerate().map(of).collect()
    }

    /// A sequence without positions.
    pub fn empty(&self) -> Sequence {
        Sequence { length: 0, dropped: 0, tables: vec![Table::default(); self.groups.len()] }
    }

    /// The same positions, in the same cache blocks.
    pub fn share(&mut self, sequence: &Sequence) -> Sequence {
        for (group, table) in self.groups.iter_mut().zip(&sequence.tables) {
            table.held().iter().for_each(|block| group.blocks.share(*block));
        }
        sequence.clone()
    }

    /// The same positions, in cache blocks of its own.
    ///
    /// # Errors
    /// Where too few are free; nothing has changed then.
    pub fn copy(&mut self, sequence: &Sequence) -> Result<Sequence> {
        self.check_free(&sequence.tables.iter().map(|table| table.held().len()).collect::<Vec<_>>())?;
        let mut copy = sequence.clone();
        for (index, table) in copy.tables.iter_mut().enumerate() {
            for block in &mut table.entries[table.released..] {
                *block = self.copy_block(index, *block)?;
            }
        }
        Ok(copy)
    }

    /// Cache blocks after the first that a token at this position of a text, and up to 64 before it, does not see.
    fn middle(&self, position: usize) -> usize {
        let unseen = |recent: usize| (position + 1).saturating_sub(recent + CACHE_BLOCK) / CACHE_BLOCK;
        self.recent.map_or(0, unseen).saturating_sub(1)
    }

    /// The first position of a text whose step drops so many cache blocks.
    fn onset(&self, middle: usize) -> usize {
        self.recent.map_or(usize::MAX, |recent| recent + (middle + 2) * CACHE_BLOCK - 1)
    }

    /// So many positions a sequence may have before any is dropped.
    pub fn until_dropped(&self) -> usize {
        self.onset(1)
    }

    /// So many tokens see the same cache blocks in one step as in a step each, which attention sums up by halves.
    pub fn steady(&self, sequence: &Sequence) -> usize {
        let position = sequence.length + sequence.dropped;
        let next = sequence.length + 1;
        let until = |window: usize| match next.checked_sub(window) {
            Some(start) => CACHE_BLOCK - start % CACHE_BLOCK,
            None => window - next + CACHE_BLOCK,
        };
        let windows = self.groups.iter().map(|group| group.plan.window).filter(|window| *window > 0).map(until);
        let own = CACHE_BLOCK - sequence.length % CACHE_BLOCK;
        windows.chain([own, self.onset(self.middle(position) + 1) - position]).min().unwrap_or(own)
    }

    /// The fewest positions, beside none, to which a sequence can be cut: what the next token would see must be held.
    pub fn shortest(&self, sequence: &Sequence) -> usize {
        if sequence.dropped > 0 {
            return self.onset(sequence.dropped / CACHE_BLOCK) - sequence.dropped;
        }
        let least = |(group, table): (&Group, &Table)| match table.released {
            0 => 1,
            released => released * CACHE_BLOCK + group.plan.window - 1,
        };
        self.groups.iter().zip(&sequence.tables).map(least).max().unwrap_or(1)
    }

    /// Puts back what lies beyond the first `length` positions, of which [`Caches::shortest`] says whether it can be.
    pub fn cut(&mut self, sequence: &mut Sequence, length: usize) {
        sequence.length = length;
        for (group, table) in self.groups.iter_mut().zip(&mut sequence.tables) {
            let left = blocks_for(length).clamp(table.released, table.entries.len());
            table.entries.drain(left..).for_each(|block| group.blocks.put_back(block));
            if length == 0 {
                *table = Table::default();
            }
        }
        if length == 0 {
            sequence.dropped = 0;
        }
    }

    /// Cache blocks of each group that must be free for `tokens` more positions, in steps of at most `step`: for new
    /// positions, and for a copy of a shared one, less what leaves sight on the way. The last holder of a shared one needs no
    /// copy: `copied` remembers those that grow before it.
    pub fn needed(&self, sequence: &Sequence, tokens: usize, step: usize, copied: &mut Copied) -> Vec<usize> {
        let mut of = |(index, (group, table)): (usize, (&Group, &Table))| {
            let held = table.entries.len();
            let shared = |block: &BlockIndex| group.blocks.is_shared(*block);
            let copies = tail(sequence, table).map_or(0, |tail| {
                let block = table.entries[tail];
                let before = copied.entry((index, block)).or_default();
                let copies = usize::from(group.blocks.holders(block) > *before + 1);
                *before += copies;
                copies
            });
            let before = |first: usize| {
                if group.plan.window == 0 {
                    let dropped =
                        self.middle(sequence.length + sequence.dropped + first) - sequence.dropped / CACHE_BLOCK;
                    let (start, end) = (held.min(1), (1 + dropped).min(held));
                    let old = table.entries[start..end.max(start)].iter();
                    return old.filter(|block| !shared(block)).count() + (1 + dropped).saturating_sub(held.max(1));
                }
                let end = group.plan.out_of_sight(sequence.length + first).max(table.released);
                let old = &table.entries[table.released..end.min(held)];
                old.iter().filter(|block| !shared(block)).count() + end.saturating_sub(held)
            };
            let steps = (0..tokens).step_by(step.max(1)).map(|first| {
                let end = sequence.length + tokens.min(first + step);
                (blocks_for(end) - held + copies).saturating_sub(before(first))
            });
            steps.max().unwrap_or(0)
        };
        self.groups.iter().zip(&sequence.tables).enumerate().map(&mut of).collect()
    }

    /// Refuses to take more cache blocks of a group than are free.
    ///
    /// # Errors
    /// Then.
    pub fn check_free(&self, needed: &[usize]) -> Result<()> {
        for (group, needed) in self.groups.iter().zip(needed) {
            let (free, total) = (group.blocks.free(), group.blocks.total());
            if *needed > free {
                let message =
                    format!("expected {needed} free cache blocks of {CACHE_BLOCK} positions, found {free} of {total}");
                let error = Error::new(Kind::Usage, message);
                return Err(error.help("release a sequence, or make the engine with more positions"));
            }
        }
        Ok(())
    }

    /// Of what [`Caches::needed`] tells, so many are not free in the group that lacks most.
    pub fn lacking(&self, needed: &[usize]) -> usize {
        let lacks = |(group, needed): (&Group, &usize)| needed.saturating_sub(group.blocks.free());
        self.groups.iter().zip(needed).map(lacks).max().unwrap_or(0)
    }

    /// Cache blocks that are free in the group that has fewest, and that there are in each.
    pub fn free(&self) -> (usize, usize) {
        let free = self.groups.iter().map(|group| group.blocks.free()).min().unwrap_or(usize::MAX);
        (free, self.groups.first().map_or(usize::MAX, |group| group.blocks.total()))
    }

    /// One more holder of the cache blocks of an entry, which the sequence has in every group.
    pub fn hold(&mut self, sequence: &Sequence, entry: usize) -> Held {
        let hold = |(group, table): (&mut Group, &Table)| {
            group.blocks.share(table.entries[entry]);
            table.entries[entry]
        };
        Held(self.groups.iter_mut().zip(&sequence.tables).map(hold).collect())
    }

    /// No other holder of these.
    pub fn only_here(&self, held: &Held) -> bool {
        self.groups.iter().zip(&held.0).all(|(group, block)| !group.blocks.is_shared(*block))
    }

    /// One holder less.
    pub fn let_go(&mut self, held: Held) {
        self.groups.iter_mut().zip(held.0).for_each(|(group, block)| group.blocks.put_back(block));
    }

    /// 64 positions more, that another sequence has computed. The sequence fills whole cache blocks.
    pub fn extend(&mut self, sequence: &mut Sequence, held: &Held) {
        debug_assert!(sequence.length.is_multiple_of(CACHE_BLOCK));
        for ((group, table), block) in self.groups.iter_mut().zip(&mut sequence.tables).zip(&held.0) {
            group.blocks.share(*block);
            table.entries.push(*block);
        }
        sequence.length += CACHE_BLOCK;
    }

    /// Puts back what is out of sight, and takes cache blocks for `tokens` more positions.
    ///
    /// # Errors
    /// Where too few are free, which [`Caches::needed`] tells before.
    pub fn grow(&mut self, sequence: &mut Sequence, tokens: usize) -> Result<()> {
        self.drop_middle(sequence);
        let tails: Vec<Option<usize>> = sequence.tables.iter().map(|table| tail(sequence, table)).collect();
        let length = sequence.length;
        for (index, (table, tail)) in sequence.tables.iter_mut().zip(tails).enumerate() {
            let group = &mut self.groups[index];
            let unseen = group.plan.out_of_sight(length).max(table.released);
            for block in &mut table.entries[table.released..unseen] {
                group.blocks.put_back(std::mem::take(block));
            }
            table.released = unseen;
            if let Some(tail) = tail.filter(|tail| self.groups[index].blocks.is_shared(table.entries[*tail])) {
                let shared = table.entries[tail];
                table.entries[tail] = self.copy_block(index, shared)?;
                self.groups[index].blocks.put_back(shared);
            }
            while table.entries.len() < blocks_for(length + tokens) {
                table.entries.push(self.groups[index].blocks.take()?);
            }
        }
        Ok(())
    }

    /// Puts back the cache blocks between the first one and the last positions.
    fn drop_middle(&mut self, sequence: &mut Sequence) {
        let more = self.middle(sequence.length + sequence.dropped) - sequence.dropped / CACHE_BLOCK;
        if more == 0 {
            return;
        }
        for (group, table) in self.groups.iter_mut().zip(&mut sequence.tables) {
            let released = table.released;
            let gone = table.entries.drain(1..1 + more).zip(1..).filter(|(_, entry)| *entry >= released);
            gone.for_each(|(block, _)| group.blocks.put_back(block));
            table.released = released.min(1).max(released.saturating_sub(more));
        }
        sequence.length -= more * CACHE_BLOCK;
        sequence.dropped += more * CACHE_BLOCK;
    }

    /// Takes a cache block with what another holds, in every cache of the group.
    fn copy_block(&mut self, group: usize, from: BlockIndex) -> Result<BlockIndex> {
        let to = self.groups[group].blocks.take()?;
        for (spec, pool) in self.specs.iter().zip(&self.offsets).filter(|(spec, _)| spec.group == group) {
            let [from, to] = [from, to].map(|block| pool + block as usize * spec.block_bytes);
            self.pools.copy(from..from + spec.block_bytes, to)?;
        }
        Ok(to)
    }
}

/// Refuses to see fewer of the last positions than some layers do by themselves.
fn check_recent(groups: &[CacheGroup], recent: Option<usize>) -> Result<()> {
    let Some(recent) = recent else { return Ok(()) };
    let least = groups.iter().map(|group| group.window).max().unwrap_or(0).max(CACHE_BLOCK);
    if groups.is_empty() || recent < least || recent > MAX_BLOCKS * CACHE_BLOCK {
        let found = if groups.is_empty() { "a model without caches".into() } else { recent.to_string() };
        bail!(Usage, "expected a window of at least {least} positions, which its layers see themselves, found {found}");
    }
    Ok(())
}

/// One arena for the pools of all caches, and the offset of each.
///
/// # Errors
/// Where the system refuses memory.
pub fn make_pools(program: &Program, blocks: usize) -> Result<(Arena, Vec<usize>)> {
    let mut offsets = vec![];
    let mut bytes = 0usize;
    for cache in &program.caches {
        offsets.push(bytes);
        let pool = cache.block_bytes.checked_mul(blocks).and_then(|pool| bytes.checked_add(pool));
        let Some(end) = pool else {
            bail!(
                Usage,
                "{blocks} cache blocks of {} bytes in {} caches: no such memory",
                cache.block_bytes,
                offsets.len()
            );
        };
        bytes = end;
    }
    let arena = Arena::new("caches", bytes)?;
    for (offset, end) in offsets.iter().zip(offsets.iter().skip(1).chain([&bytes])) {
        arena.use_huge_pages(offset.saturating_add(SMALL_POOL_BYTES)..*end);
    }
    Ok((arena, offsets))
}

/// The entry that the next position falls into, where it is filled in part.
fn tail(sequence: &Sequence, table: &Table) -> Option<usize> {
    let entry = sequence.length / CACHE_BLOCK;
    (entry < table.entries.len()).then_some(entry)
}

#[cfg(test)]
#[path = "caches_tests.rs"]
mod tests;
