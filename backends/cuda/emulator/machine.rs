//! The emulated GPU: blocks, threads that wait for one another, and what each intrinsic does.

use super::retarget::Code;
use super::shadow::{Observed, Shadow};
use super::units::{self, Unit, Units};
use crate::cuda::{SHARED_LIMIT, THREADS};
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use mansard_ir::sample::Random;
use std::cell::Cell;
use std::collections::VecDeque;
use std::ptr;

/// In which order warps, and lanes of a warp, get their turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Order {
    Ascending,
    Descending,
    /// Shuffled anew for every sweep.
    Random(u64),
}

/// When an asynchronous copy is done: at once, or as late as a wait allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Copies {
    Early,
    Late,
}

/// How a launch goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Schedule {
    pub order: Order,
    pub copies: Copies,
}

/// An intrinsic, or an access that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Thread,
    Block,
    Blocks,
    Shared,
    Barrier,
    WarpBarrier,
    Shuffle,
    Dot4 {
        signed: bool,
    },
    Mma(Matrix),
    Load,
    Store,
    Copy {
        bytes: usize,
    },
    Commit,
    AwaitCopies,
    /// Two floats rounded to f16 or bf16, the first in the upper half.
    RoundPair {
        f16: bool,
    },
    /// Four transposed matrices of 8 x 8 halves from shared memory.
    LoadMatrices,
    /// What concerns launches that overlap: here one ends before the next begins.
    Nothing,
    /// Of Hopper's units, with so many arguments.
    Unit(Unit, usize),
}

/// A product of matrix fragments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Matrix {
    /// 16 x 8 x 16 of f16 or bf16, sums in f32.
    Halves { f16: bool },
    /// 16 x 8 x 32 of bytes, those of `b` signed, sums in i32.
    Bytes { signed: bool },
}

/// The op of an intrinsic with so many arguments, by name.
pub(super) fn op(name: &str, arguments: usize) -> Option<Op> {
    Some(match name {
        "llvm.nvvm.read.ptx.sreg.tid.x" => Op::Thread,
        "llvm.nvvm.read.ptx.sreg.ctaid.x" => Op::Block,
        "llvm.nvvm.read.ptx.sreg.nctaid.x" => Op::Blocks,
        "emulator.shared" => Op::Shared,
        "llvm.nvvm.barrier.cta.sync.aligned.all" => Op::Barrier,
        "llvm.nvvm.bar.warp.sync" => Op::WarpBarrier,
        "llvm.nvvm.shfl.sync.bfly.f32" | "llvm.nvvm.shfl.sync.bfly.i32" => Op::Shuffle,
        "llvm.nvvm.idp4a.s.s" => Op::Dot4 { signed: true },
        "llvm.nvvm.idp4a.u.s" => Op::Dot4 { signed: false },
        "llvm.nvvm.mma.m16n8k32.row.col.u8.s8" => Op::Mma(Matrix::Bytes { signed: false }),
        "llvm.nvvm.mma.m16n8k32.row.col.s8" => Op::Mma(Matrix::Bytes { signed: true }),
        "llvm.nvvm.mma.m16n8k16.row.col.bf16" => Op::Mma(Matrix::Halves { f16: false }),
        "llvm.nvvm.mma.m16n8k16.row.col.f32.f32" => Op::Mma(Matrix::Halves { f16: true }),
        "llvm.nvvm.ldmatrix.sync.aligned.m8n8.x4.trans.b16.p3" => Op::LoadMatrices,
        "llvm.nvvm.cp.async.cg.shared.global.16" => Op::Copy { bytes: 16 },
        "llvm.nvvm.cp.async.ca.shared.global.8" => Op::Copy { bytes: 8 },
        "llvm.nvvm.cp.async.commit.group" => Op::Commit,
        "llvm.nvvm.cp.async.wait.group" => Op::AwaitCopies,
        "llvm.nvvm.ff2bf16x2.rn" => Op::RoundPair { f16: false },
        "llvm.nvvm.ff2f16x2.rn" => Op::RoundPair { f16: true },
        "llvm.nvvm.griddepcontrol.wait" | "llvm.nvvm.griddepcontrol.launch.dependents" => Op::Nothing,
        _ => Op::Unit(units::unit(name)?, arguments),
    })
}

/// Slots of an intrinsic's arguments and results.
pub(super) const SLOTS: usize = 16;

