//! Six tiny checkpoints, end to end through compiled code, against the logits of an independent implementation
//! (for the encoder: its last hidden states).

use mansard::driver::CompileOptions;
use mansard_tests::{all_rows, compiled, here, oracle, read_npy};

fn check(family: &str) {
    check_with(family, &CompileOptions::default(), 2e-3);
}

/// Logits differ by at most `most` standard deviations.
fn check_with(family: &str, options: &CompileOptions, most: f32) {
    let folder = here().join("goldens").join(family);
    let tokens: Vec<u32> = serde_json::from_slice(&std::fs::read(folder.join("tokens.json")).unwrap()).unwrap();
    let want = read_npy(&folder.join("logits.npy"));
    let (_files, artifact) = compiled(&folder, options).unwrap_or_else(|e| panic!("{family}: {e}"));
    let output = if artifact.manifest().model.encoder { "hidden" } else { "logits" };
    let got: Vec<f32> = all_rows(&artifact, &tokens, output).unwrap().concat();
    assert_eq!(got.len(), want.len(), "{family}: {} tokens", tokens.len());
    let mean = want.iter().sum::<f32>() / want.len() as f32;
    let std = (want.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / want.len() as f32).sqrt();
    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{family}: largest difference {:.2e} of the standard deviation", worst / std);
    assert!(worst <= most * std, "{family}: largest difference {worst} with standard deviation {std}");
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

/// Checkpoints quantized elsewhere, as they are kept: against the interpreter, and near the logits their writer computed.
#[test]
fn quantized_elsewhere() {
    for name in ["gptq", "gptq_v2", "awq", "compressed"] {
        let name = format!("quantized/{name}");
        let model = mansard_frontend::open(&here().join("goldens").join(&name), &Default::default()).unwrap();
        for target in ["native", "x86-64-v3"] {
            let target = mansard_backends::target(target).unwrap();
            oracle::check(model.clone(), target, &CompileOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        // Activations are int8.
        check_with(&name, &CompileOptions::default(), 0.06);
    }
    for name in ["gptq_act_order", "fp8", "compressed_fp8"] {
        let options = CompileOptions { float_weights: true, ..CompileOptions::default() };
        check_with(&format!("quantized/{name}"), &options, 2e-3);
    }
}
