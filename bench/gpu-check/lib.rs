//! A folder that was packed elsewhere -> a report about a GPU: is what it computes right, and how fast is it?
//!
//! ```text
//!  kernels.json  single kernels on saved inputs                                         how many differ from the interpreter
//!  plan.json     goldens: artifact, tokens, logits of an independent implementation     how far off, of a deviation
//!                answers: artifact, prompt, what a CPU answers and its last logits      how many tokens agree
//!                speeds:  artifacts whose weights are made up where they run            microseconds of a step
//! ```
//!
//! What fails is an entry of the report, not its end: a GPU is seldom at hand. Times are the least of several, which a
//! neighbour can only add to.
#![forbid(unsafe_code)]

pub mod kernels;
mod right;
mod speed;

use mansard_ir::{Error, Kind, Result};
use mansard_runtime::device::{Driver, copy_bandwidth};
use mansard_runtime::{Artifact, Engine, EngineOptions, OpenOptions};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Bytes of the copy that shows the memory's bandwidth, unless the plan says otherwise.
const COPIED: usize = 1 << 30;

/// What is in the folder.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Plan {
    /// Models beside an independent implementation.
    pub goldens: Vec<right::Golden>,
    /// Models beside their own CPU code.
    pub answers: Vec<right::Answer>,
    /// What is timed.
    pub speeds: Vec<speed::Speed>,
    /// Single kernels are there.
    pub kernels: Option<bool>,
    /// Bytes that are copied for the bandwidth; none for no such figure.
    pub copied: Option<usize>,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Report {
    /// Everything.
    pub json: Value,
    /// Nothing is further off than it may be, and nothing failed.
    pub is_right: bool,
}

/// Gives the GPU that an artifact is to run on.
pub type Open<'a> = &'a mut dyn FnMut(&Artifact) -> Result<Arc<dyn Driver>>;

/// Runs all of a folder's plan; `for_kernels` gives the GPU that single kernels are to run on.
///
/// # Errors
/// Where there is no plan.
pub fn run(folder: &Path, open: Open<'_>, for_kernels: &mut dyn FnMut() -> Result<Arc<dyn Driver>>) -> Result<Report> {
    let path = folder.join("plan.json");
    let text = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let plan: Plan =
        serde_json::from_slice(&text).map_err(|e| Error::new(Kind::Input, e.to_string()).at("plan.json"))?;
    let start = Instant::now();
    let (mut device, mut bandwidth) = (Value::Null, Value::Null);
    let mut is_right = true;
    let mut entries = |name: &str, entry: &mut dyn FnMut() -> Result<(bool, Value)>| {
        eprintln!("{:6.1} s  {name}", start.elapsed().as_secs_f64());
        let (holds, mut json) = entry().unwrap_or_else(|error| (false, json!({"error": error.to_string()})));
        is_right &= holds;
        json["name"] = name.into();
        json
    };
    let mut opened = |artifact: &Path| -> Result<(Arc<Artifact>, Arc<dyn Driver>)> {
        // Hashes were checked where it was packed, and copies are checked by whoever copies.
        let options = OpenOptions { verify_weights: false };
        let artifact = Arc::new(Artifact::open(folder.join(artifact), &options)?);
        let driver = open(&artifact)?;
        let facts = driver.facts();
        device = json!({"name": facts.name, "compute_capability": facts.capability, "cuda": facts.driver,
            "multiprocessors": facts.processors, "memory_bytes": facts.memory});
        if let (true, Some(bytes)) = (bandwidth.is_null(), plan.copied) {
            let bytes = if bytes == 0 { COPIED } else { bytes };
            bandwidth = copy_bandwidth(&driver, bytes).map_or_else(|e| json!({"error": e.to_string()}), |b| json!(b));
        }
        Ok((artifact, driver))
    };
    let mut check_kernels = || match plan.kernels {
        Some(true) => kernels::check(folder, &for_kernels()?),
        _ => Ok((true, json!({"cases": 0}))),
    };
    let single = entries("kernels", &mut check_kernels);
    let goldens: Vec<Value> =
        plan.goldens.iter().map(|g| entries(&g.name, &mut || g.check(folder, &mut opened))).collect();
    let answers: Vec<Value> =
        plan.answers.iter().map(|a| entries(&a.name, &mut || a.check(folder, &mut opened))).collect();
    let speeds: Vec<Value> = plan.speeds.iter().map(|s| entries(&s.name, &mut || s.measure(&mut opened))).collect();
    let json = json!({
        "device": device,
        "copy_bytes_per_second": bandwidth,
        "kernels": single,
        "goldens": goldens,
        "answers": answers,
        "speeds": speeds,
        "seconds": start.elapsed().as_secs_f64(),
        "is_right": is_right,
    });
    Ok(Report { json, is_right })
}

/// Opens an artifact of the folder.
pub(crate) type Opened<'a> = &'a mut dyn FnMut(&Path) -> Result<(Arc<Artifact>, Arc<dyn Driver>)>;

pub(crate) fn engine(artifact: Arc<Artifact>, driver: Arc<dyn Driver>, options: &EngineOptions) -> Result<Engine> {
    Engine::on_device(artifact, options, driver, &mut |_, _| {})
}

/// The values of a NumPy file: version 1, little-endian f32, C order.
pub(crate) fn read_npy(path: &Path) -> Result<Vec<f32>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let no_array = || Error::new(Kind::Input, "expected a NumPy file of f32").at(path.display().to_string());
    let header = bytes.get(8..10).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]]))).ok_or_else(no_array)?;
    let data = bytes.get(10 + header..).ok_or_else(no_array)?;
    let (values, rest) = data.as_chunks::<4>();
    if !rest.is_empty() || !String::from_utf8_lossy(&bytes[10..10 + header]).contains("'<f4'") {
        return Err(no_array());
    }
    Ok(values.iter().map(|b| f32::from_le_bytes(*b)).collect())
}
