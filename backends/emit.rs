//! The emitter: typed helpers that write one MLIR function in text form.
//!
//! ```text
//! let x = e.load(p, F32.x(16), 64);      %7 = llvm.load %3 {alignment = 64 : i64} : !llvm.ptr -> vector<16xf32>
//! let y = e.fma(x, x, acc);              %8 = vector.fma %7, %7, %5 : vector<16xf32>
//! ```
//!
//! Memory is `llvm.load` / `llvm.store` on opaque pointers with explicit alignment; control flow is `scf`; the rest is
//! `arith`, `vector`, `math` and LLVM intrinsics. A value knows its type, so no helper takes one twice; ill-typed calls
//! are caught by MLIR's verifier, which every module passes before it is lowered.
//!
//! Kernels have the calling convention of [`mansard_ir::plan`].

mod device;
mod hopper;

pub use device::WARP;
pub use hopper::{MAP_BYTES, MAPS, TILE_ALIGN, TILE_ROW, TileMap, WARPGROUP};

use device::Device;
use mansard_ir::Target;
use mansard_ir::plan::{CacheGroup, Kernel};
use std::fmt::{self, Write};

/// Element type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Scalar {
    I1,
    I8,
    I16,
    I32,
    I64,
    F16,
    BF16,
    F32,
    Ptr,
}

/// A scalar (`lanes == 0`) or a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ty {
    /// Element type.
    pub scalar: Scalar,
    /// Number of lanes, 0 for a scalar.
    pub lanes: usize,
}

macro_rules! scalars {
    ($($name:ident = $scalar:ident),*) => { $(
        #[doc = concat!("The scalar type `", stringify!($name), "`.")]
        pub const $name: Ty = Ty { scalar: Scalar::$scalar, lanes: 0 };
    )* };
}
scalars!(I1 = I1, I8 = I8, I16 = I16, I32 = I32, I64 = I64, F16 = F16, BF16 = BF16, F32 = F32, PTR = Ptr);

impl Ty {
    /// A vector of `lanes` of this scalar.
    pub const fn x(self, lanes: usize) -> Ty {
        Ty { scalar: self.scalar, lanes }
    }

    /// The same shape with another element type.
    pub const fn of(self, scalar: Ty) -> Ty {
        Ty { scalar: scalar.scalar, lanes: self.lanes }
    }

    fn is_float(self) -> bool {
        matches!(self.scalar, Scalar::F16 | Scalar::BF16 | Scalar::F32)
    }
}

impl fmt::Display for Ty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.scalar {
            Scalar::I1 => "i1",
            Scalar::I8 => "i8",
            Scalar::I16 => "i16",
            Scalar::I32 => "i32",
            Scalar::I64 => "i64",
            Scalar::F16 => "f16",
            Scalar::BF16 => "bf16",
            Scalar::F32 => "f32",
            Scalar::Ptr => "!llvm.ptr",
        };
        if self.lanes == 0 { f.write_str(name) } else { write!(f, "vector<{}x{name}>", self.lanes) }
    }
}

/// An SSA value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Val {
    id: u32,
    /// Result number of a loop or branch, -1 for operations with one result.
    part: i32,
    /// Its type.
    pub ty: Ty,
}

impl fmt::Display for Val {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.part < 0 { write!(f, "%{}", self.id) } else { write!(f, "%{}#{}", self.id, self.part) }
    }
}

/// Integer comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

/// Writes one function.
pub struct Emitter {
    text: String,
    next: u32,
    depth: usize,
    constants: Vec<(String, Val)>,
    entry: usize,
    /// The target rounds 16 f32 to bf16 in one instruction.
    pub converts_bf16: bool,
    /// The program's cache groups.
    pub groups: Vec<CacheGroup>,
    /// Set where the function runs on a GPU.
    device: Option<Device>,
}

/// The arguments every kernel has.
#[derive(Clone, Copy, Debug)]
pub struct KernelArgs {
    /// `*const *mut u8`: addresses of the launch's arguments.
    pub args: Val,
    /// `*const StepArgs`.
    pub step: Val,
    /// `i64`: this worker.
    pub thread: Val,
    /// `i64`: workers.
    pub threads: Val,
}

