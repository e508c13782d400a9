//! `libmansard.a` and one more member: an object that is nothing but data.
//!
//! ```text
//!  .lrodata.mansard   the artifact, at a multiple of 4096; of any size, as it lies apart from code (x86-64 psABI, medium model)
//!  .data.rel.ro       NAME_artifact = { its address, its size }
//! ```
//!
//! The function that opens it is in the header, so nothing has to be compiled here.

use super::parts::Parts;
use super::{Made, place};
use ar_archive_writer::{ArchiveKind, DEFAULT_OBJECT_READER, NewArchiveMember, write_archive_to_stream};
use mansard_ir::artifact::DATA_ALIGN;
use mansard_ir::file::MappedFile;
use mansard_ir::{Error, Kind, Result, bail};
use object::write::{Object, Relocation, StandardSection, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SectionFlags, SectionKind, SymbolFlags, SymbolKind, SymbolScope};
use object::{RelocationEncoding, RelocationFlags, RelocationKind, elf};
use std::io::{BufWriter, Write};
use std::path::Path;

/// Writes the library and its header into a folder, which is made where it is missing.
///
/// # Errors
/// Where `name` is no name in C, a part is missing, or a file cannot be written.
pub fn write(parts: &Parts, artifact: &Path, folder: &Path, name: &str) -> Result<[Made; 2]> {
    let legal = |(i, c): (usize, char)| c == '_' || c.is_ascii_alphabetic() || i > 0 && c.is_ascii_digit();
    if name.is_empty() || !name.chars().enumerate().all(legal) || name.starts_with("mansard") {
        bail!(Usage, "--name: expected a name in C that does not begin with `mansard`, found `{name}`");
    }
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let (library, header) = (parts.open("libmansard.a")?, parts.open("mansard.h")?);
    let artifact = MappedFile::open(artifact)?;
    let object = tempfile::NamedTempFile::new_in(folder).map_err(|e| Error::io(folder, e))?;
    let written = object_of(artifact.all(), name, &mut BufWriter::new(&object));
    written.map_err(|e| Error::new(Kind::Io, e.to_string()).at(object.path().display().to_string()))?;
    let object = MappedFile::open(object.path())?;
    let mut members = members(&library)?;
    members.push(NewArchiveMember::new(object.all(), &DEFAULT_OBJECT_READER, format!("{name}.o")));
    let fill = |out: &mut std::fs::File| {
        write_archive_to_stream(&mut BufWriter::new(out), &members, ArchiveKind::Gnu, false, None)
    };
    let made = place(&folder.join(format!("lib{name}.a")), 0o644, fill, |_| Ok(()))?;
    let text = [header.all(), declaration(name).as_bytes()].concat();
    let header = place(&folder.join(format!("{name}.h")), 0o644, |out| out.write_all(&text), |_| Ok(()))?;
    Ok([made, header])
}

/// For sections that are addressed with 64 bits (x86-64 psABI, 4.2.1).
const SHF_X86_64_LARGE: u32 = 0x1000_0000;

/// The members of an archive as they are.
fn members(library: &MappedFile) -> Result<Vec<NewArchiveMember<'_>>> {
    let failed = |e: object::Error| {
        let error = Error::new(Kind::Input, format!("expected an archive of objects: {e}"));
        error.at(library.path().display().to_string()).help("`make lib` builds it")
    };
    let archive = object::read::archive::ArchiveFile::parse(library.all()).map_err(failed)?;
    let mut members = vec![];
    for member in archive.members() {
        let member = member.map_err(failed)?;
        let name = String::from_utf8_lossy(member.name()).into_owned();
        let data = member.data(library.all()).map_err(failed)?;
        members.push(NewArchiveMember::new(data, &DEFAULT_OBJECT_READER, name));
    }
    Ok(members)
}

/// Writes the object.
fn object_of(artifact: &[u8], name: &str, out: &mut dyn Write) -> Result<(), Box<dyn std::error::Error>> {
    let x86 = cfg!(target_arch = "x86_64");
    let architecture = if x86 { Architecture::X86_64 } else { Architecture::Aarch64 };
    let mut object = Object::new(BinaryFormat::Elf, architecture, Endianness::Little);
    let section: &[u8] = if x86 { b".lrodata.mansard" } else { b".rodata.mansard" };
    let bytes = object.add_section(vec![], section.to_vec(), SectionKind::ReadOnlyData);
    let large = if x86 { SHF_X86_64_LARGE } else { 0 };
    object.section_mut(bytes).flags = SectionFlags::Elf { sh_flags: u64::from(elf::SHF_ALLOC | large) };
    object.section_mut(bytes).set_data(artifact, DATA_ALIGN as u64);
    let place = object.section_id(StandardSection::ReadOnlyDataWithRel);
    let value = [[0; 8], (artifact.len() as u64).to_le_bytes()].concat();
    let offset = object.append_section_data(place, &value, 8);
    object.add_symbol(Symbol {
        name: format!("{name}_artifact").into_bytes(),
        value: offset,
        size: value.len() as u64,
        kind: SymbolKind::Data,
        scope: SymbolScope::Linkage,
        weak: false,
        section: SymbolSection::Section(place),
        flags: SymbolFlags::None,
    });
    let symbol = object.section_symbol(bytes);
    let flags =
        RelocationFlags::Generic { kind: RelocationKind::Absolute, encoding: RelocationEncoding::Generic, size: 64 };
    object.add_relocation(place, Relocation { offset, symbol, addend: 0, flags })?;
    // No part of this wants an executable stack.
    object.add_section(vec![], b".note.GNU-stack".to_vec(), SectionKind::Other);
    object.write_stream(out)
}

/// What the library adds to `mansard.h`.
fn declaration(name: &str) -> String {
    format!(
        r#"
#ifndef MANSARD_BUNDLE_{name}
#define MANSARD_BUNDLE_{name}

#ifdef __cplusplus
extern "C" {{
#endif

// The artifact in lib{name}.a, mapped with the program.
extern const struct {name}_artifact {{
  const void *bytes;
  size_t size;
}} {name}_artifact;

// Opens the model in lib{name}.a; `flags` as for mansard_model_open. Nothing is copied. Any thread.
static inline mansard_status {name}_open(uint32_t flags, mansard_model **model) {{
  return mansard_model_open_memory(MANSARD_ABI_VERSION, "lib{name}.a", {name}_artifact.bytes, {name}_artifact.size, flags,
                                   model);
}}

#ifdef __cplusplus
}}
#endif

#endif
"#
    )
}
