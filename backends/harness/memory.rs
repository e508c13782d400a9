//! Values <-> bytes as kernels see them.

use super::samples::Random;
use mansard_ir::decode;
use mansard_ir::eval::{Cache, Step, Tensor, Value};
use mansard_ir::formats::to_e4m3;
use mansard_ir::layout::{
    A8, CACHE_BLOCK, STRIP, cache_block_bytes, cache_offset, cache_scales, cache_scales_bytes, row_bytes,
};
use mansard_ir::plan::{CacheGroup, StepArgs};
use mansard_ir::{DType, Dim, Type};
use std::sync::Arc;

/// Most tokens of an attention tile.
const TILE: usize = 50;
/// Cache lines of canary on either side of a buffer.
pub const GUARD: usize = 4;
const CANARY: u8 = 0xA5;
/// Garbage: NaN as f32, -1 as i32.
const PADDING: u8 = 0xFF;
/// A cache block that is not there: an address far from all memory.
const NOWHERE: i32 = i32::MAX;
/// Garbage of a cache, finite in every float format: stale rows never hold NaNs.
const STALE: u8 = 0x55;

#[repr(align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

/// One argument's memory.
#[derive(Clone)]
pub struct Memory {
    lines: Vec<Line>,
}

impl Memory {
    /// Memory that holds `bytes`.
    pub fn new(bytes: &[u8]) -> Memory {
        let mut lines = vec![Line([CANARY; 64]); bytes.len().div_ceil(64) + 2 * GUARD];
        for (line, bytes) in lines[GUARD..].iter_mut().zip(bytes.chunks(64)) {
            line.0 = [PADDING; 64];
            line.0[..bytes.len()].copy_from_slice(bytes);
        }
        Memory { lines }
    }

    /// Memory for a result of that many rows.
    pub fn for_result(ty: &Type, rows: usize) -> Memory {
        Memory::new(&vec![PADDING; rows.next_multiple_of(STRIP) * row_bytes(ty).expect("rows")])
    }

    /// An activation or cache as kernels read it.
    pub fn of_value(ty: &Type, value: &Value, pool: &Pool) -> Memory {
        let rows: Vec<Vec<u8>> = match (ty, value) {
            (Type::Tensor { dtype, .. }, Value::Tensor(t)) if dtype.planes().is_some() => {
                rows_of(t).map(|row| code_row(row, dtype.planes().unwrap_or(1))).collect()
            }
            (Type::Tensor { dtype: DType::BF16, .. }, Value::Tensor(t)) => rows_of(t).map(bf16_bytes).collect(),
            (Type::Tensor { .. }, Value::Tensor(t)) => rows_of(t).map(f32_bytes).collect(),
            (_, Value::Ints(ints)) => ints.data.iter().map(|x| x.to_le_bytes().to_vec()).collect(),
            (_, Value::Routing(r)) => {
                let chosen = r.chosen.chunks_exact(r.top).zip(r.weights.chunks_exact(r.top));
                chosen
                    .map(|(c, w)| [c.iter().flat_map(|c| (*c as i32).to_le_bytes()).collect(), f32_bytes(w)].concat())
                    .collect()
            }
            (ty, Value::Cache(cache)) => return Memory::new(&pool.bytes(ty, cache)),
            _ => panic!("{} is no {ty}", value.describe()),
        };
        let stride = row_bytes(ty).expect("rows");
        let mut bytes = vec![PADDING; rows.len().next_multiple_of(STRIP) * stride];
        for (row, out) in rows.iter().zip(bytes.chunks_exact_mut(stride)) {
            out[..row.len()].copy_from_slice(row);
        }
        Memory::new(&bytes)
    }

    /// Where a kernel finds it.
    pub fn address(&mut self) -> usize {
        self.lines[GUARD..].as_mut_ptr() as usize
    }

    /// All of it, canaries and all, for a machine that does not share this memory.
    pub fn whole(&self) -> Vec<u8> {
        self.lines.iter().flat_map(|l| l.0).collect()
    }

