//! `mansard probe`: measures this machine and stores what it found as a machine file.
//!
//! ```text
//! for 1, 2, 4... workers and all    GB/s from each cache and from memory, GOP/s of f32, bf16, int8, launch, barrier
//! for a model of each format        what its kernels take, as multiples of what these figures say
//! ```
//!
//! The loops are generated code, run by the workers that run artifacts. Of several runs the fastest counts: a neighbour
//! takes some of a machine, nobody adds any.

mod kernels;
pub mod measure;

use crate::report;
use indicatif::ProgressBar;
use mansard::machine::{origin, stored_path};
use mansard_backends as backends;
use mansard_backends::cpu::probe::{Loop, Loops};
use mansard_backends::machine::{Level, MachineTable, Peak, Workers};
use mansard_ir::costs::Costs;
use mansard_ir::{Error, Result, bail};
use mansard_runtime::{self as runtime, CacheLevel, Probe};
use measure::{bandwidth, peak};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Most, and least, of the buffer that stands for main memory.
const MEMORY_BYTES: (usize, usize) = (256 << 20, 1 << 30);

/// The same when it has to be quick.
const QUICK_BYTES: usize = 64 << 20;

/// MiB that are read again and again: what a cache keeps that others share is no matter of its size alone.
const AGAIN: [usize; 14] = [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768];

/// Measure this machine: bandwidth of caches and memory, peaks, barriers
#[derive(clap::Args)]
pub struct Arguments {
    /// Where the machine file goes [default: mansard/machine.toml in the user's configuration]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// What the machine is called [default: as its processor says]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Most worker threads [default: physical cores]
    #[arg(short = 't', long, value_name = "N")]
    threads: Option<usize>,
    /// Rough figures in a second or two, and none of kernels
    #[arg(long)]
    quick: bool,
    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Where no code is generated for this processor, memory or threads are refused, or the file cannot be written.
pub fn run(arguments: &Arguments) -> Result<()> {
    let most = arguments.threads.unwrap_or_else(runtime::physical_cores);
    if most == 0 {
        bail!(Usage, "-t: expected at least 1 thread, found 0");
    }
    let Some(path) = arguments.output.clone().or_else(stored_path) else {
        bail!(
            Usage,
            "expected where the machine file goes: -o machine.toml, as neither XDG_CONFIG_HOME nor HOME is set"
        );
    };
    let mut table = measured(arguments, most)?;
    if !arguments.quick {
        table.costs = kernels::costs(&table)?;
    }
    if let (None, Some(folder)) = (&arguments.output, path.parent()) {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    }
    let text = format!("# Written by `mansard probe`.\n{}", table.text()?);
    report::write_file(&path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io(&path, e)))?;
    report::print(if arguments.json {
        report::json(&serde_json::json!({"file": path.display().to_string(), "machine": table}))?
    } else {
        format!("{}stored in {}\n", text_of(&table), path.display())
    })
}

fn measured(arguments: &Arguments, most: usize) -> Result<MachineTable> {
    let target = backends::target("native")?;
    // The question that also asks the system for the registers of matrix units.
    if let Some(reason) = mansard_runtime::lacking(&target.arch, &target.features) {
        bail!(Unsupported, "no measurement of {}: {reason}", target.cpu);
    }
    let loops = Loops::new(&target)?;
    let caches = levels(&runtime::caches());
    let peaks = loops.loops.iter().filter(|l| matches!(l, Loop::Products(_))).count();
    let bar = report::bar("measuring", counts(most).len() * (caches.len() + 2 + peaks + 1));
    let mut table = MachineTable {
        name: arguments.name.clone().unwrap_or_else(|| model_name().unwrap_or_else(|| target.cpu.clone())),
        arch: target.arch,
        processor: target.cpu,
        measured: Some(time::OffsetDateTime::now_utc().date().to_string()),
        cache_kib: caches.iter().map(|(level, cache)| (*level, cache.bytes as u64 / 1024)).collect(),
        workers: vec![],
        costs: Costs::default(),
    };
    for count in counts(most) {
        table.workers.push(workers(&loops, &caches, count, arguments.quick, &bar)?);
    }
    bar.finish_and_clear();
    Ok(table)
}

/// Powers of two up to `most`, and that.
fn counts(most: usize) -> Vec<usize> {
    let powers = std::iter::successors(Some(1usize), |n| n.checked_mul(2));
    powers.take_while(|n| *n < most).chain([most]).collect()
}

/// The levels that a machine file has a name for.
fn levels(caches: &[CacheLevel]) -> Vec<(Level, CacheLevel)> {
    let level = |cache: &CacheLevel| [Level::L1, Level::L2, Level::L3].get(cache.level.checked_sub(1)?).copied();
    caches.iter().filter_map(|cache| Some((level(cache)?, *cache))).collect()
}

