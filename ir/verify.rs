//! Decides whether a program is legal for its stage. What has passed is [`Verified`], and only that reaches a backend.
//!
//! Every graph:
//! - inputs have distinct names that are words; results have distinct names;
//! - operands are defined before they are read; every type is the one the op's type rule gives; attributes are finite;
//! - weights have fixed extents: `f32[n]`, `dtype[n, k]` or `dtype[experts, n, k]`;
//! - a cache that is appended to is read by nothing else (the append is in place), and leaves under its input's name;
//! - estimates that are rescored are read by nothing else, for the same reason.
//!
//! `canonical`: besides, no node is unused, none is there twice, operands of commutative ops ascend, and no node does
//! nothing (scales by 1). `optimized`: no node is unused; kernels hold every node but weights and folds exactly once, in
//! ascending order, and each is of a kind of [`crate::kernel`]. `planned`: the whole body is such a kernel, for a stated
//! range; weights are inputs.
//!
//! A model: calls name graphs; variants of a graph have equal inputs and results and disjoint ranges; inputs are bound to
//! values of their type; caches are distinct; outputs exist; and, where there is a weight table, every weight has its entry
//! and type there.
//!
//! A plan: bodies are planned graphs; launches pass what the body's inputs and results are; buffers lie in the arena; the
//! variants cover `1..=limits.tokens`.

use crate::graph::{Attr, Graph, Node, Stage, TokenRange, ValueId};
use crate::kernel;
use crate::layout;
use crate::model::{Model, WeightTable};
use crate::ops::{Class, Op};
use crate::plan::{Arg, CacheGroup, Launch, Plan, RowCount, in_place};
use crate::text::is_word;
use crate::types::{Dim, Type};
use crate::{DType, Place, Result, bail};
use std::collections::{BTreeMap, BTreeSet};

/// Proof that [`verify_model`] or [`verify_plan`] has looked at it.
#[derive(Debug)]
pub struct Verified<'a, T>(&'a T);

impl<T> Clone for Verified<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Verified<'_, T> {}

impl<T> std::ops::Deref for Verified<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.0
    }
}

/// Checks a graph against the rules of its stage.
///
/// # Errors
/// Of kind `Input`, naming graph and value. Who built the graph knows whether a pass is to blame.
pub fn verify(graph: &Graph) -> Result<()> {
    rules(graph).at(|| format!("graph @{} ({})", graph.name, graph.stage))
}

fn rules(graph: &Graph) -> Result<()> {
    names(graph)?;
    for index in 0..graph.nodes.len() {
        let (v, node) = (graph.value_of(index), &graph.nodes[index]);
        definition(graph, v, node).at(|| format!("{v} = {}", node.op))?;
    }
    if let Some((name, v)) = graph.results.iter().find(|(_, v)| v.0 as usize >= graph.len()) {
        bail!(Input, "result {name} is {v}, but there are {} values", graph.len());
    }
    if graph.range.is_some_and(|r| r.min == 0 || r.min > r.max) {
        bail!(Input, "a range of tokens begins at 1 or later and ends no earlier than it begins");
    }
    caches(graph)?;
    estimates(graph)?;
    match graph.stage {
        Stage::Imported => no_kernels(graph),
        Stage::Canonical => no_kernels(graph).and_then(|()| all_used(graph)).and_then(|()| one_spelling(graph)),
        Stage::Optimized => all_used(graph).and_then(|()| kernels(graph)),
        Stage::Planned => no_kernels(graph).and_then(|()| all_used(graph)).and_then(|()| planned(graph)),
    }
}

fn names(graph: &Graph) -> Result<()> {
    let mut seen = BTreeSet::new();
    for input in &graph.inputs {
        if !is_word(&input.name) || !seen.insert(&input.name) {
            bail!(Input, "input {:?}: expected a word that no other input is named", input.name);
        }
    }
    let mut seen = BTreeSet::new();
    match graph.results.iter().find(|(name, _)| !seen.insert(name)) {
        Some((name, _)) => bail!(Input, "two results are named `{name}`"),
        None => Ok(()),
    }
}

