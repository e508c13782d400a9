//! What works beside a block's threads on Hopper: the copy engine, barriers that count its bytes, and products of warpgroups.
//!
//! ```text
//! copy of a tile      done at once, or when somebody waits for its barrier and nothing else can end the phase
//! product             reads its tile at once, or when somebody waits for it; sums are NaNs until then
//! ```
//!
//! Beyond races (`shadow.rs`), what is reported: barriers used before they are fenced, matrices described badly or not acquired,
//! products without the fence before them or with unequal descriptors, copies and products that a block leaves behind.

use super::machine::{Block, Copies, Thread, watch};
use super::shadow::Landing;
use crate::emit::{MAP_BYTES, TILE_ROW, WARPGROUP};
use std::collections::BTreeMap;
use std::ptr;

/// An op of these units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    MakeBarrier,
    FenceBarriers,
    FenceProxy,
    Arrive,
    Expect,
    TryWait,
    /// Replaces a field of a description: where it is here, its bytes, and whether a dimension is chosen first.
    Replace {
        at: usize,
        bytes: usize,
        of_dim: bool,
    },
    PublishMap,
    AcquireMap,
    CopyTile,
    BeginProducts,
    Product,
    CommitProducts,
    /// All groups but the last so many.
    AwaitProducts {
        but: u32,
    },
}

/// The op of an intrinsic, or of inline assembly as `retarget.rs` calls it.
pub(super) fn unit(name: &str) -> Option<Unit> {
    if let Some(field) = name.strip_prefix("llvm.nvvm.tensormap.replace.") {
        let (at, bytes, of_dim) = match field.strip_suffix(".p3")? {
            "global.address" => (Map::BASE, 8, false),
            "rank" => (Map::RANK, 4, false),
            "elemtype" => (Map::ELEMENT, 4, false),
            "global.dim" => (Map::SIZE, 4, true),
            "box.dim" => (Map::BOX, 4, true),
            "element.stride" => (Map::ELEMENT_STRIDE, 4, true),
            "global.stride" => (Map::STRIDE, 8, true),
            "interleave.layout" => (Map::INTERLEAVE, 4, false),
            "swizzle.mode" => (Map::SWIZZLE, 4, false),
            "fill.mode" => (Map::FILL, 4, false),
            _ => return None,
        };
        return Some(Unit::Replace { at, bytes, of_dim });
    }
    Some(match name {
        "llvm.nvvm.mbarrier.init.shared" => Unit::MakeBarrier,
        "llvm.nvvm.fence.mbarrier_init.release.cluster" => Unit::FenceBarriers,
        "llvm.nvvm.fence.proxy.async.shared_cta" => Unit::FenceProxy,
        "llvm.nvvm.mbarrier.arrive.shared" => Unit::Arrive,
        "llvm.nvvm.mbarrier.arrive.expect.tx.scope.cta.space.cta" => Unit::Expect,
        "llvm.nvvm.mbarrier.try.wait.parity.scope.cta.space.cta" => Unit::TryWait,
        "llvm.nvvm.fence.proxy.tensormap_generic.acquire.gpu" => Unit::AcquireMap,
        "llvm.nvvm.cp.async.bulk.tensor.g2s.cta.tile.2d" => Unit::CopyTile,
        "llvm.nvvm.wgmma.fence.sync.aligned" => Unit::BeginProducts,
        "llvm.nvvm.wgmma.commit_group.sync.aligned" => Unit::CommitProducts,
        _ if name.starts_with("emulator.tensormap.cp_fenceproxy") => Unit::PublishMap,
        _ if name.starts_with("emulator.wgmma.mma_async") => Unit::Product,
        _ if name.starts_with("emulator.wgmma.wait_group") => {
            Unit::AwaitProducts { but: name.rsplit('.').nth(1)?.parse().ok()? }
        }
        _ => return None,
    })
}

