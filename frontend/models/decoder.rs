//! A decoder in the manner of Llama, as data, and its graphs: `embed; layer x n; head`.
//!
//! Families differ in what they read from settings; what they build is this: pre-norm (and, `sandwich`, post-norm)
//! attention and gated MLP or experts around a residual stream, with rope. One layer graph results for each distinct
//! layer: another window, another rope, experts or none, other weight formats.

use crate::checkpoint::Checkpoint;
use crate::config::{Config, Origin};
use crate::models::Program;
use crate::models::layers::{Assembly, Attention, Experts, Net, Norm, Projections, activation};
use crate::rope::Rope;
use mansard_ir::{Attrs, DType, Dim, Result, Type, ValueId, attrs, bail};

/// One layer's own settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Layer {
    /// Positions seen back; 0 for all.
    pub window: usize,
    /// Index into [`Decoder::ropes`].
    pub rope: usize,
    /// Experts instead of the MLP.
    pub experts: Option<Experts>,
}

/// Everything that decides a decoder's graphs.
#[derive(Clone, Debug)]
pub(crate) struct Decoder {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub inner: usize,
    /// Query heads, key-value heads, width of a head.
    pub heads: (usize, usize, usize),
    /// Rows of the token table.
    pub vocab: usize,
    /// Trained positions.
    pub context: usize,
    /// Op between gate and product.
    pub activation: &'static str,
    /// Norms of rows (and of heads, where `head_norm`).
    pub norm: Norm,
    /// Queries and keys are normalized per head.
    pub head_norm: bool,
    /// Biases of queries, keys and values; of attention's output; of the MLP.
    pub bias: (bool, bool, bool),
    /// Norms after attention and MLP, too.
    pub sandwich: bool,
    /// The token table is also the head's matrix.
    pub tied: bool,
    /// Pairing of dims by rope.
    pub pairing: &'static str,
    /// Named recipes of rope tables.
    pub ropes: Vec<(&'static str, Rope)>,
    /// Multiplies embeddings.
    pub embedding_scale: f64,
    /// Multiplies what attention and MLP add.
    pub residual_scale: f64,
    /// Multiplies logits.
    pub logits_scale: f64,
    /// Multiplies attention scores.
    pub attention_scale: f64,
    /// Bounds of scores and logits; 0 for none.
    pub softcaps: (f64, f64),
    /// In order.
    pub layers: Vec<Layer>,
}

/// The settings every decoder has, at their commonest values.
///
/// # Errors
/// Where one is missing or out of range.
pub(crate) fn common(config: &Config, checkpoint: &Checkpoint, theta: f64) -> Result<Decoder> {
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.size_or("num_key_value_heads", heads)?;
    let head_dim = config.size_or("head_dim", (hidden / heads).max(1))?;
    let layers = config.layers("num_hidden_layers")?;
    let context = config.size("max_position_embeddings")?;
    let defaults = crate::rope::Defaults { head_dim, theta, context, layer_type: Some("full_attention") };
    let mut rope = Rope::read(config, &defaults)?;
    if checkpoint.has("model.rope_factors.weight") {
        rope.divide(&checkpoint.values("model.rope_factors.weight", rope.frequencies.len())?)?;
    }
    let gguf = config.origin == Origin::Gguf;
    let bias = |name: &str| gguf && checkpoint.has(&format!("model.layers.0.{name}.bias"));
    Ok(Decoder {
        hidden,
        inner: config.size("intermediate_size")?,
        heads: (heads, kv_heads, head_dim),
        vocab: config.size("vocab_size")?,
        context,
        activation: activation(config.text("hidden_act")?.unwrap_or("silu"))?,
        norm: Norm::Rms { eps: config.positive_or("rms_norm_eps", 1e-6)?, offset: 0.0 },
        head_norm: false,
        bias: (bias("self_attn.q_proj"), bias("self_attn.o_proj"), bias("mlp.down_proj")),
        sandwich: false,
        tied: config.flag_or("tie_word_embeddings", false)?,
        pairing: "half",
        ropes: vec![("rope", rope)],
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logits_scale: 1.0,
        attention_scale: (head_dim as f64).powf(-0.5),
        softcaps: (0.0, 0.0),
        layers: vec![Layer { window: 0, rope: 0, experts: None }; layers],
    })
}

/// Which layers see only a window: `layer_types` where the settings have it, else what `default` says of a layer.
///
/// # Errors
/// Where the list is too short or names a type that is not supported.
pub(crate) fn local_layers(config: &Config, layers: usize, default: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
    let Some(types) = config.list("layer_types")? else { return Ok((0..layers).map(default).collect()) };
    if types.len() < layers {
        bail!(Input, "setting `layer_types`: expected {layers} entries, found {}", types.len());
    }
    let local = types.iter().take(layers).map(|t| match t.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => bail!(Unsupported, "layer type {t}; supported: full_attention, sliding_attention"),
    });
    local.collect()
}

