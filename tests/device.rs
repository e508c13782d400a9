//! `--device` and weights that are made up, as a user meets them where no GPU is. (Built as a test of the `mansard` package.)

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn mansard(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mansard"));
    command.args(arguments).env("XDG_CONFIG_HOME", "/nonexistent").output().expect("the command runs")
}

/// Exit code, standard output and standard error.
fn ran(arguments: &[&str]) -> (i32, String, String) {
    let out = mansard(arguments);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (out.status.code().expect("no signal"), text(out.stdout), text(out.stderr))
}

fn refused(arguments: &[&str], code: i32, word: &str) {
    let (found, _, said) = ran(arguments);
    assert!(found == code && said.contains(word) && !said.contains("panicked"), "{arguments:?}: {found}: {said}");
}

fn compiled(folder: &Path, name: &str, model: &str, options: &[&str]) -> String {
    let (model, path) = (root().join(model).display().to_string(), folder.join(name).display().to_string());
    let (code, _, said) = ran(&[&["compile", &model, "-o", &path], options].concat());
    assert_eq!(code, 0, "{options:?}: {said}");
    path
}

#[test]
fn without_a_gpu_nothing_falls_back_unasked() {
    let (_, doctor, _) = ran(&["doctor", "--json"]);
    let doctor: serde_json::Value = serde_json::from_str(&doctor).unwrap();
    if doctor["gpus"].is_array() {
        return; // This is about machines without a driver.
    }
    assert!(doctor["gpus"]["error"].as_str().unwrap().starts_with("no GPU: "), "{doctor:#}");
    assert!(ran(&["doctor"]).1.contains("GPUs: no GPU: "));
    let folder = tempfile::tempdir().unwrap();
    let m = compiled(folder.path(), "m.mansard", "tests/goldens/llama", &["--target", "native,sm_90a"]);
    let run = ["run", &m, "--tokens", "1,14,51", "-n", "3", "--temp", "0"];
    let on = |device: &'static str| [&run[..], &["--device", device]].concat();
    refused(&on("cuda:0"), 4, "no GPU: ");
    refused(&on("gpu"), 2, "cuda:0");
    refused(&[&on("cuda:0")[..], &["--pin"]].concat(), 2, "--huge-pages and --pin are for CPUs");
    let ((_, cpu, said), (code, auto, note)) = (ran(&run), ran(&on("auto")));
    assert!(code == 0 && auto == cpu, "{note}");
    assert!(note.contains("note: runs on the CPU: no GPU: ") && !said.contains("note: runs on"), "{note}");
    let bench = ["bench", &m, "-p", "16", "-n", "4", "--device"];
    refused(&[&bench[..], &["cuda:1"]].concat(), 4, "no GPU: ");
    let out = folder.path().join("out.npy").display().to_string();
    refused(&["logits", &m, "--tokens", "1", "-o", &out, "--device", "cuda:0"], 4, "no GPU: ");
    refused(&[&bench[..], &["auto"]].concat(), 2, "by its name");
    refused(&[&bench[..], &["cuda:0", "-t", "2"]].concat(), 2, "--threads is for CPUs");
}

#[test]
fn weights_can_be_made_up_where_they_run() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
        "max_position_embeddings": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16"}"#;
    let file = folder.path().join("config.json");
    std::fs::write(&file, config).unwrap();
    let file = file.to_str().unwrap();
    for quant in ["bf16", "int4-g32"] {
        let seeded = |name: &str, seed: &str, more: &[&str]| {
            let seed = format!("--synthetic-weights={seed}");
            compiled(folder.path(), name, file, &[&[&seed, "--quant", quant], more].concat())
        };
        let written = seeded("written.mansard", "1", &[]);
        let names = ["a.mansard", "b.mansard", "c.mansard"];
        let [a, b, c] = [0, 1, 2].map(|i| seeded(names[i], ["1", "1", "2"][i], &["--weights-at-open"]));
        let size = |path: &str| std::fs::metadata(path).unwrap().len();
        assert!(size(&a) < size(&written), "{quant}");
        let logits = |path: &str| {
            let out = folder.path().join("out.npy").display().to_string();
            let (code, _, said) = ran(&["logits", path, "--tokens", "1,2,3", "-o", &out]);
            assert_eq!(code, 0, "{said}");
            values(&out)
        };
        let first = logits(&a);
        assert_eq!(first, logits(&b), "{quant}: the same seed");
        assert_ne!(first, logits(&c), "{quant}: another seed");
        let deviation = (first.iter().map(|x| x * x).sum::<f32>() / first.len() as f32).sqrt();
        assert!(first.iter().all(|x| x.is_finite()) && (0.05..20.0).contains(&deviation), "{quant}: {deviation}");
    }
    let gpu =
        compiled(folder.path(), "g.mansard", file, &["--synthetic-weights", "--weights-at-open", "--target", "sm_90a"]);
    refused(&["run", &gpu, "--tokens", "1"], 4, "expected machine code for this");
    refused(&["compile", file, "-o", &gpu, "--weights-at-open"], 2, "--synthetic-weights");
}

/// The values of a NumPy file of f32.
fn values(path: &str) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    let header = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    bytes[10 + header..].as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
