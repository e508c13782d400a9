//! Graphs of the shapes that models have, and how to evaluate them on seeded values.

#![allow(dead_code, missing_docs)] // each test file uses its own part

extern crate mansard_ir as ir;

use ir::eval::{Cache, Step, Tensor, Value};
use ir::model::{Call, ModelInfo};
use ir::{Attrs, CacheRole, DType, Dim, Graph, Machine, Model, Result, Target, Type, ValueId, attrs};
use std::collections::BTreeMap;

/// What a layer is made of.
#[derive(Clone, Copy)]
pub struct Shape {
    pub hidden: usize,
    pub inner: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub weights: DType,
}

pub const SMALL: Shape = Shape { hidden: 64, inner: 96, heads: 4, kv_heads: 2, dim: 32, weights: DType::F32 };

pub fn target() -> Target {
    let machine = Machine {
        threads: 2,
        bandwidth: 65e9,
        near_bandwidth: 0.0,
        near_bytes: 0.0,
        cache_bandwidth: 200e9,
        cache_bytes: 16e6,
        peak_f32: 220e9,
        peak_bf16: 440e9,
        peak_i8: 900e9,
        barrier: 0.3e-6,
    };
    Target {
        name: "test".into(),
        arch: "x86_64".into(),
        cpu: "znver4".into(),
        features: vec![],
        registers: 32,
        vector_bytes: 64,
        machine,
    }
}

pub struct B {
    pub g: Graph,
    pub s: Shape,
}

impl B {
    pub fn op(&mut self, op: &str, operands: &[ValueId], attrs: Attrs) -> ValueId {
        self.g.push(op, operands, attrs).unwrap_or_else(|e| panic!("{e}"))
    }
    pub fn vector(&mut self, name: &str, n: usize) -> ValueId {
        self.g.weight(name, Type::f32([Dim::N(n)]))
    }
    pub fn matmul(&mut self, x: ValueId, name: &str, n: usize, k: usize) -> ValueId {
        let w = self.g.weight(name, Type::tensor(self.s.weights, [Dim::N(n), Dim::N(k)]));
        self.op("matmul", &[x, w], Attrs::none())
    }
    pub fn rms(&mut self, x: ValueId, name: &str, n: usize) -> ValueId {
        let y = self.op("rms_normalize", &[x], attrs! { eps = 1e-5 });
        let g = self.vector(name, n);
        self.op("mul_row", &[y, g], Attrs::none())
    }
    pub fn layer_norm(&mut self, x: ValueId, name: &str, n: usize) -> ValueId {
        let y = self.op("layer_normalize", &[x], attrs! { eps = 1e-5 });
        let g = self.vector(&format!("{name}.weight"), n);
        let y = self.op("mul_row", &[y, g], Attrs::none());
        let b = self.vector(&format!("{name}.bias"), n);
        self.op("add_row", &[y, b], Attrs::none())
    }
    pub fn linear(&mut self, x: ValueId, name: &str, n: usize, k: usize) -> ValueId {
        let y = self.matmul(x, &format!("{name}.weight"), n, k);
        let b = self.vector(&format!("{name}.bias"), n);
        self.op("add_row", &[y, b], Attrs::none())
    }
}

/// How a layer differs from Llama's.
#[derive(Clone, Copy, Default)]
pub struct Style {
    pub qk_norm: bool,
    pub sandwich: bool,
    pub experts: bool,
}

pub fn layer(s: Shape, style: Style) -> Graph {
    let mut g = Graph::new("layer");
    let x = g.input("x", Type::f32([Dim::T, Dim::N(s.hidden)]));
    let angles = g.input("rope", Type::f32([Dim::T, Dim::N(s.dim)]));
    let cache = |role| Type::Cache { role, heads: s.kv_heads, dim: s.dim, dtype: DType::F32, window: 0 };
    let keys = g.input("keys", cache(CacheRole::Keys));
    let values = g.input("values", cache(CacheRole::Values));
    let step = g.input("step", Type::Step);
    let mut b = B { g, s };
    let n = b.rms(x, "input_norm", s.hidden);
    let q = b.matmul(n, "q", s.heads * s.dim, s.hidden);
    let k = b.matmul(n, "k", s.kv_heads * s.dim, s.hidden);
    let v = b.matmul(n, "v", s.kv_heads * s.dim, s.hidden);
    let mut q = b.op("split_heads", &[q], attrs! { heads = s.heads });
    let mut k = b.op("split_heads", &[k], attrs! { heads = s.kv_heads });
    let v = b.op("split_heads", &[v], attrs! { heads = s.kv_heads });
    if style.qk_norm {
        q = b.rms(q, "q_norm", s.dim);
        k = b.rms(k, "k_norm", s.dim);
    }
    let q = b.op("rope", &[q, angles], attrs! { pairing = "half" });
    let k = b.op("rope", &[k, angles], attrs! { pairing = "half" });
    let keys = b.op("append", &[keys, k, step], Attrs::none());
    let values = b.op("append", &[values, v, step], Attrs::none());
    let a = b.op(
        "attend",
        &[q, keys, values, step],
        attrs! { scale = 1.0 / (s.dim as f64).sqrt(), causal = true, window = 0i64, softcap = 0.0 },
    );
    let a = b.op("merge_heads", &[a], Attrs::none());
    let mut o = b.matmul(a, "o", s.hidden, s.heads * s.dim);
    if style.sandwich {
        o = b.rms(o, "post_attention_norm", s.hidden);
    }
    let x = b.op("add", &[x, o], Attrs::none());
    let n = b.rms(x, "mlp_norm", s.hidden);
    let mut d = if style.experts { experts(&mut b, n) } else { mlp(&mut b, n) };
    if style.sandwich {
        d = b.rms(d, "post_mlp_norm", s.hidden);
    }
    let x = b.op("add", &[x, d], Attrs::none());
    b.g.result("x", x);
    b.g.result("keys", keys);
    b.g.result("values", values);
    b.g
}

