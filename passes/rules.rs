//! The rule table: equations between programs, as text.
//!
//! `name | left | right | conditions | tolerance`. A term is `(op {attributes} operands)`, with `?x` for anything.
//! `@unary`, `@binary`, `@row`, `@reduce` stand for every op of that class, on both sides the same; an op's attributes
//! come along. In right sides a function makes attributes of others, as `(product ?a ?b)` multiplies two factors
//! ([`terms`]). Operands of ops that commute are found in either order. A rule whose right side does not fit the type
//! rules, or has another type, does not apply. Rules only *add* equal programs: what is worth taking is decided by the
//! extraction, so no rule needs to be an improvement, and both directions of one may be listed.
//!
//! ```text
//! scale-twice | (scale ?a (scale ?b ?x)) | (scale (product ?a ?b) ?x) | | reassociates            a (b x) = (a b) x
//! ```
//!
//! Tolerance: `exact` (the same roundings), `reassociates` (equal as reals), `approximates` (none here: what changes
//! values beyond rounding is no equation and never in this table).
//!
//! One file a theme: [`algebra`], [`weights`] (work on activations becomes work on weights), [`layout`] (where views,
//! slices and linear work stand), [`select`] (fewer rows), [`format`] (rounded activations); [`engine`] runs them.

pub mod algebra;
pub mod engine;
pub mod format;
pub mod layout;
pub mod select;
pub mod terms;
pub mod weights;

use ir::ops::Class;
use ir::{Attrs, DType, Dim, Op, Type};

pub use engine::{PhaseReport, RuleMeter, saturate};

/// How far both sides of a rule may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tolerance {
    /// The same roundings: not at all.
    Exact,
    /// Equal as reals, rounded in another order.
    Reassociates,
    /// Equal within a stated error.
    Approximates,
}

/// One row of the table.
#[derive(Debug)]
pub struct Rule {
    /// `name | left | right | conditions | tolerance`.
    pub text: &'static str,
    /// The equation in a line of algebra.
    pub algebra: &'static str,
}

/// A set of rules that run together until nothing new appears or a limit stops them.
#[derive(Debug)]
pub struct Phase {
    /// Name in reports.
    pub name: &'static str,
    /// What it is for.
    pub meaning: &'static str,
    /// Its rules.
    pub rules: &'static [Rule],
}

pub(crate) const fn rule(text: &'static str, algebra: &'static str) -> Rule {
    Rule { text, algebra }
}

/// Which rules run: those of a table, or the first of them only, by which a rule that is wrong is found.
#[derive(Clone, Copy, Debug)]
pub struct RuleSet {
    /// The table.
    pub phases: &'static [Phase],
    /// So many of its rules, counted through the phases.
    pub first: usize,
}

impl Default for RuleSet {
    fn default() -> RuleSet {
        RuleSet { phases: PHASES, first: usize::MAX }
    }
}

impl RuleSet {
    /// The rules of each phase.
    fn by_phase(&self) -> impl Iterator<Item = (&'static Phase, &'static [Rule])> {
        let mut left = self.first;
        self.phases.iter().map(move |phase| {
            let count = phase.rules.len().min(left);
            left -= count;
            (phase, &phase.rules[..count])
        })
    }

    /// Every rule of it, in order.
    pub fn rules(&self) -> Vec<&'static Rule> {
        self.by_phase().flat_map(|(_, rules)| rules).collect()
    }
}

/// The table, in the order in which the phases run.
pub static PHASES: &[Phase] = &[
    Phase { name: "algebra", meaning: "simpler spellings of one value", rules: algebra::RULES },
    Phase {
        name: "weights",
        meaning: "work on activations becomes work on weights, done once when packing",
        rules: weights::RULES,
    },
    Phase {
        name: "layout",
        meaning: "where linear work, views and slices stand: before or after a contraction, a sum over experts, attention",
        rules: layout::RULES,
    },
    Phase { name: "select", meaning: "only the rows that leave a step are computed", rules: select::RULES },
    Phase { name: "format", meaning: "work that commutes with the rounding of activations", rules: format::RULES },
];

impl Rule {
    fn field(&self, index: usize) -> &'static str {
        self.text.split('|').nth(index).map_or("", str::trim)
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.field(0)
    }

    /// The term it finds.
    pub fn left(&self) -> &'static str {
        self.field(1)
    }

    /// The term it adds.
    pub fn right(&self) -> &'static str {
        self.field(2)
    }

    /// When it applies, beside fitting types.
    pub fn condition(&self) -> &'static str {
        self.field(3)
    }

    /// The tolerance as written.
    pub fn tolerance_name(&self) -> &'static str {
        self.field(4)
    }

    /// The tolerance.
    pub fn tolerance(&self) -> Tolerance {
        match self.tolerance_name() {
            "exact" => Tolerance::Exact,
            "reassociates" => Tolerance::Reassociates,
            _ => Tolerance::Approximates,
        }
    }

    /// The rule for every op its class names stand for: `(name, left, right)`.
    pub fn instances(&self) -> Vec<(String, String, String)> {
        let Some((pattern, class, operands)) = TEMPLATES.iter().find(|(p, ..)| self.left().contains(p)) else {
            return vec![(self.name().into(), self.left().into(), self.right().into())];
        };
        let is = |o: &Op| o.class() == *class && o.row().operands.len() == *operands && !converts(*o);
        let ops = Op::all().filter(is);
        let instance = |op: Op| {
            let attrs = if op.row().attrs.is_empty() { "" } else { " ?attributes" };
            let fill = |side: &str| side.replace(pattern, &format!("{op}{attrs}"));
            (format!("{}.{op}", self.name()), fill(self.left()), fill(self.right()))
        };
        ops.map(instance).collect()
    }
}

/// Stand-ins: their text, and the class and number of operands of the ops they stand for.
const TEMPLATES: &[(&str, Class, usize)] = &[
    ("@unary", Class::Elementwise, 1),
    ("@binary", Class::Elementwise, 2),
    ("@row", Class::RowBroadcast, 2),
    ("@reduce", Class::RowReduce, 1),
];

/// The op gives another element type than it is given: rules move it past nothing.
fn converts(op: Op) -> bool {
    let float = Type::f32([Dim::T, Dim::N(64)]);
    let operands = vec![&float; op.row().operands.len()];
    let result = (op.row().infer)(&operands, &Attrs::none());
    result.is_ok_and(|ty| ty.as_tensor().map(|(dtype, _)| dtype) != Some(DType::F32))
}

/// Every rule of the table.
pub fn table() -> impl Iterator<Item = &'static Rule> {
    PHASES.iter().flat_map(|p| p.rules)
}
