//! Calls to launches, for one range of `t`: what every call's inputs are bound to, which memory every launch touches.

use super::bodies::{Bodies, Site, Source};
use super::{rows_of, too_large};
use crate::memory::{Lifetime, assign, buffer_bytes};
use ir::ops::Class;
use ir::plan::{Arg, Buffer, BufferId, CacheId, KernelId, Launch, Limits, Pack, RowCount, WeightId};
use ir::recipe::recipe;
use ir::{Graph, Model, Place, Result, TokenRange, Type, ValueId, bail};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What all variants share: packed weights and caches.
#[derive(Default)]
pub struct Tables {
    /// Packed weights.
    pub weights: Vec<PackedWeight>,
    /// Caches: name and type.
    pub caches: Vec<(String, Type)>,
    known_weights: HashMap<String, usize>,
    known_caches: HashMap<String, usize>,
}

/// A weight as one of the ways it is read needs it.
pub struct PackedWeight {
    /// How it is made.
    pub pack: Pack,
    /// Its type.
    pub ty: Type,
}

impl Tables {
    fn weight(&mut self, recipe: Graph, ty: &Type) -> Arg {
        let (pack, weights) = (Pack { recipe }, &mut self.weights);
        let index = *self.known_weights.entry(pack.name()).or_insert_with(|| {
            weights.push(PackedWeight { pack, ty: ty.clone() });
            weights.len() - 1
        });
        Arg::Weight(WeightId(index as u32))
    }

    fn cache(&mut self, prefix: &str, name: &str, ty: &Type) -> Arg {
        let caches = &mut self.caches;
        let index = *self.known_caches.entry(format!("{prefix}{name}")).or_insert_with_key(|name| {
            caches.push((name.clone(), ty.clone()));
            caches.len() - 1
        });
        Arg::Cache(CacheId(index as u32))
    }
}

/// An activation of the flattened step.
pub struct StepValue {
    /// Graph and value.
    pub name: String,
    /// Its type.
    pub ty: Type,
    /// Bytes from row to row.
    pub row_bytes: usize,
    /// What its rows are counted by.
    pub rows: RowCount,
    /// Where it lies in the arena.
    pub offset: usize,
    bytes: usize,
    first: usize,
    last: usize,
}

/// A result of the step.
pub struct StepOutput {
    /// Its name.
    pub name: String,
    /// Index of the value.
    pub value: usize,
}

/// An argument before values have memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bound {
    Value(usize),
    Fixed(Arg),
}

/// A launch before values have memory.
struct Unplaced {
    kernel: KernelId,
    args: Vec<Bound>,
    /// How many of `args` are inputs.
    inputs: usize,
    /// Inputs that it changes in place.
    changed: Vec<Bound>,
    /// Caches it appends to.
    appended: BTreeSet<CacheId>,
    /// Its workers share the scratch.
    scratch: bool,
}

/// The launches of one variant and the values between them.
pub struct Flattened {
    /// Activations.
    pub values: Vec<StepValue>,
    /// Results of the step.
    pub outputs: Vec<StepOutput>,
    /// Bytes of all values but the outputs.
    pub temporary_bytes: usize,
    launches: Vec<Unplaced>,
}

/// Flattens all calls for steps of `range` tokens.
///
/// # Errors
/// Where an input is bound by nothing or no variant of a graph covers the range.
pub fn flatten(
    model: &Model,
    bodies: &Bodies,
    range: TokenRange,
    limits: &Limits,
    tables: &mut Tables,
) -> Result<Flattened> {
    let mut out = Flattened { values: vec![], outputs: vec![], temporary_bytes: 0, launches: vec![] };
    let mut environment: BTreeMap<String, Bound> = BTreeMap::new();
    for (name, arg) in [("tokens", Arg::Tokens), ("positions", Arg::Positions), ("rows", Arg::Rows)] {
        environment.insert(name.into(), Bound::Fixed(arg));
    }
    for (number, call) in model.calls.iter().enumerate() {
        let covers = |g: &Graph| g.range.is_none_or(|r| r.min <= range.min && range.max <= r.max);
        let found = model.graphs.iter().enumerate().find(|(_, g)| g.name == call.graph && covers(g));
        let Some((index, graph)) = found else {
            bail!(Internal, "no graph @{} for {} to {} tokens", call.graph, range.min, range.max);
        };
        let mut flattener =
            Flattener { graph, prefix: &call.prefix, bound: HashMap::new(), range, limits, tables, out: &mut out };
        let place = || format!("call {number} of @{}", call.graph);
        flattener.inputs(&environment).at(place)?;
        for site in &bodies.sites[index] {
            flattener.launch(bodies, site).at(place)?;
        }
        flattener.results(&mut environment).at(place)?;
    }
    for name in &model.outputs {
        match environment.get(name) {
            Some(Bound::Value(value)) => out.outputs.push(StepOutput { name: name.clone(), value: *value }),
            _ => bail!(Input, "output `{name}` is computed by no call"),
        }
    }
    out.assign_temporaries();
    Ok(out)
}

