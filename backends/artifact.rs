//! Plan, code and weights -> one artifact file ([`mansard_ir::artifact`]).
//!
//! ```text
//!  u64 n | header: n bytes, padded with spaces | code/native | tokenizer.json | weights/... | weights/...
//! ```
//!
//! Sections stream: each weight is packed while the file is written and hashed while it passes; the header, whose length
//! is known from the start, is written last. Invariants: under the final name there is a whole artifact or what was there
//! before (the file grows as `NAME.partial-PID-N` beside it, is synced, and is renamed); the same inputs give the same bytes.

use crate::cuda::ptx::{self, Ptx};
use crate::cuda::{THREADS, synthetic};
use crate::link::Image;
use crate::pack;
use mansard_ir::artifact::{
    Code, Cubin, DATA_ALIGN, FORMAT_VERSION, METADATA_KEY, Manifest, Provenance, PtxCode, SECTION_ALIGN, Synthetic,
    TOKENIZER_SECTION, WEIGHTS_PREFIX,
};
use mansard_ir::file::MappedFile;
use mansard_ir::model::{ModelInfo, WeightTable};
use mansard_ir::plan::Plan;
use mansard_ir::{Error, Kind, Place, Result, Target, bail};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The kernel that makes weights up.
const SYNTHETIC_SECTION: &str = "code/synthetic";

/// What an artifact is made of.
#[derive(Clone, Copy)]
pub struct Contents<'a> {
    /// Program and packing recipes.
    pub plan: &'a Plan,
    /// Facts about the model, with its tokenizer.
    pub info: &'a ModelInfo,
    /// What the recipes pack.
    pub weights: &'a WeightTable,
    /// Machine code, best first.
    pub images: &'a [(Target, Image)],
    /// Code for GPUs, by chip.
    pub ptx: &'a [(String, Ptx)],
    /// No weights are written: they are made up, from this seed, by whoever opens it.
    pub synthetic: Option<u64>,
    /// Where it all came from.
    pub provenance: &'a Provenance,
}

/// A finished artifact.
#[derive(Clone, Debug)]
pub struct Written {
    /// Size of the file.
    pub bytes: usize,
    /// The manifest in it.
    pub manifest: Manifest,
}

/// Writes the artifact at `path`, replacing what is there. `progress` hears how many bytes of how many are written.
///
/// # Errors
/// Where the parts do not fit each other, a weight cannot be read or packed, or the file cannot be written. Nothing is left
/// behind then.
pub fn write(
    path: &Path,
    contents: &Contents<'_>,
    threads: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Written> {
    let sections = sections(contents)?;
    let mut manifest = manifest(contents, &sections)?;
    let placeholder = header(&sections, &mut manifest)?;
    let total = placeholder.len() + sections.iter().map(|s| s.bytes).sum::<usize>();
    let mut file = Partial::create(path)?;
    file.write(&placeholder)?;
    for section in &sections {
        let mut hasher = blake3::Hasher::new();
        let mut written = 0;
        let mut sink = |bytes: &[u8]| {
            hasher.update(bytes);
            written += bytes.len();
            file.write(bytes)?;
            progress(file.written, total);
            Ok(())
        };
        let streamed = section.content.stream(contents, threads, &mut sink);
        // A full disk is not the section's fault.
        let place = |e: Error| if e.kind() == Kind::Io { e } else { e.at(format!("section `{}`", section.name)) };
        streamed.map_err(place)?;
        if written != section.bytes {
            bail!(Internal, "section `{}`: expected {} bytes, found {written}", section.name, section.bytes);
        }
        manifest.hashes.insert(section.name.clone(), hasher.finalize().to_hex().to_string());
    }
    let header = header(&sections, &mut manifest)?;
    if header.len() != placeholder.len() {
        bail!(Internal, "the header grew from {} to {} bytes", placeholder.len(), header.len());
    }
    file.finish(&header)?;
    Ok(Written { bytes: total, manifest })
}

/// Changes the manifest of the artifact at `path`; its sections stay what they are.
///
/// # Errors
/// Where that is no artifact, or the file cannot be written; it is then what it was.
pub fn amend(path: &Path, change: impl FnOnce(&mut Manifest)) -> Result<()> {
    let place = || path.display().to_string();
    let no_artifact = || Error::new(Kind::Input, "expected an artifact").at(place());
    let file = MappedFile::open(path)?;
    let (length, rest) = file.all().split_first_chunk::<8>().ok_or_else(no_artifact)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| no_artifact())?;
    let (json, data) = rest.split_at_checked(length).ok_or_else(no_artifact)?;
    let mut json: Map<String, Value> = serde_json::from_slice(json).map_err(|_| no_artifact())?;
    let stored = json.get_mut("__metadata__").and_then(|m| m.get_mut(METADATA_KEY)).ok_or_else(no_artifact)?;
    let mut manifest = Manifest::from_json(stored.as_str().unwrap_or_default()).at(place)?;
    change(&mut manifest);
    *stored = manifest.to_json_with_hash()?.into();
    let mut out = Partial::create(path)?;
    let header = padded(json);
    out.write(&header)?;
    out.write(data)?;
    out.finish(&header)
}

