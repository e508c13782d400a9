//! A format for each weight by name: graphs whose calls no longer agree become several.
//!
//! ```text
//! call @layer "0."  call @layer "1."  call @layer "2."       0.up: q8_0   1.up: q8_0   2.up: q4_0
//!     ->  call @layer "0."  call @layer "1."  call @layer_2 "2."
//! ```
//!
//! Calls with the same formats share a graph, so the passes see as many graphs as there are different layers.

use crate::Options;
use crate::weights::{Role, fits, made, names, retype, roles, short};
use ir::{DType, Error, Graph, Kind, Model, Op, Result};
use std::collections::BTreeMap;

/// Gives the weights of `formats` those formats, and says what changed.
///
/// # Errors
/// Where there is no such weight, or its rows do not fill the groups of its format.
pub fn assign(model: &mut Model, options: &Options) -> Result<Vec<String>> {
    let formats = &options.formats;
    if formats.is_empty() {
        return Ok(vec![]);
    }
    let mut changed = BTreeMap::<(String, DType, Role), usize>::new();
    let roles = roles(model);
    for (name, format) in formats {
        let weight = model.weights.get(name)?;
        let ((from, _), (_, columns)) = (weight.dtype_shape(), weight.rows_columns());
        fits(name, columns, *format)?;
        let exact = from == *format || *format == DType::F32 || weight.stored_as(*format);
        if !exact {
            let role = roles.get(name).map_or(Role::Table, |(role, _)| *role);
            *changed.entry((short(name), *format, role)).or_default() += 1;
        }
    }
    split(model, formats)?;
    retype(model, formats);
    let line = |((name, format, role), count): ((String, DType, Role), usize)| {
        format!("weights: `{name}` ({count}) {}", made(role, format, options))
    };
    Ok(changed.into_iter().map(line).collect())
}

/// Makes a graph for every combination of formats that calls of one graph have.
fn split(model: &mut Model, formats: &BTreeMap<String, DType>) -> Result<()> {
    let mut graphs: Vec<Graph> = vec![];
    for graph in std::mem::take(&mut model.graphs) {
        let of_call = |prefix: &str| -> Vec<Option<DType>> {
            let weights = graph.nodes.iter().filter(|n| n.op == Op::WEIGHT);
            weights.map(|n| formats.get(&format!("{prefix}{}", n.attrs.str("name"))).copied()).collect()
        };
        let mut kinds: Vec<Vec<Option<DType>>> = vec![];
        for call in model.calls.iter_mut().filter(|call| call.graph == graph.name) {
            let kind = of_call(&call.prefix);
            let index = kinds.iter().position(|k| *k == kind).unwrap_or_else(|| {
                kinds.push(kind);
                kinds.len() - 1
            });
            if index > 0 {
                call.graph = format!("{}_{}", graph.name, index + 1);
            }
        }
        for index in 1..kinds.len() {
            let name = format!("{}_{}", graph.name, index + 1);
            graphs.push(Graph { name, ..graph.clone() });
        }
        graphs.push(graph);
    }
    graphs.sort_by_key(|g| model.calls.iter().position(|call| call.graph == g.name));
    let mut twins = graphs.windows(2).filter(|pair| pair[0].name == pair[1].name);
    if let Some([twin, _]) = twins.next() {
        return Err(Error::new(Kind::Unsupported, format!("two graphs would be called @{}", twin.name)));
    }
    model.graphs = graphs;
    Ok(())
}

/// The weights of a model in the order of its calls, each once, by the names of the weight table.
pub(crate) fn in_order(model: &Model) -> Vec<String> {
    let mut ordered = vec![];
    for call in &model.calls {
        for graph in model.graphs_of(call) {
            for node in graph.nodes.iter().filter(|n| n.op == Op::WEIGHT) {
                ordered.extend(names(std::slice::from_ref(call), &graph.name, node));
            }
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    ordered.retain(|name| seen.insert(name.clone()));
    ordered
}
