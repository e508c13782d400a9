//! Settings that change the math: each must show in the program, and unknown ones must be refused.

use crate::shared;
use mansard_frontend::{Options, open};
use mansard_ir::{Model, Result};
use serde_json::{Map, Value, json};

/// The program of a family's tiny config with some settings changed, its weights seeded; a null takes a setting away.
fn with(family: &str, changes: Value) -> Result<Model> {
    let text = std::fs::read_to_string(shared().join("goldens").join(family).join("config.json")).unwrap();
    let mut config: Map<String, Value> = serde_json::from_str(&text).unwrap();
    config.extend(changes.as_object().unwrap().clone());
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), Value::Object(config).to_string()).unwrap();
    let model = open(folder.path(), &Options { synthetic_seed: Some(1), ..Options::default() })?;
    mansard_ir::verify::verify_model(&model).unwrap_or_else(|e| panic!("{e}"));
    Ok(model)
}

/// `op {attributes}` of every node of a graph.
fn nodes(model: &Model, graph: &str) -> Vec<String> {
    let graph = model.graphs.iter().find(|g| g.name == graph).unwrap();
    let attrs = |n: &mansard_ir::Node| n.attrs.iter().map(|(k, v)| format!(" {k}={v:?}")).collect::<String>();
    graph.nodes.iter().map(|n| format!("{}{}", n.op, attrs(n))).collect()
}

fn count(model: &Model, graph: &str, op: &str) -> usize {
    nodes(model, graph).iter().filter(|n| n.contains(op)).count()
}

fn windows(model: &Model) -> Vec<i64> {
    let of = |call: &mansard_ir::model::Call| {
        let graph = model.graphs_of(call).next().unwrap();
        graph.nodes.iter().find(|n| n.op.name() == "attend").map(|n| n.attrs.int("window"))
    };
    model.calls.iter().filter_map(of).collect()
}

#[test]
fn biases_multipliers_and_caps() {
    let plain = with("llama", json!({})).unwrap();
    assert_eq!((count(&plain, "layer", "add_row"), count(&plain, "layer", "scale")), (0, 1), "attend's");
    let biased = with("llama", json!({ "attention_bias": true, "mlp_bias": true })).unwrap();
    assert_eq!(count(&biased, "layer", "add_row"), 7);
    let granite = json!({ "model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.25,
        "logits_scaling": 8.0, "attention_multiplier": 0.5 });
    let granite = with("llama", granite).unwrap();
    assert_eq!(count(&granite, "embed", "scale by=Float(12.0)"), 1);
    assert_eq!(count(&granite, "layer", "scale by=Float(0.25)"), 2);
    assert_eq!(count(&granite, "layer", "scale=Float(0.5)"), 1);
    assert_eq!(count(&granite, "head", "scale by=Float(0.125)"), 1);
    let gemma2 = json!({ "model_type": "gemma2", "layer_types": null, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "rope_parameters": null, "_sliding_window_pattern": null });
    let gemma2 = with("gemma3", gemma2).unwrap();
    assert_eq!(count(&gemma2, "layer", "softcap=Float(50.0)"), 1);
    assert_eq!(count(&gemma2, "head", "softcap cap=Float(30.0)"), 1);
    assert_eq!(windows(&gemma2), [16, 0, 16, 0, 16, 0]);
    let qwen2 = json!({ "model_type": "qwen2" });
    assert_eq!(count(&with("qwen3", qwen2).unwrap(), "layer", "add_row"), 3);
}

#[test]
fn windows_by_layer() {
    let mistral = with("llama", json!({ "model_type": "mistral", "sliding_window": 32 })).unwrap();
    assert_eq!(windows(&mistral), [32, 32]);
    let qwen2 = |on: bool| {
        let window = json!({ "model_type": "qwen2", "layer_types": null, "sliding_window": 8, "max_window_layers": 1,
            "use_sliding_window": on });
        with("qwen3", window).unwrap()
    };
    assert_eq!(windows(&qwen2(true)), [0, 8]);
    assert_eq!(windows(&qwen2(false)), [0, 0]);
    let named = json!({ "use_sliding_window": true, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] });
    assert_eq!(windows(&with("qwen3", named).unwrap()), [8, 0]);
    assert_eq!(windows(&with("gemma3", json!({})).unwrap()), [16, 16, 16, 16, 16, 0]);
}

