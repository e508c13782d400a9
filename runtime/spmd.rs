//! One program, many workers: every worker runs the whole step and takes its share of every launch.
//!
//! Workers stay alive between steps. They meet at barriers by spinning, which costs less than a microsecond where each has
//! a core; a wait that lasts becomes a sleep, so that a busy neighbour does not stop the team and an idle engine uses no
//! processor time. The thread that calls [`Team::run`] is worker 0.

use mansard_ir::{Error, Kind, Result, bail};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// The most workers a team may have.
pub const MAX_THREADS: usize = 1024;

/// Rounds of spinning before a waiting worker sleeps: some ten microseconds, by which workers' shares of a launch differ.
/// Sleeping at once when they have passed, rather than yielding, keeps the scheduler's favour: after it has yielded, a
/// worker waits for its neighbours' whole time slices, and the team for it.
const SPINS: u32 = 1000;
/// The same between steps, while a token is sampled.
const IDLE_SPINS: u32 = 4000;
/// The same where workers outnumber cores, and whoever is waited for may need this very core.
const SPINS_CROWDED: u32 = 100;

/// A counter that threads wait on. On cache lines of its own.
#[repr(align(128))]
struct Epoch {
    value: AtomicU32,
    sleepers: AtomicU32,
    lock: Mutex<()>,
    changed: Condvar,
    spins: u32,
}

impl Epoch {
    fn new(spins: u32) -> Epoch {
        Epoch { value: 0.into(), sleepers: 0.into(), lock: Mutex::new(()), changed: Condvar::new(), spins }
    }

    fn now(&self) -> u32 {
        self.value.load(Ordering::Acquire)
    }

