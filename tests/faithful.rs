//! `verify` and `bisect` on artifacts as they should be, and on artifacts in which something is wrong: a rewrite rule, a
//! kernel's code, or a weight of the model.

use mansard::check::bisect::{Compilation, Finding, Stage, bisect};
use mansard::check::{Report, Request, check};
use mansard::driver::{self, CompileOptions};
use mansard_ir::model::Source;
use mansard_ir::plan::Kernel;
use mansard_ir::{DType, Model, Op, Tuning};
use mansard_passes::rules::{PHASES, Phase, Rule, RuleSet};
use mansard_passes::{Event, Hooks, Options};
use mansard_runtime::{Artifact, OpenOptions};
use mansard_tests::oracle::write;
use mansard_tests::{compiled, here, published};
use std::sync::Arc;

const TOKENS: [u32; 9] = [1, 14, 51, 7, 90, 33, 2, 118, 64];

fn model(family: &str, float_weights: bool) -> Model {
    let options = CompileOptions { float_weights, ..CompileOptions::default() };
    driver::import(&here().join("goldens").join(family), &options).unwrap_or_else(|e| panic!("{family}: {e}"))
}

fn options(weights: Option<DType>) -> Options {
    let options = CompileOptions { weights, ..CompileOptions::default() };
    driver::pass_options(mansard_backends::target("native").unwrap(), &options)
}

/// An artifact of `model`, with the code of other kernels.
fn artifact(model: Model, options: &Options, change: impl Fn(&mut Kernel)) -> (tempfile::TempDir, Arc<Artifact>) {
    let mut sink = |_: Event<'_>| {};
    let (plan, optimized, _) = mansard_passes::compile(model, options, &mut Hooks::new(&mut sink)).unwrap();
    let mut kernels = plan.kernels.clone();
    kernels.iter_mut().for_each(change);
    let target = mansard_backends::target("native").unwrap();
    let image = mansard_backends::compile_kernels(&kernels, &target, &Tuning::default(), 2, &mut |_, _| {}).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.mansard");
    write(&plan, &optimized, (target, image), &path).unwrap();
    (folder, Arc::new(Artifact::open(&path, &OpenOptions::default()).unwrap()))
}

fn request<'a>(artifact: &'a Arc<Artifact>, model: &'a Model) -> Request<'a> {
    Request { artifact, model, tokens: &TOKENS, tolerance: None, progress: &|_, _| () }
}

fn verified(artifact: &Arc<Artifact>, family: &str) -> Report {
    check(&request(artifact, &model(family, true))).unwrap_or_else(|e| panic!("{family}: {e}"))
}

/// What bisect finds in an artifact that verify must refuse.
fn found(artifact: &Arc<Artifact>, options: &Options) -> Finding {
    let (exact, imported) = (model("llama", true), model("llama", false));
    assert!(!check(&request(artifact, &exact)).unwrap().holds());
    let again = Compilation { model: &imported, options: options.clone() };
    bisect(&request(artifact, &exact), &again).unwrap().expect("a finding")
}

#[test]
fn artifacts_hold_what_they_promise() {
    for family in ["llama", "qwen3", "gemma3", "mixtral", "gpt2", "bert"] {
        for weights in [None, Some(DType::Q8_0)] {
            let options = CompileOptions { weights, float_weights: weights.is_some(), ..CompileOptions::default() };
            let (_folder, artifact) = compiled(&here().join("goldens").join(family), &options).unwrap();
            let report = verified(&artifact, family);
            let (layer, kernel) = (report.worst_layer().unwrap(), report.worst_kernel().unwrap());
            println!("{family} {weights:?}: tolerance {:.1e}, {layer:?}, {kernel:?}", report.tolerance);
            assert!(report.holds(), "{family}, {weights:?}: {layer:?} {kernel:?}");
            // Every kernel was compared, in every range of tokens that launches it.
            let program = &artifact.manifest().program;
            let compared = |name: &String| report.kernels.iter().any(|k| k.kernel == *name);
            assert!(program.kernels.iter().all(|k| compared(&k.name)), "{family}");
            assert!(report.layers.last().is_some_and(|l| l.accumulated < 4.0 * report.tolerance));
        }
    }
}

/// With a vocabulary projection in two planes. Skipped where the model is not at hand.
#[test]
fn published_models_hold_what_they_promise() {
    let Some(file) = published("smollm2.gguf") else { return };
    let (_folder, artifact) = compiled(&file, &CompileOptions::default()).unwrap();
    let program = &artifact.manifest().program;
    assert!(program.weights.iter().any(|w| w.ty.starts_with("q8_planes")));
    let exact = driver::import(&file, &CompileOptions { float_weights: true, ..CompileOptions::default() }).unwrap();
    let report = check(&Request { tokens: &TOKENS[..3], ..request(&artifact, &exact) }).unwrap();
    assert!(report.holds(), "{:?} {:?}", report.worst_layer(), report.worst_kernel());
    let rescored = |k: &&mansard::check::KernelCheck| k.kernel.contains("rescore");
    assert!(report.kernels.iter().any(|k| rescored(&k)), "{:?}", report.kernels);
}

