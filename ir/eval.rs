//! The reference interpreter: it defines what a program computes, and everything faster is compared with it.
//!
//! ```text
//! graph(&graph, &inputs, weights)            results of one graph, at any stage
//! Interpreter::new(&model).step(..)          a model's calls, caches kept from step to step
//! ```
//!
//! Each op's meaning is the `eval` of its row. An optimized graph is the same nodes in groups, a kernel's body has its
//! weights as inputs; both evaluate like any other graph. Written for reading: one token of a 135M-parameter model costs a
//! few tenths of a second in an optimized build.

pub use crate::planes::Planes;
pub use crate::value::{Cache, Extents, Ints, Routing, Sequence, Step, Tensor, Value};

use crate::formats::DType;
use crate::graph::{Graph, Node};
use crate::model::{Call, Model};
use crate::ops::{Class, Op};
use crate::types::Type;
use crate::{Error, Kind, Place, Result, bail};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Where a graph's weights come from: values by name and type.
pub type Weights<'a> = dyn FnMut(&str, &Type) -> Result<Value> + 'a;

/// Evaluates a graph on `inputs`, in the graph's order, and returns its results in their order.
///
/// # Errors
/// Where the inputs do not fit the graph, a weight cannot be had, or an index is out of range; the place is the node.
pub fn graph(graph: &Graph, inputs: &[Value], weights: &mut Weights<'_>) -> Result<Vec<Value>> {
    let place = || format!("graph @{}", graph.name);
    if inputs.len() != graph.inputs.len() {
        bail!(Input, "@{}: expected {} inputs, found {}", graph.name, graph.inputs.len(), inputs.len());
    }
    let mut extents = Extents::default();
    for (input, value) in graph.inputs.iter().zip(inputs) {
        value.check(&input.ty, &mut extents).at(|| format!("input %{}", input.name)).at(place)?;
    }
    let mut values: Vec<Value> = Vec::with_capacity(graph.nodes.len()); // of the nodes; inputs are borrowed
    for (index, node) in graph.nodes.iter().enumerate() {
        let here = || format!("{} = {}", graph.value_of(index), node.op);
        let value = if node.op == Op::WEIGHT {
            let value = weights(node.attrs.str("name"), &node.ty).at(here).at(place)?;
            value.check(&node.ty, &mut extents).at(here).at(place)?;
            value
        } else {
            let mut operands: Vec<&Value> = node.operands.iter().map(|v| find(inputs, &values, v.0 as usize)).collect();
            let rounded = rounded_weight(graph, node, &operands);
            if let Some(weight) = &rounded {
                operands[1] = weight;
            }
            (node.op.row().eval)(&operands, &node.attrs).at(here).at(place)?
        };
        values.push(value);
    }
    Ok(graph.results.iter().map(|(_, v)| find(inputs, &values, v.0 as usize).clone()).collect())
}

/// The integer weight of a product with bf16 activations: as bf16 too.
fn rounded_weight(graph: &Graph, node: &Node, operands: &[&Value]) -> Option<Value> {
    let dtype = |operand: usize| graph.ty(*node.operands.get(operand)?).dtype();
    let widened = node.op.class() == Class::Contract && dtype(0)? == DType::BF16 && dtype(1)?.int().is_some();
    match operands.get(1).filter(|_| widened)? {
        Value::Tensor(w) => {
            let data = w.data.iter().map(|x| half::bf16::from_f32(*x).to_f32());
            Some(Value::Tensor(Tensor::new(w.shape.clone(), data.collect())))
        }
        _ => None,
    }
}

fn find<'a>(inputs: &'a [Value], values: &'a [Value], value: usize) -> &'a Value {
    inputs.get(value).unwrap_or_else(|| &values[value - inputs.len()])
}

/// Names a sequence over its steps.
pub type SequenceKey = usize;

/// What sequences have in a cache.
#[derive(Default)]
struct Kept {
    /// Of a position.
    width: usize,
    sequences: BTreeMap<SequenceKey, Arc<Vec<f32>>>,
}

/// Runs a model step by step, keeping the caches of its sequences.
pub struct Interpreter<'a> {
    model: &'a Model,
    weights: HashMap<String, Value>,
    /// Call prefix and input name -> sequence -> `[positions, heads, dim]`.
    caches: BTreeMap<String, Kept>,
    /// Positions each sequence has in its caches, and those before its last that were forgotten.
    lengths: BTreeMap<SequenceKey, usize>,
    forgotten: BTreeMap<SequenceKey, usize>,
}

/// A cache to be kept once the whole step has succeeded.
type NewCache = (String, Cache);

