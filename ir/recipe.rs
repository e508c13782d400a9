//! Weights that packing computes from others: a graph of weights alone, made row by row.
//!
//! ```text
//! graph @weight() stage imported {
//!   %0 = weight "w" : f32[96, 64]
//!   %1 = weight "norm" : f32[64]
//!   %2 = scale_columns %0, %1            row r: row r of %0 times all of %1
//!   return weight = %2
//! }
//! ```
//!
//! Evaluation is that of the op table, for one row at a time: [`rows_of`] says which rows of its operands a row of an op's
//! result needs. What other rows need too is read once. Rows that are only moved keep their codes, whatever their format.

use crate::graph::{Attrs, Graph};
use crate::model::{Source, Weight, WeightTable};
use crate::ops::{Class, Op};
use crate::value::{Tensor, Value};
use crate::{Error, Kind, Node, Result, ValueId, bail};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

/// A weight computed from weights.
#[derive(Debug)]
pub struct Made {
    op: Op,
    attrs: Attrs,
    operands: Vec<Weight>,
    /// Operands that are read as a whole, once one was.
    whole: Vec<OnceLock<Value>>,
}

/// What a row of a result takes of an operand.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rows {
    /// The row of that number.
    Same,
    /// The entry of that number, modulo the number of entries: a vector with one for each row.
    Entry,
    /// Everything.
    All,
}

/// What `op` needs of operand `index` for one row of its result; `None`: rows are not computed by themselves.
fn rows_of(op: Op, index: usize) -> Option<Rows> {
    match (op.class(), op.name()) {
        (Class::Elementwise, _) => Some(Rows::Same),
        (Class::RowReduce, _) => Some(Rows::Same),
        (Class::RowBroadcast, _) | (_, "scale_columns" | "multiply_weights") => {
            Some(if index == 0 { Rows::Same } else { Rows::All })
        }
        (_, "scale_rows") => Some(if index == 0 { Rows::Same } else { Rows::Entry }),
        _ => None,
    }
}

impl Made {
    /// The operand's row that row `row` is, where rows are only moved.
    fn moved(&self, row: usize) -> Option<(&Weight, usize)> {
        let first = self.operands.first()?;
        let (rows, _) = first.rows_columns();
        match self.op.name() {
            "slice_rows" => {
                let (_, shape) = first.dtype_shape();
                Some((first, row + self.attrs.size("from") * (rows / shape[0].max(1))))
            }
            "concat_rows" if row < rows => Some((first, row)),
            "concat_rows" => Some((self.operands.get(1)?, row - rows)),
            _ => None,
        }
    }

    /// The bytes of a row in a quantized format that is moved here from a weight of that format.
    pub(crate) fn moved_row(&self, row: usize) -> Option<Result<Cow<'_, [u8]>>> {
        self.moved(row).map(|(weight, row)| weight.quantized_row(row))
    }

    /// All rows are moved from weights stored in that format.
    pub(crate) fn stored_as(&self, dtype: crate::DType) -> bool {
        self.moved(0).is_some() && self.operands.iter().all(|w| w.stored_as(dtype))
    }

    /// Row `row` as f32. A vector is one row.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        if !self.is_vector(0)
            && let Some((weight, row)) = self.moved(row)
        {
            return weight.read_row(row, out);
        }
        let operands = (0..self.operands.len()).map(|index| self.operand(index, row)).collect::<Result<Vec<_>>>()?;
        let value = (self.op.row().eval)(&operands.iter().map(Cow::as_ref).collect::<Vec<_>>(), &self.attrs)?;
        let data = &value.tensor()?.data;
        // An op without a rule of rows gives all of them.
        let by_rows = !self.operands.is_empty() && (0..self.operands.len()).all(|i| rows_of(self.op, i).is_some());
        let first = if by_rows { 0 } else { row * out.len() };
        match data.get(first..first + out.len()) {
            Some(row) => out.copy_from_slice(row),
            None => bail!(Internal, "`{}` gives {} values, not row {row} of {}", self.op, data.len(), out.len()),
        }
        Ok(())
    }

    fn is_vector(&self, index: usize) -> bool {
        self.operands.get(index).is_some_and(|w| w.dtype_shape().1.len() < 2)
    }

    /// What a row needs of an operand.
    fn operand(&self, index: usize, row: usize) -> Result<Cow<'_, Value>> {
        let weight = &self.operands[index];
        let (rows, columns) = weight.rows_columns();
        let one = |shape: &[usize], data: Vec<f32>| Ok(Cow::Owned(Value::Tensor(Tensor::new(shape, data))));
        match rows_of(self.op, index) {
            Some(Rows::Same) if !self.is_vector(index) => {
                let mut data = vec![0.0; columns];
                weight.read_row(row % rows.max(1), &mut data)?;
                one(&[1, columns], data)
            }
            Some(Rows::Entry) => {
                let all = self.all(index)?.tensor()?;
                one(&[1], vec![all.data[row % all.data.len().max(1)]])
            }
            _ => self.all(index).map(Cow::Borrowed),
        }
    }

    fn all(&self, index: usize) -> Result<&Value> {
        if let Some(value) = self.whole[index].get() {
            return Ok(value);
        }
        let weight = &self.operands[index];
        let value = Value::Tensor(Tensor::new(weight.dtype_shape().1, weight.read_all()?));
        Ok(self.whole[index].get_or_init(|| value))
    }
}

