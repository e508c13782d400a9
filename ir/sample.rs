//! Random legal things from seeds: operand types (the rows' samplers), values, weights in any format, whole models.
//!
//! ```text
//! seed 7   ->   graph @layer(%x: f32[t, 96], %angles: f32[t, 32], %keys: ..) stage imported { .. }   ->   logits
//! ```
//!
//! The same seed gives the same thing on every machine. What comes out passes the verifier, has caches, ragged steps, float
//! and quantized weights, and stays in a range where f32 and f64 agree: it is meant for comparing two evaluations of it.

use crate::eval::{Cache, Routing, Step, Tensor, Value};
use crate::formats::{DType, Zero, is_e4m3_nan};
use crate::graph::{Attrs, Graph, ValueId};
use crate::model::{Call, Model, ModelInfo, Source, Weight, WeightTable};
use crate::ops::sample::{WIDTHS, WINDOWS, attention_attrs, cached, kept, weight_dtypes};
use crate::ops::{Class, Op};
use crate::types::{CacheRole, Dim, Type};
use crate::{Result, attrs, bail};
use std::sync::Arc;

/// A counter-based generator (SplitMix64): small, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of that seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The stream of a seed and a name: values for a name do not depend on what else was made.
    pub fn named(seed: u64, name: &str) -> Random {
        // FNV-1a
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x0100_0000_01b3));
        let mut random = Random(seed ^ hash);
        random.bits();
        random
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// In `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// In `[-1, 1)`.
    pub fn real(&mut self) -> f32 {
        (self.unit() * 2.0 - 1.0) as f32
    }

    /// As many in `[-1, 1)`.
    pub fn reals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.real()).collect()
    }

    /// True with that probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// A quarter of an integer in `from..=to`: short in text, exact in f32.
    pub fn quarters(&mut self, from: i64, to: i64) -> f64 {
        (from + self.below((to - from + 1) as usize) as i64) as f64 / 4.0
    }

    /// One of `choices`, of which there is at least one.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// A value of type `ty` in a step with `rows` rows asked for. Caches have the sequences' past; indices are rows of the step.
pub fn value(ty: &Type, step: &Step, rows: usize, random: &mut Random) -> Value {
    let extent = |dim: &Dim| match dim {
        Dim::N(n) => *n,
        Dim::T => step.tokens(),
        Dim::S => step.sequences.len(),
        Dim::R => rows,
    };
    match ty {
        Type::Tensor { dtype: DType::I32, shape } => {
            let data: Vec<i32> =
                (0..shape.iter().map(extent).product()).map(|_| random.below(step.tokens().max(1)) as i32).collect();
            Value::from_ints(data)
        }
        Type::Tensor { dtype: DType::Q8_PLANES, .. } => {
            let weight = weight(ty, random).and_then(|weight| Value::of_weight(&weight));
            weight.unwrap_or_else(|e| panic!("{e}"))
        }
        Type::Tensor { shape, .. } => {
            let shape: Vec<usize> = shape.iter().map(extent).collect();
            let data = (0..shape.iter().product()).map(|_| 2.0 * random.real()).collect();
            Value::Tensor(Tensor::new(shape, data))
        }
        Type::Cache { heads, dim, dtype, .. } => {
            let mut past = |n: usize| {
                let rows: Vec<f32> = (0..n * heads * dim).map(|_| random.real()).collect();
                Arc::new(Cache::keep(ty, &rows))
            };
            let sequences = step.sequences.iter().map(|s| past(s.past)).collect();
            Value::Cache(Cache { heads: *heads, dim: *dim, dtype: *dtype, sequences })
        }
        Type::Step => Value::Step(step.clone()),
        Type::Routing { top, experts } => routing(*top, *experts, step.tokens(), random),
    }
}

fn routing(top: usize, experts: usize, tokens: usize, random: &mut Random) -> Value {
    let (mut chosen, mut weights) = (vec![], vec![]);
    for _ in 0..tokens {
        let first = random.below(experts.max(1));
        chosen.extend((0..top).map(|j| (first + j) % experts));
        weights.extend((0..top).map(|_| random.unit() as f32));
    }
    Value::Routing(Routing { top, experts, chosen, weights })
}

