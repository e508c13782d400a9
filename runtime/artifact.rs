//! A file -> a checked [`Artifact`]: mapped, not read; its manifest parsed, its hashes verified, its indices in bounds.
//!
//! ```text
//!  u64 n | JSON header, n bytes, padded with spaces | section | section | ...
//!                                                   ^ multiple of 4096, every section a multiple of 64
//! ```
//!
//! Kernels read weights where they are mapped. The writer fills the page cache with huge pages, and reading a file that is
//! not cached does, where the file system has them (ext4 since Linux 6.16, XFS, Btrfs, tmpfs with `huge=`); a mapping of
//! huge pages costs a few milliseconds per gigabyte and reads as fast as memory does.
//!
//! An artifact may be a file, a part of one such as a section of an executable, or memory that a program was linked with.
//!
//! The header is that of a safetensors file. Everything in it is outside bytes: sizes are compared with the file before
//! anything is allocated, and one error names the file, the section, what was expected and what was found.

use crate::validate::validate;
use mansard_ir::artifact::{DATA_ALIGN, METADATA_KEY, Manifest, SECTION_ALIGN, TOKENIZER_SECTION, WEIGHTS_PREFIX};
use mansard_ir::file::MappedFile;
use mansard_ir::{Error, Kind, Place, Result, bail};
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// The longest header that is read. A manifest of a thousand layers has a tenth of it.
const MAX_HEADER_BYTES: usize = 256 << 20;

/// How to open an artifact.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Check the hashes of weights too. Those of code, tokenizer and manifest are always checked.
    pub verify_weights: bool,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions { verify_weights: true }
    }
}

/// A mapped and checked artifact.
#[derive(Debug)]
pub struct Artifact {
    file: MappedFile,
    manifest: Manifest,
    sections: Vec<Section>,
}

/// One named run of bytes of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Section {
    /// `code/native`, `tokenizer.json`, `weights/model.norm.weight`...
    pub name: String,
    /// Where in the file.
    pub range: Range<usize>,
}

impl Artifact {
    /// Maps and checks the artifact at `path`.
    ///
    /// # Errors
    /// Where it cannot be opened, is damaged, or is of a newer format.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Artifact> {
        let file = MappedFile::open(path)?;
        file.advise_huge_pages();
        Artifact::of(file, options)
    }

    /// Checks an artifact that is a file, a part of one ([`MappedFile::part`]), or memory that the program was linked with
    /// ([`MappedFile::linked`]), from a multiple of 4096 bytes on.
    ///
    /// # Errors
    /// Where it is damaged or of a newer format.
    pub fn of(file: MappedFile, options: &OpenOptions) -> Result<Artifact> {
        let path = file.path().display().to_string();
        Artifact::check(file, options).map_err(|e| {
            let damaged = e.kind() == Kind::Input && e.advice().is_none();
            let e = e.at(path);
            if damaged { e.help("the file is damaged or no artifact: compile the model again") } else { e }
        })
    }

    fn check(file: MappedFile, options: &OpenOptions) -> Result<Artifact> {
        let address = file.all().as_ptr().addr();
        if !address.is_multiple_of(DATA_ALIGN) {
            let message = format!("expected an artifact at a multiple of {DATA_ALIGN} bytes, found it at {address:#x}");
            return Err(Error::new(Kind::Input, message).help("align it, as files and sections that are mapped are"));
        }
        let (header, data) = read_header(file.all())?;
        let sections = lay_out(header.tensors, data, file.all().len())?;
        let Some(json) = header.metadata.get(METADATA_KEY) else {
            bail!(
                Input,
                "expected `{METADATA_KEY}` in the header's `__metadata__`, found none: no artifact of mansard"
            );
        };
        let manifest = Manifest::from_json(json).at(|| "manifest".into())?;
        let artifact = Artifact { file, manifest, sections };
        artifact.verify(options)?;
        validate(&artifact)?;
        Ok(artifact)
    }

    /// Compares every section's BLAKE3 with the manifest's.
    fn verify(&self, options: &OpenOptions) -> Result<()> {
        let hashes = &self.manifest.hashes;
        if let Some(name) = hashes.keys().find(|name| self.section(name).is_none()) {
            bail!(Input, "expected section `{name}`, found none of that name");
        }
        let mut wanted = vec![];
        for section in &self.sections {
            let Some(hash) = hashes.get(&section.name) else {
                bail!(Input, "section `{}`: expected its hash in the manifest, found none", section.name);
            };
            if options.verify_weights || !section.name.starts_with(WEIGHTS_PREFIX) {
                wanted.push((section, hash));
            }
        }
        let bytes: Vec<&[u8]> = wanted.iter().map(|(section, _)| self.bytes_of(section)).collect();
        for ((section, hash), found) in wanted.iter().zip(crate::hash::hash_all(&bytes)) {
            if found.to_hex().as_str() != *hash {
                let (name, found) = (&section.name, found.to_hex());
                bail!(Input, "section `{name}`: expected bytes that hash to `{hash}`, found {found}");
            }
        }
        Ok(())
    }

    /// Where it was opened, or what it was called.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Its bytes.
    pub fn file_bytes(&self) -> usize {
        self.file.all().len()
    }

    /// What it holds and how to run it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Every section, in order of the file.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Bytes of the section of that name.
    pub fn section(&self, name: &str) -> Option<&[u8]> {
        let section = self.sections.iter().find(|s| s.name == name)?;
        Some(self.bytes_of(section))
    }

    /// Packed bytes of every weight, in the order of the program's.
    ///
    /// # Errors
    /// Where the artifact holds none, since whoever opens it makes them up; else none once it has been opened.
    pub fn weights(&self) -> Result<Vec<&[u8]>> {
        if self.manifest.synthetic.is_some() {
            bail!(Unsupported, "the artifact holds no weights: they are made up where it runs");
        }
        let by_name: BTreeMap<&str, &Section> = self.sections.iter().map(|s| (s.name.as_str(), s)).collect();
        let weights = self.manifest.program.weights.iter();
        let bytes = weights.map(|weight| match by_name.get(format!("{WEIGHTS_PREFIX}{}", weight.name).as_str()) {
            Some(section) => Ok(self.bytes_of(section)),
            None => bail!(Input, "expected section `{WEIGHTS_PREFIX}{}`, found none of that name", weight.name),
        });
        bytes.collect()
    }

    /// Text of the tokenizer, where the artifact has one.
    ///
    /// # Errors
    /// Where it is no UTF-8.
    pub fn tokenizer_json(&self) -> Result<Option<&str>> {
        let Some(bytes) = self.section(TOKENIZER_SECTION) else { return Ok(None) };
        let text = std::str::from_utf8(bytes).map_err(|e| {
            let message = format!("section `{TOKENIZER_SECTION}`: expected UTF-8: {e}");
            Error::new(Kind::Input, message).at(self.path().display().to_string())
        })?;
        Ok(Some(text.trim_end_matches(['\0', ' ', '\n'])))
    }

    fn bytes_of(&self, section: &Section) -> &[u8] {
        // `lay_out` has checked the range against this very file.
        &self.file.all()[section.range.clone()]
    }
}

