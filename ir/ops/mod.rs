//! The op table: the only place that knows an op's meaning.
//!
//! One op is one row. Nothing else names an op: printer, parser, verifier, interpreter, cost, e-graph, generators and the
//! reference page read the row; passes and backends go by [`Class`] wherever a class will do.

mod contract;
mod elementwise;
mod flops;
mod fold;
mod head;
mod infer;
mod movement;
mod reduce;
pub(crate) mod sample;
mod state;

pub use movement::hadamard_width;

use crate::graph::{Attr, Attrs};
use crate::sample::Random;
use crate::types::Type;
use crate::value::Value;
use crate::{Result, bail};
use std::fmt;

/// An op: an index into [`OPS`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Op(u8);

/// How an op relates to the rows of its operands. Decides where fusion may put it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A weight by name.
    Weight,
    /// A weight computed from weights, once, when packing.
    WeightFold,
    /// Element by element over operands of one shape.
    Elementwise,
    /// Element by element with a vector repeated for every row.
    RowBroadcast,
    /// Each row (last axis) from the whole row.
    RowReduce,
    /// Rotates pairs within each head by angles of the token.
    Rope,
    /// Multiplies each head with a fixed orthogonal matrix.
    Turn,
    /// The same bytes under another shape.
    View,
    /// Some columns of rows, or columns side by side.
    Columns,
    /// Rows of a table or of another value, by index.
    Gather,
    /// Angles of each token's position.
    Angles,
    /// Rounds each row to int8 per group.
    Quantize,
    /// Rows times a weight matrix.
    Contract,
    /// Rows times the matrices of the experts they are routed to.
    ContractExperts,
    /// Chooses experts.
    Route,
    /// Weighted sum over chosen experts.
    Combine,
    /// Writes new rows to a cache.
    Append,
    /// Softmax attention over a cache.
    Attend,
    /// One row for each sequence.
    Pool,
    /// Rows times the first plane of a weight matrix.
    Estimate,
    /// Adds the second plane where it can matter, in the memory of the estimates.
    Rescore,
}

/// Kind and default of an attribute.
#[derive(Clone, Copy, Debug)]
pub struct AttrSpec {
    /// Name in text.
    pub name: &'static str,
    /// Kind.
    pub kind: AttrKind,
    /// One line of meaning, with units.
    pub meaning: &'static str,
    /// The value at which the op gives its operand back.
    pub neutral: Option<f64>,
}

/// Kind of an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum AttrKind {
    Int,
    Float,
    Bool,
    Str,
}

/// One row of the op table.
pub struct OpRow {
    /// Name in text.
    pub name: &'static str,
    /// Operand names; an op has as many operands as names.
    pub operands: &'static [&'static str],
    /// Attributes; all are required.
    pub attrs: &'static [AttrSpec],
    /// Where fusion may put it.
    pub class: Class,
    /// Swapping the two operands changes nothing.
    pub commutative: bool,
    /// Type of the result from types of operands and attributes.
    pub infer: fn(&[&Type], &Attrs) -> Result<Type>,
    /// The result from operands of fitting types: what the op means.
    pub eval: fn(&[&Value], &Attrs) -> Result<Value>,
    /// Operations, from types of operands, attributes, type of the result, rows of the first activation, and positions
    /// attended; see [`crate::cost`].
    pub flops: fn(&[&Type], &Attrs, &Type, f64, f64) -> f64,
    /// Types of legal operands, and attributes, given the type of the first operand or nothing; `None` where there are none.
    pub sample: fn(&mut Random, Option<&Type>) -> sample::Sample,
    /// One line of meaning.
    pub meaning: &'static str,
}

impl Op {
    /// The leaf that names a weight.
    pub const WEIGHT: Op = Op(0);

    /// The op of that name.
    pub fn named(name: &str) -> Option<Op> {
        OPS.iter().position(|r| r.name == name).map(|i| Op(i as u8))
    }

    /// Every op, in the order of the table.
    pub fn all() -> impl Iterator<Item = Op> {
        (0..OPS.len() as u8).map(Op)
    }