#[test]
fn rope_tables() {
    let partial = with("llama", json!({ "partial_rotary_factor": 0.5 })).unwrap();
    assert_eq!(partial.weights.get("rope.frequencies").unwrap().ty.to_string(), "f32[4]");
    let yarn = json!({ "rope_parameters": null, "rope_theta": 10000.0, "rope_scaling": { "rope_type": "yarn",
        "factor": 4.0, "original_max_position_embeddings": 64 } });
    let yarn = with("llama", yarn).unwrap();
    assert_eq!(count(&yarn, "embed", "scale=Float(1.138"), 1);
    let scaled = json!({ "rope_parameters": {
        "full_attention": { "rope_theta": 1e6, "rope_type": "linear", "factor": 8.0 },
        "sliding_attention": { "rope_theta": 1e4, "rope_type": "default" } } });
    let scaled = with("gemma3", scaled).unwrap();
    let first = |name: &str| scaled.weights.get(name).unwrap().read_all().unwrap()[0];
    assert_eq!((first("rope.frequencies"), first("rope_local.frequencies")), (0.125, 1.0));
}

#[test]
fn qwen3_experts_and_dense_layers() {
    let experts = json!({ "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": true,
        "moe_intermediate_size": 32, "mlp_only_layers": [0], "decoder_sparse_step": 1 });
    let model = with("qwen3", experts).unwrap();
    assert_eq!(model.calls.iter().map(|c| c.graph.as_str()).collect::<Vec<_>>(), ["embed", "layer", "layer_1", "head"]);
    assert_eq!(count(&model, "layer_1", "route normalize=Bool(true) top=Int(2)"), 1);
    let name = "model.layers.1.mlp.experts.down_proj.weight";
    assert_eq!(model.weights.get(name).unwrap().ty.to_string(), "f32[4, 64, 32]");
}

#[test]
fn what_is_not_understood_is_refused() {
    let refused = |family: &str, changes: Value, message: &str| {
        let error = with(family, changes).unwrap_err();
        let text = format!("{error}; {}", error.advice().unwrap_or_default());
        assert!(text.contains(message), "{text}");
    };
    refused("llama", json!({ "quantization_config": { "bits": 4 } }), "`quantization_config`");
    refused("llama", json!({ "clip_qkv": 8.0 }), "`clip_qkv` = 8.0");
    refused("llama", json!({ "model_type": "falcon" }), "supported: llama, mistral");
    refused("llama", json!({ "hidden_act": "xielu" }), "supported: silu");
    refused("llama", json!({ "hidden_size": 1u64 << 60 }), "setting `hidden_size`");
    refused("llama", json!({ "num_hidden_layers": 1 << 20 }), "at most 10000 layers");
    refused("llama", json!({ "num_key_value_heads": 3 }), "heads");
    refused("llama", json!({ "head_dim": 15 }), "even");
    refused("bert", json!({ "position_embedding_type": "relative_key" }), "supported: \"absolute\"");
    refused("gpt2", json!({ "n_head": 5 }), "do not divide");
    refused("gemma3", json!({ "use_bidirectional_attention": true }), "use_bidirectional_attention");
}

#[test]
fn the_text_part_of_a_config_of_several() {
    let text = json!({ "model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 6, "intermediate_size": 128,
        "sliding_window": 8, "vocab_size": 64, "rope_scaling": { "rope_type": "linear", "factor": 8.0 } });
    let several = json!({ "model_type": "gemma3", "vision_config": { "depth": 1 }, "text_config": text });
    let model = with("gemma3", several).unwrap();
    assert_eq!(windows(&model), [8, 8, 8, 8, 8, 0]);
    assert_eq!((model.info.vocab, model.info.context), (64, 131_072));
    let queries = model.weights.get("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!(queries.ty.to_string(), "f32[2048, 64]", "what the config leaves out has its published value");
}
