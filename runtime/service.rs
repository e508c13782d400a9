//! A batch on a thread of its own: requests come from any thread, tokens go to their sinks.
//!
//! ```text
//!  submit ---channel---> thread: Batcher::step, step, step ---> sinks
//!  stats  <---------------- after every step
//! ```
//!
//! The queue is bounded: a request too many is refused at once, with the seconds after which it may be worth trying again.

use crate::batch::{BatchOptions, Batcher, Request, Sink, Stats};
use mansard_ir::{Error, Kind, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How a service is run.
#[derive(Clone, Copy, Debug)]
pub struct ServiceOptions {
    /// Most requests that wait.
    pub queue: usize,
    /// How its batch is run.
    pub batch: BatchOptions,
}

impl Default for ServiceOptions {
    fn default() -> ServiceOptions {
        ServiceOptions { queue: 256, batch: BatchOptions::default() }
    }
}

/// Why a request was not taken in.
#[derive(Debug)]
pub enum Refused {
    /// Too many wait; try again after that time.
    Busy(Duration),
    /// The service takes no more requests, or its thread has ended.
    Closed,
}

/// A running batch. Dropping it ends what is not done.
pub struct Service {
    jobs: Option<Sender<Job>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    queue: usize,
}

struct Shared {
    /// Requests that wait, in the channel or in the batch.
    waiting: Arc<AtomicUsize>,
    stats: Mutex<Stats>,
    next: AtomicU64,
    /// What is not done is to be ended.
    ending: AtomicBool,
}

enum Job {
    Submit(u64, Box<Request>, Sink),
    Cancel(u64),
    /// No more will come.
    Close,
}

/// A place in the queue.
struct Ticket(Arc<AtomicUsize>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Ends its request when dropped.
pub struct Handle {
    jobs: Sender<Job>,
    request: u64,
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Where the thread has ended, so has the request.
        let _ = self.jobs.send(Job::Cancel(self.request));
    }
}

impl Service {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where the system refuses one.
    pub fn start(batcher: Batcher, options: &ServiceOptions) -> Result<Service> {
        let (jobs, inbox) = channel();
        let shared = Arc::new(Shared {
            waiting: Arc::default(),
            stats: Mutex::new(batcher.stats().clone()),
            next: AtomicU64::new(0),
            ending: AtomicBool::new(false),
        });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new().name("batch".into()).spawn(move || drive(batcher, &inbox, &theirs));
        let thread = thread.map_err(|e| Error::io("the batch's thread", e))?;
        Ok(Service { jobs: Some(jobs), shared, thread: Some(thread), queue: options.queue })
    }

    /// Takes a request in. It ends when the handle is dropped; `sink` is called on the service's thread and must not block.
    /// What makes no sense comes back as [`crate::Event::Failed`].
    ///
    /// # Errors
    /// Where too many wait, or the service is closed.
    pub fn submit(&self, mut request: Request, sink: Sink) -> Result<Handle, Refused> {
        let jobs = self.jobs.clone().ok_or(Refused::Closed)?;
        if self.shared.waiting.fetch_add(1, Ordering::Relaxed) >= self.queue {
            self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(Refused::Busy(self.wait()));
        }
        request.ticket = Some(Box::new(Ticket(self.shared.waiting.clone())));
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        jobs.send(Job::Submit(id, Box::new(request), sink)).map_err(|_| Refused::Closed)?;
        Ok(Handle { jobs, request: id })
    }

    /// What a queue takes to clear, by what requests have taken so far.
    fn wait(&self) -> Duration {
        let stats = self.stats();
        let rounds = self.queue as f64 / stats.running.max(1) as f64;
        Duration::from_secs_f64((rounds * stats.request_seconds.mean()).clamp(1.0, 60.0))
    }

    /// Figures as of the last step.
    pub fn stats(&self) -> Stats {
        locked(&self.shared.stats).clone()
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.shared.waiting.load(Ordering::Relaxed)
    }

    /// Its thread is there and takes requests.
    pub fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Takes no more requests, and returns when those that it has are done; after `patience` those that are not get an error.
    pub fn drain(&mut self, patience: Duration) {
        let (Some(jobs), Some(thread)) = (self.jobs.take(), self.thread.take()) else { return };
        // Where the thread has ended there is nothing to close.
        let _ = jobs.send(Job::Close);
        let start = Instant::now();
        while !thread.is_finished() && start.elapsed() < patience {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.shared.ending.store(true, Ordering::Relaxed);
        // A panic has been reported by the thread itself.
        let _ = thread.join();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.drain(Duration::ZERO);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread: takes what has come, runs a step, publishes figures; sleeps where there is nothing to do.
fn drive(mut batcher: Batcher, inbox: &Receiver<Job>, shared: &Shared) {
    let (mut open, mut closing) = (HashMap::new(), false);
    loop {
        while let Some(job) = take(inbox, batcher.pending() == 0 && !closing, &mut closing) {
            match job {
                Job::Submit(id, request, sink) => {
                    open.extend(batcher.submit_or_tell(*request, sink).map(|request| (id, request)));
                }
                Job::Cancel(id) => open.remove(&id).into_iter().for_each(|request| batcher.cancel(request)),
                Job::Close => closing = true,
            }
        }
        if shared.ending.load(Ordering::Relaxed) {
            batcher.abort(|| Error::new(Kind::Io, "the service is shutting down"));
        }
        batcher.step();
        *locked(&shared.stats) = batcher.stats().clone();
        if closing && batcher.pending() == 0 {
            return;
        }
    }
}

/// The next job; waits for one where there is nothing else to do.
fn take(inbox: &Receiver<Job>, idle: bool, closing: &mut bool) -> Option<Job> {
    let job = if idle { inbox.recv().map_err(|_| TryRecvError::Disconnected) } else { inbox.try_recv() };
    *closing |= matches!(job, Err(TryRecvError::Disconnected));
    job.ok()
}
