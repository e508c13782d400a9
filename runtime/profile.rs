//! What each launch of a step took, on each worker.
//!
//! ```text
//! worker 0   |-- k3 --| waits     |- k4 -|
//! worker 1   |----- k3 -----|     |-- k4 --|
//!            busy           wait: until the next launch starts, the barrier's own time included
//! ```
//!
//! A worker notes the times of its launches in memory of its own, and an engine without a recorder reads no clock. Over a
//! step, the wait before the first launch and every launch's busy time and wait add up to its whole time, on each worker.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

/// Where the time of one step went.
#[derive(Clone, Debug, Default)]
pub struct StepProfile {
    /// Index of the program's variant.
    pub variant: usize,
    /// Of the whole step.
    pub seconds: f64,
    /// Before the first launch, on average over workers: those that slept have to wake up.
    pub start: f64,
    /// In the variant's order.
    pub launches: Vec<LaunchProfile>,
}

/// Where the time of one launch went, in seconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct LaunchProfile {
    /// Running, on average over workers.
    pub busy: f64,
    /// Running, of the worker that took longest.
    pub slowest: f64,
    /// From its end until the worker runs something again, on average over workers.
    pub wait: f64,
}

/// Takes the times of one step after another.
#[derive(Debug)]
pub struct Recorder {
    /// All times are nanoseconds since then.
    origin: Instant,
    begun: AtomicU64,
    lanes: Vec<Lane>,
}

/// What one worker notes; nobody else writes there during a step.
#[derive(Debug)]
struct Lane {
    /// Nanoseconds of each launch.
    busy: Vec<AtomicU64>,
    /// Nanoseconds between launches, of the one before; the last entry is the wait before the first launch.
    wait: Vec<AtomicU64>,
    /// Entry of `wait` that a wait now is added to.
    last: AtomicUsize,
    /// When this worker began to run, or to wait.
    since: AtomicU64,
}

impl Lane {
    fn new(launches: usize) -> Lane {
        let zeros = |n| (0..n).map(|_| AtomicU64::new(0)).collect();
        Lane { busy: zeros(launches), wait: zeros(launches + 1), last: launches.into(), since: 0.into() }
    }

    /// The time since the last call.
    fn lap(&self, now: u64) -> u64 {
        now.saturating_sub(self.since.swap(now, Ordering::Relaxed))
    }

    fn idle(&self, now: u64) {
        self.wait[self.last.load(Ordering::Relaxed)].fetch_add(self.lap(now), Ordering::Relaxed);
    }
}

impl Recorder {
    /// For steps of at most `launches` launches.
    pub fn new(threads: usize, launches: usize) -> Recorder {
        let lanes = (0..threads).map(|_| Lane::new(launches)).collect();
        Recorder { origin: Instant::now(), begun: 0.into(), lanes }
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    /// A step begins; no worker runs.
    pub fn begin(&self) {
        for lane in &self.lanes {
            lane.busy.iter().chain(&lane.wait).for_each(|time| time.store(0, Ordering::Relaxed));
            lane.last.store(lane.busy.len(), Ordering::Relaxed);
        }
        let now = self.now();
        self.begun.store(now, Ordering::Relaxed);
        self.lanes.iter().for_each(|lane| lane.since.store(now, Ordering::Relaxed));
    }

    /// A worker starts a launch, or a part of it.
    pub fn started(&self, worker: usize) {
        self.lanes[worker].idle(self.now());
    }

    /// A worker has finished what it started of a launch.
    pub fn ended(&self, worker: usize, launch: usize) {
        let lane = &self.lanes[worker];
        lane.busy[launch].fetch_add(lane.lap(self.now()), Ordering::Relaxed);
        lane.last.store(launch, Ordering::Relaxed);
    }

    /// The step of `launches` launches of `variant` that has just ended; that it has ended makes its times seen.
    pub fn step(&self, variant: usize, launches: usize) -> StepProfile {
        let of = |time: &AtomicU64| time.load(Ordering::Relaxed) as f64 * 1e-9;
        let last = self.lanes.iter().map(|lane| lane.since.load(Ordering::Relaxed)).max().unwrap_or(0);
        self.lanes.iter().for_each(|lane| lane.idle(last));
        let seconds = last.saturating_sub(self.begun.load(Ordering::Relaxed)) as f64 * 1e-9;
        let share = 1.0 / self.lanes.len() as f64;
        let start = self.lanes.iter().filter_map(|lane| lane.wait.last()).map(of).sum::<f64>() * share;
        let launch = |i: usize| LaunchProfile {
            busy: self.lanes.iter().map(|lane| of(&lane.busy[i])).sum::<f64>() * share,
            slowest: self.lanes.iter().map(|lane| of(&lane.busy[i])).fold(0.0, f64::max),
            wait: self.lanes.iter().map(|lane| of(&lane.wait[i])).sum::<f64>() * share,
        };
        StepProfile { variant, seconds, start, launches: (0..launches).map(launch).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_times_and_waits_fill_a_step() {
        let recorder = Recorder::new(3, 4);
        for _ in 0..2 {
            recorder.begin();
            // The third worker sleeps; the second runs launch 2 in two parts.
            for (worker, launches) in [(0, [0, 1, 2].as_slice()), (1, &[0, 2, 2])] {
                for launch in launches {
                    std::thread::sleep(std::time::Duration::from_micros(50));
                    recorder.started(worker);
                    std::thread::sleep(std::time::Duration::from_micros(100));
                    recorder.ended(worker, *launch);
                }
            }
        }
        let step = recorder.step(1, 3);
        assert_eq!((step.variant, step.launches.len()), (1, 3));
        let all: f64 = step.launches.iter().map(|l| l.busy + l.wait).sum();
        assert!((step.start + all - step.seconds).abs() < 1e-8, "{step:?}");
        assert!(step.launches.iter().all(|l| l.busy > 20e-6 && l.busy < l.slowest && l.wait > 0.0), "{step:?}");
        assert!(step.launches[2].slowest > 200e-6 && step.seconds > 900e-6, "{step:?}");
        // Read once more, nothing has changed.
        assert_eq!(recorder.step(1, 3).launches[1].wait, step.launches[1].wait);
    }
}