fn definition(graph: &Graph, v: ValueId, node: &Node) -> Result<()> {
    if let Some(operand) = node.operands.iter().find(|o| **o >= v) {
        bail!(Input, "{operand} is not defined before this");
    }
    if let Some((name, _)) = node.attrs.iter().find(|(_, a)| matches!(a, Attr::Float(x) if !x.is_finite())) {
        bail!(Input, "attribute `{name}` is not finite");
    }
    if node.op.class() == Class::Weight {
        return weight(node);
    }
    let types: Vec<&Type> = node.operands.iter().map(|o| graph.ty(*o)).collect();
    let inferred = node.op.infer(&types, &node.attrs)?;
    if inferred != node.ty {
        bail!(Input, "its type is {}, the type rule says {inferred}", node.ty);
    }
    Ok(())
}

fn weight(node: &Node) -> Result<()> {
    if !node.operands.is_empty()
        || node.attrs.iter().count() != 1
        || !matches!(node.attrs.get("name"), Some(Attr::Str(_)))
    {
        bail!(Input, "a weight has a name and nothing else");
    }
    match node.ty.as_tensor() {
        Some((DType::F32, [Dim::N(_)])) => Ok(()),
        Some((dtype, [Dim::N(_), Dim::N(_)] | [Dim::N(_), Dim::N(_), Dim::N(_)]))
            if dtype.is_float() || dtype.int().is_some() =>
        {
            Ok(())
        }
        Some((DType::Q8_PLANES, [Dim::N(_), Dim::N(_)])) => Ok(()),
        _ => bail!(Input, "expected f32[n], dtype[n, k] or dtype[experts, n, k], found {}", node.ty),
    }
}

/// Appends happen in place: the value before is gone, and the value after is the cache its input names.
fn caches(graph: &Graph) -> Result<()> {
    for input in &graph.inputs {
        if let Type::Cache { dim, dtype, .. } = &input.ty
            && !dtype.caches(*dim)
        {
            let (name, block) = (&input.name, dtype.format().block);
            bail!(Input, "input %{name}: expected heads of a multiple of {block} for {dtype}, found {dim}");
        }
    }
    let uses = graph.uses();
    let mut origin: Vec<Option<usize>> = vec![None; graph.len()]; // of cache values: the input they grew from
    for v in graph.values() {
        let at = v.0 as usize;
        if !matches!(graph.ty(v), Type::Cache { .. }) {
            continue;
        }
        let Some(node) = graph.node(v) else {
            origin[at] = Some(at);
            continue;
        };
        let before = node.operands.first().map(|o| o.0 as usize);
        origin[at] = before.and_then(|b| origin[b]);
        if let Some(before) = before.filter(|b| uses[*b] != 1) {
            bail!(Input, "{v} = {}: the cache %{before} it appends to is read elsewhere too", node.op);
        }
    }
    for (name, v) in &graph.results {
        if let Some(input) = origin[v.0 as usize].filter(|i| graph.inputs[*i].name != *name) {
            bail!(Input, "result {name} is the cache of input %{}", graph.inputs[input].name);
        }
    }
    Ok(())
}

/// Estimates are rescored in place: the value before is gone.
fn estimates(graph: &Graph) -> Result<()> {
    let uses = graph.uses();
    for (index, node) in graph.nodes.iter().enumerate().filter(|(_, n)| n.op.class() == Class::Rescore) {
        let (v, before) = (graph.value_of(index), node.operands[0]);
        let returned = graph.results.iter().any(|(_, r)| *r == before);
        if graph.stage != Stage::Planned && (uses[before.0 as usize] != 1 || returned || graph.node(before).is_none()) {
            bail!(Input, "{v} = {}: the estimates {before} that it changes are read elsewhere too", node.op);
        }
    }
    Ok(())
}