/// A description of a matrix, as this machine lays it out; the rest of its bytes are zero.
#[derive(Clone, Copy)]
struct Map {
    base: u64,
    size: [u32; 2],
    of_tile: [u32; 2],
    stride: u64,
}

impl Map {
    const BASE: usize = 0;
    const STRIDE: usize = 8;
    const SIZE: usize = 16;
    const BOX: usize = 24;
    const ELEMENT_STRIDE: usize = 32;
    const RANK: usize = 40;
    const ELEMENT: usize = 44;
    const INTERLEAVE: usize = 48;
    const SWIZZLE: usize = 52;
    const FILL: usize = 56;
    const END: usize = 60;

    /// Reads a description: tiles of bf16 with rows of 128 bytes, swizzled, zeros beyond the matrix.
    fn parse(bytes: &[u8; MAP_BYTES]) -> Result<Map, String> {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let pair = |at: usize| [word(at), word(at + 4)];
        let how = [Map::RANK, Map::ELEMENT, Map::INTERLEAVE, Map::SWIZZLE, Map::FILL].map(word);
        if how != [1, 10, 0, 3, 0] || pair(Map::ELEMENT_STRIDE) != [1, 1] || bytes[Map::END..].iter().any(|b| *b != 0) {
            return Err(format!("a matrix is described to the copy engine as {bytes:?}"));
        }
        let (base, stride, of_tile) = (long(Map::BASE), long(Map::STRIDE), pair(Map::BOX));
        if !base.is_multiple_of(16)
            || !stride.is_multiple_of(16)
            || of_tile[0] * 2 != TILE_ROW as u32
            || of_tile[1] > 256
        {
            return Err(format!("a matrix at {base:#x}, {stride} bytes a row, has tiles of {of_tile:?}"));
        }
        Ok(Map { base, size: pair(Map::SIZE), of_tile, stride })
    }

    fn bytes(&self) -> usize {
        TILE_ROW * self.of_tile[1] as usize
    }

    /// Copies the tile at `(column, row)` to shared memory.
    unsafe fn copy(&self, [column, row]: [u32; 2], to: u64) {
        for y in 0..self.of_tile[1] {
            for x in 0..self.of_tile[0] {
                let (column, row) = (column + x, row + y);
                let inside = column < self.size[0] && row < self.size[1];
                let from = self.base + u64::from(row) * self.stride + 2 * u64::from(column);
                let to = swizzled(to + u64::from(y) * TILE_ROW as u64 + 2 * u64::from(x));
                // SAFETY: inside the matrix, which the kernel says is there; the tile's place was checked when the copy began.
                unsafe { *(to as *mut u16) = if inside { *(from as *const u16) } else { 0 } };
            }
        }
    }
}

/// Where the 128-byte swizzle puts what lies at an address.
fn swizzled(at: u64) -> u64 {
    at ^ (at >> 3 & 0x70)
}

/// A barrier in shared memory.
struct Bar {
    arrivals: i64,
    /// Arrivals and bytes that the phase still wants.
    pending: i64,
    bytes: i64,
    /// Phases that are over.
    phases: i64,
    maker: u32,
    epoch: u32,
    fenced: bool,
    flights: Vec<(Map, [u32; 2], u64)>,
}

/// A product of a warpgroup under way.
struct Product {
    id: u32,
    /// Of each thread: sums, then four words of `a`.
    args: Vec<Vec<u32>>,
    tile: u64,
    /// Sums of each thread, once it is done.
    results: Option<Vec<Vec<u32>>>,
    /// The number of the group that it was closed in.
    closed: Option<u32>,
    /// Warps that have waited for it, a bit each.
    waited: u8,
}

/// Threads that meet, with what each brings and takes.
#[derive(Default)]
struct Meeting {
    arrived: usize,
    generation: u64,
    args: Vec<Vec<u64>>,
    rets: Vec<Vec<u32>>,
}

