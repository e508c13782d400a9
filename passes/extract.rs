//! E-graph to kernels: the cheapest program and the cheapest kernels for it, chosen together.
//!
//! Kernels are chosen last first. The state is the *demand*, the values that must be in memory; a kernel that stores some
//! of them takes those away and adds what it reads. The price of a demand is the least price of a kernel plus the price of
//! what then remains, and equal demands are solved once:
//!
//! ```text
//! {logits} ──[quantize matmul]──▶ {hidden} ──[rms mul_row]──▶ {x}: an input, done
//! ```
//!
//! This is exact on the DAG: a value that two kernels read is computed once and paid once, or computed inside both where
//! that is cheaper. Every step replaces values by values of lower rank, so the search ends. Ties go to the candidate found
//! first, candidates come in a fixed order, and the limits are counts: the same e-graph gives the same kernels.

use crate::SearchLimits;
use crate::cost::Roofline;
use crate::egraph::{Classes, ENode, Tag, value_type};
use crate::kernels::{Candidate, candidates};
use crate::rebuild::Builder;
use egg::{Id, Language, Symbol};
use ir::artifact::{Derivation, Other, rounded};
use ir::graph::Fused;
use ir::kernel::{KernelKind, after_anchor};
use ir::ops::Class;
use ir::{Attrs, Dim, Graph, Op, Result, Stage, Type, ValueId, bail};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// How a class's value comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Given to the graph.
    Input(usize),
    /// A weight, or computed from weights when packing.
    Weight,
    /// By a kernel.
    Computed,
}

/// One of the equal nodes of a class.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Its op.
    pub op: Op,
    /// Its attributes.
    pub attrs: Attrs,
    /// Ranks of its operands, all lower than its own.
    pub operands: Vec<usize>,
    /// The rule that brought it, where the graph did not have it.
    pub rule: Option<Symbol>,
}

/// A class of the e-graph as the search sees it.
#[derive(Clone, Debug)]
pub struct Value {
    /// Its type.
    pub ty: Type,
    /// Where it comes from.
    pub role: Role,
    /// The equal nodes that compute it; for weights exactly one.
    pub choices: Vec<Choice>,
}

/// The e-graph in topological order: operands before users, whichever nodes are chosen.
#[derive(Clone, Debug)]
pub struct Program {
    /// Classes by rank.
    pub values: Vec<Value>,
    /// Ranks of the graph's results.
    pub results: Vec<usize>,
    /// By value: the values it depends on by some choice of nodes, itself included.
    ancestors: Vec<BTreeSet<usize>>,
    /// By value: the kinds of kernel, other than rows, that can hold it after an anchor or as one.
    anchored: Vec<Vec<KernelKind>>,
}

impl Program {
    /// Reads the part of the e-graph that `results` reach. Nodes that would close a cycle are left out.
    pub fn read(classes: &Classes, results: &[Id]) -> Program {
        // The first rule that brings an e-node counts.
        let origins = classes.analysis.origins.iter().rev();
        let origins = origins.map(|(node, rule)| (node.clone().map_children(|c| classes.find(c)), *rule)).collect();
        let mut reader = Reader { classes, origins, rank: BTreeMap::new(), open: vec![], values: vec![] };
        let results = results.iter().filter_map(|id| reader.visit(*id)).collect();
        let (values, results) = by_depth(reader.values, results);
        Program::new(values, results)
    }

    fn new(values: Vec<Value>, results: Vec<usize>) -> Program {
        let mut program = Program { values, results, ancestors: vec![], anchored: vec![] };
        for (value, node) in program.values.iter().enumerate() {
            let mut ancestors = BTreeSet::from([value]);
            let mut anchored = vec![];
            for choice in &node.choices {
                choice.operands.iter().for_each(|o| ancestors.extend(&program.ancestors[*o]));
                let follows = choice.operands.iter().flat_map(|o| &program.anchored[*o]).copied();
                anchored.extend(follows.filter(|kind| after_anchor(*kind, choice.op.class())));
                anchored.extend(KernelKind::of_anchor(choice.op.class()));
            }
            anchored.sort();
            anchored.dedup();
            program.ancestors.push(ancestors);
            program.anchored.push(anchored);
        }
        program
    }