impl Decoder {
    /// The graphs and calls.
    ///
    /// # Errors
    /// Where a weight is missing or has another shape, or the settings contradict each other.
    pub fn build(&self, checkpoint: &Checkpoint) -> Result<Program> {
        let (heads, kv_heads, _) = self.heads;
        if !heads.is_multiple_of(kv_heads) {
            bail!(Input, "{heads} query heads cannot share {kv_heads} key-value heads evenly");
        }
        let mut assembly = Assembly::new(checkpoint);
        assembly.call("embed", "", |net| self.embed(net))?;
        for (index, layer) in self.layers.iter().enumerate() {
            assembly.call("layer", &format!("model.layers.{index}."), |net| self.layer(net, layer))?;
        }
        assembly.call("head", "", |net| self.head(net))?;
        Ok(Program::decoder(assembly, self.context, self.vocab, self.hidden))
    }

    fn embed(&self, net: &mut Net<'_>) -> Result<()> {
        let tokens = net.input("tokens", Type::tensor(DType::I32, [Dim::T]));
        let positions = net.input("positions", Type::tensor(DType::I32, [Dim::T]));
        let table = net.matrix("model.embed_tokens.weight", &[self.vocab, self.hidden])?;
        let x = net.op("embed", &[tokens, table], Attrs::none())?; // [t, hidden]
        let x = net.scaled(x, self.embedding_scale)?;
        net.result("x", x);
        for (index, (name, rope)) in self.ropes.iter().enumerate() {
            if self.layers.iter().any(|l| l.rope == index) {
                let frequencies = net.constant(&format!("{name}.frequencies"), &rope.frequencies);
                let table = net.op("rope_table", &[positions, frequencies], attrs! { scale = rope.scale })?;
                net.result(name, table);
            }
        }
        Ok(())
    }

    fn attention(&self, layer: &Layer) -> Attention {
        let (heads, kv_heads, head_dim) = self.heads;
        let rope = &self.ropes[layer.rope];
        Attention {
            hidden: self.hidden,
            heads,
            kv_heads,
            head_dim,
            projections: Projections {
                qkvo: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
                qkv_bias: self.bias.0,
                out_bias: self.bias.1,
            },
            head_norm: self.head_norm.then_some(self.norm),
            rope: Some((rope.0, 2 * rope.1.frequencies.len(), self.pairing)),
            scale: self.attention_scale,
            causal: true,
            window: layer.window,
            softcap: self.softcaps.0,
        }
    }

    fn layer(&self, net: &mut Net<'_>, layer: &Layer) -> Result<()> {
        let attention = self.attention(layer);
        let inputs = net.layer_inputs(&attention);
        let n = self.hidden;
        let before_mlp = match self.sandwich {
            true => "pre_feedforward_layernorm",
            false => "post_attention_layernorm",
        };
        let x = inputs.x; // [t, hidden]
        let y = net.norm(x, "input_layernorm", n, self.norm)?;
        let mut y = net.attention(&inputs, y, &attention)?;
        if self.sandwich {
            y = net.norm(y, "post_attention_layernorm", n, self.norm)?;
        }
        let x = self.residual(net, x, y)?;
        let y = net.norm(x, before_mlp, n, self.norm)?;
        let mut y = match layer.experts {
            Some(experts) => net.experts(y, (self.hidden, experts), self.activation)?,
            None => net.gated_mlp(y, (self.hidden, self.inner), self.activation, self.bias.2)?,
        };
        if self.sandwich {
            y = net.norm(y, "post_feedforward_layernorm", n, self.norm)?;
        }
        let x = self.residual(net, x, y)?;
        net.result("x", x);
        Ok(())
    }

    fn residual(&self, net: &mut Net<'_>, x: ValueId, y: ValueId) -> Result<ValueId> {
        let y = net.scaled(y, self.residual_scale)?;
        net.op("add", &[x, y], Attrs::none())
    }

    fn head(&self, net: &mut Net<'_>) -> Result<()> {
        let x = net.input("x", Type::f32([Dim::T, Dim::N(self.hidden)]));
        let rows = net.input("rows", Type::tensor(DType::I32, [Dim::R]));
        // First, so that nothing is computed for rows nobody asked for.
        let x = net.op("select_rows", &[x, rows], Attrs::none())?; // [r, hidden]
        let x = net.norm(x, "model.norm", self.hidden, self.norm)?;
        let name = if self.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let w = net.matrix(name, &[self.vocab, self.hidden])?;
        let logits = net.op("matmul", &[x, w], Attrs::none())?; // [r, vocab]
        let mut logits = net.scaled(logits, self.logits_scale)?;
        if self.softcaps.1 != 0.0 {
            logits = net.op("softcap", &[logits], attrs! { cap = self.softcaps.1 })?;
        }
        net.result("logits", logits);
        Ok(())
    }
}
