//! Texts that models are calibrated on, and where what was measured on them is kept.
//!
//! ```text
//! model files, text, version of this compiler  --hash-->  $XDG_CACHE_HOME/mansard/calibration/HASH.json, .../codes/HASH
//! ```

pub mod inputs;

use crate::driver::{self, CompileOptions};
use mansard_ir::{Error, Result, bail};
use std::path::{Path, PathBuf};

/// Some 8,000 tokens that ship with the compiler, other ones than those of `mansard eval`: prose on several subjects; talks of
/// the Library of Congress' Workshop on Electronic Texts (1992); the beginning of Carroll's "Alice's Adventures in Wonderland".
const DEFAULT_TEXT: &str = include_str!("calibration.txt");

/// The text in a file; the default where there is none.
///
/// # Errors
/// Where the file cannot be read, is empty or is no UTF-8.
pub fn text(path: Option<&Path>) -> Result<String> {
    let Some(path) = path else { return Ok(DEFAULT_TEXT.to_string()) };
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let text = String::from_utf8(bytes).or_else(|e| {
        let at = e.utf8_error().valid_up_to();
        bail!(Input, "{}: expected UTF-8 text, found another byte at {at}", path.display())
    })?;
    if text.trim().is_empty() {
        bail!(Input, "{}: expected a text, found none", path.display());
    }
    Ok(text)
}

/// BLAKE3 of such a text.
///
/// # Errors
/// As [`text`].
pub fn hash(path: Option<&Path>) -> Result<String> {
    Ok(blake3::hash(text(path)?.as_bytes()).to_hex().to_string())
}

/// Hash of what any measurement of a model on a text depends on, and of what else is named.
///
/// # Errors
/// Where the model's files cannot be read.
pub fn key<'a>(
    input: &Path,
    options: &CompileOptions,
    text: &str,
    more: impl IntoIterator<Item = &'a str>,
) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut add = |part: &str| {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    };
    add(env!("CARGO_PKG_VERSION"));
    for (name, hash) in driver::sources(input)? {
        add(&name);
        add(&hash);
    }
    add(&format!("{:?} {}", options.synthetic_seed, blake3::hash(text.as_bytes())));
    more.into_iter().for_each(add);
    Ok(hasher.finalize().to_hex().to_string())
}

/// Where a measurement of some kind is kept; `None` where the user has no home.
pub fn stored(kind: &str, name: &str) -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("mansard").join(kind).join(name))
}