    /// This op's row.
    pub fn row(self) -> &'static OpRow {
        &OPS[self.0 as usize]
    }

    /// Name in text.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Where fusion may put it.
    pub fn class(self) -> Class {
        self.row().class
    }

    /// Checks operand count and attributes against the row, then applies the type rule.
    ///
    /// # Errors
    /// Naming the op, what was expected and found.
    pub fn infer(self, operands: &[&Type], attrs: &Attrs) -> Result<Type> {
        let row = self.row();
        let found: Vec<String> = operands.iter().map(|t| t.to_string()).collect();
        let place = || format!("{}({})", row.name, found.join(", "));
        if operands.len() != row.operands.len() {
            bail!(Input, "{}: expected {} operands, found {}", place(), row.operands.len(), operands.len());
        }
        for spec in row.attrs {
            match attrs.get(spec.name) {
                Some(value) if spec.kind.admits(value) => {}
                Some(value) => {
                    bail!(Input, "{}: `{}` is of kind {}, found {value:?}", place(), spec.name, spec.kind.name())
                }
                None => bail!(Input, "{}: attribute `{}` is missing", place(), spec.name),
            }
        }
        if let Some((name, _)) = attrs.iter().find(|(n, _)| row.attrs.iter().all(|s| s.name != *n)) {
            bail!(Input, "{}: no attribute `{name}`", place());
        }
        (row.infer)(operands, attrs).map_err(|e| e.at(place()))
    }
}