fn mlp(b: &mut B, n: ValueId) -> ValueId {
    let s = b.s;
    let gate = b.matmul(n, "gate", s.inner, s.hidden);
    let up = b.matmul(n, "up", s.inner, s.hidden);
    let gate = b.op("silu", &[gate], Attrs::none());
    let m = b.op("mul", &[gate, up], Attrs::none());
    b.matmul(m, "down", s.hidden, s.inner)
}

fn experts(b: &mut B, n: ValueId) -> ValueId {
    let s = b.s;
    let router = b.g.weight("router", Type::f32([Dim::N(4), Dim::N(s.hidden)]));
    let r = b.op("matmul", &[n, router], Attrs::none());
    let r = b.op("route", &[r], attrs! { top = 2i64, normalize = true });
    let mut expert = |name: &str, x: ValueId, n: usize, k: usize| {
        let w = b.g.weight(name, Type::tensor(s.weights, [Dim::N(4), Dim::N(n), Dim::N(k)]));
        b.op("matmul_experts", &[x, w, r], Attrs::none())
    };
    let gate = expert("gate", n, s.inner, s.hidden);
    let up = expert("up", n, s.inner, s.hidden);
    let gate = b.op("silu", &[gate], Attrs::none());
    let m = b.op("mul", &[gate, up], Attrs::none());
    let w = b.g.weight("down", Type::tensor(s.weights, [Dim::N(4), Dim::N(s.hidden), Dim::N(s.inner)]));
    let d = b.op("matmul_experts", &[m, w, r], Attrs::none());
    b.op("combine", &[d, r], Attrs::none())
}

pub fn bert(s: Shape) -> Graph {
    let mut g = Graph::new("layer");
    let x = g.input("x", Type::f32([Dim::T, Dim::N(s.hidden)]));
    let cache = |role| Type::Cache { role, heads: s.heads, dim: s.dim, dtype: DType::F32, window: 0 };
    let keys = g.input("keys", cache(CacheRole::Keys));
    let values = g.input("values", cache(CacheRole::Values));
    let step = g.input("step", Type::Step);
    let mut b = B { g, s };
    let wide = s.heads * s.dim;
    let q = b.linear(x, "q", wide, s.hidden);
    let k = b.linear(x, "k", wide, s.hidden);
    let v = b.linear(x, "v", wide, s.hidden);
    let q = b.op("split_heads", &[q], attrs! { heads = s.heads });
    let k = b.op("split_heads", &[k], attrs! { heads = s.heads });
    let v = b.op("split_heads", &[v], attrs! { heads = s.heads });
    let keys = b.op("append", &[keys, k, step], Attrs::none());
    let values = b.op("append", &[values, v, step], Attrs::none());
    let a =
        b.op("attend", &[q, keys, values, step], attrs! { scale = 0.2, causal = false, window = 0i64, softcap = 0.0 });
    let a = b.op("merge_heads", &[a], Attrs::none());
    let o = b.linear(a, "o", s.hidden, wide);
    let x = b.op("add", &[o, x], Attrs::none());
    let x = b.layer_norm(x, "norm1", s.hidden);
    let h = b.linear(x, "fc1", s.inner, s.hidden);
    let h = b.op("gelu", &[h], Attrs::none());
    let h = b.linear(h, "fc2", s.hidden, s.inner);
    let x = b.op("add", &[h, x], Attrs::none());
    let x = b.layer_norm(x, "norm2", s.hidden);
    b.g.result("x", x);
    b.g.result("keys", keys);
    b.g.result("values", values);
    b.g
}

pub fn embed(s: Shape, vocab: usize, rope: bool) -> Graph {
    let mut g = Graph::new("embed");
    let tokens = g.input("tokens", Type::tensor(DType::I32, [Dim::T]));
    let positions = g.input("positions", Type::tensor(DType::I32, [Dim::T]));
    let mut b = B { g, s };
    let table = b.g.weight("embed", Type::tensor(s.weights, [Dim::N(vocab), Dim::N(s.hidden)]));
    let x = b.op("embed", &[tokens, table], Attrs::none());
    let x = b.op("scale", &[x], attrs! { by = 8.0 });
    b.g.result("x", x);
    if rope {
        let f = b.vector("frequencies", s.dim / 2);
        let r = b.op("rope_table", &[positions, f], attrs! { scale = 1.0 });
        b.g.result("rope", r);
    }
    b.g
}

