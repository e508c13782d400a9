//! What an engine takes of memory: the file once, the cache that is filled, and little more; weights a second time only
//! where that was asked for. Measured in a process of its own.

mod support;

use mansard_runtime::{EngineOptions, Model, Rows, WeightPages, Work};
use std::process::Command;

/// Tells the child what to open, and how.
const FILE: &str = "MANSARD_TEST_FILE";
const COPIED: &str = "MANSARD_TEST_COPIED";

const WEIGHT_BYTES: usize = 160 << 20;

#[test]
fn weights_are_in_memory_once() {
    if let Some(path) = std::env::var_os(FILE) {
        return run(path.as_ref());
    }
    let mut parts = support::counting_parts();
    let mut weight = vec![7; WEIGHT_BYTES];
    weight[..4].copy_from_slice(&[5, 0, 0, 0]);
    parts.manifest.program.weights[0].bytes = WEIGHT_BYTES;
    parts.sections[2].1 = weight;
    let file = parts.write();
    let mapped = peak(file.path(), false);
    assert!((WEIGHT_BYTES..WEIGHT_BYTES + (32 << 20)).contains(&mapped), "{mapped} bytes");
    let copied = peak(file.path(), true);
    assert!((2 * WEIGHT_BYTES..2 * WEIGHT_BYTES + (32 << 20)).contains(&copied), "{copied} bytes");
}

/// The most memory of a process that runs the model.
fn peak(path: &std::path::Path, copied: bool) -> usize {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "weights_are_in_memory_once", "--nocapture"]).env(FILE, path);
    if copied {
        child.env(COPIED, "1");
    }
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found = text.lines().find_map(|l| l.split_once("VmHWM:")?.1.split_whitespace().next()?.parse::<usize>().ok());
    found.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr))) << 10
}

fn run(path: &std::path::Path) {
    let weights = if std::env::var_os(COPIED).is_some() { WeightPages::Huge } else { WeightPages::Mapped };
    let options = EngineOptions { weights, threads: Some(2), ..EngineOptions::default() };
    let mut engine = Model::open(path).unwrap().engine(&options).unwrap();
    let sequence = engine.new_sequence();
    engine.prefill(sequence, &[1; 200]).unwrap();
    let step = engine.step(&[Work { sequence, tokens: &[2], rows: Rows::Last }]).unwrap();
    assert_eq!(step.rows("sum").unwrap().row(0), Some(&[202.0][..]));
    println!("{}", std::fs::read_to_string("/proc/self/status").unwrap());
}
