//! Writers of small model files: GGUF and safetensors from lists of tensors, and the tiny checkpoints converted to GGUF
//! the way its converters do.

use crate::{ids, json, shared};
use std::collections::BTreeMap;
use std::path::Path;

/// An f32 tensor, row-major.
#[derive(Clone)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// A metadata value.
pub enum Meta {
    Size(u32),
    Real(f32),
    Flag(bool),
    Text(&'static str),
    Texts(Vec<String>),
    Reals(Vec<f32>),
    Ints(Vec<i32>),
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn array(out: &mut Vec<u8>, kind: u32, count: usize) {
    out.extend(9u32.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend((count as u64).to_le_bytes());
}

/// A GGUF file, version 3.
pub fn gguf(metadata: &[(String, Meta)], tensors: &Tensors) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        match value {
            Meta::Size(n) => out.extend([4u32.to_le_bytes(), n.to_le_bytes()].concat()),
            Meta::Real(x) => out.extend([6u32.to_le_bytes(), x.to_le_bytes()].concat()),
            Meta::Flag(b) => out.extend([&7u32.to_le_bytes()[..], &[u8::from(*b)]].concat()),
            Meta::Text(value) => {
                out.extend(8u32.to_le_bytes());
                text(&mut out, value);
            }
            Meta::Texts(values) => {
                array(&mut out, 8, values.len());
                values.iter().for_each(|value| text(&mut out, value));
            }
            Meta::Reals(values) => {
                array(&mut out, 6, values.len());
                values.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
            Meta::Ints(values) => {
                array(&mut out, 5, values.len());
                values.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
        }
    }
    let mut offset = 0u64;
    for (name, tensor) in tensors {
        text(&mut out, name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|n| out.extend((*n as u64).to_le_bytes()));
        out.extend(0u32.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset = (offset + 4 * tensor.data.len() as u64).next_multiple_of(32);
    }
    for tensor in tensors.values() {
        out.resize(out.len().next_multiple_of(32), 0);
        tensor.data.iter().for_each(|x| out.extend(x.to_le_bytes()));
    }
    out
}

/// A safetensors file.
pub fn safetensors(tensors: &Tensors) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), vec![]);
    for (name, tensor) in tensors {
        let begin = data.len();
        tensor.data.iter().for_each(|x| data.extend(x.to_le_bytes()));
        let entry = serde_json::json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, data.len()] });
        header.insert(name.clone(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

/// The tensors of a safetensors file of f32.
pub fn read_safetensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let tensor = |entry: &serde_json::Value| {
        let span = ids(&entry["data_offsets"]);
        let data = &bytes[8 + length + span[0] as usize..8 + length + span[1] as usize];
        let data = data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        Tensor { shape: ids(&entry["shape"]).into_iter().map(|n| n as usize).collect(), data }
    };
    header.iter().filter(|(n, _)| *n != "__metadata__").map(|(n, e)| (n.clone(), tensor(e))).collect()
}

/// Rows of each head regrouped so that dims `d` and `d + half` lie side by side.
fn side_by_side(tensor: &Tensor, heads: usize) -> Tensor {
    let (rows, columns) = (tensor.shape[0], tensor.data.len() / tensor.shape[0]);
    let dim = rows / heads;
    let from = |row: usize| row / dim * dim + row % dim % 2 * (dim / 2) + row % dim / 2;
    let data = (0..rows).flat_map(|row| &tensor.data[from(row) * columns..][..columns]).copied().collect();
    Tensor { shape: tensor.shape.clone(), data }
}

fn transposed(tensor: &Tensor) -> Tensor {
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    let data = (0..columns).flat_map(|c| (0..rows).map(move |r| tensor.data[r * columns + c])).collect();
    Tensor { shape: vec![columns, rows], data }
}

/// Names in `config.json`'s world and in GGUF's, longest first where one contains another.
const NAMES: &[(&str, &str)] = &[
    ("model.layers.", "blk."),
    ("transformer.h.", "blk."),
    ("encoder.layer.", "blk."),
    ("attention.output.LayerNorm", "attn_output_norm"),
    ("output.LayerNorm", "layer_output_norm"),
    ("embeddings.LayerNorm", "token_embd_norm"),
    ("embeddings.word_embeddings", "token_embd"),
    ("embeddings.position_embeddings", "position_embd"),
    ("embeddings.token_type_embeddings", "token_types"),
    ("attention.self.query", "attn_q"),
    ("attention.self.key", "attn_k"),
    ("attention.self.value", "attn_v"),
    ("attention.output.dense", "attn_output"),
    ("intermediate.dense", "ffn_up"),
    ("output.dense", "ffn_down"),
    ("transformer.wte", "token_embd"),
    ("transformer.wpe", "position_embd"),
    ("transformer.ln_f", "output_norm"),
    ("ln_1", "attn_norm"),
    ("ln_2", "ffn_norm"),
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attn_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
];

/// `config.json` settings GGUF has, and its names for them.
const SETTINGS: &[(&str, &str)] = &[
    ("max_position_embeddings", "context_length"),
    ("n_positions", "context_length"),
    ("hidden_size", "embedding_length"),
    ("n_embd", "embedding_length"),
    ("num_hidden_layers", "block_count"),
    ("n_layer", "block_count"),
    ("intermediate_size", "feed_forward_length"),
    ("num_attention_heads", "attention.head_count"),
    ("n_head", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("sliding_window", "attention.sliding_window"),
    ("num_local_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
];

/// A tiny checkpoint as a GGUF file of its family, with `more` metadata and `extra` tensors.
pub fn converted(family: &str, more: Vec<(&str, Meta)>, extra: Tensors) -> Vec<u8> {
    let folder = shared().join("goldens").join(family);
    let config = json(&folder.join("config.json"));
    let architecture = if family == "mixtral" { "llama" } else { family };
    let mut metadata = vec![("general.architecture".to_owned(), Meta::Text(architecture.to_owned().leak()))];
    metadata.extend(more.into_iter().map(|(key, value)| (key.to_owned(), value)));
    let mut add = |key: &str, value: Meta| metadata.push((format!("{architecture}.{key}"), value));
    for (ours, theirs) in SETTINGS {
        if let Some(n) = config[ours].as_u64() {
            add(theirs, Meta::Size(n as u32));
        }
    }
    let eps = ["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"].iter().find_map(|k| config[k].as_f64()).unwrap();
    let rms = if config["rms_norm_eps"].is_null() { "" } else { "_rms" };
    add(&format!("attention.layer_norm{rms}_epsilon"), Meta::Real(eps as f32));
    let rope = &config["rope_parameters"];
    let global = rope["rope_theta"].as_f64().or(rope["full_attention"]["rope_theta"].as_f64());
    if let Some(theta) = global {
        add("rope.freq_base", Meta::Real(theta as f32));
    }
    if family == "bert" {
        add("attention.causal", Meta::Flag(false));
        add("pooling_type", Meta::Size(1));
    }
    let mut tensors = Tensors::new();
    for (name, tensor) in read_safetensors(&folder.join("model.safetensors")) {
        if !name.contains("experts") && !name.starts_with("pooler") {
            let (name, tensor) = converted_tensor(architecture, &config, &name, tensor);
            tensors.insert(name, tensor);
        }
    }
    stack_experts(&folder, &config, &mut tensors);
    tensors.extend(extra);
    gguf(&metadata, &tensors)
}

fn converted_tensor(
    architecture: &str,
    config: &serde_json::Value,
    name: &str,
    mut tensor: Tensor,
) -> (String, Tensor) {
    if architecture == "llama" {
        let heads = |key: &str| config[key].as_u64().unwrap() as usize;
        if name.contains("q_proj") {
            tensor = side_by_side(&tensor, heads("num_attention_heads"));
        } else if name.contains("k_proj") {
            tensor = side_by_side(&tensor, heads("num_key_value_heads"));
        }
    }
    if architecture == "gpt2" && tensor.shape.len() == 2 && name.contains(".h.") {
        tensor = transposed(&tensor);
    }
    if architecture == "gemma3" && name.contains("norm") {
        tensor.data.iter_mut().for_each(|x| *x += 1.0);
    }
    // One name, two meanings: before the MLP where there is no norm after attention.
    let after = if architecture == "gemma3" { "post_attention_norm" } else { "ffn_norm" };
    let mut name = name.replace("post_attention_layernorm", after);
    for (ours, theirs) in NAMES {
        name = name.replace(ours, theirs);
    }
    (name, tensor)
}

fn stack_experts(folder: &Path, config: &serde_json::Value, tensors: &mut Tensors) {
    let (Some(experts), Some(layers)) = (config["num_local_experts"].as_u64(), config["num_hidden_layers"].as_u64())
    else {
        return;
    };
    let stored = read_safetensors(&folder.join("model.safetensors"));
    for layer in 0..layers {
        for (ours, theirs) in [("w1", "ffn_gate_exps"), ("w2", "ffn_down_exps"), ("w3", "ffn_up_exps")] {
            let of = |e| &stored[&format!("model.layers.{layer}.block_sparse_moe.experts.{e}.{ours}.weight")];
            let shape = [&[experts as usize], of(0).shape.as_slice()].concat();
            let data = (0..experts).flat_map(|e| of(e).data.clone()).collect();
            tensors.insert(format!("blk.{layer}.{theirs}.weight"), Tensor { shape, data });
        }
    }
}