impl Emitter {
    /// Opens the function of `kernel` for `target`.
    pub fn kernel(kernel: &Kernel, target: &Target) -> (Emitter, KernelArgs) {
        let (mut e, args) = Emitter::function(&kernel.name, target);
        e.groups.clone_from(&kernel.groups);
        (e, args)
    }

    /// Opens a function called as kernels are, which reads no cache.
    pub fn function(name: &str, target: &Target) -> (Emitter, KernelArgs) {
        let converts_bf16 = target.computes_bf16();
        let mut e = Emitter { next: 4, converts_bf16, ..Emitter::empty() };
        let _ = writeln!(e.text, "func.func @{name}(%0: !llvm.ptr, %1: !llvm.ptr, %2: i64, %3: i64) {{");
        e.entry = e.text.len();
        let arg = |id, ty| Val { id, part: -1, ty };
        (e, KernelArgs { args: arg(0, PTR), step: arg(1, PTR), thread: arg(2, I64), threads: arg(3, I64) })
    }

    fn empty() -> Emitter {
        let (text, constants, groups) = (String::new(), vec![], vec![]);
        Emitter { text, next: 0, depth: 1, constants, entry: 0, converts_bf16: false, groups, device: None }
    }

    /// Closes the function and gives its text.
    pub fn finish(mut self) -> String {
        self.line(format_args!("{}", if self.device.is_some() { "llvm.return" } else { "return" }));
        self.text.push_str("}\n");
        self.text
    }

    fn line(&mut self, text: fmt::Arguments<'_>) {
        let _ = writeln!(self.text, "{:indent$}{text}", "", indent = 2 * self.depth);
    }

    fn fresh(&mut self) -> u32 {
        self.next += 1;
        self.next - 1
    }

    /// One operation with one result of type `ty`; `rhs` is what stands right of the equals sign.
    pub fn op(&mut self, ty: Ty, rhs: fmt::Arguments<'_>) -> Val {
        let id = self.fresh();
        self.line(format_args!("%{id} = {rhs}"));
        Val { id, part: -1, ty }
    }

    /// One operation without a result.
    pub fn effect(&mut self, text: fmt::Arguments<'_>) {
        self.line(text);
    }

    /// Constants live at the top of the function, once each.
    fn constant(&mut self, ty: Ty, value: String) -> Val {
        let value = if ty.lanes == 0 { value } else { format!("dense<{value}>") };
        let key = format!("arith.constant {value} : {ty}");
        if let Some((_, val)) = self.constants.iter().find(|(k, _)| *k == key) {
            return *val;
        }
        let val = Val { id: self.fresh(), part: -1, ty };
        let line = format!("  %{} = {key}\n", val.id);
        self.text.insert_str(self.entry, &line);
        self.entry += line.len();
        self.constants.push((key, val));
        val
    }

    /// An integer constant of any integer type; every lane of a vector.
    pub fn int(&mut self, ty: Ty, value: i64) -> Val {
        self.constant(ty, value.to_string())
    }

    /// An `i64` constant.
    pub fn i64(&mut self, value: i64) -> Val {
        self.int(I64, value)
    }

    /// A float constant; every lane of a vector.
    pub fn float(&mut self, ty: Ty, value: f32) -> Val {
        // The bit pattern is exact and covers infinities.
        let text = if value.is_finite() { format!("{value:?}") } else { format!("{:#x}", value.to_bits()) };
        // MLIR wants a decimal point.
        let text = if value.is_finite() && !text.contains('.') { text.replacen('e', ".0e", 1) } else { text };
        self.constant(ty, text)
    }

    /// A vector of the integers `first`, `first + 1`...
    pub fn lanes(&mut self, scalar: Ty, lanes: usize, first: usize) -> Val {
        let values: Vec<String> = (first..first + lanes).map(|i| i.to_string()).collect();
        self.constant(scalar.x(lanes), format!("[{}]", values.join(", ")))
    }

    /// The constant `0, 1, 2, ...` of an integer vector type.
    pub fn sequence(&mut self, ty: Ty) -> Val {
        let lanes: Vec<String> = (0..ty.lanes).map(|i| i.to_string()).collect();
        self.constant(ty, format!("[{}]", lanes.join(", ")))
    }