/// The units of a block.
pub(super) struct Units {
    bars: BTreeMap<u64, Bar>,
    /// Products of each warpgroup, and how many groups of them were closed.
    groups: Vec<Vec<Product>>,
    closed: Vec<u32>,
    /// Of warpgroups, then of warps.
    meetings: Vec<Meeting>,
    next: u32,
}

/// Sums of products that were not waited for: NaNs that tell which.
const UNKNOWN: u32 = 0x7fc0_0000;

impl Units {
    pub(super) fn new(threads: usize) -> Units {
        let groups = threads / WARPGROUP;
        let meetings = (0..groups + threads / 32).map(|_| Meeting::default()).collect();
        let (closed, products) = (vec![0; groups], (0..groups).map(|_| vec![]).collect());
        Units { bars: BTreeMap::new(), groups: products, closed, meetings, next: UNKNOWN + 1 }
    }

    /// What a block leaves behind when its threads have ended.
    pub(super) fn left(&self) -> Option<String> {
        let copies: usize = self.bars.values().map(|bar| bar.flights.len()).sum();
        let products: usize = self.groups.iter().map(Vec::len).sum();
        (copies + products > 0).then(|| format!("{copies} copies and {products} products were not waited for"))
    }

    fn bar(&mut self, at: u64, thread: u32, epoch: u32) -> Result<&mut Bar, String> {
        let bar = self.bars.get_mut(&at).ok_or_else(|| format!("thread {thread} uses a barrier that was not made"))?;
        if bar.maker != thread && bar.epoch == epoch {
            return Err(format!("race: thread {thread} uses a barrier that thread {} made", bar.maker));
        }
        Ok(bar)
    }
}

impl Bar {
    /// Ends the phase where nothing is wanted any more.
    fn check(&mut self) -> Result<(), String> {
        if self.pending < 0 {
            return Err("more threads arrive at a barrier than it was made for".into());
        }
        if self.pending == 0 && self.bytes == 0 {
            (self.pending, self.phases) = (self.arrivals, self.phases + 1);
        }
        Ok(())
    }
}

/// Does an op for a thread.
pub(super) unsafe fn call(thread: &mut Thread, unit: (Unit, usize), args: *const u64, rets: *mut u64) {
    // SAFETY: as in `machine::call`.
    unsafe {
        let args = std::slice::from_raw_parts(args, unit.1);
        if let Err(fault) = attempt(thread, unit.0, args, rets) {
            (*thread.block).fault.get_or_insert(fault);
        }
    }
}

