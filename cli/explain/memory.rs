//! The memory plan over time: which launch writes each buffer, and which reads it last.
//!
//! ```text
//! launches of a step   0  1  2  3  4          offset
//!   layer.add          ████████                    0
//!   layer.quantize           █████             20480     ->  bytes alive at each launch
//! ```

use crate::bench::roof::Roof;
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::plan::{Arg, Program, Variant};
use mansard_ir::{Graph, TokenRange, Traffic};
use serde::Serialize;
use std::collections::BTreeMap;

/// Where bytes are.
#[derive(Debug, Serialize)]
pub struct Memory {
    /// Packed weights.
    pub weights: usize,
    /// Caches of all sequences when the workload ends.
    pub caches: usize,
    /// Caches of one sequence for each power of two of positions, and for a full context.
    pub growth: Vec<(usize, usize)>,
    /// Activations: what all steps share.
    pub activations: usize,
    /// Scratch of each worker.
    pub scratch: usize,
    /// By range of tokens.
    pub steps: Vec<Timeline>,
}

/// One range of tokens.
#[derive(Debug, Serialize)]
pub struct Timeline {
    /// The range.
    pub tokens: TokenRange,
    /// Launches of a step.
    pub launches: usize,
    /// Most bytes alive at once.
    pub peak: usize,
    /// In order of first launch.
    pub buffers: Vec<Life>,
    /// Bytes alive while each launch runs.
    pub alive: Vec<usize>,
}

/// A buffer from when it is written to when it is last read.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Life {
    /// Graph and value.
    pub name: String,
    /// Launch that writes it.
    pub first: usize,
    /// Last launch that reads it.
    pub last: usize,
    /// In the arena.
    pub offset: usize,
    /// With the most rows of the range.
    pub bytes: usize,
}

/// Of a program.
pub fn of(program: &Program, roof: &Roof, traffic: &Traffic) -> Memory {
    let context = program.limits.context;
    let caches = |positions: usize| -> usize {
        let blocks = |group: usize| program.groups.get(group).map_or(0, |group| group.blocks(positions));
        program.caches.iter().map(|c| c.block_bytes * blocks(c.group)).sum()
    };
    let powers = std::iter::successors(Some(CACHE_BLOCK), |n| n.checked_mul(2)).take_while(|n| *n < context);
    let growth = powers.chain([context]).map(|positions| (positions, caches(positions)));
    Memory {
        weights: program.weights.iter().map(|w| w.bytes).sum(),
        caches: traffic.batch * caches(traffic.positions().min(context)),
        growth: if program.caches.is_empty() { vec![] } else { growth.collect() },
        activations: program.arena_bytes,
        scratch: program.scratch_bytes,
        steps: program.variants.iter().map(|variant| timeline(program, roof, variant)).collect(),
    }
}

fn timeline(program: &Program, roof: &Roof, variant: &Variant) -> Timeline {
    let mut open: BTreeMap<u32, Life> = BTreeMap::new();
    let mut done = vec![];
    for (at, launch) in variant.launches.iter().enumerate() {
        // Arguments are what the body is given, the step left out, then what it leaves.
        let body = roof.body(launch.kernel.0 as usize);
        let given = body.map_or(0, Graph::arguments);
        for (index, arg) in launch.args.iter().enumerate() {
            let Arg::Buffer(id) = arg else { continue };
            if index < given {
                open.entry(id.0).and_modify(|life| life.last = at);
                continue;
            }
            let Some(buffer) = program.buffers.get(id.0 as usize) else { continue };
            let rows = buffer.rows.most(&program.limits).min(match buffer.rows {
                mansard_ir::plan::RowCount::Tokens => variant.tokens.max,
                _ => usize::MAX,
            });
            let bytes = rows.saturating_mul(buffer.row_bytes);
            let life = Life { name: buffer.name.clone(), first: at, last: at, offset: buffer.offset, bytes };
            done.extend(open.insert(id.0, life));
        }
    }
    // What leaves the step lives to its end.
    let end = variant.launches.len().saturating_sub(1);
    for output in &program.outputs {
        open.entry(output.buffer.0).and_modify(|life| life.last = end);
    }
    done.extend(open.into_values());
    done.sort_by_key(|life| (life.first, life.offset));
    let mut alive = vec![0usize; variant.launches.len()];
    for life in &done {
        alive[life.first..=life.last].iter_mut().for_each(|bytes| *bytes = bytes.saturating_add(life.bytes));
    }
    let peak = alive.iter().copied().max().unwrap_or(0);
    Timeline { tokens: variant.tokens, launches: variant.launches.len(), peak, buffers: done, alive }
}
