//! One body for each distinct kernel: a group of nodes cut out of its graph, what crosses the cut becoming inputs and
//! results.
//!
//! ```text
//! %7 = rms_normalize %0        graph @layer_rms_normalize(%x0: f32[t, 576], %w0: f32[576]) stage planned {
//! %8 = mul_row %7, %2     ->     %2 = rms_normalize %x0
//!                                %3 = mul_row %2, %w0 ...
//! ```
//!
//! Inputs are named by what they are and numbered, so equal kernels have equal bodies.

use ir::cost::Workload;
use ir::graph::{Fused, Input};
use ir::ops::Class;
use ir::plan::{CacheGroup, Kernel, KernelId};
use ir::{Graph, Model, Result, Stage, TokenRange, Type, ValueId, bail};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Where an argument of a kernel comes from, in terms of its graph.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A value of the graph.
    Value(ValueId),
    /// A value of the graph that is a weight, or computed from weights when packing.
    Weight(ValueId),
}

/// A kernel where it stands in a graph.
pub struct Site {
    /// Which.
    pub kernel: KernelId,
    /// What its inputs are bound to, the step left out.
    pub inputs: Vec<Source>,
    /// What its results define, caches included.
    pub results: Vec<ValueId>,
}

/// All bodies, and where they stand: `sites[graph][kernel of the graph]`.
pub struct Bodies {
    /// Distinct kernels.
    pub kernels: Vec<Kernel>,
    /// By graph of the model, then by kernel of the graph.
    pub sites: Vec<Vec<Site>>,
    /// Of all caches.
    pub groups: Vec<CacheGroup>,
}

impl Bodies {
    /// Cuts every kernel out of every graph.
    ///
    /// # Errors
    /// Where a graph is not at the optimized stage.
    pub fn new(model: &Model, tokens: usize) -> Result<Bodies> {
        let groups = CacheGroup::of(model.graphs.iter().flat_map(|graph| &graph.inputs).map(|input| &input.ty));
        let mut out = Bodies { kernels: vec![], sites: vec![], groups };
        let mut seen: HashMap<String, usize> = HashMap::new();
        let mut names: BTreeSet<String> = BTreeSet::new();
        for graph in &model.graphs {
            if graph.stage != Stage::Optimized {
                bail!(Internal, "graph @{} is at stage {}, not optimized", graph.name, graph.stage);
            }
            let range = graph.range.unwrap_or(TokenRange { min: 1, max: tokens });
            let mut sites = vec![];
            for group in &graph.kernels {
                let (body, inputs, results) = cut(graph, group)?;
                let index = *seen.entry(format!("{body:?}")).or_insert_with(|| {
                    let name = unique(&mut names, name(graph, &body));
                    let body = Graph { name: name.clone(), ..body };
                    out.kernels.push(Kernel { name, body, range, groups: out.groups.clone() });
                    out.kernels.len() - 1
                });
                let known = &mut out.kernels[index].range;
                *known = TokenRange { min: known.min.min(range.min), max: known.max.max(range.max) };
                sites.push(Site { kernel: KernelId(index as u32), inputs, results });
            }
            out.sites.push(sites);
        }
        for kernel in &mut out.kernels {
            kernel.body.range = Some(kernel.range);
        }
        Ok(out)
    }
}

type Cut = (Graph, Vec<Source>, Vec<ValueId>);

fn cut(graph: &Graph, group: &Fused) -> Result<Cut> {
    let inside: BTreeSet<ValueId> = group.values.iter().copied().collect();
    let mut body = Graph { stage: Stage::Planned, ..Graph::new("") };
    let (mut to, mut sources) = (BTreeMap::new(), vec![]);
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for value in &inside {
        for operand in &graph.node(*value).map(|n| n.operands.clone()).unwrap_or_default() {
            if inside.contains(operand) || to.contains_key(operand) {
                continue;
            }
            let ty = graph.ty(*operand);
            let stem = stem(ty);
            let count = counts.entry(stem).or_default();
            let input = Input { name: format!("{stem}{count}"), ty: ty.clone() };
            *count += 1;
            to.insert(*operand, body.input(input.name, input.ty));
            match ty {
                Type::Step => {}
                _ if ty.is_static() && graph.node(*operand).is_some() => sources.push(Source::Weight(*operand)),
                _ => sources.push(Source::Value(*operand)),
            }
        }
    }
    for value in &inside {
        let Some(node) = graph.node(*value) else { bail!(Internal, "input {value} in a kernel of @{}", graph.name) };
        let operands: Vec<ValueId> = node.operands.iter().map(|o| to[o]).collect();
        to.insert(*value, body.push_op(node.op, &operands, node.attrs.clone())?);
    }
    let read_outside = |v: &ValueId| {
        let by_node = graph
            .values()
            .any(|user| !inside.contains(&user) && graph.node(user).is_some_and(|n| n.operands.contains(v)));
        by_node || graph.results.iter().any(|(_, r)| r == v)
    };
    let results: Vec<ValueId> = inside.iter().copied().filter(read_outside).collect();
    for (index, value) in results.iter().enumerate() {
        let name = cache_input(&body, to[value]).unwrap_or_else(|| format!("y{index}"));
        body.result(name, to[value]);
    }
    Ok((body, sources, results))
}

/// For a cache that has been appended to: the name of the input it came from.
fn cache_input(body: &Graph, mut value: ValueId) -> Option<String> {
    matches!(body.ty(value), Type::Cache { .. }).then_some(())?;
    while let Some(node) = body.node(value) {
        value = *node.operands.first()?;
    }
    Some(body.inputs.get(value.0 as usize)?.name.clone())
}

fn stem(ty: &Type) -> &'static str {
    match ty {
        Type::Cache { .. } => "cache",
        Type::Step => "step",
        Type::Routing { .. } => "routing",
        ty if ty.is_static() => "w",
        Type::Tensor { dtype: ir::DType::I32, .. } => "index",
        Type::Tensor { .. } => "x",
    }
}

/// `layer_rms_normalize_mul_row_quantize`: the graph, then the ops; repeats counted, views left out.
fn name(graph: &Graph, body: &Graph) -> String {
    let mut runs: Vec<(&str, usize)> = vec![];
    for node in body.nodes.iter().filter(|n| n.op.class() != Class::View) {
        match runs.iter_mut().find(|(name, _)| *name == node.op.name()) {
            Some((_, count)) => *count += 1,
            None => runs.push((node.op.name(), 1)),
        }
    }
    let mut words = vec![graph.name.clone()];
    words.extend(runs.iter().take(6).map(|(op, n)| if *n > 1 { format!("{op}{n}") } else { op.to_string() }));
    let symbol: String = words.join("_").chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    if symbol.starts_with(|c: char| c.is_ascii_alphabetic()) { symbol } else { format!("k_{symbol}") }
}

fn unique(names: &mut BTreeSet<String>, name: String) -> String {
    let mut candidate = name.clone();
    let mut count = 1;
    while !names.insert(candidate.clone()) {
        count += 1;
        candidate = format!("{name}__{count}");
    }
    candidate
}

/// Operations of one launch for one token, and the bytes of weights one launch reads.
pub fn work(body: &Graph) -> (f64, usize) {
    let work = Workload::one(1, 0).work(body, &body.computed());
    (work.operations(), work.weight_bytes as usize)
}
