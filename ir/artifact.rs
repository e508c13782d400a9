//! The artifact's manifest: what a runtime reads before anything else.
//!
//! An artifact is one safetensors file. Its tensors are sections of bytes (`u8[n]`, every length a multiple of 64, the
//! first at a multiple of 4096): `code/<target>` (flat position-independent images, mapped at pages; of a GPU, PTX), `tokenizer.json`, and
//! `weights/<name>`.
//! The file's `__metadata__` holds `mansard`: this manifest as JSON.

use crate::costs::Costs;
use crate::graph::TokenRange;
use crate::model::ModelInfo;
use crate::plan::Program;
use crate::tuning::Tuning;
use crate::{Error, Kind, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the format; a runtime opens its own and every earlier one.
pub const FORMAT_VERSION: u32 = 2;

/// Key of the manifest in the file's `__metadata__`.
pub const METADATA_KEY: &str = "mansard";

/// Section of the tokenizer; padded with spaces, which JSON ignores.
pub const TOKENIZER_SECTION: &str = "tokenizer.json";

/// Put before a packed weight's name to make its section's.
pub const WEIGHTS_PREFIX: &str = "weights/";

/// Every section's length is a multiple of this, and so is its offset.
pub const SECTION_ALIGN: usize = 64;

/// The first section starts at a multiple of this.
pub const DATA_ALIGN: usize = 4096;

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
    /// Code for GPUs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ptx: Vec<PtxCode>,
    /// The file holds no weights: whoever opens it makes them up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synthetic: Option<Synthetic>,
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
    /// `native`, `x86-64-v3`, `aarch64+dotprod`...
    pub target: String,
    /// CPU features the code uses, as LLVM and `/proc/cpuinfo`-independent names (`avx512vnni`, `avx2`, `f16c`...).
    pub features: Vec<String>,
    /// Offset of each kernel in the image; `entries[i]` is `program.kernels[i]`.
    pub entries: Vec<usize>,
    /// Register tile of each kernel, for people: `8x1` tokens by strips; empty where there is none. Nothing before the first
    /// version that names them.
    #[serde(default)]
    pub tiles: Vec<String>,
}

/// The kernels as PTX, which a driver assembles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PtxCode {
    /// Section that holds the text, padded with line ends.
    pub section: String,
    /// `sm_80`, `sm_90a`.
    pub chip: String,
    /// Version of PTX: `9.0`.
    pub version: String,
    /// Threads of a block, of every kernel.
    pub threads: usize,
    /// Bytes of shared memory of a block; `shared_bytes[i]` is `program.kernels[i]`'s.
    pub shared_bytes: Vec<usize>,
    /// The same, assembled beforehand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cubin: Option<Cubin>,
}

/// Machine code of a GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cubin {
    /// Section that holds an ELF file, padded with zeros.
    pub section: String,
    /// Version of the assembler, which is that of its CUDA: `13.0.88`.
    pub version: String,
}

/// How to make weights up ([`crate::synthetic`]).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Synthetic {
    /// What they depend on.
    pub seed: u64,
    /// Section that holds PTX of the kernel that makes them on a GPU.
    pub section: String,
    /// Version of PTX.
    pub version: String,
    /// Threads of a block.
    pub threads: usize,
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
    /// Choices that were measured, or taken from an earlier measurement.
    #[serde(default, skip_serializing_if = "Tuning::is_empty")]
    pub tuning: Tuning,
    /// Costs that were measured, or taken from an earlier measurement.
    #[serde(default, skip_serializing_if = "Costs::is_empty")]
    pub costs: Costs,
    /// Why each kernel is what it is. Nothing before the first version that kept it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub derivations: Vec<Derivation>,
    /// Formats that were chosen within a budget, and what else there was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decided: Option<Decided>,
    /// How well the artifact does, where it was evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<Quality>,
}

/// How the search came to a kernel: what it weighed in its place, in one graph and range of tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Derivation {
    /// The kernel; filled in once kernels have names.
    pub kernel: String,
    /// The graph it was chosen for.
    pub graph: String,
    /// The steps it was chosen for.
    pub tokens: TokenRange,
    /// Predicted seconds of one launch in the step that the range is priced on.
    pub seconds: f64,
    /// Kernels that could have stood in its place.
    pub considered: usize,
    /// The cheapest of them, the cheapest first.
    pub others: Vec<Other>,
    /// Rewrite rules that brought some of its nodes.
    pub rules: Vec<String>,
}