impl AttrKind {
    /// How messages and the reference page call it.
    pub fn name(self) -> &'static str {
        match self {
            AttrKind::Int => "integer",
            AttrKind::Float => "float",
            AttrKind::Bool => "boolean",
            AttrKind::Str => "string",
        }
    }

    /// The value is of this kind.
    pub fn admits(self, value: &Attr) -> bool {
        matches!(
            (self, value),
            (AttrKind::Int, Attr::Int(_))
                | (AttrKind::Float, Attr::Float(_))
                | (AttrKind::Bool, Attr::Bool(_))
                | (AttrKind::Str, Attr::Str(_))
        )
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

const fn int(name: &'static str, meaning: &'static str) -> AttrSpec {
    AttrSpec { name, kind: AttrKind::Int, meaning, neutral: None }
}
const fn float(name: &'static str, meaning: &'static str) -> AttrSpec {
    AttrSpec { name, kind: AttrKind::Float, meaning, neutral: None }
}
const fn or_nothing(name: &'static str, meaning: &'static str, neutral: f64) -> AttrSpec {
    AttrSpec { neutral: Some(neutral), ..float(name, meaning) }
}
const fn flag(name: &'static str, meaning: &'static str) -> AttrSpec {
    AttrSpec { name, kind: AttrKind::Bool, meaning, neutral: None }
}
const fn string(name: &'static str, meaning: &'static str) -> AttrSpec {
    AttrSpec { name, kind: AttrKind::Str, meaning, neutral: None }
}

macro_rules! ops {
    ($(
        $name:literal ($($operand:ident),*) {$($attr:expr),*} $class:ident $($commutes:ident)?:
        $infer:ident, $eval:expr, $flops:expr, $sample:ident, $meaning:literal;
    )*) => {
        /// The table. `weight` comes first.
        pub static OPS: &[OpRow] = &[$(OpRow {
            name: $name,
            operands: &[$(stringify!($operand)),*],
            attrs: &[$($attr),*],
            class: Class::$class,
            commutative: false $(|| stringify!($commutes).len() == "commutes".len())?,
            infer: infer::$infer,
            eval: $eval,
            flops: $flops,
            sample: sample::$sample,
            meaning: $meaning,
        }),*];
    };
}

// "name" (operands) {attributes} Class [commutes]: type rule, evaluation, operations, sampler, meaning;
ops! {
    "weight" () {string("name", "entry of the weight table, under the call's prefix")}
        Weight: weight, movement::weight, flops::none, none, "a constant tensor of the model file";
    "scale_columns" (w, g) {} WeightFold: scale_columns, fold::scale_columns, flops::none, scale_columns,
        "w[n, k] * g[k]; a weight computed when packing";

    "scale_rows" (w, g) {} WeightFold: scale_rows, fold::scale_rows, flops::none, scale_rows,
        "w[n, k] * g[n]; a weight computed when packing";
    "multiply_weights" (a, b) {} WeightFold: multiply_weights, fold::multiply_weights, flops::none, multiply_weights,
        "a[n, m] b[m, k]; a weight computed when packing";
    "times_vector" (w, v) {} WeightFold: times_vector, fold::times_vector, flops::none, times_vector,
        "w[n, k] v[k]; a vector computed when packing";
    "hadamard_matrix" () {int("size", "rows and columns; a power of two")} WeightFold: hadamard_matrix, fold::hadamard_matrix, flops::none, hadamard_matrix,
        "the symmetric orthogonal matrix of signs / sqrt(size) (Sylvester); a weight made when packing";
    "slice_rows" (w) {int("from", "first row"), int("count", "number of rows")}
        WeightFold: slice_rows, fold::slice_rows, flops::none, slice_rows,
        "slices of w along its first axis; a weight of the same format, cut out when packing";
    "concat_rows" (a, b) {} WeightFold: concat_rows, fold::concat_rows, flops::none, concat_rows,
        "slices of a along its first axis, then those of b; a weight of their format, put together when packing";

    "embed" (tokens, table) {} Gather: embed, movement::embed, flops::none, embed, "row tokens[t] of the table";
    "select_rows" (x, rows) {} Gather: select_rows, movement::select_rows, flops::none, select_rows, "row rows[r] of x";
    "rope_table" (positions, frequencies) {float("scale", "multiplies cosines and sines (yarn's attention factor)")}
        Angles: rope_table, movement::rope_table, flops::made::<2>, rope_table,
        "cosines, then sines, of position * frequency";
    "rope" (x, table) {string("pairing", "`half`: d with d + r/2; `adjacent`: 2d with 2d + 1")}
        Rope: rope, movement::rope, flops::each::<3>, rope,
        "rotates the first r of each head's dims, r the table's width; the rest passes";
    "hadamard" (x) {} Turn: hadamard, movement::hadamard, flops::each::<6>, hadamard,
        "each head times the orthogonal Hadamard matrix of its width, or of the largest power of two that divides it";

    "add" (x, y) {} Elementwise commutes: same_shape, elementwise::add, flops::each::<1>, pair, "x + y";
    "mul" (x, y) {} Elementwise commutes: same_shape, elementwise::mul, flops::each::<1>, pair, "x * y";
    "scale" (x) {or_nothing("by", "factor", 1.0)} Elementwise: unary, elementwise::scale, flops::each::<1>, factor,
        "x * by";
    "offset" (x) {or_nothing("by", "summand", 0.0)} Elementwise: unary, elementwise::offset, flops::each::<1>, factor,
        "x + by";
    "softcap" (x) {float("cap", "bound")} Elementwise: unary, elementwise::softcap, flops::each::<6>, cap,
        "cap * tanh(x / cap)";
    "silu" (x) {} Elementwise: unary, elementwise::silu, flops::each::<5>, unary, "x * sigmoid(x)";
    "gelu" (x) {} Elementwise: unary, elementwise::gelu, flops::each::<8>, unary, "x * (1 + erf(x / sqrt 2)) / 2";
    "gelu_tanh" (x) {} Elementwise: unary, elementwise::gelu_tanh, flops::each::<12>, unary,
        "gelu by its tanh approximation";
    "gelu_sigmoid" (x) {} Elementwise: unary, elementwise::gelu_sigmoid, flops::each::<6>, unary,
        "x * sigmoid(1.702 x)";
    "relu" (x) {} Elementwise: unary, elementwise::relu, flops::each::<1>, unary, "max(x, 0)";
    "sigmoid" (x) {} Elementwise: unary, elementwise::sigmoid, flops::each::<5>, unary, "1 / (1 + exp -x)";
    "tanh" (x) {} Elementwise: unary, elementwise::tanh, flops::each::<4>, unary, "hyperbolic tangent";
    "round_bf16" (x) {} Elementwise: round_bf16, elementwise::round_bf16, flops::each::<6>, round_bf16,
        "x rounded to bf16, ties to even: activations of products with bf16 weights";

    "add_row" (x, row) {} RowBroadcast: row_vector, elementwise::add, flops::each::<1>, row_vector,
        "x + row, for every row of x";
    "mul_row" (x, row) {} RowBroadcast: row_vector, elementwise::mul, flops::each::<1>, row_vector,
        "x * row, for every row of x";

    "rms_normalize" (x) {float("eps", "added to the mean square")}
        RowReduce: unary, reduce::rms_normalize, flops::each::<4>, eps, "x / sqrt(mean(x^2) + eps) over the last axis";
    "layer_normalize" (x) {float("eps", "added to the variance")}
        RowReduce: unary, reduce::layer_normalize, flops::each::<7>, eps,
        "(x - mean) / sqrt(variance + eps) over the last axis";
    "l2_normalize" (x) {float("eps", "least norm")} RowReduce: unary, reduce::l2_normalize, flops::each::<4>, eps,
        "x / max(norm(x), eps) over the last axis";

    "split_heads" (x) {int("heads", "number of heads")}
        View: split_heads, movement::split_heads, flops::none, split_heads, "[t, heads * dim] as [t, heads, dim]";
    "merge_heads" (x) {} View: merge_heads, movement::merge_heads, flops::none, merge_heads,
        "[t, heads, dim] as [t, heads * dim]";

    "slice" (x) {int("from", "first column"), int("count", "number of columns")}
        Columns: slice, movement::slice, flops::none, slice, "columns from, from + 1, ... of [t, n]";
    "concat" (x, y) {} Columns: concat, movement::concat, flops::none, concat, "columns of x, then those of y";

    "quantize" (x) {} Quantize: quantize, reduce::quantize, flops::each::<4>, quantize,
        "int8 codes per group of 32 of the last axis, scale = max |x| / 127, ties to even";

    "quantize_fine" (x) {} Quantize: quantize_fine, reduce::quantize_fine, flops::each::<8>, quantize,
        "quantize, and quantize of the rounding error: two planes of int8 codes";

    "matmul" (x, w) {} Contract: matmul, contract::matmul, flops::products, matmul,
        "x[t, k] w[n, k]^T; of x in bf16, w is rounded to bf16 too";
    "route" (x) {int("top", "experts chosen per token"), flag("normalize", "weights of the chosen sum to 1")}
        Route: route, reduce::route, flops::each::<5>, route,
        "softmax over experts, the top largest (ties: the lower index first)";
    "matmul_experts" (x, w, routing) {}
        ContractExperts: matmul_experts, contract::matmul_experts, flops::products, matmul_experts,
        "row [t] or [t, j] of x times w[expert j of t]^T: [t, top, n]";
    "combine" (x, routing) {} Combine: combine, contract::combine, flops::each::<2>, combine,
        "sum over j of weight[t, j] * x[t, j]";

    "append" (cache, x, step) {} Append: append, state::append, flops::none, append,
        "the cache with this step's rows at their positions";
    "append_blocks" (cache, recent, step) {} Append: append_blocks, state::append_blocks, flops::none, append_blocks,
        "int4 keys with the cache blocks (64 positions) that this step completes, from the recent ones: a scale a dim";
    "attend" (q, keys, values, step) {
        float("scale", "multiplies scores"),
        flag("causal", "a token sees no later position"),
        int("window", "positions seen back from, and with, a token's own; 0 for all"),
        float("softcap", "scores become cap * tanh(score / cap); 0 for none")
    } Attend: attend, state::attend, flops::attention, attend,
        "softmax(scale q k^T) v; query head h reads key head h * kv_heads / heads; bf16 queries: products may be of bf16";
    "attend_mixed" (q, keys, values, recent_keys, recent_values, step) {
        float("scale", "multiplies scores"),
        flag("causal", "a token sees no later position"),
        int("window", "positions seen back from, and with, a token's own; 0 for all"),
        float("softcap", "scores become cap * tanh(score / cap); 0 for none")
    } Attend: attend_mixed, state::attend_mixed, flops::attention, attend_mixed,
        "attend; positions of a token's own cache block (64 positions) are those of the recent caches";

    "mean_pool" (x, step) {} Pool: mean_pool, reduce::mean_pool, flops::each::<1>, mean_pool,
        "mean over the tokens of each sequence";

    "estimate" (x, w, step) {} Estimate: estimate, head::estimate, flops::products, estimate,
        "x times the first plane of w; 0, or anything, in a step that wants all logits exactly";
    "estimate_bounds" (x, w, step) {float("margin", "standard deviations of the second plane's part")}
        Estimate: estimate_bounds, head::bounds, flops::bounds, estimate_bounds,
        "for every 16 rows of w: the largest estimate, then it plus the largest margin, then whose it is; as `estimate`";
    "rescore" (estimates, bounds, x, w, step) {} Rescore: rescore, head::rescore, flops::rescore, rescore,
        "estimates; exact where they can be among the step's so many largest, or everywhere";
}
