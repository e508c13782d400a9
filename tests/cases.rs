//! Case files: a test is a text file under `cases/`; adding one adds no Rust.
//!
//! The header says what to run and what must hold:
//!
//! ```text
//! # A product by one disappears.
//! # passes: canonicalize
//! # same: 1e-6          (evaluated before and after on seeded inputs; `no` with a reason where values may change)
//! # error: words        (instead: parsing, verifying or a pass must fail with these words)
//! # weights: int4_g64   (the format that weights are quantized to)
//! # kv: i4              (the type that caches are stored in)
//! # emit: mlir          (instead of passes: code of each planned graph, for `# target: x86-64-v3` or another)
//! ```
//!
//! The snapshot beside the case shows the text after each pass that changed it, the code, or the error. Besides, whatever
//! is printed must parse back to the same text, and a model that ends as a plan is run as compiled code against the
//! interpreter. `INSTA_UPDATE=always` accepts what comes out; read it first.

use mansard::driver::{CompileOptions, pass_options};
use mansard_backends::Layer;
use mansard_ir::eval::{self, Step, Value};
use mansard_ir::plan::{CacheGroup, Kernel, Plan, Program};
use mansard_ir::{DType, Graph, Model, Stage, Target, TokenRange, Tuning, sample, text};
use mansard_passes::manager::{self, State};
use mansard_passes::{Event, Hooks};
use std::path::Path;

/// A header line's value.
fn header<'a>(case: &'a str, key: &str) -> Option<&'a str> {
    case.lines().find_map(|l| l.strip_prefix("# ")?.strip_prefix(key)?.strip_prefix(':')).map(str::trim)
}

/// Every result's values on seeded inputs and weights, for a step of two sequences.
fn values(graph: &Graph) -> Vec<(String, Vec<f32>)> {
    let step = Step::new(&[(3, 4), (0, 2)]);
    let inputs = sample::inputs(graph, &step, 3, 7);
    let results = eval::graph(graph, &inputs, &mut |name, ty| sample::weight_value(name, ty, 11));
    let results = results.unwrap_or_else(|e| panic!("{}: {e}", graph.name));
    let reals = |value: Value| match value {
        Value::Tensor(t) => t.data.to_vec(),
        Value::Cache(c) => c.sequences.iter().flat_map(|s| s.to_vec()).collect(),
        Value::Routing(r) => r.chosen.iter().map(|c| *c as f32).chain(r.weights).collect(),
        other => panic!("{}: {} is no result", graph.name, other.describe()),
    };
    graph.results.iter().map(|(name, _)| name.clone()).zip(results.into_iter().map(reals)).collect()
}

fn compare(before: &Graph, after: &Graph, tolerance: f32) {
    for ((result, x), (_, y)) in values(before).into_iter().zip(values(after)) {
        assert_eq!(x.len(), y.len(), "result `{result}`");
        let largest = x.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        for (a, b) in x.iter().zip(y.iter()) {
            assert!((a - b).abs() <= tolerance * largest, "@{} `{result}`: {a} became {b}", before.name);
        }
    }
}

fn round_trips(model: &Model) -> String {
    let printed = text::print_model(model);
    let again = text::parse("printed", &printed).unwrap_or_else(|e| panic!("what is printed does not parse: {e}"));
    assert_eq!(text::print_model(&again), printed);
    printed
}

/// The result of each pass that changed something, and the state after the last.
fn run_passes(
    names: &[&str],
    model: Model,
    target: &Target,
    (weights, kv): (Option<DType>, Option<DType>),
) -> mansard_ir::Result<(String, State)> {
    let options = pass_options(target.clone(), &CompileOptions { weights, kv, ..CompileOptions::default() });
    let (mut seen, mut last) = (String::new(), text::print_model(&model));
    let mut sink = |event: Event<'_>| {
        if let Event::Dump(pass, state) = event {
            let now = state.plan.as_ref().map_or_else(|| round_trips(&state.model), text::print_plan);
            seen += &format!("==== {} ====\n{}", pass.name, if now == last { "unchanged\n" } else { &now });
            last = now;
        }
    };
    let mut hooks = Hooks::new(&mut sink);
    hooks.dump_after = names.iter().map(|p| p.to_string()).collect();
    let (state, _) = manager::run(names, State::new(model), &options, &mut hooks)?;
    Ok((seen, state))
}