/// A section to be written.
struct Section<'a> {
    name: String,
    bytes: usize,
    content: Content<'a>,
}

/// Where a section's bytes come from.
enum Content<'a> {
    Image(&'a Image),
    /// Padded with spaces.
    Text(&'a str),
    /// Padded with line ends.
    Ptx(&'a str),
    /// Machine code of a GPU, padded with zeros.
    Cubin(&'a [u8]),
    /// PTX of the kernel that makes weights up.
    Synthetic(String),
    /// Recipe of that index.
    Pack(usize),
}

fn sections<'a>(contents: &Contents<'a>) -> Result<Vec<Section<'a>>> {
    let mut sections = vec![];
    for (target, image) in contents.images {
        let (name, bytes) = (format!("code/{}", target.name), image.bytes.len());
        sections.push(Section { name, bytes, content: Content::Image(image) });
    }
    for (chip, ptx) in contents.ptx {
        let bytes = ptx.text.len().next_multiple_of(SECTION_ALIGN);
        sections.push(Section { name: format!("code/{chip}"), bytes, content: Content::Ptx(&ptx.text) });
        if let Some((cubin, _)) = &ptx.cubin {
            let bytes = cubin.len().next_multiple_of(SECTION_ALIGN);
            sections.push(Section { name: cubin_section(chip), bytes, content: Content::Cubin(cubin) });
        }
    }
    if let Some(tokenizer) = contents.info.tokenizer.as_ref().filter(|t| !t.json.is_empty()) {
        let bytes = tokenizer.json.len().next_multiple_of(SECTION_ALIGN);
        sections.push(Section { name: TOKENIZER_SECTION.into(), bytes, content: Content::Text(&tokenizer.json) });
    }
    if contents.synthetic.is_some() {
        let text = synthetic::text()?;
        let bytes = text.len().next_multiple_of(SECTION_ALIGN);
        sections.push(Section { name: SYNTHETIC_SECTION.into(), bytes, content: Content::Synthetic(text) });
    }
    let written = if contents.synthetic.is_none() { &contents.plan.program.weights[..] } else { &[] };
    for (index, weight) in written.iter().enumerate() {
        let name = format!("{WEIGHTS_PREFIX}{}", weight.name);
        sections.push(Section { name, bytes: weight.bytes, content: Content::Pack(index) });
    }
    let mut names: Vec<&str> = sections.iter().map(|s| s.name.as_str()).collect();
    names.sort_unstable();
    if let Some([name, _]) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!(Internal, "two sections are called `{name}`");
    }
    if let Some(odd) = sections.iter().find(|s| s.bytes == 0 || !s.bytes.is_multiple_of(SECTION_ALIGN)) {
        bail!(Internal, "section `{}`: {} bytes are no multiple of {SECTION_ALIGN}", odd.name, odd.bytes);
    }
    Ok(sections)
}

impl Content<'_> {
    fn stream(&self, contents: &Contents<'_>, threads: usize, sink: &mut pack::Sink<'_>) -> Result<()> {
        match self {
            Content::Image(image) => sink(&image.bytes),
            Content::Text(text) => sink(&padded_to_section(text.as_bytes(), b' ')),
            Content::Ptx(text) => sink(&padded_to_section(text.as_bytes(), b'\n')),
            Content::Cubin(code) => sink(&padded_to_section(code, 0)),
            Content::Synthetic(text) => sink(&padded_to_section(text.as_bytes(), b'\n')),
            Content::Pack(index) => {
                let Some(recipe) = contents.plan.packs.get(*index) else {
                    bail!(Internal, "the plan has no recipe for it");
                };
                let weight = contents.weights.make(&recipe.recipe).at(|| recipe.name())?;
                pack::pack(&weight, threads, sink)
            }
        }
    }
}

/// The section of a chip's machine code.
fn cubin_section(chip: &str) -> String {
    format!("cubin/{chip}")
}

fn padded_to_section(content: &[u8], with: u8) -> Vec<u8> {
    let mut bytes = content.to_vec();
    bytes.resize(bytes.len().next_multiple_of(SECTION_ALIGN), with);
    bytes
}