#[test]
fn nothing_is_found_where_nothing_is_wrong() {
    let (options, exact, imported) = (options(None), model("llama", true), model("llama", false));
    let (_folder, artifact) = artifact(imported.clone(), &options, |_| ());
    let again = Compilation { model: &imported, options };
    assert!(bisect(&request(&artifact, &exact), &again).unwrap().is_none());
    let absurd = Request { tokens: &TOKENS[..1], ..request(&artifact, &exact) };
    assert_eq!(check(&absurd).unwrap_err().exit_code(), 2);
}

#[test]
fn a_rule_that_is_no_equation_is_named() {
    const fn rule(text: &'static str) -> Rule {
        Rule { text, algebra: "" }
    }
    static PLANTED: &[Phase] = &[
        Phase {
            name: "motion",
            meaning: "",
            rules: &[
                rule("scale-twice | (scale ?a (scale ?b ?x)) | (scale (product ?a ?b) ?x) | | reassociates"),
                rule("merge-after-unary | (merge_heads (@unary ?x)) | (@unary (merge_heads ?x)) | | exact"),
                rule("no-gate | (mul ?y (silu ?x)) | (mul ?y ?x) | | exact"),
                rule("no-gate-before | (mul (silu ?x) ?y) | (mul ?x ?y) | | exact"),
            ],
        },
        Phase {
            name: "select",
            meaning: "",
            rules: &[rule("select-unary | (select_rows (@unary ?x) ?r) | (@unary (select_rows ?x ?r)) | | exact")],
        },
    ];
    for weights in [None, Some(DType::Q8_0)] {
        let options = Options { rules: RuleSet { phases: PLANTED, first: usize::MAX }, ..options(weights) };
        let (_folder, artifact) = artifact(model("llama", false), &options, |_| ());
        let finding = found(&artifact, &options);
        assert!(finding.stage == Stage::Rule && finding.name.starts_with("no-gate"), "{finding:?}");
        assert!(finding.layer.contains("layers.0") && finding.off > 0.1, "{finding:?}");
        assert!(finding.reproducer.contains("# passes: saturate") && finding.reproducer.contains("silu"));
        mansard_ir::text::parse("reproducer", &finding.reproducer).unwrap();
    }
    assert!(RuleSet::default().rules().len() == PHASES.iter().map(|p| p.rules.len()).sum::<usize>());
}

#[test]
fn a_kernel_that_is_not_its_body_is_named() {
    let activates = |kernel: &Kernel| kernel.body.nodes.iter().any(|n| n.op == Op::named("silu").unwrap());
    for weights in [None, Some(DType::Q8_0)] {
        let options = options(weights);
        let (_folder, artifact) = artifact(model("llama", false), &options, |kernel| {
            let silu = kernel.body.nodes.iter_mut().filter(|n| n.op == Op::named("silu").unwrap());
            silu.for_each(|n| n.op = Op::named("gelu").unwrap());
        });
        let finding = found(&artifact, &options);
        assert_eq!(finding.stage, Stage::Kernel, "{finding:?}");
        let planted = mansard_ir::text::parse("reproducer", &finding.reproducer).unwrap();
        let body = planted.graphs.into_iter().next().unwrap();
        assert_eq!(body.name, finding.name);
        let (range, groups) = (body.range.unwrap(), vec![]);
        assert!(activates(&Kernel { name: body.name.clone(), body, range, groups }));
    }
}

#[test]
fn a_weight_that_was_read_otherwise_is_named() {
    let name = "model.layers.1.self_attn.k_proj.weight";
    for weights in [None, Some(DType::Q8_0)] {
        let mut other = model("llama", false);
        let weight = other.weights.get_mut(name).expect("that weight");
        // Rows in another order, as where the halves that rope turns are interleaved.
        let (columns, values) = (weight.rows_columns().1, weight.read_all().unwrap());
        weight.source = Source::Values(values.chunks(columns).rev().flatten().copied().collect());
        let options = options(weights);
        let (_folder, artifact) = artifact(other, &options, |_| ());
        let finding = found(&artifact, &options);
        assert_eq!(finding.stage, Stage::Import, "{finding:?}");
        assert!(finding.name.contains(name) && finding.layer == "model.layers.1", "{finding:?}");
    }
}
