//! The first thing that is wrong with an artifact: a weight, a pass, a rewrite rule, or a kernel.
//!
//! ```text
//!  the first layer that leaves tolerance
//!    its packed weights             against the model's                         -> import, or packing
//!    its graph after each pass      against the one before, in the interpreter  -> a pass
//!      saturate with n of its rules, n by halving                               -> a rule
//!    its kernels' bodies            against those that the passes make here     -> import: another graph
//!    its kernels, one by one        against their bodies                        -> a kernel
//! ```
//!
//! In the order in which a compilation goes, so the first thing found has nothing before it to blame. Passes run here on the
//! model, with the options in the artifact's provenance.

use super::layers::{Loaded, Values};
use super::trace::{Compared, KernelCheck, Recorded, Tracer};
use super::{Request, compare, distance, layers, other_ranges, record};
use mansard_ir::eval::{Step, Tensor, Value};
use mansard_ir::model::Call;
use mansard_ir::plan::WeightSpec;
use mansard_ir::text::{parse, print_model};
use mansard_ir::types::Type;
use mansard_ir::{Graph, Model, Op, Place, Result, decode};
use mansard_passes::rules::RuleSet;
use mansard_passes::{self as passes, Event, Hooks, Options, State, manager};
use serde::Serialize;
use std::collections::BTreeSet;

/// Where in a compilation something is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The model was read otherwise: a weight, or a graph, is another.
    Import,
    /// A weight was packed otherwise.
    Packing,
    /// A pass changes values.
    Pass,
    /// A rewrite rule is no equation.
    Rule,
    /// A kernel's code is not its body.
    Kernel,
    /// A layer is too far off, and each step of its compilation near enough.
    Layer,
}

/// What is wrong.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Where.
    pub stage: Stage,
    /// The weight, pass, rule, kernel or layer.
    pub name: String,
    /// The layer it was found in.
    pub layer: String,
    /// How far values are off.
    pub off: f64,
    /// How far they may be.
    pub tolerance: f64,
    /// A text case: what `mansard opt` and the case tests read.
    #[serde(skip)]
    pub reproducer: String,
}

/// How the artifact was compiled, as far as that can be repeated.
pub struct Compilation<'a> {
    /// The model as imported for it.
    pub model: &'a Model,
    /// The passes' options.
    pub options: Options,
}

/// The first thing that is wrong; `None` where nothing is. `again` is how the artifact was compiled.
///
/// # Errors
/// As [`super::check`]; and those of passes that fail here.
pub fn bisect(request: &Request<'_>, again: &Compilation<'_>) -> Result<Option<Finding>> {
    let program = &request.artifact.manifest().program;
    let tolerance = request.tolerance.unwrap_or_else(|| distance::of_layers(program, request.model));
    let mut tracer = Tracer::new(program, Compared::First)?;
    let steps = record(request, &mut tracer)?;
    let found = compare(request.model, &steps, tolerance, request.progress)?;
    let Some(index) = found.iter().position(|layer| !layer.holds) else {
        other_ranges(request, &mut tracer)?;
        return Ok(tracer.checks.iter().find(|k| !k.holds()).map(|k| kernel(request, k)));
    };
    let search = Search { request, again, index, steps: &steps, off: found[index].off, tolerance };
    if let Some(finding) = search.weights()? {
        return Ok(Some(finding));
    }
    if let Some(finding) = search.passes()? {
        return Ok(Some(finding));
    }
    let mut tracer = Tracer::new(program, Compared::Call(index))?;
    record(request, &mut tracer)?;
    let wrong = tracer.checks.iter().find(|k| k.call == Some(index) && !k.holds());
    if let Some(wrong) = wrong.or(tracer.checks.iter().find(|k| !k.holds())) {
        return Ok(Some(kernel(request, wrong)));
    }
    search.bodies().map(Some)
}

/// A kernel that is not its body.
fn kernel(request: &Request<'_>, check: &KernelCheck) -> Finding {
    let manifest = request.artifact.manifest();
    let text = manifest.program.kernels.iter().find(|k| k.name == check.kernel).map_or("", |k| k.text.as_str());
    let target = manifest.code.first().map_or("", |code| code.target.as_str());
    let layer = check.call.and_then(|call| request.model.calls.get(call)).map_or("", layers::name);
    let words = format!("Kernel `{}` is off by {:.2e} in a step of {} tokens.", check.kernel, check.off, check.tokens);
    Finding {
        stage: Stage::Kernel,
        name: check.kernel.clone(),
        layer: layer.into(),
        off: check.off,
        tolerance: check.tolerance,
        reproducer: format!("# {words}\n# emit: mlir\n# target: {target}\n{text}"),
    }
}

/// A layer that is too far off, on its way through the compilation.
struct Search<'a> {
    request: &'a Request<'a>,
    again: &'a Compilation<'a>,
    /// Of the call.
    index: usize,
    steps: &'a [Recorded],
    off: f64,
    tolerance: f64,
}

