//! Six tiny checkpoints, end to end through compiled code, against the logits of an independent implementation
//! (for the encoder: its last hidden states).

use mansard::driver::CompileOptions;
use mansard_tests::{all_rows, compiled, here, read_npy};

fn check(family: &str) {
    let folder = here().join("goldens").join(family);
    let tokens: Vec<u32> = serde_json::from_slice(&std::fs::read(folder.join("tokens.json")).unwrap()).unwrap();
    let want = read_npy(&folder.join("logits.npy"));
    let (_files, artifact) = compiled(&folder, &CompileOptions::default()).unwrap_or_else(|e| panic!("{family}: {e}"));
    let output = if artifact.manifest().model.encoder { "hidden" } else { "logits" };
    let got: Vec<f32> = all_rows(&artifact, &tokens, output).unwrap().concat();
    assert_eq!(got.len(), want.len(), "{family}: {} tokens", tokens.len());
    let mean = want.iter().sum::<f32>() / want.len() as f32;
    let std = (want.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / want.len() as f32).sqrt();
    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{family}: largest difference {:.2e} of the standard deviation", worst / std);
    assert!(worst <= 2e-3 * std, "{family}: largest difference {worst} with standard deviation {std}");
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
