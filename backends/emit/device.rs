//! The emitter on a GPU: a kernel's header, who a thread is, shared memory, barriers and shuffles.
//!
//! ```text
//! llvm.func @k(%0: !llvm.ptr<1>, %1: !llvm.ptr<1>, %2: !llvm.ptr<1>) attributes {nvvm.kernel, nvvm.reqntid = ...}
//!                every argument of the launch, then the step
//! ```
//!
//! A block of threads is to the plan what a worker is on a CPU: [`KernelArgs::thread`] is the block's number. All pointers are
//! generic; where they come from is in the text, and LLVM infers address spaces from there.

use super::{Emitter, F32, I1, I32, I64, KernelArgs, PTR, Ty, Val};
use mansard_ir::plan::Kernel;
use std::fmt::Write;

/// Threads that execute together.
pub const WARP: usize = 32;

/// What is known of a GPU function under construction.
pub(super) struct Device {
    /// Threads of a block.
    threads: usize,
    /// Bytes of shared memory in use, and the most there ever were.
    shared: (usize, usize),
    /// Where shared memory begins.
    base: Val,
    /// `i64`: this thread in its block.
    thread: Val,
    /// Launches overlap: a block may begin before earlier launches are done.
    overlaps: bool,
}

impl Emitter {
    /// Opens the GPU function of `kernel`, for blocks of `threads` threads, with so many arguments. Gives their addresses.
    /// Where launches overlap, the next one may begin at once, and this one must [`Emitter::await_launches`].
    pub fn device(
        kernel: &Kernel,
        arguments: usize,
        (threads, overlaps): (usize, bool),
    ) -> (Emitter, KernelArgs, Vec<Val>) {
        let mut e = Emitter { next: arguments as u32 + 1, groups: kernel.groups.clone(), ..Emitter::empty() };
        let parameters: Vec<String> = (0..=arguments).map(|i| format!("%{i}: !llvm.ptr<1>")).collect();
        let (name, parameters) = (&kernel.name, parameters.join(", "));
        let attributes = format!("nvvm.kernel, nvvm.reqntid = array<i32: {threads}, 1, 1>, nvvm.minctasm = 1 : i32");
        let _ = writeln!(e.text, "llvm.func @{name}({parameters}) attributes {{{attributes}}} {{");
        e.entry = e.text.len();
        let generic =
            |e: &mut Emitter, i| e.op(PTR, format_args!("llvm.addrspacecast %{i} : !llvm.ptr<1> to !llvm.ptr"));
        let mut pointers: Vec<Val> = (0..=arguments).map(|i| generic(&mut e, i)).collect();
        let shared = e.fresh();
        e.line(format_args!("%{shared} = llvm.mlir.addressof @shared : !llvm.ptr<3>"));
        let base = e.op(PTR, format_args!("llvm.addrspacecast %{shared} : !llvm.ptr<3> to !llvm.ptr"));
        let [thread, block, blocks] = ["tid", "ctaid", "nctaid"].map(|name| {
            let value = e.intrinsic(&format!("llvm.nvvm.read.ptx.sreg.{name}.x"), &[], I32);
            e.convert("extui", value, I64)
        });
        e.device = Some(Device { threads, shared: (0, 0), base, thread, overlaps });
        if overlaps {
            e.act("llvm.nvvm.griddepcontrol.launch.dependents", &[]);
        }
        let step = pointers.pop().unwrap_or(base);
        (e, KernelArgs { args: step, step, thread: block, threads: blocks }, pointers)
    }

    fn on_device(&self) -> &Device {
        match &self.device {
            Some(device) => device,
            None => unreachable!("only kernels of GPUs have threads"),
        }
    }

    /// Threads of a block.
    pub fn block_threads(&self) -> usize {
        self.on_device().threads
    }

    /// `i64`: this thread in its block.
    pub fn thread(&self) -> Val {
        self.on_device().thread
    }

    /// `i64`: this thread in its warp, and the warp in its block.
    pub fn lane_and_warp(&mut self) -> (Val, Val) {
        let (thread, last) = (self.thread(), self.i64(WARP as i64 - 1));
        (self.and(thread, last), self.shr(thread, WARP.trailing_zeros().into()))
    }

