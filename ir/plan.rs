//! The plan: everything decided, nothing yet emitted.
//!
//! Kernels are small graphs (an anchor with its prologues and epilogue) over buffers; a backend emits one function for each.
//! The *program* is what a runtime needs of a plan and is stored in the artifact as it is: buffers with offsets, packed
//! weights, caches, and for each range of `t` the launches in order.
//!
//! Calling convention of a kernel:
//! `extern "C" fn(args: *const *mut u8, step: *const StepArgs, thread: i64, threads: i64)`, where `args` are the addresses
//! of the launch's [`Arg`]s. Every worker calls every kernel and takes its own share.

use crate::graph::{Graph, TokenRange, ValueId};
use crate::layout::{AttentionItem, CACHE_BLOCK};
use crate::ops::Class;
use crate::types::{Dim, Type};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

macro_rules! index {
    ($name:ident, $prefix:literal) => {
        #[doc = concat!("An index, printed `", $prefix, "3`.")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u32);
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}
index!(KernelId, "k");
index!(BufferId, "buf");
index!(WeightId, "w");
index!(CacheId, "c");

/// What backends compile.
///
/// A backend can emit any kernel of these kinds; passes form no others. The kind follows from the classes in the body.
///
/// | kind | body |
/// |---|---|
/// | contract | one or more `Contract` nodes over inputs, then `Elementwise`, `RowBroadcast` and `View` nodes; contractions that meet in one node have equal `n`; other operands are inputs of the result's shape, or vectors |
/// | experts | the same with `ContractExperts` |
/// | attend | one `Attend` over inputs, then `View` nodes |
/// | pool | one `Pool`, then `RowReduce` |
/// | estimate | `Estimate` nodes of one matrix and the same rows |
/// | rescore | one `Rescore` over inputs |
/// | rows | anything else that works row by row with one leading dim: `Gather` (of inputs), `Angles`, `Elementwise`, `RowBroadcast`, `RowReduce`, `Rope`, `Turn`, `View`, `Quantize`, `Append`, `Route`, `Combine` |
///
/// In kernels for at most 8 tokens a contraction's activations may also be computed inside, by nodes of the *rows* kind
/// (an operand prologue): every worker repeats them.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Kernel bodies; `kernels[i]` is `program.kernels[i]`.
    pub kernels: Vec<Kernel>,
    /// How to make each packed weight; `packs[i]` is `program.weights[i]`.
    pub packs: Vec<Pack>,
    /// What the runtime executes.
    pub program: Program,
}

/// One function to emit: a graph at the `planned` stage.
///
/// Its inputs are values in memory: activations, packed weights (static types), caches, and the step. Its arguments at
/// run time are: every input but those of type `step`, in order; then every result that is not [`in_place`].
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Says graph, anchor and epilogue; a valid symbol, unique in the plan.
    pub name: String,
    /// What it computes.
    pub body: Graph,
    /// The steps it is launched for.
    pub range: TokenRange,
    /// The program's cache groups: by the place of its own here, a cache has its tables and slots in [`StepArgs`].
    pub groups: Vec<CacheGroup>,
}

impl Kernel {
    /// What kind of code it needs.
    ///
    /// # Errors
    /// Where the body is of no kind.
    pub fn kind(&self) -> crate::Result<crate::kernel::KernelKind> {
        crate::kernel::kind_of(&self.body)
    }

    /// Bytes of scratch that each worker needs.
    pub fn scratch_bytes(&self) -> usize {
        let (body, attends) = (&self.body, |n: &&crate::Node| n.op.class() == Class::Attend);
        match body.nodes.iter().find(attends).map(|n| (body.ty(n.operands[0]), body.ty(n.operands[1]))) {
            Some((q, Type::Cache { heads, dim, .. })) => {
                AttentionItem::new(q.row_width().unwrap_or(0) / dim / heads, *dim).scratch_bytes()
            }
            _ => 0,
        }
    }
}

/// A result that a kernel leaves where its first operand was: a cache, or rescored estimates.
pub fn in_place(body: &Graph, value: ValueId) -> bool {
    let rescored = body.node(value).is_some_and(|n| n.op.class() == Class::Rescore);
    rescored || matches!(body.ty(value), Type::Cache { .. })
}

/// How a packed weight is made from the weight table.
#[derive(Clone, Debug, PartialEq)]
pub struct Pack {
    /// A graph of weights alone: an entry of the weight table, or what is computed from some ([`crate::recipe`]).
    pub recipe: Graph,
}

impl Pack {
    /// An entry of the weight table as it is.
    pub fn entry(name: &str, ty: Type) -> Pack {
        let mut recipe = Graph::new("weight");
        let weight = recipe.weight(name, ty);
        recipe.result("weight", weight);
        Pack { recipe }
    }

    /// In a line: an entry's name, or `scale_columns(w, norm)`.
    pub fn name(&self) -> String {
        crate::recipe::name(&self.recipe)
    }