    /// The program that is cheapest where every node is a kernel of its own: one choice for each value, made before anything is
    /// known about fusion.
    pub fn fixed(&self, roofline: &Roofline) -> Program {
        let (mut values, mut prices) = (self.values.clone(), vec![0.0; self.values.len()]);
        for (v, value) in self.values.iter().enumerate().filter(|(_, value)| value.role == Role::Computed) {
            let price = |(index, choice): (usize, &Choice)| {
                let kernel = Candidate::alone(self, v, index, choice);
                let operands: f64 = choice.operands.iter().map(|o| prices[*o]).sum();
                (roofline.price(self, &kernel) + operands, index)
            };
            let priced = value.choices.iter().enumerate().map(price);
            let Some((least, index)) = priced.min_by(|a, b| a.0.total_cmp(&b.0)) else { continue };
            prices[v] = least;
            values[v].choices = vec![value.choices[index].clone()];
        }
        Program::new(values, self.results.clone())
    }

    /// `value` needs `other` by some choice of nodes.
    pub fn depends(&self, value: usize, other: usize) -> bool {
        self.ancestors[value].contains(&other)
    }

    /// A kernel of that kind can hold the value after an anchor, or as one.
    pub fn anchored(&self, value: usize, kind: KernelKind) -> bool {
        self.anchored[value].contains(&kind)
    }

    /// Only a rows kernel can hold the value.
    pub fn rows_only(&self, value: usize) -> bool {
        self.anchored[value].is_empty()
    }

    /// The value is read from memory as an activation or a cache, not bound as a weight.
    pub fn in_memory(&self, value: usize) -> bool {
        self.values[value].role != Role::Weight
    }

    /// What the value's rows are counted by.
    pub fn lead(&self, value: usize) -> Option<Dim> {
        match &self.values[value].ty {
            Type::Cache { .. } => Some(Dim::T),
            ty => ty.rows(),
        }
    }
}

/// Ranks by depth, so that what can share a kernel because it is equally far from the inputs is demanded together.
fn by_depth(values: Vec<Value>, results: Vec<usize>) -> (Vec<Value>, Vec<usize>) {
    let mut depth: Vec<usize> = vec![];
    for value in &values {
        let operands = value.choices.iter().flat_map(|c| &c.operands);
        depth.push(operands.map(|o| depth[*o] + 1).max().unwrap_or(0));
    }
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by_key(|v| (depth[*v], *v));
    let mut rank = vec![0; values.len()];
    order.iter().enumerate().for_each(|(new, old)| rank[*old] = new);
    let mut values: Vec<(usize, Value)> = values.into_iter().enumerate().map(|(old, v)| (rank[old], v)).collect();
    values.sort_by_key(|(new, _)| *new);
    for operand in values.iter_mut().flat_map(|(_, v)| &mut v.choices).flat_map(|c| &mut c.operands) {
        *operand = rank[*operand];
    }
    (values.into_iter().map(|(_, v)| v).collect(), results.into_iter().map(|v| rank[v]).collect())
}

struct Reader<'a> {
    classes: &'a Classes,
    origins: HashMap<ENode, Symbol>,
    rank: BTreeMap<Id, usize>,
    open: Vec<Id>,
    values: Vec<Value>,
}