    /// The constant bytes 1, 2, 4, ... 128, again and again.
    pub fn powers(&mut self, lanes: usize) -> Val {
        let values: Vec<String> = (0..lanes).map(|i| (1u8 << (i % 8)).cast_signed().to_string()).collect();
        self.constant(I8.x(lanes), format!("[{}]", values.join(", ")))
    }

    /// The constant bytes of a table, again and again.
    pub fn table(&mut self, table: [u8; 16], lanes: usize) -> Val {
        let values: Vec<String> = (0..lanes).map(|i| table[i % 16].cast_signed().to_string()).collect();
        self.constant(I8.x(lanes), format!("[{}]", values.join(", ")))
    }

    /// A vector of these f32.
    pub fn floats(&mut self, values: &[f32]) -> Val {
        let values: Vec<String> = values.iter().map(|x| format!("{x:?}")).collect();
        self.constant(F32.x(values.len()), format!("[{}]", values.join(", ")))
    }

    fn binary(&mut self, float: &str, int: &str, a: Val, b: Val) -> Val {
        let name = if a.ty.is_float() { float } else { int };
        self.op(a.ty, format_args!("{name} {a}, {b} : {}", a.ty))
    }

    /// Sum.
    pub fn add(&mut self, a: Val, b: Val) -> Val {
        self.binary("arith.addf", "arith.addi", a, b)
    }
    /// Difference.
    pub fn sub(&mut self, a: Val, b: Val) -> Val {
        self.binary("arith.subf", "arith.subi", a, b)
    }
    /// Product.
    pub fn mul(&mut self, a: Val, b: Val) -> Val {
        self.binary("arith.mulf", "arith.muli", a, b)
    }
    /// Quotient; integers are unsigned.
    pub fn div(&mut self, a: Val, b: Val) -> Val {
        self.binary("arith.divf", "arith.divui", a, b)
    }
    /// Unsigned remainder.
    pub fn rem(&mut self, a: Val, b: Val) -> Val {
        self.binary("arith.remf", "arith.remui", a, b)
    }
    /// The larger; for floats, `b` where either is NaN (one instruction on x86).
    pub fn max(&mut self, a: Val, b: Val) -> Val {
        if a.ty.is_float() {
            let m = self.op(I1.x(a.ty.lanes), format_args!("arith.cmpf ogt, {a}, {b} : {}", a.ty));
            return self.select(m, a, b);
        }
        self.binary("", "arith.maxsi", a, b)
    }
    /// The smaller; for floats, `b` where either is NaN.
    pub fn min(&mut self, a: Val, b: Val) -> Val {
        if a.ty.is_float() {
            let m = self.op(I1.x(a.ty.lanes), format_args!("arith.cmpf olt, {a}, {b} : {}", a.ty));
            return self.select(m, a, b);
        }
        self.binary("", "arith.minsi", a, b)
    }
    /// Bitwise and.
    pub fn and(&mut self, a: Val, b: Val) -> Val {
        self.binary("", "arith.andi", a, b)
    }
    /// Bitwise or.
    pub fn or(&mut self, a: Val, b: Val) -> Val {
        self.binary("", "arith.ori", a, b)
    }
    /// Bitwise exclusive or.
    pub fn xor(&mut self, a: Val, b: Val) -> Val {
        self.binary("", "arith.xori", a, b)
    }
    /// Left shift by a constant.
    pub fn shl(&mut self, a: Val, bits: i64) -> Val {
        let b = self.int(a.ty, bits);
        self.binary("", "arith.shli", a, b)
    }
    /// Logical right shift by a constant.
    pub fn shr(&mut self, a: Val, bits: i64) -> Val {
        let b = self.int(a.ty, bits);
        self.binary("", "arith.shrui", a, b)
    }
    /// Arithmetic right shift by a constant.
    pub fn sar(&mut self, a: Val, bits: i64) -> Val {
        let b = self.int(a.ty, bits);
        self.binary("", "arith.shrsi", a, b)
    }
    /// Negation of a float.
    pub fn neg(&mut self, a: Val) -> Val {
        self.op(a.ty, format_args!("arith.negf {a} : {}", a.ty))
    }