impl WeightTable {
    /// The weight that `recipe` makes: its nodes are weights by name and what is computed from them, its last one counts.
    ///
    /// # Errors
    /// Where a weight is missing, or the recipe has inputs or no nodes.
    pub fn make(&self, recipe: &Graph) -> Result<Weight> {
        let mut made: Vec<Weight> = vec![];
        for node in &recipe.nodes {
            made.push(match node.op {
                Op::WEIGHT => self.get(node.attrs.str("name"))?.clone(),
                op => {
                    let operand = |v: &ValueId| made.get(v.0 as usize).cloned();
                    let operands: Option<Vec<Weight>> = node.operands.iter().map(operand).collect();
                    let Some(operands) = operands.filter(|_| recipe.inputs.is_empty()) else {
                        bail!(Input, "a weight's recipe has no inputs");
                    };
                    let whole = operands.iter().map(|_| OnceLock::new()).collect();
                    let made = Made { op, attrs: node.attrs.clone(), operands, whole };
                    Weight { ty: node.ty.clone(), source: Source::Made(Arc::new(made)) }
                }
            });
        }
        made.pop().ok_or_else(|| Error::new(Kind::Input, "a weight's recipe has no nodes"))
    }
}

/// The recipe of `value`, a weight or computed from weights alone, every entry under `prefix`; `None` for anything else.
pub fn recipe(graph: &Graph, value: ValueId, prefix: &str) -> Option<Graph> {
    let mut out = Graph::new("weight");
    let mut to = BTreeMap::new();
    let last = add(graph, value, prefix, &mut out, &mut to)?;
    out.result("weight", last);
    Some(out)
}

fn add(
    graph: &Graph,
    value: ValueId,
    prefix: &str,
    out: &mut Graph,
    to: &mut BTreeMap<ValueId, ValueId>,
) -> Option<ValueId> {
    if let Some(known) = to.get(&value) {
        return Some(*known);
    }
    let node = graph.node(value).filter(|n| n.ty.is_static())?;
    let made = if node.op == Op::WEIGHT {
        out.weight(format!("{prefix}{}", node.attrs.str("name")), node.ty.clone())
    } else {
        let operands = node.operands.iter().map(|o| add(graph, *o, prefix, out, to)).collect::<Option<Vec<_>>>()?;
        out.push_op(node.op, &operands, node.attrs.clone()).ok()?
    };
    to.insert(value, made);
    Some(made)
}

/// A recipe in a line: a weight's name, or `scale_columns(w, norm)`.
pub fn name(recipe: &Graph) -> String {
    let mut names: Vec<String> = vec![];
    for node in &recipe.nodes {
        names.push(if node.op == Op::WEIGHT {
            node.attrs.str("name").to_string()
        } else {
            let operand = |v: &ValueId| names.get(v.0 as usize).cloned().unwrap_or_default();
            let operands: Vec<String> = node.operands.iter().map(operand).collect();
            let attrs: Vec<String> = node.attrs.iter().map(|(name, value)| format!("{name} = {value}")).collect();
            let attrs = if attrs.is_empty() { String::new() } else { format!(" {{{}}}", attrs.join(", ")) };
            format!("{}{attrs}({})", node.op, operands.join(", "))
        });
    }
    names.pop().unwrap_or_default()
}

/// The matrices that a recipe reads.
pub fn matrices(recipe: &Graph) -> Vec<&str> {
    let matrix = |node: &&Node| node.ty.as_tensor().is_some_and(|(_, shape)| shape.len() > 1);
    let weights = recipe.nodes.iter().filter(|n| n.op == Op::WEIGHT).filter(matrix);
    weights.map(|n| n.attrs.str("name")).collect()
}
