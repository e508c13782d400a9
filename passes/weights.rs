//! What format each matrix is packed in, where another than the file's is asked for: the graphs and the weight table get the
//! new types; packing then rounds or quantizes tensor by tensor.
//!
//! ```text
//! bf16, f16           every matrix
//! int8, int4, ...     products: that format       token table and vocabulary projection: at least int8
//!                     routers and other tables: they stay as they are
//! ```
//!
//! Vectors are never touched. A matrix whose rows do not fill whole groups is an error: nothing falls back.

use crate::Options;
use ir::model::Call;
use ir::ops::Class;
use ir::quantize::{Quantizer, can_quantize};
use ir::{DType, Dim, Error, Graph, Kind, Model, Node, Op, Result, Type, ValueId};
use std::collections::BTreeMap;

/// What a matrix is for; where one serves twice (tied embeddings), the later of these counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// Rows of the step are multiplied with it.
    Product,
    /// Rows are taken from it by something else than tokens.
    Table,
    /// Decides which experts a token goes to: small, and its rounding is not averaged out.
    Router,
    /// Tokens' rows are taken from it, or rows that leave the step are multiplied with it.
    Vocabulary,
    /// Multiplied with activations that the graph itself quantizes, which go with integers only.
    Quantized,
    /// Computed with when packing.
    Folded,
}

/// Gives every matrix of `model` the format it has under `to`, and says what changed.
///
/// # Errors
/// Where nothing is quantized to `to`, or a matrix's rows do not fill its groups.
pub fn store(model: &mut Model, to: DType, options: &Options) -> Result<Vec<String>> {
    if !to.is_float() && !can_quantize(to) {
        let known = ir::formats::FORMATS.iter().map(|f| f.dtype).filter(|d| can_quantize(*d));
        let known: Vec<String> = known.map(|d| d.to_string()).collect();
        let error = Error::new(Kind::Usage, format!("weights cannot be stored as {to}"));
        return Err(error.help(format!("choose f32, f16, bf16 or one of {}", known.join(", "))));
    }
    let roles = roles(model);
    let (mut changed, mut kept) = (BTreeMap::<(bool, DType, String), usize>::new(), BTreeMap::<String, usize>::new());
    let mut types = BTreeMap::new();
    for (name, (role, ty)) in &roles {
        let Some((from, [.., Dim::N(columns)])) = ty.as_tensor() else { continue };
        let Some(format) = format(*role, to, *columns) else {
            // Under the names of one layer only.
            *kept.entry(format!("`{}` {from}", short(name))).or_default() += 1;
            continue;
        };
        fits(name, *columns, format)?;
        let exact = model.weights.get(name).is_ok_and(|w| w.stored_as(format));
        let how = if exact { format!("as the file stores them, {format}") } else { made(*role, format, options) };
        *changed.entry((*role == Role::Vocabulary && format != to, format, how)).or_default() += 1;
        types.insert(name.clone(), format);
    }
    retype(model, &types);
    let mut lines = vec![];
    for ((vocabulary, _, how), count) in changed {
        let what = if vocabulary { "vocabulary: " } else { "weights: " };
        let matrices = if count == 1 { "matrix" } else { "matrices" };
        lines.push(format!("{what}{count} {matrices} {how}"));
    }
    if !kept.is_empty() {
        let kept: Vec<String> = kept.iter().map(|(what, count)| format!("{what} ({count})")).collect();
        lines.push(format!("not quantized: {}", kept.join(", ")));
    }
    Ok(lines)
}

/// How a matrix becomes one of `format` when packed.
pub(crate) fn made(role: Role, format: DType, options: &Options) -> String {
    match (format.int(), &options.calibrated_on) {
        (None, _) => format!("rounded to {format}"),
        (Some(_), Some(text)) if role == Role::Product => {
            format!("quantized to {format} by {}, calibrated on text {text}", options.quantizer)
        }
        _ => format!("quantized to {format}, {}", Quantizer::Nearest.row().meaning),
    }
}

/// The format of a matrix with rows of `columns` under a request; `None`: it stays as it is. 8-bit floats are asked for
/// without a word about groups.
fn format(role: Role, to: DType, columns: usize) -> Option<DType> {
    let to = if to == DType::E4M3_G128 && !columns.is_multiple_of(128) { DType::E4M3_G32 } else { to };
    match (role, to.int()) {
        (Role::Quantized | Role::Folded, _) => None,
        (_, None) | (Role::Product, _) => Some(to),
        (Role::Vocabulary, Some(int)) => Some(if int.bits < 8 || !to.is_integer() { DType::Q8_0 } else { to }),
        (Role::Table | Role::Router, Some(_)) => None,
    }
}

