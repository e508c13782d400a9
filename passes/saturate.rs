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
use crate::precision::MANY;
use crate::rules;
use crate::{Options, State};
use ir::cost::Workload;
use ir::kernel::PROLOGUE_TOKENS;
use ir::ops::Class;
use ir::{Graph, Model, Op, Place, Result, TokenRange, ValueId};
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
        let (variants, mut lines) = optimize(alike, shared, options).at(|| format!("graph @{}", alike[0].name))?;
        graphs.extend(variants);
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

/// The variants of one graph - given as one, or as several for different steps - and notes on how the search went.
///
/// # Errors
/// Where some value fits no kernel.
pub fn optimize(alike: &[Graph], shared: BTreeSet<String>, options: &Options) -> Result<(Vec<Graph>, Vec<String>)> {
    let mut kept = shared;
    loop {
        let (mut all, mut notes) = (vec![], vec![]);
        for graph in alike {
            let (classes, ids) = seed(graph, kept.clone());
            let (classes, phases) = rules::saturate(classes, &options.rules, &options.search)?;
            let results: Vec<_> = graph.results.iter().map(|(_, v)| ids[v.0 as usize]).collect();
            let program = Program::read(&classes, &results);
            let (mut variants, mut lines) = variants(graph, &program, options)?;
            notes.push(saturation_note(graph, &classes, &phases));
            notes.append(&mut lines);
            all.append(&mut variants);
        }
        let conflict = packed_twice(&all);
        if conflict.is_empty() || conflict.is_subset(&kept) {
            return Ok((all, notes));
        }
        kept.extend(conflict);
    }
}

fn saturation_note(graph: &Graph, classes: &Classes, phases: &[rules::PhaseReport]) -> String {
    let phases: Vec<String> =
        phases.iter().map(|p| format!("{} {} after {} rounds", p.phase, p.stop, p.rounds)).collect();
    format!(
        "@{}: {} nodes, {} classes with {} e-nodes; {}",
        graph.name,
        graph.nodes.len(),
        classes.number_of_classes(),
        classes.total_number_of_nodes(),
        phases.join(", ")
    )
}

/// The optimized graph of every range, equal neighbours merged.
fn variants(graph: &Graph, program: &Program, options: &Options) -> Result<(Vec<Graph>, Vec<String>)> {
    let steps = graph.range.unwrap_or(TokenRange { min: 1, max: options.limits.tokens });
    let (mut out, mut notes): (Vec<Graph>, Vec<String>) = (vec![], vec![]);
    for (min, max, priced) in RANGES {
        let range = TokenRange { min: min.max(steps.min), max: max.min(steps.max) };
        if range.min > range.max {
            continue;
        }
        let step = priced_step(range, priced, options);
        let roofline = Roofline::new(program, options.target.machine, step);
        let selection = select(program, &roofline, range.max <= PROLOGUE_TOKENS, options)?;
        notes.push(selection_note(graph, range, &selection));
        let next = Graph { range: Some(range), ..rebuild(graph, program, &selection)? };
        match out.last_mut() {
            Some(last) if Graph { range: last.range, ..next.clone() } == *last => {
                last.range = last.range.map(|r| TokenRange { min: r.min, max: range.max });
            }
            _ => out.push(next),
        }
    }
    Ok((out, notes))
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

/// Weights that some variants read as they are and others with something folded in, or with different things.
fn packed_twice(variants: &[Graph]) -> BTreeSet<String> {
    let mut forms: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for graph in variants {
        for node in graph.nodes.iter().filter(|n| !matches!(n.op.class(), Class::Weight)) {
            for operand in &node.operands {
                if let Some((weight, scale)) = packed_form(graph, *operand)
                    && node.op.class() != Class::WeightFold
                {
                    forms.entry(weight).or_default().insert(scale.unwrap_or_default());
                }
            }
        }
    }
    forms.into_iter().filter(|(_, forms)| forms.len() > 1).map(|(weight, _)| weight).collect()
}

/// For a value that is a weight: its name, and the name of what is folded into its columns.
pub(crate) fn packed_form(graph: &Graph, value: ValueId) -> Option<(String, Option<String>)> {
    let node = graph.node(value)?;
    match node.op.class() {
        Class::Weight => Some((node.attrs.str("name").to_string(), None)),
        Class::WeightFold => {
            let (weight, none) = packed_form(graph, node.operands[0])?;
            let (scale, _) = packed_form(graph, node.operands[1])?;
            none.is_none().then_some((weight, Some(scale)))
        }
        _ => None,
    }
}
