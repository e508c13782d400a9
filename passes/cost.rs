//! What a kernel costs: the roofline of the target over the operations and bytes of its nodes.
//!
//! ```text
//! seconds = max(operations / peak, bytes / bandwidth) + a share of the smaller + barrier
//! ```
//!
//! Operations come from the op rows, bytes from [`ir::cost`]. Added here is what fusion decides on: a kernel that works
//! row by row can use no more workers than there are rows; an operand prologue is repeated by every worker; what stays
//! inside a kernel is neither written nor read.

use crate::extract::{Choice, Program};
use crate::kernels::{Candidate, Place};
use ir::cost::{Workload, priced};
use ir::costs::{Costs, Filed};
use ir::kernel::{KernelKind, after_anchor};
use ir::layout::cache_position_bytes;
use ir::ops::Class;
use ir::{Dim, Graph, Machine, Model, Traffic, Type, ValueId};
use std::collections::BTreeMap;

/// A machine, a step, and a program's work in it.
#[derive(Clone, Debug)]
pub struct Roofline {
    machine: Machine,
    /// By value, then by choice.
    nodes: Vec<Vec<Work>>,
    /// Bytes of each value in memory.
    bytes: Vec<f64>,
    /// Rows of each value.
    rows: Vec<f64>,
    /// Measured costs, and the tokens of the step.
    costs: (Costs, f64),
}

/// What one node does, all workers together.
#[derive(Clone, Debug, Default, PartialEq)]
struct Work {
    /// Seconds of contraction and attention.
    anchored: f64,
    /// Seconds of everything else.
    scalar: f64,
    /// Bytes of each weight and cache that it reads, and of what it appends.
    streamed: Vec<(Option<usize>, f64)>,
}

impl Roofline {
    /// Prices of `program`'s nodes in a step like `step` on `machine`.
    pub fn new(program: &Program, machine: Machine, step: Workload) -> Roofline {
        let rows = |v: usize| program.lead(v).map_or(1.0, |d| step.extent(d));
        let node = |choice: &Choice, ty: &Type, rows: f64| {
            let types: Vec<&Type> = choice.operands.iter().map(|o| &program.values[*o].ty).collect();
            let ops = (choice.op.row().flops)(&types, &choice.attrs, ty, rows, step.context);
            let ops = ops * step.made(choice.op.class());
            let made = ir::cost::Work::of(choice.op.class(), &types, ops);
            let (busy, streamed) = (made.busy(&machine), streamed(choice, &types, ty, rows, &step));
            match made.scalar_ops > 0.0 {
                true => Work { anchored: 0.0, scalar: busy, streamed },
                false => Work { anchored: busy, scalar: 0.0, streamed },
            }
        };
        let values = program.values.iter().enumerate();
        Roofline {
            machine,
            nodes: values
                .clone()
                .map(|(v, value)| value.choices.iter().map(|c| node(c, &value.ty, rows(v))).collect())
                .collect(),
            bytes: program.values.iter().map(|value| step.bytes(&value.ty)).collect(),
            rows: values.map(|(v, _)| rows(v)).collect(),
            costs: (Costs::default(), step.tokens),
        }
    }

    /// The same, scaled by what was measured.
    pub fn with(self, costs: &Costs) -> Roofline {
        Roofline { costs: (costs.clone(), self.costs.1), ..self }
    }

    /// Predicted seconds of one launch.
    pub fn price(&self, program: &Program, kernel: &Candidate) -> f64 {
        let (m, threads) = (&self.machine, self.machine.threads.max(1) as f64);
        let rows = kernel.inside.keys().next_back().map_or(1.0, |v| self.rows[*v]);
        let workers = if kernel.kind == KernelKind::Rows { rows.clamp(1.0, threads) } else { threads };
        let (mut compute, mut streamed, mut near, mut read) = (0.0, 0.0, 0.0, vec![]);
        for (value, (index, place)) in &kernel.inside {
            let (work, choice) = (&self.nodes[*value][*index], &program.values[*value].choices[*index]);
            let repeats = if *place == Place::Prologue { threads } else { threads / workers };
            compute += work.anchored + work.scalar * repeats;
            for (operand, bytes) in &work.streamed {
                // What several nodes read, a kernel reads once.
                if operand.is_none_or(|operand| !read.contains(&operand)) {
                    streamed += bytes;
                    read.extend(*operand);
                }
            }
            // among equals, what could follow an anchor goes with what computes its operands
            let follower = after_anchor(KernelKind::Contract, choice.op.class());
            near += f64::from(u8::from(follower && !choice.operands.iter().any(|o| kernel.inside.contains_key(o))));
        }
        for value in &kernel.reads {
            if matches!(program.values[*value].ty, Type::Cache { .. }) {
                continue; // appending and attending say what they touch
            }
            let repeats = if kernel.feeds_prologue(program, *value) { threads } else { threads / workers };
            near += self.bytes[*value] * repeats;
        }
        let stored = kernel.stored.iter().filter(|v| !matches!(program.values[**v].ty, Type::Cache { .. }));
        near += stored.map(|v| self.bytes[*v]).sum::<f64>() * threads / workers;
        let seconds = priced(compute, streamed / m.bandwidth + near / m.near(near), m);
        let (costs, tokens) = &self.costs;
        if costs.is_empty() {
            return seconds;
        }
        let choices = kernel.inside.iter().map(|(v, (index, _))| &program.values[*v].choices[*index]);
        let operands = choices.clone().flat_map(|c| &c.operands).map(|o| &program.values[*o].ty);
        costs.price(&filed_under(kernel.kind, choices.map(|c| c.op.name()), operands), *tokens, seconds)
    }
}