    /// Lets everyone go on who waits for the current value to pass.
    fn advance(&self) {
        self.value.fetch_add(1, Ordering::SeqCst);
        // A sleeper counts itself before it looks at the value a last time, so one of the two sees the other.
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(locked(&self.lock));
            self.changed.notify_all();
        }
    }

    /// Returns once the value is another than `seen`.
    fn wait_past(&self, seen: u32) {
        for _ in 0..self.spins {
            if self.now() != seen {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = locked(&self.lock);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.value.load(Ordering::SeqCst) == seen {
            guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where all workers meet; its sense is the epoch, so it can be used again at once.
pub struct Barrier {
    arrived: AtomicU32,
    threads: u32,
    epoch: Epoch,
}

impl Barrier {
    fn new(threads: u32, spins: u32) -> Barrier {
        Barrier { arrived: 0.into(), threads, epoch: Epoch::new(spins) }
    }

    /// Returns once every worker has called it. What they wrote before is seen after.
    pub fn wait(&self) {
        let seen = self.epoch.now();
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            // Nobody arrives again before the epoch has advanced.
            self.arrived.store(0, Ordering::Relaxed);
            self.epoch.advance();
        } else {
            self.epoch.wait_past(seen);
        }
    }
}

/// A worker, as the program sees it.
pub struct Worker<'a> {
    /// Which one: `0..threads`.
    pub thread: usize,
    /// How many there are.
    pub threads: usize,
    /// Where they meet.
    pub barrier: &'a Barrier,
}

#[derive(Clone, Copy)]
enum Order<J> {
    Wait,
    Run(J),
    Stop,
}

struct Shared<J> {
    order: Mutex<Order<J>>,
    /// Advances with every order.
    orders: Epoch,
    barrier: Barrier,
    program: Box<dyn Fn(J, Worker<'_>) + Send + Sync>,
    threads: usize,
}

impl<J: Copy> Shared<J> {
    fn run(&self, job: J, thread: usize) {
        (self.program)(job, Worker { thread, threads: self.threads, barrier: &self.barrier });
        self.barrier.wait();
    }

    fn give(&self, order: Order<J>) {
        *locked(&self.order) = order;
        self.orders.advance();
    }

    fn serve(&self, thread: usize) {
        let mut seen = 0;
        loop {
            self.orders.wait_past(seen);
            seen = self.orders.now();
            let order = *locked(&self.order);
            match order {
                Order::Wait => {}
                Order::Run(job) => self.run(job, thread),
                Order::Stop => return,
            }
        }
    }
}

/// Workers and the program they run; `J` says what to run it on.
pub struct Team<J: Copy + Send + 'static> {
    shared: Arc<Shared<J>>,
    workers: Vec<JoinHandle<()>>,
}

impl<J: Copy + Send + 'static> Team<J> {
    /// Starts `threads - 1` workers beside the caller.
    ///
    /// # Errors
    /// Where `threads` is 0 or beyond [`MAX_THREADS`], or the system refuses a thread.
    pub fn new(threads: usize, program: impl Fn(J, Worker<'_>) + Send + Sync + 'static) -> Result<Team<J>> {
        if threads == 0 || threads > MAX_THREADS {
            bail!(Usage, "expected 1 to {MAX_THREADS} threads, found {threads}");
        }
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let (spins, idle_spins) = if threads > cores { (SPINS_CROWDED, SPINS_CROWDED) } else { (SPINS, IDLE_SPINS) };
        let shared = Arc::new(Shared {
            order: Mutex::new(Order::Wait),
            orders: Epoch::new(idle_spins),
            barrier: Barrier::new(threads as u32, spins),
            program: Box::new(program),
            threads,
        });
        let mut team = Team { shared, workers: vec![] };
        for thread in 1..threads {
            let shared = team.shared.clone();
            let spawned =
                std::thread::Builder::new().name(format!("worker {thread}")).spawn(move || shared.serve(thread));
            let worker = spawned.map_err(|e| {
                Error::new(Kind::Io, format!("cannot start worker {thread} of {threads}: {e}"))
                    .help("ask for fewer threads")
            })?;
            team.workers.push(worker);
        }
        Ok(team)
    }

    /// Runs the program on `job` with every worker; returns when all have finished.
    pub fn run(&mut self, job: J) {
        if !self.workers.is_empty() {
            self.shared.give(Order::Run(job));
        }
        self.shared.run(job, 0);
    }

    /// Workers, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }
}

impl<J: Copy + Send + 'static> Drop for Team<J> {
    fn drop(&mut self) {
        self.shared.give(Order::Stop);
        for worker in self.workers.drain(..) {
            // A worker that panicked has nothing left to stop.
            let _ = worker.join();
        }
    }
}

/// Cores this process may use, counting the hardware threads of one core once.
pub fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut cores = std::collections::BTreeSet::new();
    for cpu in std::fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten() {
        let topology = cpu.path().join("topology");
        let read = |name| std::fs::read_to_string(topology.join(name)).ok();
        cores.extend(read("physical_package_id").zip(read("core_id")));
    }
    if cores.is_empty() { logical } else { logical.min(cores.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::time::{Duration, Instant};

    /// Every worker counts, and at each barrier sees what all have counted.
    fn count(threads: usize, rounds: usize) -> Duration {
        let counter = Arc::new(AtomicUsize::new(0));
        let counted = counter.clone();
        let mut team = Team::new(threads, move |rounds: usize, worker: Worker<'_>| {
            for round in 0..rounds {
                counted.fetch_add(1, Ordering::Relaxed);
                worker.barrier.wait();
                assert_eq!(counted.load(Ordering::Relaxed), (round + 1) * worker.threads);
                worker.barrier.wait();
            }
        })
        .unwrap();
        let start = Instant::now();
        team.run(rounds);
        let time = start.elapsed();
        assert_eq!(counter.load(Ordering::Relaxed), threads * rounds);
        time
    }

    #[test]
    fn barriers_hold_with_a_core_for_each_worker() {
        count(1, 1000);
        count(2, 10_000);
    }

    #[test]
    fn barriers_do_not_collapse_when_workers_outnumber_cores() {
        let time = count(8, 5000);
        assert!(time < Duration::from_secs(20), "10 000 barriers took {time:?}");
    }

    #[test]
    fn many_short_runs_and_a_pause() {
        let counter = Arc::new(AtomicUsize::new(0));
        let counted = counter.clone();
        let mut team = Team::new(3, move |n: usize, _: Worker<'_>| {
            counted.fetch_add(n, Ordering::Relaxed);
        })
        .unwrap();
        for _ in 0..1000 {
            team.run(1);
        }
        std::thread::sleep(Duration::from_millis(20)); // the workers fall asleep
        team.run(10);
        assert_eq!(counter.load(Ordering::Relaxed), 3 * 1010);
    }

    #[test]
    fn senseless_numbers_of_threads_are_refused() {
        for threads in [0, MAX_THREADS + 1] {
            assert_eq!(Team::new(threads, |_: (), _| {}).err().map(|e| e.exit_code()), Some(2));
        }
        assert!(physical_cores() >= 1);
    }
}
