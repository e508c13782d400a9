//! GGUF's spelling and Hugging Face's, side by side: tensor names and settings.
//!
//! ```text
//! blk.3.attn_q.weight        ->  model.layers.3.self_attn.q_proj.weight
//! llama.attention.head_count ->  num_attention_heads
//! ```
//!
//! A family gives its table of tensor stems; the settings table is common. A setting without a row keeps its GGUF name,
//! is therefore read by no builder, and is refused by [`Config::finish`] unless it is off.

use crate::checkpoint::Checkpoint;
use crate::config::{Config, Origin};
use crate::gguf::{Gguf, Scalar};
use mansard_ir::{Error, Kind, Result, bail};
use serde_json::{Map, Number, Value, json};

/// GGUF stem -> logical stem. `blk.` in front means one per layer; `{}` is the layer.
pub(crate) type Stems = &'static [(&'static str, &'static str)];

/// Stems of decoders in the manner of Llama.
pub(crate) const DECODER: Stems = &[
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
    ("rope_freqs", "model.rope_factors"),
    ("blk.attn_norm", "model.layers.{}.input_layernorm"),
    ("blk.attn_q", "model.layers.{}.self_attn.q_proj"),
    ("blk.attn_k", "model.layers.{}.self_attn.k_proj"),
    ("blk.attn_v", "model.layers.{}.self_attn.v_proj"),
    ("blk.attn_output", "model.layers.{}.self_attn.o_proj"),
    ("blk.attn_q_norm", "model.layers.{}.self_attn.q_norm"),
    ("blk.attn_k_norm", "model.layers.{}.self_attn.k_norm"),
    ("blk.ffn_norm", "model.layers.{}.post_attention_layernorm"),
    ("blk.ffn_gate", "model.layers.{}.mlp.gate_proj"),
    ("blk.ffn_up", "model.layers.{}.mlp.up_proj"),
    ("blk.ffn_down", "model.layers.{}.mlp.down_proj"),
    ("blk.ffn_gate_inp", "model.layers.{}.mlp.gate"),
    ("blk.ffn_gate_exps", "model.layers.{}.mlp.experts.gate_proj"),
    ("blk.ffn_up_exps", "model.layers.{}.mlp.experts.up_proj"),
    ("blk.ffn_down_exps", "model.layers.{}.mlp.experts.down_proj"),
];

