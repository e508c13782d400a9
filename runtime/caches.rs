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

use crate::blocks::{BlockIndex, Blocks, blocks_for};
use crate::memory::Memory;
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::plan::{CacheGroup, CacheSpec, Program};
use mansard_ir::{Error, Kind, Result, bail};
use std::borrow::Cow;

/// The most cache blocks: a slot, `cache block * 64 + position % 64`, is an i32.
const MAX_BLOCKS: usize = i32::MAX as usize / CACHE_BLOCK;

/// Pools of all caches, and who holds which cache block of them.
pub struct Caches {
    groups: Vec<Group>,
    specs: Vec<CacheSpec>,
    pools: Box<dyn Memory>,
    /// Of each cache's pool.
    offsets: Vec<usize>,
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
    /// Positions.
    pub length: usize,
    /// By group.
    pub tables: Vec<Table>,
}

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
    /// Where that is no number of positions, or the system refuses memory.
    pub fn new(
        program: &Program,
        positions: usize,
        pools: impl FnOnce(usize) -> Result<(Box<dyn Memory>, Vec<usize>)>,
    ) -> Result<Caches> {
        // Without caches there is nothing to hold, and no limit to it.
        let groups = if program.caches.is_empty() { &[][..] } else { &program.groups };
        let blocks = blocks_for(positions);
        if !groups.is_empty() && (blocks == 0 || blocks > MAX_BLOCKS) {
            let found = blocks * CACHE_BLOCK;
            bail!(Usage, "expected 1 to {} positions of cache, found {found}", MAX_BLOCKS * CACHE_BLOCK);
        }
        let (pools, offsets) = pools(blocks)?;
        let group = |plan: &CacheGroup| Group { plan: *plan, blocks: Blocks::new(blocks as u32) };
        Ok(Caches { groups: groups.iter().map(group).collect(), specs: program.caches.clone(), pools, offsets })
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
        Sequence { length: 0, tables: vec![Table::default(); self.groups.len()] }
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

    /// The fewest positions, beside none, to which a sequence can be cut: what the next token would see must be held.
    pub fn shortest(&self, sequence: &Sequence) -> usize {
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
    }

    /// Cache blocks of each group that must be free for `tokens` more positions, in steps of at most `step`: for new
    /// positions, and for a copy of a shared one, less what leaves sight on the way.
    pub fn needed(&self, sequence: &Sequence, tokens: usize, step: usize) -> Vec<usize> {
        let of = |(group, table): (&Group, &Table)| {
            let held = table.entries.len();
            let shared = |block: &BlockIndex| group.blocks.is_shared(*block);
            let copies = usize::from(tail(sequence, table).is_some_and(|tail| shared(&table.entries[tail])));
            let before = |first: usize| {
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
        self.groups.iter().zip(&sequence.tables).map(of).collect()
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

/// The entry that the next position falls into, where it is filled in part.
fn tail(sequence: &Sequence, table: &Table) -> Option<usize> {
    let entry = sequence.length / CACHE_BLOCK;
    (entry < table.entries.len()).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bind::make_pools;

    const WINDOW: usize = 100;

    /// Two groups, the second with a window, of one cache each.
    fn caches(positions: usize) -> Caches {
        let spec = |group| CacheSpec { name: "keys".into(), ty: String::new(), block_bytes: 64, group };
        let groups = [0, WINDOW].map(|window| CacheGroup { window }).to_vec();
        let program = Program { caches: vec![spec(0), spec(1)], groups, ..Program::default() };
        let pools = |blocks| make_pools(&program, blocks).map(|(arena, offsets)| (Box::new(arena) as _, offsets));
        Caches::new(&program, positions, pools).unwrap()
    }

    fn taken(caches: &Caches) -> [usize; 2] {
        [0, 1].map(|group| caches.usage()[group].taken)
    }

    /// A step, which must need what was said.
    fn step(caches: &mut Caches, sequence: &mut Sequence, tokens: usize) {
        let (needed, before) = (caches.needed(sequence, tokens, tokens), taken(caches));
        caches.check_free(&needed).unwrap();
        caches.grow(sequence, tokens).unwrap();
        for (group, after) in taken(caches).into_iter().enumerate() {
            assert!(after <= before[group] + needed[group], "{after} of group {group}, {needed:?} after {before:?}");
            let table = &sequence.tables[group];
            assert_eq!(table.entries.len(), blocks_for(sequence.length + tokens));
            // What the step's first token sees.
            let window = caches.groups[group].plan.window;
            if window > 0 {
                assert!(table.released * CACHE_BLOCK <= (sequence.length + 1).saturating_sub(window));
            }
        }
        sequence.length += tokens;
    }

    #[test]
    fn a_window_holds_as_many_cache_blocks_at_any_depth() {
        let mut caches = caches(8192);
        let mut sequence = caches.empty();
        for _ in 0..16 {
            step(&mut caches, &mut sequence, 500);
            assert!(taken(&caches)[1] <= (WINDOW + 64 + 500).div_ceil(CACHE_BLOCK) + 1);
        }
        for _ in 0..192 {
            step(&mut caches, &mut sequence, 1);
        }
        assert_eq!((sequence.length, taken(&caches)), (8192, [128, 3]));
        assert_eq!(CacheGroup { window: WINDOW }.blocks(8192), 3);
        let table = &sequence.tables[1];
        assert!(table.entries.iter().max() < Some(&12), "cache blocks that were put back are taken first");
        caches.cut(&mut sequence, 0);
        assert_eq!(taken(&caches), [0, 0]);
    }

    #[test]
    fn the_last_step_and_64_positions_can_be_taken_back() {
        let mut caches = caches(2048);
        let mut sequence = caches.empty();
        for tokens in [1, 300, 64, 1, 1, 130, 63, 200, 1] {
            let before = sequence.length;
            step(&mut caches, &mut sequence, tokens);
            assert!(caches.shortest(&sequence) <= before.saturating_sub(CACHE_BLOCK).max(1), "after {before}");
        }
        let (shortest, length) = (caches.shortest(&sequence), sequence.length);
        assert!(shortest > 1 && shortest < length);
        caches.cut(&mut sequence, shortest);
        assert_eq!(caches.shortest(&sequence), shortest);
        step(&mut caches, &mut sequence, length - shortest);
        caches.cut(&mut sequence, 0);
        assert_eq!((caches.shortest(&sequence), taken(&caches)), (1, [0, 0]));
    }

    #[test]
    fn forks_keep_what_the_other_lets_go() {
        let mut caches = caches(2048);
        let mut one = caches.empty();
        step(&mut caches, &mut one, 330);
        let mut other = caches.share(&one);
        let held = other.tables[1].entries.clone();
        for _ in 0..8 {
            step(&mut caches, &mut one, 50);
        }
        assert!(one.tables[1].released >= 5 && other.tables[1].released == 0);
        assert_eq!(taken(&caches)[1], 6 + one.tables[1].held().len());
        let copy = caches.copy(&one).unwrap();
        assert!(copy.tables[1].held().iter().all(|block| !one.tables[1].held().contains(block)));
        step(&mut caches, &mut other, 1);
        assert_eq!(other.tables[1].held()[..2], held[other.tables[1].released..][..2]);
        for mut sequence in [one, other, copy] {
            caches.cut(&mut sequence, 0);
        }
        assert_eq!(taken(&caches), [0, 0]);
    }

    #[test]
    fn a_long_prompt_needs_no_more_than_its_steps_hold() {
        let mut caches = caches(640);
        let mut sequence = caches.empty();
        assert_eq!(caches.needed(&sequence, 640, 640), [10, 10]);
        let needed = caches.needed(&sequence, 640, 64);
        assert_eq!(needed[0], 10);
        let mut most = 0;
        for _ in 0..10 {
            step(&mut caches, &mut sequence, 64);
            most = most.max(taken(&caches)[1]);
        }
        assert_eq!(needed[1], most);
        let error = caches.check_free(&caches.needed(&sequence, 1, 1)).unwrap_err();
        assert!(error.message().contains("expected 1 free cache blocks of 64 positions, found 0 of 10"), "{error}");
    }
}
