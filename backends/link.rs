//! ELF objects -> one flat, position-independent image: what a runtime maps as it is and jumps into.
//!
//! ```text
//!  a.o: .text .rodata.cst   b.o: .text ...   ->   | a.text | b.text | a.rodata.cst | ... |, entries by name
//! ```
//!
//! Text and read-only data keep fixed distances, so every reference is resolved here and none is left for load time. On
//! aarch64 code finds data by pages of 4096 bytes and offsets in them, so an image is mapped at the beginning of a page.
//! Invariant: an image refers to nothing outside itself and writes nothing inside itself. An object that wants more (an
//! undefined symbol such as `memset`, an absolute address, writable data) is a broken kernel and an internal error naming
//! the culprit.

use mansard_ir::{Error, Kind, Place, Result, bail};
use object::read::elf::ElfFile64;
use object::{
    Architecture, Endianness, Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget, SectionKind, elf,
};
use std::collections::HashMap;

/// Sections start at multiples of this.
const ALIGN: usize = 64;

/// Machine code and its constants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The bytes; a multiple of 64 of them, to be mapped at a multiple of 4096.
    pub bytes: Vec<u8>,
    /// Global functions and where they start.
    pub entries: Vec<(String, usize)>,
    /// The register tile of each, as people read it; empty before their kernels are known.
    pub tiles: Vec<String>,
}

impl Image {
    /// Where each function starts, in order.
    pub fn offsets(&self) -> Vec<usize> {
        self.entries.iter().map(|(_, at)| *at).collect()
    }
}

type Elf<'a> = ElfFile64<'a, Endianness>;

/// Where a section of an object went: (object, section index) -> offset in the image.
type Places = HashMap<(usize, usize), usize>;

