//! `mansard verify`: an artifact's compiled kernels against the interpreter, layer by layer and kernel by kernel.

use crate::{eval, report};
use mansard::check::{self, KernelCheck, LayerCheck};
use mansard::driver::{self, CompileOptions};
use mansard_ir::{Error, Kind, Model, Result, bail};
use mansard_runtime as runtime;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Compare an artifact's layers and kernels with the interpreter on the model's exact float weights
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    subject: Subject,
    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// An artifact and the model it was made of; shared with `bisect`.
#[derive(clap::Args)]
pub struct Subject {
    /// An artifact
    pub artifact: PathBuf,
    /// The model file it was made of
    #[arg(long, value_name = "MODEL")]
    pub against: PathBuf,
    /// Tokens that layers are compared on; the interpreter takes some tenths of a second for each
    #[arg(short = 'n', long, value_name = "TOKENS", default_value_t = eval::COMPARED)]
    pub count: usize,
    /// How far a layer may be off, as a share of what it adds [default: what the artifact's approximations come to]
    #[arg(long, value_name = "SHARE")]
    pub tolerance: Option<f64>,
    #[command(flatten)]
    pub input: report::InputArguments,
}

/// Both opened, and what to run.
pub struct Opened {
    /// The artifact.
    pub artifact: runtime::Model,
    /// Its model in exact floats.
    pub model: Model,
    /// The steps' tokens.
    pub tokens: Vec<u32>,
}

impl Subject {
    /// Opens artifact and model.
    ///
    /// # Errors
    /// Where one cannot be opened, or the tolerance is no share.
    pub fn open(&self) -> Result<Opened> {
        if let Some(share) = self.tolerance.filter(|share| !(*share > 0.0 && share.is_finite())) {
            bail!(Usage, "--tolerance: expected a share above 0, found {share}");
        }
        let artifact = runtime::Model::open(&self.artifact)?;
        let seed = artifact.artifact().manifest().provenance.options.get("synthetic-weights");
        let synthetic_seed = seed.and_then(|seed| seed.parse().ok());
        let options = CompileOptions { float_weights: true, synthetic_seed, ..CompileOptions::default() };
        let model = driver::import(&self.against, &options)?;
        let mut tokens = match (self.input.ids()?, &self.input.prompt) {
            (Some(ids), _) => ids,
            (None, Some(text)) => artifact.tokens()?.encode(text, true)?,
            (None, None) => artifact.tokens()?.encode(eval::DEFAULT_TEXT, true)?,
        };
        tokens.truncate(self.count);
        Ok(Opened { artifact, model, tokens })
    }
}

/// Runs the command.
///
/// # Errors
/// Where a file does not open; and where a layer or kernel is further off than it may be: the worst.
pub fn run(arguments: &Arguments) -> Result<()> {
    let subject = &arguments.subject;
    let opened = subject.open()?;
    let bar = report::bar("layers", opened.model.calls.len());
    let found = check::check(&check::Request {
        artifact: opened.artifact.artifact(),
        model: &opened.model,
        tokens: &opened.tokens,
        tolerance: subject.tolerance,
        progress: &|done, _| bar.set_position(done as u64),
    });
    bar.finish_and_clear();
    let found = found?;
    report::print(if arguments.json { report::json(&json_of(&found))? } else { table(&found) })?;
    verdict(&found, &subject.artifact)
}

/// The worst, where it is further off than it may be.
fn verdict(found: &check::Report, artifact: &Path) -> Result<()> {
    if found.holds() {
        return Ok(());
    }
    let words = match (found.worst_kernel().filter(|k| !k.holds()), found.worst_layer()) {
        (Some(kernel), _) => kernel_line(kernel, found),
        (None, Some(layer)) => layer_line(layer, found),
        (None, None) => "nothing was compared".into(),
    };
    let help = "mansard bisect with the same arguments names what is wrong";
    Err(Error::new(Kind::Differs, words).at(artifact.display().to_string()).help(help))
}

fn layer_line(layer: &LayerCheck, found: &check::Report) -> String {
    format!("layer {}: off by {:.2e}, expected at most {:.2e}", layer.layer, layer.off, found.tolerance)
}

fn kernel_line(kernel: &KernelCheck, found: &check::Report) -> String {
    let layer = kernel.call.and_then(|call| found.layers.get(call)).map(|l| format!(" in {}", l.layer));
    let KernelCheck { kernel, off, tolerance, tokens, .. } = kernel;
    let layer = layer.unwrap_or_default();
    format!("kernel `{kernel}`{layer}, {tokens} tokens: off by {off:.2e}, expected at most {tolerance:.2e}")
}

fn table(found: &check::Report) -> String {
    let mut rows = vec![["layer", "off", "accumulated", ""].map(String::from).to_vec()];
    for LayerCheck { layer, off, accumulated, holds, .. } in &found.layers {
        let mark = if *holds { "" } else { "too far" };
        rows.push(vec![layer.clone(), format!("{off:.2e}"), format!("{accumulated:.2e}"), mark.into()]);
    }
    let mut out = report::table(&rows);
    let far = found.kernels.iter().filter(|k| !k.holds()).count();
    out += &format!("layers may be off by {:.2e}, on {} tokens\n", found.tolerance, found.tokens);
    out += &format!("{} kernel launches compared, {far} too far\n", found.kernels.len());
    if let Some(layer) = found.worst_layer() {
        out += &format!("worst layer: {}\n", layer_line(layer, found));
    }
    if let Some(kernel) = found.worst_kernel() {
        out += &format!("worst kernel: {}\n", kernel_line(kernel, found));
    }
    out
}

fn json_of(found: &check::Report) -> serde_json::Value {
    json!({
        "holds": found.holds(),
        "tokens": found.tokens,
        "tolerance": found.tolerance,
        "layers": found.layers,
        "kernels": found.kernels,
        "worst_layer": found.worst_layer(),
        "worst_kernel": found.worst_kernel(),
    })
}
