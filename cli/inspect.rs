//! `mansard inspect`: what an artifact holds.

use crate::report::{self, indented};
use mansard_ir::artifact::Manifest;
use mansard_ir::costs::Filed;
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::plan::{CacheSpec, KernelId, KernelSpec, Program};
use mansard_ir::tuning::{Measured, Tuned};
use mansard_ir::{Choice, Result, bail};
use mansard_runtime::{Artifact, OpenOptions, missing};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Show what an artifact holds: model, kernels, weights, memory plan, provenance
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    artifact: PathBuf,
    /// Show this kernel's body
    #[arg(long, value_name = "NAME", conflicts_with = "json")]
    kernel: Option<String>,
    /// List every weight, buffer and launch
    #[arg(long, conflicts_with_all = ["json", "kernel"])]
    all: bool,
    /// The choices of a measurement, as JSON that `compile --tuning` reads
    #[arg(long, conflicts_with_all = ["json", "kernel", "all"])]
    tuning: bool,
    /// The costs that were measured, as JSON that `compile --costs` reads
    #[arg(long, conflicts_with_all = ["json", "kernel", "all", "tuning"])]
    costs: bool,
    /// The manifest and the sections, in JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Where the artifact does not open or has no such kernel.
pub fn run(arguments: &Arguments) -> Result<()> {
    let artifact = Artifact::open(&arguments.artifact, &OpenOptions::default())?;
    let program = &artifact.manifest().program;
    if arguments.json {
        return report::print(report::json(&json_of(&artifact))?);
    }
    if arguments.tuning {
        return report::print(artifact.manifest().provenance.tuning.to_json()?);
    }
    if arguments.costs {
        return report::print(artifact.manifest().provenance.costs.to_json()?);
    }
    if let Some(name) = &arguments.kernel {
        let Some(kernel) = program.kernels.iter().find(|k| k.name == *name) else {
            let names: Vec<&str> = program.kernels.iter().map(|k| k.name.as_str()).collect();
            bail!(Usage, "no kernel `{name}`; there are {}", names.join(", "));
        };
        return report::print(&kernel.text);
    }
    let mut out = model(&artifact);
    out += &weights(program);
    out += &memory(program);
    out += &kernels(program);
    out += &provenance(artifact.manifest());
    if arguments.all {
        out += &format!("\n{}", mansard_ir::text::print_program(program));
    }
    report::print(out)
}

fn model(artifact: &Artifact) -> String {
    let Manifest { model, code, format_version, .. } = artifact.manifest();
    let kind = if model.encoder { "encoder" } else { "decoder" };
    let tokenizer = model
        .tokenizer
        .as_ref()
        .map_or("none", |t| if t.chat_template.is_some() { "with a chat template" } else { "without a chat template" });
    let mut out = format!("{}\n", artifact.path().display());
    out += &format!(
        "  {} {kind}, context {}, vocabulary {}, hidden size {}\n",
        model.architecture, model.context, model.vocab, model.hidden
    );
    out += &format!("  tokenizer {tokenizer}; end tokens {:?}\n", model.end_tokens);
    out += &format!("  {}, format version {format_version}\n\ncode\n", report::bytes(artifact.file_bytes()));
    for ptx in &artifact.manifest().ptx {
        let bytes = artifact.section(&ptx.section).map_or(0, <[u8]>::len);
        out += &format!("  {:24} PTX {}, {}\n", ptx.chip, ptx.version, report::bytes(bytes));
        if let Some(cubin) = &ptx.cubin {
            let bytes = artifact.section(&cubin.section).map_or(0, <[u8]>::len);
            out += &format!("  {:24} machine code of CUDA {}, {}\n", ptx.chip, cubin.version, report::bytes(bytes));
        }
    }
    for image in code {
        let runs = missing(image).unwrap_or_else(|| "runs here".into());
        let bytes = artifact.section(&image.section).map_or(0, <[u8]>::len);
        out += &format!(
            "  {} ({}), {}: {runs}\n    {}\n",
            image.target,
            image.arch,
            report::bytes(bytes),
            image.features.join(" ")
        );
    }
    out
}

/// Weights by format: that before the `[` of a type.
fn weights(program: &Program) -> String {
    let mut formats: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for weight in &program.weights {
        let format = weight.ty.split('[').next().unwrap_or_default();
        let (count, bytes) = formats.entry(format).or_default();
        (*count, *bytes) = (*count + 1, *bytes + weight.bytes);
    }
    let mut rows = vec![["format", "weights", "packed"].map(String::from).to_vec()];
    rows.extend(formats.iter().map(|(f, (n, b))| vec![f.to_string(), n.to_string(), report::bytes(*b)]));
    let total = program.weights.iter().map(|w| w.bytes).sum();
    rows.push(vec!["all".into(), program.weights.len().to_string(), report::bytes(total)]);
    format!("\nweights\n{}", indented(&report::table(&rows)))
}

