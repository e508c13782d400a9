//! Model file -> [`Model`]: opens by content, translates names and settings, builds graphs. Tensor data is mapped,
//! never read.
//!
//! ```text
//! GGUF                 --gguf-->        settings, tensors --names-->  \
//! config.json + safetensors --safetensors--> settings, tensors --------> models::FAMILIES --> Model
//! config.json alone    --------------> settings, seeded values ------/
//! ```
//!
//! Everything here treats the file as hostile: counts are checked before anything is allocated, every shape before it
//! is used, and a setting that is not understood is refused rather than ignored.
#![forbid(unsafe_code)]

mod checkpoint;
mod config;
mod gguf;
mod models;
mod names;
mod quantized;
mod rope;
mod safetensors;
mod tokenizer;

use checkpoint::Checkpoint;
use config::{Config, Origin};
use mansard_ir::file::MappedFile;
use mansard_ir::model::ModelInfo;
use mansard_ir::{DType, Error, Kind, Model, Place, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizer::Found;

/// How to import.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Every weight's type becomes f32, whatever the file stores.
    pub float_weights: bool,
    /// Open a `config.json` without its weights, which then have pseudo-random values from this seed.
    pub synthetic_seed: Option<u64>,
}

/// One kind of input: how it is known, and how it is opened.
struct FileKind {
    /// For the list of what is supported.
    name: &'static str,
    /// Looks at the path and the file's first bytes (none of a directory).
    is: fn(&Path, &[u8]) -> bool,
    open: fn(&Path, &Options) -> Result<Model>,
}

/// The kinds, in the order they are tried.
const KINDS: &[FileKind] = &[
    FileKind { name: "GGUF", is: |_, head| head.starts_with(gguf::MAGIC), open: open_gguf },
    FileKind {
        name: "a directory with config.json and model.safetensors (or its shards)",
        is: |path, _| path.is_dir(),
        open: open_directory,
    },
    FileKind {
        name: "config.json or an index of shards",
        is: |_, head| head.trim_ascii_start().starts_with(b"{"),
        open: open_json,
    },
    FileKind {
        name: "safetensors beside its config.json",
        is: |_, head| head.get(8) == Some(&b'{'),
        open: open_safetensors,
    },
];

/// Opens a model file or directory; what it is shows in its content, not in its name.
///
/// ```no_run
/// # fn main() -> mansard_ir::Result<()> {
/// let model = mansard_frontend::open("smollm2.gguf".as_ref(), &mansard_frontend::Options::default())?;
/// assert_eq!(model.calls.len(), 32); // embed, 30 layers, head
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Where it cannot be read, is damaged, or is of a kind, architecture or format that is not supported; the error lists
/// what is.
pub fn open(path: &Path, options: &Options) -> Result<Model> {
    let mut head = [0; 16];
    let read = if path.is_dir() { 0 } else { read_head(path, &mut head)? };
    let head = &head[..read];
    let Some(kind) = KINDS.iter().find(|k| (k.is)(path, head)) else {
        let names: Vec<&str> = KINDS.iter().map(|k| k.name).collect();
        let error = match read {
            0 => Error::new(Kind::Input, "this is no model file: it is empty"),
            _ => Error::new(Kind::Unsupported, "this is no model file Mansard knows"),
        };
        return Err(error.help(format!("supported: {}", names.join("; "))).at(path.display().to_string()));
    };
    (kind.open)(path, options)
}

fn read_head(path: &Path, head: &mut [u8]) -> Result<usize> {
    use std::io::Read;
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    let mut taken = vec![];
    file.take(head.len() as u64).read_to_end(&mut taken).map_err(|e| Error::io(path, e))?;
    head[..taken.len()].copy_from_slice(&taken);
    Ok(taken.len())
}

fn open_gguf(path: &Path, options: &Options) -> Result<Model> {
    let place = || path.display().to_string();
    if options.synthetic_seed.is_some() {
        return Err(not_synthetic());
    }
    let (gguf, mut checkpoint) = gguf::Gguf::read(Arc::new(MappedFile::open(path)?))?;
    checkpoint.float_weights = options.float_weights;
    let Some(architecture) = gguf.text("general.architecture") else {
        return Err(Error::new(Kind::Input, "metadata `general.architecture` is missing")).at(place);
    };
    let family = models::family(Origin::Gguf, architecture).at(place)?;
    let config = names::settings(&gguf, architecture, &checkpoint).at(place)?;
    names::rename_tensors(&mut checkpoint, family.stems).at(place)?;
    let program = (family.build)(architecture, &config, &mut checkpoint).at(place)?;
    let found = tokenizer::from_gguf(&gguf, program.encoder).at(place)?;
    assemble(path, architecture, program, found)
}

