//! Case files: a test is a text file under `cases/`; adding one adds no Rust.
//!
//! The header says what to run and what must hold:
//!
//! ```text
//! # The product by one and the repeated norm disappear.
//! # passes: canonicalize
//! # same: 1e-6          (evaluated before and after on seeded inputs; `no` with a reason where values may change)
//! # error: words        (instead: the passes, or parsing, must fail with these words)
//! ```
//!
//! The snapshot beside the case shows the text after each pass that changed it.

use mansard::driver::{CompileOptions, pass_options};
use mansard_ir::eval::{self, Step, Value};
use mansard_ir::{Graph, sample, text};
use mansard_passes::manager::{self, State};
use mansard_passes::{Event, Hooks};
use std::path::Path;

/// A header line's value.
fn header<'a>(case: &'a str, key: &str) -> Option<&'a str> {
    case.lines().find_map(|l| l.strip_prefix("# ")?.strip_prefix(key)?.strip_prefix(':')).map(str::trim)
}

/// Values of every result on seeded inputs and weights, for a step of two sequences.
fn values(graph: &Graph) -> Vec<(String, Value)> {
    let step = Step::new(&[(3, 4), (0, 2)]);
    let inputs = sample::inputs(graph, &step, 3, 7);
    let results = eval::graph(graph, &inputs, &mut |name, ty| Ok(sample::weight_value(name, ty, 11)));
    let results = results.unwrap_or_else(|e| panic!("{}: {e}", graph.name));
    graph.results.iter().map(|(n, _)| n.clone()).zip(results).collect()
}

fn compare(name: &str, before: &Graph, after: &Graph, tolerance: f32) {
    for ((result, x), (_, y)) in values(before).into_iter().zip(values(after)) {
        let (Value::Tensor(x), Value::Tensor(y)) = (x, y) else { continue };
        assert_eq!(x.shape, y.shape, "{name}: result `{result}`");
        let largest = x.data.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        for (a, b) in x.data.iter().zip(y.data.iter()) {
            assert!((a - b).abs() <= tolerance * largest, "{name}: result `{result}`: {a} became {b}");
        }
    }
}

fn run(path: &Path) {
    let case = std::fs::read_to_string(path).unwrap();
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let passes: Vec<&str> =
        header(&case, "passes").unwrap_or_default().split(',').map(str::trim).filter(|p| !p.is_empty()).collect();
    let parsed = text::parse(&name, &case).and_then(|m| mansard_ir::verify::verify_model(&m).map(|_| ()).map(|()| m));
    let target = mansard_backends::target("x86-64-v4").unwrap();
    let options = pass_options(target, &CompileOptions::default());
    let (mut seen, mut last) = (String::new(), String::new());
    let outcome = parsed.and_then(|model| {
        last = text::print_model(&model);
        let mut sink = |event: Event<'_>| {
            if let Event::Dump(pass, state) = event {
                let now = match &state.plan {
                    Some(plan) => text::print_plan(plan),
                    None => text::print_model(&state.model),
                };
                let body = if now == last { "unchanged\n" } else { &now };
                seen += &format!("==== {} ====\n{body}", pass.name);
                last = now;
            }
        };
        let mut hooks = Hooks::new(&mut sink);
        hooks.dump_after = passes.iter().map(|p| p.to_string()).collect();
        let (state, _) = manager::run(&passes, State::new(model.clone()), &options, &mut hooks)?;
        Ok((model, state))
    });
    match (outcome, header(&case, "error")) {
        (Err(e), Some(words)) => {
            assert!(e.to_string().contains(words), "{name}: expected {words:?} in: {e}");
            seen = format!("{e}\n");
        }
        (Err(e), None) => panic!("{name}: {e}"),
        (Ok(_), Some(words)) => panic!("{name}: expected an error with {words:?}"),
        (Ok((model, state)), None) => {
            let same = header(&case, "same").unwrap_or_else(|| panic!("{name}: no `# same:` line"));
            if !same.starts_with("no") {
                let tolerance: f32 = same.parse().unwrap_or_else(|_| panic!("{name}: `same: {same}`"));
                for before in &model.graphs {
                    for after in state.model.graphs.iter().filter(|g| g.name == before.name) {
                        compare(&name, before, after, tolerance);
                    }
                }
            }
        }
    }
    insta::assert_snapshot!(seen);
}

#[test]
fn cases() {
    insta::glob!("cases/**/*.mir", run);
}
