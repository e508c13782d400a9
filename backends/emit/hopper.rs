//! The emitter on Hopper: barriers that count bytes, copies of tiles by the copy engine, products of warpgroups.
//!
//! ```text
//! one thread     expect(full, bytes)   copy_tile(slot, map, full, [column, row])          UTMALDG
//! everyone       await_phase(full)                                                        SYNCS
//! a warpgroup    begin_products   multiply(sums, a, tile) ..   commit_products            HGMMA
//!                await_products(sums)   arrive(empty)
//! ```
//!
//! A tile has rows of 128 bytes, whose pieces of 16 bytes the engine permutes (swizzles) so that products read them without
//! conflicts: its place must be a multiple of [`TILE_ALIGN`]. What products and copies do, they do in the asynchronous proxy
//! (PTX ISA, "Async proxy"): memory that threads wrote must be fenced before.

use super::{Emitter, I1, I32, I64, PTR, Val};

/// Threads that multiply together.
pub const WARPGROUP: usize = 128;

/// What places of tiles in shared memory are multiples of.
pub const TILE_ALIGN: usize = 1024;

/// Bytes of a row of a tile.
pub const TILE_ROW: usize = 128;

/// Bytes of a description of a matrix for the copy engine, and what its place is a multiple of.
pub const MAP_BYTES: usize = 128;

/// Blocks that have a place for a description; those beyond share them: what one kernel's blocks describe is the same.
pub const MAPS: usize = 512;

/// A matrix of bf16 in the GPU's memory, of which tiles are copied.
pub struct TileMap {
    /// Where it begins: a multiple of 16.
    pub base: Val,
    /// Columns, and bytes from row to row.
    pub columns: usize,
    #[allow(missing_docs)]
    pub row_bytes: usize,
    /// `i64`: rows; a tile has zeros for those beyond.
    pub rows: Val,
    /// Rows of a tile: 256 at most.
    pub tile_rows: usize,
}

impl Emitter {
    /// A pointer in an address space, as text knows it.
    pub(super) fn in_space(&mut self, pointer: Val, space: u32) -> u32 {
        let id = self.fresh();
        self.line(format_args!("%{id} = llvm.addrspacecast {pointer} : !llvm.ptr to !llvm.ptr<{space}>"));
        id
    }

    /// An intrinsic of a place in shared memory.
    fn on_shared(&mut self, name: &str, place: Val, args: &[Val], result: &str) -> u32 {
        let (at, id) = (self.in_space(place, 3), self.fresh());
        let values: String = args.iter().map(|arg| format!(", {arg}")).collect();
        let types: String = args.iter().map(|arg| format!(", {}", arg.ty)).collect();
        let to = if result == "()" { String::new() } else { format!("%{id} = ") };
        self.line(format_args!(
            "{to}llvm.call_intrinsic \"llvm.nvvm.{name}\"(%{at}{values}) : (!llvm.ptr<3>{types}) -> {result}"
        ));
        id
    }

    /// Inline assembly that reads `args`; `tied` come back as it leaves them.
    fn assembly(&mut self, text: &str, tied: &[Val], args: &[(String, &str)]) -> Vec<Val> {
        let of = |ty: &str| match ty {
            "f32" => "f",
            "i32" | "!llvm.ptr<3>" => "r",
            _ => "l",
        };
        let types = |tied: &[Val]| tied.iter().map(|v| v.ty.to_string()).collect::<Vec<String>>();
        let outs = types(tied).into_iter().map(|ty| format!("={}", of(&ty)));
        let ins = (0..tied.len()).map(|i| i.to_string()).chain(args.iter().map(|(_, ty)| of(ty).to_owned()));
        let constraints: Vec<String> = outs.chain(ins).chain(["~{memory}".to_owned()]).collect();
        let values: Vec<String> = tied.iter().map(Val::to_string).chain(args.iter().map(|(v, _)| v.clone())).collect();
        let all: Vec<String> = types(tied).into_iter().chain(args.iter().map(|(_, ty)| (*ty).to_owned())).collect();
        let (constraints, values, all) = (constraints.join(","), values.join(", "), all.join(", "));
        let asm = format!(
            "llvm.inline_asm has_side_effects asm_dialect = att \"{text}\", \"{constraints}\" {values} : ({all}) ->"
        );
        if tied.is_empty() {
            self.line(format_args!("{asm} ()"));
            return vec![];
        }
        let (id, results) = (self.fresh(), format!("!llvm.struct<({})>", types(tied).join(", ")));
        self.line(format_args!("%{id} = {asm} {results}"));
        let value =
            |(i, tied): (usize, &Val)| self.op(tied.ty, format_args!("llvm.extractvalue %{id}[{i}] : {results}"));
        tied.iter().enumerate().map(value).collect()
    }