/// Values for every input of a graph that could be bound together: positions follow from the step, indices are in range
/// for the tables they index.
pub fn inputs(graph: &Graph, step: &Step, rows: usize, seed: u64) -> Vec<Value> {
    let input = |(index, input): (usize, &crate::graph::Input)| {
        let mut random = Random::named(seed, &input.name);
        if input.name == "positions" {
            return Value::from_ints(step.positions());
        }
        let mut value = value(&input.ty, step, rows, &mut random);
        if let (Value::Ints(ints), Some(bound)) = (&mut value, table_rows(graph, ValueId(index as u32))) {
            ints.data.iter_mut().for_each(|i| *i = random.below(bound.max(1)) as i32);
        }
        value
    };
    graph.inputs.iter().enumerate().map(input).collect()
}

/// Rows of the smallest weight that `indices` gathers from.
fn table_rows(graph: &Graph, indices: ValueId) -> Option<usize> {
    let gathers = graph.nodes.iter().filter(|n| n.op.class() == Class::Gather && n.operands.contains(&indices));
    let tables = gathers.flat_map(|n| &n.operands).filter_map(|v| graph.ty(*v).as_tensor());
    tables.filter_map(|(_, shape)| if let [Dim::N(n), _, ..] = shape { Some(*n) } else { None }).min()
}

/// A weight of that type whose values are of a plausible size. Vectors are near 1; matrices are stored in their own format,
/// with random codes.
pub fn weight(ty: &Type, random: &mut Random) -> Result<Weight> {
    let mut weight = Weight { ty: ty.clone(), source: Source::Synthetic { seed: 0 } };
    if !ty.is_static() {
        bail!(Input, "expected the type of a weight, found {ty}");
    }
    let (dtype, shape) = weight.dtype_shape();
    let (rows, columns) = weight.rows_columns();
    weight.source = if let [n] = shape[..] {
        Source::Values((0..n).map(|_| 1.0 + random.real() / 2.0).collect())
    } else {
        let dtype = dtype.in_file();
        Source::Bytes { dtype, bytes: bytes(dtype, rows, columns, random)?.into() }
    };
    Ok(weight)
}

/// Rows in file order whose reals lie in `-a..a`, `a = sqrt(3 / columns)`.
fn bytes(dtype: DType, rows: usize, columns: usize, random: &mut Random) -> Result<Vec<u8>> {
    let format = dtype.format();
    let Some(size) = dtype.bytes(columns).and_then(|row| row.checked_mul(rows)) else {
        bail!(Input, "rows of {columns} do not fill whole blocks of {dtype}");
    };
    let amplitude = (3.0 / columns as f32).sqrt();
    let mut out = Vec::with_capacity(size);
    while out.len() < size {
        let start = out.len();
        let real = random.real() * amplitude;
        match dtype {
            DType::F32 => out.extend(real.to_le_bytes()),
            DType::F16 => out.extend(half::f16::from_f32(real).to_le_bytes()),
            DType::BF16 => out.extend(half::bf16::from_f32(real).to_le_bytes()),
            _ if format.int.is_none() => bail!(Input, "no weight is stored as {dtype}"),
            _ => {
                out.extend((0..format.block_bytes).map(|_| random.bits() as u8));
                let points = format.int.is_some_and(|int| int.zero == Zero::Point);
                if format.int.is_some_and(|int| int.zero == Zero::E4M3) {
                    out[start..].iter_mut().filter(|byte| is_e4m3_nan(**byte)).for_each(|byte| *byte -= 1);
                }
                for (i, (offset, unit)) in format.scales.iter().enumerate() {
                    let scale = amplitude * unit * (0.5 + random.unit() as f32 / 2.0);
                    let figure = if points && i == 1 { *unit } else { scale };
                    let at = start + offset;
                    out[at..at + 2].copy_from_slice(&half::f16::from_f32(figure).to_le_bytes());
                }
            }
        }
    }
    Ok(out)
}

