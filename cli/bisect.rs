//! `mansard bisect`: the first weight, pass, rewrite rule or kernel by which an artifact leaves tolerance.

use crate::report;
use crate::verify::{Opened, Subject};
use mansard::check::bisect::{Compilation, Finding, bisect};
use mansard::check::{Request, tolerance};
use mansard::driver::{self, CompileOptions};
use mansard_backends as backends;
use mansard_ir::artifact::Manifest;
use mansard_ir::quantize::Quantizer;
use mansard_ir::{DType, Error, Kind, Result, Target};
use mansard_passes::{LimitsRequest, Strategy};
use serde_json::json;
use std::path::PathBuf;

/// Name the first weight, pass, rewrite rule or kernel by which an artifact leaves tolerance
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    subject: Subject,
    /// Where a reproducer goes: a text case for `mansard opt` and the case tests
    #[arg(short, long, value_name = "FILE", default_value = "mansard-reproducer.mir")]
    output: PathBuf,
    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Where a file does not open, the compilation cannot be repeated; and where something is found: that.
pub fn run(arguments: &Arguments) -> Result<()> {
    let Opened { artifact, model, tokens } = arguments.subject.open()?;
    let manifest = artifact.artifact().manifest();
    let options = repeated(manifest)?;
    let targets = backends::targets(&options.targets)?;
    let imported = driver::import(&arguments.subject.against, &options)?;
    let again = Compilation { model: &imported, options: driver::pass_options(Target::common(&targets)?, &options) };
    let bar = report::bar("layers", model.calls.len());
    let found = bisect(
        &Request {
            artifact: artifact.artifact(),
            model: &model,
            tokens: &tokens,
            tolerance: arguments.subject.tolerance,
            progress: &|done, _| bar.set_position(done as u64),
        },
        &again,
    );
    bar.finish_and_clear();
    let found = found?;
    if arguments.json {
        report::print(report::json(&json!({ "finding": found }))?)?;
    }
    let Some(found) = found else {
        let most = arguments.subject.tolerance.unwrap_or_else(|| tolerance(&manifest.program, &model));
        let words = format!("nothing leaves tolerance; layers may be off by {most:.2e}\n");
        return if arguments.json { Ok(()) } else { report::print(words) };
    };
    report::deliver(Some(&arguments.output), found.reproducer.as_bytes())?;
    let help = format!("{} shows it alone", arguments.output.display());
    Err(Error::new(Kind::Differs, sentence(&found)).at(arguments.subject.artifact.display().to_string()).help(help))
}

fn sentence(found: &Finding) -> String {
    use mansard::check::bisect::Stage;
    let what = match found.stage {
        Stage::Import => "the model was read otherwise",
        Stage::Packing => "a weight is packed otherwise",
        Stage::Pass => "a pass changes values",
        Stage::Rule => "a rewrite rule changes values",
        Stage::Kernel => "a kernel computes something else than its body",
        Stage::Layer => "a layer is too far off, though each step of its compilation is near enough",
    };
    let Finding { name, layer, off, tolerance, .. } = found;
    let place = if layer.is_empty() { String::new() } else { format!(" in {layer}") };
    format!("{what}: `{name}`{place}, off by {off:.2e}, expected at most {tolerance:.2e}")
}

/// The options in a provenance, to compile the same once more.
fn repeated(manifest: &Manifest) -> Result<CompileOptions> {
    let recorded = &manifest.provenance.options;
    let get = |name: &str| recorded.get(name).map(String::as_str);
    let unknown = |name: &str| {
        let message = format!("the artifact was compiled with {name} = {}", get(name).unwrap_or_default());
        Error::new(Kind::Unsupported, message)
            .help("bisect repeats formats, caches, targets and limits, not what was measured on a machine")
    };
    let dtype = |name: &str| get(name).map(|word| DType::parse(word).ok_or_else(|| unknown(name))).transpose();
    if get("machine").is_some() {
        return Err(unknown("machine"));
    }
    // It looks for scales of inputs, which bisecting would take for weights that are off.
    if get("quantizer").and_then(Quantizer::parse).is_some_and(|quantizer| quantizer.row().scales_inputs) {
        return Err(unknown("quantizer"));
    }
    let quant = get("quant").unwrap_or("file");
    let weights = if ["file", "none"].contains(&quant) { None } else { dtype("quant")? };
    let limits = &manifest.program.limits;
    Ok(CompileOptions {
        targets: get("target").unwrap_or("native").split(',').map(String::from).collect(),
        float_weights: quant != "file",
        weights,
        kv: dtype("kv")?,
        exact_head: get("exact-head").is_some(),
        strategy: if get("search").is_some() { Strategy::Fixed } else { Strategy::Joint },
        copies: get("copies").is_some(),
        limits: LimitsRequest {
            tokens: limits.tokens,
            rows: limits.rows,
            sequences: limits.sequences,
            context: Some(limits.context),
            tile: limits.tile,
        },
        synthetic_seed: get("synthetic-weights")
            .map(|s| s.parse().map_err(|_| unknown("synthetic-weights")))
            .transpose()?,
        costs: manifest.provenance.costs.clone(),
        ..CompileOptions::default()
    })
}
