//! Runs rules on an e-graph: phase by phase, each until nothing new appears, and all phases again while that adds something.
//!
//! ```text
//! round:  every rule finds its matches | every rule adds its right sides, one after the other | congruence is restored
//! ```
//!
//! The order is fixed and the limits are counts, so the same graph gives the same classes. Every rule is metered.

use super::terms::{self, CONDITIONS};
use super::{Rule, RuleSet};
use crate::SearchLimits;
use crate::egraph::{Classes, ENode, Fact, Facts, Leaf, Tag, infer};
use egg::{Applier, ENodeOrVar, Id, Pattern, PatternAst, Rewrite, Subst, Symbol, Var};
use ir::{Error, Kind, Result};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// A condition and the variables it is about.
type Bound = (fn(&Classes, &[Id]) -> bool, Vec<Var>);

/// The right side of a rule: checks, then adds, then unites.
struct Right {
    term: PatternAst<ENode>,
    conditions: Vec<Bound>,
}

impl Right {
    /// Adds the term bottom-up; `None`, and no harm done, where a node does not fit its type rule.
    fn add(&self, classes: &mut Classes, subst: &Subst, rule: Symbol) -> Option<Id> {
        let mut ids: Vec<Id> = vec![];
        for node in self.term.iter() {
            ids.push(match node {
                ENodeOrVar::Var(v) => subst[*v],
                ENodeOrVar::ENode(node) => {
                    let mut node = node.clone();
                    node.children.iter_mut().for_each(|c| *c = ids[usize::from(*c)]);
                    if let Tag::Function(index) = node.tag {
                        let leaf: Leaf = terms::apply(classes, index, &node.children)?;
                        node = ENode { tag: Tag::Attrs, leaf, children: vec![] };
                    }
                    infer(classes, &node)?;
                    if classes.lookup(node.clone()).is_none() {
                        classes.analysis.origins.push((node.clone(), rule));
                    }
                    classes.add(node)
                }
            });
        }
        ids.last().copied()
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
        // weights are made once, however they are spelled
        if matches!(&classes[class].data, Fact::Value(ty) if ty.is_static()) {
            return vec![];
        }
        let ids = |variables: &[Var]| variables.iter().map(|v| subst[*v]).collect::<Vec<Id>>();
        if !self.conditions.iter().all(|(holds, variables)| holds(classes, &ids(variables))) {
            return vec![];
        }
        match self.add(classes, subst, rule) {
            Some(id) if classes[id].data == classes[class].data && classes.union_trusted(class, id, rule) => vec![id],
            _ => vec![],
        }
    }
}

/// A rule of the table as rewrites: one for each op and order of operands that its text stands for.
fn compile(rule: &Rule) -> Result<Vec<Rewrite<ENode, Facts>>> {
    let wrong = |what: String| Error::new(Kind::Internal, format!("rule {}: {what}", rule.name()));
    let term =
        |text: &str| -> Result<PatternAst<ENode>> { text.parse().map_err(|e| wrong(format!("term `{text}`: {e}"))) };
    let mut out = vec![];
    for (_, left, right) in rule.instances() {
        for left in orders(&term(&left)?) {
            let right = Right { term: term(&right)?, conditions: conditions(rule)? };
            let rewrite = Rewrite::new(rule.name(), Pattern::new(left), right);
            out.push(rewrite.map_err(&wrong)?);
        }
    }
    Ok(out)
}

/// A rule's conditions and what they are about.
fn conditions(rule: &Rule) -> Result<Vec<Bound>> {
    let one = |text: &str| {
        let mut words = text.split_whitespace();
        let condition = CONDITIONS.iter().find(|c| Some(c.name) == words.clone().next());
        let variables = words.by_ref().skip(1).map(str::parse).collect::<std::result::Result<Vec<Var>, _>>();
        match (condition, variables) {
            (Some(condition), Ok(variables)) if variables.len() == condition.variables => {
                Ok((condition.holds, variables))
            }
            _ => Err(Error::new(Kind::Internal, format!("rule {}: no condition `{text}`", rule.name()))),
        }
    };
    rule.condition().split(';').map(str::trim).filter(|c| !c.is_empty()).map(one).collect()
}

