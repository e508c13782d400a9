//! An artifact and a machine -> everything there is to say about it.

use super::memory::{self, Memory};
use super::pricing::{self, Phase};
use super::story::{self, Formats, Story};
use crate::bench::roof::{self, Roof};
use mansard::machine::{self, MachineFile};
use mansard_ir::artifact::{Manifest, Quality};
use mansard_ir::plan::Program;
use mansard_ir::{Machine, Result, Traffic, Type, bail};
use mansard_runtime::{Model, missing};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// What is asked for.
pub struct Request<'a> {
    /// `--machine`.
    pub machine: Option<&'a str>,
    /// Workers.
    pub threads: usize,
    /// Times that kernels are run; `None`: nothing is measured.
    pub repetitions: Option<usize>,
}

/// Everything.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// Name of the file.
    pub artifact: String,
    /// Its bytes.
    pub bytes: usize,
    /// Of the model.
    pub model: ModelFacts,
    /// What predictions are about.
    pub machine: MachineFacts,
    /// What kernels and formats were chosen for.
    pub workload: String,
    /// Bytes and elements of packed weights by format.
    pub weights: Vec<Share>,
    /// Caches by type.
    pub caches: Vec<Share>,
    /// Reading a prompt, writing a token.
    pub phases: Vec<Phase>,
    /// Where bytes are, and when.
    pub memory: Memory,
    /// Formats that were chosen within a budget.
    pub formats: Option<Formats>,
    /// Each kernel's derivation.
    pub kernels: Vec<Story>,
    /// Every choice that changes values beyond rounding.
    pub approximations: Vec<String>,
    /// What was measured of its accuracy.
    pub quality: Option<Quality>,
    /// What it was made of, and how.
    pub provenance: BTreeMap<String, String>,
}

/// What a model is.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct ModelFacts {
    pub architecture: String,
    pub encoder: bool,
    pub context: usize,
    pub vocabulary: usize,
    pub hidden: usize,
    pub parameters: usize,
}

/// The row of figures that predictions are made with; rates are those of all workers.
#[derive(Debug, Serialize)]
pub struct MachineFacts {
    /// As its file calls it, or the target.
    pub name: String,
    /// `measured 2026-11-21`, or `stated`.
    pub origin: String,
    /// Workers.
    pub threads: usize,
    /// The rates.
    #[serde(flatten)]
    pub figures: Machine,
}

/// What one format makes up.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Share {
    /// `q4_1`, `keys<f16>`.
    pub format: String,
    /// Weights or caches of it.
    pub count: usize,
    /// Elements of all; of caches for a position.
    pub elements: usize,
    /// Bytes of all; of caches for a position.
    pub bytes: usize,
}

/// Explains an opened artifact.
///
/// # Errors
/// Where its kernels' bodies are damaged, a machine file is, or it does not run here and is to be measured.
pub fn explain(model: &Model, path: &Path, request: &Request<'_>) -> Result<Explanation> {
    let artifact = model.artifact();
    let manifest = artifact.manifest();
    let (program, info) = (&manifest.program, &manifest.model);
    let (name, origin, figures) = figures(manifest, request)?;
    let roof = Roof::on(program, figures, origin.clone(), request.threads)?.with(manifest.provenance.costs.clone());
    let workload = manifest.provenance.options.get("workload").and_then(|w| w.parse().ok());
    let traffic: Traffic = workload.unwrap_or_default();
    let tests = pricing::tests(&traffic, &program.limits, info.encoder);
    let measured = request.repetitions.map(|times| pricing::measure(model, &roof, &tests, request.threads, times));
    let phases = pricing::phases(program, info.encoder, &roof, &tests, measured.transpose()?.as_deref());
    let weights = weights(program);
    Ok(Explanation {
        artifact: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        bytes: artifact.file_bytes(),
        model: ModelFacts {
            architecture: info.architecture.clone(),
            encoder: info.encoder,
            context: info.context,
            vocabulary: info.vocab,
            hidden: info.hidden,
            parameters: weights.iter().fold(0, |sum, share| sum.saturating_add(share.elements)),
        },
        machine: MachineFacts { name, origin, threads: request.threads, figures },
        workload: workload.map_or_else(|| format!("{traffic} (assumed: none was stated)"), |w| w.to_string()),
        weights,
        caches: caches(program),
        memory: memory::of(program, &roof, &traffic),
        formats: story::formats(manifest),
        kernels: story::kernels(manifest, &roof),
        phases,
        approximations: manifest.provenance.approximations.clone(),
        quality: manifest.provenance.quality.clone(),
        provenance: provenance(manifest),
    })
}