fn open_directory(path: &Path, options: &Options) -> Result<Model> {
    if options.synthetic_seed.is_some() {
        return open_hugging_face(path, None, options);
    }
    let candidates = [path.join("model.safetensors"), path.join(safetensors::INDEX)];
    match candidates.iter().find(|p| p.exists()) {
        Some(weights) => open_hugging_face(path, Some(weights), options),
        None => {
            let message = format!("expected model.safetensors or {} in the directory", safetensors::INDEX);
            Err(Error::new(Kind::Input, message).at(path.display().to_string()))
        }
    }
}

fn open_json(path: &Path, options: &Options) -> Result<Model> {
    let directory = directory_of(path);
    if path.file_name().is_some_and(|n| n.to_string_lossy().ends_with(".index.json")) {
        return open_hugging_face(&directory, Some(path), options);
    }
    open_config(path, &directory, None, options)
}

fn open_safetensors(path: &Path, options: &Options) -> Result<Model> {
    open_hugging_face(&directory_of(path), Some(path), options)
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn open_hugging_face(directory: &Path, weights: Option<&Path>, options: &Options) -> Result<Model> {
    open_config(&directory.join("config.json"), directory, weights, options)
}

fn open_config(path: &Path, directory: &Path, weights: Option<&Path>, options: &Options) -> Result<Model> {
    let place = || path.display().to_string();
    let text =
        std::fs::read(path).map_err(|e| Error::io(path, e).help("safetensors need their config.json beside them"))?;
    let config = Config::parse(&text).at(place)?;
    let Some(architecture) = config.text("model_type").at(place)? else {
        return Err(Error::new(Kind::Input, "setting `model_type` is missing")).at(place);
    };
    let family = models::family(Origin::HuggingFace, architecture).at(place)?;
    let mut checkpoint = match (weights, options.synthetic_seed) {
        (None, Some(seed)) => Checkpoint::synthetic(seed, stated_dtype(&config)),
        (None, None) => {
            let error = Error::new(Kind::Usage, "a config.json alone has no weights");
            return Err(error.help("name the directory or the safetensors file, or ask for synthetic weights"))
                .at(place);
        }
        (Some(_), Some(_)) => return Err(not_synthetic()),
        (Some(weights), None) if weights.extension().is_some_and(|e| e == "json") => {
            safetensors::read_sharded(weights)?
        }
        (Some(weights), None) => safetensors::read(weights)?,
    };
    checkpoint.float_weights = options.float_weights;
    quantized::apply(&config, &mut checkpoint).at(|| weights.map_or(path, |_| directory).display().to_string())?;
    let (root, probe) = family.root;
    checkpoint.reroot(root, probe).at(place)?;
    let program = (family.build)(architecture, &config, &mut checkpoint)
        .at(|| weights.map_or(path, |_| directory).display().to_string())?;
    if program.encoder {
        check_pooling(directory)?;
    }
    let found = tokenizer::from_directory(directory, &config, program.encoder)?;
    let named = std::fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
    assemble(&named, architecture, program, found)
}

fn not_synthetic() -> Error {
    Error::new(Kind::Usage, "synthetic weights are for a config.json; this input has weights of its own")
}

/// Synthetic matrices are of the type the settings name, so that sizes are those of the real model.
fn stated_dtype(config: &Config) -> DType {
    let named = |key| config.get(key).and_then(|v| v.as_str().map(str::to_owned));
    match named("dtype").or(named("torch_dtype")).as_deref() {
        Some("bfloat16") => DType::BF16,
        Some("float16") => DType::F16,
        _ => DType::F32,
    }
}

/// A sentence encoder says how it pools; embeddings here are means.
fn check_pooling(directory: &Path) -> Result<()> {
    let path = directory.join("1_Pooling").join("config.json");
    let Ok(text) = std::fs::read(&path) else { return Ok(()) };
    let place = || path.display().to_string();
    let pooling = Config::parse(&text).at(place)?;
    if !pooling.flag_or("pooling_mode_mean_tokens", true).at(place)? {
        return Err(Error::new(Kind::Unsupported, "embeddings pooled otherwise than by the mean")).at(place);
    }
    Ok(())
}

fn assemble(path: &Path, architecture: &str, program: models::Program, found: Found) -> Result<Model> {
    let stem = path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().to_lowercase());
    let name: String = stem.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let info = ModelInfo {
        architecture: architecture.into(),
        context: program.context,
        vocab: program.vocab,
        hidden: program.hidden,
        encoder: program.encoder,
        // Ids beyond the table are a damaged file's and cannot be sampled.
        end_tokens: found.end_tokens.into_iter().filter(|id| (*id as usize) < program.vocab).collect(),
        tokenizer: found.info,
    };
    let models::Program { graphs, calls, outputs, weights, .. } = program;
    let name = if name.is_empty() { "model".into() } else { name };
    Ok(Model { name, graphs, calls, outputs, weights, info })
}
