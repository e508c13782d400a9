//! Loops -> rates: each runs until its time is up, and its fastest run counts.

use mansard_backends::cpu::probe::{Loop, Loops, PANEL_UNITS};
use mansard_backends::machine::Peak;
use mansard_ir::target::PROBE_UNIT;
use mansard_ir::{Error, Kind, Result};
use mansard_runtime::Probe;
use std::time::{Duration, Instant};

/// A run that is timed takes this long at least: waking the workers is lost in it.
const RUN: Duration = Duration::from_millis(2);

/// The share of its time that is for finding the fastest form of reading, each form's.
const TRIAL: u32 = 12;

/// Bytes of buffer that products of so many workers need.
pub fn least(threads: usize) -> usize {
    PANEL_UNITS * PROBE_UNIT * threads
}

/// Bytes per second that are read of the first `bytes` of a buffer, again and again, in the fastest form.
///
/// # Errors
/// Where the buffer is shorter.
pub fn bandwidth(probe: &mut Probe, loops: &Loops, bytes: usize, time: Duration) -> Result<f64> {
    // As many units for every stream of every worker.
    let step = 4 * probe.threads();
    let units = (bytes / PROBE_UNIT / step).max(1) * step;
    let work = (units * PROBE_UNIT) as f64;
    let (mut best, mut form) = (0.0, 0);
    for (index, l) in loops.loops.iter().enumerate() {
        if matches!(l, Loop::Read { .. }) {
            let found = rate(probe, index, units, work, time / TRIAL)?;
            if found > best {
                (best, form) = (found, index);
            }
        }
    }
    Ok(rate(probe, form, units, work, time / 2)?.max(best))
}

/// Operations per second of products.
///
/// # Errors
/// Where there are none of this type, or the buffer is shorter than [`least`].
pub fn peak(probe: &mut Probe, loops: &Loops, peak: Peak, time: Duration) -> Result<f64> {
    let index = loops.loops.iter().position(|l| *l == Loop::Products(peak));
    let index = index.ok_or_else(|| Error::new(Kind::Internal, format!("no products of {peak}")))?;
    let threads = probe.threads();
    rate(probe, index, PANEL_UNITS * threads, loops.operations(peak) * threads as f64, time)
}

/// Seconds to start a step: the median, for workers that still look for work are the rule.
pub fn launch(probe: &mut Probe) -> f64 {
    let mut times: Vec<f64> = (0..201).map(|_| probe.launch()).collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Seconds from launch to launch.
pub fn barrier(probe: &mut Probe) -> f64 {
    (0..10).map(|_| probe.barrier()).fold(f64::INFINITY, f64::min)
}

/// What a loop does per second in its fastest run, where one round of it does `work`.
fn rate(probe: &mut Probe, index: usize, units: usize, work: f64, time: Duration) -> Result<f64> {
    let (start, mut rounds, mut best) = (Instant::now(), 1, 0.0f64);
    loop {
        let seconds = probe.seconds(index, units, rounds)?.max(1e-9);
        best = best.max(work * rounds as f64 / seconds);
        if seconds < RUN.as_secs_f64() {
            rounds *= 2;
        } else if start.elapsed() >= time {
            return Ok(best);
        }
    }
}