    /// So many bytes of the block's shared memory, at a multiple of 128.
    pub fn shared(&mut self, bytes: usize) -> Val {
        let Some(device) = &mut self.device else { unreachable!("only kernels of GPUs have shared memory") };
        let (at, base) = (device.shared.0, device.base);
        device.shared.0 = (at + bytes).next_multiple_of(128);
        device.shared.1 = device.shared.1.max(device.shared.0);
        self.gep_const(base, at)
    }

    /// So many bytes of it at a multiple of `align`, a multiple of 128 itself.
    pub fn shared_aligned(&mut self, bytes: usize, align: usize) -> Val {
        if let Some(device) = &mut self.device {
            device.shared.0 = device.shared.0.next_multiple_of(align);
        }
        self.shared(bytes)
    }

    /// Gives back all shared memory that `body` takes. It must end with a barrier.
    pub fn scoped<R>(&mut self, body: impl FnOnce(&mut Emitter) -> R) -> R {
        let before = self.on_device().shared.0;
        let result = body(self);
        if let Some(device) = &mut self.device {
            device.shared.0 = before;
        }
        result
    }

    /// Where the next bytes of shared memory would be.
    pub fn shared_mark(&self) -> usize {
        self.on_device().shared.0
    }

    /// Has `body` take shared memory from a mark on, over whatever was taken there: for one of two branches.
    pub fn shared_over<R>(&mut self, mark: usize, body: impl FnOnce(&mut Emitter) -> R) -> R {
        self.scoped(|e| {
            if let Some(device) = &mut e.device {
                device.shared.0 = mark;
            }
            body(e)
        })
    }

    /// The most bytes of shared memory that the function ever uses.
    pub fn shared_bytes(&self) -> usize {
        self.device.as_ref().map_or(0, |device| device.shared.1)
    }

    /// Every thread of the block waits for all others, and sees what they wrote.
    pub fn barrier(&mut self) {
        let all = self.int(I32, 0);
        self.act("llvm.nvvm.barrier.cta.sync.aligned.all", &[all]);
    }

    /// Every lane of the warp waits for all others, and sees what they wrote.
    pub fn warp_barrier(&mut self) {
        let all = self.int(I32, -1);
        self.act("llvm.nvvm.bar.warp.sync", &[all]);
    }

    /// Waits until all earlier launches are done and what they wrote is seen. Until then a block may read
    /// nothing but the step and weights, and write nothing.
    pub fn await_launches(&mut self) {
        if self.on_device().overlaps {
            self.act("llvm.nvvm.griddepcontrol.wait", &[]);
        }
    }

    /// What this thread wrote before is seen by every thread of the GPU that sees what it writes next, and the other way round.
    pub fn fence(&mut self) {
        self.line(format_args!("llvm.fence syncscope(\"device\") acq_rel"));
    }

    /// Begins to copy 8 or 16 bytes to shared memory; see [`Emitter::await_copies`].
    pub fn copy_async(&mut self, to: Val, from: Val, bytes: usize) {
        let [to, from] = [(to, 3), (from, 1)].map(|(pointer, space)| self.in_space(pointer, space));
        // What is read once has no use for the first-level cache.
        let how = if bytes == 16 { "cg" } else { "ca" };
        self.line(format_args!(
            "llvm.call_intrinsic \"llvm.nvvm.cp.async.{how}.shared.global.{bytes}\"(%{to}, %{from}) : \
             (!llvm.ptr<3>, !llvm.ptr<1>) -> ()"
        ));
    }

    /// Closes a group of this thread's copies.
    pub fn commit_copies(&mut self) {
        self.act("llvm.nvvm.cp.async.commit.group", &[]);
    }

    /// Waits until all but the last `but` groups of this thread's copies are there, for itself alone.
    pub fn await_copies(&mut self, but: usize) {
        let but = self.int(I32, but as i64);
        self.act("llvm.nvvm.cp.async.wait.group", &[but]);
    }

    /// The value that the lane has whose number differs in these bits. All lanes of the warp take part.
    pub fn across(&mut self, value: Val, bits: usize) -> Val {
        let name = if value.ty == F32 { "f32" } else { "i32" };
        let (all, bits, clamp) = (self.int(I32, -1), self.int(I32, bits as i64), self.int(I32, WARP as i64 - 1));
        self.intrinsic(&format!("llvm.nvvm.shfl.sync.bfly.{name}"), &[all, value, bits, clamp], value.ty)
    }

