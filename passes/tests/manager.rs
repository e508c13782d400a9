//! The manager: what it refuses, what it shows, what it leaves behind.

extern crate mansard_ir as ir;

mod common;

use common::{SMALL, Style, embed, head, layer, model, target};
use ir::{DType, Model};
use mansard_passes::{Event, Hooks, Options, PASSES, PIPELINE, State, compile, docs_markdown, manager, rules};

fn llama() -> Model {
    model(vec![embed(SMALL, 100, true), layer(SMALL, Style::default()), head(SMALL, 100)], 2, &["logits"])
}

#[test]
fn stages_follow_each_other() {
    let mut sink = |_: Event<'_>| {};
    let mut hooks = Hooks::new(&mut sink);
    let options = Options::new(target());
    let error = |names: &[&str], hooks: &mut Hooks<'_>| {
        manager::run(names, State::new(llama()), &options, hooks).map(drop).unwrap_err().to_string()
    };
    assert_eq!(error(&["plan"], &mut hooks), "pass plan takes a model at stage optimized, this one is imported");
    assert_eq!(
        error(&["simplify"], &mut hooks),
        "no pass `simplify`; there are canonicalize, precision, planes, saturate, plan"
    );
    for pair in PIPELINE.windows(2) {
        let row = |name: &str| PASSES.iter().find(|p| p.name == name).unwrap();
        assert_eq!(row(pair[0]).to, row(pair[1]).from);
    }
}

#[test]
fn dumps_come_where_asked_and_stopping_stops() {
    let mut seen = vec![];
    let mut sink = |event: Event<'_>| match event {
        Event::Start(pass) => seen.push(format!("start {}", pass.name)),
        Event::Dump(pass, state) => seen.push(format!("dump {} {}", pass.name, state.model.graphs[0].stage)),
        Event::End(..) => {}
    };
    let mut hooks = Hooks::new(&mut sink);
    hooks.dump_after = vec!["precision".into()];
    hooks.stop_after = Some("precision".into());
    let error = compile(llama(), &Options::new(target()), &mut hooks).map(drop).unwrap_err();
    assert_eq!(error.kind(), ir::Kind::Usage);
    assert_eq!(seen, ["start canonicalize", "start precision", "dump precision canonical"]);
}

#[test]
fn a_failing_pass_leaves_a_reproducer() {
    let path = std::env::temp_dir().join(format!("mansard-reproducer-{}.mir", std::process::id()));
    let mut sink = |_: Event<'_>| {};
    let mut hooks = Hooks::new(&mut sink);
    hooks.reproducer = Some(path.clone());
    // What makes no sense is not worth one.
    let options = Options { kv: Some(DType::Q4_0), ..Options::new(target()) };
    let error = compile(llama(), &options, &mut hooks).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "pass precision: caches of heads of 32 cannot be stored as q4_0");
    assert!(error.advice().unwrap().contains("f16") && !path.exists());
    let options = Options::new(target());
    let mut model = llama();
    model.outputs.push("nothing".into());
    let error = compile(model, &options, &mut hooks).map(drop).unwrap_err();
    assert!(error.advice().unwrap().contains("mansard opt"), "{error}");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(text.starts_with("# passes: canonicalize,precision,planes,saturate,plan\n"), "{text}");
    let again = ir::text::parse("reproducer", &text).unwrap();
    assert_eq!(again.graphs[0].stage, ir::Stage::Imported);
    let error = manager::run(&["canonicalize"], State::new(again), &options, &mut Hooks::new(&mut sink));
    assert!(error.is_err());
}

#[test]
fn approximations_are_reported() {
    let s = common::Shape { weights: DType::Q4_0, ..SMALL };
    let m = model(vec![embed(s, 100, true), layer(s, Style::default()), head(s, 100)], 2, &["logits"]);
    let mut sink = |_: Event<'_>| {};
    let (.., report) = compile(m, &Options::new(target()), &mut Hooks::new(&mut sink)).unwrap();
    assert_eq!(
        report.approximations,
        ["activations of integer contractions: int8 with one scale per 32", "keys and values: f16"]
    );
    let (.., report) = compile(llama(), &Options::new(target()), &mut Hooks::new(&mut sink)).unwrap();
    assert!(report.approximations.is_empty());
}

#[test]
fn the_reference_page_has_every_pass_and_rule() {
    let page = docs_markdown();
    for name in PASSES.iter().map(|p| p.name).chain(rules::table().map(|r| r.name())) {
        assert!(page.contains(name), "{name}");
    }
}
