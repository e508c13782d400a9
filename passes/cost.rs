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
use ir::cost::Workload;
use ir::kernel::{KernelKind, after_anchor};
use ir::layout::cache_position_bytes;
use ir::ops::Class;
use ir::{DType, Dim, Graph, Machine, Type, ValueId};

/// Share of the f32 peak that work outside contractions reaches: few multiply-adds, horizontal sums, polynomials.
const SCALAR_SHARE: f64 = 0.25;

/// Share of the smaller side of the roofline that the larger one does not hide.
const EXPOSED: f64 = 0.2;

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
}

/// What one node does, all workers together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Work {
    /// Seconds of contraction and attention.
    anchored: f64,
    /// Seconds of everything else.
    scalar: f64,
    /// Bytes of weights and caches.
    streamed: f64,
}

impl Roofline {
    /// Prices of `program`'s nodes in a step like `step` on `machine`.
    pub fn new(program: &Program, machine: Machine, step: Workload) -> Roofline {
        let rows = |v: usize| program.lead(v).map_or(1.0, |d| step.extent(d));
        let node = |choice: &Choice, ty: &Type, rows: f64| {
            let types: Vec<&Type> = choice.operands.iter().map(|o| &program.values[*o].ty).collect();
            let ops = (choice.op.row().flops)(&types, &choice.attrs, ty, rows, step.context);
            let ops = ops * step.made(choice.op.class());
            let mut work = Work::default();
            let activations = types.first().and_then(|t| Some(t.as_tensor()?.0));
            match (choice.op.class(), activations.and_then(DType::planes)) {
                (Class::Contract | Class::ContractExperts | Class::Estimate, Some(planes)) => {
                    work.anchored = ops * planes as f64 / machine.peak_i8
                }
                (Class::Contract | Class::ContractExperts, _) if activations == Some(DType::BF16) => {
                    work.anchored = ops / machine.peak_bf16
                }
                (Class::Contract | Class::ContractExperts | Class::Attend, _) => work.anchored = ops / machine.peak_f32,
                (Class::Rescore, _) => work.anchored = ops * 2.0 / machine.peak_i8,
                _ => work.scalar = ops / (machine.peak_f32 * SCALAR_SHARE),
            }
            work.streamed = streamed(choice, &types, ty, rows, &step);
            work
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
        }
    }

    /// Predicted seconds of one launch.
    pub fn price(&self, program: &Program, kernel: &Candidate) -> f64 {
        let (m, threads) = (&self.machine, self.machine.threads.max(1) as f64);
        let rows = kernel.inside.keys().next_back().map_or(1.0, |v| self.rows[*v]);
        let workers = if kernel.kind == KernelKind::Rows { rows.clamp(1.0, threads) } else { threads };
        let (mut compute, mut streamed, mut near) = (0.0, 0.0, 0.0);
        for (value, (index, place)) in &kernel.inside {
            let (work, choice) = (self.nodes[*value][*index], &program.values[*value].choices[*index]);
            let repeats = if *place == Place::Prologue { threads } else { threads / workers };
            compute += work.anchored + work.scalar * repeats;
            streamed += work.streamed;
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
        let bandwidth = if near > m.cache_bytes { m.bandwidth } else { m.cache_bandwidth };
        let memory = streamed / m.bandwidth + near / bandwidth;
        compute.max(memory) + compute.min(memory) * EXPOSED + m.barrier
    }
}

/// Predicted seconds of a kernel that is there already: the same roofline, over the operations and bytes of its `values`.
pub fn kernel_seconds(graph: &Graph, values: &[ValueId], machine: &Machine, step: &Workload) -> f64 {
    let work = step.work(graph, values);
    let compute = work.computing(machine);
    let near = if work.activation_bytes > machine.cache_bytes { machine.bandwidth } else { machine.cache_bandwidth };
    let memory = (work.weight_bytes + work.cache_bytes) / machine.bandwidth + work.activation_bytes / near;
    compute.max(memory) + compute.min(memory) * EXPOSED + machine.barrier
}

/// Bytes of weights and caches that a node reads or writes.
fn streamed(choice: &Choice, types: &[&Type], ty: &Type, rows: f64, step: &Workload) -> f64 {
    let routed = types.iter().find_map(|t| match t {
        Type::Routing { top, experts } => Some(*top as f64 / *experts as f64),
        _ => None,
    });
    let mut bytes = 0.0;
    for operand in types {
        let share = match (choice.op.class(), operand.as_tensor()) {
            (Class::ContractExperts, _) => routed.map_or(1.0, |each| 1.0 - (1.0 - each).powf(rows)),
            (Class::Gather, Some((_, [Dim::N(n), ..]))) => (rows / *n as f64).min(1.0),
            (class, _) => step.planes_read(class, operand),
        };
        match operand {
            Type::Cache { .. } if choice.op.class() == Class::Attend => {
                bytes += step.attended_bytes(operand, &choice.attrs)
            }
            _ if operand.is_static() => bytes += step.bytes(operand) * share,
            _ => {}
        }
    }
    match ty {
        Type::Cache { .. } => bytes + rows * cache_position_bytes(ty).unwrap_or(0) as f64,
        _ => bytes,
    }
}