impl Reader<'_> {
    /// The rank of a class; `None` where it is being visited already.
    fn visit(&mut self, id: Id) -> Option<usize> {
        let id = self.classes.find(id);
        if let Some(rank) = self.rank.get(&id) {
            return Some(*rank);
        }
        if self.open.contains(&id) {
            return None;
        }
        let ty = value_type(self.classes, id)?.clone();
        self.open.push(id);
        let mut nodes: Vec<&ENode> = self.classes[id].nodes.iter().collect();
        nodes.sort();
        let input = nodes.iter().find(|n| n.tag == Tag::Input).and_then(|n| n.leaf.input());
        let choices = if input.is_some() { vec![] } else { nodes.iter().filter_map(|n| self.choice(n)).collect() };
        self.open.pop();
        let role = match input {
            Some(index) => Role::Input(index),
            None if ty.is_static() => Role::Weight,
            None => Role::Computed,
        };
        let mut value = Value { ty, role, choices };
        if role == Role::Weight {
            value.choices.truncate(1); // a plain weight sorts before a folded one
        }
        self.values.push(value);
        self.rank.insert(id, self.values.len() - 1);
        Some(self.values.len() - 1)
    }

    fn choice(&mut self, node: &ENode) -> Option<Choice> {
        let Tag::Op(op) = node.tag else { return None };
        let operands: Option<Vec<usize>> = node.operands().iter().map(|o| self.visit(*o)).collect();
        let rule = self.origins.get(node).copied();
        Some(Choice { op, attrs: node.attrs(self.classes), operands: operands?, rule })
    }
}

/// The kernels of one variant, in launch order, and their predicted price in seconds.
#[derive(Clone, Debug)]
pub struct Selection {
    /// First to last.
    pub kernels: Vec<Candidate>,
    /// Seconds, by roofline.
    pub price: f64,
    /// Kernels that were priced.
    pub considered: usize,
    /// A limit stopped the search.
    pub limited: bool,
    /// By kernel, what was weighed against it.
    pub derivations: Vec<Derivation>,
}

/// Kernels that were not chosen which a derivation names.
const OTHERS: usize = 3;

/// A candidate and what taking it would cost.
struct Priced {
    /// Own price, and a bound on the price of the rest.
    bound: f64,
    own: f64,
    /// The demand that remains.
    rest: Vec<usize>,
    kernel: Candidate,
}

struct Search<'a> {
    program: &'a Program,
    roofline: &'a Roofline,
    limits: &'a SearchLimits,
    prologues: bool,
    best: HashMap<Vec<usize>, (f64, Option<Candidate>)>,
    considered: usize,
    limited: bool,
}

/// Chooses the kernels of `program` for steps like `roofline`'s workload. `prologues`: contractions may compute their
/// activations.
///
/// # Errors
/// Where no legal kernel computes some value.
pub fn select(program: &Program, roofline: &Roofline, prologues: bool, limits: &SearchLimits) -> Result<Selection> {
    let mut search =
        Search { program, roofline, limits, prologues, best: HashMap::new(), considered: 0, limited: false };
    let mut demand: Vec<usize> =
        program.results.iter().copied().filter(|v| program.values[*v].role == Role::Computed).collect();
    demand.sort_unstable();
    demand.dedup();
    let price = search.price(&demand);
    if !price.is_finite() {
        bail!(Internal, "no legal kernels compute the results");
    }
    let (mut kernels, mut derivations) = (vec![], vec![]);
    while let Some((_, Some(kernel))) = search.best.get(&demand) {
        derivations.push(search.derivation(&demand, kernel));
        demand = remaining(program, &demand, kernel);
        kernels.push(kernel.clone());
    }
    kernels.reverse();
    derivations.reverse();
    Ok(Selection { kernels, price, considered: search.considered, limited: search.limited, derivations })
}

/// What must be in memory before `kernel` runs, so that `demand` is afterwards.
fn remaining(program: &Program, demand: &[usize], kernel: &Candidate) -> Vec<usize> {
    let kept = demand.iter().filter(|v| !kernel.stored.contains(v));
    let read = kernel.reads.iter().filter(|v| program.values[**v].role == Role::Computed);
    let mut next: Vec<usize> = kept.chain(read).copied().collect();
    next.sort_unstable();
    next.dedup();
    next
}

