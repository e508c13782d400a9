//! What a budget decides on: the format of every matrix and of the caches, each alternative with its time and its bytes.
//!
//! ```text
//! q_proj of layers 0..7    the file's own | f32 | bf16 | q8_0 | q4_1 ...   seconds of the whole workload, packed bytes
//! ...
//! keys and values          f32 | f16 | i8
//! ```
//!
//! Prices are those of kernels that the search would choose: the model is optimized once for each kind of arithmetic
//! (f32, bf16, int8 with and without planes), and each kernel is priced with each format on the roofline in every
//! step of the workload. A kernel of several weights is divided among them by bytes, and so is, over the weights of
//! its call, what reads no weight: the sum over a model in one format is that model's price. What an alternative
//! costs in accuracy is for others to measure; [`choose`] then takes the fastest combination within the bounds.
//!
//! Matrices of one kind in neighbouring layers are one decision, [`BANDS`] for the depth of a model, so that compile time
//! does not grow with depth.

use crate::assign::in_order;
use crate::cost::kernel_seconds;
use crate::knapsack::{Item, Solution, solve};
use crate::precision::heads_of_caches;
use crate::weights::{Role, roles, short};
use crate::{Hooks, Options, State, manager};
use ir::formats::CACHED;
use ir::layout::{CACHE_BLOCK, cache_position_bytes, packed_bytes};
use ir::ops::Class;
use ir::quantize::can_quantize;
use ir::{DType, Graph, Model, Op, Result, Traffic, Type};
use std::collections::{BTreeMap, BTreeSet};

/// Parts that the layers of a model are divided into.
pub const BANDS: usize = 4;

/// What is decided.
#[derive(Clone, Debug, PartialEq)]
pub enum Subject {
    /// Matrices of one kind, by their names in the weight table.
    Weights {
        /// In order of their calls.
        names: Vec<String>,
        /// Rows that leave the step are multiplied with them, in two planes of int8 where they are integers.
        vocabulary: bool,
    },
    /// Keys and values of every layer.
    Caches,
}

/// One alternative.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative {
    /// The format; `None`: the file's own.
    pub format: Option<DType>,
    /// Predicted, for all steps of the workload.
    pub seconds: f64,
    /// In memory.
    pub bytes: usize,
    /// Predicted KL divergence in nats, to be filled in.
    pub error: f64,
}

/// A format to be chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// `model.layers.*.mlp.up_proj.weight 0..7`, `keys and values`.
    pub name: String,
    /// What it is about.
    pub subject: Subject,
    /// At least one.
    pub alternatives: Vec<Alternative>,
}

/// Everything there is to decide about a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Decisions {
    /// In order of first use; the caches last.
    pub all: Vec<Decision>,
    /// Bytes of weights that nothing is decided about.
    pub fixed_bytes: usize,
}

/// The decisions about `model` as imported, priced for the options' workload. Caches are stored as the options say, else
/// in any type.
///
/// # Errors
/// Whatever the passes say.
pub fn decisions(model: Model, options: &Options) -> Result<Decisions> {
    let traffic = options.traffic.unwrap_or_default();
    let state = run(&["canonicalize"], State::new(model), options)?;
    let model = &state.model;
    let roles = roles(model);
    let free = |name: &String| {
        let role = roles.get(name)?.0;
        matches!(role, Role::Product | Role::Vocabulary).then(|| (name.clone(), role))
    };
    let free: Vec<(String, Role)> = in_order(model).iter().filter_map(free).collect();
    let prices = Prices::of(model, &free, &traffic, options)?;
    let mut all: Vec<Decision> = vec![];
    for (kind, members) in kinds(&free) {
        let bands = if members.len() < 2 * BANDS { 1 } else { BANDS };
        let mut first = 0;
        for band in members.chunks(members.len().div_ceil(bands)) {
            let last = first + band.len() - 1;
            let name = if members.len() == 1 { kind.clone() } else { format!("{kind} {first}..{last}") };
            let names: Vec<String> = band.iter().map(|(name, _)| name.clone()).collect();
            let vocabulary = band.iter().all(|(_, role)| *role == Role::Vocabulary);
            let alternatives = formats(model, &names)?.into_iter().map(|f| prices.alternative(model, &names, f));
            let alternatives = alternatives.collect::<Result<_>>()?;
            all.push(Decision { name, subject: Subject::Weights { names, vocabulary }, alternatives });
            first = last + 1;
        }
    }
    let caches = cache_formats(model).filter(|kv| options.kv.is_none_or(|fixed| fixed == *kv));
    let alternatives = caches.map(|kv| Alternative {
        format: Some(kv),
        seconds: prices.caches.get(&kv).copied().unwrap_or(0.0),
        bytes: cache_bytes(model, kv, &traffic),
        error: 0.0,
    });
    let alternatives: Vec<Alternative> = alternatives.collect();
    if alternatives.iter().any(|a| a.bytes > 0) {
        all.push(Decision { name: "keys and values".into(), subject: Subject::Caches, alternatives });
    }
    let bound: BTreeSet<&String> = free.iter().map(|(name, _)| name).collect();
    let used = in_order(model);
    let fixed = used.iter().filter(|name| !bound.contains(name)).map(|name| {
        let (dtype, shape) = model.weights.get(name)?.dtype_shape();
        Ok(packed_bytes(dtype, &shape))
    });
    Ok(Decisions { fixed_bytes: fixed.sum::<Result<usize>>()?, all })
}

