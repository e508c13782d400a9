//! From a model file to an artifact, stage by stage.

use crate::machine::MachineFile;
use crate::{quantize, sass, tune};
use mansard_backends as backends;
use mansard_frontend as frontend;
use mansard_ir::artifact::{Provenance, Quality};
use mansard_ir::costs::Costs;
use mansard_ir::quantize::Quantizer;
use mansard_ir::{DType, Error, Model, Result, Target, Traffic, Tuning};
use mansard_passes as passes;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What to compile and how.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// Names of the targets, in any order: the artifact holds the best first.
    pub targets: Vec<String>,
    /// GPUs that the artifact holds PTX for beside: `sm_80`, `sm_90a`.
    pub chips: Vec<String>,
    /// NVIDIA's assembler: the artifact holds machine code beside PTX (`--cubin`).
    pub assembler: Option<PathBuf>,
    /// The machine that decisions are priced on; `None`: the figures stated for the targets.
    pub machine: Option<MachineFile>,
    /// Weights as f32, whatever the file holds (`--quant none`, and before they are rounded or quantized otherwise).
    pub float_weights: bool,
    /// The format of matrices, which are rounded or quantized when packed (`--quant bf16`, `--quant int4-g64`).
    pub weights: Option<DType>,
    /// Formats of single matrices, by their names in the weight table (`--max-kld`).
    pub formats: BTreeMap<String, DType>,
    /// How weights are quantized that are not stored so; `None`: the best there is for the model.
    pub quantizer: Option<Quantizer>,
    /// A text to calibrate on; the default where there is none.
    pub calibration: Option<PathBuf>,
    /// What else the provenance is to say of how they were chosen.
    pub notes: BTreeMap<String, String>,
    /// Stored type of caches; `None` lets the precision pass choose.
    pub kv: Option<DType>,
    /// Vocabulary projections stay in one plane (`--exact-head`).
    pub exact_head: bool,
    /// No rule rewrites the program: its matrices are those of the file.
    pub as_written: bool,
    /// Programs and kernels are chosen together, or one after the other (`--search`).
    pub strategy: passes::Strategy,
    /// A matrix may be packed in several forms (`--copies`).
    pub copies: bool,
    /// Bounds of a step.
    pub limits: passes::LimitsRequest,
    /// The workload that decisions are priced on.
    pub traffic: Option<Traffic>,
    /// Makes the weights up, from this seed, for a `config.json` alone.
    pub synthetic_seed: Option<u64>,
    /// They are not written: whoever opens the artifact makes them up.
    pub weights_at_open: bool,
    /// Choices of an earlier measurement.
    pub tuning: Tuning,
    /// What kernels were measured to take, as multiples of predictions.
    pub costs: Costs,
    /// Time what may be chosen on this machine, and choose by that.
    pub tune: bool,
    /// Threads of the compilation.
    pub threads: usize,
}

impl Default for CompileOptions {
    fn default() -> CompileOptions {
        CompileOptions {
            targets: vec!["native".into()],
            chips: vec![],
            assembler: None,
            machine: None,
            float_weights: false,
            weights: None,
            formats: BTreeMap::new(),
            quantizer: Some(Quantizer::Nearest),
            calibration: None,
            notes: BTreeMap::new(),
            kv: None,
            exact_head: false,
            as_written: false,
            strategy: passes::Strategy::default(),
            copies: false,
            limits: passes::LimitsRequest::default(),
            traffic: None,
            synthetic_seed: None,
            weights_at_open: false,
            tuning: Tuning::default(),
            costs: Costs::default(),
            tune: false,
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        }
    }
}

impl CompileOptions {
    /// What prices are multiplied by: what was measured for this model, else what the machine file says.
    pub fn costs(&self) -> &Costs {
        let of_machine = self.machine.as_ref().map(|file| &file.table.costs);
        of_machine.filter(|_| self.costs.is_empty()).unwrap_or(&self.costs)
    }
}

