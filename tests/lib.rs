//! What the tests share: the real models where they are, tiny checkpoints, compilation into a temporary artifact, and
//! measures of faithfulness.
#![forbid(unsafe_code)]

pub mod oracle;

use mansard::driver::{self, CompileOptions};
use mansard_ir::Result;
use mansard_runtime::{Artifact, Engine, EngineOptions, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The folder of this crate.
pub fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A published model under `models/` (or `$MANSARD_MODELS`), or `None` after printing why the test is skipped.
pub fn published(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("MANSARD_MODELS").map_or_else(|| here().join("../models"), PathBuf::from);
    let path = folder.join(name);
    if path.exists() {
        return Some(path);
    }
    // Straight to the stream: what tests print is shown only when they fail.
    let reason = format!("skipped: {} is not there (`make models` fetches it from PyPI)\n", path.display());
    let _ = std::io::stderr().write_all(reason.as_bytes());
    None
}

/// A program under `tools/` (or `$MANSARD_TOOLS`) that `.ci/fetch-ptxas` fetches, or `None` after printing why the test is
/// skipped.
pub fn tool(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("MANSARD_TOOLS").map_or_else(|| here().join("../tools"), PathBuf::from);
    let path = folder.join(name);
    if path.exists() {
        return Some(path);
    }
    let reason = format!("skipped: {} is not there (`.ci/fetch-ptxas` fetches it from PyPI)\n", path.display());
    let _ = std::io::stderr().write_all(reason.as_bytes());
    None
}

/// Compiles `model` and opens the artifact; the file is removed with the returned folder.
///
/// # Errors
/// Whatever the pipeline says.
pub fn compiled(model: &Path, options: &CompileOptions) -> Result<(tempfile::TempDir, Arc<Artifact>)> {
    let folder = tempfile::tempdir().map_err(|e| mansard_ir::Error::io("a temporary folder", e))?;
    let path = folder.path().join("model.mansard");
    let mut sink = |_: mansard_passes::Event<'_>| {};
    driver::compile(model, &path, options, &mut driver::Quiet, &mut mansard_passes::Hooks::new(&mut sink))?;
    let artifact = Artifact::open(&path, &OpenOptions::default())?;
    Ok((folder, Arc::new(artifact)))
}

/// The rows of `output` for every one of `tokens`, from an empty context.
///
/// # Errors
/// Whatever the engine says.
pub fn all_rows(artifact: &Arc<Artifact>, tokens: &[u32], output: &str) -> Result<Vec<Vec<f32>>> {
    let mut engine = Engine::new(artifact.clone(), &EngineOptions::default())?;
    let sequence = engine.new_sequence();
    let mut rows = vec![];
    engine.each_row(sequence, tokens, output, |_, row| {
        rows.push(row.to_vec());
        Ok(())
    })?;
    Ok(rows)
}

/// Natural-log probabilities of a row of logits.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().map(|x| (*x as f64 - max).exp()).sum();
    logits.iter().map(|x| *x as f64 - max - sum.ln()).collect()
}

/// The position of the largest.
pub fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// A tensor of a NumPy file: version 1, little-endian f32, C order.
///
/// # Panics
/// Where the file is something else.
pub fn read_npy(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).expect("a reference file");
    let header = u16::from_le_bytes([bytes[8], bytes[9]]) as usize;
    let text = String::from_utf8_lossy(&bytes[10..10 + header]);
    assert!(text.contains("'<f4'") && text.contains("False"), "f32 in C order: {text}");
    bytes[10 + header..].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