/// A kernel that was not chosen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Other {
    /// Its ops, in order of the program.
    pub ops: String,
    /// Predicted seconds by which the graph would take longer, its other kernels chosen anew.
    pub more: f64,
    /// It was given up at that figure: what it really costs may be more.
    pub at_least: bool,
}

/// What a search for formats within a budget decided, as it saw it last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Decided {
    /// Most KL divergence, in nats.
    pub max_kld: f64,
    /// BLAKE3 of the text that alternatives were calibrated on.
    pub calibration: String,
    /// Most bytes of weights and caches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory: Option<u64>,
    /// Bytes of weights that nothing was decided about.
    pub fixed_bytes: usize,
    /// KL divergence as measured on held-out text.
    pub measured: f64,
    /// As predicted for the choice before that.
    pub predicted: f64,
    /// In order of first use.
    pub decisions: Vec<Decision>,
}

/// One format that was chosen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// `model.layers.*.mlp.up_proj.weight 0..7`, `keys and values`.
    pub name: String,
    /// Index of the alternative taken.
    pub picked: usize,
    /// What there was.
    pub alternatives: Vec<Alternative>,
}

/// A format that could be chosen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// `file`: as the model file has it.
    pub format: String,
    /// Predicted, of the whole workload.
    pub seconds: f64,
    /// In memory.
    pub bytes: usize,
    /// Predicted KL divergence in nats.
    pub error: f64,
}

/// To four digits: predictions are not worth more, and manifests stay small.
pub fn rounded(x: f64) -> f64 {
    format!("{x:.3e}").parse().unwrap_or(x)
}

/// The quality card: what an artifact was measured to do on a text, beside its model in exact floats. Every choice that is
/// not exact is in [`Provenance::approximations`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// BLAKE3 of the evaluation text's tokens (as i32, little-endian).
    pub text: String,
    /// Tokens read from an empty context before starting over.
    pub window: usize,
    /// Positions with a next token.
    pub positions: usize,
    /// Of the artifact.
    pub perplexity: f64,
    /// One standard error of it.
    pub perplexity_error: f64,
    /// Of the model in exact floats.
    pub reference_perplexity: f64,
    /// Mean over positions, in nats.
    pub kl_divergence_mean: f64,
    /// One standard error of the mean.
    pub kl_divergence_error: f64,
    /// What 99.9% of the positions stay below.
    pub kl_divergence_p999: f64,
    /// Share of positions where the likeliest token is the same.
    pub top1_agreement: f64,
    /// Mean KL divergence as predicted where formats were chosen within a budget, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_divergence_predicted: Option<f64>,
    /// BLAKE3 of the text that this was calibrated on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<String>,
    /// What the artifact's approximations are expected to come to in a layer, as a share of what it adds.
    #[serde(default)]
    pub layer_error_predicted: f64,
    /// Each layer beside the interpreter, in order. Nothing before the first version that compared them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerError>,
}

/// How far a layer is from the model in exact floats.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerError {
    /// `model.layers.3`, or the graph of a call without a prefix.
    pub layer: String,
    /// Of its results, given the artifact's own inputs, as a share of what the layer adds.
    pub off: f64,
    /// With the errors of all layers before, as a share of the whole.
    pub accumulated: f64,
}