/// The term with the operands of its commutative ops in every order.
fn orders(term: &PatternAst<ENode>) -> Vec<PatternAst<ENode>> {
    let commutes = |node: &ENodeOrVar<ENode>| match node {
        ENodeOrVar::ENode(ENode { tag: Tag::Op(op), .. }) => op.row().commutative,
        _ => false,
    };
    let at: Vec<usize> = term.iter().enumerate().filter(|(_, node)| commutes(node)).map(|(i, _)| i).collect();
    let (mut seen, mut out) = (BTreeSet::new(), vec![]);
    for swapped in 0..1usize << at.len() {
        let mut nodes: Vec<ENodeOrVar<ENode>> = term.iter().cloned().collect();
        for (bit, index) in at.iter().enumerate() {
            if let ENodeOrVar::ENode(node) = &mut nodes[*index]
                && swapped >> bit & 1 == 1
            {
                node.children.reverse();
            }
        }
        let order = PatternAst::from(nodes);
        if seen.insert(order.to_string()) {
            out.push(order);
        }
    }
    out
}

/// How a phase ended.
#[derive(Clone, Debug)]
pub struct PhaseReport {
    /// Its name.
    pub phase: &'static str,
    /// Rounds of rewriting.
    pub rounds: usize,
    /// E-nodes afterwards.
    pub nodes: usize,
    /// Nothing new appeared, or the limit that was reached.
    pub stop: &'static str,
    /// What each rule did, those that found nothing included.
    pub rules: Vec<RuleMeter>,
}

/// What one rule did.
#[derive(Clone, Debug)]
pub struct RuleMeter {
    /// Its name.
    pub rule: &'static str,
    /// Places where its left side was found.
    pub matches: usize,
    /// Times it made two classes one.
    pub applied: usize,
    /// Finding and adding.
    pub time: Duration,
}

/// Runs all phases, and all of them again while that adds something.
///
/// # Errors
/// Where the table itself is wrong.
pub fn saturate(mut classes: Classes, set: &RuleSet, limits: &SearchLimits) -> Result<(Classes, Vec<PhaseReport>)> {
    let mut phases = vec![];
    for (phase, rules) in set.by_phase() {
        let rewrites = rules.iter().map(compile).collect::<Result<Vec<_>>>()?;
        let meters = rules.iter().map(|r| RuleMeter { rule: r.name(), matches: 0, applied: 0, time: Duration::ZERO });
        let report = PhaseReport { phase: phase.name, rounds: 0, nodes: 0, stop: "not run", rules: meters.collect() };
        phases.push((rewrites, report));
    }
    for _ in 0..limits.sweeps {
        let before = classes.total_size();
        let mut added = false;
        for (rewrites, report) in &mut phases {
            added |= run_phase(&mut classes, rewrites, limits, report);
        }
        if !added && classes.total_size() == before {
            break;
        }
    }
    Ok((classes, phases.into_iter().map(|(_, report)| report).collect()))
}

/// Runs one phase until nothing new appears or a limit stops it; something was added.
fn run_phase(
    classes: &mut Classes,
    rules: &[Vec<Rewrite<ENode, Facts>>],
    limits: &SearchLimits,
    report: &mut PhaseReport,
) -> bool {
    let mut any = false;
    report.stop = "reached the limit of rounds";
    for _ in 0..limits.iterations {
        report.rounds += 1;
        let mut found = vec![];
        for (rule, meter) in rules.iter().zip(&mut report.rules) {
            let start = Instant::now();
            let matches: Vec<_> = rule.iter().map(|rewrite| rewrite.search(classes)).collect();
            meter.matches += matches.iter().flatten().map(|m| m.substs.len()).sum::<usize>();
            meter.time += start.elapsed();
            found.push(matches);
        }
        let mut changed = false;
        for ((rule, matches), meter) in rules.iter().zip(&found).zip(&mut report.rules) {
            let start = Instant::now();
            for (rewrite, matches) in rule.iter().zip(matches) {
                let applied = rewrite.apply(classes, matches).len();
                meter.applied += applied;
                changed |= applied > 0;
            }
            meter.time += start.elapsed();
            if classes.total_size() > limits.nodes {
                break;
            }
        }
        classes.rebuild();
        any |= changed;
        report.nodes = classes.total_number_of_nodes();
        if !changed {
            report.stop = "saturated";
            break;
        }
        if classes.total_size() > limits.nodes {
            report.stop = "reached the limit of e-nodes";
            break;
        }
    }
    any
}
