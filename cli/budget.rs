//! `compile --max-kld`: the fastest formats of weights and caches that keep within an accuracy, and a memory, budget.
//!
//! ```text
//! calibrate: what each format of each kind of matrix costs in KL divergence          (once; kept)
//! choose:    least predicted time of the workload within the bounds                  (passes/budget.rs)
//! compile, measure the divergence on another text, scale what was predicted by what was measured, choose again
//! ```
//!
//! The artifact that is kept was measured within the budget, on text that it was not calibrated on. At most [`ROUNDS`]
//! artifacts are made; where none is within the budget nothing is written, and the error says what there is.

mod calibrate;
mod divergence;

use crate::calibration;
use crate::driver::{self, CompileOptions, Progress, Summary};
use calibrate::{Calibration, Subjects};
use divergence::Reference;
pub use divergence::{WINDOW, divergence_term, log_sum, steps};
use mansard_backends as backends;
use mansard_ir::artifact::{Alternative, Decided, Decision, rounded};
use mansard_ir::{DType, Error, Kind, Model, Result, Target, bail};
use mansard_passes as passes;
use mansard_passes::budget::{self, Decisions, Subject};
use mansard_passes::knapsack::Solution;
use mansard_runtime as runtime;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Prose that nothing is calibrated on.
const HELD_OUT: &str = include_str!("evaluation.txt");

/// Artifacts that are made and measured at most.
const ROUNDS: usize = 5;

/// Share of the accuracy budget that is used well enough to stop.
const USED: f64 = 0.8;

/// What formats are chosen for, within the bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Aim {
    /// Least predicted time: formats and the kernels for them are priced together
    #[default]
    Joint,
    /// Fewest bytes: formats are chosen without a look at kernels, after everything else
    After,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    /// Most mean KL divergence from the model in f32, in nats.
    pub max_kld: f64,
    /// Most bytes of weights and caches.
    pub max_memory: Option<u64>,
    /// What formats are chosen for.
    pub aim: Aim,
}

/// What was chosen, and how it came out.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The workload that times are about.
    pub workload: String,
    /// As measured on held-out text.
    pub kl_divergence: f64,
    /// As predicted for that choice before it was measured.
    pub kl_divergence_predicted: f64,
    /// Weights and caches.
    pub memory_bytes: usize,
    /// Predicted for the workload.
    pub seconds: f64,
    /// No combination is predicted to take less within the bounds; else how low the bound is.
    pub seconds_at_least: f64,
    /// Predicted for the file's own formats.
    pub seconds_of_file: f64,
    /// Artifacts made and measured: predicted and measured divergence of each.
    pub rounds: Vec<(f64, f64)>,
    /// Decision and format.
    pub formats: Vec<(String, String)>,
}

/// Compiles the model at `input` to `output` within `budget`.
///
/// # Errors
/// Where the budget cannot be met, the model predicts no tokens, the calibration text is none; whatever a stage says.
/// Nothing is left under `output` then.
pub fn compile(
    input: &Path,
    output: &Path,
    options: &CompileOptions,
    budget: &Budget,
    progress: &mut dyn Progress,
    hooks: &mut passes::Hooks<'_>,
) -> Result<(Summary, Outcome)> {
    let model = driver::import(input, options)?;
    if model.info.encoder {
        bail!(Unsupported, "--max-kld: a {} model is an encoder: it predicts no tokens", model.info.architecture);
    }
    let options = &CompileOptions { traffic: Some(options.traffic.unwrap_or_default()), ..options.clone() };
    let common = Target::common(&backends::targets(&options.targets)?)?;
    progress.stage("price formats", 0);
    let decisions = budget::decisions(model.clone(), &driver::pass_options(common, options))?;
    let folder = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = tempfile::Builder::new().prefix(".mansard-budget-").tempdir_in(folder);
    let folder = folder.map_err(|e| Error::io(output, e))?;
    let reference = folder.path().join("reference.mansard");
    let subjects = Subjects {
        input,
        options,
        decisions: &decisions,
        text: options.calibration.as_deref(),
        folder: folder.path(),
        reference: &reference,
    };
    // Before what takes long: the text may be none.
    let calibration_hash = calibration::hash(subjects.text)?;
    progress.stage("reference", 0);
    driver::compile(input, &reference, &driver::reference_options(options), &mut driver::Quiet, hooks)?;
    let calibration = subjects.calibrate(progress)?;
    let search = Search { input, output, options, budget, model: &model, calibration: &calibration, calibration_hash };
    search.run(decisions, &reference, progress, hooks)
}

