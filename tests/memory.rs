//! What a run takes of memory: artifact + cache + 64 MB, tokenizer included. Measured in a process of its own, beyond what
//! the program takes before it opens anything.

use mansard::driver::CompileOptions;
use mansard_runtime::{EngineOptions, GenerateOptions, Model, generate};
use std::path::Path;
use std::process::Command;

/// Tells the child what to open.
const FILE: &str = "MANSARD_TEST_FILE";

const ALLOWANCE: usize = 64 << 20;

#[test]
fn a_run_takes_artifact_cache_and_64_mb() {
    if let Some(path) = std::env::var_os(FILE) {
        return run(path.as_ref());
    }
    let Some(model) = mansard_tests::published("smollm2.gguf") else { return };
    let (folder, _) = mansard_tests::compiled(&model, &CompileOptions::default()).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "a_run_takes_artifact_cache_and_64_mb", "--nocapture"]);
    let output = child.env(FILE, folder.path().join("model.mansard")).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
}

/// A prompt of 600 tokens and 100 more, and what that took.
fn run(path: &Path) {
    // From here on the peak counts anew.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS:");
    let model = Model::open(path).unwrap();
    let mut engine = model.engine(&EngineOptions::default()).unwrap();
    let mut prompt =
        model.tokens().unwrap().encode(&"The castle stood on a hill above the sea. ".repeat(60), true).unwrap();
    prompt.truncate(600);
    let sequence = engine.new_sequence();
    let options = GenerateOptions { max_tokens: 100, stop_tokens: Some(vec![]), ..GenerateOptions::default() };
    generate(&mut engine, sequence, &prompt, &options, |_| Ok(true)).unwrap();
    let taken = status("VmHWM:") - before;
    let cache: usize = engine.cache_use().iter().map(|group| group.taken * group.block_bytes).sum();
    let file = model.artifact().file_bytes();
    println!("{taken} bytes: artifact {file}, cache {cache}, {} more", taken.saturating_sub(file + cache));
    assert!(taken > file && taken <= file + cache + ALLOWANCE, "{taken} bytes: artifact {file}, cache {cache}");
}

fn status(field: &str) -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}