    /// Makes a barrier at `at`, 8 bytes of shared memory, whose phases end with so many arrivals and the bytes expected.
    pub fn make_barrier(&mut self, at: Val, arrivals: usize) {
        let arrivals = self.int(I32, arrivals as i64);
        self.on_shared("mbarrier.init.shared", at, &[arrivals], "()");
    }

    /// Barriers that this thread made are there for the copy engine, too.
    pub fn fence_barriers(&mut self) {
        self.act("llvm.nvvm.fence.mbarrier_init.release.cluster", &[]);
    }

    /// What this thread wrote to, or read from, shared memory comes before what the copy engine and products do later.
    pub fn fence_proxy(&mut self) {
        self.act("llvm.nvvm.fence.proxy.async.shared_cta", &[]);
    }

    /// Arrives at a barrier.
    pub fn arrive(&mut self, barrier: Val) {
        self.on_shared("mbarrier.arrive.shared", barrier, &[], "i64");
    }

    /// Arrives at a barrier, whose phase then lasts until so many bytes more have been copied.
    pub fn expect(&mut self, barrier: Val, bytes: usize) {
        let bytes = self.int(I32, bytes as i64);
        self.on_shared("mbarrier.arrive.expect.tx.scope.cta.space.cta", barrier, &[bytes], "i64");
    }

    /// Waits for the end of the barrier's phase of this parity (`i64`, 0 or 1). The phase before the first counts as one of parity 1.
    pub fn await_phase(&mut self, barrier: Val, parity: Val) {
        let parity = self.convert("trunci", parity, I32);
        let truth = self.op(I1, format_args!("arith.constant true"));
        self.line(format_args!("scf.while : () -> () {{"));
        let over = self.on_shared("mbarrier.try.wait.parity.scope.cta.space.cta", barrier, &[parity], "i1");
        let on = self.op(I1, format_args!("arith.xori %{over}, {truth} : i1"));
        self.line(format_args!("scf.condition({on})"));
        self.line(format_args!("}} do {{\nscf.yield\n}}"));
    }

    /// Describes a matrix to the copy engine at `map` in the GPU's memory, by way of `draft` in shared memory: a multiple
    /// of [`MAP_BYTES`] either. All lanes of one warp take part; whoever copies must [`Emitter::acquire_map`] first.
    ///
    /// The description begins as zeros, of which every field is replaced, as Triton does it
    /// (`TensormapCreateOpConversion`): so no host has to encode one.
    pub fn describe(&mut self, matrix: &TileMap, draft: Val, map: Val) {
        let (lane, zero) = (self.lane_and_warp().0, self.int(I32, 0));
        let own = self.row(draft, lane, 4);
        self.store(zero, own, 4);
        self.warp_barrier();
        let (none, base) = (self.i64(0), self.fresh());
        let first = self.cmp(super::Cmp::Eq, lane, none);
        self.when(first, |e| {
            e.line(format_args!("%{base} = llvm.ptrtoint {} : !llvm.ptr to i64", matrix.base));
            let base = Val { id: base, part: -1, ty: I64 };
            let rows = e.convert("trunci", matrix.rows, I32);
            let [one, columns, across, down] =
                [1, matrix.columns, TILE_ROW / 2, matrix.tile_rows].map(|n| e.int(I32, n as i64));
            let stride = e.i64(matrix.row_bytes as i64);
            // Two dimensions, the rank less one; bf16; in order; 128-byte swizzle; zeros beyond the matrix.
            let [zero, bf16, swizzle] = [0, 10, 3].map(|n| e.int(I32, n));
            let mut replace = |field: &str, args: &[Val]| {
                e.on_shared(&format!("tensormap.replace.{field}.p3"), draft, args, "()");
            };
            replace("global.address", &[base]);
            replace("rank", &[one]);
            for (dim, (own, of_tile)) in [(columns, across), (rows, down)].into_iter().enumerate() {
                let dim = if dim == 0 { zero } else { one };
                replace("global.dim", &[dim, own]);
                replace("box.dim", &[dim, of_tile]);
                replace("element.stride", &[dim, one]);
            }
            replace("global.stride", &[zero, stride]);
            replace("elemtype", &[bf16]);
            replace("interleave.layout", &[zero]);
            replace("swizzle.mode", &[swizzle]);
            replace("fill.mode", &[zero]);
        });
        self.warp_barrier();
        let [map, draft] = [(map, 1), (draft, 3)].map(|(at, space)| format!("%{}", self.in_space(at, space)));
        let text =
            "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [$0], [$1], 128;";
        self.assembly(text, &[], &[(map, "!llvm.ptr<1>"), (draft, "!llvm.ptr<3>")]);
    }