    /// Takes back what [`Memory::whole`] has become.
    pub fn replace(&mut self, whole: &[u8]) {
        for (line, bytes) in self.lines.iter_mut().zip(whole.as_chunks().0) {
            line.0 = *bytes;
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.lines[GUARD..self.lines.len() - GUARD].iter().flat_map(|l| l.0).collect()
    }

    /// Nothing was written outside.
    pub fn check_canaries(&self, what: &str) {
        let (before, after) = (&self.lines[..GUARD], &self.lines[self.lines.len() - GUARD..]);
        let intact = |lines: &[Line]| lines.iter().all(|l| l.0 == [CANARY; 64]);
        assert!(intact(before), "{what}: written before its beginning");
        assert!(intact(after), "{what}: written beyond its end");
    }

    /// The value in a buffer of `rows` rows, after a look at what lines of codes say of their sums.
    pub fn read_rows(&self, ty: &Type, rows: usize) -> Value {
        let (bytes, stride) = (self.bytes(), row_bytes(ty).expect("rows"));
        if ty.dtype().is_some_and(|dtype| dtype.planes().is_some()) {
            bytes.chunks_exact(stride).take(rows).for_each(check_sums);
        }
        decode::rows(ty, &bytes, rows).unwrap_or_else(|e| panic!("{e}"))
    }

    /// The first `lengths[s]` positions of each sequence.
    pub fn read_cache(&self, ty: &Type, lengths: &[usize], pool: &Pool) -> Value {
        let (bytes, mut cache) = (self.bytes(), Cache::empty(ty, lengths.len()).expect("a cache"));
        for (s, length) in lengths.iter().enumerate() {
            let element = |(block, place)| {
                let block = &bytes[block..][..cache_block_bytes(ty).expect("a cache")];
                decode::cached(ty, block, place).unwrap_or_else(|e| panic!("{e}"))
            };
            let sequence: Vec<f32> = pool.each(ty, s, ty.kept(*length)).into_iter().map(element).collect();
            cache.sequences[s] = Arc::new(sequence);
        }
        Value::Cache(cache)
    }
}

fn rows_of(t: &Tensor) -> impl Iterator<Item = &[f32]> {
    t.data.chunks_exact(t.shape[1..].iter().product())
}

fn f32_bytes(reals: &[f32]) -> Vec<u8> {
    reals.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn bf16_bytes(reals: &[f32]) -> Vec<u8> {
    reals.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
}

fn reals(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Reals that `quantize` or `quantize_fine` made, back as that many planes of codes.
fn code_row(row: &[f32], planes: usize) -> Vec<u8> {
    let mut out = vec![];
    for group in row.chunks_exact(A8::GROUP) {
        let mut left = group.to_vec();
        for _ in 0..planes {
            let scale = left.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
            let code = |x: &f32| if scale > 0.0 { (x / scale).round() as i32 } else { 0 };
            let codes: Vec<i32> = left.iter().map(code).collect();
            out.extend(codes.iter().map(|c| *c as i8 as u8));
            out.extend(a8_figures(scale, &codes));
            left.iter_mut().zip(&codes).for_each(|(x, c)| *x -= scale * *c as f32);
        }
    }
    out
}

/// What follows the codes of a line.
fn a8_figures(scale: f32, codes: &[i32]) -> Vec<u8> {
    let (sum, low) = (codes.iter().sum::<i32>(), codes[..16].iter().sum::<i32>());
    let (high, real) = (sum - low, |sum: i32| (scale * sum as f32).to_le_bytes());
    [scale.to_le_bytes(), (-sum).to_le_bytes(), real(sum), [PADDING; 4], (-low).to_le_bytes(), (-high).to_le_bytes()]
        .into_iter()
        .chain([real(low), real(high)])
        .flatten()
        .collect()
}

/// The sums that a kernel stored beside a row's codes are theirs.
fn check_sums(row: &[u8]) {
    for line in row.chunks_exact(A8::LINE) {
        let codes: Vec<i32> = line[..A8::GROUP].iter().map(|b| *b as i8 as i32).collect();
        let scale = reals(&line[A8::SCALE..A8::SCALE + 4])[0];
        let (expected, found) = (a8_figures(scale, &codes), &line[A8::SCALE..]);
        for at in [A8::NEG_SUM, A8::NEG_SUM_16, A8::NEG_SUM_16 + 4].map(|at| at - A8::SCALE) {
            assert_eq!(found[at..at + 4], expected[at..at + 4], "sum of codes at byte {} of a line", at + A8::SCALE);
        }
        for at in [A8::REAL_SUM, A8::REAL_SUM_16, A8::REAL_SUM_16 + 4].map(|at| at - A8::SCALE) {
            let (found, expected) = (reals(&found[at..at + 4])[0], reals(&expected[at..at + 4])[0]);
            assert!((found - expected).abs() <= 1e-5 * expected.abs(), "{found}, not {expected}, at byte {at}");
        }
    }
}

/// Cache blocks of every sequence in every cache group, in no order.
pub struct Pool {
    groups: Vec<CacheGroup>,
    /// By group, then by sequence.
    tables: Vec<Vec<Vec<i32>>>,
    /// Positions that each sequence had before the step.
    past: Vec<usize>,
    stride: usize,
    blocks: usize,
}

impl Pool {
    /// Cache blocks for the sequences of a step.
    pub fn new(step: &Step, groups: &[CacheGroup]) -> Pool {
        let needed: Vec<usize> = step.sequences.iter().map(|s| (s.past + s.len).div_ceil(CACHE_BLOCK)).collect();
        let blocks = needed.iter().sum::<usize>() + 2;
        let mut random = Random::new(99);
        let mut tables_of = |_: &CacheGroup| {
            let mut free: Vec<i32> = (0..blocks as i32).collect();
            let mut take = || free.swap_remove(random.below(free.len()));
            needed.iter().map(|n| (0..*n).map(|_| take()).collect()).collect()
        };
        Pool {
            groups: groups.to_vec(),
            tables: groups.iter().map(&mut tables_of).collect(),
            past: step.sequences.iter().map(|s| s.past).collect(),
            stride: needed.iter().max().unwrap_or(&0) + 1,
            blocks,
        }
    }

    /// `i32[groups][s][stride]`; entries beyond a sequence's cache blocks are not to be read as such, and those that no
    /// token sees are nowhere.
    fn table(&self) -> Vec<i32> {
        let mut entries = vec![];
        for (group, tables) in self.groups.iter().zip(&self.tables) {
            for (table, past) in tables.iter().zip(&self.past) {
                let window = if group.window > 0 { group.window } else { usize::MAX };
                let unseen = (past + 1).saturating_sub(window) / CACHE_BLOCK;
                entries.extend(std::iter::repeat_n(NOWHERE, unseen));
                entries.extend(&table[unseen..]);
                entries.resize(entries.len().next_multiple_of(self.stride), 0);
            }
        }
        entries
    }

    /// The cache blocks of each sequence in a cache of that type.
    pub fn blocks_of(&self, ty: &Type) -> Vec<Vec<usize>> {
        let group = CacheGroup::index_of(&self.groups, ty).expect("a cache group");
        self.tables[group].iter().map(|table| table.iter().map(|block| *block as usize).collect()).collect()
    }

    fn slot(&self, group: usize, sequence: usize, position: usize) -> usize {
        self.tables[group][sequence][position / CACHE_BLOCK] as usize * CACHE_BLOCK + position % CACHE_BLOCK
    }

    /// The cache block's first byte, and the place in it, of `[length, heads, dim]` of a sequence.
    fn each(&self, ty: &Type, sequence: usize, length: usize) -> Vec<(usize, (usize, usize, usize))> {
        let Type::Cache { heads, dim, .. } = *ty else { panic!("{ty} is no cache") };
        let group = CacheGroup::index_of(&self.groups, ty).expect("a cache group");
        let block_bytes = cache_block_bytes(ty).expect("a cache");
        let of = |position| {
            let slot = self.slot(group, sequence, position);
            let (block, slot) = (slot / CACHE_BLOCK * block_bytes, slot % CACHE_BLOCK);
            (0..heads).flat_map(move |h| (0..dim).map(move |d| (block, (h, slot, d))))
        };
        (0..length).flat_map(of).collect()
    }

    fn bytes(&self, ty: &Type, cache: &Cache) -> Vec<u8> {
        let mut bytes = vec![STALE; self.blocks * cache_block_bytes(ty).expect("a cache")];
        for (s, sequence) in cache.sequences.iter().enumerate() {
            let places = self.each(ty, s, cache.positions(s));
            if ty.kept(1) == 0 {
                store_channels(ty, sequence, &places, &mut bytes);
                continue;
            }
            for (head, places) in sequence.chunks(cache.dim).zip(places.chunks(cache.dim)) {
                store_head(ty, head, places, &mut bytes);
            }
        }
        bytes
    }
}

/// Int4 keys, `[positions, heads, dim]` of whole cache blocks, each element at its place.
fn store_channels(ty: &Type, keys: &[f32], places: &[(usize, (usize, usize, usize))], bytes: &mut [u8]) {
    let Type::Cache { heads, dim, .. } = *ty else { panic!("{ty} is no cache") };
    let width = heads * dim;
    for (keys, places) in keys.chunks(CACHE_BLOCK * width).zip(places.chunks(CACHE_BLOCK * width)) {
        for (channel, (block, (head, _, d))) in places[..width].iter().enumerate() {
            let line: Vec<f32> = keys.iter().skip(channel).step_by(width).copied().collect();
            let (scale, middle, codes) = Cache::int4_channel(&line);
            let figures = block + cache_scales(ty, *head);
            for (at, figure) in [(figures + 2 * d, scale), (figures + 2 * (dim + d), middle)] {
                bytes[at..at + 2].copy_from_slice(&half::f16::from_f32(figure).to_le_bytes());
            }
            for (code, (_, place)) in codes.into_iter().zip(places.iter().skip(channel).step_by(width)) {
                store_nibble(ty, code, (*block, *place), bytes);
            }
        }
    }
}

fn store_nibble(ty: &Type, code: i8, (block, place): (usize, (usize, usize, usize)), bytes: &mut [u8]) {
    let (at, bit) = cache_offset(ty, place).expect("a cache");
    let byte = &mut bytes[block + at];
    *byte = *byte & !(15 << bit) | (code as u8 & 15) << bit;
}

/// One head of a position, each element at its place.
fn store_head(ty: &Type, head: &[f32], places: &[(usize, (usize, usize, usize))], bytes: &mut [u8]) {
    let Type::Cache { dtype, .. } = *ty else { panic!("{ty} is no cache") };
    let (block, (h, slot, _)) = places[0];
    let scale_at = block + cache_scales(ty, h) + cache_scales_bytes(ty) / CACHE_BLOCK * slot;
    // Codes of a head span its largest magnitude.
    let scale = head.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
    let (small, nibbles) = Cache::int4(head);
    match dtype {
        DType::I8 => bytes[scale_at..scale_at + 4].copy_from_slice(&scale.to_le_bytes()),
        DType::I4 => bytes[scale_at..scale_at + 2].copy_from_slice(&half::f16::from_f32(small).to_le_bytes()),
        _ => {}
    }
    for ((x, nibble), (block, place)) in head.iter().zip(nibbles).zip(places) {
        let at = block + cache_offset(ty, *place).expect("a cache").0;
        match dtype {
            DType::F16 => bytes[at..at + 2].copy_from_slice(&half::f16::from_f32(*x).to_le_bytes()),
            DType::BF16 => bytes[at..at + 2].copy_from_slice(&half::bf16::from_f32(*x).to_le_bytes()),
            DType::FP8 => bytes[at] = to_e4m3(*x),
            DType::I8 => bytes[at] = if scale > 0.0 { (x / scale).round() as i8 as u8 } else { 0 },
            DType::I4 => store_nibble(ty, nibble, (*block, *place), bytes),
            _ => bytes[at..at + 4].copy_from_slice(&x.to_le_bytes()),
        }
    }
}

/// The step's arrays.
pub struct StepArrays {
    t: usize,
    s: usize,
    stride: usize,
    tokens: Vec<i32>,
    positions: Vec<i32>,
    rows: Vec<i32>,
    slots: Vec<i32>,
    tiles: Vec<[i32; 4]>,
    tables: Vec<i32>,
    sequences: Vec<[i32; 2]>,
    /// Of all workers.
    pub scratch: Memory,
    scratch_bytes: usize,
    candidates: usize,
}

impl StepArrays {
    /// As a runtime describes `step`, with so many bytes of scratch for each of the workers.
    pub fn new(step: &Step, rows: Vec<i32>, pool: &Pool, (scratch_bytes, workers): (usize, usize)) -> StepArrays {
        let (mut tiles, mut sequences, mut slots) = (vec![], vec![], vec![]);
        for (index, s) in step.sequences.iter().enumerate() {
            sequences.push([s.start as i32, s.len as i32]);
            for first in (0..s.len).step_by(TILE) {
                let count = TILE.min(s.len - first);
                tiles.push([s.start + first, count, index, s.past + s.len].map(|x| x as i32));
            }
        }
        for group in 0..pool.groups.len() {
            for (index, s) in step.sequences.iter().enumerate() {
                slots.extend((s.past..s.past + s.len).map(|p| pool.slot(group, index, p) as i32));
            }
        }
        let (t, s) = (step.tokens(), step.sequences.len());
        let (tokens, positions, tables) = (vec![0; t], step.positions(), pool.table());
        let (stride, scratch) = (pool.stride, Memory::new(&vec![0; scratch_bytes * workers]));
        let candidates = step.candidates;
        StepArrays {
            t,
            s,
            stride,
            tokens,
            positions,
            rows,
            slots,
            tiles,
            tables,
            sequences,
            scratch,
            scratch_bytes,
            candidates,
        }
    }

    /// How many rows an activation of this type has; a step in which no row is asked for by an input asks for as many as
    /// the samples do.
    pub fn rows_of(&self, ty: &Type) -> usize {
        match ty.rows() {
            Some(Dim::T) => self.t,
            Some(Dim::S) => self.s,
            Some(Dim::R) if self.rows.is_empty() => self.t.div_ceil(2),
            Some(Dim::R) => self.rows.len(),
            _ => panic!("{ty} has no rows"),
        }
    }

    /// The step's arguments as bytes for an address in another machine's memory, and the arrays after them.
    pub fn whole(&self, address: usize) -> Vec<u8> {
        let counts = [self.t, self.s, self.rows_of(&Type::f32([Dim::R])), self.tiles.len(), self.stride];
        let mut head: Vec<i64> = counts.iter().map(|n| *n as i64).collect();
        let (tile, sequences) = (self.tiles.as_flattened(), self.sequences.as_flattened());
        let arrays = [&self.tokens, &self.positions, &self.rows, &self.slots, tile, &self.tables, sequences];
        let (mut at, mut tail) = (size_of::<StepArgs>(), vec![]);
        for array in arrays {
            head.push((address + at) as i64);
            at += 4 * array.len();
            tail.extend(array.iter().flat_map(|x| x.to_le_bytes()));
        }
        let scratch = at.next_multiple_of(64);
        head.extend([address + scratch, self.scratch_bytes, self.candidates].map(|n| n as i64));
        tail.resize(tail.len() + scratch - at + self.scratch.whole().len(), 0);
        head.iter().flat_map(|x| x.to_le_bytes()).chain(tail).collect()
    }

    /// What kernels get.
    pub fn args(&mut self) -> StepArgs {
        StepArgs {
            t: self.t as i64,
            s: self.s as i64,
            r: self.rows_of(&Type::f32([Dim::R])) as i64,
            tiles: self.tiles.len() as i64,
            table_stride: self.stride as i64,
            tokens: self.tokens.as_ptr(),
            positions: self.positions.as_ptr(),
            rows: self.rows.as_ptr(),
            slots: self.slots.as_ptr(),
            tile: self.tiles.as_ptr().cast(),
            tables: self.tables.as_ptr(),
            sequences: self.sequences.as_ptr().cast(),
            scratch: self.scratch.address() as *mut u8,
            scratch_bytes: self.scratch_bytes as i64,
            candidates: self.candidates as i64,
        }
    }
}

/// Equal within `tolerance` times the largest expected value.
pub fn compare(found: &Value, expected: &Value, tolerance: f64) -> Result<(), String> {
    match (found, expected) {
        (Value::Tensor(f), Value::Tensor(e)) if f.shape == e.shape => close(&f.data, &e.data, f.width(), tolerance),
        (Value::Cache(f), Value::Cache(e)) => {
            f.sequences.iter().zip(&e.sequences).enumerate().try_for_each(|(s, (f, e))| {
                close(f, e, expected.cache().map_or(1, |c| c.dim), tolerance).map_err(|d| format!("sequence {s}: {d}"))
            })
        }
        (Value::Routing(f), Value::Routing(e)) if f.chosen == e.chosen => {
            close(&f.weights, &e.weights, e.top, tolerance)
        }
        _ => Err(format!("{found:?}, not {expected:?}")),
    }
}

fn close(found: &[f32], expected: &[f32], width: usize, tolerance: f64) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{} values, not {}", found.len(), expected.len()));
    }
    let most = expected.iter().fold(0f64, |m, x| m.max(x.abs() as f64));
    let off = |(_, (f, e)): &(usize, (&f32, &f32))| {
        let difference = (**f as f64 - **e as f64).abs();
        difference.is_nan() || difference > tolerance * most
    };
    let wrong: Vec<_> = found.iter().zip(expected).enumerate().filter(off).collect();
    let Some((i, (f, e))) = wrong.first() else { return Ok(()) };
    let worst = wrong.iter().map(|(_, (f, e))| (**f as f64 - **e as f64).abs() / most).fold(0.0, f64::max);
    let (count, all) = (wrong.len(), found.len());
    let first = format!("row {} column {}: {f}, not {e}", i / width, i % width);
    Err(format!("{count} of {all} values are off, the first at {first}; largest {most}, worst {worst:.2e} of it"))
}
