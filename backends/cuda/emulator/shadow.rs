//! Who touched which byte of a block's shared memory since threads last met.

use std::collections::BTreeMap;

/// Several lanes of a warp, or of several warps.
const SEVERAL: u16 = u16::MAX;

/// Threads of a warp.
const WARP: u16 = 32;

/// The last access of a kind.
#[derive(Clone, Copy)]
struct Access {
    thread: u16,
    warp: u16,
    /// Barriers that the block, and that warp, had passed then.
    epoch: u32,
    warp_epoch: u32,
}

/// A copy of the copy engine's that has landed: its barrier, and the phase that counted its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Landing {
    pub(super) bar: u64,
    pub(super) phase: i64,
}

/// The last phase of each barrier that a thread has waited for.
pub(super) type Observed = BTreeMap<u64, i64>;

/// The record of one block.
pub(super) struct Shadow {
    /// For each byte, who wrote it and who read it.
    bytes: Vec<[Access; 2]>,
    /// Asynchronous copies under way write there.
    flying: Vec<bool>,
    /// Barriers that the block has passed.
    pub(super) epoch: u32,
    /// Barriers that each warp has passed for itself.
    warps: Vec<u32>,
    /// For each byte: what the copy engine brought, as a number of `landings` and one; products under way that read it; the
    /// thread that stored it, and how often that had fenced the asynchronous proxy before.
    landed: Vec<u32>,
    reading: Vec<u16>,
    stored: Vec<Option<(u16, u32)>>,
    landings: Vec<Landing>,
    /// What somebody had waited for when the block last met, and since.
    met: Observed,
    since: Observed,
}

impl Shadow {
    pub(super) fn new(bytes: usize, warps: usize) -> Shadow {
        let nobody = Access { thread: 0, warp: 0, epoch: 0, warp_epoch: 0 };
        Shadow {
            bytes: vec![[nobody; 2]; bytes],
            flying: vec![false; bytes],
            epoch: 1,
            warps: vec![0; warps],
            landed: vec![0; bytes],
            reading: vec![0; bytes],
            stored: vec![None; bytes],
            landings: vec![],
            met: Observed::new(),
            since: Observed::new(),
        }
    }

    /// All threads have met.
    pub(super) fn pass_all(&mut self) {
        self.epoch += 1;
        self.met.clone_from(&self.since);
    }

    /// All lanes of a warp have met.
    pub(super) fn pass(&mut self, warp: usize) {
        self.warps[warp] += 1;
    }

    /// A copy begins to write.
    pub(super) fn begin(&mut self, at: usize, size: usize) {
        self.flying[at..at + size].fill(true);
    }

    /// It was waited for.
    pub(super) fn land(&mut self, at: usize, size: usize) {
        self.flying[at..at + size].fill(false);
    }

    /// A thread has waited for a phase of a barrier.
    pub(super) fn observe(&mut self, bar: u64, phase: i64) {
        self.since.insert(bar, phase);
    }

    /// The copy engine begins to write.
    pub(super) fn begin_tile(&mut self, thread: u32, (at, size): (usize, usize), fences: &[u32]) -> Result<(), String> {
        self.landed.get_mut(at..at + size).into_iter().for_each(|landed| landed.fill(0));
        self.access(thread, at, size, true)?;
        self.fenced((at, size), fences)?;
        self.stored[at..at + size].fill(None);
        self.begin(at, size);
        Ok(())
    }

    /// It is done.
    pub(super) fn land_tile(&mut self, (at, size): (usize, usize), landing: Landing) {
        self.land(at, size);
        self.landings.push(landing);
        self.landed[at..at + size].fill(self.landings.len() as u32);
    }

    /// A product of some threads begins to read; `observed` is by thread, `known` the copy that they were last found to have
    /// waited for.
    pub(super) fn begin_read(
        &mut self,
        (at, size): (usize, usize),
        observed: &[Observed],
        fences: &[u32],
        known: &mut u32,
    ) -> Result<(), String> {
        let end = self.bytes.len();
        let Some(landed) = self.landed.get(at..at + size) else {
            return Err(format!("a product reads bytes {at}..{} of {end} of shared memory", at + size));
        };
        let mut early = false;
        for landed in landed {
            if landed != known {
                early |= observed.iter().any(|observed| !self.awaited(*landed, observed));
                *known = *landed;
            }
        }
        if early || self.flying[at..at + size].contains(&true) {
            return Err(format!("race: a product reads byte {at} of shared memory, which a copy writes"));
        }
        self.fenced((at, size), fences)?;
        self.reading[at..at + size].iter_mut().for_each(|reading| *reading += 1);
        Ok(())
    }

