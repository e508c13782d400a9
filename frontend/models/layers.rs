//! Shared pieces of graphs: norms, linear layers, attention, MLPs, experts.
//!
//! [`Net`] is a graph under construction that adds every weight it names to the model's table. What is built here is
//! the plain spelling that later stages start from: a norm is `rms_normalize` then `mul_row`, a linear layer `matmul`
//! then `add_row`, and nothing is fused or folded.

use crate::checkpoint::Checkpoint;
use mansard_ir::graph::Graph;
use mansard_ir::model::{Call, Source, Weight, WeightTable};
use mansard_ir::types::CacheRole;
use mansard_ir::{Attrs, DType, Dim, Error, Kind, Result, Type, ValueId, attrs};

/// A graph under construction, and where its weights come from.
pub(crate) struct Net<'a> {
    graph: Graph,
    checkpoint: &'a Checkpoint,
    weights: &'a mut WeightTable,
    prefix: &'a str,
}

/// Calls and their graphs, equal graphs once.
pub(crate) struct Assembly<'a> {
    checkpoint: &'a Checkpoint,
    /// Distinct graphs so far.
    pub graphs: Vec<Graph>,
    /// Calls so far.
    pub calls: Vec<Call>,
    /// Weights of all calls.
    pub weights: WeightTable,
}

/// How the last axis is normalized before a gain is applied.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Norm {
    /// `rms_normalize`; the gain is the stored vector plus `offset`.
    Rms {
        /// Added to the mean square.
        eps: f64,
        /// 1 where a checkpoint stores gains minus one.
        offset: f64,
    },
    /// `layer_normalize` with gain and bias.
    Layer {
        /// Added to the variance.
        eps: f64,
    },
}

/// Names (under the call's prefix, without `.weight`) of attention's four linear layers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Projections {
    /// To queries, keys, values, and back.
    pub qkvo: [&'static str; 4],
    /// The first three have biases.
    pub qkv_bias: bool,
    /// The last has one.
    pub out_bias: bool,
}

/// Shape and settings of one attention.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Its linear layers.
    pub projections: Projections,
    /// Norm of each query and key head, with gains `self_attn.q_norm` and `self_attn.k_norm`.
    pub head_norm: Option<Norm>,
    /// Name of the rope table's input and the width of the table; and the pairing of dims.
    pub rope: Option<(&'static str, usize, &'static str)>,
    /// Multiplies scores.
    pub scale: f64,
    /// A token sees no later position.
    pub causal: bool,
    /// Positions seen back; 0 for all.
    pub window: usize,
    /// Bound of scores; 0 for none.
    pub softcap: f64,
}

/// Inputs of every layer graph.
pub(crate) struct LayerInputs {
    /// The residual stream, `f32[t, hidden]`.
    pub x: ValueId,
    rope: Option<ValueId>,
    keys: ValueId,
    values: ValueId,
    step: ValueId,
}