unsafe fn attempt(thread: &mut Thread, unit: Unit, args: &[u64], rets: *mut u64) -> Result<(), String> {
    // SAFETY: as in `machine::call`; borrows of the block end before a thread pauses.
    unsafe {
        let arg = |i: usize| args[i];
        let (block, id) = (thread.block, thread.id);
        let epoch = (*block).shadow.epoch;
        let units = &mut (*block).units;
        match unit {
            Unit::MakeBarrier => {
                let arrivals = i64::from(arg(1) as u32);
                let (flights, fenced) = (vec![], false);
                let bar = Bar { arrivals, pending: arrivals, bytes: 0, phases: 0, maker: id, epoch, fenced, flights };
                units.bars.insert(arg(0), bar);
            }
            Unit::FenceBarriers => {
                units.bars.values_mut().filter(|bar| bar.maker == id).for_each(|bar| bar.fenced = true)
            }
            Unit::FenceProxy => (&mut (*block).fences)[id as usize] += 1,
            Unit::Arrive | Unit::Expect => {
                let bar = units.bar(arg(0), id, epoch)?;
                bar.bytes += if unit == Unit::Expect { i64::from(arg(1) as u32) } else { 0 };
                bar.pending -= 1;
                bar.check()?;
            }
            Unit::TryWait => {
                *rets = 0;
                let over = |bar: &Bar| (bar.phases + 1) & 1 == i64::from(arg(1) as u32 & 1);
                if !over(units.bar(arg(0), id, epoch)?) {
                    land(block, arg(0))?;
                }
                let bar = (*block).units.bar(arg(0), id, epoch)?;
                if !over(bar) {
                    thread.pause();
                    return Ok(());
                }
                (*block).progress += 1;
                let last = bar.phases - 1;
                (&mut (*block).observed)[id as usize].insert(arg(0), last);
                (*block).shadow.observe(arg(0), last);
                *rets = 1;
            }
            Unit::Replace { at, bytes, of_dim } => {
                watch(thread, arg(0), MAP_BYTES, true);
                let (dim, value) = if of_dim { (arg(1) as u32 as usize, arg(2)) } else { (0, arg(1)) };
                let to = (arg(0) + (at + bytes * dim) as u64) as *mut u8;
                ptr::copy_nonoverlapping(ptr::from_ref(&value).cast(), to, bytes);
            }
            Unit::PublishMap => {
                watch(thread, arg(1), MAP_BYTES, false);
                let publish = |_: &mut Block, args: &[Vec<u64>]| {
                    ptr::copy_nonoverlapping(args[0][1] as *const u8, args[0][0] as *mut u8, MAP_BYTES);
                    Ok(vec![vec![]; args.len()])
                };
                meet(thread, 32, args, publish)?;
            }
            Unit::AcquireMap => thread.acquired = arg(0),
            Unit::CopyTile => copy(thread, [arg(0), arg(1), arg(2)], [arg(3) as u32, arg(4) as u32])?,
            Unit::BeginProducts => thread.may_multiply = true,
            Unit::CommitProducts => {
                let group = id as usize / WARPGROUP;
                let next = units.closed[group] + 1;
                // The first of the warpgroup's threads closes it.
                for product in units.groups[group].iter_mut().filter(|product| product.closed.is_none()) {
                    (product.closed, units.closed[group]) = (Some(next), next);
                }
            }
            Unit::Product => {
                if !thread.may_multiply {
                    return Err(format!("thread {id} begins a product with no fence before it"));
                }
                let begin = |block: &mut Block, args: &[Vec<u64>]| begin(block, id as usize / WARPGROUP, args);
                let sums = meet(thread, WARPGROUP, args, begin)?;
                ptr::copy_nonoverlapping(sums.as_ptr(), rets.cast(), sums.len());
            }
            Unit::AwaitProducts { but } => {
                thread.may_multiply = false;
                let end = |block: &mut Block, args: &[Vec<u64>]| end(block, (id as usize / 32, but), args);
                let sums = meet(thread, 32, args, end)?;
                ptr::copy_nonoverlapping(sums.as_ptr(), rets.cast(), sums.len());
            }
        }
        Ok(())
    }
}

/// Has `size` threads meet; the last one acts on what all brought, for each of them.
unsafe fn meet(
    thread: &mut Thread,
    size: usize,
    args: &[u64],
    act: impl FnOnce(&mut Block, &[Vec<u64>]) -> Result<Vec<Vec<u32>>, String>,
) -> Result<Vec<u32>, String> {
    // SAFETY: as in `machine::call`.
    unsafe {
        let (block, id) = (thread.block, thread.id as usize);
        let place = if size == 32 { (*block).units.groups.len() + id / 32 } else { id / WARPGROUP };
        let own = |block: *mut Block| &mut (&mut (*block).units.meetings)[place];
        let generation = own(block).generation;
        own(block).args.resize(size, vec![]);
        own(block).args[id % size] = args.to_vec();
        own(block).arrived += 1;
        if own(block).arrived == size {
            let args = std::mem::take(&mut own(block).args);
            let rets = act(&mut *block, &args);
            let meeting = own(block);
            (meeting.arrived, meeting.generation) = (0, generation + 1);
            meeting.rets = rets?;
        } else {
            while own(block).generation == generation {
                thread.pause();
            }
        }
        Ok(own(block).rets.get(id % size).cloned().unwrap_or_default())
    }
}