    /// It was waited for.
    pub(super) fn end_read(&mut self, (at, size): (usize, usize)) {
        self.reading[at..at + size].iter_mut().for_each(|reading| *reading -= 1);
    }

    /// A thread that has waited for `observed` sees what landed.
    fn awaited(&self, landed: u32, observed: &Observed) -> bool {
        let Some(landing) = (landed as usize).checked_sub(1).map(|i| self.landings[i]) else { return true };
        [observed, &self.met].iter().any(|seen| seen.get(&landing.bar).is_some_and(|phase| *phase >= landing.phase))
    }

    /// What threads stored there was fenced before copies and products touch it.
    fn fenced(&self, (at, size): (usize, usize), fences: &[u32]) -> Result<(), String> {
        let unfenced =
            |stored: &Option<(u16, u32)>| stored.is_some_and(|(by, before)| fences[usize::from(by)] == before);
        match self.stored[at..at + size].iter().position(unfenced) {
            Some(i) => Err(format!(
                "byte {} of shared memory was stored with no fence of the asynchronous proxy after",
                at + i
            )),
            None => Ok(()),
        }
    }

    /// Records a thread's own access and says what is wrong with it.
    pub(super) fn touch(
        &mut self,
        thread: u32,
        (at, size): (usize, usize),
        writes: bool,
        (observed, fences): (&Observed, u32),
    ) -> Result<(), String> {
        let landed = self.landed.get(at..at + size).unwrap_or_default();
        if landed.iter().any(|landed| !self.awaited(*landed, observed)) {
            return Err(format!("race: thread {thread} touches byte {at} of shared memory, which a copy writes"));
        }
        self.access(thread, at, size, writes)?;
        if writes {
            self.landed[at..at + size].fill(0);
            self.stored[at..at + size].fill(Some((thread as u16, fences)));
        }
        Ok(())
    }

    /// Records an access and says what is wrong with it.
    pub(super) fn access(&mut self, thread: u32, at: usize, size: usize, writes: bool) -> Result<(), String> {
        let (thread, warp, end) = (thread as u16, thread as u16 / WARP, self.bytes.len());
        let own = Access { thread, warp, epoch: self.epoch, warp_epoch: self.warps[usize::from(warp)] };
        let Some(bytes) = self.bytes.get_mut(at..at + size) else {
            return Err(format!("thread {thread} touches bytes {at}..{} of {end} of shared memory", at + size));
        };
        if let Some(i) = self.flying[at..at + size].iter().position(|flying| *flying) {
            return Err(format!("race: thread {thread} touches byte {} of shared memory, which a copy writes", at + i));
        }
        if let (true, Some(i)) = (writes, self.reading[at..at + size].iter().position(|reading| *reading > 0)) {
            return Err(format!(
                "race: thread {thread} writes byte {} of shared memory, which a product reads",
                at + i
            ));
        }
        for (i, [written, read]) in bytes.iter_mut().enumerate() {
            let what = if writes { "writes" } else { "reads" };
            if written.meets(own) {
                return Err(format!(
                    "race: thread {thread} {what} byte {} of shared memory, which thread {} wrote",
                    at + i,
                    written.thread
                ));
            }
            if writes && read.meets(own) {
                let other = if read.thread == SEVERAL { "others".into() } else { format!("thread {}", read.thread) };
                return Err(format!(
                    "race: thread {thread} writes byte {} of shared memory, which {other} read",
                    at + i
                ));
            }
            match writes {
                true => *written = own,
                false => *read = read.joined(own),
            }
        }
        Ok(())
    }
}

impl Access {
    /// Nothing orders this access before a later one of another thread.
    fn meets(self, later: Access) -> bool {
        let one_warp = self.warp == later.warp;
        self.epoch == later.epoch && self.thread != later.thread && !(one_warp && self.warp_epoch < later.warp_epoch)
    }

    /// Both reads as one.
    fn joined(self, later: Access) -> Access {
        if !self.meets(later) {
            return later;
        }
        let warp = if self.warp == later.warp { later.warp } else { SEVERAL };
        Access { thread: SEVERAL, warp, ..later }
    }
}
