//! One program, many workers: a job runs in phases, and a phase in shares that workers take.
//!
//! ```text
//!  phase     0    1    2    3    4        a phase begins when every share of the one before is done
//!  worker 0  0    0   0 1  0 1   0
//!  worker 1  1    1    -    -    1        away for two phases, whose shares the other took
//! ```
//!
//! A worker has the same share of each phase from job to job, so that it finds in its caches what it left there; others
//! take it only when its owner does not come. What a share computes does not depend on who computes it. Workers stay alive
//! between jobs. They wait by spinning, which costs less than a microsecond where each has a core; a wait that lasts
//! becomes a sleep, so an idle team uses no processor time. The thread that calls [`Team::run`] is worker 0.

use crate::cores::placement;
use crate::memory::Cpus;
use mansard_ir::{Error, Kind, Result, bail};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The most workers a team may have.
pub const MAX_THREADS: usize = 1024;

/// Rounds of spinning before a share is taken whose owner has not come: a microsecond or two, by which workers that all
/// have a core differ at the start of a phase.
const GRACE: u32 = 50;
/// Rounds of spinning before a waiting worker sleeps: some ten microseconds, by which shares of a phase differ.
const SPINS: u32 = 1000;
/// The same between jobs, while a token is sampled.
const IDLE_SPINS: u32 = 4000;
/// The same where workers outnumber cores, and whoever is waited for may need this very core.
const SPINS_CROWDED: u32 = 100;
/// How long a worker runs before it offers its core to whoever else wants it, between two shares. The scheduler would take
/// the core somewhat later in the midst of a share, for which all others would then wait.
const STRETCH: Duration = Duration::from_micros(1000);

/// What a team runs; `J` says what to run it on.
pub trait Program<J>: Send + Sync {
    /// Phases of a job.
    fn phases(&self, job: &J) -> usize;
    /// One share of a phase. Shares of a phase run at the same time; those of the phase before are done.
    fn run(&self, job: &J, phase: usize, share: Share);
}

/// A part of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Which part: `0..count`.
    pub index: usize,
    /// How many there are.
    pub count: usize,
    /// Who runs it: `0..threads`.
    pub worker: usize,
}

/// A counter that threads wait on. On cache lines of its own.
#[repr(align(128))]
struct Epoch {
    value: AtomicU64,
    sleepers: AtomicU32,
    lock: Mutex<()>,
    changed: Condvar,
    spins: u32,
}

impl Epoch {
    fn new(spins: u32) -> Epoch {
        Epoch { value: 1.into(), sleepers: 0.into(), lock: Mutex::new(()), changed: Condvar::new(), spins }
    }

