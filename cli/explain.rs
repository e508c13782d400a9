//! `mansard explain`: why an artifact is what it is - each kernel, format and layout, what it costs, and how well it does.
//!
//! ```text
//! manifest: program, derivations, decisions, quality card      a machine: stated, probed, or a file
//!      └──────────────────┬────────────────────────────────────────────┘
//!                   Explanation    -->    tables    |    --json    |    --html report.html
//! ```
//!
//! Everything comes from the artifact; nothing is run but under `--measure`, which times its kernels here. The page is one
//! file that refers to nothing outside itself.

mod gather;
mod html;
mod memory;
mod plot;
pub mod pricing;
mod story;
mod text;

use crate::report::{self, OpenArguments};
use mansard_ir::{Result, bail};
use mansard_runtime::physical_cores;
use std::path::PathBuf;

/// Explain an artifact: its kernels on the roofline, their alternatives, formats, memory, accuracy
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    artifact: PathBuf,
    /// Write a page that stands alone: the same, with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Time the kernels on this machine
    #[arg(long)]
    measure: bool,
    /// Predict for this machine file, or for what `mansard probe` stored here (`local`) [default: the latter where it is about
    /// this processor, else the figures stated for the target]
    #[arg(long, value_name = "FILE")]
    machine: Option<String>,
    /// Worker threads [default: physical cores]
    #[arg(short = 't', long, value_name = "N")]
    threads: Option<usize>,
    /// With --measure: times each step is run, after once to warm up
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Where the artifact does not open, it is to be measured and does not run here, or the page cannot be written.
pub fn run(arguments: &Arguments) -> Result<()> {
    let threads = arguments.threads.unwrap_or_else(physical_cores);
    for (name, figure) in [("-t", threads), ("-r", arguments.repetitions)] {
        if figure == 0 {
            bail!(Usage, "{name}: expected at least 1, found 0");
        }
    }
    // Weights are read under --measure only.
    let opening = OpenArguments { no_verify: !arguments.measure, ..OpenArguments::default() };
    let model = opening.open(&arguments.artifact)?;
    let request = gather::Request {
        machine: arguments.machine.as_deref(),
        threads,
        repetitions: arguments.measure.then_some(arguments.repetitions),
    };
    let found = gather::explain(&model, &arguments.artifact, &request)?;
    if let Some(path) = &arguments.html {
        let page = html::page(&found)?;
        report::deliver(Some(path), page.as_bytes())?;
    }
    match (arguments.json, &arguments.html) {
        (true, _) => report::print(report::json(&found)?),
        (false, Some(path)) => report::print(format!("{}written to {}\n", text::summary(&found), path.display())),
        (false, None) => report::print(text::text(&found)),
    }
}
