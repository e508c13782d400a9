//! Passes: a model as imported becomes a plan.
//!
//! ```text
//!  imported ──canonicalize──▶ canonical ──precision, planes──▶ canonical ──saturate──▶ optimized ──plan──▶ Plan
//!             one spelling              caches, int8                       e-graph: algebra,         buffers, kernels,
//!             for equal things          activations, vocabulary            kernels by roofline       launches by range of t
//! ```
//!
//! Every pass but `plan` works on the distinct graphs of a model, never on its calls: compile time does not grow with
//! depth. [`PASSES`] is the table; [`PIPELINE`] is the order. [`manager::run`] verifies after each pass.

#![forbid(unsafe_code)]

extern crate mansard_ir as ir;

pub mod assign;
pub mod budget;
pub mod canonicalize;
mod constants;
pub mod cost;
pub mod egraph;
pub mod extract;
pub mod kernels;
pub mod knapsack;
pub mod manager;
mod memory;
pub mod plan;
pub mod planes;
pub mod precision;
mod rebuild;
pub mod rules;
pub mod saturate;
mod scales;
pub mod weights;

use ir::costs::Costs;
use ir::plan::Plan;
use ir::quantize::Quantizer;
use ir::{DType, Model, Result, Stage, Target, Traffic};
pub use manager::{Event, Hooks, PassReport, Report, State};
use std::collections::BTreeMap;

/// What a compilation is asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The machine code is for, and its roofline.
    pub target: Target,
    /// Stored element type of caches; `None`: f16 where any weight is quantized, else f32.
    pub kv: Option<DType>,
    /// The format of matrices, which are rounded or quantized when packed; `None`: they stay as they are. What other format
    /// some of them have then is written in [`weights`].
    pub weights: Option<DType>,
    /// Formats of single matrices, by their names in the weight table; goes with no `weights`.
    pub formats: BTreeMap<String, DType>,
    /// How products with weights are quantized when packed; other matrices are rounded to nearest.
    pub quantizer: Quantizer,
    /// Hash of the text that the quantizer is calibrated on.
    pub calibrated_on: Option<String>,
    /// Vocabulary projections stay in one plane: every logit of every step is exact.
    pub exact_head: bool,
    /// Bounds of one step, as requested.
    pub limits: LimitsRequest,
    /// The steps that decisions are priced on; `None`: one of each kind, at a context of 512 positions.
    pub traffic: Option<Traffic>,
    /// What kernels were measured to take, as multiples of the roofline's prices.
    pub costs: Costs,
    /// Bounds of the search. None of them is a time: the same inputs give the same plan on any machine.
    pub search: SearchLimits,
    /// Rules of the search.
    pub rules: rules::RuleSet,
    /// How programs and kernels are chosen.
    pub strategy: Strategy,
    /// A matrix may be packed in several forms where steps of few and of many tokens want different ones.
    pub copies: bool,
}

/// Bounds of one step as a user asks for them; the plan holds what was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitsRequest {
    /// New tokens over all sequences.
    pub tokens: usize,
    /// Rows that may leave a step.
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
    /// Positions of a sequence; `None`, or more than the model has: the model's context.
    pub context: Option<usize>,
    /// Tokens of an attention tile.
    pub tile: usize,
}

impl Default for LimitsRequest {
    fn default() -> Self {
        LimitsRequest { tokens: 512, rows: 128, sequences: 64, context: None, tile: 512 }
    }
}

/// How programs and kernels are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// Together: the cheapest kernels of any equal program.
    #[default]
    Joint,
    /// One after the other: the program that is cheapest node by node, then its largest legal kernels. What the search is
    /// compared with.
    Fixed,
}

/// Where the search stops. Reaching one is reported, and the best found so far is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SearchLimits {
    /// E-nodes of one graph's e-graph.
    pub nodes: usize,
    /// Rounds of rewriting in one phase.
    pub iterations: usize,
    /// Times that all phases run, one after the other.
    pub sweeps: usize,
    /// Kernels priced for one variant of one graph; beyond it every choice takes the largest legal kernel.
    pub kernels: usize,
    /// Kernels considered that end in one value.
    pub kernels_per_value: usize,
}

impl Default for SearchLimits {
    fn default() -> Self {
        SearchLimits { nodes: 20_000, iterations: 12, sweeps: 4, kernels: 60_000, kernels_per_value: 2_000 }
    }
}

impl Options {
    /// Default limits for `target`.
    pub fn new(target: Target) -> Options {
        let (limits, search, rules, strategy) = Default::default();
        let (kv, weights, formats, traffic) = (None, None, BTreeMap::new(), None);
        let (quantizer, calibrated_on, costs) = Default::default();
        Options {
            target,
            kv,
            weights,
            formats,
            quantizer,
            calibrated_on,
            copies: false,
            exact_head: false,
            limits,
            traffic,
            costs,
            search,
            rules,
            strategy,
        }
    }
}

/// One row of the pass table.
pub struct Pass {
    /// Name on the command line.
    pub name: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// Stage it takes.
    pub from: Stage,
    /// Stage it leaves.
    pub to: Stage,
    /// Applies it; returns notes for the report.
    pub run: fn(&mut State, &Options) -> Result<Vec<String>>,
}