    /// Where a block describes its matrix.
    pub fn map_of(&mut self, block: Val) -> Val {
        let (id, maps) = (self.fresh(), self.i64(MAPS as i64));
        self.line(format_args!("%{id} = llvm.mlir.addressof @maps : !llvm.ptr<1>"));
        let base = self.op(PTR, format_args!("llvm.addrspacecast %{id} : !llvm.ptr<1> to !llvm.ptr"));
        let own = self.rem(block, maps);
        self.row(base, own, MAP_BYTES)
    }

    /// What was described at `map` is seen by this thread's copies.
    pub fn acquire_map(&mut self, map: Val) {
        let bytes = self.int(I32, MAP_BYTES as i64);
        self.act("llvm.nvvm.fence.proxy.tensormap_generic.acquire.gpu", &[map, bytes]);
    }

    /// Begins to copy the tile at `(column, row)` of a described matrix; its bytes count at `barrier`.
    pub fn copy_tile(&mut self, to: Val, map: Val, barrier: Val, [column, row]: [Val; 2]) {
        let [column, row] = [column, row].map(|x| self.convert("trunci", x, I32));
        let (barrier, hint, without) = (self.in_space(barrier, 3), self.i64(0), self.int(I1, 0));
        let to = self.in_space(to, 3);
        self.line(format_args!(
            "llvm.call_intrinsic \"llvm.nvvm.cp.async.bulk.tensor.g2s.cta.tile.2d\"(%{to}, %{barrier}, {map}, {column}, \
             {row}, {hint}, {without}) : (!llvm.ptr<3>, !llvm.ptr<3>, !llvm.ptr, i32, i32, i64, i1) -> ()"
        ));
    }

    /// How products find a tile: where its rows begin, and how far every eighth lies from the one before (PTX ISA,
    /// "Matrix descriptor": 128-byte swizzle, rows of consecutive columns).
    pub fn tile_descriptor(&mut self, tile: Val) -> Val {
        let (at, id) = (self.in_space(tile, 3), self.fresh());
        self.line(format_args!("%{id} = llvm.ptrtoint %{at} : !llvm.ptr<3> to i32"));
        let place = Val { id, part: -1, ty: I32 };
        let (place, mask) = (self.shr(place, 4), self.int(I32, 0x3fff));
        let place = self.and(place, mask);
        let (place, rest) = (self.convert("extui", place, I64), self.i64(DESCRIPTOR));
        self.or(place, rest)
    }

    /// Registers that products read or add to have been written: comes before a warpgroup's first product, and after each wait.
    pub fn begin_products(&mut self) {
        self.act("llvm.nvvm.wgmma.fence.sync.aligned", &[]);
    }

    /// Begins a warpgroup's product: 64 rows by 16 columns of `a`, four words a lane, with the rows of a tile from the 16 columns
    /// on that `tile` describes. Adds to `sums`, four a lane for every eight rows of the tile.
    pub fn multiply_tile(&mut self, sums: &[Val], a: &[Val], tile: Val) -> Vec<Val> {
        let (n, count) = (2 * sums.len(), sums.len());
        let list =
            |from: usize, count: usize| (from..from + count).map(|i| format!("${i}")).collect::<Vec<_>>().join(", ");
        let text = format!(
            "{{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{}}}, {{{}}}, ${}, \
             p, 1, 1, 0; }}",
            list(0, count),
            list(2 * count, a.len()),
            2 * count + a.len()
        );
        let args: Vec<(String, &str)> =
            a.iter().map(|a| (a.to_string(), "i32")).chain([(tile.to_string(), "i64")]).collect();
        self.assembly(&text, sums, &args)
    }

    /// Closes a group of a warpgroup's products.
    pub fn commit_products(&mut self) {
        self.act("llvm.nvvm.wgmma.commit_group.sync.aligned", &[]);
    }

    /// Waits for all groups of products, whose sums these are. `words` are what later products read: registers of theirs may not
    /// be written while products run, or the assembler has these wait for one another (C7513). So words stay where they came to until
    /// the wait is over; then each is combined with `none`, a zero that no compiler knows to be one.
    pub fn await_products(&mut self, sums: &[Val], words: &mut [Val], none: Val) -> Vec<Val> {
        let tied: Vec<Val> = sums.iter().copied().chain([none]).collect();
        let mut sums = self.assembly("wgmma.wait_group.sync.aligned 0;", &tied, &[]);
        let none = sums.pop().unwrap_or(none);
        words.iter_mut().for_each(|word| *word = self.xor(*word, none));
        sums
    }
}

/// All of a descriptor but the place: 1024 bytes from eight rows to the next, and the 128-byte swizzle.
const DESCRIPTOR: i64 = 1 << 62 | (8 * TILE_ROW as i64 / 16) << 32 | 1 << 16;