/// Begins to copy a tile.
unsafe fn copy(thread: &mut Thread, [to, bar, map]: [u64; 3], at: [u32; 2]) -> Result<(), String> {
    // SAFETY: as in `machine::call`; the description is the kernel's, in its own memory.
    unsafe {
        let (block, id) = (thread.block, thread.id);
        if thread.acquired != map {
            return Err(format!("thread {id} copies from a matrix whose description it has not acquired"));
        }
        let map = Map::parse(&*(map as *const [u8; MAP_BYTES]))?;
        let block = &mut *block;
        let offset = to.wrapping_sub(block.shared) as usize;
        if !offset.is_multiple_of(1024) {
            return Err(format!("thread {id} copies a tile to byte {offset} of shared memory"));
        }
        block.shadow.begin_tile(id, (offset, map.bytes()), &block.fences)?;
        let epoch = block.shadow.epoch;
        let own = block.units.bar(bar, id, epoch)?;
        if !own.fenced {
            return Err("the copy engine uses a barrier that was not fenced".into());
        }
        own.flights.push((map, at, to));
        if block.copies == Copies::Early { land(block, bar) } else { Ok(()) }
    }
}

/// Ends the copies that count at a barrier.
unsafe fn land(block: *mut Block, at: u64) -> Result<(), String> {
    // SAFETY: as in `machine::call`.
    unsafe {
        let block = &mut *block;
        let Some(bar) = block.units.bars.get_mut(&at) else { return Ok(()) };
        for (map, place, to) in std::mem::take(&mut bar.flights) {
            map.copy(place, to);
            let offset = to.wrapping_sub(block.shared) as usize;
            block.shadow.land_tile((offset, map.bytes()), Landing { bar: at, phase: bar.phases });
            bar.bytes -= map.bytes() as i64;
            bar.check()?;
        }
        Ok(())
    }
}

/// Where the 16 columns of each row of a product's tile lie: two pieces of 16 bytes.
fn pieces(block: &Block, tile: u64, rows: usize) -> impl Iterator<Item = [u64; 2]> + use<> {
    // Descriptors have 18 bits of an address; shared memory begins at a multiple of as many.
    let (first, between, base) = ((tile & 0x3fff) << 4, (tile >> 32 & 0x3fff) << 4, block.shared);
    (0..rows as u64).map(move |row| {
        let at = base + first + row / 8 * between + row % 8 * TILE_ROW as u64;
        [swizzled(at), swizzled(at + 16)]
    })
}

/// Begins a product of a warpgroup.
fn begin(block: &mut Block, group: usize, args: &[Vec<u64>]) -> Result<Vec<Vec<u32>>, String> {
    let count = args[0].len() - 5;
    let tile = args[0][count + 4];
    if args.iter().any(|args| args[count + 4] != tile) || tile >> 62 != 1 {
        return Err("threads of a warpgroup multiply with different tiles, or one that is not swizzled".into());
    }
    let (threads, mut known) = (group * WARPGROUP..(group + 1) * WARPGROUP, 0);
    for at in pieces(block, tile, 2 * count).flatten() {
        let offset = at.wrapping_sub(block.shared) as usize;
        block.shadow.begin_read((offset, 16), &block.observed[threads.clone()], &block.fences, &mut known)?;
    }
    let id = block.units.next;
    block.units.next += 1;
    let args = args.iter().map(|args| args[..count + 4].iter().map(|arg| *arg as u32).collect()).collect();
    block.units.groups[group].push(Product { id, args, tile, results: None, closed: None, waited: 0 });
    if block.copies == Copies::Early {
        // SAFETY: the tile's place was checked above.
        unsafe { multiply(block, group) };
    }
    Ok(vec![vec![id; count]; WARPGROUP])
}

