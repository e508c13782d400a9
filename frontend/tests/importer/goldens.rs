//! Imported programs, interpreted, against the logits of an independent implementation: the importer is right before
//! anything compiles.

use crate::files::{Meta, Tensor, Tensors, converted};
use crate::{evaluate, ids, import, json, published, read_npy, shared, words};
use mansard_frontend::{Options, open};

fn check(family: &str) {
    let folder = shared().join("goldens").join(family);
    let model = import(&folder);
    let tokens = ids(&json(&folder.join("tokens.json")));
    let got = evaluate(&model, &tokens, if model.info.encoder { "hidden" } else { "logits" });
    let want = read_npy(&folder.join("logits.npy"));
    assert_eq!(got.len(), want.len());
    let mean = want.iter().sum::<f32>() / want.len() as f32;
    let std = (want.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / want.len() as f32).sqrt();
    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{family}: largest difference {:.1e} of the standard deviation", worst / std);
    assert!(worst <= 2e-3 * std, "{family}: largest difference {worst}, standard deviation {std}");
}

#[test]
fn llama() {
    check("llama");
}

#[test]
fn qwen3() {
    check("qwen3");
}

#[test]
fn gemma3() {
    check("gemma3");
}

#[test]
fn mixtral() {
    check("mixtral");
}

#[test]
fn gpt2() {
    check("gpt2");
}

#[test]
fn bert() {
    check("bert");
}

/// The first tokens of the reference text: distributions agree with those of the exactly dequantized weights.
fn check_published(file: &str, name: &str, tokens: usize) {
    let Some(path) = published(file) else { return };
    let model = import(&path);
    let reference = shared().join(format!("reference/{name}-distributions.safetensors"));
    let of = |tensor| words(&reference, tensor);
    let context: Vec<u32> = of("ids")[..tokens].iter().map(|w| u32::from_le_bytes(*w)).collect();
    let logits = evaluate(&model, &context, "logits");
    let (top, logp) = (of("top"), of("logp"));
    for (row, logits) in logits.chunks_exact(model.info.vocab).enumerate() {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
        for rank in 0..8 {
            let (token, want) = (i32::from_le_bytes(top[row * 64 + rank]), f32::from_le_bytes(logp[row * 64 + rank]));
            let got = f64::from(logits[token as usize] - max) - sum.ln();
            let difference = (got - f64::from(want)).abs();
            assert!(difference < 0.02, "{file}: row {row}, token {token}: log-probability {got}, expected {want}");
        }
    }
}

#[test]
fn smollm2_agrees_with_float_weights() {
    check_published("smollm2.gguf", "smollm2", 12);
}

#[test]
fn gemma3_270m_agrees_with_float_weights() {
    check_published("gemma3-270m.gguf", "gemma3-270m", 6);
}

#[test]
fn minilm_embeds() {
    let Some(path) = published("minilm") else { return };
    let model = import(&path);
    let sentence = &json(&shared().join("reference/minilm.json"))["sentences"][0];
    let got = evaluate(&model, &ids(&sentence["ids"]), "embedding");
    let want = sentence["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32);
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "largest difference {worst}");
}

#[test]
fn layers_of_one_kind_share_a_graph() {
    let graphs = |family: &str| -> Vec<String> {
        import(&shared().join("goldens").join(family)).graphs.iter().map(|g| g.name.clone()).collect()
    };
    assert_eq!(graphs("llama"), ["embed", "layer", "head"]);
    assert_eq!(graphs("gemma3"), ["embed", "layer", "layer_1", "head"], "local and global layers");
}

#[test]
fn a_config_alone_has_seeded_weights() {
    let config = shared().join("goldens/llama/config.json");
    assert_eq!(open(&config, &Options::default()).unwrap_err().exit_code(), 2);
    let options = Options { synthetic_seed: Some(7), ..Options::default() };
    let model = open(&config, &options).unwrap();
    let again = open(&config, &options).unwrap();
    let row = |model: &mansard_ir::Model, name: &str| {
        let mut row = [0.0; 64];
        model.weights.get(name).unwrap().read_row(1, &mut row).unwrap();
        row
    };
    let name = |layer: usize| format!("model.layers.{layer}.self_attn.q_proj.weight");
    assert_eq!(row(&model, &name(0)), row(&again, &name(0)));
    assert_ne!(row(&model, &name(0)), row(&model, &name(1)));
    assert_eq!(evaluate(&model, &[1, 2, 3], "logits").len(), 3 * 256);
}

#[test]
fn float_weights_keep_what_is_stored() {
    let Some(path) = published("smollm2.gguf") else { return };
    let model = open(&path, &Options { float_weights: true, ..Options::default() }).unwrap();
    let weight = model.weights.get("model.layers.0.mlp.down_proj.weight").unwrap();
    assert_eq!(weight.ty.to_string(), "f32[576, 1536]");
    assert!(weight.stored_as(mansard_ir::DType::Q4_1));
}

/// The same checkpoints as GGUF files, with that format's names, permutations and transpositions.
fn check_converted(family: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, converted(family, vec![], Tensors::new())).unwrap();
    let tokens = ids(&json(&shared().join("goldens").join(family).join("tokens.json")));
    let model = import(&path);
    let output = if model.info.encoder { "hidden" } else { "logits" };
    let (got, want) = (evaluate(&model, &tokens, output), shared().join("goldens").join(family).join("logits.npy"));
    let worst = got.iter().zip(read_npy(&want)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-4, "{family}: largest difference {worst}");
}

#[test]
fn checkpoints_converted_to_gguf_give_the_same() {
    ["llama", "qwen3", "gemma3", "mixtral", "gpt2", "bert"].into_iter().for_each(check_converted);
}

#[test]
fn gguf_scales_rope_by_settings_or_by_factors() {
    let frequencies = |more: Vec<(&str, Meta)>, extra: Tensors| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, converted("llama", more, extra)).unwrap();
        import(&path).weights.get("rope.frequencies").unwrap().read_all().unwrap()
    };
    let plain = frequencies(vec![], Tensors::new());
    let halved: Vec<f32> = plain.iter().map(|f| f / 2.0).collect();
    let factors = Tensor { shape: vec![8], data: vec![2.0; 8] };
    assert_eq!(frequencies(vec![], Tensors::from([("rope_freqs.weight".into(), factors)])), halved);
    let linear = vec![
        ("llama.rope.scaling.type", Meta::Text("linear")),
        ("llama.rope.scaling.factor", Meta::Real(2.0)),
        ("llama.rope.scaling.original_context_length", Meta::Size(128)),
    ];
    assert_eq!(frequencies(linear, Tensors::new()), halved);
    let partial = vec![("llama.rope.dimension_count", Meta::Size(4))];
    assert_eq!(frequencies(partial, Tensors::new()).len(), 2);
}
