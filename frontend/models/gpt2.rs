//! GPT-2: learned positions, layer norms, one matrix for queries, keys and values.
//!
//! Published checkpoints store linear layers as `[inputs, outputs]`; here they are seen as transposed, in place.

use super::layers::{Assembly, Attention, Net, Norm, Projections, activation};
use super::{Family, Program};
use crate::checkpoint::Checkpoint;
use crate::config::{Config, Origin};
use crate::names::Stems;
use mansard_ir::{Attrs, DType, Dim, Error, Kind, Place, Result, Type};

pub(super) const FAMILY: Family =
    Family { model_types: &["gpt2"], gguf: &["gpt2"], stems: STEMS, root: ("", "wte.weight"), build };

const STEMS: Stems = &[
    ("token_embd", "wte"),
    ("position_embd", "wpe"),
    ("output_norm", "ln_f"),
    ("output", "lm_head"),
    ("blk.attn_norm", "h.{}.ln_1"),
    ("blk.attn_qkv", "h.{}.attn.c_attn"),
    ("blk.attn_output", "h.{}.attn.c_proj"),
    ("blk.ffn_norm", "h.{}.ln_2"),
    ("blk.ffn_up", "h.{}.mlp.c_fc"),
    ("blk.ffn_down", "h.{}.mlp.c_proj"),
];

const PROJECTIONS: Projections =
    Projections { qkvo: ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.c_proj"], qkv_bias: true, out_bias: true };

struct Gpt2 {
    hidden: usize,
    inner: usize,
    heads: usize,
    vocab: usize,
    context: usize,
    norm: Norm,
    activation: &'static str,
    tied: bool,
    scale: f64,
    scale_by_layer: bool,
}

fn build(_: &str, config: &Config, checkpoint: &mut Checkpoint) -> Result<Program> {
    // GGUF has the common names, `config.json` of this family its own.
    let either = |own: &str, common: &str| match config.opt_size(own)? {
        None => config.size(common),
        Some(n) => Ok(n),
    };
    let (hidden, heads) = (either("n_embd", "hidden_size")?, either("n_head", "num_attention_heads")?);
    let layers = config.layers("n_layer")?;
    config.accept(&["num_key_value_heads"]);
    let head_dim = hidden as f64 / heads as f64;
    let eps = config.positive_or("layer_norm_epsilon", config.positive_or("layer_norm_eps", 1e-5)?)?;
    let inner = match config.opt_size("n_inner")? {
        None => config.size_or("intermediate_size", 4 * hidden)?,
        Some(inner) => inner,
    };
    let scaled = config.flag_or("scale_attn_weights", true)?;
    let model = Gpt2 {
        hidden,
        inner,
        heads,
        vocab: config.size("vocab_size")?,
        context: either("n_positions", "max_position_embeddings")?,
        norm: Norm::Layer { eps },
        activation: activation(config.text("activation_function")?.unwrap_or("gelu_new"))?,
        tied: config.flag_or("tie_word_embeddings", true)?,
        scale: if scaled { head_dim.powf(-0.5) } else { 1.0 },
        scale_by_layer: config.flag_or("scale_attn_by_inverse_layer_idx", false)?,
    };
    config.only("add_cross_attention", false)?;
    config.finish()?;
    if !hidden.is_multiple_of(heads) {
        return Err(Error::new(Kind::Input, format!("{heads} heads do not divide a width of {hidden}")));
    }
    for layer in 0..layers {
        prepare(checkpoint, config.origin, layer).at(|| format!("h.{layer}"))?;
    }
    let mut assembly = Assembly::new(checkpoint);
    assembly.call("embed", "", |net| model.embed(net))?;
    for layer in 0..layers {
        assembly.call("layer", &format!("h.{layer}."), |net| model.layer(net, layer))?;
    }
    assembly.call("head", "", |net| model.head(net))?;
    Ok(Program::decoder(assembly, model.context, model.vocab, hidden))
}

/// Turns linear layers the usual way round and cuts the one for queries, keys and values in three.
fn prepare(checkpoint: &mut Checkpoint, origin: Origin, layer: usize) -> Result<()> {
    if origin == Origin::HuggingFace {
        for name in ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"] {
            let name = format!("h.{layer}.{name}.weight");
            if let Some(tensor) = checkpoint.take(&name) {
                checkpoint.add(name, tensor.transposed()?)?;
            }
        }
    }
    for kind in ["weight", "bias"] {
        if let Some(all) = checkpoint.take(&format!("h.{layer}.attn.c_attn.{kind}")) {
            for (index, name) in PROJECTIONS.qkvo[..3].iter().enumerate() {
                checkpoint.add(format!("h.{layer}.{name}.{kind}"), all.piece(index, 3)?)?;
            }
        }
    }
    Ok(())
}

impl Gpt2 {
    fn embed(&self, net: &mut Net<'_>) -> Result<()> {
        let tokens = net.input("tokens", Type::tensor(DType::I32, [Dim::T]));
        let positions = net.input("positions", Type::tensor(DType::I32, [Dim::T]));
        let table = net.matrix("wte.weight", &[self.vocab, self.hidden])?;
        let x = net.op("embed", &[tokens, table], Attrs::none())?; // [t, hidden]
        let table = net.matrix("wpe.weight", &[self.context, self.hidden])?;
        let y = net.op("embed", &[positions, table], Attrs::none())?;
        let x = net.op("add", &[x, y], Attrs::none())?;
        net.result("x", x);
        Ok(())
    }

    fn layer(&self, net: &mut Net<'_>, index: usize) -> Result<()> {
        let by_layer = if self.scale_by_layer { 1.0 / (index as f64 + 1.0) } else { 1.0 };
        let attention = Attention {
            hidden: self.hidden,
            heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.hidden / self.heads,
            projections: PROJECTIONS,
            head_norm: None,
            rope: None,
            scale: self.scale * by_layer,
            causal: true,
            window: 0,
            softcap: 0.0,
        };
        let inputs = net.layer_inputs(&attention);
        let y = net.norm(inputs.x, "ln_1", self.hidden, self.norm)?; // [t, hidden]
        let y = net.attention(&inputs, y, &attention)?;
        let x = net.op("add", &[inputs.x, y], Attrs::none())?;
        let y = net.norm(x, "ln_2", self.hidden, self.norm)?;
        let y = net.mlp(y, (self.hidden, self.inner), ["mlp.c_fc", "mlp.c_proj"], self.activation)?;
        let x = net.op("add", &[x, y], Attrs::none())?;
        net.result("x", x);
        Ok(())
    }

    fn head(&self, net: &mut Net<'_>) -> Result<()> {
        let x = net.input("x", Type::f32([Dim::T, Dim::N(self.hidden)]));
        let rows = net.input("rows", Type::tensor(DType::I32, [Dim::R]));
        let x = net.op("select_rows", &[x, rows], Attrs::none())?; // [r, hidden]
        let x = net.norm(x, "ln_f", self.hidden, self.norm)?;
        let name = if self.tied { "wte.weight" } else { "lm_head.weight" };
        let w = net.matrix(name, &[self.vocab, self.hidden])?;
        let logits = net.op("matmul", &[x, w], Attrs::none())?; // [r, vocab]
        net.result("logits", logits);
        Ok(())
    }
}
