//! Zeroed memory that costs nothing until it is touched: activations, cache pools, and copies of packed weights.
//!
//! An [`Arena`] reserves address space; pages come, zeroed, with the first write. With huge pages a read of packed weights
//! is not bound by address translation. Only kernels write to an arena while workers run, through [`Arena::at`]; reading
//! takes `&self` and writing `&mut self`, which nobody has during a step.
#![allow(unsafe_code)]

use mansard_ir::{Error, Kind, Result, bail};
use std::ptr::NonNull;

/// Pages the kernel (of the operating system) may use for an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Whatever is usual.
    Small,
    /// 2 MB where they are to be had.
    Huge,
}

/// Bytes of a huge page, and the alignment of every arena.
const HUGE_PAGE: usize = 2 << 20;

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
    /// Reserves `bytes` for `what`, which names them in the error.
    ///
    /// # Errors
    /// Where the operating system refuses.
    pub fn new(what: &str, bytes: usize, pages: Pages) -> Result<Arena> {
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
        if pages == Pages::Huge {
            // SAFETY: `base` and the rounded length lie inside the mapping. This is advice: refusal costs speed only.
            unsafe { libc::madvise(base.as_ptr().cast(), reserved - HUGE_PAGE, libc::MADV_HUGEPAGE) };
        }
        Ok(Arena { base, bytes, mapping: (mapping, reserved) })
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
        let mut arena = Arena::new("a test", 3 << 20, Pages::Huge).unwrap();
        assert!(arena.at(0).addr().is_multiple_of(HUGE_PAGE));
        assert!(arena.f32s(4096, 100).iter().all(|x| *x == 0.0));
        arena.bytes_mut()[8..12].copy_from_slice(&1.5f32.to_le_bytes());
        assert_eq!(arena.f32s(8, 1), [1.5]);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        for bytes in [usize::MAX, isize::MAX as usize, 1 << 60] {
            assert_eq!(Arena::new("a test", bytes, Pages::Small).unwrap_err().exit_code(), 5);
        }
        assert!(Arena::new("nothing", 0, Pages::Small).unwrap().f32s(0, 0).is_empty());
    }
}
