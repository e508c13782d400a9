//! Artifact -> tokens. Opens artifacts, allocates cache blocks, runs ragged steps, samples.
//!
//! No compiler is linked, and no math is here but sampling: what a model computes is machine code of the artifact.
//!
//! ```
//! # mod artifact { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/mod.rs")); }
//! # fn main() -> mansard_ir::Result<()> {
//! # let file = artifact::counting_parts().write();
//! # let path = file.path();
//! use mansard_runtime::{EngineOptions, GenerateOptions, Model, generate};
//!
//! let model = Model::open(path)?;
//! let mut engine = model.engine(&EngineOptions::default())?;
//! let prompt = model.tokens()?.encode("one two three", true)?;
//! let sequence = engine.new_sequence();
//! let options = GenerateOptions { max_tokens: 3, ..GenerateOptions::default() };
//!
//! let mut text = String::new();
//! let mut decoder = model.tokens()?.decoder();
//! generate(&mut engine, sequence, &prompt, &options, |token| {
//!     text += &decoder.push(token)?;
//!     Ok(true) // go on
//! })?;
//! engine.release(sequence)?;
//! assert_eq!(text.trim(), "four five six"); // this test's artifact counts
//! # Ok(()) }
//! ```
//!
//! Several sequences advance in one [`Engine::step`]; see [`Work`].

/// The page's program.
#[cfg(doctest)]
#[doc = include_str!("../docs/embedding.md")]
struct Embedding;

mod artifact;
mod batch;
mod bind;
mod blocks;
mod caches;
mod code;
mod cores;
pub mod device;
mod embed;
mod engine;
mod generate;
mod hash;
mod host;
mod logprobs;
mod memory;
mod place;
mod prefix;
mod probe;
mod profile;
mod sample;
mod service;
mod spmd;
mod step;
mod stop;
mod template;
mod tokens;
mod validate;
mod watch;

pub use artifact::{Artifact, OpenOptions, Section};
pub use batch::{BatchOptions, Batcher, Event, Histogram, Request, RequestId, Sink, Stats, Usage};
pub use caches::CacheUse;
pub use code::{cpu_features, has_feature, lacking, missing};
pub use cores::{CacheLevel, caches, physical_cores};
pub use embed::{embed, embedded_positions};
pub use engine::{Engine, EngineOptions, OutputRows, SequenceId, StepOutput, WeightPages, Work};
pub use generate::{Finish, GenerateOptions, Generated, generate};
pub use logprobs::Logprobs;
pub use memory::available_memory;
pub use probe::Probe;
pub use profile::{LaunchProfile, StepProfile};
pub use sample::{Before, Constraint, Sampler, SamplerOptions};
pub use service::{Handle, Refused, Service, ServiceOptions};
pub use step::{Logits, Rows};
pub use template::Message;
pub use tokens::{Decoder, Tokens};
pub use watch::{Moment, SlowStep, Watch};

use mansard_ir::model::ModelInfo;
use mansard_ir::{Error, Kind, Result};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// An opened artifact and its tokenizer, which is loaded when first asked for.
#[derive(Debug)]
pub struct Model {
    artifact: Arc<Artifact>,
    tokens: OnceLock<Arc<Tokens>>,
}

impl From<Artifact> for Model {
    fn from(artifact: Artifact) -> Model {
        Model { artifact: Arc::new(artifact), tokens: OnceLock::new() }
    }
}

impl Model {
    /// Opens and checks the artifact at `path`.
    ///
    /// # Errors
    /// As [`Artifact::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Model> {
        Model::open_with(path, &OpenOptions::default())
    }

    /// [`Model::open`] with options.
    ///
    /// # Errors
    /// As [`Artifact::open`].
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Model> {
        Ok(Artifact::open(path, options)?.into())
    }

    /// The file.
    pub fn artifact(&self) -> &Arc<Artifact> {
        &self.artifact
    }

    /// Facts about the model.
    pub fn info(&self) -> &ModelInfo {
        &self.artifact.manifest().model
    }

    /// An engine of its own memory and workers.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn engine(&self, options: &EngineOptions) -> Result<Engine> {
        Engine::new(self.artifact.clone(), options)
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// Where the artifact has none or it does not load.
    pub fn tokens(&self) -> Result<&Arc<Tokens>> {
        if let Some(tokens) = self.tokens.get() {
            return Ok(tokens);
        }
        let place = |e: Error| e.at(self.artifact.path().display().to_string());
        let (Some(json), Some(info)) = (self.artifact.tokenizer_json()?, &self.info().tokenizer) else {
            let error = Error::new(Kind::Input, "the model came without a tokenizer");
            return Err(place(
                error.help("give token ids instead of text, or compile the model with its tokenizer.json"),
            ));
        };
        let tokens = Tokens::new(json, info).map_err(place)?;
        Ok(self.tokens.get_or_init(|| Arc::new(tokens)))
    }
}