fn no_kernels(graph: &Graph) -> Result<()> {
    if graph.kernels.is_empty() { Ok(()) } else { bail!(Input, "kernels belong to the optimized stage") }
}

fn all_used(graph: &Graph) -> Result<()> {
    let uses = graph.uses();
    match (graph.inputs.len()..graph.len()).find(|v| uses[*v] == 0) {
        Some(v) => bail!(Input, "%{v} is not used"),
        None => Ok(()),
    }
}

fn one_spelling(graph: &Graph) -> Result<()> {
    let mut seen: BTreeMap<(Op, &[ValueId]), Vec<ValueId>> = BTreeMap::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        let v = graph.value_of(index);
        let alike = seen.entry((node.op, &node.operands)).or_default();
        if let Some(first) = alike.iter().find(|v| graph.node(**v).is_some_and(|n| n.attrs == node.attrs)) {
            bail!(Input, "{v} = {} is {first} again", node.op);
        }
        alike.push(v);
        if node.op.row().commutative && !node.operands.is_sorted() {
            bail!(Input, "{v} = {}: its operands can be swapped, so they must ascend", node.op);
        }
        let neutral = |name: &str| node.op.row().attrs.iter().find(|s| s.name == name).and_then(|s| s.neutral);
        let nothing = |(name, attr): (&str, &Attr)| matches!(attr, Attr::Float(x) if neutral(name) == Some(*x));
        if node.attrs.iter().any(nothing) {
            bail!(Input, "{v} = {} changes nothing", node.op);
        }
    }
    Ok(())
}

fn kernels(graph: &Graph) -> Result<()> {
    let outside = |v: &ValueId| graph.node(*v).is_none_or(|n| n.ty.is_static());
    let mut values = graph.kernels.iter().flat_map(|k| &k.values);
    for v in graph.values().filter(|v| !outside(v)) {
        match values.next() {
            Some(found) if *found == v => {}
            Some(found) => bail!(Input, "expected {v} to be the next value of the kernels, found {found}"),
            None => bail!(Input, "{v} is in no kernel"),
        }
    }
    if let Some(found) = values.next() {
        bail!(Input, "{found} is in a kernel but no node, or a weight");
    }
    for (k, kernel) in graph.kernels.iter().enumerate() {
        kernel::kind(graph, &kernel.values).at(|| format!("kernel {k}"))?;
    }
    Ok(())
}

fn planned(graph: &Graph) -> Result<()> {
    if graph.range.is_none() {
        bail!(Input, "a kernel's body states its range of tokens");
    }
    if let Some((name, v)) = graph.results.iter().find(|(_, v)| graph.node(*v).is_none()) {
        bail!(Input, "result {name} is the input {v}: a kernel returns what it computes");
    }
    let nodes: Vec<ValueId> = graph.values().skip(graph.inputs.len()).collect();
    kernel::kind(graph, &nodes).map(|_| ())
}

/// Checks a model: each graph, then how calls fit together.
///
/// # Errors
/// As [`verify`] does, with the call as a place.
pub fn verify_model(model: &Model) -> Result<Verified<'_, Model>> {
    for graph in &model.graphs {
        verify(graph)?;
    }
    variants(model)?;
    let mut values = BTreeMap::from([
        ("tokens", Type::tensor(DType::I32, [Dim::T])),
        ("positions", Type::tensor(DType::I32, [Dim::T])),
        ("rows", Type::tensor(DType::I32, [Dim::R])),
        ("step", Type::Step),
    ]);
    let mut caches = BTreeSet::new();
    for call in &model.calls {
        let place = || format!("call @{} with {:?}", call.graph, call.prefix);
        let Some(graph) = model.graphs_of(call).next() else {
            bail!(Input, "no graph @{} to call", call.graph);
        };
        bind(graph, &call.prefix, &values, &mut caches).at(place)?;
        for variant in model.graphs_of(call).filter(|_| !model.weights.is_empty()) {
            weights(variant, &call.prefix, &model.weights).at(place)?;
        }
        for (name, v) in &graph.results {
            if !matches!(graph.ty(*v), Type::Cache { .. }) {
                values.insert(name, graph.ty(*v).clone());
            }
        }
    }
    for name in &model.outputs {
        match values.get(name.as_str()) {
            Some(Type::Tensor { dtype: DType::F32, .. }) => {}
            Some(ty) => bail!(Input, "output {name} is {ty}: only f32 leaves a step"),
            None => bail!(Input, "output {name} is returned by no call"),
        }
    }
    Ok(Verified(model))
}