fn memory(program: &Program) -> String {
    let limits = &program.limits;
    // Caches of a cache block's window are beside others, and grow no further than that.
    let grows = |c: &&CacheSpec| program.groups.get(c.group).is_some_and(|group| group.window != CACHE_BLOCK);
    let position = program.caches.iter().filter(grows).map(|c| c.block_bytes).sum::<usize>() / CACHE_BLOCK;
    let full: usize = program.caches.iter().map(|c| c.block_bytes * blocks(program, c, limits.context)).sum();
    let mut rows = vec![
        ("activations".to_string(), report::bytes(program.arena_bytes)),
        ("buffers".into(), program.buffers.len().to_string()),
        ("caches".into(), program.caches.len().to_string()),
        ("cache for a position".into(), report::bytes(position)),
        ("cache for a full context".into(), report::bytes(full)),
    ];
    for (index, group) in program.groups.iter().enumerate().filter(|(_, group)| group.window > 0) {
        let caches: Vec<&CacheSpec> = program.caches.iter().filter(|c| c.group == index).collect();
        let most: usize = caches.iter().map(|c| c.block_bytes * blocks(program, c, limits.context)).sum();
        let name = format!("of these, {} that keep {} positions", caches.len(), group.window);
        rows.push((name, report::bytes(most)));
    }
    rows.extend([
        ("tokens of a step".into(), limits.tokens.to_string()),
        ("rows of a step".into(), limits.rows.to_string()),
        ("sequences of a step".into(), limits.sequences.to_string()),
        ("context".into(), limits.context.to_string()),
    ]);
    let rows: Vec<Vec<String>> = rows.into_iter().map(|(name, value)| vec![name, value]).collect();
    format!("\nmemory plan\n{}", indented(&report::table(&rows)))
}

/// Cache blocks that a sequence of that length holds in a cache while it decodes.
fn blocks(program: &Program, cache: &CacheSpec, length: usize) -> usize {
    program.groups.get(cache.group).map_or(0, |group| group.blocks(length))
}

/// Kernels with their launches, for each range of `t`.
fn kernels(program: &Program) -> String {
    let mut out = String::new();
    for variant in &program.variants {
        let mut launches: BTreeMap<KernelId, usize> = BTreeMap::new();
        for launch in &variant.launches {
            *launches.entry(launch.kernel).or_default() += 1;
        }
        let mut rows = vec![["kernel", "launches", "MFLOP a token", "weights read"].map(String::from).to_vec()];
        rows.extend(launches.iter().map(|(id, n)| {
            let KernelSpec { name, flops_per_token, weight_bytes, .. } = &program.kernels[id.0 as usize];
            vec![name.clone(), n.to_string(), format!("{:.2}", flops_per_token / 1e6), report::bytes(*weight_bytes)]
        }));
        let (min, max) = (variant.tokens.min, variant.tokens.max);
        let barriers = variant.launches.iter().filter(|l| l.barrier).count();
        out += &format!("\nsteps of {min} to {max} tokens: {} launches, {barriers} barriers\n", variant.launches.len());
        out += &indented(&report::table(&rows));
    }
    out
}

fn provenance(manifest: &Manifest) -> String {
    let p = &manifest.provenance;
    let mut out = format!("\nprovenance\n  mansard {}\n", p.version);
    p.sources.iter().for_each(|(name, hash)| out += &format!("  from {name}, BLAKE3 {hash}\n"));
    out += &format!("  passes {}\n", p.passes.join(", "));
    p.options.iter().for_each(|(name, value)| out += &format!("  {name} = {value}\n"));
    for (name, value) in p.quality.iter().flat_map(|quality| quality.figures()) {
        out += &format!("  quality: {name} {value}\n");
    }
    p.approximations.iter().for_each(|a| out += &format!("  approximation: {a}\n"));
    for f in &p.costs.factors {
        let Filed { kind, format, ops } = &f.of;
        out += &format!(
            "  measured {kind} {format} [{ops}]: {:.2} us and {:.2} times the roofline's price at t = {} to {}\n",
            f.launch_us, f.factor, f.tokens.min, f.tokens.max
        );
    }
    for Tuned { kernel, target, choice, measured, .. } in &p.tuning.kernels {
        let Choice { tokens, strips, cache_bytes, ahead } = choice;
        out += &format!("  tuned {kernel} for {target}: {tokens}x{strips}, cache {cache_bytes}, ahead {ahead};");
        for Measured { tokens, nanoseconds, formula_nanoseconds } in measured {
            let share = 100.0 * *nanoseconds as f64 / *formula_nanoseconds as f64;
            out += &format!(" {share:.0}% of the time at t = {tokens}");
        }
        out += "\n";
    }
    out
}

fn json_of(artifact: &Artifact) -> serde_json::Value {
    let section =
        |s: &mansard_runtime::Section| json!({"name": s.name, "offset": s.range.start, "bytes": s.range.len()});
    json!({
        "path": artifact.path().display().to_string(),
        "bytes": artifact.file_bytes(),
        "sections": artifact.sections().iter().map(section).collect::<Vec<_>>(),
        "manifest": artifact.manifest(),
    })
}