impl Quality {
    /// Names and values for people, the single layers left out.
    pub fn figures(&self) -> Vec<(&'static str, String)> {
        let mut figures = vec![
            ("perplexity", format!("{:.3} ± {:.3}", self.perplexity, self.perplexity_error)),
            ("reference perplexity", format!("{:.3}", self.reference_perplexity)),
            ("KL divergence, mean", format!("{:.6} ± {:.6}", self.kl_divergence_mean, self.kl_divergence_error)),
            ("KL divergence, 99.9%", format!("{:.5}", self.kl_divergence_p999)),
            ("top-1 agreement", format!("{:.2}%", 100.0 * self.top1_agreement)),
            ("positions", format!("{}, in windows of {} tokens", self.positions, self.window)),
            ("text, BLAKE3", self.text.clone()),
        ];
        figures.extend(self.kl_divergence_predicted.map(|kl| ("KL divergence, predicted", format!("{kl:.6}"))));
        figures.extend(self.calibration.clone().map(|hash| ("calibration text, BLAKE3", hash)));
        if let Some(worst) = self.layers.iter().max_by(|a, b| a.off.total_cmp(&b.off)) {
            let mean = self.layers.iter().map(|l| l.off).sum::<f64>() / self.layers.len() as f64;
            figures.push(("layer error, mean", format!("{mean:.2e}")));
            figures.push(("layer error, worst", format!("{:.2e} in {}", worst.off, worst.layer)));
            figures.push(("layer error, predicted", format!("{:.2e}", self.layer_error_predicted)));
        }
        figures
    }
}

impl Manifest {
    /// Fills in `manifest_hash` and gives the JSON to store.
    ///
    /// # Errors
    /// Where a value has no JSON form (a FLOP count that is not finite).
    pub fn to_json_with_hash(&mut self) -> Result<String> {
        self.manifest_hash.clear();
        let json = serde_json::to_string(self).map_err(|e| Error::new(Kind::Internal, format!("manifest: {e}")))?;
        self.manifest_hash = blake3::hash(json.as_bytes()).to_hex().to_string();
        Ok(json.replacen(&hash_field(""), &hash_field(&self.manifest_hash), 1))
    }

    /// Reads stored JSON and checks its version and its hash. The hash is of the text as stored, so artifacts whose
    /// writers knew fewer fields keep verifying.
    ///
    /// # Errors
    /// Where the JSON is no manifest, its format is newer than [`FORMAT_VERSION`], or its hash differs.
    pub fn from_json(json: &str) -> Result<Manifest> {
        /// Read first: a newer format may differ in everything else.
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let damaged = |e: serde_json::Error| Error::new(Kind::Input, format!("expected a manifest: {e}"));
        let Version { format_version } = serde_json::from_str(json).map_err(damaged)?;
        if format_version > FORMAT_VERSION {
            let message =
                format!("format version {format_version}, this runtime opens versions up to {FORMAT_VERSION}");
            return Err(Error::new(Kind::Unsupported, message).help("use a newer mansard, or compile the model again"));
        }
        let manifest: Manifest = serde_json::from_str(json).map_err(damaged)?;
        let (stored, field) = (&manifest.manifest_hash, hash_field(&manifest.manifest_hash));
        let found = match json.matches(&field).count() {
            1 => blake3::hash(json.replacen(&field, &hash_field(""), 1).as_bytes()).to_hex(),
            n => bail!(Input, "expected one field `manifest_hash`, found {n}"),
        };
        if found.as_str() != stored {
            bail!(Input, "expected the manifest to hash to `{stored}`, found {found}");
        }
        Ok(manifest)
    }
}

/// As `serde_json` prints the field; inside any string its quotes would be escaped.
fn hash_field(hash: &str) -> String {
    format!("\"manifest_hash\":\"{hash}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_verifies_until_a_byte_changes() {
        let mut manifest = Manifest {
            format_version: FORMAT_VERSION,
            model: ModelInfo { architecture: "\"manifest_hash\":\"\"".into(), ..ModelInfo::default() },
            program: Program::default(),
            code: vec![],
            ptx: vec![],
            synthetic: None,
            hashes: BTreeMap::new(),
            manifest_hash: "stale".into(),
            provenance: Provenance::default(),
        };
        let json = manifest.to_json_with_hash().unwrap();
        assert_eq!(Manifest::from_json(&json).unwrap(), manifest);
        for at in 0..json.len() {
            let mut bytes = json.clone().into_bytes();
            bytes[at] ^= 1;
            if let Ok(changed) = String::from_utf8(bytes) {
                assert!(Manifest::from_json(&changed).is_err(), "byte {at}: {changed}");
            }
        }
    }

    #[test]
    fn a_newer_format_is_named() {
        let error = Manifest::from_json("{\"format_version\": 99, \"shape\": \"other\"}").unwrap_err();
        assert_eq!(error.exit_code(), 4);
    }
}
