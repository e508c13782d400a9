//! Files mapped, not read. The only unsafe code of this crate.
//!
//! A file may lie inside another ([`MappedFile::part`]), or be memory that a program was linked with ([`MappedFile::linked`]):
//! whoever reads it does not see the difference.
#![allow(unsafe_code)]

use crate::{Error, Kind, Result, bail};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A read-only mapping of a file, or of a part of one.
pub struct MappedFile {
    path: PathBuf,
    memory: Memory,
    part: Range<usize>,
}

enum Memory {
    Mapped(memmap2::Mmap),
    Linked(&'static [u8]),
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
        Ok(MappedFile { path: path.to_owned(), part: 0..map.len(), memory: Memory::Mapped(map) })
    }

    /// A file that lies in the program's own memory, under a name for messages.
    pub fn linked(name: impl Into<PathBuf>, bytes: &'static [u8]) -> MappedFile {
        MappedFile { path: name.into(), part: 0..bytes.len(), memory: Memory::Linked(bytes) }
    }

    /// The file that lies in `range` of this one.
    ///
    /// # Errors
    /// Where this one is shorter than that.
    pub fn part(self, range: Range<usize>) -> Result<MappedFile> {
        let whole = self.all().len();
        if range.start > range.end || range.end > whole {
            let (path, Range { start, end }) = (self.path.display(), range);
            bail!(Input, "{path}: expected a part of {whole} bytes, found bytes {start} to {end}");
        }
        let start = self.part.start;
        Ok(MappedFile { part: start + range.start..start + range.end, ..self })
    }

    /// Asks for huge pages under the mapping: where the file system can cache a file in them, what is not cached yet will
    /// be. What is cached keeps the pages it has. This is advice, refusal costs speed only.
    pub fn advise_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        if let Memory::Mapped(map) = &self.memory {
            let _ = map.advise(memmap2::Advice::HugePage);
        }
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file.
    pub fn all(&self) -> &[u8] {
        let memory = match &self.memory {
            Memory::Mapped(map) => map,
            Memory::Linked(bytes) => *bytes,
        };
        &memory[self.part.clone()]
    }

    /// `len` bytes from `offset`.
    ///
    /// # Errors
    /// Where the file is shorter than that.
    pub fn bytes(&self, offset: usize, len: usize) -> Result<&[u8]> {
        offset.checked_add(len).and_then(|end| self.all().get(offset..end)).ok_or_else(|| {
            let message = format!("expected {len} bytes at byte {offset}, the file has {}", self.all().len());
            Error::new(Kind::Input, message).at(self.path.display().to_string())
        })
    }
}

impl std::fmt::Debug for MappedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MappedFile({}, {} bytes)", self.path.display(), self.all().len())
    }
}
