//! The published models, compiled as they are, against distributions, greedy continuations and embeddings of
//! independent engines. Skipped, with the reason printed, where the models are not at hand.

use mansard::driver::CompileOptions;
use mansard_ir::DType;
use mansard_runtime::{Engine, EngineOptions, Model, Rows, Work};
use mansard_tests::{all_rows, argmax, compiled, here, log_softmax, published};
use safetensors::SafeTensors;
use std::path::Path;
use std::sync::Arc;

struct Reference {
    ids: Vec<u32>,
    top: Vec<i32>,
    logp: Vec<f32>,
}

fn reference(name: &str) -> Reference {
    let bytes = std::fs::read(here().join(format!("reference/{name}-distributions.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| file.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec();
    Reference {
        ids: words("ids").into_iter().map(u32::from_le_bytes).collect(),
        top: words("top").into_iter().map(i32::from_le_bytes).collect(),
        logp: words("logp").into_iter().map(f32::from_le_bytes).collect(),
    }
}

/// Mean KL divergence of our distributions from the reference's: over its 64 likeliest tokens, the rest as one event.
fn divergence(reference: &Reference, position: usize, ours: &[f64]) -> f64 {
    let span = position * 64..(position + 1) * 64;
    let (mut kl, mut p_rest, mut q_rest) = (0.0, 1.0f64, 1.0f64);
    for (token, logp) in reference.top[span.clone()].iter().zip(&reference.logp[span]) {
        let (logp, logq) = (*logp as f64, ours[*token as usize]);
        kl += logp.exp() * (logp - logq);
        p_rest -= logp.exp();
        q_rest -= logq.exp();
    }
    if p_rest > 1e-9 { kl + p_rest * (p_rest / q_rest.max(1e-12)).ln() } else { kl }
}

struct Bounds {
    kl: f64,
    top1: f64,
    perplexity: f64,
}

fn faithful(file: &str, name: &str, bounds: Bounds) {
    let Some(model) = published(file) else { return };
    let (_files, artifact) = compiled(&model, &CompileOptions::default()).unwrap();
    let reference = reference(name);
    let rows = all_rows(&artifact, &reference.ids, "logits").unwrap();
    let (mut kl, mut agree, mut nll) = (0.0, 0, 0.0);
    for (i, row) in rows.iter().enumerate() {
        let ours = log_softmax(row);
        kl += divergence(&reference, i, &ours);
        agree += usize::from(argmax(row) == reference.top[i * 64] as usize);
        if let Some(next) = reference.ids.get(i + 1) {
            nll -= ours[*next as usize];
        }
    }
    let n = rows.len() as f64;
    let (kl, top1, perplexity) = (kl / n, agree as f64 / n, (nll / (n - 1.0)).exp());
    println!("{name}: KL divergence {kl:.5}, top-1 agreement {top1:.4}, perplexity {perplexity:.3}");
    assert!(kl <= bounds.kl, "KL divergence {kl} over {}", bounds.kl);
    assert!(top1 >= bounds.top1, "top-1 agreement {top1} under {}", bounds.top1);
    let ratio = perplexity / bounds.perplexity;
    assert!((ratio - 1.0).abs() <= 0.01, "perplexity {perplexity}, expected {} within 1%", bounds.perplexity);
    greedy(&artifact, name);
}

/// Greedy continuations mostly agree with those of the float weights over the first 16 tokens; near ties may differ.
fn greedy(artifact: &Arc<mansard_runtime::Artifact>, name: &str) {
    let text = std::fs::read_to_string(here().join(format!("reference/{name}.json"))).unwrap();
    let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids = |v: &serde_json::Value| -> Vec<u32> {
        v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
    };
    let mut engine = Engine::new(artifact.clone(), &EngineOptions::default()).unwrap();
    let (mut agree, mut total) = (0, 0);
    for prompt in reference["prompts"].as_array().unwrap() {
        let (tokens, float) = (ids(&prompt["prompt_ids"]), ids(&prompt["greedy_ids"]));
        let quantized = ids(&prompt["greedy_ids_quantized"]);
        let sequence = engine.new_sequence();
        let mut next = tokens;
        let mut ours = vec![];
        for _ in 0..16.min(float.len()) {
            let out = engine.step(&[Work { sequence, tokens: &next, rows: Rows::Last }]).unwrap();
            let token = argmax(out.logits(0).unwrap()) as u32;
            ours.push(token);
            next = vec![token];
        }
        engine.release(sequence).unwrap();
        let same = |other: &[u32]| ours.iter().zip(other).take_while(|(a, b)| a == b).count();
        println!("{name}: {:?} agrees for {} tokens", prompt["prompt"], same(&float).max(same(&quantized)));
        agree += same(&float).max(same(&quantized));
        total += ours.len();
    }
    assert!(agree * 2 >= total, "greedy text agrees for {agree} of {total} tokens");
}

#[test]
fn smollm2() {
    faithful("smollm2.gguf", "smollm2", Bounds { kl: 0.003, top1: 0.96, perplexity: 29.311 });
}

#[test]
fn gemma3() {
    faithful("gemma3-270m.gguf", "gemma3-270m", Bounds { kl: 0.005, top1: 0.94, perplexity: 26.356 });
}

#[test]
fn minilm() {
    let Some(model) = published("minilm") else { return };
    embeds(&model, &CompileOptions::default(), 0.9999);
}

#[test]
fn minilm_quantized_to_int8() {
    let Some(model) = published("minilm") else { return };
    let options = CompileOptions { float_weights: true, weights: Some(DType::Q8_0), ..CompileOptions::default() };
    embeds(&model, &options, 0.999);
}

/// Embeddings of ten sentences have at least that cosine to those of float32 weights.
fn embeds(model: &Path, options: &CompileOptions, least: f64) {
    let (_files, artifact) = compiled(model, options).unwrap();
    let reference: serde_json::Value =
        serde_json::from_slice(&std::fs::read(here().join("reference/minilm.json")).unwrap()).unwrap();
    let loaded = Model::open(artifact.path()).unwrap();
    let tokenizer = loaded.tokens().unwrap();
    let positions = Some(16 * 64); // a cache block for each sentence
    let mut engine = Engine::new(artifact.clone(), &EngineOptions { positions, ..EngineOptions::default() }).unwrap();
    let sentences = reference["sentences"].as_array().unwrap();
    let tokens: Vec<Vec<u32>> =
        sentences.iter().map(|s| tokenizer.encode(s["text"].as_str().unwrap(), true).unwrap()).collect();
    // All ten in one ragged step.
    let work: Vec<Work<'_>> =
        tokens.iter().map(|tokens| Work { sequence: engine.new_sequence(), tokens, rows: Rows::None }).collect();
    let out = engine.step(&work).unwrap();
    let embeddings = out.rows("embedding").unwrap();
    for (i, sentence) in sentences.iter().enumerate() {
        let want: Vec<f64> = sentence["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        let got = embeddings.row(i).unwrap();
        let dot: f64 = got.iter().zip(&want).map(|(a, b)| *a as f64 * b).sum();
        let norm = |it: &mut dyn Iterator<Item = f64>| it.map(|x| x * x).sum::<f64>().sqrt();
        let cosine = dot / norm(&mut got.iter().map(|x| *x as f64)) / norm(&mut want.iter().copied());
        println!("sentence {i}: cosine {cosine}");
        assert!(cosine >= least, "sentence {i}: cosine {cosine}");
    }
}
