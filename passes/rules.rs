//! The rule table: equations between programs, as text.
//!
//! `name | left | right | conditions | tolerance`. A term is `(op {attributes} operands)`, with `?x` for anything.
//! `@unary`, `@binary`, `@row`, `@reduce` stand for every op of that class, on both sides the same; an op's attributes
//! come along. `(product ?a ?b)` multiplies two attribute lists. A rule whose right side does not fit the type rules does
//! not apply. Rules only *add* equal programs: what is worth taking is decided by the extraction, so no rule needs to be
//! an improvement, and both directions of one may be listed.
//!
//! Tolerance: `exact` (the same roundings), `reassociates` (equal as reals), `approximates` (none here: what changes
//! values beyond rounding is no equation and never in this table).

use crate::SearchLimits;
use crate::egraph::{Classes, ENode, Fact, Facts, Leaf, Tag, infer, value_type};
use egg::{Applier, ENodeOrVar, Id, Pattern, PatternAst, Rewrite, Runner, SimpleScheduler, Subst, Symbol, Var};
use ir::ops::Class;
use ir::{Attrs, DType, Dim, Error, Kind, Op, Result, Type};

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

const fn rule(text: &'static str, algebra: &'static str) -> Rule {
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
    Phase {
        name: "fold",
        meaning: "work on activations becomes work on weights, done once when packing",
        rules: &[
            rule(
                "fold-gain | (matmul (mul_row ?x ?g) ?w) | (matmul ?x (scale_columns ?w ?g)) | f32 ?w; unshared ?w | reassociates",
                "(x diag g) wᵀ = x (w diag g)ᵀ",
            ),
            rule(
                "fold-gain-experts | (matmul_experts (mul_row ?x ?g) ?w ?r) | (matmul_experts ?x (scale_columns ?w ?g) ?r) | f32 ?w; unshared ?w | reassociates",
                "(x diag g) w_eᵀ = x (w_e diag g)ᵀ",
            ),
        ],
    },
    Phase {
        name: "motion",
        meaning: "where linear work stands: before or after a contraction, a view, a sum over experts",
        rules: &[
            rule(
                "scale-after-contraction | (matmul (scale ?a ?x) ?w) | (scale ?a (matmul ?x ?w)) | | reassociates",
                "(a x) wᵀ = a (x wᵀ)",
            ),
            rule(
                "scale-after-experts | (matmul_experts (scale ?a ?x) ?w ?r) | (scale ?a (matmul_experts ?x ?w ?r)) | | reassociates",
                "(a x) w_eᵀ = a (x w_eᵀ)",
            ),
            rule(
                "scale-after-gain | (mul_row (scale ?a ?x) ?g) | (scale ?a (mul_row ?x ?g)) | | reassociates",
                "(a x) g = a (x g)",
            ),
            rule(
                "scale-before-gain | (scale ?a (mul_row ?x ?g)) | (mul_row (scale ?a ?x) ?g) | | reassociates",
                "a (x g) = (a x) g",
            ),
            rule(
                "scale-after-combine | (combine (scale ?a ?x) ?r) | (scale ?a (combine ?x ?r)) | | reassociates",
                "Σ p_j (a x_j) = a Σ p_j x_j",
            ),
            rule(
                "scale-after-rope | (rope ?p (scale ?a ?x) ?t) | (scale ?a (rope ?p ?x ?t)) | | reassociates",
                "R (a x) = a (R x)",
            ),
            rule(
                "scale-twice | (scale ?a (scale ?b ?x)) | (scale (product ?a ?b) ?x) | | reassociates",
                "a (b x) = (a b) x",
            ),
            rule(
                "view-after-unary | (split_heads ?h (@unary ?x)) | (@unary (split_heads ?h ?x)) | | exact",
                "view (f x) = f (view x)",
            ),
            rule(
                "merge-after-unary | (merge_heads (@unary ?x)) | (@unary (merge_heads ?x)) | | exact",
                "view (f x) = f (view x)",
            ),
            rule(
                "merge-after-binary | (merge_heads (@binary ?x ?y)) | (@binary (merge_heads ?x) (merge_heads ?y)) | | exact",
                "view (x ∘ y) = view x ∘ view y",
            ),
        ],
    },
    Phase {
        name: "select",
        meaning: "only the rows that leave a step are computed",
        rules: &[
            rule(
                "select-unary | (select_rows (@unary ?x) ?r) | (@unary (select_rows ?x ?r)) | | exact",
                "(f x)[r] = f (x[r])",
            ),
            rule(
                "select-binary | (select_rows (@binary ?x ?y) ?r) | (@binary (select_rows ?x ?r) (select_rows ?y ?r)) | | exact",
                "(x ∘ y)[r] = x[r] ∘ y[r]",
            ),
            rule(
                "select-row | (select_rows (@row ?x ?g) ?r) | (@row (select_rows ?x ?r) ?g) | | exact",
                "(x ∘ g)[r] = x[r] ∘ g",
            ),
            rule(
                "select-reduce | (select_rows (@reduce ?x) ?r) | (@reduce (select_rows ?x ?r)) | | exact",
                "norm(x)[r] = norm(x[r]), row by row",
            ),
            rule(
                "select-contraction | (select_rows (matmul ?x ?w) ?r) | (matmul (select_rows ?x ?r) ?w) | | exact",
                "(x wᵀ)[r] = x[r] wᵀ",
            ),
        ],
    },
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

/// A named condition over the classes its variables are bound to.
struct Condition {
    variable: Var,
    holds: fn(&Classes, Id) -> bool,
}

fn condition(text: &str) -> Result<Condition> {
    let unknown = || Error::new(Kind::Internal, format!("no condition `{text}`"));
    let (name, variable) = text.split_once(' ').ok_or_else(unknown)?;
    let holds: fn(&Classes, Id) -> bool = match name {
        // a fold into a narrower float would round the weight again
        "f32" => |classes, id| matches!(value_type(classes, id).and_then(|t| t.as_tensor()), Some((DType::F32, _))),
        // a weight as the file has it: packing folds one vector into it and no second
        "unshared" => |classes, id| {
            classes[id].nodes.iter().any(|n| match n.tag {
                Tag::Op(Op::WEIGHT) => !classes.analysis.shared.contains(n.attrs(classes).str("name")),
                _ => false,
            })
        },
        _ => return Err(unknown()),
    };
    Ok(Condition { variable: variable.trim().parse().map_err(|_| unknown())?, holds })
}

/// The right side of a rule: checks, then adds, then unites.
struct Right {
    term: PatternAst<ENode>,
    conditions: Vec<Condition>,
}

impl Right {
    /// Adds the term bottom-up; `None`, and no harm done, where a node does not fit its type rule.
    fn add(&self, classes: &mut Classes, subst: &Subst) -> Option<Id> {
        let mut ids: Vec<Id> = vec![];
        for node in self.term.iter() {
            ids.push(match node {
                ENodeOrVar::Var(v) => subst[*v],
                ENodeOrVar::ENode(node) => {
                    let mut node = node.clone();
                    node.children.iter_mut().for_each(|c| *c = ids[usize::from(*c)]);
                    if node.tag == Tag::Product {
                        node = ENode { tag: Tag::Attrs, leaf: product(classes, &node)?, children: vec![] };
                    }
                    infer(classes, &node)?;
                    classes.add(node)
                }
            });
        }
        ids.last().copied()
    }
}

fn product(classes: &Classes, node: &ENode) -> Option<Leaf> {
    match (&classes[node.children[0]].data, &classes[node.children[1]].data) {
        (Fact::Attrs(a), Fact::Attrs(b)) => a.product(b),
        _ => None,
    }
}

impl Applier<ENode, Facts> for Right {
    fn apply_one(
        &self,
        classes: &mut Classes,
        class: Id,
        subst: &Subst,
        _: Option<&PatternAst<ENode>>,
        rule: Symbol,
    ) -> Vec<Id> {
        if !self.conditions.iter().all(|c| (c.holds)(classes, subst[c.variable])) {
            return vec![];
        }
        match self.add(classes, subst) {
            Some(id) if classes.union_trusted(class, id, rule) => vec![id],
            _ => vec![],
        }
    }
}

fn compile(rule: &Rule) -> Result<Vec<Rewrite<ENode, Facts>>> {
    let term = |name: &str, text: &str| -> Result<PatternAst<ENode>> {
        text.parse().map_err(|e| Error::new(Kind::Internal, format!("rule {name}: term `{text}`: {e}")))
    };
    let mut out = vec![];
    for (name, left, right) in rule.instances() {
        let conditions = rule.condition().split(';').map(str::trim).filter(|c| !c.is_empty());
        let conditions = conditions.map(condition).collect::<Result<Vec<_>>>()?;
        let right = Right { term: term(&name, &right)?, conditions };
        let left = Pattern::new(term(&name, &left)?);
        out.push(
            Rewrite::new(name.clone(), left, right)
                .map_err(|e| Error::new(Kind::Internal, format!("rule {name}: {e}")))?,
        );
    }
    Ok(out)
}

/// How a phase ended.
#[derive(Clone, Debug)]
pub struct PhaseReport {
    /// Its name.
    pub phase: &'static str,
    /// Rounds of rewriting.
    pub rounds: usize,
    /// Classes afterwards.
    pub classes: usize,
    /// E-nodes afterwards.
    pub nodes: usize,
    /// Nothing new appeared, or the limit that was reached.
    pub stop: String,
}

/// Runs all phases.
///
/// # Errors
/// Where the table itself is wrong.
pub fn saturate(mut classes: Classes, set: &RuleSet, limits: &SearchLimits) -> Result<(Classes, Vec<PhaseReport>)> {
    let mut reports = vec![];
    for (phase, rules) in set.by_phase() {
        let rules = rules.iter().map(compile).collect::<Result<Vec<_>>>()?.concat();
        let runner = Runner::<ENode, Facts>::new(Facts::default())
            .with_egraph(classes)
            .with_scheduler(SimpleScheduler)
            .with_iter_limit(limits.iterations)
            .with_node_limit(limits.nodes)
            .with_time_limit(std::time::Duration::from_secs(u64::from(u32::MAX)))
            .run(&rules);
        reports.push(PhaseReport {
            phase: phase.name,
            rounds: runner.iterations.len(),
            classes: runner.egraph.number_of_classes(),
            nodes: runner.egraph.total_number_of_nodes(),
            stop: match runner.stop_reason {
                Some(egg::StopReason::Saturated) => "saturated".into(),
                Some(reason) => format!("{reason:?}"),
                None => "not run".into(),
            },
        });
        classes = runner.egraph;
    }
    Ok((classes, reports))
}