/// Every figure of `count` workers.
fn workers(
    loops: &Loops,
    caches: &[(Level, CacheLevel)],
    count: usize,
    quick: bool,
    bar: &ProgressBar,
) -> Result<Workers> {
    let time = Duration::from_millis(if quick { 5 } else { 250 });
    let memory = memory_bytes(caches, quick);
    let mut probe = Probe::new(&loops.image.bytes, &loops.image.offsets(), memory.max(measure::least(count)), count)?;
    let mut gb_per_s = BTreeMap::new();
    let mut inner = 0;
    for (level, cache) in caches {
        // A cache of its own, or of a core's two threads, comes with each worker. What is read lies well inside the
        // level, and beyond the one before it.
        let bytes = if cache.sharers <= 2 { cache.bytes.saturating_mul(count) } else { cache.bytes };
        let read = if inner == 0 { bytes / 2 } else { (bytes / 2).min(16 * inner) };
        gb_per_s.insert(*level, figure(bandwidth(&mut probe, loops, read.min(memory), time)?));
        inner = bytes;
        bar.inc(1);
    }
    gb_per_s.insert(Level::Memory, figure(bandwidth(&mut probe, loops, memory, 2 * time)?));
    bar.inc(1);
    let mut again = vec![];
    for mib in AGAIN.iter().filter(|mib| !quick && (**mib << 20) <= memory) {
        again.push((*mib as f64, figure(bandwidth(&mut probe, loops, mib << 20, time / 2)?)));
    }
    bar.inc(1);
    let mut gop_per_s: BTreeMap<Peak, f64> = BTreeMap::new();
    for l in &loops.loops {
        if let Loop::Products(kind) = l {
            gop_per_s.insert(*kind, figure(peak(&mut probe, loops, *kind, time)?));
            bar.inc(1);
        }
    }
    let (launch, barrier) = (measure::launch(&mut probe), measure::barrier(&mut probe));
    bar.inc(1);
    let [launch_us, barrier_us] = [launch, barrier].map(|seconds| rounded(seconds * 1e6));
    Ok(Workers { count, launch_us, barrier_us, gb_per_s, gop_per_s, again })
}

/// Twice the last cache, within reason.
fn memory_bytes(caches: &[(Level, CacheLevel)], quick: bool) -> usize {
    if quick {
        return QUICK_BYTES;
    }
    let (least, most) = MEMORY_BYTES;
    let last = caches.last().map_or(0, |(_, cache)| cache.bytes);
    let available = runtime::available_memory().unwrap_or(most) / 4;
    last.saturating_mul(2).clamp(least, most).min(available.max(QUICK_BYTES))
}

/// In 10^9 a second.
fn figure(rate: f64) -> f64 {
    rounded(rate / 1e9)
}

/// To three digits: what a measurement is good for.
fn rounded(value: f64) -> f64 {
    format!("{value:.2e}").parse().unwrap_or(value)
}

/// As the system names the processor.
fn model_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// For people: a column for each count of workers.
pub fn text_of(table: &MachineTable) -> String {
    let row = |name: String, cell: &dyn Fn(&Workers) -> String| {
        std::iter::once(name).chain(table.workers.iter().map(cell)).collect::<Vec<String>>()
    };
    let mut rows = vec![row("workers".into(), &|w| w.count.to_string())];
    let none = || "-".to_string();
    for level in [Level::L1, Level::L2, Level::L3, Level::Memory] {
        let size = table.cache_kib.get(&level).map_or_else(String::new, |kib| format!(", {kib} kB"));
        let cell = |w: &Workers| w.gb_per_s.get(&level).map_or_else(none, |rate| format!("{rate} GB/s"));
        rows.push(row(format!("read {level}{size}"), &cell));
    }
    for (index, (mib, _)) in table.workers.first().map_or(&[][..], |w| &w.again).iter().enumerate().step_by(2) {
        let cell = |w: &Workers| w.again.get(index).map_or_else(none, |(_, rate)| format!("{rate} GB/s"));
        rows.push(row(format!("read {mib} MB again"), &cell));
    }
    for peak in table.workers.iter().flat_map(|w| w.gop_per_s.keys()).collect::<std::collections::BTreeSet<_>>() {
        let cell = |w: &Workers| w.gop_per_s.get(peak).map_or_else(none, |rate| format!("{rate} GOP/s"));
        rows.push(row(format!("{peak} products"), &cell));
    }
    rows.push(row("launch".into(), &|w| format!("{} us", w.launch_us)));
    rows.push(row("barrier".into(), &|w| format!("{} us", w.barrier_us)));
    format!("{} ({}), {}\n{}", table.name, table.processor, origin(table), report::table(&rows))
}