/// The JSON header of a safetensors file.
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Tensor)>,
}

/// One entry of the header.
#[derive(Deserialize)]
struct Tensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// The header, and where the data starts.
fn read_header(file: &[u8]) -> Result<(Header, usize)> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        bail!(Input, "expected at least 8 bytes, found {}", file.len());
    };
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().filter(|n| *n <= MAX_HEADER_BYTES).and_then(|n| rest.get(..n));
    let Some(header) = header else {
        let most = rest.len().min(MAX_HEADER_BYTES);
        bail!(Input, "expected a header of at most {most} bytes, its length at byte 0 says {length}");
    };
    let data = 8 + header.len();
    let header = serde_json::from_slice(header).map_err(|e| Error::new(Kind::Input, format!("header: {e}")))?;
    if !data.is_multiple_of(DATA_ALIGN) {
        bail!(Input, "expected sections to start at a multiple of {DATA_ALIGN}, they start at byte {data}");
    }
    Ok((header, data))
}

/// Sections in order of the file: side by side, none over another, filling it to its end.
fn lay_out(tensors: Vec<(String, Tensor)>, data: usize, file_bytes: usize) -> Result<Vec<Section>> {
    let mut tensors = tensors;
    tensors.sort_by_key(|(_, t)| t.data_offsets);
    let mut sections = Vec::with_capacity(tensors.len());
    let (mut end, present) = (0, file_bytes - data);
    for (name, Tensor { dtype, shape, data_offsets: (start, stop) }) in tensors {
        if start != end || stop < start || stop > present {
            let found = format!("{start}..{stop}");
            bail!(Input, "section `{name}`: expected bytes from {end} to at most {present}, its header says {found}");
        }
        if dtype != "U8" || shape != [stop - start] {
            bail!(Input, "section `{name}`: expected U8 [{}], its header says {dtype} {shape:?}", stop - start);
        }
        if !(stop - start).is_multiple_of(SECTION_ALIGN) {
            bail!(Input, "section `{name}`: expected a multiple of {SECTION_ALIGN} bytes, found {}", stop - start);
        }
        end = stop;
        sections.push(Section { name, range: data + start..data + stop });
    }
    if end != present {
        bail!(Input, "expected {end} bytes of sections, found {present}");
    }
    Ok(sections)
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the header of a safetensors file")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut metadata, mut tensors) = (None, BTreeMap::new());
                while let Some(name) = map.next_key::<String>()? {
                    let twice = if name == "__metadata__" {
                        metadata.replace(map.next_value()?).is_some()
                    } else {
                        tensors.insert(name.clone(), map.next_value::<Tensor>()?).is_some()
                    };
                    if twice {
                        return Err(serde::de::Error::custom(format!("`{name}` occurs twice")));
                    }
                }
                Ok(Header { metadata: metadata.unwrap_or_default(), tensors: tensors.into_iter().collect() })
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}
