//! `compile --max-kld` as a user meets it, on a tiny checkpoint with a tokenizer of single letters: what is kept was measured
//! within its budget, smaller budgets cost time and bytes, and what cannot be met is refused with nothing written. (Built as a
//! test of the `mansard` package.)

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A checkpoint, and what the commands leave beside it.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/llama");
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
