//! Why each kernel and each format: what the search kept of its reasons in the artifact.

use crate::bench::roof::Roof;
use mansard_ir::artifact::{Decided, Decision, Derivation, Manifest};
use mansard_ir::ops::Class;
use mansard_passes::knapsack::{Item, solve};
use mansard_runtime::missing;
use serde::Serialize;

/// One kernel.
#[derive(Debug, Serialize)]
pub struct Story {
    /// Its name.
    pub kernel: String,
    /// What its anchor is.
    pub kind: String,
    /// Ops of the graph that it holds, in order; views left out.
    pub ops: String,
    /// Its body as text.
    pub body: String,
    /// Tokens by strips of its register tile; empty where it has none.
    pub tile: String,
    /// What was weighed, by graph and range of tokens; nothing in artifacts of versions that kept none of it.
    pub derivations: Vec<Derivation>,
}

/// Every kernel of the program.
pub fn kernels(manifest: &Manifest, roof: &Roof) -> Vec<Story> {
    let code = manifest.code.iter().find(|code| missing(code).is_none()).or(manifest.code.first());
    let tile = |index: usize| code.and_then(|code| code.tiles.get(index)).cloned().unwrap_or_default();
    let story = |(index, spec): (usize, &mansard_ir::plan::KernelSpec)| {
        let nodes = roof.body(index).map_or(&[][..], |body| &body.nodes).iter();
        let ops = nodes.filter(|n| n.op.class() != Class::View).map(|n| n.op.name());
        let of_kernel = manifest.provenance.derivations.iter().filter(|d| d.kernel == spec.name);
        Story {
            kernel: spec.name.clone(),
            kind: roof.kind(index).into(),
            ops: ops.collect::<Vec<_>>().join(" "),
            body: spec.text.clone(),
            tile: tile(index),
            derivations: of_kernel.cloned().collect(),
        }
    };
    manifest.program.kernels.iter().enumerate().map(story).collect()
}

/// Formats that were chosen within a budget.
#[derive(Debug, Serialize)]
pub struct Formats {
    /// The budget, the decisions and their alternatives.
    #[serde(flatten)]
    pub decided: Decided,
    /// Where the choice lies.
    pub chosen: Point,
    /// For some budgets the fastest there is, from the most accurate to the fastest.
    pub front: Vec<Point>,
}

/// A combination of formats: what it is predicted to come to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// KL divergence in nats.
    pub error: f64,
    /// Of the workload.
    pub seconds: f64,
    /// Of weights and caches.
    pub bytes: f64,
}

/// Budgets that the front is asked for.
const BUDGETS: i32 = 16;

/// What was decided, where anything was.
pub fn formats(manifest: &Manifest) -> Option<Formats> {
    let decided = manifest.provenance.decided.clone()?;
    let item = |a: &mansard_ir::artifact::Alternative| Item { cost: a.seconds, error: a.error, bytes: a.bytes as f64 };
    let items: Vec<Vec<Item>> = decided.decisions.iter().map(|d| d.alternatives.iter().map(item).collect()).collect();
    let point =
        |sum: Item| Point { error: sum.error, seconds: sum.cost, bytes: sum.bytes + decided.fixed_bytes as f64 };
    let picked = decided.decisions.iter().filter_map(|d: &Decision| d.alternatives.get(d.picked)).map(item);
    let nothing = Item { cost: 0.0, error: 0.0, bytes: 0.0 };
    let add = |a: Item, b: Item| Item { cost: a.cost + b.cost, error: a.error + b.error, bytes: a.bytes + b.bytes };
    let chosen = point(picked.fold(nothing, add));
    // A factor of 2 from budget to budget, the one that was given among them.
    let most = decided.max_memory.map_or(f64::INFINITY, |bytes| bytes as f64 - decided.fixed_bytes as f64);
    let budgets = (-BUDGETS / 2..BUDGETS / 2).map(|i| decided.max_kld * 2f64.powi(i));
    let within = budgets.filter_map(|error| solve(&items, Item { cost: 0.0, error, bytes: most }));
    let mut front: Vec<Point> = within.map(|solution| point(solution.sum)).collect();
    front.dedup();
    Some(Formats { decided, chosen, front })
}