pub fn head(s: Shape, vocab: usize) -> Graph {
    let mut g = Graph::new("head");
    let x = g.input("x", Type::f32([Dim::T, Dim::N(s.hidden)]));
    let rows = g.input("rows", Type::tensor(DType::I32, [Dim::R]));
    let mut b = B { g, s };
    let x = b.rms(x, "norm", s.hidden);
    let x = b.op("select_rows", &[x, rows], Attrs::none());
    let y = b.matmul(x, "embed", vocab, s.hidden);
    b.g.result("logits", y);
    b.g
}

pub fn model(graphs: Vec<Graph>, layers: usize, outputs: &[&str]) -> Model {
    let names: Vec<String> = graphs.iter().map(|g| g.name.clone()).collect();
    let mut calls = vec![];
    for name in names {
        let call = |prefix: String| Call { graph: name.clone(), prefix };
        match name.as_str() {
            "layer" => calls.extend((0..layers).map(|i| call(format!("layers.{i}.")))),
            _ => calls.push(call(String::new())),
        }
    }
    Model {
        name: "test".into(),
        graphs,
        calls,
        outputs: outputs.iter().map(|s| s.to_string()).collect(),
        weights: Default::default(),
        info: ModelInfo { context: 256, ..Default::default() },
    }
}

/// Seeded values, uniform in -1..1.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
    pub fn reals(&mut self, shape: Vec<usize>) -> Value {
        let n = shape.iter().product();
        Value::Tensor(Tensor::new(shape, (0..n).map(|_| self.next()).collect()))
    }
    pub fn of(&mut self, ty: &Type, dims: (usize, usize, usize), below: usize) -> Value {
        let (t, s, r) = dims;
        let extent = |d: &Dim| match d {
            Dim::N(n) => *n,
            Dim::T => t,
            Dim::S => s,
            Dim::R => r,
        };
        match ty {
            Type::Tensor { dtype: DType::I32, shape } => {
                let n = extent(&shape[0]);
                Value::from_ints((0..n).map(|_| ((self.next() + 1.0) * 0.5 * below as f32) as i32).collect::<Vec<_>>())
            }
            Type::Tensor { shape, .. } => self.reals(shape.iter().map(extent).collect()),
            Type::Cache { heads, dim, dtype, .. } => {
                Value::Cache(Cache { heads: *heads, dim: *dim, dtype: *dtype, sequences: vec![Default::default(); s] })
            }
            Type::Step => Value::Step(Step::new(&vec![(0, t / s); s])),
            Type::Routing { top, experts } => {
                let chosen = (0..t).flat_map(|i| (0..*top).map(move |j| (i + j) % experts)).collect();
                let weights = (0..t * top).map(|_| self.next()).collect();
                Value::Routing(ir::eval::Routing { top: *top, experts: *experts, chosen, weights })
            }
        }
    }
}

/// A weight's values: the same for the same name.
pub fn weight(name: &str, ty: &Type) -> Result<Value> {
    let seed = name.bytes().fold(17u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
    let mut value = Random(seed).of(ty, (1, 1, 1), 1);
    if let Value::Tensor(t) = &mut value {
        let scale = if t.shape.len() > 1 { 1.0 / (t.width() as f32).sqrt() } else { 1.0 };
        let data = t.data.iter().map(|x| x * scale).collect();
        *t = Tensor::new(t.shape.clone(), data);
    }
    Ok(value)
}

/// Results of a graph on values made from `seed`.
pub fn evaluate(graph: &Graph, seed: u64, dims: (usize, usize, usize)) -> BTreeMap<String, Value> {
    let mut random = Random(seed);
    let inputs: Vec<Value> = graph.inputs.iter().map(|i| random.of(&i.ty, dims, dims.0)).collect();
    let results = ir::eval::graph(graph, &inputs, &mut |n, ty| weight(n, ty)).unwrap_or_else(|e| panic!("{e}"));
    graph.results.iter().map(|(n, _)| n.clone()).zip(results).collect()
}

/// Greatest difference of two values, relative to the greatest magnitude.
pub fn difference(a: &Value, b: &Value) -> f32 {
    let flat = |v: &Value| -> Vec<f32> {
        match v {
            Value::Tensor(t) => t.data.to_vec(),
            Value::Cache(c) => c.sequences.iter().flat_map(|s| s.to_vec()).collect(),
            Value::Routing(r) => r.weights.iter().copied().chain(r.chosen.iter().map(|c| *c as f32)).collect(),
            other => panic!("{}", other.describe()),
        }
    };
    let (a, b) = (flat(a), flat(b));
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    a.iter().zip(&b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs())) / largest
}
