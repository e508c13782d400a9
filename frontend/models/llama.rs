//! Llama and the families that differ from it by settings: Mistral, Mixtral, Qwen 2, Qwen 3 (dense and experts),
//! Granite.

use super::decoder::{Decoder, common, local_layers};
use super::layers::Experts;
use super::{Family, Program};
use crate::checkpoint::Checkpoint;
use crate::config::{Config, Origin};
use crate::names;
use mansard_ir::{Result, bail};

pub(super) const FAMILY: Family = Family {
    model_types: &["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "granite"],
    gguf: &["llama", "qwen2", "qwen3", "qwen3moe", "granite"],
    stems: names::DECODER,
    root: ("model.", "embed_tokens.weight"),
    build,
};

fn build(architecture: &str, config: &Config, checkpoint: &mut Checkpoint) -> Result<Program> {
    let theta = if architecture == "mixtral" { 1e6 } else { 1e4 };
    let mut d = common(config, checkpoint, theta)?;
    if config.origin == Origin::Gguf {
        // Converters permute queries and keys of these two so that pairs lie side by side.
        d.pairing = if matches!(architecture, "llama" | "granite") { "adjacent" } else { "half" };
    } else {
        let attention = config.flag_or("attention_bias", false)?;
        // Qwen 2's are not settable.
        d.bias = if architecture == "qwen2" { (true, false, false) } else { (attention, attention, false) };
        d.bias.2 = config.flag_or("mlp_bias", false)?;
    }
    d.head_norm = architecture.starts_with("qwen3");
    windows(architecture, config, &mut d)?;
    experts(architecture, config, checkpoint, &mut d)?;
    if architecture == "granite" {
        d.embedding_scale = config.float_or("embedding_multiplier", 1.0)?;
        d.residual_scale = config.float_or("residual_multiplier", 1.0)?;
        d.logits_scale = 1.0 / config.positive_or("logits_scaling", 1.0)?;
        // A GGUF file without the setting means the usual scale; `config.json` means 1.
        let usual = if config.origin == Origin::Gguf { d.attention_scale } else { 1.0 };
        d.attention_scale = config.float_or("attention_multiplier", usual)?;
    }
    config.finish()?;
    d.build(checkpoint)
}

fn windows(architecture: &str, config: &Config, d: &mut Decoder) -> Result<()> {
    let huggingface = config.origin == Origin::HuggingFace;
    // Mistral's default, where the setting is not even null.
    let absent = (architecture == "mistral" && huggingface && !config.has("sliding_window")).then_some(4096);
    let window = config.opt_size("sliding_window")?.or(absent);
    // Qwen's windows begin at a layer, and only where they are switched on.
    let switched = architecture.starts_with("qwen");
    let on = config.flag_or("use_sliding_window", !switched || !huggingface)?;
    let first = match config.get("max_window_layers").map(|v| v.as_u64()) {
        Some(Some(first)) if switched => first as usize,
        Some(None) => bail!(Input, "setting `max_window_layers`: expected a number of layers"),
        None if switched && huggingface => 28,
        _ => 0,
    };
    let Some(window) = window.filter(|_| on) else {
        if local_layers(config, d.layers.len(), |_| false)?.contains(&true) {
            bail!(Input, "`layer_types` names layers with a sliding window, but no window is set");
        }
        return Ok(());
    };
    let local = local_layers(config, d.layers.len(), |layer| layer >= first)?;
    for (layer, local) in d.layers.iter_mut().zip(local) {
        layer.window = if local { window } else { 0 };
    }
    Ok(())
}

fn experts(architecture: &str, config: &Config, checkpoint: &mut Checkpoint, d: &mut Decoder) -> Result<()> {
    let count = match config.opt_size("num_local_experts")? {
        None => config.opt_size("num_experts")?,
        count => count,
    };
    let Some(count) = count else { return Ok(()) };
    let published = if architecture == "qwen3_moe" { 8 } else { 2 };
    let inner = config.opt_size("moe_intermediate_size")?.unwrap_or(d.inner);
    let normalize = match (architecture, config.origin) {
        ("qwen3_moe", Origin::HuggingFace) => config.flag_or("norm_topk_prob", false)?,
        _ => true,
    };
    let experts = Experts { count, top: config.size_or("num_experts_per_tok", published)?, inner, normalize };
    let step = config.size_or("decoder_sparse_step", 1)?;
    let dense = config.list("mlp_only_layers")?.unwrap_or_default();
    for (index, layer) in d.layers.iter_mut().enumerate() {
        if (index + 1) % step == 0 && !dense.iter().any(|l| l.as_u64() == Some(index as u64)) {
            layer.experts = Some(experts);
            gather(checkpoint, &format!("model.layers.{index}."), count)?;
        }
    }
    Ok(())
}

/// One expert's tensors under the names their publishers use: gate, up, down.
const SPELLINGS: &[(&str, [&str; 3])] =
    &[("mlp.experts", ["gate_proj", "up_proj", "down_proj"]), ("block_sparse_moe.experts", ["w1", "w3", "w2"])];

/// Brings a layer's experts under `mlp.experts.gate_proj` and so on, each a stack of matrices.
fn gather(checkpoint: &mut Checkpoint, layer: &str, count: usize) -> Result<()> {
    if let Some(router) = checkpoint.take(&format!("{layer}block_sparse_moe.gate.weight")) {
        checkpoint.add(format!("{layer}mlp.gate.weight"), router)?;
    }
    for (stem, matrices) in SPELLINGS {
        for (matrix, logical) in matrices.iter().zip(SPELLINGS[0].1) {
            let each = |e: usize| format!("{layer}{stem}.{e}.{matrix}.weight");
            if checkpoint.has(&each(0)) {
                checkpoint.stack(&format!("{layer}mlp.experts.{logical}.weight"), count, each)?;
            }
        }
    }
    Ok(())
}