/// Does what is left of a warpgroup's products, in order.
unsafe fn multiply(block: &mut Block, group: usize) {
    for i in 0..block.units.groups[group].len() {
        let (before, rest) = block.units.groups[group].split_at(i);
        let product = &rest[0];
        if product.results.is_some() {
            continue;
        }
        let count = product.args[0].len() - 4;
        let half = |word: u32, upper: bool| f32::from_bits(if upper { word & 0xffff_0000 } else { word << 16 });
        let mut a = vec![[0f32; 16]; 64];
        for (lane, args) in product.args.iter().enumerate() {
            for (i, word) in args[count..].iter().enumerate() {
                let (row, column) = (lane / 32 * 16 + lane % 32 / 4 + i % 2 * 8, lane % 4 * 2 + i / 2 * 8);
                (a[row][column], a[row][column + 1]) = (half(*word, false), half(*word, true));
            }
        }
        let columns = |pieces: [u64; 2]| -> [f32; 16] {
            // SAFETY: the places lie in shared memory; `begin` has checked them.
            let bits = |i: usize| unsafe { *((pieces[i / 8] + 2 * (i as u64 % 8)) as *const u16) };
            std::array::from_fn(|i| f32::from_bits(u32::from(bits(i)) << 16))
        };
        let b: Vec<[f32; 16]> = pieces(block, product.tile, 2 * count).map(columns).collect();
        let sums = |(lane, args): (usize, &Vec<u32>)| -> Vec<u32> {
            let sum = |(i, sum): (usize, &u32)| {
                // Sums of an earlier product stand for what that comes to.
                let earlier = before.iter().find(|earlier| earlier.id == *sum).and_then(|e| e.results.as_ref());
                let start = f32::from_bits(earlier.map_or(*sum, |results| results[lane][i]));
                let row = lane / 32 * 16 + lane % 32 / 4 + i % 4 / 2 * 8;
                let column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                (0..16).fold(start, |sum, k| sum + a[row][k] * b[column][k]).to_bits()
            };
            args[..count].iter().enumerate().map(sum).collect()
        };
        let results = product.args.iter().enumerate().map(sums).collect();
        block.units.groups[group][i].results = Some(results);
    }
}

/// A warp has waited for its warpgroup's products in closed groups, but for the last `but`.
fn end(block: &mut Block, (warp, but): (usize, u32), args: &[Vec<u64>]) -> Result<Vec<Vec<u32>>, String> {
    let (group, own) = (warp * 32 / WARPGROUP, warp % (WARPGROUP / 32));
    let last = block.units.closed[group].saturating_sub(but);
    let is_over = |product: &Product| product.closed.is_some_and(|closed| closed <= last);
    if block.units.groups[group].iter().any(is_over) {
        // SAFETY: places of tiles were checked when products began.
        unsafe { multiply(block, group) };
    }
    let of_lane = |(lane, args): (usize, &Vec<u64>)| {
        let known = |(i, sum): (usize, &u64)| {
            let of = block.units.groups[group].iter().find(|product| is_over(product) && product.id == *sum as u32);
            of.and_then(|of| of.results.as_ref()).map_or(*sum as u32, |results| results[own * 32 + lane][i])
        };
        args.iter().enumerate().map(known).collect()
    };
    let rets = args.iter().enumerate().map(of_lane).collect();
    let mut done = vec![];
    block.units.groups[group].retain_mut(|product| {
        product.waited |= u8::from(is_over(product)) << own;
        let over = product.waited == 0xf;
        if over {
            done.push((product.tile, 2 * (product.args[0].len() - 4)));
        }
        !over
    });
    for (tile, rows) in done {
        for at in pieces(block, tile, rows).flatten() {
            block.shadow.end_read((at.wrapping_sub(block.shared) as usize, 16));
        }
    }
    Ok(rets)
}