/// The fastest of all combinations whose errors and bytes keep within the bounds; `None` where there is none.
pub fn choose(decisions: &Decisions, error: f64, bytes: f64) -> Option<Solution> {
    let item = |a: &Alternative| Item { cost: a.seconds, error: a.error, bytes: a.bytes as f64 };
    solve(&items(decisions, item), Item { cost: 0.0, error, bytes: bytes - decisions.fixed_bytes as f64 })
}

/// The least error there is within `bytes`; `None` where nothing is as small.
pub fn most_accurate(decisions: &Decisions, bytes: f64) -> Option<Solution> {
    let item = |a: &Alternative| Item { cost: a.error, error: 0.0, bytes: a.bytes as f64 };
    let most = Item { cost: 0.0, error: f64::INFINITY, bytes: bytes - decisions.fixed_bytes as f64 };
    solve(&items(decisions, item), most)
}

/// The fewest bytes there are within `error`; `None` where nothing is as accurate.
pub fn smallest(decisions: &Decisions, error: f64) -> Option<Solution> {
    let item = |a: &Alternative| Item { cost: a.bytes as f64, error: a.error, bytes: 0.0 };
    solve(&items(decisions, item), Item { cost: 0.0, error, bytes: f64::INFINITY })
}

fn items(decisions: &Decisions, item: impl Fn(&Alternative) -> Item) -> Vec<Vec<Item>> {
    decisions.all.iter().map(|d| d.alternatives.iter().map(&item).collect()).collect()
}

/// What the model's caches may be stored in, the most accurate first.
fn cache_formats(model: &Model) -> impl Iterator<Item = DType> {
    CACHED.into_iter().filter(|kv| heads_of_caches(model).all(|dim| kv.caches(dim)))
}

/// Kinds of arithmetic, each by a format of it. Vocabulary projections of q8_0 are read in two planes.
const ARITHMETIC: [DType; 4] = [DType::F32, DType::BF16, DType::Q8_0, DType::Q4_0];

/// The format of [`ARITHMETIC`] that weights of `format` are computed like.
fn arithmetic(format: DType) -> DType {
    match format {
        DType::Q8_0 => DType::Q8_0,
        _ if format.is_integer() => DType::Q4_0,
        DType::BF16 => DType::BF16,
        _ => DType::F32,
    }
}

/// Every format that is made from reals, and those.
fn candidates() -> impl Iterator<Item = DType> {
    let quantized = ir::formats::FORMATS.iter().map(|f| f.dtype).filter(|d| can_quantize(*d));
    [DType::F32, DType::BF16].into_iter().chain(quantized)
}

/// What all of `names` may be stored in, the file's own first.
fn formats(model: &Model, names: &[String]) -> Result<Vec<Option<DType>>> {
    let weights = names.iter().map(|name| model.weights.get(name)).collect::<Result<Vec<_>>>()?;
    let fits = |f: &DType| weights.iter().all(|w| w.rows_columns().1.is_multiple_of(f.format().block));
    let other = |f: &DType| weights.iter().any(|w| w.dtype_shape().0 != *f);
    Ok(std::iter::once(None).chain(candidates().filter(|f| fits(f) && other(f)).map(Some)).collect())
}