    /// Nothing is computed.
    pub fn is_entry(&self) -> bool {
        self.recipe.nodes.len() == 1
    }
}

/// The executable part of a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// What a step may hold.
    pub limits: Limits,
    /// Size of the activation arena.
    pub arena_bytes: usize,
    /// Memory of each worker for what it shares with others inside a launch; zero before the first step.
    #[serde(default)]
    pub scratch_bytes: usize,
    /// Activations, by offset into the arena; they share memory where their lifetimes do not meet.
    pub buffers: Vec<Buffer>,
    /// Packed weights.
    pub weights: Vec<WeightSpec>,
    /// Caches, one entry for the keys and one for the values of each layer.
    pub caches: Vec<CacheSpec>,
    /// Groups of caches that keep the same positions. Before format 2 there was one, which kept all.
    #[serde(default = "CacheGroup::all")]
    pub groups: Vec<CacheGroup>,
    /// Functions.
    pub kernels: Vec<KernelSpec>,
    /// Launches by range of `t`; the ranges are disjoint and cover `1..=limits.tokens`.
    pub variants: Vec<Variant>,
    /// What a step returns.
    pub outputs: Vec<Output>,
}

impl Program {
    /// What is launched in steps of so many tokens.
    pub fn variant(&self, tokens: usize) -> Option<&Variant> {
        self.variants.iter().find(|variant| variant.tokens.contains(tokens))
    }
}

/// So many tokens of a step are many: what is done once for all of them, such as unpacking weights, costs little. Programs may
/// compute such steps otherwise.
pub const MANY: usize = 33;

/// Bounds of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// New tokens over all sequences.
    pub tokens: usize,
    /// Rows that may leave a step.
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
    /// Positions of a sequence.
    pub context: usize,
    /// Tokens of an attention tile: the runtime cuts each sequence's tokens into tiles of at most this many. Kernels cut
    /// tiles again, as [`crate::layout::AttentionItem`] says.
    pub tile: usize,
}

/// An activation. Its memory holds the most rows a step can have, rounded up to a multiple of [`crate::layout::STRIP`]:
/// kernels may compute and store rows past the step's last one, which nobody reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    /// Graph and value it stands for.
    pub name: String,
    /// Its type, as text.
    pub ty: String,
    /// Offset into the arena, a multiple of 64.
    pub offset: usize,
    /// Bytes from row to row.
    pub row_bytes: usize,
    /// What its rows are counted by.
    pub rows: RowCount,
}

/// The leading dim of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum RowCount {
    Tokens,
    Sequences,
    Rows,
}

impl RowCount {
    /// From a symbolic dim.
    pub fn from_dim(dim: Dim) -> Option<RowCount> {
        match dim {
            Dim::T => Some(RowCount::Tokens),
            Dim::S => Some(RowCount::Sequences),
            Dim::R => Some(RowCount::Rows),
            Dim::N(_) => None,
        }
    }

    /// The most rows a step can have.
    pub fn most(self, limits: &Limits) -> usize {
        match self {
            RowCount::Tokens => limits.tokens,
            RowCount::Sequences => limits.sequences,
            RowCount::Rows => limits.rows,
        }
    }
}

/// A packed weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightSpec {
    /// Entry of the weight table, or a name for what is computed; a section of the artifact has it under `weights/`.
    pub name: String,
    /// Its type, as text.
    pub ty: String,
    /// Packed size.
    pub bytes: usize,
    /// What it is computed from, as text ([`crate::recipe`]); `None`: an entry as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
}

impl WeightSpec {
    /// How it was made.
    ///
    /// # Errors
    /// Where the text of its recipe, or of its type, is damaged.
    pub fn pack(&self) -> crate::Result<Pack> {
        let Some(text) = &self.recipe else { return Ok(Pack::entry(&self.name, crate::text::parse_type(&self.ty)?)) };
        match crate::text::parse("recipe", text)?.graphs.pop() {
            Some(recipe) => Ok(Pack { recipe }),
            None => crate::bail!(Input, "weight `{}` has an empty recipe", self.name),
        }
    }
}

/// Keys or values of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheSpec {
    /// Call prefix and input name: `model.layers.3.keys`.
    pub name: String,
    /// Its type, as text.
    pub ty: String,
    /// Bytes of a cache block of 64 positions.
    pub block_bytes: usize,
    /// Its group.
    #[serde(default)]
    pub group: usize,
}

/// Caches that keep the same positions: one block table for each sequence serves them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CacheGroup {
    /// Positions a token sees back from, and with, its own; 0 for all.
    pub window: usize,
}

impl CacheGroup {
    /// The only group there is where every cache keeps all positions.
    pub fn all() -> Vec<CacheGroup> {
        vec![CacheGroup { window: 0 }]
    }