impl Search<'_> {
    fn call(&self) -> &Call {
        &self.request.model.calls[self.index]
    }

    fn finding(
        &self,
        stage: Stage,
        name: impl Into<String>,
        (off, tolerance): (f64, f64),
        reproducer: String,
    ) -> Finding {
        Finding { stage, name: name.into(), layer: layers::name(self.call()).into(), off, tolerance, reproducer }
    }

    /// Every packed weight that the layer's launches read, as kernels see it, against the model's.
    fn weights(&self) -> Result<Option<Finding>> {
        let artifact = self.request.artifact;
        let names: BTreeSet<&String> = self.steps.iter().flat_map(|step| &step.weights[self.index]).collect();
        let packed = artifact.weights()?;
        for (spec, bytes) in artifact.manifest().program.weights.iter().zip(packed) {
            if !names.contains(&spec.name) {
                continue;
            }
            let place = || format!("weight `{}`", spec.name);
            let ty = weight_type(&spec.ty).at(place)?;
            let Some(expected) = expected(self.request.model, spec).at(place)? else { continue };
            let Some((dtype, _)) = ty.as_tensor() else { continue };
            let found = Value::Tensor(decode::weight(dtype, &expected.shape, bytes).at(place)?);
            let off = distance::typical(&distance::rows(&found, &Value::Tensor(expected.clone()), None));
            // Twice the format's rounding, and that of scales to f16.
            let tolerance = distance::ROUNDING + 2.0 * distance::of_weight(&spec.name, &spec.ty, self.request.model);
            if off > tolerance {
                let stage =
                    if self.packs_well(&spec.name, &expected, tolerance)? { Stage::Import } else { Stage::Packing };
                let words = format!("# The artifact's `{}` is off by {off:.2e} of the model's.\n", spec.name);
                let case = format!("{words}# passes: canonicalize\n{}", print_model(&self.alone(self.again.model)));
                return Ok(Some(self.finding(stage, spec.name.clone(), (off, tolerance), case)));
            }
        }
        Ok(None)
    }

    /// Packed here, the model's weight is what it should be: the artifact was made of another.
    fn packs_well(&self, name: &str, expected: &Tensor, tolerance: f64) -> Result<bool> {
        let Ok(weight) = self.again.model.weights.get(name) else { return Ok(true) };
        let (mut bytes, dtype) = (vec![], weight.dtype_shape().0);
        mansard_backends::pack::pack(weight, 1, &mut |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        let found = Value::Tensor(decode::weight(dtype, &expected.shape, &bytes)?);
        let rows = distance::rows(&found, &Value::Tensor(expected.clone()), None);
        Ok(distance::typical(&rows) <= tolerance)
    }

    /// The model with the layer's graph only.
    fn alone(&self, model: &Model) -> Model {
        let graphs = model.graphs_of(self.call()).cloned().collect();
        Model { graphs, calls: vec![], outputs: vec![], ..model.clone() }
    }

    /// The layer's graph after each pass, against the one before it.
    fn passes(&self) -> Result<Option<Finding>> {
        let mut models = vec![self.again.model.clone()];
        let first = State::new(models[0].clone());
        let names: Vec<&str> = passes::PIPELINE.iter().copied().filter(|name| *name != "plan").collect();
        let mut sink = |event: Event<'_>| {
            if let Event::Dump(_, state) = event {
                models.push(state.model.clone());
            }
        };
        let mut hooks = Hooks::new(&mut sink);
        hooks.dump_after = names.iter().map(|name| name.to_string()).collect();
        manager::run(&names, first, &self.again.options, &mut hooks)?;
        for (name, pair) in names.iter().zip(models.windows(2)) {
            let tolerance = self.between(name, &pair[0]);
            let off = self.apart(&pair[0], &pair[1])?;
            if off > tolerance {
                if *name == "saturate"
                    && let Some((rule, off)) = self.rule(&pair[0], tolerance)?
                {
                    let case = self.case(name, &format!("Rule {rule} changes values by {off:.2e}."), &pair[0]);
                    return Ok(Some(self.finding(Stage::Rule, rule, (off, tolerance), case)));
                }
                let case = self.case(name, &format!("Pass {name} changes values by {off:.2e}."), &pair[0]);
                return Ok(Some(self.finding(Stage::Pass, *name, (off, tolerance), case)));
            }
        }
        Ok(None)
    }

    /// How far a pass may change the layer's results: by what is promised where that is its work, else by rounding, which
    /// roundings to int8 make more of.
    fn between(&self, pass: &str, before: &Model) -> f64 {
        let quantizes = |g: &Graph| g.nodes.iter().any(|n| n.op.class() == mansard_ir::ops::Class::Quantize);
        match pass {
            "precision" => self.tolerance,
            _ if before.graphs.iter().any(quantizes) => 2e-2f64.min(self.tolerance),
            _ => distance::ROUNDING.min(self.tolerance),
        }
    }

    fn case(&self, pass: &str, words: &str, before: &Model) -> String {
        format!("# {words}\n# passes: {pass}\n# same: {}\n{}", distance::ROUNDING, print_model(&self.alone(before)))
    }

    /// The first rule with which `saturate` changes values; `None` where it does so without any.
    fn rule(&self, before: &Model, tolerance: f64) -> Result<Option<(&'static str, f64)>> {
        let rules = self.again.options.rules.rules();
        let with = |first: usize| -> Result<f64> {
            let rules = RuleSet { first, ..self.again.options.rules };
            let options = Options { rules, ..self.again.options.clone() };
            let mut sink = |_: Event<'_>| {};
            let (state, _) =
                manager::run(&["saturate"], State::new(before.clone()), &options, &mut Hooks::new(&mut sink))?;
            self.apart(before, &state.model)
        };
        let (mut good, mut bad) = (0, rules.len());
        if with(good)? > tolerance {
            return Ok(None);
        }
        while good + 1 < bad {
            let middle = (good + bad) / 2;
            if with(middle)? > tolerance { bad = middle } else { good = middle }
        }
        Ok(rules.get(bad - 1).map(|rule| rule.name()).zip(Some(with(bad)?)))
    }

    /// How far the layer's results are apart in two programs, on the artifact's inputs: those of the first step, and of its
    /// first token alone, for which other graphs may be meant.
    fn apart(&self, before: &Model, after: &Model) -> Result<f64> {
        let mut inputs = self.steps[0].given.clone();
        self.steps[0].results[..self.index].iter().for_each(|results| inputs.extend(results.clone()));
        let mut off = 0f64;
        for inputs in [first_token(&inputs), inputs] {
            let tokens = inputs["step"].step()?.tokens();
            let [x, y] = [before, after].map(|model| -> Result<Values> {
                Ok(Loaded::new(model, self.call(), tokens)?.run(&inputs, &Values::new())?.values)
            });
            for (name, x) in &x? {
                let base = super::stream(&inputs, name);
                let rows = y.as_ref().map(|y| distance::rows(&y[name], x, base));
                off = off.max(rows.map_or(f64::INFINITY, |rows| distance::typical(&rows)));
            }
        }
        Ok(off)
    }

    /// Kernels of the layer that the passes here would make otherwise.
    fn bodies(&self) -> Result<Finding> {
        let mut sink = |_: Event<'_>| {};
        let (plan, _, _) = passes::compile(self.again.model.clone(), &self.again.options, &mut Hooks::new(&mut sink))?;
        let known: BTreeSet<String> = plan.program.kernels.iter().map(|k| body(&k.text)).collect();
        let kernels = &self.request.artifact.manifest().program.kernels;
        let launched: BTreeSet<&String> = self.steps.iter().flat_map(|step| &step.kernels[self.index]).collect();
        let other = kernels.iter().find(|k| launched.contains(&k.name) && !known.contains(&body(&k.text)));
        let measured = (self.off, self.tolerance);
        Ok(match other {
            Some(kernel) => {
                let words = format!("The passes make no kernel `{}` of this model.", kernel.name);
                self.finding(
                    Stage::Import,
                    kernel.name.clone(),
                    measured,
                    format!("# {words}\n# emit: mlir\n{}", kernel.text),
                )
            }
            None => {
                let words = format!("Layer {} is off by {:.2e}.", layers::name(self.call()), self.off);
                let case = self.case("canonicalize,precision,saturate", &words, self.again.model);
                self.finding(Stage::Layer, layers::name(self.call()), measured, case)
            }
        })
    }
}