impl<'a> Interpreter<'a> {
    /// An interpreter with no sequences. The model should be verified.
    pub fn new(model: &'a Model) -> Interpreter<'a> {
        Interpreter {
            model,
            weights: HashMap::new(),
            caches: BTreeMap::new(),
            lengths: BTreeMap::new(),
            forgotten: BTreeMap::new(),
        }
    }

    /// Runs one step: new tokens for each sequence; `rows` says which of the step's tokens (counted over all sequences)
    /// leave it. A sequence never seen before starts empty. Returns the model's outputs by name.
    ///
    /// # Errors
    /// Where a graph or weight is missing, or a token or row is out of range; the sequences are then as before.
    pub fn step(&mut self, sequences: &[(SequenceKey, &[u32])], rows: &[usize]) -> Result<BTreeMap<String, Tensor>> {
        self.step_wanting(0, sequences, rows)
    }

    /// [`Interpreter::step`] in which only `candidates` of a row's largest logits must be exact; 0: all.
    ///
    /// # Errors
    /// As [`Interpreter::step`].
    pub fn step_wanting(
        &mut self,
        candidates: usize,
        sequences: &[(SequenceKey, &[u32])],
        rows: &[usize],
    ) -> Result<BTreeMap<String, Tensor>> {
        let past = |key: &SequenceKey| self.lengths.get(key).copied().unwrap_or(0);
        let step = Step::new(&sequences.iter().map(|(key, new)| (past(key), new.len())).collect::<Vec<_>>());
        let step = step.wanting(candidates);
        let keys: Vec<SequenceKey> = sequences.iter().map(|(key, _)| *key).collect();
        let tokens: Vec<i32> = sequences.iter().flat_map(|(_, new)| *new).map(|t| *t as i32).collect();
        let rows: Vec<i32> = rows.iter().map(|r| *r as i32).collect();
        let mut values = BTreeMap::from([
            ("tokens".to_owned(), Value::from_ints(tokens)),
            ("positions".to_owned(), Value::from_ints(self.positions(&keys, &step))),
            ("rows".to_owned(), Value::from_ints(rows)),
            ("step".to_owned(), Value::Step(step.clone())),
        ]);
        let mut kept = vec![];
        for call in &self.model.calls {
            self.call(call, &keys, step.tokens(), &mut values, &mut kept)
                .at(|| format!("call @{} with {:?}", call.graph, call.prefix))?;
        }
        let mut outputs = BTreeMap::new();
        for name in &self.model.outputs {
            let value = values.get(name).ok_or_else(|| missing("output", name))?;
            outputs.insert(name.clone(), value.tensor()?.clone());
        }
        for (name, cache) in kept {
            let kept = self.caches.entry(name).or_default();
            kept.width = cache.heads * cache.dim;
            kept.sequences.extend(keys.iter().copied().zip(cache.sequences));
        }
        for (key, sequence) in keys.iter().zip(&step.sequences) {
            self.lengths.insert(*key, sequence.past + sequence.len);
        }
        Ok(outputs)
    }

    /// Takes positions out of a sequence's caches: what follows neither sees them nor is numbered anew.
    pub fn forget(&mut self, key: SequenceKey, positions: std::ops::Range<usize>) {
        let Some(length) = self.lengths.get_mut(&key).filter(|_| !positions.is_empty()) else { return };
        for Kept { width, sequences } in self.caches.values_mut() {
            if let Some(cache) = sequences.get_mut(&key) {
                Arc::make_mut(cache).drain(positions.start * *width..positions.end * *width);
            }
        }
        *length -= positions.len();
        *self.forgotten.entry(key).or_default() += positions.len();
    }

    /// Of every token of a step, in its sequence's text.
    fn positions(&self, keys: &[SequenceKey], step: &Step) -> Vec<i32> {
        let forgotten = |key: &SequenceKey| self.forgotten.get(key).copied().unwrap_or(0);
        let of = |(key, sequence): (&SequenceKey, &Sequence)| {
            let first = sequence.past + forgotten(key);
            (first..first + sequence.len).map(|p| p as i32)
        };
        keys.iter().zip(&step.sequences).flat_map(of).collect()
    }

    fn call(
        &mut self,
        call: &Call,
        keys: &[SequenceKey],
        tokens: usize,
        values: &mut BTreeMap<String, Value>,
        kept: &mut Vec<NewCache>,
    ) -> Result<()> {
        let Some(body) = self.model.graphs_of(call).find(|g| g.suits(tokens)) else {
            bail!(Input, "no graph @{} for {tokens} tokens", call.graph);
        };
        let mut inputs = vec![];
        for input in &body.inputs {
            inputs.push(match self.cache(&format!("{}{}", call.prefix, input.name), &input.ty, keys) {
                Some(cache) => Value::Cache(cache),
                None => values.get(&input.name).cloned().ok_or_else(|| missing("input", &input.name))?,
            });
        }
        let (model, known) = (self.model, &mut self.weights);
        let results = graph(body, &inputs, &mut |name, _| weight(model, known, &format!("{}{name}", call.prefix)))?;
        for ((name, _), value) in body.results.iter().zip(results) {
            match value {
                Value::Cache(cache) => kept.push((format!("{}{name}", call.prefix), cache)),
                value => _ = values.insert(name.clone(), value),
            }
        }
        Ok(())
    }

    /// What the sequences have in the cache of that name; `None` for types that are no cache.
    fn cache(&self, name: &str, ty: &Type, keys: &[SequenceKey]) -> Option<Cache> {
        let mut cache = Cache::empty(ty, keys.len())?;
        let known = self.caches.get(name);
        for (sequence, key) in cache.sequences.iter_mut().zip(keys) {
            *sequence = known.and_then(|known| known.sequences.get(key)).cloned().unwrap_or_default();
        }
        Some(cache)
    }
}

fn missing(what: &str, name: &str) -> Error {
    Error::new(Kind::Input, format!("{what} `{name}` is neither returned by an earlier call nor given by the step"))
}

/// The weight of that name, dequantized when first asked for.
fn weight(model: &Model, known: &mut HashMap<String, Value>, name: &str) -> Result<Value> {
    if let Some(value) = known.get(name) {
        return Ok(value.clone());
    }
    let value = Value::of_weight(model.weights.get(name)?).at(|| format!("weight `{name}`"))?;
    known.insert(name.to_owned(), value.clone());
    Ok(value)
}

#[cfg(test)]
#[path = "eval_tests.rs"]
mod tests;
