//! The check for a real GPU (`bench/gpu-check`), on the emulated one: tiny models instead of large ones, all else the same.

use super::device::{artifact, golden, gpu, gpu_of};
use mansard_gpu_check as gpu_check;
use mansard_runtime::{Artifact, Engine, EngineOptions, GenerateOptions, SamplerOptions, generate};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

fn tokens(family: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(family).join("tokens.json")).unwrap()).unwrap()
}

/// What the CPU answers, and its logits as a NumPy file.
fn answered(artifact: &Arc<Artifact>, prompt: &[u32], file: &Path) -> Vec<u32> {
    let mut engine = Engine::new(artifact.clone(), &EngineOptions::default()).unwrap();
    let sequence = engine.new_sequence();
    let mut bytes = b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'}".to_vec();
    let each = |_, row: &[f32]| {
        bytes.extend(row.iter().flat_map(|x| x.to_le_bytes()));
        Ok(())
    };
    engine.each_row(sequence, prompt, "logits", each).unwrap();
    std::fs::write(file, bytes).unwrap();
    engine.truncate(sequence, 0).unwrap();
    let sampler = SamplerOptions::greedy();
    let options = GenerateOptions { max_tokens: 4, sampler, stop_tokens: Some(vec![]), ..Default::default() };
    generate(&mut engine, sequence, prompt, &options, |_| Ok(true)).unwrap().tokens
}

#[test]
fn the_check_for_a_gpu_runs_on_an_emulated_one() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, family: &str, seed: Option<u64>| {
        let (_temporary, made) = artifact(family, seed);
        std::fs::copy(made.path(), folder.path().join(name)).unwrap();
        made
    };
    put("bert.mansard", "bert", None);
    let llama = put("llama.mansard", "llama", None);
    put("shape.mansard", "llama", Some(1));
    for family in ["bert", "llama"] {
        std::fs::copy(golden(family).join("logits.npy"), folder.path().join(format!("{family}.npy"))).unwrap();
    }
    let prompt = [1, 14, 51, 88, 3];
    let answer = answered(&llama, &prompt, &folder.path().join("answer.npy"));
    let one = |family: &str, output: &str, tolerance: f64| {
        json!({"name": family, "artifact": format!("{family}.mansard"), "tokens": tokens(family), "output": output,
            "expected": format!("{family}.npy"), "tolerance": tolerance})
    };
    let plan = json!({
        // The last cannot hold.
        "goldens": [one("bert", "hidden", 2e-3), one("llama", "logits", 2e-3), one("llama", "logits", 1e-9)],
        "answers": [{"name": "tiny", "artifact": "llama.mansard", "prompt": prompt, "answer": answer,
            "expected": "answer.npy", "tolerance": 2e-3}],
        "speeds": [
            {"name": "tiny shape", "artifact": "shape.mansard", "context": 5, "batches": [1, 3], "decode": 2, "prefill": [9]},
            {"name": "none", "artifact": "missing.mansard", "context": 5, "batches": [1], "decode": 2, "prefill": []},
        ],
    });
    std::fs::write(folder.path().join("plan.json"), plan.to_string()).unwrap();
    let report =
        gpu_check::run(folder.path(), &mut |artifact| Ok(gpu(&artifact.manifest().program)), &mut || Ok(gpu_of(&[])));
    let report = report.unwrap();
    let json = &report.json;
    assert!(!report.is_right, "one golden cannot hold, and one artifact is missing");
    let off = |i: usize| json["goldens"][i]["off"].as_f64().unwrap_or_else(|| panic!("{json:#}"));
    assert!(off(0) <= 2e-3 && off(1) <= 2e-3 && off(2) == off(1), "{json:#}");
    assert_eq!(json["answers"][0]["tokens_agree"], 4, "{json:#}");
    let speed = &json["speeds"][0];
    assert!(speed["prefill"][0]["seconds"].as_f64().unwrap() > 0.0, "{json:#}");
    assert!(speed["decode"][1]["batch"] == 3 && speed["decode"][1]["is_finite"] == true, "{json:#}");
    assert!(json["speeds"][1]["error"].as_str().unwrap().contains("missing.mansard"), "{json:#}");
    assert_eq!(json["device"]["name"], "an emulated GPU");
    merges(folder.path(), json);
}

/// The script that runs it all on the GPU's machine puts reports side by side; there is no torch in this test.
fn merges(folder: &Path, report: &Value) {
    std::fs::write(folder.join("checker.json"), report.to_string()).unwrap();
    let torch = json!({"rows": [{"name": "tiny shape", "batch": 3, "context": 5, "seconds": 1.0},
        {"name": "tiny shape", "prefill": 9, "seconds": 2.0}], "torch": "none"});
    std::fs::write(folder.join("torch.json"), torch.to_string()).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/gpu-check/on_gpu.py");
    let out = Command::new("python3").arg(script).args(["--merge"]).arg(folder).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let merged: Value = serde_json::from_slice(&out.stdout).unwrap();
    let speed = &merged["checker"]["speeds"][0];
    let seconds = speed["decode"][1]["seconds"].as_f64().unwrap();
    let ratio = speed["decode"][1]["torch_ratio"].as_f64().unwrap();
    assert!((ratio * seconds - 1.0).abs() < 1e-6, "{merged:#}");
    assert!(
        speed["prefill"][0]["torch_ratio"].as_f64().unwrap() > 0.0 && speed["decode"][0].get("torch_ratio").is_none()
    );
}