/// Name, origin and figures of the machine that predictions are for.
fn figures(manifest: &Manifest, request: &Request<'_>) -> Result<(String, String, Machine)> {
    let of_file = |file: &MachineFile| {
        let priced = roof::priced(&file.table, &manifest.program, request.threads);
        (file.table.name.clone(), machine::origin(&file.table), priced)
    };
    let here = manifest.code.iter().find(|code| missing(code).is_none());
    let file = match (request.machine, here) {
        (Some(name), _) => Some(MachineFile::named(name)?),
        (None, Some(_)) => machine::of_this_processor()?,
        (None, None) => None,
    };
    match (file, here.or(manifest.code.first())) {
        (Some(file), _) => Ok(of_file(&file)),
        (None, Some(code)) => {
            let machine = Machine { threads: request.threads, ..roof::stated(&code.target, request.threads)? };
            Ok((code.target.clone(), "stated".into(), machine))
        }
        (None, None) => bail!(Input, "the artifact has no code"),
    }
}

fn weights(program: &Program) -> Vec<Share> {
    shares(program.weights.iter().map(|weight| {
        let (format, shape) = weight.ty.split_once('[').unwrap_or((&weight.ty, ""));
        let extents = shape.trim_end_matches(']').split(',').map(|n| n.trim().parse::<usize>().unwrap_or(0));
        (format.to_string(), extents.fold(1, usize::saturating_mul), weight.bytes)
    }))
}

fn caches(program: &Program) -> Vec<Share> {
    shares(program.caches.iter().map(|cache| {
        let (format, _) = cache.ty.split_once('[').unwrap_or((&cache.ty, ""));
        let elements = match mansard_ir::text::parse_type(&cache.ty) {
            Ok(Type::Cache { heads, dim, .. }) => heads * dim,
            _ => 0,
        };
        (format.to_string(), elements, cache.block_bytes / mansard_ir::layout::CACHE_BLOCK)
    }))
}

/// By format, the largest first.
fn shares(of: impl Iterator<Item = (String, usize, usize)>) -> Vec<Share> {
    let mut by_format: BTreeMap<String, Share> = BTreeMap::new();
    for (format, elements, bytes) in of {
        let empty = || Share { format: format.clone(), count: 0, elements: 0, bytes: 0 };
        let share = by_format.entry(format.clone()).or_insert_with(empty);
        *share = Share {
            count: share.count + 1,
            elements: share.elements.saturating_add(elements),
            bytes: share.bytes + bytes,
            ..share.clone()
        };
    }
    let mut shares: Vec<Share> = by_format.into_values().collect();
    shares.sort_by_key(|share| std::cmp::Reverse(share.bytes));
    shares
}

fn provenance(manifest: &Manifest) -> BTreeMap<String, String> {
    let p = &manifest.provenance;
    let mut out = BTreeMap::from([("mansard".to_string(), p.version.clone()), ("passes".into(), p.passes.join(", "))]);
    out.extend(p.sources.iter().map(|(name, hash)| (format!("source {name}"), format!("BLAKE3 {hash}"))));
    out.extend(p.options.iter().map(|(name, value)| (format!("option {name}"), value.clone())));
    out.extend(manifest.code.iter().map(|code| (format!("code for {}", code.target), code.features.join(" "))));
    out
}