/// Every pass.
pub static PASSES: &[Pass] = &[
    Pass {
        name: "canonicalize",
        summary: "one spelling for equal things: folded weights and constants, shared and dead nodes, operand order, views",
        from: Stage::Imported,
        to: Stage::Canonical,
        run: canonicalize::run,
    },
    Pass {
        name: "precision",
        summary: "stored type of matrices and caches; int8 activations for contractions with integer weights",
        from: Stage::Canonical,
        to: Stage::Canonical,
        run: precision::run,
    },
    Pass {
        name: "planes",
        summary: "vocabulary projections of 8 bits in two planes, of which most rows need the first",
        from: Stage::Canonical,
        to: Stage::Canonical,
        run: planes::run,
    },
    Pass {
        name: "saturate",
        summary: "all equal programs in one e-graph; the cheapest program and kernels by roofline, per range of t",
        from: Stage::Canonical,
        to: Stage::Optimized,
        run: saturate::run,
    },
    Pass {
        name: "plan",
        summary: "kernels, packed weights, buffers with offsets, launches with barriers",
        from: Stage::Optimized,
        to: Stage::Planned,
        run: plan::run,
    },
];

/// The passes of a compilation, in order.
pub static PIPELINE: &[&str] = &[
    "canonicalize", // first: every later pattern needs one spelling only
    "precision",    // before the search, because `quantize` is work that the search places and shares
    "planes",       // before the search, which places the estimates; after what decides on weights and activations
    "saturate",     // the only place where programs and kernels are chosen
    "plan",         // last: nothing after it looks at graphs
];

/// The pass of that name.
///
/// # Errors
/// Listing the passes there are.
pub fn pass(name: &str) -> Result<&'static Pass> {
    PASSES.iter().find(|p| p.name == name).ok_or_else(|| {
        let known: Vec<&str> = PASSES.iter().map(|p| p.name).collect();
        ir::Error::new(ir::Kind::Usage, format!("no pass `{name}`; there are {}", known.join(", ")))
    })
}

/// Runs the whole [`PIPELINE`]: the plan, the optimized model behind it, and what happened.
///
/// # Errors
/// The first pass that fails, with the reproducer's path where one was asked for; or, where a hook stops the pipeline
/// early, that there is no plan.
pub fn compile(model: Model, options: &Options, hooks: &mut Hooks<'_>) -> Result<(Plan, Model, Report)> {
    let (state, report) = manager::run(PIPELINE, State::new(model), options, hooks)?;
    match state.plan {
        Some(plan) => Ok((plan, state.model, report)),
        None => Err(ir::Error::new(ir::Kind::Usage, "the pipeline was stopped before `plan`")),
    }
}

/// The reference page of passes and rules, `docs/passes.md`.
pub fn docs_markdown() -> String {
    let mut page = String::from("# Passes\n\nGenerated from the tables in `passes/lib.rs`, `passes/kernels.rs` and ");
    page += "`passes/rules.rs`; do not edit.\n\n| pass | from | to | what it does |\n|---|---|---|---|\n";
    for pass in PASSES {
        page += &format!("| `{}` | {} | {} | {} |\n", pass.name, pass.from, pass.to, pass.summary);
    }
    let order: Vec<String> = PIPELINE.iter().map(|p| format!("`{p}`")).collect();
    page += &format!("\nOrder of a compilation: {}.\n", order.join(", "));
    page += "\n## Kernels\n\nWhat one kernel may hold; the search composes any kernel of these kinds.\n\n";
    page += "| kind | composition |\n|---|---|\n";
    for (name, meaning) in kernels::KINDS {
        page += &format!("| {} | {meaning} |\n", name.name());
    }
    page += RULES_PREFACE;
    page += "\n| condition | holds where |\n|---|---|\n";
    for condition in rules::terms::CONDITIONS {
        page += &format!("| `{}` | {} |\n", condition.name, condition.meaning);
    }
    page += "\n| function | attributes it makes |\n|---|---|\n";
    for function in rules::terms::FUNCTIONS {
        page += &format!("| `{}` | {} |\n", function.name, function.meaning);
    }
    for phase in rules::PHASES {
        page += &format!("\n### {}: {}\n\n", phase.name, phase.meaning);
        page += "| rule | algebra | left | right | if | tolerance |\n|---|---|---|---|---|---|\n";
        for rule in phase.rules {
            let algebra = rule.algebra.replace('|', "\\|");
            let cells = [rule.name(), &algebra, &code(rule.left()), &code(rule.right()), rule.condition()];
            page += &format!("| {} | {} |\n", cells.join(" | "), rule.tolerance_name());
        }
    }
    page
}

fn code(term: &str) -> String {
    format!("`{term}`")
}

const RULES_PREFACE: &str = "
## Rules

Equations of the e-graph, in phases that run in this order, and again while that adds something. A rule adds its right side to
what equals its left one, where the types fit; what is worth taking is decided afterwards, by price. `@unary`, `@binary`, `@row`
and `@reduce` stand for every op of that class; operands of ops that commute are found in either order. That norms, activations,
rope, residuals and appends to caches go into kernels needs no rules: the search composes any kernel of the kinds above, and rules
bring together what can meet in one. So contractions over the same rows share a kernel as they are; they are merged into one
where a graph puts their results side by side. Tolerance: *exact*: the same roundings; *reassociates*: equal as reals, rounded in
another order.
";
