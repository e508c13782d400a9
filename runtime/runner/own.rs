//! This executable -> the artifact in it: a section that `mansard bundle` has put behind everything else.
//!
//! The section is read where the file is mapped. What its header says is outside bytes like those of any artifact.

use mansard_ir::file::MappedFile;
use mansard_ir::{Error, Kind, Result};
use mansard_runtime::{Artifact, OpenOptions};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection};
use std::ops::Range;
use std::path::PathBuf;

/// Name of the section.
const SECTION: &str = ".mansard";

/// Opens and checks the artifact in this executable.
///
/// # Errors
/// Where there is none, or it is damaged.
pub fn artifact(options: &OpenOptions) -> Result<Artifact> {
    let file = MappedFile::open(executable()?)?;
    let range = section(file.all()).map_err(|e| e.at(file.path().display().to_string()))?;
    let file = file.part(range)?;
    file.advise_huge_pages();
    Artifact::of(file, options)
}

/// Where this executable is: without `/proc`, where it was called.
fn executable() -> Result<PathBuf> {
    let called = || std::env::args_os().next().map(PathBuf::from).filter(|path| path.is_file());
    std::env::current_exe().or_else(|error| called().ok_or(error)).map_err(|e| Error::io("this executable", e))
}

/// Where the section is in an executable's bytes.
fn section(bytes: &[u8]) -> Result<Range<usize>> {
    let damaged = |e: object::Error| {
        let error = Error::new(Kind::Input, format!("expected an executable with all its sections: {e}"));
        error.help("the file is damaged or cut short: copy it again")
    };
    let elf: ElfFile64<'_> = ElfFile64::parse(bytes).map_err(damaged)?;
    let section = elf.sections().find(|section| section.name_bytes() == Ok(SECTION.as_bytes()));
    let Some((start, size)) = section.and_then(|section| section.file_range()) else {
        let error = Error::new(Kind::Usage, "this executable holds no artifact");
        return Err(error.help("`mansard bundle m.mansard --exe answer` makes one that does"));
    };
    // An end beyond all numbers is beyond the file.
    Ok(start as usize..start.saturating_add(size) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_holds_none() {
        let bytes = std::fs::read(executable().unwrap()).unwrap();
        assert_eq!(section(&bytes).unwrap_err().exit_code(), 2);
        assert_eq!(artifact(&OpenOptions::default()).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn damaged_executables_are_refused() {
        let bytes = std::fs::read(executable().unwrap()).unwrap();
        for length in [0, 3, 64, 1000, bytes.len() / 2, bytes.len() - 1] {
            assert!(section(&bytes[..length]).is_err(), "{length} bytes");
        }
        for at in 0..64 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0xff;
            // Some bytes of the header say nothing about sections.
            assert!(section(&damaged).is_err(), "byte {at}");
        }
    }
}