impl<'a> Assembly<'a> {
    /// Nothing yet.
    pub fn new(checkpoint: &'a Checkpoint) -> Assembly<'a> {
        Assembly { checkpoint, graphs: vec![], calls: vec![], weights: WeightTable::default() }
    }

    /// Calls the graph that `build` makes: an earlier equal one, or a new one named `name`, `name_1`, ...
    ///
    /// # Errors
    /// Of `build`, with the prefix as place.
    pub fn call(&mut self, name: &str, prefix: &str, build: impl FnOnce(&mut Net<'_>) -> Result<()>) -> Result<()> {
        let graph = Graph::new(name);
        let mut net = Net { graph, checkpoint: self.checkpoint, weights: &mut self.weights, prefix };
        build(&mut net)
            .map_err(|e| if prefix.is_empty() { e } else { e.at(prefix.trim_end_matches('.').to_owned()) })?;
        let mut graph = net.graph;
        let same = |g: &&Graph| g.inputs == graph.inputs && g.nodes == graph.nodes && g.results == graph.results;
        let graph = match self.graphs.iter().find(same) {
            Some(known) => known.name.clone(),
            None => {
                let kinds = self.graphs.iter().filter(|g| g.name.split('_').next() == Some(name)).count();
                if kinds > 0 {
                    graph.name = format!("{name}_{kinds}");
                }
                let name = graph.name.clone();
                self.graphs.push(graph);
                name
            }
        };
        self.calls.push(Call { graph, prefix: prefix.to_owned() });
        Ok(())
    }
}

impl Net<'_> {
    /// Declares an input; before the first node only.
    pub fn input(&mut self, name: &str, ty: Type) -> ValueId {
        self.graph.input(name, ty)
    }

    /// Names a result.
    pub fn result(&mut self, name: &str, value: ValueId) {
        self.graph.result(name, value);
    }

    /// Appends a node.
    ///
    /// # Errors
    /// Where the operands do not fit: a file whose settings contradict each other.
    pub fn op(&mut self, op: &str, operands: &[ValueId], attrs: Attrs) -> Result<ValueId> {
        self.graph.push(op, operands, attrs)
    }

    fn named(&mut self, name: &str, weight: Weight) -> ValueId {
        let ty = weight.ty.clone();
        self.weights.insert(format!("{}{name}", self.prefix), weight);
        self.graph.weight(name, ty)
    }

    /// A vector of the checkpoint.
    ///
    /// # Errors
    /// Where it is missing or has another length.
    pub fn vector(&mut self, name: &str, n: usize) -> Result<ValueId> {
        let weight = self.checkpoint.vector(&format!("{}{name}", self.prefix), n)?;
        Ok(self.named(name, weight))
    }

    /// A matrix, or a stack of matrices, of the checkpoint.
    ///
    /// # Errors
    /// Where it is missing or has another shape.
    pub fn matrix(&mut self, name: &str, shape: &[usize]) -> Result<ValueId> {
        let weight = self.checkpoint.matrix(&format!("{}{name}", self.prefix), shape)?;
        Ok(self.named(name, weight))
    }

    /// A vector the importer computed.
    pub fn constant(&mut self, name: &str, values: &[f32]) -> ValueId {
        let weight = Weight { ty: Type::f32([Dim::N(values.len())]), source: Source::Values(values.into()) };
        self.named(name, weight)
    }

    /// `x` times `name.weight`, plus `name.bias`.
    ///
    /// # Errors
    /// Where a weight is missing or has another shape.
    pub fn linear(&mut self, x: ValueId, name: &str, (n, k): (usize, usize), bias: bool) -> Result<ValueId> {
        let w = self.matrix(&format!("{name}.weight"), &[n, k])?;
        let y = self.op("matmul", &[x, w], Attrs::none())?; // [t, n]
        if !bias {
            return Ok(y);
        }
        let bias = self.vector(&format!("{name}.bias"), n)?;
        self.op("add_row", &[y, bias], Attrs::none())
    }

    /// Normalizes the last axis, of width `n`, with the gain `name.weight`.
    ///
    /// # Errors
    /// Where a weight is missing or has another length.
    pub fn norm(&mut self, x: ValueId, name: &str, n: usize, norm: Norm) -> Result<ValueId> {
        let mut gain = self.vector(&format!("{name}.weight"), n)?;
        match norm {
            Norm::Rms { eps, offset } => {
                if offset != 0.0 {
                    gain = self.op("offset", &[gain], attrs! { by = offset })?;
                }
                let y = self.op("rms_normalize", &[x], attrs! { eps = eps })?;
                self.op("mul_row", &[y, gain], Attrs::none())
            }
            Norm::Layer { eps } => {
                let y = self.op("layer_normalize", &[x], attrs! { eps = eps })?;
                let y = self.op("mul_row", &[y, gain], Attrs::none())?;
                let bias = self.vector(&format!("{name}.bias"), n)?;
                self.op("add_row", &[y, bias], Attrs::none())
            }
        }
    }

    /// `x * by`, or `x` where that is the same.
    ///
    /// # Errors
    /// None in practice.
    pub fn scaled(&mut self, x: ValueId, by: f64) -> Result<ValueId> {
        if by == 1.0 { Ok(x) } else { self.op("scale", &[x], attrs! { by = by }) }
    }

    /// Declares a layer's inputs.
    pub fn layer_inputs(&mut self, a: &Attention) -> LayerInputs {
        let cache =
            |role| Type::Cache { role, heads: a.kv_heads, dim: a.head_dim, dtype: DType::F32, window: a.window };
        LayerInputs {
            x: self.input("x", Type::f32([Dim::T, Dim::N(a.hidden)])),
            rope: a.rope.map(|(name, width, _)| self.input(name, Type::f32([Dim::T, Dim::N(width)]))),
            keys: self.input("keys", cache(CacheRole::Keys)),
            values: self.input("values", cache(CacheRole::Values)),
            step: self.input("step", Type::Step),
        }
    }

    /// Attention over `x: f32[t, hidden]`; names the results `keys` and `values`.
    ///
    /// # Errors
    /// Where a weight is missing or the settings contradict each other.
    pub fn attention(&mut self, inputs: &LayerInputs, x: ValueId, a: &Attention) -> Result<ValueId> {
        let p = &a.projections;
        let (q_width, kv_width) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        let q = self.linear(x, p.qkvo[0], (q_width, a.hidden), p.qkv_bias)?;
        let k = self.linear(x, p.qkvo[1], (kv_width, a.hidden), p.qkv_bias)?;
        let v = self.linear(x, p.qkvo[2], (kv_width, a.hidden), p.qkv_bias)?;
        let mut q = self.op("split_heads", &[q], attrs! { heads = a.heads })?; // [t, heads, head_dim]
        let mut k = self.op("split_heads", &[k], attrs! { heads = a.kv_heads })?;
        let v = self.op("split_heads", &[v], attrs! { heads = a.kv_heads })?;
        if let Some(norm) = a.head_norm {
            q = self.norm(q, "self_attn.q_norm", a.head_dim, norm)?;
            k = self.norm(k, "self_attn.k_norm", a.head_dim, norm)?;
        }
        if let (Some(table), Some((_, _, pairing))) = (inputs.rope, a.rope) {
            q = self.op("rope", &[q, table], attrs! { pairing = pairing })?;
            k = self.op("rope", &[k, table], attrs! { pairing = pairing })?;
        }
        let keys = self.op("append", &[inputs.keys, k, inputs.step], Attrs::none())?;
        let values = self.op("append", &[inputs.values, v, inputs.step], Attrs::none())?;
        let settings = attrs! { scale = a.scale, causal = a.causal, window = a.window, softcap = a.softcap };
        let y = self.op("attend", &[q, keys, values, inputs.step], settings)?; // [t, heads, head_dim]
        let y = self.op("merge_heads", &[y], Attrs::none())?;
        let y = self.linear(y, p.qkvo[3], (a.hidden, q_width), p.out_bias)?;
        self.result("keys", keys);
        self.result("values", values);
        Ok(y)
    }

    /// `down(activation(gate(x)) * up(x))` under `mlp.`.
    ///
    /// # Errors
    /// Where a weight is missing or has another shape.
    pub fn gated_mlp(
        &mut self,
        x: ValueId,
        (hidden, inner): (usize, usize),
        activation: &str,
        bias: bool,
    ) -> Result<ValueId> {
        let gate = self.linear(x, "mlp.gate_proj", (inner, hidden), bias)?; // [t, inner]
        let up = self.linear(x, "mlp.up_proj", (inner, hidden), bias)?;
        let gate = self.op(activation, &[gate], Attrs::none())?;
        let y = self.op("mul", &[gate, up], Attrs::none())?;
        self.linear(y, "mlp.down_proj", (hidden, inner), bias)
    }

    /// `names[1](activation(names[0](x)))`, both with biases.
    ///
    /// # Errors
    /// Where a weight is missing or has another shape.
    pub fn mlp(
        &mut self,
        x: ValueId,
        (hidden, inner): (usize, usize),
        names: [&str; 2],
        activation: &str,
    ) -> Result<ValueId> {
        let y = self.linear(x, names[0], (inner, hidden), true)?; // [t, inner]
        let y = self.op(activation, &[y], Attrs::none())?;
        self.linear(y, names[1], (hidden, inner), true)
    }

    /// A gated MLP for each of `e.count` experts; a token takes the `e.top` its router prefers.
    ///
    /// # Errors
    /// Where a weight is missing or has another shape.
    pub fn experts(&mut self, x: ValueId, (hidden, e): (usize, Experts), activation: &str) -> Result<ValueId> {
        let scores = self.linear(x, "mlp.gate", (e.count, hidden), false)?; // [t, experts]
        let routing = self.op("route", &[scores], attrs! { top = e.top, normalize = e.normalize })?;
        let gate = self.matrix("mlp.experts.gate_proj.weight", &[e.count, e.inner, hidden])?;
        let gate = self.op("matmul_experts", &[x, gate, routing], Attrs::none())?; // [t, top, inner]
        let up = self.matrix("mlp.experts.up_proj.weight", &[e.count, e.inner, hidden])?;
        let up = self.op("matmul_experts", &[x, up, routing], Attrs::none())?;
        let gate = self.op(activation, &[gate], Attrs::none())?;
        let y = self.op("mul", &[gate, up], Attrs::none())?;
        let down = self.matrix("mlp.experts.down_proj.weight", &[e.count, hidden, e.inner])?;
        let y = self.op("matmul_experts", &[y, down, routing], Attrs::none())?; // [t, top, hidden]
        self.op("combine", &[y, routing], Attrs::none())
    }
}

/// Experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Experts {
    /// How many there are.
    pub count: usize,
    /// Taken by each token.
    pub top: usize,
    /// Width of one expert.
    pub inner: usize,
    /// Weights of those taken sum to 1.
    pub normalize: bool,
}

/// The op of an activation by its name in settings.
///
/// # Errors
/// Listing the supported ones.
pub(crate) fn activation(name: &str) -> Result<&'static str> {
    const KNOWN: &[(&str, &str)] = &[
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "gelu_sigmoid"),
        ("relu", "relu"),
        ("tanh", "tanh"),
    ];
    let found = KNOWN.iter().find(|k| k.0 == name).map(|k| k.1);
    found.ok_or_else(|| {
        let names: Vec<&str> = KNOWN.iter().map(|k| k.0).collect();
        let message = format!("activation `{name}`");
        Error::new(Kind::Unsupported, message).help(format!("supported: {}", names.join(", ")))
    })
}