/// Gives every weight that the model's calls name, and that its table lacks, random values.
pub fn fill_weights(model: &mut Model, seed: u64) -> Result<()> {
    for call in &model.calls {
        for graph in model.graphs.iter().filter(|g| g.name == call.graph) {
            for node in graph.nodes.iter().filter(|n| n.op == Op::WEIGHT) {
                let name = format!("{}{}", call.prefix, node.attrs.str("name"));
                if model.weights.get(&name).is_err() {
                    let weight = weight(&node.ty, &mut Random::named(seed, &name))?;
                    model.weights.insert(name, weight);
                }
            }
        }
    }
    Ok(())
}

/// The values that [`fill_weights`] would give a weight of that name, for [`crate::eval::graph`].
pub fn weight_value(name: &str, ty: &Type, seed: u64) -> Result<Value> {
    Value::of_weight(&weight(ty, &mut Random::named(seed, name))?)
}

/// A random model of about `max_nodes` nodes, weights included, that returns `logits: f32[r, n]`: one graph, or
/// `embed`, `layer` (called once or twice) and `head`.
///
/// # Errors
/// None is known: an error is a sampler that disagrees with its type rule.
pub fn graph(seed: u64, max_nodes: usize) -> Result<Model> {
    let mut random = Random::new(seed);
    let (hidden, vocab) = (random.pick(&WIDTHS), random.pick(&[17, 32, 50]));
    let shape = Shape::new(&mut random, hidden, vocab);
    let mut model = Model {
        name: format!("random{seed}"),
        graphs: vec![],
        calls: vec![],
        outputs: vec!["logits".into()],
        weights: WeightTable::default(),
        info: ModelInfo { architecture: "random".into(), context: 1 << 12, vocab, hidden, ..Default::default() },
    };
    let mut call = |b: Builder, prefix: &str| {
        model.calls.push(Call { graph: b.graph.name.clone(), prefix: prefix.into() });
        model.graphs.retain(|g| g.name != b.graph.name);
        model.graphs.push(b.graph);
    };
    if random.chance(0.4) {
        let mut b = Builder::new("all", &[&shape.embed_inputs()[..], &shape.caches(), &shape.head_inputs()].concat());
        let (x, angles) = b.embed(&shape, &mut random)?;
        let x = b.layer(&shape, (x, angles), max_nodes, &mut random)?;
        b.head(&shape, x, &mut random)?;
        call(b, "");
    } else {
        let mut b = Builder::new("embed", &shape.embed_inputs());
        let (x, angles) = b.embed(&shape, &mut random)?;
        b.graph.result("x", x);
        b.graph.result("angles", angles);
        call(b, "");
        let x = [("x", shape.x()), ("angles", shape.angles())];
        let mut b = Builder::new("layer", &[&x[..], &shape.caches()].concat());
        let (x, angles) = (b.input("x"), b.input("angles"));
        let x = b.layer(&shape, (x, angles), max_nodes, &mut random)?;
        b.graph.result("x", x);
        if random.chance(0.5) {
            call(b.clone(), "layers.0.");
            call(b, "layers.1.");
        } else {
            call(b, "layers.0.");
        }
        let mut b = Builder::new("head", &[&[("x", shape.x())][..], &shape.head_inputs()].concat());
        let x = b.input("x");
        b.head(&shape, x, &mut random)?;
        call(b, "");
    }
    fill_weights(&mut model, seed)?;
    Ok(model)
}

/// Extents that the graphs of one model agree on.
struct Shape {
    hidden: usize,
    vocab: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    cache: DType,
    /// What attention sees, and what caches keep.
    windows: (usize, usize),
}