/// Weights by kind, in order of first use.
fn kinds(free: &[(String, Role)]) -> Vec<(String, Vec<(String, Role)>)> {
    let mut kinds: Vec<(String, Vec<(String, Role)>)> = vec![];
    for (name, role) in free {
        let kind = short(name);
        match kinds.iter_mut().find(|k| k.0 == kind) {
            Some(known) => known.1.push((name.clone(), *role)),
            None => kinds.push((kind, vec![(name.clone(), *role)])),
        }
    }
    kinds
}

/// Bytes that the caches of all sequences have come to when the workload ends.
fn cache_bytes(model: &Model, kv: DType, traffic: &Traffic) -> usize {
    let mut bytes = 0;
    for call in &model.calls {
        for input in model.graphs_of(call).flat_map(|g| &g.inputs) {
            let mut ty = input.ty.clone();
            let Type::Cache { dtype, .. } = &mut ty else { continue };
            *dtype = kv;
            for cache in [ty.recent(), Some(ty)].into_iter().flatten() {
                let Type::Cache { window, .. } = cache else { continue };
                let kept = if window > 0 { window + CACHE_BLOCK } else { usize::MAX };
                let positions = traffic.positions().min(kept).next_multiple_of(CACHE_BLOCK);
                bytes += traffic.batch * positions * cache_position_bytes(&cache).unwrap_or(0);
            }
        }
    }
    bytes
}

fn run(passes: &[&str], state: State, options: &Options) -> Result<State> {
    let mut sink = |_: manager::Event<'_>| {};
    Ok(manager::run(passes, state, options, &mut Hooks::new(&mut sink))?.0)
}

/// Seconds of the whole workload.
#[derive(Default)]
struct Prices {
    /// By weight and format.
    weights: BTreeMap<(String, DType), f64>,
    /// Of attention, by the caches' format.
    caches: BTreeMap<DType, f64>,
}

impl Prices {
    fn of(model: &Model, free: &[(String, Role)], traffic: &Traffic, options: &Options) -> Result<Prices> {
        let mut prices = Prices::default();
        let mut own = BTreeSet::new();
        for (name, _) in free {
            own.insert(model.weights.get(name)?.dtype_shape().0);
        }
        let formats: BTreeSet<DType> = candidates().chain(own).collect();
        for kind in ARITHMETIC {
            let mut assigned = BTreeMap::new();
            for (name, _) in free {
                let fits = model.weights.get(name)?.rows_columns().1.is_multiple_of(kind.format().block);
                assigned.insert(name.clone(), if fits { kind } else { DType::F32 });
            }
            let profile = Options { formats: assigned, weights: None, ..options.clone() };
            let state = State::new(model.clone());
            let optimized = run(&["precision", "planes", "saturate"], state, &profile)?.model;
            let formats: Vec<DType> = formats.iter().copied().filter(|f| arithmetic(*f) == kind).collect();
            let free: BTreeSet<&str> = free.iter().map(|(name, _)| name.as_str()).collect();
            prices.profile(&optimized, &free, &formats, traffic, options);
        }
        Ok(prices)
    }

    /// Adds the prices of `formats`, which are all computed as in `model`.
    fn profile(&mut self, model: &Model, free: &BTreeSet<&str>, formats: &[DType], traffic: &Traffic, o: &Options) {
        let counts_caches = formats.contains(&DType::F32);
        for steps in traffic.steps(o.limits.tokens) {
            let tokens = steps.step.tokens.ceil() as usize;
            let mut known: BTreeMap<&str, Vec<Priced>> = BTreeMap::new();
            for call in &model.calls {
                let Some(graph) = model.graphs_of(call).find(|g| g.suits(tokens)) else { continue };
                let is_free = |local: &str| free.contains(format!("{}{local}", call.prefix).as_str());
                let priced = known.entry(graph.name.as_str()).or_insert_with(|| {
                    formats.iter().map(|f| Priced::of(graph, *f, &is_free, &o.target.machine, &steps.step)).collect()
                });
                for (format, priced) in formats.iter().zip(priced.iter()) {
                    for (local, seconds) in &priced.weights {
                        let key = (format!("{}{local}", call.prefix), *format);
                        *self.weights.entry(key).or_default() += seconds * steps.count;
                    }
                }
                for kv in cache_formats(model).filter(|_| counts_caches) {
                    let seconds = attention(graph, kv, &o.target.machine, &steps.step);
                    *self.caches.entry(kv).or_default() += seconds * steps.count;
                }
            }
        }
    }