    /// The groups of the caches among `types`, ascending by window.
    pub fn of<'a>(types: impl IntoIterator<Item = &'a Type>) -> Vec<CacheGroup> {
        let windows = types.into_iter().filter_map(|ty| match ty {
            Type::Cache { window, .. } => Some(CacheGroup { window: *window }),
            _ => None,
        });
        windows.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Which of the groups a cache is of.
    pub fn index_of(groups: &[CacheGroup], cache: &Type) -> Option<usize> {
        groups.iter().position(|group| CacheGroup::of([cache]) == [*group])
    }

    /// Cache blocks at the beginning of a sequence of `length` positions that the next token does not see, nor would it
    /// with up to 64 tokens taken back: their positions all lie before `length + 1 - window - 64`.
    pub fn out_of_sight(&self, length: usize) -> usize {
        match self.window {
            0 => 0,
            window => (length + 1).saturating_sub(window.saturating_add(CACHE_BLOCK)) / CACHE_BLOCK,
        }
    }

    /// Cache blocks that a sequence of `length` positions holds after a step of one token.
    pub fn blocks(&self, length: usize) -> usize {
        length.div_ceil(CACHE_BLOCK) - self.out_of_sight(length.saturating_sub(1))
    }
}

/// A function of the code section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelSpec {
    /// Its symbol.
    pub name: String,
    /// The body in text form.
    pub text: String,
    /// FLOPs of one launch per token (rows of attention count their context at 0).
    pub flops_per_token: f64,
    /// Bytes of weights one launch reads.
    pub weight_bytes: usize,
}

impl KernelSpec {
    /// What it computes.
    ///
    /// # Errors
    /// Where its text is damaged.
    pub fn body(&self) -> crate::Result<Graph> {
        match crate::text::parse(&self.name, &self.text)?.graphs.pop() {
            Some(body) => Ok(body),
            None => crate::bail!(Input, "kernel `{}` has no body", self.name),
        }
    }
}

/// Launches for steps of `tokens` tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Variant {
    /// Numbers of tokens.
    pub tokens: TokenRange,
    /// In order.
    pub launches: Vec<Launch>,
}

/// One kernel call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// Which function.
    pub kernel: KernelId,
    /// Its arguments.
    pub args: Vec<Arg>,
    /// All workers must have finished every earlier launch before this one starts.
    pub barrier: bool,
}

/// What a launch passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arg {
    /// An activation.
    Buffer(BufferId),
    /// A packed weight.
    Weight(WeightId),
    /// The pool of a cache.
    Cache(CacheId),
    /// `i32[t]`: token ids.
    Tokens,
    /// `i32[t]`: position of each token in its sequence.
    Positions,
    /// `i32[r]`: tokens whose rows leave the step.
    Rows,
}

/// A result of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// `logits`, `hidden`, `embedding`.
    pub name: String,
    /// Where it is; f32.
    pub buffer: BufferId,
    /// Elements of a row.
    pub width: usize,
}

/// The ragged step as kernels see it. All arrays are the runtime's and live as long as the step.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StepArgs {
    /// New tokens.
    pub t: i64,
    /// Sequences.
    pub s: i64,
    /// Rows asked for.
    pub r: i64,
    /// Attention tiles.
    pub tiles: i64,
    /// Entries of a row of `tables`.
    pub table_stride: i64,
    /// `i32[t]`: token ids.
    pub tokens: *const i32,
    /// `i32[t]`: position of each token in its sequence.
    pub positions: *const i32,
    /// `i32[r]`: tokens whose rows leave the step.
    pub rows: *const i32,
    /// `i32[groups][t]`: slot of each token in the caches of a group, `cache block * 64 + position % 64`.
    pub slots: *const i32,
    /// `i32[tiles][4]`: first token, number of tokens (at most `limits.tile`), sequence, and the sequence's length
    /// including this step's tokens.
    pub tile: *const i32,
    /// `i32[groups][s][table_stride]`: cache blocks of each sequence in order of position. Those that lie wholly before the
    /// window of the step's first token may be any number.
    pub tables: *const i32,
    /// `i32[s][2]`: first token and number of tokens of each sequence in this step.
    pub sequences: *const i32,
    /// Scratch of all workers, one after the other.
    pub scratch: *mut u8,
    /// Bytes of one worker's scratch.
    pub scratch_bytes: i64,
    /// How many of the largest logits of a row must be exact; 0: all.
    pub candidates: i64,
}

impl StepArgs {
    /// A step of no tokens.
    pub const NOTHING: StepArgs = StepArgs {
        t: 0,
        s: 0,
        r: 0,
        tiles: 0,
        table_stride: 0,
        tokens: std::ptr::null(),
        positions: std::ptr::null(),
        rows: std::ptr::null(),
        slots: std::ptr::null(),
        tile: std::ptr::null(),
        tables: std::ptr::null(),
        sequences: std::ptr::null(),
        scratch: std::ptr::null_mut(),
        scratch_bytes: 0,
        candidates: 0,
    };
}

/// Most rows of a step that may want some of their largest logits only: more of them read the whole matrix anyway.
pub const CANDIDATE_ROWS: usize = 8;

/// The most candidates; who wants more wants all logits.
pub const CANDIDATES: usize = 64;