impl Search<'_> {
    /// A bound on the price of `demand`: having one value in memory costs no more than having it among others.
    fn at_least(&mut self, demand: &[usize]) -> f64 {
        if demand.len() == 1 {
            return 0.0; // the bound would be the price itself, which may never be asked for
        }
        demand.iter().map(|v| self.price(&[*v])).fold(0.0, f64::max)
    }

    /// The least price of having `demand` in memory.
    fn price(&mut self, demand: &[usize]) -> f64 {
        if demand.is_empty() {
            return 0.0;
        }
        if let Some((price, _)) = self.best.get(demand) {
            return *price;
        }
        let all = self.limits.kernels_per_value;
        let found = if self.considered >= self.limits.kernels {
            self.limited = true;
            // The first may lead nowhere.
            Some(self.least(demand, 1))
                .filter(|(price, _)| price.is_finite())
                .unwrap_or_else(|| self.least(demand, all))
        } else {
            self.least(demand, all)
        };
        let price = found.0;
        self.best.insert(demand.to_vec(), found);
        price
    }

    /// The least price of having `demand` in memory, and the last kernel for that, among so many candidates for a value.
    fn least(&mut self, demand: &[usize], limit: usize) -> (f64, Option<Candidate>) {
        let found = candidates(self.program, demand, self.prologues, limit);
        self.limited |= limit > 1 && found.len() >= limit;
        self.considered += found.len();
        let mut priced: Vec<Priced> = found
            .into_iter()
            .map(|kernel| {
                let own = self.roofline.price(self.program, &kernel);
                let rest = remaining(self.program, demand, &kernel);
                Priced { bound: own + self.at_least(&rest), own, rest, kernel }
            })
            .collect();
        priced.sort_by(|a, b| a.bound.total_cmp(&b.bound)); // stable: ties stay in the order of the grammar
        let (mut least, mut chosen) = (f64::INFINITY, None);
        for each in priced {
            if each.bound >= least {
                break;
            }
            let price = each.own + self.price(&each.rest);
            if price < least {
                (least, chosen) = (price, Some(each.kernel));
            }
        }
        (least, chosen)
    }

    /// What else could have been the last kernel before `demand`, at the prices that the search has found.
    fn derivation(&self, demand: &[usize], kernel: &Candidate) -> Derivation {
        let found = candidates(self.program, demand, self.prologues, self.limits.kernels_per_value);
        let least = self.best.get(demand).map_or(0.0, |(price, _)| *price);
        let mut others: Vec<Other> = vec![];
        for other in found.iter().filter(|c| c.inside != kernel.inside || c.stored != kernel.stored) {
            let rest = remaining(self.program, demand, other);
            let alone = |v: &usize| self.best.get(&vec![*v]).map_or(0.0, |(price, _)| *price);
            let known = if rest.is_empty() { Some(0.0) } else { self.best.get(&rest).map(|(price, _)| *price) };
            let bound = || if rest.len() == 1 { 0.0 } else { rest.iter().map(alone).fold(0.0, f64::max) };
            let price = self.roofline.price(self.program, other) + known.unwrap_or_else(bound);
            let more = rounded((price - least).max(0.0));
            others.push(Other { ops: ops(self.program, other), more, at_least: known.is_none() });
        }
        let considered = others.len();
        others.sort_by(|a, b| a.more.total_cmp(&b.more));
        others.dedup_by(|a, b| a.ops == b.ops);
        others.truncate(OTHERS);
        let seconds = rounded(self.roofline.price(self.program, kernel));
        Derivation { seconds, considered, others, rules: rules(self.program, kernel), ..Derivation::default() }
    }
}