/// A body without its name.
fn body(text: &str) -> String {
    text.split_once('(').map_or(text, |(_, rest)| rest).to_string()
}

/// A weight's type from its text.
fn weight_type(ty: &str) -> Result<Type> {
    let source = format!("graph @w(%x: {ty}) stage imported {{\n  return x = %x\n}}\n");
    Ok(parse("type", &source)?.graphs[0].inputs[0].ty.clone())
}

/// The reals that a weight has if it is made of the model's; `None` where the model has not all it is made of.
fn expected(model: &Model, spec: &WeightSpec) -> Result<Option<Tensor>> {
    let recipe = spec.pack()?.recipe;
    let mut entries = recipe.nodes.iter().filter(|n| n.op == Op::WEIGHT);
    if !entries.all(|n| model.weights.get(n.attrs.str("name")).is_ok()) {
        return Ok(None);
    }
    let weight = model.weights.make(&recipe)?;
    Ok(Some(Tensor::new(weight.dtype_shape().1, weight.read_all()?)))
}

/// A step of the first token alone.
fn first_token(values: &Values) -> Values {
    let tokens = values["step"].step().map_or(1, Step::tokens);
    let one = |value: &Value| match value {
        Value::Step(_) => Value::Step(Step::new(&[(0, 1)])),
        Value::Ints(ints) if ints.data.len() == tokens => Value::from_ints(vec![ints.data[0]]),
        Value::Ints(_) => Value::from_ints(vec![0]),
        Value::Tensor(t) if t.shape.first() == Some(&tokens) => {
            let rest = t.shape[1..].to_vec();
            Value::Tensor(Tensor::new([vec![1], rest].concat(), t.outer(0).to_vec()))
        }
        other => other.clone(),
    };
    values
        .iter()
        .map(|(name, value)| (name.clone(), if name == "rows" { Value::from_ints(vec![0]) } else { one(value) }))
        .collect()
}