struct Flattener<'a> {
    graph: &'a Graph,
    prefix: &'a str,
    bound: HashMap<ValueId, Bound>,
    range: TokenRange,
    limits: &'a Limits,
    tables: &'a mut Tables,
    out: &'a mut Flattened,
}

impl Flattener<'_> {
    /// Binds the graph's inputs by name.
    fn inputs(&mut self, environment: &BTreeMap<String, Bound>) -> Result<()> {
        for (index, input) in self.graph.inputs.iter().enumerate() {
            let bound = match &input.ty {
                Type::Step => continue,
                Type::Cache { .. } => Bound::Fixed(self.tables.cache(self.prefix, &input.name, &input.ty)),
                _ => match environment.get(&input.name) {
                    Some(bound) => *bound,
                    None => {
                        let known: Vec<&str> = environment.keys().map(String::as_str).collect();
                        bail!(Input, "input `{}` is bound by nothing; there are {}", input.name, known.join(", "))
                    }
                },
            };
            self.bound.insert(ValueId(index as u32), bound);
        }
        Ok(())
    }

    /// Appends the launch of one kernel.
    fn launch(&mut self, bodies: &Bodies, site: &Site) -> Result<()> {
        let at = self.out.launches.len();
        let mut args = vec![];
        for source in &site.inputs {
            args.push(match source {
                Source::Weight(value) => {
                    let Some(recipe) = recipe(self.graph, *value, self.prefix) else {
                        bail!(Internal, "{value} is no weight");
                    };
                    Bound::Fixed(self.tables.weight(recipe, self.graph.ty(*value)))
                }
                Source::Value(value) => match self.bound.get(value) {
                    Some(bound) => *bound,
                    None => bail!(Internal, "{value} is read before it is written"),
                },
            });
        }
        for arg in &args {
            if let Bound::Value(value) = arg {
                self.out.values[*value].last = at;
            }
        }
        let inputs = args.len();
        let body = &bodies.kernels[site.kernel.0 as usize].body;
        let appended = appended(body, &args);
        let mut changed = vec![];
        for value in &site.results {
            let ty = self.graph.ty(*value);
            let bound = match ty {
                _ if self.rescores(*value) => {
                    let Some(estimates) = self.graph.node(*value).and_then(|n| self.bound.get(&n.operands[0])) else {
                        bail!(Internal, "{value} rescores what is not in memory");
                    };
                    changed.push(*estimates);
                    *estimates
                }
                Type::Cache { .. } => match self.cache_of(*value) {
                    Some(cache) => Bound::Fixed(cache),
                    None => bail!(Internal, "{value} appends to no input of @{}", self.graph.name),
                },
                _ => {
                    let bound = Bound::Value(self.value(*value, ty, at)?);
                    args.push(bound);
                    bound
                }
            };
            self.bound.insert(*value, bound);
        }
        let scratch = bodies.kernels[site.kernel.0 as usize].scratch_bytes() > 0;
        self.out.launches.push(Unplaced { kernel: site.kernel, args, inputs, changed, appended, scratch });
        Ok(())
    }

    /// The value is estimates after a change in their memory.
    fn rescores(&self, value: ValueId) -> bool {
        self.graph.node(value).is_some_and(|n| n.op.class() == Class::Rescore)
    }

    /// The cache that a chain of appends writes to.
    fn cache_of(&self, value: ValueId) -> Option<Arg> {
        let mut value = value;
        while let Some(node) = self.graph.node(value) {
            value = *node.operands.first()?;
        }
        match self.bound.get(&value) {
            Some(Bound::Fixed(arg)) => Some(*arg),
            _ => None,
        }
    }

    fn value(&mut self, value: ValueId, ty: &Type, at: usize) -> Result<usize> {
        let (row_bytes, rows) = rows_of(ty)?;
        let most = rows.most(self.limits);
        let most = if rows == RowCount::Tokens { most.min(self.range.max) } else { most };
        let bytes = buffer_bytes(most, row_bytes).ok_or_else(too_large)?;
        let named = self.graph.results.iter().find(|(_, v)| *v == value).map(|(n, _)| n.as_str());
        let name = named.or(self.graph.node(value).map(|n| n.op.name())).unwrap_or("value");
        let name = format!("{}.{name}", self.graph.name);
        let ty = ty.clone();
        self.out.values.push(StepValue { name, ty, row_bytes, rows, offset: 0, bytes, first: at, last: at });
        Ok(self.out.values.len() - 1)
    }

    /// Makes the graph's results known to later calls.
    fn results(&mut self, environment: &mut BTreeMap<String, Bound>) -> Result<()> {
        for (name, value) in &self.graph.results {
            if matches!(self.graph.ty(*value), Type::Cache { .. }) {
                continue; // state: the next step finds it in its cache
            }
            match self.bound.get(value) {
                Some(bound) => environment.insert(name.clone(), *bound),
                None => bail!(Unsupported, "result `{name}` is a weight"),
            };
        }
        Ok(())
    }
}