    /// `a * b + c`, rounded once.
    pub fn fma(&mut self, a: Val, b: Val, c: Val) -> Val {
        let name = if a.ty.lanes == 0 { "math.fma" } else { "vector.fma" };
        self.op(a.ty, format_args!("{name} {a}, {b}, {c} : {}", a.ty))
    }

    /// A one-operand op of the `math` dialect that LLVM has an instruction for: `sqrt`, `roundeven`, `absf`, `floor`.
    pub fn math(&mut self, name: &str, a: Val) -> Val {
        self.op(a.ty, format_args!("math.{name} {a} : {}", a.ty))
    }

    /// Compares signed integers.
    pub fn cmp(&mut self, how: Cmp, a: Val, b: Val) -> Val {
        let how = match how {
            Cmp::Eq => "eq",
            Cmp::Ne => "ne",
            Cmp::Lt => "slt",
            Cmp::Le => "sle",
            Cmp::Gt => "sgt",
            Cmp::Ge => "sge",
        };
        self.op(I1.x(a.ty.lanes), format_args!("arith.cmpi {how}, {a}, {b} : {}", a.ty))
    }

    /// Lane by lane, `a` where the condition holds. A scalar condition chooses whole vectors.
    pub fn select(&mut self, condition: Val, a: Val, b: Val) -> Val {
        if condition.ty.lanes == a.ty.lanes && a.ty.lanes > 0 {
            return self.op(a.ty, format_args!("arith.select {condition}, {a}, {b} : {}, {}", condition.ty, a.ty));
        }
        self.op(a.ty, format_args!("arith.select {condition}, {a}, {b} : {}", a.ty))
    }

    /// A conversion op of `arith`: `extf`, `truncf`, `sitofp`, `fptosi`, `extsi`, `extui`, `trunci`, `bitcast`.
    pub fn convert(&mut self, name: &str, a: Val, scalar: Ty) -> Val {
        let to = a.ty.of(scalar);
        self.op(to, format_args!("arith.{name} {a} : {} to {to}", a.ty))
    }

    /// The same bits as another vector type.
    pub fn bitcast(&mut self, a: Val, to: Ty) -> Val {
        self.op(to, format_args!("vector.bitcast {a} : {} to {to}", a.ty))
    }

    /// A scalar in every lane.
    pub fn broadcast(&mut self, a: Val, lanes: usize) -> Val {
        if lanes == 0 {
            return a;
        }
        let to = a.ty.x(lanes);
        self.op(to, format_args!("vector.broadcast {a} : {} to {to}", a.ty))
    }

    /// Lanes of `a` then of `b`, chosen by index.
    pub fn shuffle(&mut self, a: Val, b: Val, lanes: &[usize]) -> Val {
        let to = a.ty.x(lanes.len());
        let lanes: Vec<String> = lanes.iter().map(usize::to_string).collect();
        self.op(to, format_args!("vector.shuffle {a}, {b} [{}] : {}, {}", lanes.join(", "), a.ty, b.ty))
    }

    /// One lane.
    pub fn extract(&mut self, a: Val, lane: usize) -> Val {
        self.op(a.ty.x(0), format_args!("vector.extract {a}[{lane}] : {} from {}", a.ty.x(0), a.ty))
    }

    /// Sum of all lanes, reassociated.
    pub fn reduce_add(&mut self, a: Val) -> Val {
        let flags = if a.ty.is_float() { " fastmath<reassoc>" } else { "" };
        self.op(a.ty.x(0), format_args!("vector.reduction <add>, {a}{flags} : {} into {}", a.ty, a.ty.x(0)))
    }

    /// Largest lane, by halving.
    pub fn reduce_max(&mut self, a: Val) -> Val {
        let mut a = a;
        while a.ty.lanes > 1 {
            let half = a.ty.lanes / 2;
            let low: Vec<usize> = (0..half).collect();
            let high: Vec<usize> = (half..2 * half).collect();
            let (low, high) = (self.shuffle(a, a, &low), self.shuffle(a, a, &high));
            a = self.max(low, high);
        }
        self.extract(a, 0)
    }