/// What measured costs of a kernel are filed under.
pub fn filed(body: &Graph) -> Option<Filed> {
    let nodes = body.nodes.iter().filter(|n| n.op.class() != Class::Weight);
    let operands = nodes.clone().flat_map(|n| &n.operands).map(|o| body.ty(*o));
    Some(filed_under(ir::kernel::kind_of(body).ok()?, nodes.map(|n| n.op.name()), operands))
}

fn filed_under<'a>(
    kind: KernelKind,
    ops: impl Iterator<Item = &'a str>,
    operands: impl Iterator<Item = &'a Type>,
) -> Filed {
    let mut ops: Vec<&str> = ops.collect();
    ops.sort_unstable();
    Filed { kind: kind.name().into(), format: format(operands), ops: ops.join(" ") }
}

/// The format of a kernel's cache, else of its first matrix; nothing where it reads neither.
fn format<'a>(operands: impl Iterator<Item = &'a Type>) -> String {
    let mut matrix = None;
    for ty in operands {
        match ty {
            Type::Cache { dtype, .. } => return dtype.to_string(),
            _ if ty.is_static() => matrix = matrix.or(ty.as_tensor().filter(|(_, shape)| shape.len() > 1)),
            _ => {}
        }
    }
    matrix.map_or(String::new(), |(dtype, _)| dtype.to_string())
}

/// Predicted seconds of a kernel that is there already: the same roofline, over the operations and bytes of its `values`.
pub fn kernel_seconds(graph: &Graph, values: &[ValueId], machine: &Machine, step: &Workload) -> f64 {
    let (work, threads) = (step.work(graph, values), machine.threads.max(1) as f64);
    let rows = values.last().and_then(|v| graph.ty(*v).rows()).map_or(1.0, |dim| step.extent(dim));
    let row_by_row = ir::kernel::kind(graph, values).is_ok_and(|kind| kind == KernelKind::Rows);
    // As above: without as many rows some workers stand by.
    let share = if row_by_row { rows.clamp(1.0, threads) / threads } else { 1.0 };
    let streamed = (work.weight_bytes + work.cache_bytes) / machine.bandwidth;
    let near = work.activation_bytes / machine.near(work.activation_bytes);
    priced(work.busy(machine) / share, streamed + near / share, machine)
}

/// Predicted seconds of all steps of `traffic`, with steps of at most `most` tokens, for an optimized model.
pub fn workload_seconds(model: &Model, machine: &Machine, traffic: &Traffic, most: usize) -> f64 {
    let mut seconds = 0.0;
    for steps in traffic.steps(most) {
        let tokens = steps.step.tokens.ceil() as usize;
        let mut known: BTreeMap<&str, f64> = BTreeMap::new();
        for call in &model.calls {
            let Some(graph) = model.graphs_of(call).find(|g| g.suits(tokens)) else { continue };
            seconds += steps.count
                * *known.entry(graph.name.as_str()).or_insert_with(|| {
                    graph.kernels.iter().map(|k| kernel_seconds(graph, &k.values, machine, &steps.step)).sum()
                });
        }
    }
    seconds
}

/// Bytes of each weight and cache that a node reads, and of what it appends to one.
fn streamed(choice: &Choice, types: &[&Type], ty: &Type, rows: f64, step: &Workload) -> Vec<(Option<usize>, f64)> {
    let routed = types.iter().find_map(|t| match t {
        Type::Routing { top, experts } => Some(*top as f64 / *experts as f64),
        _ => None,
    });
    let mut bytes = vec![];
    for (value, operand) in choice.operands.iter().zip(types) {
        let share = match (choice.op.class(), operand.as_tensor()) {
            (Class::ContractExperts, _) => routed.map_or(1.0, |each| 1.0 - (1.0 - each).powf(rows)),
            (Class::Gather, Some((_, [Dim::N(n), ..]))) => (rows / *n as f64).min(1.0),
            (class, _) => step.planes_read(class, operand),
        };
        match operand {
            Type::Cache { .. } if choice.op.class() == Class::Attend => {
                bytes.push((Some(*value), step.attended_bytes(operand, &choice.attrs)));
            }
            _ if operand.is_static() => bytes.push((Some(*value), step.bytes(operand) * share)),
            _ => {}
        }
    }
    if let Type::Cache { .. } = ty {
        bytes.push((None, rows * cache_position_bytes(ty).unwrap_or(0) as f64));
    }
    bytes
}