/// The manifest, with zeros for hashes.
fn manifest(contents: &Contents<'_>, sections: &[Section<'_>]) -> Result<Manifest> {
    let kernels = &contents.plan.program.kernels;
    let mut code = vec![];
    for (target, image) in contents.images {
        if !image.entries.iter().map(|(name, _)| name).eq(kernels.iter().map(|k| &k.name)) {
            bail!(Internal, "the code for {} is not that of the plan's kernels", target.name);
        }
        code.push(Code {
            section: format!("code/{}", target.name),
            arch: target.arch.clone(),
            target: target.name.clone(),
            features: target.features.clone(),
            entries: image.offsets(),
            tiles: image.tiles.clone(),
        });
    }
    let of_chip = |(chip, ptx): &(String, Ptx)| PtxCode {
        section: format!("code/{chip}"),
        chip: chip.clone(),
        version: ptx::VERSION.into(),
        threads: THREADS,
        shared_bytes: ptx.shared_bytes.clone(),
        cubin: ptx.cubin.as_ref().map(|(_, version)| Cubin { section: cubin_section(chip), version: version.clone() }),
    };
    let zeros: BTreeMap<String, String> = sections.iter().map(|s| (s.name.clone(), "0".repeat(64))).collect();
    let mut model = contents.info.clone();
    if let Some(tokenizer) = &mut model.tokenizer {
        tokenizer.json.clear(); // a section of its own
    }
    Ok(Manifest {
        format_version: FORMAT_VERSION,
        model,
        program: contents.plan.program.clone(),
        code,
        ptx: contents.ptx.iter().map(of_chip).collect(),
        synthetic: contents.synthetic.map(|seed| Synthetic {
            seed,
            section: SYNTHETIC_SECTION.into(),
            version: ptx::VERSION.into(),
            threads: THREADS,
        }),
        hashes: zeros,
        manifest_hash: String::new(),
        provenance: contents.provenance.clone(),
    })
}

/// The safetensors header with its length, padded so that the first section is aligned.
fn header(sections: &[Section<'_>], manifest: &mut Manifest) -> Result<Vec<u8>> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ METADATA_KEY: manifest.to_json_with_hash()? }));
    let mut offset = 0;
    for Section { name, bytes, .. } in sections {
        let end = offset + bytes;
        header.insert(name.clone(), json!({ "dtype": "U8", "shape": [bytes], "data_offsets": [offset, end] }));
        offset = end;
    }
    Ok(padded(header))
}

/// A header as the file begins with it.
fn padded(header: Map<String, Value>) -> Vec<u8> {
    let json = Value::Object(header).to_string();
    let length = (8 + json.len()).next_multiple_of(DATA_ALIGN) - 8;
    let mut out = (length as u64).to_le_bytes().to_vec();
    out.extend_from_slice(json.as_bytes());
    out.resize(8 + length, b' ');
    out
}

/// Bytes written at a time, and what their place in the file is a multiple of: a huge page. File systems that can then
/// keep the file in huge pages, which is how runtimes map it.
const CHUNK: usize = 2 << 20;

/// A file that grows beside its final place; removed unless finished.
struct Partial {
    file: File,
    /// What has yet to be written of the current chunk.
    chunk: Vec<u8>,
    path: PathBuf,
    place: PathBuf,
    written: usize,
    finished: bool,
}

impl Partial {
    fn create(place: &Path) -> Result<Partial> {
        // A link stays, what it points to is replaced.
        let place = std::fs::canonicalize(place).unwrap_or_else(|_| place.to_owned());
        if std::fs::metadata(&place).is_ok_and(|m| !m.is_file()) {
            let message = format!("{}: exists and is no regular file", place.display());
            return Err(Error::new(Kind::Usage, message).help("name a file with -o"));
        }
        let Some(name) = place.file_name() else {
            bail!(Usage, "`{}` names no file", place.display());
        };
        // Names may be taken: by a process of the same number that was killed, or by this one writing twice at once.
        for attempt in 0..1000 {
            let mut partial = name.to_owned();
            partial.push(format!(".partial-{}-{attempt}", std::process::id()));
            let path = place.with_file_name(partial);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok(Partial { file, chunk: vec![], path, place, written: 0, finished: false }),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io(&place, e)),
            }
        }
        let message = format!("{}: a thousand partial files lie beside it", place.display());
        Err(Error::new(Kind::Io, message).help("remove the files named *.partial-*"))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(CHUNK - self.chunk.len()));
            self.chunk.extend_from_slice(now);
            if self.chunk.len() == CHUNK {
                self.flush()?;
            }
            rest = later;
        }
        self.written += bytes.len();
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.file.write_all(&self.chunk).map_err(|e| self.failed(e))?;
        self.chunk.clear();
        Ok(())
    }

    /// Puts the header in front, makes it all durable and moves it to its place.
    fn finish(mut self, header: &[u8]) -> Result<()> {
        self.flush()?;
        let finish = |file: &mut File| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(header)?;
            file.sync_all()
        };
        finish(&mut self.file).map_err(|e| self.failed(e))?;
        std::fs::rename(&self.path, &self.place).map_err(|e| self.failed(e))?;
        self.finished = true;
        // The rename is durable once the directory is; some file systems cannot sync one.
        let directory = self.place.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if let Ok(directory) = File::open(directory) {
            let _ = directory.sync_all();
        }
        Ok(())
    }

    fn failed(&self, error: std::io::Error) -> Error {
        let full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
        let error = Error::io(&self.place, error);
        if full { error.help("free some space, or write to another disk with -o") } else { error }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing more can be done about a file that cannot be removed.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
#[path = "artifact_tests.rs"]
mod tests;