/// The rounds of choosing and measuring.
struct Search<'a> {
    input: &'a Path,
    output: &'a Path,
    options: &'a CompileOptions,
    budget: &'a Budget,
    model: &'a Model,
    calibration: &'a Calibration,
    /// BLAKE3 of its text.
    calibration_hash: String,
}

impl Search<'_> {
    fn run(
        &self,
        mut decisions: Decisions,
        reference: &Path,
        progress: &mut dyn Progress,
        hooks: &mut passes::Hooks<'_>,
    ) -> Result<(Summary, Outcome)> {
        let threads = self.options.threads;
        let opened = runtime::Model::open(reference)?;
        let tokens = opened.tokens()?.encode(HELD_OUT, true)?;
        let mut held_out = Reference::new(&opened, &tokens, usize::MAX, threads)?;
        let bytes = self.budget.max_memory.map_or(f64::INFINITY, |bytes| bytes as f64);
        let (mut scale, mut rounds) = (1.0, vec![]);
        let mut tried: Vec<Vec<usize>> = vec![];
        let mut best: Option<(Solution, Summary, Outcome)> = None;
        for round in 0..ROUNDS {
            self.calibration.fill(&mut decisions, self.model, scale)?;
            let last = round + 1 == ROUNDS && best.is_none();
            let chosen = match self.budget.aim {
                Aim::Joint => budget::choose(&decisions, self.budget.max_kld, bytes),
                Aim::After => budget::smallest(&decisions, self.budget.max_kld),
            };
            // The last resort: what is most accurate, whatever its time.
            let chosen = if last { budget::most_accurate(&decisions, bytes) } else { chosen };
            let Some(solution) = chosen.or_else(|| budget::most_accurate(&decisions, bytes)) else {
                return Err(self.too_small(&decisions));
            };
            if tried.contains(&solution.picked) {
                break;
            }
            let trial = reference.with_file_name(format!("round-{round}.mansard"));
            let options = self.options_of(&decisions, &solution);
            let summary = driver::compile(self.input, &trial, &options, progress, hooks)?;
            progress.stage("measure", 0);
            let measured = held_out.divergence(&runtime::Model::open(&trial)?, threads)?;
            let predicted = errors(&decisions, &solution);
            rounds.push((predicted, measured));
            tried.push(solution.picked.clone());
            let decided = self.decided(&decisions, &solution, (predicted, measured));
            let found = self.outcome(&decisions, &solution, (predicted, measured));
            let worth = |outcome: &Outcome| match self.budget.aim {
                Aim::Joint => outcome.seconds,
                Aim::After => outcome.memory_bytes as f64,
            };
            let better = best.as_ref().is_none_or(|(_, _, b)| worth(&found) < worth(b));
            if measured <= self.budget.max_kld && better {
                backends::artifact::amend(&trial, |manifest| manifest.provenance.decided = Some(decided))?;
                std::fs::rename(&trial, self.output).map_err(|e| Error::io(self.output, e))?;
                best = Some((solution, summary, found));
                if measured >= USED * self.budget.max_kld {
                    break;
                }
            } else {
                let _ = std::fs::remove_file(&trial);
            }
            if predicted > 0.0 {
                scale *= (measured / predicted).clamp(0.05, 20.0);
            }
        }
        let Some((_, summary, mut outcome)) = best else { return Err(self.too_inaccurate(&rounds)) };
        outcome.rounds = rounds;
        Ok((summary, outcome))
    }

    fn options_of(&self, decisions: &Decisions, solution: &Solution) -> CompileOptions {
        let (mut formats, mut kv) = (BTreeMap::new(), self.options.kv);
        for (decision, picked) in decisions.all.iter().zip(&solution.picked) {
            match (&decision.subject, decision.alternatives[*picked].format) {
                (Subject::Weights { names, .. }, Some(format)) => {
                    formats.extend(names.iter().map(|name| (name.clone(), format)));
                }
                (Subject::Weights { .. }, None) => {}
                (Subject::Caches, format) => kv = format,
            }
        }
        let mut notes = BTreeMap::from([("max-kld".to_string(), self.budget.max_kld.to_string())]);
        if self.budget.aim == Aim::After {
            notes.insert("precision".to_string(), "after".to_string());
        }
        notes.extend(self.budget.max_memory.map(|bytes| ("max-memory".to_string(), bytes.to_string())));
        CompileOptions { formats, kv, notes, ..self.options.clone() }
    }

    fn outcome(&self, decisions: &Decisions, solution: &Solution, (predicted, measured): (f64, f64)) -> Outcome {
        let picked = || decisions.all.iter().zip(&solution.picked).map(|(d, i)| (d, &d.alternatives[*i]));
        Outcome {
            workload: self.options.traffic.unwrap_or_default().to_string(),
            kl_divergence: measured,
            kl_divergence_predicted: predicted,
            memory_bytes: decisions.fixed_bytes + picked().map(|(_, a)| a.bytes).sum::<usize>(),
            seconds: picked().map(|(_, a)| a.seconds).sum(),
            seconds_at_least: solution.bound,
            seconds_of_file: decisions.all.iter().map(|d| d.alternatives[0].seconds).sum(),
            rounds: vec![],
            formats: picked().map(|(d, a)| (d.name.clone(), named(a.format))).collect(),
        }
    }

    /// For the artifact: everything that was weighed.
    fn decided(&self, decisions: &Decisions, solution: &Solution, (predicted, measured): (f64, f64)) -> Decided {
        let of = |a: &budget::Alternative| Alternative {
            format: named(a.format),
            seconds: rounded(a.seconds),
            bytes: a.bytes,
            error: rounded(a.error),
        };
        let decision = |(d, picked): (&budget::Decision, &usize)| Decision {
            name: d.name.clone(),
            picked: *picked,
            alternatives: d.alternatives.iter().map(of).collect(),
        };
        Decided {
            max_kld: self.budget.max_kld,
            calibration: self.calibration_hash.clone(),
            max_memory: self.budget.max_memory,
            fixed_bytes: decisions.fixed_bytes,
            measured: rounded(measured),
            predicted: rounded(predicted),
            decisions: decisions.all.iter().zip(&solution.picked).map(decision).collect(),
        }
    }

    fn too_small(&self, decisions: &Decisions) -> Error {
        let least = budget::smallest(decisions, f64::INFINITY).map_or(0.0, |s| s.sum.cost);
        let least = (least + decisions.fixed_bytes as f64) / 1e6;
        let message = format!("--max-memory: weights and caches of this workload take {least:.1} MB at least");
        Error::new(Kind::Usage, message).help("allow more memory, or a workload of fewer positions")
    }

    fn too_inaccurate(&self, rounds: &[(f64, f64)]) -> Error {
        let least = rounds.iter().map(|r| r.1).fold(f64::INFINITY, f64::min);
        let within = self.budget.max_memory.map_or(String::new(), |b| format!(" within {:.1} MB", b as f64 / 1e6));
        let message = format!(
            "--max-kld: expected a KL divergence of at most {}, the least that was found{within} is {least:.6}",
            self.budget.max_kld
        );
        Error::new(Kind::Usage, message).help("allow a larger divergence, or more memory")
    }
}

