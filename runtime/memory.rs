//! Zeroed memory that costs nothing until it is touched: activations, cache pools, and copies of packed weights.
//!
//! An [`Arena`] reserves address space; pages come, zeroed, with the first write. With huge pages a read of packed weights
//! is not bound by address translation. Only kernels write to an arena while workers run, through [`Arena::at`]; reading
//! takes `&self` and writing `&mut self`, which nobody has during a step.
//!
//! [`Cpus`] says where a thread runs, and with that from which part of the memory its first writes get pages.
#![allow(unsafe_code)]

use mansard_ir::{Error, Kind, Result, bail};
use std::borrow::Cow;
use std::ops::Range;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::thread::JoinHandle;

/// Bytes of a huge page, and the alignment of every arena.
const HUGE_PAGE: usize = 2 << 20;

/// Memory of kernels: this process's, or a GPU's.
pub trait Memory: Send + Sync {
    /// Address of byte `offset`, for kernels alone.
    fn at(&self, offset: usize) -> *mut u8;

    /// Copies bytes to others of it.
    ///
    /// # Errors
    /// Where a GPU's driver fails.
    fn copy(&mut self, from: Range<usize>, to: usize) -> Result<()>;

    /// `len` values from byte `offset`.
    ///
    /// # Errors
    /// Where a GPU's driver fails.
    fn read(&self, offset: usize, len: usize) -> Result<Cow<'_, [f32]>>;
}

impl Memory for Arena {
    fn at(&self, offset: usize) -> *mut u8 {
        Arena::at(self, offset)
    }

    fn copy(&mut self, from: Range<usize>, to: usize) -> Result<()> {
        self.bytes_mut().copy_within(from, to);
        Ok(())
    }

    fn read(&self, offset: usize, len: usize) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Borrowed(self.f32s(offset, len)))
    }
}

/// A zeroed range of memory, aligned to 2 MB, returned when dropped.
pub struct Arena {
    base: NonNull<u8>,
    bytes: usize,
    /// The whole mapping, of which `base` is the first aligned byte.
    mapping: (*mut libc::c_void, usize),
}

// SAFETY: an arena owns its mapping as a `Box<[u8]>` owns its bytes, and is not tied to the thread that mapped it.
unsafe impl Send for Arena {}
// SAFETY: through `&Arena` memory is only read, or handed out as raw pointers.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `bytes` for `what`, which names them in the error. They are on small pages until [`Arena::use_huge_pages`]
    /// says otherwise, also where the system would give huge ones unasked: a touched byte costs 4 kB then, not 2 MB.
    ///
    /// # Errors
    /// Where the operating system refuses.
    pub fn new(what: &str, bytes: usize) -> Result<Arena> {
        let refused = |reason: &str| {
            let message = format!("expected {bytes} bytes of memory for {what}: {reason}");
            Error::new(Kind::Io, message).help("ask for a shorter context, or close other programs")
        };
        // One byte at least, so that empty arenas have an address of their own.
        let reserved = bytes.max(1).checked_next_multiple_of(HUGE_PAGE).and_then(|b| b.checked_add(HUGE_PAGE));
        let Some(reserved) = reserved.filter(|b| *b <= isize::MAX as usize) else {
            return Err(refused("more than an address space"));
        };
        // SAFETY: a new private anonymous mapping at an address of the system's choice touches no memory in use.
        let mapping = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), reserved, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if mapping == libc::MAP_FAILED {
            return Err(refused(&std::io::Error::last_os_error().to_string()));
        }
        let offset = mapping.align_offset(HUGE_PAGE);
        let Some(base) = NonNull::new(mapping.cast::<u8>().wrapping_add(offset)) else {
            bail!(Internal, "memory mapped at address 0");
        };
        let arena = Arena { base, bytes, mapping: (mapping, reserved) };
        arena.advise(0..bytes, libc::MADV_NOHUGEPAGE);
        Ok(arena)
    }

    /// An arena on huge pages, where they are to be had.
    ///
    /// # Errors
    /// As [`Arena::new`].
    pub fn huge(what: &str, bytes: usize) -> Result<Arena> {
        let arena = Arena::new(what, bytes)?;
        arena.use_huge_pages(0..bytes);
        Ok(arena)
    }

    /// Asks for huge pages under every 2 MB that lie in `range`, and those at its end. This is advice: refusal costs
    /// speed only.
    pub fn use_huge_pages(&self, range: Range<usize>) {
        self.advise(range, libc::MADV_HUGEPAGE);
    }

    fn advise(&self, range: Range<usize>, advice: libc::c_int) {
        let start = range.start.next_multiple_of(HUGE_PAGE);
        let end = range.end.min(self.bytes).next_multiple_of(HUGE_PAGE);
        if start < end {
            // SAFETY: the arena was reserved up to a multiple of 2 MB from its base, so the range lies in its mapping;
            // none of the advice given changes what memory holds.
            unsafe { libc::madvise(self.base.as_ptr().add(start).cast(), end - start, advice) };
        }
    }

    /// Address of byte `offset`, for kernels to read and write.
    ///
    /// # Panics
    /// Past the end.
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.bytes, "byte {offset} of an arena of {}", self.bytes);
        self.base.as_ptr().wrapping_add(offset)
    }

    /// `len` values from byte `offset`.
    ///
    /// # Panics
    /// Past the end, or off a multiple of 4.
    pub fn f32s(&self, offset: usize, len: usize) -> &[f32] {
        let end = len.checked_mul(4).and_then(|bytes| bytes.checked_add(offset));
        assert!(end.is_some_and(|end| end <= self.bytes) && offset.is_multiple_of(4), "{len} floats at byte {offset}");
        // SAFETY: the range lies inside the mapping, is aligned, and every bit pattern is an f32. Kernels write only
        // during `Engine::step`, which has the engine to itself.
        unsafe { std::slice::from_raw_parts(self.at(offset).cast::<f32>(), len) }
    }

    /// All of it, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping holds `bytes` initialized (zeroed) bytes from `base`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `new` made; borrows of it have ended.
        unsafe { libc::munmap(self.mapping.0, self.mapping.1) };
    }
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Arena({} bytes)", self.bytes)
    }
}

