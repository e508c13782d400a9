//! Tests of the importer, and what they share: the real models where they are, references, a reader of NumPy files.

mod files;
mod goldens;
mod hostile;
mod quantized;
mod settings;
mod tokenizers;

use mansard_frontend::{Options, open};
use mansard_ir::Model;
use mansard_ir::eval::Interpreter;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The repository's `tests` folder: tiny checkpoints and references.
pub fn shared() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests")
}

/// A published model under `models/` (or `$MANSARD_MODELS`), or `None` after printing why the test is skipped.
pub fn published(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("MANSARD_MODELS").map_or_else(|| shared().join("../models"), PathBuf::from);
    let path = folder.join(name);
    if path.exists() {
        return Some(path);
    }
    // Straight to the stream: what tests print is shown only when they fail.
    let reason = format!("skipped: {} is not there (`make models` fetches it from PyPI)\n", path.display());
    let _ = std::io::stderr().write_all(reason.as_bytes());
    None
}

/// Imports, and checks what comes out against the rules of its stage.
pub fn import(path: &Path) -> Model {
    let model = open(path, &Options::default()).unwrap_or_else(|e| panic!("{e}\nhelp: {:?}", e.advice()));
    mansard_ir::verify::verify_model(&model).unwrap_or_else(|e| panic!("{e}"));
    model
}

/// The rows of `output` for all of `tokens` at once, from an empty context.
pub fn evaluate(model: &Model, tokens: &[u32], output: &str) -> Vec<f32> {
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let outputs = Interpreter::new(model).step(&[(0, tokens)], &rows).unwrap_or_else(|e| panic!("{e}"));
    outputs[output].data.to_vec()
}

/// Ids of a JSON array.
pub fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A JSON file.
pub fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A little-endian f32 tensor of a NumPy file.
pub fn read_npy(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    let header = u16::from_le_bytes([bytes[8], bytes[9]]) as usize;
    assert!(String::from_utf8_lossy(&bytes[10..10 + header]).contains("'<f4'"));
    bytes[10 + header..].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// The 4-byte words of a tensor of a safetensors file.
pub fn words(path: &Path, name: &str) -> Vec<[u8; 4]> {
    let bytes = std::fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let entries: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let offsets = ids(&entries[name]["data_offsets"]);
    let data = &bytes[8 + header..];
    data[offsets[0] as usize..offsets[1] as usize].as_chunks::<4>().0.to_vec()
}