type Slots = [u64; SLOTS];

struct Warp {
    /// Lanes that have arrived, and how often all have.
    arrived: u32,
    generation: u64,
    args: Box<[Slots; 32]>,
    rets: Box<[Slots; 32]>,
}

pub(super) struct Block {
    id: u32,
    blocks: u32,
    threads: u32,
    /// Where its shared memory begins.
    pub(super) shared: u64,
    pub(super) shadow: Shadow,
    warps: Vec<Warp>,
    waiting: u32,
    ops: *const [Op],
    pub(super) copies: Copies,
    pub(super) units: Units,
    /// By thread: what it has waited for, and how often it has fenced the asynchronous proxy.
    pub(super) observed: Vec<Observed>,
    pub(super) fences: Vec<u32>,
    pub(super) progress: u64,
    pub(super) fault: Option<String>,
}

pub(super) struct Thread {
    pub(super) id: u32,
    pub(super) block: *mut Block,
    yielder: *const Yielder<(), ()>,
    /// The description of a matrix that it has acquired.
    pub(super) acquired: u64,
    /// It has fenced its registers for products.
    pub(super) may_multiply: bool,
    /// Copies that no group holds yet, and groups that were not waited for.
    open: Vec<Flight>,
    groups: VecDeque<Vec<Flight>>,
}

/// An asynchronous copy under way.
#[derive(Clone, Copy)]
struct Flight {
    to: u64,
    from: u64,
    bytes: usize,
}

thread_local! {
    static CURRENT: Cell<*mut Thread> = const { Cell::new(ptr::null_mut()) };
    static STACKS: Cell<Vec<DefaultStack>> = const { Cell::new(vec![]) };
}

/// What retargeted code calls: op `id` with packed arguments, which leaves its results packed likewise.
///
/// # Safety
/// Called by code of a running launch alone, with arguments as the op's declaration has them.
pub(super) unsafe extern "C" fn call(id: u32, args: *const u64, rets: *mut u64) {
    // SAFETY: a launch sets the current thread before it resumes one, and both outlive the call. Threads are coroutines of
    // one system thread, so nobody else uses the block meanwhile; borrows end before a thread yields.
    unsafe {
        let thread = &mut *CURRENT.with(Cell::get);
        let block = thread.block;
        let op = (&*(*block).ops)[id as usize];
        if !matches!(op, Op::Load | Op::Store | Op::Unit(Unit::TryWait, _)) {
            (*block).progress += 1;
        }
        let arg = |i: usize| *args.add(i);
        match op {
            Op::Thread => *rets = thread.id.into(),
            Op::Block => *rets = (*block).id.into(),
            Op::Blocks => *rets = (*block).blocks.into(),
            Op::Shared => *rets = (*block).shared,
            Op::Barrier => barrier(thread),
            Op::Shuffle | Op::Mma(_) | Op::WarpBarrier => collective(thread, op, args, rets),
            Op::Dot4 { signed } => *rets = dot4(signed, arg(0) as u32, arg(1) as u32, arg(2) as u32).into(),
            Op::Load => watch(thread, arg(0), arg(1) as usize, false),
            Op::Store => watch(thread, arg(0), arg(1) as usize, true),
            Op::Copy { bytes } => begin(thread, Flight { to: arg(0), from: arg(1), bytes }),
            Op::Commit => {
                let group = std::mem::take(&mut thread.open);
                thread.groups.push_back(group);
            }
            Op::AwaitCopies => {
                while thread.groups.len() > arg(0) as u32 as usize {
                    let group = thread.groups.pop_front().unwrap_or_default();
                    group.into_iter().for_each(|flight| land(thread, flight));
                }
            }
            Op::LoadMatrices => {
                watch(thread, arg(0), 16, false);
                collective(thread, op, args, rets);
            }
            Op::RoundPair { f16 } => {
                let half = |i: usize| {
                    let x = f32::from_bits(arg(i) as u32);
                    u64::from(if f16 { half::f16::from_f32(x).to_bits() } else { half::bf16::from_f32(x).to_bits() })
                };
                *rets = half(0) << 16 | half(1);
            }
            Op::Nothing => {}
            Op::Unit(unit, arguments) => units::call(thread, (unit, arguments), args, rets),
        }
    }
}