/// Hears how far a compilation is.
pub trait Progress {
    /// A stage begins; `total` counts its units (0: unknown).
    fn stage(&mut self, name: &'static str, total: usize);
    /// Units done.
    fn advance(&mut self, done: usize);
}

/// Hears nothing.
pub struct Quiet;

impl Progress for Quiet {
    fn stage(&mut self, _: &'static str, _: usize) {}
    fn advance(&mut self, _: usize) {}
}

/// What a compilation came to.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Name and time of each stage, in order.
    pub stages: Vec<(&'static str, Duration)>,
    /// Size of the artifact.
    pub artifact_bytes: usize,
    /// Size of the packed weights.
    pub weight_bytes: usize,
    /// Size of the machine code of all targets.
    pub code_bytes: usize,
    /// Distinct kernels.
    pub kernels: usize,
    /// How the passes went.
    pub passes: passes::Report,
    /// Choices that were taken instead of the formulas'.
    pub tuning: Tuning,
    /// Choices that were given, but are for no kernel of this artifact.
    pub unused: Tuning,
    /// What the artifact was measured to do, where that was asked for.
    pub quality: Option<Quality>,
}

/// Opens the model file at `path`.
///
/// # Errors
/// As [`frontend::open`].
pub fn import(path: &Path, options: &CompileOptions) -> Result<Model> {
    let options = frontend::Options { float_weights: options.float_weights, synthetic_seed: options.synthetic_seed };
    frontend::open(path, &options)
}

/// Every weight and cache in f32.
pub fn reference_options(options: &CompileOptions) -> CompileOptions {
    let kv = Some(DType::F32);
    let quantizer = Some(Quantizer::Nearest);
    CompileOptions { float_weights: true, weights: None, formats: BTreeMap::new(), quantizer, kv, ..options.clone() }
}

/// The options of the passes for one target.
pub fn pass_options(mut target: Target, options: &CompileOptions) -> passes::Options {
    if let Some(file) = &options.machine {
        target.machine = file.table.whole();
    }
    let CompileOptions { kv, weights, exact_head, strategy, copies, limits, traffic, quantizer, .. } = *options;
    let quantizer = quantizer.unwrap_or_default();
    let (formats, costs) = (options.formats.clone(), options.costs().clone());
    let first = if options.as_written { 0 } else { usize::MAX };
    let rules = passes::rules::RuleSet { first, ..Default::default() };
    let fresh = passes::Options { rules, ..passes::Options::new(target) };
    passes::Options { costs, kv, weights, formats, quantizer, exact_head, strategy, copies, limits, traffic, ..fresh }
}

/// Imports, plans and generates code for every target, and writes the artifact at `output`.
///
/// # Errors
/// Whatever a stage says; nothing is left under `output` then.
pub fn compile(
    input: &Path,
    output: &Path,
    options: &CompileOptions,
    progress: &mut dyn Progress,
    hooks: &mut passes::Hooks<'_>,
) -> Result<Summary> {
    let mut stages = Stages::new(progress);
    stages.begin("import", 0);
    let targets = if options.targets.is_empty() { vec![] } else { backends::targets(&options.targets)? };
    // There is one program, whatever the number of images: it must suit them all.
    let common = Target::common(&options.planned_for()?)?;
    let model = import(input, options)?;
    let sources = sources(input)?;
    stages.begin("optimize", 0);
    let quantizer = quantize::choose(&model, options)?;
    let options = &CompileOptions { quantizer: Some(quantizer), ..options.clone() };
    let calibrated_on = quantize::calibrated_on(quantizer, options)?;
    let pass_options = passes::Options { calibrated_on, ..pass_options(common, options) };
    let (plan, mut model, report) = passes::compile(model, &pass_options, hooks)?;
    let (mut tuning, unused) = options.tuning.clone().known(&plan.kernels, &targets);
    if options.tune {
        let subject = tune::Subject { plan: &plan, model: &model, threads: options.threads, output };
        stages.begin("tune", 0);
        tuning = tune::tune(&subject, &targets, stages.progress)?;
    }
    let mut images = vec![];
    stages.begin("generate code", plan.kernels.len() * targets.len());
    for (index, target) in targets.iter().enumerate() {
        let before = index * plan.kernels.len();
        let mut advance = |done, _| stages.progress.advance(before + done);
        images.push((target.clone(), backends::compile(&plan, target, &tuning, options.threads, &mut advance)?));
    }
    let mut ptx = vec![];
    if !options.chips.is_empty() {
        stages.begin("generate PTX", options.chips.len());
    }
    for (index, chip) in options.chips.iter().enumerate() {
        let mut code = backends::cuda::ptx::compile(&plan.kernels, chip)?;
        if let Some(ptxas) = &options.assembler {
            code.cubin = Some(sass::assembled(ptxas, &code.text, chip)?);
        }
        ptx.push((chip.clone(), code));
        stages.progress.advance(index + 1);
    }
    stages.begin("quantize", 0);
    quantize::quantize(&mut model, input, options, quantizer, stages.progress)?;
    let provenance = Provenance {
        version: env!("CARGO_PKG_VERSION").into(),
        sources,
        passes: passes::PIPELINE.iter().map(|p| p.to_string()).collect(),
        options: options.recorded(&targets),
        approximations: report.approximations.clone(),
        tuning,
        costs: options.costs().clone(),
        decided: None,
        derivations: report.derivations.clone(),
        quality: None,
    };
    let contents = backends::artifact::Contents {
        plan: &plan,
        info: &model.info,
        weights: &model.weights,
        images: &images,
        ptx: &ptx,
        synthetic: options.synthetic_seed.filter(|_| options.weights_at_open),
        provenance: &provenance,
    };
    stages.begin("pack weights", plan.program.weights.iter().map(|w| w.bytes).sum());
    let written =
        backends::artifact::write(output, &contents, options.threads, &mut |done, _| stages.progress.advance(done))?;
    Ok(Summary {
        stages: stages.end(),
        artifact_bytes: written.bytes,
        weight_bytes: plan.program.weights.iter().map(|w| w.bytes).sum(),
        code_bytes: images.iter().map(|(_, image)| image.bytes.len()).sum(),
        kernels: plan.kernels.len(),
        passes: report,
        tuning: provenance.tuning,
        unused,
        quality: None,
    })
}

impl CompileOptions {
    /// What the program is planned for: the CPUs, whose program GPUs run as it is; the GPUs where there are no others.
    ///
    /// # Errors
    /// Where a name is unknown, or given twice.
    pub fn planned_for(&self) -> Result<Vec<Target>> {
        if self.targets.is_empty() {
            return self.chips.iter().map(|chip| backends::cuda::ptx::target(chip)).collect();
        }
        backends::targets(&self.targets)
    }

