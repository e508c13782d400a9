//! Who touched which byte of a block's shared memory since threads last met.

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
}

impl Shadow {
    pub(super) fn new(bytes: usize, warps: usize) -> Shadow {
        let nobody = Access { thread: 0, warp: 0, epoch: 0, warp_epoch: 0 };
        Shadow { bytes: vec![[nobody; 2]; bytes], flying: vec![false; bytes], epoch: 1, warps: vec![0; warps] }
    }

    /// All threads have met.
    pub(super) fn pass_all(&mut self) {
        self.epoch += 1;
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