/// The caches among `args` that the body appends to.
fn appended(body: &Graph, args: &[Bound]) -> BTreeSet<CacheId> {
    let arguments = body.inputs.iter().enumerate().filter(|(_, i)| i.ty != Type::Step).map(|(i, _)| i);
    let position: Vec<usize> = arguments.collect();
    let caches = body.nodes.iter().filter(|n| n.op.class() == Class::Append).filter_map(|n| {
        let argument = position.iter().position(|i| *i == n.operands[0].0 as usize)?;
        match args[argument] {
            Bound::Fixed(Arg::Cache(cache)) => Some(cache),
            _ => None,
        }
    });
    caches.collect()
}

impl Flattened {
    fn assign_temporaries(&mut self) {
        let output = |v: usize| self.outputs.iter().any(|o| o.value == v);
        let temporary: Vec<usize> = (0..self.values.len()).filter(|v| !output(*v)).collect();
        let lifetimes: Vec<Lifetime> = temporary
            .iter()
            .map(|v| &self.values[*v])
            .map(|v| Lifetime { bytes: v.bytes, first: v.first, last: v.last })
            .collect();
        let (offsets, bytes) = assign(&lifetimes);
        for (value, offset) in temporary.into_iter().zip(offsets) {
            self.values[value].offset = offset;
        }
        self.temporary_bytes = bytes;
    }

    /// The launches, their barriers set; buffers that are not there yet are added.
    pub fn launches(&self, buffers: &mut Vec<Buffer>) -> Vec<Launch> {
        let mut known: HashMap<String, usize> =
            buffers.iter().enumerate().map(|(i, b)| (format!("{b:?}"), i)).collect();
        let ids: Vec<BufferId> = self.values.iter().map(|v| v.intern(buffers, &mut known)).collect();
        let mut hazards = Hazards::default();
        let launch = |site: &Unplaced| {
            let barrier = hazards.next(self, site);
            let arg = |b: &Bound| match b {
                Bound::Value(v) => Arg::Buffer(ids[*v]),
                Bound::Fixed(arg) => *arg,
            };
            Launch { kernel: site.kernel, args: site.args.iter().map(arg).collect(), barrier }
        };
        self.launches.iter().map(launch).collect()
    }
}

impl StepValue {
    fn intern(&self, buffers: &mut Vec<Buffer>, known: &mut HashMap<String, usize>) -> BufferId {
        let buffer = Buffer {
            name: self.name.clone(),
            ty: self.ty.to_string(),
            offset: self.offset,
            row_bytes: self.row_bytes,
            rows: self.rows,
        };
        let index = *known.entry(format!("{buffer:?}")).or_insert_with(|| {
            buffers.push(buffer);
            buffers.len() - 1
        });
        BufferId(index as u32)
    }
}

/// Memory touched since the last barrier.
#[derive(Default)]
struct Hazards {
    read: Vec<(usize, usize)>,
    written: Vec<(usize, usize)>,
    caches_read: BTreeSet<CacheId>,
    caches_written: BTreeSet<CacheId>,
    scratch: bool,
}

impl Hazards {
    /// Whether `site` must wait for the launches since the last barrier; remembers what it touches.
    fn next(&mut self, step: &Flattened, site: &Unplaced) -> bool {
        let span = |b: &Bound| match b {
            Bound::Value(v) => Some((step.values[*v].offset, step.values[*v].offset + step.values[*v].bytes)),
            Bound::Fixed(_) => None,
        };
        let reads: Vec<_> = site.args[..site.inputs].iter().filter_map(span).collect();
        let writes: Vec<_> = site.args[site.inputs..].iter().chain(&site.changed).filter_map(span).collect();
        let caches = site.args.iter().filter_map(|b| if let Bound::Fixed(Arg::Cache(c)) = b { Some(*c) } else { None });
        let cache_reads: BTreeSet<CacheId> = caches.filter(|c| !site.appended.contains(c)).collect();
        let meet =
            |a: &[(usize, usize)], b: &[(usize, usize)]| a.iter().any(|x| b.iter().any(|y| x.0 < y.1 && y.0 < x.1));
        let touched = |a: &BTreeSet<CacheId>, b: &BTreeSet<CacheId>| !a.is_disjoint(b);
        let wait = meet(&reads, &self.written)
            || meet(&writes, &self.written)
            || meet(&writes, &self.read)
            || touched(&cache_reads, &self.caches_written)
            || touched(&site.appended, &self.caches_written)
            || touched(&site.appended, &self.caches_read)
            || site.scratch && self.scratch;
        if wait {
            *self = Hazards::default();
        }
        self.read.extend(reads);
        self.written.extend(writes);
        self.caches_read.extend(cache_reads);
        self.caches_written.extend(&site.appended);
        self.scratch |= site.scratch;
        wait
    }
}