impl Thread {
    /// Lets others run.
    pub(super) unsafe fn pause(&mut self) {
        // SAFETY: the yielder is that of the coroutine that runs.
        unsafe { (*self.yielder).suspend(()) };
        CURRENT.with(|current| current.set(self));
    }
}

unsafe fn barrier(thread: &mut Thread) {
    let block = thread.block;
    // SAFETY: as in `call`.
    unsafe {
        let epoch = (*block).shadow.epoch;
        (*block).waiting += 1;
        if (*block).waiting == (*block).threads {
            (*block).waiting = 0;
            (*block).shadow.pass_all();
            return;
        }
        loop {
            thread.pause();
            if (*block).shadow.epoch != epoch {
                return;
            }
        }
    }
}

/// Records an access to shared memory.
pub(super) unsafe fn watch(thread: &mut Thread, at: u64, size: usize, writes: bool) {
    // SAFETY: as in `call`.
    let block = unsafe { &mut *thread.block };
    let (offset, id) = (at.wrapping_sub(block.shared), thread.id as usize);
    if offset < SHARED_LIMIT as u64 && block.fault.is_none() {
        let of_thread = (&block.observed[id], block.fences[id]);
        block.fault = block.shadow.touch(thread.id, (offset as usize, size), writes, of_thread).err();
    }
}

/// Begins an asynchronous copy.
unsafe fn begin(thread: &mut Thread, flight: Flight) {
    // SAFETY: as in `call`; addresses are those of the kernel's copy.
    unsafe {
        watch(thread, flight.to, flight.bytes, true);
        let block = &mut *thread.block;
        let offset = flight.to.wrapping_sub(block.shared);
        if !flight.to.is_multiple_of(flight.bytes as u64) || !flight.from.is_multiple_of(flight.bytes as u64) {
            block
                .fault
                .get_or_insert(format!("thread {} copies {} bytes from or to odd places", thread.id, flight.bytes));
        }
        if block.fault.is_none() {
            block.shadow.begin(offset as usize, flight.bytes);
            if block.copies == Copies::Early {
                ptr::copy_nonoverlapping(flight.from as *const u8, flight.to as *mut u8, flight.bytes);
            }
            thread.open.push(flight);
        }
    }
}

/// Ends an asynchronous copy.
unsafe fn land(thread: &Thread, flight: Flight) {
    // SAFETY: as in `call`; `begin` has checked the place.
    unsafe {
        let block = &mut *thread.block;
        if block.copies == Copies::Late {
            ptr::copy_nonoverlapping(flight.from as *const u8, flight.to as *mut u8, flight.bytes);
        }
        block.shadow.land(flight.to.wrapping_sub(block.shared) as usize, flight.bytes);
    }
}

/// An op that all lanes of a warp do together.
unsafe fn collective(thread: &mut Thread, op: Op, args: *const u64, rets: *mut u64) {
    let (block, lane) = (thread.block, thread.id as usize % 32);
    let index = thread.id as usize / 32;
    // SAFETY: as in `call`; there are SLOTS slots on either side.
    unsafe {
        let warp = |block: *mut Block| &mut (&mut (*block).warps)[index];
        let own = warp(block);
        let generation = own.generation;
        ptr::copy_nonoverlapping(args, own.args[lane].as_mut_ptr(), SLOTS);
        own.arrived |= 1 << lane;
        if own.arrived == u32::MAX {
            match op {
                Op::WarpBarrier => (*block).shadow.pass(index),
                op => together(op, &own.args, &mut own.rets),
            }
            own.arrived = 0;
            own.generation += 1;
        } else {
            while warp(block).generation == generation {
                thread.pause();
            }
        }
        ptr::copy_nonoverlapping(warp(block).rets[lane].as_ptr(), rets, SLOTS);
    }
}

fn together(op: Op, args: &[Slots; 32], rets: &mut [Slots; 32]) {
    match op {
        Op::Mma(Matrix::Halves { f16 }) => mma_halves(f16, args, rets),
        Op::LoadMatrices => load_matrices(args, rets),
        Op::Mma(Matrix::Bytes { signed }) => mma_bytes(signed, args, rets),
        _ => (0..32).for_each(|lane| rets[lane][0] = args[lane ^ (args[lane][2] as usize & 31)][1]),
    }
}

