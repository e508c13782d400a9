//! The runner, and the artifact in a section behind it:
//!
//! ```text
//!  | ELF header | runner ... | artifact | names of sections | table of sections |
//!    ^ says where the table is  ^ `.mansard`, at a multiple of 4096
//! ```
//!
//! The section belongs to no segment: the runner maps it from its own file, so starting it reads no weight. The table is last,
//! so a file that was cut short has none.

use super::parts::Parts;
use super::{Made, place};
use mansard_ir::artifact::DATA_ALIGN;
use mansard_ir::file::MappedFile;
use mansard_ir::{Error, Kind, Result};
use object::elf::{FileHeader64, SHT_PROGBITS, SectionHeader64};
use object::read::elf::{FileHeader, SectionHeader};
use object::{LittleEndian as LE, U16, U32, U64, pod};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

const SECTION: &[u8] = b".mansard";

/// Writes the executable and lets it say what it holds.
///
/// # Errors
/// Where the runner is no executable of ours, or the result cannot be written or started.
pub fn write(parts: &Parts, artifact: &Path, path: &Path) -> Result<Made> {
    let (runner, artifact) = (parts.open("mansard-runner")?, MappedFile::open(artifact)?);
    let joined = Joined::new(runner.all(), artifact.all().len()).map_err(|e| {
        let message = format!("expected an executable to put a section into: {e}");
        Error::new(Kind::Input, message).at(runner.path().display().to_string()).help("`make lib` builds it")
    })?;
    let fill = |out: &mut std::fs::File| {
        let header = pod::bytes_of(&joined.header);
        let zeros = vec![0; joined.start - runner.all().len()];
        let rest = [&joined.names[..], &vec![0; joined.gap], pod::bytes_of_slice(&joined.table)].concat();
        [header, &runner.all()[header.len()..], &zeros, artifact.all(), &rest].iter().try_for_each(|b| out.write_all(b))
    };
    place(path, 0o755, fill, |made| tried(made).map_err(|e| e.at(path.display().to_string())))
}

/// Starts the executable, which checks every hash.
fn tried(path: &Path) -> Result<()> {
    let out = Command::new(path).arg("--about").stdin(Stdio::null()).output().map_err(|e| Error::io(path, e))?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    let message = format!("expected an executable that opens its artifact, it says: {}", said.trim());
    Err(Error::new(Kind::Input, message).help("mansard-runner may be of another version: `make lib` builds it again"))
}

/// What is to be written beside the runner and the artifact.
struct Joined {
    header: FileHeader64<LE>,
    /// Where the artifact starts.
    start: usize,
    names: Vec<u8>,
    /// Bytes between the names and the table, which is aligned.
    gap: usize,
    table: Vec<SectionHeader64<LE>>,
}

impl Joined {
    fn new(runner: &[u8], artifact: usize) -> object::read::Result<Joined> {
        let mut header = *FileHeader64::<LE>::parse(runner)?;
        let sections = header.sections(LE, runner)?;
        let strings = header.shstrndx(LE, runner)? as usize;
        let mut table: Vec<SectionHeader64<LE>> = sections.iter().copied().collect();
        let mut names = sections.section(object::SectionIndex(strings))?.data(LE, runner)?.to_vec();
        let start = runner.len().next_multiple_of(DATA_ALIGN);
        let (end, name) = (start + artifact, names.len());
        names.extend_from_slice(&[SECTION, &[0]].concat());
        table[strings].sh_offset = U64::new(LE, end as u64);
        table[strings].sh_size = U64::new(LE, names.len() as u64);
        table.push(SectionHeader64 {
            sh_name: U32::new(LE, name as u32),
            sh_type: U32::new(LE, SHT_PROGBITS),
            sh_flags: U64::new(LE, 0),
            sh_addr: U64::new(LE, 0),
            sh_offset: U64::new(LE, start as u64),
            sh_size: U64::new(LE, artifact as u64),
            sh_link: U32::new(LE, 0),
            sh_info: U32::new(LE, 0),
            sh_addralign: U64::new(LE, DATA_ALIGN as u64),
            sh_entsize: U64::new(LE, 0),
        });
        let gap = (end + names.len()).next_multiple_of(8) - (end + names.len());
        header.e_shoff = U64::new(LE, (end + names.len() + gap) as u64);
        header.e_shnum = U16::new(LE, table.len() as u16);
        Ok(Joined { header, start, names, gap, table })
    }
}