/// A set of processors that a thread may run on.
#[derive(Clone, Copy, Debug)]
pub struct Cpus(libc::cpu_set_t);

impl Cpus {
    /// Those the calling thread may use.
    ///
    /// # Errors
    /// Where the system does not say.
    pub fn mine() -> Result<Cpus> {
        let mut cpus = Cpus::none();
        // SAFETY: the set is ours to write, and of the size given.
        let status = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut cpus.0) };
        if status == 0 { Ok(cpus) } else { Err(refused_cpus(std::io::Error::last_os_error())) }
    }

    /// A single one.
    ///
    /// # Errors
    /// Where its number is beyond what a set can hold.
    pub fn one(cpu: usize) -> Result<Cpus> {
        if cpu >= libc::CPU_SETSIZE as usize {
            bail!(Usage, "expected a processor below {}, found {cpu}", libc::CPU_SETSIZE);
        }
        let mut cpus = Cpus::none();
        // SAFETY: the number is one of the set's, as checked.
        unsafe { libc::CPU_SET(cpu, &mut cpus.0) };
        Ok(cpus)
    }

    /// Their numbers.
    pub fn list(&self) -> Vec<usize> {
        // SAFETY: every number is one of the set's.
        (0..libc::CPU_SETSIZE as usize).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &self.0) }).collect()
    }

    /// Keeps a thread to them.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn hold<T>(&self, thread: &JoinHandle<T>) -> Result<()> {
        // SAFETY: the thread can be named for as long as its handle lives, and the set is of the size given.
        let status =
            unsafe { libc::pthread_setaffinity_np(thread.as_pthread_t(), size_of::<libc::cpu_set_t>(), &self.0) };
        if status == 0 { Ok(()) } else { Err(refused_cpus(std::io::Error::from_raw_os_error(status))) }
    }

    /// Keeps the calling thread to them; gives those it could use before.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn hold_me(&self) -> Result<Cpus> {
        let before = Cpus::mine()?;
        // SAFETY: the set is of the size given.
        let status = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &self.0) };
        if status == 0 { Ok(before) } else { Err(refused_cpus(std::io::Error::last_os_error())) }
    }

    fn none() -> Cpus {
        // SAFETY: a set is an array of bits, of which all may be 0.
        Cpus(unsafe { std::mem::zeroed() })
    }
}

fn refused_cpus(error: std::io::Error) -> Error {
    Error::new(Kind::Io, format!("cannot pin a thread: {error}")).help("run without pinning")
}

/// Bytes of memory the system could give without swapping, as `/proc/meminfo` says.
pub fn available_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arenas_are_zeroed_aligned_and_writable() {
        let mut arena = Arena::huge("a test", 3 << 20).unwrap();
        assert!(arena.at(0).addr().is_multiple_of(HUGE_PAGE));
        assert!(arena.f32s(4096, 100).iter().all(|x| *x == 0.0));
        arena.bytes_mut()[8..12].copy_from_slice(&1.5f32.to_le_bytes());
        assert_eq!(arena.f32s(8, 1), [1.5]);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        for bytes in [usize::MAX, isize::MAX as usize, 1 << 60] {
            assert_eq!(Arena::new("a test", bytes).unwrap_err().exit_code(), 5);
        }
        assert!(Arena::new("nothing", 0).unwrap().f32s(0, 0).is_empty());
    }
}
