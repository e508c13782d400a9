//! Canonical to optimized: each distinct graph in one e-graph, then the cheapest kernels for each range of `t`.
//!
//! ```text
//! graph @layer  ->  graph @layer for t in 1..=8      (contractions compute their activations)
//!                   graph @layer for t in 9..=512
//! ```
//!
//! The e-graph is saturated once; the ranges differ in price only. Ranges that choose the same program and kernels become
//! one. A weight is packed once: where two ranges would pack one differently, folding into it is given up.

use crate::cost::Roofline;
use crate::egraph::{Classes, seed};
use crate::extract::{Program, Selection, rebuild, select};
use crate::rules;
use crate::{Options, SearchLimits, State, Strategy};
use ir::artifact::Derivation;
use ir::cost::Workload;
use ir::kernel::PROLOGUE_TOKENS;
use ir::plan::MANY;
use ir::recipe::{self, matrices, recipe};
use ir::{Graph, Model, Op, Place, Result, TokenRange};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

/// Ranges that kernels are chosen for: one token, few (an operand prologue is allowed), some, many; and the number of
/// tokens at which each is priced.
const RANGES: [(usize, usize, usize); 4] =
    [(1, 1, 1), (2, PROLOGUE_TOKENS, 4), (PROLOGUE_TOKENS + 1, MANY - 1, 32), (MANY, usize::MAX, 256)];

/// Positions attended in the step that variants are priced for.
const PRICED_CONTEXT: f64 = 512.0;

/// The pass.
///
/// # Errors
/// Where some value fits no kernel.
pub fn run(state: &mut State, options: &Options) -> Result<Vec<String>> {
    let shared = shared_weights(&state.model);
    let (mut graphs, mut notes) = (vec![], vec![]);
    for alike in state.model.graphs.chunk_by(|a, b| a.name == b.name) {
        let shared = shared.get(&alike[0].name).cloned().unwrap_or_default();
        let Optimized { variants, mut derivations, notes: mut lines } =
            optimize(alike, shared, options).at(|| format!("graph @{}", alike[0].name))?;
        graphs.extend(variants);
        state.derivations.append(&mut derivations);
        notes.append(&mut lines);
    }
    state.model.graphs = graphs;
    Ok(notes)
}

/// For each graph its weights that are read by more than one node of the whole model, over all calls.
fn shared_weights(model: &Model) -> BTreeMap<String, BTreeSet<String>> {
    let mut readers: BTreeMap<String, usize> = BTreeMap::new();
    let named = |g: &Graph| -> Vec<(String, usize)> {
        let uses = g.uses();
        let weights = g.nodes.iter().enumerate().filter(|(_, n)| n.op == Op::WEIGHT);
        weights.map(|(i, n)| (n.attrs.str("name").to_string(), uses[g.value_of(i).0 as usize])).collect()
    };
    let names: BTreeMap<&str, Vec<(String, usize)>> =
        model.graphs.iter().map(|g| (g.name.as_str(), named(g))).collect();
    for call in &model.calls {
        for (name, uses) in names.get(call.graph.as_str()).into_iter().flatten() {
            *readers.entry(format!("{}{name}", call.prefix)).or_default() += uses;
        }
    }
    let mut shared: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for call in &model.calls {
        for (name, _) in names.get(call.graph.as_str()).into_iter().flatten() {
            if readers.get(&format!("{}{name}", call.prefix)).is_some_and(|n| *n > 1) {
                shared.entry(call.graph.clone()).or_default().insert(name.clone());
            }
        }
    }
    shared
}

/// One graph, optimized.
#[derive(Default)]
pub struct Optimized {
    /// By ascending range of tokens.
    pub variants: Vec<Graph>,
    /// How the search came to the kernels of each range.
    pub derivations: Vec<Derivation>,
    /// How the search went.
    pub notes: Vec<String>,
}

impl Optimized {
    fn append(&mut self, mut other: Optimized) {
        self.variants.append(&mut other.variants);
        self.derivations.append(&mut other.derivations);
        self.notes.append(&mut other.notes);
    }
}

/// The variants of one graph, given as one, or as several for different steps.
///
/// # Errors
/// Where some value fits no kernel.
pub fn optimize(alike: &[Graph], shared: BTreeSet<String>, options: &Options) -> Result<Optimized> {
    let mut kept = shared;
    loop {
        let mut optimized = Optimized::default();
        for graph in alike {
            let (classes, ids) = seed(graph, kept.clone());
            let (classes, phases) = rules::saturate(classes, &options.rules, &options.search)?;
            let results: Vec<_> = graph.results.iter().map(|(_, v)| ids[v.0 as usize]).collect();
            let program = Program::read(&classes, &results);
            optimized.notes.extend(saturation_notes(graph, &classes, &phases));
            optimized.append(variants(graph, &program, options)?);
        }
        let conflict = packed_twice(&optimized.variants);
        if options.copies || conflict.is_empty() || conflict.is_subset(&kept) {
            return Ok(optimized);
        }
        kept.extend(conflict);
    }
}