/// Graphs of one name are one graph for different steps.
fn variants(model: &Model) -> Result<()> {
    for (i, graph) in model.graphs.iter().enumerate() {
        let types = |g: &Graph| g.results.iter().map(|(n, v)| (n.clone(), g.ty(*v).clone())).collect::<Vec<_>>();
        for other in model.graphs[..i].iter().filter(|g| g.name == graph.name) {
            let disjoint = match (graph.range, other.range) {
                (Some(a), Some(b)) => a.max < b.min || b.max < a.min,
                _ => false,
            };
            if !disjoint {
                bail!(Input, "two graphs @{} for the same number of tokens", graph.name);
            }
            if graph.inputs != other.inputs || types(graph) != types(other) {
                bail!(Input, "variants of @{} differ in inputs or results", graph.name);
            }
        }
    }
    Ok(())
}

fn bind(graph: &Graph, prefix: &str, values: &BTreeMap<&str, Type>, caches: &mut BTreeSet<String>) -> Result<()> {
    for input in &graph.inputs {
        if matches!(input.ty, Type::Cache { .. }) {
            if !caches.insert(format!("{prefix}{}", input.name)) {
                bail!(Input, "another call has the cache `{prefix}{}` already", input.name);
            }
            continue;
        }
        match values.get(input.name.as_str()) {
            Some(ty) if *ty == input.ty => {}
            Some(ty) => bail!(Input, "input %{} is {}, bound to {ty}", input.name, input.ty),
            None => bail!(Input, "input %{} is bound to nothing: no earlier call returns it", input.name),
        }
    }
    Ok(())
}

fn weights(graph: &Graph, prefix: &str, table: &WeightTable) -> Result<()> {
    for node in graph.nodes.iter().filter(|n| n.op == Op::WEIGHT) {
        let name = format!("{prefix}{}", node.attrs.str("name"));
        let found = &table.get(&name)?.ty;
        if *found != node.ty {
            bail!(Input, "weight `{name}` is {found}, the graph says {}", node.ty);
        }
    }
    Ok(())
}