/// Every matrix by name: what it is for, and its type.
pub(crate) fn roles(model: &Model) -> BTreeMap<String, (Role, Type)> {
    let mut roles = BTreeMap::new();
    for graph in &model.graphs {
        for (index, node) in graph.nodes.iter().enumerate().filter(|(_, n)| n.op == Op::WEIGHT && is_matrix(&n.ty)) {
            let role = role(graph, graph.value_of(index), model.info.vocab);
            for name in names(&model.calls, &graph.name, node) {
                let (known, _) = roles.entry(name).or_insert((role, node.ty.clone()));
                *known = role.max(*known);
            }
        }
    }
    roles
}

/// A weight's entries of the weight table: one for each call of its graph, or its plain name where nothing calls it.
pub(crate) fn names(calls: &[Call], graph: &str, node: &Node) -> Vec<String> {
    let name = node.attrs.str("name");
    let of_calls: Vec<String> =
        calls.iter().filter(|call| call.graph == graph).map(|call| format!("{}{name}", call.prefix)).collect();
    if of_calls.is_empty() { vec![name.to_string()] } else { of_calls }
}

fn is_matrix(ty: &Type) -> bool {
    ty.as_tensor().is_some_and(|(_, shape)| shape.len() > 1)
}

fn role(graph: &Graph, weight: ValueId, vocab: usize) -> Role {
    let readers = graph.nodes.iter().enumerate().filter(|(_, n)| n.operands.contains(&weight));
    let of = |(index, reader): (usize, &Node)| match reader.op.class() {
        Class::WeightFold => Role::Folded,
        Class::Gather => match graph.ty(weight).as_tensor() {
            Some((_, [Dim::N(rows), ..])) if *rows == vocab => Role::Vocabulary,
            _ => Role::Table,
        },
        _ if graph.ty(reader.operands[0]).dtype().is_some_and(|d| d.planes().is_some()) => Role::Quantized,
        _ if graph.ty(reader.operands[0]).rows() == Some(Dim::R) => Role::Vocabulary,
        _ if routes(graph, graph.value_of(index)) => Role::Router,
        _ => Role::Product,
    };
    readers.map(of).max().unwrap_or(Role::Product)
}

/// Experts are chosen by this value, or by what is computed from it element by element.
fn routes(graph: &Graph, scores: ValueId) -> bool {
    let mut from_scores = vec![false; graph.len()];
    from_scores[scores.0 as usize] = true;
    for (index, node) in graph.nodes.iter().enumerate() {
        if node.operands.iter().any(|o| from_scores[o.0 as usize]) {
            match node.op.class() {
                Class::Route => return true,
                Class::Elementwise | Class::RowBroadcast => from_scores[graph.value_of(index).0 as usize] = true,
                _ => {}
            }
        }
    }
    false
}

/// Rows of `columns` fill whole groups of `format`.
pub(crate) fn fits(name: &str, columns: usize, format: DType) -> Result<()> {
    let block = format.format().block;
    if columns.is_multiple_of(block) {
        return Ok(());
    }
    let message = format!("weight `{name}`: expected rows that fill groups of {block} for {format}, found {columns}");
    let bits = |d: DType| d.int().map(|int| int.bits);
    let others = ir::formats::FORMATS
        .iter()
        .filter(|f| can_quantize(f.dtype) && bits(f.dtype) == bits(format) && columns.is_multiple_of(f.block));
    let others: Vec<&str> = others.map(|f| f.name).collect();
    let help = match others[..] {
        [] => "no quantized format takes such rows; choose bf16".to_string(),
        _ => format!("formats of as many bits that fit: {}", others.join(", ")),
    };
    Err(Error::new(Kind::Usage, message).help(help))
}

/// A weight's name without the number of its layer.
pub(crate) fn short(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').map(|p| if p.parse::<usize>().is_ok() { "*" } else { p }).collect();
    parts.join(".")
}

/// Gives weights their new types, in the table and in every graph.
pub(crate) fn retype(model: &mut Model, types: &BTreeMap<String, DType>) {
    for (name, dtype) in types {
        if let Some(weight) = model.weights.get_mut(name) {
            set(&mut weight.ty, *dtype);
        }
    }
    for graph in &mut model.graphs {
        for node in graph.nodes.iter_mut().filter(|n| n.op == Op::WEIGHT) {
            let names = names(&model.calls, &graph.name, node);
            if let Some(dtype) = names.iter().find_map(|name| types.get(name)) {
                set(&mut node.ty, *dtype);
            }
        }
    }
}

fn set(ty: &mut Type, to: DType) {
    if let Type::Tensor { dtype, .. } = ty {
        *dtype = to;
    }
}