/// `d[16, 8] = a[16, 16] b[16, 8] + c[16, 8]`: lane `4 g + t` has rows `g` and `g + 8` of `a` and `c`, column `g` of `b`.
fn mma_halves(f16: bool, args: &[Slots; 32], rets: &mut [Slots; 32]) {
    let half = |word: u64, upper: bool| {
        let bits = (word as u32 >> if upper { 16 } else { 0 }) as u16;
        if f16 { half::f16::from_bits(bits).to_f32() } else { half::bf16::from_bits(bits).to_f32() }
    };
    let (mut a, mut b) = ([[0f32; 16]; 16], [[0f32; 8]; 16]);
    for (lane, args) in args.iter().enumerate() {
        let (g, t) = (lane / 4, lane % 4);
        for (upper, k) in [(false, 2 * t), (true, 2 * t + 1)] {
            (a[g][k], a[g + 8][k]) = (half(args[0], upper), half(args[1], upper));
            (a[g][k + 8], a[g + 8][k + 8]) = (half(args[2], upper), half(args[3], upper));
            (b[k][g], b[k + 8][g]) = (half(args[4], upper), half(args[5], upper));
        }
    }
    for (lane, rets) in rets.iter_mut().enumerate() {
        let mut sums = [0f32; 4];
        for (i, sum) in sums.iter_mut().enumerate() {
            let (row, column) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
            let start = f32::from_bits(args[lane][6 + i] as u32);
            *sum = (0..16).fold(start, |sum, k| sum + a[row][k] * b[k][column]);
        }
        // A struct of four floats lies packed in the first two slots.
        for (i, pair) in sums.as_chunks::<2>().0.iter().enumerate() {
            rets[i] = u64::from(pair[0].to_bits()) | u64::from(pair[1].to_bits()) << 32;
        }
    }
}

/// `d[16, 8] = a[16, 32] b[32, 8] + c[16, 8]` of words of four bytes: words `t` and `t + 4` of a lane's rows and column.
fn mma_bytes(signed: bool, args: &[Slots; 32], rets: &mut [Slots; 32]) {
    for (lane, rets) in rets.iter_mut().enumerate() {
        let mut sums = [0u32; 4];
        for (i, sum) in sums.iter_mut().enumerate() {
            let (row, column) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
            *sum = (0..8).fold(args[lane][6 + i] as u32, |sum, word| {
                let (a, b) = (&args[4 * (row % 8) + word % 4], &args[4 * column + word % 4]);
                dot4(signed, a[row / 8 + word / 4 * 2] as u32, b[4 + word / 4] as u32, sum)
            });
        }
        for (i, pair) in sums.as_chunks::<2>().0.iter().enumerate() {
            rets[i] = u64::from(pair[0]) | u64::from(pair[1]) << 32;
        }
    }
}

/// Lane `8 i + r` has the place of row `r` of matrix `i`; lane `4 g + t` gets column `g` of rows `2 t` and `2 t + 1` of each.
fn load_matrices(args: &[Slots; 32], rets: &mut [Slots; 32]) {
    for (lane, rets) in rets.iter_mut().enumerate() {
        let half = |matrix: usize, row: usize| {
            let place = args[8 * matrix + row][0] + 2 * (lane as u64 / 4);
            // SAFETY: each lane has reported its row of 16 bytes; shared memory has room beyond its limit.
            u64::from(unsafe { *(place as *const u16) })
        };
        let word = |i: usize| half(i, 2 * (lane % 4)) | half(i, 2 * (lane % 4) + 1) << 16;
        (rets[0], rets[1]) = (word(0) | word(1) << 32, word(2) | word(3) << 32);
    }
}

fn dot4(signed: bool, a: u32, b: u32, sum: u32) -> u32 {
    let pairs = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
    let product =
        |(a, b): (u8, u8)| (if signed { i32::from(a.cast_signed()) } else { a.into() }) * i32::from(b.cast_signed());
    sum.wrapping_add_signed(pairs.map(product).sum())
}

