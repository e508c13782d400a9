//! Teams under all conditions: every share runs once and in its phase, whoever is away, asleep, or without a core.

use super::*;
use std::sync::atomic::AtomicUsize;

/// Phases of a job in which every share counts, after it has seen all that was counted in the phases before.
struct Counting {
    threads: usize,
    counted: Arc<AtomicUsize>,
    /// This worker takes long over every share.
    slow: Option<usize>,
    /// Shares that another than their owner has run.
    taken_over: Arc<AtomicUsize>,
}

impl Counting {
    fn new(threads: usize) -> Counting {
        Counting { threads, counted: Arc::default(), slow: None, taken_over: Arc::default() }
    }
}

impl Program<usize> for Counting {
    fn phases(&self, job: &usize) -> usize {
        *job
    }

    fn run(&self, _: &usize, phase: usize, share: Share) {
        let before = phase * self.threads;
        let counted = self.counted.fetch_add(1, Ordering::Relaxed);
        assert!((before..before + self.threads).contains(&counted), "{share:?} of phase {phase} is number {counted}");
        assert!(share.count == self.threads && share.index < self.threads && share.worker < self.threads);
        self.taken_over.fetch_add(usize::from(share.index != share.worker), Ordering::Relaxed);
        if self.slow == Some(share.worker) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn count(threads: usize, phases: usize) -> Duration {
    let counting = Counting::new(threads);
    let counted = counting.counted.clone();
    let mut team = Team::new(threads, false, counting).unwrap();
    let start = Instant::now();
    for _ in 0..3 {
        counted.store(0, Ordering::Relaxed);
        team.run(phases);
        assert_eq!(counted.load(Ordering::Relaxed), threads * phases);
    }
    start.elapsed()
}

#[test]
fn every_share_runs_once_and_in_its_phase() {
    for threads in [1, 2, 3] {
        count(threads, 3000);
    }
    count(2, 0);
}

#[test]
fn phases_do_not_collapse_when_workers_outnumber_cores() {
    for threads in [8, 64] {
        let time = count(threads, 1000);
        assert!(time < Duration::from_secs(60), "3000 phases of {threads} workers took {time:?}");
    }
}

/// The workers are still asleep when the caller is through with its own shares.
#[test]
fn shares_of_workers_that_are_away_are_taken_over() {
    let counting = Counting::new(64);
    let (counted, taken_over) = (counting.counted.clone(), counting.taken_over.clone());
    let mut team = Team::new(64, false, counting).unwrap();
    for _ in 0..10 {
        counted.store(0, Ordering::Relaxed);
        team.run(10);
        assert_eq!(counted.load(Ordering::Relaxed), 640);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(taken_over.load(Ordering::Relaxed) > 0, "every worker ran its own shares");
}

#[test]
fn a_slow_worker_keeps_its_share() {
    let mut counting = Counting::new(2);
    counting.slow = Some(1);
    let counted = counting.counted.clone();
    let mut team = Team::new(2, false, counting).unwrap();
    team.run(20);
    assert_eq!(counted.load(Ordering::Relaxed), 40);
}

#[test]
fn many_short_jobs_and_a_pause() {
    let counting = Counting::new(3);
    let counted = counting.counted.clone();
    let mut team = Team::new(3, false, counting).unwrap();
    for _ in 0..1000 {
        counted.store(0, Ordering::Relaxed);
        team.run(1);
        assert_eq!(counted.load(Ordering::Relaxed), 3);
    }
    std::thread::sleep(Duration::from_millis(20)); // the workers fall asleep
    counted.store(0, Ordering::Relaxed);
    team.run(10);
    assert_eq!(counted.load(Ordering::Relaxed), 30);
}

#[test]
fn senseless_numbers_of_threads_are_refused() {
    for threads in [0, MAX_THREADS + 1] {
        let team = Team::new(threads, false, Counting::new(threads));
        assert_eq!(team.err().map(|e| e.exit_code()), Some(2));
    }
}

/// Where its worker runs.
struct Places(Arc<Mutex<Vec<Vec<usize>>>>);

impl Program<()> for Places {
    fn phases(&self, (): &()) -> usize {
        1
    }

    fn run(&self, (): &(), _: usize, share: Share) {
        locked(&self.0)[share.worker] = Cpus::mine().unwrap().list();
        // The others come for their own shares meanwhile.
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn pinned_workers_keep_to_processors_of_their_own() {
    let allowed = Cpus::mine().unwrap().list();
    let threads = allowed.len().min(4);
    let places = Arc::new(Mutex::new(vec![vec![]; threads]));
    let mut team = Team::new(threads, true, Places(places.clone())).unwrap();
    team.run(());
    let mut used: Vec<usize> = locked(&places).iter().flatten().copied().collect();
    assert!(locked(&places).iter().all(|cpus| cpus.len() <= 1));
    used.sort_unstable();
    let count = used.len();
    used.dedup();
    assert!(!used.is_empty() && used.len() == count && used.iter().all(|cpu| allowed.contains(cpu)));
    assert_eq!(Cpus::mine().unwrap().list(), allowed, "the caller is free again");
}
