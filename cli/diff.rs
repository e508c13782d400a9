//! `mansard diff`: what two artifacts have in common, and what not.
//!
//! ```text
//!                                 a.mansard    b.mansard
//! weights q4_1                    211, 83 MB           -
//! weights f32                      61, 141 kB    61, 141 kB
//! kernel layer_matmul_add         30 launches  60 launches
//! ```
//!
//! Every property of an artifact is a line `name -> value`; the report is the lines that differ.

use crate::report;
use mansard_ir::Result;
use mansard_ir::artifact::Manifest;
use mansard_ir::plan::Program;
use mansard_runtime::{Artifact, OpenOptions};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Compare two artifacts: formats, kernels, bytes, caches, targets, provenance, approximations, quality
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    a: PathBuf,
    /// Another
    b: PathBuf,
    /// Show what is equal too
    #[arg(long)]
    all: bool,
    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// Properties by section and name.
type Properties = BTreeMap<(&'static str, String), serde_json::Value>;

/// Runs the command.
///
/// # Errors
/// Where one of them does not open.
pub fn run(arguments: &Arguments) -> Result<()> {
    // Hashes stand for the weights, so these are not read.
    let open = |path| Artifact::open(path, &OpenOptions { verify_weights: false });
    let [a, b] = [open(&arguments.a)?, open(&arguments.b)?].map(|artifact| properties(&artifact));
    let names: BTreeSet<_> = a.keys().chain(b.keys()).collect();
    let shown: Vec<_> = names.into_iter().filter(|name| arguments.all || a.get(name) != b.get(name)).collect();
    if arguments.json {
        let line = |name: &&(&str, String)| json!({"section": name.0, "name": name.1, "a": a.get(name), "b": b.get(name), "equal": a.get(name) == b.get(name)});
        return report::print(report::json(&json!({
            "equal": a == b,
            "properties": shown.iter().map(line).collect::<Vec<_>>(),
        }))?);
    }
    if a == b && !arguments.all {
        return report::print("no difference\n");
    }
    let file = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut rows = vec![vec![String::new(), file(&arguments.a), file(&arguments.b)]];
    let cell = |value: Option<&serde_json::Value>| match value {
        None => "-".to_string(),
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    };
    for name in shown {
        rows.push(vec![format!("{} {}", name.0, name.1).trim().to_string(), cell(a.get(name)), cell(b.get(name))]);
    }
    report::print(report::table(&rows))
}

fn properties(artifact: &Artifact) -> Properties {
    let manifest = artifact.manifest();
    let mut out = Properties::new();
    let mut put = |section: &'static str, name: &str, value: serde_json::Value| {
        out.insert((section, name.to_string()), value);
    };
    model(manifest, &mut put);
    program(&manifest.program, &mut put);
    put("bytes", "artifact", artifact.file_bytes().into());
    for code in &manifest.code {
        let bytes = artifact.section(&code.section).map_or(0, <[u8]>::len);
        put("target", &code.target, format!("{}, {}", code.arch, report::bytes(bytes)).into());
    }
    for (section, hash) in &manifest.hashes {
        put("section", section, hash.chars().take(16).collect::<String>().into());
    }
    provenance(manifest, &mut put);
    out
}

/// Takes a section, a name and a value.
type Put<'a> = dyn FnMut(&'static str, &str, serde_json::Value) + 'a;

fn model(manifest: &Manifest, put: &mut Put<'_>) {
    let model = &manifest.model;
    put("model", "architecture", model.architecture.clone().into());
    put("model", "context", model.context.into());
    put("model", "vocabulary", model.vocab.into());
    put("model", "hidden size", model.hidden.into());
    put("model", "end tokens", json!(model.end_tokens));
    let limits = &manifest.program.limits;
    let figures = [("tokens", limits.tokens), ("rows", limits.rows), ("sequences", limits.sequences)];
    for (name, figure) in figures.into_iter().chain([("context", limits.context)]) {
        put("limit", name, figure.into());
    }
}

fn program(program: &Program, put: &mut Put<'_>) {
    for weight in &program.weights {
        put("weight", &weight.name, weight.ty.clone().into());
    }
    put("bytes", "weights", program.weights.iter().map(|w| w.bytes).sum::<usize>().into());
    put("bytes", "activations", program.arena_bytes.into());
    put("bytes", "scratch of a worker", program.scratch_bytes.into());
    for cache in &program.caches {
        put("cache", &cache.name, format!("{}, {}", cache.ty, report::bytes(cache.block_bytes)).into());
    }
    for kernel in &program.kernels {
        // The body without the kernel's name, which it may share with another.
        let hash = blake3::hash(kernel.text.as_bytes()).to_hex();
        put("kernel", &kernel.name, hash.chars().take(16).collect::<String>().into());
    }
    for variant in &program.variants {
        let range = format!("{} to {} tokens", variant.tokens.min, variant.tokens.max);
        let mut launches: BTreeMap<&str, usize> = BTreeMap::new();
        for launch in &variant.launches {
            *launches.entry(program.kernels[launch.kernel.0 as usize].name.as_str()).or_default() += 1;
        }
        for (kernel, count) in launches {
            put("launches", &format!("of {range}: {kernel}"), count.into());
        }
        let barriers = variant.launches.iter().filter(|l| l.barrier).count();
        put("launches", &format!("of {range}: all"), variant.launches.len().into());
        put("launches", &format!("of {range}: with a barrier"), barriers.into());
    }
}

fn provenance(manifest: &Manifest, put: &mut Put<'_>) {
    let p = &manifest.provenance;
    put("provenance", "mansard", p.version.clone().into());
    p.sources.iter().for_each(|(name, hash)| put("source", name, hash.clone().into()));
    put("provenance", "passes", p.passes.join(", ").into());
    p.options.iter().for_each(|(name, value)| put("option", name, value.clone().into()));
    p.approximations.iter().for_each(|a| put("approximation", a, "yes".into()));
    p.costs.factors.iter().for_each(|f| {
        let name = format!("{} {} [{}] t {}..={}", f.of.kind, f.of.format, f.of.ops, f.tokens.min, f.tokens.max);
        put("cost", &name, format!("{} us and {} times", f.launch_us, f.factor).into());
    });
    p.tuning.kernels.iter().for_each(|t| put("tuned", &t.kernel, format!("{:?}", t.choice).into()));
    if let Some(quality) = &p.quality {
        quality.figures().into_iter().for_each(|(name, value)| put("quality", name, value.into()));
        quality.layers.iter().for_each(|l| put("layer error", &l.layer, l.off.into()));
    }
}
