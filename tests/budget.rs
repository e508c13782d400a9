//! `compile --max-kld` and `--quantizer` as a user meets them, on a tiny checkpoint with a tokenizer of single letters: what is
//! kept was measured within its budget, smaller budgets cost time and bytes, codes chosen by a text are better than the nearest,
//! and what cannot be met is refused with nothing written. (Built as a test of the `mansard` package.)

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A checkpoint, and what the commands leave beside it.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder::of("llama")
    }

    fn of(golden: &str) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(golden);
        for name in ["config.json", "model.safetensors"] {
            fs::copy(golden.join(name), folder.path(name)).unwrap();
        }
        let letters = "abcdefghijklmnopqrstuvwxyz ,.".chars().enumerate().map(|(i, c)| (c.to_string(), json!(i + 1)));
        let vocab: serde_json::Map<String, Value> = letters.chain([("?".into(), json!(0))]).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": false},
            "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"}
        });
        fs::write(folder.path("tokenizer.json"), tokenizer.to_string()).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn compile(&self, arguments: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mansard"));
        command.env("XDG_CONFIG_HOME", "/nonexistent").env("XDG_CACHE_HOME", self.path("cache")).stdin(Stdio::null());
        command.arg("compile").arg(self.0.path()).arg("-o").arg(self.path("m.mansard")).arg("--json");
        command.args(arguments.split(' ').filter(|a| !a.is_empty())).output().unwrap()
    }

    fn budget(&self, arguments: &str) -> Value {
        let out = self.compile(arguments);
        assert!(out.status.success(), "{arguments}: {}", String::from_utf8_lossy(&out.stderr));
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        report["budget"].clone()
    }

    fn refused(&self, arguments: &str, code: i32, words: &[&str]) {
        let out = self.compile(arguments);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{arguments}: {said}");
        assert!(words.iter().all(|w| said.contains(w)), "{arguments}: expected {words:?} in {said}");
        let left = fs::read_dir(self.0.path()).unwrap().flatten().map(|e| e.file_name().to_string_lossy().into_owned());
        let left: Vec<String> = left.filter(|n| n.contains("mansard")).collect();
        assert!(left.is_empty(), "{arguments}: {left:?}");
    }
}

#[test]
fn budgets_are_kept_and_traded_against_time() {
    let folder = Folder::new();
    let tight = folder.budget("--max-kld 1e-9 --workload prompt=64,generate=32");
    let kept = folder.path("cache/mansard/calibration");
    assert_eq!(fs::read_dir(&kept).unwrap().count(), 1);
    let loose = folder.budget("--max-kld 0.01 --workload prompt=64,generate=32");
    assert_eq!(fs::read_dir(&kept).unwrap().count(), 1, "the calibration was kept");
    for (budget, most) in [(&tight, 1e-9), (&loose, 0.01)] {
        assert!(budget["kl_divergence"].as_f64().unwrap() <= most, "{budget}");
        assert_eq!(budget["workload"], "prompt=64,generate=32,batch=1");
    }
    let memory = |budget: &Value| budget["memory_bytes"].as_u64().unwrap();
    assert!(memory(&loose) * 3 < memory(&tight) * 2, "{loose}\n{tight}");
    let seconds = |budget: &Value| budget["seconds"].as_f64().unwrap();
    assert!(seconds(&loose) < seconds(&tight), "{loose}\n{tight}");
    // What the artifact says of itself.
    let mut inspect = Command::new(env!("CARGO_BIN_EXE_mansard"));
    let out = inspect.arg("inspect").arg(folder.path("m.mansard")).arg("--json").output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(said.contains("\"max-kld\"") && said.contains("prompt=64,generate=32,batch=1"), "{said}");
}

#[test]
fn what_cannot_be_met_is_refused() {
    let folder = Folder::new();
    folder.refused("--max-kld 0.01 --workload prompt=64 --max-memory 1kB", 2, &["--max-memory", "at least"]);
    folder.refused("--max-kld 0", 2, &["--max-kld"]);
    folder.refused("--max-kld 0.1 --quant int8", 2, &["--quant"]);
    folder.refused("--max-memory 1MB", 2, &["--max-kld"]);
    folder.refused("--workload prompt=1,batch=0", 2, &["--workload", "at least 1"]);
    folder.refused("--workload prompt=5000", 2, &["--workload", "positions"]);
    let (empty, bytes) = (folder.path("empty.txt"), folder.path("bytes.txt"));
    fs::write(&empty, " \n").unwrap();
    fs::write(&bytes, [b'a', 0xff]).unwrap();
    let with = |text: &Path| format!("--max-kld 0.1 --workload prompt=64 --calibration {}", text.display());
    folder.refused(&with(&empty), 3, &["expected a text"]);
    folder.refused(&with(&bytes), 3, &["UTF-8"]);
}

/// Divergence of what is compiled under `arguments`, and what the compiler says of its weights.
fn quantized(folder: &Folder, arguments: &str) -> (f64, String) {
    let out = folder.compile(arguments);
    assert!(out.status.success(), "{arguments}: {}", String::from_utf8_lossy(&out.stderr));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    let mut eval = Command::new(env!("CARGO_BIN_EXE_mansard"));
    eval.arg("eval")
        .arg(folder.path("m.mansard"))
        .arg("--against")
        .arg(folder.0.path())
        .args(["--json", "--window", "128"]);
    let out = eval.arg("--text").arg(folder.path("text.txt")).output().unwrap();
    assert!(out.status.success(), "{arguments}: {}", String::from_utf8_lossy(&out.stderr));
    let found: Value = serde_json::from_slice(&out.stdout).unwrap();
    (found["kl_divergence_mean"].as_f64().unwrap(), report["approximations"].to_string())
}