    fn alternative(&self, model: &Model, names: &[String], format: Option<DType>) -> Result<Alternative> {
        let (mut seconds, mut bytes) = (0.0, 0);
        for name in names {
            let (own, shape) = model.weights.get(name)?.dtype_shape();
            let format = format.unwrap_or(own);
            seconds += self.weights.get(&(name.clone(), format)).copied().unwrap_or(0.0);
            bytes += packed_bytes(format, &shape);
        }
        Ok(Alternative { format, seconds, bytes, error: 0.0 })
    }
}

/// Seconds of one step of a graph whose free weights all have one format, by weight; attention is left out.
struct Priced {
    weights: BTreeMap<String, f64>,
}

impl Priced {
    fn of(
        graph: &Graph,
        format: DType,
        is_free: &dyn Fn(&str) -> bool,
        machine: &ir::Machine,
        step: &ir::cost::Workload,
    ) -> Priced {
        let mut graph = graph.clone();
        let mut bytes = BTreeMap::new(); // by value: the weight's name and its packed bytes
        for index in 0..graph.nodes.len() {
            let value = graph.value_of(index);
            let node = &mut graph.nodes[index];
            if node.op == Op::WEIGHT && is_free(node.attrs.str("name")) {
                if node.ty.as_tensor().is_none_or(|(dtype, _)| dtype != DType::Q8_PLANES) {
                    set(&mut node.ty, format);
                }
                bytes.insert(value, (node.attrs.str("name").to_string(), step.bytes(&node.ty)));
            }
        }
        let (mut weights, mut rest) = (BTreeMap::<String, f64>::new(), 0.0);
        for kernel in graph.kernels.iter().filter(|k| !attends(&graph, &k.values)) {
            let seconds = kernel_seconds(&graph, &kernel.values, machine, step);
            let operands = kernel.values.iter().filter_map(|v| graph.node(*v)).flat_map(|n| &n.operands);
            let read: BTreeSet<_> = operands.flat_map(|o| folded(&graph, *o)).collect();
            let read: Vec<&(String, f64)> = read.iter().filter_map(|v| bytes.get(v)).collect();
            let all: f64 = read.iter().map(|(_, bytes)| bytes).sum();
            if read.is_empty() {
                rest += seconds;
            }
            for (name, bytes) in read {
                *weights.entry(name.clone()).or_default() += seconds * bytes / all;
            }
        }
        let all: f64 = bytes.values().map(|(_, bytes)| bytes).sum();
        for (name, bytes) in bytes.into_values().filter(|_| all > 0.0) {
            *weights.entry(name).or_default() += rest * bytes / all;
        }
        Priced { weights }
    }
}

/// The weights a kernel reads when it reads `value`: that one, or what is folded into it when packing.
fn folded(graph: &Graph, value: ir::ValueId) -> Vec<ir::ValueId> {
    match graph.node(value) {
        Some(node) if node.ty.is_static() && node.op != Op::WEIGHT => {
            node.operands.iter().flat_map(|o| folded(graph, *o)).collect()
        }
        _ => vec![value],
    }
}

fn attends(graph: &Graph, values: &[ir::ValueId]) -> bool {
    values.iter().filter_map(|v| graph.node(*v)).any(|n| n.op.class() == Class::Attend)
}

/// Seconds of attention in one step of a graph with caches of type `kv`.
fn attention(graph: &Graph, kv: DType, machine: &ir::Machine, step: &ir::cost::Workload) -> f64 {
    let mut graph = graph.clone();
    let types = graph.inputs.iter_mut().map(|i| &mut i.ty).chain(graph.nodes.iter_mut().map(|n| &mut n.ty));
    types.filter(|ty| matches!(ty, Type::Cache { .. })).for_each(|ty| set(ty, kv));
    let kernels = graph.kernels.iter().filter(|k| attends(&graph, &k.values));
    kernels.map(|k| kernel_seconds(&graph, &k.values, machine, step)).sum()
}

fn set(ty: &mut Type, to: DType) {
    if let Type::Tensor { dtype, .. } | Type::Cache { dtype, .. } = ty {
        *dtype = to;
    }
}

#[cfg(test)]
#[path = "budget_tests.rs"]
mod tests;
