//! `mansard compile`: a model file becomes an artifact, or any layer of it becomes text.

use crate::{costs, eval, report};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use mansard::budget::{self, Budget, Outcome};
use mansard::driver::{self, CompileOptions, Progress, Summary};
use mansard::machine::MachineFile;
use mansard::sass;
use mansard_backends::cuda::ptx::{self, CHIPS};
use mansard_backends::{self as backends, Layer};
use mansard_ir::artifact::Provenance;
use mansard_ir::artifact::Quality;
use mansard_ir::quantize::{QUANTIZERS, Quantizer};
use mansard_ir::text::{print_model, print_plan};
use mansard_ir::{DType, Result, Stage, Tuning, bail};
use mansard_passes::{self as passes, Event, Hooks, State};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Compile a model file (GGUF, or safetensors with config.json) into an artifact
#[derive(clap::Args)]
pub struct Arguments {
    /// A GGUF file, or a directory with config.json and safetensors
    model: PathBuf,
    /// Where the artifact (or what --emit names) goes
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Show one layer instead of writing an artifact
    #[arg(long, value_name = "LAYER")]
    emit: Option<Emit>,
    #[command(flatten)]
    choices: Choices,
    /// Choose formats of weights and caches: the fastest whose mean KL divergence from the model in f32 is measured at most
    /// this, in nats
    #[arg(long, value_name = "NATS", conflicts_with_all = ["quant", "emit", "stop_after", "dump_after", "tune", "tuning"])]
    max_kld: Option<String>,
    /// With --max-kld: most memory of weights and of the workload's caches, like 120MB
    #[arg(long, value_name = "BYTES", requires = "max_kld")]
    max_memory: Option<String>,
    /// With --max-kld: formats that take the least predicted time, or, for comparison, the fewest bytes whatever the time
    #[arg(long, value_name = "AIM", default_value = "joint", requires = "max_kld")]
    precision: budget::Aim,
    /// Store machine code for the GPUs of --target beside their PTX; needs NVIDIA's ptxas
    #[arg(long, conflicts_with_all = ["emit", "stop_after"])]
    cubin: bool,
    /// Time tile shapes on this machine and choose by that
    #[arg(long, conflicts_with_all = ["emit", "stop_after", "tuning"])]
    tune: bool,
    /// Choose as --tune did for another artifact: that artifact, or what `mansard inspect --tuning` says of it
    #[arg(long, value_name = "FILE")]
    tuning: Option<PathBuf>,
    /// Time kernels on this machine, and choose them again by that
    #[arg(long, conflicts_with_all = ["emit", "stop_after", "costs"])]
    calibrate_cost: bool,
    /// Choose by what --calibrate-cost measured for another artifact: that artifact, or what `mansard inspect --costs` says of it
    #[arg(long, value_name = "FILE")]
    costs: Option<PathBuf>,
    /// Evaluate the artifact beside the model in exact floats, and store perplexity, KL divergence and top-1 agreement in it
    /// [default text: some prose that ships with the compiler]
    #[arg(long, value_name = "TEXT", num_args = 0..=1, require_equals = true, conflicts_with_all = ["emit", "stop_after"])]
    evaluate: Option<Option<PathBuf>>,
    /// Show the program after this pass
    #[arg(long, value_name = "PASS")]
    dump_after: Vec<String>,
    /// Stop after this pass and show the program
    #[arg(long, value_name = "PASS", conflicts_with = "emit")]
    stop_after: Option<String>,
    /// Show what each pass did and how long it took
    #[arg(long)]
    time_passes: bool,
    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// What shapes a program; shared with `opt`.
#[derive(clap::Args)]
pub struct Choices {
    /// Formats of matrices: the file's own, f32 (`none`), or what they are rounded or quantized to
    #[arg(long, value_name = "FORMATS", default_value = "file")]
    quant: Quant,
    /// How weights become integers: to nearest, or chosen by what they are multiplied with on a calibration text; auto is gptq
    /// for formats of less than 8 bits where the model has a tokenizer, else nearest
    #[arg(long, value_name = "QUANTIZER", default_value = "auto")]
    quantizer: String,
    /// A text to calibrate on, for --quantizer and --max-kld [default: some prose that ships with the compiler]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// What the machine code is for: native, x86-64-v3, x86-64-v3+avxvnni, x86-64-v4, aarch64+dotprod or aarch64+i8mm;
    /// several make one artifact that runs the best one a machine can; sm_80 and sm_90a add PTX for GPUs
    #[arg(long, value_name = "TARGET", default_value = "native", value_delimiter = ',')]
    target: Vec<String>,
    /// Price decisions on this machine file, or on what `mansard probe` stored here (`local`) [default: figures stated for
    /// the target]
    #[arg(long, value_name = "FILE")]
    machine: Option<String>,
    /// How caches store keys and values; auto is f16 with quantized weights, else f32
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    kv: Kv,
    /// Read the whole vocabulary projection for every token, not 4 of its 8 bits where those decide
    #[arg(long)]
    exact_head: bool,
    /// How programs and kernels are chosen: together, or one after the other, for comparison
    #[arg(long, value_name = "HOW", default_value = "joint")]
    search: Search,
    /// Pack a matrix in several forms where steps of few and of many tokens want different ones: faster, more memory
    #[arg(long)]
    copies: bool,
    /// What decisions are priced on: tokens of a prompt, tokens generated after it, sequences side by side, and positions
    /// before the prompt, as in prompt=512,generate=128,batch=1,context=0
    #[arg(long, value_name = "WORKLOAD")]
    workload: Option<String>,
    /// Longest sequence [default: the model's]
    #[arg(long, value_name = "POSITIONS")]
    context: Option<usize>,
    /// Most new tokens of a step
    #[arg(long, value_name = "TOKENS")]
    step_tokens: Option<usize>,
    /// Make up the weights of a config.json, from a seed
    #[arg(long, value_name = "SEED", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    synthetic_weights: Option<u64>,
    /// Write no such weights: whoever opens the artifact makes them, a GPU its own. So a model of any size can be timed
    #[arg(long, requires = "synthetic_weights")]
    weights_at_open: bool,
    /// Threads of the compilation [default: all]
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Quant {
    /// As the file stores them
    File,
    /// f32
    None,
    /// Rounded
    Bf16,
    /// Rounded
    F16,
    /// 8 bits, one scale per 32
    #[value(alias = "q8_0")]
    Int8,
    /// 4 bits, one scale per 32; like the rest of the 4- and 5-bit formats, with the vocabulary's matrices in int8
    #[value(name = "int4-g32", alias = "q4_0")]
    Int4G32,
    /// 4 bits, one scale per 64
    #[value(name = "int4-g64")]
    Int4G64,
    /// 4 bits, one scale per 128
    #[value(name = "int4-g128")]
    Int4G128,
    /// 4 bits, scale and minimum per 32
    #[value(name = "q4_1")]
    Q4_1,
    /// 5 bits, one scale per 32
    #[value(name = "q5_0")]
    Q5_0,
    /// 5 bits, scale and minimum per 32
    #[value(name = "q5_1")]
    Q5_1,
    /// 4 bits, 6-bit scale and minimum per 32
    #[value(name = "q4_k")]
    Q4K,
    /// 5 bits, 6-bit scale and minimum per 32
    #[value(name = "q5_k")]
    Q5K,
    /// 6 bits, 8-bit scale per 16
    #[value(name = "q6_k")]
    Q6K,
    /// 8-bit floats (e4m3), one scale per 128, or per 32 where rows do not fill 128; the vocabulary's matrices in int8
    Fp8,
    /// 4-bit floats, a power of two per 32
    Mxfp4,
    /// 4-bit floats, an 8-bit float per 16 and an f32 per row
    Nvfp4,
}

impl Quant {
    /// What matrices are rounded or quantized to.
    fn weights(self) -> Option<DType> {
        match self {
            Quant::File | Quant::None => None,
            Quant::Bf16 => Some(DType::BF16),
            Quant::F16 => Some(DType::F16),
            Quant::Int8 => Some(DType::Q8_0),
            Quant::Int4G32 => Some(DType::Q4_0),
            Quant::Int4G64 => Some(DType::INT4_G64),
            Quant::Int4G128 => Some(DType::INT4_G128),
            Quant::Q4_1 => Some(DType::Q4_1),
            Quant::Q5_0 => Some(DType::Q5_0),
            Quant::Q5_1 => Some(DType::Q5_1),
            Quant::Q4K => Some(DType::Q4_K),
            Quant::Q5K => Some(DType::Q5_K),
            Quant::Q6K => Some(DType::Q6_K),
            Quant::Fp8 => Some(DType::E4M3_G128),
            Quant::Mxfp4 => Some(DType::MXFP4),
            Quant::Nvfp4 => Some(DType::NVFP4),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Search {
    /// The cheapest kernels of any equal program
    Joint,
    /// The program that is cheapest node by node, then its largest legal kernels
    Fixed,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kv {
    Auto,
    F16,
    #[value(alias = "i8")]
    Int8,
    F32,
    Bf16,
    Fp8,
    #[value(alias = "i4")]
    Int4,
}

/// Layers in the order they are made.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Emit {
    Graph,
    Canonical,
    Optimized,
    Plan,
    Mlir,
    Llvm,
    Asm,
    Object,
    /// Of a GPU: what its driver assembles
    Ptx,
    /// Of a GPU: its machine code, with NVIDIA's ptxas and nvdisasm
    Sass,
}

impl Choices {
    /// As the driver takes them.
    ///
    /// # Errors
    /// Where a value is none of those there are.
    pub fn options(&self) -> Result<CompileOptions> {
        if let Some(chip) = CHIPS.iter().find(|chip| self.target.iter().filter(|name| name == *chip).count() > 1) {
            bail!(Usage, "expected each target once, found `{chip}` twice");
        }
        let is_chip = |name: &&String| CHIPS.contains(&name.as_str());
        let mut options = CompileOptions {
            targets: self.target.iter().filter(|name| !is_chip(name)).cloned().collect(),
            chips: CHIPS
                .iter()
                .filter(|chip| self.target.iter().any(|name| name == *chip))
                .map(|c| c.to_string())
                .collect(),
            machine: self.machine.as_deref().map(MachineFile::named).transpose()?,
            float_weights: !matches!(self.quant, Quant::File),
            weights: self.quant.weights(),
            traffic: self.workload.as_deref().map(str::parse).transpose()?,
            synthetic_seed: self.synthetic_weights,
            weights_at_open: self.weights_at_open,
            exact_head: self.exact_head,
            quantizer: quantizer(&self.quantizer)?,
            calibration: self.calibration.clone(),
            strategy: match self.search {
                Search::Joint => passes::Strategy::Joint,
                Search::Fixed => passes::Strategy::Fixed,
            },
            copies: self.copies,
            ..CompileOptions::default()
        };
        if let Some(machine) = &options.machine {
            machine.suits(&options.planned_for()?)?;
        }
        options.kv = match self.kv {
            Kv::Auto => None,
            Kv::F16 => Some(DType::F16),
            Kv::Int8 => Some(DType::I8),
            Kv::F32 => Some(DType::F32),
            Kv::Bf16 => Some(DType::BF16),
            Kv::Fp8 => Some(DType::FP8),
            Kv::Int4 => Some(DType::I4),
        };
        if let Some(threads) = self.threads {
            options.threads = threads;
        }
        options.limits.context = self.context;
        if let Some(tokens) = self.step_tokens {
            options.limits.tokens = tokens;
        }
        let figures =
            [("--threads", Some(options.threads)), ("--context", self.context), ("--step-tokens", self.step_tokens)];
        if let Some((name, _)) = figures.iter().find(|(_, figure)| *figure == Some(0)) {
            bail!(Usage, "{name}: expected at least 1, found 0");
        }
        Ok(options)
    }
}

/// The quantizer of that name; `None`: the best for the model.
fn quantizer(name: &str) -> Result<Option<Quantizer>> {
    let known = Quantizer::parse(name);
    if known.is_none() && name != "auto" {
        let names: Vec<&str> = QUANTIZERS.iter().map(|row| row.name).collect();
        bail!(Usage, "--quantizer: expected auto or one of {}, found `{name}`", names.join(", "));
    }
    Ok(known)
}

/// Runs the command.
///
/// # Errors
/// Whatever a stage says.
pub fn run(arguments: &Arguments) -> Result<()> {
    let mut options = arguments.choices.options()?;
    options.tune = arguments.tune;
    if arguments.cubin {
        if options.chips.is_empty() {
            bail!(Usage, "--cubin is for GPUs: expected --target with {}", CHIPS.join(" or "));
        }
        options.assembler = Some(sass::assembler()?);
    }
    if let Some(path) = &arguments.tuning {
        options.tuning = tuning(path)?;
    }
    if let Some(path) = &arguments.costs {
        options.costs = costs::read(path)?;
    }
    let mut dumped = Ok(());
    let mut sink = |event: Event<'_>| {
        if let Event::Dump(pass, state) = event
            && dumped.is_ok()
        {
            dumped = report::print(format!("# after {}\n{}", pass.name, text(state)));
        }
    };
    let mut hooks = Hooks::new(&mut sink);
    hooks.dump_after = arguments.dump_after.clone();
    hooks.stop_after = arguments.stop_after.clone();
    hooks.reproducer = Some(PathBuf::from("mansard-reproducer.mir"));
    if arguments.emit.is_some() || arguments.stop_after.is_some() {
        show(arguments, &options, &mut hooks)?;
        return dumped;
    }
    let runs =
        arguments.tune || arguments.calibrate_cost || arguments.max_kld.is_some() || arguments.evaluate.is_some();
    if options.targets.is_empty() && runs {
        let names = "--tune, --calibrate-cost, --max-kld and --evaluate";
        bail!(Usage, "{names} run code of this CPU: name one too, as in --target native,sm_90a");
    }
    let Some(output) = &arguments.output else {
        bail!(Usage, "expected where the artifact goes: -o model.mansard");
    };
    let mut progress = Bar::default();
    if arguments.calibrate_cost {
        options.costs = costs::measure(&arguments.model, output, &options, &mut progress)?;
    }
    let summary = match arguments.budget()? {
        Some(budget) => budget::compile(&arguments.model, output, &options, &budget, &mut progress, &mut hooks)
            .map(|(summary, outcome)| (summary, Some(outcome))),
        None => driver::compile(&arguments.model, output, &options, &mut progress, &mut hooks).map(|s| (s, None)),
    };
    progress.clear();
    let (mut summary, outcome) = summary?;
    dumped?;
    if let Some(text) = &arguments.evaluate {
        let quality = eval::card(output, text.as_deref(), &arguments.model)?;
        summary.quality = Some(quality.clone());
        backends::artifact::amend(output, |manifest| manifest.provenance.quality = Some(quality))?;
    }
    if arguments.time_passes {
        eprint!("{}", summary.passes.times());
    }
    if arguments.json {
        let mut json = json_of(&summary);
        if let Some(outcome) = &outcome {
            json["budget"] = json!(outcome);
        }
        return report::print(report::json(&json)?);
    }
    if arguments.calibrate_cost {
        report::print(costs::table(&options.costs))?;
    }
    report::print(closing_table(&summary) + &outcome.map_or(String::new(), |outcome| outcome_table(&outcome)))
}

impl Arguments {
    fn budget(&self) -> Result<Option<Budget>> {
        let Some(bound) = &self.max_kld else { return Ok(None) };
        Ok(Some(Budget {
            max_kld: budget::divergence_bound(bound)?,
            max_memory: self.max_memory.as_deref().map(budget::bytes).transpose()?,
            aim: self.precision,
        }))
    }
}

/// What was chosen under a budget.
fn outcome_table(outcome: &Outcome) -> String {
    let ms = |seconds: f64| format!("{:.1} ms", 1e3 * seconds);
    let mut rows: Vec<Vec<String>> = outcome.formats.iter().map(|(d, f)| vec![d.clone(), f.clone()]).collect();
    rows.push(vec!["workload".into(), outcome.workload.clone()]);
    rows.push(vec!["KL divergence, measured".into(), format!("{:.5}", outcome.kl_divergence)]);
    rows.push(vec!["KL divergence, predicted".into(), format!("{:.5}", outcome.kl_divergence_predicted)]);
    rows.push(vec!["rounds".into(), outcome.rounds.len().to_string()]);
    rows.push(vec!["weights and caches".into(), report::bytes(outcome.memory_bytes)]);
    rows.push(vec!["predicted time".into(), ms(outcome.seconds)]);
    rows.push(vec!["with the file's formats".into(), ms(outcome.seconds_of_file)]);
    report::table(&rows)
}

/// The choices in an artifact, or in JSON.
fn tuning(path: &Path) -> Result<Tuning> {
    let checked = |from: &Provenance| from.tuning.check().map(|()| from.tuning.clone());
    report::json_or_artifact(path, b'{', Tuning::from_json, checked)
}

/// `--emit` and `--stop-after`.
fn show(arguments: &Arguments, options: &CompileOptions, hooks: &mut Hooks<'_>) -> Result<()> {
    let targets = options.planned_for()?;
    let [target] = &targets[..] else {
        bail!(Usage, "--emit: expected one target, found {}", options.targets.len() + options.chips.len());
    };
    if options.chips.is_empty() && matches!(arguments.emit, Some(Emit::Ptx | Emit::Sass)) {
        bail!(Usage, "--emit ptx and sass are for GPUs: expected --target {}", CHIPS.join(" or "));
    }
    let state = State::new(driver::import(&arguments.model, options)?);
    let last = match arguments.emit {
        Some(Emit::Graph) => None,
        Some(Emit::Canonical) => Some(Stage::Canonical),
        Some(Emit::Optimized) => Some(Stage::Optimized),
        _ => Some(Stage::Planned),
    };
    let names: Vec<&str> = passes::PIPELINE
        .iter()
        .copied()
        .take_while(|name| last.is_some_and(|last| passes::pass(name).is_ok_and(|pass| pass.to <= last)))
        .collect();
    let (state, ran) = passes::manager::run(&names, state, &driver::pass_options(target.clone(), options), hooks)?;
    if arguments.time_passes {
        eprint!("{}", ran.times());
    }
    let layer = match arguments.emit {
        Some(Emit::Mlir) => Some(Layer::Mlir),
        Some(Emit::Llvm) => Some(Layer::Llvm),
        Some(Emit::Asm | Emit::Ptx | Emit::Sass) => Some(Layer::Asm),
        Some(Emit::Object) => Some(Layer::Object),
        _ => None,
    };
    let bytes = match (layer, &state.plan) {
        (Some(layer), Some(plan)) if !options.chips.is_empty() => {
            let bytes = ptx::show(&plan.kernels, &target.name, layer)?;
            if arguments.emit == Some(Emit::Sass) { sass::disassembled(&bytes, &target.name)? } else { bytes }
        }
        (Some(layer), Some(plan)) => backends::emit(plan, target, &options.tuning, layer)?,
        _ => text(&state).into_bytes(),
    };
    report::deliver(arguments.output.as_deref(), &bytes)
}

/// A program as text, at whatever stage it is.
pub fn text(state: &State) -> String {
    match &state.plan {
        Some(plan) => print_plan(plan),
        None => print_model(&state.model),
    }
}

fn closing_table(summary: &Summary) -> String {
    let seconds = |s: f64| format!("{s:.2} s");
    let mut rows: Vec<Vec<String>> =
        summary.stages.iter().map(|(stage, time)| vec![stage.to_string(), seconds(time.as_secs_f64())]).collect();
    rows.push(vec!["all".into(), seconds(summary.stages.iter().map(|(_, t)| t.as_secs_f64()).sum())]);
    rows.push(vec!["artifact".into(), report::bytes(summary.artifact_bytes)]);
    rows.push(vec!["weights".into(), report::bytes(summary.weight_bytes)]);
    rows.push(vec!["code".into(), report::bytes(summary.code_bytes)]);
    rows.push(vec!["kernels".into(), summary.kernels.to_string()]);
    rows.extend(report::peak_memory().map(|peak| vec!["peak memory".into(), report::bytes(peak)]));
    let mut out = report::table(&rows);
    if !summary.tuning.is_empty() {
        out += &format!("tuned: {} of {} kernels\n", summary.tuning.kernels.len(), summary.kernels);
    }
    if !summary.unused.is_empty() {
        out += &format!("tuning: {} choices are for kernels that are not here\n", summary.unused.kernels.len());
    }
    for (name, value) in summary.quality.iter().flat_map(Quality::figures) {
        out += &format!("{name}: {value}\n");
    }
    for approximation in &summary.passes.approximations {
        out += &format!("approximation: {approximation}\n");
    }
    out
}

fn json_of(summary: &Summary) -> serde_json::Value {
    let stages: serde_json::Map<String, serde_json::Value> =
        summary.stages.iter().map(|(name, time)| (name.to_string(), time.as_secs_f64().into())).collect();
    let pass = |p: &passes::PassReport| {
        json!({"pass": p.pass, "seconds": p.elapsed.as_secs_f64(), "verify_seconds": p.verified.as_secs_f64(),
            "notes": p.notes})
    };
    json!({
        "stage_seconds": stages,
        "artifact_bytes": summary.artifact_bytes,
        "weight_bytes": summary.weight_bytes,
        "code_bytes": summary.code_bytes,
        "kernels": summary.kernels,
        "peak_memory_bytes": report::peak_memory(),
        "passes": summary.passes.passes.iter().map(pass).collect::<Vec<_>>(),
        "approximations": summary.passes.approximations,
        "quality": summary.quality,
        "tuning": summary.tuning,
        "tuning_unused": summary.unused.kernels.iter().map(|t| t.kernel.as_str()).collect::<Vec<_>>(),
    })
}

/// A bar on standard error for each stage; invisible where that is no terminal.
#[derive(Default)]
struct Bar(Option<ProgressBar>);

impl Bar {
    fn clear(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bar {
    fn stage(&mut self, name: &'static str, total: usize) {
        self.clear();
        let bar = if total == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(total as u64) };
        let template =
            if total == 0 { "{msg:14} {spinner} {elapsed}" } else { "{msg:14} {bar:40} {percent:>3}% {elapsed}" };
        // The templates are constants; one that did not parse would leave the bar as it is.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(name);
        bar.enable_steady_tick(std::time::Duration::from_millis(100));
        self.0 = Some(bar);
    }

    fn advance(&mut self, done: usize) {
        if let Some(bar) = &self.0 {
            bar.set_position(done as u64);
        }
    }
}