    /// `pointer + bytes`.
    pub fn gep(&mut self, pointer: Val, bytes: Val) -> Val {
        self.op(PTR, format_args!("llvm.getelementptr inbounds {pointer}[{bytes}] : (!llvm.ptr, i64) -> !llvm.ptr, i8"))
    }

    /// `pointer + bytes`, a constant.
    pub fn gep_const(&mut self, pointer: Val, bytes: usize) -> Val {
        if bytes == 0 {
            return pointer;
        }
        self.op(PTR, format_args!("llvm.getelementptr inbounds {pointer}[{bytes}] : (!llvm.ptr) -> !llvm.ptr, i8"))
    }

    /// Loads a value.
    pub fn load(&mut self, pointer: Val, ty: Ty, align: usize) -> Val {
        self.op(ty, format_args!("llvm.load {pointer} {{alignment = {align} : i64}} : !llvm.ptr -> {ty}"))
    }

    /// Stores a value.
    pub fn store(&mut self, value: Val, pointer: Val, align: usize) {
        let ty = value.ty;
        self.line(format_args!("llvm.store {value}, {pointer} {{alignment = {align} : i64}} : {ty}, !llvm.ptr"));
    }

    /// Adds to an `i64` that workers share and gives what it was; orders their other accesses before and after.
    ///
    /// On a GPU it orders nothing, since such an order would be lost on the way to PTX: [`Emitter::fence`] does.
    pub fn atomic_add(&mut self, pointer: Val, value: Val) -> Val {
        if self.device.is_some() {
            return self.op(
                value.ty,
                format_args!(
                    "llvm.atomicrmw add {pointer}, {value} syncscope(\"device\") monotonic : !llvm.ptr, {}",
                    value.ty
                ),
            );
        }
        self.op(value.ty, format_args!("llvm.atomicrmw add {pointer}, {value} acq_rel : !llvm.ptr, {}", value.ty))
    }

    /// Asks for the line at `pointer + bytes`, which may lie beyond the object, in the first or second-level cache.
    pub fn prefetch(&mut self, pointer: Val, bytes: Val, level: usize) {
        let at =
            self.op(PTR, format_args!("llvm.getelementptr {pointer}[{bytes}] : (!llvm.ptr, i64) -> !llvm.ptr, i8"));
        let hint = 4 - level;
        let how = format!("<{{cache = 1 : i32, hint = {hint} : i32, rw = 0 : i32}}>");
        self.line(format_args!("\"llvm.intr.prefetch\"({at}) {how} : (!llvm.ptr) -> ()"));
    }

    /// Bytes on the stack, 64-byte aligned, allocated once at the top of the function.
    pub fn stack(&mut self, bytes: usize) -> Val {
        let size = self.i64(bytes as i64);
        let id = self.fresh();
        let line = format!("  %{id} = llvm.alloca {size} x i8 {{alignment = 64 : i64}} : (i64) -> !llvm.ptr\n");
        self.text.insert_str(self.entry, &line);
        self.entry += line.len();
        Val { id, part: -1, ty: PTR }
    }

    /// An LLVM intrinsic.
    pub fn intrinsic(&mut self, name: &str, args: &[Val], ty: Ty) -> Val {
        let values: Vec<String> = args.iter().map(Val::to_string).collect();
        let types: Vec<String> = args.iter().map(|a| a.ty.to_string()).collect();
        let (values, types) = (values.join(", "), types.join(", "));
        self.op(ty, format_args!("llvm.call_intrinsic \"{name}\"({values}) : ({types}) -> {ty}"))
    }

    /// An LLVM intrinsic without a result.
    pub fn act(&mut self, name: &str, args: &[Val]) {
        let values: Vec<String> = args.iter().map(Val::to_string).collect();
        let types: Vec<String> = args.iter().map(|a| a.ty.to_string()).collect();
        let (values, types) = (values.join(", "), types.join(", "));
        self.line(format_args!("llvm.call_intrinsic \"{name}\"({values}) : ({types}) -> ()"));
    }