/// Links objects for x86-64 or aarch64. Entries come in order of object, then of symbol table.
///
/// # Errors
/// Where an object is no ELF object for these, or refers to anything that is not in the image.
pub fn link<'a>(objects: &'a [Vec<u8>]) -> Result<Image> {
    let parse = |bytes: &'a Vec<u8>| Elf::parse(bytes.as_slice()).map_err(broken);
    let files = objects.iter().map(parse).collect::<Result<Vec<Elf<'a>>>>()?;
    let (mut bytes, mut places) = (vec![], Places::new());
    for kind in [SectionKind::Text, SectionKind::ReadOnlyData] {
        for (f, file) in files.iter().enumerate() {
            place_sections(f, file, kind, &mut bytes, &mut places)?;
        }
    }
    let entries = entries(&files, &places)?;
    for (f, file) in files.iter().enumerate() {
        for section in file.sections() {
            if let Some(base) = places.get(&(f, section.index().0)) {
                relocate(f, file, &section, *base, &places, &entries, &mut bytes)
                    .at(|| format!("section `{}` of object {f}", section.name().unwrap_or("?")))?;
            }
        }
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
    Ok(Image { bytes, entries, tiles: vec![] })
}

fn broken(error: object::Error) -> Error {
    Error::new(Kind::Internal, format!("object file: {error}"))
}

/// Appends the sections of one kind; `kind` is text or read-only data.
fn place_sections(f: usize, file: &Elf<'_>, kind: SectionKind, image: &mut Vec<u8>, places: &mut Places) -> Result<()> {
    for section in file.sections() {
        let found = match section.kind() {
            SectionKind::ReadOnlyString | SectionKind::ReadOnlyDataWithRel => SectionKind::ReadOnlyData,
            other => other,
        };
        let writable = matches!(
            found,
            SectionKind::Data | SectionKind::UninitializedData | SectionKind::Tls | SectionKind::Common
        );
        if writable && section.size() > 0 {
            bail!(Internal, "writable section `{}` in generated code", section.name().unwrap_or("?"));
        }
        // Unwind tables are read-only data to ELF; nothing unwinds through a kernel.
        if found != kind || section.size() == 0 || section.name().is_ok_and(|n| n == ".eh_frame") {
            continue;
        }
        let align = usize::try_from(section.align()).unwrap_or(usize::MAX).max(1);
        if align > ALIGN {
            bail!(Internal, "section `{}` wants alignment {align}", section.name().unwrap_or("?"));
        }
        image.resize(image.len().next_multiple_of(if kind == SectionKind::Text { ALIGN } else { align }), 0);
        places.insert((f, section.index().0), image.len());
        image.extend_from_slice(section.data().map_err(broken)?);
    }
    Ok(())
}

/// Global symbols that are defined in the image.
fn entries(files: &[Elf<'_>], places: &Places) -> Result<Vec<(String, usize)>> {
    let mut entries: Vec<(String, usize)> = vec![];
    for (f, file) in files.iter().enumerate() {
        for symbol in file.symbols().filter(|s| s.is_global() && s.is_definition()) {
            let name = symbol.name().map_err(broken)?;
            let Some(base) = symbol.section_index().and_then(|s| places.get(&(f, s.0))) else { continue };
            if entries.iter().any(|(n, _)| n == name) {
                bail!(Internal, "symbol `{name}` is defined twice");
            }
            entries.push((name.to_owned(), base + symbol.address() as usize));
        }
    }
    Ok(entries)
}

/// Resolves the relocations of one section, whose first byte is at `base` of the image.
fn relocate<'a>(
    f: usize,
    file: &Elf<'_>,
    section: &impl ObjectSection<'a>,
    base: usize,
    places: &Places,
    entries: &[(String, usize)],
    image: &mut [u8],
) -> Result<()> {
    for (offset, relocation) in section.relocations() {
        let RelocationTarget::Symbol(index) = relocation.target() else {
            bail!(Internal, "relocation at byte {offset} has no symbol");
        };
        let symbol = file.symbol_by_index(index).map_err(broken)?;
        let name = symbol.name().unwrap_or("");
        let local = symbol.section_index().and_then(|s| places.get(&(f, s.0)));
        let target = match (local, entries.iter().find(|(n, _)| n == name)) {
            (Some(base), _) => base + symbol.address() as usize,
            (None, Some((_, entry))) if symbol.is_undefined() => *entry,
            _ => bail!(Internal, "generated code refers to `{name}`, which is not in the image"),
        };
        let RelocationFlags::Elf { r_type } = relocation.flags() else {
            bail!(Internal, "relocation at byte {offset} is not of ELF");
        };
        let at = base + offset as usize;
        let target = (target as i64).wrapping_add(relocation.addend());
        let Some(field) = image.get_mut(at..).and_then(|b| b.first_chunk_mut::<4>()) else {
            bail!(Internal, "relocation at byte {offset} against `{name}` is out of range");
        };
        let patched = match file.architecture() {
            Architecture::X86_64 => x86_64(r_type, target, at as i64),
            Architecture::Aarch64 => aarch64(r_type, target, at as i64, u32::from_le_bytes(*field)),
            other => bail!(Internal, "an object for {other:?}"),
        };
        *field = patched.at(|| format!("relocation at byte {offset} against `{name}`"))?.to_le_bytes();
    }
    Ok(())
}

fn out_of_range<T>() -> Result<T> {
    bail!(Internal, "the distance is out of range")
}

/// The 32-bit field of a reference to `target` at `at`.
fn x86_64(kind: u32, target: i64, at: i64) -> Result<u32> {
    match kind {
        elf::R_X86_64_PC32 | elf::R_X86_64_PLT32 => {
            i32::try_from(target.wrapping_sub(at)).or_else(|_| out_of_range()).map(i32::cast_unsigned)
        }
        other => bail!(Internal, "type {other} is not relative to the code"),
    }
}

/// The instruction, or the data, of a reference to `target` at `at`. An image starts a page, so that a page's number and
/// an offset in it are the same in the image as in memory.
fn aarch64(kind: u32, target: i64, at: i64, instruction: u32) -> Result<u32> {
    let with = |value: i64, bits: u32, low: u32| {
        let mask = ((1u32 << bits) - 1) << low;
        instruction & !mask | ((value as u32) << low) & mask
    };
    // The offset in the page, in units of what is loaded.
    let in_page = |shift: u32| match target & 0xfff {
        offset if offset.trailing_zeros() >= shift => Ok(with(offset >> shift, 12, 10)),
        offset => bail!(Internal, "offset {offset} in its page is no multiple of {}", 1 << shift),
    };
    match kind {
        elf::R_AARCH64_ADR_PREL_PG_HI21 => {
            let pages = (target >> 12) - (at >> 12);
            if !(-(1 << 20)..1 << 20).contains(&pages) {
                return out_of_range();
            }
            Ok(with(pages & 3, 2, 29) & !(0x7ffff << 5) | ((pages >> 2) as u32 & 0x7ffff) << 5)
        }
        elf::R_AARCH64_ADD_ABS_LO12_NC | elf::R_AARCH64_LDST8_ABS_LO12_NC => in_page(0),
        elf::R_AARCH64_LDST16_ABS_LO12_NC => in_page(1),
        elf::R_AARCH64_LDST32_ABS_LO12_NC => in_page(2),
        elf::R_AARCH64_LDST64_ABS_LO12_NC => in_page(3),
        elf::R_AARCH64_LDST128_ABS_LO12_NC => in_page(4),
        elf::R_AARCH64_CALL26 | elf::R_AARCH64_JUMP26 => {
            let distance = target.wrapping_sub(at);
            if distance & 3 != 0 || !(-(1 << 27)..1 << 27).contains(&distance) {
                return out_of_range();
            }
            Ok(with(distance >> 2, 26, 0))
        }
        elf::R_AARCH64_PREL32 => {
            i32::try_from(target.wrapping_sub(at)).or_else(|_| out_of_range()).map(i32::cast_unsigned)
        }
        other => bail!(Internal, "type {other} is not relative to the code"),
    }
}