    /// What shaped the result, for the provenance.
    fn recorded(&self, targets: &[Target]) -> BTreeMap<String, String> {
        let quant = match self.weights {
            Some(dtype) => dtype.to_string(),
            None => if self.float_weights { "none" } else { "file" }.to_string(),
        };
        let mut options = BTreeMap::from([
            ("quant".to_string(), quant),
            ("target".to_string(), targets.iter().map(|t| t.name.as_str()).collect::<Vec<_>>().join(",")),
        ]);
        if let Some(quantizer) = self.quantizer.filter(|q| *q != Quantizer::Nearest) {
            options.insert("quantizer".into(), quantizer.to_string());
        }
        options.extend(self.notes.clone());
        if let Some(file) = &self.machine {
            options.insert("machine".into(), file.provenance());
        }
        if !self.chips.is_empty() {
            options.insert("ptx".into(), self.chips.join(","));
        }
        if let Some(kv) = self.kv {
            options.insert("kv".into(), kv.to_string());
        }
        if self.exact_head {
            options.insert("exact-head".into(), "true".into());
        }
        if self.strategy == passes::Strategy::Fixed {
            options.insert("search".into(), "fixed".into());
        }
        if self.copies {
            options.insert("copies".into(), "true".into());
        }
        if let Some(context) = self.limits.context {
            options.insert("context".into(), context.to_string());
        }
        if let Some(traffic) = self.traffic {
            options.insert("workload".into(), traffic.to_string());
        }
        if let Some(seed) = self.synthetic_seed {
            options.insert("synthetic-weights".into(), seed.to_string());
            if self.weights_at_open {
                options.insert("weights-at-open".into(), "true".into());
            }
        }
        options
    }
}

/// Name and hash of the files that decide a model: the file itself, or a checkpoint's configuration and weights.
pub(crate) fn sources(input: &Path) -> Result<Vec<(String, String)>> {
    let mut files = vec![input.to_owned()];
    if input.is_dir() {
        let entries = std::fs::read_dir(input).map_err(|e| Error::io(input, e))?;
        let decides = |p: &PathBuf| p.extension().is_some_and(|e| e == "json" || e == "safetensors" || e == "jinja");
        files = entries.flatten().map(|e| e.path()).filter(decides).collect();
        files.sort();
    }
    let hash = |path: PathBuf| {
        // Read, not mapped: pages that are only hashed should not count as memory in use.
        let file = std::fs::File::open(&path).map_err(|e| Error::io(&path, e))?;
        let hash = blake3::Hasher::new().update_reader(file).map_err(|e| Error::io(&path, e))?.finalize();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Ok((name, hash.to_hex().to_string()))
    };
    files.into_iter().map(hash).collect()
}

/// Times stages as they follow each other.
struct Stages<'a> {
    progress: &'a mut dyn Progress,
    done: Vec<(&'static str, Duration)>,
    running: Option<(&'static str, Instant)>,
}

impl<'a> Stages<'a> {
    fn new(progress: &'a mut dyn Progress) -> Stages<'a> {
        Stages { progress, done: vec![], running: None }
    }

    fn begin(&mut self, name: &'static str, total: usize) {
        self.close();
        self.running = Some((name, Instant::now()));
        self.progress.stage(name, total);
    }

    fn close(&mut self) {
        self.done.extend(self.running.take().map(|(name, start)| (name, start.elapsed())));
    }

    fn end(mut self) -> Vec<(&'static str, Duration)> {
        self.close();
        self.done
    }
}