/// How the search for equal programs went: a line for each phase, with the rules that found something.
fn saturation_notes(graph: &Graph, classes: &Classes, phases: &[rules::PhaseReport]) -> Vec<String> {
    let ms = |time: std::time::Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
    let phase = |p: &rules::PhaseReport| {
        let all: std::time::Duration = p.rules.iter().map(|r| r.time).sum();
        let found = p.rules.iter().filter(|r| r.matches > 0);
        let found: Vec<String> =
            found.map(|r| format!("{} {}/{} {}", r.rule, r.applied, r.matches, ms(r.time))).collect();
        let rules = if found.is_empty() { "no rule matched".to_string() } else { found.join(", ") };
        format!("@{} {}: {} after {} rounds, {}: {rules}", graph.name, p.phase, p.stop, p.rounds, ms(all))
    };
    let (nodes, classes, enodes) = (graph.nodes.len(), classes.number_of_classes(), classes.total_number_of_nodes());
    let first = format!("@{}: {nodes} nodes, {classes} classes with {enodes} e-nodes", graph.name);
    std::iter::once(first).chain(phases.iter().map(phase)).collect()
}

/// The optimized graph of every range, equal neighbours merged.
fn variants(graph: &Graph, program: &Program, options: &Options) -> Result<Optimized> {
    let steps = graph.range.unwrap_or(TokenRange { min: 1, max: options.limits.tokens });
    let mut found = Optimized::default();
    for (min, max, priced) in RANGES {
        let range = TokenRange { min: min.max(steps.min), max: max.min(steps.max) };
        if range.min > range.max {
            continue;
        }
        let step = priced_step(range, priced, options);
        let roofline = |program: &Program| Roofline::new(program, options.target.machine, step).with(&options.costs);
        let prologues = range.max <= PROLOGUE_TOKENS;
        let (program, selection) = match options.strategy {
            Strategy::Joint => {
                (Cow::Borrowed(program), select(program, &roofline(program), prologues, &options.search)?)
            }
            Strategy::Fixed => {
                let program = program.fixed(&roofline(program));
                let largest = SearchLimits { kernels: 0, ..options.search };
                let selection = select(&program, &roofline(&program), prologues, &largest)?;
                (Cow::Owned(program), selection)
            }
        };
        found.notes.push(selection_note(graph, range, &selection));
        let next = Graph { range: Some(range), ..rebuild(graph, &program, &selection)? };
        let of_graph = |d: Derivation| Derivation { graph: graph.name.clone(), tokens: range, ..d };
        found.derivations.extend(selection.derivations.into_iter().map(of_graph));
        match found.variants.last_mut() {
            Some(last) if Graph { range: last.range, ..next.clone() } == *last => {
                last.range = last.range.map(|r| TokenRange { min: r.min, max: range.max });
            }
            _ => found.variants.push(next),
        }
    }
    Ok(found)
}

/// The step that kernels for `range` are priced in: the workload's commonest in that range, else one of `tokens` tokens.
fn priced_step(range: TokenRange, tokens: usize, options: &Options) -> Workload {
    let steps = options.traffic.map_or(vec![], |traffic| traffic.steps(options.limits.tokens));
    let here = |step: &Workload| (range.min as f64..=range.max as f64).contains(&step.tokens.ceil());
    let commonest = steps.iter().filter(|s| here(&s.step)).max_by(|a, b| a.count.total_cmp(&b.count));
    if let Some(steps) = commonest {
        return steps.step;
    }
    let tokens = tokens.clamp(range.min, range.max) as f64;
    let each = if range.max <= PROLOGUE_TOKENS { tokens } else { 1.0 };
    let context = steps.last().map_or(PRICED_CONTEXT, |s| s.step.context);
    Workload { tokens, sequences: each, rows: each, context, candidates: 1 }
}

fn selection_note(graph: &Graph, range: TokenRange, selection: &Selection) -> String {
    format!(
        "@{} t {}..={}: {} kernels, {:.1} us predicted, {} priced{}",
        graph.name,
        range.min,
        range.max,
        selection.kernels.len(),
        selection.price * 1e6,
        selection.considered,
        if selection.limited { "; a limit stopped the search" } else { "" }
    )
}

/// Matrices that some variants read as they are and others with something folded in, or with different things. Disjoint
/// slices of one matrix are one packing of it.
fn packed_twice(variants: &[Graph]) -> BTreeSet<String> {
    let forms: Vec<BTreeMap<String, BTreeSet<String>>> = variants.iter().map(packed_forms).collect();
    let sliced = |form: &String| form.starts_with("slice_rows");
    let mut twice = BTreeSet::new();
    for (matrix, first) in forms.iter().flatten() {
        let differs = forms.iter().any(|of| of.get(matrix).is_some_and(|forms| forms != first));
        if differs || first.len() > 1 && !first.iter().all(sliced) {
            twice.insert(matrix.clone());
        }
    }
    twice
}

/// By matrix, the names of what is packed from it.
fn packed_forms(graph: &Graph) -> BTreeMap<String, BTreeSet<String>> {
    let mut forms: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in graph.nodes.iter().filter(|n| !n.ty.is_static()) {
        for recipe in node.operands.iter().filter_map(|o| recipe(graph, *o, "")) {
            for matrix in matrices(&recipe) {
                forms.entry(matrix.to_string()).or_default().insert(recipe::name(&recipe));
            }
        }
    }
    forms
}