/// A format, or that of the model file.
fn named(format: Option<DType>) -> String {
    format.map_or_else(|| "file".into(), |format| format.to_string())
}

fn errors(decisions: &Decisions, solution: &Solution) -> f64 {
    decisions.all.iter().zip(&solution.picked).map(|(d, i)| d.alternatives[*i].error).sum()
}

/// Bytes as a person writes them: `120MB`, `1.5GiB`, `4096`.
///
/// # Errors
/// Usage, where it is nothing of the kind.
pub fn bytes(text: &str) -> Result<u64> {
    const UNITS: [(&str, f64); 7] = [
        ("KiB", 1024.0),
        ("MiB", 1048576.0),
        ("GiB", 1073741824.0),
        ("kB", 1e3),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
    ];
    let unit = UNITS.iter().find(|(unit, _)| text.ends_with(unit));
    let figure = unit.map_or(text, |(unit, _)| text.trim_end_matches(unit)).trim();
    match figure.parse::<f64>() {
        Ok(figure) if figure.is_finite() && figure > 0.0 => Ok((figure * unit.map_or(1.0, |(_, of)| *of)) as u64),
        _ => bail!(Usage, "--max-memory: expected bytes like 120MB or 1.5GiB, found `{text}`"),
    }
}

/// A divergence as a person writes it.
///
/// # Errors
/// Usage, where it is no number above 0.
pub fn divergence_bound(text: &str) -> Result<f64> {
    match text.parse::<f64>() {
        Ok(bound) if bound.is_finite() && bound > 0.0 => Ok(bound),
        _ => bail!(Usage, "--max-kld: expected a number above 0 like 0.02, found `{text}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(bytes("120MB").unwrap(), 120_000_000);
        assert_eq!(bytes("1.5GiB").unwrap(), 1_610_612_736);
        assert_eq!(bytes("4096").unwrap(), 4096);
        for wrong in ["", "MB", "-1MB", "0", "12XB", "nan", "inf"] {
            assert_eq!(bytes(wrong).unwrap_err().kind(), Kind::Usage, "{wrong}");
            assert!(divergence_bound(wrong).is_err(), "{wrong}");
        }
        assert_eq!(divergence_bound("0.02").unwrap(), 0.02);
    }
}
