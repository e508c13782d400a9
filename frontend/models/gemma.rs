//! Gemma 1, 2 and 3 (its text part): gains stored minus one, scaled embeddings, GeGLU, tied table; from 2 on norms
//! after attention and MLP, local and global layers, soft caps; in 3 norms of heads and a second rope for local layers.

use super::decoder::{Decoder, Layer, common, local_layers};
use super::layers::{Norm, activation};
use super::{Family, Program};
use crate::checkpoint::Checkpoint;
use crate::config::{Config, Origin};
use crate::names::Stems;
use crate::rope::{Defaults, Rope};
use mansard_ir::{Result, bail};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    model_types: &["gemma", "gemma2", "gemma3_text", "gemma3"],
    gguf: &["gemma", "gemma2", "gemma3"],
    stems: STEMS,
    root: ("model.", "embed_tokens.weight"),
    build,
};

const STEMS: Stems = &[
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
    ("blk.attn_norm", "model.layers.{}.input_layernorm"),
    ("blk.attn_q", "model.layers.{}.self_attn.q_proj"),
    ("blk.attn_k", "model.layers.{}.self_attn.k_proj"),
    ("blk.attn_v", "model.layers.{}.self_attn.v_proj"),
    ("blk.attn_output", "model.layers.{}.self_attn.o_proj"),
    ("blk.attn_q_norm", "model.layers.{}.self_attn.q_norm"),
    ("blk.attn_k_norm", "model.layers.{}.self_attn.k_norm"),
    ("blk.post_attention_norm", "model.layers.{}.post_attention_layernorm"),
    ("blk.ffn_norm", "model.layers.{}.pre_feedforward_layernorm"),
    ("blk.post_ffw_norm", "model.layers.{}.post_feedforward_layernorm"),
    ("blk.ffn_gate", "model.layers.{}.mlp.gate_proj"),
    ("blk.ffn_up", "model.layers.{}.mlp.up_proj"),
    ("blk.ffn_down", "model.layers.{}.mlp.down_proj"),
];

/// What the published `config.json` files of Gemma 3 leave out.
fn with_defaults(text: &Map<String, Value>) -> Map<String, Value> {
    let defaults = json!({
        "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131_072, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "intermediate_size": 9216, "hidden_size": 2304, "num_hidden_layers": 26,
    });
    let mut all = defaults.as_object().cloned().unwrap_or_default();
    all.extend(text.iter().map(|(k, v)| (k.clone(), v.clone())));
    all
}

fn build(architecture: &str, config: &Config, checkpoint: &mut Checkpoint) -> Result<Program> {
    let generation = if architecture.starts_with("gemma3") {
        3
    } else if architecture == "gemma2" {
        2
    } else {
        1
    };
    if generation == 3 && config.origin == Origin::HuggingFace {
        let text = config.section("text_config")?.map(|c| c.settings().clone());
        let filled = with_defaults(text.as_ref().unwrap_or(config.settings()));
        return program(generation, &Config::new(config.origin, filled), checkpoint);
    }
    program(generation, config, checkpoint)
}

fn program(generation: usize, config: &Config, checkpoint: &mut Checkpoint) -> Result<Program> {
    let gguf = config.origin == Origin::Gguf;
    let theta = if generation == 3 { 1e6 } else { 1e4 };
    let mut d = common(config, checkpoint, theta)?;
    let (heads, _, head_dim) = d.heads;
    let eps = config.positive_or("rms_norm_eps", 1e-6)?;
    // Converters to GGUF have added the one already.
    d.norm = Norm::Rms { eps, offset: if gguf { 0.0 } else { 1.0 } };
    // `hidden_act` of the first configs says `gelu` and was always run as its tanh approximation.
    config.accept(&["hidden_act"]);
    d.activation = activation(config.text("hidden_activation")?.unwrap_or("gelu_pytorch_tanh"))?;
    d.tied = config.flag_or("tie_word_embeddings", true)?;
    d.embedding_scale = (d.hidden as f64).sqrt();
    if !gguf {
        let bias = config.flag_or("attention_bias", false)?;
        d.bias = (bias, bias, false);
    }
    config.only("use_bidirectional_attention", false)?;
    if generation > 1 {
        d.sandwich = true;
        // A GGUF file does not say; of the published sizes only these two differ from the width of a head.
        let large = matches!((generation, d.layers.len()), (2, 46) | (3, 62));
        let scalar = if gguf && large { d.hidden as f64 / heads as f64 } else { head_dim as f64 };
        let scalar = config.positive_or("query_pre_attn_scalar", if gguf { scalar } else { 256.0 })?;
        d.attention_scale = scalar.powf(-0.5);
        let caps = if generation == 2 && !gguf { (50.0, 30.0) } else { (0.0, 0.0) };
        d.softcaps =
            (softcap(config, "attn_logit_softcapping", caps.0)?, softcap(config, "final_logit_softcapping", caps.1)?);
        local_and_global(generation, config, &mut d)?;
    }
    d.head_norm = generation == 3;
    config.finish()?;
    d.build(checkpoint)
}

/// An absent cap is the default; an explicit null is none.
fn softcap(config: &Config, key: &str, default: f64) -> Result<f64> {
    let default = if config.has(key) { 0.0 } else { default };
    match config.float_or(key, default)? {
        cap if cap >= 0.0 => Ok(cap),
        cap => bail!(Input, "setting `{key}`: expected a positive number, found {cap}"),
    }
}

fn local_and_global(generation: usize, config: &Config, d: &mut Decoder) -> Result<()> {
    let window = config.size_or("sliding_window", 4096)?;
    let published = if generation == 2 { 2 } else { 6 };
    let pattern = config.size_or("sliding_window_pattern", config.size_or("_sliding_window_pattern", published)?)?;
    let local = local_layers(config, d.layers.len(), |layer| (layer + 1) % pattern != 0)?;
    if generation == 3 {
        d.ropes.push(("rope_local", local_rope(config, d)?));
    }
    for (layer, local) in d.layers.iter_mut().zip(local) {
        if local {
            *layer = Layer { window, rope: d.ropes.len() - 1, ..*layer };
        }
    }
    Ok(())
}

/// Local layers have a base of their own and no scaling.
fn local_rope(config: &Config, d: &Decoder) -> Result<Rope> {
    let head_dim = d.heads.2;
    let theta = config.positive_or("rope_local_base_freq", 1e4)?;
    let partial = config.positive_or("partial_rotary_factor", 1.0)?;
    match config.section("rope_parameters")? {
        Some(all) if all.has("sliding_attention") => {
            let defaults = Defaults { head_dim, theta, context: d.context, layer_type: Some("sliding_attention") };
            Rope::read(config, &defaults)
        }
        _ => Rope::unscaled(theta, partial, head_dim),
    }
}