/// Kernels of the planned graphs as MLIR; what LLVM makes of it must be an object file.
fn emit(model: &Model, target: &Target) -> mansard_ir::Result<String> {
    let planned = model.graphs.iter().filter(|g| g.stage == Stage::Planned);
    let kernel = |body: &Graph| Kernel {
        name: body.name.clone(),
        body: body.clone(),
        range: body.range.unwrap_or(TokenRange { min: 1, max: 512 }),
        groups: CacheGroup::of(body.inputs.iter().map(|input| &input.ty)),
    };
    let plan = Plan { kernels: planned.map(kernel).collect(), packs: vec![], program: Program::default() };
    assert!(!plan.kernels.is_empty(), "no graph at stage planned");
    let object = mansard_backends::emit(&plan, target, &Tuning::default(), Layer::Object)?;
    assert!(object.starts_with(b"\x7fELF"));
    Ok(String::from_utf8_lossy(&mansard_backends::emit(&plan, target, &Tuning::default(), Layer::Mlir)?).into_owned())
}

/// What the case comes to, and the model before and the state after its passes.
fn outcome(name: &str, case: &str) -> mansard_ir::Result<(String, Option<(Model, State)>)> {
    let target = mansard_backends::target(header(case, "target").unwrap_or("x86-64-v4"))?;
    let model = text::parse(name, case)?;
    mansard_ir::verify::verify_model(&model)?;
    let printed = round_trips(&model);
    if header(case, "emit").is_some() {
        return Ok((emit(&model, &target)?, None));
    }
    let passes = header(case, "passes").unwrap_or_default();
    let passes: Vec<&str> = passes.split(',').map(str::trim).filter(|p| !p.is_empty()).collect();
    let dtype = |key| header(case, key).map(|d| DType::parse(d).unwrap_or_else(|| panic!("{name}: {key} {d}")));
    let (seen, state) = run_passes(&passes, model.clone(), &target, (dtype("weights"), dtype("kv")))?;
    Ok((if passes.is_empty() { printed } else { seen }, Some((model, state))))
}

fn run(path: &Path) {
    let case = std::fs::read_to_string(path).unwrap();
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let seen = match (outcome(&name, &case), header(&case, "error")) {
        (Err(e), Some(words)) => {
            assert!(!words.is_empty() && e.to_string().contains(words), "{name}: expected {words:?} in: {e}");
            format!("{e}\n")
        }
        (Err(e), None) => panic!("{name}: {e}"),
        (Ok(_), Some(words)) => panic!("{name}: expected an error with {words:?}"),
        (Ok((seen, None)), None) => seen,
        (Ok((seen, Some((model, state)))), None) => {
            keeps_its_meaning(&name, &case, &model, &state);
            seen
        }
    };
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(path.parent().unwrap());
    settings.set_prepend_module_to_snapshot(false);
    settings.remove_snapshot_suffix();
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(path.file_stem().unwrap().to_string_lossy().as_ref(), seen));
}

fn keeps_its_meaning(name: &str, case: &str, model: &Model, state: &State) {
    let same = header(case, "same").unwrap_or_else(|| panic!("{name}: no `# same:` line"));
    if let Some(reason) = same.strip_prefix("no") {
        assert!(reason.trim_start_matches([',', ':', ' ']).len() > 10, "{name}: `# same: no` needs a reason");
    } else {
        let tolerance: f32 = same.parse().unwrap_or_else(|_| panic!("{name}: `same: {same}`"));
        for before in &model.graphs {
            for after in state.model.graphs.iter().filter(|g| g.name == before.name) {
                compare(before, after, tolerance);
            }
        }
    }
    if state.plan.is_some() && !model.outputs.is_empty() {
        let mut model = model.clone();
        sample::fill_weights(&mut model, 5).unwrap_or_else(|e| panic!("{name}: {e}"));
        let target = mansard_backends::target("native").unwrap_or_else(|e| panic!("{name}: {e}"));
        let agreement = mansard_tests::oracle::check(model, target, &CompileOptions::default())
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(agreement.bound < 0.25, "{name}: {agreement:?}");
    }
}

#[test]
fn cases() {
    let mut failed = vec![];
    insta::glob!("cases/**/*.mir", |path| {
        // Differing snapshots are insta's to report, after the last case.
        if std::panic::catch_unwind(|| run(path)).is_err() {
            failed.push(path.to_owned());
        }
    });
    assert!(failed.is_empty(), "{} cases failed: {failed:?}", failed.len());
}