#[test]
fn codes_chosen_by_a_text_are_better_than_the_nearest() {
    let folder = Folder::new();
    fs::write(folder.path("text.txt"), "the quick brown fox, it is said. jumps over a lazy dog. ".repeat(8)).unwrap();
    let (nearest, said) = quantized(&folder, "--quant int4-g32 --quantizer nearest");
    assert!(said.contains("quantized to q4_0, to nearest") && !said.contains("calibrated"), "{said}");
    let nearest_bytes = fs::read(folder.path("m.mansard")).unwrap();
    let (importance, said) = quantized(&folder, "--quant int4-g32 --quantizer importance");
    assert!(said.contains("quantized to q4_0 by importance, calibrated on text "), "{said}");
    let (gptq, said) = quantized(&folder, "--quant int4-g32");
    assert!(said.contains("quantized to q4_0 by gptq, calibrated on text "), "{said}");
    assert!(gptq < 0.7 * nearest && importance < 1.3 * nearest, "{gptq} {importance} {nearest}");
    // Inputs are divided by what columns were multiplied with: else these would be no small differences.
    let (awq, said) = quantized(&folder, "--quant int4-g32 --quantizer awq");
    assert!(said.contains("quantized to q4_0 by awq") && said.contains("scaled column by column 8 times"), "{said}");
    assert!(awq < 2.0 * nearest, "{awq} {nearest}");
    quantized(&folder, "--quant int4-g32");
    let once = fs::read(folder.path("m.mansard")).unwrap();
    assert!(once.len() < nearest_bytes.len() + 4096, "as many bytes of weights");
    assert_eq!(fs::read_dir(folder.path("cache/mansard/codes")).unwrap().count(), 3, "one for each quantizer");
    // The same from what was kept, on another number of threads, and when it has to be taken again.
    for again in ["", "--threads 1", "--threads 3"] {
        if !again.is_empty() {
            fs::remove_dir_all(folder.path("cache")).unwrap();
        }
        quantized(&folder, &format!("--quant int4-g32 {again}"));
        assert!(once == fs::read(folder.path("m.mansard")).unwrap(), "{again}");
    }
    // What was kept is damaged: made again.
    let kept = fs::read_dir(folder.path("cache/mansard/codes")).unwrap().flatten().next().unwrap().path();
    for damage in [vec![9; 40], vec![]] {
        fs::write(&kept, damage).unwrap();
        quantized(&folder, "--quant int4-g32");
        assert!(once == fs::read(folder.path("m.mansard")).unwrap());
    }
    // Another text, other codes; nothing is lost where 8 bits are nearest anyway.
    quantized(&folder, &format!("--quant int4-g32 --calibration {}", folder.path("text.txt").display()));
    assert!(once != fs::read(folder.path("m.mansard")).unwrap());
    let (_, said) = quantized(&folder, "--quant int8");
    assert!(said.contains("quantized to q8_0, to nearest"), "{said}");
    fs::remove_file(folder.path("m.mansard")).unwrap();
    folder.refused("--quant int4-g32 --quantizer best", 2, &["--quantizer", "nearest", "gptq"]);
    fs::write(folder.path("empty.txt"), " ").unwrap();
    let empty = format!("--quant int4-g32 --calibration {}", folder.path("empty.txt").display());
    folder.refused(&empty, 3, &["expected a text"]);
    fs::remove_file(folder.path("tokenizer.json")).unwrap();
    folder.refused("--quant int4-g32 --quantizer gptq", 2, &["tokenizer", "nearest"]);
}

#[test]
fn encoders_are_calibrated_on_texts_and_compared_by_their_vectors() {
    let folder = Folder::of("bert");
    let texts =
        ["the quick brown fox", "it is said, jumps over a lazy dog.", "a letter takes four days", "bread, water"];
    fs::write(folder.path("text.txt"), texts.join("\n\n")).unwrap();
    let eval = |arguments: &[&str]| {
        let mut eval = Command::new(env!("CARGO_BIN_EXE_mansard"));
        eval.arg("eval").arg(folder.path("m.mansard")).args(["--json", "--text"]).arg(folder.path("text.txt"));
        eval.args(arguments).output().unwrap()
    };
    let error = |arguments: &str| {
        let out = folder.compile(arguments);
        assert!(out.status.success(), "{arguments}: {}", String::from_utf8_lossy(&out.stderr));
        let out = eval(&["--against", folder.0.path().to_str().unwrap()]);
        let found: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(found["texts"], 4, "{found}");
        let figure = |name: &str| found[name].as_f64().unwrap();
        assert!(figure("cosine_error_mean") <= figure("cosine_error_max") + 1e-12, "{found}");
        figure("cosine_error_mean")
    };
    assert!(error("--quant none").abs() < 1e-6, "the model itself");
    let (nearest, gptq) = (error("--quant int4-g32 --quantizer nearest"), error("--quant int4-g32"));
    assert!(nearest > 1e-6 && gptq < nearest, "{gptq} {nearest}");
    let out = eval(&[]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(2) && said.contains("--against"), "{said}");
    fs::remove_file(folder.path("m.mansard")).unwrap();
    folder.refused("--max-kld 0.1 --workload prompt=16", 4, &["encoder"]);
}