type Inputs = Vec<(&'static str, Type)>;

impl Shape {
    fn new(random: &mut Random, hidden: usize, vocab: usize) -> Shape {
        let (kv_heads, groups) = (random.pick(&[1, 2, 3]), random.pick(&[1, 2, 3]));
        let head_dim = random.pick(&[16, 32, 64]);
        let cache = cached(random, head_dim);
        let window = random.pick(&WINDOWS);
        let windows = (window, kept(random, window));
        Shape { hidden, vocab, heads: kv_heads * groups, kv_heads, head_dim, cache, windows }
    }

    fn x(&self) -> Type {
        Type::f32([Dim::T, Dim::N(self.hidden)])
    }

    fn angles(&self) -> Type {
        Type::f32([Dim::T, Dim::N(self.head_dim)])
    }

    fn embed_inputs(&self) -> Inputs {
        let ids = Type::tensor(DType::I32, [Dim::T]);
        vec![("tokens", ids.clone()), ("positions", ids)]
    }

    fn caches(&self) -> Inputs {
        let (heads, dim, dtype, window) = (self.kv_heads, self.head_dim, self.cache, self.windows.1);
        let cache = |role| Type::Cache { role, heads, dim, dtype, window };
        vec![("keys", cache(CacheRole::Keys)), ("values", cache(CacheRole::Values)), ("step", Type::Step)]
    }

    fn head_inputs(&self) -> Inputs {
        vec![("rows", Type::tensor(DType::I32, [Dim::R]))]
    }
}

/// Products of values that a value may be: more would leave the range of f32.
const MOST_FACTORS: u32 = 4;

/// A graph in the making.
#[derive(Clone)]
struct Builder {
    graph: Graph,
    /// Values that ops may take, and of how many factors each is.
    pool: Vec<(ValueId, u32)>,
    weights: usize,
}

impl Builder {
    fn new(name: &str, inputs: &[(&'static str, Type)]) -> Builder {
        let mut graph = Graph::new(name);
        for (name, ty) in inputs {
            graph.input(*name, ty.clone());
        }
        Builder { graph, pool: vec![], weights: 0 }
    }

    fn input(&self, name: &str) -> ValueId {
        let index = self.graph.inputs.iter().position(|i| i.name == name);
        ValueId(index.map_or(u32::MAX, |i| i as u32))
    }

    /// A weight; now and then one in f32 that packing computes from others.
    fn weight(&mut self, ty: Type, random: &mut Random) -> Result<ValueId> {
        self.weights += 1;
        let name = format!("w{}", self.weights);
        let shape = match ty.as_tensor() {
            Some((DType::F32, shape)) if random.chance(0.25) => shape,
            _ => return Ok(self.graph.weight(name, ty)),
        };
        let mut of = |what: &str, shape: &[usize]| {
            let dims: Vec<Dim> = shape.iter().map(|n| Dim::N(*n)).collect();
            self.graph.weight(format!("{name}{what}"), Type::f32(dims))
        };
        let (op, operands, attrs) = match *shape {
            [Dim::N(n)] => ("times_vector", vec![of("", &[n, 32]), of(".vector", &[32])], Attrs::none()),
            [Dim::N(n), Dim::N(k)] => match random.below(6) {
                0 if n == k && n.is_power_of_two() => ("hadamard_matrix", vec![], attrs! { size = n }),
                0 | 1 => ("scale_rows", vec![of("", &[n, k]), of(".rows", &[n])], Attrs::none()),
                2 => ("multiply_weights", vec![of(".left", &[n, 32]), of(".right", &[32, k])], Attrs::none()),
                3 => ("slice_rows", vec![of("", &[n + 5, k])], attrs! { from = 3usize, count = n }),
                4 if n > 1 => ("concat_rows", vec![of(".above", &[1, k]), of(".below", &[n - 1, k])], Attrs::none()),
                _ => ("scale_columns", vec![of("", &[n, k]), of(".columns", &[k])], Attrs::none()),
            },
            _ => return Ok(self.graph.weight(name, ty)),
        };
        self.graph.push(op, &operands, attrs)
    }

    /// `x` times a new matrix with `n` rows, in f32 or, where the format allows it, in int8.
    fn project(&mut self, x: ValueId, n: usize, random: &mut Random) -> Result<ValueId> {
        let k = self.graph.ty(x).row_width().unwrap_or(0);
        let dtypes = weight_dtypes(k, random.chance(0.4));
        let dtype = if dtypes.is_empty() { DType::F32 } else { random.pick(&dtypes) };
        let w = self.weight(Type::tensor(dtype, [Dim::N(n), Dim::N(k)]), random)?;
        let integer = dtype.is_integer() && random.chance(0.5);
        let x = if integer { self.graph.push("quantize", &[x], Attrs::none())? } else { x };
        self.graph.push("matmul", &[x, w], Attrs::none())
    }

    fn embed(&mut self, shape: &Shape, random: &mut Random) -> Result<(ValueId, ValueId)> {
        let dtypes = [weight_dtypes(shape.hidden, true), weight_dtypes(shape.hidden, false)].concat();
        let ty = Type::tensor(random.pick(&dtypes), [Dim::N(shape.vocab), Dim::N(shape.hidden)]);
        let table = self.graph.weight("table", ty);
        let x = self.graph.push("embed", &[self.input("tokens"), table], Attrs::none())?;
        let x = self.graph.push("rms_normalize", &[x], attrs! { eps = 1e-6 })?;
        let frequencies = self.graph.weight("frequencies", Type::f32([Dim::N(shape.head_dim / 2)]));
        let attrs = attrs! { scale = random.pick(&[1.0, 1.25]) };
        let angles = self.graph.push("rope_table", &[self.input("positions"), frequencies], attrs)?;
        Ok((x, angles))
    }

    /// Attention, experts, random nodes of the op table, and a sum of what came of them.
    fn layer(
        &mut self,
        shape: &Shape,
        (x, angles): (ValueId, ValueId),
        max_nodes: usize,
        random: &mut Random,
    ) -> Result<ValueId> {
        let first = self.graph.nodes.len();
        self.pool = vec![(x, 1), (angles, 1)];
        let normal = self.graph.push("rms_normalize", &[x], attrs! { eps = 1e-5 })?;
        let attended = self.attention(shape, normal, angles, random)?;
        self.pool.push((attended, 1));
        if random.chance(0.3) {
            let mixed = self.experts(shape, normal, random)?;
            self.pool.push((mixed, 1));
        }
        let most = max_nodes.saturating_sub(8); // room for the sum
        for _ in 0..4 * max_nodes {
            if self.graph.nodes.len() - first >= most {
                break;
            }
            self.random_node(random)?;
        }
        self.sum(shape, x, random)
    }

    fn attention(&mut self, shape: &Shape, x: ValueId, angles: ValueId, random: &mut Random) -> Result<ValueId> {
        let pairing = attrs! { pairing = random.pick(&["half", "adjacent"]) };
        let (rotated, normal) = (random.chance(0.8), random.chance(0.3));
        let mut heads = vec![];
        for n in [shape.heads, shape.kv_heads, shape.kv_heads] {
            let flat = self.project(x, n * shape.head_dim, random)?;
            let split = self.graph.push("split_heads", &[flat], attrs! { heads = n })?;
            heads.push(if normal { self.graph.push("rms_normalize", &[split], attrs! { eps = 1e-5 })? } else { split });
        }
        if rotated {
            for head in &mut heads[..2] {
                *head = self.graph.push("rope", &[*head, angles], pairing.clone())?;
            }
        }
        let step = self.input("step");
        let keys = self.graph.push("append", &[self.input("keys"), heads[1], step], Attrs::none())?;
        let values = self.graph.push("append", &[self.input("values"), heads[2], step], Attrs::none())?;
        let attrs = attention_attrs(random, shape.head_dim, shape.windows.0);
        let y = self.graph.push("attend", &[heads[0], keys, values, step], attrs)?;
        self.graph.result("keys", keys);
        self.graph.result("values", values);
        let y = self.graph.push("merge_heads", &[y], Attrs::none())?;
        self.project(y, shape.hidden, random)
    }

    fn experts(&mut self, shape: &Shape, x: ValueId, random: &mut Random) -> Result<ValueId> {
        let (experts, top, inner) = (random.pick(&[4, 8]), 1 + random.below(3), random.pick(&[32, 64]));
        let router = self.weight(Type::f32([Dim::N(experts), Dim::N(shape.hidden)]), random)?;
        let scores = self.graph.push("matmul", &[x, router], Attrs::none())?;
        let attrs = attrs! { top = top, normalize = random.chance(0.5) };
        let routing = self.graph.push("route", &[scores], attrs)?;
        let mut y = x;
        for (n, k) in [(inner, shape.hidden), (shape.hidden, inner)] {
            let dtypes = weight_dtypes(k, random.chance(0.4));
            let ty = Type::tensor(random.pick(&dtypes), [experts, n, k].map(Dim::N));
            let w = self.weight(ty, random)?;
            y = self.graph.push("matmul_experts", &[y, w, routing], Attrs::none())?;
            if n == inner {
                y = self.graph.push("silu", &[y], Attrs::none())?;
            }
        }
        self.graph.push("combine", &[y, routing], Attrs::none())
    }

    /// Some op of the table on some values of the pool, where both fit.
    fn random_node(&mut self, random: &mut Random) -> Result<()> {
        // Late values more often than early ones, so that chains grow.
        let back = random.below(self.pool.len()).min(random.below(self.pool.len()));
        let (x, factors) = self.pool[self.pool.len() - 1 - back];
        let ops: Vec<Op> = Op::all().filter(|op| in_layers(op.class())).collect();
        let op = random.pick(&ops);
        let x_ty = self.graph.ty(x).clone();
        let Some((types, attrs)) = (op.row().sample)(random, Some(&x_ty)) else { return Ok(()) };
        let mut operands = vec![x];
        let mut factors = if op.row().commutative || op.class() == Class::Rope { factors } else { 1.max(factors) };
        for ty in &types[1..] {
            let alike: Vec<(ValueId, u32)> =
                self.pool.iter().copied().filter(|(v, _)| self.graph.ty(*v) == ty).collect();
            if ty.is_static() {
                operands.push(self.weight(ty.clone(), random)?);
            } else if alike.is_empty() {
                return Ok(());
            } else {
                let (v, more) = random.pick(&alike);
                operands.push(v);
                factors += more;
            }
        }
        if factors > MOST_FACTORS {
            return Ok(());
        }
        let y = self.graph.push_op(op, &operands, attrs)?;
        self.pool.push((y, if op.class() == Class::RowReduce { 1 } else { factors }));
        Ok(())
    }

    /// The residual stream plus the last values that nobody has read, each brought to its width.
    fn sum(&mut self, shape: &Shape, x: ValueId, random: &mut Random) -> Result<ValueId> {
        let uses = self.graph.uses();
        let flat = |v: &ValueId| matches!(self.graph.ty(*v).as_tensor(), Some((DType::F32, [Dim::T, Dim::N(_)])));
        let unread = self.pool.iter().rev().map(|(v, _)| *v).filter(|v| uses[v.0 as usize] == 0 && flat(v));
        let last: Vec<ValueId> = unread.take(3).collect();
        let mut total = x;
        for v in last {
            let wide = *self.graph.ty(v) == shape.x();
            let v = if wide { v } else { self.project(v, shape.hidden, random)? };
            total = self.graph.push("add", &[total, v], Attrs::none())?;
        }
        Ok(total)
    }

    fn head(&mut self, shape: &Shape, x: ValueId, random: &mut Random) -> Result<()> {
        let x = self.graph.push("select_rows", &[x, self.input("rows")], Attrs::none())?;
        let x = self.graph.push("rms_normalize", &[x], attrs! { eps = 1e-5 })?;
        let logits = self.project(x, shape.vocab, random)?;
        self.graph.result("logits", logits);
        Ok(())
    }
}

/// Ops that a layer takes at random: whose result has the rows of its operand, and that touch no cache.
fn in_layers(class: Class) -> bool {
    use Class::*;
    !matches!(class, Weight | WeightFold | Gather | Angles | Append | Attend | Pool | Estimate | Rescore)
}

#[cfg(test)]
#[path = "sample_tests.rs"]
mod tests;