/// GGUF setting (after the architecture's name) -> `config.json` setting.
const SETTINGS: &[(&str, &str)] = &[
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.layer_norm_epsilon", "layer_norm_eps"),
    ("attention.sliding_window", "sliding_window"),
    ("attention.sliding_window_pattern", "sliding_window_pattern"),
    ("attention.scale", "attention_multiplier"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("rope.freq_base", "rope_theta"),
    ("rope.freq_base_swa", "rope_local_base_freq"),
    ("expert_count", "num_local_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
];

/// Settings that say nothing new: implied by shapes, or of the converter.
const IMPLIED: &[&str] = &["vocab_size", "tensor_data_layout", "rope.scale_linear"];

/// Gives every tensor of a GGUF file its logical name; names without a row stay.
///
/// # Errors
/// Where two tensors would have one name.
pub(crate) fn rename_tensors(checkpoint: &mut Checkpoint, stems: Stems) -> Result<()> {
    checkpoint.rename(|name| logical(stems, name).unwrap_or_else(|| name.into()))
}

/// `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`.
fn logical(stems: Stems, name: &str) -> Option<String> {
    let (stem, suffix) = name.rsplit_once('.')?;
    let to = |stem: &str| stems.iter().find(|s| s.0 == stem).map(|s| s.1);
    let Some(rest) = stem.strip_prefix("blk.") else {
        return Some(format!("{}.{suffix}", to(stem)?));
    };
    let (layer, stem) = rest.split_once('.')?;
    if let Some(to) = to(&format!("blk.{stem}")) {
        return Some(format!("{}.{suffix}", to.replace("{}", layer)));
    }
    // Older files store each expert by itself: `blk.3.ffn_gate.5.weight`.
    let (stem, expert) = stem.rsplit_once('.')?;
    let expert: usize = expert.parse().ok()?;
    let to = to(&format!("blk.{stem}_exps"))?.replace("{}", layer).replace("experts", &format!("experts.{expert}"));
    Some(format!("{to}.{suffix}"))
}

/// The settings of a GGUF file in the spelling of `config.json`.
///
/// # Errors
/// Where a setting is inconsistent or one per layer.
pub(crate) fn settings(gguf: &Gguf, architecture: &str, checkpoint: &Checkpoint) -> Result<Config> {
    let mut map = Map::new();
    let prefix = format!("{architecture}.");
    for (key, scalars) in gguf.scalars(&prefix) {
        if IMPLIED.contains(&key) || key.starts_with("rope.scaling.") {
            continue;
        }
        let [first, rest @ ..] = scalars.as_slice() else { continue };
        if rest.iter().any(|s| s != first) {
            let message = format!("setting `{prefix}{key}` differs from layer to layer");
            return Err(Error::new(Kind::Unsupported, message).help("supported: one value for all layers"));
        }
        let name = SETTINGS.iter().find(|s| s.0 == key).map_or(format!("{prefix}{key}"), |s| s.1.to_owned());
        map.insert(name, number(*first));
    }
    let take = |map: &mut Map<String, Value>, key: &str| map.remove(&format!("{prefix}{key}"));
    if let (Some(values), Some(keys)) = (take(&mut map, "attention.value_length"), map.get("head_dim"))
        && values != *keys
    {
        bail!(Unsupported, "keys of {keys} dims with values of {values}; supported: one width for both");
    }
    if let Some(dims) = take(&mut map, "rope.dimension_count").and_then(|v| v.as_f64()) {
        let head_dim = match (map.get("head_dim"), map.get("hidden_size"), map.get("num_attention_heads")) {
            (Some(dim), _, _) => dim.as_f64(),
            (None, Some(hidden), Some(heads)) => hidden.as_f64().zip(heads.as_f64()).map(|(h, n)| h / n),
            _ => None,
        };
        map.insert("partial_rotary_factor".into(), json!(head_dim.filter(|d| *d > 0.0).map(|d| dims / d)));
    }
    // A window or a number of experts of 0 means none.
    map.retain(|_, value| *value != json!(0) && *value != json!(0.0));
    if let Some(scaling) = rope_scaling(gguf, architecture)? {
        map.insert("rope_scaling".into(), scaling);
    }
    if let Some([vocab, _]) = checkpoint.shape("token_embd.weight") {
        map.insert("vocab_size".into(), json!(vocab));
    }
    map.insert("tie_word_embeddings".into(), json!(!checkpoint.has("output.weight")));
    map.insert("model_type".into(), json!(architecture));
    Ok(Config::new(Origin::Gguf, map))
}

/// `rope.scaling.*` as `rope_scaling`.
fn rope_scaling(gguf: &Gguf, architecture: &str) -> Result<Option<Value>> {
    let prefix = format!("{architecture}.rope.scaling.");
    let legacy = gguf.float(&format!("{architecture}.rope.scale_linear"));
    let kind = gguf.text(&format!("{prefix}type")).or(legacy.map(|_| "linear"));
    let mut map = Map::new();
    let mut boost = None;
    if let Some(factor) = legacy {
        map.insert("factor".into(), json!(factor));
    }
    for (key, scalars) in gguf.scalars(&prefix) {
        let Some(value) = scalars.first().map(|s| number(*s)) else { continue };
        match key {
            "finetuned" | "yarn_log_multiplier" if value.as_f64().unwrap_or(0.0) == 0.0 || key == "finetuned" => {}
            "original_context_length" => drop(map.insert("original_max_position_embeddings".into(), value)),
            "attn_factor" => boost = value.as_f64(),
            "yarn_beta_fast" => drop(map.insert("beta_fast".into(), value)),
            "yarn_beta_slow" => drop(map.insert("beta_slow".into(), value)),
            other => drop(map.insert(other.into(), value)),
        }
    }
    let Some(kind) = kind.filter(|k| *k != "none") else { return Ok(None) };
    if let (Some(boost), "yarn") = (boost, kind) {
        // This format's factor comes on top of the usual one.
        let factor = map.get("factor").and_then(Value::as_f64).unwrap_or(1.0).max(1.0);
        map.insert("attention_factor".into(), json!(boost * (0.1 * factor.ln() + 1.0)));
    }
    map.insert("rope_type".into(), json!(kind));
    Ok(Some(Value::Object(map)))
}

fn number(scalar: Scalar) -> Value {
    match scalar {
        Scalar::Bool(b) => Value::Bool(b),
        Scalar::Float(x) => json!(x),
        Scalar::Int(i) => i64::try_from(i).map_or(Value::Null, |i| Value::Number(Number::from(i))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_have_logical_names() {
        let of = |name| logical(DECODER, name).unwrap_or_else(|| "none".into());
        assert_eq!(of("blk.12.attn_q.weight"), "model.layers.12.self_attn.q_proj.weight");
        assert_eq!(of("blk.0.ffn_down_exps.weight"), "model.layers.0.mlp.experts.down_proj.weight");
        assert_eq!(of("blk.0.ffn_down.7.weight"), "model.layers.0.mlp.experts.7.down_proj.weight");
        assert_eq!(of("output.weight"), "lm_head.weight");
        assert_eq!(of("blk.weight"), "none");
        assert_eq!(of("mystery"), "none");
    }
}