/// The ops of a kernel by rank; views, which cost nothing, are left out where there is anything else.
fn ops(program: &Program, kernel: &Candidate) -> String {
    let ops = kernel.inside.iter().map(|(v, (index, _))| program.values[*v].choices[*index].op);
    let (views, others): (Vec<Op>, Vec<Op>) = ops.partition(|op| op.class() == Class::View);
    let named = if others.is_empty() { views } else { others };
    named.iter().map(|op| op.name()).collect::<Vec<_>>().join(" ")
}

/// Rules that brought nodes of a kernel, or what is folded into its weights.
fn rules(program: &Program, kernel: &Candidate) -> Vec<String> {
    let inside = kernel.inside.iter().map(|(v, (index, _))| &program.values[*v].choices[*index]);
    let folded = inside.clone().flat_map(|c| &c.operands).filter(|o| program.values[**o].role == Role::Weight);
    let folded = folded.flat_map(|o| program.values[*o].choices.first());
    let rules: BTreeSet<String> = inside.chain(folded).filter_map(|c| c.rule).map(|rule| rule.to_string()).collect();
    rules.into_iter().collect()
}

/// The optimized graph that a selection stands for: nodes in launch order, one group for each kernel.
///
/// # Errors
/// Where the selection is not executable: a broken invariant of the search.
pub fn rebuild(like: &Graph, program: &Program, selection: &Selection) -> Result<Graph> {
    let mut builder = Builder::like(like);
    let mut at: HashMap<usize, ValueId> = HashMap::new(); // values in memory, and weights
    let inputs = program.values.iter().enumerate().filter_map(|(v, value)| match value.role {
        Role::Input(index) => Some((v, ValueId(index as u32))),
        _ => None,
    });
    at.extend(inputs);
    let mut kernels = vec![];
    for kernel in &selection.kernels {
        let choices = kernel.inside.iter().map(|(v, (index, _))| (*v, &program.values[*v].choices[*index]));
        for (_, choice) in choices.clone() {
            for operand in &choice.operands {
                weights(&mut builder, program, *operand, &mut at)?;
            }
        }
        let mut inside: HashMap<usize, ValueId> = HashMap::new();
        for (value, choice) in choices {
            let find = |o: &usize| inside.get(o).or_else(|| at.get(o)).copied();
            let operands: Option<Vec<ValueId>> = choice.operands.iter().map(find).collect();
            let Some(operands) = operands else {
                bail!(Internal, "`{}` of a kernel reads what no earlier kernel stores", choice.op);
            };
            inside.insert(value, builder.graph.push_op(choice.op, &operands, choice.attrs.clone())?);
        }
        let mut values: Vec<ValueId> = inside.values().copied().collect();
        values.sort();
        at.extend(kernel.stored.iter().map(|v| (*v, inside[v])));
        kernels.push(Fused { values });
    }
    for ((name, _), value) in like.results.iter().zip(&program.results) {
        weights(&mut builder, program, *value, &mut at)?;
        let Some(value) = at.get(value) else { bail!(Internal, "result `{name}` is not computed") };
        builder.graph.result(name, *value);
    }
    Ok(Graph { stage: Stage::Optimized, kernels, ..builder.graph })
}

/// Makes sure that a weight's value is there.
fn weights(b: &mut Builder, program: &Program, value: usize, at: &mut HashMap<usize, ValueId>) -> Result<()> {
    let node = &program.values[value];
    let (Role::Weight, Some(choice)) = (node.role, node.choices.first()) else { return Ok(()) };
    if at.contains_key(&value) {
        return Ok(());
    }
    let mut operands = vec![];
    for operand in &choice.operands {
        weights(b, program, *operand, at)?;
        let Some(operand) = at.get(operand) else { bail!(Internal, "`{}` reads what is no weight", choice.op) };
        operands.push(*operand);
    }
    let id = if choice.op == Op::WEIGHT {
        b.weight(choice.attrs.str("name"), &node.ty)
    } else {
        b.add(choice.op, choice.attrs.clone(), &operands)?
    };
    at.insert(value, id);
    Ok(())
}