    /// Runs `body` for the numbers below `count` that are this thread's: its own, and every so many threads further.
    pub fn strided(&mut self, count: usize, body: impl FnOnce(&mut Emitter, Val)) {
        let (thread, end, threads) = (self.thread(), self.i64(count as i64), self.block_threads());
        if count <= threads {
            let mine = self.cmp(super::Cmp::Lt, thread, end);
            return self.when(mine, |e| body(e, thread));
        }
        self.repeat(thread, end, threads as i64, body);
    }

    /// Loads a pointer to memory that, on a GPU, is the device's.
    pub(super) fn load_pointer(&mut self, at: Val) -> Val {
        if self.device.is_none() {
            return self.load(at, PTR, 8);
        }
        let id = self.fresh();
        self.line(format_args!("%{id} = llvm.load {at} {{alignment = 8 : i64}} : !llvm.ptr -> !llvm.ptr<1>"));
        self.op(PTR, format_args!("llvm.addrspacecast %{id} : !llvm.ptr<1> to !llvm.ptr"))
    }

    /// `sum + the products of four bytes each`: weight codes, signed or not, times signed activations.
    pub fn dot4(&mut self, signed: bool, codes: Val, x: Val, sum: Val) -> Val {
        let name = if signed { "llvm.nvvm.idp4a.s.s" } else { "llvm.nvvm.idp4a.u.s" };
        self.intrinsic(name, &[codes, x, sum], I32)
    }

    /// A product of matrix fragments by a warp: 16 rows of `a` and 8 columns of `b`, added to four elements a lane.
    pub fn matrix_product(&mut self, name: &str, a: &[Val], b: &[Val], c: [Val; 4]) -> [Val; 4] {
        let ty = c[0].ty;
        let args: Vec<String> = a.iter().chain(b).chain(&c).map(Val::to_string).collect();
        let types: Vec<String> = a.iter().chain(b).chain(&c).map(|v| v.ty.to_string()).collect();
        let (args, types, four) =
            (args.join(", "), types.join(", "), format!("!llvm.struct<({ty}, {ty}, {ty}, {ty})>"));
        let id = self.fresh();
        self.line(format_args!("%{id} = llvm.call_intrinsic \"llvm.nvvm.mma.{name}\"({args}) : ({types}) -> {four}"));
        [0, 1, 2, 3].map(|i| self.op(ty, format_args!("llvm.extractvalue %{id}[{i}] : {four}")))
    }

    /// Four matrices of 8 x 8 halves from shared memory, each transposed; lanes `8 i ..` bring the places of the rows of matrix `i`.
    /// Lane `4 g + t` gets two halves of each: column `g` of rows `2 t` and `2 t + 1`.
    pub fn load_matrices(&mut self, at: Val) -> [Val; 4] {
        let (at, id, four) = (self.in_space(at, 3), self.fresh(), "!llvm.struct<(i32, i32, i32, i32)>");
        self.line(format_args!(
            "%{id} = llvm.call_intrinsic \"llvm.nvvm.ldmatrix.sync.aligned.m8n8.x4.trans.b16.p3\"(%{at}) : \
             (!llvm.ptr<3>) -> {four}"
        ));
        [0, 1, 2, 3].map(|i| self.op(I32, format_args!("llvm.extractvalue %{id}[{i}] : {four}")))
    }

    /// Compares floats: `ogt`, `oge`, `oeq`...
    pub fn cmp_float(&mut self, how: &str, a: Val, b: Val) -> Val {
        self.op(I1.x(a.ty.lanes), format_args!("arith.cmpf {how}, {a}, {b} : {}", a.ty))
    }

    /// Shift by a variable: `arith.shrui`, `arith.shli`.
    pub fn shift(&mut self, name: &str, a: Val, by: Val) -> Val {
        self.op(a.ty, format_args!("{name} {a}, {by} : {}", a.ty))
    }

    /// The integer `a` in another width, its upper bits zero.
    pub fn resize(&mut self, a: Val, to: Ty) -> Val {
        match (a.ty, to) {
            (I64, I32) => self.convert("trunci", a, I32),
            (from, to) if from == to => a,
            _ => self.convert("extui", a, to),
        }
    }
}
