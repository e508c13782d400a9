//! The interpreter's side: a model's calls one by one, each on inputs from outside, weights held for one call only.

use mansard_ir::eval::{self, Cache, Value};
use mansard_ir::model::Call;
use mansard_ir::{Error, Graph, Kind, Model, Op, Place, Result};
use std::collections::{BTreeMap, HashMap};

/// Values by the names that calls bind.
pub type Values = BTreeMap<String, Value>;

/// One call's graph and its weights, dequantized.
pub struct Loaded<'a> {
    graph: &'a Graph,
    weights: HashMap<&'a str, Value>,
}

/// What a call left behind.
pub struct Called {
    /// Results that later calls see.
    pub values: Values,
    /// Caches, for the call in the next step.
    pub caches: Values,
}

impl<'a> Loaded<'a> {
    /// Reads the weights of a call for steps of `tokens` tokens.
    ///
    /// # Errors
    /// Where there is no such graph, or a weight cannot be read.
    pub fn new(model: &'a Model, call: &Call, tokens: usize) -> Result<Loaded<'a>> {
        let Some(graph) = model.graphs.iter().filter(|g| g.name == call.graph).find(|g| g.suits(tokens)) else {
            return Err(Error::new(Kind::Input, format!("no graph @{} for {tokens} tokens", call.graph)));
        };
        let mut weights = HashMap::new();
        for node in graph.nodes.iter().filter(|n| n.op == Op::WEIGHT) {
            let name = node.attrs.str("name");
            let weight = model.weights.get(&format!("{}{name}", call.prefix))?;
            weights.insert(name, Value::of_weight(weight).at(|| format!("weight `{}{name}`", call.prefix))?);
        }
        Ok(Loaded { graph, weights })
    }

    /// Evaluates it on what `values` binds its inputs to. A cache that `caches` has none of is empty.
    ///
    /// # Errors
    /// As [`eval::graph`].
    pub fn run(&self, values: &Values, caches: &Values) -> Result<Called> {
        let step = values.get("step").ok_or_else(|| missing("step"))?.step()?;
        let mut inputs = vec![];
        for input in &self.graph.inputs {
            inputs.push(match Cache::empty(&input.ty, step.sequences.len()) {
                Some(empty) => caches.get(&input.name).cloned().unwrap_or(Value::Cache(empty)),
                None => values.get(&input.name).cloned().ok_or_else(|| missing(&input.name))?,
            });
        }
        let known = &self.weights;
        let results =
            eval::graph(self.graph, &inputs, &mut |name, _| known.get(name).cloned().ok_or_else(|| missing(name)))?;
        let mut called = Called { values: Values::new(), caches: Values::new() };
        for ((name, _), value) in self.graph.results.iter().zip(results) {
            let kind = if matches!(value, Value::Cache(_)) { &mut called.caches } else { &mut called.values };
            kind.insert(name.clone(), value);
        }
        Ok(called)
    }
}

fn missing(name: &str) -> Error {
    Error::new(Kind::Internal, format!("`{name}` is bound by nothing"))
}

/// How a call is named in reports: its prefix, or its graph where that is empty.
pub fn name(call: &Call) -> &str {
    if call.prefix.is_empty() { &call.graph } else { call.prefix.trim_end_matches('.') }
}