/// Checks a plan: each body, then buffers and launches.
///
/// # Errors
/// As [`verify`] does, with kernel and launch as places.
pub fn verify_plan(plan: &Plan) -> Result<Verified<'_, Plan>> {
    let program = &plan.program;
    if plan.kernels.len() != program.kernels.len() || plan.packs.len() != program.weights.len() {
        bail!(Input, "the program lists other kernels or weights than the plan");
    }
    for (kernel, spec) in plan.kernels.iter().zip(&program.kernels) {
        verify(&kernel.body).at(|| format!("kernel {}", kernel.name))?;
        let same = kernel.name == spec.name && kernel.groups == program.groups;
        if kernel.body.stage != Stage::Planned || kernel.body.range != Some(kernel.range) || !same {
            bail!(Input, "kernel {}: stage, range, name or cache groups disagree with the program", kernel.name);
        }
    }
    for cache in &program.caches {
        let ty = crate::text::parse_type(&cache.ty).at(|| format!("cache {}", cache.name))?;
        if CacheGroup::index_of(&program.groups, &ty) != Some(cache.group) {
            bail!(Input, "cache {} of type {} is in cache group {}", cache.name, cache.ty, cache.group);
        }
    }
    let limits = &program.limits;
    if let Some(kernel) = plan.kernels.iter().find(|k| k.scratch_bytes() > program.scratch_bytes) {
        bail!(
            Input,
            "expected {} bytes of scratch for `{}`, found {}",
            kernel.scratch_bytes(),
            kernel.name,
            program.scratch_bytes
        );
    }
    for (i, buffer) in program.buffers.iter().enumerate() {
        let rows = buffer.rows.most(limits).checked_next_multiple_of(layout::STRIP);
        let size = rows.and_then(|rows| rows.checked_mul(buffer.row_bytes));
        let end = size.and_then(|size| size.checked_add(buffer.offset));
        if buffer.offset % layout::ALIGN != 0 || end.is_none_or(|end| end > program.arena_bytes) {
            bail!(Input, "buf{i} ({}) is not aligned or leaves the arena", buffer.name);
        }
    }
    let mut next = 1;
    for variant in &program.variants {
        let TokenRange { min, max } = variant.tokens;
        if min != next || max < min {
            bail!(Input, "expected launches for {next} tokens next, found {min}..{max}");
        }
        next = max + 1;
        for (i, each) in variant.launches.iter().enumerate() {
            launch(plan, each).at(|| format!("launch {i} for t = {min}..{max} of {}", each.kernel))?;
        }
    }
    if next != limits.tokens + 1 {
        bail!(Input, "launches end at {} tokens, the limit is {}", next - 1, limits.tokens);
    }
    match program.outputs.iter().find(|o| program.buffers.get(o.buffer.0 as usize).is_none()) {
        Some(output) => bail!(Input, "output {} is no buffer", output.name),
        None => Ok(Verified(plan)),
    }
}

fn launch(plan: &Plan, launch: &Launch) -> Result<()> {
    let Some(kernel) = plan.kernels.get(launch.kernel.0 as usize) else { bail!(Input, "there is no such kernel") };
    let body = &kernel.body;
    let inputs = body.inputs.iter().map(|i| &i.ty).filter(|ty| **ty != Type::Step);
    let results = body.results.iter().filter(|(_, v)| !in_place(body, *v)).map(|(_, v)| body.ty(*v));
    let types: Vec<&Type> = inputs.chain(results).collect();
    if types.len() != launch.args.len() {
        bail!(Input, "expected {} arguments, found {}", types.len(), launch.args.len());
    }
    for (i, (ty, arg)) in types.iter().zip(&launch.args).enumerate() {
        if !passes(plan, ty, arg) {
            bail!(Input, "argument {i} must be {ty}, found {arg:?}");
        }
    }
    Ok(())
}

/// The argument is memory of that type. Views share a buffer, so rows are compared by their bytes.
fn passes(plan: &Plan, ty: &Type, arg: &Arg) -> bool {
    let program = &plan.program;
    let same_text = |text: Option<&String>| text.is_some_and(|text| *text == ty.to_string());
    match arg {
        Arg::Buffer(b) => program.buffers.get(b.0 as usize).is_some_and(|b| {
            ty.rows().and_then(RowCount::from_dim) == Some(b.rows) && layout::row_bytes(ty) == Some(b.row_bytes)
        }),
        Arg::Weight(w) => ty.is_static() && same_text(program.weights.get(w.0 as usize).map(|w| &w.ty)),
        Arg::Cache(c) => matches!(ty, Type::Cache { .. }) && same_text(program.caches.get(c.0 as usize).map(|c| &c.ty)),
        Arg::Tokens | Arg::Positions => *ty == Type::tensor(DType::I32, [Dim::T]),
        Arg::Rows => *ty == Type::tensor(DType::I32, [Dim::R]),
    }
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
