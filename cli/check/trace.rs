//! The artifact's side: its launches one by one, on a few steps. Results of the model's calls are recorded as they are
//! written, and kernels are compared with their bodies, on the very values and packed weights that they read.
//!
//! Which call a launch belongs to is told by the buffers: a call has ended when each of its results has been written, under
//! the graph's name and its own. All logits are exact in these steps, so estimates of them are not compared.

use super::distance;
use super::layers::Values;
use mansard_ir::eval::{self, Value};
use mansard_ir::ops::Class;
use mansard_ir::plan::{Arg, KernelSpec, Program, in_place};
use mansard_ir::{Error, Graph, Kind, Model, Place, Result, Type, ValueId, bail};
use mansard_runtime::{Engine, Moment, Watch, Work};
use std::collections::BTreeSet;

/// One launch that was compared with the interpreter.
#[derive(Clone, Debug, serde::Serialize)]
pub struct KernelCheck {
    /// The kernel's name.
    pub kernel: String,
    /// The call it was launched for; `None` in steps of which only kernels are compared.
    pub call: Option<usize>,
    /// New tokens of the step.
    pub tokens: usize,
    /// Index among the step's launches.
    pub launch: usize,
    /// How far the furthest row of a result is from the interpreter's.
    pub off: f64,
    /// How far it may be.
    pub tolerance: f64,
}

impl KernelCheck {
    /// It is as near as it must be.
    pub fn holds(&self) -> bool {
        self.off <= self.tolerance
    }
}

/// Which launches are compared.
#[derive(Clone, Debug)]
pub enum Compared {
    /// Of each kernel, in each range of tokens, the first.
    First,
    /// None: layers alone.
    Nothing,
    /// All of that call, and the first of each kernel elsewhere.
    Call(usize),
}

/// What a step left at the end of each call.
pub struct Recorded {
    /// The step's own values: tokens, positions, rows, step.
    pub given: Values,
    /// By call: its results.
    pub results: Vec<Values>,
    /// By call: names of the packed weights that its launches read.
    pub weights: Vec<BTreeSet<String>>,
    /// By call: kernels that were launched.
    pub kernels: Vec<BTreeSet<String>>,
}

/// An artifact's program, ready to be watched.
pub struct Tracer<'a> {
    program: &'a Program,
    bodies: Vec<Graph>,
    compared: Compared,
    seen: BTreeSet<(usize, u32)>,
    /// So far.
    pub checks: Vec<KernelCheck>,
}

impl<'a> Tracer<'a> {
    /// Reads the bodies of all kernels.
    ///
    /// # Errors
    /// Where one is no text of a graph.
    pub fn new(program: &'a Program, compared: Compared) -> Result<Tracer<'a>> {
        let bodies = program.kernels.iter().map(KernelSpec::body).collect::<Result<_>>()?;
        Ok(Tracer { program, bodies, compared, seen: BTreeSet::new(), checks: vec![] })
    }

    /// Runs a step; with a model, records what its calls leave.
    ///
    /// # Errors
    /// Where the engine refuses the step, or its launches are not those of the model's calls.
    pub fn step(&mut self, engine: &mut Engine, work: &[Work<'_>], model: Option<&Model>) -> Result<Recorded> {
        let calls = model.map_or(0, |m| m.calls.len());
        let mut out = Recorded {
            given: Values::new(),
            results: vec![Values::new(); calls],
            weights: vec![BTreeSet::new(); calls],
            kernels: vec![BTreeSet::new(); calls],
        };
        let mut pending = Pending::new(model);
        let mut inputs = None;
        engine.step_watched(work, &mut |moment, watch| {
            let kernel = watch.launch().kernel.0;
            let (call, body) = (pending.call.filter(|call| *call < calls), &self.bodies[kernel as usize]);
            if moment == Moment::Before {
                if out.given.is_empty() {
                    out.given = given(watch)?;
                }
                let all = matches!(self.compared, Compared::Call(at) if call == Some(at));
                let first = !matches!(self.compared, Compared::Nothing) && self.seen.insert((watch.variant, kernel));
                inputs = if (all || first) && !estimates(body) { Some(read_inputs(body, watch)?) } else { None };
                return Ok(());
            }
            if let Some(inputs) = inputs.take() {
                self.checks.push(compare(body, &inputs, watch, call)?);
            }
            if let Some(call) = call {
                let weights = watch.launch().args.iter().filter_map(|arg| match arg {
                    Arg::Weight(w) => Some(self.program.weights[w.0 as usize].name.clone()),
                    _ => None,
                });
                out.weights[call].extend(weights);
                out.kernels[call].insert(body.name.clone());
                if !estimates(body) {
                    pending.written(self.program, body, watch, &mut out.results[call])?;
                }
            }
            Ok(())
        })?;
        match pending.name() {
            Some(missing) => {
                let error = Error::new(Kind::Input, format!("the artifact's launches never write {missing}"));
                Err(error.help("it was compiled from a model of another shape, or by another version of mansard"))
            }
            None => Ok(out),
        }
    }
}

/// A step that wants all logits finds nothing in place of estimates.
fn estimates(body: &Graph) -> bool {
    body.nodes.iter().any(|n| n.op.class() == Class::Estimate)
}

fn given(watch: &Watch<'_>) -> Result<Values> {
    let named = [("tokens", Arg::Tokens), ("positions", Arg::Positions), ("rows", Arg::Rows)];
    let mut values = Values::from([("step".to_string(), Value::Step(watch.step()))]);
    for (name, arg) in named {
        values.insert(name.into(), watch.read(arg, &Type::Step, false)?);
    }
    Ok(values)
}

/// The values of a body's inputs. A cache that the body appends to has the positions before the step.
fn read_inputs(body: &Graph, watch: &Watch<'_>) -> Result<Vec<Value>> {
    let appended = |index: usize| {
        let to = |n: &mansard_ir::Node| n.op.class() == Class::Append && n.operands[0] == ValueId(index as u32);
        body.nodes.iter().any(to)
    };
    let mut args = watch.launch().args.iter();
    let read = |(index, input): (usize, &mansard_ir::Input)| {
        if input.ty == Type::Step {
            return Ok(Value::Step(watch.step()));
        }
        let Some(arg) = args.next() else { bail!(Input, "a launch has no argument for %{}", input.name) };
        watch.read(*arg, &input.ty, !appended(index)).at(|| format!("input %{}", input.name))
    };
    body.inputs.iter().enumerate().map(read).collect::<Result<_>>().at(|| format!("kernel `{}`", body.name))
}

/// A launch that has run against the interpreter.
fn compare(body: &Graph, inputs: &[Value], watch: &Watch<'_>, call: Option<usize>) -> Result<KernelCheck> {
    let place = || format!("kernel `{}`", body.name);
    let no_weights = &mut |name: &str, _: &Type| bail!(Input, "weight `{name}` in a kernel");
    let expected = eval::graph(body, inputs, no_weights).at(place)?;
    let mut written = watch.launch().args.iter().skip(body.arguments());
    let mut off = 0f64;
    for ((_, value), expected) in body.results.iter().zip(&expected) {
        let ty = body.ty(*value);
        let args = &watch.launch().args;
        let arg = if in_place(body, *value) { changed(body, *value, args) } else { written.next() };
        let Some(arg) = arg else { bail!(Input, "kernel `{}`: a launch has too few arguments", body.name) };
        off = off.max(distance::worst(&watch.read(*arg, ty, true).at(place)?, expected));
    }
    let tokens = watch.step().tokens();
    let tolerance = distance::of_kernel(body);
    Ok(KernelCheck { kernel: body.name.clone(), call, tokens, launch: watch.launch, off, tolerance })
}

/// The argument that a result is in place of: the input at the root of appends, or the estimates.
fn changed<'a>(body: &Graph, value: ValueId, args: &'a [Arg]) -> Option<&'a Arg> {
    args.get(body.argument(body.root(value))?)
}

