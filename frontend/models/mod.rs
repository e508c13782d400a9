//! Architecture name -> builder: one table for both `model_type` and `general.architecture`.
//!
//! A family reads settings and builds a [`Program`]; it touches one file here and one row of [`FAMILIES`].

mod bert;
mod decoder;
mod gemma;
mod gpt2;
mod layers;
mod llama;

use crate::checkpoint::Checkpoint;
use crate::config::{Config, Origin};
use crate::names::Stems;
use layers::Assembly;
use mansard_ir::graph::Graph;
use mansard_ir::model::{Call, WeightTable};
use mansard_ir::{Error, Kind, Result};

/// One row: the names a family goes by, and how to build it.
pub(crate) struct Family {
    /// Values of `model_type` in `config.json`.
    pub model_types: &'static [&'static str],
    /// Values of `general.architecture` in GGUF.
    pub gguf: &'static [&'static str],
    /// Tensor stems of GGUF and their logical names.
    pub stems: Stems,
    /// Root of logical names, and the tensor that shows where it begins in a checkpoint.
    pub root: (&'static str, &'static str),
    /// Settings and tensors (under logical names) to a program.
    pub build: fn(&str, &Config, &mut Checkpoint) -> Result<Program>,
}

/// Graphs, calls and weights, and the facts only the builder knows.
pub(crate) struct Program {
    /// Distinct graphs.
    pub graphs: Vec<Graph>,
    /// What runs, in order.
    pub calls: Vec<Call>,
    /// Values that leave a step.
    pub outputs: Vec<String>,
    /// Logical weights.
    pub weights: WeightTable,
    /// Positions a sequence may have.
    pub context: usize,
    /// Rows of the token table.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Hidden states and an embedding instead of logits.
    pub encoder: bool,
}

/// The table.
pub(crate) const FAMILIES: &[Family] = &[llama::FAMILY, gemma::FAMILY, gpt2::FAMILY, bert::FAMILY];

impl Program {
    fn decoder(assembly: Assembly<'_>, context: usize, vocab: usize, hidden: usize) -> Program {
        let Assembly { graphs, calls, weights, .. } = assembly;
        let outputs = vec!["logits".into()];
        Program { graphs, calls, outputs, weights, context, vocab, hidden, encoder: false }
    }
}

/// The family of an architecture.
///
/// # Errors
/// Listing the supported ones.
pub(crate) fn family(origin: Origin, architecture: &str) -> Result<&'static Family> {
    let names = |f: &Family| match origin {
        Origin::HuggingFace => f.model_types,
        Origin::Gguf => f.gguf,
    };
    FAMILIES.iter().find(|f| names(f).contains(&architecture)).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().flat_map(names).copied().collect();
        let message = format!("unknown architecture `{architecture}`");
        Error::new(Kind::Unsupported, message).help(format!("supported: {}", known.join(", ")))
    })
}