    /// `for i in low..high step by step`, carrying values: the body gets `i` and the carried values and gives their next
    /// values; what the last round gave comes back.
    pub fn for_loop(
        &mut self,
        (low, high, step): (Val, Val, Val),
        carried: &[Val],
        body: impl FnOnce(&mut Emitter, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let i = Val { id: self.fresh(), part: -1, ty: I64 };
        let inner: Vec<Val> = carried.iter().map(|c| Val { id: self.fresh(), part: -1, ty: c.ty }).collect();
        let types: Vec<String> = carried.iter().map(|c| c.ty.to_string()).collect();
        let types = types.join(", ");
        let id = self.fresh();
        if carried.is_empty() {
            self.line(format_args!("scf.for {i} = {low} to {high} step {step} : i64 {{"));
        } else {
            let init: Vec<String> = inner.iter().zip(carried).map(|(a, b)| format!("{a} = {b}")).collect();
            let (n, init) = (carried.len(), init.join(", "));
            self.line(format_args!(
                "%{id}:{n} = scf.for {i} = {low} to {high} step {step} iter_args({init}) -> ({types}) : i64 {{"
            ));
        }
        self.depth += 1;
        let next = body(self, i, &inner);
        assert_eq!(next.len(), carried.len(), "a loop body gives as many values as it carries");
        self.yield_values(&next);
        self.depth -= 1;
        self.line(format_args!("}}"));
        carried.iter().enumerate().map(|(part, c)| Val { id, part: part as i32, ty: c.ty }).collect()
    }

    /// [`Emitter::for_loop`] that carries nothing.
    pub fn repeat(&mut self, low: Val, high: Val, step: i64, body: impl FnOnce(&mut Emitter, Val)) {
        let step = self.i64(step);
        self.for_loop((low, high, step), &[], |e, i, _| {
            body(e, i);
            vec![]
        });
    }

    /// Runs `then` where the condition holds.
    pub fn when(&mut self, condition: Val, then: impl FnOnce(&mut Emitter)) {
        self.line(format_args!("scf.if {condition} {{"));
        self.depth += 1;
        then(self);
        self.depth -= 1;
        self.line(format_args!("}}"));
    }

    /// Runs one of two.
    pub fn either(&mut self, condition: Val, then: impl FnOnce(&mut Emitter), otherwise: impl FnOnce(&mut Emitter)) {
        self.line(format_args!("scf.if {condition} {{"));
        self.depth += 1;
        then(self);
        self.depth -= 1;
        self.line(format_args!("}} else {{"));
        self.depth += 1;
        otherwise(self);
        self.depth -= 1;
        self.line(format_args!("}}"));
    }

    fn yield_values(&mut self, values: &[Val]) {
        if values.is_empty() {
            return;
        }
        let types: Vec<String> = values.iter().map(|v| v.ty.to_string()).collect();
        let values: Vec<String> = values.iter().map(Val::to_string).collect();
        self.line(format_args!("scf.yield {} : {}", values.join(", "), types.join(", ")));
    }

    /// The launch's `index`-th argument.
    pub fn arg(&mut self, k: KernelArgs, index: usize) -> Val {
        let at = self.gep_const(k.args, 8 * index);
        self.load(at, PTR, 8)
    }

    /// A field of `StepArgs`: an `i64`, or a pointer.
    pub fn step_field(&mut self, k: KernelArgs, offset: usize, ty: Ty) -> Val {
        let at = self.gep_const(k.step, offset);
        if ty == PTR { self.load_pointer(at) } else { self.load(at, ty, 8) }
    }

    /// This worker's share `[begin, end)` of `count` units, in order of worker.
    pub fn share(&mut self, k: KernelArgs, count: Val) -> (Val, Val) {
        let one = self.i64(1);
        let next = self.add(k.thread, one);
        let (a, b) = (self.mul(count, k.thread), self.mul(count, next));
        (self.div(a, k.threads), self.div(b, k.threads))
    }

    /// `index * bytes + more`.
    pub fn scaled(&mut self, index: Val, bytes: usize, more: usize) -> Val {
        let (bytes, more) = (self.i64(bytes as i64), self.i64(more as i64));
        let product = self.mul(index, bytes);
        self.add(product, more)
    }

    /// `base + index * bytes`.
    pub fn row(&mut self, base: Val, index: Val, bytes: usize) -> Val {
        let bytes = self.i64(bytes as i64);
        let at = self.mul(index, bytes);
        self.gep(base, at)
    }
}