/// The results that a call has yet to write.
struct Pending<'a> {
    model: Option<&'a Model>,
    call: Option<usize>,
    left: Vec<(&'a str, &'a Graph, ValueId)>,
}

impl<'a> Pending<'a> {
    fn new(model: Option<&'a Model>) -> Pending<'a> {
        let mut pending = Pending { model, call: None, left: vec![] };
        pending.next();
        pending
    }

    /// Goes on to the next call that writes something.
    fn next(&mut self) {
        let Some(model) = self.model else { return };
        while self.left.is_empty() && self.call.is_none_or(|call| call < model.calls.len()) {
            let call = self.call.map_or(0, |call| call + 1);
            self.call = Some(call);
            let graph = model.calls.get(call).and_then(|call| model.graphs_of(call).next());
            let results = graph.into_iter().flat_map(|g| g.results.iter().map(move |(name, v)| (name.as_str(), g, *v)));
            // Caches stay where they are, and what only passes through is written by nobody.
            let written =
                |(_, g, v): &(&str, &Graph, ValueId)| g.node(*v).is_some() && !matches!(g.ty(*v), Type::Cache { .. });
            self.left = results.filter(written).collect();
        }
    }

    /// Takes what a launch has written.
    fn written(&mut self, program: &Program, body: &Graph, watch: &Watch<'_>, results: &mut Values) -> Result<()> {
        let args = &watch.launch().args;
        let rescored = body.results.iter().filter(|(_, v)| in_place(body, *v));
        let rescored = rescored.filter_map(|(_, v)| changed(body, *v, args));
        for arg in args.iter().skip(body.arguments()).chain(rescored) {
            let Arg::Buffer(id) = arg else { continue };
            let buffer = &program.buffers[id.0 as usize];
            // Rescored estimates keep their name; as an output they have the result's.
            let outputs = &program.outputs;
            let is = |(name, graph, v): &(&str, &Graph, ValueId)| {
                let named = buffer.name == format!("{}.{name}", graph.name);
                let output = || outputs.iter().any(|o| o.name == *name && o.buffer == *id);
                (named || output()) && buffer.ty == graph.ty(*v).to_string()
            };
            let Some(at) = self.left.iter().position(is) else { continue };
            let (name, graph, value) = self.left[at];
            let found = watch.read(*arg, graph.ty(value), true)?;
            // Results of the same value share its first name.
            let same = |(_, _, v): &(&str, &Graph, ValueId)| *v == value;
            self.left.iter().filter(|r| same(r)).for_each(|r| _ = results.insert(r.0.to_string(), found.clone()));
            results.insert(name.to_string(), found);
            self.left.retain(|r| !same(r));
        }
        self.next();
        Ok(())
    }

    fn name(&self) -> Option<String> {
        self.left.first().map(|(name, graph, _)| format!("`{name}` of @{}", graph.name))
    }
}