    fn now(&self) -> u64 {
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

    /// Whether the value becomes another than `seen` within so many rounds of spinning.
    fn passes(&self, seen: u64, rounds: u32) -> bool {
        for _ in 0..rounds {
            if self.now() != seen {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Returns once the value is another than `seen`.
    fn wait_past(&self, seen: u64) {
        if self.passes(seen, self.spins) {
            return;
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

/// The stamp of the last phase in which one worker's share was taken. On cache lines of its own.
#[repr(align(128))]
struct Taken(AtomicU64);

impl Taken {
    /// Takes the share of the phase with that stamp, unless it is taken. Whoever has overslept finds it taken too, for no
    /// stamp comes twice.
    fn take(&self, stamp: u64) -> bool {
        self.0.load(Ordering::Relaxed) < stamp && self.0.fetch_max(stamp, Ordering::AcqRel) < stamp
    }
}

#[derive(Clone, Copy)]
enum Order<J> {
    Wait,
    /// A job, and the stamp of its first phase.
    Run(J, u64),
    Stop,
}

struct Shared<J> {
    order: Mutex<Order<J>>,
    /// Advances with every order.
    orders: Epoch,
    /// Advances with every phase: the stamp of the current one.
    stamp: Epoch,
    /// Shares of the current phase that are done.
    done: Done,
    taken: Box<[Taken]>,
    program: Box<dyn Program<J>>,
}

#[repr(align(128))]
struct Done(AtomicU32);

impl<J: Copy> Shared<J> {
    fn threads(&self) -> usize {
        self.taken.len()
    }

    fn give(&self, order: Order<J>) {
        *locked(&self.order) = order;
        self.orders.advance();
    }

    fn serve(&self, worker: usize) {
        let mut seen = 1;
        loop {
            self.orders.wait_past(seen);
            seen = self.orders.now();
            let order = *locked(&self.order);
            match order {
                Order::Wait => {}
                Order::Run(job, first) => self.work(&job, first, worker),
                Order::Stop => return,
            }
        }
    }

    /// Takes part in a job until it is done.
    fn work(&self, job: &J, first: u64, worker: usize) {
        let phases = self.program.phases(job) as u64;
        let mut since = Instant::now();
        loop {
            let stamp = self.stamp.now();
            let phase = stamp - first;
            if phase >= phases {
                return;
            }
            let phase = Phase { shared: self, job, stamp, phase: phase as usize, worker };
            phase.take_part();
            if since.elapsed() >= STRETCH {
                std::thread::yield_now();
                since = Instant::now();
            }
        }
    }
}

/// A phase in one worker's eyes.
struct Phase<'a, J> {
    shared: &'a Shared<J>,
    job: &'a J,
    stamp: u64,
    phase: usize,
    worker: usize,
}

impl<J: Copy> Phase<'_, J> {
    /// Runs shares until none is left to take, and returns when all are done.
    fn take_part(&self) {
        self.run_share_of(self.worker);
        if self.shared.stamp.passes(self.stamp, GRACE) {
            return;
        }
        let threads = self.shared.threads();
        for other in 1..threads {
            self.run_share_of((self.worker + other) % threads);
        }
        self.shared.stamp.wait_past(self.stamp);
    }

    fn run_share_of(&self, owner: usize) {
        let shared = self.shared;
        if !shared.taken[owner].take(self.stamp) {
            return;
        }
        let count = shared.threads();
        shared.program.run(self.job, self.phase, Share { index: owner, count, worker: self.worker });
        if shared.done.0.fetch_add(1, Ordering::AcqRel) + 1 == count as u32 {
            // Nobody counts for the next phase before the stamp has advanced.
            shared.done.0.store(0, Ordering::Relaxed);
            shared.stamp.advance();
        }
    }
}

/// Workers and the program they run; `J` says what to run it on.
pub struct Team<J: Copy + Send + 'static> {
    shared: Arc<Shared<J>>,
    workers: Vec<JoinHandle<()>>,
    /// Where worker 0 runs during a job.
    home: Option<Cpus>,
}

impl<J: Copy + Send + 'static> Team<J> {
    /// Starts `threads - 1` workers beside the caller; with `pin`, each worker keeps to a core of its own.
    ///
    /// # Errors
    /// Where `threads` is 0 or beyond [`MAX_THREADS`], or the system refuses a thread or its place.
    pub fn new(threads: usize, pin: bool, program: impl Program<J> + 'static) -> Result<Team<J>> {
        if threads == 0 || threads > MAX_THREADS {
            bail!(Usage, "expected 1 to {MAX_THREADS} threads, found {threads}");
        }
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let (spins, idle_spins) = if threads > cores { (SPINS_CROWDED, SPINS_CROWDED) } else { (SPINS, IDLE_SPINS) };
        let shared = Arc::new(Shared {
            order: Mutex::new(Order::Wait),
            orders: Epoch::new(idle_spins),
            stamp: Epoch::new(spins),
            done: Done(0.into()),
            taken: (0..threads).map(|_| Taken(0.into())).collect(),
            program: Box::new(program),
        });
        let places = if pin { placement(threads)? } else { vec![] };
        let mut team = Team { shared, workers: vec![], home: places.first().copied() };
        for worker in 1..threads {
            let shared = team.shared.clone();
            let spawned =
                std::thread::Builder::new().name(format!("worker {worker}")).spawn(move || shared.serve(worker));
            let handle = spawned.map_err(|e| {
                Error::new(Kind::Io, format!("cannot start worker {worker} of {threads}: {e}"))
                    .help("ask for fewer threads")
            })?;
            let placed = places.get(worker).map_or(Ok(()), |cpus| cpus.hold(&handle));
            team.workers.push(handle);
            placed?;
        }
        Ok(team)
    }

    /// Runs the program on `job` with every worker; returns when all is done.
    pub fn run(&mut self, job: J) {
        // The caller's thread is not ours: it keeps to its core for as long as the job takes. Where the system has taken
        // that core away since, the job runs all the same.
        let before = self.home.and_then(|home| home.hold_me().ok());
        let first = self.shared.stamp.now();
        if !self.workers.is_empty() {
            self.shared.give(Order::Run(job, first));
        }
        self.shared.work(&job, first, 0);
        let _ = before.map(|cpus| cpus.hold_me());
    }

    /// Workers, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.threads()
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

#[cfg(test)]
#[path = "spmd_tests.rs"]
mod tests;
