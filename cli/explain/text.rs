//! The explanation as tables for a terminal, and the cells that the page shows too.

use super::gather::Explanation;
use super::memory::Memory;
use super::pricing::{Phase, Row};
use super::story::{Formats, Story};
use crate::report::{self, indented};
use mansard_ir::artifact::Derivation;

/// Head of the roofline's table.
pub const HEAD: [&str; 14] = [
    "#",
    "kernel",
    "launches",
    "FLOP",
    "weights",
    "activations",
    "KV",
    "FLOP/B",
    "ridge",
    "bound",
    "least",
    "predicted",
    "measured",
    "of roof",
];

/// A row's cells.
pub fn cells(row: &Row) -> Vec<String> {
    vec![
        if row.number > 0 { row.number.to_string() } else { String::new() },
        row.kernel.clone(),
        row.launches.to_string(),
        figure(row.operations),
        bytes(row.weight_bytes),
        bytes(row.activation_bytes),
        bytes(row.cache_bytes),
        format!("{:.2}", row.intensity),
        format!("{:.1}", row.ridge),
        row.bound.clone(),
        seconds(row.least),
        seconds(row.predicted),
        row.measured.map_or_else(|| "-".into(), seconds),
        percent(row.roof_share),
    ]
}

/// `1.23 M`.
pub fn figure(x: f64) -> String {
    let units = [("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)];
    match units.iter().find(|(_, size)| x >= *size) {
        Some((unit, size)) => format!("{:.2} {unit}", x / size),
        None => format!("{x:.0}"),
    }
}

/// `97.2 MB`; nothing is `-`.
pub fn bytes(n: f64) -> String {
    if n > 0.0 { report::bytes(n as usize).replace("bytes", "B") } else { "-".into() }
}

/// `1.23 ms`.
pub fn seconds(s: f64) -> String {
    let units = [("s", 1.0), ("ms", 1e-3)];
    let (unit, size) = units.into_iter().find(|(_, size)| s >= *size).unwrap_or(("us", 1e-6));
    format!("{:.2} {unit}", s / size)
}

/// `12.3%`.
pub fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

/// What is said first, on the page too: names and values.
pub fn facts(found: &Explanation) -> Vec<(&'static str, String)> {
    let (model, machine) = (&found.model, &found.machine);
    let kind = if model.encoder { "encoder" } else { "decoder" };
    let m = &machine.figures;
    let giga = |rate: f64| format!("{:.0}", rate / 1e9);
    vec![
        ("model", format!("{} {kind}, {} parameters", model.architecture, figure(model.parameters as f64))),
        (
            "artifact",
            format!("{}, context {}, vocabulary {}", report::bytes(found.bytes), model.context, model.vocabulary),
        ),
        ("workload", found.workload.clone()),
        ("machine", format!("{} ({}), threads: {}", machine.name, machine.origin, machine.threads)),
        (
            "roofline",
            format!(
                "{:.1} GB/s from memory, {} GB/s from the last cache; GFLOP/s: {} f32, {} bf16, {} int8; barrier {}",
                m.bandwidth / 1e9,
                giga(m.cache_bandwidth),
                giga(m.peak_f32),
                giga(m.peak_bf16),
                giga(m.peak_i8),
                seconds(m.barrier)
            ),
        ),
    ]
}

/// A phase in a line or two: speed, shares, what bounds it.
pub fn closing(phase: &Phase, memory_bandwidth: f64) -> Vec<String> {
    let total = &phase.total;
    let speed = |seconds: f64| format!("{}, {:.0} tokens/s", self::seconds(seconds), phase.tokens as f64 / seconds);
    let measured = total.measured.map_or_else(
        || "measured: not yet, --measure runs the kernels here".into(),
        |measured| format!("measured {}", speed(measured)),
    );
    let mut lines =
        vec![format!("predicted {}; {measured}; at the least {}", speed(total.predicted), speed(total.least))];
    let parts: Vec<String> = phase.parts.iter().map(|(name, share)| format!("{name} {}", percent(*share))).collect();
    lines.push(format!("predicted time: {}", parts.join(", ")));
    if phase.kind == "decode" && total.operations > 0.0 {
        let reading = total.weight_bytes / memory_bandwidth;
        let computing = total.operations / (total.ridge * memory_bandwidth);
        let batch = (phase.tokens as f64 * reading / computing).max(1.0);
        lines.push(format!("reading weights takes as long as computing at {batch:.0} sequences side by side"));
    }
    lines.extend(phase.misses.map(|misses| misses.to_string()));
    lines
}

/// Alternatives of a kernel, a line each.
pub fn weighed(derivation: &Derivation) -> Vec<String> {
    let Derivation { graph, tokens, seconds: own, considered, others, rules, .. } = derivation;
    let mut lines = vec![format!(
        "@{graph}, {} to {} tokens: {} a launch as priced; others in its place: {considered}",
        tokens.min,
        tokens.max,
        seconds(*own)
    )];
    for other in others {
        let sign = if other.at_least { "at least " } else { "" };
        lines.push(format!("{sign}+{} with [{}]", seconds(other.more), other.ops));
    }
    if !rules.is_empty() {
        lines.push(format!("rules: {}", rules.join(", ")));
    }
    lines
}

/// The first facts alone.
pub fn summary(found: &Explanation) -> String {
    let rows = facts(found).into_iter().map(|(name, value)| format!("{name:<10}{value}\n"));
    format!("{}\n{}", found.artifact, indented(&rows.collect::<String>()))
}

/// Everything.
pub fn text(found: &Explanation) -> String {
    let mut out = summary(found);
    for phase in &found.phases {
        out += &format!("\n{}, {} positions before\n", phase.name, phase.depth);
        let mut rows = vec![HEAD.map(String::from).to_vec()];
        rows.extend(phase.kernels.iter().chain([&phase.total]).map(cells));
        out += &indented(&aligned(&rows));
        closing(phase, found.machine.figures.bandwidth).iter().for_each(|line| out += &format!("  {line}\n"));
    }
    out += &memory(&found.memory);
    out += &formats(found);
    out += "\nkernels\n";
    found.kernels.iter().for_each(|story| out += &kernel(story));
    out
}

/// The first two columns to the left: numbers are short.
fn aligned(rows: &[Vec<String>]) -> String {
    let (width, named) = (rows.len().to_string().len(), |row: &Vec<String>, width: usize| {
        let mut cells = vec![format!("{:>width$} {}", row[0], row[1])];
        cells.extend(row[2..].iter().cloned());
        cells
    });
    report::table(&rows.iter().map(|row| named(row, width)).collect::<Vec<_>>())
}

fn memory(memory: &Memory) -> String {
    let mut rows = vec![
        vec!["weights".to_string(), report::bytes(memory.weights)],
        vec!["caches when the workload ends".into(), report::bytes(memory.caches)],
        vec!["activations".into(), report::bytes(memory.activations)],
        vec!["scratch of a worker".into(), report::bytes(memory.scratch)],
    ];
    rows.extend(memory.steps.iter().map(|step| {
        let name = format!("alive at most, steps of {} to {} tokens", step.tokens.min, step.tokens.max);
        vec![name, report::bytes(step.peak)]
    }));
    format!("\nmemory\n{}", indented(&report::table(&rows)))
}

/// What formats were chosen from, or that they were not.
pub fn formats(found: &Explanation) -> String {
    let mut rows = vec![["format", "weights", "elements", "bytes"].map(String::from).to_vec()];
    for share in &found.weights {
        let elements = figure(share.elements as f64);
        rows.push(vec![share.format.clone(), share.count.to_string(), elements, report::bytes(share.bytes)]);
    }
    let mut out = format!("\nformats\n{}", indented(&report::table(&rows)));
    for share in &found.caches {
        let each = report::bytes(share.bytes);
        out += &format!("  {} caches of {}, {each} a position\n", share.count, share.format);
    }
    found.approximations.iter().for_each(|a| out += &format!("  approximation: {a}\n"));
    match &found.formats {
        None => out += &format!("  {NOT_SEARCHED}\n"),
        Some(formats) => out += &decided(formats),
    }
    let figures = found.quality.iter().flat_map(|quality| quality.figures());
    figures.for_each(|(name, value)| out += &format!("  quality: {name} {value}\n"));
    if found.quality.is_none() {
        out += &format!("  {NOT_EVALUATED}\n");
    }
    out
}

/// Where no formats were chosen.
pub const NOT_SEARCHED: &str =
    "formats were not searched: they are the file's, or as asked for; compile --max-kld chooses them within a budget";

/// Where there is no quality card.
pub const NOT_EVALUATED: &str = "its accuracy was not measured: compile --evaluate stores a quality card";

fn decided(formats: &Formats) -> String {
    let d = &formats.decided;
    let mut rows =
        vec![["decision", "chosen", "time", "bytes", "KL divergence", "next to it"].map(String::from).to_vec()];
    for decision in &d.decisions {
        let Some(own) = decision.alternatives.get(decision.picked) else { continue };
        rows.push(vec![
            decision.name.clone(),
            own.format.clone(),
            seconds(own.seconds),
            report::bytes(own.bytes),
            format!("{:.2e}", own.error),
            others(decision),
        ]);
    }
    let budget = d.max_memory.map_or(String::new(), |bytes| format!(" and {}", report::bytes(bytes as usize)));
    let mut out = format!(
        "  chosen within {} nats{budget}; measured {:.5}, predicted {:.5}\n",
        d.max_kld, d.measured, d.predicted
    );
    out += &indented(&report::table(&rows));
    let mut front = vec![["budget's front: KL divergence", "time", "bytes", ""].map(String::from).to_vec()];
    for point in &formats.front {
        let mark = if *point == formats.chosen { "chosen" } else { "" };
        front.push(vec![format!("{:.2e}", point.error), seconds(point.seconds), bytes(point.bytes), mark.into()]);
    }
    out + &indented(&report::table(&front))
}

/// The nearest faster, and the nearest more accurate alternative of a decision.
fn others(decision: &mansard_ir::artifact::Decision) -> String {
    let Some(own) = decision.alternatives.get(decision.picked) else { return String::new() };
    let faster = decision.alternatives.iter().filter(|a| a.seconds < own.seconds);
    let better = decision.alternatives.iter().filter(|a| a.error < own.error);
    let named = |word: &str, a: Option<&mansard_ir::artifact::Alternative>| {
        a.map(|a| format!("{word}: {} ({}, {:.1e})", a.format, seconds(a.seconds), a.error))
    };
    let faster = named("faster", faster.min_by(|a, b| a.error.total_cmp(&b.error)));
    let better = named("closer", better.min_by(|a, b| a.seconds.total_cmp(&b.seconds)));
    faster.into_iter().chain(better).collect::<Vec<_>>().join("; ")
}

fn kernel(story: &Story) -> String {
    let tile = if story.tile.is_empty() { String::new() } else { format!(", tile {}", story.tile) };
    let mut out = format!("  {} ({}{tile}): {}\n", story.kernel, story.kind, story.ops);
    for derivation in &story.derivations {
        weighed(derivation).iter().for_each(|line| out += &format!("      {line}\n"));
    }
    out
}
