//! Measured rows -> a Markdown table, JSON or CSV.
//!
//! Every row has the same fields, so that a reader needs no cases:
//!
//! | field | |
//! |---|---|
//! | `test` | `pp512`, `tg128 b8 @ d2048` |
//! | `tokens`, `batch`, `depth`, `threads` | tokens of each sequence, sequences, tokens in each cache before, workers |
//! | `tokens_per_second`, `stddev` | of all sequences together; mean and spread over the repetitions |
//! | `milliseconds` | of the whole prefill; of a decoded token of every sequence |
//! | `roofline_share`, `bandwidth`, `peaks` | of the least time; the bytes per second measured for it, and where its peaks come from |
//! | `device`, `stated_bandwidth` | `cpu`, or the GPU's name and the bytes per second stated for it, else null |
//! | `open_milliseconds` | from the file's name to an engine that could run |
//! | `kl_divergence` | of the artifact from the model of `--against`, else null |

use super::roof::Roof;
use super::steps::{Kind, Test};
use crate::report;
use mansard_ir::Result;
use mansard_runtime::Model;
use serde_json::{Value, json};

/// One measured test.
pub struct Row {
    /// Which.
    pub test: Test,
    /// Tokens per second of every repetition.
    pub speeds: Vec<f64>,
    /// The least seconds of the whole test.
    pub least: f64,
}

/// The rows of an engine with some number of threads.
pub struct Group {
    /// Workers.
    pub threads: usize,
    /// What the shares are of.
    pub roof: Roof,
    /// In the order measured.
    pub rows: Vec<Row>,
    /// Milliseconds of every opening.
    pub opening: Vec<f64>,
}

/// How rows are printed.
#[derive(Clone, Copy, clap::ValueEnum)]
#[allow(missing_docs)]
pub enum Form {
    Md,
    Json,
    Csv,
}

impl Row {
    /// Of all tokens over their least time.
    fn share(&self) -> f64 {
        mean(&self.speeds) * self.least / self.test.tokens() as f64
    }

    /// Of the whole prefill; of one step in decoding.
    fn milliseconds(&self) -> f64 {
        let steps = if self.test.kind == Kind::Prefill { 1 } else { self.test.count };
        1e3 * self.test.tokens() as f64 / mean(&self.speeds) / steps as f64
    }

    fn fields(&self, group: &Group, divergence: Option<f64>) -> [(&'static str, Value); 15] {
        [
            ("test", self.test.name().into()),
            ("tokens", self.test.count.into()),
            ("batch", self.test.batch.into()),
            ("depth", self.test.depth.into()),
            ("threads", group.threads.into()),
            ("tokens_per_second", mean(&self.speeds).into()),
            ("stddev", stddev(&self.speeds).into()),
            ("milliseconds", self.milliseconds().into()),
            ("roofline_share", self.share().into()),
            ("bandwidth", group.roof.machine.bandwidth.into()),
            ("peaks", group.roof.peaks.as_str().into()),
            ("device", group.roof.device.as_str().into()),
            ("stated_bandwidth", json!(group.roof.stated)),
            ("open_milliseconds", mean(&group.opening).into()),
            ("kl_divergence", json!(divergence)),
        ]
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Of a sample: over one value less than there are.
fn stddev(values: &[f64]) -> f64 {
    let (mean, n) = (mean(values), values.len());
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    if n < 2 { 0.0 } else { (squares / (n - 1) as f64).sqrt() }
}

/// The report.
///
/// # Errors
/// None that is expected.
pub fn text(model: &Model, groups: &[Group], divergence: Option<f64>, form: Form) -> Result<String> {
    let rows = groups.iter().flat_map(|group| group.rows.iter().map(move |row| row.fields(group, divergence)));
    match form {
        Form::Md => Ok(markdown(model, groups, divergence)),
        Form::Json => {
            let objects = rows.map(|fields| fields.into_iter().map(|(k, v)| (k.to_string(), v)).collect());
            report::json(&objects.collect::<Vec<serde_json::Map<String, Value>>>())
        }
        Form::Csv => Ok(csv(rows.map(Vec::from))),
    }
}

/// Rows of the same fields under their names.
pub fn csv(rows: impl Iterator<Item = Vec<(&'static str, Value)>>) -> String {
    let line = |cells: Vec<String>| cells.join(",") + "\n";
    let (mut head, mut lines) = (String::new(), String::new());
    for fields in rows {
        head = line(fields.iter().map(|(name, _)| name.to_string()).collect());
        lines += &line(fields.iter().map(|(_, value)| cell(value)).collect());
    }
    head + &lines
}

/// A value of a CSV file; nothing for null.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) if text.contains([',', '"', '\n']) => format!("\"{}\"", text.replace('"', "\"\"")),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn markdown(model: &Model, groups: &[Group], divergence: Option<f64>) -> String {
    let path = model.artifact().path();
    let stem = path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned());
    let size = report::bytes(model.artifact().file_bytes());
    let (title, rule) = if divergence.is_some() { (" KL divergence |", "---:|") } else { ("", "") };
    let last = divergence.map_or_else(String::new, |kl| format!(" {kl:.5} |"));
    let mut out = format!(
        "| model | size | threads | test | tokens/s | ms | of roofline |{title}\n|---|---:|---:|---:|---:|---:|---:|{rule}\n"
    );
    let figure = |values: &[f64]| format!("{:.2} ± {:.2}", mean(values), stddev(values));
    for group in groups {
        let threads = group.threads;
        for row in &group.rows {
            let (name, speed, share) = (row.test.name(), figure(&row.speeds), row.share() * 100.0);
            let ms = row.milliseconds();
            out += &format!("| {stem} | {size} | {threads} | {name} | {speed} | {ms:.2} | {share:.0}% |{last}\n");
        }
        out += &format!("| {stem} | {size} | {threads} | open | | {} | |{last}\n", figure(&group.opening));
    }
    out + "\n" + &groups.iter().map(|group| group.roof.rates()).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_that_of_a_sample() {
        let values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0];
        assert_eq!(mean(&values), 5.0);
        assert!((stddev(&values) - (32.0f64 / 7.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn times_are_of_a_prefill_and_of_a_token_of_each_sequence() {
        let row = |kind| Row { test: Test { kind, count: 64, batch: 8, depth: 0 }, speeds: vec![512.0], least: 0.25 };
        assert_eq!((row(Kind::Prefill).milliseconds(), row(Kind::Decode).milliseconds()), (1000.0, 1000.0 / 64.0));
        assert_eq!(row(Kind::Decode).share(), 0.25);
    }

    #[test]
    fn cells_with_commas_are_quoted() {
        assert_eq!(
            [json!("a b"), json!("a,\"b\""), json!(2.5), json!(null)].map(|v| cell(&v)),
            ["a b", "\"a,\"\"b\"\"\"", "2.5", ""]
        );
    }
}
