//! Runs passes by name: verifies after each, times it, shows what was asked for, and leaves a reproducer on failure.
//!
//! A reproducer is the text of the model before the failing pass, under a line `# passes: a,b,c` that names it and the
//! passes after it; `mansard opt` accepts it as it is.

use crate::{Options, Pass, pass};
use ir::artifact::Derivation;
use ir::plan::Plan;
use ir::text::print_model;
use ir::verify::{verify_model, verify_plan};
use ir::{Error, Kind, Model, Result, Stage};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What passes change.
#[derive(Clone, Debug)]
pub struct State {
    /// The program.
    pub model: Model,
    /// After `plan`.
    pub plan: Option<Plan>,
    /// Choices that change values beyond rounding, each in a line.
    pub approximations: Vec<String>,
    /// How the search came to each kernel, in order of graph, range of tokens and launch.
    pub derivations: Vec<Derivation>,
}

impl State {
    /// A model before its first pass.
    pub fn new(model: Model) -> State {
        State { model, plan: None, approximations: vec![], derivations: vec![] }
    }
}

/// Something a person may want to see.
pub enum Event<'a> {
    /// A pass begins.
    Start(&'static Pass),
    /// A pass whose result was asked for has run.
    Dump(&'static Pass, &'a State),
    /// A pass has ended.
    End(&'static Pass, &'a PassReport),
}

/// What to watch, and what to do with it.
pub struct Hooks<'a> {
    /// Passes after which [`Event::Dump`] is wanted.
    pub dump_after: Vec<String>,
    /// The last pass to run.
    pub stop_after: Option<String>,
    /// Where a failing pass leaves its reproducer.
    pub reproducer: Option<PathBuf>,
    /// Receives the events.
    pub sink: &'a mut dyn FnMut(Event<'_>),
}

impl<'a> Hooks<'a> {
    /// Watches nothing in particular.
    pub fn new(sink: &'a mut dyn FnMut(Event<'_>)) -> Hooks<'a> {
        Hooks { dump_after: vec![], stop_after: None, reproducer: None, sink }
    }
}

/// How one pass went.
#[derive(Clone, Debug)]
pub struct PassReport {
    /// Its name.
    pub pass: &'static str,
    /// Time it took.
    pub elapsed: Duration,
    /// Time verifying its result took.
    pub verified: Duration,
    /// What it has to say.
    pub notes: Vec<String>,
}

/// How a pipeline went.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In order.
    pub passes: Vec<PassReport>,
    /// Choices that change values beyond rounding.
    pub approximations: Vec<String>,
    /// How the search came to each kernel.
    pub derivations: Vec<Derivation>,
}

impl Report {
    /// The table of `--time-passes`.
    pub fn times(&self) -> String {
        let mut out = String::from("pass              time    verify\n");
        for p in &self.passes {
            let (time, verify) = (p.elapsed.as_secs_f64() * 1e3, p.verified.as_secs_f64() * 1e3);
            out += &format!("{:<14} {time:>7.1} ms {verify:>6.1} ms\n", p.pass);
            p.notes.iter().for_each(|n| out += &format!("    {n}\n"));
        }
        out
    }
}

/// Runs the passes called `names` on `state`.
///
/// # Errors
/// An unknown name, a pass that does not take the stage at hand, a pass that fails or panics, or a result that does not
/// verify. The place is the pass; the advice names the reproducer.
pub fn run(names: &[&str], mut state: State, options: &Options, hooks: &mut Hooks<'_>) -> Result<(State, Report)> {
    let passes = names.iter().map(|n| pass(n)).collect::<Result<Vec<_>>>()?;
    for name in hooks.dump_after.iter().chain(&hooks.stop_after) {
        pass(name)?;
    }
    let mut report = Report::default();
    for (index, pass) in passes.iter().enumerate() {
        takes(pass, &state)?;
        (hooks.sink)(Event::Start(pass));
        let before = hooks.reproducer.is_some().then(|| state.clone());
        let done = apply(pass, &mut state, options).map_err(|e| {
            let error = e.at(format!("pass {}", pass.name));
            match (&hooks.reproducer, &before) {
                // What was asked for makes no sense: nothing of ours failed.
                (Some(path), Some(before)) if error.kind() != Kind::Usage => {
                    reproducer(error, path, before, &names[index..])
                }
                _ => error,
            }
        })?;
        if hooks.dump_after.iter().any(|n| n == pass.name) {
            (hooks.sink)(Event::Dump(pass, &state));
        }
        (hooks.sink)(Event::End(pass, &done));
        report.passes.push(done);
        if hooks.stop_after.as_deref() == Some(pass.name) {
            break;
        }
    }
    report.approximations = state.approximations.clone();
    report.derivations = state.derivations.clone();
    Ok((state, report))
}

/// The stage a model is at: that of all its graphs.
fn takes(pass: &Pass, state: &State) -> Result<()> {
    let stage =
        |s: &State| if s.plan.is_some() { Some(Stage::Planned) } else { s.model.graphs.first().map(|g| g.stage) };
    match stage(state) {
        Some(found) if found != pass.from => Err(Error::new(
            Kind::Usage,
            format!("pass {} takes a model at stage {}, this one is {found}", pass.name, pass.from),
        )),
        _ => Ok(()),
    }
}

fn apply(pass: &'static Pass, state: &mut State, options: &Options) -> Result<PassReport> {
    let start = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| (pass.run)(state, options)));
    let notes = result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(Error::new(Kind::Internal, format!("panic: {}", text.unwrap_or("no message"))))
    })?;
    let (elapsed, start) = (start.elapsed(), Instant::now());
    verify(state)?;
    Ok(PassReport { pass: pass.name, elapsed, verified: start.elapsed(), notes })
}

fn verify(state: &State) -> Result<()> {
    let blame = |e: Error| e.help("a pass has broken a rule of the stage it leaves; this is a bug");
    match &state.plan {
        Some(plan) => verify_plan(plan).map(drop).map_err(blame),
        None => verify_model(&state.model).map(drop).map_err(blame),
    }
}

/// Writes what `mansard opt` needs to see the failure again.
fn reproducer(error: Error, path: &std::path::Path, before: &State, rest: &[&str]) -> Error {
    let comment = error.to_string().replace('\n', " ");
    let text = format!("# passes: {}\n# {comment}\n{}", rest.join(","), print_model(&before.model));
    match std::fs::write(path, text) {
        Ok(()) => error.help(format!("mansard opt {} shows it again", path.display())),
        Err(io) => error.help(format!("the reproducer could not be written to {}: {io}", path.display())),
    }
}
