//! Files mapped, not read. The only unsafe code of this crate.
#![allow(unsafe_code)]

use crate::{Error, Kind, Result};
use std::fs::File;
use std::path::{Path, PathBuf};

/// A read-only mapping of a whole file.
pub struct MappedFile {
    path: PathBuf,
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps `path`.
    ///
    /// # Errors
    /// Where it cannot be opened or mapped.
    pub fn open(path: impl AsRef<Path>) -> Result<MappedFile> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: the mapping is private and read-only. Should another process truncate the file while it is mapped, a
        // read faults (SIGBUS) rather than yielding undefined values; models and artifacts are replaced by renaming.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Ok(MappedFile { path: path.to_owned(), map })
    }

    /// Asks for huge pages under the mapping: where the file system can cache a file in them, what is not cached yet will
    /// be. What is cached keeps the pages it has. This is advice, refusal costs speed only.
    pub fn advise_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        let _ = self.map.advise(memmap2::Advice::HugePage);
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file.
    pub fn all(&self) -> &[u8] {
        &self.map
    }

    /// `len` bytes from `offset`.
    ///
    /// # Errors
    /// Where the file is shorter than that.
    pub fn bytes(&self, offset: usize, len: usize) -> Result<&[u8]> {
        offset.checked_add(len).and_then(|end| self.map.get(offset..end)).ok_or_else(|| {
            let message = format!("expected {len} bytes at byte {offset}, the file has {}", self.map.len());
            Error::new(Kind::Input, message).at(self.path.display().to_string())
        })
    }
}

impl std::fmt::Debug for MappedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MappedFile({}, {} bytes)", self.path.display(), self.map.len())
    }
}
