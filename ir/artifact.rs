//! The artifact's manifest: what a runtime reads before anything else.
//!
//! An artifact is one safetensors file. Its tensors are sections of bytes (`u8[n]`, every length a multiple of 64, the
//! first at a multiple of 4096): `code/<isa>` (flat position-independent images), `tokenizer.json`, and `weights/<name>`.
//! The file's `__metadata__` holds `mansard`: this manifest as JSON.

use crate::model::ModelInfo;
use crate::plan::Program;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the format; a runtime opens its own and every earlier one.
pub const FORMAT_VERSION: u32 = 1;

/// Key of the manifest in the file's `__metadata__`.
pub const METADATA_KEY: &str = "mansard";

/// The manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// Facts about the model.
    pub model: ModelInfo,
    /// What to execute.
    pub program: Program,
    /// Machine code, best first.
    pub code: Vec<Code>,
    /// BLAKE3 of every section, in hexadecimal, over its bytes including padding.
    pub hashes: BTreeMap<String, String>,
    /// BLAKE3 of this manifest's JSON with this field empty.
    pub manifest_hash: String,
    /// Where it came from.
    pub provenance: Provenance,
}

/// One image of machine code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Code {
    /// Section that holds the image.
    pub section: String,
    /// `x86_64` or `aarch64`.
    pub arch: String,
    /// `native`, `x86-64-v3`, `x86-64-v4`.
    pub target: String,
    /// CPU features the code uses, as LLVM and `/proc/cpuinfo`-independent names (`avx512vnni`, `avx2`, `f16c`...).
    pub features: Vec<String>,
    /// Offset of each kernel in the image; `entries[i]` is `program.kernels[i]`.
    pub entries: Vec<usize>,
}

/// Where an artifact came from. Same provenance, same bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Mansard's version.
    pub version: String,
    /// Name of the model file and BLAKE3 of its bytes.
    pub sources: Vec<(String, String)>,
    /// Passes, in order.
    pub passes: Vec<String>,
    /// Options that shaped the result.
    pub options: BTreeMap<String, String>,
    /// Every choice that changes values beyond rounding.
    pub approximations: Vec<String>,
}