/// Runs a kernel with a grid of `blocks` blocks, each with so much shared memory.
///
/// # Errors
/// A race, a deadlock, or an access beyond shared memory; after it the kernel's results are worth nothing.
///
/// # Safety
/// The arguments must be those of the kernel.
pub(super) unsafe fn launch(
    code: &Code,
    args: &[u64],
    (blocks, shared): (u32, usize),
    schedule: Schedule,
) -> Result<(), String> {
    let turns = schedule.order;
    let mut random = Random::new(match turns {
        Order::Random(seed) => seed,
        _ => 0,
    });
    for place in order(blocks as usize, turns, &mut random) {
        // Not zero: NaNs, whatever is read of it.
        let mut memory = vec![u128::MAX; 2 * WINDOW / 16];
        let mut block = Box::new(Block {
            id: place as u32,
            blocks,
            threads: THREADS as u32,
            shared: (memory.as_mut_ptr() as u64).next_multiple_of(WINDOW as u64),
            shadow: Shadow::new(shared, THREADS / 32),
            warps: (0..THREADS / 32).map(|_| Warp::new()).collect(),
            waiting: 0,
            ops: code.ops(),
            copies: schedule.copies,
            units: Units::new(THREADS),
            observed: vec![Observed::new(); THREADS],
            fences: vec![0; THREADS],
            progress: 0,
            fault: None,
        });
        // SAFETY: the caller's.
        unsafe { run(&mut block, code, args, turns, &mut random) }
            .map_err(|fault| format!("block {place} of {blocks}, {schedule:?}: {fault}"))?;
    }
    Ok(())
}

impl Warp {
    fn new() -> Warp {
        Warp { arrived: 0, generation: 0, args: Box::new([[0; SLOTS]; 32]), rets: Box::new([[0; SLOTS]; 32]) }
    }
}

fn order(count: usize, order: Order, random: &mut Random) -> Vec<usize> {
    let mut all: Vec<usize> = (0..count).collect();
    match order {
        Order::Ascending => {}
        Order::Descending => all.reverse(),
        Order::Random(_) => (1..count).rev().for_each(|i| all.swap(i, random.below(i + 1))),
    }
    all
}

/// What shared memory begins at a multiple of, so that descriptors of products may hold the lower 18 bits of an address.
const WINDOW: usize = 1 << 18;

/// Of a thread's stack: host code that nobody optimized keeps all its values there. Pages are taken when touched.
const STACK_BYTES: usize = 256 << 10;

type Running = (Coroutine<(), (), (), DefaultStack>, Box<Thread>);

/// Runs one block to its end.
unsafe fn run(block: &mut Block, code: &Code, args: &[u64], turns: Order, random: &mut Random) -> Result<(), String> {
    let mut stacks = STACKS.take();
    let (at, entry, args) = (ptr::from_mut(block), code.entry(), args.as_ptr() as usize);
    let mut start = |id: u32| -> Option<Running> {
        let (open, groups) = (vec![], VecDeque::new());
        let (acquired, may_multiply) = (0, false);
        let mut thread = Box::new(Thread { id, block: at, yielder: ptr::null(), acquired, may_multiply, open, groups });
        let own: *mut Thread = &mut *thread;
        let stack = stacks.pop().unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("memory for a stack"));
        let coroutine = Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
            // SAFETY: the thread outlives its coroutine; the entry takes the kernel's arguments, one a slot.
            unsafe {
                (*own).yielder = yielder;
                entry(args as *const u64);
            }
        });
        Some((coroutine, thread))
    };
    let mut threads: Vec<Option<Running>> = (0..block.threads).map(&mut start).collect();
    let (mut left, mut fault) = (threads.len(), None);
    while left > 0 && fault.is_none() {
        let before = (block.progress, left);
        for warp in order(threads.len() / 32, turns, random) {
            loop {
                let progress = block.progress;
                for lane in order(32, turns, random) {
                    let slot = &mut threads[32 * warp + lane];
                    let Some((coroutine, thread)) = slot else { continue };
                    CURRENT.with(|current| current.set(&mut **thread));
                    if let CoroutineResult::Return(()) = coroutine.resume(()) {
                        if let Some((coroutine, _)) = slot.take() {
                            stacks.push(coroutine.into_stack());
                        }
                        left -= 1;
                    }
                }
                if block.progress == progress {
                    break;
                }
            }
        }
        fault = block.fault.take();
        if fault.is_none() && before == (block.progress, left) {
            let (waiting, all) = (block.waiting, block.threads);
            fault = Some(format!("deadlock: {left} threads wait, {waiting} of {all} of them at a barrier"));
        }
    }
    // Threads that have not ended cannot be unwound through generated code.
    std::mem::forget(threads);
    STACKS.set(stacks);
    match fault.or_else(|| block.fault.take()).or_else(|| block.units.left()) {
        Some(fault) => Err(fault),
        None => Ok(()),
    }
}
